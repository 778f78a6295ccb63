"""Finding contacts on the local network by multicast DNS: the only file that imports zeroconf.

Discovery proposes addresses; whether a peer is one is decided by meeting it.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import ifaddr
from zeroconf import (
    BadTypeInNameException,
    InterfaceChoice,
    IPVersion,
    NonUniqueNameException,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from deca_node.errors import ListenError
from deca_node.limits import MAX_SIGHTINGS

SERVICE_TYPE = "_deca._tcp.local."
RESOLVE_MS = 3000
# Addresses announced; a host with more interfaces should set node.advertise or node.host.
MAX_ADDRESSES = 8


def own_addresses(host: str) -> list[str]:
    """IP addresses to announce for a server that is called ``host`` or listens on it.

    Those of all interfaces when ``host`` means all, or is a name that only others can resolve.
    """
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104 - compares, binds nothing
        with contextlib.suppress(OSError):
            return [str(socket.getaddrinfo(host, None)[0][4][0])]
    found = [
        ip.ip
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if isinstance(ip.ip, str) and not ipaddress.ip_address(ip.ip).is_loopback
    ]
    return found[:MAX_ADDRESSES] or ["127.0.0.1"]


class Discovery:
    """Announces this node and proposes others of the same run.

    Args:
        run: only nodes of this run are proposed.
        node: this node's name.
        port: the one announced.
        protocol: version announced.
        addresses: IP addresses announced.
        interfaces: IP addresses of the interfaces to use; empty means all.
        browse_every: seconds between two fresh browsers; one browser asks only at 0, 1, 5 and
            14 s and never finds a service that was registered behind a partition.
        sighted: called with HOST:PORT of every node found.
    """

    def __init__(
        self,
        *,
        run: str,
        node: str,
        port: int,
        protocol: int,
        addresses: Sequence[str],
        interfaces: Sequence[str],
        browse_every: float,
        sighted: Callable[[str], None],
    ) -> None:
        self._run = run
        self._browse_every = browse_every
        self._sighted = sighted
        self._interfaces = list(interfaces)
        # DNS labels hold 63 bytes; the digest keeps equal names of different runs apart.
        digest = hashlib.sha256(f"{run}/{node}/{port}/{addresses}".encode()).hexdigest()[:8]
        self._info = AsyncServiceInfo(
            SERVICE_TYPE,
            f"{node}-{digest}.{SERVICE_TYPE}",
            port=port,
            parsed_addresses=list(addresses),
            properties={"node": node, "run": run, "port": str(port), "version": str(protocol)},
            server=f"{node}-{digest}.local.",
        )
        self._zeroconf: AsyncZeroconf | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._known: set[str] = set()

    async def start(self) -> None:
        """Announce and browse from now on.

        Raises:
            ListenError: the interface is unknown or multicast cannot be used on it.
        """
        try:
            self._zeroconf = AsyncZeroconf(
                interfaces=self._interfaces or InterfaceChoice.All, ip_version=IPVersion.V4Only
            )
            # Probing for the name takes 1.6 s and its digest makes it unique.
            registered = await self._zeroconf.async_register_service(
                self._info, cooperating_responders=True
            )
            self._keep(registered)
        except (OSError, ValueError, NonUniqueNameException, BadTypeInNameException) as error:
            await self.stop()
            raise ListenError(
                f"zeroconf cannot be used ({error}); set network.interfaces, or network.zeroconf = "
                "false with network.static_peers"
            ) from None
        self._keep(asyncio.create_task(self._browse()))

    async def stop(self) -> None:
        """Withdraw the announcement and stop browsing."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._zeroconf is not None:
            zeroconf, self._zeroconf = self._zeroconf, None
            # Withdrawing sends its goodbyes over half a second; a stuck socket must not hold
            # the shutdown up.
            with contextlib.suppress(TimeoutError, OSError):
                await asyncio.wait_for(zeroconf.async_unregister_all_services(), 1.5)
            await zeroconf.async_close()

    async def _browse(self) -> None:
        while self._zeroconf is not None:
            browser = AsyncServiceBrowser(
                self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change]
            )
            try:
                await asyncio.sleep(self._browse_every)
            finally:
                await browser.async_cancel()

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._known.discard(name)
        elif name != self._info.name and len(self._known) < MAX_SIGHTINGS:
            self._known.add(name)
            self._keep(asyncio.create_task(self._resolve(zeroconf, service_type, name)))

    async def _resolve(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        info = AsyncServiceInfo(service_type, name)
        if not await info.async_request(zeroconf, RESOLVE_MS) or info.port is None:
            return
        if info.properties.get(b"run") != self._run.encode():
            return
        for address in info.parsed_addresses(IPVersion.V4Only)[:MAX_ADDRESSES]:
            self._sighted(f"{address}:{info.port}")

    def _keep(self, task: Any) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
