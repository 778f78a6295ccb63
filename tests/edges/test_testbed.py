"""The testbed's parts that need no processes."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from deca_node import cli, config, disk, template, testbed
from deca_node.errors import DataError, OutputError
from deca_node.pb import node_pb2 as pb
from deca_node.plots import draw, running_mean
from deca_node.testbed import layout, processes, results
from deca_node.testbed.mark import Mark


def _plan(folder: Path, **changes: Any) -> layout.Plan:
    settings = {
        "nodes": 2,
        "config": None,
        "overrides": ("model.path=m", "schedule.steps=3"),
        "train": folder / "data.jsonl",
        "shards": None,
        "test": None,
        "test_per_label": 1,
        "concentration": 0.5,
        "seed": 0,
        "label_field": None,
        "out": folder / "out",
        "isolated": False,
    }
    return layout.Plan(**{**settings, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"text": str(number), "label": "abc"[number % 3]} for number in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _nodes(plan: layout.Plan) -> list[config.Settings]:
    base = layout.base_settings(plan, plan.out)
    return layout.node_settings(plan, base, plan.out)


def test_a_blank_label_is_named_by_its_row(folder: Path) -> None:
    """In what was given, before anything of it is written; of ready shards in the shard."""
    rows = [{"text": str(number), "label": "abc "[number % 4]} for number in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"/data\.jsonl, row 4: data\.label_field 'label' is blank"):
        _nodes(_plan(folder))
    assert not (folder / "out").exists()
    for number in range(2):
        (folder / f"node-{number}.jsonl").write_text(lines)
    with pytest.raises(
        DataError, match=r"node-0\.jsonl, row 4: data\.label_field 'label' is blank"
    ):
        _nodes(_plan(folder, train=None, shards=folder))


def test_each_node_has_its_own_name_data_and_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is shared, every label is known to all, and paths do not depend on where we are."""
    monkeypatch.chdir(folder)
    first, second = _nodes(_plan(folder))
    assert [first.node.name, second.node.name] == ["node-0", "node-1"]
    assert first.node.output == folder / "out/node-0"
    assert first.data.train == folder / "out/data/node-0.jsonl"
    assert first.data.test == second.data.test == folder / "out/data/test.jsonl"
    assert first.data.labels == second.data.labels == {"a": "a", "b": "b", "c": "c"}
    assert first.model.path == folder / "m"
    assert (first.run.start_when, first.node.port, first.node.host) == (2, 0, "127.0.0.1")
    assert first.network.preset == "local"
    assert first.schedule == second.schedule == config.ScheduleSettings(steps=3)


def test_what_only_one_daemon_of_a_machine_can_have_is_left_out(folder: Path) -> None:
    """Ports that are taken by the first; a node that stays would keep the testbed from ending."""
    plan = _plan(folder)
    given = ["node.stay=true", "node.health_port=7431", "metrics.port=9464"]
    plan = replace(plan, overrides=[*plan.overrides, *given])
    for settings in _nodes(plan):
        assert not settings.node.stay
        assert settings.node.health_port is None
        assert settings.metrics.port is None


def test_two_testbeds_in_one_folder_are_one_too_many(folder: Path) -> None:
    """The second would take away the data that the first's nodes are about to read."""
    plan = _plan(folder)
    with (
        disk.alone(plan.out, "testbed"),
        pytest.raises(OutputError, match="another `deca-node testbed` is working there"),
    ):
        testbed.run(plan)


def test_a_nodes_file_gives_its_settings(folder: Path) -> None:
    """What a process reads is what was meant for it."""
    settings = _nodes(_plan(folder))[1]
    path = folder / "node.toml"
    path.write_text(template.document(settings))
    # As plain values: a copied model's fields are in another order.
    assert config.load(path).model_dump(mode="json") == settings.model_dump(mode="json")


def test_two_testbeds_do_not_meet(folder: Path) -> None:
    """Their run names differ by folder, are valid, and are the same when resumed."""
    name = "x" * 48
    overrides = ("model.path=m", f"run.name={name}")
    here, again, there = (
        layout.base_settings(_plan(folder, overrides=overrides), out).run
        for out in (folder / "a", folder / "a", folder / "b")
    )
    assert here == again
    assert here.name != there.name
    assert config.RunSettings(name=here.name) == here.model_copy(update={"start_when": 2})
    assert len(here.name) == 48


def test_isolated_nodes_have_no_edges_but_wait_for_each_other(folder: Path) -> None:
    for settings in _nodes(_plan(folder, isolated=True)):
        assert settings.topology.kind == "explicit"
        assert settings.topology.edges == ()
        assert settings.run.start_when == 2


