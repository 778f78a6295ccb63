"""A look at a whole swarm, and its picture in a terminal."""

import asyncio
import copy
import io
import json
from collections import Counter

import pytest
from rich.console import Console

from deca_node import cli, cli_watch, errors, registry, survey, watch
from deca_node import status as words
from deca_node.errors import PeerUnavailable
from deca_node.limits import MAX_MEMBERS, MAX_PROPOSALS, MAX_SURVEYED
from deca_node.observer import Observer
from deca_node.panorama import MAX_VAIN_CALLS, Panorama
from deca_node.pb import node_pb2 as pb
from tests.edges.test_registry import _own_folder  # noqa: F401 - nodes of this machine stay out
from tests.pretend import PretendSwarm
from tests.virtual_time import run


def status(name, *peers, run="run", **fields):
    """A node at its own address, with neighbours of weight 0.25."""
    fields = {"phase": pb.PHASE_TRAINING, "loss": 1.5, "disagreement": 0.25, **fields}
    now = pb.NodeStatus(run=run, node=name, address=f"{name}:1", **fields)
    now.rounds, now.blocks, now.steps_total, now.steps_done, now.position = 2, 10, 40, 13, 3
    for peer in peers:
        now.peers.add(node=peer, address=f"{peer}:1", state="alive", neighbour=True, weight=0.25)
    return now


class _Link:
    def __init__(self, statuses, address):
        self._statuses, self._address = statuses, address

    async def get_status(self, timeout):
        if self._address not in self._statuses:
            raise PeerUnavailable(f"{self._address}: nobody listens")
        return copy.deepcopy(self._statuses[self._address])

    async def close(self):
        pass


async def look(statuses, *begin, panorama=None, now=0.0):
    """One look at nodes by address; all others do not answer."""
    asked = []

    async def link(address):
        asked.append(address)
        return _Link(statuses, address)

    panorama = panorama or Panorama()
    await Observer(panorama, link, lambda: begin, 1.0, lambda: now).look()
    return panorama, asked


async def test_one_node_leads_to_all_that_can_be_reached():
    """Each is asked once, wherever the walk begins, and who does not answer is named."""
    ring = {f"{n}:1": status(n, *ps) for n, ps in {"a": "bd", "b": "ac", "c": "bd"}.items()}
    found, asked = await look(ring, "a:1", "a:1")
    assert sorted(asked) == ["a:1", "b:1", "c:1", "d:1"]
    assert set(found.statuses()) == {"run/a", "run/b", "run/c"}
    tree = survey.as_json(found, 0.0)
    assert tree["unreachable"] == {"d": "d:1: nobody listens"}
    edges = {tuple(edge["ends"]): edge for edge in tree["edges"]}
    assert list(edges) == [("a", "b"), ("a", "d"), ("b", "c"), ("c", "d")]
    assert edges["a", "b"]["weights"] == [0.25, 0.25]
    assert edges["a", "d"]["weights"] == [0.25, None]
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(survey.render(found, 0.0))
    lines = console.export_text().splitlines()
    assert any(line.startswith("d ") and "no answer: d:1: nobody" in line for line in lines)
    assert ["a", "—", "b", "0.250", "-", "0s", "ok"] in [line.split() for line in lines]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
async def test_a_dead_node_leaves_the_names_whole_in_a_narrow_terminal(width):
    """Its reason is beside no column; what matters less than names and losses goes."""
    names = [f"garden-shed-{n}" for n in range(4)]
    here = {f"{n}:1": status(n, *(set(names) - {n}), eta_seconds=65) for n in names[:3]}
    found, _ = await look(here, f"{names[0]}:1")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(survey.render(found, 0.0))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    rows = [line.split()[:2] for line in lines if line.startswith("garden-shed")]
    assert rows[:3] == [[name, "training"] for name in names[:3]]
    assert rows[3] == ["garden-shed-3", "no"]
    assert "…" not in "".join(lines) or width < 60  # of edges
    assert ("1.500" in lines[1]) is (width >= 60)
    assert ("received" in lines[0]) is (width >= 200)
    if width >= 80:
        assert "garden-shed-3  no answer: garden-shed-3:1: nobody listens" in lines


