"""Every setting, typed, with its unit and what it trades.

TOML, ``DECA_…`` environment variables and ``--set`` are read here and nowhere else. Later wins:
defaults, file, environment, ``--set``. Relative paths in a file are relative to that file.
"""

import difflib
import json
import os
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from deca_node.errors import ConfigError

ENV_PREFIX = "DECA_"
DEFAULT_PORT = 7430  # unassigned by IANA

# A name becomes part of a DNS label (63 bytes, RFC 1035), a folder and a log line.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def default_node_name() -> str:
    """This machine's host name, cut down to what a node name may hold."""
    name = re.sub(r"[^a-z0-9-]+", "-", platform.node().split(".")[0].lower()).strip("-")
    return name[:48] or "node"


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunSettings(Section):
    """What all nodes of a run must agree on, besides model, schedule and optimizer."""

    name: Name = "deca"
    seed: int = Field(0, ge=0, lt=2**32)
    method: Literal["deca"] = "deca"
    start_when: int = Field(2, ge=1, le=1000)


class NodeSettings(Section):
    """This machine's part."""

    name: Name = Field(default_factory=default_node_name)
    host: str = "0.0.0.0"  # noqa: S104 - neighbours are on other machines
    port: int = Field(DEFAULT_PORT, ge=0, le=65535)
    advertise: str | None = None
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    threads: int = Field(0, ge=0, le=1024)
    output: Path = Path("out")


class ModelSettings(Section):
    """The base model."""

    path: Path
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    cache: Path = Path("~/.cache/deca-node")

    @field_validator("cache")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return value.expanduser()


class DataSettings(Section):
    """The private data and how rows become examples."""

    train: Path
    test: Path | None = None
    task: Literal["classification", "instruction", "text"] = "classification"
    template: str = "{text}\nLabel:"
    labels: dict[str, str] = Field(default_factory=dict)
    label_field: str = "label"
    prompt_field: str = "prompt"
    response_field: str = "response"
    messages_field: str = "messages"
    text_field: str = "text"
    max_tokens: int = Field(512, ge=8, le=1_000_000)
    batch_size: int = Field(4, ge=1, le=4096)


class ScheduleSettings(Section):
    """How long and in which order."""

    rounds: int = Field(4, ge=1, le=100_000)
    steps: int = Field(48, ge=1, le=1_000_000)
    layers_per_block: int = Field(1, ge=1, le=10_000)
    order: Literal["ascending", "descending", "random"] = "ascending"


class OptimizerSettings(Section):
    """Adam and its correction from the mix (BMA)."""

    learning_rate: Positive = 1e-4
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    adam_eps: Positive = 1e-8
    bma: Literal["on", "off", "trivial"] = "on"
    bma_beta1: Share = 0.3
    bma_beta2: Share = 0.333
    discrepancy: Literal["l2", "none", "lr"] = "l2"


class TopologySettings(Section):
    """Who exchanges with whom."""

    kind: Literal["full", "ring", "erdos_renyi", "bipartite", "explicit"] = "ring"
    p: float = Field(0.5, gt=0, le=1)
    edges: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _edges_only_when_explicit(self) -> "TopologySettings":
        if self.edges and self.kind != "explicit":
            raise ValueError('edges are used with kind = "explicit" only')
        return self


