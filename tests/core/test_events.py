"""What of a node's log is kept for its status."""

import re
from pathlib import Path
from typing import Any

import pytest

import deca_node
from deca_node.events import _TOLD, Heard, Ring, describe
from deca_node.limits import MAX_EVENTS, MAX_REASON_BYTES


class _Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **values: self.lines.append((level, event, values))


@pytest.mark.parametrize(
    ("warned", "event", "values", "told"),
    [
        (False, "peer alive", {"peer": "bob"}, ("joined", "joined", "bob")),
        (True, "peer gone", {"peer": "bob", "detail": ""}, ("gone", "gone", "bob")),
        (True, "disk is slow", {}, ("warning", "disk is slow", "")),
        (False, "resolved", {"finding": "alone"}, ("resolved", "resolved: alone", "")),
        (False, "visit", {"visit": 3}, None),
        (False, "step", {"loss": 1.0}, None),
    ],
)
def test_lines_become_events(
    warned: bool, event: str, values: dict[str, Any], told: tuple[str, str, str] | None
) -> None:
    assert describe(warned, event, values) == told


def test_only_named_values_are_told() -> None:
    """The line that says the label counts in the log does not say them in the status."""
    told = describe(False, "ready", {"visit": 2, "step": 1, "labels": {"secret": 5}})
    assert told == ("ready", "ready at visit 2, step 1", "")


def test_what_a_peer_said_is_cut_and_made_printable() -> None:
    told = describe(True, "peer gone", {"peer": "x" * 500, "detail": "{0}\n\x1b[31m" + "y" * 9999})
    assert told is not None
    _, text, peer = told
    assert text.startswith("gone: {0}??[31m")
    assert len(text) <= MAX_REASON_BYTES
    assert len(peer) <= 64


def test_the_ring_keeps_the_latest() -> None:
    ring = Ring()
    for serial in range(3 * MAX_EVENTS):
        ring.add(float(serial), "joined", "joined", str(serial))
    kept = list(ring)
    assert len(kept) == MAX_EVENTS
    assert kept[-1].serial == 3 * MAX_EVENTS
    assert [event.serial for event in kept] == sorted(event.serial for event in kept)


def test_of_saves_in_a_row_the_last_is_kept() -> None:
    ring = Ring()
    for at in range(5):
        ring.add(at, "saved", f"saved {at}")
    ring.add(5.0, "joined", "joined", "bob")
    ring.add(6.0, "saved", "saved 6")
    assert [event.text for event in ring] == ["saved 4", "joined", "saved 6"]


def test_a_logger_between_passes_everything_on() -> None:
    log, ring = _Log(), Ring()
    heard = Heard(log, ring, lambda: 7.0)
    heard.info("peer alive", peer="bob")
    heard.debug("step", loss=1.0)
    heard.warning("full disk")
    heard.error("worse")
    heard.exception("a defect", code=1)
    assert [level for level, _, _ in log.lines] == [
        "info",
        "debug",
        "warning",
        "error",
        "exception",
    ]
    assert log.lines[0] == ("info", "peer alive", {"peer": "bob"})
    assert [(event.kind, event.at) for event in ring] == [
        ("joined", 7.0),
        ("warning", 7.0),
        ("warning", 7.0),
        ("warning", 7.0),
    ]


def test_the_dashboard_colours_kinds_that_there_are():
    """A kind that is called otherwise from now on would lose its colour, and nothing else."""
    page = Path(deca_node.__file__).parent / "dashboard" / "page" / "style.css"
    coloured = set(re.findall(r"\.events \.([a-z-]+) i", page.read_text()))
    kinds = {kind.replace(" ", "-") for kind, _ in _TOLD.values()}
    assert {"resolved", "trouble"} < coloured <= kinds | {"trouble", "answers"}
