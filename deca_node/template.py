"""Settings written as TOML: the file of ``deca-node init``, and all settings of a node."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deca_node.config import Settings, default_node_name

# What nobody can guess for the user; everything else is written as a comment.
_TO_FILL_IN: Mapping[str, Any] = {
    "run.name": "my-run",
    "node.name": default_node_name(),
    "model.path": "path/to/model",
    "data.train": "path/to/train.jsonl",
}
_WIDTH = 98


def commented() -> str:
    """A node.toml that explains every setting and sets only what must be filled in."""
    lines = [
        "# Settings of one deca-node. A line that is commented out shows the default (or, where",
        "# there is none, an example). Every setting can also be given by an environment variable,",
        "# as in DECA_SCHEDULE__STEPS=24, or by --set schedule.steps=24; the latter wins.",
        "# A relative path that is set here is relative to this file; one that is given elsewhere,",
        "# to the folder in which deca-node is called.",
    ]
    for section, info in Settings.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)  # noqa: S101 - narrows the types: all sections are models
        assert issubclass(model, BaseModel)  # noqa: S101
        lines += ["", "", f"[{section}]", *_comment(model.__doc__ or "")]
        for name, field in model.model_fields.items():
            lines += ["", *_setting(f"{section}.{name}", name, field)]
    return "\n".join(lines) + "\n"


def _setting(key: str, name: str, field: FieldInfo) -> list[str]:
    about = _comment(f"{field.description or ''}{_choices(field.annotation)}")
    if key in _TO_FILL_IN:
        return [*about, f"{name} = {value(_TO_FILL_IN[key])}"]
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined:
        default = (field.examples or [""])[0]
    return [*about, f"# {name} = {value(default)}"]


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is not Literal:
        return ""
    return " One of " + ", ".join(value(choice) for choice in annotation.__args__) + "."


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH)]


def document(settings: Settings) -> str:
    """Everything that is set, as a TOML file of its own."""
    lines: list[str] = []
    for section, values in settings.model_dump(mode="json", exclude_none=True).items():
        lines += [f"[{section}]", *(f"{name} = {value(given)}" for name, given in values.items())]
        lines.append("")
    return "\n".join(lines)


def value(given: Any) -> str:
    """A value in TOML."""
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{value(key)} = {value(item)}" for key, item in given.items()) + "}"
    if isinstance(given, list | tuple):
        return "[" + ", ".join(map(value, given)) + "]"
    if isinstance(given, PurePath):
        given = str(given)
    # JSON's texts, numbers and booleans are TOML's, but for U+007F, which TOML wants escaped.
    return json.dumps(given, ensure_ascii=False).replace("\x7f", "\\u007f")
