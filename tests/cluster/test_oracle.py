"""Real daemons over real gRPC against the paper's equations in float64."""

import json
import uuid

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deca_node import trainer
from deca_node.batches import BatchStream
from deca_node.blocks import Schedule, partition_layers
from deca_node.config import DataSettings, ModelSettings
from deca_node.data import examples
from deca_node.models import LanguageModel
from deca_node.rows import read_rows
from tests import oracle
from tests.cluster.daemons import Daemon
from tests.tiny import make_model

NODES, ROUNDS, STEPS, LAYERS_PER_BLOCK, SEED, BATCH = 4, 2, 3, 2, 11, 3
RATE = 2e-3
# With Adam's usual 1e-8 the first step of a visit is the gradient's sign where the gradient is mere
# rounding, and fp32 and fp64 may differ in it by the whole step.
EPS = 1e-4


def write_shard(path, node):
    """Skewed rows: every node talks of its own letters."""
    rows = [
        {"text": f"{'abcdefgh'[(node * 2 + i) % 8]} {i * (node + 3)}", "label": "abcd"[node]}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four daemons on a ring, run to their end."""
    folder = tmp_path_factory.mktemp("oracle")
    model = make_model(folder / "model", "llama")
    name = f"oracle-{uuid.uuid4().hex[:8]}"
    common = [
        f"run.name={name}",
        f"run.seed={SEED}",
        f"run.start_when={NODES}",
        f"model.path={model}",
        "model.dtype=fp32",
        'data.labels={a="a", b="b", c="c", d="d"}',
        f"data.batch_size={BATCH}",
        f"schedule.rounds={ROUNDS}",
        f"schedule.steps={STEPS}",
        f"schedule.layers_per_block={LAYERS_PER_BLOCK}",
        "schedule.order=random",
        f"optimizer.learning_rate={RATE}",
        f"optimizer.adam_eps={EPS}",
    ]
    shards = [write_shard(folder / f"{i}.jsonl", i) for i in range(NODES)]
    daemons = [
        Daemon(folder, f"n{i}", [*common, f"data.train={shard}"]).start()
        for i, shard in enumerate(shards)
    ]
    try:
        codes = [daemon.wait() for daemon in daemons]
    finally:
        for daemon in daemons:
            daemon.end(9)
    assert codes == [0] * NODES, daemons[0].log.read_text()[-3000:]
    return model, shards, daemons


def oracle_blocks(model_path, shards):
    """The same run by the oracle, with gradients from the same model and batches."""
    settings = DataSettings(train=shards[0], labels={c: c for c in "abcd"})
    model = LanguageModel.load(ModelSettings(path=model_path, dtype="fp32"), torch.device("cpu"))
    layers = partition_layers(model.n_layers, LAYERS_PER_BLOCK)
    streams = [
        BatchStream(
            examples(read_rows(shard), settings, model.tokenizer, shard),
            BATCH,
            SEED,
            model.tokenizer.pad_id,
        )
        for shard in shards
    ]

    def flat(block):
        active = model.activate(layers[block])
        values = active.master.double().numpy().copy()
        model.release()
        return values

    def gradient(client, _round, _position, _step, blocks, active):
        for index, values in enumerate(blocks):
            model.activate(layers[index]).master.copy_(torch.from_numpy(values))
            model.release()
        block = model.activate(layers[active])
        trainer.gradient(model, block, streams[client].next())
        values = torch.cat([part.flatten() for _, part in block.gradients()]).double().numpy()
        block.drop_gradients()
        model.release()
        return values

    schedule = Schedule(layers, ROUNDS, STEPS, "random", SEED)
    ring = np.zeros((NODES, NODES), dtype=bool)
    for i in range(NODES):
        ring[i, (i + 1) % NODES] = ring[(i + 1) % NODES, i] = True
    clients = oracle.run(
        [flat(block) for block in range(len(layers))],
        gradient,
        ring,
        rounds=ROUNDS,
        steps=STEPS,
        settings=oracle.Settings(learning_rate=RATE, adam_eps=EPS),
        order=schedule.round_order,
    )
    names = [[spec.name for spec in model.activate(block).layout.tensors] for block in layers]
    return clients, names


def test_final_blocks_equal_the_oracle(run):
    """After two rounds every block of every exported model is the oracle's to 1e-5."""
    model_path, shards, daemons = run
    clients, names = oracle_blocks(model_path, shards)
    moved = 0.0
    start = load_file(model_path / "model.safetensors")
    for client, daemon in zip(clients, daemons, strict=True):
        tensors = load_file(daemon.output / "model" / "model.safetensors")
        for expected, block in zip(client.blocks, names, strict=True):
            found = torch.cat([tensors[name].flatten() for name in block]).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            begin = torch.cat([start[name].flatten() for name in block]).numpy()
            moved = max(moved, float(np.abs(found - begin).max()))
    assert moved > 20 * 1e-5  # the tolerance is small beside what training did


def test_every_step_used_every_edge(run):
    """History has one line a step, with both neighbours mixed in whole."""
    _, _, daemons = run
    for daemon in daemons:
        history = daemon.history()
        assert len(history) == ROUNDS * 2 * STEPS
        assert all(len(row["neighbours"]) == 2 for row in history)
        assert all(row["missing"] == {} and row["partial"] == [] for row in history)
        assert daemon.summary()["incomplete_mixes"] == 0
        sent = sum(row["bytes_sent"] for row in history)
        assert 0 < sent <= daemon.summary()["bytes_sent"]


def test_nodes_end_alike(run):
    """Neighbours' models end nearer to each other than to where they began."""
    model_path, _, daemons = run
    start = load_file(model_path / "model.safetensors")
    ends = [load_file(d.output / "model" / "model.safetensors") for d in daemons]

    def distance(a, b):
        return float(sum((a[name] - b[name]).square().sum() for name in start)) ** 0.5

    assert max(distance(ends[0], end) for end in ends[1:]) < 0.5 * distance(start, ends[0])
