"""The demo as a user runs it, and what the edges between its nodes are worth."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "bbc_demo.py"


def demo(out, *arguments):
    """results.json of a demo run."""
    command = [sys.executable, str(DEMO), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    ("seed", "isolated", "folder"),
    [
        (0, False, "out/demo"),
        (1, False, "out/demo-seed1"),
        (0, True, "out/demo-isolated"),
        (1, True, "out/demo-seed1-isolated"),
    ],
)
def test_each_demo_has_a_folder_of_its_own(seed, isolated, folder):
    """One that was interrupted does not stop another, for which make has no --out."""
    found = runpy.run_path(str(DEMO))["default_out"](seed, isolated=isolated)
    assert found == Path(folder)


@pytest.mark.slow
def test_a_swarm_learns_what_its_nodes_have_not_seen(tmp_path):
    """Mean accuracy at least 0.80 and every node at least 0.75, though some lack whole topics."""
    swarm = demo(tmp_path / "swarm")
    assert swarm["mean_after_accuracy"] >= 0.80
    assert swarm["min_after_accuracy"] >= 0.75
    assert set(swarm) == {
        "nodes",
        "mean_after_accuracy",
        "min_after_accuracy",
        "disagreement",
        "wall_seconds",
        "settings",
    }
    assert len(swarm["nodes"]) == 4
    for node in swarm["nodes"]:
        assert set(node) == {
            "node",
            "label_counts",
            "before",
            "after",
            "bytes_sent",
            "bytes_received",
        }
        for scores in (node["before"], node["after"]):
            assert set(scores) == {"accuracy", "macro_f1"}
            assert all(0 <= score <= 1 for score in scores.values())
    assert all(node["bytes_received"] > 0 for node in swarm["nodes"])
    absent = [node for node in swarm["nodes"] if len(node["label_counts"]) < 5]
    assert absent, "the split gives every node every topic: it shows nothing"
    for name in ("results.png", *(f"node-{i}/model/model.safetensors" for i in range(4))):
        assert (tmp_path / "swarm" / name).stat().st_size > 0


@pytest.mark.long
def test_nodes_alone_do_not_learn_it(tmp_path):
    """0.64 where the swarm reaches 0.88, when last measured: at least 0.10 below its bound."""
    alone = demo(tmp_path / "alone", "--isolated")
    assert all(node["bytes_received"] == 0 for node in alone["nodes"])
    assert alone["mean_after_accuracy"] <= 0.70
