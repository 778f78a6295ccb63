"""One node alone, in this process."""

import asyncio
import errno
import json
import math
import shutil
import threading
from types import SimpleNamespace

import pytest
import structlog
import torch
from safetensors.torch import load_file

from deca_node import (
    agreement,
    checkpoint,
    doctor,
    loading,
    member,
    memory,
    registry,
    trainer,
)
from deca_node import node as node_module
from deca_node.blocks import Schedule, partition_layers
from deca_node.checkpoint.manifest import Progress
from deca_node.checkpoint.sealing import sealed, unsealed
from deca_node.config import load
from deca_node.curve import Point
from deca_node.doctor.checks import Facts, Verdict
from deca_node.errors import ConfigError, DeviceError, DiskFullError, OutputError
from deca_node.exchange import Gathered
from deca_node.export import export
from deca_node.limits import MAX_HISTORY_POINTS, MAX_LABELS
from deca_node.logbook import Logbook
from deca_node.loopback import LoopbackNetwork
from deca_node.membership import Edges, Peer, Phase, State
from deca_node.methods import Local, Settled
from deca_node.models import LanguageModel
from deca_node.node import Node
from deca_node.pb import node_pb2 as pb
from deca_node.rounds import Seconds, StepRecord
from deca_node.standing import MAX_WARNINGS, Standing
from deca_node.waiting import Pulse
from tests.tiny import make_model
from tests.virtual_time import run


def settings(folder, *more):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "model").exists():
        make_model(folder / "model", "llama")
    return load(
        None,
        [
            "run.start_when=1",
            "node.host=127.0.0.1",
            "node.port=0",
            f"node.output={folder / 'out'}",
            f"model.path={folder / 'model'}",
            f"data.train={folder / 'train.jsonl'}",
            "network.zeroconf=false",
            "schedule.rounds=1",
            "schedule.steps=2",
            "optimizer.learning_rate=1e-3",
            *more,
        ],
    )


async def test_a_block_that_could_not_be_kept_is_kept_with_the_next(tmp_path, monkeypatch):
    """A full disk at one visit's end must not make a later state forget that visit's block."""
    failures = iter([True])
    real = checkpoint.Checkpoint.save

    def save(self, blocks, progress, *rest):
        if next(failures, False):
            raise DiskFullError("disk: no space left")
        real(self, blocks, progress, *rest)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    node = Node(settings(tmp_path), structlog.get_logger())
    assert await node.run()
    assert any("no space left" in warning for warning in node.status().warnings)
    manifest = json.loads((tmp_path / "out" / "state" / "manifest.json").read_text())
    assert sorted(manifest["blocks"]) == ["0", "1", "2", "3"]
    model = load_file(tmp_path / "out" / "model" / "model.safetensors")
    for saved in manifest["blocks"].values():
        for name, tensor in load_file(tmp_path / "out" / "state" / saved["file"]).items():
            assert torch.equal(tensor, model[name])


async def test_the_log_names_whole_paths(tmp_path, monkeypatch):
    """So that what a node has left is found, wherever it was called."""
    chosen = settings(tmp_path, "node.output=left/here")
    monkeypatch.chdir(tmp_path)
    with structlog.testing.capture_logs() as lines:
        assert await Node(chosen, structlog.get_logger()).run()
        assert await Node(chosen, structlog.get_logger()).run()
    folder = tmp_path / "left" / "here"
    assert [line["output"] for line in lines if "output" in line] == [str(folder)]
    models = [line["model"] for line in lines if "finished" in line["event"]]
    assert models == [str(folder / "model")] * 2


async def test_what_is_no_number_is_null_in_record_state_and_log(tmp_path):
    """Readers of JSON other than Python's refuse NaN; a run whose rate is too high comes to it."""
    chosen = settings(tmp_path, "optimizer.learning_rate=1e18", f"data.test={tmp_path}/train.jsonl")

    def refuse(word):
        raise AssertionError(word)

    with structlog.testing.capture_logs() as lines:
        assert await Node(chosen, structlog.get_logger()).run()
    (after,) = [line for line in lines if line["event"] == "after training"]
    assert after["loss"] is None
    assert any("a lower optimizer.learning_rate" in line["event"] for line in lines)
    record = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=refuse)
    assert record["after"]["loss"] is None
    assert record["before"]["loss"] > 0


NO_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.25 GiB"
)


