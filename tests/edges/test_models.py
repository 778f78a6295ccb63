"""models against real architectures of transformers, tiny and random."""

import copy
import errno
import json
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from deca_node import sizes
from deca_node.batches import Batch, Example, collate
from deca_node.config import DataSettings, ModelSettings
from deca_node.data import label_token_ids
from deca_node.errors import DeviceError, DiskFullError, ModelError, OutputError
from deca_node.models import DTYPES, LanguageModel, Tokenizer, pick_device, reading
from deca_node.models.tokenizer import tokenizer_digest
from deca_node.models.writing import written_whole
from deca_node.moments import Rule, half_step
from tests.tiny import CHAT_TEMPLATE, FAMILIES, make_model, make_tokenizer

CPU = torch.device("cpu")
TIED = {"llama", "qwen2", "gemma2", "gpt2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model folder of a family, made once; tests only read it."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str = "llama") -> Path:
        path = root / family
        return path if path.exists() else make_model(path, family)

    return get


def load(path: Path, dtype: str = "fp32", **settings: Any) -> LanguageModel:
    return LanguageModel.load(ModelSettings(path=path, dtype=dtype, **settings), CPU)


def some_batch(rows: int = 3) -> Batch:
    """Rows of different lengths, of which the ends are learned."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for row in range(rows):
        size = 6 + 3 * row
        ids = torch.randint(5, 260, (size,), generator=generator).tolist()
        examples.append(Example(ids, [False] * (size - 2 - row) + [True] * (2 + row)))
    return collate(examples, pad_id=0)


def train(model: LanguageModel, layers: range, batch: Batch, steps: int) -> list[float]:
    block = model.activate(layers)
    m, v = torch.zeros_like(block.master), torch.zeros_like(block.master)
    losses = []
    for step in range(steps):
        block.drop_gradients()
        loss = model.loss(batch)
        (loss * block.loss_scale).backward()
        losses.append(loss.item())
        for part, gradient in block.gradients():
            half_step(block.master[part], gradient, m[part], v[part], step, Rule(3e-3))
        block.write_back()
    model.release()
    return losses


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def gradient_of(model: LanguageModel, layers: range, batch: Batch) -> torch.Tensor:
    block = model.activate(layers)
    model.loss(batch).backward()
    return torch.cat([gradient.clone() for _, gradient in block.gradients()])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_trains_and_the_rest_stays(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The stack is found, only its active layers move, and the export is the model."""
    from transformers import AutoModelForCausalLM

    model = load(folder(family))
    assert model.n_layers == 4
    before = state(model)
    losses = train(model, range(1, 3), some_batch(), steps=8)
    assert losses[-1] < losses[0] - 0.05

    names = set(model.block_tensors(range(1, 3)))
    assert names == {n for n, _ in model.module.named_parameters() if ".1." in n or ".2." in n}
    for name, tensor in state(model).items():
        assert torch.equal(tensor, before[name]) == (name not in names), name

    model.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = some_batch()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.module(**inputs).logits)
    for module in (again, model.module):
        tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
        assert tied == (family in TIED)
    assert load(tmp_path / "out").tokenizer.encode("a b") == model.tokenizer.encode("a b")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_transformers(family: str, folder: Callable[[str], Path]) -> None:
    """With and without the LM head cut down to the positions that count."""
    model = load(folder(family))
    batch = some_batch()
    theirs = model.module(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    assert model._keeps_logits
    ours, tokens = model.predictions(batch)
    model._keeps_logits = False
    full, _ = model.predictions(batch)
    assert ours.shape == (2 + 3 + 4, model.module.config.vocab_size)
    assert tokens.tolist() == batch.labels[batch.labels >= 0].tolist()
    torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(batch), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradient(family: str, folder: Callable[[str], Path]) -> None:
    """Layers from the active one up run twice, those below once."""
    batch = some_batch()
    expected = gradient_of(load(folder(family)), range(1, 2), batch)
    model = load(folder(family), gradient_checkpointing=True)
    runs = [0] * model.n_layers
    for index, layer in enumerate(model.module.get_submodule(model.stack)):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        next(layer.children()).register_forward_hook(count)
    gradient = gradient_of(model, range(1, 2), batch)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert runs == [1, 2, 2, 2]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_master_and_parameters_agree(
    dtype: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The master is fp32 and the parameters are its views, or its rounded copies."""
    model = load(folder("llama"), dtype)
    kind = DTYPES[dtype]
    before = state(model)
    block = model.activate(range(2, 4))
    assert block.layout.numel == block.master.numel()
    assert block.master.dtype == torch.float32
    order = [name for name in before if ".2." in name or ".3." in name]
    assert [spec.name for spec in block.layout.tensors] == order
    flat = torch.cat([before[name].reshape(-1) for name in order])
    assert torch.equal(block.master, flat.float())

    block.master.mul_(1.01)
    block.write_back()
    after = model.block_tensors(range(2, 4))
    assert torch.equal(torch.cat([t.reshape(-1) for t in after.values()]), block.master.to(kind))
    homes = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    assert (homes == {block.master.untyped_storage().data_ptr()}) == (dtype == "fp32")

    model.export(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {kind}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_trains(dtype: str, folder: Callable[[str], Path]) -> None:
    losses = train(load(folder("llama"), dtype), range(1, 2), some_batch(), steps=8)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_resumes_from_a_prefix_bit_for_bit(
    family: str, checkpointing: bool, folder: Callable[[str], Path]
) -> None:
    """The same loss and gradient as from a whole pass; layers below do not run again."""
    batch = some_batch()
    whole = load(folder(family), gradient_checkpointing=checkpointing)
    model = load(folder(family), gradient_checkpointing=checkpointing)
    runs = [0] * model.n_layers
    for index, layer in enumerate(model.module.get_submodule(model.stack)):

        def count(*_: Any, index: int = index, **__: Any) -> None:
            runs[index] += 1

        next(layer.children()).register_forward_pre_hook(count)
    for depth in range(1, model.n_layers):
        expected = gradient_of(whole, range(depth, depth + 1), batch)
        prefix = model.prefix(batch, depth, lambda: False)
        assert prefix is not None
        assert model.resumes_exactly(prefix)
        runs[:] = [0] * model.n_layers
        block = model.activate(range(depth, depth + 1))
        loss = model.loss(batch, prefix)
        assert runs[:depth] == [0] * depth
        assert min(runs[depth:]) == 1
        assert torch.equal(loss, whole.loss(batch))
        loss.backward()
        assert torch.equal(torch.cat([each for _, each in block.gradients()]), expected)
        # Nothing is left behind: a whole pass is one again.
        assert torch.equal(model.loss(batch), whole.loss(batch))
        model.release()
        whole.release()


def test_a_prefix_can_be_given_up(folder: Callable[[str], Path]) -> None:
    """Between two layers, leaving no trace; a depth that the model has not is an error."""
    model = load(folder("llama"))
    batch = some_batch()
    before = model.loss(batch)
    asked = []
    assert model.prefix(batch, 3, lambda: asked.append(1) or len(asked) == 2) is None
    assert len(asked) == 2
    assert torch.equal(model.loss(batch), before)
    for depth in (0, 5):
        with pytest.raises(IndexError):
            model.prefix(batch, depth, lambda: False)


def test_a_model_that_shares_more_than_a_hidden_state_is_told(
    folder: Callable[[str], Path],
) -> None:
    """Here a layer above reads what the first one has left aside."""
    model = load(folder("llama"))
    first, *_, last = model.module.get_submodule(model.stack)
    aside: list[torch.Tensor] = []
    first.register_forward_hook(lambda _, __, output: aside.append(output))
    last.register_forward_hook(lambda _, __, output: output + aside.pop())
    prefix = model.prefix(some_batch(), 2, lambda: False)
    assert prefix is not None
    aside[:] = [torch.zeros_like(aside[0])] * 2
    assert not model.resumes_exactly(prefix)


def test_only_the_active_block_is_trainable(folder: Callable[[str], Path]) -> None:
    """Activating another block, or releasing, freezes the former and frees its gradients."""
    model = load(folder("llama"))

    def trainable() -> set[str]:
        return {n.split(".")[2] for n, p in model.module.named_parameters() if p.requires_grad}

    assert trainable() == set()
    model.activate(range(1))
    model.loss(some_batch()).backward()
    model.activate(range(2, 4))
    assert trainable() == {"2", "3"}
    model.release()
    assert trainable() == set()
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not model.module.training
    with pytest.raises(IndexError):
        model.activate(range(3, 5))


def test_a_parameter_without_gradient_counts_as_zero(folder: Callable[[str], Path]) -> None:
    block = load(folder("llama")).activate(range(1))
    parts = list(block.gradients())
    assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]
    assert parts[-1][0].stop == block.layout.numel
    assert all(not gradient.any() for _, gradient in parts)


def test_block_tensors_load_again(folder: Callable[[str], Path]) -> None:
    model = load(folder("llama"), "bf16")
    saved = {name: t.clone() for name, t in model.block_tensors(range(1, 2)).items()}
    train(model, range(1, 2), some_batch(), steps=1)
    model.load_block(range(1, 2), saved)
    for name, tensor in model.block_tensors(range(1, 2)).items():
        assert torch.equal(tensor, saved[name])
    name = next(iter(saved))
    with pytest.raises(ModelError, match=r"layers\.1\..* is not part of the block"):
        model.load_block(range(2), {**model.block_tensors(range(1)), **saved, "layers.1.x": CPU})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=f"{name}' is missing"):
        model.load_block(range(1, 2), {n: t for n, t in saved.items() if n != name})
    with pytest.raises(ModelError, match=f"{name}' has shape"):
        model.load_block(range(1, 2), {**saved, name: saved[name][:1]})


def test_the_model_folder_is_only_read(tmp_path: Path) -> None:
    """The weights may be mapped into memory: what is written there must not reach the file."""
    path = make_model(tmp_path / "model")
    before = (path / "model.safetensors").read_bytes()
    model = load(path)
    zeros = {name: tensor * 0 for name, tensor in model.block_tensors(range(2)).items()}
    model.load_block(range(2), zeros)
    train(model, range(1, 3), some_batch(), steps=1)
    assert (path / "model.safetensors").read_bytes() == before


def test_digests(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The configuration's ignores how it was read; the weights' sees a single bit."""
    model = load(folder("llama"))
    copy = load(make_model(tmp_path / "elsewhere"))
    half = load(folder("llama"), "bf16")
    assert model.config_digest() == copy.config_digest() == half.config_digest()
    assert model.weights_digest() == copy.weights_digest() != half.weights_digest()
    assert model.config_digest() != load(folder("mistral")).config_digest()

    block = copy.activate(range(1))
    assert copy.weights_digest() == model.weights_digest()
    block.master.view(torch.int32)[5] ^= 1
    assert copy.weights_digest() != model.weights_digest()


BPE = {"type": "BPE", "vocab": {"a": 1, "b": 2}, "merges": ["a b"], "dropout": None}
WORDS = {"a": 1, "b": 2, "<s>": 0}
BACKEND: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 9, "content": "<x>", "lstrip": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": BPE,
}


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        ({"version": "2.0"}, True),
        ({"truncation": {"max_length": 7}, "padding": {"length": 7}}, True),
        ({"model": {**BPE, "merges": [["a", "b"]], "ignore_merges": False}}, True),
        ({"model": {**BPE, "vocab": {"b": 2, "a": 1}}}, True),
        ({"added_tokens": BACKEND["added_tokens"][::-1]}, True),
        ({"model": {**BPE, "merges": ["b a"]}}, False),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, False),
        ({"added_tokens": BACKEND["added_tokens"][:1]}, False),
    ],
)
def test_a_tokenizers_digest_is_of_what_makes_tokens(change: dict[str, Any], equal: bool) -> None:
    """Not of the order in which it is written, by which release, and who cuts with it."""
    own = tokenizer_digest(WORDS, json.dumps(BACKEND), [0], 2)
    changed = json.dumps({**BACKEND, **change})
    other = tokenizer_digest(dict(reversed(WORDS.items())), changed, [0], 2)
    assert (own == other) == equal


