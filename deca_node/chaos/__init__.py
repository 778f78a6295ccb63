"""A testbed whose nodes are killed, frozen, cut off, restarted and joined by new ones.

Three runs of real ``deca-node start`` processes, in OUT::

    data/          the shards; rehearsal/ has model and data where none were given
    pace/          some steps, to learn how many rounds the minutes take (removed)
    undisturbed/   all nodes, in peace
    disturbed/     the same nodes, settings and rounds, under faults
    chaos.json     the report, written also when the swarm did not pass

Faults are drawn in faults.py and carried out in arena.py. Nodes call each other through relays
(relay.py), whose cables are cut. Steps and kept states are read from the nodes' folders, so that
what is judged is not what a node says of itself.
"""

import asyncio
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deca_node import rehearsal, status, template
from deca_node.chaos.arena import Arena
from deca_node.config import Settings
from deca_node.disk import translated, write_atomically
from deca_node.errors import ConfigError, OutputError, SwarmError
from deca_node.pb import node_pb2 as pb
from deca_node.testbed import layout, processes, results

# What faults may cost of the mean accuracy: 2 points.
MAX_LOSS = 0.02
# Rounds last this much longer than the faults at the undisturbed pace: with nodes away those that
# are left have the machine to themselves and are faster.
SLACK = 1.15
# What is healed last must come back and train every block once more with the others: faults end
# when a round is left, or so many seconds.
CALM_SECONDS = 30.0
# The pace is taken when every node has done a round, or so many steps in so many seconds.
PACE_STEPS, PACE_SECONDS = 8, 20.0
MANY_ROUNDS = 100_000
REHEARSAL_ROWS, REHEARSAL_TEST_PER_LABEL = 8000, 100
# By then its nodes have learned what there is. In a shorter run, as a slow machine would make it,
# steps that were missed under faults cost accuracy however well their nodes came back.
REHEARSAL_ROUNDS = 20


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        minutes: of faults.
        seed: of the faults, and of the split.
        nodes: that begin.
        joiners: that come later.
        config, overrides: settings of all nodes.
        train: labelled data to split among nodes and joiners; None rehearses with a small random
            model and made-up data.
        test, test_per_label, concentration, label_field: see testbed.layout.Plan.
        out: folder for everything.
    """

    minutes: float
    seed: int
    nodes: int
    joiners: int
    config: Path | None
    overrides: tuple[str, ...]
    train: Path | None
    test: Path | None
    test_per_label: int
    concentration: float
    label_field: str | None
    out: Path


def run(plan: Plan) -> None:
    """Run everything, write the report, show it.

    Raises:
        SwarmError: a hang, a lost state, a node that ended by itself, or too low an accuracy.
        OutputError: the folder is not empty.
        KeyboardInterrupt: interrupted; all nodes have ended.
        DecaError: settings or data cannot be used.
    """
    console = status.make_console()
    out = plan.out.absolute()
    with translated(out):
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{out}: is not empty; choose another --out or move it away")
        out.mkdir(parents=True, exist_ok=True)
    bed = _testbed_plan(plan, out)
    base = layout.base_settings(bed, out, preset="lan")
    if base.data.task != "classification":
        raise ConfigError(
            f"data.task = {base.data.task!r}: chaos compares accuracies; use classification"
        )
    nodes = layout.node_settings(bed, base, out)
    if nodes[0].data.test is None:
        raise ConfigError("chaos compares accuracies: give --test FILE or --test-per-label N")
    report: dict[str, Any] = {
        "verdict": "unfinished",
        "minutes": plan.minutes,
        "seed": plan.seed,
        "nodes": plan.nodes,
        "joiners": plan.joiners,
    }
    try:
        _judge(plan, nodes, out, report, console)
        report["verdict"] = "passed"
    except SwarmError as error:
        report["verdict"] = f"failed: {error}"
        raise
    except KeyboardInterrupt:
        report["verdict"] = "interrupted"
        raise
    finally:
        with translated(out):
            write_atomically(out / "chaos.json", (json.dumps(report, indent=2) + "\n").encode())
        if "counts" in report:
            console.print(_summary(report))
        console.print(str(plan.out / "chaos.json"), soft_wrap=True, highlight=False)


def _judge(
    plan: Plan, nodes: Sequence[Settings], out: Path, report: dict[str, Any], console: Console
) -> None:
    """The three runs, filling the report on the way."""
    rounds, calm = _rounds(plan, nodes, out / "pace", console)
    nodes = [layout.updated(node, {"schedule": {"rounds": rounds}}) for node in nodes]
    report |= {"rounds": rounds, "calm_rounds": calm}
    report |= {"settings": nodes[0].model_dump(mode="json", exclude={"node"})}
    console.print(f"undisturbed: {rounds} rounds, {len(nodes)} nodes", highlight=False)
    peace = _placed(nodes, out / "undisturbed")
    began = time.monotonic()
    _supervise(peace, console)
    seconds = time.monotonic() - began
    report["undisturbed"] = _results(peace, seconds)
    console.print(
        f"disturbed: the same rounds; faults for {status.duration(plan.minutes * 60)}",
        highlight=False,
    )
    arena = Arena(
        _placed(nodes, out / "disturbed"),
        console,
        beginners=plan.nodes,
        minutes=plan.minutes,
        seed=plan.seed,
        patience=seconds,
        calm=calm,
    )
    began = time.monotonic()
    try:
        if not asyncio.run(arena.run()):
            raise KeyboardInterrupt
    finally:
        report |= arena.report()
    report["disturbed"] = _results(
        [one.settings for one in arena.nodes.values()], time.monotonic() - began
    )
    before, after = (report[name]["mean_accuracy"] for name in ("undisturbed", "disturbed"))
    if after < before - MAX_LOSS:
        raise SwarmError(
            f"mean accuracy {after:.3f} under faults, {before:.3f} without: more than"
            f" {MAX_LOSS * 100:.0f} points lost"
        )


# Settings and measures


def _testbed_plan(plan: Plan, out: Path) -> layout.Plan:
    train, test_per_label, overrides = plan.train, plan.test_per_label, plan.overrides
    if train is None:
        folder = out / "rehearsal"
        train = folder / "data.jsonl"
        rehearsal.write_model(folder / "model", plan.seed)
        rehearsal.write_data(train, REHEARSAL_ROWS, plan.seed)
        test_per_label = REHEARSAL_TEST_PER_LABEL
        chosen = {"model.path": str(folder / "model"), **rehearsal.SETTINGS}
        ours = (f"{key}={template.value(value)}" for key, value in chosen.items())
        overrides = (*ours, *overrides)
    return layout.Plan(
        nodes=plan.nodes + plan.joiners,
        config=plan.config,
        overrides=overrides,
        train=train,
        shards=None,
        test=plan.test,
        test_per_label=test_per_label,
        concentration=plan.concentration,
        seed=plan.seed,
        label_field=plan.label_field,
        out=out,
        isolated=False,
    )


def _placed(nodes: Sequence[Settings], folder: Path) -> list[Settings]:
    """The nodes with folders of their own, and a run that no other meets."""
    return [
        layout.updated(
            node,
            {
                "node": {"output": folder / node.node.name},
                "run": {"name": layout.own_name(node.run.name, folder)},
            },
        )
        for node in nodes
    ]


def _supervise(
    nodes: Sequence[Settings],
    console: Console,
    enough: Callable[[Mapping[str, pb.NodeStatus | str]], bool] | None = None,
) -> None:
    for settings in nodes:
        layout.write_settings(settings)
    if not asyncio.run(processes.supervise(nodes, console, enough)):
        raise KeyboardInterrupt


def _rounds(
    plan: Plan, nodes: Sequence[Settings], folder: Path, console: Console
) -> tuple[int, int]:
    """How many rounds to run, and how many of them are to be left when faults end.

    At the pace of a short trial the others take a little longer than the faults.
    """
    pace = _Pace()
    trial = [layout.updated(node, {"schedule": {"rounds": MANY_ROUNDS}}) for node in nodes]
    console.print(f"pace: some steps of {len(nodes)} nodes", highlight=False)
    _supervise(_placed(trial, folder), console, pace)
    with translated(folder):
        shutil.rmtree(folder)
    calm = math.ceil(CALM_SECONDS / pace.round_seconds)
    disturbed = math.ceil(SLACK * plan.minutes * 60 / pace.round_seconds)
    least = REHEARSAL_ROUNDS if plan.train is None else 0
    return min(MANY_ROUNDS, max(least, disturbed + calm)), calm


class _Pace:
    """Seconds that a round takes, once the nodes have shown it."""

    def __init__(self) -> None:
        self.round_seconds = math.inf
        self._since: float | None = None

    def __call__(self, known: Mapping[str, pb.NodeStatus | str]) -> bool:
        """Whether it is known now."""
        states = [one for one in known.values() if isinstance(one, pb.NodeStatus)]
        if len(states) < len(known) or not all(one.eta_seconds for one in states):
            return False
        now = time.monotonic()
        self._since = self._since or now
        steps = states[0].blocks * states[0].steps_per_visit
        least = min(one.steps_done for one in states)
        self.round_seconds = max(
            steps * one.eta_seconds / max(1, one.steps_total - one.steps_done) for one in states
        )
        return least >= steps or (least >= PACE_STEPS and now - self._since >= PACE_SECONDS)


def _results(nodes: Sequence[Settings], seconds: float) -> dict[str, Any]:
    """Accuracies and disagreement of a finished run.

    Raises:
        SwarmError: a node's result or model is missing.
    """
    folders = [node.node.output for node in nodes]
    try:
        found = results.summarise(
            [results.measured(folder) for folder in folders],
            results.disagreement([folder / "model" for folder in folders]),
            seconds,
            {},
        )
    except OutputError as error:
        raise SwarmError(f"a result is lost: {error}") from None
    return {
        "mean_accuracy": found["mean_after_accuracy"],
        "accuracy": {one["node"]: one["after"]["accuracy"] for one in found["nodes"]},
        "accuracy_before": {one["node"]: one["before"]["accuracy"] for one in found["nodes"]},
        "disagreement": found["disagreement"],
        "wall_seconds": round(seconds, 1),
    }


def _summary(report: Mapping[str, Any]) -> Table:
    """The report in a few lines."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    counts = dict(report["counts"])
    every = counts.pop("all")
    kinds = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    gaps, back = report["longest_without_step"], report["recovery_seconds"]
    table.add_row("verdict", report["verdict"])
    table.add_row("faults", f"{every} in {status.duration(report['fault_seconds'])}: {kinds}")
    table.add_row(
        "steps",
        f"{report['steps']}; longest without any {gaps['anywhere']} s, of one"
        f" node under no fault {gaps['one_node']} s ({gaps['node'] or '-'})",
    )
    if back["count"]:
        table.add_row(
            "restarts",
            f"{len(report['restarts'])}; from start to next step: median"
            f" {back['median']} s, longest {back['longest']} s",
        )
    for name in ("undisturbed", "disturbed"):
        if name in report:
            run = report[name]
            table.add_row(
                name,
                f"mean accuracy {run['mean_accuracy']:.3f}  disagreement {run['disagreement']:.4g}"
                f"  wall time {status.duration(run['wall_seconds'])}",
            )
    return table
