"""Agreement: rounds known by hand, factors on random graphs, and who knows what when."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.consensus import (
    LOST_AFTER,
    MAX_AMPLIFICATION,
    Plan,
    Tally,
    chebyshev,
    diameter,
    digest,
    eigenvalues,
    extends,
    plain,
    plan,
    reached,
    weights,
)
from deca_node.mixing import MIX_SLICE, mix_measured
from deca_node.topology import TopologySpec, graph, is_connected

NAMES = [f"n{i:02}" for i in range(64)]
KINDS = ("full", "ring", "erdos_renyi", "bipartite")


def path(size):
    return TopologySpec("explicit", edges=tuple(pairwise(NAMES[:size])))


@st.composite
def connected_graphs(draw, largest=32):
    """All kinds, and random trees with random further edges."""
    size = draw(st.integers(2, largest))
    kind = draw(st.sampled_from([*KINDS, "explicit"]))
    spec = TopologySpec(kind, p=draw(st.floats(0.05, 1)), seed=draw(st.integers(0, 99)))
    if kind == "explicit":
        edges = {(i, draw(st.integers(max(0, i - 3), i - 1))) for i in range(1, size)}
        pairs = st.sampled_from([(i, j) for i in range(size) for j in range(i)])
        edges |= set(draw(st.lists(pairs, max_size=20)))
        spec = TopologySpec(kind, edges=tuple((NAMES[i], NAMES[j]) for i, j in edges))
    made = graph(NAMES[:size], spec)
    return made if is_connected(made) else graph(NAMES[:size], TopologySpec("ring"))


def gossip(made, chosen, values, used=lambda round_, edge: True):
    """The planned rounds as nodes do them: float32, edge by edge, from a snapshot."""
    matrix = torch.from_numpy(weights(made))
    index = {name: row for row, name in enumerate(sorted(made))}
    for round_, factor in enumerate(chosen.factors):
        own = values.clone()
        for name, i in index.items():
            for peer in sorted(made[name]):
                j = index[peer]
                if used(round_, frozenset((name, peer))):
                    weight = float(matrix[i, j]) * factor
                    mix_measured(values[i], own[i], own[j], weight)
    return values


def test_a_difference_that_float32_cannot_hold_ends_the_mix():
    """What was mixed before it stays; from there on nothing of such a neighbour is."""
    own, received = torch.zeros(2 * MIX_SLICE + 1), torch.ones(2 * MIX_SLICE + 1)
    own[MIX_SLICE], received[MIX_SLICE] = -3e38, 3e38
    x = torch.zeros_like(own)
    assert mix_measured(x, own, received, 0.5) == np.inf
    assert (x[:MIX_SLICE] == 0.5).all()
    assert (x[MIX_SLICE:] == 0).all()


def deviation(values):
    return float((values - values.mean(0)).norm())


def test_rounds_on_a_ring_of_eight():
    """1e-3 takes 32 plain rounds, 10 with Chebyshev's factors, 4 exact ones."""
    made = graph(NAMES[:8], TopologySpec("ring"))
    spectrum = eigenvalues(made)
    expected = [(1 + 2 * np.cos(2 * np.pi * k / 8)) / 3 for k in (4, 3, 2, 1)]
    np.testing.assert_allclose(spectrum, expected, atol=1e-12)
    assert plain(spectrum, 1e-3, 500) == 32
    assert chebyshev(spectrum, 1e-3, 500).size == 10
    chosen = plan(made, 1e-3, 500)
    assert (chosen.kind, len(chosen.factors), chosen.hops) == ("exact", 4, 4)


