"""HOST:PORT: which text is one, its two parts, and the two joined again. Pure.

Whatever calls takes more for a host than is meant here: gRPC takes schemes (``unix:``, ``dns:``)
and lists, the system's resolver takes ``127.1`` or ``0x7f000001`` for this machine. A text that a
peer, a name server or a person gives is therefore looked at in this one place.
"""

import ipaddress
import re

from deca_node.limits import MAX_ADDRESS_BYTES

# At most 63 bytes (RFC 1035). The underscore stands in no host name of the standards, but in many
# of container networks.
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
# A name that ends in one is an IPv4 address to some resolvers, and one in disguise at that.
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
# Which link an IPv6 address is meant on: an interface's name (15 bytes on Linux) or number.
_ZONE = re.compile(r"[A-Za-z0-9._-]{1,15}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")

# What callers on this machine use for a host to listen on that means all interfaces.
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def is_host(text: str) -> bool:
    """Whether it is an IP address, IPv6 without brackets, or a host name."""
    if len(text) > MAX_ADDRESS_BYTES or not text.isascii():
        return False
    bare, percent, zone = text.partition("%")
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        labels = text.removesuffix(".").split(".")
        return all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(labels[-1])
    return not percent or (version == 6 and _ZONE.fullmatch(zone) is not None)


def split(address: str) -> tuple[str, int]:
    """The host, of IPv6 without its brackets, and the port.

    Raises:
        ValueError: it is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if bracketed := host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    good = len(address) <= MAX_ADDRESS_BYTES and is_host(host) and (":" in host) == bracketed
    if not (good and _PORT.fullmatch(port) and int(port) < 65536):
        raise ValueError(f"{address!r} is not HOST:PORT with a port from 1 to 65535")
    return host, int(port)


def is_address(text: str) -> bool:
    """Whether it is a HOST:PORT that can be called."""
    try:
        split(text)
    except ValueError:
        return False
    return True


def checked_address(address: str) -> str:
    """The address of a node as it was given.

    Raises:
        ValueError: it is not HOST:PORT.
    """
    split(address)
    return address


def joined(host: str, port: int) -> str:
    """HOST:PORT, of IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def as_called_here(host: str) -> str:
    """What callers on this machine use for a host to listen on."""
    return _EVERYWHERE.get(host, host)


def is_own(host: str) -> bool:
    """Whether whoever calls the host reaches the machine that it calls from."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.removesuffix(".").lower()
        return name == "localhost" or name.endswith(".localhost")
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_loopback or address.is_unspecified
