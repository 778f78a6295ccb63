"""A row in ``data.template``, cut to the tokens that there is room for."""

import re
import string
from collections.abc import Callable, Sequence

from deca_node.config import DataSettings
from deca_node.data.fields import IN_TEMPLATE, Row, check, value_of
from deca_node.data.tokens import Tokenizer
from deca_node.errors import ConfigError, DataError

_MARK = "\0"  # stands for the text where its place in a template is looked for


def prompt_of(
    row: Row, settings: DataSettings, tokenizer: Tokenizer, room: int, where: str
) -> list[int]:
    """The filled template in at most ``room`` tokens.

    Raises:
        DataError: the row does not fit the template, or nothing of it fits into ``room``.
    """
    fields = {name: value_of(row, name, where) for name in fields_of(settings.template)}
    for name in parts_of(settings.template):
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
            f"{where}: data.template and the completion leave no room for text in data.max_tokens "
            f"= {settings.max_tokens}; raise it"
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


def _back_to_space(text: str, size: int) -> int:
    """The end of the last whole word in ``text[:size]``, or ``size`` if that gives up over half."""
    end = size
    if not text[size : size + 1].isspace():
        while end and not text[end - 1].isspace():
            end -= 1
    end = len(text[:end].rstrip())
    return end if 2 * end >= size else size


def fields_of(template: str) -> list[str]:
    """The fields of a row that a template needs."""
    try:
        parsed = parts_of(template)
    except ValueError as error:
        raise ConfigError(f"data.template = {template!r}: {error}") from None
    names = [name.partition("[")[0] for name in parsed]
    if any("." in re.sub(r"\[[^]]*\]", "", name) for name in parsed):
        raise ConfigError(
            f"data.template = {template!r}: the name of a field may not contain dots; rename"
            " it, or take a part of it as in {text[part]}"
        )
    if not names or any(not name or name.isdecimal() for name in names):
        raise ConfigError(f"data.template = {template!r}: name the fields of a row, as in {{text}}")
    return names


def parts_of(template: str) -> list[str]:
    """What stands in the braces of a template, format specifications' included."""
    found = []
    for _, name, specification, _ in string.Formatter().parse(template):
        if name is not None:
            found += [name, *parts_of(specification or "")]
    return found


def end_of(template: str) -> str:
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
    check(value, name, where, IN_TEMPLATE, remedy)
