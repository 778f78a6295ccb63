"""Who may come in: how many calls at once, and how often a caller may greet. Pure.

Time is an argument, in seconds. Tables are bounded, so that callers cannot make them grow.
"""

import ipaddress
from collections import Counter

from deca_node.pacing import TokenBucket


def network(address: str) -> str:
    """What a caller's address counts as: of IPv6 the /64, which one caller has for itself."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if known.version == 4:
        return address
    if known.ipv4_mapped is not None:  # a caller by IPv4 at a socket that is open for both
        return str(known.ipv4_mapped)
    return str(ipaddress.ip_network((known, 64), strict=False))


class Places:
    """Calls that are answered at once.

    Args:
        total: over all callers.
        each: of one caller, so that nobody takes the places of all.
    """

    def __init__(self, total: int, each: int) -> None:
        self._total, self._each = total, each
        self._taken: Counter[str] = Counter()
        self._count = 0

    def enter(self, caller: str) -> bool:
        """Take a place, if there is one; whoever has it gives it back by ``leave``."""
        if self._count >= self._total or self._taken[caller] >= self._each:
            return False
        self._count += 1
        self._taken[caller] += 1
        return True

    def leave(self, caller: str) -> None:
        """Give a place back."""
        self._count -= 1
        self._taken[caller] -= 1
        if self._taken[caller] <= 0:
            del self._taken[caller]


class Turns:
    """How often each caller may come.

    Args:
        rate: times per second, in the long run.
        burst: times at once after a rest.
        most: callers remembered; who has not come for longest is forgotten.
    """

    def __init__(self, rate: float, burst: float, most: int) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, caller: str, now: float) -> bool:
        """Whether it may come now; who may not has not used up anything."""
        bucket = self._buckets.pop(caller, None) or TokenBucket(self._rate, self._burst, now)
        self._buckets[caller] = bucket  # the last of the dictionary is the latest used
        if len(self._buckets) > self._most:
            del self._buckets[next(iter(self._buckets))]
        if bucket.take(1, now) > 0:
            bucket.give_back(1)
            return False
        return True
