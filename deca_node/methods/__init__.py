"""Fine-tuning methods: each answers the same questions, asked by rounds.py.

What is trainable in this stage (``open``), when and what is exchanged (``exchanges``,
``outgoing``), how arrivals are mixed (``intake``), what is done with the result (``settle``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from deca_node.batches import Batch
from deca_node.blocks import Visit
from deca_node.exchange import Mix
from deca_node.wire import Layout, Snapshot


@dataclass(frozen=True)
class Local:
    """A local mini-batch's loss and the norm of its gradient over the block."""

    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Settled:
    """What a step and its mix did to the block.

    Attributes:
        discrepancy: ‖x − x_next‖₂, local model against aggregated model; ``disagreement`` again
            in a method that has no use for it.
        h_norm: ‖h‖₂ after normalisation, 0 where there is no h.
        disagreement: ‖x½ − x_next‖₂, what the mix alone changed.
        clipped: where the mix is clipped, what was left of each neighbour's difference, 0 to 1.
    """

    discrepancy: float
    h_norm: float
    disagreement: float
    clipped: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol):
    """One fine-tuning method on one node.

    Called by one thread at a time, but for what ``intake`` gives: that comes from another
    thread, one call at a time, during ``ahead``, and of a stale method at any time between two
    calls of ``outgoing``. Of what was promised it may come during ``advance``, for elements of
    which the messages are made.
    """

    @property
    def stale(self) -> bool:
        """Whether a step's arrivals are mixed in by the next step's ``outgoing``."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether anything is done for the next batch while blocks travel."""
        ...

    @property
    def layout(self) -> Layout:
        """Names and shapes of what is exchanged in the open visit."""
        ...

    def open(self, visit: Visit, saved: Mapping[str, Tensor] | None) -> None:
        """Begin a visit, afresh or from ``saved`` (see ``state``)."""
        ...

    def gradient(self, batch: Batch) -> Local:
        """Local loss and gradient; changes no parameter, so that it can be abandoned."""
        ...

    def ahead(self, batch: Batch, stop: Callable[[], bool]) -> None:
        """Compute what the next batch's gradient needs and no mix can change.

        Called while arrivals are mixed in on another thread; ``stop()`` says to leave it at that.
        """
        ...

    def promise(self, serial: int) -> Snapshot | None:
        """What ``advance`` makes of ``outgoing``, message by message, as it updates the block.

        It may be handed out before ``advance`` is called. None where all of the update comes first:
        ``outgoing`` is to be called then.
        """
        ...

    def advance(self, step: int) -> None:
        """The local update with the gradient at hand."""
        ...

    def exchanges(self, step: int) -> bool:
        """Whether anything is exchanged after this step; the same on all nodes."""
        ...

    def outgoing(self, serial: int) -> Snapshot:
        """What is exchanged after the local update, as messages."""
        ...

    def intake(self, peer: str) -> Mix:
        """Where a neighbour's values go, which come in order and may end too early.

        They are mixed against what the neighbour has of this node: ``own``, where that is not what
        ``outgoing`` gave.
        """
        ...

    def absorb(self) -> None:
        """Take in what has arrived since ``outgoing``, when stale; nothing more is on its way."""
        ...

    def settle(self, step: int) -> Settled:
        """End the step with what arrived."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The open visit's state between two steps, for ``open`` to continue from."""
        ...

    def close(self) -> None:
        """End the visit; the block's values stay in the model."""
        ...
