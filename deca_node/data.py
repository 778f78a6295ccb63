"""Local data set -> resumable mini-batches.

Rows are plain dicts read from a file of this machine; they become token ids once, before training.
From then on one integer, ``BatchStream.position``, says where the node is in its data. This is the
only file that imports ``datasets``.
"""

import csv
import datetime as dt
import decimal
import glob
import io
import json
import math
import random
import re
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch

from deca_node.config import DataSettings
from deca_node.errors import ConfigError, DataError, ModelError, first_line

_MARK = "\0"  # stands for the text where its place in a template is looked for
ROLES = ("system", "user", "assistant", "tool")  # of messages; what their chat templates know
IGNORED = -100  # the target that cross entropy skips, in PyTorch and in Hugging Face models
MAX_CSV_FIELD = 2**31 - 1  # characters; the csv module's own 131,072 is less than a long article

_TEXT = (str, bool, int, float)
# A template says how it writes them; that they were meant as a label or a whole text is a guess.
_IN_TEMPLATE = (*_TEXT, dt.date, dt.time, dt.timedelta, decimal.Decimal)
ROWS_AT_ONCE = 1024  # of a Parquet file

_log = structlog.get_logger(__name__)

Row = Mapping[str, Any]


# Files -> rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a data set; nothing is written beside it and nothing is downloaded.

    JSON Lines, CSV with a header line (values are strings), Parquet, or a folder that
    ``Dataset.save_to_disk`` wrote. Blank lines do not count as rows.

    Raises:
        DataError: naming the file and, where the file has lines, the line.
    """
    try:
        if path.is_dir():
            rows = _read_saved(path)
        elif (reader := _READERS.get(path.suffix.lower())) is None:
            raise DataError(
                f"{path}: unknown kind of data file; use one of {', '.join(_READERS)}"
                " or a folder written by Dataset.save_to_disk"
            )
        else:
            rows = reader(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{where}: not valid JSON ({reason}); each line must be one JSON object"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {_json_type(row)}; each line must be one JSON object")
        if "\\u" in line and not _encodable(row):
            raise DataError(f"{where}: holds half of a surrogate pair, which no text can hold")
        rows.append(row)
    return rows


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _encodable(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] = []
    rows = []
    line = 1
    try:
        for values in reader:
            if not values:
                pass
            elif not header:
                header = values
                if twice := [name for name, count in Counter(header).items() if count > 1]:
                    raise DataError(f"{path}, line {line}: two columns are named {twice[0]!r}")
            elif len(values) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(values)} fields where the header has {len(header)}"
                )
            else:
                rows.append(dict(zip(header, values, strict=True)))
            line = reader.line_num + 1  # a quoted field may span lines: name the first of them
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: not valid CSV ({error})") from None
    return rows


def _datasets() -> Any:
    """The ``datasets`` module: quiet, and barred from the network."""
    import datasets  # noqa: PLC0415 - takes more than a second, and JSON Lines and CSV do without

    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
    return datasets


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    path.open("rb").close()  # the system's own words for a missing or unreadable file
    reader = _datasets().Dataset.from_parquet
    try:
        # Streaming makes no Arrow copy of private data; all that the cache gets is a lock file.
        with tempfile.TemporaryDirectory() as cache:
            pattern = glob.escape(str(path.absolute()))
            # By itself it reads in batches as large as the first row group, which may be empty.
            found = reader(pattern, cache_dir=cache, streaming=True, batch_size=ROWS_AT_ONCE)
            return _plain(found, found.features)
    except Exception as error:  # whatever the reader trips over, the file is to blame
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _read_saved(path: Path) -> list[dict[str, Any]]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.parent.name for entry in path.glob("*/state.json"))
        raise DataError(
            f"{path}: a DatasetDict with the splits {', '.join(splits)}; name the folder of one"
        )
    if not (path / "state.json").is_file():
        raise DataError(f"{path}: not a folder written by Dataset.save_to_disk")
    reader = _datasets().load_from_disk
    try:
        found = reader(str(path))
        return _plain(found.to_list(), found.features)
    except Exception as error:  # as above
        raise DataError(f"{path}: not a readable data set ({first_line(error)})") from error


def _plain(rows: Iterable[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with binary text as text, and with the names of labels that are kept as numbers."""
    class_label = _datasets().ClassLabel
    names = {
        column: dict(enumerate(feature.names))
        for column, feature in features.items()
        if isinstance(feature, class_label)
    }
    return [
        {
            # -1 stands for no label, as in a test split whose labels are secret.
            column: names[column].get(value) if column in names else _decoded(value)
            for column, value in row.items()
        }
        for row in rows
    ]


def _decoded(value: Any) -> Any:
    """Binary text as text; other bytes stay, for a field that nothing reads may be a picture."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        return {name: _decoded(each) for name, each in value.items()}
    return value


_READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def place(source: Path, index: int) -> str:
    """How messages name the row at ``index``: counted from 1, a CSV's header not counted."""
    return f"{source}, row {index + 1}"


