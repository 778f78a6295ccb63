"""`deca-node doctor`: real listeners on the loopback, one real daemon."""

import asyncio
import errno
import json
import shutil
import socket
import sys
import time
import uuid
from collections import namedtuple
from contextlib import asynccontextmanager

import pytest

from deca_node import cli, discovery, estimate
from deca_node.checkpoint import sealing
from deca_node.config import load
from deca_node.doctor import Verdict, examine, machine, network
from deca_node.doctor.checks import Facts
from deca_node.errors import CheckError, OutputError
from deca_node.pb import node_pb2 as pb
from deca_node.tensorboard import Scalars
from deca_node.transport.server import GrpcTransport
from tests.cluster.daemons import Daemon
from tests.edges.test_models import swapped
from tests.tiny import make_model
from tests.trust import Run

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("doctor") / "model", "llama")


@pytest.fixture
def words(tmp_path, model):
    """Settings of a node that would start, as on the command line; others may follow."""
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = [
        f"run.name=doc-{uuid.uuid4().hex[:8]}",
        "node.host=127.0.0.1",
        "node.port=0",
        f"node.output={tmp_path / 'out'}",
        f"model.path={model}",
        f"data.train={train}",
        "network.zeroconf=false",
        "network.preset=local",
    ]
    return lambda *more: [*common, *more]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_name(checks):
    """Check -> list of them."""
    found = {}
    for one in checks:
        found.setdefault(one.check, []).append(one)
    return found


def verdicts(checks, name):
    return [one.verdict for one in by_name(checks)[name]]


async def look(words, *more, **options):
    return await examine(load(None, words(*more)), **options)


async def test_a_node_that_would_start_alone_is_well(words, tmp_path):
    """Everything is looked at, and nothing is left behind."""
    checks = await look(words, "run.start_when=1", "node.name=a")
    found = by_name(checks)
    assert {one.verdict for one in checks} == {Verdict.OK}, checks
    assert set(found) == {
        *("settings", "device", "model", "data", "weights", "memory", "disk", "trust"),
        *("multicast", "port"),
    }
    assert "LlamaForCausalLM" in found["model"][0].found
    assert "8 rows" in found["data"][0].found
    assert "a 4, b 4" in found["data"][0].found
    assert not (tmp_path / "out").exists()


async def test_a_test_that_the_node_trains_on_is_a_warning(words, tmp_path):
    """The rows themselves as data.test measure nothing: told with the remedy, and no failure."""
    checks = await look(words, f"data.test={tmp_path / 'train.jsonl'}")
    assert verdicts(checks, "data") == [Verdict.OK, Verdict.WARN]
    assert "8 rows of data.test ask the same" in by_name(checks)["data"][1].found


LONG = {"text": "0123456789 " * 6, "label": "a"}


@pytest.mark.parametrize(
    ("family", "change", "verdict", "said"),
    [
        ("llama", {"vocab_size": 264}, Verdict.FAIL, "ids up to 268, its embedding has 264 rows"),
        ("gpt2", {"n_positions": 48}, Verdict.FAIL, "can take 48"),
        ("llama", {"max_position_embeddings": 48}, Verdict.WARN, "was made for 48"),
        ("llama", {"vocab_size": 300}, Verdict.OK, "examples"),
    ],
)
async def test_examples_that_the_model_cannot_take(words, tmp_path, family, change, verdict, said):
    """Ids without a row and tokens without a position end a step; a padded embedding is well."""
    path = make_model(tmp_path / "small", family, layers=1, **change)
    (tmp_path / "long.jsonl").write_text(json.dumps(LONG) + "\n")
    more = [] if verdict == Verdict.OK else [f"data.train={tmp_path / 'long.jsonl'}"]
    label = "data.labels={a='h'}" if "vocab_size" in change else "data.labels={a='a'}"
    more += [label] if more else []
    found = await look(words, "run.start_when=1", f"model.path={path}", *more)
    (*_, last) = by_name(found)["data"]
    assert last.verdict == verdict
    assert said in last.found
    assert verdict == Verdict.OK or last.remedy


