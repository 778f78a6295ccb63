"""The pages of docs/ that say what to type, typed."""

import json

import pytest

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
