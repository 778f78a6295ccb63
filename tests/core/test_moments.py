"""The DECA step against the float64 oracle and against torch.optim.Adam."""

import numpy as np
import pytest
import torch

from deca_node.mixing import metropolis_hastings, mix_arrival
from deca_node.moments import (
    Rule,
    discrepancy_norm,
    fold,
    half_step,
    mixed_square,
    scale,
    slices,
)
from deca_node.topology import TopologySpec, graph
from tests import oracle

CLIENTS, ROUNDS, BLOCKS, STEPS, SIZE = 8, 3, 4, 5, 37
NAMES = [f"n{i}" for i in range(CLIENTS)]


def quadratic(seed):
    """Gradients of skewed quadratics: every client pulls to its own optimum, with noise."""
    source = np.random.default_rng(seed)
    target = source.normal(size=(CLIENTS, BLOCKS, SIZE))
    noise = source.normal(size=(CLIENTS, ROUNDS, BLOCKS, STEPS, SIZE)) * 0.1
    coupling = source.normal(size=(BLOCKS, BLOCKS)) * 0.1 + np.eye(BLOCKS)

    def gradient(client, round_, position, step, blocks, active):
        pull = sum(coupling[active, b] * (blocks[b] - target[client, b]) for b in range(BLOCKS))
        return pull + noise[client, round_, position, step]

    return gradient


def run_torch(initial, gradient, neighbours, rule, order):
    """n clients with the functions of the package, in float64."""
    blocks = [[torch.tensor(block) for block in initial] for _ in NAMES]
    moments = []
    for round_ in range(ROUNDS):
        for position, active in enumerate(order(round_)):
            moments = [(torch.zeros(SIZE).double(), torch.zeros(SIZE).double()) for _ in NAMES]
            for step in range(STEPS):
                grads = [
                    torch.tensor(
                        gradient(i, round_, position, step, [b.numpy() for b in own], active)
                    )
                    for i, own in enumerate(blocks)
                ]
                for own, grad, (m, v) in zip(blocks, grads, moments, strict=True):
                    half_step(own[active], grad, m, v, step, rule)
                published = [own[active].clone() for own in blocks]
                for i, name in enumerate(NAMES):
                    x, (m, v) = blocks[i][active], moments[i]
                    degrees = {peer: len(neighbours[peer]) for peer in neighbours[name]}
                    row = metropolis_hastings(len(degrees), degrees)
                    for peer, weight in row.items():
                        mix_arrival(x, published[i], published[NAMES.index(peer)], weight)
                    total, _ = discrepancy_norm(published[i], x, m, v, step, rule)
                    fold(published[i], x, m, v, step, rule, scale(total**0.5, rule))
    return blocks, moments


@pytest.mark.parametrize("kind", ["ring", "full", "erdos_renyi", "bipartite"])
@pytest.mark.parametrize("bma", ["on", "off", "trivial"])
@pytest.mark.parametrize("discrepancy", ["l2", "none", "lr", "zero"])
def test_eight_clients_equal_the_oracle(kind, bma, discrepancy):
    """Parameters and moments of every client equal the paper's equations to 1e-6 relative."""
    neighbours = graph(NAMES, TopologySpec(kind, p=0.4, seed=1))
    adjacency = np.array([[peer in neighbours[name] for peer in NAMES] for name in NAMES])
    initial = [np.random.default_rng(7).normal(size=SIZE) for _ in range(BLOCKS)]
    constants = {"learning_rate": 3e-3, "bma": bma, "discrepancy": discrepancy}

    def order(round_):
        return [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]][round_]

    expected = oracle.run(
        initial,
        quadratic(5),
        adjacency,
        rounds=ROUNDS,
        steps=STEPS,
        settings=oracle.Settings(**constants),
        order=order,
    )
    blocks, moments = run_torch(initial, quadratic(5), neighbours, Rule(**constants), order)
    for client, own, (m, v) in zip(expected, blocks, moments, strict=True):
        for block, mine in zip(client.blocks, own, strict=True):
            np.testing.assert_allclose(mine.numpy(), block, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(m.numpy(), client.m, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(v.numpy(), client.v, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rule", [Rule(1e-2, bma="off"), Rule(1e-2, bma_beta1=1, bma_beta2=1)])
def test_alone_with_the_moments_kept_it_is_adam(rule):
    """Without neighbours and with β = 1 (or BMA off) the step is torch.optim.Adam to 1e-6."""
    torch.manual_seed(0)
    x = torch.randn(100_000, dtype=torch.float64)
    reference = torch.nn.Parameter(x.clone())
    adam = torch.optim.Adam([reference], lr=1e-2)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(20):
        gradient = torch.randn_like(x)
        reference.grad = gradient.clone()
        adam.step()
        half_step(x, gradient, m, v, step, rule)
        half = x.clone()
        total, mixed = discrepancy_norm(half, x, m, v, step, rule)
        fold(half, x, m, v, step, rule, scale(total**0.5, rule))
        assert mixed == 0
    torch.testing.assert_close(x, reference.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(m, adam.state[reference]["exp_avg"], rtol=1e-6, atol=0)


def test_nothing_moved_folds_in_zero():
    """Where the norm of (8) is 0, h is 0: no NaN enters the moments."""
    rule, zeros = Rule(1e-3), torch.zeros(10)
    x, m, v = torch.ones(10), zeros.clone(), zeros.clone()
    half_step(x, zeros, m, v, 0, rule)
    total, _ = discrepancy_norm(x, x, m, v, 0, rule)
    fold(x.clone(), x, m, v, 0, rule, scale(total**0.5, rule))
    assert total == 0
    assert torch.equal(x, torch.ones(10))
    assert torch.equal(m, zeros)
    assert torch.equal(v, zeros)


def test_a_half_precision_gradient_is_widened_first():
    """An fp16 gradient is squared in fp32, where 1e-10 does not vanish."""
    x, m, v = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    half_step(x, torch.full((4,), 1e-5, dtype=torch.float16), m, v, 0, Rule(1e-3))
    assert (v > 0).all()


def test_what_the_mix_changed_is_measured_alone():
    """‖x½ − x_next‖² by slices, with and without BMA."""
    torch.manual_seed(0)
    half, after = torch.randn(70_000), torch.randn(70_000)
    expected = float((half.double() - after.double()).square().sum())
    assert mixed_square(half, after) == pytest.approx(expected, rel=1e-5)
    m, v = torch.randn(70_000), torch.rand(70_000)
    _, mixed = discrepancy_norm(half, after, m, v, 0, Rule(1e-2))
    assert mixed == pytest.approx(expected, rel=1e-5)


def test_slices_cover_everything_once():
    """Slicing neither skips nor repeats an element at the borders."""
    covered = torch.zeros(100_001, dtype=torch.int32)
    for part in slices(covered):
        covered[part] += 1
    assert (covered == 1).all()
