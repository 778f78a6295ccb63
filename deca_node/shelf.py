"""The blocks that a simulated node keeps: in memory, by reference, for as long as nobody asks.

A daemon keeps them on its disk (kept.py). Here a block at the end of a visit is the model's own
memory, which a twin never writes to again (LanguageModel.twin); a file is made of it only for one
that catches up.
"""

import io
from collections.abc import Collection, Mapping
from typing import BinaryIO

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from deca_node.blocks import Schedule, Visit
from deca_node.errors import PayloadError
from deca_node.kept import fits, most_bytes
from deca_node.models import LanguageModel
from deca_node.recovery import Kept


class Part:
    """A block's file that is being fetched (catchup.Partial)."""

    def __init__(self, xxh3: str) -> None:
        self.xxh3, self.data = xxh3, bytearray()

    @property
    def size(self) -> int:
        """See Partial."""
        return len(self.data)

    def write(self, data: bytes | memoryview) -> None:
        """See Partial."""
        self.data += data

    def close(self) -> None:
        """See Partial. What is there stays."""


class HeldBlocks:
    """See the module; a member's ``Blocks``. It outlives its node, as a disk does.

    Args:
        schedule: the run's.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._model: LanguageModel | None = None
        self._held: dict[int, tuple[int, Mapping[str, Tensor]]] = {}
        self._digests: dict[int, Kept] = {}
        self._parts: dict[tuple[int, str], Part] = {}

    @property
    def model(self) -> LanguageModel:
        """The model of the node's present life."""
        if self._model is None:
            raise RuntimeError("this node has not begun")
        return self._model

    def put_into(self, model: LanguageModel) -> None:
        """Begin a life of the node with this model, which gets what is held."""
        self._model = model
        for block, (_, tensors) in self._held.items():
            model.load_block(self._schedule.blocks[block], tensors)

    def closed(self, visit: Visit) -> Mapping[str, Tensor]:
        """A visit of a block has ended; its values."""
        self._held[visit.block] = visit.index, self.model.block_tensors(visit.layers)
        return self._held[visit.block][1]

    def lost(self) -> frozenset[int]:
        """See Store: memory is not damaged."""
        return frozenset()

    # --- for others (giving.Shelf)

    def kept(self) -> Mapping[int, Kept]:
        """See Shelf."""
        for block, (visit, tensors) in self._held.items():
            known = self._digests.get(block)
            if known is None or known.visit != visit:
                data = save(dict(tensors))
                digest = xxhash.xxh3_128_hexdigest(data)
                self._digests[block] = Kept(visit, len(data), digest)
        return dict(self._digests)

    def open(self, block: int, xxh3: str) -> BinaryIO | None:
        """See Shelf."""
        found = self.kept().get(block)
        if found is None or found.xxh3 != xxh3:
            return None
        return io.BytesIO(save(dict(self._held[block][1])))

    async def read(self, file: BinaryIO, offset: int, size: int) -> bytes:
        """See Shelf."""
        file.seek(offset)
        return file.read(size)

    # --- from others (catchup.Store)

    def versions(self) -> Mapping[int, int]:
        """See Store."""
        return {block: visit for block, (visit, _) in self._held.items()}

    def most_bytes(self) -> Mapping[int, int]:
        """See Store."""
        return most_bytes(self.model, self._schedule)

    def begun(self) -> Collection[str]:
        """See Store."""
        return {xxh3 for _, xxh3 in self._parts}

    async def partial(self, block: int, xxh3: str) -> Part:
        """See Store."""
        return self._parts.setdefault((block, xxh3), Part(xxh3))

    async def install(self, block: int, partial: Part, visit: int) -> None:
        """See Store."""
        data = bytes(partial.data)
        # Those of slower givers, too: as on a disk (checkpoint).
        self._parts = {key: part for key, part in self._parts.items() if key[0] != block}
        if xxhash.xxh3_128_hexdigest(data) != partial.xxh3:
            raise PayloadError("digest", "not what was promised")
        layers = self._schedule.blocks[block]
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise PayloadError("header", str(error)) from None
        fits(tensors, self.model.block_tensors(layers))
        self.model.load_block(layers, tensors)
        self._held[block] = visit, self.model.block_tensors(layers)