def test_a_tokenizers_digest_sees_ids_and_ends() -> None:
    """Of a slow tokenizer the vocabulary is all there is."""
    own = tokenizer_digest(WORDS, "", [], 2)
    assert own != tokenizer_digest({**WORDS, "a": 2, "b": 1}, "", [], 2)
    assert own != tokenizer_digest(WORDS, "", [0], 2)
    assert own != tokenizer_digest(WORDS, "", [], 0)
    assert tokenizer_digest(WORDS, "", [0], 2) != tokenizer_digest(WORDS, "", [0, 1], 2)


def test_a_tokenizers_digest_stays_what_it_was() -> None:
    """Or nodes of two releases would refuse each other, and a run would not be gone on with."""
    known = {"a13cfa31700027d0774874a46142fc61": [], "bccdeebca81a3aa34ed9cdea24988b10": [0]}
    for digest, prefix in known.items():
        assert tokenizer_digest(WORDS, json.dumps(BACKEND), prefix, 2) == digest


def test_a_tokenizer_is_the_same_wherever_it_was_read(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Copied, exported, used, or in a converted GGUF file twice; with two ids swapped it is not."""
    model = load(folder("llama"))
    digest = model.tokenizer.digest()
    model.tokenizer.hf(["a b c", "a"], padding=True, truncation=True, max_length=2)
    assert model.tokenizer.digest() == digest
    model.export(tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.digest() == digest
    write_gguf(tmp_path / "tiny.gguf", model)
    first, second = (
        load(tmp_path / "tiny.gguf", cache=tmp_path / each).tokenizer.digest() for each in "ab"
    )
    assert first == second

    file = tmp_path / "out" / "tokenizer.json"
    file.write_text(swapped(file.read_text()))
    assert load(tmp_path / "out").tokenizer.digest() != digest


def swapped(tokenizer: str) -> str:
    """A tokenizer.json in which two letters have each other's id."""
    tree = json.loads(tokenizer)
    ids = tree["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("family", "made"),
    [("llama", (256, False)), ("gpt2", (256, True)), ("gpt_neox", (256, False))],
)
def test_positions_are_a_bound_where_each_has_a_row(
    folder: Callable[[str], Path], family: str, made: tuple[int, bool]
) -> None:
    """Elsewhere they merely are those that were trained."""
    found = sizes.capacity(load(folder(family)).module)
    assert (found.positions, found.bound) == made


@pytest.mark.parametrize(
    ("name", "config", "bound"),
    [
        ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
        ("GPTJConfig", {"rotary_dim": 4}, True),
        ("MptConfig", {"max_seq_len": 64}, True),
        ("MistralConfig", {"num_key_value_heads": 4}, False),
    ],
)
def test_positions_of_other_architectures(name: str, config: dict[str, Any], bound: bool) -> None:
    """A row too many is an error exactly where they are said to be a bound."""
    import transformers

    kind = getattr(transformers, name)(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        **config,
    )
    module = transformers.AutoModelForCausalLM.from_config(kind)
    found = sizes.capacity(module)
    assert (found.positions, found.bound) == (64, bound)
    module(input_ids=torch.ones(1, 64, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)) if bound else nullcontext():
        module(input_ids=torch.ones(1, 65, dtype=torch.int64))


# What cannot be trained


def _no_folder(path: Path) -> None:
    shutil.rmtree(path)


def _a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _broken_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def _list_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def _edit(path: Path, **entries: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **entries}))


