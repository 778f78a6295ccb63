"""Every method on real tiny models: against dense references, resumed, exported, refused."""

import importlib.util
import json
import math

import numpy as np
import pytest
import structlog
import torch
from safetensors.torch import load_file

from deca_node import estimate, houlsby, trainer
from deca_node.batches import Example, collate
from deca_node.blocks import Visit
from deca_node.config import load
from deca_node.errors import ConfigError, DeviceError, ModelError
from deca_node.export import export
from deca_node.fingerprint import schedule_for
from deca_node.houlsby import Houlsby
from deca_node.lora import Lora
from deca_node.methods.choose import added, build, prepare, state_bytes
from deca_node.models import LanguageModel, outline
from deca_node.node import Node
from deca_node.wire import Receiver
from tests import oracle_methods
from tests.edges.test_node import settings as node_settings
from tests.mps import Mps
from tests.tiny import make_model

NODES, STEPS, LAYERS, RATE = 3, 4, 3, 2e-3
VISIT = Visit(0, 0, 0, 0, range(LAYERS))
NAMES = [f"n{i}" for i in range(NODES)]
# A path: the two ends do not know each other, so the weights differ.
W = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the extra [lora] is not installed"
)
LORA = "dec-lora", "decaf"


def chosen(method, *more):
    """A parameter: a method with settings, left out where its extra is missing."""
    return pytest.param((method, *more), marks=needs_peft if method in LORA else ())


ALL = [chosen(m) for m in ("deca", *LORA, "dec-adapter", "dsgd", "dadam", "qg-adam")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("methods") / "model", "llama", layers=LAYERS)


def settings_of(folder, choice, name="n0"):
    method, *more = choice
    adam = () if method == "dsgd" else ("optimizer.adam_eps=1e-4",)
    layers = (f"schedule.layers_per_block={LAYERS}",) if method == "deca" else ()
    return load(
        None,
        [
            f"run.method={method}",
            f"node.name={name}",
            f"model.path={folder}",
            "data.train=unused",
            f"optimizer.learning_rate={RATE}",
            *(*adam, *layers, *more),
        ],
    )


def make(folder, choice, name="n0", dtype="fp32"):
    settings = settings_of(folder, (*choice, f"model.dtype={dtype}"), name)
    model = LanguageModel.load(settings.model, torch.device("cpu"))
    prepare(settings, model)
    return build(settings, model, settings.node.name), model


def batch(node, step):
    ids = [(7 * node + 3 * step + i) % 200 + 10 for i in range(12)]
    return collate([Example(ids, [i > 5 for i in range(12)])], 0)


def exchange(methods, serial):
    """Publish, and let every neighbour take what it accepts."""
    published = {name: m.outgoing(serial) for name, m in methods.items()}
    for i, method in enumerate(methods.values()):
        for j, peer in enumerate(methods):
            if i == j or not W[i, j]:
                continue
            receiver = Receiver(method.layout, serial, "deca", peer)
            sink = method.intake(peer)
            for message in published[peer].messages:
                arrived = receiver.feed(message)
                if arrived is not None:
                    sink(*arrived, W[i, j])


def one_step(methods, step, *, fresh=True):
    for node, method in enumerate(methods.values()):
        method.gradient(batch(node, step if fresh else 0))
        method.advance(step)
    if all(method.exchanges(step) for method in methods.values()):
        exchange(methods, step)
    return [method.settle(step) for method in methods.values()]


