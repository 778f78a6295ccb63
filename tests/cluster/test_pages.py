"""The pages of docs/ that say what to type, typed."""

import contextlib
import json
import os
import signal
import socket
import uuid

import pytest

from deca_node import registry
from deca_node.config import load
from tests.cluster.daemons import Daemon, end_all
from tests.pages import follow
from tests.tiny import make_model

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder whose background nodes are this test's own, and end with it."""
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield tmp_path
    for entry in registry.local_nodes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, signal.SIGKILL)


def test_own_data(tmp_path, monkeypatch):
    """From rows of each task to a model that transformers loads."""
    monkeypatch.setenv("DECA_NODE__PORT", "0")  # the usual one may be another test's
    make_model(tmp_path / "model", "llama", layers=2)
    printed = follow("own-data.md", tmp_path)
    assert any("rows" in text for text in printed.values())
    for name in ("alice", "chat", "notes"):
        summary = json.loads((tmp_path / f"out-{name}" / "summary.json").read_text())
        assert summary["finished"]
    assert (tmp_path / "alice-model" / "model.safetensors").exists()
    assert len(json.loads((tmp_path / "out-rehearsal" / "results.json").read_text())["nodes"]) == 2


def test_watching(here):
    """Beside two nodes that run; the page's settings are read as they are written."""
    tmp_path = here
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


def test_first_run(here):
    printed = follow("first-run.md", here, {"first": f"first-{uuid.uuid4().hex[:8]}"})
    table = printed["deca-node swarm status"]
    assert "alice — bob" in table
    assert "alice" in printed["deca-node status"]


def test_wan(here):
    """Each site's public address is this machine's, and its router forwards nothing."""
    make_model(here / "model", "llama", layers=2)
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    (here / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        ports = [str(each.getsockname()[1]) for each in (one, other)]
    north, south = ports
    instead = {
        "north.example.org": "127.0.0.1",
        "7430": north,
        "17430": north,
        "south.example.org": "127.0.0.1",
        "7431": south,
        "27430": south,
        "rounds = 3": "rounds = 5000",
        "wide": f"wide-{uuid.uuid4().hex[:8]}",
    }
    printed = follow("wan.md", here, instead)
    assert "reachable both ways" in printed["deca-node doctor --config south.toml"]
    [table] = [text for command, text in printed.items() if "swarm status 127" in command]
    edge = next(line for line in table.splitlines() if line.startswith("north — south"))
    assert edge.split()[-1] in ("ok", "slow")
