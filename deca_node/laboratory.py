"""Runs an experiment's cells one after the other and keeps what they give.

In the folder of results::

    experiment.json       whose folder this is
    cells/NAME.jsonl      one for each cell that is done; kinds of rows: cell, step, visit, node,
                          summary
    model/, data.jsonl    of a rehearsal; .rehearsal says that they are, until experiment.json does

A cell's file is written in one piece when the cell is done. What was interrupted is begun anew.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deca_node import __version__, config, memory, rehearsal, status, virtual_time
from deca_node.batches import Example
from deca_node.config import DataSettings, Settings
from deca_node.corpus import Corpus
from deca_node.data import Row, asked, examples, label_of, label_token_ids, text_of, words_of
from deca_node.disk import alone, replace_folder, translated, write_atomically
from deca_node.errors import ConfigError, DataError, ModelError, OutputError
from deca_node.evaluation import evaluate
from deca_node.experiment import Cell, Experiment, read
from deca_node.fingerprint import schedule_for
from deca_node.methods import choose
from deca_node.models import LanguageModel, pick_device
from deca_node.partition import deal
from deca_node.record import finite
from deca_node.rows import place, read_rows
from deca_node.simulator import Material, Simulation, summary

# Without a terminal a line now and then shows that it is alive.
SAY_SECONDS = 10.0
# Beside a model and data that were made here for an experiment that is not claimed yet.
_MARK = ".rehearsal"
# Settings that say where a file is; what is in it is in the folder's identity.
_PLACES = ("model.path", "model.cache", "data.train", "data.test")

# Of an experiment's identity: a digest of each ready shard.
SHARDS = "shards (content)"

_log = structlog.get_logger(__name__)


def run(path: Path, out: Path | None = None, *, keep_models: bool = False) -> Path:
    """Run the cells of an experiment that are not done yet.

    Args:
        path: the experiment file.
        out: folder of the results; out/NAME when not given.
        keep_models: write a model of each cell that is run, too, into models/CELL.

    Returns:
        The folder of the results.

    Raises:
        ConfigError, DataError, ModelError: the experiment cannot be run.
        OutputError: the folder holds another experiment, or somebody writes there now.
    """
    console = status.make_console()
    experiment = read(path, Path("made"))  # to learn its name, and what is wrong with it
    folder = out or Path("out") / experiment.world.experiment.name
    experiment = read(path, folder.absolute())
    claim_checked(folder)
    with alone(folder, "simulate"):
        laboratory = Laboratory(experiment, folder)
        # By seed, so that a split is made once, and half a comparison is one of all methods.
        order = experiment.world.experiment.seeds.index
        cells = sorted(experiment.cells, key=lambda cell: order(cell.seed))
        left = [cell for cell in cells if not laboratory.is_done(cell)]
        done = len(experiment.cells) - len(left)
        if done:
            console.print(f"{done} of {len(experiment.cells)} cells are done already")
        steps = [laboratory.steps(cell) for cell in left]
        with _progress(console, sum(steps)) as progress:
            for number, cell in enumerate(left, start=1):
                progress.begin(f"cell {number} of {len(left)}: {cell.name}")
                laboratory.run(cell, progress.step, keep_model=keep_models)
                # Its nodes refer to each other, and Python does not count what their tensors take:
                # gigabytes of cell after cell would stay.
                gc.collect()
    return folder


def claim_checked(folder: Path) -> None:
    """Refuse a folder that holds something else than an experiment's results.

    Raises:
        OutputError: it does, or cannot be read.
    """
    with translated(folder):
        if folder.is_dir() and not (folder / "experiment.json").exists():
            names = {p.name for p in folder.iterdir()} - {".lock"}
            # Unmarked, a model and data are a person's own, and must not be made anew.
            if _MARK in names:
                names -= {_MARK, "model", "data.jsonl"}
            if strange := sorted(names):
                raise OutputError(
                    f"{folder}: holds other files ({strange[0]}); choose another --out"
                )


class Laboratory:
    """Model and data of an experiment, loaded once, and the folder of its results.

    Args:
        experiment: what is run.
        folder: of the results.

    Raises:
        DecaError: model, data, settings or folder cannot be used.
    """

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self._folder = folder
        self._path = experiment.path
        base = experiment.cells[0].settings
        if experiment.world.rehearsal.rows:
            _make(experiment, folder)
        if base.node.threads:
            torch.set_num_threads(base.node.threads)
        self._model = LanguageModel.load(base.model, pick_device(base.node.device))
        self._weights = self._model.weights_digest()
        for settings in _distinct(experiment.cells):
            # Now, not when hours of other cells are done.
            try:
                schedule_for(settings, self._model.n_layers)
                choose.prepare(settings, self._model.twin())
            except (ConfigError, ModelError) as error:
                raise type(error)(f"{experiment.path}: {error}") from None
        self._refuse_the_same_run_twice(experiment)
        self._shards = experiment.world.partition.shards
        self._rows: Sequence[Row] = [] if self._shards else read_rows(base.data.train)
        self._test: Sequence[Row] = read_rows(base.data.test) if base.data.test else []
        self._questions: dict[str, list[tuple[object, ...]]] = {}
        self._has_twins = False
        if not self._shards:
            dealt = {self._material_key(cell): cell for cell in experiment.cells}
            for cell in dealt.values():  # now, likewise
                self._split(cell)
        # All that are dealt of the same rows have the same in all, but for twins.
        largest = sorted(experiment.cells, key=lambda cell: cell.world.experiment.nodes)
        for cell in {cell.settings.data.model_dump_json(): cell for cell in largest}.values():
            try:
                warning = self._check_rows(cell)
            except ConfigError as error:
                raise ConfigError(f"{experiment.path}: {error}") from None
            if warning:
                _log.warning(warning)
        self._materials: dict[str, tuple[Material, dict[str, Any]]] = {}
        contents: dict[str, Any] = {"model": f"{self._model.config_digest()} {self._weights}"}
        if self._shards:
            contents |= {"shards": self._shard_digests(experiment), "test": _digest(self._test)}
        else:
            contents["data"] = _digest([self._rows, self._test])
        if self._has_twins:  # earlier versions trained on some of them
            contents["split"] = "without twins of test rows, in tokens"
        _claim(folder, experiment.identity(contents), self._as_now)

    def _refuse_the_same_run_twice(self, experiment: Experiment) -> None:
        seen: dict[str, Cell] = {}
        for cell in experiment.cells:
            settings, world = _told(cell), cell.world.model_dump(mode="json")
            if len(schedule_for(cell.settings, self._model.n_layers).blocks) == 1:
                settings["schedule"]["order"] = None  # one block has no order
            world["experiment"]["greetings"] = cell.everybody
            settings["network"] = cell.settings.network.model_dump(mode="json")
            other = seen.setdefault(json.dumps([settings, world], sort_keys=True), cell)
            if other is not cell:
                raise ConfigError(
                    f"{experiment.path}: grid: {dict(other.values)} and {dict(cell.values)} are the"
                    " same run here; leave one of them out"
                )

    def _shard_digests(self, experiment: Experiment) -> list[str]:
        most = max(cell.world.experiment.nodes for cell in experiment.cells)
        return [_digest(read_rows(path)) for path in self._shard_paths(most)]

    def _as_now(self, found: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        """A folder's identity; one of before each shard had a digest of its own as it is now."""
        if SHARDS not in wanted or SHARDS in found:
            return found
        shards, test = wanted[SHARDS], "test (content)"
        for count in range(1, len(shards) + 1):
            if found.get("data (content)") == _digest([shards[:count], self._test]):
                kept = {key: value for key, value in found.items() if key != "data (content)"}
                return {**kept, SHARDS: shards[:count], test: wanted[test]}
        return found

    def _shard_paths(self, nodes: int) -> list[Path]:
        assert self._shards is not None  # noqa: S101 - asked only then
        paths = [self._shards / f"node-{number}.jsonl" for number in range(nodes)]
        if absent := [path for path in paths if not path.is_file()]:
            raise DataError(f"{absent[0]}: no such file; {nodes} nodes need as many shards")
        return paths

    def _file(self, cell: Cell) -> Path:
        return self._folder / "cells" / f"{cell.name}.jsonl"

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell's results are there.

        Raises:
            OutputError: they are damaged, or were made with other settings, as with the defaults
                of another version.
        """
        path = self._file(cell)
        with translated(path):
            if not path.exists():
                return False
            made = read_cell(path)[0]["settings"]
        now = _compared(json.loads(json.dumps(_told(cell))))
        for key, before in _compared(made).items():
            # A setting that this version has not, or that one had not, is no difference.
            if (after := now.get(key, before)) != before:
                raise OutputError(
                    f"{path}: was made with {key} = {_shown(before)}, which is now {_shown(after)};"
                    f" write it into {self._path.name}, or choose another --out"
                )
        return True

    def steps(self, cell: Cell) -> int:
        """Steps of all nodes of a cell."""
        schedule = schedule_for(cell.settings, self._model.n_layers)
        return schedule.total_steps * cell.world.experiment.nodes

    def run(self, cell: Cell, progress: Callable[[], None], *, keep_model: bool = False) -> None:
        """Run a cell and keep what it gives.

        Args:
            cell: of the grid.
            progress: called after each node's step.
            keep_model: write the model of the first node that has finished, too.

        Raises:
            DataError: its data do not do.
            DeviceError: there is not enough memory.
            OutputError: the results cannot be written.
        """
        began = time.monotonic()
        rows: list[dict[str, Any]] = []

        def tell(row: dict[str, Any]) -> None:
            rows.append(row)
            if row["kind"] == "step":
                progress()

        with memory.suffices(self._model.device):
            material, before = self._material(cell)
            simulation = Simulation(cell, material, tell)
            virtual_time.run(simulation.run())
            measures = simulation.measure()
        if self._model.weights_digest() != self._weights:
            raise RuntimeError("a node has written into weights that all nodes share")
        if keep_model and (model := simulation.finished_model()) is not None:
            replace_folder(self._folder / "models" / cell.name, model.export)
        about = {
            "kind": "cell",
            "values": dict(cell.values),
            "seed": cell.seed,
            "version": __version__,
            "settings": _told(cell, self._folder.absolute()),
            "world": cell.world.model_dump(mode="json"),
        }
        last = {**summary(simulation, rows, measures), **before}
        last["seconds"] = round(time.monotonic() - began, 2)
        lines = [json.dumps(row, allow_nan=False) for row in (about, *rows, *measures, last)]
        path = self._file(cell)
        with translated(path):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, ("\n".join(lines) + "\n").encode())

    # --- data

    def _material(self, cell: Cell) -> tuple[Material, dict[str, Any]]:
        """What its nodes work on, and what the base model reaches on the test."""
        key = self._material_key(cell)
        if key not in self._materials:
            # One at a time: cells of one seed follow each other.
            dealt = self._dealt(cell)
            self._materials = {key: (dealt, self._before(cell, dealt))}
        found, before = self._materials[key]
        schedule = schedule_for(cell.settings, self._model.n_layers)
        return replace(found, schedule=schedule), before

    def _material_key(self, cell: Cell) -> str:
        world, data = cell.world, cell.settings.data
        return json.dumps(
            [
                world.experiment.nodes,
                None if self._shards else [cell.seed, world.partition.model_dump(mode="json")],
                data.model_dump(mode="json"),
            ]
        )

    def _before(self, cell: Cell, material: Material) -> dict[str, Any]:
        if not material.test:
            return {}
        size = cell.settings.data.batch_size
        found = evaluate(self._model, material.test, material.completions, size)
        scores = asdict(found) if found is not None else {}
        return {
            f"before_{name}": finite(scores[name])
            for name in ("accuracy", "macro_f1", "perplexity", "loss")
            if scores.get(name) is not None
        }

    def _dealt(self, cell: Cell) -> Material:
        data, tokenizer = cell.settings.data, self._model.tokenizer
        source, labelled = data.train, data.task == "classification"
        if self._shards is not None:
            paths = self._shard_paths(cell.world.experiment.nodes)
            parts: Sequence[Sequence[Row]] = [read_rows(path) for path in paths]
            test = self._test
            sources = list(paths)
        else:
            parts, test = self._split(cell)
            sources = [source] * len(parts)
        words: dict[str, str] = {}
        if labelled:
            values = {
                label_of(row, data.label_field, data.labels, place(path, index))
                for path, part in zip((*sources, data.test or source), (*parts, test), strict=True)
                for index, row in enumerate(part)
            }
            words = words_of(values, data)
        make = partial(examples, settings=data, tokenizer=tokenizer, words=words or None)
        shards: list[list[Example]] = [
            make(part, source=path) for part, path in zip(parts, sources, strict=True)
        ]
        return Material(
            self._model,
            schedule_for(cell.settings, self._model.n_layers),
            shards,
            make(test, source=data.test or source) if test else [],
            label_token_ids(words, data, tokenizer) if words else {},
        )

    def _check_rows(self, cell: Cell) -> str:
        """Whether the model can take a cell's rows; what may do harm."""
        material = self._dealt(cell)
        train = [example for shard in material.shards for example in shard]
        corpus = Corpus(len(train), train, material.test, material.completions)
        return "; ".join(corpus.warnings(self._model, cell.settings.model.path))

    def _asked(self, data: DataSettings, labels: Iterable[str]) -> list[tuple[object, ...]]:
        """What each row asks; the same in all cells of equal data settings."""
        key = data.model_dump_json()
        if key not in self._questions:
            tokenizer, words = self._model.tokenizer, words_of(labels, data)
            found = asked(self._rows, data, tokenizer, data.train, words)
            self._questions[key] = found
            self._has_twins |= len(set(found)) < len(found)
        return self._questions[key]

    def _split(self, cell: Cell) -> tuple[Sequence[Sequence[Row]], Sequence[Row]]:
        """Rows of each node, and those to test on."""
        data, chosen = cell.settings.data, cell.world.partition
        source, rows, field = data.train, self._rows, data.label_field
        if data.task == "classification":
            labels = [
                label_of(row, field, data.labels, place(source, index))
                for index, row in enumerate(rows)
            ]
        else:  # without labels every row is of the same kind
            labels = [
                text_of(row, field, place(source, index)) if field in row else ""
                for index, row in enumerate(rows)
            ]
        try:
            held = 0 if self._test else chosen.test_per_label
            shards, test = deal(
                labels,
                cell.world.experiment.nodes,
                chosen.alpha,
                cell.seed,
                held,
                partial(self._asked, data, labels),
            )
        except ValueError as error:
            raise DataError(f"{source}: {error}") from None
        parts = [[rows[index] for index in shard] for shard in shards]
        return parts, self._test or [rows[index] for index in test]


