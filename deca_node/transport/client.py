"""Calls to other nodes: a link, and asking one or many for their status."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from deca_node.errors import PeerError, PeerRefused, PeerTimeout, PeerUnavailable, known_reason
from deca_node.events import printable
from deca_node.pb import node_pb2 as pb
from deca_node.transport.connection import (
    BUSY,
    CLIENT_OPTIONS,
    CONTROL,
    PEER,
    STATUS,
    Credentials,
    Guard,
    target,
)
from deca_node.trust import is_name

# A connection that another has replaced may end the calls under way on it.
OLD_CONNECTION_SECONDS = 60.0
# Connections to a node are made anew so often: the certificate of who answers is looked at by TLS
# alone, and only then.
RECONNECT_SECONDS = 3600.0


def _path(service: Any, method: str) -> str:
    return f"/{service.full_name}/{method}"


# What gRPC says where no node is, by a part of it, and what that means.
_OTHERS = (
    ("http1.x server", "a web server is there (a dashboard?), not a node"),
    ("Failed parsing HTTP/2", "another program is there, not a node"),
)
# The same of a handshake that failed.
_HANDSHAKES = (
    ("WRONG_VERSION_NUMBER", "answers, but not under TLS: a node without it, or another program"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate has expired or was issued by another authority"),
    ("Hostname Verification Check failed", "its certificate names another node or another run"),
)


def _translate(error: grpc.aio.AioRpcError, address: str) -> PeerError:
    # Who answers chooses the text, which ends in logs, statuses and terminals.
    details, code = str(error.details() or ""), error.code()
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return PeerTimeout(f"{address}: no answer in time")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        for sign, text in _HANDSHAKES:
            if sign in details:
                return PeerRefused("handshake", f"{address}: {text}")
        # Of "failed to connect to all addresses; last error: …: Connection refused" the end tells.
        details = details.rpartition("; last error: ")[2]
        details = details.rpartition("Failed to connect to remote host: ")[2]
        details = next((text for sign, text in _OTHERS if sign in details), details)
        return PeerUnavailable(f"{address}: {printable(details)}")
    details = printable(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details == BUSY:
        return PeerRefused("busy", f"{address}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PeerRefused("too_long", f"{address}: {details}")
    if code is not grpc.StatusCode.FAILED_PRECONDITION:
        return PeerRefused(known_reason(code.name.lower()), f"{address}: {details}")
    reason, _, text = details.partition(": ")  # as _refuse wrote it
    return PeerRefused(known_reason(reason), f"{address}: {text}")


class _Connection:
    """A channel and the calls that can be made on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.unary: dict[str, Callable[..., Awaitable[Any]]] = {}
        asked = {"GetStatus", "ListPeers", "GetHistory"}
        for service, names in ((PEER, None), (STATUS, asked), (CONTROL, None)):
            for method in service.methods:
                if method.server_streaming or (names and method.name not in names):
                    continue
                self.unary[method.name] = channel.unary_unary(
                    _path(service, method.name),
                    request_serializer=GetMessageClass(method.input_type).SerializeToString,
                    response_deserializer=GetMessageClass(method.output_type).FromString,
                )
        # No deserializer: the payload is read where it lies (wire.parse).
        self.pull = channel.unary_stream(
            _path(PEER, "Pull"), request_serializer=pb.PullRequest.SerializeToString
        )
        self.fetch = channel.unary_stream(
            _path(PEER, "FetchBlock"), request_serializer=pb.FetchBlockRequest.SerializeToString
        )
        self.watch = channel.unary_stream(
            _path(STATUS, "WatchStatus"),
            request_serializer=pb.WatchStatusRequest.SerializeToString,
            response_deserializer=pb.NodeStatus.FromString,
        )