class NetworkSettings(Section):
    """How peers are found and how long they are waited for."""

    preset: Literal["local", "lan", "wan"] = "lan"
    zeroconf: bool = True
    interfaces: tuple[str, ...] = ()
    static_peers: tuple[str, ...] = ()
    step_deadline: Positive | None = None
    visit_deadline: Positive | None = None
    heartbeat: Positive | None = None
    gone_after: Positive | None = None

    @field_validator("static_peers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"{address!r} is not HOST:PORT")
        return value


@dataclass(frozen=True)
class Timing:
    """Deadlines and intervals in seconds.

    ``step_deadline`` bounds what a missing neighbour can cost one step; ``visit_deadline`` what it
    can cost the start of a visit; ``gone_after`` is the silence after which a peer leaves the
    member set. Longer is kinder to slow machines, shorter loses less when one dies without a word
    (a closed connection is noticed at once in any case).
    """

    step_deadline: float
    visit_deadline: float
    heartbeat: float
    gone_after: float
    rpc: float
    browse: float
    redial: float

    @classmethod
    def local(cls) -> "Timing":
        """Several nodes share one machine: steps are slow, the network is not."""
        return cls(60.0, 120.0, 1.0, 60.0, rpc=10.0, browse=3.0, redial=0.5)

    @classmethod
    def lan(cls) -> "Timing":
        """Machines of one room."""
        return cls(30.0, 60.0, 2.0, 30.0, rpc=5.0, browse=5.0, redial=1.0)

    @classmethod
    def wan(cls) -> "Timing":
        """Machines of several sites."""
        return cls(180.0, 300.0, 10.0, 180.0, rpc=20.0, browse=15.0, redial=3.0)


class Settings(BaseSettings):
    """The whole configuration of one node."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    run: RunSettings = RunSettings()
    node: NodeSettings = Field(default_factory=NodeSettings)
    model: ModelSettings
    data: DataSettings
    schedule: ScheduleSettings = ScheduleSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    topology: TopologySettings = TopologySettings()
    network: NetworkSettings = NetworkSettings()

    def timing(self) -> Timing:
        """The preset's timing with the settings that were given in its place."""
        base: Timing = getattr(Timing, self.network.preset)()
        given = {
            field.name: getattr(self.network, field.name)
            for field in fields(Timing)
            if getattr(self.network, field.name, None) is not None
        }
        return replace(base, **given)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the hook's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """``--set`` first, then the environment; the file's source is put in by ``load``."""
        return init_settings, env_settings


def _keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.annotation


KEYS: Mapping[str, Any] = dict(_keys())


def _free_form(key: str) -> bool:
    return get_origin(KEYS[key]) is dict


def _nearest(key: str) -> str:
    if close := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    section = key.partition(".")[0]
    known = sorted(name for name in KEYS if name.startswith(section + ".")) or sorted(
        {name.partition(".")[0] for name in KEYS}
    )
    return "known here: " + ", ".join(known)


def _is_path(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_path(option) for option in get_args(annotation))
    return annotation is Path


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, Mapping) and not (key in KEYS and _free_form(key)):
            yield from _flatten(value, key + ".")
        else:
            yield key, value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _read_file(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `deca-node init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    flat = dict(_flatten(tree))
    for key, value in flat.items():
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown setting {key!r}; {_nearest(key)}")
        if _is_path(KEYS[key]) and isinstance(value, str):
            flat[key] = str(path.parent / Path(value).expanduser())
    return _nest(flat)


def _read_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as --set section.key=value")
        if key not in KEYS:
            raise ConfigError(f"--set {key}: unknown setting; {_nearest(key)}")
        try:
            flat[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            flat[key] = text  # a bare word is a string
    return _nest(flat)


def _check_environment(environ: Mapping[str, str]) -> None:
    for variable in environ:
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        key = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        if key not in KEYS and not any(
            key.startswith(known + ".") for known in KEYS if _free_form(known)
        ):
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            remedy = (
                f"did you mean {ENV_PREFIX}{close[0].upper().replace('.', '__')}?"
                if close
                else "write DECA_SECTION__KEY"
            )
            raise ConfigError(f"environment variable {variable}: unknown setting; {remedy}")


def load(config: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read and check a node's settings.

    Args:
        config: a TOML file, or None to use the environment and ``overrides`` alone.
        overrides: ``section.key=value`` strings; values are TOML, bare words are strings.

    Raises:
        ConfigError: naming the file or variable, the key and the remedy.
    """
    from_file = _read_file(config) if config else {}
    _check_environment(os.environ)

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101 - narrows the type
            return init_settings, env_settings, InitSettingsSource(settings_cls, from_file)

    try:
        return Loaded(**_read_overrides(overrides))
    except ValidationError as error:
        raise ConfigError(_explain(error, config)) from None
    except ValueError as error:  # a variable whose value is not JSON where a list is wanted
        raise ConfigError(f"environment: {error}".splitlines()[0]) from None


def _explain(error: ValidationError, config: Path | None) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"{config}: " if config else ""
    if first["type"] == "missing":
        need = f"{key}.path" if key == "model" else f"{key}.train" if key == "data" else key
        return f"{where}setting {need!r} is missing; give it in the file or with --set {need}=…"
    if first["type"] == "extra_forbidden":
        return f"{where}unknown setting {key!r}; {_nearest(key)}"
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}{key} = {json.dumps(first['input'], default=str)}: {message}{more}"
