"""Renderings of a status."""

import io
import json
import logging
from typing import Any

import pytest
import structlog
from rich.console import Console

from deca_node import doctor, logs, status, survey, watch
from deca_node.doctor import network
from deca_node.limits import MAX_MEMBERS
from deca_node.panorama import Panorama
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


def test_after_the_last_step_there_is_no_place_in_the_schedule() -> None:
    """No round 3 of 2; as the dashboard says it."""
    done = _example()
    done.round, done.steps_done, done.steps_total, done.position = 2, 120, 120, 0
    text = _text(status.render(done))
    assert "all steps done" in text
    assert "round" not in text


def test_what_is_piped_has_a_line_for_each_peer(capsys: pytest.CaptureFixture[str]) -> None:
    """Addresses are whole, however long they are and the rest is."""
    now = _example()
    address = f"{'long-name.' * 20}example.org:7430"
    now.peers[1].address = now.peers[1].detail = address
    status.make_console().print(status.render_peers(now.peers))
    _, bob, carol = capsys.readouterr().out.splitlines()
    assert bob.startswith("bob")
    assert carol.split()[-2:] == [address, address]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_in_a_narrow_terminal_names_and_addresses_of_peers_are_whole(width: int) -> None:
    """Columns that matter less go, those without an entry before others."""
    now = _example()
    for peer, name in zip(now.peers, ("garden-shed-0", "garden-shed-1"), strict=True):
        peer.node, peer.address = name, f"{name}.local:7430"
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status.render_peers(now.peers))
    heading, *rows = console.export_text().splitlines()
    for name in ("garden-shed-0", "garden-shed-1"):
        [row] = [row for row in rows if row.startswith(f"{name} ")]
        assert f"{name}.local:7430" in row.split()
    assert ("retries" in heading) is (width == 200)
    assert ("weight" in heading) is (width >= 80)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(status.render(now))
    assert "garden-shed-0.local:7430" in console.export_text().split()


def test_a_name_wider_than_the_terminal_is_folded() -> None:
    now = pb.NodeStatus(node="n" * 64)
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(status.render_swarm({"n": now}))
    assert console.export_text().count("n" * 8) >= 4
    assert "…" not in console.export_text()


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


# What a terminal would obey: a title, the clipboard, the screen, a colour, the cursor, and letters
# that turn a line around; and what rich would.
_EVIL = "\x1b]0;t\x07\x1b]52;c;eA==\x07\x1b[2J\x1b[31m\r\n\t\x9b5A\x00\x7f\u202e[/][link=x][bold"
_ODD = (float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 1e18)


def _hostile(message: Any, number: float) -> Any:
    """A message with every field set: texts to what is evil, numbers to what is odd."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value[_EVIL] = 2**63
        elif field.message_type is not None and field.is_repeated:
            _hostile(value.add(), number)
        elif field.message_type is not None:
            _hostile(value, number)
        elif field.type == field.TYPE_STRING:
            one = _EVIL
            value.extend([one]) if field.is_repeated else setattr(message, field.name, one)
        elif field.cpp_type == field.CPPTYPE_DOUBLE:
            value.extend([number]) if field.is_repeated else setattr(message, field.name, number)
        elif field.type == field.TYPE_ENUM:
            message.ClearField(field.name)
        elif field.type == field.TYPE_BOOL:
            setattr(message, field.name, True)
        else:
            most = 2**32 - 1 if field.cpp_type == field.CPPTYPE_UINT32 else 2**64 - 1
            value.extend([most]) if field.is_repeated else setattr(message, field.name, most)
    return message


def _plain(renderable: Any) -> str:
    """What a terminal without colours would get."""
    file = io.StringIO()
    Console(width=300, file=file, force_terminal=True, color_system=None).print(renderable)
    text = file.getvalue()
    assert "".join(text.split("\n")).isprintable(), repr(text)
    return text


@pytest.mark.parametrize("number", _ODD)
@pytest.mark.parametrize("catching_up", [False, True])
def test_nothing_that_a_node_says_is_obeyed_by_a_terminal(number: float, catching_up: bool) -> None:
    """No control character of any field comes through, no number ends the look at it."""
    told = _hostile(pb.NodeStatus(), number)
    if not catching_up:
        told.ClearField("catch_up_total")
    for shown in (status.render(told), status.render_line(told), status.render_peers(told.peers)):
        assert "]52;" in _plain(shown) or catching_up
    told.phase = pb.PHASE_AGREEING
    _plain(status.render_line(told))
    _plain(status.render_swarm({_EVIL: told, f"{_EVIL}2": _EVIL}))
    _plain(doctor.render(network.running(told)))


@pytest.mark.parametrize("number", _ODD)
def test_nor_is_it_in_a_picture_of_several(number: float) -> None:
    """Edges and silent nodes come from what peers say of each other."""
    panorama = Panorama()
    panorama.give(["a:1", "b:1"])
    told = _hostile(pb.NodeStatus(), number)
    panorama.answered("a:1", told, 0.0)
    panorama.failed("b:1", _EVIL, 0.0)
    panorama.steps_made("a:1", [_hostile(pb.HistoryPoint(), number)])
    _plain(survey.render(panorama, 1.0))
    _plain(watch.Screen(panorama, 1.0, 1e9))
    console = json.dumps(survey.as_json(panorama, 1.0))
    assert console.isprintable()


def test_a_long_list_of_neighbours_is_shown_whole() -> None:
    now = pb.NodeStatus(node="alice", loss=1.0)
    names = [f"a-node-of-a-long-name-{number}" for number in range(MAX_MEMBERS - 1)]
    for name in names:
        now.peers.add(node=name, state="alive", neighbour=True)
    console = Console(width=20_000, file=io.StringIO(), record=True)
    console.print(status.render_swarm({"alice": now}))
    assert ", ".join(names) in console.export_text()


def test_a_log_line_for_people_says_what_a_peer_said_without_its_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(logs, "console", Console(file=file, width=400))
    try:
        logs.configure(human=True)
        structlog.get_logger().warning("refused", detail="\x1b]52;c;eA==\x07x", peer="\x9b2J")
        assert "".join(file.getvalue().split("\n")).isprintable()
        assert "]52;c;eA==" in file.getvalue()
    finally:
        structlog.reset_defaults()
        logging.getLogger().handlers.clear()
        logging.captureWarnings(capture=False)