def _bert(path: Path) -> None:
    _edit(path, model_type="bert", architectures=["BertForMaskedLM"])


def _vision(path: Path) -> None:
    _edit(path, model_type="vit", architectures=["ViTForImageClassification"])


def _encoder_decoder(path: Path) -> None:
    _edit(path, model_type="bart", architectures=["BartForCausalLM"], is_encoder_decoder=True)


def _own_code(path: Path) -> None:
    _edit(
        path,
        model_type="mine",
        architectures=["MyForCausalLM"],
        auto_map={"AutoModelForCausalLM": "mine.MyForCausalLM"},
    )


def _quantized(path: Path) -> None:
    _edit(path, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def _no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _missing_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _wrong_shape(path: Path) -> None:
    _edit(path, intermediate_size=48)


def _no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, "no such folder"),
        (_a_file, "neither a model folder nor a .gguf file"),
        (_no_config, r"no config\.json"),
        (_broken_config, r"config\.json cannot be read"),
        (_list_config, r"config\.json cannot be read"),
        (_bert, "BertForMaskedLM is not a causal language model"),
        (_vision, "ViTForImageClassification is not a causal language model"),
        (_encoder_decoder, "not a causal language model"),
        (_own_code, "MyForCausalLM is not a causal language model that transformers ships"),
        (_quantized, "quantized"),
        (_no_weights, "cannot be loaded"),
        (_cut_weights, "cannot be loaded"),
        (
            _missing_tensor,
            r"1 of its tensors are missing, such as model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (_wrong_shape, r"12 of its tensors have other shapes than config\.json says"),
        (_no_tokenizer, "no usable tokenizer"),
    ],
)
def test_unusable_folders(
    spoil: Callable[[Path], None], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that names the folder, and nothing printed."""
    path = make_model(tmp_path / "model")
    capfd.readouterr()
    spoil(path)
    with pytest.raises(ModelError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_parameters_shared_between_layers_are_refused(folder: Callable[[str], Path]) -> None:
    model = load(folder("llama"))
    layers = model.module.model.layers
    layers[3].mlp = layers[0].mlp
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.* and .*layers\.3\.mlp.* are one"):
        LanguageModel(model.module, model.tokenizer, CPU, Path("some"))


def test_a_model_without_a_stack_is_refused(folder: Callable[[str], Path]) -> None:
    """Layers of two classes are no stack, and neither is a list within a list."""
    model = load(folder("llama"))
    inner = model.module.model
    inner.layers = nn.ModuleList([nn.ModuleList(inner.layers[:3]), inner.layers[3]])
    with pytest.raises(ModelError, match="no stack of equal layers"):
        LanguageModel(model.module, model.tokenizer, CPU, Path("some"))


# Tokenizer


def test_tokenizer() -> None:
    tokenizer = Tokenizer(make_tokenizer(), Path("some"))
    assert (tokenizer.prefix, tokenizer.eos_id, tokenizer.pad_id) == ([1], 2, 0)
    ids = tokenizer.encode("x a é")
    assert 1 not in ids
    assert tokenizer.hf.decode(ids) == "x a é"
    assert tokenizer.starts("x a é") == (ids, [0, 1, 3, 4, 4])  # é is two tokens here


def test_a_bos_that_the_tokenizer_does_not_use_is_not_put_before_texts() -> None:
    """As in GPT-2: the token exists, but no text starts with it. Padding falls back to eos."""
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer().backend_tokenizer.from_str(
        make_tokenizer().backend_tokenizer.to_str()
    )
    backend.post_processor = None
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer(hf, Path("some"))
    assert (tokenizer.prefix, tokenizer.eos_id, tokenizer.pad_id) == ([], 2, 2)
    hf.eos_token = None
    assert Tokenizer(hf, Path("some")).pad_id == 0


@pytest.mark.parametrize("after", ["", " </s>"])
def test_all_that_a_tokenizer_puts_before_a_text_is_its_prefix(after: str) -> None:
    """GLM-4 puts two tokens, of which none is called bos; what it puts behind is none of them."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = make_tokenizer().backend_tokenizer
    backend = backend.from_str(backend.to_str())
    special = [(token, backend.token_to_id(token)) for token in ("</s>", "<|start|>", "<|end|>")]
    backend.post_processor = processors.TemplateProcessing(
        single=f"<|start|> <|end|> $A{after}", special_tokens=special
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer = Tokenizer(hf, Path("some"))
    assert tokenizer.prefix == [3, 4]
    assert hf("b c").input_ids[: 2 + 2] == [*tokenizer.prefix, *tokenizer.encode("b c")]


TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "uno"},
    {"role": "assistant", "content": "due"},
]


