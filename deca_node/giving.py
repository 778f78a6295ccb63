"""The giving end of catching up: kept blocks for those who missed them.

What a node hands out are the files of its own state on disk: they do not change while they are
read, cost the training no memory, and carry their digest. It is paced, so that training goes on.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import BinaryIO, Protocol

from deca_node import wire
from deca_node.config import Timing
from deca_node.errors import PeerError, PeerRefused
from deca_node.limits import (
    CHUNK_BYTES,
    LIST_HOLD_SECONDS,
    MAX_QUEUED_TRANSFERS,
    MAX_TRANSFERS,
    MAX_TRANSFERS_PER_PEER,
    MIN_TRANSFER_RATE,
    QUEUE_SECONDS,
)
from deca_node.pacing import SendRates, TokenBucket, WorkBudget
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import Kept
from deca_node.transport import Link
from deca_node.waiting import Pulse

# A pause costs CPU time of its own: shorter ones are put off until they add up to this.
LEAST_PAUSE_SECONDS = 0.05
# What giving takes of the CPU in all, over what checksums and copies take of it: gRPC and the
# kernel are the rest. 6.7 and 8 by bench/serving.py --core 0, quiet and busy, messages paced apart.
WHOLE_OVER_FRAMING = 7.0
# What a byte costs is averaged over so many.
COST_BYTES = 16 * CHUNK_BYTES
# There is no place for whoever asks, or it is another's turn: nobody has done anything wrong.
LATER = "too_many_transfers"
# A node that leaves stays so long after somebody that catches up has asked for something: between
# two blocks the joiner checks one, syncs it to its disk and puts it into its model.
QUIET_SECONDS = 5.0
# But no longer than this in all, however slowly somebody fetches, or asks for the same ever again.
MAX_DRAIN_SECONDS = 1800.0


class Shelf(Protocol):
    """The blocks that a node keeps, as those who catch up get them."""

    def kept(self) -> Mapping[int, Kept]:
        """What there is to hand out, by block."""
        ...

    def open(self, block: int, xxh3: str) -> BinaryIO | None:
        """A block's file, readable also when it is superseded meanwhile; None when it is gone."""
        ...

    async def read(self, file: BinaryIO, offset: int, size: int) -> bytes | memoryview:
        """Up to ``size`` bytes from ``offset`` on, without holding up the event loop."""
        ...


class Peers(Protocol):
    """What catching up needs to know of peers; swarm.Swarm is one."""

    def sender(self) -> pb.Sender:
        """This node's introduction."""
        ...

    def givers(self) -> Mapping[str, Link]:
        """Links to those that can hand out blocks."""
        ...

    def visit_of(self, peer: str) -> int:
        """Where the peer said last that it is."""
        ...

    def is_paused(self, peer: str) -> bool:
        """Whether the peer has said that it takes no part for now."""
        ...

    def trouble(self, peer: str, error: PeerError) -> None:
        """A call to the peer failed or what it sent was refused."""
        ...

    def told_visit(self, peer: str, visit: int) -> None:
        """A peer has told its visit."""
        ...

    def check_sender(self, sender: pb.Sender) -> str:
        """Name of a greeted peer of this run, current session. Raises PeerRefused."""
        ...


