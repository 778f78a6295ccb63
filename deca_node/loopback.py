"""The transport in memory: for tests and simulations, with loss, delay and death on request."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from deca_node.errors import ListenError, PeerRefused, PeerTimeout, PeerUnavailable
from deca_node.pb import node_pb2 as pb
from deca_node.transport import ControlHandler, Handler, StatusHandler

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """What a fault decides on: who calls whom, and what."""

    source: str
    target: str
    method: str
    request: object


@dataclass
class LoopbackNetwork:
    """Nodes that reach each other by address within one event loop.

    Attributes:
        delay: seconds that a message takes from one address to another: a call's request, its
            answer, each message of a stream. What is sent one right after the other is on its way
            at once.
        fault: called before every call and every streamed message (numbered from 0, unary calls
            have 0); raises a PeerError to fail it, or returns a replacement for the message.
        passage: further seconds until a streamed message of so many bytes has come through.
    """

    delay: Callable[[str, str], float] = lambda _source, _target: 0.0
    fault: Callable[[Call, int, bytes], bytes] = lambda _call, _index, message: message
    passage: Callable[[Call, int], float] = lambda _call, _nbytes: 0.0
    handlers: dict[str, Handler] = field(default_factory=dict)

    def transport(self, host: str, port: int) -> "LoopbackTransport":
        """A transport for one node."""
        return LoopbackTransport(self, host, port)

    def kill(self, address: str) -> None:
        """The node at the address vanishes without a word."""
        self.handlers.pop(address, None)


class LoopbackTransport:
    """See transport.Transport."""

    def __init__(self, network: LoopbackNetwork, host: str, port: int) -> None:
        self._network, self._host, self._port = network, host, port

    @property
    def address(self) -> str:
        """HOST:PORT of this node."""
        return f"{self._host}:{self._port}"

    async def listen(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None = None,
        socket: Path | None = None,
    ) -> int:
        """See Transport. Peers alone are answered."""
        del status, control, socket
        if self._port == 0:
            ports = [int(address.rpartition(":")[2]) for address in self._network.handlers]
            self._port = max(ports, default=0) + 1
        if self.address in self._network.handlers:
            raise ListenError(f"cannot listen on {self.address}: the port is taken")
        self._network.handlers[self.address] = handler
        return self._port

    def link(self, address: str) -> "LoopbackLink":
        """See Transport."""
        return LoopbackLink(self._network, self.address, address)

    async def close(self, grace: float) -> None:
        """See Transport."""
        del grace
        self._network.kill(self.address)


class LoopbackLink:
    """See transport.Link."""

    def __init__(self, network: LoopbackNetwork, source: str, target: str) -> None:
        self._network, self._source, self._target = network, source, target

    def _handler(self) -> Handler:
        try:
            return self._network.handlers[self._target]
        except KeyError:
            raise PeerUnavailable(f"{self._target}: nobody listens") from None

    async def _ask(self) -> None:
        """The request's way."""
        await asyncio.sleep(self._network.delay(self._source, self._target))
        self._handler()

    def _back(self) -> float:
        """Seconds of an answer's way."""
        return self._network.delay(self._target, self._source)

    async def _unary(
        self,
        method: str,
        request: object,
        timeout: float,
        answer: Callable[[Handler], Awaitable[T]],
    ) -> T:
        async def both_ways() -> T:
            await self._ask()
            self._network.fault(Call(self._source, self._target, method, request), 0, b"")
            said = await answer(self._handler())
            await asyncio.sleep(self._back())
            self._handler()
            return said

        try:
            async with asyncio.timeout(timeout):
                return await both_ways()
        except TimeoutError:
            raise PeerTimeout(f"{self._target}: no answer in time") from None

    async def hello(self, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """See Link."""
        source = self._source.rpartition(":")[0]
        return await self._unary("Hello", request, timeout, lambda h: h.hello(request, source))

    async def open_visit(self, request: pb.VisitOffer, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        return await self._unary("OpenVisit", request, timeout, lambda h: h.open_visit(request))

    async def settle_visit(self, request: pb.VisitDegree, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        return await self._unary("SettleVisit", request, timeout, lambda h: h.settle_visit(request))

    async def goodbye(self, request: pb.GoodbyeRequest, timeout: float) -> pb.GoodbyeReply:
        """See Link."""
        return await self._unary("Goodbye", request, timeout, lambda h: h.goodbye(request))

    async def list_blocks(self, request: pb.ListBlocksRequest, timeout: float) -> pb.BlockList:
        """See Link."""
        return await self._unary("ListBlocks", request, timeout, lambda h: h.list_blocks(request))

    async def renew(self, request: bytes, timeout: float) -> bytes:
        """See Link: nobody has certificates here."""
        del request, timeout
        raise PeerRefused("no_authority", f"{self._target}: there are no certificates here")

    def pull(self, request: pb.PullRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._stream("Pull", request, timeout, lambda h: h.pull(request))

    def fetch_block(self, request: pb.FetchBlockRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._stream("FetchBlock", request, timeout, lambda h: h.fetch_block(request))

    async def _stream(
        self,
        method: str,
        request: object,
        timeout: float,
        answer: Callable[[Handler], AsyncGenerator[bytes]],
    ) -> AsyncGenerator[bytes]:
        call = Call(self._source, self._target, method, request)
        loop, index, before = asyncio.get_running_loop(), 0, 0.0
        try:
            async with asyncio.timeout(timeout):
                await self._ask()
                asked = loop.time()
                async with aclosing(answer(self._handler())) as messages:
                    async for message in messages:
                        delay = self._back()
                        # What was there at once was sent right behind the message before it, so
                        # that it has most of its way behind it when that one is here.
                        left = delay if loop.time() > asked else max(0.0, delay - before)
                        await asyncio.sleep(left + self._network.passage(call, len(message)))
                        self._handler()
                        yield self._network.fault(call, index, message)
                        index, asked, before = index + 1, loop.time(), delay
        except TimeoutError:
            raise PeerTimeout(f"{self._target}: no answer in time") from None

    async def close(self) -> None:
        """See Link."""
