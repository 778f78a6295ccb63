"""Gathering the neighbours' blocks of a step: mix on arrival, until the deadline, report what came.

A peer's failure is an entry in the report, never an exception.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import structlog
from torch import Tensor

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerError, PeerTimeout, PeerUnavailable
from deca_node.exchange.neighbourhood import Neighbourhood
from deca_node.limits import MAX_PULL_SECONDS
from deca_node.membership import Edges
from deca_node.patience import Patience
from deca_node.pb import node_pb2 as pb
from deca_node.references import Followed
from deca_node.waiting import Pulse
from deca_node.wire import Layout, Pieces, Receiver, Snapshot

_log = structlog.get_logger(__name__)


@dataclass
class EdgeUse:
    """What one edge carried in a step: bytes, and seconds from publishing to its last message."""

    wait: float = 0.0
    received: int = 0
    sent: int = 0


@dataclass
class Gathered:
    """What one step's exchange brought.

    Attributes:
        used: neighbours whose whole block was mixed in.
        partial: neighbours of whose block only some messages arrived in time.
        missing: neighbours that gave nothing, with the reason.
        late: those of both whose stream was good, but not here in time.
        received: bytes, prefixes included.
        wait: seconds from publishing until the last contribution.
        mix: seconds of that spent checking and mixing.
        exposed: seconds of that in which the caller had nothing else to do, and nothing was mixed.
        edges: by neighbour; sent is what it fetched since the last step's end.
    """

    used: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    received: int = 0
    wait: float = 0.0
    mix: float = 0.0
    exposed: float = 0.0
    edges: dict[str, EdgeUse] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every edge of the visit was used in full."""
        return not self.partial and not self.missing

    def waited(self, seconds: float) -> None:
        """Count further seconds in which nothing was done but to wait for neighbours."""
        self.wait += seconds
        self.exposed += seconds

    def add(self, later: "Gathered") -> None:
        """Count another exchange of the same step, after this one."""
        self.used += [peer for peer in later.used if peer not in self.used]
        self.partial += [peer for peer in later.partial if peer not in self.partial]
        self.missing.update(later.missing)
        self.late += [peer for peer in later.late if peer not in self.late]
        self.received += later.received
        self.wait += later.wait
        self.mix += later.mix
        self.exposed += later.exposed
        for peer, use in later.edges.items():
            edge = self.edges.setdefault(peer, EdgeUse())
            edge.wait += use.wait
            edge.received += use.received
            edge.sent += use.sent


Sink = Callable[[int, Tensor, float], None]
"""Mixes a slice: index of its first element, float32 values, weight."""


class Mix(Protocol):
    """A Sink that may be told what the neighbour has of this node; as Method.intake gives."""

    def __call__(
        self, first: int, values: Tensor, weight: float, own: Pieces | None = None
    ) -> None:
        """Mixes a slice against ``own``, where that is not what was published in fp32."""
        ...


Hear = Callable[[str, str], Sink]
"""Told a neighbour and the note beside its block, before the block's values: where these go.

Raises PayloadError when the note is none.
"""


@dataclass(frozen=True)
class Step:
    """What is gathered, and what of this node it is mixed with.

    Attributes:
        serial: the step.
        layout: names and shapes of the block.
        edges: the visit's.
        own: this node's snapshot; None when every neighbour has it already, so that it is made.
        encoded: what this node published on compressed edges.
        hear: told the notes, where blocks must come with them.
        is_behind: whether a neighbour has not come to this step yet.
    """

    serial: int
    layout: Layout
    edges: Edges
    own: Snapshot | None
    encoded: Mapping[Format, Pieces]
    hear: Hear | None
    is_behind: Callable[[str], bool]


@dataclass
class _Wait:
    """Until when a step waits at most: its time begins when its node has nothing else to do.

    Before that a neighbour that is not there holds nobody up, however long this node computes.

    Attributes:
        most: seconds from then on.
        idle_since: when that was; None while it is busy.
    """

    most: float
    idle_since: float | None

    @property
    def deadline(self) -> float:
        """By the loop's clock; infinite while the node is busy."""
        return math.inf if self.idle_since is None else self.idle_since + self.most


