"""What several nodes tell, as one picture."""

import json
import math

import pytest

from deca_node import panorama as panorama_module
from deca_node.limits import (
    MAX_EVENTS_KEPT,
    MAX_LINKS_SHOWN,
    MAX_MEMBERS,
    MAX_POINTS_SHOWN,
    MAX_PROPOSALS,
)
from deca_node.panorama import GONE_SECONDS, MAX_VAIN_CALLS, Panorama
from deca_node.pb import node_pb2 as pb
from tests.pretend import PretendSwarm


def _look(panorama, swarm, now, steps=True):
    """One question to every address, as the observer asks."""
    swarm.now = now
    for address in panorama.addresses():
        name = next((n for n in swarm.names if swarm.address(n) == address), None)
        if name is None or name in swarm.down:
            panorama.failed(address, "connection refused", now)
            continue
        panorama.answered(address, swarm.status(name), now)
        if steps:
            seen = panorama.seen_until(address)
            first = 0 if seen is None else seen + 1
            points = [swarm.point(name, s) for s in range(first, swarm.done(name))]
            panorama.steps_made(address, points)


def _watching(swarm, now=40.0, looks=3, **options):
    panorama = Panorama(**options)
    panorama.give([swarm.addresses[0]])
    for look in range(looks):
        _look(panorama, swarm, now + look)
    return panorama, now + looks - 1


def _run(panorama, now):
    [run] = panorama.view(now)["runs"]
    return run


def test_one_address_is_enough_to_see_the_whole_swarm():
    swarm = PretendSwarm(4)
    panorama, now = _watching(swarm)
    run = _run(panorama, now)
    assert [node["node"] for node in run["nodes"]] == swarm.names
    assert {node["state"] for node in run["nodes"]} == {"live"}
    assert [(link["a"], link["b"], link["state"]) for link in run["links"]] == [
        ("bbc/node-0", "bbc/node-1", "ok"),
        ("bbc/node-0", "bbc/node-3", "ok"),
        ("bbc/node-1", "bbc/node-2", "ok"),
        ("bbc/node-2", "bbc/node-3", "ok"),
    ]
    assert run["links"][0]["weights"] == pytest.approx([1 / 3, 1 / 3], abs=1e-5)
    summary = run["summary"]
    assert (summary["nodes"], summary["live"], summary["wanted"]) == (4, 4, 4)
    assert summary["phases"] == {"training": 4}
    assert summary["bytes_sent"] == sum(node["bytes_sent"] for node in run["nodes"])


def test_names_are_in_the_order_that_people_count():
    swarm = PretendSwarm(12)
    panorama, now = _watching(swarm)
    assert [node["node"] for node in _run(panorama, now)["nodes"]] == swarm.names


def test_without_walking_only_what_is_given_is_asked():
    swarm = PretendSwarm(4)
    panorama, now = _watching(swarm, walk=False)
    assert panorama.addresses() == [swarm.addresses[0]]
    states = {node["node"]: node["state"] for node in _run(panorama, now)["nodes"]}
    assert states == {"node-0": "live", "node-1": "heard", "node-2": "heard", "node-3": "heard"}


def test_a_killed_node_grows_stale_then_is_gone_and_comes_back():
    swarm = PretendSwarm(4)
    panorama, now = _watching(swarm)
    swarm.down["node-2"] = now
    _look(panorama, swarm, now + 2)
    states = {node["node"]: node["state"] for node in _run(panorama, now + 2)["nodes"]}
    assert states["node-2"] == "stale"
    for later in range(8, 14):
        _look(panorama, swarm, now + later)
        states = {node["node"]: node["state"] for node in _run(panorama, now + later)["nodes"]}
        assert states["node-2"] == ("gone" if later > GONE_SECONDS else "stale")
    run = _run(panorama, now + 13)
    node = next(node for node in run["nodes"] if node["node"] == "node-2")
    assert node["state"] == "gone"
    assert node["age"] == 13
    assert node["steps_done"] == swarm.done("node-2")  # as it was last
    assert run["summary"]["live"] == 3
    broken = {(link["a"], link["b"]) for link in run["links"] if link["state"] == "gone"}
    assert broken == {("bbc/node-1", "bbc/node-2"), ("bbc/node-2", "bbc/node-3")}
    told = [event for event in panorama.events(0, now + 13, 1e9) if event["kind"] == "silent"]
    assert [event["node"] for event in told] == ["node-2"]  # once
    swarm.down.clear()
    _look(panorama, swarm, now + 20)
    run = _run(panorama, now + 20)
    assert run["summary"]["live"] == 4
    assert {link["state"] for link in run["links"]} == {"ok"}
    assert panorama.events(0, now + 20, 1e9)[-1]["kind"] in ("answers", "saved", "joined")
    assert [event["kind"] for event in panorama.events(0, 0, 0)].count("answers") == 1