def text_of(row: Row, field: str, where: str) -> str:
    """The text in a field; numbers and booleans become text.

    Raises:
        DataError: the field is missing, null or composite; ``where`` begins the message.
    """
    value = _value_of(row, field, where)
    _check(value, field, where, _TEXT)
    return str(value)


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
    def bos_id(self) -> int | None:
        """The token that this model expects before every text, None when it expects none."""

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

    def chat(self, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """A conversation's token ids in order, in segments.

        The flag is True where the segment is an assistant's text, which is to be learned.

        Raises:
            ValueError: the model's chat template does not take these messages.
        """


@dataclass(frozen=True)
class Example:
    """One sequence to train on.

    ``completion`` is as long as ``input_ids``; True marks the tokens that are learned. ``label`` is
    the row's label value (not its word), None outside classification.
    """

    input_ids: list[int]
    completion: list[bool]
    label: str | None = None


def examples(
    rows: Sequence[Row],
    settings: DataSettings,
    tokenizer: Tokenizer,
    source: Path,
    words: Mapping[str, str] | None = None,
) -> list[Example]:
    """Turn rows into examples of at most ``settings.max_tokens`` tokens, in the rows' order.

    - classification: ``[bos] template completion``. A row that is too long has its longest text
      field cut at the end, so the template's text and the completion stay whole.
    - instruction: the chat, cut at the end. A row that loses all it would teach is dropped.
    - text: ``[bos] text [eos]`` in as many pieces as needed; a piece of one token teaches nothing
      and is dropped.

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
    make: Callable[[Row, str], list[Example] | str]  # or why there are none
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
        make = partial(_classification, settings, tokenizer, completions)
    elif settings.task == "instruction":
        make = partial(_instruction, settings, tokenizer)
    else:
        make = partial(_text, settings, tokenizer)

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
    return found


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
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    room = settings.max_tokens - len(start) - len(completion)
    prompt = start + _prompt(row, settings, tokenizer, room, where)
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
    messages = _messages(row, settings, where)
    try:
        segments = tokenizer.chat(messages)
    except ValueError as error:
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from None
    if unheard := _unheard(messages, settings, where):
        return unheard
    ids = [token for segment, _ in segments for token in segment]
    trained = [flag for segment, flag in segments for _ in segment]
    # Nothing predicts the first token, so it alone teaches nothing.
    if not any(trained[1:]):
        return "the answer is empty; give it one"
    size = settings.max_tokens
    if not any(trained[1:size]):
        return f"nothing is learned within data.max_tokens = {size}; raise it"
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
    return [
        {
            key: text_of(entry, key, f"{where}: message {number} of {field!r}")
            for key in ("role", "content")
        }
        for number, entry in enumerate(messages, start=1)
    ]


def _text(
    settings: DataSettings, tokenizer: Tokenizer, row: Row, where: str
) -> list[Example] | str:
    ids = tokenizer.encode(text_of(row, settings.text_field, where))
    if not ids:
        return "there is no text; see data.text_field"
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
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

    They are those of the word after a space, unless the template ends in one, in its place after
    the template's end: alone, SentencePiece would put its mark of a word's begin before it.

    Raises:
        ConfigError: a word has no tokens, or two labels have the same.
    """
    _template_fields(settings.template)
    gap = "" if settings.template[-1:].isspace() else " "
    end = _end(settings.template) or "."  # for what a row ends with
    before = tokenizer.encode(end)
    ids: dict[str, list[int]] = {}
    owner: dict[tuple[int, ...], str] = {}
    for label, word in words.items():
        after = tokenizer.encode(end + gap + word)
        if after[: len(before)] == before:
            ids[label] = after[len(before) :]
        else:  # the word and what precedes it make other tokens together
            ids[label] = tokenizer.encode(gap + word)
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

    @property
    def longest(self) -> int:
        """Tokens of the longest example, to train on or to evaluate with."""
        return max(len(each.input_ids) for each in (*self.train, *self.test))

    @property
    def highest(self) -> int:
        """The largest id of a token in an example or a label."""
        ids = (each.input_ids for each in (*self.train, *self.test))
        return max(map(max, (*ids, *self.completions.values())))

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


def check_room(
    corpus: Corpus, pad_id: int, model: Path, rows: int, positions: tuple[int, bool]
) -> str:
    """Whether a model can take examples: their ids, and as many tokens in a row.

    Args:
        corpus: what the model is to read.
        pad_id: what examples are padded with.
        model: its path.
        rows: of its input embedding; larger ids than its tokenizer has are no harm.
        positions: as ``sizes.positions`` gives them.

    Returns:
        What may do harm; empty when nothing may.

    Raises:
        ModelError: an id has no row.
        ConfigError: an example is longer than the model can take.
    """
    if (highest := max(corpus.highest, pad_id)) >= rows:
        raise ModelError(
            f"{model}: its tokenizer gives ids up to {highest}, its embedding has {rows} rows; put "
            "the tokenizer that belongs to the model into its folder, or enlarge the embedding "
            "(resize_token_embeddings of transformers), the same on all nodes"
        )
    made, bound = positions
    longest = corpus.longest
    if not made or longest <= made:
        return ""
    if bound:
        raise ConfigError(
            f"data.max_tokens: the longest example has {longest} tokens, and {model} can take "
            f"{made}; lower it to {made}"
        )
    return (
        f"the longest example has {longest} tokens, and {model} was made for {made}: beyond, it "
        f"may learn little; set data.max_tokens = {made}"
    )


# Examples -> batches


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
