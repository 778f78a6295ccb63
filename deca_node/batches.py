"""Examples -> resumable mini-batches.

One integer, ``BatchStream.position``, says where a node is in its data.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

IGNORED = -100  # the target that cross entropy skips, in PyTorch and in Hugging Face models


@dataclass(frozen=True)
class Example:
    """One sequence to train on.

    ``completion`` is as long as ``input_ids``; True marks the tokens that are learned. ``label`` is
    the row's label value (not its word), None outside classification.
    """

    input_ids: list[int]
    completion: list[bool]
    label: str | None = None

    @property
    def asked(self) -> tuple[int, ...]:
        """The tokens that are given, not learned; all of them where nothing is only given."""
        given = tuple(
            token
            for token, learned in zip(self.input_ids, self.completion, strict=True)
            if not learned
        )
        return given or tuple(self.input_ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side: int64 CPU tensors of shape (examples, longest), padded on the right.

    ``labels`` is ``input_ids`` with ``IGNORED`` wherever nothing is learned. It is not shifted:
    Hugging Face models do that.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Put at least one example into a batch."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.where(torch.tensor(example.completion), IGNORED)
    return Batch(input_ids, attention_mask, labels)


def batches(examples: Sequence[Example], size: int, pad_id: int) -> Iterator[Batch]:
    """All examples once, in order; the last batch may be smaller."""
    for start in range(0, len(examples), size):
        yield collate(examples[start : start + size], pad_id)


class BatchStream:
    """Endless mini-batches in a seeded order.

    Each epoch is a permutation of its own, and a batch may span two epochs: no example is seen
    again before all were seen. ``position``, the number of examples consumed, is all the state
    there is; setting it resumes: from the same position come the same batches.

    Raises:
        ValueError: there are no examples.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, pad_id: int
    ) -> None:
        if not examples:
            raise ValueError("a stream of batches needs at least one example")
        self.position = 0
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._pad_id = pad_id
        self._epoch = -1
        self._order: list[int] = []

    def next(self) -> Batch:
        """The batch at ``position``, which moves past it."""
        chosen = [self._at(self.position + offset) for offset in range(self._batch_size)]
        self.position += self._batch_size
        return collate(chosen, self._pad_id)

    def _at(self, position: int) -> Example:
        epoch, place_in_epoch = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._examples)))
            shuffler = random.Random(f"deca/data/{self._seed}/{epoch}")  # noqa: S311 - no secret
            shuffler.shuffle(self._order)
        return self._examples[self._order[place_in_epoch]]
