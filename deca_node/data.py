"""Rows -> examples: what a task makes of them, as token ids, once before training."""

import datetime as dt
import decimal
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import structlog

from deca_node.batches import Example
from deca_node.config import DataSettings
from deca_node.errors import ConfigError, DataError, ModelError
from deca_node.rows import place, read_rows
from deca_node.sizes import Capacity

_MARK = "\0"  # stands for the text where its place in a template is looked for
ROLES = ("system", "user", "assistant", "tool")  # of messages; what their chat templates know

_TEXT = (str, bool, int, float)
# A template says how it writes them; that they were meant as a label or a whole text is a guess.
_IN_TEMPLATE = (*_TEXT, dt.date, dt.time, dt.timedelta, decimal.Decimal)

_log = structlog.get_logger(__name__)

Row = Mapping[str, Any]


def text_of(row: Row, field: str, where: str) -> str:
    """The text in a field; numbers become text, and booleans as JSON writes them.

    Raises:
        DataError: the field is missing, null or composite; ``where`` begins the message.
    """
    value = _value_of(row, field, where)
    _check(value, field, where, _TEXT)
    return json.dumps(value) if isinstance(value, bool) else str(value)


def question(row: Row, settings: DataSettings, where: str) -> str:
    """All that a row gives the model before what it is to learn.

    Two rows with the same one are twins: who trained on one is no longer tested by the other.

    Raises:
        DataError: a field is missing; ``where`` begins the message.
    """
    if settings.task == "classification":
        fields = _template_fields(settings.template)
        return json.dumps({name: _value_of(row, name, where) for name in fields}, default=str)
    if settings.task == "instruction":
        said = _messages(row, settings, where)
        return json.dumps([each["content"] for each in said if each["role"] != "assistant"])
    return text_of(row, settings.text_field, where)


def questions(rows: Sequence[Row], settings: DataSettings, source: Path) -> list[str]:
    """:func:`question` of each row, in their order."""
    return [question(row, settings, place(source, index)) for index, row in enumerate(rows)]


def _value_of(row: Row, field: str, where: str) -> Any:
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; it has: {', '.join(map(str, row))}")
    if row[field] is None:
        raise DataError(f"{where}: field {field!r} is null")
    _check_finite(row[field], field, where)
    return row[field]


def _check_finite(value: Any, field: str, where: str) -> None:
    # pandas writes NaN where there is no number; it would be a label of its own.
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: field {field!r} is {value}, not a finite number; mend the row")


def _check(value: Any, field: str, where: str, kinds: tuple[type, ...], remedy: str = "") -> None:
    """Refuse what no text comes from but Python's own for it."""
    if value is None:
        raise DataError(f"{where}: field {field!r} is null")
    if isinstance(value, bytes):
        raise DataError(f"{where}: field {field!r} is binary and not UTF-8 text; name another")
    if not isinstance(value, kinds):
        kind = type(value).__name__
        raise DataError(f"{where}: field {field!r} is a {kind}, not text{remedy}")
    _check_finite(value, field, where)


# Rows -> examples


class Tokenizer(Protocol):
    """What this file asks of a model's tokenizer. No method adds tokens that were not asked for."""

    @property
    def prefix(self) -> Sequence[int]:
        """The tokens that this model expects before every text: in most bos, or none."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, None when there is none."""

    @property
    def pad_id(self) -> int:
        """Any token of the vocabulary; it fills places that attention never sees."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""

    def starts(self, text: str) -> tuple[list[int], list[int] | None]:
        """``encode``, and by token where in ``text`` it begins; None if that cannot be told."""

    def in_place(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of consecutive texts, by text, each as it is after those before it."""

    def chat(self, messages: list[dict[str, str]], limit: int) -> list[tuple[list[int], bool]]:
        """A conversation's token ids in order, in segments.

        The flag is True where the segment is an assistant's text, which is to be learned; a blank
        one is not. What follows once there are more than ``limit`` tokens may be left out.

        Raises:
            ValueError: the model's chat template does not take these messages.
        """


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
        raise DataError(f"{source}: empty shard: none of {len(rows)} rows gives an example: {why}")
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
                text_of(row, settings.label_field, place(source, index))
                for index, row in enumerate(rows)
            )
            words = _label_words(values, settings)
            if not settings.labels:
                _warn_of_lookalikes(words, source)
        completions = label_token_ids(words, settings, tokenizer)
        return partial(_classification, settings, tokenizer, completions)
    if settings.task == "instruction":
        return partial(_instruction, settings, tokenizer)
    return partial(_text, settings, tokenizer)


