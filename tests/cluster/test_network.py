"""Real daemons on hosts of their own, and what networks and disks do to them."""

import itertools
import json
import random
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from datetime import datetime

import psutil
import pytest
from safetensors.torch import load_file

from deca_node.pb import node_pb2 as pb
from tests.cluster.daemons import DEADLINE
from tests.lab.hosts import REPOSITORY, Lab, LabDaemon, unavailable
from tests.tiny import make_model
from tests.trust import Run

RING = {"a": "bd", "b": "ac", "c": "bd", "d": "ac"}  # its neighbours with all four there
GONE_ON = 2.0  # seconds that a killed neighbour may cost the others on the lan preset, once
FOUND = 10.0  # seconds from a network's healing until all have met again

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def whole_lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab(whole_lab):
    """A laboratory without hosts."""
    whole_lab.clear(seed=5)
    yield whole_lab
    whole_lab.clear()


@pytest.fixture
def swarm(lab, tmp_path, model):
    """A function that makes a host with its daemon; each has data of its own.

    ``secure``: it trains under TLS, with certificates of an authority of the run.
    """
    run = f"lab-{uuid.uuid4().hex[:8]}"
    common = [f"run.name={run}", f"model.path={model}", "model.dtype=fp32"]
    common += ["optimizer.learning_rate=1e-3", "data.batch_size=2"]
    numbers = itertools.count()
    authority = Run(tmp_path / "trust", run)

    def factory(name, *settings, secure=False):
        number = next(numbers)
        rows = [
            {"text": f"{'abcd'[(i + number) % 4]} {i}", "label": "abcd"[(i * number) % 4]}
            for i in range(24)
        ]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lab.host(name)
        labels = 'data.labels={a = "a", b = "b", c = "c", d = "d"}'
        keyring = authority.keyring(name) if secure else None
        chosen = [*common, f"data.train={data}", labels, *settings]
        return LabDaemon(lab, tmp_path, name, chosen, keyring)

    return factory


def finish(daemons):
    """All end well within the deadline."""
    for daemon in daemons:
        assert daemon.wait() == 0, f"{daemon.name}:\n{daemon.log.read_text()[-3000:]}"


def stop(daemons):
    """The runs were longer than the test needs."""
    for daemon in daemons:
        daemon.end(signal.SIGTERM)
    finish(daemons)


def neighbours(status):
    """Those with whom there are edges in the visit under way."""
    return {peer.node for peer in status.peers if peer.neighbour}


def alive(status):
    """Those whom a node has met and has not lost."""
    return {peer.node for peer in status.peers if peer.state == "alive"}


def trains_with(*names):
    """A condition on a status: training, with exactly these neighbours."""

    def reached(status):
        return status.phase == pb.PHASE_TRAINING and neighbours(status) == set(names)

    return reached


def seconds_until(daemon, reached, begin):
    """How long after ``begin`` a daemon's status satisfied a condition."""
    daemon.until(reached)
    return time.monotonic() - begin


def visit(status):
    """Index of the block visit over the whole run."""
    return status.round * status.blocks + status.position


def weights(daemon):
    return load_file(daemon.output / "model" / "model.safetensors")


def distance(one, other):
    """Largest difference between two daemons' models in any weight."""
    first, second = weights(one), weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def longest_pause(daemon, first):
    """Seconds that a step waited for neighbours, or that lay between two visits, at the most.

    The record says how long steps took, the log when visits began; ``first`` is the first visit
    that counts.
    """
    rows = [row for row in daemon.history() if row["visit"] >= first]
    took = Counter()
    for row in rows:
        took[row["visit"]] += row["seconds_step"]
    began = {
        event["visit"]: datetime.fromisoformat(event["time"]).timestamp()
        for event in daemon.events()
        if event["event"] == "visit"
    }
    between = [began[v + 1] - began[v] - took[v] for v in took if v + 1 in began]
    return max(*(row["seconds_wait"] for row in rows), *between)