def read_cell(path: Path) -> list[dict[str, Any]]:
    """The rows of a cell's file; the first is of kind ``cell``, the last of kind ``summary``.

    Raises:
        OutputError: it is damaged.
    """
    with translated(path):
        try:
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            whole = rows[0]["kind"] == "cell" and rows[-1]["kind"] == "summary"
        except (ValueError, LookupError, TypeError):
            whole = False
    if not whole:
        raise OutputError(f"{path}: damaged; move it away and it is made anew")
    return rows


def _make(experiment: Experiment, folder: Path) -> None:
    """Model and data of a rehearsal: the same at every try.

    What was made before the folder was this experiment's is made anew: it may be another's.
    """
    chosen, claimed = experiment.world.rehearsal, (folder / "experiment.json").exists()
    if not claimed:
        with translated(folder):
            write_atomically(folder / _MARK, b"")
    if not claimed or not (folder / "model" / "model.safetensors").exists():
        rehearsal.write_model(folder / "model", chosen.seed, chosen.layers, chosen.hidden)
    if not claimed or not (folder / "data.jsonl").exists():
        rehearsal.write_data(folder / "data.jsonl", chosen.rows, chosen.seed)


def _told(cell: Cell, folder: Path | None = None) -> dict[str, Any]:
    """A cell's settings as its file has them, for others to read.

    Not where this machine keeps its converted models; what was made in ``folder``, the results', by
    its place there.
    """
    told = cell.settings.model_dump(mode="json", exclude={"node", "network"})
    del told["model"]["cache"]
    for section, name in (("model", "path"), ("data", "train"), ("data", "test")):
        place = told[section][name]
        if folder and place and (path := Path(place)).is_relative_to(folder):
            told[section][name] = path.relative_to(folder).as_posix()
    return told


