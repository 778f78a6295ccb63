"""Serving neighbours: one snapshot at a time, for as long as they may still fetch it."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import PeerRefused
from deca_node.exchange.neighbourhood import Neighbourhood, is_out
from deca_node.limits import CHUNK_BYTES, MAX_MEMBERS, MAX_PULLS, MAX_PULLS_PER_PEER
from deca_node.membership import Edges
from deca_node.pacing import SendRates
from deca_node.patience import Patience
from deca_node.pb import node_pb2 as pb
from deca_node.waiting import Pulse
from deca_node.wire import Pieces, Snapshot


def send_rates(total: float | None = None, per_peer: float | None = None) -> SendRates:
    """Caps in bytes per second on what is sent in all and to each peer."""
    return SendRates(total, per_peer, CHUNK_BYTES, MAX_MEMBERS)


@dataclass
class _Visit:
    """What is forgotten at a visit's end."""

    index: int = 0
    steps: int = 1
    settled: bool = False  # its edges are known
    asked: dict[str, int] = field(default_factory=dict)  # latest step, by neighbour
    idle: set[str] = field(default_factory=set)  # let it wait for them to fetch, in vain


@dataclass
class _Published:
    """What is forgotten when the next snapshot is published."""

    formats: Mapping[str, Format] = field(default_factory=dict)  # of the edges at that time
    served: frozenset[str] = frozenset()  # whom it is for
    have: set[str] = field(default_factory=set)
    gave: set[str] = field(default_factory=set)  # those whose block of its step is here
    failed: set[str] = field(default_factory=set)  # those whose stream of it broke off


