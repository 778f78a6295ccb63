"""Who counts how much, and the mix itself. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Values mixed at once: scratch, own and received ones and the block's take 1 MB of fp32 together.
MIX_SLICE = 65_536

# κ, the part of a mix that is taken when it comes a step late: x_{r+1} = x½_r + κ (W − I) x½_{r−1}.
# Along an eigenvector of W with eigenvalue λ that is z² − z + κ(1 − λ) = 0, whose roots lie within
# the unit circle when κ(1 − λ) < 1. Every node keeps some weight for itself, so all λ are above −1
# and one half is stable on every graph. Own and received values are of one step: the mean stays.
STALE_STEP = 0.5


def metropolis_hastings(degree: int, neighbour_degrees: Mapping[str, int]) -> dict[str, float]:
    """Weights w_ij of one node's row; the rest, 1 − Σ w_ij, is the node's own.

    Args:
        degree: d_i, the number of this node's edges.
        neighbour_degrees: d_j of every neighbour j.

    Returns:
        w_ij = 1 / (1 + max(d_i, d_j)) for every neighbour. Because both ends of an edge use the
        same two numbers the matrix is symmetric, hence doubly stochastic.

    Raises:
        ValueError: more neighbours than ``degree``, or a neighbour's degree below 1.
    """
    if len(neighbour_degrees) > degree:
        raise ValueError(f"{len(neighbour_degrees)} neighbours but degree {degree}")
    if any(other < 1 for other in neighbour_degrees.values()):
        raise ValueError("a neighbour has at least one edge")
    return {peer: 1 / (1 + max(degree, other)) for peer, other in neighbour_degrees.items()}


def mix_arrival(x: Tensor, own: Tensor, received: Tensor, weight: float) -> None:
    """Equation (7), one neighbour's part: x += w_ij (x½_j − x½_i), in place.

    In this form what does not arrive adds nothing: its weight falls to the node itself and each
    coordinate stays a convex combination of the nodes' values.

    Args:
        x: the block being mixed, shape (P,), any device.
        own: x½_i, shape (P,), CPU, same dtype as ``x``; ``x`` itself while nothing is mixed in yet,
            which is one reading of memory less.
        received: x½_j, likewise.
        weight: w_ij.
    """
    mixed = _Mixed(x)
    for part, difference in _differences(own, received):
        mixed.add(part, difference, weight)


def mix_measured(x: Tensor, own: Tensor, received: Tensor, weight: float) -> float:
    """The same with any weight, 0 included, and ‖x_j − x_i‖₂² of what was received.

    Infinite, and nothing more is mixed, from the first slice with a difference that ``x``'s dtype
    cannot hold; squares are summed in float64, where those of all others have room.
    """
    square, mixed = 0.0, _Mixed(x)
    for part, difference in _differences(own, received):
        square += float(np.square(difference, dtype=np.float64).sum())
        if not math.isfinite(square):
            return math.inf
        if weight:
            mixed.add(part, difference, weight)
    return square


def _differences(own: Tensor, received: Tensor) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Received minus own, slice by slice, in scratch that each next slice overwrites.

    By NumPy, which takes half of torch's time for slices that fit a cache, and never its threads.
    """
    mine, theirs = own.numpy(), received.numpy()
    scratch = np.empty(min(MIX_SLICE, mine.size), mine.dtype)
    for low in range(0, mine.size, MIX_SLICE):
        part = slice(low, min(low + MIX_SLICE, mine.size))
        difference = scratch[: part.stop - low]
        with np.errstate(over="ignore"):  # seen in the results
            np.subtract(theirs[part], mine[part], out=difference)
        yield part, difference


class _Mixed:
    """What is mixed into, as NumPy sees it: slices of tensors cost ten times those of arrays."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._values = x.numpy() if x.device.type == "cpu" else None

    def add(self, part: slice, difference: NDArray[Any], weight: float) -> None:
        """Add weight · difference to a slice; the difference is scratch afterwards."""
        np.multiply(difference, difference.dtype.type(weight), out=difference)
        if self._values is not None:
            values = self._values[part]
            np.add(values, difference, out=values)
        else:
            self._x[part].add_(torch.from_numpy(difference).to(self._x.device))