async def test_the_trust_of_a_node_for_others_is_looked_at(words, tmp_path):
    """No certificate, a good one, plain text by wish; two under TLS meet."""
    run = next(w for w in words() if w.startswith("run.name=")).partition("=")[2]
    open_words = (*words("node.host=0.0.0.0", "run.start_when=1"), f"trust.folder={tmp_path / 't'}")

    async def trust(*more):
        return by_name(await examine(load(None, [*open_words, *more]), patience=0.1))

    found = await trust("node.name=a")
    assert [one.verdict for one in found["trust"]] == [Verdict.FAIL]
    assert "swarm join" in found["trust"][0].remedy
    keyring = Run(tmp_path / "run", run).keyring("a")
    keyring.folder.rename(tmp_path / "t")
    found = await trust("node.name=a")
    assert [one.verdict for one in found["trust"]] == [Verdict.OK]
    assert "a is certified until" in found["trust"][0].found
    (tmp_path / "t" / "nodes" / "a.key").chmod(0o440)  # a mounted secret
    assert [one.verdict for one in (await trust("node.name=a"))["trust"]] == [Verdict.OK]
    (tmp_path / "t" / "nodes" / "a.key").chmod(0o640)
    found = await trust("node.name=a")
    assert [one.verdict for one in found["trust"]] == [Verdict.OK, Verdict.WARN]
    assert "chmod 600" in found["trust"][1].remedy
    found = await trust("trust.insecure=true")
    assert [one.verdict for one in found["trust"]] == [Verdict.WARN]


@pytest.mark.parametrize(
    ("change", "check", "words_found"),
    [
        ("data.train=absent.jsonl", "data", "absent.jsonl: no such file"),
        ("data.label_field=topic", "data", "topic"),
        ("model.path=absent", "model", "absent: no such folder"),
        ("node.device=cuda:77", "device", "cuda:77"),
        ("schedule.layers_per_block=9", "model", "the model has 4 layers"),
        (f"node.output={__file__}/out", "disk", "is a file, not a folder"),
        (f"tensorboard.folder={__file__}", "tensorboard", "is a file, not a folder"),
    ],
)
async def test_what_would_stop_the_node_fails_by_name(words, change, check, words_found):
    """And the other checks are made all the same."""
    checks = await look(words, "run.start_when=1", change)
    bad = [one for one in checks if one.verdict == Verdict.FAIL]
    assert [one.check for one in bad] == [check]
    assert words_found in bad[0].found
    assert bad[0].remedy or "absent" in change
    assert "port" in by_name(checks)


async def test_curves_need_their_extra(words, monkeypatch, tmp_path):
    """As `start` says it; nothing is written."""
    wanted = f"tensorboard.folder={tmp_path / 'curves'}"
    assert verdicts(await look(words, "run.start_when=1", wanted), "tensorboard") == [Verdict.OK]
    assert not (tmp_path / "curves").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    (one,) = by_name(await look(words, "run.start_when=1", wanted))["tensorboard"]
    assert (one.verdict, one.found) == (Verdict.FAIL, "tensorboard.folder needs tensorboardX")
    assert "pip install 'deca-node[tensorboard]'" in one.remedy


@pytest.mark.parametrize("place", ["/proc/tb", "FILE/tb"])
def test_a_folder_for_curves_that_cannot_be_made_is_said_with_the_remedy(place, tmp_path):
    (tmp_path / "FILE").touch()
    folder = tmp_path / place  # an absolute place stays as it is
    with pytest.raises(OutputError, match=r"; set tensorboard\.folder to another folder that can"):
        Scalars(folder, 0)


async def test_too_little_memory_and_disk_fail_with_what_to_turn(words, monkeypatch):
    """The need is told beside what is free; just enough is a warning."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine, "_free_memory", lambda: 1 << 20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(9, 9, 1 << 20))
    found = by_name(await look(words, "run.start_when=1"))
    for name, beside, setting in (
        ("memory", "needed of 1.0 MiB free", "data.batch_size"),
        ("disk", "to write, 1.0 MiB free", "node.output"),
    ):
        (one,) = found[name]
        assert one.verdict == Verdict.FAIL
        assert beside in one.found
        assert setting in one.remedy
    assert machine._fits("memory", 90, 100, "").verdict == Verdict.WARN
    assert machine._fits("memory", 80, 100, "").verdict == Verdict.OK


def test_memory_to_write_a_merged_model_is_counted(words, monkeypatch):
    """On a CPU, where LoRA's copies of the matrices are beside the weights: for most, the peak."""
    facts = Facts(load(None, words("run.method=dec-lora")))
    needs = estimate.Memory(1000, 10, 20, 10, activations=100, snapshots=10, copies=900)
    monkeypatch.setattr(machine.estimate, "memory", lambda *_: needs)
    monkeypatch.setattr(machine.estimate, "PROCESS_BYTES", 0)
    for look in (machine._device, machine._model):
        list(look(facts))
    assert facts.work()[1].merged
    [check] = machine._memory(facts)
    assert check.found.startswith("about 1.9 KiB needed")
    assert check.found.endswith("; to write the model, weights and copies 900 B)")