@pytest.mark.parametrize(
    "choice",
    [
        chosen("dsgd"),
        chosen("dadam"),
        chosen("qg-adam"),
        chosen("qg-adam", "quasi_global.first_moment=local"),
        chosen("dec-adapter", "adapter.width=5"),
        chosen("dec-lora", "lora.rank=3"),
        chosen("dec-lora", "lora.rank=3", "lora.local_steps=2"),
        chosen("decaf", "lora.rank=3"),
        chosen("decaf", "lora.rank=3", "lora.local_steps=2"),
    ],
    ids=" ".join,
)
def test_a_visit_equals_the_dense_reference(folder, choice):
    """Three nodes on a path: gradient, update, messages, mix and what follows."""
    methods = {name: make(folder, choice, name)[0] for name in NAMES}
    for method in methods.values():
        method.open(VISIT, None)
    starts = [method.state()["x"].clone() for method in methods.values()]
    assert all(torch.equal(start, starts[0]) for start in starts)
    judge, model = make(folder, choice)
    judge.open(VISIT, None)
    shapes = [spec.shape for spec in judge.layout.tensors]
    apart = [[s.disagreement for s in one_step(methods, step)] for step in range(STEPS)]
    every = next((int(s[-1]) for s in choice if s.startswith("lora.local_steps")), 1)
    assert [all(row) for row in apart] == [(step + 1) % every == 0 for step in range(STEPS)]

    def gradient(client, step, x):
        block = judge._active
        block.master.copy_(torch.from_numpy(x))
        trainer.gradient(model, block, batch(client, step))
        values = torch.cat([part.flatten() for _, part in block.gradients()]).double().numpy()
        block.drop_gradients()
        return values

    x = np.tile(starts[0].double().numpy(), (NODES, 1))
    pairs = list(zip(shapes[::2], shapes[1::2], strict=False))
    name, *_ = choice
    if name == "dsgd":
        expected = oracle_methods.dsgd(x, gradient, W, STEPS, RATE)
    elif name == "qg-adam":
        first = "local" if len(choice) > 1 else "quasi-global"
        expected = oracle_methods.qg_adam(x, gradient, W, STEPS, RATE, 1e-4, first)
    elif name == "decaf":
        expected = oracle_methods.decaf(x, gradient, W, STEPS, RATE, 1e-4, pairs, every)
    else:
        expected = oracle_methods.dadam(x, gradient, W, STEPS, RATE, 1e-4, every)
    moved = 0.0
    for row, start, method in zip(expected, starts, methods.values(), strict=True):
        found = method.state()["x"].double().numpy()
        if name == "decaf":  # factors are determined up to signs
            for one, other in zip(
                *(oracle_methods.products(each, pairs) for each in (found, row)), strict=True
            ):
                # Where the last kept singular value is close to the first dropped one, rounding
                # is amplified: 2e-4 of the product was seen on one processor, 1e-5 on another.
                assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other)
                moved = max(moved, float(np.abs(one).max()))
        else:
            np.testing.assert_allclose(found, row, rtol=1e-5, atol=1e-5)
            moved = max(moved, float(np.abs(found - start.numpy()).max()))
    assert moved > 1e-4


@pytest.mark.parametrize("choice", ALL, ids=" ".join)
def test_the_disagreement_is_what_the_mix_has_changed(folder, choice):
    """Its norm over the block; over products where factors are mixed together."""
    methods = {name: make(folder, choice, name)[0] for name in NAMES}
    for node, method in enumerate(methods.values()):
        method.open(VISIT, None)
        method.gradient(batch(node, 0))
        method.advance(0)
    halves = [method.state()["x"].double().numpy().copy() for method in methods.values()]
    exchange(methods, 0)
    for half, method in zip(halves, methods.values(), strict=True):
        settled, mixed = method.settle(0), method.state()["x"].double().numpy()
        shapes = [spec.shape for spec in method.layout.tensors]
        if choice[0] == "decaf":
            pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
            before, after = (oracle_methods.products(x, pairs) for x in (half, mixed))
            changed = np.concatenate([(a - b).ravel() for a, b in zip(after, before, strict=True)])
        else:
            changed = mixed - half
        assert settled.disagreement == pytest.approx(np.linalg.norm(changed), rel=1e-3)


