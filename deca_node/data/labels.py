"""Labels of rows, the words that the model says for them, and the tokens of these."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import structlog

from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.data.fields import Row, text_of
from deca_node.data.prompts import end_of, fields_of
from deca_node.data.tokens import Tokenizer
from deca_node.errors import ConfigError, DataError

_log = structlog.get_logger(__name__)


def label_of(row: Row, field: str, words: Mapping[str, str], where: str) -> str:
    """A row's label.

    Args:
        row: the row.
        field: where its label is.
        words: ``data.labels``, which may have a word for a blank label; when empty, each label is
            its own word.
        where: begins messages.

    Raises:
        DataError: there is no text in the field, or it is blank and has no word.
    """
    label = text_of(row, field, where)
    if not words and not label.strip():
        raise DataError(
            f"{where}: data.label_field {field!r} is blank; give it a label or remove the row"
        )
    return label


def label_words(examples: Iterable[Example], settings: DataSettings) -> dict[str, str]:
    """Label value -> the word that the model says for it.

    ``settings.labels`` or, when that is empty, the sorted labels of the examples, each its own
    word.
    """
    return words_of((example.label for example in examples if example.label is not None), settings)


def words_of(values: Iterable[str], settings: DataSettings) -> dict[str, str]:
    """:func:`label_words` of label values, as ``label_of`` has them."""
    return dict(settings.labels) or {value: value for value in sorted(set(values))}


def warn_of_lookalikes(labels: Iterable[str], source: Path) -> None:
    """Labels that are probably one, written in two ways."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.strip().casefold(), []).append(label)
    if twice := [group for group in alike.values() if len(group) > 1]:
        _log.warning(
            "labels that differ only by case or spaces around them are trained as different;"
            " make them the same if they are",
            source=str(source),
            labels=twice,
        )


def label_token_ids(
    words: Mapping[str, str], settings: DataSettings, tokenizer: Tokenizer
) -> dict[str, list[int]]:
    """Label value -> the token ids of its completion, exactly as examples hold them.

    They are those of the word as it stands after the template's end, and after a space, unless the
    template ends in white space.

    Raises:
        ConfigError: a word has no tokens, or two labels have the same.
    """
    fields_of(settings.template)
    gap = "" if settings.template[-1:].isspace() else " "
    end = end_of(settings.template) or "."  # for what a row ends with
    ids: dict[str, list[int]] = {}
    owner: dict[tuple[int, ...], str] = {}
    for label, word in words.items():
        *_, ids[label] = tokenizer.in_place([end, gap + word])
        if not word.strip() or not ids[label]:
            raise ConfigError(f"data.labels: label {label!r} has no word")
        if (other := owner.setdefault(tuple(ids[label]), label)) != label:
            raise ConfigError(
                f"data.labels: the model cannot tell labels {other!r} and {label!r} apart"
                f" ({words[other]!r} and {word!r} have the same tokens)"
            )
    return ids


def label_counts(examples: Iterable[Example]) -> dict[str, int]:
    """Label value -> number of examples, by label; empty outside classification."""
    counts = Counter(example.label for example in examples if example.label is not None)
    return dict(sorted(counts.items()))
