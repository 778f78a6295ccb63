"""Joining a run by an invitation: how a machine gets its certificate.

The inviter holds the authority's key and waits at a port under TLS 1.3 with a certificate made for
this invitation alone. Whoever connects is told the authority's certificate. The joiner believes it
when its SHA-256 is the one in the token, and connects a second time, now accepting only a
certificate that this authority has signed for invitations. Over that connection go the token's
secret, once, and a request for a certificate over a key that stays where it was made. The inviter
compares the secret, forgets it, and answers with the certificate. Who only sees the network learns
neither: the token's secret is never sent to anybody but the authority.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deca_node import identity
from deca_node.addresses import split
from deca_node.admission import Places, Turns, network
from deca_node.errors import DecaError, ListenError, TrustError
from deca_node.events import printable
from deca_node.keyring import Keyring, Pair
from deca_node.limits import (
    MAX_JOIN_ATTEMPTS,
    MAX_JOIN_BYTES,
    MAX_JOINERS,
    MAX_JOINERS_PER_ADDRESS,
    MAX_REVOKED,
    MAX_TOKEN_ADDRESSES,
    NAME_RULE,
    REFUSAL_LINES,
)
from deca_node.trust import (
    SECRET_BYTES,
    Holder,
    Invitation,
    is_name,
    pairing_name,
)

# What each of the two ends gives the other for a handshake, and for what it has to say.
CONNECT_SECONDS = 5.0
# OpenSSL's numbers for a certificate whose time has not begun, or is over.
_TIMES = (9, 10)


class NobodyError(TrustError):
    """The inviter is at none of the addresses."""


class _OtherError(Exception):
    """Who answers at an address is not the inviter; the text says why."""


@dataclass(frozen=True)
class Terms:
    """What an invitation is good for.

    Attributes:
        node: whom it lets in; None lets the joiner choose a name that nobody has yet.
        days: that the certificate will be good for.
        ttl: seconds until it is over.
    """

    node: str | None
    days: float
    ttl: float


class Inviter:
    """Waits for the one machine that an invitation is for.

    Args:
        keyring: with the authority's key.
        terms: of the invitation.
        tell: called with what is worth telling a person who watches.
        clock: seconds since 1970.

    Raises:
        TrustError: the authority's key is not here, or the node cannot be let in.
    """

    def __init__(
        self,
        keyring: Keyring,
        terms: Terms,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keyring, self._terms, self._tell, self._clock = keyring, terms, tell, clock
        self._authority = keyring.open_authority()
        if terms.node is not None and terms.node in keyring.revoked():
            raise TrustError(f"node {terms.node!r} was revoked for good; invite it by another name")
        self._expires = clock() + terms.ttl
        self._secret: bytes | None = secrets.token_bytes(SECRET_BYTES)
        self._wrong = self._untold = 0
        self._places = Places(MAX_JOINERS, MAX_JOINERS_PER_ADDRESS)
        self._lines = Turns(REFUSAL_LINES, MAX_JOIN_ATTEMPTS, 1)
        self._server: asyncio.Server | None = None
        self._done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def listen(self, host: str, port: int) -> int:
        """Begin to wait; returns the port.

        Raises:
            ListenError: the port cannot be used.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve,
                sock=_socket(host, port),
                limit=MAX_JOIN_BYTES,
                ssl=self._context(),
                ssl_handshake_timeout=CONNECT_SECONDS,
            )
        except OSError as error:
            raise ListenError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port"
            ) from None
        return int(self._server.sockets[0].getsockname()[1])

    def invitation(self, addresses: Sequence[str]) -> Invitation:
        """What the joiner must know.

        Args:
            addresses: where this machine is reached, HOST:PORT.
        """
        mark = identity.fingerprint(self._authority.certificate)
        assert self._secret is not None  # noqa: S101 - asked for before anybody joined
        return Invitation(
            self._keyring.run, mark, self._secret, int(self._expires), tuple(addresses)
        )

    async def joined(self) -> str:
        """Wait for the joiner; returns its name.

        Raises:
            TrustError: nobody came in time, or too many came with a wrong secret.
        """
        try:
            async with asyncio.timeout(max(0.0, self._expires - self._clock())):
                return await self._done
        except TimeoutError:
            raise TrustError("nobody joined in time; invite again") from None
        finally:
            self._secret = None
            if self._server is not None:
                self._server.close()

    def _context(self) -> ssl.SSLContext:
        key = identity.new_key()
        request = identity.new_request(key)
        shown = self._authority.issue_pairing(request, self._clock(), self._terms.ttl / 86400)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        with tempfile.TemporaryDirectory() as folder:  # the library reads files only; mode 0700
            both = Path(folder) / "pairing.pem"
            both.write_bytes(key + shown)
            context.load_cert_chain(both)
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host = str((writer.get_extra_info("peername") or ("?",))[0])
        caller = network(host)
        if self._done.done() or not self._places.enter(caller):
            writer.close()
            return
        node = ""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _send(writer, {"authority": self._authority.certificate.decode()})
                await writer.drain()
                if line := await reader.readline():  # else it only asked for the certificate
                    node, answer = self._answer(line, host)
                    _send(writer, answer)
                    await writer.drain()
                    if node and not self._done.done():
                        self._done.set_result(node)
        except (OSError, TimeoutError, ValueError):
            if node and not self._done.done():
                self._done.set_exception(
                    TrustError(
                        f"{node} has a certificate, but the connection broke; if it did not come, "
                        f"invite it again with --node {node}"
                    )
                )
            # Else it is the joiner's affair; ValueError: a line that is too long.
        finally:
            self._places.leave(caller)
            writer.close()

    def _answer(self, line: bytes, host: str) -> tuple[str, dict[str, Any]]:
        """Who is let in, and what it is told; nobody when the name is empty."""
        try:
            secret, asked, request = _request(line)
            self._check_secret(secret)
            node = self._name(asked)
            now = self._clock()
            revoked = {name: mark.hex() for name, mark in self._keyring.revoked().items()}
            fresh = self._terms.node is None
            certificate = self._keyring.issue(node, request, now, self._terms.days, fresh=fresh)
        except DecaError as error:
            self._tell_of(host, error)
            return "", {"refusal": str(error)}
        self._secret = None
        return node, {"certificate": certificate.decode(), "node": node, "revoked": revoked}

    def _tell_of(self, host: str, error: DecaError) -> None:
        """Who came in vain; callers that come again and again do not fill a terminal."""
        if not self._lines.take("", time.monotonic()):
            self._untold += 1
            return
        more = f" (and {self._untold} callers before)" if self._untold else ""
        self._untold = 0
        self._tell(f"{host} was not let in: {error}{more}")

    def _check_secret(self, shown: bytes) -> None:
        good = self._secret is not None and self._clock() < self._expires
        if good and self._secret is not None and hmac.compare_digest(shown, self._secret):
            return
        self._wrong += good
        if self._wrong >= MAX_JOIN_ATTEMPTS and not self._done.done():
            self._secret = None
            self._done.set_exception(
                TrustError(
                    f"{self._wrong} callers had a wrong secret: somebody is guessing; invite "
                    "again when you know who"
                )
            )
        raise TrustError("this invitation has ended, or was never made here; ask for a new one")

    def _name(self, asked: str) -> str:
        wanted = self._terms.node
        if wanted is not None:
            if asked not in ("", wanted):
                raise TrustError(f"the invitation is for node {wanted!r}, not for {asked!r}")
            return wanted
        if not is_name(asked):
            raise TrustError(f"a node's name has {NAME_RULE}")
        if asked in self._keyring.revoked():
            raise TrustError(f"node {asked!r} was revoked for good; join with --node and another")
        return asked


