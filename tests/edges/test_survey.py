"""A look at a whole swarm, and its picture in a terminal."""

import copy
import io
import json

import pytest
from rich.console import Console

from deca_node import cli, cli_watch, errors, registry, survey, watch
from deca_node.errors import PeerUnavailable
from deca_node.limits import MAX_SURVEYED
from deca_node.pb import node_pb2 as pb
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out


def status(name, *peers, run="run", **fields):
    """A node at its own address, with neighbours of weight 0.25."""
    fields = {"phase": pb.PHASE_TRAINING, "loss": 1.5, "disagreement": 0.25, **fields}
    now = pb.NodeStatus(run=run, node=name, address=f"{name}:1", **fields)
    now.rounds, now.blocks, now.steps_total, now.steps_done, now.position = 2, 10, 40, 13, 3
    for peer in peers:
        now.peers.add(node=peer, address=f"{peer}:1", state="alive", neighbour=True, weight=0.25)
    return now


async def look(statuses, *begin):
    """Walk over nodes by address; all others do not answer."""
    asked = []

    async def ask(address):
        asked.append(address)
        if address not in statuses:
            raise PeerUnavailable(f"{address}: nobody listens")
        return copy.deepcopy(statuses[address])

    return await survey.walk(begin, ask=ask), asked


async def test_one_node_leads_to_all_that_can_be_reached():
    """Each is asked once, wherever the walk begins, and who does not answer is named."""
    ring = {f"{n}:1": status(n, *ps) for n, ps in {"a": "bd", "b": "ac", "c": "bd"}.items()}
    found, asked = await look(ring, "a:1", "a:1")
    assert sorted(asked) == ["a:1", "b:1", "c:1", "d:1"]
    assert {now.node for now in found.statuses.values()} == {"a", "b", "c"}
    assert found.unreachable() == {"d": "d:1: nobody listens"}
    edges = {edge.ends: edge for edge in survey.edges(found.statuses.values())}
    assert set(edges) == {("a", "b"), ("a", "d"), ("b", "c"), ("c", "d")}
    assert edges["a", "b"].weights == (0.25, 0.25)
    assert edges["a", "d"].weights == (0.25, None)
    tree = survey.as_json(found)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert [edge["ends"] for edge in tree["edges"]] == [list(ends) for ends in sorted(edges)]


async def test_a_node_at_two_addresses_is_one():
    here = {"unix:/s": status("a", "b"), "a:1": status("a", "b"), "b:1": status("b", "a")}
    found, _ = await look(here, "unix:/s", "a:1")
    assert sorted(now.node for now in found.statuses.values()) == ["a", "b"]
    assert not found.unreachable()


async def test_a_node_that_knows_too_many_does_not_send_us_everywhere():
    """Names and addresses are what anybody may say; refused peers are no members."""
    liar = status("a", *(f"n{index}" for index in range(3 * MAX_SURVEYED)))
    liar.peers[0].address = "\x1b[2Jx:1"
    liar.peers[1].address = "no port"
    liar.peers[2].state = "refused"
    found, asked = await look({"a:1": liar}, "a:1")
    assert len(asked) == MAX_SURVEYED
    assert not {"\x1b[2Jx:1", "no port", "n2:1"} & set(asked)
    assert len(found.errors) == MAX_SURVEYED - 1


def test_an_edge_that_one_end_does_not_use_is_no_healthy_one():
    a, b = status("a", "b"), status("b", "a")
    assert survey.edges([a, b])[0].healthy
    b.peers[0].neighbour, b.peers[0].weight = False, 0.0
    assert not survey.edges([a, b])[0].healthy
    b = status("b", "a")
    b.peers[0].state = "suspect"
    assert not survey.edges([a, b])[0].healthy


# the picture


def draw(picture, width, height, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, width=width, height=height, force_terminal=True)
    console.print(watch.Screen(picture))
    file.flush()
    plain = Console(width=width, height=height, record=True, file=io.StringIO())
    plain.print(watch.Screen(picture))
    return plain.export_text().rstrip("\n").split("\n")


async def swarm_of(count):
    names = [f"node-{index:02}" for index in range(count)]
    return {
        f"{name}:1": status(name, names[index - 1], names[(index + 1) % count])
        for index, name in enumerate(names)
    }


