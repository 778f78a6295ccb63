"""Fixtures that start real daemons."""

import json

import pytest

from tests.cluster.daemons import Daemon, end_all


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