def _request(line: bytes) -> tuple[bytes, str, bytes]:
    try:
        said = json.loads(line)
        return bytes.fromhex(said["secret"]), str(said["node"]), str(said["request"]).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise TrustError("not what a joining deca-node sends") from None


def _socket(host: str, port: int) -> socket.socket:
    """Where callers are waited for; ``::`` means all addresses of IPv4, too."""
    if host == "::" and socket.has_dualstack_ipv6():
        return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family)


def _send(writer: asyncio.StreamWriter, said: dict[str, Any]) -> None:
    writer.write(json.dumps(said).encode() + b"\n")


@dataclass(frozen=True)
class Joined:
    """What a joiner has become."""

    node: str
    keyring: Keyring


async def join(
    invitation: Invitation,
    node: str,
    open_keyring: Callable[[bytes], Keyring],
    addresses: Sequence[str],
    clock: Callable[[], float] = time.time,
) -> Joined:
    """Become a node of a run.

    Args:
        invitation: from the token.
        node: the name wished for.
        open_keyring: opens or makes the trust folder for an authority's certificate.
        addresses: where the inviter may be, HOST:PORT, tried in this order.
        clock: seconds since 1970.

    Raises:
        NobodyError: nobody answers there, or another.
        TrustError: it does not let us in.
    """
    if clock() >= invitation.expires:
        raise TrustError(
            "the invitation has expired by this machine's clock; ask for a new one, or set the "
            "clock (NTP)"
        )
    others: list[str] = []
    for address in addresses:
        try:
            authority = await _authority(address, invitation)
            keyring = open_keyring(authority)  # before the secret is spent
            key = identity.new_key()
            answer = await _ask(address, invitation, authority, node, identity.new_request(key))
        except _OtherError as error:
            others.append(f"{address}: {error}")
            continue
        return _take(keyring, invitation, key, answer)
    why = "; ".join(others[:MAX_TOKEN_ADDRESSES]) or "nobody answers"
    raise NobodyError(
        f"no inviter for run {invitation.run!r} was found ({why}); check that `deca-node swarm "
        "invite` is still waiting there, and give its address with --at HOST:PORT"
    )