@given(connected_graphs(), st.sampled_from([1e-1, 1e-3, 1e-5]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_the_planned_rounds_reach_the_tolerance(made, tolerance, seed):
    """Of any values' disagreement the tolerance is left, in float32 too, and the mean stays."""
    chosen = plan(made, tolerance, 5000)
    assert chosen.contraction <= tolerance * (1 + 1e-6)
    before = torch.randn(len(made), 20, generator=torch.Generator().manual_seed(seed)) + 1
    after = gossip(made, chosen, before.clone())
    rounding = 2.0**-24 * max(chosen.amplification, 1) * float(before.norm())
    assert deviation(after) <= tolerance * (1 + 1e-3) * deviation(before) + rounding
    assert float((after.mean(0) - before.mean(0)).abs().max()) <= 1e-5


@given(connected_graphs(16), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_edges_that_fail_at_both_ends_keep_the_mean(made, seed):
    """Whatever the factor: what an edge takes from one end it gives to the other."""
    chosen = plan(made, 1e-3, 500)
    source = random.Random(seed)
    failed = {}

    def used(round_, edge):
        return failed.setdefault((round_, edge), source.random() < 0.8)

    before = torch.randn(len(made), 20, dtype=torch.float64)
    after = gossip(made, chosen, before.clone(), used)
    scale = max(1.0, float(after.abs().max()))
    assert float((after.mean(0) - before.mean(0)).abs().max()) <= 1e-9 * scale


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_accelerated_rounds_are_few_and_stable(size, tolerance):
    """Rings and paths, the slowest graphs: Leja's order keeps what is on the way small."""
    for spec in (TopologySpec("ring"), path(size)):
        chosen = plan(graph(NAMES[:size], spec), tolerance, 1000)
        assert len(chosen.factors) <= (2.5 if tolerance == 1e-3 else 5) * size
        assert chosen.contraction <= tolerance
        assert chosen.amplification <= MAX_AMPLIFICATION


def test_a_limit_takes_what_gets_closest():
    """With too few rounds for the tolerance, Chebyshev's best polynomial of so many."""
    chosen = plan(graph(NAMES[:32], TopologySpec("ring")), 1e-6, 10)
    assert (chosen.kind, len(chosen.factors)) == ("chebyshev", 10)
    assert 0.1 < chosen.contraction < 0.5


def test_parts_of_a_graph_agree_within_themselves():
    """Where the graph is not connected there is no common value to plan for."""
    spec = TopologySpec("explicit", edges=(("n00", "n01"), ("n02", "n03")))
    made = graph(NAMES[:5], spec)
    chosen = plan(made, 1e-3, 10)
    assert (chosen.kind, chosen.factors, chosen.hops) == ("plain", (1.0,), 1)
    assert plan(graph(NAMES[:3], TopologySpec("explicit")), 1e-3, 10).factors == ()


@pytest.mark.parametrize(("tolerance", "limit"), [(0, 5), (1, 5), (-1, 5), (0.5, 0)])
def test_impossible_demands_are_refused(tolerance, limit):
    """A tolerance is between 0 and 1, and nothing is done in no round."""
    with pytest.raises(ValueError, match="tolerance"):
        plan(graph(NAMES[:3], TopologySpec("ring")), tolerance, limit)


def test_lengths_and_reach():
    """The diameter is that of the textbook; broken edges cut off who has no other way."""
    assert [diameter(graph(NAMES[:8], TopologySpec(kind))) for kind in ("full", "ring")] == [1, 4]
    assert diameter(graph(NAMES[:8], path(8))) == 7
    assert diameter({}) == 0
    ring = graph(NAMES[:6], TopologySpec("ring"))
    assert reached(ring, "n00") == set(ring)
    assert reached(ring, "n00", [("n00", "n01")]) == set(ring)
    assert reached(ring, "n00", [("n02", "n03"), ("n05", "n04")]) == {"n00", "n01", "n02", "n05"}


def test_the_digest_tells_graphs_and_plans_apart():
    """The same view in any order is one number; another member, edge or plan is another."""
    ring = graph(NAMES[:6], TopologySpec("ring"))
    mark = digest(ring, plan(ring, 1e-3, 500))
    again = graph(reversed(NAMES[:6]), TopologySpec("ring"))
    assert digest(dict(reversed(again.items())), plan(again, 1e-3, 500)) == mark
    others = [graph(NAMES[:7], TopologySpec("ring")), graph(NAMES[:6], path(6))]
    marks = {digest(each, plan(each, 1e-3, 500)) for each in others}
    marks.add(digest(ring, plan(ring, 1e-3, 2)))
    assert len(marks) == 3
    assert mark not in marks


# Tallies


class Crowd:
    """Nodes in lockstep, in float64; what does not arrive is decided by ``arrives``."""

    def __init__(self, made, chosen, tolerance, seed, arrives):
        self.graph, self.arrives = made, arrives
        self.matrix, self.names = weights(made), sorted(made)
        self.x = np.random.default_rng(seed).normal(size=(len(made), 6))
        self.start = self.x.copy()
        self.base = max(
            np.linalg.norm(self.x[i] - self.x[j])
            for i, name in enumerate(self.names)
            for j, peer in enumerate(self.names)
            if peer in made[name]
        )
        self.tallies = [
            Tally(name, made, made[name], same=True, chosen=chosen, tolerance=tolerance, norm=0.0)
            for name in self.names
        ]
        self.here = set(range(len(made)))
        self.rounds = 0

    def round(self):
        notes = [tally.note() for tally in self.tallies]
        own = self.x.copy()
        acting = sorted(self.here)
        backs = {}
        for i in acting:
            heard, differences = {}, {}
            for j in acting:
                peer = self.names[j]
                if peer not in self.tallies[i].neighbours or not self.arrives(self.rounds, i, j):
                    continue
                heard[peer] = notes[j]
                differences[peer] = float(np.linalg.norm(own[j] - own[i]))
                factor = self.tallies[i].factor(peer, notes[j])
                self.x[i] += factor * self.matrix[i, j] * (own[j] - own[i])
            backs[i] = (heard, differences)
        for i, (heard, differences) in backs.items():
            if self.tallies[i].close_round(heard, differences):
                self.x[i] = self.start[i]
        self.here -= {i for i in acting if self.tallies[i].leaving}
        self.rounds += 1

    def spread(self, names):
        rows = [self.x[self.names.index(name)] for name in names]
        return max((np.linalg.norm(a - b) for a in rows for b in rows), default=0.0)


RING = graph(NAMES[:6], TopologySpec("ring"))  # 3 hops; n00's neighbours are n01 and n05
ONCE = Plan("plain", (1.0,), 1.0, 1.0, 3)


def tally(chosen=ONCE, *, linked=RING["n00"], same=True):
    return Tally("n00", RING, linked, same=same, chosen=chosen, tolerance=0.75, norm=0.0)


def said(**fields):
    """A note of a neighbour that mixes plainly and has seen calm rounds enough."""
    return tally().note().model_copy(update={"calm": 9, **fields})


def heard(counting, one, other, **fields):
    """A round in which both neighbours' blocks came, so far away."""
    note = said(**fields)
    return counting.close_round({"n01": note, "n05": note}, {"n01": one, "n05": other})


def test_a_round_is_calm_where_nobody_is_farther_than_a_hops_share():
    """Of the tolerance, times what was between two neighbours at the beginning."""
    counting = tally()
    heard(counting, 1.0, 0.5)
    for one, other, calm in ((0.25, 0.25, 1), (0.1, 0.25, 2), (0.26, 0.1, 0), (0.25, 0.0, 1)):
        heard(counting, one, other)
        assert counting.note().calm == calm
    heard(counting, 0.0, 0.0, plain=False)  # what came was not mixed
    assert counting.note().calm == 0


def test_calm_rounds_are_counted_anew_where_the_way_turns_out_to_be_longer():
    """They were calm by the threshold of a shorter one."""
    counting = tally()
    heard(counting, 1.0, 1.0)
    heard(counting, 0.0, 0.0)
    heard(counting, 0.0, 0.0)
    assert counting.note().calm == 2
    heard(counting, 0.0, 0.0, need=6)
    assert (counting.note().calm, counting.hops) == (1, 5)


def test_the_longest_way_is_that_of_what_is_known_to_be_there():
    """The diameter; all nodes one after the other where an edge is missing; of two views, twice."""
    assert tally().hops == 3
    assert tally(linked=frozenset({"n01"})).hops == 5
    assert tally(same=False).hops == 11


def test_an_edge_is_given_up_after_vain_rounds_one_after_the_other():
    """Where one message in a hundred is lost none is given up by chance."""
    counting = tally()
    came, vain = {"n01": said(), "n05": said()}, {"n01": said()}
    for round_ in (*[vain] * (LOST_AFTER - 1), came, *[vain] * (LOST_AFTER - 1)):
        counting.close_round(round_, dict.fromkeys(round_, 1.0))
    assert counting.neighbours == {"n01", "n05"}
    counting.close_round(vain, {"n01": 1.0})
    assert counting.neighbours == {"n01"}
    assert counting.lost == {("n00", "n05")}


def test_who_was_done_and_has_left_is_missed_by_nobody():
    """Its edge is not lost, and no round was in vain."""
    counting = tally()
    heard(counting, 1.0, 1.0)
    last = {"n01": said(done=True), "n05": said()}
    counting.close_round(last, dict.fromkeys(last, 0.0))
    counting.close_round({"n05": said()}, {"n05": 0.0}, left=("n01",))
    assert counting.neighbours == {"n05"}
    assert (counting.lost, counting.note().fault) == (set(), None)


def test_what_is_said_of_lost_edges_is_believed_of_edges_and_by_their_ends():
    """A liar adds none that the graph has not, and takes away none of ours but its own."""
    counting = tally()
    lies = (("n00", "n05"), ("n02", "n05"), ("n00", "eve"), ("eve", "n02"))
    notes = {"n01": said(lost=(*lies, ("n02", "n03"))), "n05": said()}
    counting.close_round(notes, dict.fromkeys(notes, 1.0))
    assert counting.lost == {("n02", "n03")}
    assert counting.neighbours == {"n01", "n05"}
    notes["n05"] = said(lost=(("n05", "n00"),))
    counting.close_round(notes, dict.fromkeys(notes, 1.0))
    assert counting.neighbours == {"n01"}


def test_an_edge_is_used_where_both_ends_mix_in_the_same_way():
    chosen = Plan("exact", (2.0, 3.0), 0.0, 1.0, 3)
    counting = tally(chosen)
    assert counting.factor("n01", said(plain=False)) == 2.0
    assert counting.factor("n01", said()) == 0.0
    assert counting.factor("n03", said(plain=False)) == 0.0  # no neighbour
    assert tally().factor("n01", said()) == 1.0
    assert tally().factor("n01", said(plain=False)) == 0.0


@given(connected_graphs(16), st.sampled_from([1e-1, 1e-3]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_all_leave_together_when_nothing_fails(made, tolerance, seed):
    """After the planned rounds, one calm round for each distance, and one to say so."""
    hops = diameter(made)
    chosen = plan(made, tolerance / hops / 20, 10_000)
    crowd = Crowd(made, chosen, tolerance, seed, lambda *_: True)
    while crowd.here:
        assert len(crowd.here) == len(made)
        crowd.round()
        assert crowd.rounds <= len(chosen.factors) + hops + 2
    assert all(tally.done for tally in crowd.tallies)
    assert crowd.spread(crowd.names) <= tolerance * crowd.base
    np.testing.assert_allclose(crowd.x.mean(0), crowd.start.mean(0), atol=1e-9)
    bound = hops * max(tally.apart for tally in crowd.tallies)
    assert crowd.spread(crowd.names) <= bound + 1e-12


@given(connected_graphs(10), st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 3))
@settings(deadline=None, max_examples=150)
def test_the_living_agree_whoever_dies_when(made, seed, moment, deaths):
    """Who is done is within tolerance of all whom it can reach; nobody waits for ever."""
    source = random.Random(seed)
    chosen = plan(made, 1e-3 / diameter(made), 500)
    dead = {i: moment + source.randrange(3) for i in source.sample(range(len(made)), 1)}
    for _ in range(deaths - 1):
        dead[source.randrange(len(made))] = source.randrange(41)
    crowd = Crowd(made, chosen, 1e-3, seed, lambda *_: True)
    while crowd.here and crowd.rounds < 3000:
        crowd.here -= {i for i, when in dead.items() if when <= crowd.rounds}
        crowd.round()
    assert not crowd.here
    for i, tally in enumerate(crowd.tallies):
        if dead.get(i, 3000) <= crowd.rounds:
            continue
        assert tally.done or not tally.neighbours
        if not tally.done:
            continue
        group = reached(made, tally._own, tally.lost)
        group = [n for n in group if dead.get(crowd.names.index(n), 3000) > crowd.rounds]
        assert crowd.spread(group) <= 1e-3 * crowd.base * (1 + 1e-9)


@pytest.mark.parametrize("moment", range(8))
def test_a_broken_ring_is_as_long_as_its_path(moment):
    """A death makes ways longer than the diameter was; what is far away is still waited for.

    While the planned rounds were under way, the living end at the mean of what they began with.
    """
    made = graph(NAMES[:16], TopologySpec("ring"))
    chosen = plan(made, 0.01, 500)
    assert len(chosen.factors) == 8
    crowd = Crowd(made, chosen, 0.1, 0, lambda *_: True)
    crowd.x[:] = crowd.start[:] = 0
    crowd.x[15] = crowd.start[15] = 1  # beside n00, which dies; n01 is 14 hops away then
    crowd.base = np.sqrt(6)
    while crowd.here:
        crowd.here -= {0} if crowd.rounds >= moment else set()
        crowd.round()
    assert all(tally.done for tally in crowd.tallies[1:])
    assert crowd.spread(crowd.names[1:]) <= 0.1 * crowd.base
    np.testing.assert_allclose(crowd.x[1:].mean(0), crowd.start[1:].mean(0), atol=1e-12)


@given(connected_graphs(10), st.integers(0, 2**31), st.sampled_from([0.001, 0.01, 0.1]))
@settings(deadline=None, max_examples=100)
def test_who_is_done_is_right_whatever_gets_lost(made, seed, share):
    """Blocks that fail one way break edges or cost rounds; they do not end in a false verdict."""
    source = random.Random(seed)
    chosen = plan(made, 1e-3 / diameter(made), 500)
    crowd = Crowd(made, chosen, 1e-3, seed, lambda *_: source.random() >= share)
    while crowd.here and crowd.rounds < 2000:
        crowd.round()
    for tally in crowd.tallies:
        if tally.done:
            group = reached(made, tally._own, tally.lost)
            group = [n for n in group if crowd.tallies[crowd.names.index(n)].done]
            assert crowd.spread(group) <= 1e-3 * crowd.base * (1 + 1e-9)
    # Plain ends together: whatever got lost, values stay between those of the beginning.
    if all(tally.plain for tally in crowd.tallies):
        assert (crowd.x <= crowd.start.max(0) + 1e-9).all()
        assert (crowd.x >= crowd.start.min(0) - 1e-9).all()


@pytest.mark.parametrize(
    ("here", "finer", "anew"),
    [
        ("ab", False, False),  # nobody more: they have one model
        ("abc", False, True),
        ("ac", False, False),  # b would be left with another model
        ("a", True, False),
        ("ab", True, True),
    ],
)
def test_who_has_agreed_does_so_anew_only_with_all_of_them_and_for_a_reason(here, finer, anew):
    """Where nobody has, whoever is here may."""
    assert extends(frozenset("ab"), frozenset(here), finer=finer) == anew
    assert extends(frozenset(), frozenset(here), finer=finer)