def test_who_took_leave_or_finished_is_not_missing():
    """By its own last words, or by what others say of it."""
    swarm = PretendSwarm(3)
    panorama, now = _watching(swarm)
    statuses = {name: swarm.status(name) for name in swarm.names}
    statuses["node-1"].phase = pb.PHASE_SERVING
    panorama.answered(swarm.address("node-1"), statuses["node-1"], now)
    panorama.failed(swarm.address("node-1"), "refused", now + 60)
    for peer in statuses["node-0"].peers:
        if peer.node == "node-2":
            peer.state, peer.phase = "gone", pb.PHASE_STOPPING
    panorama.answered(swarm.address("node-0"), statuses["node-0"], now + 60)
    panorama.failed(swarm.address("node-2"), "refused", now + 60)
    run = _run(panorama, now + 60)
    assert {node["node"]: node["state"] for node in run["nodes"]} == {
        "node-0": "live",
        "node-1": "finished",
        "node-2": "stopped",
    }
    assert "silent" not in {event["kind"] for event in panorama.events(0, now, 0)}
    assert all(link["state"] == "ok" for link in run["links"])


def test_who_was_only_heard_of_and_took_leave_is_not_missing():
    """As the doctor, which comes and goes; whoever else says only that it is gone."""
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    phases = {"node-0": pb.PHASE_TRAINING, "node-1": pb.PHASE_STOPPING}
    for name, phase in phases.items():
        status = swarm.status(name)
        status.peers.add(node="doc", address="10.0.0.9:1", state="gone", phase=phase)
        status.peers.add(node="old", address="10.0.0.8:1", state="done")
        status.peers.add(node="lost", address="10.0.0.7:1", state="gone", phase=pb.PHASE_TRAINING)
        panorama.answered(swarm.address(name), status, now)
    run = _run(panorama, now)
    said = {node["node"]: node["said"] for node in run["nodes"] if node["state"] == "heard"}
    assert said == {"doc": "stopped", "old": "finished", "lost": "gone"}
    assert run["summary"]["nodes"] == 3
    assert run["summary"]["states"] == {"live": 2, "stopped": 1, "finished": 1, "heard": 1}


def test_an_edge_that_steps_wait_for_is_slow():
    swarm = PretendSwarm(4)
    swarm.slow.add(frozenset({"node-0", "node-1"}))
    panorama, now = _watching(swarm, looks=6)
    slow = [link for link in _run(panorama, now)["links"] if link["state"] == "slow"]
    assert [(link["a"], link["b"]) for link in slow] == [("bbc/node-0", "bbc/node-1")]
    assert slow[0]["waiting"] == pytest.approx(0.5, abs=0.05)
    assert slow[0]["waited"] > 0


def test_an_edge_that_only_one_end_has_is_seen():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    status = swarm.status("node-1")
    status.peers[0].neighbour = False
    panorama.answered(swarm.address("node-1"), status, now)
    assert [link["state"] for link in _run(panorama, now)["links"]] == ["one-sided"]


def test_nothing_answers():
    panorama = Panorama()
    panorama.give(["127.0.0.1:7430"])
    assert panorama.view(0.0) == {
        "runs": [],
        "silent": [{"address": "127.0.0.1:7430", "error": ""}],
    }
    for attempt in range(3 * MAX_VAIN_CALLS):
        panorama.failed("127.0.0.1:7430", "refused\x00", float(attempt))
    assert panorama.view(0.0)["silent"] == [{"address": "127.0.0.1:7430", "error": "refused?"}]
    panorama.give([])
    assert panorama.addresses() == []