async def test_who_has_left_does_not_count_as_missing():
    """Nor is it asked: others tell that it stopped or finished."""
    told = status("a")
    told.peers.add(node="doc", address="d:1", state="gone", phase=pb.PHASE_STOPPING)
    told.peers.add(node="lost", address="l:1", state="gone", phase=pb.PHASE_TRAINING)
    found, asked = await look({"a:1": told}, "a:1")
    assert asked == ["a:1"]
    assert list(survey.as_json(found, 0.0)["unreachable"]) == ["lost"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(survey.render(found, 0.0))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[-2:] == ["lost  no answer: not asked, others find it gone", "doc   stopped"]
    drawn = "\n".join(draw(found, 80, 24))
    assert "1 of 2 nodes answer" in drawn
    assert "stopped, not asked" not in drawn


async def test_a_node_at_two_addresses_is_one():
    here = {"unix:/s": status("a", "b"), "a:1": status("a", "b"), "b:1": status("b", "a")}
    found, _ = await look(here, "unix:/s", "a:1")
    assert sorted(found.statuses()) == ["run/a", "run/b"]
    assert not survey.as_json(found, 0.0)["unreachable"]


async def test_this_machines_socket_file_leads_to_its_other_nodes():
    here = {"unix:/s": status("a", "b"), "127.0.0.1:2": status("b", "a")}
    here["unix:/s"].peers[0].address = "127.0.0.1:2"
    found, _ = await look(here, "unix:/s")
    assert sorted(found.statuses()) == ["run/a", "run/b"]


async def test_a_node_that_knows_too_many_does_not_send_us_everywhere():
    """Names and addresses are what anybody may say; refused peers are no members."""
    liar = status("a", *(f"n{index}" for index in range(3 * MAX_SURVEYED)))
    liar.peers[0].address = "\x1b[2Jx:1"
    liar.peers[1].address = "no port"
    liar.peers[2].state = "refused"
    found, asked = await look({"a:1": liar}, "a:1")
    assert len(asked) == 1 + MAX_PROPOSALS
    assert not {"\x1b[2Jx:1", "no port", "n2:1"} & set(asked)
    missing = survey.as_json(found, 0.0)["unreachable"]
    assert missing["n2"] == "not asked, others find it refused"
    assert len(missing) == MAX_MEMBERS - 1


async def test_what_breaks_while_one_is_asked_is_said_of_that_one():
    """A name that cannot be resolved, a certificate that cannot be read: the others are shown."""

    async def link(address):
        if address != "a:1":
            raise UnicodeError("label empty or too long")
        return _Link({"a:1": status("a", "b")}, address)

    panorama = Panorama()
    await Observer(panorama, link, lambda: ["a:1"], 1.0, lambda: 0.0).look()
    assert set(panorama.statuses()) == {"run/a"}
    missing = survey.as_json(panorama, 0.0)["unreachable"]
    assert missing == {"b": "b:1: UnicodeError: label empty or too long"}


def test_what_breaks_while_one_is_followed_does_not_end_that():
    """It is asked again, and dropped after as many tries as anybody who never answers."""
    asked = Counter()

    async def link(address):
        asked[address] += 1
        if address != "a:1":
            raise UnicodeError("label empty or too long")
        return _Link({"a:1": status("a")}, address)

    async def main():
        panorama = Panorama()
        loop = asyncio.get_running_loop()
        observer = Observer(panorama, link, lambda: ["a:1", "given:1"], 1.0, loop.time)
        following = asyncio.create_task(observer.run(lambda: None))
        await asyncio.sleep(0.5)
        panorama.answered("a:1", status("a", "b"), loop.time())
        await asyncio.sleep(3 * MAX_VAIN_CALLS)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        return panorama

    panorama = run(main())
    assert asked["b:1"] == MAX_VAIN_CALLS
    assert asked["given:1"] > MAX_VAIN_CALLS
    assert panorama.addresses() == ["a:1", "given:1"]
    [silent] = panorama.view(0.0)["silent"]
    assert silent["error"] == "given:1: UnicodeError: label empty or too long"


async def test_an_edge_that_one_end_does_not_use_is_no_healthy_one():
    async def state(a, b):
        found, _ = await look({"a:1": a, "b:1": b}, "a:1")
        [edge] = survey.as_json(found, 0.0)["edges"]
        assert edge["healthy"] == (edge["state"] == "ok")
        return edge["state"]

    a, b = status("a", "b"), status("b", "a")
    assert await state(a, b) == "ok"
    b.peers[0].neighbour, b.peers[0].weight = False, 0.0
    assert await state(a, b) == "one-sided"
    b = status("b", "a")
    b.peers[0].state = "suspect"
    assert await state(a, b) == "suspect"


# the picture


def draw(panorama, width, height, now=0.0, encoding="utf-8"):
    screen = watch.Screen(panorama, now, 1e9 + now)
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(file=file, width=width, height=height, force_terminal=True)
    console.print(screen)
    file.flush()
    plain = Console(width=width, height=height, record=True, file=io.StringIO())
    plain.print(screen)
    return plain.export_text().rstrip("\n").split("\n")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (70, 20), (120, 30), (160, 50), (200, 24)])
