"""A testbed whose nodes are killed, frozen, cut off, restarted and joined by new ones.

Three runs of real ``deca-node start`` processes, in OUT::

    data/          the shards; rehearsal/ has model and data where none were given
    pace/          some steps, to learn how many rounds the minutes take (removed)
    undisturbed/   all nodes, in peace
    disturbed/     the same nodes, settings and rounds, under faults
    chaos.json     the report, written also when the swarm did not pass

Faults are drawn in faults.py and carried out here. Nodes call each other through relays
(relay.py), whose cables are cut. Steps and kept states are read from the nodes' folders, so that
what is judged is not what a node says of itself.
"""

import asyncio
import contextlib
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from deca_node import faults, registry, rehearsal, status, template
from deca_node.config import Settings
from deca_node.disk import translated, write_atomically
from deca_node.errors import ConfigError, OutputError, SwarmError
from deca_node.faults import Fault, Kind, Standing
from deca_node.pb import node_pb2 as pb
from deca_node.relay import Cables, Relay
from deca_node.testbed import layout, processes, results
from deca_node.trail import Holding, Position, Trail, place, read_kept, resumed_at
from deca_node.waiting import happens

# The swarm hangs when nobody makes a step for so long.
HANG_SECONDS = 60.0
# What faults may cost of the mean accuracy: 2 points.
MAX_LOSS = 0.02
TICK_SECONDS = 0.2
# Rounds last this much longer than the faults at the undisturbed pace: with nodes away those that
# are left have the machine to themselves and are faster.
SLACK = 1.15
# What is healed last must come back and train every block once more with the others: faults end
# when a round is left, or so many seconds.
CALM_SECONDS = 30.0
# The pace is taken when every node has done a round, or so many steps in so many seconds.
PACE_STEPS, PACE_SECONDS = 8, 20.0
MANY_ROUNDS = 100_000
# Loading and evaluation beside the time that the undisturbed run took for all.
GRACE_SECONDS = 120.0
REHEARSAL_ROWS, REHEARSAL_TEST_PER_LABEL = 8000, 100


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
    arena = _Arena(plan, _placed(nodes, out / "disturbed"), console, seconds, calm)
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
    return min(MANY_ROUNDS, disturbed + calm), calm


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


# The disturbed run


@dataclass
class Restart:
    """A node's way back; seconds from its start to its next step, None when hurt before."""

    at: float
    node: str
    after: str
    kept: Position
    resumed: Position | None = None
    recovery_seconds: float | None = None


@dataclass
class Gaps:
    """The longest times without a step: of all nodes, and of one that was under no fault."""

    anywhere: float = 0.0
    one_node: float = 0.0
    node: str = ""
    at: float = 0.0


@dataclass
class _Node:
    """A node of the disturbed run.

    Attributes:
        quiet_since: when it made its last step, or was healed; None before its first step since
            its last start.
        restart: its way back, until it is back.
        spared: it was hurt on its way back, and is left alone until it has made a step.
        read_log_from: where its log began at its last start; None when its beginning is known.
    """

    settings: Settings
    relay: Relay
    trail: Trail
    process: subprocess.Popen[bytes] | None = None
    port: int | None = None
    fault: Fault | None = None
    heal_at: float = 0.0
    started_at: float = 0.0
    quiet_since: float | None = None
    restart: Restart | None = None
    spared: bool = False
    read_log_from: int | None = None
    kept: Holding = field(default_factory=Holding)
    finished: bool = False

    @property
    def name(self) -> str:
        return self.settings.node.name

    @property
    def log(self) -> Path:
        return self.settings.node.output / "log.jsonl"


