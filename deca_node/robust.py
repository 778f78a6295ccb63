"""Mixing that a hostile neighbour cannot steer: clipped, or trimmed. Pure.

Both need the whole block of every neighbour, so arrivals are kept until the mix, as differences
d_j = x_j − x_i from what this node published: what the rules compute does not change when the same
is taken from all values, and on a compressed edge x_i is the reference that the neighbour has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deca_node.compression import subtract
from deca_node.errors import PeerRefused
from deca_node.limits import MAX_KEPT_ARRIVALS
from deca_node.moments import slices


@dataclass(frozen=True)
class Aggregation:
    """How a node makes one block of its own and its neighbours'.

    Attributes:
        rule: ``mean`` (equation (7)), ``clipped`` or ``trimmed``.
        hostile: f, how many neighbours may be hostile.
        tau: radius of ``clipped``, in the block's own units; 0: by ``radius``.
    """

    rule: Literal["mean", "clipped", "trimmed"] = "mean"
    hostile: int = 1
    tau: float = 0.0


MEAN = Aggregation()
# The whole and a half were tried, a quarter in one case (docs/robust.md).
_NEAR_SHARE = 0.5


def radius(distances: Mapping[str, float], weights: Mapping[str, float], hostile: int) -> float:
    """τ_i of ClippedGossip (He, Karimireddy and Jaggi 2022), as far as one node can know it.

    The paper's τ_i² = (1/δ_i) Σ w_ij ‖x_j − x_i‖² sums over the honest neighbours, with δ_i the
    weight of the others. Nobody knows who is honest: here the f farthest are left out of the sum,
    and δ_i is the weight of the f heaviest. τ_i is at most half of what the farthest of those in
    the sum is away. Where radii are about equal, clip(x_j − x_i) at i and clip(x_i − x_j) at j
    cancel: a smaller radius slows agreement among the honest and leaves their mean, while what a
    liar adds to that mean, step after step the same way, shrinks with it (docs/robust.md has what
    was measured). 0, which trusts nobody, when no more than f came.

    Args:
        distances: ‖x_j − x_i‖₂ of every neighbour that came.
        weights: w_ij of the same neighbours.
        hostile: f, at least 1.
    """
    if len(distances) <= hostile:
        return 0.0
    near = sorted(distances, key=lambda peer: (distances[peer], peer))[:-hostile]
    share = sum(sorted(weights.values())[-hostile:])
    # By hypot, so that the square of a huge distance is no infinity.
    paper = math.hypot(*(math.sqrt(weights[peer] / share) * distances[peer] for peer in near))
    return min(paper, _NEAR_SHARE * distances[near[-1]])


def clip_factors(
    distances: Mapping[str, float], weights: Mapping[str, float], aggregation: Aggregation
) -> dict[str, float]:
    """min(1, τ_i / ‖x_j − x_i‖₂) of every neighbour: what is left of its difference."""
    tau = aggregation.tau or radius(distances, weights, aggregation.hostile)
    return {peer: 1.0 if far <= tau else tau / far for peer, far in distances.items()}


def add_scaled(x: Tensor, differences: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
    """Add Σ c_j d_j to x, in place.

    Args:
        x: the block being mixed, shape (P,), any device.
        differences: d_j, float32, shape (P,), CPU.
        factors: c_j.
    """
    for part in slices(x):
        for peer, difference in differences.items():
            x[part].add_(difference[part].to(x.device), alpha=factors[peer])


def add_trimmed(
    x: Tensor, differences: Mapping[str, Tensor], hostile: int, share: float = 1.0
) -> None:
    """Add to x, in place, the mean of 0 and the d_j without the f largest and the f smallest.

    By coordinate; the 0 is this node's own value. All that are left count the same, whatever their
    weight is. Nothing is added where none would be left.

    Args:
        x: the block being mixed, shape (P,), any device.
        differences: d_j, float32, shape (P,), CPU.
        hostile: f, at least 1.
        share: κ of a mix that comes a step late, else 1.
    """
    count = len(differences) + 1
    left = count - 2 * hostile
    if left < 1:
        return
    # Of the CPU's size, whatever the device is: the rows are sorted in the cache.
    for part in slices(next(iter(differences.values()))):
        own = torch.zeros(part.stop - part.start)
        rows = [own, *(difference[part].clone() for difference in differences.values())]
        for top in range(count - 1, count - 1 - hostile, -1):  # the largest of the rest to the top
            for row in range(top):
                _order(rows, row, row + 1)
        for bottom in range(hostile):
            for row in range(count - hostile - 1, bottom, -1):
                _order(rows, row - 1, row)
        mean = torch.zeros_like(own)
        for middle in rows[hostile : count - hostile]:
            mean.add_(middle, alpha=share / left)
        x[part].add_(mean.to(x.device))


def _order(rows: list[Tensor], low: int, high: int) -> None:
    """Exchange two rows' values where the first is the larger; faster than sorting the rows."""
    rows[low], rows[high] = (
        torch.minimum(rows[low], rows[high]),
        torch.maximum(rows[low], rows[high]),
    )


