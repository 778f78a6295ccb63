"""An experiment file: settings of nodes, of what they live in, and a grid of values to compare.

Its sections are those of node.toml and those of ``World`` below; ``[grid]`` gives lists of values
for dotted settings of either, whose product, once for each seed, is the experiment's cells. Several
``[[grid]]`` tables are one grid after the other.
"""

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from deca_node import config, rehearsal, topology
from deca_node.config import Name, Positive, Section, Settings
from deca_node.errors import ConfigError
from deca_node.limits import MAX_MEMBERS
from deca_node.topology import TopologySpec

# Beyond this many nodes, everybody greeting everybody costs more than what they compute.
EVERYBODY = 32


class ExperimentSection(Section):
    """What is simulated."""

    name: Name = Field("experiment", description="The experiment; its folder is out/NAME.")
    nodes: int = Field(8, ge=1, le=10_000, description="How many nodes.")
    seeds: tuple[int, ...] = Field(
        (0,),
        min_length=1,
        description="Seeds of the run and of the split of the data; each a cell.",
    )
    greetings: Literal["auto", "everybody", "neighbours"] = Field(
        "auto",
        description="Who greets whom. everybody: as daemons do. neighbours: each node only those "
        "that the topology over all nodes gives it. auto: everybody up to 32 nodes.",
    )
    measured: int | None = Field(
        None, ge=0, description="Nodes whose model is tested, evenly spread. Unset: all."
    )

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value) < 0:
            raise ValueError("write whole numbers of at least 0, each only once")
        return value


class RehearsalSection(Section):
    """A small random model and made-up data in place of model.path and data.train."""

    rows: int = Field(0, ge=0, description="Rows of data; 0: model and data are given.")
    seed: int = Field(0, ge=0, description="Seed of the model and the data.")
    layers: int = Field(rehearsal.LAYERS, ge=1, le=1000, description="Layers of the model.")
    hidden: int = Field(
        rehearsal.HIDDEN, ge=8, le=8192, multiple_of=8, description="Width of the model."
    )


class PartitionSection(Section):
    """How data.train is dealt to the nodes."""

    alpha: Positive = Field(
        0.25, description="Dirichlet concentration: 100 is even, 0.1 very uneven."
    )
    test_per_label: int = Field(
        0, ge=0, description="Rows of each label held out for the test, where data.test is unset."
    )
    shards: Path | None = Field(
        None, description="Folder of ready node-0.jsonl and so on, in place of data.train."
    )


class ComputeSection(Section):
    """What computing takes on the virtual clock."""

    seconds: float = Field(1.0, ge=0, allow_inf_nan=False, description="Seconds of one step.")
    spread: float = Field(
        0.0,
        ge=0,
        le=3,
        description="How far the nodes' speeds differ: a node's seconds are drawn once, log-normal "
        "with this standard deviation of the logarithm.",
    )
    nodes: dict[str, Positive] = Field(
        default_factory=dict, description="Seconds of single nodes, by name."
    )


class LinksSection(Section):
    """Every link between two nodes, each way."""

    delay: float = Field(0.001, ge=0, allow_inf_nan=False, description="Seconds of a message.")
    jitter: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Most seconds that are added to it at random."
    )
    loss: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability that a message of a block is lost, and with it the rest.",
    )
    bandwidth: Positive | None = Field(None, description="MB per second. Unset: unlimited.")