async def test_another_runs_output_folder_is_told(words, tmp_path):
    """Before the node itself would refuse it."""
    folder = tmp_path / "out"
    folder.mkdir()
    own = Facts(load(None, words("run.start_when=1", "node.name=a"))).marks()
    mark = sealing.sealed({**own, "run.seed": "5", "node": "a"})
    (folder / "run.json").write_bytes(mark)
    (bad,) = by_name(await look(words, "run.start_when=1", "node.name=a"))["output"]
    assert bad.verdict == Verdict.FAIL
    assert "run.seed is '5' there, '0' here" in bad.found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", '{"format": 1}', "format"),
        ("run.json", "{", "damaged"),
        ("history.jsonl", "", "not a run's output"),
    ],
)
async def test_a_folder_that_start_refuses_is_told(words, tmp_path, name, content, said):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text(content)
    (bad,) = by_name(await look(words, "run.start_when=1"))["output"]
    assert bad.verdict == Verdict.FAIL
    assert said in bad.found


async def test_a_file_that_cannot_be_looked_at_costs_its_own_check(words, monkeypatch):
    """And no other one."""

    def unreadable(_):
        raise PermissionError(errno.EACCES, "Permission denied", "out/state")

    monkeypatch.setattr(machine, "_size", unreadable)
    found = by_name(await look(words, "run.start_when=1"))
    assert [(one.verdict, one.found) for one in found["disk"]] == [
        (Verdict.FAIL, "out/state: Permission denied")
    ]
    assert "port" in found


async def test_an_interface_that_does_not_hear_itself(words, monkeypatch):
    """It fails where multicast is the only way to others, and else is a warning."""
    monkeypatch.setattr(network, "loops_back", lambda _: False)
    on = ["network.zeroconf=true", 'network.interfaces=["127.0.0.1"]']
    checks = await look(words, "run.start_when=2", *on, patience=0.1)
    assert verdicts(checks, "multicast") == [Verdict.FAIL]
    peers = 'network.static_peers=["127.0.0.1:9"]'
    checks = await look(words, "run.start_when=2", *on, peers, patience=0.1)
    assert verdicts(checks, "multicast") == [Verdict.WARN]
    assert "127.0.0.1" in by_name(checks)["multicast"][0].found


async def test_interfaces_that_cannot_be_listed_are_a_check_that_fails(words, monkeypatch):
    """As under a seccomp that forbids netlink; it ended the doctor with a traceback."""

    def refused():
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(discovery.ifaddr, "get_adapters", refused)
    facts = Facts(load(None, words("run.start_when=2", "network.zeroconf=true")))
    [check] = await network.multicast(facts)
    assert check.verdict == Verdict.FAIL
    assert check.found == "this machine's interfaces cannot be listed: Operation not permitted"
    assert "network.static_peers" in check.remedy
    facts = Facts(load(None, words("run.start_when=1", "network.zeroconf=true")))
    [check] = await network.multicast(facts)
    assert check.verdict == Verdict.WARN


async def test_nobody_there_is_a_warning(words):
    """The others may not have been started; a static peer that does not answer is named."""
    checks = await look(words, 'network.static_peers=["127.0.0.1:9"]', patience=1.0)
    assert verdicts(checks, "peers") == [Verdict.WARN]
    assert "127.0.0.1:9" in by_name(checks)["peer"][0].found
    assert verdicts(checks, "peer") == [Verdict.WARN]


async def test_a_name_without_an_address_is_a_warning(words):
    """With what the resolver said; where a name has one, whoever is there is called."""
    checks = await look(words, 'network.dns_peers=["no-such-name.invalid:9"]', patience=1.0)
    assert any(
        check.verdict == Verdict.WARN and "no-such-name.invalid:9 has no address" in check.found
        for check in by_name(checks)["peers"]
    )
    checks = await look(words, 'network.dns_peers=["localhost:9"]', patience=1.0)
    assert not any("has no address" in check.found for check in by_name(checks)["peers"])


