"""State on disk: whole or not at all, named when damaged, nobody else's folder."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from deca_node import checkpoint
from deca_node.checkpoint import Checkpoint, Progress
from deca_node.disk import translated
from deca_node.errors import DiskFullError, OutputError
from deca_node.record import History

IDENTITY = {"run.seed": "0", "node": "a"}
TENSORS = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def kept(tmp_path):
    """A folder with one saved block, let go of again."""
    store = Checkpoint(tmp_path / "out", IDENTITY)
    assert store.claim() is False
    store.save_blocks({2: TENSORS}, Progress(visit=3, data_position=40))
    store.release()
    return tmp_path / "out"


def reopened(folder):
    store = Checkpoint(folder, IDENTITY)
    assert store.claim() is True
    return store


def test_what_was_saved_is_read_again(kept):
    """Blocks, progress and an open visit's tensors come back bit for bit."""
    store = reopened(kept)
    assert store.state.progress == Progress(visit=3, data_position=40)
    loaded = store.load(store.state.blocks[2])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    store.save_visit({"x": torch.zeros(3)}, Progress(visit=3, step=2))
    store.release()
    again = reopened(kept)
    assert again.state.progress.step == 2
    assert torch.equal(again.load(again.state.active)["x"], torch.zeros(3))


def test_superseded_files_are_removed_and_others_kept(kept):
    """A newer visit of a block replaces its file; nothing piles up."""
    store = reopened(kept)
    store.save_blocks({0: TENSORS}, Progress(visit=4))
    store.save_blocks({2: TENSORS}, Progress(visit=7))
    files = sorted(path.name for path in (kept / "state").iterdir())
    assert files == ["block-0000-4.safetensors", "block-0002-7.safetensors", "manifest.json"]


@pytest.mark.parametrize("moment", ["save_file", "write_atomically"])
def test_a_full_disk_leaves_the_previous_state(kept, monkeypatch, moment):
    """Whichever write finds no room, the old manifest and the files it names stay good."""

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = reopened(kept)
    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(DiskFullError, match="no space left"):
        store.save_blocks({2: {"w": torch.zeros(9)}}, Progress(visit=9))
    monkeypatch.undo()
    assert store.state.progress.visit == 3
    store.release()
    again = reopened(kept)
    assert again.state.progress.visit == 3
    assert torch.equal(again.load(again.state.blocks[2])["w"], TENSORS["w"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_systems_own_full_disk_is_recognised(tmp_path):
    """ENOSPC as the kernel gives it becomes DiskFullError."""
    with (
        pytest.raises(DiskFullError),
        translated(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_a_damaged_file_is_named(kept):
    """A flipped byte is found by the digest, and the message says what to do."""
    path = next((kept / "state").glob("block-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = reopened(kept)
    with pytest.raises(OutputError, match=rf"{path.name}: damaged .* remove"):
        store.load(store.state.blocks[2])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"progress": {}}', '{"progress": {"x": 1}}'])
def test_a_damaged_manifest_is_named(kept, text):
    """Whatever stands in the manifest, the answer is one clear error."""
    (kept / "state" / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match=r"manifest\.json: damaged"):
        Checkpoint(kept, IDENTITY).claim()


def test_another_runs_folder_is_refused_with_the_difference(kept):
    """The differing field and both values are in the message; the folder is as it was."""
    with pytest.raises(OutputError, match=r"run\.seed is '0' there, '5' here"):
        Checkpoint(kept, {**IDENTITY, "run.seed": "5"}).claim()
    assert reopened(kept).state.progress.visit == 3


def test_a_folder_in_use_is_refused(kept):
    """Two daemons do not write into one folder."""
    first = reopened(kept)
    with pytest.raises(OutputError, match="another deca-node is using"):
        Checkpoint(kept, IDENTITY).claim()
    first.release()
    reopened(kept)


@pytest.mark.parametrize("name", ["history.jsonl", "summary.json", "model", "state"])
def test_a_strangers_files_are_not_overwritten(tmp_path, name):
    """A folder that holds files of these names but is no run's output is refused."""
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=name):
        Checkpoint(tmp_path, IDENTITY).claim()


def test_history_takes_back_what_will_be_done_again(tmp_path):
    """Lines from the resumed step on, and a line torn by a crash, are dropped."""
    path = tmp_path / "history.jsonl"
    rows = [{"visit": v, "step": s} for v in range(3) for s in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]) + '{"visit": 2, "st')
    history = History(path, first_serial=6, steps_per_visit=4)
    history.append(rows[6])
    history.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:7]