class Serving:
    """See the module; its arguments are Exchange's, and what all parts have in common.

    Attributes:
        edges: of the visit; those of the one before while its own are being agreed on.
        resting: no further steps are taken part in.
        held: the newest snapshot, None when every neighbour has it or memory is needed.
        encoded: what it has for compressed edges; kept until memory is needed.
        grown: beats when more of it is made.
        bytes_sent: bytes of blocks sent to all peers.
    """

    def __init__(
        self,
        peers: Neighbourhood,
        timing: Timing,
        stopping: asyncio.Event,
        rates: SendRates,
        patience: Patience,
        changes: Pulse,
    ) -> None:
        self._peers, self._timing, self._stopping = peers, timing, stopping
        self._rates, self._patience, self._changes = rates, patience, changes
        self._visit = _Visit()
        self.edges = Edges(-1)
        self.resting = False
        self._missed = False  # a neighbour asked for a step that this node did not do meanwhile
        self._newest = -1
        self._published = _Published()
        self.held: Snapshot | None = None
        self.encoded: Mapping[Format, Pieces] = {}
        self.grown = Pulse()
        self._pulls: Counter[str] = Counter()
        self._reading: Counter[str] = Counter()  # of the pulls, the streams under way
        self._slots = asyncio.Semaphore(MAX_PULLS)
        self._sent: Counter[str] = Counter()  # since the last step's end
        self.bytes_sent = 0

    def begin_visit(self, visit: int, steps_per_visit: int, first_serial: int) -> None:
        """Visits before this one are over."""
        self._visit = _Visit(visit, steps_per_visit)
        self._newest = first_serial - 1
        self.resting = False
        self._changes.beat()

    def settle(self, edges: Edges) -> None:
        """These are the visit's edges from now on."""
        self.edges, self._visit.settled = edges, True
        self._changes.beat()

    def publish(self, snapshot: Snapshot) -> None:
        """Hand out a step's block from now on, and the one before no more."""
        self._drop()
        self.held, self.encoded, self._newest = snapshot, snapshot.encoded, snapshot.serial
        self._published = _Published(self.edges.formats, frozenset(self.edges.weights))
        loop = asyncio.get_running_loop()
        snapshot.grown = lambda: _soon(loop, self.grown)
        self._changes.beat()

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
        while self.held is not None and not self._stopping.is_set():
            behind = self._behind(self.held)
            if not behind:
                break
            now = loop.time()
            limit = begin + self._timing.step_deadline
            if not patient:
                asked = any(self._visit.asked.get(peer, -1) == self.held.serial for peer in behind)
                limit = self._patience.for_readers(behind, begin, now, asked=asked)
            if now >= limit:
                self._visit.idle |= behind
                break
            await self._changes.comes(limit - now)
            self._patience.waited(behind, loop.time() - now)
        self._drop()
        self.encoded = {}
        return loop.time() - begin

    def _behind(self, held: Snapshot) -> set[str]:
        """Those that are worth waiting for to fetch this node's last block."""
        # Who gave its own is at this step; who asks for a later one does without ours.
        of, asked = self._published, self._visit.asked
        here = (of.gave | self._reading.keys()) & of.served
        here -= of.have | of.failed | self._visit.idle
        return self._patience.worth(peer for peer in here if asked.get(peer, -1) <= held.serial)

    def is_behind(self, peer: str, serial: int) -> bool:
        """Whether a neighbour has not come to this step yet, as far as its asking tells."""
        return self._visit.asked.get(peer, -1) < serial

    def is_last(self, serial: int) -> bool:
        """Whether the visit ends with this step."""
        return (serial + 1) % self._visit.steps == 0

    def end_step(self, gave: Iterable[str]) -> Counter[str]:
        """A step has brought the blocks of these neighbours, and is over.

        Returns:
            Bytes sent to each neighbour since the step before ended.
        """
        self._published.gave.update(gave)
        sent, self._sent = self._sent, Counter()
        return sent

    async def drain(self) -> frozenset[str]:
        """Serve the last block until every neighbour has it, at most ``step_deadline``.

        Returns:
            The neighbours that did not fetch it.
        """
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._timing.step_deadline
        while (unserved := self._unserved()) and not self._stopping.is_set():
            left = limit - loop.time()
            if left <= 0:
                break
            await self._changes.comes(min(1.0, left))
        return unserved

    def _unserved(self) -> frozenset[str]:
        """Neighbours that may still come for the newest snapshot."""
        if self.held is None:
            return frozenset()
        without = self.edges.weights.keys() - self._published.have
        return frozenset(peer for peer in without if not is_out(self._peers, peer))

    def release(self) -> None:
        """Nothing is served any more; readers under way end."""
        self._drop()
        self._changes.beat()

    def _drop(self) -> None:
        if self.held is not None:
            self.held.release()
            self.held = None
            self.grown.beat()

    def rest(self) -> None:
        """Take no part in further steps: whoever asks for one hears so at once.

        What is published is handed out still. It ends with ``wake_up``, or with the next visit.
        """
        self.resting, self._missed = True, False
        self._changes.beat()

    def wake_up(self) -> bool:
        """Go on with the visit, unless a neighbour has gone on in it meanwhile.

        Returns:
            Whether one has; then this node stays out of the visit.
        """
        self.resting = self._missed
        return self._missed

    # --- what a neighbour gets

    async def answer(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """Stream the asked-for snapshot, once it is published."""
        peer = self._peers.check_sender(request.sender)
        if self._pulls[peer] >= MAX_PULLS_PER_PEER:
            raise PeerRefused("too_many_pulls", f"at most {MAX_PULLS_PER_PEER} at once")
        self._pulls[peer] += 1
        try:
            held = await self._once_published(peer, request.serial)
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
                        of = self._published
                        (of.failed if left else of.have).add(peer)
                    if not left:
                        self._peers.seen(peer)
                    self._let_go()
                    self._changes.beat()
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
            await self.grown.wait()
        message = snapshot.message(index)
        now = asyncio.get_running_loop().time()
        if pause := self._rates.take(peer, len(message), now):
            try:
                await asyncio.sleep(pause)
            except asyncio.CancelledError:
                self._rates.give_back(peer, len(message))
                raise
        self._peers.sent(peer, len(message))
        self.bytes_sent += len(message)
        self._sent[peer] += len(message)
        return message

    async def _once_published(self, peer: str, serial: int) -> Snapshot:
        while True:
            self._note_asked(peer, serial)
            held = self.held
            if held is not None and held.serial == serial and peer in self._published.served:
                return held
            if self._stopping.is_set():
                raise PeerRefused("stopping", "this node is going away")
            visit = serial // self._visit.steps
            if visit < self._visit.index:
                raise PeerRefused("ended", f"visit {visit} is over here")
            if serial <= self._newest:
                raise PeerRefused("passed", f"step {serial} is over here")
            if self.resting:
                self._missed = self._missed or peer in self.edges.weights
                raise PeerRefused("paused", "this node takes no part for now")
            settled = visit == self._visit.index and self._visit.settled
            if settled and peer not in self.edges.weights:
                raise PeerRefused("not_a_neighbour", f"no edge in visit {visit}")
            await self._changes.wait()

    def _note_asked(self, peer: str, serial: int) -> None:
        """A neighbour wants this step; who asked before the edges were known may be one by now."""
        asked = self._visit.asked
        if peer in self.edges.weights and asked.get(peer, -1) < serial:
            asked[peer] = serial
            self._changes.beat()

    def _in_format(self, peer: str, held: Snapshot, request: pb.PullRequest) -> Snapshot:
        wire = self._published.formats.get(peer, Format.FP32)
        if int(request.wire_format) != wire or wire not in (Format.FP32, *held.encoded):
            raise PeerRefused("bad_format", f"the edge's format is {wire.word}")
        if wire is Format.FP32:
            return held
        return held.encoded[wire].answer(request.base if request.HasField("base") else None)

    def _let_go(self) -> None:
        """Forget the snapshot as soon as every neighbour has it; the step may still need it."""
        if self._published.have >= self._published.served and not self._reading:
            self.held = None


def _soon(loop: asyncio.AbstractEventLoop, pulse: Pulse) -> None:
    """Beat on the loop's thread, if there is somebody left to be told."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(pulse.beat)
