"""Asks nodes for their status and curve over gRPC, once or again and again, for the panorama."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from deca_node.errors import DecaError, PeerRefused
from deca_node.limits import MAX_HISTORY_POINTS, MAX_SURVEYED
from deca_node.panorama import Panorama
from deca_node.pb import node_pb2 as pb

# An answer takes milliseconds; a node whose machine is busy a second.
ASK_SECONDS = 4.0
# With more nodes than this each is asked more seldom, so that asking stays a small load.
UNHURRIED = 32
# Asked at once in a single look: a laptop's look at a large swarm is to stay a look.
ASK_AT_ONCE = 16


class Asked(Protocol):
    """A link to one node, as GrpcLink has it."""

    async def get_status(self, timeout: float) -> pb.NodeStatus:
        """The node's status."""
        ...

    async def get_history(
        self, after: int | None, limit: int, timeout: float
    ) -> Sequence[pb.HistoryPoint]:
        """The node's steps after one."""
        ...

    async def close(self) -> None:
        """Give up the connection."""
        ...


class Observer:
    """Asks every address of the panorama.

    Args:
        panorama: what is filled.
        link: makes a link to HOST:PORT.
        given: the operator's addresses, or those of this machine's nodes, asked again and again.
        interval: seconds between two questions to a node.
        clock: seconds.
    """

    def __init__(
        self,
        panorama: Panorama,
        link: Callable[[str], Awaitable[Asked]],
        given: Callable[[], Iterable[str]],
        interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._panorama = panorama
        self._link = link
        self._given = given
        self._interval = interval
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def interval(self) -> float:
        """Seconds between two questions to a node."""
        return self._interval * max(1.0, len(self._tasks) / UNHURRIED)

    async def look(self) -> None:
        """Ask for the status of each once, then of those that they name, and so on."""
        panorama, asked = self._panorama, set[str]()
        panorama.give(self._given())
        slots = asyncio.Semaphore(ASK_AT_ONCE)

        async def one(address: str) -> None:
            async with slots:
                try:
                    link = await self._link(address)
                    try:
                        status = await link.get_status(ASK_SECONDS)
                        panorama.answered(address, status, self._clock())
                    finally:
                        await link.close()
                except Exception as error:  # noqa: BLE001 - see _why
                    panorama.failed(address, _why(address, error), self._clock())

        while True:
            coming = [address for address in panorama.addresses() if address not in asked]
            coming = coming[: MAX_SURVEYED - len(asked)]
            if not coming:
                return
            asked.update(coming)
            await asyncio.gather(*map(one, coming))

    async def run(self, ticked: Callable[[], None]) -> None:
        """Follow each with a task of its own until cancelled.

        ``ticked`` is called whenever there may be news.
        """
        try:
            while True:
                self._panorama.give(self._given())
                wanted = self._panorama.addresses()
                for address in self._tasks.keys() - set(wanted):
                    self._tasks.pop(address).cancel()
                for address in wanted:
                    if address not in self._tasks:
                        self._tasks[address] = asyncio.create_task(self._follow(address))
                ticked()
                await asyncio.sleep(self._interval)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self, address: str) -> None:
        while True:
            # A new link after a failure: a node may come back that wants to be asked otherwise.
            try:
                link = await self._link(address)
                try:
                    while True:
                        await self._ask(address, link)
                        await asyncio.sleep(self.interval)
                finally:
                    await link.close()
            except Exception as error:  # noqa: BLE001 - see _why
                self._panorama.failed(address, _why(address, error), self._clock())
            await asyncio.sleep(self.interval)

    async def _ask(self, address: str, link: Asked) -> None:
        status = await link.get_status(ASK_SECONDS)
        panorama = self._panorama
        panorama.answered(address, status, self._clock())
        seen = panorama.seen_until(address)
        if not status.loss or seen == status.steps_done - 1:
            return
        try:
            points = await link.get_history(seen, MAX_HISTORY_POINTS, ASK_SECONDS)
        except PeerRefused:
            # An older node: at least the steps that it is found at.
            step = max(status.steps_done, 1) - 1
            points = [
                pb.HistoryPoint(
                    first=step,
                    last=step,
                    loss=status.loss,
                    gradient_norm=status.gradient_norm,
                    disagreement=status.disagreement,
                )
            ]
        panorama.steps_made(address, points)


def _why(address: str, error: Exception) -> str:
    """Why a node could not be asked.

    Whatever it was, of one node of many: what an address, a certificate or a status makes this
    machine's libraries raise must not end the look at the others.
    """
    if isinstance(error, DecaError):
        return str(error)
    return f"{address}: {type(error).__name__}: {error}"
