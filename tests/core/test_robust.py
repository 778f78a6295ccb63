"""Clipped and trimmed mixing against plain oracles, and what a hostile neighbour can do to them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.errors import PeerRefused
from deca_node.limits import MAX_KEPT_ARRIVALS
from deca_node.moments import CPU_SLICE
from deca_node.robust import Aggregation, Arrivals, clip_factors, radius

NUMEL = CPU_SLICE + 77  # more than one slice


def blocks(count, seed=0, spread=1.0):
    """This node's block and its neighbours'."""
    draw = np.random.default_rng(seed)
    own = draw.normal(size=NUMEL).astype(np.float32)
    others = {
        f"n{i}": own + draw.normal(size=NUMEL).astype(np.float32) * spread * (i + 1)
        for i in range(count)
    }
    return own, others


def mixed(own, others, weights, aggregation, share=1.0, pieces=1000):
    """What Arrivals makes of them, in pieces as they come."""
    arrivals = Arrivals(NUMEL, aggregation)
    for peer, values in others.items():
        for low in range(0, NUMEL, pieces):
            part = slice(low, min(low + pieces, NUMEL))
            arrivals.take(
                peer,
                low,
                torch.from_numpy(own[part]),
                torch.from_numpy(values[part]),
                weights[peer],
            )
    x = torch.from_numpy(own.copy())
    factors = arrivals.mix_into(x, share)
    return x.numpy(), factors


def clipped_oracle(own, others, weights, hostile, tau=None):
    """x_i + Σ w_ij clip(x_j − x_i, τ_i) as the paper prints it, in float64.

    But for τ_i, which is at most half of what the farthest is away who is not left out.
    """
    own = own.astype(np.float64)
    away = {peer: values - own for peer, values in others.items()}
    far = {peer: np.linalg.norm(d) for peer, d in away.items()}
    if tau is None:
        near = sorted(far, key=far.get)[: len(far) - hostile]
        delta = sum(sorted(weights.values())[-hostile:])
        tau = math.sqrt(sum(weights[p] * far[p] ** 2 for p in near) / delta) if near else 0.0
        tau = min(tau, 0.5 * max((far[p] for p in near), default=0.0))
    return own + sum(weights[p] * d * min(1.0, tau / far[p]) for p, d in away.items())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("hostile", [1, 2])
@pytest.mark.parametrize("tau", [0.0, 50.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_clipped_is_the_papers_equation(count, hostile, tau, share):
    """With its radius from the neighbours' distances, or a fixed one; late by half, too."""
    own, others = blocks(count)
    weights = {peer: 1 / (count + 1 + i % 2) for i, peer in enumerate(others)}
    found, factors = mixed(own, others, weights, Aggregation("clipped", hostile, tau), share)
    expected = clipped_oracle(own, others, weights, hostile, tau or None)
    np.testing.assert_allclose(found, own + share * (expected - own), rtol=0, atol=1e-5)
    assert factors.keys() == others.keys()
    assert all(0 <= factor <= 1 for factor in factors.values())
    if count <= hostile and not tau:
        assert set(factors.values()) == {0.0}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("hostile", [1, 2, 3])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_trimmed_is_the_mean_of_the_middle(count, hostile, share):
    """By coordinate, own value included; with too few values nothing changes."""
    own, others = blocks(count)
    weights = dict.fromkeys(others, 0.01)  # they do not count
    found, _ = mixed(own, others, weights, Aggregation("trimmed", hostile), share)
    rows = np.sort(np.stack([own, *others.values()]).astype(np.float64), axis=0)
    middle = rows[hostile : len(rows) - hostile]
    expected = middle.mean(0) if len(middle) else own
    np.testing.assert_allclose(found, own + share * (expected - own), rtol=0, atol=1e-5)


@given(
    factor=st.floats(-(2.0**127), 2.0**127, width=32),
    count=st.integers(2, 5),
    rule=st.sampled_from(["clipped", "trimmed"]),
)
@settings(max_examples=40, deadline=None)
def test_one_neighbour_moves_a_block_no_further_than_the_others_could(factor, count, rule):
    """Whatever it sends; the result is finite, and as near to the honest as they are to us."""
    own, others = blocks(count, spread=0.1)
    honest = max(float(np.linalg.norm(v - own)) for v in others.values())
    others["evil"] = np.full(NUMEL, factor, np.float32)
    weights = dict.fromkeys(others, 1 / (count + 2))
    found, _ = mixed(own, others, weights, Aggregation(rule))
    assert np.isfinite(found).all()
    moved = float(np.linalg.norm(found - own))
    # Clipped: each by its weight times τ, which is at most half the farthest honest distance.
    assert moved <= honest * 1.001


