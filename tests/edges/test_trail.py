"""What a node's folder tells: steps made, states kept, where it began again."""

import json

import pytest

from deca_node.errors import OutputError
from deca_node.trail import Trail, read_kept, resumed_at

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


def test_the_kept_position_is_the_manifests(tmp_path):
    """A step counts only where the open visit's tensors are there; no manifest is the beginning."""
    assert read_kept(tmp_path) == (0, 0)
    path = tmp_path / "state" / "manifest.json"
    path.parent.mkdir()
    for active, kept in ((None, (4, 0)), ({"file": "x", "xxh3": "y"}, (4, 2))):
        path.write_text(json.dumps({"progress": {"visit": 4, "step": 2}, "active": active}))
        assert read_kept(tmp_path) == kept
    for text in ("", "{", "[]", '{"progress": 3, "active": null}'):
        path.write_text(text)
        with pytest.raises(OutputError, match="manifest"):
            read_kept(tmp_path)


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