class GrpcLink:
    """Calls to one address, in plain text without a guard.

    Under TLS the first greeting accepts any node of the run and learns its name; all else goes over
    a second connection, which that node alone can answer.

    Args:
        address: HOST:PORT.
        guard: of the calling node.
        credentials: in place of a guard, for calls that no node's name matters to.
    """

    def __init__(
        self, address: str, guard: Guard | None = None, credentials: Credentials | None = None
    ) -> None:
        self.address = address
        self._guard = guard
        self._closed = False
        self._node: str | None = None  # whose certificate the second connection asks for
        self._uncertain = True  # somebody else may be there now: ask for the name again
        self._outdated = False  # the second connection is to be replaced whoever answers
        self._credentials = credentials or (guard.credentials() if guard else None)
        self._since = time.monotonic()
        self._connection = self._connect()
        self._named = self._connection
        self._closing: set[asyncio.Task[None]] = set()
        self._compared = 0, 0  # digests of revocations, ours and theirs, whose lists were swapped

    def _connect(self, node: str | None = None) -> _Connection:
        if self._credentials is None:
            return _Connection(
                grpc.aio.insecure_channel(target(self.address), options=CLIENT_OPTIONS)
            )
        return _Connection(self._credentials.channel(self.address, node))

    async def _call(
        self, name: str, request: Any, timeout: float, connection: _Connection | None = None
    ) -> Any:
        with self._translated():
            reply = await (connection or self._proven()).unary[name](request, timeout=timeout)
        if reply is None:  # what grpc gives for bytes that it cannot decode
            raise PeerRefused("malformed", f"{self.address}: not an answer to {name}")
        return reply

    def _proven(self) -> _Connection:
        """The connection on which only the node that was met can answer."""
        if self._guard is not None:
            if self._node is None:
                raise PeerUnavailable(f"{self.address}: not met yet")
            self._guard.vouch(self._node)
        return self._named

    async def _greet(self, guard: Guard, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """Greet, and be sure of who answers."""
        request.revoked = guard.digest()
        now = time.monotonic()
        if guard.credentials() is not self._credentials or now - self._since > RECONNECT_SECONDS:
            self._credentials, self._since = guard.credentials(), now
            old, self._connection = self._connection, self._connect()
            self._uncertain = self._outdated = True
            self._leave(old)
        try:
            if self._uncertain:
                first = await self._call("Hello", request, timeout, self._connection)
                self._name(guard, first.sender.node)
            reply: pb.HelloReply = await self._call("Hello", request, timeout)
        except PeerError:
            self._uncertain = True
            raise
        if reply.sender.node != self._node:
            raise PeerRefused(
                "impostor",
                f"{self.address}: has the certificate of {self._node}, says it is another",
            )
        self._uncertain = False
        digests = guard.digest(), reply.revoked
        if digests[0] != digests[1] and digests != self._compared:
            told = await self._call("ExchangeRevocations", guard.revocations(), timeout)
            guard.learn(told)
            self._compared = digests
            guard.vouch(reply.sender.node)
        return reply

    def _name(self, guard: Guard, node: str) -> None:
        """From now on only this node is to answer."""
        if not is_name(node):
            raise PeerRefused("bad_name", f"{self.address}: no name of a node")
        guard.vouch(node)
        if node != self._node or self._outdated:
            self._outdated = False
            old, self._node, self._named = self._named, node, self._connect(node)
            self._leave(old)

    def _leave(self, connection: _Connection) -> None:
        """Close a connection that is used no more; what is under way on it may end."""
        if connection not in (self._connection, self._named):
            closing = asyncio.ensure_future(connection.channel.close(OLD_CONNECTION_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def hello(self, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """See Link."""
        if self._guard is not None:
            return await self._greet(self._guard, request, timeout)
        reply: pb.HelloReply = await self._call("Hello", request, timeout)
        return reply

    async def renew(self, request: bytes, timeout: float) -> bytes:
        """See Link."""
        asked = pb.RenewRequest(request=request)
        reply: pb.RenewReply = await self._call("Renew", asked, timeout)
        return reply.certificate

    async def exchange_revocations(self, ours: pb.Revocations, timeout: float) -> pb.Revocations:
        """Tell a node who is out of the run; returns what it knows."""
        return await self._call("ExchangeRevocations", ours, timeout)  # type: ignore[no-any-return]

    async def open_visit(self, request: pb.VisitOffer, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        reply: pb.VisitAnswer = await self._call("OpenVisit", request, timeout)
        return reply

    async def settle_visit(self, request: pb.VisitDegree, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        reply: pb.VisitAnswer = await self._call("SettleVisit", request, timeout)
        return reply

    async def goodbye(self, request: pb.GoodbyeRequest, timeout: float) -> pb.GoodbyeReply:
        """See Link."""
        reply: pb.GoodbyeReply = await self._call("Goodbye", request, timeout)
        return reply

    async def list_blocks(self, request: pb.ListBlocksRequest, timeout: float) -> pb.BlockList:
        """See Link."""
        reply: pb.BlockList = await self._call("ListBlocks", request, timeout)
        return reply

    def pull(self, request: pb.PullRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._messages(lambda: self._proven().pull(request, timeout=timeout))

    def fetch_block(self, request: pb.FetchBlockRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._messages(lambda: self._proven().fetch(request, timeout=timeout))

    async def _messages(self, begin: Callable[[], Any]) -> AsyncGenerator[bytes]:
        with self._translated():
            call = begin()
            coming = asyncio.ensure_future(call.read())
            try:
                while (message := await coming) is not grpc.aio.EOF:
                    # The next one is asked for before this one is looked at, so that it is taken
                    # apart by gRPC's threads meanwhile.
                    coming = asyncio.ensure_future(call.read())
                    await asyncio.sleep(0)  # the task begins
                    self._proven()  # it may be out of the run since it was asked
                    yield message
            finally:
                call.cancel()
                coming.cancel()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of grpc as ours; what it raises when we have closed the channel as well."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.address) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise PeerUnavailable(f"{self.address}: given up") from None

    async def get_status(self, timeout: float) -> pb.NodeStatus:
        """The node's status."""
        status: pb.NodeStatus = await self._call("GetStatus", pb.GetStatusRequest(), timeout)
        return status

    async def control(self, verb: str, request: Any, timeout: float) -> Any:
        """Tell the node something, as its operator: a call of the service Control by its name."""
        return await self._call(verb, request, timeout)

    async def get_history(
        self, after: int | None, limit: int, timeout: float
    ) -> Sequence[pb.HistoryPoint]:
        """At most ``limit`` points of the node's steps after step ``after``, of all if None."""
        request = pb.GetHistoryRequest(after=after, limit=limit)
        reply: pb.HistoryReply = await self._call("GetHistory", request, timeout)
        return reply.points

    async def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """The node's status, again and again until it ends."""
        call = self._named.watch(pb.WatchStatusRequest(interval_seconds=interval))
        try:
            async for status in call:
                yield status
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.address) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """See Link."""
        self._closed = True
        for task in list(self._closing):
            task.cancel()
        for connection in {self._connection, self._named}:
            await connection.channel.close()


async def ask_status(
    address: str, timeout: float, credentials: Credentials | None = None
) -> pb.NodeStatus:
    """One node's status, asked in plain text without credentials.

    Raises:
        PeerError: it does not answer as a deca node does.
    """
    link = GrpcLink(address, credentials=credentials)
    try:
        async with asyncio.timeout(timeout + 1):
            return await link.get_status(timeout)
    except TimeoutError:
        raise PeerTimeout(f"{address}: no answer in {timeout:g} s") from None
    finally:
        await link.close()


async def ask_all(
    addresses: Sequence[str],
    timeout: float,
    credentials: Mapping[str, Credentials] | None = None,
) -> list[pb.NodeStatus | PeerError]:
    """Status of several nodes at once; a node that does not answer gives its error.

    Args:
        addresses: HOST:PORT each.
        timeout: seconds.
        credentials: by address, what to show; all others are asked in plain text.
    """

    async def one(address: str) -> pb.NodeStatus | PeerError:
        try:
            return await ask_status(address, timeout, (credentials or {}).get(address))
        except PeerError as error:
            return error

    return list(await asyncio.gather(*map(one, addresses)))
