"""What a node's data files hold, and whether its model can take that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deca_node import sizes
from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.data import Tokenizer, examples, label_token_ids, label_words, questions
from deca_node.errors import ConfigError, ModelError
from deca_node.rows import read_rows


class Model(Protocol):
    """What this file asks of a model; it may be without values."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Made the examples."""

    @property
    def module(self) -> Any:
        """The Hugging Face model."""


@dataclass(frozen=True)
class Corpus:
    """Examples to train on, and to test.

    Attributes:
        rows: in the file to train on.
        train: examples to train on, one a row or more; at least one.
        test: examples to evaluate with; may be empty.
        completions: tokens by label, where there are labels.
        twins: how many rows to test on ask what a row to train on asks.
    """

    rows: int
    train: Sequence[Example]
    test: Sequence[Example]
    completions: Mapping[str, Sequence[int]]
    twins: int = 0

    def warnings(self, model: Model, path: Path) -> list[str]:
        """What may do harm: what is wrong, and after a semicolon the remedy.

        Args:
            model: which is to learn this.
            path: its own.

        Raises:
            ModelError: an id has no row in the embedding.
            ConfigError: an example is longer than the model can take.
        """
        twins = (
            f"{self.twins:,} rows of data.test ask the same as a row of data.train, so for them "
            "the test shows only what was memorized; remove them from one of the two"
            if self.twins
            else ""
        )
        return [each for each in (twins, self._check_capacity(model, path)) if each]

    def _check_capacity(self, model: Model, path: Path) -> str:
        capacity = sizes.capacity(model.module)
        texts = [example.input_ids for example in (*self.train, *self.test)]
        words = list(self.completions.values())
        highest = max(model.tokenizer.pad_id, *map(max, texts), *map(max, words))
        if highest >= capacity.ids:
            raise ModelError(
                f"{path}: its tokenizer gives ids up to {highest}, its embedding has "
                f"{capacity.ids} rows; put the tokenizer that belongs to the model into its "
                "folder, or enlarge the embedding (resize_token_embeddings of transformers), the "
                "same on all nodes"
            )
        made = capacity.positions
        longest = max(map(len, texts))
        lengths = [len(word) for word in words] if self.test else []
        most, least = max(lengths, default=0), min(lengths, default=0)
        # Evaluation tries each label on every prompt.
        tried = max((len(one.asked) + most for one in self.test if lengths), default=0)
        if not made or max(longest, tried) <= made:
            return ""
        found = f"the longest example has {max(longest, tried)} tokens"
        if tried > longest:
            found += " with the longest label, since evaluation tries every label"
        # A row is cut to fit with its own label.
        fitting = made - (most - least)
        if capacity.bound:
            raise ConfigError(
                f"data.max_tokens: {found}, and {path} can take {made}; lower it to {fitting}"
            )
        return (
            f"{found}, and {path} was made for {made}: beyond that it may learn little; "
            f"set data.max_tokens = {fitting}"
        )


def read_corpus(settings: DataSettings, tokenizer: Tokenizer) -> Corpus:
    """Read ``data.train`` and ``data.test``.

    Raises:
        DataError: a file cannot be read, or does not fit the task.
        ConfigError: as ``label_token_ids``.
    """
    rows = read_rows(settings.train)
    train = examples(rows, settings, tokenizer, settings.train)
    words = label_words(train, settings) if settings.task == "classification" else {}
    completions = label_token_ids(words, settings, tokenizer) if words else {}
    if settings.test is None:
        return Corpus(len(rows), train, [], completions)
    held = read_rows(settings.test)
    test = examples(held, settings, tokenizer, settings.test, words or None)
    known = set(questions(rows, settings, settings.train))
    twins = sum(asked in known for asked in questions(held, settings, settings.test))
    return Corpus(len(rows), train, test, completions, twins)
