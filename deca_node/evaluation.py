"""How well a model does on examples that it is not trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from deca_node import metrics
from deca_node.batches import Example, collate
from deca_node.models import LanguageModel


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on ``examples`` examples.

    ``loss`` is the mean cross entropy, in nats, over all tokens that training would learn;
    ``accuracy`` and ``macro_f1`` (0 to 1) belong to classification, ``perplexity`` to all else.
    """

    examples: int
    loss: float
    accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None


def evaluate(
    model: LanguageModel,
    examples: Sequence[Example],
    completions: Mapping[str, Sequence[int]],
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Measure a model; its parameters and gradients are left as they are.

    The label predicted is the one whose completion has the highest log-probability: one forward a
    batch when every completion is one token, else one a batch and label.

    Args:
        model: what to measure.
        examples: at least one.
        completions: the token ids of each label, from ``data.label_token_ids``; empty unless the
            task is classification. Every example's label must be among them.
        batch_size: examples per forward.
        should_stop: asked before every forward.

    Returns:
        None if it was stopped.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("nothing to evaluate")
    ordered = sorted(examples, key=lambda example: len(example.input_ids))  # less padding
    predicted: list[str] = []
    total, tokens = 0.0, 0
    # Not inference_mode: what a module might cache in it could never take part in training.
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            group = ordered[start : start + batch_size]
            if completions:
                scores = _label_scores(model, group, completions, should_stop)
                if scores is None:
                    return None
                labels = list(completions)
                total -= sum(
                    row[labels.index(str(example.label))]
                    for example, row in zip(group, scores.tolist(), strict=True)
                )
                tokens += sum(len(completions[str(example.label)]) for example in group)
                predicted += [labels[index] for index in scores.argmax(dim=1).tolist()]
            else:
                if should_stop():
                    return None
                logits, targets = model.predictions(collate(group, model.tokenizer.pad_id))
                total += cross_entropy(logits, targets, reduction="sum").item()
                tokens += targets.numel()

    loss = total / tokens
    if not completions:
        perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()  # inf, where math raises
        return Evaluation(len(ordered), loss, perplexity=perplexity)
    truth = [str(example.label) for example in ordered]
    return Evaluation(
        len(ordered),
        loss,
        accuracy=metrics.accuracy(truth, predicted),
        macro_f1=metrics.macro_f1(truth, predicted),
    )


def _label_scores(
    model: LanguageModel,
    group: Sequence[Example],
    completions: Mapping[str, Sequence[int]],
    should_stop: Callable[[], bool],
) -> Tensor | None:
    """Log-probability of each label's completion: float32, shape (group, labels)."""
    pad = model.tokenizer.pad_id
    if all(len(ids) == 1 for ids in completions.values()):
        if should_stop():
            return None
        logits, _ = model.predictions(collate(group, pad))  # of the one token that each completes
        return log_softmax(logits, dim=1)[:, [ids[0] for ids in completions.values()]]
    columns = []
    for ids in completions.values():
        if should_stop():
            return None
        logits, targets = model.predictions(collate([_ending(each, ids) for each in group], pad))
        losses = cross_entropy(logits, targets, reduction="none")
        columns.append(-losses.view(len(group), len(ids)).sum(dim=1))
    return torch.stack(columns, dim=1)


def _ending(example: Example, completion: Sequence[int]) -> Example:
    """The example's prompt with another completion."""
    prompt = example.input_ids[: example.completion.index(True)]
    learned = [False] * len(prompt) + [True] * len(completion)
    return Example([*prompt, *completion], learned, example.label)
