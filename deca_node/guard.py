"""Whom a running node believes, and what it shows itself (transport.Guard)."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress

import xxhash

from deca_node import identity
from deca_node.errors import DecaError, PeerRefused, TrustError
from deca_node.keyring import Keyring, Pair, lifetime_days
from deca_node.limits import MAX_REVOKED
from deca_node.pb import node_pb2 as pb
from deca_node.transport import Caller
from deca_node.transport.connection import Credentials
from deca_node.trust import barred, is_name, is_renewal_due, objection

# Between two renewals of one node: each is a signature and two files synced.
RENEWAL_PAUSE_SECONDS = 60.0


class Guard:
    """One node's trust, while it runs. Its files may be changed by other processes meanwhile.

    Args:
        keyring: of the run.
        node: this node.
        allow: the only nodes dealt with, beside this one; empty for all of the run's.
        clock: seconds since 1970.

    Raises:
        TrustError: this node could show nothing that others would believe.
    """

    def __init__(
        self,
        keyring: Keyring,
        node: str,
        allow: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keyring, self._node, self._clock = keyring, node, clock
        self._allow = frozenset((*allow, node)) if allow else frozenset[str]()
        self.refused: Counter[str] = Counter()
        self._stamp = keyring.stamp(node)  # before what it is of: no change can come between
        self._revoked = keyring.revoked()
        # What counts already and could not be written yet: the list, this node's pair.
        self._unsaved_list = self._unsaved_pair = False
        self._issued: dict[str, float] = {}  # when to whom; names are those of certificates
        self._issuing = threading.Lock()
        self._pair = keyring.node(node)
        self._credentials = self._shown()
        if wrong := objection(self._pair.says, keyring.run, self._revoked, (), clock()):
            reason, _, text = wrong.partition(": ")
            raise TrustError(
                f"{keyring.folder}: node {node!r} cannot take part: "
                + (text if reason != "revoked" else f"{text}; join under another name")
            )
        holder = self._pair.says.holder
        if holder is None or holder.node != node:
            raise TrustError(
                f"{keyring.folder}: the certificate of node {node!r} names another node"
            )

    # --- transport.Guard

    def credentials(self) -> Credentials:
        """See transport.Guard."""
        return self._credentials

    def admit(self, certificate: bytes) -> Caller:
        """See transport.Guard."""
        try:
            shown = identity.read(certificate)
        except TrustError as error:
            raise PeerRefused("no_certificate", str(error)) from None
        wrong = objection(shown, self._keyring.run, self._revoked, self._allow, self._clock())
        if wrong or shown.holder is None:
            raise _refused(wrong)
        return Caller(shown.holder.node, shown.holder.operator)

    def vouch(self, node: str) -> None:
        """See transport.Guard."""
        if wrong := barred(node, self._revoked, self._allow):
            raise _refused(wrong)

    def digest(self) -> int:
        """See transport.Guard."""
        names = "\n".join(sorted(self._revoked))
        return xxhash.xxh3_64_intdigest(names.encode()) if names else 0

    def revocations(self) -> pb.Revocations:
        """See transport.Guard."""
        return pb.Revocations(
            revoked=[pb.Revocation(node=n, signature=s) for n, s in sorted(self._revoked.items())]
        )

    def learn(self, told: pb.Revocations) -> None:
        """See transport.Guard."""
        found = dict(self._revoked)
        for each in told.revoked:
            if each.node in found:
                continue
            # One bad signature ends it, so that a list of them costs one check.
            if len(found) >= MAX_REVOKED or not (
                is_name(each.node)
                and identity.revokes(self._keyring.authority, each.node, each.signature)
            ):
                raise PeerRefused("bad_list", "a revocation that the authority has not signed")
            found[each.node] = each.signature
        if len(found) > len(self._revoked):
            self._revoked, self._unsaved_list = found, True
            with suppress(DecaError):  # in force all the same; Upkeep tries again, and tells
                self.keep_list()

    def renew_for(self, certificate: bytes, request: bytes) -> bytes:
        """See transport.Guard."""
        try:
            shown = identity.read(certificate)
        except TrustError as error:
            raise PeerRefused("bad_request", str(error)) from None
        if not self._keyring.has_authority:
            raise PeerRefused("no_authority", "the authority's key is not here")
        if shown.holder is None or shown.holder.node is None:
            raise PeerRefused("not_a_node", "only nodes are renewed")
        now = self._clock()
        if not is_renewal_due(shown, now):
            raise PeerRefused("not_due", "a certificate is renewed in the last third of its time")
        node, days = shown.holder.node, lifetime_days(shown)
        # It is due until its holder shows the new one at another connection.
        with self._issuing:  # several calls may be at this at once
            if abs(now - self._issued.get(node, -math.inf)) < RENEWAL_PAUSE_SECONDS:
                raise PeerRefused("not_due", f"renewed within the last {RENEWAL_PAUSE_SECONDS:g} s")
            self._issued[node] = now
        try:
            return self._keyring.issue(node, request, now, days)
        except TrustError as error:
            raise PeerRefused("bad_request", str(error)) from None
        except DecaError as error:  # it is for another node to try, or later
            raise PeerRefused("no_authority", str(error)) from None

    # --- for the node

    @property
    def revoked(self) -> frozenset[str]:
        """Nodes that are out of the run."""
        return frozenset(self._revoked)

    @property
    def ends(self) -> float:
        """When this node's certificate ends, seconds since 1970."""
        return self._pair.says.ends

    @property
    def is_out(self) -> str:
        """Why this node has no say in the run any more, as ``reason: text``; empty while it has."""
        return objection(self._pair.says, self._keyring.run, self._revoked, (), self._clock())

    def refresh(self) -> bool:
        """Look whether another process has changed the files; whether anything is new.

        What cannot be read is tried again at each look: the remedy may not change the file.

        Raises:
            TrustError: what is there now is damaged; what was known before stays in force.
        """
        stamp = self._keyring.stamp(self._node)
        if stamp == self._stamp:
            return False
        before = self._revoked, self._pair
        self._revoked = {**self._revoked, **self._keyring.revoked()}
        pair = self._keyring.node(self._node)
        # One that could not be written is newer than what it was to replace.
        if not self._unsaved_pair or pair.says.ends > self.ends:
            self._take(pair)
            self._unsaved_pair = False
        self._stamp = stamp
        return (self._revoked, self._pair) != before

    def keep_list(self) -> None:
        """Write the revocations that peers have told, if that is still to be done.

        Raises:
            TrustError: the folder cannot be written, or another process is at it.
            DiskFullError: there is no room.
        """
        if self._unsaved_list:
            # What another process has written meanwhile counts as well.
            self._revoked = self._keyring.keep_revoked(self._revoked, wait=False)
            self._unsaved_list = False

    def keep_pair(self) -> None:
        """Write this node's renewed pair, if that is still to be done; raises as ``keep_list``."""
        if self._unsaved_pair:
            self._keyring.keep_node(self._node, self._pair, wait=False)
            self._unsaved_pair = False

    @property
    def is_renewal_due(self) -> bool:
        """Whether this node's certificate should be renewed."""
        return is_renewal_due(self._pair.says, self._clock())

    @property
    def has_authority(self) -> bool:
        """Whether the authority's key is here."""
        return self._keyring.has_authority

    def renew_here(self) -> bool:
        """Renew this node's certificate where the authority's key is; False where it is not."""
        if not self._keyring.has_authority:
            return False
        key, days = identity.new_key(), lifetime_days(self._pair.says)
        authority = self._keyring.open_authority()
        certificate = authority.issue(identity.new_request(key), self._node, self._clock(), days)
        with suppress(DecaError):  # the older copy there keeps the name as well
            self._keyring.note_issued(self._node, certificate)
        self.renewed(key, certificate)
        return True

    def renew_operator_here(self) -> bool:
        """Renew the operator's certificate if it is here, due, and the authority's key is, too."""
        keyring, now = self._keyring, self._clock()
        if not (keyring.has_authority and keyring.has_operator):
            return False
        shown = keyring.operator_certificate()
        if not is_renewal_due(shown, now):
            return False
        keyring.issue_operator(now, lifetime_days(shown))
        return True

    def renewed(self, key: bytes, certificate: bytes) -> None:
        """Use another certificate from now on, also where it cannot be written yet.

        Raises:
            TrustError: it is not one of this node's.
        """
        identity.check_pair(key, certificate, self._keyring.authority)
        pair = Pair(key, certificate)
        if pair.says.holder != self._pair.says.holder or pair.says.ends <= self.ends:
            raise TrustError("not a renewal of this node's certificate")
        self._take(pair)
        self._unsaved_pair = True
        with suppress(DecaError):  # Upkeep tries again, and tells
            self.keep_pair()

    def _take(self, pair: Pair) -> None:
        if pair != self._pair:
            self._pair = pair
            self._credentials = self._shown()

    def _shown(self) -> Credentials:
        return Credentials(
            self._pair.key, self._pair.certificate, self._keyring.authority, self._keyring.run
        )


class Visitor:
    """A person's trust, for questions to nodes (transport.Guard).

    Args:
        keyring: of the run; its operator's certificate is shown, else one of its nodes'.
    """

    def __init__(self, keyring: Keyring) -> None:
        now = time.time()
        pair = keyring.caller(now)
        self.keyring = keyring
        self._credentials = Credentials(pair.key, pair.certificate, keyring.authority, keyring.run)
        if wrong := objection(pair.says, keyring.run, (), (), now):
            raise TrustError(f"{keyring.folder}: {wrong.partition(': ')[2]}")

    def credentials(self) -> Credentials:
        """See transport.Guard."""
        return self._credentials


def _refused(objection: str) -> PeerRefused:
    reason, _, text = objection.partition(": ")
    return PeerRefused(reason, text)
