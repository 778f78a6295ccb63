"""Catching up: blocks that others trained meanwhile are fetched from several of them at once.

The fetching end; giving.py is the other. What is fetched, and from whom, is decided in recovery.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from deca_node import wire
from deca_node.blocks import Schedule
from deca_node.config import Timing
from deca_node.errors import (
    DiskFullError,
    OutputError,
    PayloadError,
    PeerError,
    PeerTimeout,
)
from deca_node.giving import LATER, Peers, transfer_seconds
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import (
    STUCK_FACTOR,
    Flight,
    Holdings,
    Kept,
    Need,
    Records,
    Step,
    checked,
    displaced,
    next_block,
    next_rival,
    next_step,
)
from deca_node.swarm import UNMET
from deca_node.transport import Link
from deca_node.waiting import Pulse, done_before, happens

# Between two tries when nothing could be fetched, or kept on a full disk.
RETRY_SECONDS = 2.0
# How often a giver that has nothing to give looks whether another one needs help.
LOOK_SECONDS = 1.0
# Blocks in one go that could not be kept, until the run goes on without what it missed.
MAX_DISK_FAILURES = 5
# Times that nobody answers, a redial apart, until the run goes on alone.
MAX_SILENT_ROUNDS = 3


class Partial(Protocol):
    """A block's file that is being fetched; it outlives an interruption."""

    @property
    def size(self) -> int:
        """Bytes that are there."""
        ...

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        ...

    def close(self) -> None:
        """Keep what is there for the next try."""
        ...


P = TypeVar("P", bound=Partial)
T = TypeVar("T")


class Store(Protocol[P]):
    """Where a node that catches up puts what it fetches."""

    def versions(self) -> Mapping[int, int]:
        """By block, the last visit that changed it here."""
        ...

    def lost(self) -> Collection[int]:
        """Blocks whose values here are damaged: any version of them is wanted."""
        ...

    def most_bytes(self) -> Mapping[int, int]:
        """By block, the largest size that a file of it can have."""
        ...

    def begun(self) -> Collection[str]:
        """Digests of the files of which an earlier try left a part."""
        ...

    async def partial(self, block: int, xxh3: str) -> P:
        """The file that a version of a block goes to, with what an earlier try left in it."""
        ...

    async def install(self, block: int, partial: P, visit: int) -> None:
        """Check a complete file and put its values into the model and the state on disk.

        Raises:
            PayloadError: it is not what the digest promised, or does not fit the model.
            DiskFullError: no room to keep it; the partial file is still there.
        """
        ...


@dataclass
class Gain:
    """How far catching up is; what it brought in all.

    Attributes:
        active: whether it is under way, and told to others.
        entry: the visit in which the node takes part, 0 while unknown.
        fetched: bytes of blocks since it began.
        total: those and the ones still to come, as known now.
        bytes: fetched over all times.
        visits: visits passed over.
        waiting_for: what is under way, in words.
    """

    active: bool = False
    entry: int = 0
    fetched: int = 0
    total: int = 0
    bytes: int = 0
    visits: int = 0
    waiting_for: str = ""


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _TornPart(PeerTimeout):
    """What was there of a file was damaged, and whoever gave the rest of it is not to blame.

    It had broken off on this disk, or came from another giver, who was counted for that.
    """


@dataclass(eq=False)
class _Flight:
    """A block on its way from one giver.

    Attributes:
        giver: its name.
        kept: the version that it has.
        begin: when it was asked.
        task: what fetches it.
        has_landed: all of it is here, and is looked at.
        is_over: another one was faster, or takes its place; its task is ending.
    """

    giver: str
    kept: Kept
    begin: float
    task: "asyncio.Task[None] | None" = None
    has_landed: bool = False
    is_over: bool = False
    _partial: Partial | None = None
    _before: int = 0

    def opened(self, partial: Partial) -> int:
        """The part that it goes to is open; bytes that an earlier try left there."""
        self._partial, self._before = partial, partial.size
        return self._before

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return 0 if self._partial is None else self._partial.size

    @property
    def got(self) -> int:
        """Bytes that have come."""
        return self.size - self._before

    def seen(self, now: float) -> Flight:
        """How it goes."""
        left = self.kept.bytes - self.size
        return Flight(self.kept.xxh3, self.got, left, now - self.begin)

    def stop(self) -> None:
        """End it, once: what it closes is not to be interrupted."""
        if not self.is_over and self.task is not None:
            self.task.cancel()
        self.is_over = True


