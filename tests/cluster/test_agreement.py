"""Real daemons come to one model after their last round; some of them are stopped on the way."""

import re
import signal
import subprocess
import sys
import uuid

import pytest
import torch
from safetensors.torch import load_file

from deca_node.pb import node_pb2 as pb
from tests.cluster.daemons import DEADLINE
from tests.tiny import make_model

ON = "consensus.tolerance=1e-3"
NAMES = "abcd"
EXPORT_KEYS = ("run.", "model.", "data.", "schedule.", "optimizer.", "topology.", "node.")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of many blocks: their agreement takes seconds, so that its middle can be hit."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "llama", layers=40)


@pytest.fixture
def ring(daemon, model):
    """A function that starts a ring of four, each with data of its own."""
    run = f"agree-{uuid.uuid4().hex[:8]}"

    def start(*settings, names=NAMES):
        daemons = []
        for name in names:
            # Other texts for each, and half of them call a what is b to the others.
            labels = "ab" if name < "c" else "ba"
            rows = [{"text": f"{'ab'[i % 2]} {name}{i}", "label": labels[i % 2]} for i in range(8)]
            common = [
                f"run.name={run}",
                f"run.start_when={len(NAMES)}",
                f"model.path={model}",
                "topology.kind=ring",
                "schedule.rounds=1",
                "schedule.steps=2",
                "optimizer.learning_rate=1e-2",
            ]
            daemons.append(daemon(name, rows, *common, *settings).start())
        return daemons

    return start


def ended(daemons):
    for daemon in daemons:
        assert daemon.wait() == 0, daemon.log.read_text()[-3000:]


def spread(daemons):
    """Largest difference between two nodes in any value of their models."""
    models = [load_file(daemon.output / "model" / "model.safetensors") for daemon in daemons]
    return max(
        float((torch.stack([m[name] for m in models]) - models[0][name]).abs().max())
        for name in models[0]
    )


def export(daemon, to, *arguments):
    command = [sys.executable, "-m", "deca_node", "export", "--to", str(to), *arguments]
    for setting in daemon.settings:
        if setting.startswith(EXPORT_KEYS):
            command += ["--set", setting]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


def settled(daemon, names=NAMES):
    """The summary's agreement, which is complete among ``names``."""
    found = daemon.summary()["consensus"]
    assert found["complete"], found
    assert found["members"] == sorted(names)
    assert found["tolerance"] == 1e-3
    assert found["disagreement"] <= 1e-3 * found["before"] + 2**-21
    return found


def test_a_ring_ends_with_one_model_and_so_does_one_that_had_finished(ring, tmp_path):
    """Trained without, the nodes differ; started again with a tolerance, they agree on one model.

    The model folder is replaced, and export gives the agreed model and refuses the other.
    """
    before = ring()
    ended(before)
    apart = spread(before)
    assert apart > 1e-4
    refused = export(before[0], tmp_path / "no", "--consensus")
    assert refused.returncode == 8
    assert "finished without an agreement" in refused.stderr
    assert not (tmp_path / "no").exists()
    steps = [len(daemon.history()) for daemon in before]

    daemons = ring(ON)
    ended(daemons)
    assert spread(daemons) < 2e-3 * apart
    for daemon in daemons:
        found = settled(daemon)
        assert found["missing"] == []
        assert found["kind"] == "exact"
        assert not any(e["event"].startswith("not saved") for e in daemon.events())
    assert [len(daemon.history()) for daemon in daemons] == steps  # nothing was trained again
    good = export(daemons[0], tmp_path / "agreed", "--consensus", "--set", ON)
    assert good.returncode == 0, good.stderr
    assert "agreed on by a, b, c, d" in good.stdout + good.stderr
    exported = load_file(tmp_path / "agreed" / "model.safetensors")
    written = load_file(daemons[0].output / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in written.items())
    again = daemons[0].start()
    ended([again])  # agreed already: no other node is needed
    assert "finished" in again.events()[-1]["event"]


def in_the_middle(status):
    """Some blocks are agreed on, and others are not."""
    found = re.search(r"block (\d+) of", status.waiting_for)
    return status.phase == pb.PHASE_AGREEING and found and 3 <= int(found[1]) <= 30


@pytest.mark.slow
def test_stopped_in_the_agreement_all_agree_when_started_again(ring):
    """SIGTERM while blocks are agreed on: the state is kept, and a second start finishes."""
    daemons = ring(ON)
    daemons[0].until(in_the_middle)
    for daemon in daemons:
        daemon.end(signal.SIGTERM)
    ended(daemons)
    for daemon in daemons:
        assert daemon.events()[-2]["event"] == "stopped in the agreement, state saved"
        assert not (daemon.output / "model").exists()
        assert len(daemon.history()) == 80
    ended([daemon.start() for daemon in daemons])
    for daemon in daemons:
        assert settled(daemon)["missing"] == []
        assert len(daemon.history()) == 80
    assert spread(daemons) < 1e-5


@pytest.mark.slow
def test_one_killed_in_the_agreement_is_named_and_agrees_later(ring):
    """SIGKILL: the others agree and say who is missing; started again, all four agree."""
    daemons = ring(ON)
    daemons[3].until(in_the_middle)
    daemons[3].end(signal.SIGKILL)
    daemons[3].wait()
    ended(daemons[:3])
    for daemon in daemons[:3]:
        assert settled(daemon, "abc")["missing"] == ["d"]
    assert spread(daemons[:3]) < 1e-5
    ended([daemon.start() for daemon in daemons])
    for daemon in daemons:
        assert settled(daemon)["missing"] == []
    assert spread(daemons) < 1e-5
