"""Cables between nodes of one machine that can be pulled and put back, with no rights needed.

Every node advertises the port of a relay, which forwards to the port that it listens on. Who calls
is found by the caller's local port, so that a cut holds for one direction of calling between two
nodes. On a cut cable nothing is closed: bytes, new connections and the news that an end has closed
wait until it is healed, as when a plug is pulled.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from deca_node.waiting import Pulse

Pair = tuple[str, str]
"""Caller and called."""

CHUNK_BYTES = 1 << 18


class Cables:
    """Which pairs are cut now."""

    def __init__(self) -> None:
        self._cuts: dict[Pair, int] = {}
        self._healed = Pulse()

    def cut(self, pairs: Iterable[Pair]) -> None:
        """Pull cables; one that is pulled twice must be healed twice."""
        for pair in pairs:
            self._cuts[pair] = self._cuts.get(pair, 0) + 1

    def heal(self, pairs: Iterable[Pair]) -> None:
        """Undo one cut of each pair."""
        for pair in pairs:
            self._cuts[pair] -= 1
            if not self._cuts[pair]:
                del self._cuts[pair]
        self._healed.beat()

    async def whole(self, caller: str | None, called: str) -> None:
        """Return when the caller's cable is whole; a caller that is no node has no cable."""
        while caller is not None and (caller, called) in self._cuts:
            await self._healed.wait()


class Relay:
    """Forwards connections to one node.

    Args:
        node: its name.
        cables: shared by all relays.
        target: the port that the node listens on now, None while it does not.
        caller: the name of the node that a connection from a local port comes from, None when it
            is none.
    """

    def __init__(
        self,
        node: str,
        cables: Cables,
        target: Callable[[], int | None],
        caller: Callable[[int], str | None],
    ) -> None:
        self._node = node
        self._cables = cables
        self._target = target
        self._caller = caller
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self) -> int:
        """Start; returns the port on the loopback interface."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", limit=CHUNK_BYTES)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Give up the port and all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward: asyncio.StreamWriter | None = None
        try:
            caller = self._caller(writer.get_extra_info("peername")[1])
            await self._cables.whole(caller, self._node)
            port = self._target()
            if port is None:
                raise ConnectionRefusedError
            back, onward = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK_BYTES)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pump(reader, onward, caller))
                ways.create_task(self._pump(back, writer, caller))
        except* OSError:
            pass  # an end is gone; the other one is told below
        finally:
            for end in (writer, onward):
                if end is not None:
                    end.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, caller: str | None
    ) -> None:
        try:
            while data := await source.read(CHUNK_BYTES):
                await self._cables.whole(caller, self._node)
                sink.write(data)
                await sink.drain()
        except OSError:
            # A pulled cable does not tell that an end has gone, either. Not in a ``finally``, which
            # would wait for the cable in a task that is told to end.
            await self._cables.whole(caller, self._node)
            raise
        await self._cables.whole(caller, self._node)
        with contextlib.suppress(OSError):
            sink.write_eof()