# --- the laboratory itself

TALK = """
import socket, sys, time
end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end.settimeout(0.5)
end.bind(("", 9000))
if sys.argv[1] == "echo":
    end.settimeout(None)
    while True:
        end.sendto(*end.recvfrom(100))
begin, came = time.monotonic(), 0
for _ in range(int(sys.argv[2])):
    end.sendto(b"x", (sys.argv[1], 9000))
    try:
        came += len(end.recv(100))
    except TimeoutError:
        pass
print(came, time.monotonic() - begin)
"""


def test_the_laboratory_delays_loses_and_cuts(lab, tmp_path):
    """Echoes over a real link take what the switch says, and stop where it says so."""
    first = lab.host("a")
    lab.host("b")
    lab.start("a", [sys.executable, "-c", TALK, "echo"], tmp_path / "a.log")

    def echoes(count):
        log = tmp_path / "b.log"
        asking = lab.start("b", [sys.executable, "-c", TALK, first, str(count)], log)
        assert asking.wait(DEADLINE) == 0, log.read_text()
        came, seconds = log.read_text().splitlines()[-1].split()
        return int(came), float(seconds)

    limit = time.monotonic() + DEADLINE
    while echoes(1)[0] == 0:
        assert time.monotonic() < limit  # the echo has not begun yet
    lab.links(delay=0.05)
    came, seconds = echoes(5)
    assert came == 5
    assert seconds >= 0.5
    lab.cut("a", "b")
    assert echoes(1)[0] == 0
    lab.heal()
    assert echoes(1)[0] == 1
    lab.link("b", "a", loss=1.0)
    assert echoes(1)[0] == 0


