"""Real daemons with methods that exchange adapters, and not at every step."""

import importlib.util
import json
import signal
import uuid

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deca_node import trainer
from deca_node.batches import BatchStream
from deca_node.config import load
from deca_node.data import examples
from deca_node.methods.choose import prepare
from deca_node.models import LanguageModel
from deca_node.rows import read_rows
from tests import oracle_methods
from tests.cluster.daemons import DEADLINE, Daemon, end_all
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the extra [lora] is not installed"
)
NODES, ROUNDS, STEPS, EVERY, SEED, BATCH, RATE, EPS = 3, 2, 4, 2, 5, 3, 2e-3, 1e-4


@pytest.fixture
def make(tmp_path):
    """A function that makes daemons of one run and ends them afterwards."""
    made = []
    model = make_model(tmp_path / "model", "llama", layers=2)
    run = f"methods-{uuid.uuid4().hex[:8]}"

    def factory(index, *settings):
        data = tmp_path / f"{index}.jsonl"
        rows = [
            {"text": f"{'abcdefgh'[(index * 2 + i) % 8]} {i * (index + 3)}", "label": "abc"[index]}
            for i in range(10)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = [
            f"run.name={run}",
            f"run.seed={SEED}",
            f"run.start_when={NODES}",
            f"model.path={model}",
            "model.dtype=fp32",
            f"data.train={data}",
            'data.labels={a="a", b="b", c="c"}',
            f"data.batch_size={BATCH}",
            f"optimizer.learning_rate={RATE}",
            f"optimizer.adam_eps={EPS}",
        ]
        daemon = Daemon(tmp_path, f"n{index}", [*common, *settings])
        daemon.deadline = 2 * DEADLINE  # peft's start comes on top of transformers'
        made.append(daemon)
        return daemon

    yield factory
    end_all(made)


def adapters(daemon):
    """The adapters that a finished run has kept."""
    manifest = json.loads((daemon.output / "state" / "manifest.json").read_text())
    return load_file(daemon.output / "state" / manifest["blocks"]["0"]["file"])


def test_dec_lora_ends_as_the_dense_reference(make):
    """Two rounds of four steps, mixed after every other one, on all edges of a ring of three."""
    own = (
        *("run.method=dec-lora", "lora.rank=3", f"lora.local_steps={EVERY}"),
        *(f"schedule.rounds={ROUNDS}", f"schedule.steps={STEPS}"),
    )
    daemons = [make(i, *own).start() for i in range(NODES)]
    assert [d.wait() for d in daemons] == [0] * NODES, daemons[0].log.read_text()[-3000:]
    for daemon in daemons:
        rows = daemon.history()
        assert [len(row["neighbours"]) for row in rows] == [0, 2] * (ROUNDS * STEPS // 2)
        assert daemon.summary()["incomplete_mixes"] == 0
    streams = []
    for daemon in daemons:
        settings = load(None, daemon.settings)
        model = LanguageModel.load(settings.model, torch.device("cpu"))
        rows = read_rows(settings.data.train)
        found = examples(rows, settings.data, model.tokenizer, settings.data.train)
        streams.append(BatchStream(found, BATCH, SEED, model.tokenizer.pad_id))
    prepare(settings, model)
    block = model.activate(range(model.n_layers))

    def gradient(client, _step, x):
        block.master.copy_(torch.from_numpy(x))
        trainer.gradient(model, block, streams[client].next())
        values = torch.cat([part.flatten() for _, part in block.gradients()]).double().numpy()
        block.drop_gradients()
        return values

    x = np.tile(block.master.double().numpy(), (NODES, 1))
    w = np.full((NODES, NODES), 1 / NODES)
    for _ in range(ROUNDS):
        x = oracle_methods.dadam(x, gradient, w, STEPS, RATE, EPS, EVERY)
    names = [spec.name for spec in block.layout.tensors]
    for expected, daemon in zip(x, daemons, strict=True):
        tensors = adapters(daemon)
        assert tensors.keys() == set(names)
        values = torch.cat([tensors[name].flatten() for name in names]).numpy()
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected).max() > 1e-3


@pytest.mark.long
def test_a_killed_node_comes_back_with_the_others_adapters(make):
    """DeCAF: rounds go by without it; it fetches the one block that there is, and goes on."""
    own = (
        *("run.method=decaf", "lora.rank=2", "lora.local_steps=2", "optimizer.learning_rate=1e-2"),
        *("schedule.rounds=100", "schedule.steps=20"),
    )
    daemons = [make(i, *own).start() for i in range(NODES)]
    lost = daemons[2]
    lost.until(lambda s: s.steps_done >= 50)
    lost.end(signal.SIGKILL)
    lost.process.wait()
    daemons[0].until(lambda s: s.steps_done >= 200)
    lost.start()
    assert [d.wait() for d in daemons] == [0] * NODES, lost.log.read_text()[-3000:]
    assert lost.summary()["bytes_caught_up"] > 0
    assert lost.summary()["visits_passed_over"] > 0
    assert lost.history()[-1]["neighbours"] == ["n0", "n1"]
    ends = [load_file(d.output / "model" / "model.safetensors") for d in daemons]
    start = load_file(lost.folder / "model" / "model.safetensors")

    def distance(a, b):
        return float(sum((a[name] - b[name]).square().sum() for name in start)) ** 0.5

    assert distance(ends[2], ends[0]) < 0.25 * distance(ends[2], start)