def test_a_node_at_two_addresses_is_one():
    swarm = PretendSwarm(2)
    panorama = Panorama()
    first, second = "127.0.0.1:17430", "localhost:17430"
    panorama.give([first])
    panorama.answered(first, swarm.status("node-0"), 1.0)
    panorama.give([first, second])
    panorama.answered(second, swarm.status("node-0"), 1.0)
    panorama.give([first, second])
    assert panorama.addresses()[:1] == [first]
    assert second not in panorama.addresses()
    panorama.failed(first, "refused", 2.0)
    panorama.give([first, second])
    assert second in panorama.addresses()
    panorama.answered(first, swarm.status("node-0"), 3.0)
    names = [node["key"] for node in _run(panorama, 1.0)["nodes"] if node["state"] == "live"]
    assert names == ["bbc/node-0"]


def test_an_address_that_was_given_goes_before_one_that_a_peer_named():
    """It may be the one that the operator can reach; the other is a node's word."""
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    given = [swarm.addresses[0], "localhost:17431"]
    panorama.give(given)
    panorama.answered(given[1], swarm.status("node-1"), now)
    assert panorama.addresses() == given
    panorama.answered(swarm.addresses[0], swarm.status("node-0"), now)
    assert panorama.addresses() == given


def test_a_node_that_comes_back_at_another_address_takes_its_own_place():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    panorama.failed(swarm.addresses[1], "refused", now)
    panorama.give([swarm.addresses[0], "127.0.0.1:9999"])
    panorama.answered("127.0.0.1:9999", swarm.status("node-1"), now)
    assert swarm.addresses[1] not in panorama.addresses()
    assert {node["state"] for node in _run(panorama, now)["nodes"]} == {"live"}


def test_two_runs_are_kept_apart():
    one, other = PretendSwarm(2, run="one"), PretendSwarm(2, run="other")
    panorama = Panorama(walk=False)
    panorama.give(["10.0.0.1:1", "10.0.0.2:1"])
    panorama.answered("10.0.0.1:1", one.status("node-0"), 0.0)
    panorama.answered("10.0.0.2:1", other.status("node-0"), 0.0)
    assert [run["run"] for run in panorama.view(0.0)["runs"]] == ["one", "other"]


# --- hostile nodes


def _hostile(**fields):
    return pb.NodeStatus(run="bbc", node="evil", pid=1, **fields)


def test_no_name_passes_for_a_node_of_another_run():
    """The two are parted by a stroke, which neither has."""
    panorama = Panorama()
    for number, (run, node) in enumerate((("bbc", "a/b"), ("bbc/a", "b"))):
        address = f"10.0.0.{number}:1"
        panorama.give([*panorama.addresses(), address])
        panorama.answered(address, pb.NodeStatus(run=run, node=node), 0.0)
    view = panorama.view(0.0)
    assert {run["run"]: run["nodes"][0]["key"] for run in view["runs"]} == {
        "bbc": "bbc/a?b",
        "bbc?a": "bbc?a/b",
    }


def test_a_remote_node_cannot_make_the_dashboard_call_this_machine():
    """Nor, by peers, more addresses than a bound."""
    status = _hostile()
    for port in range(1, 400):
        status.peers.add(node=f"a{port}", address=f"127.0.0.1:{port}", state="alive")
        status.peers.add(node=f"b{port}", address=f"localhost:{port}", state="alive")
        status.peers.add(node=f"c{port}", address=f"[::1]:{port}", state="alive")
    panorama = Panorama()
    panorama.give(["10.0.0.5:7430"])
    panorama.answered("10.0.0.5:7430", status, 0.0)
    assert panorama.addresses() == ["10.0.0.5:7430"]
    del status.peers[:]
    for host in range(250):
        status.peers.add(node=f"x{host}", address=f"10.0.1.{host}:7430", state="alive")
        status.peers.add(node=f"y{host}", address="not an address", state="alive")
    for _ in range(20):
        panorama.answered("10.0.0.5:7430", status, 0.0)
    assert len(panorama.addresses()) == 1 + MAX_PROPOSALS
    for address in panorama.addresses()[1:]:
        for _ in range(MAX_VAIN_CALLS):
            panorama.failed(address, "nobody", 1.0)
    assert panorama.addresses() == ["10.0.0.5:7430"]


