"""Who is behind, where it takes part again, and which blocks it fetches from whom. Pure.

The merge rule, after a late start, a restart, a long sleep or a cut network alike: the position
further ahead wins. Who is behind fetches every block that a later visit than its own last one of
that block has changed, and takes part from the first visit whose edges are still open. A block
that both sides visited last at the same number stays as it is on each: the next visit mixes it.
Nobody decides this for anybody else.

A giver that is of no use, whether silent, false or stuck, is left alone for a while, and a block
that comes slowly from one is also fetched from another: whoever is ahead holds nobody up for good.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from deca_node.blocks import Schedule
from deca_node.limits import MAX_MEMBERS, MIN_TRANSFER_RATE

# Tries of one giver in a row that brought nothing, be it a list or a block, until it is left alone
# for a while. One may hit a block that has got a newer version, two a giver that starts again.
MAX_VAIN_TRIES = 3
# Likewise without a whole block, though bytes came or it had no place free: what broke off goes on
# where it was, so that a bad line gets there, but one that changes what it gives never does.
MAX_BROKEN_TRIES = 20
# It is left alone for so many times as long as it was tried: it costs about a tenth of the time.
# Not for good, since it may only have been cut off, or started again.
REST_FACTOR = 10.0
# And at least for so long, since each try of one that refuses at once may cost us a visit.
LEAST_REST_SECONDS = 60.0
# Likewise one that sent something wrong, which honest givers do not.
FALSE_REST_SECONDS = 600.0
# Each time without a whole block in between twice as long as before, but no longer than this.
MAX_REST_SECONDS = 3600.0
# Who says that it is ahead, and for so many times as long as a step may wait, or took here, tells
# no further step, is stuck. A gradient has no deadline: much slower machines are still waited for.
STUCK_FACTOR = 10.0
# A block is fetched from so many at once: as many parts of it are kept on disk (checkpoint).
MAX_FLIGHTS = 2
# A block that comes within this is not worth asking a second giver for.
LEAST_PATIENCE_SECONDS = 2.0
# A block is overdue after so many times as long as another giver would take for it, however little
# of it is to come: else one could stop just before the end.
OVERDUE = 4.0


@dataclass(frozen=True)
class Kept:
    """A block as a node keeps it.

    Attributes:
        visit: the last visit that changed it.
        bytes: of its safetensors file.
        xxh3: of that file, xxh3_128 as 32 hexadecimal digits.
    """

    visit: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Holdings:
    """What a node that others fetch from says of itself.

    Attributes:
        visit: its own visit; the number of visits when it has done them all.
        closed: that visit's edges are fixed.
        blocks: what it keeps; blocks that the run has not changed yet are not there.
        step: steps of that visit that it has done.
    """

    visit: int
    closed: bool
    blocks: Mapping[int, Kept]
    step: int = 0


@dataclass(frozen=True)
class Need:
    """A block to fetch: its newest version by the name of each node that has one of that visit.

    Their digests differ, since each node has values of its own; any of them will do.
    """

    block: int
    sources: Mapping[str, Kept]

    @property
    def bytes(self) -> int:
        """Size of the largest."""
        return max(kept.bytes for kept in self.sources.values())


def next_block(missing: Mapping[int, Need], giver: str, begun: Collection[str]) -> int | None:
    """The block to fetch next from a giver; None when it has none of them.

    Args:
        missing: what is still to be fetched.
        giver: its name.
        begun: digests of files of which an earlier transfer left a part. First comes what it can
            complete, last what only others can.
    """

    def preference(block: int) -> tuple[int, int]:
        sources = missing[block].sources
        if sources[giver].xxh3 in begun:
            return 0, block
        return (2 if any(kept.xxh3 in begun for kept in sources.values()) else 1), block

    has = [block for block, need in missing.items() if giver in need.sources]
    return min(has, key=preference, default=None)


@dataclass(frozen=True)
class Flight:
    """A block on its way from a giver.

    Attributes:
        xxh3: of the version that it has.
        got: bytes that have come.
        left: bytes to come.
        seconds: since they were asked for.
    """

    xxh3: str
    got: int
    left: int
    seconds: float

    @property
    def rest(self) -> float:
        """Seconds that what is to come will take at the pace so far."""
        if not self.left:
            return 0.0
        return self.left * self.seconds / self.got if self.got else math.inf

    def is_slow(self, patience: float) -> bool:
        """Whether who takes ``patience`` seconds for the whole block will be there before it."""
        late = self.seconds > patience and self.rest > patience
        return late or self.seconds > OVERDUE * patience


def next_rival(
    flying: Mapping[int, Sequence[Flight]],
    needs: Mapping[int, Need],
    giver: str,
    rate: float | None,
    unmeasured: float,
) -> int | None:
    """The block on its way from others that an idle giver is asked for, too; None for none.

    The one that is under way longest, if all that it comes from are slow beside this giver.

    Args:
        flying: by block, from whom it comes.
        needs: what is fetched.
        giver: its name.
        rate: what it gave lately, bytes per second; None while it was not asked.
        unmeasured: seconds that one is expected to take that was not asked yet.
    """

    def patience(block: int) -> float:
        if rate is None:
            return unmeasured
        nbytes = needs[block].sources[giver].bytes
        return max(LEAST_PATIENCE_SECONDS, nbytes / rate) if rate else math.inf

    slow = {
        block: min(flight.seconds for flight in flights)
        for block, flights in flying.items()
        if giver in needs[block].sources
        and flights
        and all(flight.is_slow(patience(block)) for flight in flights)
    }
    return max(slow, key=slow.__getitem__, default=None)


def displaced(flights: Sequence[Flight], xxh3: str) -> int | None:
    """Which of a block's flights ends for a new one; None when there is room for all.

    One of the same version: they have one file, and the new one goes on with it. Else the slowest.
    """
    for index, flight in enumerate(flights):
        if flight.xxh3 == xxh3:
            return index
    if len(flights) < MAX_FLIGHTS:
        return None
    return max(range(len(flights)), key=lambda index: flights[index].rest)


@dataclass
class _Record:
    rate: float | None = None
    unheard: int = 0
    vain: int = 0
    broken: int = 0
    turns: int = 0  # bytes of tries that ended as others' turn had come
    cost: float = 0.0  # seconds that those tries took
    rests: int = 0  # since its last whole block
    until: float = -math.inf  # left alone


class Records:
    """How asking and fetching went with each giver: whom to ask first, and whom not at all.

    Time is given. All that makes a giver useless ends in the same way: it rests for a while.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Record] = {}

    def tried(
        self,
        giver: str,
        begin: float,
        now: float,
        nbytes: int,
        *,
        whole: bool,
        excused: bool = False,
        size: int = 0,
    ) -> bool:
        """A try to fetch a block has ended.

        Where others queue, a giver's blocks come in turns: it is in order as long as each came at
        the slowest rate or faster, and no more in all of them than the block has bytes.

        Args:
            giver: of whom.
            begin: when it was asked.
            now: in the same seconds.
            nbytes: that came.
            whole: the block is there, and good.
            excused: that nothing, or not more, came was not its fault.
            size: bytes of the block.

        Returns:
            Whether it is left alone from now on.
        """
        record = self._of.setdefault(giver, _Record())
        if nbytes or not whole:
            record.rate = nbytes / max(now - begin, 1e-3)
        if whole:
            record.vain = record.broken = record.turns = record.rests = 0
            record.cost = 0.0
            return False
        least = max(1.0, (now - begin) * MIN_TRANSFER_RATE)
        if excused and nbytes >= least and record.turns + nbytes <= size:
            record.turns += nbytes
            record.vain = 0
            return False
        record.cost += now - begin
        record.broken += 1
        record.vain = 0 if nbytes else record.vain + (not excused)
        if record.vain < MAX_VAIN_TRIES and record.broken < MAX_BROKEN_TRIES:
            return False
        self._rest(record, now)
        return True

    def listed(self, giver: str, begin: float, now: float, *, useful: bool) -> bool:
        """A giver was asked for a list of its blocks.

        Args:
            giver: its name.
            begin: when it was asked.
            now: in the same seconds.
            useful: the list came, and says no less than the giver's greetings.

        Returns:
            Whether it is left alone from now on.
        """
        record = self._of.setdefault(giver, _Record())
        if useful:
            record.unheard = 0
            return False
        record.cost += now - begin
        record.unheard += 1
        if record.unheard < MAX_VAIN_TRIES:
            return False
        self._rest(record, now)
        return True

    def stuck(self, giver: str, since: float, now: float) -> None:
        """It was waited for in vain, and is left alone."""
        record = self._of.setdefault(giver, _Record())
        record.cost += now - since
        self._rest(record, now)

    def false(self, giver: str, now: float) -> None:
        """It sent something wrong, and is left alone."""
        self._rest(self._of.setdefault(giver, _Record()), now, FALSE_REST_SECONDS)

    @staticmethod
    def _rest(record: _Record, now: float, least: float = LEAST_REST_SECONDS) -> None:
        seconds = max(REST_FACTOR * record.cost, least) * 2**record.rests
        record.until = max(record.until, now + min(seconds, MAX_REST_SECONDS))
        record.unheard = record.vain = record.broken = record.turns = 0
        record.cost = 0.0
        if seconds < MAX_REST_SECONDS:
            record.rests += 1

    def rate(self, giver: str) -> float | None:
        """Bytes per second that it gave in its latest try; None when there was none."""
        record = self._of.get(giver)
        return None if record is None else record.rate

    def in_order(self, givers: Collection[str]) -> list[str]:
        """Whom to ask first: those that were not asked yet, then the fastest."""

        def slowness(giver: str) -> float:
            rate = self.rate(giver)
            return -math.inf if rate is None else -rate

        return sorted(givers, key=slowness)

    def resting(self, now: float) -> frozenset[str]:
        """Those that are left alone."""
        return frozenset(giver for giver, record in self._of.items() if now < record.until)

    def make_room(self, givers: Collection[str]) -> None:
        """Where names come and go, forget all but those that can give now."""
        if len(self._of) > MAX_MEMBERS:
            self._of = {giver: record for giver, record in self._of.items() if giver in givers}


