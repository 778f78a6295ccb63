"""Whole swarms in one process, on a virtual clock, with a real (tiny) model."""

import asyncio
import gc
import json
import math
import re
import shutil
import socket
from pathlib import Path
from typing import get_args

import pytest
import structlog
import torch
import xxhash
from safetensors.torch import load_file

from deca_node import experiment, trainer, virtual_time
from deca_node.cli import main
from deca_node.config import Method, has, load
from deca_node.errors import DataError, OutputError
from deca_node.laboratory import Laboratory, read_cell
from deca_node.loopback import LoopbackNetwork
from deca_node.models import LanguageModel
from deca_node.node import Node
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import Records
from deca_node.rows import read_rows
from deca_node.simulator import SimulatedNode, Simulation, Spread, summary
from tests.answers import Answers
from tests.mps import Mps
from tests.tiny import LETTERS, make_model

SEED, ROUNDS, STEPS, RATE = 3, 2, 3, 2e-3
# Virtual seconds: no simulation here has so many, unless its nodes wait for what will not come.
FOR_EVER = 1000.0
SETTINGS = {
    "model.dtype": "fp32",
    "data.batch_size": 2,
    "data.labels": {letter: letter for letter in LETTERS[:4]},
    "schedule.rounds": ROUNDS,
    "schedule.steps": STEPS,
    "schedule.layers_per_block": 2,
    "schedule.order": "random",
    "optimizer.learning_rate": RATE,
    # With 1e-8 a first step is the sign of what may be rounding (test_oracle.py).
    "optimizer.adam_eps": 1e-4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and skewed shards for six nodes."""
    folder = tmp_path_factory.mktemp("simulator")
    make_model(folder / "model", "llama")
    for node in range(6):
        rows = [
            {"text": f"{LETTERS[(node * 2 + i) % 8]} {i * (node + 3)}", "label": LETTERS[node % 4]}
            for i in range(10)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"node-{node}.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text(
        "".join((folder / f"node-{node}.jsonl").read_text() for node in range(4))
    )
    return folder


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def settings_of(method):
    """Those of SETTINGS that the method has."""
    return {key: value for key, value in SETTINGS.items() if has(method, key)}


def prepare(folder, nodes, text, method="deca", **schedule):
    """An experiment of one cell and its laboratory."""
    changed = {f"schedule.{key}": value for key, value in schedule.items()}
    chosen = {**settings_of(method), "run.method": method, **changed}
    lines = [f"{key} = {toml(value)}" for key, value in chosen.items()]
    path = folder / "experiment.toml"
    path.write_text(
        "\n".join(
            [
                'model.path = "model"\npartition.shards = "."\ndata.test = "test.jsonl"',
                f"experiment.nodes = {nodes}\nexperiment.seeds = [{SEED}]",
                *lines,
                text,
            ]
        )
    )
    out = folder / "out"
    out.mkdir(exist_ok=True)
    (out / "experiment.json").unlink(missing_ok=True)
    found = experiment.read(path, out)
    return found, Laboratory(found, out)


def simulate(folder, nodes, text="", method="deca", **schedule):
    """The simulation after its end, and the rows that it told."""
    found, laboratory = prepare(folder, nodes, text, method, **schedule)
    rows = []
    material, _ = laboratory._material(found.cells[0])
    simulation = Simulation(found.cells[0], material, rows.append)
    virtual_time.run(asyncio.wait_for(simulation.run(), FOR_EVER))
    return simulation, rows


def losses(rows):
    """By node, in the order of its steps."""
    found = {}
    for row in rows:
        if row["kind"] == "step":
            found.setdefault(row["node"], []).append(row["loss"])
    return found


async def run_real(folder, out, nodes, text, method="deca"):
    """The same nodes as daemons are made, over gRPC; their histories."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(nodes)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    chosen = {**settings_of(method), "run.method": method}
    common = [f"{key}={toml(value)}" for key, value in chosen.items()]
    swarm = [
        Node(
            load(
                None,
                [
                    *common,
                    f"node.name=node-{number}",
                    "node.host=127.0.0.1",
                    f"node.port={port}",
                    "node.threads=1",
                    f"node.output={out / f'node-{number}'}",
                    "run.name=experiment",
                    f"run.seed={SEED}",
                    f"run.start_when={nodes}",
                    f"model.path={folder / 'model'}",
                    f"data.train={folder / f'node-{number}.jsonl'}",
                    "network.zeroconf=false",
                    "network.preset=local",
                    "network.static_peers="
                    + json.dumps([f"127.0.0.1:{other}" for other in ports if other != port]),
                    *text,
                ],
            ),
            structlog.get_logger(),
        )
        for number, port in enumerate(ports)
    ]
    assert all(await asyncio.gather(*(node.run() for node in swarm)))
    return {
        f"node-{number}": [
            json.loads(line)["loss"]
            for line in (out / f"node-{number}" / "history.jsonl").read_text().splitlines()
        ]
        for number in range(nodes)
    }


@pytest.mark.parametrize("method", get_args(Method))
async def test_two_simulated_nodes_do_what_two_real_ones_do_to_the_last_bit(
    folder, tmp_path, method
):
    """Same settings, same shards, real gRPC: no difference in any loss or any weight."""
    if has(method, "lora"):
        pytest.importorskip("peft", reason="the extra [lora] is not installed")
    real = await run_real(folder, tmp_path, 2, ['topology.kind="full"'], method)
    simulation, rows = await asyncio.to_thread(
        simulate, folder, 2, 'topology.kind = "full"', method
    )
    assert losses(rows) == real
    blocks = simulation.material.schedule.blocks
    assert len(real["node-0"]) == ROUNDS * len(blocks) * STEPS
    if has(method, "lora") or has(method, "adapter"):
        # An exported folder has them merged, or beside it; the state has them as they are.
        for node in simulation.nodes:
            state = tmp_path / node.name / "state"
            manifest = json.loads((state / "manifest.json").read_text())
            kept = load_file(state / manifest["blocks"]["0"]["file"])
            tensors = node.model.block_tensors(range(node.model.n_layers))
            assert tensors
            for name, tensor in tensors.items():
                assert torch.equal(tensor, kept[name]), (node.name, name)
        return
    for node in simulation.nodes:
        exported = load_file(tmp_path / node.name / "model" / "model.safetensors")
        for layers in simulation.material.schedule.blocks:
            for name, tensor in node.model.block_tensors(layers).items():
                assert torch.equal(tensor, exported[name]), (node.name, name)


async def test_on_a_ring_only_the_order_of_arrivals_makes_a_difference(folder, tmp_path):
    """Two neighbours may come in either order, which changes the rounding of their sum."""
    real = await run_real(folder, tmp_path, 4, ['topology.kind="ring"'])
    _, rows = await asyncio.to_thread(simulate, folder, 4, 'topology.kind = "ring"')
    simulated = losses(rows)
    assert simulated.keys() == real.keys()
    for node, values in real.items():
        assert simulated[node] == pytest.approx(values, rel=1e-4)


def test_a_simulation_repeats_itself_to_the_last_bit(folder):
    """Chance included: messages lost and late."""
    text = "links.loss = 0.1\nlinks.jitter = 0.5\ncompute.spread = 0.5\n"
    (_, first), (_, second) = simulate(folder, 4, text), simulate(folder, 4, text)
    assert first == second


def test_who_greets_only_its_neighbours_learns_the_same(folder):
    """Without everybody greeting everybody the graph, the mixing and the losses are the same."""
    text = 'topology.kind = "ring"\nexperiment.greetings = '
    _, everybody = simulate(folder, 6, text + '"everybody"')
    simulation, neighbours = simulate(folder, 6, text + '"neighbours"')
    found = losses(neighbours)
    for node, values in losses(everybody).items():  # but for the order of arrivals, as above
        assert found[node] == pytest.approx(values, rel=1e-4)
    assert all(len(node._member.swarm.peers) == 2 for node in simulation.nodes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_twin_holds_only_what_it_has_changed(folder, dtype):
    """The frozen weights are there once, and nobody's training touches them or another's."""
    base = LanguageModel.load(
        load(
            None,
            [f"model.path={folder / 'model'}", f"model.dtype={dtype}", "data.train=x"],
        ).model,
        torch.device("cpu"),
    )
    before = base.weights_digest()
    one, other = base.twin(), base.twin()
    block = one.activate(range(1, 2))
    held = one.block_tensors(range(1, 2))
    block.master.add_(1.0)
    block.write_back()
    one.release()
    one.load_block(range(2, 3), {n: t + 1 for n, t in one.block_tensors(range(2, 3)).items()})
    assert base.weights_digest() == other.weights_digest() == before
    assert one.weights_digest() != before
    shared = {p.data_ptr() for p in base.module.parameters()}
    assert {p.data_ptr() for p in other.module.parameters()} == shared
    own = [name for name, p in one.module.named_parameters() if p.data_ptr() not in shared]
    assert own
    assert all(".1." in name or ".2." in name for name in own)
    # What was handed out at a visit's end does not change in the next.
    kept = {name: tensor.clone() for name, tensor in held.items()}
    again = one.activate(range(1, 2))
    again.master.add_(1.0)
    again.write_back()
    assert all(torch.equal(held[name], kept[name]) for name in held)


def test_time_is_what_the_experiment_says(folder):
    """Steps take their seconds, the slowest neighbour holds up the others, links their own."""
    _, rows = simulate(folder, 2, "compute.seconds = 2.0\nlinks.delay = 0.0\n")
    total = ROUNDS * 2 * STEPS
    assert max(row["time"] for row in rows) == pytest.approx(2.0 * total, rel=0.01)
    _, rows = simulate(folder, 2, "compute.nodes = {node-1 = 5.0}\nlinks.delay = 0.0\n")
    assert max(row["time"] for row in rows) == pytest.approx(5.0 * total, rel=0.01)
    _, rows = simulate(folder, 2, "compute.seconds = 0.0\nlinks.bandwidth = 0.01\n")
    steps = [row for row in rows if row["kind"] == "step" and row["node"] == "node-0"]
    sent = sum(row["bytes_sent"] for row in steps)
    assert steps[-1]["time"] == pytest.approx(sent / 1e4, rel=0.1)


@pytest.mark.parametrize("method", ["deca", "dadam"])
def test_a_step_is_computed_and_then_exchanged(folder, method):
    """One after the other for every method, as ``network.overlap`` is off in a simulation."""
    text = "compute.seconds = 3.0\nlinks.delay = 0.5\nlinks.bandwidth = 0.05\n"
    _, rows = simulate(folder, 2, text, method)
    steps = [row for row in rows if row["kind"] == "step" and row["node"] == "node-0"]
    times = [row["time"] for row in steps]
    for row, before, now in zip(steps[1:], times, times[1:], strict=False):
        if row["step"]:  # no visit was opened between
            # The request's way and the block's, and what its bytes take.
            exchange = 2 * 0.5 + row["bytes_sent"] / 5e4
            assert now - before == pytest.approx(3.0 + exchange, rel=0.02)


def test_a_delay_is_paid_once_for_messages_sent_one_right_after_the_other():
    """And again where the sender had to wait for the next one."""

    class Sender(Answers):
        async def pull(self, request):
            for number in range(5):
                if number == 3:
                    await asyncio.sleep(10)
                yield bytes([number])

    async def scenario():
        network = LoopbackNetwork(delay=lambda _a, _b: 1.0)
        await network.transport("b", 1).listen(Sender(), None)
        loop = asyncio.get_running_loop()
        link = network.transport("a", 1).link("b:1")
        return [loop.time() async for _ in link.pull(pb.PullRequest(), 60)]

    assert virtual_time.run(scenario()) == pytest.approx([2, 2, 2, 13, 13], abs=1e-6)


def test_lost_messages_cost_mixes_and_not_the_run(folder):
    """What did not come is counted with its reason."""
    simulation, rows = simulate(folder, 4, "links.loss = 0.2\n")
    missing = [row["missing"] for row in rows if row.get("missing")]
    assert missing
    assert {reason for one in missing for reason in one.values()} == {"incomplete"}
    assert summary(simulation, rows, [])["incomplete_mixes"] == len(missing)
    assert all(node.finished for node in simulation.nodes)


def test_a_node_dies_and_another_comes_back(folder):
    """Who stays dead is missed, who comes back catches up and ends with the others."""
    text = 'topology.kind = "full"\n[faults.deaths]\nnode-1 = [20.5]\nnode-2 = [20.5, 60.5]\n'
    simulation, rows = simulate(folder, 4, text, rounds=20)
    assert [node.finished for node in simulation.nodes] == [True, False, True, True]
    back = [row for row in rows if row["kind"] == "step" and row["node"] == "node-2"]
    assert not [row for row in back if 20.5 < row["time"] < 60.5]
    assert back[-1]["visit"] == 39
    assert back[-1]["neighbours"] == 2
    last = summary(simulation, [row for row in rows if row["kind"] == "step"], [])
    assert (last["nodes"], last["finished"]) == (4, 3)


def test_who_comes_back_over_bad_links_catches_up(folder, monkeypatch):
    """A file that breaks off is asked for again, and its giver not taken for a liar."""
    branded = []
    monkeypatch.setattr(Records, "false", lambda _, giver, now: branded.append((giver, now)))
    text = 'links.loss = 0.5\ntopology.kind = "full"\n[faults.deaths]\nnode-2 = [20.5, 60.5]\n'
    _, rows = simulate(folder, 4, text, rounds=20)
    assert not branded
    back = [row for row in rows if row["kind"] == "step" and row["node"] == "node-2"]
    assert any(row["neighbours"] for row in back if row["time"] > 60.5)


@pytest.mark.parametrize(
    ("world", "finished"),
    [
        # Dead before its first visit ends, and back when the others have left.
        ("[faults.deaths]\nnode-0 = [2.0, 300.0]\n", {"node-1", "node-2", "node-3"}),
        ("[faults.deaths]\nnode-0 = [0.0]\n", set()),
        ("[faults.deaths]\nnode-0 = [0.0, 200.0]\n", {"node-0", "node-1", "node-2", "node-3"}),
        # No greeting is answered before its deadline.
        ("[links]\ndelay = 30.0\n", set()),
    ],
)
def test_who_waits_for_those_that_will_not_come_is_unfinished(folder, world, finished):
    """Rather than that the cell never ends. Who comes back is waited for."""
    simulation, rows = simulate(folder, 4, f'topology.kind = "ring"\n{world}')
    assert {node.name for node in simulation.nodes if node.finished} == finished
    last = summary(simulation, rows, simulation.measure())
    assert (last["nodes"], last["finished"]) == (4, len(finished))


@pytest.mark.parametrize("shards", [False, True])
def test_a_blank_label_is_named_by_its_row(folder, tmp_path, shards):
    """Before anything is computed."""
    rows = [{"text": f"text {number}", "label": "ab "[number % 3]} for number in range(12)]
    for name in ("node-0.jsonl", "node-1.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = 'partition.shards = "."' if shards else 'data.train = "node-0.jsonl"'
    (tmp_path / "toy.toml").write_text(
        f'model.path = "{folder / "model"}"\n{place}\nexperiment.nodes = 2\n'
    )
    found = experiment.read(tmp_path / "toy.toml", tmp_path / "out")
    with pytest.raises(
        DataError, match=r"node-0\.jsonl, row 3: data\.label_field 'label' is blank"
    ):
        Laboratory(found, tmp_path / "out")


def test_the_spread_is_the_distance_from_the_mean():
    """Root mean square over the nodes, also far from zero."""
    torch.manual_seed(0)
    blocks = [{"a": 100 + torch.randn(3, 4), "b": torch.randn(5)} for _ in range(7)]
    spread = Spread()
    for block in blocks:
        spread.add(block)
    whole = torch.stack([torch.cat([t.flatten() for t in b.values()]) for b in blocks]).double()
    expected = float((whole - whole.mean(0)).square().sum(1).mean().sqrt())
    assert spread.rms == pytest.approx(expected, rel=1e-4)
    on_mps = Spread()
    for block in blocks:
        on_mps.add({name: tensor.as_subclass(Mps) for name, tensor in block.items()})
    assert on_mps.rms == spread.rms


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_spread_of_what_is_not_finite_is_none(value):
    """Not 0: a swarm that is destroyed does not agree. Of no block at all likewise."""
    spread = Spread()
    assert math.isnan(spread.rms)
    for _ in range(2):
        spread.add({"a": torch.full((3,), value)})
    assert math.isnan(spread.rms)


TOY = """
[experiment]
name = "toy"
nodes = 3
seeds = [0]
[rehearsal]
rows = 120
layers = 2
hidden = 16
[partition]
test_per_label = 4
[schedule]
rounds = 1
steps = 2
[grid]
optimizer.bma = ["on", "off"]
"""


def deca_node(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_a_cells_model_is_kept_where_that_is_wanted(tmp_path):
    """A node's, as it is at the end, for what reads Hugging Face folders."""
    from transformers import AutoModelForCausalLM

    file, out = tmp_path / "toy.toml", tmp_path / "out"
    file.write_text(TOY)
    assert deca_node("simulate", file, "-o", out, "--keep-models") == 0
    cells = {path.stem for path in (out / "cells").iterdir()}
    assert {path.name for path in (out / "models").iterdir()} == cells
    base = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    for name in cells:
        model = AutoModelForCausalLM.from_pretrained(out / "models" / name).state_dict()
        assert model.keys() == base.keys()
        changed = {key for key in base if not torch.equal(base[key], model[key])}
        assert changed
        assert all(".layers." in key for key in changed)


def test_a_device_without_memory_ends_an_experiment_with_the_remedy(tmp_path, monkeypatch, capsys):
    """Not as a defect; cells that are done stay."""
    file, out = tmp_path / "toy.toml", tmp_path / "out"
    file.write_text(TOY)
    calls, real = [], trainer.gradient

    def full(*arguments):
        calls.append(None)
        if len(calls) > 3 * 2 * 2:  # nodes, blocks, steps: of the second cell
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0")
        return real(*arguments)

    monkeypatch.setattr(trainer, "gradient", full)
    assert deca_node("simulate", file, "-o", out) == 7
    assert "cpu: out of memory (tried to allocate 2.50 GiB); lower" in capsys.readouterr().err
    assert len(list((out / "cells").iterdir())) == 1


def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """A cell that is done is not done again, one that was under way is begun anew."""
    file, out = tmp_path / "toy.toml", tmp_path / "out"
    file.write_text(TOY)
    run = Laboratory.run
    calls = []

    def interrupted(self, cell, progress, **options):
        calls.append(cell.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(self, cell, progress, **options)

    monkeypatch.setattr(Laboratory, "run", interrupted)
    assert deca_node("simulate", file, "-o", out) == 130
    (first,) = (out / "cells").iterdir()
    content = first.read_bytes()
    assert deca_node("simulate", file, "-o", out) == 0
    assert "1 of 2 cells are done already" in capsys.readouterr().out
    assert len(calls) == 3
    assert calls[1] == calls[2]
    assert first.read_bytes() == content
    assert len(list((out / "cells").iterdir())) == 2

    file.write_text(TOY.replace("seeds = [0]", "seeds = [0, 1]"))
    assert deca_node("simulate", file, "-o", out) == 0
    assert len(list((out / "cells").iterdir())) == 4
    rows = read_cell(first)
    assert [row["kind"] for row in rows].count("step") == 3 * 2 * 2
    assert [row["kind"] for row in rows].count("node") == 3
    assert rows[-1]["finished"] == 3
    assert 0 <= rows[-1]["test_accuracy_worst"] <= rows[-1]["test_accuracy"] <= 1

    check_report(out, capsys)
    check_refusals(file, out, capsys)


def test_results_can_be_shown_to_others(tmp_path):
    """No cell says where on this machine it was made."""
    (tmp_path / "toy.toml").write_text(TOY)
    assert deca_node("simulate", tmp_path / "toy.toml", "-o", tmp_path / "out") == 0
    for cell in (tmp_path / "out" / "cells").iterdir():
        settings = read_cell(cell)[0]["settings"]
        assert (settings["model"]["path"], settings["data"]["train"]) == ("model", "data.jsonl")
        for place in (tmp_path, Path.home()):
            assert str(place) not in cell.read_text()


def test_of_a_cell_that_is_done_nothing_stays_in_memory(tmp_path, monkeypatch):
    """Not even until Python looks for cycles by itself, which may be cells later."""
    run, left = Laboratory.run, []

    def counted(self, cell, progress, **options):
        left.append(sum(isinstance(each, SimulatedNode) for each in gc.get_objects()))
        run(self, cell, progress, **options)

    monkeypatch.setattr(Laboratory, "run", counted)
    (tmp_path / "toy.toml").write_text(TOY.replace("seeds = [0]", "seeds = [0, 1]"))
    gc.collect()
    assert deca_node("simulate", tmp_path / "toy.toml", "-o", tmp_path / "out") == 0
    assert left == [0] * 4


DIVERGING = TOY.partition("[grid]")[0].replace("steps = 2", "steps = 12")
DIVERGING += '[topology]\nkind = "full"\n[faults]\nattacks = { node-0 = 1e6 }\n'


def test_a_cell_that_diverges_is_kept_and_told(tmp_path, capsys):
    """Null where JSON has no number, null for means over it, and a column that says how many."""
    (tmp_path / "toy.toml").write_text(DIVERGING)
    out = tmp_path / "out"
    assert deca_node("simulate", tmp_path / "toy.toml", "-o", out) == 0
    (cell,) = (out / "cells").iterdir()
    rows = read_cell(cell)
    last = rows[-1]
    assert [row for row in rows if row["kind"] == "step" and row["loss"] is None]
    assert last["diverged"] == 2
    assert last["loss"] is None
    assert last.get("test_loss") is None
    assert deca_node("report", out) == 0
    assert "diverged nodes" in (out / "report.md").read_text()


def test_settings_that_mean_something_else_by_now_are_another_experiment(tmp_path, capsys):
    """As after another version has changed a default: what is there is not mixed with new cells."""
    file, out = tmp_path / "toy.toml", tmp_path / "out"
    file.write_text(TOY)
    assert deca_node("simulate", file, "-o", out) == 0
    cell = min((out / "cells").iterdir())
    cell.write_text(cell.read_text().replace('"discrepancy": "l2"', '"discrepancy": "lr"'))
    capsys.readouterr()
    assert deca_node("simulate", file, "-o", out) == 8
    error = capsys.readouterr().err
    assert 'was made with optimizer.discrepancy = "lr", which is now "l2"' in error


def test_a_rehearsal_that_was_refused_is_made_anew(tmp_path):
    """What its first try had made may be for other settings."""
    file, out = tmp_path / "toy.toml", tmp_path / "out"
    wrong = TOY.replace("steps = 2", "steps = 2\nlayers_per_block = 3")
    file.write_text(wrong)
    assert deca_node("simulate", file, "-o", out) == 2
    file.write_text(wrong.replace("layers = 2", "layers = 3"))
    assert deca_node("simulate", file, "-o", out) == 0


@pytest.mark.parametrize("name", ["data.jsonl", "model/model.safetensors"])
def test_a_users_own_data_and_model_are_never_replaced(tmp_path, capsys, name):
    """They have the names of what a rehearsal makes, in a folder that no simulation has marked."""
    file, mine = tmp_path / "toy.toml", tmp_path / "mine"
    file.write_text(TOY)
    path = mine / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the only copy")
    assert deca_node("simulate", file, "-o", mine) == 8
    assert f"holds other files ({name.split('/')[0]})" in capsys.readouterr().err
    assert [p for p in mine.rglob("*") if p.is_file()] == [path]
    assert path.read_bytes() == b"the only copy"


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (
            'schedule.layers_per_block = [2]\nschedule.order = ["ascending", "descending"]\n',
            "'schedule.order': 'ascending'} and .*'schedule.order': 'descending'} are the same run",
        ),
        ('experiment.greetings = ["auto", "everybody"]\n', "are the same run"),
        ('optimizer.bma = ["on"]\n[[grid]]\noptimizer.discrepancy = ["l2"]\n', "are the same"),
    ],
)
def test_a_grid_with_the_same_run_twice_is_refused(tmp_path, capsys, grid, words):
    """As two orders of one block: the differences of such cells would be nothing's."""
    file = tmp_path / "toy.toml"
    file.write_text(TOY.partition("[grid]")[0] + "[[grid]]\n" + grid)
    assert deca_node("simulate", file, "-o", tmp_path / "out") == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out" / "cells").exists()


def test_orders_of_several_blocks_are_different_runs(tmp_path):
    """Also beside a granularity at which there is one block, in one order."""
    file = tmp_path / "toy.toml"
    text = TOY.partition("[grid]")[0] + "[[grid]]\nschedule.layers_per_block = [2]\n"
    text += '[[grid]]\nschedule.order = ["ascending", "descending"]\n'
    file.write_text(text)
    assert deca_node("simulate", file, "-o", tmp_path / "out") == 0


def test_cells_that_trained_on_their_tests_twins_take_no_others_beside_them(tmp_path, capsys):
    """Results of a version that did not look for twins belong to another experiment."""
    lines = [{"text": f"a b {n // 2}", "label": "xy"[n // 2 % 2]} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_model(tmp_path / "model")
    file, out = tmp_path / "own.toml", tmp_path / "out"
    file.write_text(
        'model.path = "model"\ndata.train = "data.jsonl"\nschedule.rounds = 1\n'
        "schedule.steps = 1\nexperiment.nodes = 2\npartition.test_per_label = 3\n"
    )
    assert deca_node("simulate", file, "-o", out) == 0
    path = out / "experiment.json"
    tree = json.loads(path.read_text())
    assert tree["identity"].pop("split (content)") == "without twins of test rows, in tokens"
    path.write_text(json.dumps(tree))
    assert deca_node("simulate", file, "-o", out) == 8
    assert "split (content) is unset there" in capsys.readouterr().err


SHARDED = """
model.path = "model"
partition.shards = "shards"
data.test = "test.jsonl"
schedule.rounds = 1
schedule.steps = 1
grid.experiment.nodes = [2]
"""


@pytest.fixture
def sharded(tmp_path):
    """An experiment file over two of four ready shards."""
    make_model(tmp_path / "model", layers=1)
    (tmp_path / "shards").mkdir()
    for node in range(4):
        lines = [{"text": f"a b {node} {n}", "label": "xy"[n % 2]} for n in range(6)]
        path = tmp_path / "shards" / f"node-{node}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(path, tmp_path / "test.jsonl")
    file = tmp_path / "own.toml"
    file.write_text(SHARDED)
    return file


def test_more_nodes_with_ready_shards_are_the_same_experiment(sharded, tmp_path, capsys):
    """As more of any value are; also for a report elsewhere. Another shard is named."""
    out, shown = tmp_path / "out", tmp_path / "shown"
    assert deca_node("simulate", sharded, "-o", out) == 0
    assert deca_node("report", out, "--to", shown) == 0
    sharded.write_text(SHARDED.replace("[2]", "[2, 4]"))
    assert deca_node("simulate", sharded, "-o", out) == 0
    assert "1 of 2 cells are done already" in capsys.readouterr().out
    assert deca_node("report", out, "--to", shown) == 0
    sharded.write_text(SHARDED)
    assert deca_node("simulate", sharded, "-o", out) == 0
    sharded.write_text(SHARDED.replace("[2]", "[4]"))
    for name, said in (
        ("shards/node-3", "shard node-3.jsonl (content)"),
        ("test", "test (content)"),
    ):
        path = tmp_path / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(before.replace("a b", "a c"))
        assert deca_node("simulate", sharded, "-o", out) == 8
        assert f"holds another experiment ({said} is" in capsys.readouterr().err
        path.write_text(before)


@pytest.mark.parametrize("recorded", [2, 3])
def test_a_folder_with_one_digest_of_all_shards_is_gone_on_with(sharded, tmp_path, recorded):
    """Earlier versions wrote one, of the shards of as many nodes as the grid had at most."""
    out = tmp_path / "out"
    assert deca_node("simulate", sharded, "-o", out) == 0
    path = out / "experiment.json"
    tree = json.loads(path.read_text())
    rows = [read_rows(tmp_path / "shards" / f"node-{node}.jsonl") for node in range(4)]
    earlier = [[digest(each) for each in rows[:recorded]], rows[3]]
    for key in ("shards (content)", "test (content)"):
        del tree["identity"][key]
    tree["identity"]["data (content)"] = digest(earlier)
    path.write_text(json.dumps(tree))
    sharded.write_text(SHARDED.replace("[2]", "[2, 4]"))
    assert deca_node("simulate", sharded, "-o", out) == 0
    assert len(json.loads(path.read_text())["identity"]["shards (content)"]) == 4
    tree["identity"]["data (content)"] = digest([])
    path.write_text(json.dumps(tree))
    assert deca_node("simulate", sharded, "-o", out) == 8


def digest(tree):
    return xxhash.xxh3_128_hexdigest(json.dumps(tree, sort_keys=True, default=str).encode())


def test_a_row_without_a_label_is_named(tmp_path, capsys):
    """With its file and its own number."""
    lines = [{"text": f"a b {n}", "label": "x" if n % 2 else "y"} for n in range(30)]
    del lines[7]["label"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_model(tmp_path / "model")
    (tmp_path / "own.toml").write_text(
        'model.path = "model"\ndata.train = "data.jsonl"\nexperiment.nodes = 2\n'
    )
    assert deca_node("simulate", tmp_path / "own.toml", "-o", tmp_path / "out") == 4
    assert "data.jsonl, row 8: no field 'label'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "change", "code", "said"),
    [
        ("gpt2", {"n_positions": 12}, 2, "own.toml: data.max_tokens: the longest example has 22"),
        ("llama", {"vocab_size": 264}, 5, "its embedding has 264 rows"),
        ("llama", {"max_position_embeddings": 12}, 0, "was made for 12: beyond"),
    ],
)
def test_rows_that_the_model_cannot_take(tmp_path, capsys, family, change, code, said):
    """That is the end, before the first cell; what may merely do harm is said once."""
    lines = [{"text": f"0123456789 {n}", "label": "g" if n % 2 else "h"} for n in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_model(tmp_path / "model", family, **change)
    (tmp_path / "own.toml").write_text(
        'model.path = "model"\ndata.train = "data.jsonl"\nexperiment.nodes = 2\n'
        "schedule.rounds = 1\nschedule.steps = 1\nexperiment.seeds = [0, 1]\n"
        "grid.data.max_tokens = [12, 64]\n"
    )
    assert deca_node("simulate", tmp_path / "own.toml", "-o", tmp_path / "out") == code
    assert capsys.readouterr().err.count(said) == 1
    assert (tmp_path / "out" / "cells").exists() == (code == 0)


def check_report(out, capsys):
    assert deca_node("report", out) == 0
    text = (out / "report.md").read_text()
    assert "| bma | seeds | before | accuracy |" in text
    table, _, rest = text.partition("Differences from bma on, seed by seed")
    assert (table.count("\n| o"), rest.count("\n| o")) == (2, 1)
    assert {"loss.png", "loss.svg", "disagreement.png"} <= {p.name for p in out.iterdir()}
    lines = (out / "curves.csv").read_text().splitlines()
    assert lines[0] == "optimizer.bma,step,loss,loss_std,disagreement,disagreement_std"
    assert len(lines) == 1 + 2 * 4
    assert len((out / "table.csv").read_text().splitlines()) == 1 + 4
    svg = (out / "loss.svg").read_bytes()
    assert deca_node("report", out) == 0
    assert (out / "loss.svg").read_bytes() == svg


def check_refusals(file, out, capsys):
    """Another experiment's folder, or somebody else's: one line, exit code 8, nothing changed."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    file.write_text(TOY.replace("steps = 2", "steps = 3"))
    assert deca_node("simulate", file, "-o", out) == 8
    error = capsys.readouterr().err
    assert "holds another experiment (schedule.steps is 2 there, 3 here)" in error
    assert error.count("\n") == 1
    file.write_text(TOY.replace('name = "toy"', 'name = "toy"\nschedule = 3'))
    assert deca_node("simulate", file, "-o", out) == 2
    capsys.readouterr()
    file.write_text(TOY + "schedule.layers_per_block = [1, 3]\n")
    assert deca_node("simulate", file, "-o", out) == 2
    assert "layers_per_block = 3: the model has 2 layers" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    strange = out.parent / "mine"
    strange.mkdir()
    (strange / "letter.txt").write_text("dear")
    assert deca_node("simulate", file, "-o", strange) == 8
    assert [p.name for p in strange.iterdir()] == ["letter.txt"]
    assert deca_node("report", strange) == 8
    other = out.parent / "other"
    other.mkdir()
    (other / "experiment.json").write_text("{}")
    capsys.readouterr()
    assert deca_node("report", out, "--to", other) == 8
    assert "holds another experiment's results" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["experiment.json"]


def test_a_damaged_cell_is_named_and_kept(tmp_path):
    """Nothing is overwritten, and nothing counted that cannot be read."""
    (tmp_path / "cell.jsonl").write_text('{"kind": "cell"}\n{"kind": "st')
    with pytest.raises(OutputError, match="damaged"):
        read_cell(tmp_path / "cell.jsonl")


QUICK = """
[experiment]
name = "quick"
nodes = 6
[rehearsal]
rows = 240
layers = 2
hidden = 32
[partition]
test_per_label = 10
[schedule]
rounds = 1
steps = 8
[grid]
optimizer.bma = ["on", "off"]
"""


def test_the_correction_from_the_mix_keeps_nodes_together_in_small(tmp_path):
    """What the ablation shows, with a wide margin: far less disagreement, and it learns."""
    (tmp_path / "quick.toml").write_text(QUICK)
    assert deca_node("simulate", tmp_path / "quick.toml", "-o", tmp_path / "out") == 0
    cells = [read_cell(path) for path in (tmp_path / "out" / "cells").iterdir()]
    last = {cell[0]["values"]["optimizer.bma"]: cell[-1] for cell in cells}
    assert 2 * last["on"]["disagreement"] < last["off"]["disagreement"]
    for one in last.values():
        assert one["test_loss"] < one["before_loss"] - 0.5