@pytest.mark.parametrize(
    ("place", "name", "visits"),
    [
        (trainer, "gradient", 1),
        (node_module, "evaluate", 4),
        (agreement, "_norm", 4),
    ],
)
async def test_a_device_without_memory_is_told_and_nothing_is_lost(
    tmp_path, monkeypatch, place, name, visits
):
    """In a step, the evaluation at the end or the agreement; the same command goes on with less."""
    chosen = settings(tmp_path, f"data.test={tmp_path}/train.jsonl", "consensus.tolerance=1e-3")
    calls, real = [], getattr(place, name)

    def full(*arguments):
        calls.append(None)
        if len(calls) > {"gradient": 3, "evaluate": 1, "_norm": 0}[name]:
            raise NO_MEMORY
        return real(*arguments)

    monkeypatch.setattr(place, name, full)
    told = r"^cpu: out of memory \(tried to allocate 2.50 GiB\); lower data.batch_size"
    with pytest.raises(DeviceError, match=told):
        await Node(chosen, structlog.get_logger()).run()
    manifest = json.loads((tmp_path / "out" / "state" / "manifest.json").read_text())
    assert len(manifest["blocks"]) == visits
    monkeypatch.undo()
    with structlog.testing.capture_logs() as lines:
        assert await Node(chosen, structlog.get_logger()).run()
    [line] = [line for line in lines if line["event"] == "resuming"]
    assert line["visit"] == visits
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate"), "mps"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "mps"),
        (MemoryError(), "this machine"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine"),
        (None, "this machine"),
    ],
)
def test_the_end_of_memory_is_known_in_all_its_forms(error, place):
    """Not all of torch's allocators have an exception of their own for it."""

    def work():
        if error is not None:
            raise error
        torch.empty(10**15)

    with pytest.raises(DeviceError, match=f"^{place}: out of memory"):  # noqa: SIM117
        with memory.suffices(torch.device("mps")):
            work()
    with pytest.raises(RuntimeError, match="shapes"):  # noqa: SIM117
        with memory.suffices(torch.device("mps")):
            raise RuntimeError("shapes do not fit")


def test_a_node_that_is_in_no_edge_is_refused(tmp_path):
    """By a slip in its name it would train alone to the end; no edges at all are meant so."""
    chosen = settings(
        tmp_path,
        "node.name=alicia",
        "topology.kind=explicit",
        'topology.edges=[["alice", "bob"]]',
    )
    with pytest.raises(ConfigError, match="= 'alicia', only of alice, bob; set"):
        Node(chosen, structlog.get_logger())
    [check] = doctor._guarded("settings", doctor.machine.settings, Facts(chosen))
    assert (check.verdict, check.remedy[:7]) == (Verdict.FAIL, "set the")


class Looking(Node):
    """A node whose status is looked at after every step."""

    def __init__(self, settings, look):
        super().__init__(settings, structlog.get_logger())
        self._look = look

    async def _train(self, start, member, method, kept, logbook, *others):
        written = logbook._write_down

        def write_down(record):
            written(record)
            self._look(self.status())

        logbook._write_down = write_down
        return await super()._train(start, member, method, kept, logbook, *others)


async def test_a_status_that_nobody_asks_for_is_not_made(tmp_path, monkeypatch):
    """But a scrape, on the server's thread, and a caller get the one of that moment."""
    made = []
    plain = Standing.status

    def counted(self, *arguments):
        made.append(threading.current_thread())
        return plain(self, *arguments)

    monkeypatch.setattr(Standing, "status", counted)
    for name in "ab":
        (tmp_path / name).mkdir()
    assert await Node(settings(tmp_path / "a"), structlog.get_logger()).run()
    assert not made

    scraped = []

    async def scrape(node):
        measured = await asyncio.to_thread(lambda: list(node._measurements.collect()))
        scraped.append(
            {family.name: family.samples[0].value for family in measured if family.samples}
        )

    tasks = []
    node = Looking(
        settings(tmp_path / "b"), lambda _: tasks.append(asyncio.create_task(scrape(node)))
    )
    assert await node.run()
    await asyncio.gather(*tasks)
    assert max(sample["deca_schedule_steps_done"] for sample in scraped) == 8
    assert set(made) == {threading.main_thread()}  # the loop's