def test_nothing_is_left_when_the_test_process_is_killed(tmp_path):
    """SIGKILL of whoever opened the laboratory ends what ran in it, to the last process."""
    script = """
import sys
from pathlib import Path
from tests.lab.hosts import Lab
lab = Lab()
for name in "ab":
    lab.host(name)
    lab.start(name, ["sleep", sys.argv[1]], Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.read()
"""
    mark = f"86400.{random.randrange(10**9)}"  # finds these very processes among all

    def sleeping():
        return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]

    tester = subprocess.Popen(
        [sys.executable, "-c", script, mark, str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert tester.stdout.readline() == b"ready\n"
    assert len(sleeping()) >= 2
    tester.kill()
    tester.wait()
    limit = time.monotonic() + DEADLINE
    while sleeping():
        assert time.monotonic() < limit
        time.sleep(0.05)  # between two looks at other processes
    tester.stdin.close()
    tester.stdout.close()


# --- swarms


def test_a_swarm_found_by_multicast_trains_and_finishes(swarm):
    """Four hosts that know nothing of each other but the run's name and authority."""
    common = ["run.start_when=4", "schedule.rounds=2", "schedule.steps=40"]
    daemons = [swarm(name, *common, secure=True).start(anew=True) for name in RING]
    finish(daemons)
    for daemon, expected in zip(daemons, RING.values(), strict=True):
        history = daemon.history()
        assert len(history) == 320
        assert all(row["neighbours"] == list(expected) for row in history)
    assert max(distance(daemons[0], other) for other in daemons[1:]) < 0.05


def test_each_node_is_killed_in_turn_and_comes_back(swarm):
    """SIGKILL one: the others go on within 2 s; it takes part again, and the next one is killed."""
    common = ["run.start_when=4", "schedule.rounds=1000", "schedule.steps=25"]
    daemons = {name: swarm(name, *common).start() for name in RING}
    for victim, daemon in daemons.items():
        for name, each in daemons.items():
            each.until(trains_with(*RING[name]))
        living = [each for name, each in daemons.items() if name != victim]
        since = {each.name: visit(each.status()) for each in living}
        daemon.end(signal.SIGKILL)
        assert daemon.wait() == -signal.SIGKILL
        for each in living:
            rest = {peer.name for peer in living} - {each.name}
            each.until(trains_with(*rest))
        daemon.start()
        daemon.until(trains_with(*RING[victim]))
        for each in living:
            assert longest_pause(each, since[each.name]) < GONE_ON, (victim, each.name)
    stop(daemons.values())


def test_a_ring_cut_in_two_goes_on_and_grows_together_again(lab, swarm):
    """Both halves train for 30 s apart; healed, all meet within 10 s and agree within a round.

    The learning rate is low, so that disagreement is steady where nothing disturbs it.
    """
    common = ["run.start_when=4", "schedule.rounds=1000", "schedule.steps=25"]
    common += ["optimizer.learning_rate=1e-5"]
    daemons = {name: swarm(name, *common).start() for name in RING}
    for name, each in daemons.items():
        each.until(trains_with(*RING[name]))
    for each in daemons.values():
        each.until(lambda s: s.round >= 3)
    lab.cut("ab", "cd")
    begin = time.monotonic()
    apart = {name: visit(each.status()) for name, each in daemons.items()}
    for name, each in daemons.items():
        each.until(trains_with({"a": "b", "b": "a", "c": "d", "d": "c"}[name]))
    halfway = {name: each.status().steps_done for name, each in daemons.items()}
    time.sleep(max(0.0, begin + 30 - time.monotonic()))  # the length of the fault
    for name, each in daemons.items():
        assert each.status().steps_done > halfway[name] + 25, name
    lab.heal()
    begin = time.monotonic()
    for name, each in daemons.items():
        others = daemons.keys() - {name}
        assert seconds_until(each, lambda s, o=others: alive(s) >= o, begin) < FOUND, name
    for name, each in daemons.items():
        each.until(trains_with(*RING[name]))
    together = max(visit(each.status()) for each in daemons.values())
    for each in daemons.values():
        each.until(lambda s: visit(s) > together + 2 * s.blocks)
    stop(daemons.values())
    for name, each in daemons.items():
        rows = each.history()

        def disagreement(first, rows=rows):
            """The median over a round's visits, each at its end."""
            round_ = [r for r in rows if first <= r["visit"] < first + 4 and r["step"] >= 15]
            return statistics.median(r["disagreement"] for r in round_)

        before, after = disagreement(apart[name] - 4), disagreement(together + 5)
        assert after < 1.5 * before, (name, before, after)


def test_a_run_finishes_over_links_that_lose_every_fifth_frame(lab, swarm):
    """20% loss and 50 ms each way, from discovery to the last block."""
    common = ["run.start_when=3", "schedule.rounds=1", "schedule.steps=3", "network.preset=wan"]
    daemons = [swarm(name, *common) for name in "abc"]
    lab.links(delay=0.05, loss=0.2)
    finish([daemon.start() for daemon in daemons])
    for daemon in daemons:
        assert len(daemon.history()) == 12
        assert any(row["neighbours"] for row in daemon.history())


def test_others_finish_with_a_node_on_a_thin_line(lab, swarm):
    """One of three has 2 Mbit/s for all it sends and as much for all that it receives."""
    common = ["run.start_when=3", "schedule.rounds=1", "schedule.steps=10"]
    daemons = [swarm(name, *common) for name in "abc"]
    lab.uplink("c", rate=2e6, delay=0.01)
    finish([daemon.start() for daemon in daemons])
    for daemon in daemons:
        assert len(daemon.history()) == 40
    assert distance(*daemons[:2]) < 0.05


def test_one_static_peer_introduces_everybody_where_multicast_is_blocked(lab, swarm):
    """All four know one address; each meets every other through what that one says."""
    common = ["run.start_when=4", "schedule.rounds=1", "schedule.steps=25", "topology.kind=full"]
    hub = swarm("a", *common)
    settings = [*common, f'network.static_peers=["{lab.address("a")}"]']
    daemons = [hub, *(swarm(name, *settings) for name in "bcd")]
    lab.links(multicast=False)
    finish([daemon.start() for daemon in daemons])
    for daemon in daemons:
        others = sorted({"a", "b", "c", "d"} - {daemon.name})
        assert all(row["neighbours"] == others for row in daemon.history())


def test_a_node_whose_address_changes_is_met_again(lab, swarm):
    """The others find its new address and exchange with it there; it never stopped."""
    common = ["run.start_when=3", "schedule.rounds=1000", "schedule.steps=25"]
    daemons = {name: swarm(name, *common, secure=True).start() for name in "abc"}
    for name, each in daemons.items():
        each.until(trains_with(*daemons.keys() - {name}))
    lab.move("c")
    moved = lab.address("c")
    for name in "ab":
        daemons[name].until(
            lambda s: any(
                p.node == "c" and p.address == moved and p.state == "alive" for p in s.peers
            )
        )
    for name, each in daemons.items():
        each.until(trains_with(*daemons.keys() - {name}))
    met = daemons["c"].status().steps_done
    daemons["c"].until(lambda s: s.steps_done > met + 100)
    recent = daemons["c"].history()[-50:]
    stop(daemons.values())
    assert all(row["neighbours"] == ["a", "b"] for row in recent)


@pytest.mark.parametrize("seed", [1])
def test_a_node_that_comes_late_catches_up_and_takes_part(swarm, seed):
    """It starts at a step drawn from the seed, somewhere in the first rounds."""
    common = ["run.start_when=3", "schedule.rounds=20", "schedule.steps=25"]
    daemons = [swarm(name, *common).start() for name in "abc"]
    step = random.Random(seed).randrange(50, 400)
    daemons[0].until(lambda s: s.steps_done >= step)
    late = swarm("d", *common).start()
    late.until(trains_with("a", "c"))
    finish([*daemons, late])
    assert late.history()[0]["visit"] * 25 > step  # it did not begin at the beginning
    assert daemons[0].history()[-1]["neighbours"] == ["b", "d"]
    assert max(distance(late, other) for other in daemons) < 0.05


def test_a_full_disk_is_said_and_written_to_again(lab, swarm):
    """The run goes on meanwhile; when there is room, state, record and model are written."""
    common = ["run.start_when=2", "schedule.rounds=12", "schedule.steps=25"]
    small = lab.small_disk("a", 4 << 20)
    daemons = [swarm("a", *common, f"node.output={small / 'out'}"), swarm("b", *common)]
    daemons[0].output = lab.seen(small / "out")
    for daemon in daemons:
        daemon.start()
    daemons[0].until(lambda s: s.steps_done >= 30)
    manifest = daemons[0].output / "state" / "manifest.json"
    filler = lab.seen(small / "filler")
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(4 << 20))
    full = daemons[0].until(lambda s: any("no space left" in text for text in s.warnings))
    kept = json.loads(manifest.read_bytes())["progress"]["visit"]
    later = daemons[0].until(lambda s: s.steps_done >= full.steps_done + 60)
    assert later.phase == pb.PHASE_TRAINING
    assert json.loads(manifest.read_bytes())["progress"]["visit"] <= kept + 1
    filler.unlink()
    now = visit(later)
    limit = time.monotonic() + DEADLINE
    while json.loads(manifest.read_bytes())["progress"]["visit"] <= now:
        assert time.monotonic() < limit
        time.sleep(0.05)  # between two looks at another process's files
    daemons[1].until(lambda s: s.steps_done >= 500)
    state = daemons[0].output / "state"
    # Its file system goes with the laboratory: look before the end.
    finish(daemons)
    assert json.loads(manifest.read_bytes())["progress"]["finished"]
    assert len(list(state.glob("block-*"))) == 4
    serials = [row["visit"] * 25 + row["step"] for row in daemons[0].history()]
    assert serials == sorted(set(serials))
    assert serials[-1] == 12 * 4 * 25 - 1
    assert distance(*daemons) < 0.05