def checked(holdings: Holdings, schedule: Schedule, most_bytes: Mapping[int, int]) -> str:
    """What is wrong with what a peer says it has, empty when nothing is.

    A block may be of a later visit than the peer's own: it caught up in part, or kept what it had
    fetched and went on where it was. Who claims that falsely gets its block taken before others',
    as it would by claiming to be ahead.

    Args:
        holdings: as received.
        schedule: the run's.
        most_bytes: by block, the largest size that its file can have.
    """
    if holdings.visit > schedule.visits:
        return f"visit {holdings.visit} of {schedule.visits}"
    if holdings.step > schedule.steps:
        return f"step {holdings.step} of {schedule.steps}"
    for block, kept in holdings.blocks.items():
        if block not in most_bytes:
            return f"block {block} of {len(schedule.blocks)}"
        # A block that was agreed on at the end has the number of visits.
        if kept.visit > schedule.visits or (
            kept.visit < schedule.visits and schedule.visit(kept.visit).block != block
        ):
            return f"block {block} is not visited in visit {kept.visit}"
        if not 0 < kept.bytes <= most_bytes[block]:
            return f"block {block} of {kept.bytes} bytes"
        if len(kept.xxh3) != 32 or not set(kept.xxh3) <= set("0123456789abcdef"):
            return f"block {block} without a digest"
    return ""


