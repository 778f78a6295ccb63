"""All the ways by which a node looks for others of its run: addresses, DNS names, zeroconf."""

import asyncio
import errno
import socket
from functools import partial
from ipaddress import ip_address

from deca_node.config import NetworkSettings, Settings, Timing
from deca_node.discovery import Discovery, own_addresses
from deca_node.dns import NamedPeers
from deca_node.errors import ListenError
from deca_node.fingerprint import PROTOCOL_VERSION
from deca_node.swarm import Swarm


def check_interfaces(network: NetworkSettings) -> None:
    """Look whether zeroconf could use the interfaces that it is to use; takes no time.

    Raises:
        ListenError: one of them is no address of this machine; it is named.
    """
    for address in network.interfaces if network.zeroconf else ():
        if not _is_own(address):
            raise ListenError(
                f"network.interfaces: {address} is not an IP address of this machine; give some "
                "that are, or none for all, or set network.zeroconf = false with "
                "network.static_peers"
            )


def _is_own(address: str) -> bool:
    try:
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except ValueError:
        return False
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


class Search:
    """Proposes to a swarm whom it finds, until it is stopped.

    Addresses and names are looked at from now on, zeroconf once ``start`` is done.

    Args:
        settings: of the node.
        timing: how often to look.
        port: at which others call this node.
        swarm: greets who is found.

    Attributes:
        discovery: zeroconf; None where it is off, or has not been started.
        named: who follows network.dns_peers.
    """

    def __init__(self, settings: Settings, timing: Timing, port: int, swarm: Swarm) -> None:
        self._settings, self._timing, self._port, self._swarm = settings, timing, port, swarm
        for address in settings.network.static_peers:
            swarm.propose(address, lasting=True)
        self.named = NamedPeers(settings.network.dns_peers, timing.browse, swarm.propose)
        self.discovery: Discovery | None = None

    async def start(self) -> None:
        """Announce this node by zeroconf and browse for others, where that is wanted.

        Raises:
            ListenError: this machine cannot; addresses and names are looked at all the same.
        """
        node, network = self._settings.node, self._settings.network
        if not network.zeroconf:
            return
        check_interfaces(network)
        try:
            addresses = await asyncio.to_thread(own_addresses, node.advertise or node.host)
        except OSError as error:
            raise ListenError(
                f"zeroconf cannot be used (this machine's addresses: {error}); set node.advertise,"
                " or network.zeroconf = false with network.static_peers"
            ) from None
        discovery = Discovery(
            run=self._settings.run.name,
            node=node.name,
            port=self._port,
            protocol=PROTOCOL_VERSION,
            addresses=addresses,
            addresses_now=None if node.advertise else partial(own_addresses, node.host),
            interfaces=network.interfaces,
            browse_every=self._timing.browse,
            sighted=self._swarm.sighted,
        )
        await discovery.start()
        self.discovery = discovery

    async def stop(self) -> None:
        """Look no more, and take back what was announced."""
        await self.named.stop()
        if self.discovery is not None:
            await self.discovery.stop()
