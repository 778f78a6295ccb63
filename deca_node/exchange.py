"""Publish, gather until the deadline, mix on arrival, report what came.

One per node. It agrees on edges with neighbours, serves this node's published snapshots to them
and collects theirs. A peer's failure is an entry in a report here, never an exception.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import structlog
from torch import Tensor

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerError, PeerRefused, PeerTimeout, PeerUnavailable
from deca_node.limits import CHUNK_BYTES, MAX_MEMBERS, MAX_PULLS, MAX_PULLS_PER_PEER
from deca_node.membership import Edges, Verdict, VisitAgreement
from deca_node.pacing import SendRates
from deca_node.pb import node_pb2 as pb
from deca_node.references import Followed, OwnReferences
from deca_node.transport import Link
from deca_node.waiting import happens
from deca_node.wire import Layout, Pieces, Receiver, Snapshot

_log = structlog.get_logger(__name__)

RETRY_SECONDS = 0.1  # between two tries to reach a neighbour within a handshake
# What a step gives to neighbours that it would not wait for: time for a block that is ready.
DOUBTFUL_SECONDS = 0.25


def send_rates(total: float | None = None, per_peer: float | None = None) -> SendRates:
    """Caps in bytes per second on what is sent in all and to each peer."""
    return SendRates(total, per_peer, CHUNK_BYTES, MAX_MEMBERS)


class Neighbourhood(Protocol):
    """What the exchange needs to know of peers; swarm.Swarm is one."""

    def sender(self) -> pb.Sender:
        """This node's introduction."""
        ...

    def link(self, peer: str) -> Link | None:
        """A link to a peer of the run, None when it is not known or gone."""
        ...

    def is_suspect(self, peer: str) -> bool:
        """Whether the peer failed lately."""
        ...

    def is_down(self, peer: str) -> bool:
        """Whether its connection broke or nobody listens there."""
        ...

    def is_paused(self, peer: str) -> bool:
        """Whether the peer has said that it takes no part for now."""
        ...

    def trouble(self, peer: str, error: PeerError) -> None:
        """A call to the peer failed or what it sent was refused."""
        ...

    def seen(self, peer: str) -> None:
        """The peer showed that it lives."""
        ...

    def sent(self, peer: str, nbytes: int) -> None:
        """Bytes of blocks went to the peer."""
        ...

    def received(self, peer: str, nbytes: int) -> None:
        """Bytes of blocks came from the peer."""
        ...

    def waited(self, peer: str, seconds: float) -> None:
        """A step waited for the peer's block."""
        ...

    def retried(self, peer: str) -> None:
        """A call to the peer failed and is made again."""
        ...

    def check_sender(self, sender: pb.Sender) -> str:
        """Name of a greeted peer of this run, current session. Raises PeerRefused."""
        ...


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
        received: bytes, prefixes included.
        wait: seconds from publishing until the last contribution.
        mix: seconds of that spent checking and mixing.
        exposed: seconds of that in which the caller had nothing else to do, and nothing was mixed.
        edges: by neighbour; sent is what it fetched since the last step's end.
    """

    used: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
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


class Exchange:
    """See the module.

    Args:
        peers: the neighbourhood.
        timing: deadlines.
        run: the run's name.
        stopping: set when the node is told to end; nothing is waited for any more.
        rates: what may be sent; all that the link takes when not given.
    """

    def __init__(
        self,
        peers: Neighbourhood,
        timing: Timing,
        run: str,
        stopping: asyncio.Event,
        rates: SendRates | None = None,
    ) -> None:
        self._peers = peers
        self._timing = timing
        self._run = run
        self._stopping = stopping
        self._agreement = VisitAgreement(0)
        self.edges = Edges(-1)
        self._steps_per_visit = 1
        self._graph = 0
        self._rates = rates or send_rates()
        self._held: Snapshot | None = None
        self._have: set[str] = set()  # neighbours that have the newest snapshot
        self._gave: set[str] = set()  # those whose block of its step is here
        self._failed: set[str] = set()  # those whose stream of it broke off
        self._served: frozenset[str] = frozenset()  # whom it is for
        self._idle_readers: set[str] = set()  # let this visit wait for them to fetch, in vain
        self._reading: Counter[str] = Counter()  # under way with it
        self._slots = asyncio.Semaphore(MAX_PULLS)
        self._sent_to: Counter[str] = Counter()  # since the last step's end
        self._wish = Format.FP32
        self._formats: Mapping[str, Format] = {}  # of the edges, when the newest was published
        self._encoded: Mapping[Format, Pieces] = {}  # of the newest
        self._references = OwnReferences()
        self._followed: dict[str, Followed] = {}  # neighbours' references, on compressed edges
        self._newest = -1
        self._asked: dict[str, int] = {}  # the latest step that a neighbour asked for
        self._late: set[str] = set()  # missed the step deadline in this visit
        self._slow: set[str] = set()  # used up what a visit waits for one neighbour
        self._waited: dict[str, float] = {}  # of that, the seconds gone by
        self._untold: set[str] = set()  # neighbours that do not know our degree yet
        self._idle: set[str] = set()  # let the last visit's beginning wait in vain
        self._pulls: Counter[str] = Counter()
        self._sent = 0
        self._resting = False
        self._missed = False  # a neighbour asked for a step that this node did not do meanwhile
        self._changed = asyncio.Event()
        self._grown = asyncio.Event()

    # --- agreeing on the edges of a visit

    async def open_visit(
        self,
        visit: int,
        steps_per_visit: int,
        wanted: frozenset[str],
        first_serial: int,
        graph: int = 0,
        wish: Format | None = None,
    ) -> Edges:
        """Shake hands with the wanted neighbours and fix the visit's edges and weights.

        Waits at most ``visit_deadline`` for the neighbours to come, and as long for their degrees,
        since they may be waiting for others first. A peer that let us wait in vain in the last
        visit is given one call's timeout in this one. ``graph`` is told to the neighbours: a
        digest of the graph that this node sees, where that matters; and so is ``wish``, the format
        that this node would have; None takes fp32 for all edges, whatever the neighbours wish.
        """
        self._drop_references()
        self._resting = False
        self._steps_per_visit = steps_per_visit
        self._graph = graph
        self._newest = first_serial - 1
        self._asked.clear()
        self._idle_readers.clear()
        self._late.clear()
        self._slow.clear()
        self._waited.clear()
        self._agreement.begin(visit, wanted, first_serial - visit * steps_per_visit, wish)
        self._wish = wish or Format.FP32
        self._pulse()
        await self._handshake(wanted, self._offer, self._agreement.undecided)
        linked = self._agreement.close()
        self._pulse()
        # Ours must arrive as well as theirs.
        untold = self._untold = set(linked)
        await self._handshake(
            linked, self._tell_degree, lambda: self._agreement.unsettled() | untold
        )
        self.edges = self._agreement.settle()
        self._idle -= self.edges.weights.keys()
        self._pulse()
        return self.edges

    async def _handshake(
        self,
        peers: frozenset[str],
        call: Callable[[str], "asyncio.Task[None]"],
        open_: Callable[[], frozenset[str]],
    ) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        calls = [call(peer) for peer in sorted(peers)]
        while not self._stopping.is_set():
            elapsed = loop.time() - begin
            patience = {peer: self._patience(peer) - elapsed for peer in open_()}
            for peer, left in patience.items():
                if left <= 0 and peer not in self._idle:
                    self._idle.add(peer)
                    if not self._given_up(peer):
                        self._peers.trouble(peer, PeerTimeout("did not come to the visit"))
            waiting = [left for left in patience.values() if left > 0]
            if not waiting:
                break
            await self._wait_change(min(*waiting, self._timing.heartbeat))
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def _patience(self, peer: str) -> float:
        """Seconds that a visit's beginning waits for a peer.

        A living peer answers at once, whatever it is doing: a suspect that has not is not worth
        the deadline of those that have, nor is one that let us wait in vain before.
        """
        if self._given_up(peer):
            return 0.0
        idle = peer in self._idle
        if self._peers.is_suspect(peer) and self._peers.is_down(peer):
            return RETRY_SECONDS if idle else self._timing.redial
        if idle or self._peers.is_suspect(peer):
            return self._timing.rpc
        return self._timing.visit_deadline

    def _given_up(self, peer: str) -> bool:
        return self._peers.link(peer) is None or self._peers.is_paused(peer)

    def _offer(self, peer: str) -> "asyncio.Task[None]":
        async def offer() -> None:
            request = pb.VisitOffer(
                sender=self._peers.sender(),
                visit=self._agreement.visit,
                step=self._newest + 1 - self._agreement.visit * self._steps_per_visit,
                wire_format=pb.WireFormat.Name(self._wish),
            )
            while (link := self._peers.link(peer)) is not None:
                pause = self._timing.heartbeat
                try:
                    answer = await link.open_visit(request, self._timing.rpc)
                except PeerError as error:
                    self._peers.trouble(peer, error)
                    self._peers.retried(peer)
                    if not isinstance(error, PeerRefused):
                        pause = RETRY_SECONDS
                else:
                    self._peers.seen(peer)
                    if answer.verdict == pb.VisitAnswer.VERDICT_ACCEPTED:
                        self._agreement.answered(peer, Verdict.ACCEPTED)
                    elif answer.verdict == pb.VisitAnswer.VERDICT_PASSED:
                        self._agreement.answered(peer, Verdict.PASSED)
                    elif answer.verdict == pb.VisitAnswer.VERDICT_NOT_WANTED:
                        self._agreement.answered(peer, Verdict.NOT_WANTED)
                    self._pulse()
                    # A peer that accepted before it reached the visit may, once there, see
                    # other members and decline: ask again while its own offer is missing.
                    if peer not in self._agreement.undecided():
                        return
                await asyncio.sleep(pause)

        return asyncio.create_task(offer())

    def _tell_degree(self, peer: str) -> "asyncio.Task[None]":
        degree = len(self._agreement.edges)

        async def tell() -> None:
            request = pb.VisitDegree(
                sender=self._peers.sender(),
                visit=self._agreement.visit,
                degree=degree,
                graph=self._graph,
            )
            while (link := self._peers.link(peer)) is not None:
                try:
                    await link.settle_visit(request, self._timing.rpc)
                except PeerError as error:
                    self._peers.trouble(peer, error)
                    self._peers.retried(peer)
                    refused = isinstance(error, PeerRefused)
                    await asyncio.sleep(self._timing.heartbeat if refused else RETRY_SECONDS)
                else:
                    self._untold.discard(peer)
                    self._pulse()
                    return

        return asyncio.create_task(tell())

    # --- one step

    def encode(self, snapshot: Snapshot, layout: Layout) -> None:
        """Add what neighbours on compressed edges get; may run on another thread.

        Once for each step's snapshot, before it is published.
        """
        formats = frozenset(self.edges.formats.values())
        self._references.encode(snapshot, layout, formats, self._run, self._peers.sender().node)

    def _drop_references(self) -> None:
        """Free this node's references and its neighbours': the next exchange is a whole one."""
        self._references = OwnReferences()
        self._followed.clear()

    def publish(self, snapshot: Snapshot) -> None:
        """Hand out a step's block from now on, and the one before no more."""
        self._drop()
        self._held = snapshot
        self._newest = snapshot.serial
        self._have, self._gave, self._failed = set(), set(), set()
        self._served = frozenset(self.edges.weights)
        self._formats, self._encoded = self.edges.formats, snapshot.encoded
        loop = asyncio.get_running_loop()
        snapshot.grown = lambda: _soon(loop, self._has_grown)
        self._pulse()

    @property
    def early(self) -> bool:
        """Whether all edges take a snapshot that is still being made.

        A compressed stream begins with scales, or is of a difference: these need all values.
        """
        return not self.edges.formats

    async def make_room(self, *, patient: bool = False) -> float:
        """Let the last step's snapshot go before memory is taken for the next one.

        Neighbours that gave theirs and do not have ours yet are waited for as their blocks are, out
        of the same budget unless ``patient``. It costs no time where both are at one step, since
        they publish the block that we want next only when they have this one. Who lets us wait in
        vain is not waited for again in this visit.

        Returns:
            Seconds waited.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while self._held is not None and not self._stopping.is_set():
            behind = self._without(self._held)
            if not behind:
                break
            now = loop.time()
            # Who has not even asked gets no longer than a call that got lost.
            asked = any(self._asked.get(peer, -1) == self._held.serial for peer in behind)
            patience = self._timing.step_deadline if asked or patient else self._timing.rpc
            limit = begin + patience
            if not patient:
                limit = min(limit, now + max(self._budget(peer) for peer in behind))
            if now >= limit:
                self._idle_readers |= behind
                break
            await self._wait_change(limit - now)
            for peer in behind:
                self._waited[peer] = self._waited.get(peer, 0.0) + loop.time() - now
        self._drop()
        self._encoded = {}
        return loop.time() - begin

    def _without(self, held: Snapshot) -> set[str]:
        """Those that are worth waiting for to fetch this node's last block."""
        # Who gave its own is at this step; who asks for a later one does without ours.
        here = (self._gave | self._reading.keys()) & self._served
        return {
            peer
            for peer in here - self._have - self._failed - self._idle_readers
            if self._asked.get(peer, -1) <= held.serial and self._worth_waiting(peer)
        }

    def _drop(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None
            self._has_grown()

    def give_up(self, peers: Collection[str]) -> None:
        """Use the edges to these neighbours no more in this visit: neither take nor serve."""
        weights = {peer: w for peer, w in self.edges.weights.items() if peer not in peers}
        self.edges = replace(self.edges, weights=weights)
        self._pulse()

    async def gather(
        self,
        serial: int,
        layout: Layout,
        sink: Mix | None = None,
        hear: Hear | None = None,
        busy: "asyncio.Future[Any] | None" = None,
        intake: Callable[[str], Mix] | None = None,
    ) -> Gathered:
        """Pull the step's block from every neighbour and mix what passes its checks.

        Either ``sink`` takes the values, or ``intake`` says for each neighbour where they go, or
        blocks must come with notes and ``hear`` says it when it has heard the note.

        ``busy`` is what the caller does meanwhile: until it is done nobody waits, so it costs no
        neighbour its budget.

        Returns when all came, or those that came lately are through and the others failed, at
        latest after ``step_deadline``.
        """
        loop = asyncio.get_running_loop()
        begin = loop.time()
        idle_since, mixed_before = begin if busy is None else None, 0.0
        deadline = begin + self._timing.step_deadline
        report = Gathered()
        tasks = {
            asyncio.create_task(
                self._take(
                    peer,
                    weight,
                    serial,
                    layout,
                    intake(peer) if intake else sink,
                    report,
                    deadline,
                    hear,
                )
            ): peer
            for peer, weight in self.edges.weights.items()
        }
        alone_since = begin  # when all but those that are still missing had come
        pending = set(tasks)
        try:
            while pending and not self._stopping.is_set():
                # Those that hold nobody up may still bring what they have ready.
                worth = {tasks[task] for task in pending if self._worth_waiting(tasks[task])}
                if idle_since is None and busy is not None and busy.done():
                    idle_since, mixed_before = loop.time(), report.mix
                    alone_since = max(alone_since, idle_since)
                limit = deadline
                if idle_since is not None:
                    if not worth:
                        limit = min(deadline, idle_since + DOUBTFUL_SECONDS)
                    # No budget where nothing is trained: to go on without a node is no agreement.
                    elif len(worth) == 1 and hear is None:
                        limit = min(deadline, alone_since + self._budget(*worth))
                if limit <= loop.time():
                    if worth and loop.time() < deadline:
                        self._slow |= worth
                        continue
                    break
                arrived = await self._any_done(pending, limit - loop.time(), busy)
                pending -= arrived
                if arrived and not pending and idle_since is not None:
                    # What the last one takes after the others is its own to answer for.
                    for peer in {tasks[task] for task in arrived} & worth:
                        spent = loop.time() - alone_since
                        self._waited[peer] = self._waited.get(peer, 0.0) + spent
                if arrived:
                    alone_since = loop.time()
        finally:
            for task in pending:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for peer, raised in zip(tasks.values(), ended, strict=True):
            if isinstance(raised, Exception):
                _log.error("defect while taking a block", peer=peer, exc_info=raised)
        for peer in self.edges.weights:  # a task may have been cancelled before it began
            if peer not in (*report.used, *report.partial, *report.missing):
                report.missing[peer] = "late"
        if (serial + 1) % self._steps_per_visit == 0:
            self._drop_references()
        report.wait = loop.time() - begin
        if idle_since is not None:
            exposed = loop.time() - idle_since - (report.mix - mixed_before)
            report.exposed = max(0.0, exposed)
        for peer in self.edges.weights:
            edge = report.edges.setdefault(peer, EdgeUse(report.wait))
            edge.sent = self._sent_to.pop(peer, 0)
            self._peers.waited(peer, edge.wait)
        self._sent_to.clear()
        return report

    async def _any_done(
        self,
        tasks: set["asyncio.Task[None]"],
        seconds: float,
        busy: "asyncio.Future[Any] | None",
    ) -> set["asyncio.Task[None]"]:
        """Those of the tasks that have ended, when one has or something else has changed."""
        changed = asyncio.create_task(self.changed())
        others = {changed} if busy is None or busy.done() else {changed, busy}
        try:
            await asyncio.wait(
                {*tasks, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()
        return {task for task in tasks if task.done()}

    def _worth_waiting(self, peer: str) -> bool:
        """Who missed a deadline, used up its budget, or broke the connection, holds nobody up."""
        doubtful = self._late | self._slow
        return peer not in doubtful and not self._peers.is_suspect(peer)

    def _budget(self, peer: str) -> float:
        """Seconds that this visit still waits for a neighbour after the others have come."""
        return max(0.0, self._timing.wait_budget - self._waited.get(peer, 0.0))

    async def _take(
        self,
        peer: str,
        weight: float,
        serial: int,
        layout: Layout,
        mix: Mix | None,
        report: Gathered,
        deadline: float,
        hear: Hear | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        wire = self.edges.format(peer)
        # Out of the table until all of the stream was good: half advanced it is of no use.
        followed = self._followed.pop(peer, None) or Followed(layout.numel)
        receiver = Receiver(
            layout,
            serial,
            self._run,
            peer,
            noted=hear is not None,
            wire=wire,
            base=followed.serial,
        )
        sink: Sink | None = mix
        if mix is not None and wire is not Format.FP32:
            sink = partial(mix, own=self._encoded[wire])
        own = self._held  # None when every neighbour has it already, so that it is made
        mixed = 0
        started = loop.time()
        edge = report.edges[peer] = EdgeUse()
        problem: PeerError | None = PeerTimeout("not there in time")  # when cancelled
        request = pb.PullRequest(
            sender=self._peers.sender(),
            serial=serial,
            wire_format=pb.WireFormat.Name(wire),
            base=followed.serial,
        )
        try:
            link = self._peers.link(peer)
            if link is None:
                raise PeerUnavailable("gone")
            async with aclosing(link.pull(request, self._timing.step_deadline)) as stream:
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
                self._gave.add(peer)
                if wire is not Format.FP32:
                    followed.serial = serial
                    self._followed[peer] = followed
                self._late.discard(peer)
                self._peers.seen(peer)
            else:
                if mixed:
                    report.partial.append(peer)
                else:
                    report.missing[peer] = problem.reason
                if not self._stopping.is_set():
                    self._peers.trouble(peer, problem)
                    if loop.time() >= deadline:
                        self._late.add(peer)

    def rest(self) -> None:
        """Take no part in further steps: whoever asks for one hears so at once.

        What is published is handed out still. It ends with ``wake_up``, or with the next visit.
        """
        self._resting, self._missed = True, False
        self._pulse()

    def wake_up(self) -> bool:
        """Go on with the visit, unless a neighbour has gone on in it meanwhile.

        Returns:
            Whether one has; then this node stays out of the visit.
        """
        self._resting = self._missed
        return self._missed

    async def drain(self) -> frozenset[str]:
        """Serve the last block until every neighbour has it, at most ``step_deadline``.

        Returns:
            The neighbours that did not fetch it.
        """
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._timing.step_deadline
        while (
            self._held is not None
            and self._unserved()
            and not self._stopping.is_set()
            and loop.time() < limit
        ):
            await self._wait_change(min(1.0, limit - loop.time()))
        return self._unserved() if self._held is not None else frozenset()

    def _unserved(self) -> frozenset[str]:
        """Neighbours that may still come for the newest snapshot."""
        return frozenset(
            peer
            for peer in self.edges.weights
            if peer not in self._have and not self._given_up(peer)
        )

    # --- answering neighbours

    def answer_offer(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """A neighbour offers an edge."""
        peer = self._peers.check_sender(request.sender)
        self._peers.seen(peer)
        try:
            wish = Format(request.wire_format)
        except ValueError:
            raise PeerRefused("bad_format", f"no format {request.wire_format}") from None
        verdict = Verdict.NOT_WANTED
        if not self._resting:
            verdict = self._agreement.offered(
                peer, request.visit, request.sender.session, request.step, wish
            )
        self._pulse()
        return self._answer(verdict)

    def answer_degree(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """A neighbour tells its degree."""
        peer = self._peers.check_sender(request.sender)
        if request.degree < 1:
            raise PeerRefused("bad_degree", "a neighbour has at least one edge")
        self._agreement.degree(peer, request.visit, request.degree, request.graph)
        self._pulse()
        return self._answer(Verdict.ACCEPTED)

    def _answer(self, verdict: Verdict) -> pb.VisitAnswer:
        name = pb.VisitAnswer.Verdict.Name(verdict)
        agreement = self._agreement
        return pb.VisitAnswer(verdict=name, visit=agreement.visit, closed=agreement.closed)

    @property
    def overtaken(self) -> bool:
        """Whether the visit has no edge because the neighbours had begun it without us."""
        return self._agreement.overtaken

    def is_closed(self, visit: int) -> bool:
        """Whether the visit's edges are fixed: who comes now is too late for it."""
        return self._agreement.visit == visit and self._agreement.closed

    async def answer_pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """Stream the asked-for snapshot, once it is published."""
        peer = self._peers.check_sender(request.sender)
        if self._pulls[peer] >= MAX_PULLS_PER_PEER:
            raise PeerRefused("too_many_pulls", f"at most {MAX_PULLS_PER_PEER} at once")
        self._pulls[peer] += 1
        if peer in self.edges.weights:
            self._asked[peer] = max(self._asked.get(peer, -1), request.serial)
            self._pulse()
        try:
            held = await self._published(peer, request.serial)
            snapshot = self._in_format(peer, held, request)
            async with self._slots:
                self._reading[peer] += 1
                left = snapshot.count
                try:
                    for index in range(snapshot.count):
                        message = await self._next_message(peer, snapshot, index)
                        left -= 1
                        yield message
                except PeerRefused:  # thrown in where the last message was not taken, too
                    left = snapshot.count
                    raise
                finally:  # a reader that has everything may turn away before the stream's end
                    self._reading[peer] -= 1
                    self._reading += Counter()  # forgets the zeros
                    if snapshot.serial == self._newest:
                        (self._failed if left else self._have).add(peer)
                    if not left:
                        self._peers.seen(peer)
                    self._let_go()
                    self._pulse()
        except PeerRefused as error:
            if error.reason == "too_slow":
                self._peers.trouble(peer, error)
            raise
        finally:
            self._pulls[peer] -= 1
            if not self._pulls[peer]:
                del self._pulls[peer]

    async def _next_message(self, peer: str, snapshot: Snapshot, index: int) -> bytes:
        """A message when it is its turn."""
        while not snapshot.has(index) and snapshot.messages:
            await self._grown.wait()
        message = snapshot.message(index)
        now = asyncio.get_running_loop().time()
        if pause := self._rates.take(peer, len(message), now):
            try:
                await asyncio.sleep(pause)
            except asyncio.CancelledError:
                self._rates.give_back(peer, len(message))
                raise
        self._peers.sent(peer, len(message))
        self._sent += len(message)
        self._sent_to[peer] += len(message)
        return message

    async def _published(self, peer: str, serial: int) -> Snapshot:
        while True:
            held = self._held
            if held is not None and held.serial == serial and peer in self._served:
                return held
            if self._stopping.is_set():
                raise PeerRefused("stopping", "this node is going away")
            visit = serial // self._steps_per_visit
            if visit < self._agreement.visit:
                raise PeerRefused("ended", f"visit {visit} is over here")
            if serial <= self._newest:
                raise PeerRefused("passed", f"step {serial} is over here")
            if self._resting:
                self._missed = self._missed or peer in self.edges.weights
                raise PeerRefused("paused", "this node takes no part for now")
            settled = self.edges.visit == self._agreement.visit and self._agreement.closed
            if visit == self._agreement.visit and settled and peer not in self.edges.weights:
                raise PeerRefused("not_a_neighbour", f"no edge in visit {visit}")
            await self._changed.wait()

    def _in_format(self, peer: str, held: Snapshot, request: pb.PullRequest) -> Snapshot:
        wire = self._formats.get(peer, Format.FP32)
        if int(request.wire_format) != wire or wire not in (Format.FP32, *held.encoded):
            raise PeerRefused("bad_format", f"the edge's format is {wire.word}")
        if wire is Format.FP32:
            return held
        return held.encoded[wire].answer(request.base if request.HasField("base") else None)

    def _let_go(self) -> None:
        """Forget the snapshot as soon as every neighbour has it; the step may still need it."""
        if self._have >= self._served and not self._reading:
            self._held = None

    # --- bookkeeping

    @property
    def bytes_sent(self) -> int:
        """Bytes of blocks sent to all peers."""
        return self._sent

    def release(self) -> None:
        """Nothing is served any more; readers under way end."""
        self._drop()
        self._drop_references()
        self._pulse()

    def wake(self) -> None:
        """Something outside changed (stop, a peer's state): look again."""
        self._pulse()

    async def changed(self) -> None:
        """Returns at the next change: a peer's state, an offer, the stop signal."""
        await self._changed.wait()

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _has_grown(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def _wait_change(self, seconds: float) -> None:
        await happens(self._changed, seconds)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call on the loop's thread, if there is somebody left to be told."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(call)
