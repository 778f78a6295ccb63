"""All the ways by which a node looks for others of its run: addresses, DNS names, zeroconf."""

import asyncio
from functools import partial

from deca_node.config import Settings, Timing
from deca_node.discovery import Discovery, own_addresses
from deca_node.dns import NamedPeers
from deca_node.errors import ListenError
from deca_node.fingerprint import PROTOCOL_VERSION
from deca_node.swarm import Swarm


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
