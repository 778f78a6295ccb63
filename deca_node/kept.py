"""The blocks that a node keeps: in its model, on its disk, for others and from others."""

import asyncio
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from torch import Tensor

from deca_node.blocks import Schedule, Visit
from deca_node.checkpoint import Changed, Checkpoint
from deca_node.checkpoint.incoming import Incoming
from deca_node.checkpoint.manifest import Progress
from deca_node.errors import OutputError, PayloadError
from deca_node.limits import MAX_HEADER_BYTES
from deca_node.models import LanguageModel
from deca_node.moments import slices
from deca_node.recovery import Kept
from deca_node.worker import TrainingThread


class KeptBlocks:
    """See the module; a member's ``Blocks``.

    Args:
        checkpoint: the state on disk.
        model: whose blocks they are.
        schedule: the run's.
        worker: the training thread, the only one that changes the model.
        progress: where the run is now.
        addresses: by name, where peers were last met, to be found again after a restart.

    Attributes:
        schedule: the run's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: LanguageModel,
        schedule: Schedule,
        worker: TrainingThread,
        progress: Callable[[], Progress],
        addresses: Callable[[], dict[str, str]],
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self.schedule = schedule
        self._worker = worker
        self._progress = progress
        self._addresses = addresses
        self._unsaved: dict[int, int] = {}  # blocks of which the disk has not the last visit's

    # --- for this node

    def saved_blocks(self) -> None:
        """Put the kept blocks into the model; to be called on the training thread.

        Raises:
            OutputError: a file of the state is damaged.
        """
        for block, saved in self._checkpoint.state.blocks.items():
            self._model.load_block(self.schedule.blocks[block], self._checkpoint.load(saved))

    def changed(self, visit: Visit) -> None:
        """A visit of a block has ended."""
        self._unsaved[visit.block] = visit.index

    def agreed(self, block: int) -> None:
        """The nodes have agreed on a block after the last visit."""
        self._unsaved[block] = self.schedule.visits

    @property
    def is_saved(self) -> bool:
        """Whether the disk has all visits that have ended, and how the run has."""
        disk, now = self._checkpoint.state.progress, self._progress()
        ends_alike = (disk.agreement, disk.finished) == (now.agreement, now.finished)
        return ends_alike and not self._unsaved

    @property
    def are_agreed(self) -> bool:
        """Whether all blocks have the values of a final agreement."""
        versions = self.versions()
        return all(
            versions.get(block) == self.schedule.visits
            for block in range(len(self.schedule.blocks))
        )

    def save(self, open_visit: Mapping[str, Tensor] | None = None) -> None:
        """Keep what changed, and the progress; nothing may change those blocks meanwhile.

        Others may be marked as changed while this runs on another thread.

        Args:
            open_visit: x, m and v of the visit under way; None between two visits.

        Raises:
            DiskFullError, OutputError: the state on disk is the previous one; what could not be
                kept is kept with the next.
        """
        opened = None if open_visit is None else self.schedule.visit(self._progress().visit).block
        blocks = {
            block: Changed(visit, self._model.block_tensors(self.schedule.blocks[block]))
            for block, visit in dict(self._unsaved).items()
            if block != opened  # its values are those of no visit's end
        }
        self._checkpoint.save(blocks, self._progress(), open_visit, self._addresses())
        for block, saved in blocks.items():
            if self._unsaved.get(block) == saved.visit:
                del self._unsaved[block]

    # --- for others (giving.Shelf)

    def kept(self) -> Mapping[int, Kept]:
        """See Shelf."""
        blocks = self._checkpoint.state.blocks
        return {block: Kept(each.visit, each.bytes, each.xxh3) for block, each in blocks.items()}

    def open(self, block: int, xxh3: str) -> BinaryIO | None:
        """See Shelf."""
        saved = self._checkpoint.state.blocks.get(block)
        if saved is None or saved.xxh3 != xxh3:
            return None
        try:
            return self._checkpoint.open(saved)
        except OutputError:
            return None

    async def read(self, file: BinaryIO, offset: int, size: int) -> bytes | memoryview:
        """See Shelf."""
        return await read_piece(file, offset, size)

    # --- from others (catchup.Store)

    def lost(self) -> frozenset[int]:
        """See Store."""
        return frozenset(self._checkpoint.lost) - self._unsaved.keys()

    def versions(self) -> Mapping[int, int]:
        """See Store."""
        blocks = self._checkpoint.state.blocks
        return {block: saved.visit for block, saved in blocks.items()} | self._unsaved

    def most_bytes(self) -> Mapping[int, int]:
        """See Store."""
        return most_bytes(self._model, self.schedule)

    def begun(self) -> Collection[str]:
        """See Store."""
        return self._checkpoint.begun()

    async def partial(self, block: int, xxh3: str) -> Incoming:
        """See Store. It reads what is there already."""
        return await asyncio.to_thread(self._checkpoint.incoming, block, xxh3)

    async def install(self, block: int, partial: Incoming, visit: int) -> None:
        """See Store."""
        await self._worker(functools.partial(self._install, block, partial, visit))

    def _install(self, block: int, incoming: Incoming, visit: int) -> None:
        layers = self.schedule.blocks[block]
        try:
            tensors = incoming.read()
            fits(tensors, self._model.block_tensors(layers))
        except PayloadError:
            incoming.discard()
            raise
        # The open visit's tensors go: it is passed over, or else begun anew with newer blocks.
        progress = replace(self._progress(), step=0)
        self._checkpoint.adopt({block: (incoming, visit)}, progress, self._addresses())
        self._model.load_block(layers, tensors)
        self._unsaved.pop(block, None)


async def read_piece(file: BinaryIO, offset: int, size: int) -> bytes | memoryview:
    """Up to ``size`` bytes of a file from ``offset`` on, without holding up the event loop.

    What the system has in memory comes at once: a trip to another thread costs nearly as much as
    reading 1 MB.
    """
    if sys.platform == "linux":
        buffer = np.empty(size, np.uint8).data
        with contextlib.suppress(OSError):  # not in memory, or a file system that cannot tell
            if got := os.preadv(file.fileno(), [buffer], offset, os.RWF_NOWAIT):
                return buffer[:got]
    return await asyncio.to_thread(os.pread, file.fileno(), size, offset)


def most_bytes(model: LanguageModel, schedule: Schedule) -> dict[int, int]:
    """By block, the largest size that a file of it can have."""
    return {
        block: MAX_HEADER_BYTES
        + sum(t.numel() * t.element_size() for t in model.block_tensors(layers).values())
        for block, layers in enumerate(schedule.blocks)
    }


def fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check what a peer gave for a block.

    Raises:
        PayloadError: a name, shape or dtype differs from the model's, or a value is not finite.
    """
    if wrong := sorted(tensors.keys() ^ expected.keys()):
        raise PayloadError("shape", f"tensor {wrong[0][:100]!r} is on one side only")
    for name, tensor in tensors.items():
        like = expected[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise PayloadError(
                "shape",
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected {like.dtype}"
                f" {tuple(like.shape)}",
            )
        flat = tensor.reshape(-1)
        if not all(np.isfinite(flat[part].float().numpy()).all() for part in slices(flat)):
            raise PayloadError("not_finite", f"NaN or infinity in {name}")
