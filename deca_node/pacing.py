"""A byte rate kept by waiting: the token bucket. Pure; time is an argument, in seconds."""


class TokenBucket:
    """Lets ``rate`` bytes per second through, and up to ``burst`` bytes at once after a rest.

    Args:
        rate: bytes per second, above 0.
        burst: bytes, above 0.
        now: when it is made; it starts full.
    """

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._at = burst, now

    def take(self, nbytes: int, now: float) -> float:
        """Count bytes as sent and tell how long to wait first.

        The level may fall below zero, so that what is larger than the burst passes too, and
        callers are served in the order in which they ask.

        Returns:
            Seconds, 0 when there is room.
        """
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - nbytes
        self._at = now
        return max(0.0, -self._level / self._rate)