def _classification(
    settings: DataSettings,
    tokenizer: Tokenizer,
    completions: Mapping[str, list[int]],
    row: Row,
    where: str,
) -> list[Example]:
    label = text_of(row, settings.label_field, where)
    if label not in completions:
        raise DataError(
            f"{where}: label {label!r} is not one of: {', '.join(completions)};"
            " add it to data.labels"
        )
    completion = completions[label]
    room = settings.max_tokens - len(tokenizer.prefix) - len(completion)
    prompt = [*tokenizer.prefix, *_prompt(row, settings, tokenizer, room, where)]
    if not prompt:
        raise DataError(f"{where}: the prompt is empty; add text to data.template")
    trained = [False] * len(prompt) + [True] * len(completion)
    return [Example(prompt + completion, trained, label)]


def _prompt(
    row: Row, settings: DataSettings, tokenizer: Tokenizer, room: int, where: str
) -> list[int]:
    """The filled template in at most ``room`` tokens."""
    fields = {name: _value_of(row, name, where) for name in _template_fields(settings.template)}
    for name in _replaced(settings.template):
        _check_part(name, fields, where)

    texts = {name: value for name, value in fields.items() if isinstance(value, str)}
    longest = max(texts, key=lambda name: len(texts[name]), default="")
    text = texts.get(longest, "")

    def filled(text: str) -> str:
        try:
            return settings.template.format_map({**fields, longest: text} if longest else fields)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError(f"{where}: data.template cannot be filled: {error}") from None

    def cut(size: int) -> list[int]:
        return tokenizer.encode(filled(text[:size]))

    # So that the cost depends on what is kept, not on the length of the row.
    high = 8 * max(room, 1)
    while True:
        whole = filled(text[:high])
        ids, starts = tokenizer.starts(whole)
        if len(ids) > room:
            break
        if high >= len(text):
            return ids
        high *= 2
    high = min(high, len(text))
    around = filled(_MARK).split(_MARK)
    # Not where a template has the text twice, or makes something else of it.
    if starts is not None and text[:high].join(around) == whole and len(around) == 2:
        begin, end = len(around[0]), len(whole) - len(around[1])
        size = min(_size_by_starts(starts, room, begin, end), high)
        tidy = _back_to_space(text, size)
        # A guess: the text's end and what follows may be other tokens than in the longer one.
        if tidy > 0 and len(guess := cut(tidy)) <= room:
            return guess
    least = len(cut(0))
    if room < 1 or least > room:
        raise DataError(
            f"{where}: data.template and the completion leave no room for text"
            f" in data.max_tokens = {settings.max_tokens}; raise it"
        )
    size = _longest_fit(lambda size: len(cut(size)), room, (0, least), (high, len(ids)))
    tidy = _back_to_space(text, size)
    ids = cut(tidy)
    return ids if len(ids) <= room else cut(size)


def _size_by_starts(starts: Sequence[int], room: int, begin: int, end: int) -> int:
    """How much of the text between two places fits, judged by a longer one's tokens.

    Args:
        starts: where each token begins.
        room: the most tokens.
        begin: where the text begins.
        end: where it ends; what follows is kept whole.
    """
    kept = room - sum(start >= end for start in starts)
    return max(0, starts[kept] - begin) if kept > 0 else 0


def _longest_fit(
    tokens: Callable[[int], int], room: int, low: tuple[int, int], high: tuple[int, int]
) -> int:
    """The largest size that has at most ``room`` tokens.

    Tokens are of much the same length, so interpolating takes half the tries of halving.

    Args:
        tokens: how many a size has.
        room: the most.
        low: a size that fits and its tokens.
        high: a larger one that does not, and its tokens.
    """
    (size, few), (end, many) = low, high
    while end - size > 1:
        guess = size + round((end - size) * (room + 0.5 - few) / (many - few))
        guess = min(max(guess, size + 1), end - 1)
        found = tokens(guess)
        if found <= room:
            size, few = guess, found
        else:
            end, many = guess, found
    return size


