"""Whom a node waits for, and how long: at a visit's beginning and in its steps.

No I/O and no clock: time is an argument, in seconds.
"""

from collections.abc import Callable, Collection, Iterable

from deca_node.config import Timing

RETRY_SECONDS = 0.1  # between two tries to reach a neighbour within a handshake
# What a step gives to neighbours that it would not wait for: time for a block that is ready.
DOUBTFUL_SECONDS = 0.25


def to_come(timing: Timing, *, idle: bool, suspect: bool, down: bool) -> float:
    """Seconds that a visit's beginning waits for a peer.

    A living peer answers at once, whatever it is doing: a suspect that has not is not worth
    the deadline of those that have, nor is one that let us wait in vain before (``idle``).
    """
    if suspect and down:
        return RETRY_SECONDS if idle else timing.redial
    return timing.rpc if idle or suspect else timing.visit_deadline


class Patience:
    """What a visit has seen of its neighbours' pace, and how long it still waits for them.

    Args:
        timing: deadlines, and the seconds that a visit waits for one neighbour alone (its budget).
        is_suspect: whether a peer failed lately.
    """

    def __init__(self, timing: Timing, is_suspect: Callable[[str], bool]) -> None:
        self._timing, self._is_suspect = timing, is_suspect
        self._late: set[str] = set()  # missed the latest step deadline
        self._slow: set[str] = set()  # used up their budget
        self._waited: dict[str, float] = {}  # of the budget, the seconds gone by

    def begin_visit(self) -> None:
        """Everybody is worth waiting for again."""
        self._late.clear()
        self._slow.clear()
        self._waited.clear()

    def worth(self, peers: Iterable[str]) -> set[str]:
        """Who missed a deadline, used up its budget, or broke the connection, holds nobody up."""
        doubtful = self._late | self._slow
        return {peer for peer in peers if peer not in doubtful and not self._is_suspect(peer)}

    def missed(self, peer: str) -> None:
        """It let a step's deadline go by."""
        self._late.add(peer)

    def came(self, peer: str) -> None:
        """Its block is here in time."""
        self._late.discard(peer)

    def used_up(self, peers: Iterable[str]) -> None:
        """Their budget is gone."""
        self._slow.update(peers)

    def waited(self, peers: Iterable[str], seconds: float) -> None:
        """These alone were waited for."""
        for peer in peers:
            self._waited[peer] = self._waited.get(peer, 0.0) + seconds

    def budget(self, peer: str) -> float:
        """Seconds that this visit still waits for a neighbour after the others have come."""
        return max(0.0, self._timing.wait_budget - self._waited.get(peer, 0.0))

    def for_blocks(
        self, worth: Collection[str], deadline: float, idle_since: float, now: float
    ) -> float:
        """Until when a step waits for those whose blocks are missing and worth it.

        Nothing else has been done since ``idle_since``.
        """
        if not worth:
            return min(deadline, idle_since + DOUBTFUL_SECONDS)
        if len(worth) == 1:
            return min(deadline, now + self.budget(*worth))
        return deadline

    def for_agreement(self, held_up: Collection[str], deadline: float) -> float:
        """The same where nothing is trained; no budget, since without a node there is no agreement.

        Who had not come to this step by the deadline (``held_up``) may itself have waited for
        another until then.
        """
        return deadline + self._timing.rpc if held_up else deadline

    def for_readers(
        self, behind: Collection[str], begin: float, now: float, *, asked: bool
    ) -> float:
        """Until when those, one or more, are waited for that have not fetched this node's block.

        That began at ``begin``. Who has not even asked gets no longer than a call that got lost.
        """
        limit = begin + (self._timing.step_deadline if asked else self._timing.rpc)
        return min(limit, now + max(self.budget(peer) for peer in behind))
