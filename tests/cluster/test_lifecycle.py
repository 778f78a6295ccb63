"""Real daemons: stop and resume, meet without multicast, refuse each other, answer status."""

import json
import signal
import socket
import subprocess
import sys
import time
import uuid

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deca_node.fingerprint import PROTOCOL_VERSION
from deca_node.pb import node_pb2 as pb
from tests.cluster.daemons import DEADLINE
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def make(daemon, model):
    """A function that makes daemons of one run."""
    rows = [{"text": f"{'abcd'[i % 4]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    run = f"life-{uuid.uuid4().hex[:8]}"

    def factory(name, *settings):
        common = [
            f"run.name={run}",
            f"model.path={model}",
            "schedule.rounds=1",
            "optimizer.learning_rate=1e-3",
        ]
        return daemon(name, rows, *common, *settings)

    return factory


@pytest.fixture
def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def weights(daemon):
    return load_file(daemon.output / "model" / "model.safetensors")


def test_a_stopped_run_resumes_in_its_visit_and_ends_the_same(make):
    """SIGTERM in the middle of a visit, then a second start: the very same model, bit for bit.

    The run is long against the questions to it: a stall of ours does not miss its middle.
    """
    alone = ["run.start_when=1", "network.zeroconf=false", "schedule.steps=400"]
    whole = make("whole", *alone).start()
    assert whole.wait() == 0, whole.log.read_text()[-3000:]
    stopped = make("stopped", *alone, "data.batch_size=4").start()
    stopped.until(lambda s: s.steps_done >= 70)
    begin = time.monotonic()
    stopped.end(signal.SIGTERM)
    assert stopped.wait() == 0
    assert time.monotonic() - begin < 5
    done = len(stopped.history())
    assert 70 <= done < 1600
    assert not (stopped.output / "model").exists()
    assert stopped.start().wait() == 0
    resumed = next(e for e in stopped.events() if e["event"] == "resuming")
    assert resumed["visit"] * 400 + resumed["step"] == done
    rows = [(r["visit"], r["step"]) for r in stopped.history()]
    assert rows == [(v, s) for v in range(4) for s in range(400)]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(stopped)[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(stopped.output / "model")
    assert loaded.config.num_hidden_layers == 4
    again = stopped.start()
    assert again.wait() == 0  # a finished run stays finished
    assert any("finished" in e["event"] for e in again.events()[-1:])


def test_a_second_interrupt_ends_a_node_whose_save_hangs(make):
    """The disk takes nothing any more: one Ctrl-C waits for it, a second one does not."""
    node = make("hangs", "run.start_when=1", "schedule.steps=4000")
    options = [word for setting in node.settings for word in ("--set", setting)]
    hanging = (
        "import sys, threading\n"
        "from deca_node import cli\n"
        "from deca_node.kept import KeptBlocks\n"
        "KeptBlocks.save = lambda *_: (print('hangs', flush=True), threading.Event().wait())\n"
        "cli.main(sys.argv[1:])\n"
    )
    with (
        node.log.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", hanging, "start", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        node.process = process
        try:
            node.until(lambda s: s.steps_done >= 5)
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "hangs\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)  # it waits for its save
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == -signal.SIGINT  # which a shell calls 130
        finally:
            process.kill()


def test_another_run_does_not_get_the_folder(make):
    """The same output with another seed is refused with the field, and nothing is touched."""
    first = make("one", "run.start_when=1", "network.zeroconf=false", "schedule.steps=1").start()
    assert first.wait() == 0
    before = (first.output / "history.jsonl").read_bytes()
    other = make(
        "one", "run.start_when=1", "network.zeroconf=false", "schedule.steps=1", "run.seed=5"
    ).start()
    assert other.wait() == 8
    assert "run.seed" in other.log.read_text().splitlines()[-1]
    assert (first.output / "history.jsonl").read_bytes() == before


def test_static_peers_and_peer_exchange_take_the_place_of_multicast(make):
    """Three nodes that only know one address each find all of each other."""
    common = ["network.zeroconf=false", "run.start_when=3", "schedule.steps=2"]
    hub = make("hub", *common).start()
    address = hub.until(lambda s: s.address).address
    rest = [make(n, *common, f'network.static_peers=["{address}"]').start() for n in ("a", "b")]
    daemons = [hub, *rest]
    assert [d.wait() for d in daemons] == [0, 0, 0], hub.log.read_text()[-3000:]
    for daemon in daemons:
        others = sorted({"hub", "a", "b"} - {daemon.name})
        history = daemon.history()
        for row in history:
            assert row["neighbours"] == others
            assert set(row["edges"]) == set(others)
            for edge in row["edges"].values():
                assert edge["received"] > 0
                assert 0 <= edge["wait"] < row["seconds_step"]
                assert edge["retries"] >= 0
            # The wait begins while the block is still being updated, and so is no further part.
            assert 0 < row["seconds_gradient"] + row["seconds_update"] <= row["seconds_step"] + 1e-5
            assert min(row["seconds_wait"], row["seconds_mix"], row["seconds_ahead"]) >= 0
            assert 0 <= row["seconds_exposed"] <= row["seconds_step"]
        for peer in others:
            edges = [row["edges"][peer] for row in history]
            for way, rate in (("received", "receive_rate"), ("sent", "send_rate")):
                # Means over ten seconds, rounded; a block may be fetched while a line is written.
                carried = [edge[way] for edge in edges]
                most = (sum(carried) + max(carried)) / 10 + 1
                assert all(0 <= edge[rate] <= most for edge in edges)
                assert edges[-1][rate] > 0


def test_different_settings_are_named_on_both_sides(make):
    """Two nodes of one run that differ in a setting wait, and both logs say which."""
    common = ["run.start_when=2", "schedule.steps=1"]
    one = make("one", *common).start()
    other = make("other", *common, "optimizer.bma=off").start()
    for daemon in (one, other):
        status = daemon.until(lambda s: s.peers and s.peers[0].state == "refused")
        assert "optimizer.bma is" in status.peers[0].detail
        # For whom a node waits it works out once a second.
        daemon.until(lambda s: "optimizer.bma" in s.waiting_for)
    for daemon in (one, other):
        daemon.end(signal.SIGINT)
    assert [d.wait() for d in (one, other)] == [0, 0]
    for daemon in (one, other):
        assert any("optimizer.bma" in str(event.get("detail")) for event in daemon.events())


def test_a_killed_neighbour_does_not_stop_the_others(make):
    """SIGKILL one of three in the middle: the others notice, heal and finish."""
    common = ["run.start_when=3", "schedule.steps=150", "topology.kind=ring"]
    daemons = [make(name, *common).start() for name in "abc"]
    daemons[2].until(lambda s: s.steps_done >= 20)
    daemons[2].end(signal.SIGKILL)
    assert [d.wait() for d in daemons[:2]] == [0, 0], daemons[0].log.read_text()[-3000:]
    for daemon, other in zip(daemons[:2], "ba", strict=True):
        history = daemon.history()
        assert len(history) == 600
        assert history[0]["neighbours"] == sorted({"a", "b", "c"} - {daemon.name})
        assert history[-1]["neighbours"] == [other]
        assert history[-1]["degree"] == 1
        slowest = max(row["seconds_step"] for row in history)
        assert slowest < 30  # far from the 60 s deadline: a closed connection is not waited for
    first, second = (weights(d) for d in daemons[:2])
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 0.05


def test_a_neighbour_that_is_too_slow_is_named(make):
    """By the one that waits for it in vain, with what to do; the slow one is not told so."""
    common = ["run.start_when=2", "schedule.steps=30"]
    fast = make("alice", *common, "network.step_deadline=0.2").start()
    slow = make("bob", *common, "network.send_rate=0.005").start()
    fast.until(lambda status: any("bob's blocks come too late" in w for w in status.warnings))
    assert not [event for event in slow.events() if "come too late" in event["event"]]


def test_status_verbs_show_a_running_node(make):
    """`status` finds the node of this machine; JSON and table agree; peers lists the neighbour."""
    common = ["run.start_when=2", "schedule.steps=4000"]
    daemons = [make(name, *common).start() for name in "ab"]
    address = daemons[0].until(lambda s: s.steps_done >= 5).address

    def verb(*arguments):
        command = [sys.executable, "-m", "deca_node", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE, check=False
        )

    found = verb("status", address, "--json")
    assert found.returncode == 0, found.stderr
    status = json.loads(found.stdout)
    assert status["node"] == "a"
    assert status["phase"] == "training"
    assert status["peers"][0]["weight"] == pytest.approx(0.5)
    table = verb("status", address)
    assert table.returncode == 0
    assert "training" in table.stdout
    assert verb("peers", address).stdout.count("alive") == 1
    everybody = verb("status")
    assert everybody.returncode == 0
    assert everybody.stdout.count("training") >= 2
    for daemon in daemons:
        daemon.end(signal.SIGTERM)
    assert [d.wait() for d in daemons] == [0, 0]
    gone = verb("status", address)
    assert gone.returncode == 3
    assert len(gone.stderr.strip().splitlines()) == 1


def test_a_node_that_stays_answers_health_until_a_signal(make, free_port):
    """On a port of its own; its run is finished, and it is so again after another start."""
    daemon = make(
        "staying",
        *("run.start_when=1", "network.zeroconf=false", "schedule.steps=4"),
        *("node.stay=true", f"node.health_port={free_port}"),
    )
    for _ in range(2):
        status = daemon.start().until(lambda s: s.phase == pb.PHASE_DONE)
        sender = pb.Sender(run=daemon.run_name, node="late", session=7)
        greeting = pb.HelloRequest(sender=sender, protocol=PROTOCOL_VERSION, port=1)
        greeting.phase = pb.PHASE_STARTING
        with grpc.insecure_channel(status.address) as channel:
            hello = channel.unary_unary(
                "/deca.v1.Peer/Hello",
                request_serializer=pb.HelloRequest.SerializeToString,
                response_deserializer=pb.HelloReply.FromString,
            )
            assert hello(greeting, timeout=DEADLINE).phase == pb.PHASE_DONE
        with grpc.insecure_channel(f"127.0.0.1:{free_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            ask = channel.unary_unary("/deca.v1.Status/GetStatus")
            with pytest.raises(grpc.RpcError) as refused:
                ask(b"", timeout=DEADLINE)
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED  # it serves nothing else
        daemon.end(signal.SIGTERM)
        assert daemon.wait() == 0
        assert (daemon.output / "model" / "model.safetensors").exists()