def _compared(told: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cell's settings, by dotted key, those that decide on its results."""
    return {
        key: value
        for key, value in config.flatten(told)
        if key not in _PLACES and not key.startswith("trust.")
    }


def _claim(
    folder: Path,
    identity: Mapping[str, Any],
    as_now: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]],
) -> None:
    path = folder / "experiment.json"
    # As it is read again.
    wanted = json.loads(json.dumps(identity, default=str))
    with translated(path):
        if not path.exists():
            _write_identity(path, wanted)
            (folder / _MARK).unlink(missing_ok=True)
            return
        try:
            found = json.loads(path.read_bytes())["identity"]
            items = as_now(dict(found), wanted)
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path}: damaged; choose another --out or move it away") from None
    if (other := difference(items, wanted)) is not None:
        key, there, here = other
        raise OutputError(
            f"{folder}: holds another experiment ({key} is {_shown(there)} there,"
            f" {_shown(here)} here); choose another --out or move it away"
        )
    if len(wanted.get(SHARDS, ())) > len(items.get(SHARDS, ())):
        items = wanted
    if items != found:
        with translated(path):
            _write_identity(path, items)


def _write_identity(path: Path, identity: Mapping[str, Any]) -> None:
    tree = {"digest": _digest(identity), "identity": identity}
    write_atomically(path, (json.dumps(tree, indent=1) + "\n").encode())