async def test_status_knows_the_schedule_before_and_after(tmp_path):
    """Position, totals and phase are right at the end of a run in descending order."""
    seen = []
    node = Looking(settings(tmp_path, "schedule.order=descending"), seen.append)
    assert await node.run()
    last = node.status()
    assert (last.steps_done, last.steps_total) == (8, 8)
    training = [status for status in seen if status.steps_done == 1]
    assert {status.block for status in training} == {3}
    assert training[0].eta_seconds > 0


async def test_others_are_told_the_advertised_address_and_this_machine_its_own(tmp_path):
    """Behind a relay or a router the two differ; status and greetings say the one for others."""
    here, said = set(), set()

    def look(status):
        here.update(e.address for e in registry.local_nodes() if e.run == "behind-a-router")
        if node._member is not None:
            greeting = node._member.swarm.greeting()
            said.add((status.address, greeting.host, greeting.port))

    run = settings(
        tmp_path, "run.name=behind-a-router", "node.advertise=192.0.2.7", "node.advertise_port=7001"
    )
    node = Looking(run, look)
    assert await node.run()
    assert said == {("192.0.2.7:7001", "192.0.2.7", 7001)}
    assert len(here) == 1
    host, _, port = here.pop().rpartition(":")
    assert host == "127.0.0.1"
    assert port != "7001"


@pytest.mark.parametrize(
    ("state", "phase", "reached", "waits"),
    [
        (State.ALIVE, Phase.TRAINING, True, True),
        (State.BEHIND, Phase.CATCHING_UP, True, True),
        (State.SUSPECT, Phase.TRAINING, True, True),
        (State.GONE, Phase.TRAINING, True, False),
        (State.ALIVE, Phase.TRAINING, False, False),
        (State.ALIVE, Phase.AGREEING, True, False),
    ],
)
def test_the_agreement_begins_when_nobody_trains_any_more(tmp_path, state, phase, reached, waits):
    """As soon as the last one is there, and not later than a visit would begin without it."""
    config = settings(tmp_path)

    async def scenario(comes):
        node = Node(config, structlog.get_logger())
        node._stopping, node._changed = asyncio.Event(), Pulse()
        peers = {"b": Peer("b", 1, "b:1", state, phase, 3, 0.0, reached=reached)}

        def arrive():
            peers["b"] = Peer("b", 1, "b:1", State.ALIVE, Phase.AGREEING, 4, 0.0)
            node._changed.beat()

        loop = asyncio.get_running_loop()
        loop.call_later(comes, arrive)
        begin = loop.time()
        await node._wait_for_late(SimpleNamespace(swarm=SimpleNamespace(peers=peers)))
        return loop.time() - begin

    deadline = config.timing().visit_deadline
    assert run(scenario(5.0)) == pytest.approx(5.0 if waits else 0.0, abs=0.01)
    assert run(scenario(1000.0)) == pytest.approx(deadline if waits else 0.0, abs=0.01)


async def test_a_full_disk_at_the_end_is_waited_for(tmp_path, monkeypatch):
    """The finished model is written when there is room, and the wait is said."""
    monkeypatch.setattr("deca_node.node.ROOM_SECONDS", 0.01)
    failures = iter([True, True])
    real = LanguageModel.export

    def export(self, folder):
        if next(failures, False):
            raise DiskFullError("disk: no space left")
        real(self, folder)

    monkeypatch.setattr(LanguageModel, "export", export)
    node = Node(settings(tmp_path), structlog.get_logger())
    assert await node.run()
    assert any("waiting for room" in warning for warning in node.status().warnings)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_block_that_is_not_kept_at_the_end_is_waited_for(tmp_path, monkeypatch, at_once):
    """Or else a signal would end the run as if all were saved: in the wait, or within a try."""
    monkeypatch.setattr("deca_node.node.ROOM_SECONDS", 0.01)
    real, tries, full = checkpoint.Checkpoint.save, [], True

    def save(self, blocks, progress, *rest):
        tries.append(progress.visit)
        if full and progress.visit == 4:
            if tries.count(4) == 3:
                stopped = asyncio.run_coroutine_threadsafe(stop(), loop)
                if at_once:
                    stopped.result()
            raise DiskFullError("disk: no space left")
        real(self, blocks, progress, *rest)

    async def stop():
        node.stop()

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    loop = asyncio.get_running_loop()
    node = Node(settings(tmp_path), structlog.get_logger())
    with pytest.raises(DiskFullError):
        await node.run()
    assert tries.count(4) >= 3
    full = False
    node = Node(settings(tmp_path), structlog.get_logger())
    assert await node.run()


