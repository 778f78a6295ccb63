"""Rows -> examples: what a task makes of them, as token ids, once before training."""

import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.data.chats import instruction, messages_of
from deca_node.data.fields import Row, text_of, value_of
from deca_node.data.labels import (
    label_counts,
    label_of,
    label_token_ids,
    label_words,
    warn_of_lookalikes,
    words_of,
)
from deca_node.data.prompts import fields_of, parts_of, prompt_of
from deca_node.data.tokens import Tokenizer
from deca_node.errors import DataError
from deca_node.rows import place

__all__ = [
    "Row",
    "Tokenizer",
    "asked",
    "examples",
    "label_counts",
    "label_of",
    "label_token_ids",
    "label_words",
    "question",
    "questions",
    "text_of",
    "words_of",
]

_log = structlog.get_logger(__name__)


def question(row: Row, settings: DataSettings, where: str) -> str:
    """All that a row gives the model before what it is to learn.

    Two rows with the same one are twins: who trained on one is no longer tested by the other.

    Raises:
        DataError: a field is missing; ``where`` begins the message.
    """
    if settings.task == "classification":
        fields = fields_of(settings.template)
        return json.dumps({name: value_of(row, name, where) for name in fields}, default=str)
    if settings.task == "instruction":
        said = messages_of(row, settings, where)
        return json.dumps([each["content"] for each in said if each["role"] != "assistant"])
    return text_of(row, settings.text_field, where)


def questions(rows: Sequence[Row], settings: DataSettings, source: Path) -> list[str]:
    """:func:`question` of each row, in their order."""
    return [question(row, settings, place(source, index)) for index, row in enumerate(rows)]


def examples(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    source: Path,
    words: Mapping[str, str] | None = None,
) -> list[Example]:
    """Turn rows into examples of at most ``settings.max_tokens`` tokens, in the rows' order.

    - classification: ``[prefix] template completion``. A row that is too long has its longest text
      field cut at the end, so the template's text and the completion stay whole. A row without
      any text is kept, with a warning.
    - instruction: the chat, cut at the end. A row that loses all it would teach is dropped.
    - text: ``[prefix] text [eos]`` in as many pieces as needed; a piece of one token teaches
      nothing and is dropped.

    Args:
        rows: what ``read_rows`` gave.
        settings: the task, its fields and limits.
        tokenizer: the model's.
        source: where the rows come from, for messages.
        words: the label words to accept. None takes ``settings.labels`` or, when that is empty,
            the labels of these rows; give the training rows' words to read test rows.

    Raises:
        DataError: a row does not fit the task, or no row gives an example.
        ConfigError: the template or the label words cannot be used.
    """
    make = _maker(rows, settings, tokenizer, source, words)
    found: list[Example] = []
    reasons: Counter[str] = Counter()
    for index, row in enumerate(rows):
        made = make(row, place(source, index))
        if isinstance(made, str):
            reasons[made] += 1
        else:
            found += made
    why = "; ".join(f"in {count} {reason}" for reason, count in reasons.most_common())
    if not found:
        raise DataError(f"{source}: empty shard: none of {len(rows)} rows yields an example: {why}")
    if reasons:
        _log.warning(
            "rows without an example",
            source=str(source),
            rows=len(rows),
            dropped=reasons.total(),
            why=why,
        )
    if settings.task == "classification":
        _warn_of_blanks(rows, settings, source)
    return found


def asked(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    source: Path,
    words: Mapping[str, str] | None = None,
) -> list[tuple[object, ...]]:
    """What each row gives the model before what it is to learn, in the tokens that are left of it.

    Rows with the same are twins, as :func:`question` has it; here those are, too, that differ only
    behind where ``settings.max_tokens`` cuts them. A row without an example is nobody's twin.

    Arguments and errors are those of ``examples``.
    """
    make = _maker(rows, settings, tokenizer, source, words)
    found: list[tuple[object, ...]] = []
    for index, row in enumerate(rows):
        made = make(row, place(source, index))
        found.append((made, index) if isinstance(made, str) else tuple(e.asked for e in made))
    return found


def _maker(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    source: Path,
    words: Mapping[str, str] | None,
) -> Callable[[Row, str], list[Example] | str]:
    """What makes a row's examples, or says why there are none."""
    if settings.task == "classification":
        if words is None:
            _warn_of_line_breaks(settings)
            values = (
                label_of(row, settings.label_field, settings.labels, place(source, index))
                for index, row in enumerate(rows)
            )
            words = words_of(values, settings)
            if not settings.labels:
                warn_of_lookalikes(words, source)
        completions = label_token_ids(words, settings, tokenizer)
        return partial(_classification, settings, tokenizer, completions)
    if settings.task == "instruction":
        return partial(instruction, settings, tokenizer)
    return partial(_text, settings, tokenizer)


def _classification(
    settings: DataSettings,
    tokenizer: Tokenizer,
    completions: Mapping[str, list[int]],
    row: Row,
    where: str,
) -> list[Example]:
    label = label_of(row, settings.label_field, settings.labels, where)
    if label not in completions:
        raise DataError(
            f"{where}: label {label!r} is not one of: {', '.join(completions)};"
            " add it to data.labels"
        )
    completion = completions[label]
    room = settings.max_tokens - len(tokenizer.prefix) - len(completion)
    prompt = [*tokenizer.prefix, *prompt_of(row, settings, tokenizer, room, where)]
    if not prompt:
        raise DataError(f"{where}: the prompt is empty; add text to data.template")
    trained = [False] * len(prompt) + [True] * len(completion)
    return [Example(prompt + completion, trained, label)]


def _text(
    settings: DataSettings, tokenizer: Tokenizer, row: Row, where: str
) -> list[Example] | str:
    ids = tokenizer.encode(text_of(row, settings.text_field, where))
    if not ids:
        return "there is no text; see data.text_field"
    ids = [*tokenizer.prefix, *ids]
    if tokenizer.eos_id is not None:
        ids = [*ids, tokenizer.eos_id]
    size = settings.max_tokens
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    made = [Example(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]
    return made or "there is one token, and nothing to predict it from; lengthen the text"


def _warn_of_blanks(rows: Sequence[Row], settings: DataSettings, source: Path) -> None:
    parts = parts_of(settings.template)
    part = string.Formatter().get_field
    blank = sum(all(not str(part(name, (), row)[0]).strip() for name in parts) for row in rows)
    if blank:
        _log.warning(
            "rows in which every field named by data.template is empty: the model would learn their"
            " labels with no text; remove them, or correct data.template",
            source=str(source),
            rows=len(rows),
            empty=blank,
        )


def _warn_of_line_breaks(settings: DataSettings) -> None:
    if "\\n" in settings.template:
        _log.warning(
            r"data.template holds \n as two characters, not a line break: in a shell quote it once"
            r""" more, as in -s 'data.template="{text}\nLabel:"'""",
            template=settings.template,
        )
