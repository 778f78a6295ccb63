"""Several real nodes on one machine: split the data, start them, watch, compare their results.

Each node is a ``deca-node start`` process with a folder of its own::

    OUT/testbed.json      what was asked for, so that the same command resumes
    OUT/data/             the shards, when they were made here
    OUT/node-0/           node.toml, log.jsonl and what the node writes
    OUT/results.json, OUT/results.png
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from deca_node import registry, status, template
from deca_node.config import ENV_PREFIX, Settings, load
from deca_node.data import place, read_rows, text_of
from deca_node.disk import alone, translated, write_atomically
from deca_node.errors import DataError, OutputError, SwarmError
from deca_node.partition import write_shards
from deca_node.pb import node_pb2 as pb
from deca_node.record import read_summary
from deca_node.transport.client import ask_all
from deca_node.waiting import happens

POLL_SECONDS = 1.0
ASK_SECONDS = 2.0
# Without a terminal a line now and then shows that it is alive.
SAY_SECONDS = 10.0
# A node ends within 5 s of SIGTERM; on a machine this busy we allow it more.
STOP_SECONDS = 20.0
# Elements of a tensor that are compared at once: 16 MB a node as float32.
SLICE = 4_000_000
_SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1", "perplexity": "perplexity"}


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        nodes: how many.
        config: settings of all nodes; ``base_settings`` says which of them are ours.
        overrides: ``section.key=value`` on top.
        train: labelled data to split with ``concentration``, ``seed`` and ``label_field``.
        shards: folder of ready shards, in place of ``train``.
        test: held-out data, the same for all.
        test_per_label: rows of each label to hold out of ``train`` in place of ``test``.
        concentration: of the Dirichlet distribution.
        seed: of the split.
        label_field: None takes the setting data.label_field.
        out: folder for everything.
        isolated: no edges, for comparison.
    """

    nodes: int
    config: Path | None
    overrides: tuple[str, ...]
    train: Path | None
    shards: Path | None
    test: Path | None
    test_per_label: int
    concentration: float
    seed: int
    label_field: str | None
    out: Path
    isolated: bool


@dataclass(frozen=True)
class Measure:
    """One node's results, from its summary.json."""

    node: str
    label_counts: Mapping[str, int]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    bytes_sent: int
    bytes_received: int


def run(plan: Plan) -> None:
    """Run a testbed to its end and write its results.

    Raises:
        SwarmError: a node did not finish; the others were stopped.
        OutputError: the folder holds something else, or a finished run.
        KeyboardInterrupt: interrupted; all nodes have ended with their state saved.
        DecaError: settings or data cannot be used.
    """
    out = plan.out.absolute()
    base = base_settings(plan, out)
    with alone(out, "testbed"):
        _run(plan, base, out)


def _run(plan: Plan, base: Settings, out: Path) -> None:
    began = time.monotonic()
    console = status.make_console()
    mark = _Mark.claim(out, _intent(plan, base))
    nodes = node_settings(plan, base, out)
    for settings in nodes:
        write_settings(settings)
    try:
        finished = asyncio.run(supervise(nodes, console))
    finally:
        mark.add(time.monotonic() - began)
    if not finished:
        console.print(f"stopped, state saved in {plan.out}; the same command resumes")
        raise KeyboardInterrupt

    measures = [measured(settings.node.output) for settings in nodes]
    models = [settings.node.output / "model" for settings in nodes]
    results = summarise(measures, disagreement(models), mark.seconds, mark.intent)
    picture = _draw(nodes, measures, out / "results.png", console)
    # The last file to be written: its presence says that the run is complete.
    with translated(out):
        write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    console.print(_results_table(measures))
    console.print(
        f"disagreement {results['disagreement']:.4g}"
        f"  wall time {status.duration(results['wall_seconds'])}",
        highlight=False,
    )
    for path in [out / "results.json", *picture, *models]:  # named as the user named the folder
        console.print(str(plan.out / path.relative_to(out)), soft_wrap=True, highlight=False)


# Settings and data of the nodes


