"""evaluation.py against the same numbers computed one example at a time."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deca_node import data, metrics
from deca_node.batches import Example, collate
from deca_node.config import DataSettings, ModelSettings
from deca_node.corpus import Corpus
from deca_node.data import label_token_ids
from deca_node.errors import ConfigError
from deca_node.evaluation import Evaluation, evaluate
from deca_node.models import LanguageModel
from deca_node.trainer import gradient
from tests.tiny import LETTERS, make_model

LABELS = {"one": " a", "two": " b", "three": " c"}
LONG_LABELS = {"one": " a", "two": " yes", "three": " no c"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_model(tmp_path_factory.mktemp("evaluation") / "qwen2", "qwen2", seed=3)
    settings = ModelSettings(path=folder, dtype="fp32")
    return LanguageModel.load(settings, torch.device("cpu"))


@pytest.fixture
def forwards(model: LanguageModel) -> Any:
    """The batch size of each forward of the test."""
    sizes: list[int] = []
    hook = model.module.get_input_embeddings().register_forward_hook(
        lambda _, args, __: sizes.append(len(args[0]))
    )
    yield sizes
    hook.remove()


def ids_of(model: LanguageModel, words: Mapping[str, str]) -> dict[str, list[int]]:
    return {label: model.tokenizer.encode(word) for label, word in words.items()}


def labelled(model: LanguageModel, completions: Mapping[str, Sequence[int]]) -> list[Example]:
    """Eleven prompts of many lengths, not in order, with labels in turn."""
    examples = []
    for index in range(11):
        text = " ".join(LETTERS[(index * k) % 8] for k in range(1, 2 + index * 7 % 11))
        prompt = [1, *model.tokenizer.encode(text)]
        label = list(completions)[index % 3]
        ending = list(completions[label])
        learned = [False] * len(prompt) + [True] * len(ending)
        examples.append(Example(prompt + ending, learned, label))
    return examples


def log_probability(model: LanguageModel, prompt: list[int], ending: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model.module(torch.tensor([[*prompt, *ending]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(rows.gather(1, torch.tensor(ending)[:, None]).sum())


@pytest.mark.parametrize("words", [LABELS, LONG_LABELS])
def test_classification(model: LanguageModel, words: dict[str, str], forwards: list[int]) -> None:
    """The most probable completion wins; one forward a batch if all are of one token."""
    completions = ids_of(model, words)
    examples = labelled(model, completions)
    found = evaluate(model, examples, completions, batch_size=4)
    assert forwards == [4, 4, 3] if words is LABELS else [4] * 6 + [3] * 3

    truth, predicted = [], []
    total, tokens = 0.0, 0
    for example in examples:
        prompt = example.input_ids[: example.completion.index(True)]
        scores = {
            label: log_probability(model, prompt, ending) for label, ending in completions.items()
        }
        assert example.label is not None
        truth.append(example.label)
        predicted.append(max(scores, key=scores.__getitem__))
        total -= scores[example.label]
        tokens += len(completions[example.label])
    assert found is not None
    assert found.examples == 11
    assert found.perplexity is None
    assert found.accuracy == metrics.accuracy(truth, predicted)
    assert found.macro_f1 == metrics.macro_f1(truth, predicted)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)


def test_text(model: LanguageModel) -> None:
    """The loss is the mean over tokens, not over batches; perplexity its exponential."""
    texts = ["a b c", "x", "the quick brown fox", "d e f g h a b c d e f"]
    examples = []
    total, tokens = 0.0, 0
    for text in texts:
        ids = [1, *model.tokenizer.encode(text), 2]
        examples.append(Example(ids, [True] * len(ids)))
        total -= log_probability(model, ids[:1], ids[1:])
        tokens += len(ids) - 1
    found = evaluate(model, examples, {}, batch_size=2)
    assert found is not None
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found == Evaluation(4, found.loss, perplexity=found.perplexity)


@pytest.mark.parametrize("words", [{}, LABELS, LONG_LABELS])
@pytest.mark.parametrize("after", [0, 2])
def test_it_stops_before_the_next_forward(
    model: LanguageModel, words: dict[str, str], after: int, forwards: list[int]
) -> None:
    examples = labelled(model, ids_of(model, words or LABELS))
    assert (
        evaluate(model, examples, ids_of(model, words), 4, lambda: len(forwards) == after) is None
    )
    assert len(forwards) == after


def test_training_goes_on_as_if_nothing_had_been(model: LanguageModel) -> None:
    """Between two steps it changes neither parameters nor gradients, nor what comes after."""
    block = model.activate(range(1, 2))
    completions = ids_of(model, LONG_LABELS)
    examples = labelled(model, completions)
    batch = collate(examples[:4], model.tokenizer.pad_id)
    before = gradient(model, block, batch)
    digest = model.weights_digest()
    held = [part.clone() for _, part in block.gradients()]
    evaluate(model, examples, completions, batch_size=4)
    assert all(map(torch.equal, held, (part for _, part in block.gradients())))
    assert model.weights_digest() == digest
    assert gradient(model, block, batch) == before
    model.release()


def test_what_the_capacity_allows_can_be_evaluated(tmp_path: Path) -> None:
    """A table of positions must hold each tested prompt with the longest label."""
    folder = make_model(tmp_path / "gpt2", "gpt2", layers=1, n_positions=64)
    model = LanguageModel.load(ModelSettings(path=folder), torch.device("cpu"))
    words = {"one": "a", "two": "something else"}
    rows = [
        {"text": letter * 300, "label": label} for letter, label in zip("xy", words, strict=True)
    ]

    def corpus(size: int) -> tuple[list[Example], dict[str, list[int]]]:
        settings = DataSettings(train=folder, template="{text}:", labels=words, max_tokens=size)
        found = label_token_ids(words, settings, model.tokenizer)
        return data.examples(rows, settings, model.tokenizer, folder), found

    def check(size: int, *, tested: bool = True) -> list[str]:
        found, completions = corpus(size)
        whole = Corpus(len(rows), found, found if tested else [], completions)
        return whole.warnings(model, folder)

    with pytest.raises(
        ConfigError,
        match=r"has 77 tokens with the longest label, .* can take 64; lower it to 51",
    ):
        check(64)
    with pytest.raises(ConfigError, match="lower it to 51"):
        check(52)
    assert not check(51)
    assert not check(64, tested=False)
    with pytest.raises(ConfigError, match=r"has 65 tokens, .* can take 64; lower it to 64"):
        check(65, tested=False)
    examples, completions = corpus(51)
    assert evaluate(model, examples, completions, batch_size=2) is not None


def test_a_hopeless_model_has_infinite_perplexity(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopeless = torch.tensor([[0.0, 1e6]])
    monkeypatch.setattr(model, "predictions", lambda _: (hopeless, torch.tensor([0])))
    found = evaluate(model, [Example([1, 2], [False, True])], {}, batch_size=1)
    assert found == Evaluation(1, 1e6, perplexity=math.inf)


def test_nothing_to_evaluate(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="nothing"):
        evaluate(model, [], {}, batch_size=1)