async def test_a_port_of_another_program_fails(words):
    """With the setting to change."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (bad,) = by_name(await look(words, f"node.port={port}"))["port"]
    assert bad.verdict == Verdict.FAIL
    assert f"127.0.0.1:{port}" in bad.found
    assert "node.port" in bad.remedy


@pytest.mark.parametrize("setting", ["node.health_port", "metrics.port"])
async def test_the_other_ports_are_looked_at_as_start_does(words, setting):
    """Taken by another program, or by this node itself."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        checks = await look(words, "run.start_when=1", f"{setting}={taken}")
    assert verdicts(checks, "port") == [Verdict.OK, Verdict.FAIL]
    bad = by_name(checks)["port"][1]
    assert f"127.0.0.1:{taken}" in bad.found
    assert setting in bad.remedy
    same = [f"{setting}={taken}", f"node.port={taken}"]
    checks = await look(words, "run.start_when=1", *same)
    assert verdicts(checks, "port") == [Verdict.OK, Verdict.FAIL]
    checks = await look(words, "run.start_when=1", f"{setting}={taken}")
    assert verdicts(checks, "port") == [Verdict.OK, Verdict.OK]


async def test_a_port_that_is_free_is_not_so_for_two(words):
    port = free_port()
    two = [f"node.health_port={port}", f"metrics.port={port}"]
    checks = await look(words, "run.start_when=1", *two)
    assert verdicts(checks, "port") == [Verdict.OK, Verdict.OK, Verdict.FAIL]
    assert "metrics.port" in by_name(checks)["port"][2].remedy


async def both(words, first=(), second=()):
    """Two machines are checked at the same time; the first knows the second's address."""
    port = free_port()
    named = f'network.static_peers=["127.0.0.1:{port}"]'
    return await asyncio.gather(
        look(words, "node.name=a", named, *first, patience=6.0),
        look(words, "node.name=b", f"node.port={port}", *second, patience=6.0),
    )


async def test_two_machines_that_are_checked_at_once_meet(words):
    """Each is reachable both ways, with the same model, weights included."""
    for checks, other in zip(await both(words), "ba", strict=True):
        (peer,) = by_name(checks)["peer"]
        assert peer.verdict == Verdict.OK
        assert peer.found.startswith(f"{other} at ")
        assert "reachable both ways, same settings and model" in peer.found