class FaultsSection(Section):
    """What happens to nodes."""

    deaths: dict[str, tuple[float, ...]] = Field(
        default_factory=dict,
        description="By node, the virtual second at which it dies without a word, and the second "
        "at which it starts again, if it does.",
    )
    attacks: dict[str, float] = Field(
        default_factory=dict,
        description="By node, the factor by which it multiplies every block that it sends: -1 "
        "flips all signs, 1e6 is huge. Its own training is as the others'; what is measured "
        "leaves it out.",
    )

    @field_validator("attacks")
    @classmethod
    def _finite(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(map(math.isfinite, value.values())):
            raise ValueError("write finite numbers")
        return value


class World(BaseModel):
    """The sections that node.toml has not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: ExperimentSection = ExperimentSection()
    rehearsal: RehearsalSection = RehearsalSection()
    partition: PartitionSection = PartitionSection()
    compute: ComputeSection = ComputeSection()
    links: LinksSection = LinksSection()
    faults: FaultsSection = FaultsSection()


WORLD_KEYS: Mapping[str, Any] = {key: info.annotation for key, info in config.keyed_fields(World)}
KEYS: Mapping[str, Any] = {**config.KEYS, **WORLD_KEYS}

# Settings that a simulation sets itself, and what to write instead.
_OURS = {
    "run.seed": "give experiment.seeds",
    "run.name": "give experiment.name",
    "run.start_when": "give experiment.nodes",
    "network.zeroconf": "leave it out: simulated nodes know where the others are",
    "network.interfaces": "leave it out: simulated nodes have no network",
    "network.static_peers": "leave it out: simulated nodes know where the others are",
    "network.dns_peers": "leave it out: simulated nodes know where the others are",
    "consensus.tolerance": "leave it out: the agreement after the last round is not simulated",
    "consensus.max_rounds": "leave it out: the agreement after the last round is not simulated",
    "metrics.port": "leave it out: `deca-node report` shows a simulation's curves",
    "tensorboard.folder": "leave it out: `deca-node report` shows a simulation's curves",
}
_NODES_OWN = ("node.device", "node.threads")
# What daemons do and simulated nodes do not, and what to write instead.
_NOT_SIMULATED = {
    "network.send_rate": "give links.bandwidth",
    "network.send_rate_per_peer": "give links.bandwidth",
    "network.catch_up_share": "give links.bandwidth",
    "network.overlap": "leave it out",
    "metrics.host": "leave it out",
    **dict.fromkeys((key for key in config.KEYS if key.startswith("trust.")), "leave it out"),
}
# Settings that have an effect only beside these values of another one.
_NEEDS = {
    "topology.p": ("topology.kind", ("erdos_renyi",)),
    "optimizer.bma_beta1": ("optimizer.bma", ("on",)),
    "optimizer.bma_beta2": ("optimizer.bma", ("on",)),
    "optimizer.discrepancy": ("optimizer.bma", ("on", "trivial")),
    "aggregation.hostile": ("aggregation.rule", ("clipped", "trimmed")),
    "aggregation.tau": ("aggregation.rule", ("clipped",)),
}
# What is read once for all cells.
_SHARED = ("model.", "rehearsal.", "data.train", "data.test", "partition.shards", "node.")
_NOT_IN_GRID = ("experiment.name", "experiment.seeds")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        number: its place in the experiment.
        values: what the grid gives it, by dotted setting.
        seed: of the run and the split.
        settings: of every node, but for its name and its share of the data.
        world: what they live in.
    """

    number: int
    values: Mapping[str, Any]
    seed: int
    settings: Settings
    world: World

    @property
    def nodes(self) -> list[str]:
        """The nodes' names, those of a testbed."""
        return [f"node-{number}" for number in range(self.world.experiment.nodes)]

    @property
    def spec(self) -> TopologySpec:
        """How the graph is made."""
        chosen = self.settings.topology
        return TopologySpec(chosen.kind, chosen.p, chosen.edges, self.seed)

    @property
    def everybody(self) -> bool:
        """Whether everybody greets everybody."""
        chosen = self.world.experiment
        if chosen.greetings == "auto":
            return chosen.nodes <= EVERYBODY
        return chosen.greetings == "everybody"

    @property
    def name(self) -> str:
        """A file name that no other cell of the experiment has, and that people can read."""
        values = dict(sorted(self.values.items()))  # in whatever order the file gives them
        words = "-".join(re.sub(r"[^a-z0-9.]+", "", str(v).lower()) for v in values.values())
        text = json.dumps([values, self.seed])
        digest = xxhash.xxh3_64_hexdigest(text.encode())[:8]
        return f"{words[:60]}{'-' if words else ''}seed{self.seed}-{digest}"

    def _check_choices(self, path: Path) -> None:
        """Refuse what the grid varies without effect: its cells would be the same run."""
        for key in self.values:
            if key in _NOT_SIMULATED:
                raise ConfigError(
                    f"{path}: grid: {key} has no effect in a simulation; {_NOT_SIMULATED[key]}"
                )
            if key not in _NEEDS:
                continue
            other, needed = _NEEDS[key]
            section, name = other.split(".")
            value = getattr(getattr(self.settings, section), name)
            if value not in needed:
                remedy = (
                    f"vary it in a [[grid]] of its own, without that {other}"
                    if other in self.values
                    else f'leave it out, or set {other} = "{needed[0]}"'
                )
                raise ConfigError(
                    f'{path}: grid: {key} has no effect where {other} is "{value}"; {remedy}'
                )

    def check(self, path: Path) -> None:
        """What can be told before anything is loaded.

        Raises:
            ConfigError: one line.
        """
        self._check_choices(path)
        names, chosen = self.nodes, self.settings.topology
        stranger = {name: "topology.edges" for edge in chosen.edges for name in edge}
        stranger |= dict.fromkeys(self.world.compute.nodes, "compute.nodes")
        stranger |= dict.fromkeys(self.world.faults.deaths, "faults.deaths")
        stranger |= dict.fromkeys(self.world.faults.attacks, "faults.attacks")
        for name, key in stranger.items():
            if name not in set(names):
                raise ConfigError(
                    f"{path}: {key} names {name!r}; the nodes are node-0 to {names[-1]}"
                )
        if chosen.kind == "explicit" and chosen.edges:
            drawn = topology.graph(names, self.spec)
            if cut := sorted(drawn.keys() - topology.component(drawn, names[0])):
                raise ConfigError(
                    f"{path}: topology.edges: the graph is not connected: no way from {names[0]}"
                    f" to {cut[0]}; add an edge, or give none at all to train alone"
                )
        if self.everybody and len(names) > MAX_MEMBERS:
            raise ConfigError(
                f"{path}: experiment.nodes = {len(names)}: everybody greets at most {MAX_MEMBERS}"
                ' nodes; set experiment.greetings = "neighbours"'
            )
        for name, times in self.world.faults.deaths.items():
            fits = 1 <= len(times) <= 2 and all(map(math.isfinite, times)) and times[0] >= 0
            if not fits or (len(times) == 2 and times[1] <= times[0]):
                raise ConfigError(
                    f"{path}: faults.deaths.{name}: write [second of death] or [second of death, "
                    "second of return]"
                )


@dataclass(frozen=True)
class Experiment:
    """What a file asks for.

    Attributes:
        path: the file.
        base: the values that all cells begin with, by dotted setting.
        keys: the settings that the grid varies.
        cells: one for each combination and seed.
    """

    path: Path
    base: Mapping[str, Any]
    keys: Sequence[str]
    cells: Sequence[Cell]

    @property
    def world(self) -> World:
        """Of the first cell; for what is the same in all of them."""
        return self.cells[0].world

    def identity(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """What makes this experiment this one: a folder of results belongs to it alone.

        Seeds and the values of the grid may be added later; where files lie does not matter.

        Args:
            contents: digests of what the files that it names hold.
        """
        base = {
            key: value
            for key, value in self.base.items()
            if key != "experiment.seeds" and not key.startswith("node.") and not _is_path(key)
        }
        return {
            **base,
            "grid": sorted(self.keys),
            **{f"{k} (content)": v for k, v in contents.items()},
        }


def read(path: Path, folder: Path) -> Experiment:
    """Read an experiment file and check it as far as it can be without model and data.

    Args:
        path: the file.
        folder: of the results, where model and data of a rehearsal are made.

    Raises:
        ConfigError: one line naming file, setting and remedy.
    """
    tree = config.read_toml(path, "examples/experiments has some")
    grids = tree.pop("grid", {})
    base = {key: _checked(key, value, path) for key, value in config.flatten(tree, keys=KEYS)}
    world = _world(base, path)
    given: Collection[str] = base.keys()
    if world.rehearsal.rows:
        for key in ("model.path", "data.train", "partition.shards"):
            if key in base:
                raise ConfigError(f"{path}: give either rehearsal.rows or {key}")
        made = {"model.path": str(folder / "model"), "data.train": str(folder / "data.jsonl")}
        given = base.keys()
        base = {**rehearsal.SETTINGS, **base, **made}
    elif world.partition.shards is not None:
        base.setdefault("data.train", str(world.partition.shards))
    tables = grids if isinstance(grids, list) else [grids]
    if not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError(f"{path}: grid: write [grid] and below it setting = [value, …]")
    choices = [_choices(table, path) for table in tables] or [{}]
    keys = list(dict.fromkeys(key for table in choices for key in table))
    cells: list[Cell] = []
    for values in _products(choices):
        for seed in world.experiment.seeds:
            flat = {**base, **values, "run.seed": seed, "run.name": world.experiment.name}
            ours = {key: value for key, value in flat.items() if key in WORLD_KEYS}
            method = flat.get("run.method", config.RunSettings.model_fields["method"].default)
            theirs = {
                key: value
                for key, value in flat.items()
                if key not in WORLD_KEYS
                # What the rehearsal sets for its own sake binds no method that has no such setting.
                and (key in given or key in values or config.has(str(method), key))
            }
            cell = Cell(
                len(cells), values, seed, config.from_values(theirs, path), _world(ours, path)
            )
            cell.check(path)
            cells.append(cell)
    _check_idle(base, keys, world, path)
    names: dict[str, Cell] = {}
    for cell in cells:
        if names.setdefault(cell.name, cell) is not cell:
            raise ConfigError(f"{path}: the grid gives {dict(cell.values)} twice")
    return Experiment(path, base, keys, cells)


def _checked(key: str, value: Any, path: Path) -> Any:
    if key in _OURS:
        raise ConfigError(f"{path}: {key} is set by the simulation; {_OURS[key]}")
    if key.startswith("node.") and key in KEYS and key not in _NODES_OWN:
        raise ConfigError(f"{path}: {key} is set by the simulation; leave it out")
    return config.checked_value(key, value, path, KEYS)


def _check_idle(base: Mapping[str, Any], keys: Sequence[str], world: World, path: Path) -> None:
    """Refuse what would have no effect: cells that differ in it would be the same run."""
    idle: dict[str, str] = {}
    if world.partition.shards is not None:
        idle = dict.fromkeys(("partition.alpha", "partition.test_per_label"), "partition.shards")
    if "data.test" in base:
        idle["partition.test_per_label"] = "data.test"
    for key, reason in idle.items():
        if key in base or key in keys:
            raise ConfigError(f"{path}: {key} has no effect beside {reason}; leave one of them out")


def _choices(table: Mapping[str, Any], path: Path) -> dict[str, list[Any]]:
    found = {}
    for key, values in config.flatten(table):
        if key not in KEYS:
            raise ConfigError(f"{path}: grid: unknown setting {key!r}; {config.nearest(key, KEYS)}")
        if key.startswith(_SHARED) or key in _NOT_IN_GRID:
            raise ConfigError(f"{path}: grid: {key} is the same for a whole experiment")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid: {key}: write a list of values to compare")
        found[key] = [_checked(key, value, path) for value in values]
    return found


def _products(tables: Sequence[Mapping[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    for table in tables:
        for chosen in itertools.product(*table.values()):
            yield dict(zip(table, chosen, strict=True))


def _world(flat: Mapping[str, Any], path: Path) -> World:
    ours = {key: value for key, value in flat.items() if key in WORLD_KEYS}
    try:
        return World(**config.nest(ours))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        shown = json.dumps(first["input"], default=str)
        raise ConfigError(f"{path}: {key} = {shown}: {first['msg']}") from None


def _is_path(key: str) -> bool:
    return KEYS[key] is Path or KEYS[key] == Path | None
