"""Settings by their dotted keys: what there is, what each may be, what a TOML file gives."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deca_node.config.settings import Settings
from deca_node.errors import ConfigError


def keyed_fields(
    model: type[BaseModel] = Settings, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Each setting by its dotted key."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keyed_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


FIELDS: Mapping[str, FieldInfo] = dict(keyed_fields())
KEYS: Mapping[str, Any] = {key: info.annotation for key, info in FIELDS.items()}


def is_free_form(key: str, keys: Mapping[str, Any] = KEYS) -> bool:
    """Whether a setting is a table whose keys are its user's."""
    return get_origin(keys[key]) is dict


def nearest(key: str, keys: Mapping[str, Any] = KEYS) -> str:
    """What to write in place of an unknown setting."""
    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    section = key.partition(".")[0]
    known = sorted(name for name in keys if name.startswith(section + ".")) or sorted(
        {name.partition(".")[0] for name in keys}
    )
    return "known here: " + ", ".join(known)


def kinds_of(annotation: Any) -> set[Any]:
    """The plain types that a setting may have; str stands for words, too."""
    if get_origin(annotation) in (Union, UnionType):
        return {kind for option in get_args(annotation) for kind in kinds_of(option)}
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    return {str} if get_origin(annotation) is Literal else {annotation}


def check_kind(key: str, value: Any, where: str, keys: Mapping[str, Any] = KEYS) -> None:
    """TOML has types: what Python or a variable's text would pass for another is refused.

    Raises:
        ConfigError: naming the key, after ``where``.
    """
    kinds = kinds_of(keys[key])
    shown = f"{where}{key} = {json.dumps(value, default=str)}"
    if kinds & {int, float} and isinstance(value, bool | str):
        raise ConfigError(f"{shown}: a number is needed, without quotes")
    if bool in kinds and not isinstance(value, bool):
        raise ConfigError(f"{shown}: true or false is needed, without quotes")


def flatten(
    tree: Mapping[str, Any], prefix: str = "", keys: Mapping[str, Any] = KEYS
) -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted keys."""
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, Mapping) and not (key in keys and is_free_form(key, keys)):
            yield from flatten(value, key + ".", keys)
        else:
            yield key, value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of values by their dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """What a TOML file says; ``remedy`` is for who names one that is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}; {remedy}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def checked_value(key: str, value: Any, path: Path, keys: Mapping[str, Any] = KEYS) -> Any:
    """A value that a file gives; a path in it is relative to the file.

    Raises:
        ConfigError: no such setting, or not of its type.
    """
    if key not in keys:
        raise ConfigError(f"{path}: unknown setting {key!r}; {nearest(key, keys)}")
    check_kind(key, value, f"{path}: ", keys)
    is_path = Path in kinds_of(keys[key]) and isinstance(value, str)
    if is_path and value.strip() and not value.startswith("~"):
        return str(path.parent / value)
    return value
