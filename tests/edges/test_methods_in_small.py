"""The main comparison as a regression test: a toy model, every method, wide margins.

What it shows is that each method learns and agrees on skewed data, not which is better: that takes
more steps, seeds and learning rates (docs/results).
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


def test_every_method_learns_and_deca_more_than_nodes_alone(tmp_path):
    """Test loss falls for each; alone, nodes do not learn what they have no examples of."""
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    methods = get_args(Method)
    text = FILE + "".join(map(grid, methods)) + grid("deca", isolated=True)
    (tmp_path / "small.toml").write_text(text)
    assert deca_node("simulate", tmp_path / "small.toml", "-o", tmp_path / "out") == 0
    cells = [read_cell(path) for path in (tmp_path / "out" / "cells").iterdir()]
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