@pytest.mark.parametrize("count", [1, 4, 40])
async def test_the_picture_fits_the_terminal(width, height, count):
    """No line is wrapped, nothing runs off the screen, and events are seen."""
    swarm = PretendSwarm(count)
    panorama = Panorama()
    panorama.give(swarm.addresses)
    for now in (140.0, 141.0, 142.0):
        swarm.now = now
        for name in swarm.names:
            panorama.answered(swarm.address(name), swarm.status(name), now)
    for name in swarm.names:
        points = [swarm.point(name, step) for step in range(swarm.done(name))]
        panorama.steps_made(swarm.address(name), points)
    lines = draw(panorama, width, height, 142.0)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "training" in text
    assert "▁" in text
    assert f"{count} of {count} nodes answer" in text
    assert "saved its state" in text
    assert "disagr" in text
    first = next(line for line in lines if line.startswith("node-0"))
    assert "…" not in first  # each column has its place


async def test_what_happens_is_told_once_however_many_tell_it():
    """A peer found gone by all is a line; silence and return are told; no escape gets through."""
    swarm = PretendSwarm(3)
    swarm.now = 20.0
    panorama = Panorama()
    panorama.give(swarm.addresses)

    def ask(now):
        swarm.now = now
        for name in swarm.names:
            if name in swarm.down:
                panorama.failed(swarm.address(name), "refused", now)
            else:
                panorama.answered(swarm.address(name), swarm.status(name), now)

    ask(20.0)
    swarm.down["node-2"] = 20.0
    swarm.warnings["node-0"] = ["low\x1b[2J disk"]
    ask(31.0)
    lines = draw(panorama, 120, 40, 31.0)
    ends = [line.partition(" ")[2].rstrip() for line in lines]
    assert "node-2 gone: no greeting (says node-0, node-1)" in ends
    assert f"node-2 does not answer at {swarm.address('node-2')}" in ends
    assert "node-0 low?[2J disk" in ends
    assert any(line.startswith("node-2") and "gone" in line for line in lines)
    assert any("node-2" in line and line.rstrip().endswith("gone") for line in lines)
    assert "\x1b" not in "\n".join(lines)
    swarm.down.clear()
    ask(32.0)
    ends = [line.partition(" ")[2].rstrip() for line in draw(panorama, 120, 40, 32.0)]
    assert "node-2 answers again" in ends


async def test_a_terminal_without_unicode_gets_letters():
    found, _ = await look({"a:1": status("a", "b"), "b:1": status("b", "a")}, "a:1")
    draw(found, 80, 24, encoding="ascii")  # raises where a letter has no code


def test_curves_and_strips():
    assert watch.sparkline([1, 2, 3], 10) == "▁▅█"
    assert watch.sparkline([5, 5], 10) == "▁▁"
    assert watch.sparkline([float("nan"), None], 10) == ""
    assert len(watch.sparkline(list(range(1000)), 30)) == 30
    node = words.as_json(status("a"))
    assert watch.strip(node, 20) == "███▶······"
    assert len(watch.strip(node, 4)) == 4
    assert watch.strip(node | {"steps_done": node["steps_total"]}, 5) == "█████"


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
            with pytest.raises(errors.ConfigError, match="give RUN/NODE"):
                cli_watch.target("alice")
            assert cli_watch.target("other/alice") == "127.0.0.1:8"
        with (
            registry.announce("127.0.0.1:9", "run", "alice"),
            pytest.raises(errors.ConfigError, match=r"run/alice at 127.0.0.1:9; .* the address"),
        ):
            cli_watch.target("run/alice")


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
        (["export", "--name", "b", "--set", "x=1"], 2, "which has its own settings"),
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