class _Arena:
    """The nodes of a disturbed run and what is done to them.

    Args:
        plan: what to run.
        nodes: the settings of all; those after the first ``plan.nodes`` join later.
        console: where it is shown.
        patience: seconds that the undisturbed run took for all.
        calm: rounds that are left when faults end.
    """

    def __init__(
        self,
        plan: Plan,
        nodes: Sequence[Settings],
        console: Console,
        patience: float,
        calm: int,
    ) -> None:
        self._plan = plan
        self._console = console
        self._draw = random.Random(plan.seed)  # noqa: S311 - faults, to be drawn again
        self._patience = 2 * patience + GRACE_SECONDS
        self._calm = calm / nodes[0].schedule.rounds  # of all steps
        self._cables = Cables()
        self.nodes: dict[str, _Node] = {}
        for settings in nodes:
            name, folder = settings.node.name, settings.node.output
            relay = Relay(name, self._cables, partial(self._port, name), self._caller)
            trail = Trail(folder / "history.jsonl", settings.schedule.steps)
            self.nodes[name] = _Node(settings, relay, trail)
        self._absent = list(self.nodes)[plan.nodes :]
        self._began = time.monotonic()
        self._faults_began: float | None = None
        self._faults_ended: float | None = None
        self._next_fault = 0.0
        self._last_step: float | None = None
        self._steps, self._total_steps = 0, 0
        self._gaps = Gaps()
        self._faults: list[dict[str, Any]] = []
        self._restarts: list[Restart] = []
        self._known: dict[str, pb.NodeStatus | str] = {}

    async def run(self) -> bool:
        """Run to the end; False when a signal ended it.

        Raises:
            SwarmError: what went wrong.
        """
        interrupted = processes.interruption()
        self._began = time.monotonic()
        with ExitStack() as stack:
            show = stack.enter_context(processes.display(self._console))
            watching = asyncio.create_task(self._watch(show))
            try:
                await self._begin()
                while not self._tick(time.monotonic()):
                    if await happens(interrupted, TICK_SECONDS):
                        return False
                    if watching.done():
                        watching.result()
                return True
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await self._end()

    async def _begin(self) -> None:
        for node in self.nodes.values():
            node.settings = layout.updated(
                node.settings,
                {
                    "node": {"advertise_port": await node.relay.listen()},
                    "run": {"start_when": self._plan.nodes},
                },
            )
            layout.write_settings(node.settings)
            if node.name not in self._absent:
                self._start(node, self._began)

    async def _watch(self, show: Callable[[Mapping[str, pb.NodeStatus | str]], None]) -> None:
        """Show what the nodes say of themselves."""
        while True:
            children = {
                node.name: node.process
                for node in self.nodes.values()
                if node.process is not None and not (node.fault and node.fault.kind == Kind.FREEZE)
            }
            answers = await processes.poll(children)
            for name, node in self.nodes.items():
                state = answers.get(name)
                if isinstance(state, pb.NodeStatus):
                    self._total_steps = state.steps_total or self._total_steps
                if name in self._absent:
                    continue
                if node.finished:
                    self._known[name] = "finished"
                elif node.fault is not None:
                    self._known[name] = f"under {node.fault.kind}"
                elif isinstance(state, pb.NodeStatus):
                    self._known[name] = state
                elif node.quiet_since is None:
                    self._known[name] = "starting"
            show(self._known)
            await asyncio.sleep(processes.POLL_SECONDS)

    async def _end(self) -> None:
        children = [node.process for node in self.nodes.values() if node.process is not None]
        for child in children:
            child.send_signal(signal.SIGCONT)
        await asyncio.gather(*(asyncio.to_thread(processes.end, child) for child in children))
        for node in self.nodes.values():
            await node.relay.close()

    # --- one look at everything

    def _tick(self, now: float) -> bool:
        """Look, judge, hurt, heal; True when all is over."""
        for node in self.nodes.values():
            self._follow(node, now)
            self._reap(node, now)
        self._judge_progress(now)
        if self._faults_began is None:
            if all(n.quiet_since for n in self.nodes.values() if n.name not in self._absent):
                self._faults_began = now
                self._next_fault = now + faults.pause(self._draw)
        elif self._faults_ended is None:
            self._disturb(now)
        for node in self.nodes.values():
            self._heal(node, now)
        return not self._absent and all(node.finished for node in self.nodes.values())

    def _follow(self, node: _Node, now: float) -> None:
        """Read on in a node's files."""
        made = node.trail.look()
        if node.read_log_from is not None:
            self._check_beginning(node, node.read_log_from)
        if made and node.process is not None:
            self._steps += made
            self._last_step = now
            if node.restart is not None:
                node.restart.recovery_seconds = round(now - node.started_at, 2)
                node.restart = None
            node.quiet_since, node.spared = now, False

    def _reap(self, node: _Node, now: float) -> None:
        """Notice a process that has ended, and whether it should have."""
        if node.process is None or (code := node.process.poll()) is None:
            return
        node.process, node.port, node.quiet_since, node.restart = None, None, None, None
        node.read_log_from = None
        self._check_kept(node)
        kind = node.fault.kind if node.fault else None
        if kind == Kind.KILL and code in (-signal.SIGKILL, 0):
            return  # started again when its time has come
        # A node that still imports, or has finished, has no handler of its own for the signal.
        asked = kind == Kind.RESTART and code == -signal.SIGTERM
        if code and not asked:
            raise SwarmError(
                f"{node.name} failed (exit code {code}): {processes.last_words(node.log)};"
                f" see {node.log}"
            )
        if processes.has_finished(node.settings.node.output):
            node.finished = True
            self._say(now, f"{node.name} has finished")
        elif kind != Kind.RESTART:
            raise SwarmError(f"{node.name} ended before its run was finished; see {node.log}")

    def _check_kept(self, node: _Node) -> None:
        """What a node had kept is still there when it is dead."""
        try:
            kept = read_kept(node.settings.node.output)
        except OutputError as error:
            raise SwarmError(f"{node.name} lost a state: {error}") from None
        gone = kept.lacks(node.kept)
        if kept.position < node.trail.kept:
            gone = place(node.trail.kept)
        if gone:
            raise SwarmError(
                f"{node.name} lost a state: it holds {place(kept.position)}, but had kept {gone}"
            )
        node.kept = kept

    def _check_beginning(self, node: _Node, offset: int) -> None:
        """A node that starts again begins where it had kept its state, or later."""
        resumed = resumed_at(node.log, offset)
        if resumed is None:
            return
        node.read_log_from = None
        if resumed < node.kept.position:
            raise SwarmError(
                f"{node.name} lost a state: it began again at {place(resumed)}, but had kept"
                f" {place(node.kept.position)}; see {node.log}"
            )
        if node.restart is not None:
            node.restart.resumed = resumed

    def _judge_progress(self, now: float) -> None:
        who = processes.progress_line(self._known)
        if self._last_step is None:
            if now - self._began > self._patience:
                raise SwarmError(f"no first step within {self._patience:.0f} s: {who}")
            return
        training = [node for node in self.nodes.values() if not self._trained(node)]
        gap = now - self._last_step
        if training:
            self._gaps.anywhere = max(self._gaps.anywhere, gap)
            if gap > HANG_SECONDS:
                raise SwarmError(f"no step anywhere for {gap:.0f} s: {who}")
        for node in training:
            if node.fault is None and node.quiet_since is not None:
                quiet = now - node.quiet_since
                if quiet > self._gaps.one_node:
                    self._gaps.one_node, self._gaps.node = quiet, node.name
                    self._gaps.at = self._at(node.quiet_since)
        if self._faults_ended and now - self._faults_ended > self._patience:
            raise SwarmError(f"not finished {self._patience:.0f} s after the last fault: {who}")

    def _trained(self, node: _Node) -> bool:
        """Whether a node has no step to make any more.

        One that caught up with the end has made none of the last; that it says so itself excuses
        it from steps only, not from finishing.
        """
        said = self._known.get(node.name)
        ended = isinstance(said, pb.NodeStatus) and said.phase in _ENDED
        return node.finished or ended or (0 < self._total_steps <= _steps_done(node))

    # --- faults

    def _disturb(self, now: float) -> None:
        """The next fault if it is time, or the end of them all."""
        assert self._faults_began is not None  # noqa: S101 - as _tick knows
        since, end = now - self._faults_began, self._plan.minutes * 60
        done = max(map(_steps_done, self.nodes.values()))
        if since >= end or done >= (1 - self._calm) * (self._total_steps or math.inf):
            self._faults_ended = now
            self._say(now, "faults end; everything is healed")
            for name in list(self._absent):
                self._hurt(Fault(Kind.JOIN, name, 0.0), now)
            for node in self.nodes.values():
                if node.fault is not None and node.fault.kind != Kind.RESTART:
                    node.heal_at = now
        elif now >= self._next_fault:
            fault, _ = faults.next_fault(self._draw, self._standing(), since, end)
            if fault is not None:
                self._hurt(fault, now)
                self._next_fault = now + faults.pause(self._draw)

    def _standing(self) -> Standing:
        present = [n for n in self.nodes.values() if not n.finished and n.name not in self._absent]
        well = [node for node in present if node.fault is None]
        return Standing(
            steady=tuple(n.name for n in well if n.quiet_since is not None),
            recovering=tuple(n.name for n in well if n.quiet_since is None and not n.spared),
            spared=tuple(n.name for n in well if n.quiet_since is None and n.spared),
            faulty=tuple(n.name for n in present if n.fault is not None),
            absent=tuple(self._absent),
        )

    def _hurt(self, fault: Fault, now: float) -> None:
        node = self.nodes[fault.node]
        entry = {"at": self._at(now), **asdict(fault), "seconds": round(fault.seconds, 2)}
        self._faults.append(entry)
        lasts = f" for {fault.seconds:.1f} s" if fault.seconds else ""
        others = sorted({name for pair in fault.pairs for name in pair} - {node.name})
        cables = f" from {', '.join(others)}" if others else ""
        self._say(now, f"{fault.kind} {node.name}{cables}{lasts}")
        if fault.kind == Kind.JOIN:
            self._absent.remove(node.name)
            self._start(node, now)
            return
        assert node.process is not None  # noqa: S101 - whoever is steady or recovering runs
        node.fault, node.heal_at = fault, now + fault.seconds
        node.spared = node.quiet_since is None
        if fault.kind == Kind.CUT:
            self._cables.cut(fault.pairs)
        elif fault.kind == Kind.RESTART:
            node.process.terminate()
            node.heal_at = now + processes.STOP_SECONDS
        else:
            node.process.send_signal(_SIGNALS[fault.kind])

    def _heal(self, node: _Node, now: float) -> None:
        """End a node's fault if it is time."""
        if node.fault is None:
            return
        fault, due = node.fault, now >= node.heal_at
        if node.finished:
            due = True
        elif fault.kind == Kind.RESTART and node.process is not None:
            if due:
                raise SwarmError(
                    f"{node.name} did not end within {processes.STOP_SECONDS:.0f} s of SIGTERM"
                )
            return
        elif fault.kind in (Kind.KILL, Kind.RESTART):
            if node.process is None and (due or fault.kind == Kind.RESTART):
                node.fault = None
                self._start(node, now, after=fault.kind)
            return
        if not due:
            return
        if fault.kind == Kind.CUT:
            self._cables.heal(fault.pairs)
        elif fault.kind == Kind.FREEZE and node.process is not None:
            node.process.send_signal(signal.SIGCONT)
        node.fault = None
        if node.quiet_since is not None:
            node.quiet_since = now

    def _start(self, node: _Node, now: float, after: str = "") -> None:
        with node.log.open("ab") as log:
            node.read_log_from = log.tell()
            node.process = processes.spawn(node.settings, log)
        node.started_at = now
        if after:
            node.restart = Restart(self._at(now), node.name, after, node.kept.position)
            self._restarts.append(node.restart)

    # --- what relays ask

    def _port(self, name: str) -> int | None:
        """Where a node listens now."""
        node = self.nodes[name]
        if node.process is None:
            return None
        if node.port is None:
            pid = node.process.pid
            entry = next((one for one in registry.local_nodes() if one.pid == pid), None)
            node.port = int(entry.address.rpartition(":")[2]) if entry else None
        return node.port

    def _caller(self, port: int) -> str | None:
        """Whose local port this is."""
        for node in self.nodes.values():
            if node.process is None:
                continue
            with contextlib.suppress(psutil.Error):
                for one in psutil.Process(node.process.pid).net_connections("tcp4"):
                    if one.laddr and one.laddr.port == port:
                        return node.name
        return None

    # --- the report

    def _at(self, now: float) -> float:
        return round(now - self._began, 2)

    def _say(self, now: float, text: str) -> None:
        self._console.print(
            f"{status.duration(now - self._began)}  {text}", soft_wrap=True, highlight=False
        )

    def report(self) -> dict[str, Any]:
        """What was done and what came of it, as far as it went."""
        now = time.monotonic()
        counts = Counter(entry["kind"] for entry in self._faults)
        back = [one.recovery_seconds for one in self._restarts if one.recovery_seconds is not None]
        began, ended = self._faults_began or now, self._faults_ended or now
        return {
            "counts": {kind.value: counts[kind] for kind in Kind} | {"all": counts.total()},
            "fault_seconds": round(ended - began, 1),
            "steps": self._steps,
            "longest_without_step": {
                "anywhere": round(self._gaps.anywhere, 1),
                "one_node": round(self._gaps.one_node, 1),
                "node": self._gaps.node,
                "at": self._gaps.at,
            },
            "recovery_seconds": {
                "count": len(back),
                "median": round(statistics.median(back), 1) if back else None,
                "longest": max(back, default=None),
            },
            "restarts": [asdict(one) for one in self._restarts],
            "faults": self._faults,
        }


_ENDED = (pb.PHASE_SERVING, pb.PHASE_AGREEING, pb.PHASE_DONE)
_SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.FREEZE: signal.SIGSTOP}


def _steps_done(node: _Node) -> int:
    """Where in the schedule a node is, counted in steps."""
    visit, step = node.trail.position
    return visit * node.settings.schedule.steps + step + 1


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
