"""The main comparison and the ablation as regression tests: a toy model, wide margins.

What they show is that each method learns and agrees on skewed data, and what the correction from
the mix does to agreement, not which is better: that takes more steps, seeds and learning rates
(docs/results).
"""

from typing import get_args

import pytest

from deca_node.config import Method, has
from deca_node.laboratory import read_cell
from tests.edges.test_simulator import deca_node

# Four nodes, three of four labels missing on most of them; as many steps for every method.
FILE = """
[experiment]
name = "small"
nodes = 4
measured = 2
[rehearsal]
rows = 200
layers = 2
hidden = 32
[partition]
alpha = 0.25
test_per_label = 10
[node]
threads = 1
[topology]
kind = "ring"
[schedule]
rounds = 1
"""
STEPS = 24
RATES = {"dsgd": 0.5, "dadam": 1e-2, "qg-adam": 1e-2, "deca": 1e-2}
ADAPTERS = 2e-2


def grid(method, isolated=False):
    steps = STEPS // 2 if method == "deca" else STEPS  # two blocks
    text = f'[[grid]]\nrun.method = ["{method}"]\nschedule.steps = [{steps}]\n'
    text += f"optimizer.learning_rate = [{RATES.get(method, ADAPTERS)}]\n"
    if has(method, "lora"):
        text += "lora.local_steps = [4]\n"
    return text + ('topology.kind = ["explicit"]\n' if isolated else "")


def simulate(folder, text):
    """The cells of an experiment: of each the rows of its file."""
    (folder / "small.toml").write_text(text)
    assert deca_node("simulate", folder / "small.toml", "-o", folder / "out") == 0
    return [read_cell(path) for path in (folder / "out" / "cells").iterdir()]


def test_every_method_learns_and_deca_more_than_nodes_alone(tmp_path):
    """Test loss falls for each; alone, nodes do not learn what they have no examples of."""
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    methods = get_args(Method)
    text = FILE + "".join(map(grid, methods)) + grid("deca", isolated=True)
    cells = simulate(tmp_path, text)
    assert len(cells) == len(methods) + 1
    last = {
        (cell[0]["values"]["run.method"], "topology.kind" in cell[0]["values"]): cell[-1]
        for cell in cells
    }
    for method in methods:
        one = last[method, False]
        assert one["finished"] == 4
        assert one["incomplete_mixes"] == 0
        assert one["test_loss"] < one["before_loss"] - 0.3, method
    together, alone = last["deca", False], last["deca", True]
    assert alone["bytes_sent"] == 0 < together["bytes_sent"]
    assert together["test_loss"] < alone["test_loss"]
    # The methods differ in what they send as their trained parts differ.
    assert last["dec-lora", False]["bytes_sent"] < together["bytes_sent"]
    assert together["bytes_sent"] < last["dadam", False]["bytes_sent"]


def test_the_correction_from_the_mix_keeps_nodes_together(tmp_path):
    """In three seeds `l2` left a tenth of the disagreement, trivial a quarter, `none` a third."""
    text = FILE + grid("deca")
    text += grid("deca") + 'optimizer.bma = ["off", "trivial"]\n'
    text += grid("deca") + 'optimizer.discrepancy = ["none", "lr", "zero"]\n'
    cells = simulate(tmp_path, text)
    last = {
        cell[0]["values"].get(
            "optimizer.discrepancy", cell[0]["values"].get("optimizer.bma", "l2")
        ): cell[-1]
        for cell in cells
    }
    assert set(last) == {"off", "trivial", "l2", "none", "lr", "zero"}
    for name, one in last.items():
        assert one["finished"] == 4
        assert one["test_loss"] < one["before_loss"] - 0.1, name
    apart = {name: one["disagreement"] for name, one in last.items()}
    assert apart["l2"] < apart["off"] / 4
    assert apart["trivial"] < apart["off"] / 2
    assert apart["none"] < apart["off"] / 1.5
    # Moments that only shrink do not bring nodes together: what is blended in does.
    assert apart["zero"] > 3 * apart["l2"]
    # The difference by the learning rate outweighs the gradient: it agrees, and hardly learns.
    assert apart["lr"] < apart["off"] / 4
    assert last["lr"]["test_loss"] > max(last[name]["test_loss"] for name in ("l2", "none", "off"))
