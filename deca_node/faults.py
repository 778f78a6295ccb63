"""What is done to a swarm next, to see whether it lives.

Pure: a decision is a function of (random state, who is in which state, seconds left).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is done to a node."""

    KILL = "kill"  # SIGKILL, started again after a while
    FREEZE = "freeze"  # SIGSTOP, SIGCONT after a while
    CUT = "cut"  # calls between it and some or all others hang
    RESTART = "restart"  # SIGTERM, started again as soon as it has ended
    JOIN = "join"  # a new node is started


@dataclass(frozen=True)
class Fault:
    """One fault.

    ``seconds`` is how long it lasts, 0 for a restart and a join. ``pairs`` are the cut directions,
    each the caller and the called.
    """

    kind: Kind
    node: str
    seconds: float
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Roster:
    """Who is in which state.

    Attributes:
        steady: run, are under no fault, and have made a step since they were last started.
        recovering: run and are under no fault, but have made no step yet.
        spared: the same, but were hurt on their way back already.
        faulty: are under a fault.
        absent: may still join.
    """

    steady: tuple[str, ...]
    recovering: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    faulty: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def present(self) -> tuple[str, ...]:
        """All that take part."""
        return (*self.steady, *self.recovering, *self.spared, *self.faulty)

    @property
    def full(self) -> bool:
        """Whether as many as may be are down, or not back yet."""
        present = len(self.present)
        return present - len(self.steady) >= most_down(present)


# Seconds between two faults: every few seconds, and at times two at once.
PAUSE_SECONDS = (1.0, 7.0)
WEIGHTS: Mapping[Kind, float] = {Kind.KILL: 3, Kind.FREEZE: 3, Kind.CUT: 3, Kind.RESTART: 1}
# Shorter and longer than what a node does about it: a missed heartbeat (1 to 2 s), a connection
# given up (15 s). Drawn so that short ones are as likely as long ones.
SECONDS: Mapping[Kind, tuple[float, float]] = {
    Kind.KILL: (0.3, 10.0),
    Kind.FREEZE: (0.5, 20.0),
    Kind.CUT: (1.0, 30.0),
}
# No fault begins so shortly before the end, and none lasts beyond it.
LAST_SECONDS = 5.0
# Whoever has not joined in this share of the time is due: late, but with time left to be hurt.
JOIN_BY = 0.6
JOIN_CHANCE = 0.15  # of a fault being a join, while somebody is absent
# A cut of all cables, or of a random part of them; both ways, or one way of calling only.
ALL_CABLES, BOTH_WAYS = 0.5, 0.6


def pause(draw: random.Random) -> float:
    """Seconds until the next fault."""
    return draw.uniform(*PAUSE_SECONDS)


def most_down(present: int) -> int:
    """How many nodes may be under a fault or on their way back at a time.

    Half of them, rounded down, and always fewer than all: what is tested is a swarm and not the
    one node that is left.
    """
    return max(1, present // 2)


def next_fault(
    draw: random.Random, roster: Roster, now: float, end: float
) -> tuple[Fault | None, str]:
    """What to do now, and why; None when nothing may be done.

    As many nodes as ``most_down`` may be down at a time, and the last steady one is left alone, so
    that somebody can always train. A node on its way back is hurt once, then left to come back.

    Args:
        draw: the random state.
        roster: who is in which state.
        now: seconds since faults began.
        end: seconds after which there are none.
    """
    left = end - now
    if left < LAST_SECONDS:
        return None, "the end is near"
    # Drawn in any case, so that a seed's later decisions depend less on what was possible before.
    join, choice, length = draw.random(), draw.random(), draw.random()
    if roster.absent and (now > JOIN_BY * end or join < JOIN_CHANCE):
        return Fault(Kind.JOIN, roster.absent[0], 0.0), "somebody is still to join"
    victims = list(roster.recovering) if roster.steady else []
    if not roster.full and len(roster.steady) > 1:
        victims += roster.steady
    if not victims:
        return None, f"no more than {len(roster.steady)} are steady"
    victim = victims[int(choice * len(victims))]
    kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind not in SECONDS:
        return Fault(kind, victim, 0.0), "drawn"
    shortest, longest = SECONDS[kind]
    seconds = min(shortest * (longest / shortest) ** length, left)
    others = [node for node in roster.present if node != victim]
    pairs = _pairs(draw, victim, others) if kind == Kind.CUT else ()
    return Fault(kind, victim, seconds, pairs), "drawn"


def _pairs(draw: random.Random, victim: str, others: list[str]) -> tuple[tuple[str, str], ...]:
    if draw.random() >= ALL_CABLES:
        others = sorted(draw.sample(others, draw.randint(1, len(others))))
    way = draw.random()
    out = tuple((victim, other) for other in others)
    back = tuple((other, victim) for other in others)
    if way < BOTH_WAYS:
        return out + back
    return out if way < (1 + BOTH_WAYS) / 2 else back