async def test_what_is_said_again_and_again_pushes_nothing_out(tmp_path):
    """A neighbour that is missing at each visit, in a run that began in plain text."""
    standing = Node(settings(tmp_path), structlog.get_logger())._standing
    standing.warn("plain text")
    for visit in range(100):
        standing.warn(f"visit {visit} without neighbours bob", "neighbours")
    assert standing.warnings == ["plain text", "visit 99 without neighbours bob"]
    for number in range(100):
        standing.warn(f"another {number}")
    assert len(standing.warnings) == MAX_WARNINGS
    assert standing.warnings[-1] == "another 99"


SCHEDULE = Schedule(partition_layers(4, 2), 2, 5, "ascending", 0)  # four visits, 20 steps


def stepped(step, **gathered):
    """A step of visit 1 that took four seconds."""
    seconds, settled = Seconds(1.0, step=4.0), Settled(0.0, 0.0, 0.5)
    visit, edges = SCHEDULE.visit(1), Edges(1)
    return StepRecord(visit, step, Local(1.0, 1.0), settled, Gathered(**gathered), edges, seconds)


def test_the_time_left_is_at_the_pace_of_the_steps(tmp_path, monkeypatch):
    """Pauses and earlier processes are in what the run has taken, and not in the pace."""
    now = [100.0]
    standing = Node(settings(tmp_path), structlog.get_logger())._standing
    monkeypatch.setattr("deca_node.standing.time", SimpleNamespace(monotonic=lambda: now[0]))
    standing.schedule, standing.began = SCHEDULE, now[0]
    standing.resume(Progress(visit=1, seconds=1000.0))
    assert standing.status(None, []).eta_seconds == 0  # not known yet
    for step, seconds in enumerate((4.0, 6.0, 500.0)):
        if step == 2:
            standing.paused()
        now[0] += seconds
        standing.step_done(stepped(step))
        standing.at(1, step + 1, 0)
    told = standing.status(None, [])
    assert (told.steps_done, told.steps_total) == (8, 20)
    assert told.eta_seconds == pytest.approx((4 + 6 + 4) / 3 * 12)
    assert standing.progress.seconds == 1000 + 510
    first, second = told.block_disagreement
    assert math.isnan(first)
    assert second == 0.5


def test_at_the_end_the_last_block_is_told(tmp_path):
    """The position is past it, as that of whoever is about to begin another round."""
    standing = Node(settings(tmp_path), structlog.get_logger())._standing
    standing.schedule = SCHEDULE
    standing.at(4, 0, 0)
    told = standing.status(None, [])
    assert (told.round, told.steps_done, told.block) == (2, 20, 1)
    assert told.round_order == [0, 1]


def test_only_late_blocks_make_a_neighbour_late(tmp_path):
    """In full or in part; whoever sent garbage or is away has another line."""
    standing = Node(settings(tmp_path), structlog.get_logger())._standing
    missing = {"late": "late", "evil": "checksum", "away": "unavailable"}
    for step in range(2):
        late = ["late", "slow"]
        partial = ["broken", "slow"]
        standing.step_done(
            stepped(step, partial=partial, missing=missing, used=["good"], late=late)
        )
    assert standing.late == {"late": 2, "slow": 2}


def test_labels_are_counted_for_others_only_where_the_settings_say_so(tmp_path):
    """And no more than a status has room for."""
    for more in ((), ("data.share_label_counts=true",)):
        standing = Node(settings(tmp_path, *more), structlog.get_logger())._standing
        standing.label_counts = {f"label {number}": 1 for number in range(MAX_LABELS + 1)}
        assert len(standing.status(None, []).label_counts) == (MAX_LABELS if more else 0)


def test_a_history_begins_and_ends_where_it_is_asked_to(tmp_path):
    """With all that there is when nothing is said of that."""
    standing = Node(settings(tmp_path), structlog.get_logger())._standing
    for step in range(10):
        standing.curve.add(Point(step, step, 1.0, 1.0, 0.0, 0.0, 1.0))

    def asked(**request):
        return [p.first for p in standing.history(pb.GetHistoryRequest(**request)).points]

    assert asked() == asked(limit=MAX_HISTORY_POINTS + 1) == list(range(10))
    assert asked(after=0) == list(range(1, 10))
    assert len(asked(limit=5)) <= 5


