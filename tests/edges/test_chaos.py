"""What a chaos run judges, without processes: the clock and the nodes' files are made up."""

import asyncio
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deca_node import chaos, cli, config, rehearsal
from deca_node.chaos.arena import Arena
from deca_node.errors import ConfigError, OutputError, SwarmError
from deca_node.faults import Fault, Kind
from deca_node.pb import node_pb2 as pb
from deca_node.rows import read_rows
from deca_node.testbed import processes

STEPS = 4


class Process:
    """A child that ends when it is told how."""

    pid = 0

    def __init__(self):
        self.code = None
        self.signals = []

    def poll(self):
        return self.code

    def send_signal(self, number):
        self.signals.append(number)

    def terminate(self):
        self.signals.append(15)


@pytest.fixture
def arena(tmp_path, monkeypatch):
    """Two nodes that run and one that may join; nothing is a process."""
    monkeypatch.setattr(processes, "spawn", lambda settings, log: Process())
    nodes = []
    for number in range(3):
        output = tmp_path / f"node-{number}"
        output.mkdir()
        nodes.append(
            config.load(
                None,
                [
                    "model.path=m",
                    "data.train=d",
                    f"schedule.steps={STEPS}",
                    "schedule.rounds=4",
                    f"node.name=node-{number}",
                    f"node.output={output}",
                ],
            )
        )
    console = Console(file=io.StringIO())
    made = Arena(nodes, console, beginners=2, minutes=1.0, seed=0, patience=10.0, calm=1)
    made._began = 0.0
    for name in ("node-0", "node-1"):
        made._start(made.nodes[name], 0.0)
        (made.nodes[name].settings.node.output / "history.jsonl").touch()
    made._tick(0.1)
    made._next_fault = 1e9  # faults come when the test says so
    return made


def step(node, visit, step):
    with (node.settings.node.output / "history.jsonl").open("a") as file:
        file.write(json.dumps({"visit": visit, "step": step}) + "\n")


