"""deca-node export: the model as it stands, while the node runs, and only if agreed."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import structlog
import torch
from safetensors.torch import load_file

from deca_node import cli
from deca_node.blocks import Schedule, partition_layers
from deca_node.checkpoint import Changed, Checkpoint
from deca_node.consensus import Agreement
from deca_node.errors import OutputError
from deca_node.export import export
from deca_node.node import Node
from tests.edges.test_node import settings

SCHEDULE = Schedule(partition_layers(4, 1), 1, 2, "random", 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one node, at its end."""
    import asyncio

    folder = tmp_path_factory.mktemp("run")
    assert asyncio.run(Node(settings(folder), structlog.get_logger()).run())
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def agreement(folder, *, finished=True, **told):
    """Write down an agreement, or none, as the node would."""
    store = store_of(folder)
    found = Agreement("exact", 9, 0.1, 1e-4, tolerance=1e-3, **told) if told else None
    store.save({}, replace(store.state.progress, agreement=found, finished=finished))
    store.release()


def test_a_finished_run_exports_the_model_that_it_wrote(finished, tmp_path):
    """Base model and kept blocks make the very model of node.output, and transformers loads it."""
    said = export(settings(finished), tmp_path / "new", consensus=False)
    assert "after 4 of 4 block visits, 4 of 4 blocks changed" in said
    assert same(weights(tmp_path / "new"), weights(finished / "out" / "model"))
    assert not same(weights(tmp_path / "new"), weights(finished / "model"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "new")


@pytest.fixture
def copy(finished, tmp_path):
    """The finished run's folder, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def store_of(folder):
    """What a daemon of the run keeps its state with."""
    mark = json.loads((folder / "out" / "run.json").read_text())
    for key in ("format", "xxh3"):
        mark.pop(key)
    store = Checkpoint(folder / "out", mark, SCHEDULE)
    assert store.claim()
    return store


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return path


def test_a_running_nodes_folder_is_read_and_left_alone(finished, tmp_path):
    """Its lock does not matter, and nothing in it changes."""

    def content():
        files = sorted(path for path in (finished / "out").rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    daemon = store_of(finished)
    before = content()
    export(settings(finished), tmp_path / "new", consensus=False)
    assert content() == before
    daemon.release()


def test_a_block_replaced_meanwhile_is_read_again(copy, tmp_path, monkeypatch):
    """A file that is gone belongs to an older state: the newest one is what comes out."""
    daemon = store_of(copy)
    saved = daemon.state.blocks[1]
    newer = {name: tensor + 1 for name, tensor in daemon.load(saved).items()}
    real = Checkpoint.load
    calls = []

    def load(self, asked):
        if len(calls) == 1:  # the daemon ends a visit between two reads, and then another one
            for progress in (daemon.state.progress, replace(daemon.state.progress, seconds=9.0)):
                daemon.save({1: Changed(4, newer)}, progress)
            assert not (copy / "out" / "state" / saved.file).exists()
        calls.append(asked.file)
        return real(self, asked)

    monkeypatch.setattr(Checkpoint, "load", load)
    said = export(settings(copy), tmp_path / "new", consensus=False)
    daemon.release()
    found = weights(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in newer.items())
    assert len(calls) == len(set(calls)) == 5  # nothing was read twice
    assert said.endswith("blocks changed")


def test_files_replaced_while_they_are_checked_are_no_damage(copy, tmp_path, monkeypatch):
    """Commits under the reader's eyes: it looks again, and warns of nothing."""
    daemon = store_of(copy)
    newer = {name: tensor + 1 for name, tensor in daemon.load(daemon.state.blocks[3]).items()}
    real = Checkpoint._trouble
    commits = iter([1.0, 2.0])

    def trouble(self, saved):
        if self is not daemon and (seconds := next(commits, None)):
            progress = replace(daemon.state.progress, seconds=seconds)
            daemon.save({3: Changed(4, newer)}, progress)
        return real(self, saved)

    monkeypatch.setattr(Checkpoint, "_trouble", trouble)
    said = export(settings(copy), tmp_path / "new", consensus=False)
    daemon.release()
    assert said.endswith("blocks changed")
    found = weights(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in newer.items())


def test_a_damaged_block_is_named_and_nothing_written(copy, tmp_path):
    """The state before has the same file: there is no model to write."""
    path = damage(next((copy / "out" / "state").glob("block-0002-*")))
    with pytest.raises(OutputError, match=f"{path.name}: damaged.*start the node"):
        export(settings(copy), tmp_path / "new", consensus=False)
    assert not (tmp_path / "new").exists()


def test_the_state_before_a_damaged_one_is_written_with_a_warning(copy, tmp_path):
    """All of its blocks, and the answer names the damaged file; an agreement it is not."""
    daemon = store_of(copy)
    before = daemon.load(daemon.state.blocks[2])
    newer = {name: tensor + 1 for name, tensor in before.items()}
    daemon.save({2: Changed(4, newer)}, daemon.state.progress)
    path = damage(copy / "out" / "state" / daemon.state.blocks[2].file)
    daemon.release()
    said = export(settings(copy), tmp_path / "new", consensus=False)
    assert f"{path.name}: damaged; the state before is used" in said
    found = weights(tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    with pytest.raises(OutputError, match=f"{path.name}: damaged.*set consensus.tolerance"):
        export(settings(copy), tmp_path / "agreed", consensus=True)
    assert not (tmp_path / "agreed").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("optimizer.learning_rate=2e-3", "holds another run .optimizer.learning_rate"),
        ("node.name=other", "holds another run .node is"),
        ("node.output=nowhere", "nowhere: holds no run; set node.output"),
    ],
)
def test_another_runs_folder_is_refused(finished, tmp_path, more, words):
    """Named with the setting that differs; nothing is written."""
    with pytest.raises(OutputError, match=words):
        export(settings(finished, more), tmp_path / "new", consensus=False)
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_not_overwritten(finished):
    """Said before the model is loaded."""
    with pytest.raises(OutputError, match="give --to a new folder"):
        export(settings(finished), finished / "out" / "model", consensus=False)


