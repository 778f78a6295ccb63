"""The demo as a user runs it, and what the edges between its nodes are worth."""

import json
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


@pytest.mark.slow
def test_a_swarm_learns_what_its_nodes_alone_do_not(tmp_path):
    """Mean accuracy at least 0.80, every node at least 0.75, and 0.20 above isolated nodes."""
    swarm = demo(tmp_path / "swarm")
    assert swarm["mean_after_accuracy"] >= 0.80
    assert swarm["min_after_accuracy"] >= 0.75
    assert len(swarm["nodes"]) == 4
    assert all(node["bytes_received"] > 0 for node in swarm["nodes"])
    absent = [node for node in swarm["nodes"] if len(node["label_counts"]) < 5]
    assert absent, "the split gives every node every topic: it shows nothing"
    for name in ("results.png", *(f"node-{i}/model/model.safetensors" for i in range(4))):
        assert (tmp_path / "swarm" / name).stat().st_size > 0
    alone = demo(tmp_path / "alone", "--isolated")
    assert all(node["bytes_received"] == 0 for node in alone["nodes"])
    assert swarm["mean_after_accuracy"] - alone["mean_after_accuracy"] >= 0.20
