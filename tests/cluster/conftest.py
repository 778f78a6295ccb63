"""Fixtures that start real daemons."""

import json
import uuid

import pytest

from tests.cluster.daemons import Daemon, end_all
from tests.tiny import make_model


@pytest.fixture
def daemon(tmp_path):
    """A function that makes a daemon with data of its own; all are ended afterwards."""
    made = []

    def make(name, rows, *settings):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(Daemon(tmp_path, name, [f"data.train={data}", "model.dtype=fp32", *settings]))
        return made[-1]

    yield make
    end_all(made)


@pytest.fixture
def pair(tmp_path):
    """Two daemons of one run that train for minutes, with metrics and curves; ended afterwards."""
    model = make_model(tmp_path / "tiny", "llama", layers=2)
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f"run.name=watch-{uuid.uuid4().hex[:8]}",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={tmp_path / 'data.jsonl'}",
        "schedule.rounds=5000",
        "schedule.steps=20",
        "run.start_when=2",
        "metrics.port=0",
        f"tensorboard.folder={tmp_path / 'curves'}",
    ]
    made = [Daemon(tmp_path, name, common).start() for name in ("alice", "bob")]
    yield made
    end_all(made)