class _Pass:
    """Blocks that are fetched in one go.

    Args:
        needs: all of them.
        begun: see next_block.

    Attributes:
        missing: those that nobody is asked for now.
        moved: beats when a block is there, or is missing again.
    """

    def __init__(self, needs: Mapping[int, Need], begun: Collection[str]) -> None:
        self.needs, self.begun = needs, begun
        self.missing = dict(needs)
        self.moved = Pulse()
        self._flying: dict[int, list[_Flight]] = {}

    def flights(self, now: float) -> dict[int, list[Flight]]:
        """By block, how it goes from whom it comes; those whose last byte is here are left out."""
        found = {
            block: [flight.seen(now) for flight in flights if not flight.is_over]
            for block, flights in self._flying.items()
            if not any(flight.has_landed for flight in flights)
        }
        return {block: flights for block, flights in found.items() if flights}

    def begin(self, block: int, flight: _Flight, now: float) -> Collection["asyncio.Task[None]"]:
        """A flight begins; those of the block that end for it, and are to be waited for."""
        self.missing.pop(block, None)
        flights = self._flying.setdefault(block, [])
        active = [each for each in flights if not each.is_over]
        out = displaced([each.seen(now) for each in active], flight.kept.xxh3)
        if out is not None:
            active[out].stop()
        ending = [each.task for each in flights if each.is_over and each.task is not None]
        flights.append(flight)
        return ending

    def landed(self, block: int, flight: _Flight) -> Collection["asyncio.Task[None]"]:
        """All of it is there: the block's other flights end, and are to be waited for."""
        flight.has_landed = True
        others = [each for each in self._flying[block] if each is not flight]
        for each in others:
            each.stop()
        return [each.task for each in others if each.task is not None]

    def end(self, block: int, flight: _Flight, *, missing: bool) -> None:
        """A flight is over; what is missing after it is for others, if none is fetching it.

        Of one that was told to end, whoever took its place has to say that.
        """
        flights = self._flying[block]
        flights.remove(flight)
        if missing and not flight.is_over and all(each.is_over for each in flights):
            self.missing[block] = self.needs[block]
        if not flights:
            del self._flying[block]
        self.moved.beat()


