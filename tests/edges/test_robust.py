"""Clipped and trimmed mixing in whole swarms: in every format, late, and with a liar in it."""

import json
import statistics

import numpy as np
import pytest
import torch

from deca_node import experiment, virtual_time
from deca_node.compression import Format
from deca_node.laboratory import Laboratory
from deca_node.methods.deca import Deca
from deca_node.mixing import STALE_STEP
from deca_node.moments import Rule
from deca_node.robust import Aggregation
from deca_node.simulator import Simulation
from tests.swarm import ToyModel, ToySwarm

CLIPPED, TRIMMED = Aggregation("clipped"), Aggregation("trimmed")


def deca(aggregation, stale=False):
    """A method whose block is 48 values, all 0 and all 1 where it wants to be."""
    model = ToyModel(torch.ones(48))
    model.layers[0].data.uniform_(-1, 1)
    method = Deca(model, Rule(0.05), "toy", "n0", aggregation=aggregation, stale=stale)
    from deca_node.blocks import Visit

    method.open(Visit(0, 0, 0, 0, range(1)), None)
    return method


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("aggregation", [CLIPPED, TRIMMED])
def test_the_mix_is_made_when_all_have_come(aggregation, stale):
    """Nothing is mixed as it comes; what comes of it is the rule's answer, late by half."""
    method = deca(aggregation, stale)
    method.gradient(None)
    method.advance(0)
    half = method.state()["x"].clone()
    method.outgoing(0)
    came = {f"n{i}": half + torch.randn(48) * i for i in (1, 2, 3)}
    for peer, values in came.items():
        method.intake(peer)(0, values, 0.25)
    assert torch.equal(method.state()["x"], half)
    settled = method.settle(0)
    if stale:
        assert torch.equal(method.state()["x"], half)
        method.absorb()
    rows = np.stack([half.numpy(), *(values.numpy() for values in came.values())])
    if aggregation is TRIMMED:
        expected = np.sort(rows, 0)[1:-1].mean(0)
    else:
        far = {peer: float((values - half).norm()) for peer, values in came.items()}
        near = sorted(far.values())[:-1]
        tau = min(np.sqrt(sum(0.25 * d**2 for d in near) / 0.25), 0.5 * near[-1])
        left = {peer: min(1.0, tau / far[peer]) for peer in came}
        expected = half.numpy() + sum(
            0.25 * (values - half).numpy() * left[peer] for peer, values in came.items()
        )
        assert settled.clipped == ({} if stale else pytest.approx(left))
    share = STALE_STEP if stale else 1.0
    expected = half.numpy() + share * (expected - half.numpy())
    np.testing.assert_allclose(method.state()["x"].numpy(), expected, rtol=0, atol=1e-6)


def test_the_mean_is_mixed_as_it_comes():
    """Nothing is kept of what arrives, and nothing waits."""
    method = deca(Aggregation())
    method.gradient(None)
    method.advance(0)
    method.outgoing(0)
    assert method.intake("n1") == method.mix
    assert method._kept is None


@pytest.mark.parametrize("aggregation", [CLIPPED, TRIMMED])
@pytest.mark.parametrize(
    ("wire", "stale"), [(Format.FP32, False), (Format.BF16, True), (Format.INT8, False)]
)
def test_honest_nodes_learn_together_over_every_format(aggregation, wire, stale):
    """They end near the common optimum, which none would find alone; as differences, too."""
    ends = {}
    for rule in (aggregation, None):
        swarm = ToySwarm(
            5,
            kind="full" if rule else "explicit",
            rounds=8,
            steps=4,
            learning_rate=0.2,
            stale=stale,
            wire_format=lambda index: wire,
            aggregation=rule or Aggregation(),
        )

        async def live(swarm=swarm):
            swarm.start()
            await swarm.finish()

        virtual_time.run(live())
        assert all(node.story.finished for node in swarm.nodes)
        ends[rule is None] = float((swarm.models() - 1.0).abs().mean())
    assert ends[False] < 0.6 * ends[True], ends


TOY = """
[experiment]
name = "robust"
nodes = {nodes}
seeds = {seeds}

[rehearsal]
rows = 1200
layers = 2
hidden = 32

[partition]
alpha = 1.0
test_per_label = 100

[node]
threads = 1

[schedule]
rounds = 1
steps = 24

[optimizer]
learning_rate = 2e-2

[topology]
kind = "full"

[grid]
faults.attacks = [{attack}]
aggregation.rule = ["{rule}"]
"""
NODES, LIAR = 8, "node-0"


def accuracies(tmp_path, rule, factor=None, seeds=(0, 1, 2)):
    """Mean accuracy of the seven that are honest in all runs, by seed."""
    path, out = tmp_path / f"{rule}{factor}.toml", tmp_path / f"{rule}{factor}"
    attack = "{}" if factor is None else f"{{ {LIAR} = {factor} }}"
    told = {"nodes": NODES, "seeds": json.dumps(list(seeds)), "rule": rule, "attack": attack}
    path.write_text(TOY.format(**told))
    out.mkdir()
    grid = experiment.read(path, out)
    laboratory, found = Laboratory(grid, out), []
    for cell in grid.cells:
        material, _ = laboratory._material(cell)
        simulation = Simulation(cell, material, lambda _: None)
        virtual_time.run(simulation.run())
        rows = [row for row in simulation.measure() if row["node"] != LIAR]
        assert len(rows) == NODES - 1
        found.append(statistics.fmean(row["accuracy"] for row in rows))
    return found


@pytest.mark.long
def test_one_liar_spoils_the_mean_and_not_the_clipped_mix(tmp_path):
    """Signs turned or huge: chance with the mean, else within 3 points of where all are honest.

    Of three seeds in the mean. All honest, the seven have the eighth's data beside theirs.
    """
    honest = statistics.fmean(accuracies(tmp_path, "mean"))
    assert honest > 0.9
    for factor in (-1.0, 1e6):
        (spoilt,) = accuracies(tmp_path, "mean", factor, seeds=(0,))
        assert spoilt < 0.35  # four labels: chance is 0.25
        clipped = statistics.fmean(accuracies(tmp_path, "clipped", factor))
        assert clipped > honest - 0.03, (factor, clipped, honest)
        (trimmed,) = accuracies(tmp_path, "trimmed", factor, seeds=(0,))
        assert trimmed > 0.7
