"""DECA (arXiv 2606.03209): block-wise Adam whose moments are corrected from the mix."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import structlog
import torch
from torch import Tensor

from deca_node import trainer
from deca_node.batches import Batch
from deca_node.blocks import Visit
from deca_node.exchange import Mix
from deca_node.methods import Local, Settled
from deca_node.mixing import STALE_STEP, mix_arrival
from deca_node.models import ActiveBlock, LanguageModel, Prefix
from deca_node.moments import (
    Rule,
    discrepancy_norm,
    fold,
    half_step,
    mixed_square,
    scale,
    slices,
)
from deca_node.robust import MEAN, Aggregation, Arrivals
from deca_node.wire import CHUNK_ELEMENTS, Layout, Pieces, Snapshot, metadata, promised, snapshot

_log = structlog.get_logger(__name__)


class Deca:
    """See methods.Method.

    Args:
        model: the model; its active block is this method's.
        rule: the update's constants.
        run: the run's name, for the headers of what is sent.
        node: this node's name, likewise.
        overlap: whether to compute ahead while blocks travel; the numbers are the same.
        stale: see Method; costs another copy of the block.
        aggregation: other than the mean, arrivals are kept until the mix (robust.py).
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule,
        run: str,
        node: str,
        *,
        overlap: bool = True,
        stale: bool = False,
        aggregation: Aggregation = MEAN,
    ) -> None:
        self._model = model
        self._stale = stale
        self._late = torch.empty(0)  # Σ w_ij (x½_j − x½_i) of the last step, when stale
        self._aggregation = aggregation
        self._kept: Arrivals | None = None  # where the mix is not the mean
        self._clipped: Mapping[str, float] = {}
        self._overlap = self._overlap_wished = overlap  # the first is given up where it fails
        self._exact: set[int] = set()  # depths at which a resumed pass was held against a whole one
        self._below = 0
        self._prefix: Prefix | None = None
        self._rule = rule
        self._run, self._node = run, node
        self._block: ActiveBlock | None = None
        self._m = self._v = torch.empty(0)
        self._own: Snapshot | None = None
        self._growing: Snapshot | None = None  # promised, of the update that comes next
        self._touched: set[int] = set()  # messages of the step that something was mixed into
        self._finite = True

    @property
    def stale(self) -> bool:
        """See Method. When true, (7) is x½ + ½ (W − I) x½ of the step before."""
        return self._stale

    @property
    def overlaps(self) -> bool:
        """See Method."""
        return self._overlap_wished

    @property
    def layout(self) -> Layout:
        """See Method."""
        return self._active.layout

    @property
    def _active(self) -> ActiveBlock:
        if self._block is None:
            raise RuntimeError("no visit is open")
        return self._block

    def open(self, visit: Visit, saved: Mapping[str, Tensor] | None) -> None:
        """See Method."""
        self._block = block = self._model.activate(visit.layers)
        self._below = visit.layers.start
        # On the CPU, where arrivals are: a copy to a busy GPU would hold up the event loop.
        robust = self._aggregation.rule != "mean"
        self._late = torch.zeros(block.layout.numel if self._stale and not robust else 0)
        self._kept = Arrivals(block.layout.numel, self._aggregation) if robust else None
        self._begin()
        if saved is not None:
            for name, tensor in self.state().items():
                tensor.copy_(saved[name])
            block.write_back()

    def _begin(self) -> None:
        """Optimizer state of a visit's beginning."""
        master = self._active.master
        self._m, self._v = torch.zeros_like(master), torch.zeros_like(master)

    def gradient(self, batch: Batch) -> Local:
        """See Method. Equation (3)."""
        prefix = self._checked_prefix(batch)
        loss, norm = trainer.gradient(self._model, self._active, batch, prefix)
        self._finite = math.isfinite(norm) and math.isfinite(loss)
        return Local(loss, norm)

    def ahead(self, batch: Batch, stop: Callable[[], bool]) -> None:
        """See Method. The layers below the block are frozen for the whole visit."""
        self._prefix = None
        if not (self._overlap and self._below):
            return
        try:
            self._prefix = self._model.prefix(batch, self._below, stop)
        except Exception as error:  # noqa: BLE001 - any model's own code; the gradient runs it again
            self._give_up_overlap(f"{type(error).__name__}: {error}")

    def _checked_prefix(self, batch: Batch) -> Prefix | None:
        """What was worked ahead for this batch, if a pass may go on from it.

        The first one of each depth is held against a whole pass: here, where nothing is mixed in
        meanwhile.
        """
        prefix, self._prefix = self._prefix, None
        if prefix is None or prefix.batch is not batch or prefix.depth in self._exact:
            return prefix if prefix is not None and prefix.batch is batch else None
        try:
            exact = self._model.resumes_exactly(prefix)
        except Exception as error:  # noqa: BLE001 - as above
            exact = False
            _log.debug("a pass that goes on from a prefix failed", error=repr(error))
        if exact:
            self._exact.add(prefix.depth)
        elif exact is False:
            self._give_up_overlap("its layers share more than a hidden state")
        return prefix if exact else None

    def _give_up_overlap(self, why: str) -> None:
        self._overlap = False
        _log.warning("nothing is worked ahead with this model", why=why)

    def advance(self, step: int) -> None:
        """See Method. Equations (4) to (6).

        A gradient that is not finite counts as 0, so that it reaches neither the moments nor the
        neighbours.
        """
        block = self._active
        growing, self._growing = self._growing, None
        with torch.no_grad():
            for part, gradient in block.gradients():
                usable = gradient if self._finite else torch.zeros_like(gradient)
                if growing is None:
                    self._update(part, usable, step)
                    continue
                for few in _messages(part, block.master):
                    self._update(
                        few, usable[few.start - part.start :][: few.stop - few.start], step
                    )
                    growing.grow(block.master, few.stop)
        block.drop_gradients()

    def _update(self, part: slice, gradient: Tensor, step: int) -> None:
        """The local update of a part of the master."""
        x, m, v = self._active.master[part], self._m[part], self._v[part]
        half_step(x, gradient, m, v, step, self._rule)

    def exchanges(self, step: int) -> bool:  # noqa: ARG002
        """See Method. Always."""
        return True

    def promise(self, serial: int) -> Snapshot | None:
        """See Method. When stale the snapshot before is mixed against until ``outgoing``."""
        if not self._overlap_wished or self._stale:
            return None
        self._touched.clear()
        self._own = self._growing = promised(
            self.layout, serial, metadata(self._run, self._node, serial)
        )
        return self._own

    def outgoing(self, serial: int) -> Snapshot:
        """See Method. The snapshot is x½, the only further copy of the block."""
        about = metadata(self._run, self._node, serial)
        self._touched.clear()
        self._own = None  # when stale it is there still, and is not to be held beside the new one
        self._own = snapshot(self._active.master, self.layout, serial, about)
        self._take_late()
        return self._own

    def absorb(self) -> None:
        """See Method."""
        self._take_late()
        self._active.write_back()

    def intake(self, peer: str) -> Mix:
        """See Method. Equation (7) needs no more of a neighbour than its weight."""
        return self.mix if self._kept is None else partial(self._keep, self._kept, peer)

    def _take_kept(self) -> None:
        """Mix what was kept in place of being mixed as it came."""
        if self._kept is not None and not self._stale:
            self._clipped = self._kept.mix_into(self._active.master)

    def _take_late(self) -> None:
        master = self._active.master
        if self._kept is not None and self._stale:
            self._clipped = self._kept.mix_into(master, STALE_STEP)
        for part in slices(self._late):
            master[part].add_(self._late[part].to(master.device), alpha=STALE_STEP)
            self._late[part].zero_()

    def mix(self, first: int, values: Tensor, weight: float, own: Pieces | None = None) -> None:
        """Equation (7), in the master, slice by slice."""
        sent = self._published(own)
        mixed = self._late if self._stale else self._active.master
        end = first + values.numel()
        messages = range(first // CHUNK_ELEMENTS, -(-end // CHUNK_ELEMENTS))
        # Until something is mixed into a message its values are x½ themselves, as published,
        # but on compressed edges, whose neighbours have an x̂ in its place.
        untouched = (
            own is None
            and not self._stale
            and mixed.device.type == "cpu"
            and self._touched.isdisjoint(messages)
        )
        self._touched.update(messages)
        if untouched:
            part = mixed[first:end]
            mix_arrival(part, part, values, weight)
        else:
            for low, half in sent.pieces(first, end - first):
                part = mixed[low : low + half.numel()]
                mix_arrival(part, half, values[low - first :][: half.numel()], weight)

    def _keep(
        self,
        arrivals: Arrivals,
        peer: str,
        first: int,
        values: Tensor,
        weight: float,
        own: Pieces | None = None,
    ) -> None:
        """The same where it must wait for the other neighbours."""
        for low, half in self._published(own).pieces(first, values.numel()):
            arrivals.take(peer, low, half, values[low - first :][: half.numel()], weight)

    def _published(self, own: Pieces | None) -> Pieces:
        """What a neighbour has of this node."""
        sent = own or self._own
        if sent is None:
            raise RuntimeError("nothing was published in this step")
        return sent

    def settle(self, step: int) -> Settled:
        """See Method. Equations (8) to (10), in two passes over the block; without BMA in one."""
        self._take_kept()
        settled = self._counted() if self._rule.bma == "off" else self._folded(step)
        if not self._stale:
            self._own = None
        self._active.write_back()
        return settled

    def _counted(self) -> Settled:
        """What the mix has changed, and nothing is made of it."""
        mixed = self._mixed()
        return Settled(mixed, 0.0, mixed, self._clipped)

    def _mixed(self) -> float:
        """‖x½ − x_next‖₂."""
        master = self._active.master
        return math.sqrt(sum(mixed_square(half, master[part]) for part, half in self._halves()))

    def _folded(self, step: int) -> Settled:
        master = self._active.master
        total = mixed = 0.0
        for part, half in self._halves():
            t, d = discrepancy_norm(
                half, master[part], self._m[part], self._v[part], step, self._rule
            )
            total, mixed = total + t, mixed + d
        norm = math.sqrt(total)
        factor = scale(norm, self._rule)
        for part, half in self._halves():
            fold(half, master[part], self._m[part], self._v[part], step, self._rule, factor)
        return Settled(norm, norm * factor, math.sqrt(mixed), self._clipped)

    def _halves(self) -> Iterator[tuple[slice, Tensor]]:
        """x½ by slices; without a published snapshot nothing was mixed and x½ is x_next."""
        master = self._active.master
        if self._own is None:
            yield slice(0, master.numel()), master
            return
        for index, low in enumerate(range(0, master.numel(), CHUNK_ELEMENTS)):
            half = self._own.values(index).to(master.device)
            yield slice(low, low + half.numel()), half

    def state(self) -> dict[str, Tensor]:
        """See Method."""
        return {"x": self._active.master, "m": self._m, "v": self._v}

    def close(self) -> None:
        """See Method."""
        self._model.release()
        self._block = self._prefix = self._own = self._growing = None
        self._m = self._v = self._late = torch.empty(0)
        self._kept = None


def _messages(part: slice, master: Tensor) -> Iterator[slice]:
    """A part of the master as messages take it; on a GPU whole, since slices cost launches."""
    size = CHUNK_ELEMENTS if master.device.type == "cpu" else part.stop - part.start
    return (slice(low, min(low + size, part.stop)) for low in range(part.start, part.stop, size))
