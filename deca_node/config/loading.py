"""A node's settings from a file, the environment and ``--set``."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
)

from deca_node.config.keys import (
    FIELDS,
    KEYS,
    check_kind,
    checked_value,
    flatten,
    is_free_form,
    kinds_of,
    nearest,
    nest,
    read_toml,
)
from deca_node.config.settings import ENV_PREFIX, Settings
from deca_node.errors import ConfigError


def _read_file(path: Path) -> dict[str, Any]:
    """Key -> value."""
    flat = dict(flatten(read_toml(path, "`deca-node init` writes one")))
    return {key: checked_value(key, value, path) for key, value in flat.items()}


def _read_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Key -> value."""
    flat: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as --set section.key=value")
        if key not in KEYS:
            raise ConfigError(f"--set {key}: unknown setting; {nearest(key)}")
        flat[key] = _override(key, text)
    return flat


def _override(key: str, text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
    value = tree["value"]
    if kinds_of(KEYS[key]) & {str, Path} and not isinstance(value, str):
        return text  # a name may be a number
    if len(tree) > 1:
        raise ConfigError(f"--set {key}: more than one setting; give each a --set of its own")
    check_kind(key, value, "--set ")
    return value


def _check_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Key -> the variable that sets it."""
    found: dict[str, str] = {}
    for variable in environ:
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        key = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        table = next((k for k in KEYS if is_free_form(k) and key.startswith(f"{k}.")), None)
        if table is not None:  # pydantic-settings would read its keys without their case
            whole = ENV_PREFIX + table.upper().replace(".", "__")
            meant = {variable[len(whole) + 2 :]: environ[variable]}
            raise ConfigError(
                f"environment variable {variable}: keys of {table} would lose their case; write "
                f"{whole} as a JSON object, as in {json.dumps(meant)}"
            )
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            remedy = (
                f"did you mean {ENV_PREFIX}{close[0].upper().replace('.', '__')}?"
                if close
                else "write DECA_SECTION__KEY"
            )
            raise ConfigError(f"environment variable {variable}: unknown setting; {remedy}")
        if key in KEYS and get_origin(KEYS[key]) in (tuple, dict):
            try:
                json.loads(environ[variable])
            except ValueError:
                kind = "list" if get_origin(KEYS[key]) is tuple else "object"
                raise ConfigError(
                    f"environment variable {variable}: {environ[variable]!r} is not a JSON {kind}"
                ) from None
        found[key] = variable
    return found


def load(config: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read and check a node's settings.

    Args:
        config: a TOML file, or None to use the environment and ``overrides`` alone.
        overrides: ``section.key=value`` strings; values are TOML, bare words are strings.

    Raises:
        ConfigError: naming the file or variable, the key and the remedy.
    """
    from_file = _read_file(config) if config else {}
    variables = _check_environment(os.environ)
    given = _read_overrides(overrides)

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # By whole settings: pydantic would merge the tables of several sources into one.
            found = {**from_file, **dict(flatten(env_settings())), **given}
            return (InitSettingsSource(settings_cls, nest(found)),)

    try:
        return Loaded()
    except ValidationError as error:
        sources = [
            *((key, "--set ") for key in given),
            *((key, f"environment variable {name}: ") for key, name in variables.items()),
            *((key, f"{config}: ") for key in from_file),
        ]
        raise ConfigError(_explain(error, config, sources)) from None
    except ValueError as error:  # pydantic-settings could not read a variable
        raise ConfigError(f"environment: {error}".splitlines()[0]) from None


def from_values(values: Mapping[str, Any], path: Path) -> Settings:
    """Settings from these values alone, whatever the environment says.

    Args:
        values: by dotted key.
        path: the file that they come from, for messages.

    Raises:
        ConfigError: naming the key and the remedy.
    """

    class Given(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],  # noqa: ARG003
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        return Given(**nest(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, path, [(key, f"{path}: ") for key in values])) from None


def _explain(
    error: ValidationError, config: Path | None, sources: Iterable[tuple[str, str]]
) -> str:
    """One line: who gave the first wrong value, its key and the remedy.

    Args:
        error: what pydantic found.
        config: the file.
        sources: pairs of a key and what to call its giver, those that win first.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    setting = next((known for known in KEYS if f"{key}.".startswith(f"{known}.")), key)
    where = next((name for given, name in sources if f"{given}.".startswith(f"{setting}.")), "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not key:  # of several settings together; see settings._unfit
        text = first["msg"].removeprefix("Value error, ")
        setting = text.partition(" ")[0]
        return next((name for given, name in sources if given == setting), "") + text
    if setting in KEYS and get_origin(KEYS[setting]) is tuple and first["type"] != "value_error":
        example = json.dumps((FIELDS[setting].examples or [[]])[0])
        return f"{where}{setting}: write it as a list, as in {example}{more}"
    if first["type"] == "missing":
        need = f"{key}.path" if key == "model" else f"{key}.train" if key == "data" else key
        file = f"{config}: " if config else ""
        return f"{file}setting {need!r} is missing; give it in the file or with --set {need}=…"
    if first["type"] == "extra_forbidden":
        return f"{where}unknown setting {key!r}; {nearest(key)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{key} = {json.dumps(first['input'], default=str)}: {message}{more}"
