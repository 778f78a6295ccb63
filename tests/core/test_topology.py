"""Graphs and weights: shapes known by hand, properties on random graphs."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node import topology
from deca_node.mixing import STALE_STEP, metropolis_hastings, mix_arrival
from deca_node.topology import MAX_DRAWN_PAIRS, TopologySpec, graph, is_connected

NAMES = [f"n{i:02}" for i in range(16)]
KINDS = ("full", "ring", "erdos_renyi", "bipartite")


@st.composite
def connected_graphs(draw):
    """A random tree with random further edges."""
    size = draw(st.integers(1, 12))
    edges = {(i, draw(st.integers(0, i - 1))) for i in range(1, size)}
    pairs = [(i, j) for i in range(size) for j in range(i)]
    edges |= set(draw(st.lists(st.sampled_from(pairs), max_size=20))) if pairs else set()
    spec = TopologySpec("explicit", edges=tuple((NAMES[i], NAMES[j]) for i, j in edges))
    return graph(NAMES[:size], spec)


def weight_matrix(neighbours):
    """The rows that the nodes compute alone, side by side."""
    names = sorted(neighbours)
    matrix = np.zeros((len(names), len(names)))
    for i, name in enumerate(names):
        row = metropolis_hastings(
            len(neighbours[name]), {peer: len(neighbours[peer]) for peer in neighbours[name]}
        )
        for peer, weight in row.items():
            matrix[i, names.index(peer)] = weight
        matrix[i, i] = 1 - sum(row.values())
    return matrix


@given(connected_graphs())
def test_weights_are_symmetric_and_doubly_stochastic(neighbours):
    """Rows computed by nodes that know only their neighbours' degrees form a proper W."""
    matrix = weight_matrix(neighbours)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-12)
    assert (matrix >= -1e-15).all()


def stale_radius(matrix, step):
    """Largest growth in a step of x' = x + step (W − I) x_prev, off the mean."""
    size = len(matrix)
    identity, zero = np.eye(size), np.zeros((size, size))
    centre = identity - 1 / size
    companion = np.block([[centre, step * (matrix - identity)], [centre, zero]])
    return max(abs(np.linalg.eigvals(companion)))


@given(connected_graphs())
@settings(deadline=None)
def test_mixing_a_step_late_is_stable_on_every_graph(neighbours):
    """By half, every difference between nodes shrinks."""
    if len(neighbours) > 1:
        assert stale_radius(weight_matrix(neighbours), STALE_STEP) < 1


def test_mixing_a_step_late_in_full_is_not_stable():
    """On a ring of four it grows: what the half is for."""
    ring = weight_matrix(graph(NAMES[:4], TopologySpec("ring")))
    assert stale_radius(ring, 1.0) > 1


@given(connected_graphs(), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_whole_mix_preserves_the_mean(neighbours, seed):
    """With every edge used by both ends the mean over nodes is the same after the mix."""
    source = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(64, generator=source) for name in neighbours}
    mixed = {}
    for name, others in neighbours.items():
        mixed[name] = values[name].clone()
        degrees = {peer: len(neighbours[peer]) for peer in others}
        for peer, weight in metropolis_hastings(len(others), degrees).items():
            mix_arrival(mixed[name], values[name], values[peer], weight)
    before = torch.stack(list(values.values())).mean(0)
    after = torch.stack(list(mixed.values())).mean(0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@given(connected_graphs(), st.data())
@settings(deadline=None)
def test_every_partial_arrival_is_a_convex_combination(neighbours, data):
    """Whatever subset of chunks arrives, each coordinate stays between the nodes' values."""
    names = sorted(neighbours)
    values = {name: torch.randn(40, dtype=torch.float64) for name in names}
    name = data.draw(st.sampled_from(names))
    mixed = values[name].clone()
    degrees = {peer: len(neighbours[peer]) for peer in neighbours[name]}
    for peer, weight in metropolis_hastings(len(degrees), degrees).items():
        for low in range(0, 40, 10):
            if data.draw(st.booleans()):
                part = slice(low, low + 10)
                mix_arrival(mixed[part], values[name][part], values[peer][part], weight)
    stack = torch.stack(list(values.values()))
    assert (mixed <= stack.amax(0) + 1e-12).all()
    assert (mixed >= stack.amin(0) - 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_graphs_are_symmetric_connected_and_the_same_for_all(kind, size):
    """The graph does not depend on the order in which a node met the members."""
    spec = TopologySpec(kind, p=0.4, seed=3)
    made = graph(NAMES[:size], spec)
    assert made == graph(reversed(NAMES[:size]), spec)
    assert is_connected(made)
    assert all(name in made[peer] for name, others in made.items() for peer in others)
    assert all(name not in others for name, others in made.items())


def test_degrees_of_the_known_shapes():
    """Full, ring and complete bipartite graphs have the degrees of the textbook."""

    def degrees(kind, size):
        return [len(n) for _, n in sorted(graph(NAMES[:size], TopologySpec(kind)).items())]

    assert degrees("full", 4) == [3] * 4
    assert degrees("ring", 5) == [2] * 5
    assert degrees("ring", 2) == [1, 1]
    assert degrees("bipartite", 5) == [2, 3, 2, 3, 2]


def test_explicit_edges_to_strangers_do_not_count():
    """An edge needs both ends to be members; without edges everybody is alone."""
    spec = TopologySpec("explicit", edges=(("a", "b"), ("b", "z")))
    assert graph("abc", spec) == {"a": {"b"}, "b": {"a"}, "c": frozenset()}
    assert not is_connected(graph("abc", spec))


def test_an_impossible_probability_falls_back_to_a_ring():
    """p far under the connectivity threshold still gives a connected graph."""
    assert is_connected(graph(NAMES, TopologySpec("erdos_renyi", p=1e-9)))


def test_the_seed_changes_the_random_graph():
    """Two runs with different seeds do not share their random graph."""
    draws = {str(graph(NAMES, TopologySpec("erdos_renyi", p=0.4, seed=s))) for s in range(5)}
    assert len(draws) > 1


def test_inconsistent_degrees_are_refused():
    """Degrees that cannot be true are an error, not a negative self-weight."""
    with pytest.raises(ValueError, match="2 neighbours but degree 1"):
        metropolis_hastings(1, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="at least one edge"):
        metropolis_hastings(1, {"a": 0})


def test_a_graph_that_is_never_connected_is_given_up_soon(monkeypatch):
    """All that is drawn, of 256 members, takes a part of a second; the ring is under it."""
    drawn = []

    class Counted(random.Random):
        def random(self):
            drawn.append(None)
            return super().random()

    monkeypatch.setattr(topology.random, "Random", Counted)
    names = [f"n{i:03}" for i in range(256)]
    found = graph(names, TopologySpec("erdos_renyi", p=0.001))
    assert is_connected(found)
    assert len(drawn) <= MAX_DRAWN_PAIRS


def test_draws_that_are_connected_are_those_of_before():
    """Of all versions: a run's nodes may have several, and results are compared."""
    source = random.Random("deca/erdos-renyi/3/" + "/".join(NAMES))
    pairs = list(itertools.combinations(NAMES, 2))
    for draw in range(1000):  # noqa: B007 - how many it took
        edges = {pair for pair in pairs if source.random() < 0.1}
        expected = graph(NAMES, TopologySpec("explicit", edges=tuple(edges)))
        if is_connected(expected):
            break
    assert draw > 3
    assert graph(NAMES, TopologySpec("erdos_renyi", p=0.1, seed=3)) == expected