async def _authority(address: str, invitation: Invitation) -> bytes:
    """The authority's certificate, as whoever waits there shows it. Nothing is sent.

    Raises:
        _OtherError: it shows none, or another's.
    """
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    try:
        reader, writer = await _connect(address, anybody, None)
        with contextlib.closing(writer):
            said = await _line(reader)
        authority = identity.alone(str(said["authority"]).encode())
        shown = identity.fingerprint(authority)
    except OSError as error:
        raise _OtherError(error.strerror or error or "no answer in time") from None
    except (KeyError, ValueError, RecursionError, TrustError):
        raise _OtherError("answers, but is no inviter") from None
    if shown != invitation.fingerprint:
        raise _OtherError("is not who made the invitation")
    return authority


async def _ask(
    address: str, invitation: Invitation, authority: bytes, node: str, request: bytes
) -> dict[str, Any]:
    """What the inviter answers; the secret goes to nobody else.

    Raises:
        _OtherError: it cannot be called again, or has only a copy of the authority's certificate.
        TrustError: the inviter does not let us in, or breaks off.
    """
    known = ssl.create_default_context(cadata=authority.decode())
    known.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        reader, writer = await _connect(address, known, pairing_name(invitation.run))
        try:
            await _line(reader)
        except OSError:
            writer.close()
            raise
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _TIMES:
            raise _OtherError(
                "the inviter's clock and this machine's differ too much; set the wrong one (NTP)"
            ) from None
        raise _OtherError("is not who made the invitation") from None
    except OSError as error:
        raise _OtherError(error.strerror or error or "no answer in time") from None
    with contextlib.closing(writer):
        try:
            said = {"secret": invitation.secret.hex(), "node": node, "request": request.decode()}
            _send(writer, said)
            answer = await _line(reader)
        except OSError:
            raise TrustError(f"{address}: has hung up; ask for a new invitation") from None
    if "refusal" in answer:
        raise TrustError(f"not let in: {printable(str(answer['refusal']))}")
    return answer


def _take(keyring: Keyring, invitation: Invitation, key: bytes, answer: dict[str, Any]) -> Joined:
    try:
        certificate, node = str(answer["certificate"]).encode(), str(answer["node"])
        revoked = {str(n): bytes.fromhex(mark) for n, mark in answer["revoked"].items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise TrustError("the inviter's answer is damaged; ask for a new invitation") from None
    identity.check_pair(key, certificate, keyring.authority)
    pair = Pair(key, certificate)
    if not is_name(node) or pair.says.holder != Holder(invitation.run, node, operator=False):
        raise TrustError("the inviter has certified somebody else; ask for a new invitation")
    if len(revoked) > MAX_REVOKED or not all(
        is_name(name) and identity.revokes(keyring.authority, name, mark)
        for name, mark in revoked.items()
    ):
        raise TrustError("the inviter's list of revoked nodes is not signed")
    keyring.keep_node(node, pair)
    if revoked:
        keyring.keep_revoked({**keyring.revoked(), **revoked})
    return Joined(node, keyring)


async def _connect(
    address: str, context: ssl.SSLContext, name: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        host, port = split(address)
    except ValueError as error:  # an invitation may name anything
        raise OSError(str(error)) from None
    async with asyncio.timeout(CONNECT_SECONDS):  # its TimeoutError is an OSError
        return await asyncio.open_connection(
            host,
            port,
            ssl=context,
            server_hostname=name or "",
            limit=MAX_JOIN_BYTES,
        )


async def _line(reader: asyncio.StreamReader) -> dict[str, Any]:
    async with asyncio.timeout(CONNECT_SECONDS):
        try:
            line = await reader.readline()
            if not line:
                raise OSError("has hung up: busy, try again")
            said = json.loads(line)
        except (ValueError, RecursionError):
            raise OSError("answers, but is no inviter") from None
    if not isinstance(said, dict):
        raise OSError("answers, but is no inviter")
    return said