def test_a_proposed_node_of_another_run_is_not_followed():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    other = PretendSwarm(2, run="other")
    panorama.answered(swarm.addresses[1], other.status("node-1"), now)
    assert panorama.addresses() == [swarm.addresses[0]]


def test_everything_told_is_bounded_and_plain():
    """Whatever a node tells, the picture is small, valid JSON without what could be markup."""
    long = "<img src=x onerror=alert(1)>\x1b[2J\n" * 2000
    status = _hostile(
        phase=pb.PHASE_TRAINING,
        loss=math.inf,
        gradient_norm=math.nan,
        disagreement=-math.inf,
        eta_seconds=math.nan,
        send_rate=math.inf,
        steps_done=2**64 - 1,
        steps_total=1,
        memory_bytes=2**63,
        blocks=2**60,
        model=long,
        waiting_for=long,
        device=long,
        method=long,
        warnings=[f"{index}{long}" for index in range(300)],
        block_disagreement=[math.nan] * 50_000,
        round_order=range(50_000),
        label_counts={f"{long}{index}": 2**64 - 1 for index in range(300)},
        refusals={f"{long}{index}": 2**64 - 1 for index in range(300)},
    )
    for index in range(2000):
        status.events.add(
            serial=index + 1, age_seconds=(math.nan, -1e300, 1e300, 3)[index % 4], text=long
        )
    for index in range(600):
        status.peers.add(
            node=f"{long}{index}",
            address=long,
            state=long,
            neighbour=True,
            weight=math.nan,
            detail=long,
            last_seen_seconds=math.inf,
            waited_seconds=-math.inf,
            bytes_sent=2**64 - 1,
            refusals={long: 2**64 - 1},
        )
    panorama = Panorama()
    panorama.give(["10.0.0.5:7430"])
    for now in range(5):
        panorama.answered("10.0.0.5:7430", status, float(now))
    panorama.steps_made(
        "10.0.0.5:7430",
        [pb.HistoryPoint(first=9, last=1)]
        + [pb.HistoryPoint(first=i, last=i, loss=math.nan) for i in range(5000)],
    )
    panorama.steps_made("10.0.0.5:7430", [pb.HistoryPoint(first=2**64 - 1, last=2**64 - 1)])
    tree = {
        "view": panorama.view(5.0),
        "events": panorama.events(0, 5.0, 1e9),
        "curves": panorama.curves({}),
        "details": panorama.details("bbc/evil", 5.0),
    }
    text = json.dumps(tree, allow_nan=False)
    assert len(text) < 1_500_000
    assert "\\u001b" not in text
    assert "\\n" not in text
    assert len(panorama.events(0, 5.0, 1e9)) <= MAX_EVENTS_KEPT
    [run] = tree["view"]["runs"]
    assert len(run["nodes"]) <= MAX_MEMBERS
    assert run["nodes"][-1]["steps_done"] <= 2**53
    assert sum(len(points) for points in tree["curves"].values()) <= 1024
    assert tree["curves"]["bbc/evil"][-1][1] == 1022  # no step beyond what JavaScript counts


def test_edges_and_points_have_bounds_however_large_the_swarm():
    swarm = PretendSwarm(92, kind="full", rounds=2, steps=8)
    panorama, now = _watching(swarm, now=20.0, looks=3)
    run = _run(panorama, now)
    assert len(run["nodes"]) == 92
    assert len(run["links"]) == MAX_LINKS_SHOWN
    assert run["links_left_out"] == 92 * 91 // 2 - MAX_LINKS_SHOWN
    assert sum(map(len, panorama.curves({}).values())) <= MAX_POINTS_SHOWN
    panorama.failed(swarm.addresses[-1], "refused", now + 60)
    links = _run(panorama, now + 60)["links"]
    assert sum(link["state"] == "gone" for link in links) == 91  # trouble is not left out