async def test_peers_of_an_earlier_life_are_not_forgotten(tmp_path, monkeypatch):
    """A restart that meets nobody keeps the addresses that it knew."""
    node = Looking(
        settings(tmp_path, "schedule.rounds=30"),
        lambda status: node.stop() if status.steps_done == 5 else None,
    )
    assert not await node.run()
    path = tmp_path / "out" / "state" / "manifest.json"
    assert json.loads(path.read_text())["peers"] == {}
    node = Looking(
        settings(tmp_path, "schedule.rounds=30"),
        lambda status: node.stop() if status.steps_done == 12 else None,
    )

    async def know(*given):
        loaded = await loading.load(*given)
        loaded.checkpoint.state.peers["bob"] = "192.0.2.1:7430"
        return loaded

    monkeypatch.setattr("deca_node.node.load", know)
    assert not await node.run()
    assert json.loads(path.read_text())["peers"] == {"bob": "192.0.2.1:7430"}


async def test_plain_text_on_the_network_is_said_in_log_and_status(tmp_path):
    """What it means, for as long as it runs; on the loopback there is nothing to warn of."""
    for name, open_to_all in (("loopback", False), ("network", True)):
        (tmp_path / name).mkdir()
        more = ["node.host=0.0.0.0", "trust.insecure=true"] if open_to_all else []
        with structlog.testing.capture_logs() as logged:
            node = Node(settings(tmp_path / name, *more), structlog.get_logger())
            assert await node.run()
        said = [str(line) for line in logged if line["log_level"] == "warning"]
        shown = node.status()
        for texts in (said, list(shown.warnings)):
            assert any("whoever reaches this port can read" in one for one in texts) == open_to_all
        assert shown.security == (
            "PLAIN TEXT on the network (trust.insecure)"
            if open_to_all
            else "plain text, on this machine only"
        )


async def test_a_defect_in_what_is_done_each_second_ends_none_of_it():
    """The other things are done in the same second, and all again in the next."""
    looked, rounds = [], asyncio.Event()

    def boom():
        raise RuntimeError("swept too far")

    async def comes(_):
        if len(looked) >= 2:
            rounds.set()
            await asyncio.Event().wait()

    class Ticking:
        _log = structlog.get_logger()
        _changed = SimpleNamespace(comes=comes)
        _sweep = staticmethod(boom)
        _look_around = staticmethod(boom)
        _look_at_trust = staticmethod(lambda: looked.append("trust"))
        _show = staticmethod(lambda: None)

    ticking = asyncio.create_task(Node._tick(Ticking()))
    await asyncio.wait_for(rounds.wait(), 10)
    assert looked == ["trust", "trust"]
    assert not ticking.done()
    ticking.cancel()
    await asyncio.gather(ticking, return_exceptions=True)


@pytest.mark.parametrize(
    ("left", "phase", "seen"),
    [
        (False, Phase.TRAINING, ["member"]),
        (True, Phase.STOPPING, []),
        (True, Phase.DONE, [None]),  # node.stay: its certificate is still asked for
    ],
)
def test_a_node_that_stays_still_looks_after_its_trust(left, phase, seen):
    """Its swarm is closed, but who was revoked meanwhile is refused, and a renewal taken up."""
    looked = []
    node = SimpleNamespace(
        _upkeep=SimpleNamespace(look=looked.append),
        _left=left,
        _member="member",
        _standing=SimpleNamespace(phase=phase),
    )
    Node._look_at_trust(node)
    assert looked == seen


HOSTS = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


def agreeing(folder, network, name, *more, names="ab"):
    """One of some nodes that agree at the end; with a transport of its own."""
    (folder / name).mkdir(exist_ok=True)
    others = ", ".join(f'"{HOSTS[other]}:7430"' for other in names if other != name)
    config = settings(
        folder / name,
        "run.name=agreeing",
        f"node.name={name}",
        f"node.host={HOSTS[name]}",
        "trust.insecure=true",
        f"network.static_peers=[{others}]",
        "consensus.tolerance=1e-3",
        *more,
    )
    return Node(config, structlog.get_logger(), transport=network.transport(HOSTS[name], 7430))


def outcome(folder, name):
    """What summary.json says of the agreement, and the progress on disk."""
    out = folder / name / "out"
    manifest = json.loads((out / "state" / "manifest.json").read_text())
    return json.loads((out / "summary.json").read_text())["consensus"], manifest["progress"]


