"""DeCAF: as Dec-LoRA, but what is mixed are the products B A, which are then factored anew.

A neighbour's factors can be used together only, so they are kept until the step's end: as many
times the adapters as there are neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deca_node.blocks import Visit
from deca_node.exchange import Mix
from deca_node.lowrank import Split, distance, refactored
from deca_node.methods import Settled
from deca_node.methods.dec_lora import DecLora
from deca_node.models import LanguageModel, wide_device
from deca_node.moments import Rule, half_step
from deca_node.wire import Pieces


@dataclass
class _Arrival:
    """What came of a neighbour: float32 values on the CPU, how many of them, and its weight."""

    values: Tensor
    count: int = 0
    weight: float = 0.0


class Decaf(DecLora):
    """See methods.Method; the model is extended by lora.Lora.

    Args:
        model, rule, run, node, local_steps: as for DecLora.
        split: where a product's singular values go.
        overlap: as for Deca.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule,
        run: str,
        node: str,
        local_steps: int,
        split: Split,
        *,
        overlap: bool = True,
    ) -> None:
        super().__init__(model, rule, run, node, local_steps, overlap=overlap)
        self._split = split
        self._arrivals: dict[str, _Arrival] = {}
        self._pairs: list[tuple[slice, slice, int]] = []
        self._age = torch.zeros(1, dtype=torch.int64)

    def open(self, visit: Visit, saved: Mapping[str, Tensor] | None) -> None:
        """See Method."""
        super().open(visit, saved)
        self._arrivals.clear()
        self._pairs = []
        end = 0
        for a, b in zip(self.layout.tensors[::2], self.layout.tensors[1::2], strict=True):
            middle, begin = end + a.numel, end
            end = middle + b.numel
            self._pairs.append((slice(begin, middle), slice(middle, end), a.shape[0]))

    def _begin(self) -> None:
        super()._begin()
        self._age = torch.zeros(1, dtype=torch.int64)

    def _update(self, part: slice, gradient: Tensor, step: int) -> None:  # noqa: ARG002
        """Adam, whose moments are as old as the factors are."""
        x, m, v = self._active.master[part], self._m[part], self._v[part]
        half_step(x, gradient, m, v, int(self._age), self._rule)

    def intake(self, peer: str) -> Mix:
        """See Method. Keeps what comes."""

        def keep(
            first: int,
            values: Tensor,
            weight: float,
            own: Pieces | None = None,  # noqa: ARG001 - its own factors it has as they are
        ) -> None:
            if first == 0:
                self._arrivals[peer] = _Arrival(torch.empty(self.layout.numel), weight=weight)
            arrival = self._arrivals[peer]
            arrival.values[first : first + values.numel()] = values
            arrival.count += values.numel()

        return keep

    def settle(self, step: int) -> Settled:  # noqa: ARG002
        """See Method. The distances are those between products, Frobenius, over all matrices.

        The weight of whoever did not come in full falls to this node. The factors that come out
        span another basis than those that the moments were made in, so the moments begin anew.
        """
        numel = self.layout.numel
        came = [each for _, each in sorted(self._arrivals.items()) if each.count == numel]
        self._arrivals.clear()
        self._own = None
        square = 0.0
        with torch.no_grad():
            if came:
                square = sum(self._refactor(*pair, came) for pair in self._pairs)
                self._begin()
            else:
                self._age += 1
        self._active.write_back()
        return Settled(square**0.5, 0.0, square**0.5)

    def _refactor(self, at_a: slice, at_b: slice, rank: int, came: list[_Arrival]) -> float:
        """Mix one matrix's products; the square of how far its product has moved."""
        master = self._active.master
        place = wide_device(master.device)

        def pair(values: Tensor) -> tuple[Tensor, Tensor]:
            a, b = values[at_a].view(rank, -1), values[at_b].view(-1, rank)
            return a.to(place), b.to(place)

        own = pair(master)
        weights = [1 - sum(each.weight for each in came), *(each.weight for each in came)]
        found = refactored([own, *(pair(each.values) for each in came)], weights, self._split)
        # All products are 0, as before the first step: there is no basis yet. Or somebody's are no
        # numbers: the node keeps its own, as if nobody had come.
        if found is None:
            return 0.0
        apart = distance(own, found)
        master[at_a].copy_(found[0].reshape(-1))
        master[at_b].copy_(found[1].reshape(-1))
        return apart**2

    def state(self) -> dict[str, Tensor]:
        """See Method."""
        return {**super().state(), "age": self._age}
