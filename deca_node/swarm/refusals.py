"""Calls that were refused here, and addresses where this node was refused."""

from collections import Counter
from typing import Any

from deca_node.admission import Turns
from deca_node.health import Refusal
from deca_node.limits import (
    MAX_CONTACTS,
    PEER_LINES,
    PEER_LINES_BURST,
    REFUSAL_LINES,
    REFUSAL_LINES_BURST,
)

# Characters kept of what was said.
DETAIL_CHARACTERS = 200
# Who has no name yet: nobody was understood at the address.
NAMELESS = "the node"


class Refusals:
    """The last refusal of each address, logged when it is news; and how many there were of callers.

    Args:
        log: a structlog logger.

    Attributes:
        count: of refused calls by those that are no peers or greet too often, by reason.
        last: by address, at most MAX_CONTACTS of them.
    """

    def __init__(self, log: Any) -> None:
        self.count: Counter[str] = Counter()
        self.last: dict[str, Refusal] = {}
        self._log = log
        self._lines = Turns(REFUSAL_LINES, REFUSAL_LINES_BURST, 1)
        self._lines_of = Turns(PEER_LINES, PEER_LINES_BURST, MAX_CONTACTS)
        self._said: dict[str, str] = {}  # the reason that was logged last, by address

    def note(
        self,
        address: str,
        name: str,
        reason: str,
        text: str,
        now: float,
        *,
        theirs: bool = False,
    ) -> None:
        """Keep a refusal; the same one of the same address is logged once, and few of one name."""
        if len(self.last) >= MAX_CONTACTS:
            self.last.clear()
        self.last[address] = Refusal(name, reason, text[:DETAIL_CHARACTERS], now, theirs)
        if self._said.get(address) == reason:
            return
        if len(self._said) >= MAX_CONTACTS:
            self._said.clear()
        self._said[address] = reason
        # Other runs on the same network are normal; anything else wants a look.
        level = self._log.info if reason == "other_run" else self._log.warning
        whose = address if name == NAMELESS else name
        if self._lines_of.take(whose, now) and self._lines.take("", now):
            level("peer refused", peer=name, address=address, reason=reason, detail=text)

    def forget(self, address: str, *, reached: bool = True) -> None:
        """A peer is there now.

        Who was not ``reached`` but only calls may refuse this node as before, when that calls.
        """
        if not reached and address in self.last and self.last[address].theirs:
            return
        self.last.pop(address, None)
        self._said.pop(address, None)
