"""The list of this machine's nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deca_node import registry


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_node_is_listed_while_it_runs(tmp_path: Path) -> None:
    """It comes with announce, in a folder that only its user can read, and goes with it."""
    with registry.announce("192.0.2.1:7430", "bbc", "alice"):
        assert registry.local_nodes() == [
            registry.Entry("192.0.2.1:7430", "bbc", "alice", os.getpid())
        ]
        assert (tmp_path / "deca-node").stat().st_mode & 0o777 == 0o700
    assert registry.local_nodes() == []
    assert list((tmp_path / "deca-node").iterdir()) == []


def test_several_nodes_of_one_process_come_in_order() -> None:
    """Each has a file of its own."""
    with registry.announce("h:2", "bbc", "bob"), registry.announce("h:1", "bbc", "alice"):
        assert [entry.node for entry in registry.local_nodes()] == ["alice", "bob"]


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    """The file of a pid that no longer runs goes; a foreign file is left alone."""
    process = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    with registry.announce("h:1", "bbc", "alice"):
        folder = tmp_path / "deca-node"
        stale = folder / "stale.json"
        stale.write_text(
            json.dumps({"address": "h:2", "run": "bbc", "node": "bob", "pid": int(process.stdout)})
        )
        (folder / "foreign.json").write_text("{}")
        assert [entry.node for entry in registry.local_nodes()] == ["alice"]
        assert not stale.exists()
        assert (folder / "foreign.json").exists()


def test_a_folder_open_to_others_is_not_used(tmp_path: Path) -> None:
    """Neither read nor written, and the node runs on without it."""
    folder = tmp_path / "deca-node"
    folder.mkdir()
    folder.chmod(0o777)
    with registry.announce("h:1", "bbc", "alice"):
        assert list(folder.iterdir()) == []
        assert registry.local_nodes() == []


def test_without_a_runtime_folder_the_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, or after su."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with registry.announce("h:1", "bbc", "alice"):
        assert len(list((tmp_path / f"deca-node-{os.getuid()}").iterdir())) == 1