def base_settings(plan: Plan, out: Path, preset: str = "local") -> Settings:
    """Settings that all nodes share; environment variables are read here and not by the nodes.

    Ours, whatever was given: name, addresses and output of each node, its share of the data, how
    many are waited for, how they meet (zeroconf on the loopback interface), that they end with the
    run, and a run's name that is no other's. ``preset`` and the threads are ours only where they
    were not given.

    Raises:
        ConfigError: a setting is wrong.
    """
    data = template.value(str(plan.train or plan.shards))  # in its place until there are shards
    settings = load(plan.config, [*plan.overrides, f"data.train={data}"])
    update: dict[str, dict[str, Any]] = {
        "node": {
            "host": "127.0.0.1",
            "port": 0,
            "advertise": None,
            "advertise_port": None,
            "output": out,
            "stay": False,
            "health_port": None,
        },
        "run": {"name": own_name(settings.run.name, out), "start_when": plan.nodes},
        "network": {
            "zeroconf": True,
            "interfaces": ("127.0.0.1",),
            "static_peers": (),
            "dns_peers": (),
        },
        "metrics": {"port": None},
        "model": {
            "path": settings.model.path.absolute(),
            "cache": settings.model.cache.absolute(),
        },
        "topology": {"kind": "explicit", "edges": ()} if plan.isolated else {},
        "data": {"label_field": plan.label_field} if plan.label_field else {},
    }
    if "threads" not in settings.node.model_fields_set:
        update["node"]["threads"] = max(1, torch.get_num_threads() // plan.nodes)
    if "preset" not in settings.network.model_fields_set:
        update["network"]["preset"] = preset
    return updated(settings, update)


def own_name(run: str, out: Path) -> str:
    """A run name of this folder alone, so that two testbeds on one machine never meet."""
    digest = hashlib.sha256(str(out).encode()).hexdigest()[:6]
    return f"{run[:41]}-{digest}"  # 48 characters at most


def updated(settings: Settings, update: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings with others in their place: section -> name -> value."""
    return settings.model_copy(
        update={
            section: getattr(settings, section).model_copy(update=dict(values))
            for section, values in update.items()
        }
    )


def _intent(plan: Plan, base: Settings) -> dict[str, Any]:
    """What makes this testbed this testbed."""
    held = {
        "nodes": plan.nodes,
        "train": plan.train,
        "shards": plan.shards,
        "test": plan.test,
        "test_per_label": plan.test_per_label,
        "concentration": plan.concentration,
        "seed": plan.seed,
        "isolated": plan.isolated,
    }
    intent = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in held.items()
    }
    settings = base.model_dump(
        mode="json", exclude={"node": {"threads", "output"}, "data": {"train"}}
    )
    return {**intent, "settings": settings}


def node_settings(plan: Plan, base: Settings, out: Path) -> list[Settings]:
    """Write the shards if need be, and give each node its own settings.

    Raises:
        DataError: there are too few shards, or the data cannot be split.
    """
    folder = plan.shards.absolute() if plan.shards else out / "data"
    if plan.train is not None and not (folder / "node-0.jsonl").exists():
        write_shards(
            plan.train,
            folder,
            plan.nodes,
            plan.concentration,
            plan.seed,
            label_field=base.data.label_field,
            test_per_label=plan.test_per_label,
        )
    trains = [folder / f"node-{number}.jsonl" for number in range(plan.nodes)]
    if absent := [str(path) for path in trains if not path.is_file()]:
        raise DataError(f"{absent[0]}: no such file; {plan.nodes} nodes need as many shards")
    test = plan.test or base.data.test
    if test is None and (folder / "test.jsonl").is_file():
        test = folder / "test.jsonl"
    labels = base.data.labels
    if base.data.task == "classification" and not labels:
        labels = all_labels([*trains, *([test] if test else [])], base.data.label_field)
    return [
        updated(
            base,
            {
                "node": {"name": f"node-{number}", "output": out / f"node-{number}"},
                "data": {
                    "train": train,
                    "test": test.absolute() if test else None,
                    "labels": labels,
                },
            },
        )
        for number, train in enumerate(trains)
    ]


def all_labels(paths: Sequence[Path], field: str) -> dict[str, str]:
    """Every label of the whole data set as its own word: a node alone would not know them all."""
    found = {
        text_of(row, field, place(path, index))
        for path in paths
        for index, row in enumerate(read_rows(path))
    }
    return {label: label for label in sorted(found)}


class _Mark:
    """testbed.json: whose folder this is, and the seconds spent in it before now."""

    def __init__(self, path: Path, intent: dict[str, Any], seconds: float) -> None:
        self.path, self.intent, self.seconds = path, intent, seconds

    @classmethod
    def claim(cls, out: Path, intent: dict[str, Any]) -> "_Mark":
        """Take the folder, or recognise what an interrupted run of the same plan left there.

        A mark under which no node has begun holds nothing: a failed try is not in the way.

        Raises:
            OutputError: it holds something else.
        """
        path = out / "testbed.json"
        elsewhere = "choose another --out or move it away"
        with translated(out):
            if (out / "results.json").exists():
                raise OutputError(f"{out}: this run is finished (results.json); {elsewhere}")
            if not path.exists():
                if any(out.glob("node-*")) or (out / "data").exists():
                    raise OutputError(f"{out}: holds nodes of another run; {elsewhere}")
                out.mkdir(parents=True, exist_ok=True)
                mark = cls(path, intent, 0.0)
                mark.add(0.0)
                return mark
            try:
                found = json.loads(path.read_bytes())
                held, seconds = dict(found["intent"]), float(found["seconds"])
            except (ValueError, TypeError, KeyError):
                raise OutputError(f"{path}: damaged; {elsewhere}") from None
            if not any(out.glob("node-*/run.json")):
                # No node has begun: what was asked for may be corrected, the data as well.
                for shard in (*out.glob("data/node-*.jsonl"), out / "data/test.jsonl"):
                    shard.unlink(missing_ok=True)
                mark = cls(path, intent, 0.0)
                mark.add(0.0)
                return mark
        old, new = _flat(held), _flat(json.loads(json.dumps(intent)))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise OutputError(
                    f"{out}: holds another run ({name} is {old.get(name)!r} there,"
                    f" {new.get(name)!r} here); {elsewhere}"
                )
        return cls(path, intent, seconds)

    def add(self, seconds: float) -> None:
        """Count time that was spent on the run."""
        self.seconds += seconds
        tree = {"intent": self.intent, "seconds": self.seconds}
        with translated(self.path):
            write_atomically(self.path, (json.dumps(tree, indent=2) + "\n").encode())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Processes


def write_settings(settings: Settings) -> None:
    """Make a node's folder and write there what it reads its settings from.

    Raises:
        DiskFullError, OutputError: it cannot be written.
    """
    folder = settings.node.output
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "node.toml", template.document(settings).encode())


def interruption() -> asyncio.Event:
    """An event that the signals by which people end a verb set from now on."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupted.set)
    return interrupted


async def supervise(
    nodes: Sequence[Settings],
    console: Console,
    enough: Callable[[Mapping[str, pb.NodeStatus | str]], bool] | None = None,
) -> bool:
    """Run all nodes until all have finished; False when a signal ended them.

    Args:
        nodes: whose settings are written.
        console: where the progress is shown.
        enough: asked again and again with what is known of the nodes; True ends them early.

    Raises:
        SwarmError: one failed; the others were stopped.
    """
    interrupted = interruption()
    children: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        show = stack.enter_context(display(console))
        try:
            for settings in nodes:
                log = stack.enter_context((settings.node.output / "log.jsonl").open("ab"))
                children[settings.node.name] = spawn(settings, log)
            known: dict[str, pb.NodeStatus | str] = dict.fromkeys(children, "starting")
            while any(child.poll() is None for child in children.values()):
                _check(nodes, children)
                known |= await poll(children)
                show(known)
                if await happens(interrupted, POLL_SECONDS):
                    return False
                if enough is not None and enough(known):
                    return True
            _check(nodes, children)
        finally:
            await asyncio.gather(*(asyncio.to_thread(end, one) for one in children.values()))
    for settings in nodes:
        if not has_finished(settings.node.output):
            raise SwarmError(f"{settings.node.name} was stopped; run the same command to resume")
    return True


def spawn(settings: Settings, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a node whose settings are written."""
    # What variables set is in node.toml already; there they must not win over what is per node.
    environment = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)
    }
    command = [sys.executable, "-m", "deca_node", "start", "--config"]
    return subprocess.Popen(  # noqa: S603 - our own program
        [*command, str(settings.node.output / "node.toml")],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and we pass it on
    )


def _check(nodes: Sequence[Settings], children: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for settings in nodes:
        if code := children[settings.node.name].poll():
            log = settings.node.output / "log.jsonl"
            raise SwarmError(
                f"{settings.node.name} failed (exit code {code}): {last_words(log)}; see {log}"
            )


def last_words(log: Path) -> str:
    """What a node's log says last: an error's one line, or the last event."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = next((line for line in reversed(lines) if line.strip()), "its log is empty")
    try:
        record = json.loads(text)
    except ValueError:
        return text
    if not isinstance(record, dict):
        return text
    detail = str(record.get("exception", "")).strip().rpartition("\n")[2]
    return ": ".join(filter(None, [str(record.get("event", text)), detail]))


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process: kindly, and after a while by force."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


async def poll(children: Mapping[str, subprocess.Popen[bytes]]) -> dict[str, pb.NodeStatus | str]:
    """Ask the nodes that answer for their status; of the others only those that ended are told."""
    names = {child.pid: name for name, child in children.items()}
    entries = [entry for entry in registry.local_nodes() if entry.pid in names]
    answers = await ask_all([entry.address for entry in entries], ASK_SECONDS)
    found: dict[str, pb.NodeStatus | str] = {
        names[entry.pid]: answer
        for entry, answer in zip(entries, answers, strict=True)
        if isinstance(answer, pb.NodeStatus)
    }
    return found | {name: "ended" for name, child in children.items() if child.poll() is not None}


@contextlib.contextmanager
def display(console: Console) -> Iterator[Callable[[Mapping[str, pb.NodeStatus | str]], None]]:
    """Yields what takes all nodes' states: a live table, or now and then a line."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda known: live.update(status.render_swarm(known), refresh=True)
        return
    began = time.monotonic()
    said = -math.inf

    def say(known: Mapping[str, pb.NodeStatus | str]) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            console.print(
                f"{status.duration(now - began)}  {progress_line(known)}",
                soft_wrap=True,
                highlight=False,
            )

    yield say


def progress_line(known: Mapping[str, pb.NodeStatus | str]) -> str:
    """All nodes in a line; those that do the same share a phrase."""
    phrases: dict[str, list[str]] = {}
    for name, state in known.items():
        phrases.setdefault(state if isinstance(state, str) else _phrase(state), []).append(name)
    return "; ".join(f"{', '.join(names)}: {phrase}" for phrase, names in phrases.items())


def _phrase(now: pb.NodeStatus) -> str:
    if now.waiting_for:
        return f"{status.phase(now.phase)}, {now.waiting_for}"
    loss = f", loss {now.loss:.3f}" if now.loss else ""
    return f"{status.phase(now.phase)} {now.steps_done}/{now.steps_total}{loss}"


# Results


def measured(folder: Path) -> Measure:
    """A finished node's results.

    Raises:
        OutputError: its summary is missing or damaged.
    """
    path = folder / "summary.json"
    summary = read_summary(path)
    try:
        return Measure(
            summary["node"],
            summary["label_counts"],
            summary["before"] or {},
            summary["after"] or {},
            summary["bytes_sent"],
            summary["bytes_received"],
        )
    except (KeyError, TypeError):
        raise OutputError(f"{path}: missing or damaged") from None


def has_finished(folder: Path) -> bool:
    """Whether a node's run is complete.

    Raises:
        OutputError: its summary cannot be read.
    """
    return bool(read_summary(folder / "summary.json").get("finished"))


def summarise(
    measures: Sequence[Measure],
    disagreement: float,
    wall_seconds: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds; accuracies are null where nothing was classified."""
    after = [measure.after.get("accuracy") for measure in measures]
    known = [value for value in after if value is not None]
    complete = len(known) == len(measures)
    return {
        "nodes": [
            {
                "node": measure.node,
                "label_counts": dict(measure.label_counts),
                "before": _scores(measure.before),
                "after": _scores(measure.after),
                "bytes_sent": measure.bytes_sent,
                "bytes_received": measure.bytes_received,
            }
            for measure in measures
        ],
        "mean_after_accuracy": sum(known) / len(known) if complete else None,
        "min_after_accuracy": min(known) if complete else None,
        "disagreement": disagreement,
        "wall_seconds": round(wall_seconds, 1),
        "settings": dict(settings),
    }


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evaluation.get(name) for name in ("accuracy", "macro_f1")}


def _results_table(measures: Sequence[Measure]) -> Table:
    labels = sorted({label for measure in measures for label in measure.label_counts})
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("node", no_wrap=True)
    for label in labels:
        table.add_column(Text(label), justify="right", overflow="fold")
    scores = [name for name in _SCORES if any(m.after.get(name) is not None for m in measures)]
    for name in scores:
        table.add_column(_SCORES[name], justify="right", no_wrap=True)
    for heading in ("sent", "received"):
        table.add_column(heading, justify="right", no_wrap=True)
    for measure in measures:
        table.add_row(
            Text(measure.node, "bold"),
            *(str(measure.label_counts.get(label, 0)) for label in labels),
            *(
                f"{_number(measure.before, name)} → {_number(measure.after, name)}"
                for name in scores
            ),
            status.size(measure.bytes_sent),
            status.size(measure.bytes_received),
        )
    return table


def _number(evaluation: Mapping[str, Any], name: str) -> str:
    value = evaluation.get(name)
    return "-" if value is None else f"{value:.3f}"


def disagreement(models: Sequence[Path]) -> float:
    """Root mean square over nodes of ‖x_i − x̄‖, over all parameters of the exported models.

    Reads slice by slice: models need not fit in memory together.

    Raises:
        OutputError: a model is missing, or they are not of one shape.
    """
    total = 0.0
    with ExitStack() as stack:
        stores = [_open_model(folder, stack) for folder in models]
        if any(store.keys() != stores[0].keys() for store in stores):
            raise OutputError(f"{models[0].parent.parent}: the exported models differ in tensors")
        for name in stores[0]:
            parts = [store[name].get_slice(name) for store in stores]
            shape = parts[0].get_shape()
            if any(part.get_shape() != shape for part in parts):
                raise OutputError(f"{models[0].parent.parent}: {name} differs in shape")
            for rows in _row_slices(shape):
                x = torch.stack([part[rows].to(torch.float32) for part in parts])
                total += (x - x.mean(0)).square().sum(dtype=torch.float64).item()
    return math.sqrt(total / len(models))


def _row_slices(shape: Sequence[int]) -> Iterator[Any]:
    if not shape:
        yield ...
        return
    rows = max(1, SLICE // max(1, math.prod(shape[1:])))
    for low in range(0, shape[0], rows):
        yield slice(low, min(low + rows, shape[0]))


def _open_model(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    store: dict[str, Any] = {}
    with translated(folder):
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            store |= dict.fromkeys(file.keys(), file)
    if not store:
        raise OutputError(f"{folder}: holds no safetensors file")
    return store


def _draw(
    nodes: Sequence[Settings], measures: Sequence[Measure], path: Path, console: Console
) -> list[Path]:
    """The picture's path; nothing where matplotlib is absent."""
    try:
        from deca_node.plots import draw  # noqa: PLC0415 - matplotlib is optional
    except ImportError:
        console.print("no picture: it needs matplotlib, pip install 'deca-node\\[plots]'")
        return []
    histories = {
        settings.node.name: [
            json.loads(line)
            for line in (settings.node.output / "history.jsonl").read_text("utf-8").splitlines()
        ]
        for settings in nodes
    }
    with translated(path):
        draw(histories, {measure.node: measure.label_counts for measure in measures}, path)
    return [path]
