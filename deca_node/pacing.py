"""A byte rate kept by waiting: the token bucket. Pure; time is an argument, in seconds."""


class TokenBucket:
    """Lets ``rate`` bytes per second through, and up to ``burst`` bytes at once after a rest.

    Args:
        rate: bytes per second, above 0.
        burst: bytes, above 0.
        now: when it is made; it starts full.

    Attributes:
        rate: may be changed; it holds from the last take on.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self._burst = burst
        self._level, self._at = burst, now

    def take(self, nbytes: int, now: float) -> float:
        """Count bytes as sent and tell how long to wait first.

        The level may fall below zero, so that what is larger than the burst passes too, and
        callers are served in the order in which they ask.

        Returns:
            Seconds, 0 when there is room.
        """
        self._level = min(self._burst, self._level + (now - self._at) * self.rate) - nbytes
        self._at = now
        return max(0.0, -self._level / self.rate)

    def give_back(self, nbytes: int) -> None:
        """Count bytes as not sent after all."""
        self._level += nbytes


class WorkBudget:
    """The byte rate at which a side job takes a set share of one core.

    Args:
        share: of one core, above 0.
        weight: bytes over which what a byte costs is averaged, above 0.
    """

    def __init__(self, share: float, weight: float) -> None:
        self._share, self._weight = share, weight
        self._cost: float | None = None  # CPU seconds per byte

    def spent(self, nbytes: int, seconds: float) -> None:
        """Count CPU seconds that some bytes, at least one, have taken."""
        cost = seconds / nbytes
        part = min(1.0, nbytes / self._weight)
        self._cost = cost if self._cost is None else self._cost + part * (cost - self._cost)

    def rate(self, most: float) -> float:
        """Bytes per second, at most ``most``; that where nothing is known yet."""
        return min(most, self._share / self._cost) if self._cost else most


class SendRates:
    """What a node sends in all and to each peer.

    Args:
        total: bytes per second to all of them; None is no cap.
        per_peer: likewise to each.
        burst: bytes that may go at once after a rest.
        most_peers: remembered at once.
    """

    def __init__(
        self, total: float | None, per_peer: float | None, burst: float, most_peers: int
    ) -> None:
        self._total, self._per_peer = total, per_peer
        self._burst, self._most_peers = burst, most_peers
        self._all: TokenBucket | None = None
        self._peers: dict[str, TokenBucket] = {}

    def take(self, peer: str, nbytes: int, now: float) -> float:
        """Count bytes as sent to a peer and tell how many seconds to wait first."""
        wait = 0.0
        if self._total is not None:
            if self._all is None:
                self._all = TokenBucket(self._total, self._burst, now)
            wait = self._all.take(nbytes, now)
        if self._per_peer is not None:
            bucket = self._peers.pop(peer, None) or TokenBucket(self._per_peer, self._burst, now)
            self._peers[peer] = bucket  # the last of the dictionary is the latest used
            if len(self._peers) > self._most_peers:
                del self._peers[next(iter(self._peers))]
            wait = max(wait, bucket.take(nbytes, now))
        return wait

    def give_back(self, peer: str, nbytes: int) -> None:
        """Count bytes as not sent to a peer after all."""
        for bucket in (self._all, self._peers.get(peer)):
            if bucket is not None:
                bucket.give_back(nbytes)