def told(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    return [(tokenizer.hf.decode(ids), flag) for ids, flag in tokenizer.chat(messages, 999)]


def test_chat_marks_what_the_assistant_says() -> None:
    """Its content and the end-of-turn token; together the segments are the rendered text."""
    tokenizer = Tokenizer(make_tokenizer(), Path("some"))
    assert told(tokenizer, TALK) == [
        ("<s><|start|>user\none<|end|>\n<|start|>assistant\n", False),
        ("uno<|end|>", True),
        ("\n<|start|>user\nuno<|end|>\n<|start|>assistant\n", False),
        ("due<|end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE.replace("<|end|>", "")])
@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_answer_is_not_learned(template: str, blank: str) -> None:
    """The others of its chat are, whether or not the template marks a turn's end."""
    tokenizer = Tokenizer(make_tokenizer(template), Path("some"))
    said = [*TALK[:1], {"role": "assistant", "content": blank}, *TALK[2:]]
    found = told(tokenizer, said)
    end = "<|end|>" if "<|end|>" in template else ""
    assert [text for text, learned in found if learned] == ["due" + end]
    whole = tokenizer.hf.apply_chat_template(said, tokenize=False)
    assert "".join(text for text, _ in found) == whole
    assert not any(learned for _, learned in told(tokenizer, said[:2]))


def test_chat_of_a_thinking_model() -> None:
    """An empty thought that the template adds to the last answer alone is learned there."""
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = Tokenizer(make_tokenizer(template), Path("some"))
    learned = [text for text, flag in told(tokenizer, TALK) if flag]
    assert learned == ["uno<|end|>", "<think></think>due<|end|>"]


# SmolLM2-Instruct's, as published; Qwen2.5's begins in the same way.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chat_that_the_assistant_begins() -> None:
    """Its greeting is learned after what the template puts before it."""
    greeting = {"role": "assistant", "content": "ciao"}
    system = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    tokenizer = Tokenizer(make_tokenizer(CHATML), Path("some"))
    assert told(tokenizer, [greeting, *TALK[:2]]) == [
        (f"{system}<|im_end|>\n<|im_start|>assistant\n", False),
        ("ciao<|im_end|>", True),
        ("\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", False),
        ("uno<|im_end|>", True),
        ("\n", False),
    ]
    assert told(tokenizer, [greeting])[1] == ("ciao<|im_end|>", True)


def test_a_greeting_whose_begin_cannot_be_told_is_not_learned() -> None:
    """Where a template shows no difference between what was said and what is to be said."""
    bare = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    tokenizer = Tokenizer(make_tokenizer(bare), Path("some"))
    assert told(tokenizer, [TALK[1], *TALK[:2]]) == [
        ("uno<|end|>one<|end|>", False),
        ("uno<|end|>", True),
    ]


def test_a_template_that_wants_the_user_first_says_so() -> None:
    """As Llama 2's, Mistral's and Gemma's do."""
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="roles must alternate"):
        Tokenizer(make_tokenizer(strict), Path("some")).chat([TALK[1], *TALK[:2]], 99)


def marking(chat_template: str | None = None) -> Any:
    """As Llama 2's: a mark before a text's first word and in the place of spaces, no merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = [*map(chr, range(33, 127)), "▁"]
    vocabulary = {token: index for index, token in enumerate([*special, *letters, "\n"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    mark = letters[-1]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


# As Llama 2's, without its system message.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


def test_chat_of_a_tokenizer_that_marks_a_texts_first_word() -> None:
    """Its tokens are those of the whole, and a prompt's continue as the answer does."""
    tokenizer = Tokenizer(marking(INST), Path("some"))
    segments = tokenizer.chat(TALK, 99)
    whole = tokenizer.hf.apply_chat_template(TALK, tokenize=False)
    assert [token for ids, _ in segments for token in ids] == tokenizer.encode(whole)
    said = [(tokenizer.hf.convert_ids_to_tokens(ids), flag) for ids, flag in segments]
    assert [tokens for tokens, flag in said if flag] == [
        ["▁", "u", "n", "o", "▁", "</s>"],
        ["▁", "d", "u", "e", "▁", "</s>"],
    ]
    asked = tokenizer.prompt(TALK[:3])
    assert asked == [token for ids, _ in segments[:3] for token in ids]


def merging(*merges: tuple[str, str]) -> Any:
    """Of single letters, with some pairs of them as tokens of their own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "\n", *"xyz", *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(merges)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def in_place(hf: Any, *texts: str) -> list[list[str]]:
    made = Tokenizer(hf, Path("some")).in_place(texts)
    return [hf.convert_ids_to_tokens(ids) for ids in made]


def test_a_token_never_goes_over_a_border() -> None:
    """What precedes an answer is what it is as a prompt; the answer begins a text of its own."""
    hf = merging(("x", "y"))
    assert in_place(hf, "xy", "y") == [["xy"], ["y"]]
    assert in_place(hf, "yx", "yx", "yx") == [["y", "x"], ["y", "x"], ["y", "x"]]
    assert in_place(hf, "x", "", "z") == [["x"], [], ["z"]]


PAIRS = st.tuples(*[st.sampled_from("xyz")] * 2)


@given(
    merges=st.lists(PAIRS, max_size=4, unique=True),
    texts=st.lists(st.text("xyz", max_size=3), min_size=1, max_size=5),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_nothing_of_a_text_is_lost(merges: list[tuple[str, str]], texts: list[str]) -> None:
    """Whatever merges with whatever, each text's tokens are that text."""
    assert ["".join(tokens) for tokens in in_place(merging(*merges), *texts)] == texts


def test_a_chat_ends_soon_after_its_limit() -> None:
    """What would be cut off is not made tokens of."""
    tokenizer = Tokenizer(make_tokenizer(), Path("some"))
    whole = tokenizer.chat(TALK, 999)
    assert tokenizer.chat(TALK, len(whole[0][0])) == whole[:2]


def test_label_words_are_tokens_as_after_the_prompt() -> None:
    for template, expected in (
        ("{text}\nTopic:", ["▁", "a", "b"]),
        ("{text}\nTopic:\n", ["a", "b"]),
        ("{text}", ["▁", "a", "b"]),
        ("{text}\nTopic: ", ["a", "b"]),
        ("{{x}} {text:>9} {{", ["▁", "a", "b"]),
    ):
        settings = DataSettings(train=Path("some"), template=template)
        tokenizer = Tokenizer(marking(), Path("some"))
        [ids] = label_token_ids({"x": "ab"}, settings, tokenizer).values()
        assert tokenizer.hf.convert_ids_to_tokens(ids) == expected


def test_chat_refusals() -> None:
    """No template at all is the model's fault; messages that it refuses are the row's."""
    with pytest.raises(ModelError, match=r"^some: has no chat template; .*data\.task"):
        Tokenizer(make_tokenizer(None), Path("some")).chat(TALK, 99)
    strict = "{{ raise_exception('only users speak') }}"
    with pytest.raises(ValueError, match="only users speak"):
        Tokenizer(make_tokenizer(strict), Path("some")).chat(TALK, 99)
    shifting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="message 2 cannot be told apart"):
        Tokenizer(make_tokenizer(shifting), Path("some")).chat(TALK, 99)


# Writing


def test_export_needs_a_free_place(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A killed export's remains are no obstacle; the files can be read by whoever may look."""
    model = load(folder("llama"))
    with pytest.raises(OutputError, match="already exists"):
        model.export(tmp_path)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").touch()
    model.export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    assert "rest" not in {file.name for file in (tmp_path / "out").iterdir()}


def test_a_model_with_several_chat_templates_is_written(tmp_path: Path) -> None:
    """transformers keeps all but the default one in a folder within the model's."""
    source = make_model(tmp_path / "source")
    hf = copy.deepcopy(make_tokenizer())
    hf.chat_template = {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE + "{{ tools }}"}
    hf.save_pretrained(source)
    load(source).export(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    written = load(tmp_path / "out").tokenizer
    assert written.hf.chat_template == hf.chat_template
    assert told(written, TALK) == told(Tokenizer(make_tokenizer(), Path("some")), TALK)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.parent.name == "additional_chat_templates" for path in files)
    assert len({stat.S_IMODE(file.stat().st_mode) for file in files}) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (Exception("No space left on device (os error 28)"), DiskFullError),  # from tokenizers
        (PermissionError(errno.EACCES, "Permission denied"), OutputError),
    ],
)
def test_a_failed_export_leaves_nothing(
    error: Exception,
    expected: type[Exception],
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(folder("llama"))

    def fail(place: Path) -> None:
        (place / "half").touch()
        raise error

    monkeypatch.setattr(model.module, "save_pretrained", fail)
    with pytest.raises(expected, match=str(tmp_path)):
        model.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Devices


@pytest.mark.parametrize("text", ["cuda", "cuda:7", "mps"])
def test_absent_devices(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: text == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=rf'{text}.*set node\.device = "cpu"'):
        pick_device(text)


def test_present_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)