def rewrite(folder, name, change):
    """Change the progress on disk."""
    path = folder / name / "out" / "state" / "manifest.json"
    tree = unsealed(path, path.read_bytes())
    change(tree["progress"])
    path.write_bytes(sealed(tree))


async def agreed_pair(folder, network, *more):
    """Run a and b to their end, where both have one model."""
    both = [agreeing(folder, network, name, "run.start_when=2", *more) for name in "ab"]
    assert await asyncio.gather(*(node.run() for node in both)) == [True, True]
    for name in "ab":
        told, progress = outcome(folder, name)
        assert (told["complete"], told["members"]) == (True, ["a", "b"])
        assert progress["finished"]
        assert progress["agreement"] == told


async def test_alone_a_node_keeps_what_it_has_agreed_on_with_others(tmp_path, monkeypatch):
    """Started again as one of them is missing: the record, the state and the model stay."""
    network = LoopbackNetwork()
    await agreed_pair(tmp_path, network)
    monkeypatch.setattr(member, "REJOIN_SECONDS", 0.0)
    records = []
    for name in "ab":  # as when another one had been killed in the agreement
        rewrite(tmp_path, name, lambda progress: progress["agreement"].update(missing=["c"]))
        out = tmp_path / name / "out"
        (out / "model" / "untouched").touch()
        records.append((out / "summary.json").read_text())
    for names in ("a", "a", "ab"):
        again = [agreeing(tmp_path, network, name) for name in names]
        assert all(await asyncio.gather(*(node.run() for node in again)))
        for name, record in zip(names, records, strict=False):
            out = tmp_path / name / "out"
            assert (out / "summary.json").read_text() == record
            assert (out / "model" / "untouched").exists()
            assert outcome(tmp_path, name)[1]["finished"]
    # A finer tolerance is worth another agreement, with all that had the one before.
    for name in "ab":
        rewrite(tmp_path, name, lambda progress: progress["agreement"].update(missing=[]))
    finer = "consensus.tolerance=1e-4"
    assert await agreeing(tmp_path, network, "a", finer).run()
    assert (tmp_path / "a" / "out" / "summary.json").read_text() == records[0]
    monkeypatch.undo()
    both = [agreeing(tmp_path, network, name, finer, "run.start_when=2") for name in "ab"]
    assert all(await asyncio.gather(*(node.run() for node in both)))
    found, progress = outcome(tmp_path, "a")
    assert (found["complete"], found["tolerance"]) == (True, 1e-4)
    assert progress["agreement"] == found


async def test_a_folder_of_an_earlier_version_keeps_its_agreement(tmp_path):
    """There only summary.json tells of it; it counts where the state is finished and agreed on."""
    network = LoopbackNetwork()
    await agreed_pair(tmp_path, network)
    rewrite(tmp_path, "a", lambda progress: progress.pop("agreement"))
    config = agreeing(tmp_path, network, "a").settings
    said = export(config, tmp_path / "agreed", consensus=True)
    assert said.endswith("agreed on by a, b")
    with structlog.testing.capture_logs() as lines:
        assert await agreeing(tmp_path, network, "a").run()
    assert lines[-1]["event"].startswith("this run is finished")