@pytest.mark.parametrize("choice", ALL, ids=" ".join)
def test_a_visit_continues_from_its_saved_state(folder, choice):
    """Three steps, save, three more in another process's place: bit for bit the same as six."""
    choice = (*choice, "lora.local_steps=2") if choice[0] in LORA else choice
    whole = {name: make(folder, choice, name)[0] for name in NAMES}
    first = {name: make(folder, choice, name)[0] for name in NAMES}
    for method in (*whole.values(), *first.values()):
        method.open(VISIT, None)
    for step in range(6):
        one_step(whole, step)
    for step in range(3):
        one_step(first, step)
    second = {}
    for name, method in first.items():
        second[name], _ = make(folder, choice, name)
        second[name].open(VISIT, {key: t.clone() for key, t in method.state().items()})
    for step in range(3, 6):
        one_step(second, step)
    for one, other in zip(whole.values(), second.values(), strict=True):
        assert one.state().keys() == other.state().keys()
        for key, tensor in one.state().items():
            assert torch.equal(tensor, other.state()[key]), key


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("choice", ALL, ids=" ".join)
def test_low_precision_weights_are_trained_too(folder, choice, dtype):
    """What is sent is fp32 and finite, the gradient about that of fp32, and the model moves."""
    method, model = make(folder, choice, dtype=dtype)
    exact, _ = make(folder, choice)
    before = model.loss(batch(0, 0)).item()
    for each in (method, exact):
        each.open(VISIT, None)
    found = method.gradient(batch(0, 0))
    assert found.gradient_norm == pytest.approx(exact.gradient(batch(0, 0)).gradient_norm, rel=0.1)
    for step in range(8):
        method.gradient(batch(0, 0))
        method.advance(step)
        method.settle(step)
    assert method.state()["x"].dtype == torch.float32
    if choice[0] != "dsgd":  # whose steps at this rate are below the weights' precision
        assert model.loss(batch(0, 0)).item() < before


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A model whose frozen head can say something: the embeddings are not near 0."""
    folder = tmp_path_factory.mktemp("talkative") / "model"
    return make_model(folder, "llama", layers=LAYERS, initializer_range=0.2)


@pytest.mark.parametrize(
    "choice",
    [
        chosen("deca", "optimizer.learning_rate=3e-3"),
        chosen("deca", "optimizer.learning_rate=3e-3", "optimizer.bma=off"),
        chosen("deca", "optimizer.learning_rate=3e-3", "optimizer.bma=trivial"),
        chosen("dec-lora", "optimizer.learning_rate=3e-2"),
        chosen("dec-lora", "optimizer.learning_rate=3e-2", "lora.local_steps=4"),
        chosen("decaf", "optimizer.learning_rate=3e-2"),
        chosen("decaf", "optimizer.learning_rate=3e-2", "lora.split=a"),
        chosen("dec-adapter", "optimizer.learning_rate=3e-2"),
        chosen("dsgd", "optimizer.learning_rate=0.3"),
        chosen("dadam", "optimizer.learning_rate=3e-3"),
        chosen("qg-adam", "optimizer.learning_rate=3e-3"),
        chosen("qg-adam", "optimizer.learning_rate=3e-3", "quasi_global.first_moment=local"),
    ],
    ids=" ".join,
)
def test_it_learns(talkative, choice):
    """Three nodes with other data each: every node learns all of it."""
    made = {name: make(talkative, choice, name) for name in NAMES}

    def losses():
        with torch.no_grad():
            return [
                np.mean([model.loss(batch(node, 0)).item() for node in range(NODES)])
                for _, model in made.values()
            ]

    before = losses()
    methods = {name: method for name, (method, _) in made.items()}
    for method in methods.values():
        method.open(VISIT, None)
    for step in range(40):
        one_step(methods, step, fresh=False)
    after = losses()
    assert all(end < 0.4 * start for start, end in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "choice",
    [
        chosen("dec-lora", 'lora.targets=["q_proj", "down_proj"]'),
        chosen("decaf"),
        chosen("dec-adapter", "adapter.width=7"),
        chosen("dsgd"),
        chosen("dadam"),
        chosen("qg-adam"),
    ],
    ids=" ".join,
)
def test_what_is_estimated_is_what_there_is(folder, choice, dtype):
    """Parameters, master, gradient and optimizer state of a method, to the byte."""
    settings = settings_of(folder, (*choice, f"model.dtype={dtype}"))
    seen = outline(settings.model)
    element = 4 if dtype == "fp32" else 2
    blocks = schedule_for(settings, LAYERS).blocks
    work = estimate.Work(
        *(blocks, element, 1, 12, 6), added=added(settings, seen), state=state_bytes(settings)
    )
    need = estimate.memory(seen.shape, work)
    method, _ = make(folder, choice, dtype=dtype)
    method.open(VISIT, None)
    method.gradient(batch(0, 0))
    gradients = sum(p.grad.nbytes for _, p in method._active._parameters)
    assert method.layout.numel == work.trained_at_once(seen.shape)
    assert gradients == need.gradient
    method.advance(0)
    state = {name: t for name, t in method.state().items() if t.numel() == method.layout.numel}
    x = state.pop("x")
    copies = [method._before] if choice[0] == "qg-adam" else []
    assert sum(t.nbytes for t in (*state.values(), *copies)) == need.moments
    assert (work.added is None and dtype == "fp32") or x.nbytes == need.master


# LoRA


@needs_peft
def test_what_comes_in_part_leaves_its_weight_with_the_node(folder):
    """DeCAF uses a neighbour's factors whole or not at all; who gets nothing keeps its own."""
    methods = {name: make(folder, ("decaf", "lora.rank=2"), name)[0] for name in NAMES}
    for node, method in enumerate(methods.values()):
        method.open(VISIT, None)
        method.gradient(batch(node, 0))
        method.advance(0)
    before = [method.state()["x"].clone() for method in methods.values()]
    ends, middle = (methods["n0"], methods["n2"]), methods["n1"]
    for peer, method in (("n1", ends[0]), ("n1", ends[1]), ("n0", middle), ("n2", middle)):
        sink = method.intake(peer)
        values = methods[peer].state()["x"]
        half = values.numel() // 2
        sink(0, values[:half], 1 / 3)
        if peer == "n2":
            sink(half, values[half:], 1 / 3)
    for method in methods.values():
        method.settle(0)
    assert torch.equal(methods["n0"].state()["x"], before[0])
    assert int(methods["n0"].state()["age"]) == 1
    assert int(middle.state()["age"]) == 0
    assert not middle.state()["m"].any()
    pairs = [spec.shape for spec in middle.layout.tensors]
    pairs = list(zip(pairs[::2], pairs[1::2], strict=True))
    own, other, found = (
        oracle_methods.products(x.double().numpy(), pairs)
        for x in (before[1], before[2], middle.state()["x"])
    )
    for one, two, result in zip(own, other, found, strict=True):
        u, s, vt = np.linalg.svd(2 / 3 * one + 1 / 3 * two)
        np.testing.assert_allclose(result, u[:, :2] * s[:2] @ vt[:2], rtol=1e-3, atol=1e-6)