def keep(node, visit):
    folder = node.settings.node.output / "state"
    folder.mkdir(exist_ok=True)
    manifest = {"progress": {"visit": visit, "step": 0}, "active": None, "blocks": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def say(node, event, **fields):
    with node.log.open("a") as file:
        file.write(json.dumps({"event": event, **fields}) + "\n")


def both_step(arena, now, visit=0, number=0):
    for name in ("node-0", "node-1"):
        step(arena.nodes[name], visit, number)
    arena._tick(now)
    arena._next_fault = 1e9


def test_a_minute_without_a_step_is_a_hang(arena):
    """A step of anybody is enough to go on; the longest silence is kept."""
    both_step(arena, 1.0)
    arena._tick(50.0)
    step(arena.nodes["node-1"], 0, 1)
    arena._tick(60.0)
    arena._tick(119.0)  # node-0 has been silent for longest: since 1.0
    with pytest.raises(SwarmError, match="no step anywhere for 61 s"):
        arena._tick(121.0)
    gaps = arena.report()["longest_without_step"]
    assert (gaps["anywhere"], gaps["one_node"], gaps["node"]) == (61.0, 118.0, "node-0")


def test_a_run_that_never_begins_is_given_up(arena):
    with pytest.raises(SwarmError, match="no first step"):
        arena._tick(1e4)


def test_a_node_that_ends_by_itself_fails_the_run(arena):
    """With its own last words, or as one that ended too early."""
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    say(node, "out of luck")
    node.process.code = 5
    with pytest.raises(SwarmError, match=r"node-0 failed \(exit code 5\): out of luck; see "):
        arena._tick(2.0)
    node.process = Process()
    node.process.code = 0
    with pytest.raises(SwarmError, match="node-0 ended before its run was finished"):
        arena._tick(3.0)


def killed(arena, node, now):
    arena._hurt(Fault(Kind.KILL, node.name, 5.0), now)
    node.process.code = -9
    arena._tick(now)


def test_a_killed_node_is_started_again_and_timed(arena):
    """It begins where it had kept its state; the seconds are those to its next step."""
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    keep(node, 2)
    killed(arena, node, 2.0)
    assert node.process is None
    arena._tick(6.0)
    assert node.process is None
    arena._tick(7.1)
    assert node.process is not None
    say(node, "resuming", visit=2, step=0)
    step(node, 2, 0)
    arena._tick(9.6)
    assert arena.report()["restarts"] == [
        {
            "at": 7.1,
            "node": "node-0",
            "after": "kill",
            "kept": (2, 0),
            "resumed": (2, 0),
            "recovery_seconds": 2.5,
        }
    ]
    assert arena.report()["counts"] == {
        "kill": 1,
        "freeze": 0,
        "cut": 0,
        "restart": 0,
        "join": 0,
        "all": 1,
    }


def test_a_node_that_begins_too_early_has_lost_a_state(arena):
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    keep(node, 2)
    killed(arena, node, 2.0)
    arena._tick(8.0)
    say(node, "resuming", visit=1, step=3)
    with pytest.raises(SwarmError, match="began again at visit 1 step 3, but had kept visit 2"):
        arena._tick(9.0)


def test_a_kept_state_that_is_gone_is_noticed_at_the_death(arena):
    """Older than at an earlier death, or than the visit that the node went on to; or damaged."""
    node = arena.nodes["node-0"]
    for number in range(STEPS):
        both_step(arena, 1.0, 0, number)
    both_step(arena, 2.0, 1, 0)
    with pytest.raises(SwarmError, match="it holds visit 0 step 0, but had kept visit 1 step 0"):
        killed(arena, node, 3.0)
    node.process, node.fault = Process(), None
    keep(node, 1)
    (node.settings.node.output / "state" / "manifest.json").write_text("{")
    with pytest.raises(SwarmError, match=r"node-0 lost a state: .*manifest"):
        killed(arena, node, 4.0)


def test_a_frozen_node_is_thawed_and_a_restarted_one_started_once_it_has_ended(arena):
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    process = node.process
    arena._hurt(Fault(Kind.FREEZE, "node-0", 3.0), 1.0)
    arena._tick(3.9)
    assert process.signals == [19]
    assert arena._roster().faulty == ("node-0",)
    arena._tick(4.1)
    assert process.signals == [19, 18]
    arena._hurt(Fault(Kind.RESTART, "node-0", 0.0), 5.0)
    arena._tick(6.0)
    assert node.process is process
    process.code = 0
    arena._tick(6.2)
    assert node.process is not process
    assert arena._roster().recovering == ("node-0",)
    assert arena._roster().steady == ("node-1",)
    assert arena._roster().absent == ("node-2",)


def test_a_node_that_was_still_starting_dies_of_sigterm(arena):
    """It had begun nothing; of any other signal it has not ended as it was asked to."""
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    arena._hurt(Fault(Kind.RESTART, "node-0", 0.0), 2.0)
    process = node.process
    process.code = -15
    arena._tick(2.2)
    assert node.process not in (None, process)
    arena._hurt(Fault(Kind.RESTART, "node-0", 0.0), 3.0)
    node.process.code = -11
    with pytest.raises(SwarmError, match="node-0 failed"):
        arena._tick(3.2)


def test_a_node_that_ignores_sigterm_fails_the_run(arena):
    both_step(arena, 1.0)
    arena._hurt(Fault(Kind.RESTART, "node-0", 0.0), 2.0)
    with pytest.raises(SwarmError, match="node-0 did not end within 20 s"):
        arena._tick(23.0)


def test_at_the_end_everything_is_healed_and_everybody_has_joined(arena):
    """Early, too, where the schedule is nearly done."""
    arena._total_steps = 20
    both_step(arena, 1.0)
    node = arena.nodes["node-0"]
    arena._hurt(Fault(Kind.CUT, "node-0", 500.0, (("node-0", "node-1"),)), 1.0)
    arena._tick(2.0)
    assert arena._absent == ["node-2"]
    both_step(arena, 3.0, 4, STEPS - 2)
    assert node.fault is None
    assert not arena._cables._cuts
    assert arena._absent == []
    assert arena.report()["fault_seconds"] == 2.0


def test_the_pace_is_that_of_the_slowest_after_a_round_or_a_while():
    def status(eta, done):
        return pb.NodeStatus(
            eta_seconds=eta, steps_done=done, steps_total=1000, blocks=2, steps_per_visit=10
        )

    pace = chaos._Pace()
    assert not pace({"a": "starting", "b": status(500, 3)})
    assert not pace({"a": status(1960, 20), "b": status(495, 10)})
    assert pace({"a": status(1960, 20), "b": status(490, 20)})
    assert pace.round_seconds == pytest.approx(40.0)


def test_the_rehearsals_model_and_data_are_taken_by_a_node(tmp_path):
    """The model is read by transformers, every word is a token of it, labels are balanced."""
    from deca_node.models import LanguageModel

    rehearsal.write_model(tmp_path / "model", 0)
    rehearsal.write_data(tmp_path / "data.jsonl", 40, 0)
    settings = config.load(
        None,
        [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'data.jsonl'}"]
        + [f"{key}={value}" for key, value in rehearsal.SETTINGS.items()],
    )
    model = LanguageModel.load(settings.model, torch.device("cpu"))
    assert model.n_layers == rehearsal.LAYERS
    rows = read_rows(tmp_path / "data.jsonl")
    assert {row["label"] for row in rows} == set(rehearsal.LABELS)
    unknown = model.tokenizer.encode("nonsense")
    for row in rows:
        ids = model.tokenizer.encode(f"{row['text']} label: {row['label']}")
        assert len(ids) == rehearsal.WORDS_PER_ROW + 2
        assert not set(unknown) & set(ids)
    again = tmp_path / "again.jsonl"
    rehearsal.write_data(again, 40, 0)
    assert again.read_bytes() == (tmp_path / "data.jsonl").read_bytes()


def plan(tmp_path: Path, **changes):
    values = {
        "minutes": 1.0,
        "seed": 0,
        "nodes": 2,
        "joiners": 1,
        "config": None,
        "overrides": ("model.path=m",),
        "train": tmp_path / "data.jsonl",
        "test": None,
        "test_per_label": 0,
        "concentration": 1.0,
        "label_field": None,
        "out": tmp_path / "out",
    }
    return chaos.Plan(**{**values, **changes})


def test_what_cannot_be_compared_is_said_before_anything_runs(tmp_path):
    rehearsal.write_data(tmp_path / "data.jsonl", 40, 0)
    with pytest.raises(ConfigError, match=r"data\.task = 'text'"):
        chaos.run(plan(tmp_path, overrides=("model.path=m", "data.task=text")))
    with pytest.raises(ConfigError, match="--test FILE or --test-per-label"):
        chaos.run(plan(tmp_path, out=tmp_path / "out2"))
    (tmp_path / "out3").mkdir()
    (tmp_path / "out3" / "precious").touch()
    with pytest.raises(OutputError, match="is not empty"):
        chaos.run(plan(tmp_path, out=tmp_path / "out3"))


def test_a_failed_run_leaves_its_report(tmp_path, monkeypatch):
    """With what went wrong as its verdict."""
    rehearsal.write_data(tmp_path / "data.jsonl", 40, 0)

    def fail(*_):
        raise SwarmError("node-1 lost a state")

    monkeypatch.setattr(chaos, "_judge", fail)
    with pytest.raises(SwarmError):
        chaos.run(plan(tmp_path, test_per_label=2))
    report = json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert report["verdict"] == "failed: node-1 lost a state"


def test_a_missing_model_is_a_lost_result(tmp_path):
    settings = config.load(None, ["model.path=m", "data.train=d", f"node.output={tmp_path}"])
    with pytest.raises(SwarmError, match=r"a result is lost: .*summary\.json"):
        chaos._results([settings], 1.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "x.toml"], "need --train FILE"),
        (["--test", "x.jsonl"], "need --train FILE"),
        (["--train", "x", "--test", "y", "--test-per-label", "2"], "give either --test FILE"),
    ],
)
def test_options_that_do_not_go_together(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["chaos", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


async def test_a_caller_is_known_by_its_local_port(arena):
    """As relays ask; who is no child is nobody."""
    import os

    server = await asyncio.start_server(lambda *_: None, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    local = writer.get_extra_info("sockname")[1]
    assert arena._caller(local) is None
    arena.nodes["node-1"].process.pid = os.getpid()
    arena.nodes["node-0"].process.pid = 2**22 + 1  # nobody's
    assert arena._caller(local) == "node-1"
    writer.close()
    server.close()