# GGUF


def write_gguf(file: Path, model: LanguageModel) -> None:
    """The tiny Llama as llama.cpp would hold it, in fp32."""
    import gguf

    config = model.module.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    hf = model.tokenizer.hf
    tokens = hf.convert_ids_to_tokens(range(len(hf)))
    special = set(hf.added_tokens_encoder)
    kind = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kind.CONTROL if t in special else kind.NORMAL for t in tokens])
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens[-8:]])
    writer.add_bos_token_id(hf.bos_token_id)
    writer.add_eos_token_id(hf.eos_token_id)
    writer.add_pad_token_id(hf.pad_token_id)
    writer.add_chat_template(hf.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.n_layers)
    for name, tensor in model.module.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        values = tensor
        if n := heads.get(name.split(".")[-2]):  # llama.cpp interleaves the rotary halves
            values = tensor.view(n, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_converted_once(
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The converted folder is the same model, and a second node or a copied file finds it."""
    original = load(folder("llama"))
    file = tmp_path / "tiny.gguf"
    write_gguf(file, original)
    cache = tmp_path / "cache" / "deep"
    capfd.readouterr()
    model = load(file, cache=cache)
    assert capfd.readouterr() == ("", "")
    assert model.name == "tiny"
    assert not list(cache.glob(".*"))  # no remains
    for name, tensor in original.module.state_dict().items():
        assert torch.equal(tensor, model.module.state_dict()[name]), name
    assert model.tokenizer.encode("a b<|end|>") == original.tokenizer.encode("a b<|end|>")
    assert model.tokenizer.chat(TALK, 99)

    monkeypatch.setattr(reading, "_convert", lambda *_: pytest.fail("converted twice"))
    load(file.rename(tmp_path / "other.gguf"), "bf16", cache=cache)


def test_a_killed_conversion_leaves_nothing_in_the_way(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds a lock, and what it left half-done is not taken for the model."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"any content")
    copy = folder("llama")

    def is_locked(target: Path) -> bool:
        try:
            with filelock.FileLock(target.with_suffix(".lock"), timeout=0):
                return False
        except filelock.Timeout:
            return True

    def convert(path: Path, target: Path) -> None:
        with ThreadPoolExecutor() as another_node:
            assert another_node.submit(is_locked, target).result()
        with written_whole(target) as place:
            shutil.copytree(copy, place, dirs_exist_ok=True)
            if not killed:
                killed.append(True)
                raise KeyboardInterrupt

    killed: list[bool] = []
    monkeypatch.setattr(reading, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        load(file, cache=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])
    partial = tmp_path / "cache" / f".{reading._content_digest(file)}.partial"
    partial.mkdir()
    (partial / "config.json").write_text("{")
    assert load(file, cache=tmp_path / "cache").n_layers == 4
    assert not partial.exists()


def test_gguf_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(ModelError, match=r"tiny\.gguf: no such file; set model\.path"):
        load(file, cache=tmp_path)
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"tiny\.gguf: "):
        load(file, cache=tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        load(file, cache=file / "cache")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'deca-node\[gguf\]'"):
        load(file, cache=tmp_path)
