"""Renderings of a status."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from deca_node import status
from deca_node.pb import node_pb2 as pb


def _example(**fields: Any) -> pb.NodeStatus:
    now = pb.NodeStatus(
        run="bbc",
        node="alice",
        phase=pb.PHASE_TRAINING,
        rounds=2,
        blocks=5,
        steps_per_visit=12,
        steps_total=120,
        steps_done=30,
        round=0,
        position=2,
        block=2,
        step=6,
        eta_seconds=65,
        loss=1.25,
        disagreement=0.5,
        degree=1,
        own_weight=0.5,
        device="cpu",
        memory_bytes=3 << 30,
        bytes_sent=5 << 40,
        send_rate=1536.0,
        **fields,
    )
    now.peers.add(
        node="bob",
        state="alive",
        neighbour=True,
        weight=0.5,
        last_seen_seconds=2.0,
        wire_format="int8",
    )
    now.peers.add(node="[carol]", state="gone", detail="said [b]goodbye")
    return now


def _text(renderable: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.6, "1m 00s"),
        (65, "1m 05s"),
        (3600, "1h 00m"),
        (7384, "2h 03m"),
        (90000, "1d 01h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert status.size(count) == text


def test_one_node_in_full() -> None:
    """What is asked for most is there, counted from 1, in units people read."""
    text = _text(status.render(_example(refusals={"nan": 3}, warnings=["low disk"])))
    for part in (
        "alice",
        "training",
        "round 1/2  block 2 (3/5)  step 7/12",
        "25%",
        "1m 05s left",
        "1.2500",
        "3.0 GiB",
        "5.0 TiB  1.5 KiB/s",
        "nan 3",
        "low disk",
    ):
        assert part in text
    bob, carol = [line.split() for line in text.splitlines()[-2:]]
    assert bob[:5] == ["bob", "alive", "unspecified", "0.500", "int8"]
    assert carol[:2] == ["[carol]", "gone"]
    assert "said [b]goodbye" in text  # a peer's text is no markup


def test_a_node_that_has_not_begun() -> None:
    """No numbers are made up."""
    text = _text(
        status.render(
            pb.NodeStatus(
                node="alice", phase=pb.PHASE_WAITING, waiting_for="1 of 2 members missing"
            )
        )
    )
    assert "1 of 2 members missing" in text
    assert "loss" not in text


def test_a_swarm_has_a_row_per_node_even_without_a_status() -> None:
    text = _text(status.render_swarm({"alice": _example(), "dave": "starting"}))
    rows = [line.split() for line in text.splitlines()]
    assert rows[1][:2] == ["alice", "training"]
    assert "30/120" in rows[1]
    assert rows[1][-1] == "bob"
    assert rows[2] == ["dave", "starting"]


def test_json_has_every_field_as_a_plain_value() -> None:
    """64-bit numbers are numbers, enums words, NaN null, and unset fields are there."""
    tree = status.as_json(_example(gradient_norm=float("nan"), refusals={"nan": 3}))
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert set(tree) == {field.name for field in pb.NodeStatus.DESCRIPTOR.fields}
    assert tree["phase"] == "training"
    assert tree["bytes_sent"] == 5 << 40
    assert tree["gradient_norm"] is None
    assert tree["warnings"] == []
    assert tree["refusals"] == {"nan": 3}
    assert tree["peers"][0]["node"] == "bob"
    assert tree["peers"][0]["phase"] == "unspecified"


def test_a_newer_nodes_phase_is_shown_as_its_number() -> None:
    now = pb.NodeStatus(node="alice")
    now.ParseFromString(pb.NodeStatus(node="alice").SerializeToString() + b"\x20\x63")
    assert status.as_json(now)["phase"] == 99
    assert "99" in _text(status.render(now))


def test_catching_up_is_shown_with_a_bar_of_its_own() -> None:
    """One node, a line and a table all tell how much of what is fetched is there."""
    late = pb.NodeStatus(
        node="late",
        phase=pb.PHASE_CATCHING_UP,
        catch_up_bytes=3 << 20,
        catch_up_total=12 << 20,
        waiting_for="4 blocks from alice, bob",
    )
    for shown in (status.render(late), status.render_line(late)):
        text = _text(shown)
        assert "3.0 MiB of 12.0 MiB" in text
        assert "4 blocks from alice, bob" in text
    assert "catching_up" in _text(status.render_swarm({"late": late}))