class CatchUp:
    """One node's way back into step with the others.

    A greeting that says that somebody is ahead makes it ask for lists, and no more: what it does
    then, and tells the others, follows from the lists. Who is of no use rests (recovery.Records).

    Args:
        peers: the peer table.
        store: where blocks go.
        schedule: the run's.
        timing: deadlines.
        behind: tells whether this node, about to begin a visit, is out of step with others that
            are at these visits.
        reachable: those that this node exchanges with, if only through others.
        changed: called when ``gain`` changes in a way that others should hear of.
        stopping: ends it.
        log: a structlog logger.
    """

    def __init__(
        self,
        peers: Peers,
        store: Store[Any],
        schedule: Schedule,
        timing: Timing,
        behind: Callable[[int, Collection[int]], bool],
        reachable: Callable[[int], frozenset[str]],
        changed: Callable[[], None],
        stopping: asyncio.Event,
        log: Any,
    ) -> None:
        self._peers = peers
        self._store = store
        self._schedule = schedule
        self._timing = timing
        self._behind = behind
        self._reachable = reachable
        self._visit = 0
        self._disk_failures = 0
        self._installed = False
        self._records = Records()
        # The visit that this node went on with, and when.
        self._begun: tuple[int, float] | None = None
        self._step_seconds = 0.0  # that a step took here, lately
        self._changed = changed
        self._stopping = stopping
        self._log = log
        self.gain = Gain()

    async def __call__(self, visit: int, *, overtaken: bool) -> tuple[int, bool]:
        """Catch up if need be.

        Args:
            visit: where this node is, about to begin it.
            overtaken: its neighbours have begun or ended this visit without it.

        Returns:
            The visit at which it goes on, its own when it is in step or when nobody can give it
            anything; and whether blocks have changed, so that a visit under way begins anew.
        """
        self._visit = visit
        self._measure(visit)
        entry, self._installed = visit, False
        if overtaken or self._is_behind_greetings():
            entry = await self._in_time(visit, overtaken)
        self._begun = entry, self._now()
        return entry, self._installed

    @property
    def unusable(self) -> frozenset[str]:
        """Givers that are left alone for now, and so not followed either."""
        return self._records.resting(self._now())

    def _measure(self, visit: int) -> None:
        """What a step takes here, where a visit has been made since the last call."""
        if self._begun is not None and visit == self._begun[0] + 1:
            self._step_seconds = (self._now() - self._begun[1]) / self._schedule.steps

    async def _in_time(self, visit: int, overtaken: bool) -> int:
        gain = self.gain
        gain.entry, gain.fetched, gain.total = 0, 0, 0
        self._disk_failures = 0
        self._records.make_room(self._peers.givers())
        begin = time.monotonic()
        try:
            entry = await self._catch_up(visit, overtaken)
        finally:
            told, gain.active, gain.waiting_for = gain.active, False, ""
        gain.visits += entry - visit
        if told or entry > visit:
            self._log.info(
                "caught up" if entry > visit else "nothing to catch up with",
                visit=entry,
                megabytes=round(gain.fetched / 1e6, 1),
                seconds=round(time.monotonic() - begin, 1),
            )
            self._changed()
        return entry

    def _is_behind_greetings(self) -> bool:
        """Whether somebody that can be asked says that it is ahead: worth asking for lists.

        So it is where a block is lost: each that is here may have it, or have got it since.
        """
        givers = self._givers()
        if givers and self._store.lost():
            return True
        return self._behind(self._visit, [self._peers.visit_of(name) for name in givers])

    def _is_behind_lists(self, others: Mapping[str, Holdings]) -> bool:
        """Whether somebody is ahead by its list, or has a block that is lost here.

        Lists end with the schedule; where its final agreement is, a peer tells by its greetings.
        """
        last, lost = self._schedule.visits, self._store.lost()
        if any(block in each.blocks for each in others.values() for block in lost):
            return True
        visits = [
            max(each.visit, self._peers.visit_of(name)) if each.visit == last else each.visit
            for name, each in others.items()
        ]
        return self._behind(self._visit, visits)

    async def _catch_up(self, visit: int, overtaken: bool) -> int:
        waited: int | None = None  # the visit whose end the last listing waited for
        furthest, since = (-1, 0), self._now()  # visit and step of whoever is ahead, and since when
        promised = missed = silent = 0
        while not self._stopping.is_set() and self._disk_failures < MAX_DISK_FAILURES:
            others = await self._unless_stopped(self._holdings(after=waited), {})
            if not others:
                silent += 1
                followed = overtaken or self._is_behind_greetings()
                if not followed or silent > MAX_SILENT_ROUNDS:
                    return visit
                await self._pause(self._timing.redial)
                continue
            silent = 0
            # The end of a visit in which all the others pause is not waited for.
            overtaken = overtaken and not all(map(self._peers.is_paused, others))
            if not overtaken and not self._is_behind_lists(others):
                return visit  # nobody is ahead, or who is has turned out to be of no use
            step = next_step(
                visit, self._store.versions(), others, self._schedule, overtaken=overtaken
            )
            if step.done:
                return step.entry
            if promised and step.entry > promised:
                missed, promised = missed + 1, 0
            if missed and step.wait is None and step.entry == promised:
                # It takes longer to fetch a visit's block than the others wait: the mix mends it.
                return step.entry
            if step.fetch:
                waited = None
                self.gain.total = self.gain.fetched + sum(n.bytes for n in step.fetch.values())
                self.gain.waiting_for = f"{len(step.fetch)} blocks from {', '.join(sorted(others))}"
                self._announce(self.gain.entry)
                before = self.gain.bytes
                await self._unless_stopped(self._fetch_all(step), None)
                if self.gain.bytes == before:
                    await self._pause(RETRY_SECONDS)
            else:
                if waited != step.wait:
                    waited = step.wait
                else:  # an answer that should have been held back may not have been
                    await self._pause(RETRY_SECONDS / 10)
                at = max((each.visit, each.step) for each in others.values())
                if at > furthest or at[0] < furthest[0]:  # or who was ahead is so no more
                    furthest, since = at, self._now()
                elif self._now() - since > self._step_patience():
                    self._give_up_front(others, at[0], since)
                promised = step.entry
                self.gain.waiting_for = f"visit {step.entry} to begin"
                self._announce(step.entry)
        return visit

    def _step_patience(self) -> float:
        """Seconds without a further step after which those ahead count as stuck."""
        return STUCK_FACTOR * max(self._timing.step_deadline, self._step_seconds)

    def _give_up_front(self, others: Mapping[str, Holdings], visit: int, since: float) -> None:
        """Those that say that they are at a visit make no step of it: they rest."""
        stuck = sorted(name for name, each in others.items() if each.visit == visit)
        self._log.warning("ahead, but stuck: not asked for a while", peers=stuck, visit=visit)
        for name in stuck:
            self._records.stuck(name, since, self._now())

    def _announce(self, entry: int) -> None:
        """Tell the others, who count on this node from ``entry`` on; 0 while that is not known."""
        gain = self.gain
        if not gain.active:
            self._log.info("catching up", visit=self._visit)
        elif gain.entry == entry:
            return
        gain.active, gain.entry = True, entry
        self._changed()

    def _givers(self) -> dict[str, Link]:
        usable = self._reachable(self._visit) - self.unusable
        return {name: link for name, link in self._peers.givers().items() if name in usable}

    async def _pause(self, seconds: float) -> None:
        await happens(self._stopping, seconds)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T], otherwise: T) -> T:
        task = asyncio.create_task(work)
        return task.result() if await done_before(self._stopping, task, end=True) else otherwise

    # --- asking

    async def _holdings(self, after: int | None) -> dict[str, Holdings]:
        """What each giver has; with ``after``, as soon as the first of them is past that visit."""
        tasks = {
            asyncio.create_task(self._ask(name, link, after)): name
            for name, link in self._givers().items()
        }
        found: dict[str, Holdings] = {}
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (holdings := task.result()) is not None:
                        found[tasks[task]] = holdings
                if after is not None and any(each.visit > after for each in found.values()):
                    break
        finally:
            await _end(pending)
        return found

    async def _ask(self, name: str, link: Link, after: int | None) -> Holdings | None:
        request = pb.ListBlocksRequest(sender=self._peers.sender(), after=after)
        begin, greeted = self._now(), min(self._peers.visit_of(name), self._schedule.visits)
        try:
            reply = await link.list_blocks(request, self._timing.rpc)
            holdings = Holdings(
                reply.visit,
                reply.closed,
                {each.block: Kept(each.visit, each.bytes, each.xxh3) for each in reply.blocks},
                reply.step,
            )
            if wrong := checked(holdings, self._schedule, self._store.most_bytes()):
                raise PayloadError("bad_list", wrong)
        except PeerError as error:
            self._fault(name, error)
            if error.reason != UNMET:
                self._listed(name, begin, useful=False)
            return None
        self._listed(name, begin, useful=holdings.visit >= greeted)
        self._peers.told_visit(name, holdings.visit)
        return holdings

    def _listed(self, giver: str, begin: float, *, useful: bool) -> None:
        """Whoever says that it is ahead, and shows nothing for it, is left alone for a while."""
        if self._records.listed(giver, begin, self._now(), useful=useful):
            self._log.warning("lists no blocks: not asked for a while", peer=giver)

    def _fault(self, peer: str, error: PeerError) -> None:
        self._peers.trouble(peer, error)
        if isinstance(error, PayloadError):
            self._records.false(peer, self._now())

    # --- fetching

    async def _fetch_all(self, step: Step) -> None:
        """Fetch blocks, one at a time from each giver, until all are there or nobody is left.

        What is in memory of them is bounded by the number of givers: of each a message or two, and
        its stream's window. On disk a block has as many parts as flights.
        """
        under_way = _Pass(step.fetch, frozenset(self._store.begun()))
        links = self._givers()
        sources = {name for need in step.fetch.values() for name in need.sources}
        tasks = [
            asyncio.create_task(self._fetch_from(name, links[name], under_way))
            for name in self._records.in_order([name for name in links if name in sources])
        ]
        try:
            if tasks:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in ended:
                    task.result()
        finally:
            await _end(tasks)

    async def _fetch_from(self, name: str, link: Link, under_way: _Pass) -> None:
        while (block := await self._next_for(name, under_way)) is not None:
            flight = _Flight(name, under_way.needs[block].sources[name], self._now())
            ending = under_way.begin(block, flight, self._now())
            fetching = self._fetch(link, block, flight, under_way, ending)
            flight.task = asyncio.create_task(fetching)
            try:
                await asyncio.wait([flight.task])
            finally:
                if not flight.task.done():
                    await _end([flight.task])
            error = None if flight.task.cancelled() else flight.task.exception()
            under_way.end(block, flight, missing=isinstance(error, PeerError))
            if not await self._ended(flight, error, whole=not flight.task.cancelled()):
                return

    async def _next_for(self, name: str, under_way: _Pass) -> int | None:
        """The block to fetch next from a giver, waiting while it may still be of use."""
        while True:
            block = next_block(under_way.missing, name, under_way.begun)
            if block is not None:
                return block
            flying = under_way.flights(self._now())
            if not any(name in under_way.needs[block].sources for block in flying):
                return None
            rate = self._records.rate(name)
            patience = self._timing.step_deadline
            block = next_rival(flying, under_way.needs, name, rate, patience)
            if block is not None:
                return block
            await under_way.moved.comes(LOOK_SECONDS)

    async def _ended(self, flight: _Flight, error: BaseException | None, *, whole: bool) -> bool:
        """A flight is over: what that says of its giver; whether that is asked for more.

        Args:
            flight: the flight.
            error: what it ended with.
            whole: it was not told to end before.
        """
        if error is None and whole:
            self._installed = True
        else:  # it is counted anew when the next try goes on with it
            self.gain.fetched = max(0, self.gain.fetched - flight.size)
        if isinstance(error, DiskFullError | OutputError):
            self._disk_failures += 1
            self._log.warning("cannot store what was fetched", reason=str(error))
            await self._pause(RETRY_SECONDS)
            return False
        if error is None:
            self._tried(flight, whole=whole, excused=True)
            return flight.giver not in self.unusable
        if not isinstance(error, PeerError):
            raise error
        if not isinstance(error, _TornPart):
            self._tried(flight, whole=False, excused=error.reason == LATER)
        self._fault(flight.giver, error)
        return isinstance(error, _TornPart)

    def _tried(self, flight: _Flight, *, whole: bool, excused: bool) -> None:
        """Whoever gives nothing, again and again, is left alone for a while."""
        giver = flight.giver
        if self._records.tried(
            giver,
            flight.begin,
            self._now(),
            flight.got,
            whole=whole,
            excused=excused,
            size=flight.kept.bytes,
        ):
            self._log.warning("gives no blocks: not asked for a while", peer=giver)

    async def _fetch(
        self,
        link: Link,
        block: int,
        flight: _Flight,
        under_way: _Pass,
        ending: Collection["asyncio.Task[None]"],
    ) -> None:
        """One flight; ``ending`` are others of the block that have been told to end."""
        kept = flight.kept
        if ending:  # they may have the same part open
            await asyncio.wait(ending)
        partial = await self._opened(block, kept.xxh3)
        before = flight.opened(partial)
        try:
            self.gain.fetched += before
            if before < kept.bytes:
                await self._receive(link, block, kept, partial)
            # From here on nobody else fetches it: what those have who are slower stays for another
            # try, should this turn out to be no good.
            if others := under_way.landed(block, flight):
                await asyncio.wait(others)
            await self._store.install(block, partial, kept.visit)
        except PayloadError as error:
            if before and error.reason == "digest":  # what an earlier try left may have been torn
                raise _TornPart("the part of an earlier transfer was damaged") from None
            raise
        finally:
            partial.close()
        self._log.info(
            "fetched", block=block, visit=kept.visit, peer=flight.giver, bytes=kept.bytes
        )

    async def _opened(self, block: int, xxh3: str) -> Partial:
        """A block's part; one that is opened for a flight that has been told to end is closed."""
        opening = asyncio.ensure_future(self._store.partial(block, xxh3))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            raise

    async def _receive(self, link: Link, block: int, kept: Kept, partial: Partial) -> None:
        request = pb.FetchBlockRequest(
            sender=self._peers.sender(), block=block, xxh3=kept.xxh3, offset=partial.size
        )
        limit = transfer_seconds(kept.bytes, self._timing)
        async with aclosing(link.fetch_block(request, limit)) as stream:
            while message := await self._next(stream):
                chunk = wire.checked(message, kept.visit, partial.size)
                if partial.size + len(chunk.data) > kept.bytes:
                    raise PayloadError("too_long", f"more than {kept.bytes} bytes")
                partial.write(chunk.data)
                self.gain.fetched += len(chunk.data)
                self.gain.bytes += len(chunk.data)
                if partial.size == kept.bytes:
                    return
        raise PayloadError("incomplete", "the stream ended early")

    async def _next(self, stream: AsyncGenerator[bytes]) -> bytes:
        """The next message, empty at the end; a giver that pauses too long is given up."""
        try:
            async with asyncio.timeout(self._timing.step_deadline):
                return await anext(stream, b"")
        except TimeoutError:
            raise PeerTimeout("nothing came for too long") from None

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
