"""Estimates of memory and disk, held against the tensors of real small models."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from deca_node import estimate
from deca_node.batches import Batch
from deca_node.blocks import Visit, partition_layers
from deca_node.config import ModelSettings
from deca_node.errors import ModelError
from deca_node.estimate import Work
from deca_node.methods.deca import Deca
from deca_node.models import LanguageModel, outline
from deca_node.moments import Rule
from tests.edges.test_models import write_gguf
from tests.tiny import FAMILIES, make_model

LAYERS, HIDDEN = 4, 128
WIDE = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN}
WIDTHS = {"gpt2": {"n_embd": HIDDEN}, "phi3": WIDE, "gpt_neox": WIDE}
BATCH, TOKENS = 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that gives a model's folder, made once."""
    made: dict[str, Path] = {}

    def get(family):
        if family not in made:
            widths = WIDTHS.get(family, {**WIDE, "head_dim": 32})
            place = tmp_path_factory.mktemp(family) / "model"
            made[family] = make_model(place, family, layers=LAYERS, **widths)
        return made[family]

    return get


def open_model(folder, dtype):
    settings = ModelSettings(path=folder, dtype=dtype)
    return LanguageModel.load(settings, torch.device("cpu")), outline(settings)


def batch(trained):
    ids = torch.randint(5, 200, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -trained:] = ids[:, -trained:]
    return Batch(ids, torch.ones_like(ids), labels)


def work(layers_per_block, dtype, trained):
    element = 4 if dtype == "fp32" else 2
    return Work(partition_layers(LAYERS, layers_per_block), element, BATCH, TOKENS, trained)


def nbytes(tensor):
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layers_per_block", [1, 3])
def test_state_of_the_active_block_is_as_measured(folder, dtype, layers_per_block):
    """Weights, master, moments, gradient and snapshot are counted to the byte."""
    model, seen = open_model(folder("llama"), dtype)
    needs = estimate.memory(seen.shape, work(layers_per_block, dtype, 1))
    frozen = sum(map(nbytes, model.module.parameters()))
    assert needs.weights == frozen
    method = Deca(model, Rule(1e-3), "run", "node")
    method.open(Visit(0, 0, 0, 0, range(layers_per_block)), None)
    method.gradient(batch(1))
    block = model._active
    assert needs.gradient == sum(
        nbytes(p.grad) for p in model.module.parameters() if p.grad is not None
    )
    state = method.state()
    assert needs.moments == nbytes(state["m"]) + nbytes(state["v"])
    shared = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    aliased = block.master.untyped_storage().data_ptr() in shared
    assert needs.master == (0 if aliased else nbytes(block.master))
    snapshot = method.outgoing(0)
    size = sum(map(len, snapshot.messages))
    assert size == pytest.approx(needs.snapshots, rel=0.02)  # names and prefixes
    method.close()


@pytest.mark.parametrize("trained", [1, TOKENS - 1])
@pytest.mark.parametrize("layers_per_block", [1, LAYERS])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_bounded_and_not_wildly(folder, family, dtype, layers_per_block, trained):
    """What autograd keeps of a real forward pass is below the estimate, and above a third of it."""
    model, seen = open_model(folder(family), dtype)
    model.activate(range(layers_per_block))
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(batch(trained))
        loss.detach()
    needs = estimate.memory(seen.shape, work(layers_per_block, dtype, trained))
    assert sum(kept.values()) < needs.activations < 3 * sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_the_models(folder, family):
    """Layers, parameters and the digest that peers compare, without reading a weight."""
    model, seen = open_model(folder(family), "fp32")
    assert seen.config_digest == model.config_digest()
    assert seen.shape.parameters == sum(p.numel() for p in model.module.parameters())
    assert len(seen.shape.layers) == model.n_layers
    for index, count in enumerate(seen.shape.layers):
        tensors = model.block_tensors(range(index, index + 1))
        assert count == sum(t.numel() for t in tensors.values())
    assert (seen.shape.hidden, seen.shape.heads) == (HIDDEN, 4)
    assert seen.weight_bytes > 4 * seen.shape.parameters
    assert not seen.to_convert


def test_a_gguf_file_is_outlined_before_and_after_its_conversion(folder, tmp_path):
    """Before it nothing is converted and the digest is unknown; after it all is as loaded."""
    source, _ = open_model(folder("llama"), "fp32")
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file, source)
    settings = ModelSettings(path=file, dtype="fp32", cache=cache)
    before = outline(settings)
    assert before.to_convert
    assert before.config_digest is None
    assert not cache.exists()
    model = LanguageModel.load(settings, torch.device("cpu"))
    after = outline(settings)
    assert not after.to_convert
    assert after.config_digest == model.config_digest()
    assert after.shape == before.shape


def test_missing_files_of_weights_are_named(folder, tmp_path):
    """A download that was cut short is noticed without reading what is there."""
    place = tmp_path / "model"
    shutil.copytree(folder("llama"), place)
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        outline(ModelSettings(path=place))
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (place / "model-1.safetensors").touch()
    with pytest.raises(ModelError, match="1 of its 2 files of weights are missing"):
        outline(ModelSettings(path=place))
