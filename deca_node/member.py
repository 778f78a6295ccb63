"""One member of a run: who it meets, what it exchanges, how it stays in step.

It has no process, no files and no clock of its own: the node gives it real ones, tests and
simulations theirs.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from deca_node import membership, topology
from deca_node.blocks import Schedule, Visit
from deca_node.catchup import CatchUp, Store
from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.exchange import Exchange, send_rates
from deca_node.giving import COST_BYTES, Giver, Shelf
from deca_node.membership import Edges, Phase
from deca_node.methods import Method
from deca_node.pacing import WorkBudget
from deca_node.pb import node_pb2 as pb
from deca_node.rounds import Batches, Observer, Rounds, Start, StepRecord, Worker
from deca_node.swarm import Identity, Position, Swarm
from deca_node.topology import Graph, TopologySpec
from deca_node.transport import Transport
from deca_node.waiting import done_before

# A node that starts again within a run waits this long for its old members, then goes on without.
REJOIN_SECONDS = 30.0
# Of a capped node's bytes, what those who catch up may have: the training must go on beside them.
CATCH_UP_SHARE = 0.25
# How often a waiting node says who is missing.
REMIND_SECONDS = 10.0


class Blocks(Shelf, Store[Any], Protocol):
    """The blocks that a member keeps: handed out to others, taken in from them."""


@dataclass(frozen=True)
class Run:
    """What a member must know of the run.

    Attributes:
        schedule: rounds, blocks, steps.
        topology: how the graph is made from the members.
        timing: deadlines.
        catch_up_rate: bytes per second given to those who catch up, at most.
        catch_up_share: of one core, what giving may take while this member trains; None is no
            bound, and needs no clock of the process.
        send_rate: bytes per second sent in all, those included; None is no cap.
        send_rate_per_peer: likewise to each peer.
        wire_format: what this member wishes for its edges.
    """

    schedule: Schedule
    topology: TopologySpec
    timing: Timing
    catch_up_rate: float
    catch_up_share: float | None = None
    send_rate: float | None = None
    send_rate_per_peer: float | None = None
    wire_format: Format = Format.FP32


class Member:
    """See the module; answers peers (transport.Handler).

    Args:
        run: what all members share.
        identity: who this one is.
        transport: how to reach others.
        blocks: what it keeps.
        stopping: ends everything that waits.
        woken: called when a peer's state changed.
        log: a structlog logger.
        draw: makes the graph from members' names; from the run's topology when not given.

    Attributes:
        phase: what it is doing, as peers are told; catching up overrides it.
        visit: the block visit it is in, or about to begin; their number at the end.
        step: the steps of it that are done.
    """

    def __init__(
        self,
        run: Run,
        identity: Identity,
        transport: Transport,
        blocks: Blocks,
        stopping: asyncio.Event,
        woken: Callable[[], None],
        log: Any,
        draw: Callable[[frozenset[str]], Graph] | None = None,
    ) -> None:
        self._run = run
        self._draw = draw or (lambda names: topology.graph(names, run.topology))
        self._blocks = blocks
        self._stopping = stopping
        self._woken = woken
        self._log = log
        self.phase = Phase.STARTING
        self.visit = self.step = 0
        self._rest = _Rest(self)
        schedule, timing = run.schedule, run.timing
        self.swarm = Swarm(
            identity,
            transport,
            timing,
            self.position,
            schedule.steps,
            self.wake,
            log,
            # In the final agreement each block gets one more.
            last_visit=schedule.visits + len(schedule.blocks),
        )
        rates = send_rates(run.send_rate, run.send_rate_per_peer)
        self.exchange = Exchange(self.swarm, timing, identity.run, stopping, rates)
        self.giver = Giver(
            self.swarm,
            blocks,
            self._place,
            timing,
            run.catch_up_rate
            if run.send_rate is None
            else min(run.catch_up_rate, CATCH_UP_SHARE * run.send_rate),
            rates,
            None if run.catch_up_share is None else WorkBudget(run.catch_up_share, COST_BYTES),
            lambda: self.phase in (Phase.TRAINING, Phase.AGREEING),
        )
        self.catch_up = CatchUp(
            self.swarm,
            blocks,
            schedule,
            timing,
            self._is_behind,
            self._reachable,
            self.swarm.nudge,
            stopping,
            log,
        )

    # --- where it is

    def position(self) -> Position:
        """As peers are told."""
        gain = self.catch_up.gain
        if gain.active:
            return Position(Phase.CATCHING_UP, self.visit, gain.entry)
        return Position(self.phase, self.visit)

    def _place(self) -> tuple[int, bool, int]:
        """The visit, whether it is closed, and the steps done, for those that catch up.

        A paused node's visit is open: nobody is to wait for its end.
        """
        is_closed = self.exchange.is_closed(self.visit) and self.phase != Phase.PAUSED
        return min(self.visit, self._run.schedule.visits), is_closed, self.step

    def enter(self, phase: Phase) -> None:
        """Begin another phase and tell everybody."""
        self.phase = phase
        self.swarm.nudge()
        self.giver.moved()

    @property
    def is_stopping(self) -> bool:
        """Whether the node is about to end."""
        return self._stopping.is_set()

    @property
    def is_to_pause(self) -> bool:
        """Whether this member pauses, or will after the step under way."""
        return self._rest.wanted

    def pause(self) -> None:
        """Take no part after the step under way; members that are waited for come without it."""
        self._rest.wanted = True
        if self.phase == Phase.WAITING:
            self.enter(Phase.PAUSED)

    def resume(self) -> None:
        """Take part again."""
        self._rest.wanted = False
        if self.phase == Phase.PAUSED:
            self.enter(self._rest.before)
        self.wake()

    async def rest(self) -> bool:
        """See rounds.Pause."""
        self.exchange.rest()
        while self._rest.wanted and not self._stopping.is_set():
            if self.phase != Phase.PAUSED:
                self.enter(Phase.PAUSED)
            await self._pause(REMIND_SECONDS)
        return self.exchange.wake_up()

    def wake(self) -> None:
        """Something changed outside (a peer's state, the stop signal): look again."""
        self.exchange.wake()
        self._woken()

    def graph(self, visit: int) -> Graph:
        """The topology over the members of a visit."""
        return self._draw(self.swarm.members(visit))

    def neighbours(self, visit: int) -> frozenset[str]:
        """With whom the topology would have this member exchange in a visit."""
        return self.graph(visit)[self.swarm.identity.node]

    def _is_behind(self, visit: int, others: Collection[int]) -> bool:
        """Whether this member must catch up before a visit, with others that are at these."""
        # Behind the last visit whoever is further has agreed on a block without this member.
        near = self.swarm.near_visits if visit < self._run.schedule.visits else 0
        return any(other - visit > near for other in others)

    def _reachable(self, visit: int) -> frozenset[str]:
        """Those that this member exchanges with, if only through others.

        The parts of a graph that was given in parts go on each at its own pace.
        """
        everybody = self.swarm.members(visit).union(self.swarm.givers())
        return topology.component(self._draw(everybody), self.swarm.identity.node)

    # --- life

    async def wait_for_members(
        self, wanted: int, waiting: Callable[[str], None], *, resumed: bool
    ) -> str:
        """Wait until enough members are there; not for ever where they cannot come.

        Args:
            wanted: how many, this one included.
            waiting: told again and again whom it waits for, in words.
            resumed: this member has taken part before.

        Returns:
            Why it goes on without all of them; empty when they are there, or when told to stop.
        """
        swarm = self.swarm
        clock = asyncio.get_running_loop().time
        begin = reminded = clock()
        begun: float | None = None
        while not self._stopping.is_set():
            swarm.sweep()
            peers = swarm.peers.values()
            enough, who = membership.ready(swarm.identity.node, peers, wanted)
            if lost := self._blocks.lost():
                who += f"; block {', '.join(map(str, sorted(lost)))} is lost here, one must have it"
            waiting(who)
            now = clock()
            if enough:
                self._log.info("members are here", members=who)
                return ""
            # They may have seen the missing ones a moment before us.
            training = any(
                peer.phase in (Phase.TRAINING, Phase.AGREEING) and peer.reached for peer in peers
            )
            begun = (begun if begun is not None else now) if training else None
            if begun is not None and now - begun > 2 * self._run.timing.heartbeat:
                return f"the others have begun: {who}"
            # Without its lost blocks it would train the base model's.
            if resumed and now - begin > REJOIN_SECONDS and not self._blocks.lost():
                return f"going on after a restart: {who}"
            if now >= reminded:
                self._log.info("waiting", who=who)
                reminded = now + REMIND_SECONDS
            await self._pause(1.0)
        return ""

    async def _pause(self, seconds: float) -> None:
        changed = asyncio.create_task(self.exchange.changed())
        await done_before(self._stopping, changed, end=True, within=seconds)

    async def train(
        self, start: Start, method: Method, batches: Batches, observer: Observer, worker: Worker
    ) -> tuple[Start, bool]:
        """Run the schedule (rounds.Rounds).

        Returns:
            Where it ended, and whether a visit is still open in ``method``.
        """
        self.visit = start.visit
        self._rest.before = Phase.TRAINING
        rounds = Rounds(
            self._run.schedule,
            method,
            self.exchange,
            batches,
            self.neighbours,
            self._in_step,
            self._rest,
            _Watched(self, observer),
            worker,
            self._stopping,
            self._run.wire_format,
        )
        visit, step = await rounds.run(start)
        self._rest.wanted = False  # it came too late
        self.moved(visit)
        return Start(visit, step), rounds.is_open

    async def _in_step(self, visit: int, *, overtaken: bool) -> tuple[int, bool]:
        entry, anew = await self.catch_up(visit, overtaken=overtaken)
        self.moved(entry)
        return entry, anew

    async def hand_out(self) -> None:
        """Before this member leaves: let those who catch up have its blocks (Giver.drain)."""
        await self.giver.drain(expecting=membership.may_come(self.swarm.peers.values()))

    def moved(self, visit: int) -> None:
        """This member is at another visit."""
        if visit != self.visit:
            self.visit, self.step = visit, 0
            self.swarm.moved()
            self.giver.moved()

    async def leave(self, *, finished: bool) -> None:
        """Take leave of everybody."""
        await self.swarm.goodbye(finished=finished)
        await self.swarm.close()

    # --- answers to peers (transport.Handler)

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """See Handler."""
        return await self.swarm.answer_hello(request, source)

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """See Handler."""
        return self.exchange.answer_offer(request)

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """See Handler."""
        return self.exchange.answer_degree(request)

    def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """See Handler."""
        return self.exchange.answer_pull(request)

    async def list_blocks(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """See Handler."""
        return await self.giver.answer_list(request)

    def fetch_block(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """See Handler."""
        return self.giver.answer_fetch(request)

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """See Handler."""
        self.swarm.answer_goodbye(request)
        return pb.GoodbyeReply()


class _Rest:
    """rounds.Pause of a member.

    Attributes:
        wanted: see rounds.Pause.
        before: the phase that the member comes back to.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self.wanted = False
        self.before = Phase.WAITING

    async def __call__(self) -> bool:
        """See rounds.Pause."""
        return await self._member.rest()


class _Watched:
    """rounds.Observer that keeps the member's own position and passes everything on."""

    def __init__(self, member: Member, observer: Observer) -> None:
        self._member, self._observer = member, observer

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """See Observer."""
        self._observer.visit_opened(visit, edges, wanted)

    async def step_done(self, record: StepRecord) -> None:
        """See Observer."""
        self._member.step = record.step + 1
        await self._observer.step_done(record)

    async def paused(self, *, within: bool) -> None:
        """See Observer."""
        await self._observer.paused(within=within)

    async def visit_closed(self, visit: Visit) -> None:
        """See Observer. Only then can those who catch up have the block."""
        await self._observer.visit_closed(visit)
        self._member.moved(visit.index + 1)
