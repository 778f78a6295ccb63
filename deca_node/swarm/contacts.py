"""Addresses where somebody may be: each has one task that greets it.

With backoff while nobody answers, and as a heartbeat once somebody does. What an answer means is
the greeter's to say.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Collection
from enum import Enum, auto
from typing import Protocol

from deca_node.addresses import is_address
from deca_node.config import Timing
from deca_node.errors import PeerError
from deca_node.limits import MAX_CONTACTS, MAX_PROPOSALS
from deca_node.transport import Link, Transport
from deca_node.waiting import happens

# Greetings to a node that refused us: often enough to notice that its operator mended it.
REFUSED_HEARTBEATS = 5
# A contact that was only proposed, and never met, is dropped after this many vain greetings.
MAX_VAIN_GREETINGS = 30
# A caller is told that we cannot call it back after this many seconds of vain greetings: three of
# the lan preset, so that a restart does not raise an alarm.
UNREACHED_SECONDS = 8.0


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


class Contacts:
    """All addresses that are greeted.

    Args:
        greeter: greets, and says what came of it.
        transport: how to reach others.
        timing: heartbeat and backoff.
        seed: of the jitter.
    """

    def __init__(self, greeter: Greeter, transport: Transport, timing: Timing, seed: int) -> None:
        self._greeter, self._transport, self._timing = greeter, transport, timing
        self._jitter = random.Random(seed)  # noqa: S311 - spreads redials, no secret
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wakers: dict[str, asyncio.Event] = {}  # greet it now
        self._proposed: Counter[str] = Counter()  # contacts under way, by the peer that named them
        self._failing: set[str] = set()  # whose last greeting was in vain
        self._vain: dict[str, float] = {}  # since when greetings find nobody
        self._answered: set[str] = set()  # that did answer once

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, address: str, *, lasting: bool, by: str) -> None:
        """Begin to greet HOST:PORT, if it is an address and there is room.

        Args:
            address: where.
            lasting: never drop it.
            by: the peer that says so, if one does; what peers say takes at most half of the
                table, and a bounded part of it each.
        """
        if address in self._tasks or len(self) >= MAX_CONTACTS or not is_address(address):
            return
        if by and (
            self._proposed[by] >= MAX_PROPOSALS or self._proposed.total() >= MAX_CONTACTS // 2
        ):
            return
        task = asyncio.create_task(self._keep_greeting(address, lasting))
        self._tasks[address] = task
        if by:
            self._proposed[by] += 1
        task.add_done_callback(lambda _: self._dropped(address, by))

    def _dropped(self, address: str, by: str) -> None:
        self._tasks.pop(address, None)
        self._wakers.pop(address, None)
        self._failing.discard(address)
        self._answered.discard(address)
        if by:
            self._proposed[by] -= 1
            self._proposed += Counter()  # forgets the zeros

    async def _keep_greeting(self, address: str, lasting: bool) -> None:
        link = self._transport.link(address)
        failures = 0
        try:
            while lasting or failures < MAX_VAIN_GREETINGS or self._greeter.was_met(address):
                # Before the greeting: what changes meanwhile is told with the next.
                woken = self._wakers[address] = asyncio.Event()
                try:
                    answer = await self._greeter.greet(address, link)
                except PeerError as error:
                    failures += 1
                    self._unanswered(address, failures, error)
                    # With jitter, so that a healed network is not hit by everybody at once.
                    pause = self._timing.redial * 2 ** min(failures - 1, 30)
                    pause = min(pause, self._timing.redial_max)
                else:
                    if answer is Answer.ITSELF or (answer is Answer.DUPLICATE and not lasting):
                        return
                    failures = 0
                    self._failing.discard(address)
                    slow = 1 if answer is Answer.MET else REFUSED_HEARTBEATS
                    pause = self._timing.heartbeat * slow
                await happens(woken, pause * self._jitter.uniform(0.75, 1.25))
        finally:
            self._greeter.dropped(link)
            await link.close()

    def _unanswered(self, address: str, failures: int, error: PeerError) -> None:
        self._failing.add(address)
        if error.reason == "starting":
            self.found(address)  # it is there, and loads its model
        else:
            if len(self._vain) >= MAX_CONTACTS:
                self._vain.clear()
            self._vain.setdefault(address, _now())
        self._greeter.unanswered(address, failures, error)

    def greet_all(self) -> None:
        """Greet everybody now."""
        for waker in self._wakers.values():
            waker.set()

    def found(self, address: str) -> None:
        """Somebody answers there."""
        self._vain.pop(address, None)
        if address in self._tasks:
            self._answered.add(address)

    def broke(self, address: str) -> None:
        """A call to there broke: whoever it was may be at another address now."""
        self._failing.add(address)

    def welcome(self, address: str) -> None:
        """Somebody calls from there again: do not wait for the next try to call back."""
        if address in self._vain:
            self._vain[address] = _now()  # before, there was nobody to answer
        if address in self._failing and address in self._wakers:
            self._wakers[address].set()

    def is_failing(self, address: str) -> bool:
        """Whether the last greeting or call to there was in vain."""
        return address in self._failing

    def is_silent(self, address: str) -> bool:
        """Whether nobody has answered there since the first greeting in vain."""
        return address in self._vain

    def is_unreached(self, address: str) -> bool:
        """Whether it is silent for so long that whoever calls from there should be told."""
        since = self._vain.get(address)
        return since is not None and _now() - since >= UNREACHED_SECONDS

    def never_answered(self, addresses: Collection[str]) -> frozenset[str]:
        """Those of ``addresses`` that were greeted and have not answered once."""
        return frozenset(a for a in addresses if a in self._vain and a not in self._answered)

    async def close(self) -> None:
        """Stop greeting."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
