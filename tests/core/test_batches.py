"""Batches, and streams of them that resume."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from deca_node.batches import IGNORED, Batch, BatchStream, Example, batches, collate

PAD = 258


def numbered(count: int) -> list[Example]:
    """Examples of 1 to 3 tokens, each with its own number as first token."""
    return [
        Example([number] * (1 + number % 3), [True] * (1 + number % 3)) for number in range(count)
    ]


def numbers(batch: Batch) -> list[int]:
    return [int(number) for number in batch.input_ids[:, 0]]


def test_what_is_asked_is_what_is_not_learned() -> None:
    """Where all is learned two examples are twins if they are equal, and not all are."""
    assert Example([5, 6, 7], [True, False, True]).asked == (6,)
    assert Example([5, 6], [True, True]).asked == (5, 6)


def test_collate() -> None:
    """Padding is on the right, masked from attention and, like the prompt, from the loss."""
    made = [Example([5, 6, 7], [False, True, True]), Example([8], [True])]
    batch = collate(made, PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
        assert tensor.dtype == torch.int64


def test_evaluation_batches_are_in_order() -> None:
    """Every example comes once; the last batch is smaller."""
    assert [numbers(batch) for batch in batches(numbered(5), 2, PAD)] == [[0, 1], [2, 3], [4]]


@hypothesis_settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), size=st.integers(1, 7), seed=st.integers(0, 2**32 - 1))
def test_every_example_once_an_epoch(count: int, size: int, seed: int) -> None:
    """Three epochs are three permutations, across the bounds of batches."""
    stream = BatchStream(numbered(count), size, seed, PAD)
    drawn: list[int] = []
    while len(drawn) < 3 * count:
        drawn += numbers(stream.next())
        assert stream.position == len(drawn)
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@hypothesis_settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 12), size=st.integers(1, 7), steps=st.integers(0, 9))
def test_position_resumes_the_stream(count: int, size: int, steps: int) -> None:
    """A new stream set to an old position gives the same batches from there."""
    old = BatchStream(numbered(count), size, 1, PAD)
    for _ in range(steps):
        old.next()
    new = BatchStream(numbered(count), size, 1, PAD)
    new.position = old.position
    for _ in range(4):
        assert torch.equal(old.next().labels, new.next().labels)


def test_position_can_be_set_back() -> None:
    """The stream keeps no state besides its position."""
    stream = BatchStream(numbered(5), 2, 0, PAD)
    first = [numbers(stream.next()) for _ in range(6)]
    stream.position = 0
    assert [numbers(stream.next()) for _ in range(6)] == first


def test_order_depends_on_seed_and_epoch() -> None:
    """The permutation is the documented one, another for each epoch and each seed."""
    stream = BatchStream(numbered(30), 30, 4, PAD)
    expected = []
    for epoch in range(2):
        order = list(range(30))
        random.Random(f"deca/data/4/{epoch}").shuffle(order)
        expected.append(order)
    assert [numbers(stream.next()), numbers(stream.next())] == expected
    assert expected[0] != expected[1]
    assert numbers(BatchStream(numbered(30), 30, 5, PAD).next()) != expected[0]


def test_stream_of_nothing_is_refused() -> None:
    """Without examples there is no batch to wait for."""
    with pytest.raises(ValueError, match="at least one example"):
        BatchStream([], 1, 0, PAD)
