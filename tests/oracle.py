"""Float64 NumPy reference ("oracle") of DECA, the measure that tests hold the real node against.

The equations are those of "DECA: Decentralizing Block-Wise Adam for Efficient LLM Full-Parameter
Fine-Tuning on Non-IID Data", arXiv 2606.03209; numbers in parentheses are the paper's. They are
written as printed, on whole vectors and with every client in lock step: clarity before speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. `bma` picks the ablation, `discrepancy` the normalisation of h in (8)."""

    learning_rate: float
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    bma_beta1: float = 0.3
    bma_beta2: float = 0.333
    bma: Literal["on", "off", "trivial"] = "on"
    discrepancy: Literal["l2", "none", "lr", "zero"] = "l2"


@dataclass
class Client:
    """One client: its blocks, and the moments of the active (afterwards: last) block visit."""

    blocks: list[Array]
    m: Array | None = None
    v: Array | None = None


# (client, round, position in the round's order, step, that client's blocks, active block)
Gradient: TypeAlias = Callable[[int, int, int, int, list[Array], int], Array]
# round -> the blocks to visit, in order
Order: TypeAlias = Callable[[int], Sequence[int]]
# (round, position, step, clients after that step)
Observe: TypeAlias = Callable[[int, int, int, list[Client]], None]


def metropolis_hastings(adjacency: NDArray[np.bool_]) -> Array:
    """The mixing matrix W of a symmetric adjacency, whose diagonal does not count."""
    n = len(adjacency)
    if adjacency.shape != (n, n) or not np.array_equal(adjacency, adjacency.T):
        raise ValueError("adjacency must be a square symmetric matrix")
    neighbours = [[j for j in range(n) if j != i and adjacency[i, j]] for i in range(n)]
    w = np.zeros((n, n))
    for i in range(n):
        for j in neighbours[i]:
            w[i, j] = 1 / (1 + max(len(neighbours[i]), len(neighbours[j])))
        w[i, i] = 1 - sum(w[i, j] for j in neighbours[i])  # 1 where there is no neighbour
    return w


def _discrepancy(x: Array, x_next: Array, settings: Settings) -> Array:
    """h of (8): old minus new, so that it points the way a gradient does."""
    h = x - x_next
    if settings.discrepancy == "zero":  # the ablation's control: (9), (10) shrink and add nothing
        return np.zeros_like(h)
    if settings.discrepancy == "none":
        return h
    if settings.discrepancy == "lr":
        return h / settings.learning_rate
    norm = float(np.sqrt(np.sum(h * h)))
    return h / norm if norm > 0 else np.zeros_like(h)


def run(
    initial_blocks: Sequence[NDArray[np.floating]],
    gradient: Gradient,
    adjacency: NDArray[np.bool_],
    *,
    rounds: int,
    steps: int,
    settings: Settings,
    order: Order | None = None,
    observe: Observe | None = None,
) -> list[Client]:
    """Run DECA on all clients in lock step from the same blocks, and return the clients.

    `order` gives each round's blocks (ascending where None). Arrays held by a client are replaced,
    never written to, so `observe` may keep an array, but must copy a `blocks` list it keeps.
    """
    w = metropolis_hastings(adjacency)
    n = len(w)
    a1, a2 = settings.adam_beta1, settings.adam_beta2
    b1, b2 = settings.bma_beta1, settings.bma_beta2
    if settings.bma == "trivial":
        b1, b2 = 0.0, 0.0
    clients = [Client([np.array(b, dtype=np.float64) for b in initial_blocks]) for _ in range(n)]

    for t in range(rounds):
        visits = range(len(initial_blocks)) if order is None else order(t)
        for position, k in enumerate(visits):
            m = [np.zeros_like(c.blocks[k]) for c in clients]  # moments start every visit at 0
            v = [np.zeros_like(c.blocks[k]) for c in clients]
            for r in range(steps):
                x = [c.blocks[k] for c in clients]
                m_half, v_half, x_half = [], [], []
                for i, c in enumerate(clients):
                    g = np.array(gradient(i, t, position, r, c.blocks, k), dtype=np.float64)  # (3)
                    if g.shape != x[i].shape:
                        raise ValueError(f"gradient of shape {g.shape} for block {x[i].shape}")
                    m_half.append(a1 * m[i] + (1 - a1) * g)  # (4)
                    v_half.append(a2 * v[i] + (1 - a2) * g * g)  # (4)
                    m_hat = m_half[i] / (1 - a1 ** (r + 1))  # (5)
                    v_hat = v_half[i] / (1 - a2 ** (r + 1))  # (5)
                    step = settings.learning_rate * m_hat / (np.sqrt(v_hat) + settings.adam_eps)
                    x_half.append(x[i] - step)  # (6)
                for i, c in enumerate(clients):
                    x_next = w[i, i] * x_half[i]  # (7), the client's own share
                    for j in range(n):
                        if j != i and w[i, j] > 0:
                            x_next = x_next + w[i, j] * x_half[j]  # (7), a neighbour's share
                    if settings.bma == "off":
                        m[i], v[i] = m_half[i], v_half[i]
                    else:
                        h = _discrepancy(x[i], x_next, settings)  # (8)
                        m[i] = b1 * m_half[i] + (1 - b1) * h  # (9)
                        v[i] = b2 * v_half[i] + (1 - b2) * h * h  # (10)
                    c.blocks[k], c.m, c.v = x_next, m[i], v[i]
                if observe is not None:
                    observe(t, position, r, clients)
    return clients