@pytest.mark.parametrize("at", ["its end", "the model"])
async def test_stopped_after_the_agreement_a_node_only_has_to_finish(tmp_path, monkeypatch, at):
    """The others are at their end and gone: what they have agreed on is on its disk, and stays."""
    network = LoopbackNetwork()
    first, other = (agreeing(tmp_path, network, name, "run.start_when=2") for name in "ab")
    finish, agreed = first._finish, Logbook.block_agreed

    async def stopped(*arguments):
        first.stop()
        await finish(*arguments)

    async def block_agreed(self, result):
        await agreed(self, result)
        if result.block == 3 and self._standing._settings.node.name == "a":
            first.stop()

    if at == "the model":
        first._finish = stopped
    else:
        monkeypatch.setattr(Logbook, "block_agreed", block_agreed)
    assert await asyncio.gather(first.run(), other.run()) == [False, True]
    out = tmp_path / "a" / "out"
    assert not (out / "summary.json").exists()
    said = export(first.settings, tmp_path / "agreed", consensus=True)
    assert said.endswith("agreed on by a, b")
    monkeypatch.undo()
    again = agreeing(tmp_path, network, "a", "run.start_when=2")
    async with asyncio.timeout(20):  # nobody is waited for
        assert await again.run()
    told, progress = outcome(tmp_path, "a")
    assert told == progress["agreement"]
    assert (told["complete"], told["members"], told["missing"]) == (True, ["a", "b"], [])
    assert progress["finished"]
    mine, theirs = (
        load_file(tmp_path / name / "out" / "model" / "model.safetensors") for name in "ab"
    )
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("backup", [False, True])
async def test_an_old_record_ends_no_run_that_begins_anew(tmp_path, monkeypatch, backup):
    """state/ is removed, or put back as it was within the run: both come to a result again."""
    network, kept = LoopbackNetwork(), tmp_path / "kept"
    save = checkpoint.Checkpoint.save

    def keep(self, blocks, progress, *rest):
        save(self, blocks, progress, *rest)
        if progress.visit == 2:
            shutil.copytree(self.folder / "state", kept / self.folder.parent.name)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", keep)
    await agreed_pair(tmp_path, network)
    monkeypatch.undo()
    for name in "ab":
        out = tmp_path / name / "out"
        shutil.rmtree(out / "state")
        if backup:
            shutil.copytree(kept / name, out / "state")
        else:
            shutil.rmtree(out / "model")
    await agreed_pair(tmp_path, network)
    for name in "ab":
        assert (tmp_path / name / "out" / "model" / "model.safetensors").exists()
    # Nor does it make a node wait for those that it had agreed with.
    shutil.rmtree(tmp_path / "a" / "out" / "state")
    shutil.rmtree(tmp_path / "a" / "out" / "model")
    async with asyncio.timeout(20):
        assert await agreeing(tmp_path, network, "a").run()
    assert not outcome(tmp_path, "a")[0]["complete"]


async def test_a_crash_behind_the_summary_leaves_a_run_that_is_finished_later(
    tmp_path, monkeypatch
):
    """The last manifest could not be written, and the node was told to end."""
    network = LoopbackNetwork()
    first, other = (agreeing(tmp_path, network, name, "run.start_when=2") for name in "ab")
    real = checkpoint.Checkpoint.save

    def save(self, blocks, progress, *rest):
        if progress.finished and self.folder == first.settings.node.output:
            loop.call_soon_threadsafe(first.stop)
            raise DiskFullError("disk: no space left")
        real(self, blocks, progress, *rest)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    loop = asyncio.get_running_loop()
    ends = await asyncio.gather(first.run(), other.run(), return_exceptions=True)
    assert isinstance(ends[0], DiskFullError)
    monkeypatch.undo()
    assert not outcome(tmp_path, "a")[1]["finished"]
    assert await agreeing(tmp_path, network, "a", "run.start_when=2").run()
    told, progress = outcome(tmp_path, "a")
    assert told["complete"]
    assert progress["finished"]
    said = export(first.settings, tmp_path / "agreed", consensus=True)
    assert said.endswith("agreed on by a, b")


@pytest.mark.parametrize("full", [False, True])
async def test_a_signal_before_the_agreement_saves_what_was_not(tmp_path, monkeypatch, full):
    """The disk was full at the last visit's end: there is another try, and its failure is said."""
    real, tries = checkpoint.Checkpoint.save, []

    def save(self, blocks, progress, *rest):
        if progress.visit == 4:
            tries.append(progress)
            if full or len(tries) == 1:
                raise DiskFullError("disk: no space left")
        real(self, blocks, progress, *rest)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    node = Node(settings(tmp_path, "consensus.tolerance=1e-3"), structlog.get_logger())

    async def wait_for_late(_member):
        node.stop()

    node._wait_for_late = wait_for_late
    if full:
        with pytest.raises(DiskFullError):
            await node.run()
    else:
        assert not await node.run()
    manifest = json.loads((tmp_path / "out" / "state" / "manifest.json").read_text())
    assert manifest["progress"]["visit"] == (3 if full else 4)


def kept(folder, name):
    """By block, the visit and the digest of what the state on disk has."""
    manifest = json.loads((folder / name / "out" / "state" / "manifest.json").read_text())
    return {
        int(block): (saved["visit"], saved["xxh3"]) for block, saved in manifest["blocks"].items()
    }


