"""Finding contacts by DNS: the addresses of names that stand for all nodes of a run.

A headless service of Kubernetes, or several A records of one name, lists machines that come and go;
so names are resolved again and again, and every address is proposed. The system's own resolver is
asked: it knows /etc/hosts, search domains and the cluster's name server, and needs no dependency.
What a DNS library would add, records' lifetimes and SRV, is not needed: we ask at the pace at which
a node may be missed, and the port is part of the setting.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence

import structlog

from deca_node.addresses import joined, split
from deca_node.limits import MAX_NAMED_ADDRESSES

# (host, port) -> IP addresses; raises OSError where there are none.
Resolve = Callable[[str, int], Sequence[str]]

_log = structlog.get_logger(__name__)


def resolve(host: str, port: int) -> list[str]:
    """IP addresses of a host, from this machine's resolver; blocks for as long as that takes.

    Raises:
        OSError: the name is unknown, or no name server answers.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # a label that IDNA cannot hold
        raise OSError(str(error)) from None
    return [str(sockaddr[0]) for _, _, _, _, sockaddr in found]


class NamedPeers:
    """Proposes what names stand for, until it is stopped.

    Args:
        names: HOST:PORT, as in network.dns_peers.
        every: seconds from an answer to the next question.
        sighted: called with IP:PORT of every address, at every answer.
        resolver: in place of this machine's.

    Attributes:
        failing: why a name could not be resolved the last time, by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        every: float,
        sighted: Callable[[str], None],
        resolver: Resolve = resolve,
    ) -> None:
        self.failing: dict[str, str] = {}
        self._every, self._sighted, self._resolver = every, sighted, resolver
        self._tasks = [asyncio.create_task(self._follow(name)) for name in names]

    async def stop(self) -> None:
        """Ask no more; a question under way is left to itself."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, name: str) -> None:
        host, port = split(name)
        while True:
            try:
                found = await _in_a_thread(lambda: self._resolver(host, port))
            except Exception as error:  # noqa: BLE001 - no memory, no thread: it may have one later
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                if self.failing.get(name) != reason:
                    _log.warning("name not resolved, asking again", name=name, reason=reason)
                self.failing[name] = reason
            else:
                self.failing.pop(name, None)
                for address in callable_addresses(found):
                    self._sighted(joined(address, port))
            await asyncio.sleep(self._every)


def callable_addresses(found: Sequence[str]) -> list[str]:
    """The addresses of an answer that can be called, each once and in its order, within a bound."""
    good = []
    for text in dict.fromkeys(found):
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(text)
            if not (address.is_unspecified or address.is_multicast):
                good.append(text)
    return good[:MAX_NAMED_ADDRESSES]


async def _in_a_thread(ask: Callable[[], Sequence[str]]) -> Sequence[str]:
    """The answer of a call that may block for a minute, and must not hold up this node's end.

    The loop's own threads are waited for when it closes; this one is not. Raises what the call
    raises, and RuntimeError where no thread can be had.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Sequence[str]] = loop.create_future()

    def settle(answer: Sequence[str] | None, error: Exception | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(answer or ())

    def work() -> None:
        answer, trouble = None, None
        try:
            answer = ask()
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits it
            trouble = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, answer, trouble)

    threading.Thread(target=work, name="dns", daemon=True).start()
    return await future