@needs_peft
def test_factors_of_nothing_are_left_alone(folder):
    """A round in which no node has learned yet must not end the learning."""
    methods = {name: make(folder, ("decaf",), name)[0] for name in NAMES}
    for method in methods.values():
        method.open(VISIT, None)
    before = methods["n1"].state()["x"].clone()
    exchange(methods, 0)
    for method in methods.values():
        assert method.settle(0).disagreement == 0
        assert torch.equal(method.state()["x"], before)


@needs_peft
def test_factors_on_a_device_without_float64_are_mixed_as_on_the_cpu(folder):
    """MPS; it has no QR either."""
    after = []
    for kind in (torch.Tensor, Mps):
        mine, other = (make(folder, ("decaf",), name)[0] for name in NAMES[:2])
        for node, method in enumerate((mine, other)):
            method.open(VISIT, None)
            method.gradient(batch(node, 0))
            method.advance(0)
        mine.intake("n1")(0, other.state()["x"].clone(), 0.5)
        mine._active.master = mine._active.master.as_subclass(kind)
        settled = mine.settle(0)
        assert settled.disagreement > 0
        after.append(mine._active.master.as_subclass(torch.Tensor))
    assert torch.equal(*after)


@needs_peft
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_factors_whose_product_is_no_number_leave_a_matrix_its_own(folder, size):
    """Each number of theirs is a float32; the matrices that they came well for are mixed."""
    mine, other = (make(folder, ("decaf",), name)[0] for name in NAMES[:2])
    for node, method in enumerate((mine, other)):
        method.open(VISIT, None)
        method.gradient(batch(node, 0))
        method.advance(0)
    before, values = mine.state()["x"].clone(), other.state()["x"].clone()
    first = sum(spec.numel for spec in mine.layout.tensors[:2])  # of one matrix: A and B
    values[:first] = size
    mine.intake("n1")(0, values, 0.5)
    settled = mine.settle(0)
    after = mine.state()["x"]
    assert torch.equal(after[:first], before[:first])
    assert bool(after.isfinite().all())
    assert 0 < settled.disagreement < math.inf
    assert not torch.equal(after[first:], before[first:])


