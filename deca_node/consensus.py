"""How to bring a graph of nodes to one value, and how each of them knows that it is done. Pure.

One round of gossip is x ← x + a (W x − x), with the Metropolis–Hastings matrix W of the graph and
a factor a that both ends of an edge share; a = 1 is the plain mix. T rounds multiply the part of x
along an eigenvector of W with eigenvalue λ by ∏ (1 − a_t (1 − λ)): which is 1 for the mean (λ = 1)
whatever the factors, and small for everything else when the factors are chosen well. The usual way
to write Chebyshev gossip, a recurrence over x_t and x_{t−1}, ends at the same polynomial; but it
needs a second copy of x, and keeps the mean only if both copies lost the same messages. Here every
round keeps it on its own: each edge takes from one end what it gives to the other.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, Field, with_config

from deca_node.limits import MAX_LOST_EDGES, MAX_MEMBERS, MAX_NAME_BYTES
from deca_node.mixing import metropolis_hastings
from deca_node.topology import Graph, component

Floats = npt.NDArray[np.float64]
Kind = Literal["plain", "exact", "chebyshev"]
Edge = tuple[str, str]

# Eigenvalues closer than this are one. float64 has them to about 1e-14; those of different worth
# are farther apart than this in all graphs of at most MAX_MEMBERS nodes that were looked at.
SAME = 1e-9
# What rounding errors of float32 (6e-8 of a value) may grow to in the worst case: 1024 leaves
# 14 bits of a value, and what the check rounds then find is removed by plain rounds.
MAX_AMPLIFICATION = 1024.0
# Differences below this share of a block's norm are rounding of float32, no disagreement.
FLOOR = 2.0**-21
# A neighbour from which nothing whole came in so many rounds, one after the other, is given up. The
# exchange waits a quarter of a second for one whose connection broke: that is time to redial, and
# where one message in a hundred is lost none is given up by chance.
LOST_AFTER = 4


# The plan


@dataclass(frozen=True)
class Plan:
    """Factors of the rounds, in order, the same on every node.

    Attributes:
        kind: where they come from.
        factors: a_1 … a_T.
        contraction: what of any disagreement (ℓ2, over all nodes) is left after them, at most.
        amplification: bound of what they make of the rounding error of one round.
        hops: the graph's diameter.
    """

    kind: Kind
    factors: tuple[float, ...]
    contraction: float
    amplification: float
    hops: int


def plan(graph: Graph, tolerance: float, limit: int) -> Plan:
    """The fewest rounds that leave at most ``tolerance`` of any disagreement.

    ``exact``: one round for each distinct eigenvalue, a = 1/(1 − λ). ``chebyshev``: the best for
    all eigenvalues in [λ_min, λ_2]. ``plain``: all 1. What would amplify rounding errors more than
    MAX_AMPLIFICATION is not considered; where nothing gets there in ``limit`` rounds, what gets
    closest is taken. In a graph of several parts each comes to a value of its own.

    Args:
        graph: neighbours of every member.
        tolerance: share of the disagreement that may be left, between 0 and 1.
        limit: most rounds, at least 1.

    Raises:
        ValueError: ``tolerance`` or ``limit`` is out of its range.
    """
    if not 0 < tolerance < 1 or limit < 1:
        raise ValueError("a tolerance between 0 and 1 and at least one round are needed")
    spectrum = eigenvalues(graph)
    hops = diameter(graph)
    if not spectrum.size:
        return Plan("plain", (), 0.0, 0.0, hops)
    options: list[tuple[Kind, Floats]] = [("plain", np.ones(plain(spectrum, tolerance, limit)))]
    if spectrum.size <= limit:
        options.append(("exact", 1 / (1 - spectrum)))
    if spectrum.size > 1:
        options.append(("chebyshev", chebyshev(spectrum, tolerance, limit)))
    plans = [_judged(kind, factors, spectrum, hops) for kind, factors in options]
    stable = [p for p in plans if p.kind == "plain" or p.amplification <= MAX_AMPLIFICATION]
    # Of equally many rounds the earlier kind's: plain ones never overshoot.
    return min(stable, key=lambda p: (max(p.contraction / tolerance, 1 + SAME), len(p.factors)))


def weights(graph: Graph) -> Floats:
    """W, float64, shape (n, n), in sorted order of the names: symmetric, rows sum to 1."""
    index = {name: row for row, name in enumerate(sorted(graph))}
    matrix = np.zeros((len(index), len(index)))
    for name, row in index.items():
        degrees = {peer: len(graph[peer]) for peer in graph[name]}
        for peer, weight in metropolis_hastings(len(degrees), degrees).items():
            matrix[row, index[peer]] = weight
        matrix[row, row] = 1 - matrix[row].sum()
    return matrix


def eigenvalues(graph: Graph) -> Floats:
    """Distinct eigenvalues of W below 1, ascending, float64. 1 is each part's mean."""
    distinct: list[float] = []
    for value in np.linalg.eigvalsh(weights(graph)):
        if value < 1 - SAME and (not distinct or value - distinct[-1] > SAME):
            distinct.append(float(value))
    return np.array(distinct)


