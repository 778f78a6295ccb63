"""Finding contacts on the local network by multicast DNS: the only file that imports zeroconf.

Discovery proposes addresses; whether a peer is one is decided by meeting it.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import ifaddr
import psutil
import structlog
from zeroconf import (
    BadTypeInNameException,
    InterfaceChoice,
    IPVersion,
    NonUniqueNameException,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from deca_node.addresses import joined
from deca_node.errors import ListenError
from deca_node.limits import MAX_SIGHTINGS

# It warns, with a traceback, of sockets whose interface went away; discovery begins anew then.
logging.getLogger("zeroconf").setLevel(logging.ERROR)

SERVICE_TYPE = "_deca._tcp.local."
RESOLVE_MS = 3000
# Withdrawing sends goodbyes over half a second; a stuck socket must not hold anybody longer.
WITHDRAW_SECONDS = 1.5
# Kinds of failure told of: each new text of one defect would be one more.
MAX_TOLD = 8
# Addresses announced; a host with more interfaces should set node.advertise or node.host.
MAX_ADDRESSES = 8

_log = structlog.get_logger(__name__)

# Where multicast DNS lives (RFC 6762, 3).
MDNS_GROUP, MDNS_PORT = "224.0.0.251", 5353
# What a host sends to the group comes back to it at once, or never.
LOOP_SECONDS = 1.0
# A question for our service, as it goes over the wire: one question of type PTR, class IN.
_QUESTION = bytes.fromhex("000000000001000000000000") + b"\5_deca\4_tcp\5local\0\0\x0c\0\1"

# What zeroconf raises where it cannot be used; RuntimeError: no interface at all.
_TROUBLE = (OSError, ValueError, RuntimeError, NonUniqueNameException, BadTypeInNameException)


def own_addresses(host: str) -> list[str]:
    """IP addresses to announce for a server that is called ``host`` or listens on it.

    Those of all interfaces when ``host`` means all, or is a name that only others can resolve; of
    IPv6 only where ``host`` means that, too, and behind those of IPv4, which more networks carry.
    """
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104 - compares, binds nothing
        with contextlib.suppress(OSError):
            return [str(socket.getaddrinfo(host, None)[0][4][0])]
    every = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    found = [ipaddress.ip_address(at) for at in every if isinstance(at, str)]
    if host == "::":
        wide = [ipaddress.ip_address(at[0]) for at in every if not isinstance(at, str)]
        found += [at for at in wide if not at.is_link_local]  # which names no link here
    shown = [str(at) for at in found if not at.is_loopback]
    return shown[:MAX_ADDRESSES] or ["::1" if host == "::" else "127.0.0.1"]


def multicast_addresses(interfaces: Sequence[str]) -> list[str]:
    """The interfaces that others could hear us on: the chosen ones, or all but the loopback."""
    return list(interfaces) or own_addresses("")


def loops_back(address: str) -> bool:
    """Whether a multicast DNS packet sent on the interface of an IPv4 address is heard on it.

    Where not even the sender hears it, nobody does: the interface has no multicast, or a firewall
    drops it. Takes up to a second.
    """
    if _without_multicast(address):
        return False
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth,
        ):
            here = socket.inet_aton(address)
            ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):  # as zeroconf does, to share the port with it
                ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            ear.bind(("", MDNS_PORT))
            group = socket.inet_aton(MDNS_GROUP) + here
            ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            mouth.bind((address, 0))
            mouth.sendto(_QUESTION, (MDNS_GROUP, MDNS_PORT))
            limit = time.monotonic() + LOOP_SECONDS
            while (left := limit - time.monotonic()) > 0:
                ear.settimeout(left)
                if ear.recvfrom(9000)[1] == mouth.getsockname():
                    return True
    except OSError:
        pass
    return False


def _without_multicast(address: str) -> bool:
    """Whether the interface is marked so: Linux loops packets back all the same."""
    stats = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if address in {one.address for one in addresses} and name in stats:
            flags = stats[name].flags.split(",")  # empty where the system tells none
            return flags != [""] and not {"multicast", "loopback"} & set(flags)
    return False


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
        addresses_now: asked before every fresh browser, in a thread; when it no longer gives the
            announced addresses (a cable, another Wi-Fi), all is announced anew. None where what is
            announced does not depend on this machine's interfaces.

    Attributes:
        heard_itself: what was sent on one of its interfaces was heard there by this node.
        heard_others: an announcement of another node, of any run, came by multicast.
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
        addresses_now: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self.heard_itself = self.heard_others = False
        self._run, self._node, self._port, self._protocol = run, node, port, protocol
        self._browse_every = browse_every
        self._sighted = sighted
        self._interfaces = list(interfaces)
        self._addresses = list(addresses)
        self._addresses_now = addresses_now
        self._info = self._announcement()
        self._zeroconf: AsyncZeroconf | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._known: set[str] = set()  # names that this browser has told of
        self._resolving: set[str] = set()
        self._told: set[str] = set()  # what has failed, each kind once

    def _announcement(self) -> AsyncServiceInfo:
        run, node, port = self._run, self._node, self._port
        # DNS labels hold 63 bytes; the digest keeps equal names of different runs apart.
        digest = hashlib.sha256(f"{run}/{node}/{port}/{self._addresses}".encode()).hexdigest()[:8]
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{node}-{digest}.{SERVICE_TYPE}",
            port=port,
            parsed_addresses=self._addresses,
            properties={
                "node": node,
                "run": run,
                "port": str(port),
                "version": str(self._protocol),
            },
            server=f"{node}-{digest}.local.",
        )

    async def start(self) -> None:
        """Announce and browse from now on.

        Raises:
            ListenError: the interface is unknown or multicast cannot be used on it.
        """
        try:
            await self._announce()
        except _TROUBLE as error:
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
        await self._withdraw()

    async def _announce(self) -> None:
        self._zeroconf = AsyncZeroconf(
            interfaces=self._interfaces or InterfaceChoice.All, ip_version=IPVersion.V4Only
        )
        # Probing for the name takes 1.6 s and its digest makes it unique.
        registered = await self._zeroconf.async_register_service(
            self._info, cooperating_responders=True
        )
        self._keep(registered)

    async def _withdraw(self) -> None:
        if self._zeroconf is not None:
            zeroconf, self._zeroconf = self._zeroconf, None
            try:
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(WITHDRAW_SECONDS):
                        await zeroconf.async_unregister_all_services()
            finally:  # whatever else it raises: sockets that stay open run out
                await zeroconf.async_close()

    async def _browse(self) -> None:
        while True:
            for part in (self._follow, self._listen_for_itself, self._look):
                try:
                    await part()
                except Exception as error:  # noqa: BLE001 - it may work again later, as on a new Wi-Fi
                    if (kind := repr(error)) not in self._told and len(self._told) < MAX_TOLD:
                        self._told.add(kind)
                        _log.warning(
                            "discovery failed, trying again",
                            reason=kind,
                            exc_info=not isinstance(error, _TROUBLE),
                        )
                    if part == self._look:
                        await asyncio.sleep(self._browse_every)

    async def _look(self) -> None:
        """See who is there, with a fresh browser."""
        if self._zeroconf is None:
            await asyncio.sleep(self._browse_every)
            return
        # It tells of all names anew, and nobody tells of those that went away before it.
        self._known.clear()
        browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._on_change]
        )
        try:
            await asyncio.sleep(self._browse_every)
        finally:
            await browser.async_cancel()

    async def _listen_for_itself(self) -> None:
        """Asked of the interfaces one by one: zeroconf hears itself on the loopback in any case."""
        if not self.heard_itself:
            places = await asyncio.to_thread(multicast_addresses, self._interfaces)
            heard = await asyncio.gather(*(asyncio.to_thread(loops_back, at) for at in places))
            self.heard_itself = any(heard)

    async def _follow(self) -> None:
        """Announce anew where this machine's addresses have changed: sockets are bound to them."""
        if self._addresses_now is None:
            return
        found = list(await asyncio.to_thread(self._addresses_now))
        if found == self._addresses and self._zeroconf is not None:
            return
        if found != self._addresses:
            _log.warning("addresses changed, announcing anew", was=self._addresses, now=found)
        self._addresses = found
        self._info = self._announcement()
        await self._withdraw()
        try:
            await self._announce()
        except Exception as error:
            await self._withdraw()  # so that it is tried again before the next browser
            if not isinstance(error, _TROUBLE):
                raise
            _log.debug("not announced yet", reason=str(error))

    def _on_change(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._known.discard(name)
        elif name != self._info.name and (name in self._known or len(self._known) < MAX_SIGHTINGS):
            self.heard_others = True
            self._known.add(name)
            if name not in self._resolving:  # which takes the latest that is announced
                self._resolving.add(name)
                task = asyncio.create_task(self._resolve(zeroconf, service_type, name))
                task.add_done_callback(lambda _: self._resolving.discard(name))
                self._keep(task)

    async def _resolve(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        for address in await _addresses_of(zeroconf, service_type, self._run, name):
            self._sighted(address)

    def _keep(self, task: Any) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _addresses_of(zeroconf: Zeroconf, service_type: str, run: str, name: str) -> list[str]:
    """Where the service of a run is that has this name; nowhere within RESOLVE_MS, or ever.

    Anybody may announce a name, also one that cannot be of this type.
    """
    try:
        info = AsyncServiceInfo(service_type, name)
        heard = await info.async_request(zeroconf, RESOLVE_MS)
    except _TROUBLE:
        return []
    if not heard or not info.port or info.properties.get(b"run") != run.encode():
        return []
    return _announced(info)


def _announced(info: AsyncServiceInfo) -> list[str]:
    """Where a service is, HOST:PORT: its addresses of both protocols that can be called."""
    # Scoped: one of IPv6 that holds on a link alone cannot be called without the link.
    found = [at for at in info.parsed_scoped_addresses(IPVersion.All) if not _lacks_link(at)]
    return [joined(at, info.port or 0) for at in found[:MAX_ADDRESSES]]


def _lacks_link(address: str) -> bool:
    at = ipaddress.ip_address(address)
    return isinstance(at, ipaddress.IPv6Address) and at.is_link_local and not at.scope_id


# Invitations

JOIN_TYPE = "_deca-join._tcp.local."


@contextlib.asynccontextmanager
async def inviting(run: str, port: int, addresses: Sequence[str]) -> AsyncGenerator[None]:
    """Announce an invitation; where multicast does not work, its token must say where it is."""
    digest = hashlib.sha256(f"{run}/{port}/{addresses}".encode()).hexdigest()[:8]
    info = AsyncServiceInfo(
        JOIN_TYPE,
        f"{run}-{digest}.{JOIN_TYPE}",
        port=port,
        parsed_addresses=list(addresses),
        properties={"run": run},
        server=f"{run}-{digest}.local.",
    )
    zeroconf = None
    try:
        zeroconf = AsyncZeroconf(ip_version=IPVersion.V4Only)
        await zeroconf.async_register_service(info, cooperating_responders=True)
    except _TROUBLE as error:
        _log.debug("the invitation is not announced", reason=str(error))
    try:
        yield
    finally:
        if zeroconf is not None:
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()


async def inviters(run: str, seconds: float) -> list[str]:
    """Where invitations to a run are announced, HOST:PORT; looks for so long."""
    found: list[str] = []
    names: dict[str, None] = {}  # as they came

    def seen(*, name: str, state_change: ServiceStateChange, **_: Any) -> None:
        if state_change is not ServiceStateChange.Removed and len(names) < MAX_SIGHTINGS:
            names[name] = None

    try:
        zeroconf = AsyncZeroconf(ip_version=IPVersion.V4Only)
    except _TROUBLE:
        return []
    browser = AsyncServiceBrowser(zeroconf.zeroconf, JOIN_TYPE, handlers=[seen])
    try:
        await asyncio.sleep(seconds)
        # All at once: names of which nobody knows an address must not hold up the others.
        asked = [
            asyncio.create_task(_addresses_of(zeroconf.zeroconf, JOIN_TYPE, run, name))
            for name in names
        ]
        for invited in await asyncio.gather(*asked):
            found += invited
    finally:
        await browser.async_cancel()
        await zeroconf.async_close()
    return found