@pytest.mark.parametrize("ended", [True, False])
def test_consensus_is_exported_when_it_is_kept(copy, tmp_path, ended):
    """It says who has this model, and who is missing; the node need not have written it yet."""
    agreement(copy, finished=ended, complete=True, members=("a", "b"), missing=("c",))
    said = export(settings(copy), tmp_path / "new", consensus=True)
    assert said.endswith("agreed on by a, b, without c")
    assert same(weights(tmp_path / "new"), weights(copy / "out" / "model"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "finished without an agreement; set consensus.tolerance"),
        (
            {"complete": False, "members": ("a",), "missing": ("b",)},
            "did not come to an agreement; set consensus.tolerance",
        ),
    ],
)
def test_what_was_not_agreed_on_is_refused_with_the_way_there(copy, tmp_path, told, words):
    """The reason, and what to do about it; whatever the record of another end says."""
    agreement(copy, **told)
    path = copy / "out" / "summary.json"
    good = asdict(Agreement("exact", 9, 0.1, 1e-4, True, ("a", "b"), (), 1e-3))
    path.write_text(json.dumps({**json.loads(path.read_text()), "consensus": good}))
    with pytest.raises(OutputError, match=words):
        export(settings(copy), tmp_path / "new", consensus=True)
    assert not (tmp_path / "new").exists()


def test_a_run_under_way_has_no_agreement(copy, tmp_path, capsys):
    """The command line says so in one line, with the documented exit code."""
    agreement(copy, finished=False)
    arguments = ["export", "--consensus", "--to", str(tmp_path / "new")]
    for key in ("node.output", "model.path", "data.train"):
        value = {"node.output": "out", "model.path": "model", "data.train": "train.jsonl"}[key]
        arguments += ["--set", f"{key}={copy / value}"]
    for chosen in ("schedule.rounds=1", "schedule.steps=2", "optimizer.learning_rate=1e-3"):
        arguments += ["--set", chosen]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == OutputError.exit_code
    assert "the run is not finished" in capsys.readouterr().err
