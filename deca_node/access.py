"""Which nodes a person's verb asks, and with what: certificates where a node wants them."""

import asyncio
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path

from deca_node import identity, registry
from deca_node.addresses import checked_address, split
from deca_node.config import default_trust_folder
from deca_node.errors import ConfigError, TrustError, UnreachableError
from deca_node.guard import Visitor
from deca_node.keyring import Keyring
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink
from deca_node.transport.connection import Credentials

PROBE_SECONDS = 3.0
ASKED_IN_PLAIN_TEXT = "asked in PLAIN TEXT: anyone on the network path can answer for the node"


def targets(given: str | None) -> list[str]:
    """Where the node that was given is called, or where this machine's are.

    Raises:
        ConfigError: as of ``named``.
        UnreachableError: none was given, and no node runs here; or none of that name does.
    """
    if given is not None:
        return [named(given)]
    found = [entry.target for entry in registry.local_nodes()]
    if not found:
        raise UnreachableError("no node runs on this machine; give HOST:PORT of one elsewhere")
    return found


def named(given: str) -> str:
    """Where a node is called: NODE or RUN/NODE of this machine, or any HOST:PORT.

    Raises:
        ConfigError: several nodes here are called so, or it is not HOST:PORT.
        UnreachableError: it is a name, and no node of that name runs here.
    """
    here = registry.local_nodes()
    found = [e for e in here if given in (e.node, f"{e.run}/{e.node}", e.address)]
    if len(found) > 1:
        names = ", ".join(f"{entry.run}/{entry.node} at {entry.address}" for entry in found)
        raise ConfigError(
            f"{given}: several nodes have this name: {names}; give RUN/NODE or the address"
        )
    if found:
        return found[0].target
    if ":" not in given:
        raise UnreachableError(
            f"{given}: no node of that name runs on this machine; `deca-node status` lists "
            "those that do; give HOST:PORT for one on another machine"
        )
    try:
        return checked_address(given)
    except ValueError as error:
        raise ConfigError(str(error)) from None


async def credentials(
    addresses: Iterable[str], trust: Path | None = None
) -> dict[str, Credentials]:
    """What to show at each address; those that answer in plain text are left out.

    Args:
        addresses: HOST:PORT each.
        trust: the trust folder to use everywhere, whatever answers; None finds out for each.

    Raises:
        TrustError: a node wants a certificate, and there is none here.
        UnreachableError: something else answers.
    """
    addresses = [each for each in addresses if not each.startswith("unix:")]  # asks for none
    if trust is not None:
        shown = Visitor(Keyring(trust)).credentials()
        return dict.fromkeys(addresses, shown)
    here = {entry.address: entry.trust for entry in registry.local_nodes()}
    found = {}
    for address in addresses:
        if address in here:
            folder = Path(here[address]) if here[address] else None
        else:
            folder = await _folder(address)
        if folder is not None:
            found[address] = Visitor(Keyring(folder)).credentials()
    return found


def is_plain(address: str, shown: Mapping[str, Credentials]) -> bool:
    """Whether a node is asked over the network without certificates: anybody may answer for it.

    Args:
        address: HOST:PORT, or a socket file, which its user alone can open.
        shown: what ``credentials`` found.
    """
    return address not in shown and not address.startswith("unix:")


def as_asked(now: pb.NodeStatus, address: str, shown: Mapping[str, Credentials]) -> pb.NodeStatus:
    """A node's status; arguments as of ``is_plain``.

    Where its certificate was not seen, this end's word is in the place of what it says of it.
    """
    if is_plain(address, shown):
        now.security, now.certificate_ends = ASKED_IN_PLAIN_TEXT, 0.0
    return now


async def link(address: str, trust: Path | None = None) -> GrpcLink:
    """A link that shows what is wanted there; arguments and errors as of ``credentials``."""
    shown = await credentials([address], trust)
    return GrpcLink(address, credentials=shown.get(address))


async def _folder(address: str) -> Path | None:
    """The trust folder for a node elsewhere: this machine's of the run that its certificate names.

    The usual one or one that a node here uses, the operator's before others.

    The name is not believed for more than that: the folder's authority decides who answers.
    """
    shown = await _certificate(address)
    if shown is None:
        return None
    try:
        holder = identity.read(identity.to_pem(shown)).holder
    except Exception:  # noqa: BLE001 - what a stranger puts into one may raise what we know nothing of
        holder = None
    if holder is None:
        raise UnreachableError(f"{address}: answers under TLS, but not as a deca-node")
    usual = default_trust_folder(holder.run)
    nodes = [entry for entry in registry.local_nodes() if entry.run == holder.run and entry.trust]
    folders = [each for each in (usual, *(Path(node.trust) for node in nodes)) if each.exists()]
    if not folders:
        raise TrustError(
            f"{address}: is a node of run {holder.run!r} and answers its members only; give its "
            f"trust folder with --trust, or have one in {usual}"
        )
    return next((each for each in folders if Keyring(each).has_operator), folders[0])


async def _certificate(address: str) -> bytes | None:
    """What whoever answers shows (DER); None when it does not speak TLS, or nobody answers."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    anybody.set_alpn_protocols(["h2"])
    try:
        host, port = split(address)
        async with asyncio.timeout(PROBE_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=anybody, server_hostname="")
    except (OSError, ValueError):  # the latter of a name that cannot be one
        return None
    shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return shown