def diameter(graph: Graph) -> int:
    """Most edges on the shortest way between two members of one part of the graph."""
    return max((len(_waves(graph, name)) - 1 for name in graph), default=0)


def reached(graph: Graph, start: str, broken: Iterable[Edge] = ()) -> frozenset[str]:
    """Members that ``start`` is connected with, itself included, when some edges are broken."""
    gone = {frozenset(edge) for edge in broken}
    whole = {
        name: frozenset(peer for peer in peers if frozenset((name, peer)) not in gone)
        for name, peers in graph.items()
    }
    return component(whole, start)


def digest(graph: Graph, chosen: Plan) -> int:
    """A number that two nodes have in common when they see one graph and do the same in it.

    The factors are part of it: computed on different machines, they may differ in the last bits,
    and two equally good orders may change places.
    """
    tree = [sorted((name, sorted(peers)) for name, peers in graph.items()), chosen.factors]
    return int(xxhash.xxh3_64_intdigest(json.dumps(tree).encode()))


def _waves(graph: Graph, start: str) -> list[set[str]]:
    """Members by their distance from ``start``."""
    waves, seen = [{start}], {start}
    while wave := {peer for name in waves[-1] for peer in graph[name]} - seen:
        waves.append(wave)
        seen |= wave
    return waves


def plain(spectrum: Floats, tolerance: float, limit: int) -> int:
    """Number of plain rounds: max |λ|^T ≤ tolerance."""
    rate = float(np.abs(spectrum).max())
    if rate <= tolerance:
        return 1
    return min(math.ceil(math.log(tolerance) / math.log(rate)), limit)


def chebyshev(spectrum: Floats, tolerance: float, limit: int) -> Floats:
    """1/(1 − μ) at the Chebyshev nodes μ of [λ_min, λ_2]; T such that 1/T_T(z) ≤ tolerance."""
    low, high = spectrum[0], spectrum[-1]
    z = (2 - low - high) / (high - low)
    rounds = min(math.ceil(math.acosh(1 / tolerance) / math.acosh(z)), limit)
    angles = np.pi * (2 * np.arange(rounds) + 1) / (2 * rounds)
    nodes: Floats = (high + low) / 2 + (high - low) / 2 * np.cos(angles)
    return 1 / (1 - nodes)


def _judged(kind: Kind, factors: Floats, spectrum: Floats, hops: int) -> Plan:
    """Put factors in order and look at what they do.

    An error made in round s meets the factors after s, so it grows by at most
    max_λ |∏_{t>s} (1 − a_t (1 − λ))|. It is as large as the values then are: those of the mean, and
    those of a disagreement that the factors up to s may have made larger than it was.
    """
    # Nine digits are more than float32 holds, and the same ones on every machine.
    ordered = [float(f"{factor:.9g}") for factor in _leja(factors)]
    effects = 1 - np.outer(ordered, 1 - spectrum)
    done = np.abs(np.cumprod(effects, axis=0)).max(axis=1)
    tails = np.vstack([np.cumprod(effects[:0:-1], axis=0)[::-1], np.ones(spectrum.size)])
    ahead = np.abs(tails).max(axis=1)
    return Plan(kind, tuple(ordered), float(done[-1]), float((ahead * done.clip(1)).sum()), hops)


def _leja(factors: Floats) -> Floats:
    """The factors in Leja's order of 1/a: each as far as can be from those before it.

    With the largest factors first the products on the way reach 3e16 (ring of 32, 39 rounds), with
    the smallest first those that a rounding error meets; in this order they stay within the
    overshoot of the largest factor alone. It begins with the smallest factor.
    """
    points = 1 / factors
    order = [int(points.argmax())]
    distances = np.zeros(points.size)
    while len(order) < points.size:
        with np.errstate(divide="ignore"):
            distances += np.log(np.abs(points - points[order[-1]]))
        distances[order[-1]] = -np.inf
        # Rounded, since equal distances must not be told apart by rounding errors.
        order.append(int(distances.round(6).argmax()))
    return factors[order]


