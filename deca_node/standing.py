"""Where a node stands in its run, and the status that tells of it."""

import asyncio
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import psutil
import torch

from deca_node import __version__
from deca_node.blocks import Schedule, Visit
from deca_node.catchup import Gain
from deca_node.checkpoint.manifest import Progress
from deca_node.config import Settings, is_loopback
from deca_node.curve import Curve
from deca_node.events import Ring
from deca_node.guard import Guard
from deca_node.health import Finding, late_steps
from deca_node.limits import MAX_HISTORY_POINTS, MAX_LABELS
from deca_node.member import Member
from deca_node.membership import Edges, Phase
from deca_node.pb import node_pb2 as pb
from deca_node.rounds import StepRecord
from deca_node.swarm import Swarm

MAX_WARNINGS = 20


class Standing:
    """What a node is doing, how far it is, what it has to say.

    Args:
        settings: of the node.
        log: a structlog logger.
        events: what it lately said.
        guard: whom it believes; None in plain text.

    Attributes:
        phase: of the node while it has no member, which knows it better.
        waiting_for: who or what, in words; empty when nothing is waited for.
        progress: position and totals, as they are kept on disk.
        last: the last step.
        visit: the open visit, or the last one.
        edges: of that visit, or of the agreement under way.
        late: neighbours whose blocks came too late, and how many steps in a row.
        address: where others call.
        schedule: None until the model is read.
        device: where tensors are.
        model: its name.
        began: when training began in this process, by the monotonic clock.
        warnings: said once, the latest last.
        curve: the steps made, thinned; those of earlier processes as well.
        label_counts: examples by label; told only when the settings say so.
    """

    def __init__(self, settings: Settings, log: Any, events: Ring, guard: Guard | None) -> None:
        self._settings = settings
        self._log = log
        self._events = events
        self._guard = guard
        self._disagreements: dict[int, float] = {}  # by block, at its last step
        self._started = time.monotonic()
        self._steps_here = 0
        self._seconds_of_steps = 0.0  # of those, and what is between them; not of pauses
        self._stepped: float | None = None  # when, unless there was a pause since
        self._seconds_before = 0.0
        self.phase = Phase.STARTING
        self.waiting_for = "the model"
        self.progress = Progress()
        self.last: StepRecord | None = None
        self.visit: Visit | None = None
        self.edges = Edges(-1)
        self.late: Mapping[str, int] = {}
        self.address = ""
        self.schedule: Schedule | None = None
        self.device = torch.device("cpu")
        self.model = settings.model.path.name
        self.began: float | None = None
        self._warnings: dict[str, str] = {}  # by what they are about, the newest last
        self.curve = Curve(MAX_HISTORY_POINTS)
        self.label_counts: Mapping[str, int] = {}

    def resume(self, progress: Progress) -> None:
        """Go on from what an earlier process kept."""
        self.progress = progress
        self._seconds_before = progress.seconds

    def at(self, visit: int, step: int, data_position: int) -> None:
        """Move to a position."""
        self.progress = replace(
            self.progress,
            visit=visit,
            step=step,
            data_position=data_position,
            seconds=self.seconds(),
        )

    def seconds(self) -> float:
        """Since the training began, in earlier processes as well; pauses and waits count."""
        here = time.monotonic() - self.began if self.began is not None else 0.0
        return self._seconds_before + here

    def step_done(self, record: StepRecord) -> None:
        """A step is complete."""
        self.last, gathered = record, record.gathered
        self.late = late_steps(self.late, gathered.late, gathered.used)
        self._disagreements[record.visit.block] = record.settled.disagreement
        self._steps_here += 1
        now = time.monotonic()
        since = now - self._stepped if self._stepped is not None else record.seconds.step
        self._seconds_of_steps, self._stepped = self._seconds_of_steps + since, now

    def paused(self) -> None:
        """What follows until the next step is no training."""
        self._stepped = None

    def wait_for(self, what: str) -> None:
        """For whom or what the node waits from now on, in words."""
        self.waiting_for = what

    @property
    def warnings(self) -> list[str]:
        """What people should see, the newest last."""
        return list(self._warnings.values())

    def warn(self, text: str, about: str = "") -> None:
        """Log something that people should see, and keep it for the status.

        Args:
            text: one line.
            about: takes the place of what was said before of the same; of the very text if empty.
        """
        self._log.warning(text)
        self._warnings.pop(about or text, None)
        self._warnings[about or text] = text
        while len(self._warnings) > MAX_WARNINGS:
            del self._warnings[next(iter(self._warnings))]

    def status(self, member: Member | None, findings: Iterable[Finding]) -> pb.NodeStatus:
        """Everything there is to know about the node now; asked on its event loop.

        Args:
            member: None before there is one.
            findings: what is wrong with its surroundings.
        """
        settings, now = self._settings, time.monotonic()
        status = pb.NodeStatus(
            run=settings.run.name,
            node=settings.node.name,
            version=__version__,
            phase=pb.Phase.Name(member.position().phase if member else self.phase),
            uptime_seconds=now - self._started,
            device=str(self.device),
            memory_bytes=psutil.Process().memory_info().rss,
            bytes_sent=self.progress.bytes_sent,
            bytes_received=self.progress.bytes_received,
            incomplete_mixes=self.progress.incomplete,
            address=self.address,
            model=self.model,
            waiting_for=self.waiting_for,
            warnings=[*(finding.text for finding in findings), *self.warnings],
            pid=os.getpid(),
            members_wanted=settings.run.start_when,
            security=self._security(),
            method=settings.run.method,
            topology=settings.topology.kind,
        )
        if self._guard is not None:
            status.certificate_ends = self._guard.ends
            status.revoked.extend(sorted(self._guard.revoked))
            for reason, count in self._guard.refused.items():
                status.refusals[reason] += count
        if status.phase == pb.PHASE_PAUSED:
            status.waiting_for = f"its operator: deca-node resume {settings.node.name}"
        for event in self._events:
            status.events.add(
                serial=event.serial,
                age_seconds=now - event.at,
                kind=event.kind,
                text=event.text,
                peer=event.peer,
            )
        if settings.data.share_label_counts:
            status.label_counts.update(list(self.label_counts.items())[:MAX_LABELS])
        if self.device.type == "cuda":
            status.device_memory_bytes = torch.cuda.memory_allocated(self.device)
        if self.schedule is not None:
            self._add_position(status, self.schedule)
        if self.last is not None:
            status.loss = self.last.local.loss
            status.gradient_norm = self.last.local.gradient_norm
            status.h_norm = self.last.settled.h_norm
            status.disagreement = self.last.settled.disagreement
        if member is not None:
            self._add_peers(status, member.swarm)
            _add_catch_up(status, member.catch_up.gain)
        return status

    def history(self, request: pb.GetHistoryRequest) -> pb.HistoryReply:
        """The steps made so far, thinned to what is asked for."""
        after = request.after if request.HasField("after") else None
        limit = min(request.limit or MAX_HISTORY_POINTS, MAX_HISTORY_POINTS)
        points = self.curve.points(after, limit)
        return pb.HistoryReply(points=[pb.HistoryPoint(**asdict(point)) for point in points])

    def _security(self) -> str:
        if self._guard is not None:
            return "TLS 1.3, both ends certified"
        if is_loopback(self._settings.node.host):
            return "plain text, on this machine only"
        return "PLAIN TEXT on the network (trust.insecure)"

    def _add_position(self, status: pb.NodeStatus, schedule: Schedule) -> None:
        visit, step = self.progress.visit, self.progress.step
        done = min(schedule.serial(visit, step), schedule.total_steps)
        status.rounds, status.blocks = schedule.rounds, len(schedule.blocks)
        status.steps_per_visit, status.steps_total = schedule.steps, schedule.total_steps
        cursor = schedule.cursor(visit, step)
        status.round, status.position, status.step = cursor.round, cursor.position, cursor.step
        status.block = schedule.visit(min(visit, schedule.visits - 1)).block
        status.round_order.extend(schedule.round_order(min(cursor.round, schedule.rounds - 1)))
        known = self._disagreements
        status.block_disagreement.extend(
            known.get(block, math.nan) for block in range(len(schedule.blocks))
        )
        status.steps_done = done
        if self._steps_here:
            pace = self._seconds_of_steps / self._steps_here
            status.eta_seconds = pace * (schedule.total_steps - done)
        status.degree = len(self.edges.weights)
        status.own_weight = self.edges.own_weight

    def _add_peers(self, status: pb.NodeStatus, swarm: Swarm) -> None:
        clock = asyncio.get_running_loop().time()
        status.send_rate = swarm.send_meter.rate(clock)
        status.receive_rate = swarm.receive_meter.rate(clock)
        for reason, count in swarm.refusals.count.items():
            status.refusals[reason] += count
        for name, peer in sorted(swarm.peers.items()):
            traffic = swarm.traffic.get(name)
            row = status.peers.add(
                node=name,
                address=peer.address,
                state=str(peer.state),
                phase=pb.Phase.Name(peer.phase),
                visit=peer.visit,
                neighbour=name in self.edges.weights,
                weight=self.edges.weights.get(name, 0.0),
                last_seen_seconds=max(0.0, clock - peer.last_seen),
                detail=peer.detail,
                wire_format=self.edges.format(name).word if name in self.edges.weights else "",
            )
            if traffic is not None:
                row.bytes_sent, row.bytes_received = traffic.sent, traffic.received
                row.send_rate = traffic.send_meter.rate(clock)
                row.receive_rate = traffic.receive_meter.rate(clock)
                row.waited_seconds, row.retries = traffic.waited, traffic.retries
                for reason, count in traffic.refusals.items():
                    row.refusals[reason] = count
                    status.refusals[reason] += count


def _add_catch_up(status: pb.NodeStatus, gain: Gain) -> None:
    if gain.active:
        status.catch_up_bytes, status.catch_up_total = gain.fetched, gain.total
        status.waiting_for = gain.waiting_for
