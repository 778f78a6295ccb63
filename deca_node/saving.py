"""When a node's state goes to disk as it trains: at each visit's end, and within long ones."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torch import Tensor

from deca_node.control import Control
from deca_node.errors import DecaError
from deca_node.kept import KeptBlocks
from deca_node.standing import Standing
from deca_node.worker import TrainingThread

# On a slow disk saving within visits costs at most this part of the time.
SHARE = 1 / 50


class Saving:
    """See the module.

    Args:
        kept: the node's blocks, on disk.
        open_visit: x, m and v of the visit under way.
        standing: where the node stands.
        control: is told when its operator's wish is met.
        worker: on whose thread is saved, so that nothing changes meanwhile.
        every: seconds between two saves of an open visit; 0 saves none.
        at: visit and step of what is on disk.
        log: a structlog logger.

    Attributes:
        at: visit and step of what is on disk.
    """

    def __init__(
        self,
        kept: KeptBlocks,
        open_visit: Callable[[], Mapping[str, Tensor]],
        standing: Standing,
        control: Control,
        worker: TrainingThread,
        every: float,
        at: tuple[int, int],
        log: Any,
    ) -> None:
        self._kept, self._open_visit = kept, open_visit
        self._standing, self._control, self._worker = standing, control, worker
        self._every, self._log, self.at = every, log, at
        self._last = time.monotonic()
        self._beside: asyncio.Task[None] | None = None

    @property
    def is_due(self) -> bool:
        """Whether the open visit is to be saved after this step."""
        late = time.monotonic() - self._last >= self._every > 0
        return self._control.is_save_due or late

    async def within_visit(self) -> None:
        """Save the open visit, and all that is not on disk yet."""
        await self._save(lambda: self._kept.save(self._open_visit()))

    async def between_visits(self) -> None:
        """Save all that is not on disk yet."""
        if self._beside is not None:
            await self._beside
        await self._save(self._kept.save)

    def beside(self) -> None:
        """Save blocks that are final while others change; what comes meanwhile is saved next."""
        if self._beside is None or self._beside.done():
            self._beside = asyncio.create_task(self._save_beside())

    async def _save_beside(self) -> None:
        while not self._kept.is_saved and await self._save(self._kept.save, asyncio.to_thread):
            pass

    async def _save(
        self,
        save: Callable[[], None],
        run: Callable[[Callable[[], None]], Awaitable[None]] | None = None,
    ) -> bool:
        begin = time.monotonic()
        saved = True
        try:
            await (run or self._worker)(save)
        except DecaError as error:
            _tell(self._standing, error)
            saved = False
        at = self._standing.progress
        if saved:
            self.at = at.visit, at.step
        self._control.saved(done=saved)
        end = time.monotonic()
        if saved:
            self._log.debug("saved", visit=at.visit, step=at.step)
        self._last = end + max(0.0, (end - begin) / SHARE - self._every)
        return saved


def tried_to_save(standing: Standing, write: Callable[[], None]) -> bool:
    """Write; trouble with the disk is said and costs what was to be written, not the run.

    Returns:
        Whether it is written.
    """
    try:
        write()
    except DecaError as error:
        _tell(standing, error)
        return False
    return True


def _tell(standing: Standing, error: DecaError) -> None:
    standing.warn(f"not saved: {error}")