def _template_fields(template: str) -> list[str]:
    """The fields of a row that a template needs."""
    try:
        parsed = _replaced(template)
    except ValueError as error:
        raise ConfigError(f"data.template = {template!r}: {error}") from None
    names = [name.partition("[")[0] for name in parsed]
    if any("." in re.sub(r"\[[^]]*\]", "", name) for name in parsed):
        raise ConfigError(
            f"data.template = {template!r}: no dots in the name of a field; rename the field,"
            " or take a part of it as in {text[part]}"
        )
    if not names or any(not name or name.isdecimal() for name in names):
        raise ConfigError(f"data.template = {template!r}: name the fields of a row, as in {{text}}")
    return names


def _warn_of_blanks(rows: Sequence[Row], settings: DataSettings, source: Path) -> None:
    parts = _replaced(settings.template)
    part = string.Formatter().get_field
    blank = sum(all(not str(part(name, (), row)[0]).strip() for name in parts) for row in rows)
    if blank:
        _log.warning(
            "rows of which all is empty that data.template names: their labels are learned as what"
            " follows no text; take them out, or see data.template",
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


def _replaced(template: str) -> list[str]:
    """What stands in the braces of a template, format specifications' included."""
    found = []
    for _, name, specification, _ in string.Formatter().parse(template):
        if name is not None:
            found += [name, *_replaced(specification or "")]
    return found


def _end(template: str) -> str:
    """What stands after the last field of a template."""
    end = ""
    for text, name, _, _ in string.Formatter().parse(template):
        end = end + text if name is None else ""
    return end


def _check_part(name: str, fields: Row, where: str) -> None:
    """Refuse what ``name`` leads to in a row if it is no text, number or date."""
    try:
        value, _ = string.Formatter().get_field(name, (), fields)
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{where}: data.template cannot be filled: {error}") from None
    remedy = ""
    if isinstance(value, (list, dict)) and value:
        part = 0 if isinstance(value, list) else next(iter(value))
        remedy = f"; name a part of it, as in {{{name}[{part}]}}"
    _check(value, name, where, _IN_TEMPLATE, remedy)


def _back_to_space(text: str, size: int) -> int:
    """The end of the last whole word in ``text[:size]``, or ``size`` if that gives up over half."""
    end = size
    if not text[size : size + 1].isspace():
        while end and not text[end - 1].isspace():
            end -= 1
    end = len(text[:end].rstrip())
    return end if 2 * end >= size else size


def _instruction(
    settings: DataSettings, tokenizer: Tokenizer, row: Row, where: str
) -> list[Example] | str:
    messages, size = _messages(row, settings, where), settings.max_tokens
    try:
        segments = tokenizer.chat(messages, size)
    except ValueError as error:
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from None
    if unheard := _unheard(messages, settings, where):
        return unheard
    # A template's mark of a turn's end would be all that such a chat teaches.
    if not any(each["content"].strip() for each in messages if each["role"] == "assistant"):
        return "the answer is empty; give it one"
    ids = [token for segment, _ in segments for token in segment]
    trained = [flag for segment, flag in segments for _ in segment]
    # Nothing predicts the first token, so it alone teaches nothing.
    if not any(trained[1:size]):
        if len(ids) > size:
            return f"nothing is learned within data.max_tokens = {size}; raise it"
        return "nothing stands before the answer; begin with what the user says"
    return [Example(ids[:size], trained[:size])]


def _unheard(messages: list[dict[str, str]], settings: DataSettings, where: str) -> str:
    """Why a chat without an answer teaches nothing; most templates take any role as it is."""
    found = {message["role"] for message in messages}
    said = f"no message has the role 'assistant' (found: {', '.join(sorted(found))})"
    if found <= set(ROLES):
        return "" if "assistant" in found else f"{said}; give them answers"
    if "assistant" not in found:
        raise DataError(f"{where}: {said}; rename them to user and assistant")
    number, role = next(
        (number, message["role"])
        for number, message in enumerate(messages, start=1)
        if message["role"] not in ROLES
    )
    raise DataError(
        f"{where}: message {number} of {settings.messages_field!r} has the role {role!r}, not one"
        f" of: {', '.join(ROLES)}; rename it"
    )


def _messages(row: Row, settings: DataSettings, where: str) -> list[dict[str, str]]:
    field = settings.messages_field
    if row.get(field) is None:
        if settings.prompt_field not in row:
            raise DataError(
                f"{where}: neither field {field!r} nor field {settings.prompt_field!r};"
                f" it has: {', '.join(map(str, row))}"
            )
        return [
            {"role": "user", "content": text_of(row, settings.prompt_field, where)},
            {"role": "assistant", "content": text_of(row, settings.response_field, where)},
        ]
    messages = row[field]
    if not isinstance(messages, list) or not all(isinstance(entry, Mapping) for entry in messages):
        raise DataError(f"{where}: field {field!r} is not a list of {{role, content}} objects")
    if not messages:
        raise DataError(f"{where}: field {field!r} has no messages; take the row out")
    found = []
    for number, entry in enumerate(messages, start=1):
        place_in_row = f"{where}: message {number} of {field!r}"
        if entry.get("tool_calls"):  # each template writes them in its way; here they would be lost
            raise DataError(
                f"{place_in_row} has tool_calls, which are not trained; write the call into its"
                " content as the model is to say it, or take the row out"
            )
        found.append({key: text_of(entry, key, place_in_row) for key in ("role", "content")})
    return found


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


# Labels


def label_words(examples: Iterable[Example], settings: DataSettings) -> dict[str, str]:
    """Label value -> the word that the model says for it.

    ``settings.labels`` or, when that is empty, the sorted labels of the examples, each its own
    word.
    """
    return _label_words(
        (example.label for example in examples if example.label is not None), settings
    )


def _label_words(values: Iterable[str], settings: DataSettings) -> dict[str, str]:
    return dict(settings.labels) or {value: value for value in sorted(set(values)) if value.strip()}


def _warn_of_lookalikes(labels: Iterable[str], source: Path) -> None:
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
    _template_fields(settings.template)
    gap = "" if settings.template[-1:].isspace() else " "
    end = _end(settings.template) or "."  # for what a row ends with
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


# All of it


@dataclass(frozen=True)
class Corpus:
    """What a node's data files hold.

    Attributes:
        rows: in the file to train on.
        train: examples to train on, one a row or more.
        test: examples to evaluate with; may be empty.
        completions: tokens by label, where there are labels.
        twins: how many rows to test on ask what a row to train on asks.
    """

    rows: int
    train: list[Example]
    test: list[Example]
    completions: dict[str, list[int]]
    twins: int = 0

    def warning(self) -> str:
        """What is wrong with the test; empty when nothing is."""
        if not self.twins:
            return ""
        return (
            f"{self.twins:,} rows of data.test ask what a row of data.train asks: what the model "
            "knows of them says nothing about others; take them out of one of the two"
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


def check_capacity(
    examples: Sequence[Example],
    completions: Iterable[Sequence[int]],
    pad_id: int,
    model: Path,
    capacity: Capacity,
) -> str:
    """Whether a model can take examples: their ids, and as many tokens in a row.

    Labelled examples count with the longest label: evaluation tries each of them on every prompt.

    Args:
        examples: to train on and to evaluate with; at least one.
        completions: of the labels; empty outside classification.
        pad_id: what examples are padded with.
        model: its path.
        capacity: what it can take.

    Returns:
        What may do harm; empty when nothing may.

    Raises:
        ModelError: an id has no row.
        ConfigError: an example is longer than the model can take.
    """
    texts = [example.input_ids for example in examples]
    words = list(completions)
    if (highest := max(pad_id, *map(max, texts), *map(max, words))) >= capacity.ids:
        raise ModelError(
            f"{model}: its tokenizer gives ids up to {highest}, its embedding has {capacity.ids} "
            "rows; put the tokenizer that belongs to the model into its folder, or enlarge the "
            "embedding (resize_token_embeddings of transformers), the same on all nodes"
        )
    sizes = [len(word) for word in words]
    most = max(sizes, default=0)
    longest = max(
        len(text) + (most - sum(example.completion) if words else 0)
        for text, example in zip(texts, examples, strict=True)
    )
    made = capacity.positions
    if not made or longest <= made:
        return ""
    found = f"the longest example has {longest} tokens"
    if longest > max(map(len, texts)):
        found += " with the longest label, which evaluation tries on all"
    fitting = made - (most - min(sizes, default=0))  # a row is cut to fit with its own label
    if capacity.bound:
        raise ConfigError(
            f"data.max_tokens: {found}, and {model} can take {made}; lower it to {fitting}"
        )
    return (
        f"{found}, and {model} was made for {made}: beyond, it may learn little; "
        f"set data.max_tokens = {fitting}"
    )