@dataclass
class _Arrival:
    """What came of a neighbour: differences, how many of them, ‖·‖₂² of those, and its weight."""

    values: Tensor
    count: int = 0
    square: float = 0.0
    weight: float = 0.0


class Arrivals:
    """The neighbours' blocks of one step, kept until all that will come have come.

    Args:
        numel: P, elements of the block; so many float32 are held for every neighbour that came,
            and for no more than MAX_KEPT_ARRIVALS.
        aggregation: the rule, not ``mean``.
    """

    def __init__(self, numel: int, aggregation: Aggregation) -> None:
        self._numel, self._aggregation = numel, aggregation
        self._kept: dict[str, _Arrival] = {}

    def take(self, peer: str, first: int, own: Tensor, received: Tensor, weight: float) -> None:
        """Keep a stretch of a neighbour's block; its stretches come in order.

        Args:
            peer: the neighbour.
            first: index of the stretch in the block; 0 begins the neighbour's block.
            own: what this node published, or the neighbour has of it; float32, shape (n,), CPU.
            received: x_j, likewise, all finite.
            weight: w_ij.

        Raises:
            PeerRefused: as many as may be are kept already.
        """
        arrival = self._kept.get(peer)
        if arrival is None:
            if len(self._kept) >= MAX_KEPT_ARRIVALS:
                raise PeerRefused("too_many_arrivals", f"{MAX_KEPT_ARRIVALS} blocks are kept")
            arrival = self._kept[peer] = _Arrival(torch.empty(self._numel))
        if first == 0:
            arrival.count, arrival.square, arrival.weight = 0, 0.0, weight
        difference = subtract(received, own)
        for part in slices(difference):
            few = difference[part].double()  # whose squares are finite for all of float32
            arrival.square += float(torch.dot(few, few))
        arrival.values[first : first + difference.numel()] = difference
        arrival.count += difference.numel()

    def mix_into(self, x: Tensor, share: float = 1.0) -> dict[str, float]:
        """Add to x what the rule makes of those that came in full; nothing is kept of them then.

        Args:
            x: the block being mixed, float32, shape (P,), any device.
            share: κ of a mix that comes a step late, else 1.

        Returns:
            What was left of each neighbour's difference, 0 to 1; with ``trimmed`` nothing, as
            that has an answer for each coordinate only.
        """
        # By name, so that the sum is the same to the last bit in whatever order they came.
        whole = {p: a for p, a in sorted(self._kept.items()) if a.count == self._numel}
        differences = {peer: arrival.values for peer, arrival in whole.items()}
        factors: dict[str, float] = {}
        if self._aggregation.rule == "trimmed":
            if whole:
                add_trimmed(x, differences, self._aggregation.hostile, share)
        else:
            distances = {peer: math.sqrt(arrival.square) for peer, arrival in whole.items()}
            weights = {peer: arrival.weight for peer, arrival in whole.items()}
            factors = clip_factors(distances, weights, self._aggregation)
            scaled = {peer: share * weights[peer] * left for peer, left in factors.items()}
            add_scaled(x, differences, scaled)
        for arrival in self._kept.values():
            arrival.count = 0
        return factors