# Agreeing anew


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True)
class Agreement:
    """How it went with the whole model; the state on disk keeps it, and summary.json tells of it.

    Differences are of the values in float32, before they are rounded to the model's precision.

    Attributes:
        kind: kinds of gossip used, joined by ``+``.
        rounds: exchanges over all blocks.
        before: largest difference between two neighbours at the beginning of a block, as a share of
            its ‖x‖₂.
        disagreement: bound of the difference between any two of ``members`` at the end, likewise.
        complete: whether every block reached the tolerance among ``members``, who are more than
            this node.
        members: who has the same model.
        missing: who was to have it, and has not.
        tolerance: that was wanted.
    """

    kind: str
    rounds: int
    before: float
    disagreement: float
    complete: bool
    members: tuple[str, ...]
    missing: tuple[str, ...]
    tolerance: float


def extends(agreed: frozenset[str], here: frozenset[str], *, finer: bool) -> bool:
    """Whether those that are here may agree anew, where some have agreed before.

    All of these must be here, or their one model becomes several; and somebody more, unless a finer
    tolerance is wanted.
    """
    return agreed <= here and (finer or agreed != here)


# Knowing that all are done

Member = Annotated[str, Field(min_length=1, max_length=MAX_NAME_BYTES)]
# No norm of a block of float32 values is larger; so no note makes a sum of ours infinite.
MAX_AMOUNT = 1e50
Amount = Annotated[float, Field(ge=0, le=MAX_AMOUNT, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
# Hops between two nodes that see different members: those of both views, one after the other.
MAX_NEED = 2 * MAX_MEMBERS


class Note(BaseModel):
    """What a node says beside its block in every round. See :class:`Tally` for the words."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    plain: bool
    done: bool
    calm: Count
    need: Annotated[int, Field(ge=1, le=MAX_NEED)]
    base: Amount
    apart: Amount
    fault: Count | None
    lost: Annotated[tuple[tuple[Member, Member], ...], Field(max_length=MAX_LOST_EDGES)]


class Tally:
    """One node's knowledge of how far all are, in one block's agreement. No clock, no network.

    Everybody begins *accelerated* and does the plan's T rounds; from then on all factors are 1.
    A fault (an edge of the graph that was not agreed, a neighbour whose block did not come) in one
    of the T rounds makes the products wrong, so who hears of it goes back to the block that it
    began with and mixes *plainly*; an edge with an accelerated and a plain end is not used. All
    plain ends together have the mean of the blocks that they began with.

    A round is *calm* for a node when all factors were 1, every neighbour's block came and none
    differed by more than the threshold. ``calm`` counts: 0 after another round, else one more than
    the least of its own and its neighbours' counts. Whose count reaches m + 1 knows that m rounds
    ago everybody within m hops was calm in one and the same round, and from then on everybody's
    block was a convex combination of those. ``need`` is m + 1 for the longest way there may be:
    the diameter, or, since a fault may have broken edges, n − 1. Then the node is *done*, says so,
    and leaves when its neighbours say the same.

    The threshold makes it a bound for any two nodes: m hops of at most ``tolerance · base / m``.

    Args:
        own: this node.
        graph: neighbours of every member, as this node sees it.
        linked: neighbours in it with which the edge was agreed.
        same: whether all of those see the same graph.
        chosen: what is done.
        tolerance: largest difference between two nodes at the end, relative to ``base``.
        norm: ‖x‖₂ of this node's block.

    Attributes:
        round: rounds done.
        neighbours: whose blocks are still mixed in.
        plain: see above.
        done: see above.
        base: the largest difference between two neighbours in the first round, as known so far.
        apart: the largest in the calm rounds of those that ``calm`` counts.
        lost: edges of the graph that are not used any more, as known so far.
    """

    def __init__(
        self,
        own: str,
        graph: Graph,
        linked: frozenset[str],
        *,
        same: bool,
        chosen: Plan,
        tolerance: float,
        norm: float,
    ) -> None:
        self._own, self._graph = own, graph
        self._factors = chosen.factors if chosen.kind != "plain" else ()
        self._tolerance, self._norm = tolerance, norm
        self.round = 0
        self.neighbours = linked
        self.base = self.apart = 0.0
        self.lost: set[Edge] = {_edge(own, peer) for peer in graph[own] - linked}
        self._fault = 0 if self.lost or not same else None
        self.plain = not self._factors or self._fault is not None
        need = chosen.hops + 1 if self._fault is None else len(graph)
        self._need = min(need if same else 2 * len(graph), MAX_NEED)
        self._calm = 0
        self.done = False
        self._misses: Counter[str] = Counter()
        self._finished: set[str] = set()  # neighbours that were done when last heard
        self._leaving = False

    @property
    def hops(self) -> int:
        """The longest way that there may be between two nodes, at least 1."""
        return max(1, self._need - 1)

    @property
    def leaving(self) -> bool:
        """Whether the block is over here: all are done, or nobody is left."""
        return self._leaving or not self.neighbours

    def note(self) -> Note:
        """What goes beside the block in the coming round."""
        return Note(
            plain=self.plain,
            done=self.done,
            calm=self._calm,
            need=self._need,
            base=self.base,
            apart=self.apart,
            fault=self._fault,
            lost=tuple(sorted(self.lost)[:MAX_LOST_EDGES]),
        )

    def factor(self, peer: str, note: Note) -> float:
        """Factor of this round on the edge to a neighbour that says this; 0: it is not used."""
        if peer not in self.neighbours or note.plain != self.plain:
            return 0.0
        accelerated = not self.plain and self.round < len(self._factors)
        return self._factors[self.round] if accelerated else 1.0

    def close_round(
        self,
        notes: Mapping[str, Note],
        differences: Mapping[str, float],
        left: Collection[str] = (),
    ) -> bool:
        """End a round.

        Args:
            notes: of the neighbours whose whole block came.
            differences: ‖x_j − x_i‖₂ to each of them.
            left: neighbours that say that the block is over for them.

        Returns:
            Whether to go back to the block that the agreement began with.
        """
        here = {peer: notes[peer] for peer in self.neighbours if peer in notes}
        # Who leaves has heard that all its neighbours are done, unless it has given some up.
        if self.done:
            self._finished |= self.neighbours.intersection(left)
        # Who was done when last heard may have left.
        missing = self.neighbours - set(here) - self._finished
        largest = max((differences[peer] for peer in here), default=0.0)
        self.base = max([self.base, *(note.base for note in here.values())])
        if self.round == 0:
            self.base = max(self.base, largest)
        self._find_fault(here.values(), missing)
        self._lose(here, missing, left)
        late = self._fault is not None and self._fault < len(self._factors)
        back = late and not self.plain and not self.done
        if (
            (self.plain or self.round >= len(self._factors))
            and not back
            and not missing
            and all(note.plain == self.plain for note in here.values())
            and largest <= self._threshold()
        ):
            self._calm = 1 + min([self._calm, *(note.calm for note in here.values())])
            wider = [note.apart for note in here.values()] if self._calm > 1 else []
            self.apart = max([largest, *wider])
        else:
            self._calm = 0
        self.neighbours -= self._finished - set(here)
        self._finished |= {peer for peer, note in here.items() if note.done}
        if self.done:  # and has said so in this round
            self._leaving = self._finished >= self.neighbours
        told = [n.apart for n in here.values() if n.done and n.plain == self.plain and not back]
        self.apart = max([self.apart, *told])
        self.done = self.done or bool(told) or self._calm >= self._need
        self.plain = self.plain or back
        self.round += 1
        return back

    def _threshold(self) -> float:
        return max(self._tolerance * self.base / self.hops, FLOOR * self._norm)

    def _find_fault(self, notes: Collection[Note], missing: Collection[str]) -> None:
        """Remember the earliest fault, and how many calm rounds are needed now."""
        faults = [note.fault for note in notes if note.fault is not None]
        faults += [self.round] * bool(missing)
        faults += [self._fault] if self._fault is not None else []
        self._fault = min(faults, default=None)
        need = max([self._need, *(note.need for note in notes)])
        if self._fault is not None:
            need = max(need, len(self._graph))
        if need > self._need:
            self._need, self._calm = need, 0  # the threshold has changed

    def _lose(
        self, notes: Mapping[str, Note], missing: Collection[str], left: Collection[str]
    ) -> None:
        """Give up edges, after vain rounds or because the other end has."""
        for teller, note in notes.items():
            for one, other in note.lost:
                ours = self._own in (one, other)
                if other in self._graph.get(one, ()) and (not ours or teller in (one, other)):
                    self.lost.add(_edge(one, other))
        for peer in self.neighbours:
            self._misses[peer] = self._misses[peer] + 1 if peer in missing else 0
            if self._misses[peer] >= LOST_AFTER or (peer in missing and peer in left):
                self.lost.add(_edge(self._own, peer))
        self.neighbours = frozenset(
            peer for peer in self.neighbours if _edge(self._own, peer) not in self.lost
        )


def _edge(one: str, other: str) -> Edge:
    return (one, other) if one <= other else (other, one)