def difference(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> tuple[str, object, object] | None:
    """The first key in which two experiments' identities differ, and the two values.

    None where they are one experiment's. Ready shards are compared as far as both have them: more
    nodes may be added.
    """
    for key in sorted(there.keys() | here.keys()):
        one, other = there.get(key), here.get(key)
        if key == SHARDS and isinstance(one, list) and isinstance(other, list):
            for number, pair in enumerate(zip(one, other, strict=False)):
                if pair[0] != pair[1]:
                    return f"shard node-{number}.jsonl (content)", *pair
        elif one != other:
            return key, one, other
    return None


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)[:80]


def _digest(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


# Progress


@dataclass
class _Shown:
    """Takes what happens and shows it: a bar on a terminal, else now and then a line."""

    total: int
    console: Console
    bar: Progress | None
    what: str = ""
    done: int = 0
    said: float = -math.inf

    def __post_init__(self) -> None:
        self._first = 0.0  # when the first step was done: what came before it tells no pace
        self._task = self.bar.add_task("", total=self.total) if self.bar is not None else None

    def begin(self, what: str) -> None:
        """Another cell."""
        self.what = what
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, description=what)

    def step(self) -> None:
        """A node has made a step."""
        self.done += 1
        if self.bar is not None and self._task is not None:
            self.bar.advance(self._task)
            return
        now = time.monotonic()
        if self.done == 1:
            self._first = now
        if now - self.said >= SAY_SECONDS:
            self.said = now
            line = f"{self.what}  {self.done}/{self.total} steps"
            if self.done > 1:
                each = (now - self._first) / (self.done - 1)
                line += f", {status.duration(each * (self.total - self.done))} left"
            self.console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[_Shown]:
    if not console.is_terminal:
        yield _Shown(total, console, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield _Shown(total, console, bar)


def _distinct(cells: Sequence[Cell]) -> Iterator[Settings]:
    """The settings of cells that differ in more than their seed and names."""
    seen: set[str] = set()
    for cell in cells:
        key = json.dumps(dict(cell.values), default=str, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield cell.settings