class Giver:
    """Hands out kept blocks: paced, a few at a time, the others queued.

    Args:
        peers: the peer table.
        shelf: what is kept.
        position: this node's visit, whether its edges are fixed, and its steps that are done.
        timing: how long a transfer may take.
        rate: bytes per second over all transfers, at most.
        rates: what may be sent in all.
        budget: bounds the rate further while this node trains.
        training: whether it does.
    """

    def __init__(
        self,
        peers: Peers,
        shelf: Shelf,
        position: Callable[[], tuple[int, bool, int]],
        timing: Timing,
        rate: float,
        rates: SendRates,
        budget: WorkBudget | None = None,
        training: Callable[[], bool] = lambda: True,
    ) -> None:
        self._peers = peers
        self._shelf = shelf
        self._position = position
        self._timing = timing
        self._rate = rate
        self._budget, self._training = budget, training
        self._bucket = TokenBucket(rate, CHUNK_BYTES, asyncio.get_running_loop().time())
        self._rates = rates
        self._slots = asyncio.Semaphore(MAX_TRANSFERS)
        self._queued = 0  # of those that have asked, how many have no place yet
        self._asked: Counter[str] = Counter()
        self._moved = Pulse()
        self._asked_at = -math.inf  # when a list or a block was asked for, or a transfer ended
        self._given_at = -math.inf  # when the last message of a block went out
        self.bytes_sent = 0

    def moved(self) -> None:
        """This node's visit or phase changed: answer who waits for that."""
        self._moved.beat()

    async def answer_list(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """What is kept here; at once, or when past the visit that the caller names."""
        self._peers.check_sender(request.sender)
        self._asked_at = asyncio.get_running_loop().time()
        limit = self._asked_at + LIST_HOLD_SECONDS
        if request.HasField("after"):
            while self._position()[0] <= request.after:
                left = limit - asyncio.get_running_loop().time()
                if not await self._moved.comes(left):
                    break
        visit, closed, step = self._position()
        blocks = [
            pb.BlockState(block=block, visit=kept.visit, bytes=kept.bytes, xxh3=kept.xxh3)
            for block, kept in self._shelf.kept().items()
        ]
        return pb.BlockList(
            sender=self._peers.sender(), visit=visit, closed=closed, blocks=blocks, step=step
        )

    async def answer_fetch(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """A kept block's file from the asked-for offset on."""
        peer = self._peers.check_sender(request.sender)
        clock = asyncio.get_running_loop().time
        async with self._slot(peer):
            kept = self._shelf.kept().get(request.block)
            file = self._shelf.open(request.block, request.xxh3)
            if kept is None or file is None:
                raise PeerRefused("passed", f"block {request.block} has a newer version here")
            with file:
                offset = request.offset
                try:
                    _within(kept, offset)
                    begin = clock()
                    limit = begin + transfer_seconds(kept.bytes, self._timing)
                    while piece := await self._shelf.read(file, offset, CHUNK_BYTES):
                        self._take_turns(clock() - begin)
                        await self._pace(peer, len(piece))
                        # Who reads more slowly than this holds a slot that others wait for. Looked
                        # at between messages: a timer would go off in whoever is given one.
                        _in_time(clock(), limit)
                        self.bytes_sent += len(piece)
                        message = self._framed(kept.visit, offset, piece)
                        offset += len(piece)
                        if offset == kept.bytes:
                            self._given_at = clock()
                        yield message
                except (asyncio.CancelledError, GeneratorExit):
                    if offset < kept.bytes:  # who has all of it may turn away before the end
                        self._peers.trouble(peer, PeerRefused("hung_up", "before the end"))
                    raise
                except PeerRefused as error:  # also thrown in by the transport: it does not read
                    if error.reason != LATER:
                        self._peers.trouble(peer, error)
                    raise
                except OSError as error:
                    raise PeerRefused("passed", f"cannot be read here: {error.strerror}") from None

    def _take_turns(self, seconds: float) -> None:
        """Who has had a place for so long gives it up to those that queue, and queues again.

        It keeps what it has: one block to a slow line takes hours, and there are few places.
        """
        if self._queued and seconds > self._timing.step_deadline:
            raise PeerRefused(LATER, "others queue, ask again later")

    def _framed(self, visit: int, offset: int, piece: bytes | memoryview) -> bytes:
        if self._budget is None:
            return wire.frame(visit, offset, piece)
        begin = time.thread_time()
        message = wire.frame(visit, offset, piece)
        took = time.thread_time() - begin
        self._budget.spent(len(piece), WHOLE_OVER_FRAMING * took)
        return message

    async def _pace(self, peer: str, nbytes: int) -> None:
        """Wait until a message may go; one whose reader hangs up meanwhile counts as not sent.

        Within the rate for giving, and where what is sent is capped, in turn with the exchange's.
        """
        now = asyncio.get_running_loop().time
        try:
            if (pause := self._spare_training(nbytes, now())) >= LEAST_PAUSE_SECONDS:
                await asyncio.sleep(pause)
        except asyncio.CancelledError:
            self._bucket.give_back(nbytes)
            raise
        if pause := self._rates.take(peer, nbytes, now()):
            try:
                await asyncio.sleep(pause)
            except asyncio.CancelledError:
                self._bucket.give_back(nbytes)
                self._rates.give_back(peer, nbytes)
                raise

    def _spare_training(self, nbytes: int, now: float) -> float:
        """Seconds to wait, for the rate of giving and for its budget while this node trains."""
        if self._budget is not None:
            most = self._rate
            self._bucket.rate = self._budget.rate(most) if self._training() else most
        return self._bucket.take(nbytes, now)

    @asynccontextmanager
    async def _slot(self, peer: str) -> AsyncGenerator[None]:
        full = self._asked.total() >= MAX_TRANSFERS + MAX_QUEUED_TRANSFERS
        if full or self._asked[peer] >= MAX_TRANSFERS_PER_PEER:
            raise PeerRefused(LATER, "ask again later")
        self._asked[peer] += 1
        try:
            # Whoever asks gives up when nothing comes for its step_deadline: refused before that,
            # it knows why.
            self._queued += 1
            try:
                async with asyncio.timeout(min(self._timing.step_deadline / 2, QUEUE_SECONDS)):
                    await self._slots.acquire()
            except TimeoutError:
                raise PeerRefused(LATER, "ask again later") from None
            finally:
                self._queued -= 1
            try:
                yield
            finally:
                self._slots.release()
        finally:
            self._asked[peer] -= 1
            self._asked += Counter()  # forgets the zeros
            self._asked_at = asyncio.get_running_loop().time()
            self.moved()

    async def drain(self, *, expecting: bool) -> None:
        """Let those who catch up have what they miss: this node is leaving.

        It stays while somebody asks, as long as each block is complete a step_deadline after the
        one before.

        Args:
            expecting: somebody may come who has not asked yet, and gets as long for that as
                between two questions. Where all are here nobody waits for that.
        """
        clock = asyncio.get_running_loop().time
        begin = self._given_at = clock()
        if expecting:
            self._asked_at = begin
        while True:
            limit = min(self._given_at + self._timing.step_deadline, begin + MAX_DRAIN_SECONDS)
            if not self._asked:
                limit = min(limit, self._asked_at + QUIET_SECONDS)
            if (left := limit - clock()) <= 0:
                return
            await self._moved.comes(left)


def _within(kept: Kept, offset: int) -> None:
    """Refuse an offset beyond the file: a caller's may be more than any file's can be."""
    if offset > kept.bytes:
        raise PeerRefused("bad_request", f"the file has {kept.bytes} bytes")


def _in_time(now: float, limit: float) -> None:
    if now > limit:
        raise PeerRefused("too_slow", "the transfer took too long")


def transfer_seconds(nbytes: int, timing: Timing) -> float:
    """The longest that a transfer may take, its time in the queue included."""
    return timing.step_deadline + nbytes / MIN_TRANSFER_RATE