@dataclass(frozen=True)
class Step:
    """What a node that catches up does next.

    Attributes:
        fetch: blocks to fetch now, newest version first named by whoever has it.
        entry: the visit in which it takes part.
        wait: the visit whose end is waited for, since its block is about to change once more;
            None when nothing is waited for.
    """

    fetch: Mapping[int, Need]
    entry: int
    wait: int | None = None

    @property
    def done(self) -> bool:
        """Whether it can enter now."""
        return not self.fetch and self.wait is None


def next_step(
    own_visit: int,
    versions: Mapping[int, int],
    others: Mapping[str, Holdings],
    schedule: Schedule,
    *,
    overtaken: bool,
) -> Step:
    """Decide from what the others have.

    Args:
        own_visit: where this node is.
        versions: by block, the last visit that changed it here; absent for the base model's.
        others: what each peer that can be asked has.
        schedule: the run's.
        overtaken: this node has found its own visit closed.
    """
    front = max((each.visit for each in others.values()), default=own_visit)
    if front < own_visit:
        front, closed = own_visit, False
    else:
        # One that still shakes hands may be doing so with this node.
        closed = all(each.closed for each in others.values() if each.visit == front)
        closed = closed or (overtaken and front == own_visit)
    ended = front >= schedule.visits
    under_way = None if ended or not closed else schedule.visit(front).block
    needs = {
        block: need
        for block, need in _newer(versions, others, range(len(schedule.blocks))).items()
        if block != under_way
    }
    entry = min(front + closed, schedule.visits)
    return Step(needs, entry, wait=front if under_way is not None else None)


def _newer(
    versions: Mapping[int, int], others: Mapping[str, Holdings], blocks: Collection[int]
) -> dict[int, Need]:
    needs = {}
    for block in blocks:
        kept = {name: each.blocks[block] for name, each in others.items() if block in each.blocks}
        newest = max((each.visit for each in kept.values()), default=-1)
        if newest > versions.get(block, -1):
            latest = {name: each for name, each in kept.items() if each.visit == newest}
            needs[block] = Need(block, latest)
    return needs
