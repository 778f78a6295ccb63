"""What a node's folder tells: steps made, states kept, where it began again."""

import json
from pathlib import Path

import pytest
import torch

from deca_node.blocks import Schedule, partition_layers
from deca_node.checkpoint import Changed, Checkpoint
from deca_node.checkpoint.manifest import Progress
from deca_node.errors import OutputError
from deca_node.trail import Holding, Trail, read_kept, resumed_at

STEPS = 3


def line(visit, step):
    return json.dumps({"visit": visit, "step": step}) + "\n"


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def renew(path, text=""):
    """As a start does: a new file in the old one's place."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)


def test_steps_are_counted_as_they_come(tmp_path):
    """A line that is still being written is none yet."""
    path = tmp_path / "history.jsonl"
    trail = Trail(path, STEPS)
    assert trail.look() == 0
    renew(path)
    assert trail.look() == 0
    append(path, line(0, 0) + line(0, 1)[:5])
    assert trail.look() == 1
    assert trail.position == (0, 0)
    append(path, line(0, 1)[5:] + line(0, 2))
    assert trail.look() == 2
    assert trail.position == (0, 2)


def test_a_start_is_no_step(tmp_path):
    """What it keeps of the old lines was counted; what it does again counts again."""
    path = tmp_path / "history.jsonl"
    trail = Trail(path, STEPS)
    renew(path)
    trail.look()
    append(path, line(0, 0) + line(0, 1))
    assert trail.look() == 2
    renew(path, line(0, 0))
    assert trail.look() == 0
    append(path, line(0, 1))
    assert trail.look() == 1


def test_a_start_at_the_moment_of_a_look_is_seen_by_the_next(tmp_path, monkeypatch):
    """What was opened before is read as what it is, not for the file in its place."""
    path = tmp_path / "history.jsonl"
    trail = Trail(path, STEPS)
    renew(path)
    trail.look()
    append(path, line(0, 0) + line(0, 1))
    opened = Path.open

    def started_meanwhile(self, *mode):
        file = opened(self, *mode)
        monkeypatch.undo()
        renew(path, line(0, 0))
        append(path, line(0, 1))
        return file

    monkeypatch.setattr(Path, "open", started_meanwhile)
    assert trail.look() == 2
    assert trail.look() == 0
    append(path, line(0, 2))
    assert trail.look() == 1
    assert trail.position == (0, 2)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(0, 0), (0, 1), (0, 2)], (0, 0)),  # being kept, perhaps
        ([(0, 0), (0, 1), (0, 2), (1, 0)], (1, 0)),
        ([(0, 0), (0, 1), (5, 0)], (0, 0)),  # left in the middle, for a later visit
        ([(4, 2), (7, 0), (7, 1), (7, 2), (8, 0)], (8, 0)),
    ],
)
def test_who_goes_on_to_the_next_visit_has_kept_the_last(tmp_path, rows, kept):
    path = tmp_path / "history.jsonl"
    trail = Trail(path, STEPS)
    renew(path)
    trail.look()
    append(path, "".join(line(*row) for row in rows))
    trail.look()
    assert trail.kept == kept


def test_who_passes_visits_over_after_a_start_has_kept_none_of_them(tmp_path):
    """A whole visit was done, but died before it was kept; the node goes on where others are."""
    path = tmp_path / "history.jsonl"
    trail = Trail(path, STEPS)
    renew(path)
    trail.look()
    append(path, "".join(line(4, step) for step in range(STEPS)))
    trail.look()
    renew(path, "".join(line(3, step) for step in range(STEPS)))
    trail.look()
    assert trail.position == (3, STEPS - 1)
    append(path, line(7, 0))
    trail.look()
    assert trail.kept == (4, 0)


def test_the_kept_state_is_the_manifests(tmp_path):
    """Read as the daemon writes it; no manifest is the base model, a damaged one is told."""
    schedule = Schedule(partition_layers(2, 1), 3, STEPS, "ascending", 0)
    checkpoint = Checkpoint(tmp_path, {"run": "r"}, schedule)
    checkpoint.claim()
    assert read_kept(tmp_path) == Holding()
    tensors = {"w": torch.zeros(2)}
    checkpoint.save({0: Changed(2, tensors)}, Progress(visit=3, step=0))
    assert read_kept(tmp_path) == Holding((3, 0), {0: 2})
    checkpoint.save({}, Progress(visit=3, step=2), tensors)
    assert read_kept(tmp_path) == Holding((3, 2), {0: 2})
    checkpoint.save({1: Changed(5, tensors)}, Progress(visit=6, finished=True))
    assert read_kept(tmp_path) == Holding((6, 0), {0: 2, 1: 5})
    checkpoint.release()
    path = tmp_path / "state" / "manifest.json"
    for text in (
        "",
        "{",
        "[]",
        '{"progress": 3, "active": null}',
        '{"progress": {}, "active": {}}',
    ):
        path.write_text(text)
        with pytest.raises(OutputError, match="manifest"):
            read_kept(tmp_path)


KEPT = Holding((5, 2), {0: 4, 1: 1})


@pytest.mark.parametrize(
    ("later", "lost"),
    [
        (KEPT, ""),
        (Holding((5, 3), {0: 4, 1: 1}), ""),
        (Holding((6, 0), {0: 4, 1: 5}), ""),
        (Holding((5, 0), {0: 4, 1: 3}), ""),  # begun anew with a newer block
        (Holding((5, 1), {0: 4, 1: 1}), "visit 5 step 2"),
        (Holding((4, 0), {0: 4, 1: 3}), "visit 5 step 2"),
        (Holding((7, 0), {0: 4, 1: 0}), "block 1 of visit 1"),
        (Holding((7, 0), {1: 1}), "block 0 of visit 4"),
    ],
)
def test_what_was_kept_before_must_still_be_there(later, lost):
    """No visit, no step of an open visit and no block's newest values may go."""
    assert later.lacks(KEPT) == lost


def test_where_a_node_begins_is_read_from_its_last_start(tmp_path):
    """Not from an earlier one's lines, and not from text that is no log line."""
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"event": "ready", "visit": 0, "step": 0}) + "\n")
    assert resumed_at(log, 0) == (0, 0)
    offset = log.stat().st_size
    assert resumed_at(log, offset) is None
    append(log, 'Traceback\n[1]\n{"event": "visit", "visit": 3}\n')
    assert resumed_at(log, offset) is None
    append(log, json.dumps({"event": "resuming", "visit": 3, "step": 1}) + "\n")
    assert resumed_at(log, offset) == (3, 1)