@pytest.mark.parametrize("where", ["training", "agreement"])
@pytest.mark.parametrize("blocks", [1, 4])
async def test_who_comes_back_takes_the_model_of_those_that_still_serve(
    tmp_path, monkeypatch, where, blocks
):
    """It was stopped in the last visit or the agreement; the others have agreed without it."""
    network, serving, back = LoopbackNetwork(), asyncio.Event(), asyncio.Event()

    def node(name):
        more = ["run.start_when=3", "topology.kind=full", "optimizer.learning_rate=1e-2"]
        more += [f"schedule.layers_per_block={4 // blocks}", "schedule.rounds=2"]
        return agreeing(tmp_path, network, name, *more, names="abc")

    nodes = {name: node(name) for name in "abc"}
    visits = 2 * blocks
    real_step, real_round = Logbook.step_done, Logbook.round_done

    async def step_done(self, record):
        await real_step(self, record)
        at = record.visit.index, record.step
        if where == "training" and self is books.get("a") and at == (visits - 1, 0):
            nodes["a"].stop()

    def round_done(self, block, rounds):
        real_round(self, block, rounds)
        if where == "agreement" and self is books.get("a") and (block, rounds) == (blocks // 2, 1):
            nodes["a"].stop()

    books = {}
    train = nodes["a"]._train

    async def know(start, member, method, kept, logbook, *others):
        books["a"] = logbook
        return await train(start, member, method, kept, logbook, *others)

    nodes["a"]._train = know
    monkeypatch.setattr(Logbook, "step_done", step_done)
    monkeypatch.setattr(Logbook, "round_done", round_done)

    def hold(served):
        finish = served._finish

        async def finished(*arguments):  # its evaluation takes long
            served._enter(Phase.SERVING)
            serving.set()
            await back.wait()
            await finish(*arguments)

        served._finish = finished

    hold(nodes["b"])
    hold(nodes["c"])
    others = [asyncio.create_task(nodes[name].run()) for name in "bc"]
    async with asyncio.timeout(60):
        assert not await nodes["a"].run()
        # A block that was given back is none that was agreed on.
        agreed = range(blocks // 2) if where == "agreement" else ()
        for block, (visit, _) in kept(tmp_path, "a").items():
            assert (visit == visits) == (block in agreed)
        await serving.wait()
        assert await node("a").run()
        back.set()
        assert await asyncio.gather(*others) == [True, True]
    mine, b, c = (kept(tmp_path, name) for name in "abc")
    assert {visit for visit, _ in mine.values()} == {visits}
    for block, saved in mine.items():
        assert saved in (b[block], c[block])
    # It has not agreed itself, and says nothing else.
    assert not outcome(tmp_path, "a")[0]["complete"]
    assert outcome(tmp_path, "b")[0]["members"] == ["b", "c"]


async def test_a_lost_block_is_named_at_every_start(tmp_path):
    """Also when the manifest has forgotten its file: by the node's refusal, and by export."""
    assert await Node(settings(tmp_path), structlog.get_logger()).run()
    path = tmp_path / "out" / "state" / "manifest.json"
    tree = unsealed(path, path.read_bytes())
    (tmp_path / "out" / "state" / tree["blocks"].pop("2")["file"]).unlink()
    path.write_bytes(sealed({**tree, "lost": [2]}))  # as a save after the first start leaves it
    words = r"block-0002-.*: found damaged at an earlier start, so block 2 is lost; restore"
    for _ in range(2):
        with pytest.raises(OutputError, match=words):
            await Node(settings(tmp_path), structlog.get_logger()).run()
    with pytest.raises(OutputError, match=words):
        export(settings(tmp_path), tmp_path / "new", consensus=False)


async def test_a_slow_disk_holds_up_no_agreement(tmp_path, monkeypatch):
    """A block is saved while the next ones are agreed on; all are on disk in the end."""
    network, opened, waited = LoopbackNetwork(), threading.Event(), []
    real_save, real_opened = checkpoint.Checkpoint.save, Logbook.block_opened

    def save(self, blocks, progress, *rest):
        if 4 in {changed.visit for changed in blocks.values()} and not waited:
            waited.append(opened.wait(5))
        real_save(self, blocks, progress, *rest)

    def block_opened(self, block, *rest):
        if block == 3:
            opened.set()
        real_opened(self, block, *rest)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    monkeypatch.setattr(Logbook, "block_opened", block_opened)
    await agreed_pair(tmp_path, network, "topology.kind=full")
    assert waited
    assert all(waited)
    assert {visit for visit, _ in kept(tmp_path, "a").values()} == {4}
    assert kept(tmp_path, "a") == kept(tmp_path, "b")