def test_many_silent_nodes_cost_no_more_than_as_many_that_answer(monkeypatch):
    """What others say of them is looked up, and not looked for among all peers of all."""
    count, names = 60, 0
    swarm = PretendSwarm(count, kind="full", rounds=2, steps=8)
    panorama, now = _watching(swarm, now=20.0, looks=2)
    for index in range(count // 2):
        swarm.down[f"node-{index}"] = now
    real = panorama_module._key

    def counted(run, node):
        nonlocal names
        names += 1
        return real(run, node)

    monkeypatch.setattr(panorama_module, "_key", counted)
    for index in range(count // 2):
        panorama.failed(swarm.address(f"node-{index}"), "refused", now + 60)
    run = _run(panorama, now + 60)
    assert sum(node["state"] == "gone" for node in run["nodes"]) == count // 2
    assert names < 4 * count**2


# --- what grows


def test_curves_and_events_are_told_from_where_the_receiver_is():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    whole = panorama.curves({})
    told = [(event["key"], event["kind"], event["at"]) for event in panorama.events(0, now, 0.0)]
    assert len(set(told)) == len(told)  # however often it was looked at
    done = swarm.done("node-0")
    assert [point[:2] for point in whole["bbc/node-0"]] == [[s, s] for s in range(done)]
    seen = {key: points[-1][1] for key, points in whole.items()}
    assert panorama.curves(seen) == {}
    last = panorama.events(0, now, 0.0)[-1]["id"]
    _look(panorama, swarm, now + 3)
    assert [point[0] for point in panorama.curves(seen)["bbc/node-0"]] == [
        done,
        done + 1,
        done + 2,
    ]
    assert all(event["id"] > last for event in panorama.events(last, now, 0.0))


def test_a_run_begun_anew_has_a_new_curve():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    before = {key: points[-1][1] for key, points in panorama.curves({}).items()}
    status = swarm.status("node-0")
    status.pid += 1
    panorama.answered(swarm.addresses[0], status, now)
    assert panorama.seen_until(swarm.addresses[0]) is None
    panorama.steps_made(swarm.addresses[0], [swarm.point("node-0", s) for s in range(3)])
    assert [point[0] for point in panorama.curves(before)["bbc/node-0"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("away", "uptime"),
    [(1.0, 1.0), (60.0, 1.0), (60.0, 9.0)],  # the last: it was seen at 5 s, soon after its start
)
def test_a_node_begun_anew_in_its_container_is_told_anew(away, uptime):
    """Its process has the number that the one before had, and counts its events from 1."""
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    status = swarm.status("node-0")
    status.uptime_seconds = 5.0
    panorama.answered(swarm.addresses[0], status, now)
    last = panorama.events(0, now, 0.0)[-1]["id"]
    status = swarm.status("node-0")
    status.uptime_seconds = uptime
    del status.events[1:]
    panorama.answered(swarm.addresses[0], status, now + away)
    assert [event["kind"] for event in panorama.events(last, now + away, 0.0)] == ["started"]
    assert panorama.seen_until(swarm.addresses[0]) is None


def test_an_answer_that_was_long_on_its_way_is_of_the_same_process():
    swarm = PretendSwarm(2)
    panorama, now = _watching(swarm)
    last = panorama.events(0, now, 0.0)[-1]["id"]
    seen = panorama.seen_until(swarm.addresses[0])
    panorama.answered(swarm.addresses[0], swarm.status("node-0"), now + 4.0)
    assert panorama.events(last, now + 4.0, 0.0) == []
    assert panorama.seen_until(swarm.addresses[0]) == seen


def test_events_are_at_the_time_of_day_they_happened():
    swarm = PretendSwarm(2)
    panorama = Panorama()
    panorama.give(swarm.addresses[:1])
    swarm.now = 100.0
    panorama.answered(swarm.addresses[0], swarm.status("node-0"), 500.0)
    started = next(e for e in panorama.events(0, 510.0, 1e9) if e["kind"] == "started")
    assert started["at"] == pytest.approx(1e9 - 110.0, abs=0.1)


def test_details_are_the_whole_status():
    swarm = PretendSwarm(3)
    panorama, now = _watching(swarm)
    tree = panorama.details("bbc/node-1", now)
    assert tree["pid"] == 4001
    assert {peer["node"] for peer in tree["peers"]} == {"node-0", "node-2"}
    assert panorama.details("bbc/nobody", now) is None
