"""Which layers form a block, and which block is active when. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BlockOrder = Literal["ascending", "descending", "random"]


@dataclass(frozen=True, order=True)
class Cursor:
    """A moment of a run: round t, position k within the round, step r within the visit."""

    round: int
    position: int
    step: int


@dataclass(frozen=True)
class Visit:
    """One visit of one block: ``steps`` inner steps on the same block.

    ``index`` counts visits from 0 over the whole run; every node derives the same list.
    """

    index: int
    round: int
    position: int
    block: int
    layers: range


def partition_layers(n_layers: int, layers_per_block: int) -> list[range]:
    """Split layers 0..n_layers-1 into consecutive blocks; the last may be smaller.

    Raises:
        ValueError: either number is below 1.
    """
    if n_layers < 1 or layers_per_block < 1:
        raise ValueError("a model needs at least one layer and a block at least one layer")
    return [
        range(low, min(low + layers_per_block, n_layers))
        for low in range(0, n_layers, layers_per_block)
    ]


@dataclass(frozen=True)
class Schedule:
    """The order of a run: ``rounds`` rounds, each visiting every block once for ``steps`` steps."""

    blocks: Sequence[range]
    rounds: int
    steps: int
    order: BlockOrder
    seed: int

    @property
    def visits(self) -> int:
        """Number of block visits in the run."""
        return self.rounds * len(self.blocks)

    @property
    def total_steps(self) -> int:
        """Number of inner steps in the run."""
        return self.visits * self.steps

    def round_order(self, round_: int) -> list[int]:
        """Blocks of a round in visiting order; ``random`` derives it from the run's seed."""
        order = list(range(len(self.blocks)))
        if self.order == "descending":
            order.reverse()
        elif self.order == "random":
            # A string seed is hashed with SHA-512: the same on every machine and Python.
            random.Random(f"deca/order/{self.seed}/{round_}").shuffle(order)  # noqa: S311
        return order

    def visit(self, index: int) -> Visit:
        """Return visit number ``index`` (0-based).

        Raises:
            IndexError: outside the run.
        """
        if not 0 <= index < self.visits:
            raise IndexError(f"visit {index} of {self.visits}")
        round_, position = divmod(index, len(self.blocks))
        block = self.round_order(round_)[position]
        return Visit(index, round_, position, block, self.blocks[block])

    def serial(self, visit: int, step: int) -> int:
        """Number a step over the whole run from 0: the tag every message carries."""
        return visit * self.steps + step

    def cursor(self, visit: int, step: int) -> Cursor:
        """Round, position and step of a step of a visit; the end of the run is round ``rounds``."""
        round_, position = divmod(visit, len(self.blocks))
        return Cursor(round_, position, step)