def test_given_shards_are_used_as_they_are(folder: Path) -> None:
    """And must be enough."""
    _nodes(_plan(folder))
    shards = folder / "out/data"
    given = _plan(folder, train=None, shards=shards, test_per_label=0, out=folder / "other")
    assert [settings.data.train.parent for settings in _nodes(given)] == [shards, shards]
    assert not (folder / "other").exists()
    with pytest.raises(DataError, match=r"node-2\.jsonl"):
        _nodes(_plan(folder, train=None, shards=shards, nodes=3))


def test_given_labels_are_kept(folder: Path) -> None:
    given = ("model.path=m", 'data.labels={a="x", b="y", c="z"}')
    assert _nodes(_plan(folder, overrides=given))[0].data.labels == {"a": "x", "b": "y", "c": "z"}


def test_a_folder_is_resumed_by_the_same_plan_only(folder: Path) -> None:
    """Another plan is told what differs, a finished run is left alone, so is a foreign folder."""

    def claim(plan: layout.Plan) -> Mark:
        return Mark.claim(plan.out, testbed._intent(plan, layout.base_settings(plan, plan.out)))

    plan = _plan(folder)
    claim(plan).add(1.5)
    (plan.out / "node-0").mkdir()
    (plan.out / "node-0/run.json").touch()  # a node has begun
    assert claim(plan).seconds == 1.5
    with pytest.raises(OutputError, match="seed is 0 there, 1 here"):
        claim(_plan(folder, seed=1))
    with pytest.raises(OutputError, match=r"settings\.schedule\.steps is 3 there, 48 here"):
        claim(_plan(folder, overrides=("model.path=m",)))
    (plan.out / "results.json").touch()
    with pytest.raises(OutputError, match="finished"):
        claim(plan)
    (folder / "foreign/node-0").mkdir(parents=True)
    with pytest.raises(OutputError, match="another run"):
        claim(_plan(folder, out=folder / "foreign"))
    assert not (folder / "foreign/testbed.json").exists()


def test_a_failed_try_is_not_in_the_way(folder: Path) -> None:
    """Where no node has begun, settings and data can be corrected; others' files stay."""

    def attempt(plan: layout.Plan) -> list[config.Settings]:
        base = layout.base_settings(plan, plan.out)
        Mark.claim(plan.out, testbed._intent(plan, base))
        return layout.node_settings(plan, base, plan.out)

    with pytest.raises(DataError, match="no such file"):
        attempt(_plan(folder, train=folder / "absent.jsonl"))
    attempt(_plan(folder, nodes=3))  # the model's path is wrong, say
    (folder / "out/data/notes").write_text("precious")
    rows = "".join(json.dumps({"text": str(number), "label": "d"}) + "\n" for number in range(9))
    (folder / "data.jsonl").write_text(rows)
    plan = _plan(folder, overrides=("model.path=n",))
    assert [settings.data.labels for settings in attempt(plan)] == [{"d": "d"}] * 2
    names = sorted(path.name for path in (folder / "out/data").iterdir())
    assert names == ["node-0.jsonl", "node-1.jsonl", "notes", "test.jsonl"]


