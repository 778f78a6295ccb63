"""What goes on with each peer, for those who look: bytes, rates, waits, retries, refusals."""

from collections import Counter, deque
from dataclasses import dataclass, field

from deca_node.limits import MAX_MEMBERS


class RateMeter:
    """Mean bytes per second over the last ``window`` seconds."""

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, nbytes: int) -> None:
        """Count bytes; neighbouring messages share an entry, so that memory stays small."""
        self._sum += nbytes
        if self._events and now - self._events[-1][0] < 0.1:
            first, count = self._events[-1]
            self._events[-1] = (first, count + nbytes)
        else:
            self._events.append((now, nbytes))
        self._forget(now)

    def rate(self, now: float) -> float:
        """Bytes per second."""
        self._forget(now)
        return self._sum / self._window

    def _forget(self, now: float) -> None:
        while self._events and now - self._events[0][0] > self._window:
            self._sum -= self._events.popleft()[1]


@dataclass
class Traffic:
    """What went on with a peer.

    Attributes:
        sent: bytes of blocks, and ``received`` likewise.
        waited: seconds that steps waited for its blocks.
        retries: calls that failed and were made again.
        refusals: what of it was refused, by reason.
    """

    sent: int = 0
    received: int = 0
    waited: float = 0.0
    retries: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    send_meter: RateMeter = field(default_factory=RateMeter)
    receive_meter: RateMeter = field(default_factory=RateMeter)


class TrafficTable(dict[str, Traffic]):
    """Traffic by peer, of at most MAX_MEMBERS; what goes on with further ones is not kept."""

    def of(self, peer: str) -> Traffic:
        """A peer's, to be counted in."""
        if (known := self.get(peer)) is not None:
            return known
        return Traffic() if len(self) >= MAX_MEMBERS else self.setdefault(peer, Traffic())
