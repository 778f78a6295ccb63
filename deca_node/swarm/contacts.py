"""Addresses where somebody may be: each has one task that greets it.

With backoff while nobody answers, and as a heartbeat once somebody does. What an answer means is
the greeter's to say.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Protocol

from deca_node.addresses import is_address
from deca_node.admission import Turns
from deca_node.config import Timing
from deca_node.errors import PeerError
from deca_node.limits import (
    MAX_ANNOUNCED,
    MAX_CLAIMS,
    MAX_CONTACTS,
    MAX_PROPOSALS,
    REFUSAL_LINES,
    REFUSAL_LINES_BURST,
)
from deca_node.transport import Link, Transport
from deca_node.waiting import happens

# Greetings to a node that refused us: often enough to notice that its operator mended it.
REFUSED_HEARTBEATS = 5
# A contact that was only proposed, and never met, is dropped after this many vain greetings.
MAX_VAIN_GREETINGS = 30
# A caller is told that we cannot call it back after this many seconds of vain greetings: three of
# the lan preset, so that a restart does not raise an alarm.
UNREACHED_SECONDS = 8.0


class Origin(Enum):
    """Who says that somebody may be at an address."""

    OPERATOR = auto()  # or this node's memory, or a name server that the operator has named
    CALLER = auto()  # that somebody: it has called from there, or says so
    PEER = auto()  # a peer, of another
    NETWORK = auto()  # an announcement, which anybody on the local network can make


class Answer(Enum):
    """What a greeting has brought."""

    MET = auto()
    REFUSED = auto()
    ITSELF = auto()  # this node, at one of its own addresses
    DUPLICATE = auto()  # a peer that is met at another of its addresses


class Greeter(Protocol):
    """Who says what greetings bring; Swarm is one."""

    async def greet(self, address: str, link: Link) -> Answer:
        """Greet once. Raises PeerError when there is no answer."""
        ...

    def unanswered(self, address: str, failures: int, error: PeerError) -> None:
        """Told of each greeting in vain; ``failures`` of them since the last answer."""
        ...

    def was_met(self, address: str) -> bool:
        """Whether a peer that may come back was reached there."""
        ...

    def dropped(self, link: Link) -> None:
        """Told that the link is about to be closed."""
        ...


@dataclass(eq=False)
class _Contact:
    """An address that is greeted.

    Attributes:
        address: HOST:PORT.
        origin: who named it.
        by: the caller or peer that did, if one did.
        lasting: it is never dropped.
        task: greets.
        link: what it greets over, once there is one.
        waker: greet it now.
        failures: greetings in vain since the last answer.
        tried: a greeting has come to its end.
        answered: somebody did answer once.
        failing: the last greeting or call was in vain.
        stale: the next greeting takes a new link.
        met: a peer of the run is there, or was and may come back.
    """

    address: str
    origin: Origin
    by: str
    lasting: bool
    task: asyncio.Task[None] | None = None
    link: Link | None = None
    waker: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0
    tried: bool = False
    answered: bool = False
    failing: bool = False
    stale: bool = False
    met: bool = False

    @property
    def is_spare(self) -> bool:
        """Whether it can make way for another: tried, and nobody of the run is there."""
        return self.tried and not self.met and not self.lasting


class Contacts:
    """All addresses that are greeted.

    Args:
        greeter: greets, and says what came of it.
        transport: how to reach others.
        timing: heartbeat and backoff.
        seed: of the jitter.
        log: a structlog logger.
    """

    def __init__(
        self, greeter: Greeter, transport: Transport, timing: Timing, seed: int, log: Any
    ) -> None:
        self._greeter, self._transport, self._timing = greeter, transport, timing
        self._jitter = random.Random(seed)  # noqa: S311 - spreads redials, no secret
        self._log = log
        self._lines = Turns(REFUSAL_LINES, REFUSAL_LINES_BURST, 1)
        self._table: dict[str, _Contact] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()  # of those that made way, too
        self._proposed: Counter[str] = Counter()  # contacts under way, by the peer that named them
        self._vain: dict[str, float] = {}  # since when greetings find nobody
        self._closed = False

    def __len__(self) -> int:
        return len(self._table)

    def add(self, address: str, *, origin: Origin, lasting: bool = False, by: str = "") -> None:
        """Begin to greet HOST:PORT, if it is an address and there is room; not once closed.

        Args:
            address: where.
            origin: who says so.
            lasting: never drop it.
            by: the caller or peer that says so, if one does.
        """
        if self._closed or not is_address(address):
            return
        if address in self._table:
            self._table[address].lasting |= lasting
            return
        if not self._has_room(address, origin, by, lasting=lasting):
            return
        contact = self._table[address] = _Contact(address, origin, by, lasting)
        if origin is Origin.PEER:
            self._proposed[by] += 1
        task = contact.task = asyncio.create_task(self._keep_greeting(contact))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._forget(contact))

    def _has_room(self, address: str, origin: Origin, by: str, *, lasting: bool) -> bool:
        """Whether there is a place for a new one; it may be that of an old one.

        A caller that names ever new addresses loses its own old ones for them, announcements
        theirs. In a full table a caller, or who is to stay, takes the place of anybody at whose
        address no peer was met.
        """
        table = self._table.values()
        if origin is Origin.PEER and (
            self._proposed[by] >= MAX_PROPOSALS or self._proposed.total() >= MAX_CONTACTS // 2
        ):
            return False
        if origin is Origin.CALLER:
            own = [one for one in table if one.origin is origin and one.by == by]
            if len(own) >= MAX_CLAIMS and self._replaced(own) is None:
                return False
        if origin is Origin.NETWORK:
            own = [one for one in table if one.origin is origin and not one.met]
            if len(own) >= MAX_ANNOUNCED and self._replaced(own) is None:
                return False
        if len(table) < MAX_CONTACTS:
            return True
        if not lasting and origin is not Origin.CALLER:
            return False
        replaced = self._replaced(table)
        if self._lines.take("", _now()):
            self._log.warning(
                f"{MAX_CONTACTS} addresses are in use: "
                + (
                    "ignoring a new one"
                    if replaced is None
                    else "dropped one at which no peer ever answered"
                ),
                address=address,
                by=by,
                instead_of=replaced.address if replaced is not None else "",
            )
        return replaced is not None

    def _replaced(self, candidates: Iterable[_Contact]) -> _Contact | None:
        """Drop the oldest of them that can make way, one that never answered before others."""
        spare = [contact for contact in candidates if contact.is_spare]
        if not spare:
            return None
        replaced = min(spare, key=lambda contact: contact.answered)
        if replaced.task is not None:
            replaced.task.cancel()
        self._forget(replaced)
        return replaced

    def _forget(self, contact: _Contact) -> None:
        if self._table.get(contact.address) is not contact:
            return  # it made way before
        del self._table[contact.address]
        if contact.origin is Origin.PEER:
            self._proposed[contact.by] -= 1
            self._proposed += Counter()  # forgets the zeros

    async def _keep_greeting(self, contact: _Contact) -> None:
        address = contact.address
        try:
            while (
                contact.lasting
                or contact.failures < MAX_VAIN_GREETINGS
                or self._greeter.was_met(address)
            ):
                # Before the greeting: what changes meanwhile is told with the next.
                woken = contact.waker = asyncio.Event()
                try:
                    answer = await self._greet(contact)
                except Exception:  # noqa: BLE001 - a defect, which must not cost us the address
                    answer = None
                    contact.failing = True
                    if contact.failures == 1:  # the same again and again would fill the log
                        self._log.exception("defect while greeting, going on", address=address)
                contact.tried = True
                if answer is Answer.ITSELF or (answer is Answer.DUPLICATE and not contact.lasting):
                    return
                if answer is None:
                    # With jitter, so that a healed network is not hit by everybody at once.
                    pause = self._timing.redial * 2 ** min(contact.failures - 1, 30)
                    pause = min(pause, self._timing.redial_max)
                else:
                    slow = 1 if answer is Answer.MET else REFUSED_HEARTBEATS
                    pause = self._timing.heartbeat * slow
                await happens(woken, pause * self._jitter.uniform(0.75, 1.25))
        finally:
            await self._hang_up(contact)

    async def _hang_up(self, contact: _Contact) -> None:
        link, contact.link, contact.stale = contact.link, None, False
        if link is not None:
            self._greeter.dropped(link)
            await link.close()

    async def _greet(self, contact: _Contact) -> Answer | None:
        """Greet once; None when it was in vain."""
        contact.failures += 1  # until there is an answer
        if contact.stale:
            await self._hang_up(contact)
        if contact.link is None:
            contact.link = self._transport.link(contact.address)
        try:
            answer = await self._greeter.greet(contact.address, contact.link)
        except PeerError as error:
            contact.failing = True
            contact.met = self._greeter.was_met(contact.address)
            self._unanswered(contact.address, contact.failures, error)
            return None
        contact.failures, contact.failing = 0, False
        contact.met = answer in (Answer.MET, Answer.DUPLICATE)
        return answer

    def _unanswered(self, address: str, failures: int, error: PeerError) -> None:
        if error.reason == "starting":
            self.found(address)  # it is there, and loads its model
        else:
            if len(self._vain) >= MAX_CONTACTS:
                self._vain.clear()
            self._vain.setdefault(address, _now())
        self._greeter.unanswered(address, failures, error)

    def greet_all(self) -> None:
        """Greet everybody now."""
        for contact in self._table.values():
            contact.waker.set()

    def found(self, address: str) -> None:
        """Somebody answers there."""
        self._vain.pop(address, None)
        if address in self._table:
            self._table[address].answered = True

    def broke(self, address: str) -> None:
        """A call to there broke: whoever it was may be at another address now."""
        if address in self._table:
            self._table[address].failing = True

    def welcome(self, address: str) -> None:
        """Somebody calls from there again: do not wait for the next try, or beat, to call back.

        Nor for the link, which pauses for seconds after a connection that was refused.
        """
        if address in self._vain:
            self._vain[address] = _now()  # before, there was nobody to answer
        if (contact := self._table.get(address)) is not None:
            contact.stale |= contact.failing
            contact.waker.set()

    def is_failing(self, address: str) -> bool:
        """Whether the last greeting or call to there was in vain."""
        return address in self._table and self._table[address].failing

    def is_silent(self, address: str) -> bool:
        """Whether nobody has answered there since the first greeting in vain."""
        return address in self._vain

    def is_unreached(self, address: str) -> bool:
        """Whether it is silent for so long that whoever calls from there should be told."""
        since = self._vain.get(address)
        return since is not None and _now() - since >= UNREACHED_SECONDS

    def never_answered(self, addresses: Collection[str]) -> frozenset[str]:
        """Those of ``addresses`` that were greeted and have not answered once."""
        answered = {address for address, contact in self._table.items() if contact.answered}
        return frozenset(a for a in addresses if a in self._vain and a not in answered)

    async def close(self) -> None:
        """Stop greeting, for good."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
