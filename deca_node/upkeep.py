"""Keeps a running node's trust up to date: who is out, when to renew its certificate."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deca_node import identity
from deca_node.errors import DecaError, PeerError
from deca_node.guard import Guard
from deca_node.member import Member
from deca_node.membership import State
from deca_node.trust import date

# Between two tries to renew: a third of a certificate's time is left for them.
RENEW_EVERY_SECONDS = 3600.0
ASK_SECONDS = 10.0


class Upkeep:
    """One node's, called about once a second.

    Args:
        guard: the node's.
        warn: called with what people should see.
        log: a structlog logger.
    """

    def __init__(self, guard: Guard, warn: Callable[[str], None], log: Any) -> None:
        self._guard, self._warn, self._log = guard, warn, log
        self._out = ""
        self._troubles: dict[str, str] = {}  # by what each means
        self._known = guard.revoked
        self._tried = self._tried_operator = -RENEW_EVERY_SECONDS
        self._renewing: asyncio.Task[None] | None = None

    def look(self, member: Member | None) -> None:
        """See whether anything has changed, and act on it."""
        guard = self._guard
        with self._told_once("what was known before stays in force"):
            if guard.refresh():
                self._log.info("certificates reloaded", ends=date(guard.ends))
        with self._told_once(
            "a revocation is in force but could not be saved, and is lost when this node stops"
        ):
            guard.keep_list()
        with self._told_once(
            "a renewed certificate is in use but could not be saved, and is lost when this "
            "node stops"
        ):
            guard.keep_pair()
        for name in sorted(guard.revoked - self._known):
            self._log.warning("revoked", peer=name)
        self._known = guard.revoked
        if member is not None:
            for name in guard.revoked:
                member.swarm.put_out(name)
        out = guard.is_out.partition(": ")[2]
        if out and out != self._out:
            self._warn(f"the others refuse this node: {out}")
        self._out = out
        now = time.monotonic()
        if guard.has_authority and now - self._tried_operator >= RENEW_EVERY_SECONDS:
            self._tried_operator = now
            try:
                if guard.renew_operator_here():
                    self._log.info("operator's certificate renewed")
            except DecaError as error:
                self._warn(f"the operator's certificate could not be renewed: {error}")
        late = guard.is_renewal_due and now - self._tried >= RENEW_EVERY_SECONDS
        if late and (guard.has_authority or (member is not None and _anybody(member))):
            self._tried = now
            self._renewing = asyncio.create_task(self._renew(member))

    @contextmanager
    def _told_once(self, means: str) -> Iterator[None]:
        """Warn of trouble and of what it means, unless it is what there was at the last look."""
        try:
            yield
            self._troubles.pop(means, None)
        except DecaError as error:
            if str(error) != self._troubles.get(means):
                self._warn(f"{means}: {error}")
            self._troubles[means] = str(error)

    async def _renew(self, member: Member | None) -> None:
        why = "no running node has the authority's key; start one where it is"
        try:
            if self._guard.renew_here() or (member and await self._ask(member)):
                self._log.info("certificate renewed", ends=date(self._guard.ends))
                return
        except DecaError as error:
            why = (
                f"it could not be renewed: {error}; repair the authority's files in the trust "
                "folder"
            )
        self._warn(
            f"this node's certificate expires on {date(self._guard.ends)}, and {why}, or invite "
            "this node anew (deca-node swarm invite --node)"
        )

    async def _ask(self, member: Member) -> bool:
        """Ask the peers, one after the other, until one has the authority's key."""
        key = identity.new_key()
        request = identity.new_request(key)
        for peer in list(member.swarm.peers.values()):
            link = member.swarm.link(peer.name)
            if link is None or peer.state != State.ALIVE:
                continue
            try:
                certificate = await link.renew(request, ASK_SECONDS)
                self._guard.renewed(key, certificate)
            except PeerError:
                continue
            except Exception as error:  # noqa: BLE001 - whatever one gives, the others are asked
                self._log.warning("bad renewal", peer=peer.name, reason=repr(error))
            else:
                return True
        return False

    async def end(self) -> None:
        """Give up what is under way."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)


def _anybody(member: Member) -> bool:
    return any(peer.state == State.ALIVE for peer in member.swarm.peers.values())
