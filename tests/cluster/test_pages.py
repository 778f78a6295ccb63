"""The pages of docs/ that say what to type, typed."""

import json
import uuid

import pytest

from deca_node.config import load
from tests.cluster.daemons import Daemon, end_all
from tests.pages import follow
from tests.tiny import make_model

pytestmark = pytest.mark.slow


def test_own_data(tmp_path):
    """From rows of each task to a model that transformers loads."""
    make_model(tmp_path / "model", "llama", layers=2)
    printed = follow("own-data.md", tmp_path)
    assert any("rows" in text for text in printed.values())
    for name in ("alice", "chat", "notes"):
        summary = json.loads((tmp_path / f"out-{name}" / "summary.json").read_text())
        assert summary["finished"]
    assert (tmp_path / "alice-model" / "model.safetensors").exists()
    assert len(json.loads((tmp_path / "out-rehearsal" / "results.json").read_text())["nodes"]) == 2


def test_watching(tmp_path):
    """Beside two nodes that run; the page's settings are read as they are written."""
    make_model(tmp_path / "model", "llama", layers=2)
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f"run.name=page-{uuid.uuid4().hex[:8]}",
        f"model.path={tmp_path / 'model'}",
        f"data.train={tmp_path / 'data.jsonl'}",
        "schedule.rounds=5000",
    ]
    nodes = [Daemon(tmp_path, name, common).start() for name in ("alice", "bob")]
    try:
        nodes[0].until(lambda s: s.steps_done)
        printed = follow("watching.md", tmp_path)
        assert nodes[0].wait() == 0
    finally:
        end_all(nodes)
    assert "alice — bob" in printed["deca-node swarm status"]
    assert (nodes[0].output / "exports" / "friday" / "config.json").exists()
    needed = ["model.path=m", "data.train=d"]
    assert load(tmp_path / "metrics.toml", needed).metrics.port == 9464
    assert load(tmp_path / "curves.toml", needed).tensorboard.folder is not None
