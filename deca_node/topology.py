"""Member set -> communication graph. Pure: every node derives the same graph alone."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

Graph = dict[str, frozenset[str]]
TopologyKind = Literal["full", "ring", "erdos_renyi", "bipartite", "explicit"]

# With p above the connectivity threshold ln(n)/n a draw is connected more often than not; when
# a thousand draws are not, p is too small for this many members and a ring is laid underneath.
MAX_DRAWS = 1_000
# Pairs that all draws together look at, about a tenth of a second's: from 66 members on draws are
# fewer than a thousand, of 256 they are 64.
MAX_DRAWN_PAIRS = 1 << 21


@dataclass(frozen=True)
class TopologySpec:
    """How the graph is made; the same on every node."""

    kind: TopologyKind
    p: float = 0.5
    edges: tuple[tuple[str, str], ...] = ()
    seed: int = 0


def graph(members: Iterable[str], spec: TopologySpec) -> Graph:
    """Neighbours of every member.

    ``full``: everybody. ``ring``: a cycle through the members in sorted order. ``erdos_renyi``:
    each pair with probability p, redrawn until connected, over a ring when p is too small for
    that. ``bipartite``: every even-ranked with every odd-ranked member. ``explicit``: the listed
    edges whose two ends are members.

    Args:
        members: node names; order and repetition do not matter.
        spec: the kind and its parameters.
    """
    return dict(_drawn(tuple(sorted(set(members))), spec))


# One visit asks for the same graph several times, and with few edges among hundreds of members
# drawing takes seconds.
@lru_cache(maxsize=8)
def _drawn(names: tuple[str, ...], spec: TopologySpec) -> Graph:
    if spec.kind == "full":
        edges: Iterable[tuple[str, str]] = combinations(names, 2)
    elif spec.kind == "ring":
        edges = _ring(names)
    elif spec.kind == "bipartite":
        edges = ((a, b) for a in names[::2] for b in names[1::2])
    elif spec.kind == "explicit":
        present = set(names)
        edges = (pair for pair in spec.edges if present.issuperset(pair))
    else:
        edges = _erdos_renyi(names, spec)
    return _from_edges(names, edges)


def is_connected(graph: Graph) -> bool:
    """Whether every member can reach every other."""
    return not graph or len(component(graph, next(iter(graph)))) == len(graph)


def component(graph: Graph, start: str) -> frozenset[str]:
    """The members that ``start`` can reach, itself included."""
    reached: set[str] = set()
    frontier = [start]
    while frontier:
        name = frontier.pop()
        if name not in reached:
            reached.add(name)
            frontier.extend(graph[name])
    return frozenset(reached)


def _from_edges(names: Sequence[str], edges: Iterable[tuple[str, str]]) -> Graph:
    neighbours: dict[str, set[str]] = {name: set() for name in names}
    for a, b in edges:
        if a != b:
            neighbours[a].add(b)
            neighbours[b].add(a)
    return {name: frozenset(others) for name, others in neighbours.items()}


def _ring(names: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(names, [*names[1:], *names[:1]], strict=True))


def _erdos_renyi(names: Sequence[str], spec: TopologySpec) -> list[tuple[str, str]]:
    # A string seed is hashed with SHA-512: the same on every machine and Python.
    source = random.Random(f"deca/erdos-renyi/{spec.seed}/{'/'.join(names)}")  # noqa: S311
    edges: list[tuple[str, str]] = []
    pairs = max(1, len(names) * (len(names) - 1) // 2)
    for _ in range(min(MAX_DRAWS, max(1, MAX_DRAWN_PAIRS // pairs))):
        edges = [pair for pair in combinations(names, 2) if source.random() < spec.p]
        if is_connected(_from_edges(names, edges)):
            return edges
    return edges + _ring(names)
