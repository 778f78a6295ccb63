"""Who may take part in a run, and what a certificate must say for it.

Pure: certificates are read in identity.py; here are the decisions about what they say.
"""

import base64
import binascii
import datetime as dt
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deca_node.errors import TrustError
from deca_node.limits import MAX_TOKEN_ADDRESSES, MAX_TOKEN_BYTES, NAME

# Names in certificates end in a domain that ICANN keeps free for private use, so that no
# certificate of ours could ever be mistaken for one of a host on the internet.
DOMAIN = "deca.internal"
SCHEME = "deca://"
# Renewed when less than this share of a certificate's time is left.
RENEW_SHARE = 1 / 3
# The clocks of two machines of a run may differ by this: certificates begin so much earlier.
CLOCK_SECONDS = 300.0


def is_name(text: str) -> bool:
    """Whether a run or a node can be called so, as in the settings."""
    return re.fullmatch(NAME, text) is not None


def date(seconds: float) -> str:
    """A time of a certificate, seconds since 1970, as people write it."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def common_name(run: str) -> str:
    """The DNS name that all nodes of a run have in their certificates."""
    return f"{run}.{DOMAIN}"


def node_name(run: str, node: str) -> str:
    """The DNS name that one node alone has in its certificate."""
    return f"{node}.{run}.{DOMAIN}"


def pairing_name(run: str) -> str:
    """The DNS name of an invitation, which no node has."""
    return f"invitation.{run}.pairing.{DOMAIN}"


def node_uri(run: str, node: str) -> str:
    """What a node's certificate says that its holder is."""
    return f"{SCHEME}{run}/node/{node}"


def operator_uri(run: str) -> str:
    """What an operator's certificate says that its holder is."""
    return f"{SCHEME}{run}/operator"


@dataclass(frozen=True)
class Holder:
    """Whom a certificate of a run's authority names.

    Attributes:
        run: the run.
        node: the node's name; None for an operator.
        operator: whether it may control nodes.
    """

    run: str
    node: str | None
    operator: bool


def holder(names: Iterable[str]) -> Holder | None:
    """Whom a certificate names by its subject alternative names; None when it is none of ours."""
    for name in names:
        run, _, who = name.removeprefix(SCHEME).partition("/")
        if not name.startswith(SCHEME) or not is_name(run):
            continue
        if who == "operator":
            return Holder(run, None, operator=True)
        kind, _, node = who.partition("/")
        if kind == "node" and is_name(node):
            return Holder(run, node, operator=False)
    return None


@dataclass(frozen=True)
class Certificate:
    """What a certificate says.

    Attributes:
        holder: whom it names; None for an authority's, and for one that is none of ours.
        begins: seconds since 1970.
        ends: seconds since 1970.
        serial: of the authority's certificates.
    """

    holder: Holder | None
    begins: float
    ends: float
    serial: int


def objection(
    shown: Certificate, run: str, revoked: Collection[str], allow: Collection[str], now: float
) -> str:
    """Why the holder of a certificate has no say in a run, as ``reason: text``; empty when it has.

    That the run's authority has signed it was checked before: by TLS, when the connection was made.

    Args:
        shown: what it says.
        run: the run.
        revoked: nodes whose certificates were taken back.
        allow: the only nodes let in; empty lets in all of the run's.
        now: seconds since 1970.
    """
    if shown.holder is None or shown.holder.run != run:
        return f"no_certificate: its certificate names no member of run {run!r}"
    node = shown.holder.node
    if now >= shown.ends:
        anew = (
            f"`deca-node swarm invite --node {node}` (of a node there, `deca-node swarm renew`)"
            if node is not None
            else "`deca-node swarm renew`, and copy operator.pem and operator.key from there"
        )
        ended = date(shown.ends)
        return f"expired: its certificate expired on {ended}; on the authority's machine {anew}"
    if now < shown.begins - CLOCK_SECONDS:
        return (
            f"expired: its certificate is not valid before {date(shown.begins)}; set the clock of "
            "the machine that is wrong (NTP)"
        )
    return "" if node is None else barred(node, revoked, allow)


def barred(node: str, revoked: Collection[str], allow: Collection[str]) -> str:
    """Why a node is not dealt with, as ``reason: text``; empty when it is."""
    if node in revoked:
        return f"revoked: {node} was taken out of the run (deca-node swarm revoke)"
    if allow and node not in allow:
        return f"not_allowed: {node} is not in trust.allow"
    return ""


def is_renewal_due(shown: Certificate, now: float) -> bool:
    """Whether a certificate is in the last third of its time."""
    return now >= shown.ends - RENEW_SHARE * (shown.ends - shown.begins)


# Invitations

FINGERPRINT_BYTES = 32  # SHA-256
SECRET_BYTES = 16
_PREFIX = "deca1-"


@dataclass(frozen=True)
class Invitation:
    """What a token says to the machine that joins.

    Attributes:
        run: the run's name.
        fingerprint: SHA-256 of the authority's certificate (DER), by which the inviter is known.
        secret: by which the inviter knows the joiner; good once.
        expires: seconds since 1970.
        addresses: where the inviter waits, HOST:PORT.
    """

    run: str
    fingerprint: bytes
    secret: bytes
    expires: int
    addresses: tuple[str, ...]


def token(invitation: Invitation) -> str:
    """An invitation as one word of letters, digits, - and _."""
    body = (
        invitation.fingerprint
        + invitation.secret
        + invitation.expires.to_bytes(6, "big")
        + "\n".join((invitation.run, *invitation.addresses)).encode()
    )
    checked = zlib.crc32(body).to_bytes(4, "big") + body
    return _PREFIX + base64.urlsafe_b64encode(checked).decode().rstrip("=")


def read_token(text: str) -> Invitation:
    """What a token says.

    Raises:
        TrustError: it is not one, or was copied in part.
    """
    text = text.strip()
    encoded = text.removeprefix(_PREFIX)
    if encoded == text or len(text) > MAX_TOKEN_BYTES:
        raise TrustError(
            f"this is no invitation; copy the word that begins with {_PREFIX} from `deca-node "
            "swarm invite`"
        )
    damaged = TrustError("the invitation was copied in part or with an error; copy all of it again")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    check, body = raw[:4], raw[4:]
    fixed = FINGERPRINT_BYTES + SECRET_BYTES + 6
    if len(body) <= fixed or zlib.crc32(body).to_bytes(4, "big") != check:
        raise damaged
    try:
        run, *addresses = body[fixed:].decode().split("\n")
    except UnicodeDecodeError:
        raise damaged from None
    if not is_name(run):
        raise damaged
    secret = body[FINGERPRINT_BYTES : FINGERPRINT_BYTES + SECRET_BYTES]
    return Invitation(
        run,
        body[:FINGERPRINT_BYTES],
        secret,
        int.from_bytes(body[fixed - 6 : fixed], "big"),
        tuple(addresses[:MAX_TOKEN_ADDRESSES]),
    )
