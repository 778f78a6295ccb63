"""The disturbed run: its nodes are watched, judged, hurt and healed."""

import asyncio
import math
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console

from deca_node import faults, status
from deca_node.chaos.nodes import Node, Restart
from deca_node.config import Settings
from deca_node.errors import SwarmError
from deca_node.faults import Fault, Kind, Roster
from deca_node.pb import node_pb2 as pb
from deca_node.relay import Cables, Relay
from deca_node.testbed import layout, processes
from deca_node.trail import Trail
from deca_node.waiting import happens

# The swarm hangs when nobody makes a step for so long.
HANG_SECONDS = 60.0
TICK_SECONDS = 0.2
# Loading and evaluation beside the time that the undisturbed run took for all.
GRACE_SECONDS = 120.0
_ENDED = (pb.PHASE_SERVING, pb.PHASE_AGREEING, pb.PHASE_DONE)
_SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.FREEZE: signal.SIGSTOP}


@dataclass
class Gaps:
    """The longest times without a step: of all nodes, and of one that was under no fault."""

    anywhere: float = 0.0
    one_node: float = 0.0
    node: str = ""
    at: float = 0.0


class Arena:
    """The nodes of a disturbed run and what is done to them.

    Args:
        nodes: the settings of all.
        console: where it is shown.
        beginners: how many of the nodes begin; the others join later.
        minutes: of faults.
        seed: of the faults.
        patience: seconds that the undisturbed run took for all.
        calm: rounds that are left when faults end.
    """

    def __init__(
        self,
        nodes: Sequence[Settings],
        console: Console,
        *,
        beginners: int,
        minutes: float,
        seed: int,
        patience: float,
        calm: int,
    ) -> None:
        self._console = console
        self._beginners = beginners
        self._fault_seconds = minutes * 60
        self._draw = random.Random(seed)  # noqa: S311 - faults, to be drawn again
        self._patience = 2 * patience + GRACE_SECONDS
        self._calm = calm / nodes[0].schedule.rounds  # of all steps
        self._cables = Cables()
        self.nodes: dict[str, Node] = {}
        for settings in nodes:
            name, folder = settings.node.name, settings.node.output
            relay = Relay(name, self._cables, partial(self._port, name), self._caller)
            trail = Trail(folder / "history.jsonl", settings.schedule.steps)
            self.nodes[name] = Node(settings, relay, trail)
        self._absent = list(self.nodes)[beginners:]
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
                    "run": {"start_when": self._beginners},
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
        await asyncio.to_thread(processes.end, children)
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

    def _follow(self, node: Node, now: float) -> None:
        """Read on in a node's files."""
        made = node.trail.look()
        node.check_beginning()
        if made and node.process is not None:
            self._steps += made
            self._last_step = now
            if node.restart is not None:
                node.restart.recovery_seconds = round(now - node.started_at, 2)
                node.restart = None
            node.quiet_since, node.spared = now, False

    def _reap(self, node: Node, now: float) -> None:
        """Notice a process that has ended, and whether it should have."""
        if (code := node.reap()) is None:
            return
        node.check_kept()
        kind = node.fault.kind if node.fault else None
        if kind == Kind.KILL and code in (-signal.SIGKILL, 0):
            return  # started again when its time has come
        # A node that has just begun, or has finished, has no handler of its own for the signal.
        asked = kind == Kind.RESTART and code == -signal.SIGTERM
        if code and not asked:
            raise processes.failure(node.settings, code)
        if processes.has_finished(node.settings.node.output):
            node.finished = True
            self._say(now, f"{node.name} has finished")
        elif kind != Kind.RESTART:
            raise SwarmError(f"{node.name} ended before its run was finished; see {node.log}")

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

    def _trained(self, node: Node) -> bool:
        """Whether a node has no step to make any more.

        One that caught up with the end has made none of the last; that it says so itself excuses
        it from steps only, not from finishing.
        """
        said = self._known.get(node.name)
        ended = isinstance(said, pb.NodeStatus) and said.phase in _ENDED
        return node.finished or ended or (0 < self._total_steps <= node.steps_done)

    # --- faults

    def _disturb(self, now: float) -> None:
        """The next fault if it is time, or the end of them all."""
        assert self._faults_began is not None  # noqa: S101 - as _tick knows
        since, end = now - self._faults_began, self._fault_seconds
        done = max(node.steps_done for node in self.nodes.values())
        if since >= end or done >= (1 - self._calm) * (self._total_steps or math.inf):
            self._faults_ended = now
            self._say(now, "faults end; everything is healed")
            for name in list(self._absent):
                self._hurt(Fault(Kind.JOIN, name, 0.0), now)
            for node in self.nodes.values():
                if node.fault is not None and node.fault.kind != Kind.RESTART:
                    node.heal_at = now
        elif now >= self._next_fault:
            fault, _ = faults.next_fault(self._draw, self._roster(), since, end)
            if fault is not None:
                self._hurt(fault, now)
                self._next_fault = now + faults.pause(self._draw)

    def _roster(self) -> Roster:
        present = [n for n in self.nodes.values() if not n.finished and n.name not in self._absent]
        well = [node for node in present if node.fault is None]
        return Roster(
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

    def _heal(self, node: Node, now: float) -> None:
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

    def _start(self, node: Node, now: float, after: str = "") -> None:
        node.start(now)
        if after:
            node.restart = Restart(self._at(now), node.name, after, node.kept.position)
            self._restarts.append(node.restart)

    # --- what relays ask

    def _port(self, name: str) -> int | None:
        """Where a node listens now."""
        return self.nodes[name].listens_at()

    def _caller(self, port: int) -> str | None:
        """Whose local port this is."""
        return next((node.name for node in self.nodes.values() if node.calls_from(port)), None)

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
