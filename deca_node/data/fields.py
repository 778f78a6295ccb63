"""One field of a row, as text."""

import datetime as dt
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

from deca_node.errors import DataError

Row = Mapping[str, Any]

TEXT = (str, bool, int, float)

# A template says how it writes them; that they were meant as a label or a whole text is a guess.
IN_TEMPLATE = (*TEXT, dt.date, dt.time, dt.timedelta, decimal.Decimal)


_NULL = "give it a value or remove the row"


def names_of(row: Row) -> str:
    """The fields that a row has, quoted: of a CSV one may begin with a space."""
    return ", ".join(map(repr, row))


def text_of(row: Row, field: str, where: str) -> str:
    """The text in a field; numbers become text, and booleans as JSON writes them.

    Raises:
        DataError: the field is missing, null or composite; ``where`` begins the message.
    """
    value = value_of(row, field, where)
    check(value, field, where, TEXT)
    return json.dumps(value) if isinstance(value, bool) else str(value)


def value_of(row: Row, field: str, where: str) -> Any:
    """What is in a field.

    Raises:
        DataError: the field is missing, null or not finite.
    """
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; it has: {names_of(row)}")
    if row[field] is None:
        raise DataError(f"{where}: field {field!r} is null; {_NULL}")
    _check_finite(row[field], field, where)
    return row[field]


def check(value: Any, field: str, where: str, kinds: tuple[type, ...], remedy: str = "") -> None:
    """Refuse what no text comes from but Python's own for it."""
    if value is None:
        raise DataError(f"{where}: field {field!r} is null; {_NULL}")
    if isinstance(value, bytes):
        raise DataError(f"{where}: field {field!r} is binary and not UTF-8 text; name another")
    if not isinstance(value, kinds):
        kind = type(value).__name__
        raise DataError(f"{where}: field {field!r} is a {kind}, not text{remedy}")
    _check_finite(value, field, where)


def _check_finite(value: Any, field: str, where: str) -> None:
    # pandas writes NaN where there is no number; it would be a label of its own.
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where}: field {field!r} is {value}, not a finite number; correct the row"
        )