async def test_who_cannot_be_called_back_is_told_at_both_ends(words):
    """Here with node.advertise, there with the address that does not answer."""
    own, others = await both(words, first=["node.advertise=127.0.0.9"])
    (here,), (there,) = by_name(own)["peer"], by_name(others)["peer"]
    assert (here.verdict, there.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert "has not called back" in here.found
    assert "node.advertise" in here.remedy
    assert "calls this node, but does not answer there" in there.found
    assert "127.0.0.9" in there.found


async def test_settings_that_differ_are_told_by_field_at_both_ends(words):
    """Each from where it stands."""
    own, others = await both(words, second=["optimizer.bma=off"])
    (here,), (there,) = by_name(own)["peer"], by_name(others)["peer"]
    assert (here.verdict, there.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert "optimizer.bma is 'on' here, 'off' there" in here.found
    assert "optimizer.bma is 'off' here, 'on' there" in there.found


async def test_tokenizers_that_differ_are_told_at_both_ends(words, tmp_path, model):
    """The weights are the same, and so is the configuration."""
    shutil.copytree(model, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(swapped(file.read_text()))
    own, others = await both(words, second=[f"model.path={tmp_path / 'other'}"])
    (here,), (there,) = by_name(own)["peer"], by_name(others)["peer"]
    assert (here.verdict, there.verdict) == (Verdict.FAIL, Verdict.FAIL)
    assert "model.tokenizer is " in here.found
    assert "model.tokenizer is " in there.found


async def test_weights_that_were_not_read_are_said_to_be_uncompared(words, monkeypatch):
    """The rest is compared all the same; --full reads them."""
    monkeypatch.setattr(machine, "QUICK_BYTES", 0)
    own, _ = await both(words)
    (peer,) = by_name(own)["peer"]
    assert peer.verdict == Verdict.OK
    assert "model.weights not compared" in peer.found
    assert "--full" in peer.remedy
    assert "weights" not in by_name(own)
    checks = await look(words, "run.start_when=1", full=True)
    assert verdicts(checks, "weights") == [Verdict.OK]


class Odd:
    """A peer with a clock of its own and a program of another version."""

    def __init__(self, run):
        self.run = run

    async def hello(self, request, source):
        sender = pb.Sender(run=self.run, node="odd", session=5)
        return pb.HelloReply(
            sender=sender,
            protocol=1,
            fingerprint=request.fingerprint,
            phase=pb.PHASE_WAITING,
            version="9.9.9",
            time=time.time() - 7200,
        )

    async def goodbye(self, request):
        return pb.GoodbyeReply()

    def __getattr__(self, name):
        """The other calls of a Handler: the transport wants all, the checks make none of them."""

        def never(request):
            raise AssertionError(f"{name} was called")

        return never


@asynccontextmanager
async def serving(handler):
    transport = GrpcTransport("127.0.0.1", 0)
    try:
        yield await transport.listen(handler, None)
    finally:
        await transport.close(0)


async def test_clock_and_version_of_a_peer_that_differ_are_warnings(words):
    """With how far and which."""
    run = next(w for w in words() if w.startswith("run.name=")).partition("=")[2]
    async with serving(Odd(run)) as port:
        named = f'network.static_peers=["127.0.0.1:{port}"]'
        found = by_name(await look(words, named, patience=1.0))
    assert found["clock"][0].verdict == found["version"][0].verdict == Verdict.WARN
    assert "odd is 2 h behind ours" in found["clock"][0].found
    assert "9.9.9" in found["version"][0].found


def test_a_running_swarm_is_met_and_not_disturbed(words, tmp_path):
    """A real daemon, found by multicast, counts the checker as nobody and waits on."""
    on = ["network.zeroconf=true", 'network.interfaces=["127.0.0.1"]', "model.dtype=fp32"]
    common = [w for w in words() if not w.startswith(("node.", "network."))]
    daemon = Daemon(tmp_path, "b", [*common, *on, "run.start_when=2"]).start()
    try:
        before = daemon.until(lambda s: s.phase == pb.PHASE_WAITING)

        def ask(*more):
            return asyncio.run(look(words, *on, "run.start_when=2", *more))

        checks = ask("node.name=a")
        assert all(one.verdict == Verdict.OK for one in checks), checks
        (peer,) = by_name(checks)["peer"]
        assert peer.found.startswith("b at 127.0.0.1:")
        after = daemon.until(lambda s: s.peers and s.peers[0].state == "gone")
        assert after.peers[0].phase == pb.PHASE_STOPPING  # and nobody misses it
        assert after.phase == pb.PHASE_WAITING
        assert after.waiting_for.startswith("1 of 2 members missing")
        assert before.pid == after.pid

        (peer,) = by_name(ask("node.name=c", "schedule.steps=7"))["peer"]
        assert peer.verdict == Verdict.FAIL
        assert "schedule.steps is '7' here, '48' there" in peer.found

        checks = ask("node.name=b")  # on the same machine: the very node
        assert "b is running: waiting at" in by_name(checks)["node"][0].found
        assert "port" not in by_name(checks)

        port = before.address.rpartition(":")[2]
        (bad,) = by_name(ask("node.name=d", f"node.port={port}"))["port"]
        assert "is taken by node 'b'" in bad.found
        assert daemon.status().phase == pb.PHASE_WAITING
    finally:
        daemon.end()
        assert daemon.wait() == 0


async def test_a_node_of_the_name_elsewhere_is_told(words, monkeypatch):
    """Its place is not taken; the operator is asked whether it is that one."""
    checks, _ = await both(words, second=["node.name=a"])
    (bad,) = by_name(checks)["name"]
    assert bad.verdict == Verdict.FAIL
    assert "a node called a is running already" in bad.found
    assert "node.name" in bad.remedy


# the verb


def run_verb(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *arguments])
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def test_the_verb_prints_a_table_or_json_and_its_exit_code(words, capsys):
    """0 when nothing fails; 11 and a line on stderr when something does."""
    good = [part for w in words("run.start_when=1") for part in ("--set", w)]
    code, out, err = run_verb(capsys, *good)
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM" in out
    code, out, err = run_verb(capsys, *good, "--json", "--set", "data.train=absent.jsonl")
    assert code == CheckError.exit_code == 11
    tree = json.loads(out)
    assert tree["ok"] is False
    assert [one["check"] for one in tree["checks"] if one["verdict"] == "fail"] == ["data"]
    assert err.startswith("deca-node: error: 1 of ")
    assert err.endswith("checks failed: data\n")


def test_settings_that_cannot_be_read_are_a_failed_check(capsys):
    """With the line that start would print."""
    code, out, _ = run_verb(capsys, "--json", "--set", "schedule.stepz=1")
    assert code == 11
    (one,) = json.loads(out)["checks"]
    assert (one["check"], one["verdict"]) == ("settings", "fail")
    assert "did you mean 'schedule.steps'?" in one["remedy"]


def test_a_folder_in_place_of_the_settings_is_said_with_a_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--json", "--config", str(tmp_path)])
    assert ended.value.code == CheckError.exit_code
    (one,) = json.loads(capsys.readouterr().out)["checks"]
    assert one["found"] == f"{tmp_path}: cannot be read: Is a directory"
    assert "deca-node init" in one["remedy"]