@needs_peft
def test_the_start_depends_on_the_seed_alone(folder):
    """A is random and B zero, so that the model is at first what it was."""
    base = LanguageModel.load(settings_of(folder, ("deca",)).model, torch.device("cpu"))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    _, model = make(folder, ("dec-lora", "run.seed=1"))
    assert torch.equal(torch.random.get_rng_state(), state)
    _, same = make(folder, ("dec-lora", "run.seed=1"))
    _, other = make(folder, ("dec-lora", "run.seed=2"))
    parts = [each.block_tensors(range(LAYERS)) for each in (model, same, other)]
    for name, tensor in parts[0].items():
        assert torch.equal(tensor, parts[1][name])
        assert tensor.any() == name.endswith("lora_A.weight")
        assert torch.equal(tensor, parts[2][name]) == name.endswith("lora_B.weight")
    assert torch.equal(model.loss(batch(0, 0)), base.loss(batch(0, 0)))


@needs_peft
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen2", "phi3", "gpt_neox", "falcon", "deepseek_v3"]
)
def test_only_adapters_are_trained_in_any_architecture(tmp_path, family):
    """All linear layers by default; GPT-2's matrices lie the other way round.

    Falcon's are of an own class, and peft knows DeepSeek's by other names.
    """
    folder = make_model(tmp_path / "model", family, layers=LAYERS)
    method, model = make(folder, ("dec-lora", "lora.rank=4"))
    frozen = {n: p.clone() for n, p in model.module.named_parameters() if "lora_" not in n}
    before = model.loss(batch(0, 0)).item()
    method.open(VISIT, None)
    for step in range(4):
        method.gradient(batch(0, 0))
        method.advance(step)
        method.settle(step)
    names = dict(model.module.named_parameters())
    assert all(torch.equal(names[name], value) for name, value in frozen.items())
    assert all(value.any() for name, value in names.items() if "lora_B" in name)
    assert model.loss(batch(0, 0)).item() < before
    method.close()
    model.export(tmp_path / "merged")
    # Exporting changes nothing, and the merged model computes the same.
    assert all(torch.equal(names[name], value) for name, value in frozen.items())
    merged = LanguageModel.load(
        settings_of(tmp_path / "merged", ("deca",)).model, torch.device("cpu")
    )
    torch.testing.assert_close(
        merged.predictions(batch(0, 0))[0], model.predictions(batch(0, 0))[0]
    )
    assert not any("lora" in name for name in merged.module.state_dict())


@needs_peft
def test_an_export_keeps_copies_off_the_device(folder, tmp_path, monkeypatch):
    """Matrices are merged where they are, and put back, also where memory ends meanwhile."""
    method, model = make(folder, ("dec-lora", "lora.rank=4"), dtype="bf16")
    method.open(VISIT, None)
    method.gradient(batch(0, 0))
    method.advance(0)
    method.settle(0)
    method.close()
    frozen = {n: p for n, p in model.module.named_parameters() if "base_layer" in n}
    before = {name: (p.data_ptr(), p.clone()) for name, p in frozen.items()}
    with model._addition.exporting(tmp_path):
        assert all(p.data_ptr() == before[name][0] for name, p in frozen.items())
        assert not all(torch.equal(p, before[name][1]) for name, p in frozen.items())
    assert all(torch.equal(p, before[name][1]) for name, p in frozen.items())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    *_, last = model._addition._layers.values()
    monkeypatch.setattr(last, "merge", full)
    with pytest.raises(DeviceError, match="out: not enough memory to write it; free some"):
        model.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[name][1]) for name, p in frozen.items())
    assert model.module.get_submodule(next(iter(frozen)).removesuffix(".base_layer.weight")) in (
        model._addition._layers.values()
    )


# Adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "openai-gpt"])
def test_adapters_hang_behind_attention_and_feed_forward(tmp_path, family):
    """Two a layer; near the identity at first; exported beside the base model, and read again."""
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "model", family, layers=LAYERS)
    base = LanguageModel.load(settings_of(folder, ("deca",)).model, torch.device("cpu"))
    method, model = make(folder, ("dec-adapter", "adapter.width=5"))
    tensors = model.block_tensors(range(1, 2))
    assert len(tensors) == 8
    assert sum(t.numel() for t in tensors.values()) == 2 * (2 * 32 * 5 + 32 + 5)
    logits = base.predictions(batch(0, 0))[0], model.predictions(batch(0, 0))[0]
    assert 0 < float((logits[0] - logits[1]).abs().max()) < 0.02 * float(logits[0].abs().max())
    method.open(VISIT, None)
    for step in range(3):
        method.gradient(batch(0, 0))
        method.advance(step)
        method.settle(step)
    method.close()
    model.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = batch(0, 0).input_ids
    torch.testing.assert_close(again(ids).logits, base.module(ids).logits)
    houlsby.attach(again, tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, model.module(ids).logits)
    wrong = AutoModelForCausalLM.from_pretrained(
        make_model(tmp_path / "other", family, layers=LAYERS + 1)
    )
    wrong.eval()
    before = wrong(ids).logits
    with pytest.raises(ModelError, match="not the adapters of this model"):
        houlsby.attach(wrong, tmp_path / "out")
    assert torch.equal(wrong(ids).logits, before)


def test_a_model_without_the_two_parts_is_refused():
    """By the layer's class and what it has."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = torch.nn.Linear(4, 4)

    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([Odd()])
    with pytest.raises(ModelError, match=r"Odd: no attention in layer 0, which has mixer; choose"):
        Houlsby(module, "layers", 4, seed=0)


# The daemon's way: state, export, the final folder


@pytest.mark.parametrize("choice", ALL, ids=" ".join)
async def test_a_daemon_runs_it_and_its_folder_exports(tmp_path, choice):
    """What the node wrote is what export makes of its kept blocks, and transformers reads it."""
    from transformers import AutoModelForCausalLM

    chosen = node_settings(tmp_path, f"run.method={choice[0]}", "optimizer.learning_rate=1e-2")
    assert await Node(chosen, structlog.get_logger()).run()
    said = export(chosen, tmp_path / "again", consensus=False)
    assert ("adapters.safetensors" in said) == (choice[0] == "dec-adapter")
    files = "model", *(["adapters"] if choice[0] == "dec-adapter" else [])
    for name in files:
        one, other = (
            load_file(folder / f"{name}.safetensors")
            for folder in (tmp_path / "again", tmp_path / "out" / "model")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    base = load_file(tmp_path / "model" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, written[name])}
    assert bool(changed) == (choice[0] != "dec-adapter")
    assert not any("embed" in name for name in changed)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    # One block but for DECA: the kept file has what was trained, and no more.
    manifest = json.loads((tmp_path / "out" / "state" / "manifest.json").read_text())
    assert len(manifest["blocks"]) == (4 if choice[0] == "deca" else 1)


@needs_peft
def test_without_peft_the_extra_is_named(folder, monkeypatch):
    """In one line, before anything is changed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'deca-node\[lora\]'"):
        make(folder, ("dec-lora",))


@needs_peft
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('lora.targets=["q_porj"]', r"lora\.targets: 'q_porj' matches no .* self_attn\.q_proj"),
        ("lora.rank=33", r"lora\.rank = 33: model\.layers\.0\.self_attn\.q_proj is of 32 × 32"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(folder, setting, words):
    """The culprit and what there is instead."""
    settings = settings_of(folder, ("decaf", setting))
    model = LanguageModel.load(settings.model, torch.device("cpu"))
    with pytest.raises(ConfigError, match=words):
        Lora(model.module, model.stack, settings.lora, 0)


@needs_peft
def test_a_matrix_that_kernels_read_past_its_adapter_is_refused(tmp_path):
    """Mamba's out_proj, which the defaults would take; the targets that are named instead do."""
    folder = make_model(tmp_path / "model", "mamba", layers=LAYERS)
    model = LanguageModel.load(settings_of(folder, ("deca",)).model, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"out_proj of a mamba .* set lora\.targets = "
    ) as refusal:
        added(settings_of(folder, ("dec-lora",)), outline(settings_of(folder, ("deca",)).model))
    targets = str(refusal.value).partition("set ")[2]
    Lora(model.module, model.stack, settings_of(folder, ("dec-lora", targets)).lora, 0)


def test_a_block_of_more_layers_than_the_model_is_refused(folder):
    """Granularity is at most the depth."""
    settings = settings_of(folder, ("deca", "schedule.layers_per_block=4"))
    with pytest.raises(ConfigError, match=r"layers_per_block = 4: the model has 3 layers"):
        schedule_for(settings, LAYERS)