def test_a_radius_that_no_neighbour_can_blow_up():
    """Distances near the end of float64 stay numbers; ties and zeros are no trouble."""
    weights = {"a": 0.25, "b": 0.25, "c": 0.25}
    assert radius({"a": 1e300, "b": 1e300, "c": 1e300}, weights, 1) == pytest.approx(5e299)
    assert radius({"a": 0.0, "b": 0.0, "c": 9.0}, weights, 1) == 0.0
    factors = clip_factors({"a": 0.0, "b": 0.0, "c": 9.0}, weights, Aggregation("clipped"))
    assert factors == {"a": 1.0, "b": 1.0, "c": 0.0}


def test_a_liar_adds_no_more_than_half_of_the_farthest_of_those_who_count():
    """How far the liar is does not matter; a heavy one is the paper's case, and adds less."""
    far = {"a": 1.0, "b": 2.0, "c": 3.0, "evil": 1e30}
    equal = dict.fromkeys(far, 0.2)
    assert radius(far, equal, 1) == 1.5
    factors = clip_factors(far, equal, Aggregation("clipped"))
    assert factors == {"a": 1.0, "b": 0.75, "c": 0.5, "evil": pytest.approx(1.5e-30)}
    heavy = {"a": 0.05, "b": 0.05, "c": 0.05, "evil": 0.8}
    assert radius(far, heavy, 1) == pytest.approx(math.sqrt(14 * 0.05 / 0.8))


def test_who_did_not_come_in_full_counts_for_nothing():
    """And what it left is not taken for the next step's."""
    own, others = blocks(3)
    weights = dict.fromkeys(others, 0.25)
    for rule in ("clipped", "trimmed"):
        arrivals = Arrivals(NUMEL, Aggregation(rule))
        for peer, values in others.items():
            end = NUMEL if peer != "n2" else NUMEL - 1
            arrivals.take(
                peer, 0, torch.from_numpy(own[:end]), torch.from_numpy(values[:end]), 0.25
            )
        x = torch.from_numpy(own.copy())
        arrivals.mix_into(x)
        rest = {peer: others[peer] for peer in ("n0", "n1")}
        expected, _ = mixed(own, rest, weights, Aggregation(rule))
        assert np.array_equal(x.numpy(), expected)
        before = x.clone()
        assert arrivals.mix_into(x) == {}
        assert torch.equal(x, before)


@pytest.mark.parametrize("rule", ["clipped", "trimmed"])
def test_a_step_is_mixed_as_if_there_had_been_none_before(rule):
    """Distances and weights are the step's own."""
    arrivals = Arrivals(NUMEL, Aggregation(rule))
    for seed, weight in ((1, 0.1), (0, 0.25)):
        own, others = blocks(3, seed)
        for peer, values in others.items():
            arrivals.take(peer, 0, torch.from_numpy(own), torch.from_numpy(values), weight)
        x = torch.from_numpy(own.copy())
        arrivals.mix_into(x)
        weights = dict.fromkeys(others, weight)
        expected, _ = mixed(own, others, weights, Aggregation(rule), pieces=NUMEL)
        assert np.array_equal(x.numpy(), expected)


@pytest.mark.parametrize("rule", ["clipped", "trimmed"])
def test_the_order_of_arrivals_changes_no_bit(rule):
    """Nor does how a block is cut into messages."""
    own, others = blocks(4)
    weights = dict.fromkeys(others, 0.2)
    one, _ = mixed(own, others, weights, Aggregation(rule))
    turned, _ = mixed(own, dict(reversed(others.items())), weights, Aggregation(rule))
    assert np.array_equal(one, turned)
    if rule == "trimmed":  # a norm is summed in the order of the messages
        cut, _ = mixed(own, others, weights, Aggregation(rule), pieces=777)
        assert np.array_equal(one, cut)


def test_no_more_blocks_are_kept_than_are_allowed():
    """The one on top is refused by name, and takes no memory."""
    arrivals, piece = Arrivals(10, Aggregation("clipped")), torch.zeros(10)
    for number in range(MAX_KEPT_ARRIVALS):
        arrivals.take(f"n{number}", 0, piece, piece, 0.01)
    with pytest.raises(PeerRefused) as caught:
        arrivals.take("one more", 0, piece, piece, 0.01)
    assert caught.value.reason == "too_many_arrivals"
    arrivals.take("n0", 0, piece, piece, 0.01)  # the next step's