@pytest.mark.parametrize(("width", "height"), [(80, 24), (70, 20), (120, 30), (160, 50), (200, 24)])
@pytest.mark.parametrize("count", [1, 4, 40])
async def test_the_picture_fits_the_terminal(width, height, count):
    """No line is wrapped, nothing runs off the screen, and events are seen."""
    picture = watch.Picture()
    for turn in range(30):
        states = await swarm_of(count)
        for now in states.values():
            now.loss, now.steps_done = 3.0 - turn / 20, turn + 1
        found, _ = await look(states, "node-00:1")
        picture.look(found, 1000.0 + turn)
    lines = draw(picture, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "node-00" in text
    assert "training" in text
    assert "▁" in text
    assert "seen, training" in text
    assert "disagr" in text
    first = next(line for line in lines if line.startswith("node-00"))
    assert "…" not in first  # each column has its place


async def test_what_happens_becomes_an_event():
    """Phases, restarts, peers lost and found, warnings, silence and return: each once."""
    picture = watch.Picture()
    states = {"a:1": status("a", "b"), "b:1": status("b", "a")}
    found, _ = await look(states, "a:1")
    picture.look(found, 1.0)
    states["a:1"].peers[0].state = "suspect"
    states["a:1"].warnings.append("low\x1b[2J disk")
    del states["b:1"]
    found, _ = await look(states, "a:1")
    picture.look(found, 2.0)
    picture.look(found, 3.0)
    states["b:1"] = status("b", "a", pid=5, phase=pb.PHASE_CATCHING_UP)
    found, _ = await look(states, "a:1")
    picture.look(found, 4.0)
    assert [text for _, text, _ in picture.events][2:] == [
        "a: finds b suspect",
        "a: low?[2J disk",
        "b: does not answer",
        "b: was started again",
        "b: catching_up",
        "b: answers again",
    ]
    assert "\x1b" not in "\n".join(draw(picture, 80, 24))


async def test_a_terminal_without_unicode_gets_letters():
    picture = watch.Picture()
    states = await swarm_of(2)
    for turn in range(5):
        for now in states.values():
            now.loss, now.steps_done = 2.0 + turn, turn + 1
        found, _ = await look(states, "node-00:1")
        picture.look(found, 1.0)
    draw(picture, 80, 24, encoding="ascii")  # raises where a letter has no code


def test_curves_and_strips():
    assert watch.sparkline([1, 2, 3], 10) == "▁▅█"
    assert watch.sparkline([5, 5], 10) == "▁▁"
    assert watch.sparkline([float("nan")], 10) == ""
    assert len(watch.sparkline(list(range(1000)), 30)) == 30
    assert watch.strip(status("a"), 20) == "███▶······"
    assert len(watch.strip(status("a"), 4)) == 4
    now = status("a")
    now.steps_done = now.steps_total
    assert watch.strip(now, 5) == "█████"


# whom a verb is about


def test_a_node_is_named_by_name_run_or_address():
    with pytest.raises(errors.UnreachableError, match="no node runs on this machine"):
        cli_watch.target(None)
    with registry.announce("127.0.0.1:7", "run", "alice", "", "/s/alice.sock"):
        assert cli_watch.target(None) == "unix:/s/alice.sock"
        assert cli_watch.target("alice") == "unix:/s/alice.sock"
        assert cli_watch.target("127.0.0.1:7") == "unix:/s/alice.sock"
        assert cli_watch.target("host:9") == "host:9"
        with pytest.raises(errors.UnreachableError, match="bob: no node of that name"):
            cli_watch.target("bob")
        with registry.announce("127.0.0.1:8", "other", "alice"):
            with pytest.raises(errors.ConfigError, match="other/alice, run/alice; name one"):
                cli_watch.target(None)
            with pytest.raises(errors.ConfigError, match="name the run, too"):
                cli_watch.target("alice")
            assert cli_watch.target("other/alice") == "127.0.0.1:8"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pause"], 3, "no node runs on this machine"),
        (["resume", "bob"], 3, "bob: no node of that name"),
        (["stop", "127.0.0.1:9"], 3, "no deca-node answers at 127.0.0.1:9"),
        (["checkpoint", "bob:x"], 2, "'bob:x' is not HOST:PORT"),
        (["swarm", "status", "127.0.0.1:9"], 3, "no deca-node answers at 127.0.0.1:9"),
        (["swarm", "status"], 3, "no node runs on this machine"),
        (["watch"], 2, "watch needs a terminal"),
        (["export"], 2, "give either --to DIR, or --name NAME"),
        (["export", "--to", "a", "--name", "b"], 2, "give either --to DIR, or --name NAME"),
        (["export", "bob", "--to", "a"], 2, "to ask a running node give --name"),
        (["export", "--name", "b", "--set", "x=1"], 2, "which has its settings"),
        (["export", "--name", "b"], 3, "no node runs on this machine"),
    ],
)
def test_wrong_words_are_answered_in_a_line(arguments, code, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deca-node: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