def test_what_was_given_is_kept_and_the_rest_is_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preset and threads are the user's; the way nodes meet is the testbed's, as --help says."""
    given = (
        "model.path=m",
        "node.threads=3",
        "network.preset=wan",
        "network.zeroconf=false",
        'network.static_peers=["192.0.2.1:7430"]',
    )
    settings = _nodes(_plan(folder, overrides=given))[0]
    assert (settings.node.threads, settings.network.preset) == (3, "wan")
    assert settings.network.zeroconf
    assert settings.network.static_peers == ()
    with pytest.raises(SystemExit):
        cli.main(["testbed", "--help"])
    shown = capsys.readouterr().out
    node = {f"node.{name}" for name in ("name", "host", "port", "advertise", "output")}
    network = {f"network.{name}" for name in ("zeroconf", "interfaces", "static_peers")}
    for key in node | network | {"run.start_when", "run.name", "data.train"}:
        assert key in shown


def _measure(node: str, accuracy: float | None) -> results.Measure:
    scores = {"accuracy": accuracy, "macro_f1": accuracy, "loss": 1.0}
    return results.Measure(node, {"a": 3}, {"accuracy": 0.25, "macro_f1": 0.1}, scores, 10, 20)


def test_results_have_the_promised_keys() -> None:
    found = results.summarise([_measure("x", 0.5), _measure("y", 0.75)], 0.125, 61.04, {"k": 1})
    first = {
        "node": "x",
        "label_counts": {"a": 3},
        "before": {"accuracy": 0.25, "macro_f1": 0.1},
        "after": {"accuracy": 0.5, "macro_f1": 0.5},
        "bytes_sent": 10,
        "bytes_received": 20,
    }
    assert found.pop("nodes")[0] == first
    assert found == {
        "mean_after_accuracy": 0.625,
        "min_after_accuracy": 0.5,
        "disagreement": 0.125,
        "wall_seconds": 61.0,
        "settings": {"k": 1},
    }


def test_results_without_accuracy_say_so() -> None:
    found = results.summarise([_measure("x", None)], 0.0, 1.0, {})
    assert found["mean_after_accuracy"] is None
    assert found["nodes"][0]["after"] == {"accuracy": None, "macro_f1": None}


def test_summaries_are_read_and_damaged_ones_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"summary\.json: missing or damaged"):
        results.measured(tmp_path)
    assert not processes.has_finished(tmp_path)
    summary = {
        "node": "x",
        "label_counts": {},
        "before": None,
        "after": {"loss": 2.0},
        "bytes_sent": 1,
        "bytes_received": 2,
        "finished": True,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert results.measured(tmp_path) == results.Measure("x", {}, {}, {"loss": 2.0}, 1, 2)
    assert processes.has_finished(tmp_path)


def test_disagreement_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes at distance 2·5 of each other are 5 from their mean, whatever the slices."""
    monkeypatch.setattr(results, "SLICE", 4)
    for number, sign in enumerate((1.0, -1.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        matrix = torch.full((7, 3), 9.0)
        matrix[0, 0] += sign * 3
        save_file({"matrix": matrix, "empty": torch.zeros(0, 3)}, folder / "a.safetensors")
        scalar = torch.tensor(sign * 4, dtype=torch.bfloat16)
        save_file({"scalar": scalar}, folder / "b.safetensors")
    models = [tmp_path / "0", tmp_path / "1"]
    assert results.disagreement(models) == pytest.approx(5.0)
    assert results.disagreement([models[0]] * 3) == 0.0
    with pytest.raises(OutputError, match="holds no safetensors"):
        results.disagreement([tmp_path])


def test_three_nodes_disagreement_by_hand(tmp_path: Path) -> None:
    """Root of the mean square: values 0, 0, 3 are 1, 1, 2 from their mean."""
    for number, value in enumerate((0.0, 0.0, 3.0)):
        (tmp_path / str(number)).mkdir()
        save_file({"x": torch.tensor([value])}, tmp_path / str(number) / "a.safetensors")
    found = results.disagreement([tmp_path / str(number) for number in range(3)])
    assert found == pytest.approx(math.sqrt((1 + 1 + 4) / 3))


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ('{"event": "ready"}\n{"event": "no disk", "exit_code": 9}\n', "no disk"),
        (
            '{"event": "defect", "exception": "Traceback\\n  x\\nValueError: 3"}\n',
            "defect: ValueError: 3",
        ),
        ("Killed\n\n", "Killed"),
        ("", "its log is empty"),
    ],
)
def test_a_nodes_last_words(log: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(log)
    assert processes.last_words(path) == words


def test_progress_in_a_line() -> None:
    training = pb.NodeStatus(phase=pb.PHASE_TRAINING, steps_done=3, steps_total=9, loss=1.5)
    loading = pb.NodeStatus(phase=pb.PHASE_STARTING, waiting_for="the model")
    line = processes.progress_line({"a": loading, "b": training, "c": loading, "d": "ended"})
    assert line == "a, c: starting, the model; b: training 3/9, loss 1.500; d: ended"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """Also with a loss that was none, no edges and no labels."""
    rows = [
        {"loss": None if step == 1 else 2.0, "disagreement": 0.0, "visit": step // 2}
        for step in range(4)
    ]
    draw({"x": rows, "y": []}, {"x": {}, "y": {}}, tmp_path / "a.png")
    draw({"x": rows}, {"x": {"a": 3}}, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_running_mean_steps_over_nan() -> None:
    assert running_mean([1.0, float("nan"), 2.0]) == pytest.approx([1.0, 1.0, 1.2])


class _Child:
    """A process that ends when every one of them has been told to."""

    told: ClassVar[set[int]] = set()

    def __init__(self, pid: int, *, deaf: bool = False) -> None:
        self.pid, self.deaf, self.killed = pid, deaf, False

    def terminate(self) -> None:
        self.told.add(self.pid)

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        assert len(self.told) == 3, "one was not told while this one was waited for"
        if self.deaf and not self.killed:
            raise subprocess.TimeoutExpired("node", timeout or 0.0)
        return 0


def test_all_nodes_are_told_to_end_before_one_is_waited_for() -> None:
    """Else those that are told last go on training without the others. Who is deaf is killed."""
    children: list[Any] = [_Child(0), _Child(1, deaf=True), _Child(2)]
    processes.end(children)
    assert [child.killed for child in children] == [False, True, False]