class Gathering:
    """See the module; its arguments are Exchange's, what all parts have in common, and one more.

    Args:
        grown: beats when more of this node's own snapshot is made.
    """

    def __init__(
        self,
        peers: Neighbourhood,
        timing: Timing,
        run: str,
        stopping: asyncio.Event,
        patience: Patience,
        changes: Pulse,
        grown: Pulse,
    ) -> None:
        self._peers, self._timing, self._run, self._stopping = peers, timing, run, stopping
        self._patience, self._changes, self._grown = patience, changes, grown
        self._followed: dict[str, Followed] = {}  # neighbours' references, on compressed edges

    def forget_references(self) -> None:
        """The next blocks on compressed edges are whole ones."""
        self._followed.clear()

    async def gather(
        self,
        step: Step,
        intake: Callable[[str], Mix] | None,
        busy: "asyncio.Future[Any] | None",
    ) -> Gathered:
        """See Exchange."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        wait = _Wait(self._timing.step_deadline, begin if busy is None else None)
        mixed_before = 0.0
        report = Gathered()
        mixes = {peer: intake(peer) if intake else None for peer in step.edges.weights}
        tasks = {
            asyncio.create_task(self._take(step, peer, mix, report, wait)): peer
            for peer, mix in mixes.items()
        }
        behind: set[str] = set()
        pending = set(tasks)
        try:
            while pending and not self._stopping.is_set():
                now = loop.time()
                # Those that hold nobody up may still bring what they have ready.
                worth = self._patience.worth(tasks[task] for task in pending)
                if wait.idle_since is None and busy is not None and busy.done():
                    wait.idle_since, mixed_before = now, report.mix
                limit = deadline = wait.deadline
                if step.hear and now < deadline:
                    behind = {peer for peer in worth if step.is_behind(peer)}
                if step.hear and worth:
                    limit = self._patience.for_agreement(behind & worth, deadline)
                elif wait.idle_since is not None:
                    limit = self._patience.for_blocks(worth, deadline, wait.idle_since, now)
                if limit <= now:
                    if worth and now < deadline:
                        self._patience.used_up(worth)
                        continue
                    break
                pending -= await self._any_done(pending, limit - now, busy)
                if len(worth) == 1 and wait.idle_since is not None:
                    # For it alone: its own to answer for, whether it came and who else is missing.
                    self._patience.waited(worth, loop.time() - now)
        finally:
            for task in pending:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for peer, raised in zip(tasks.values(), ended, strict=True):
            if isinstance(raised, Exception):
                _log.error("defect while taking a block", peer=peer, exc_info=raised)
        for peer in step.edges.weights:  # a task may have been cancelled before it began
            if peer not in (*report.used, *report.partial, *report.missing):
                report.missing[peer] = "late"
                report.late.append(peer)
        report.wait = loop.time() - begin
        if wait.idle_since is not None:
            exposed = loop.time() - wait.idle_since - (report.mix - mixed_before)
            report.exposed = max(0.0, exposed)
        for peer in step.edges.weights:
            edge = report.edges.setdefault(peer, EdgeUse(report.wait))
            self._peers.waited(peer, edge.wait)
        return report

    async def _any_done(
        self,
        tasks: set["asyncio.Task[None]"],
        seconds: float,
        busy: "asyncio.Future[Any] | None",
    ) -> set["asyncio.Task[None]"]:
        """Those of the tasks that have ended, when one has or something else has changed."""
        changed = asyncio.create_task(self._changes.wait())
        others = {changed} if busy is None or busy.done() else {changed, busy}
        try:
            await asyncio.wait(
                {*tasks, *others},
                timeout=seconds if seconds < math.inf else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            changed.cancel()
        return {task for task in tasks if task.done()}

    async def _take(
        self, step: Step, peer: str, mix: Mix | None, report: Gathered, wait: _Wait
    ) -> None:
        loop = asyncio.get_running_loop()
        own, hear, weight = step.own, step.hear, step.edges.weights[peer]
        wire = step.edges.format(peer)
        # Out of the table until all of the stream was good: half advanced it is of no use.
        followed = self._followed.pop(peer, None) or Followed(step.layout.numel)
        receiver = Receiver(
            step.layout,
            step.serial,
            self._run,
            peer,
            noted=hear is not None,
            wire=wire,
            base=followed.serial,
        )
        sink: Sink | None = mix
        if mix is not None and wire is not Format.FP32:
            sink = partial(mix, own=step.encoded[wire])
        mixed = 0
        started = loop.time()
        edge = report.edges[peer] = EdgeUse()
        problem: PeerError | None = PeerTimeout("did not arrive in time")  # when cancelled
        request = pb.PullRequest(
            sender=self._peers.sender(),
            serial=step.serial,
            wire_format=pb.WireFormat.Name(wire),
            base=followed.serial,
        )
        try:
            link = self._peers.link(peer)
            if link is None:
                raise PeerUnavailable("gone")
            most = self._timing.step_deadline + (self._timing.rpc if hear else 0.0)
            if wait.idle_since is None:  # it is ended by the step, not by the call's own time
                most += MAX_PULL_SECONDS
            async with aclosing(link.pull(request, most)) as stream:
                async for message in stream:
                    report.received += len(message)
                    edge.received += len(message)
                    self._peers.received(peer, len(message))
                    begin = loop.time()
                    arrived = receiver.feed(message)
                    if arrived is not None and own is not None:
                        end = arrived[0] + len(arrived[1])
                        while not own.covers(end):  # the block is still being updated there
                            report.mix += loop.time() - begin
                            await self._grown.wait()
                            begin = loop.time()
                    if arrived is not None and wire is not Format.FP32:
                        values = followed.take(*arrived, is_difference=receiver.is_difference)
                        arrived = arrived[0], values
                    if arrived is not None and sink is not None:
                        sink(*arrived, weight)
                        mixed += 1
                    elif hear is not None and receiver.note is not None:
                        sink = hear(peer, receiver.note)
                    report.mix += loop.time() - begin
                    if receiver.complete:
                        break
            if not receiver.complete:
                raise PayloadError("incomplete", "the stream ended early")
            problem = None
        except PeerError as error:
            problem = error
        finally:
            edge.wait = loop.time() - started
            if problem is None:
                report.used.append(peer)
                if wire is not Format.FP32:
                    followed.serial = step.serial
                    self._followed[peer] = followed
                self._patience.came(peer)
                self._peers.seen(peer)
            else:
                if mixed:
                    report.partial.append(peer)
                else:
                    report.missing[peer] = problem.reason
                if isinstance(problem, PeerTimeout):
                    report.late.append(peer)
                if not self._stopping.is_set():
                    self._peers.trouble(peer, problem)
                    if loop.time() >= wait.deadline:
                        self._patience.missed(peer)
