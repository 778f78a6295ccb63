"""Real multicast DNS on the loopback interface."""

import asyncio
import errno
import uuid
from types import SimpleNamespace

import pytest
from zeroconf import ServiceStateChange

from deca_node import discovery as discovery_module
from deca_node.addresses import is_address
from deca_node.config import load
from deca_node.discovery import Discovery, inviters, inviting, loops_back, own_addresses
from deca_node.errors import ListenError
from deca_node.search import Search

PATIENCE = 30.0  # a bound on failure; multicast answers within two seconds


def discovery(
    run,
    node,
    port,
    sighted,
    browse_every=3.0,
    interfaces=("127.0.0.1",),
    now=None,
    addresses=("127.0.0.1",),
):
    return Discovery(
        run=run,
        node=node,
        port=port,
        protocol=1,
        addresses=addresses,
        interfaces=interfaces,
        browse_every=browse_every,
        sighted=sighted,
        addresses_now=now,
    )


class Sightings:
    """Remembers addresses and lets a test wait for one."""

    def __init__(self):
        self.addresses = set()
        self.changed = asyncio.Event()

    def __call__(self, address):
        self.addresses.add(address)
        self.changed.set()

    async def until(self, address):
        async with asyncio.timeout(PATIENCE):
            while address not in self.addresses:
                self.changed.clear()
                await self.changed.wait()


async def test_nodes_of_one_run_find_each_other_and_nobody_else():
    """Whoever came first, both are told of the other, never of themselves or another run."""
    run, seen = f"run-{uuid.uuid4().hex[:8]}", [Sightings() for _ in range(3)]
    nodes = [
        discovery(run, "a", 7001, seen[0]),
        discovery("elsewhere", "x", 7003, seen[2]),
        discovery(run, "b", 7002, seen[1]),
    ]
    try:
        for node in nodes:
            await node.start()
        await seen[0].until("127.0.0.1:7002")
        await seen[1].until("127.0.0.1:7001")
    finally:
        for node in nodes:
            await node.stop()
    assert seen[0].addresses == {"127.0.0.1:7002"}
    assert seen[1].addresses == {"127.0.0.1:7001"}
    assert seen[2].addresses == set()


async def test_addresses_of_both_protocols_are_proposed():
    """In brackets where they must be; one of a link alone only with the link."""
    run, here = f"run-{uuid.uuid4().hex[:8]}", ["192.0.2.2", "fd00::2", "fe80::2"]
    seen = Sightings()
    first = discovery(run, "a", 7001, seen, addresses=["fd00::1"])
    second = discovery(run, "b", 7002, Sightings(), addresses=here)
    try:
        await first.start()
        await second.start()
        await seen.until("[fd00::2]:7002")
        await seen.until("192.0.2.2:7002")
        assert not [at for at in seen.addresses if at.startswith("[fe80") and "%" not in at]
        assert all(map(is_address, seen.addresses))
    finally:
        await first.stop()
        await second.stop()


async def test_an_address_of_a_link_is_proposed_with_the_link():
    """As the packet that told it came by one."""
    sighted = Sightings()
    node = discovery("run", "a", 7001, sighted)

    class Info:
        port, properties = 7002, {b"run": b"run"}

        def __init__(self, service_type, name):
            pass

        async def async_request(self, zeroconf, timeout):
            return True

        def parsed_scoped_addresses(self, version):
            return ["fe80::2%3", "fe80::3"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery_module, "AsyncServiceInfo", Info)
        await node._resolve(None, "", "b")
    assert sighted.addresses == {"[fe80::2%3]:7002"}


async def test_a_node_is_sighted_again_by_every_fresh_browser():
    """Re-browsing finds what an earlier browser saw or missed."""
    run, seen = f"run-{uuid.uuid4().hex[:8]}", Sightings()
    first = discovery(run, "a", 7001, seen, browse_every=0.5)
    second = discovery(run, "b", 7002, Sightings())
    try:
        await first.start()
        await second.start()
        await seen.until("127.0.0.1:7002")
        seen.addresses.clear()  # as a contact that was given up
        await seen.until("127.0.0.1:7002")
    finally:
        await first.stop()
        await second.stop()


async def test_a_node_whose_addresses_change_announces_itself_anew():
    """Another cable, another Wi-Fi: those that browse are told of the new address."""
    run, seen = f"run-{uuid.uuid4().hex[:8]}", Sightings()
    addresses = ["127.0.0.1"]
    watching = discovery(run, "a", 7001, seen, browse_every=0.5)
    moving = discovery(run, "b", 7002, Sightings(), browse_every=0.5, now=lambda: list(addresses))
    try:
        await watching.start()
        await moving.start()
        await seen.until("127.0.0.1:7002")
        addresses[:] = ["127.0.0.2"]
        await seen.until("127.0.0.2:7002")
        seen.addresses.clear()
        await seen.until("127.0.0.2:7002")
        assert "127.0.0.1:7002" not in seen.addresses  # the old announcement was withdrawn
    finally:
        await watching.stop()
        await moving.stop()


async def test_an_interface_that_goes_away_is_taken_up_again_when_it_is_back(monkeypatch):
    """While it is gone nothing is announced, and nothing breaks."""
    run, seen = f"run-{uuid.uuid4().hex[:8]}", Sightings()
    addresses, tried = ["127.0.0.1"], asyncio.Event()
    watching = discovery(run, "a", 7001, seen, browse_every=0.5)
    moving = discovery(run, "b", 7002, Sightings(), browse_every=0.2, now=lambda: list(addresses))
    real = discovery_module.AsyncZeroconf

    def gone(**_):
        tried.set()
        raise OSError("no such device")

    try:
        await watching.start()
        await moving.start()
        await seen.until("127.0.0.1:7002")
        monkeypatch.setattr(discovery_module, "AsyncZeroconf", gone)
        addresses[:] = ["127.0.0.2"]
        await asyncio.wait_for(tried.wait(), PATIENCE)
        monkeypatch.setattr(discovery_module, "AsyncZeroconf", real)
        await seen.until("127.0.0.2:7002")
    finally:
        await watching.stop()
        await moving.stop()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (discovery_module, "own_addresses"),
        (discovery_module.psutil, "net_if_stats"),
        (discovery_module, "AsyncServiceBrowser"),
        (discovery_module.AsyncZeroconf, "async_close"),
        (discovery_module.AsyncZeroconf, "async_register_service"),
    ],
)
async def test_what_fails_once_does_not_end_discovery(monkeypatch, where, name):
    """Too many open files, a lost interface, no thread: it goes on when that is over."""
    run, seen, failed = f"run-{uuid.uuid4().hex[:8]}", Sightings(), asyncio.Event()
    loop, real = asyncio.get_running_loop(), getattr(where, name)
    addresses = ["127.0.0.1"]
    watching = discovery(
        run, "a", 7001, seen, 0.1, now=lambda: discovery_module.own_addresses(addresses[0])
    )
    other = discovery(run, "b", 7002, Sightings())

    def fails(*_, **__):
        loop.call_soon_threadsafe(failed.set)
        raise LookupError("trouble")

    try:
        await watching.start()
        monkeypatch.setattr(where, name, fails)
        watching.heard_itself = False
        addresses[:] = ["127.0.0.2"]
        await asyncio.wait_for(failed.wait(), PATIENCE)
        monkeypatch.setattr(where, name, real)
        await other.start()
        await seen.until("127.0.0.1:7002")
    finally:
        await watching.stop()
        await other.stop()


@pytest.mark.parametrize("name", ["x._http._tcp.local.", "\0._deca._tcp.local.", "."])
async def test_a_name_that_cannot_be_one_is_passed_over(name):
    """Whoever is on the network may announce it; it neither fills the log nor ends a search."""
    watching = discovery(f"run-{uuid.uuid4().hex[:8]}", "a", 7001, Sightings())
    await watching.start()
    try:
        zeroconf = watching._zeroconf.zeroconf
        await watching._resolve(zeroconf, discovery_module.SERVICE_TYPE, name)
        join_type = discovery_module.JOIN_TYPE
        assert await discovery_module._addresses_of(zeroconf, join_type, "bbc", name) == []
    finally:
        await watching.stop()


async def test_a_node_hears_its_own_announcement_where_multicast_works():
    """And that of others."""
    run, seen = f"run-{uuid.uuid4().hex[:8]}", Sightings()
    first = discovery(run, "a", 7001, seen, browse_every=0.5)
    second = discovery(run, "b", 7002, seen, browse_every=0.5)
    assert not first.heard_itself
    try:
        await first.start()
        await second.start()
        async with asyncio.timeout(PATIENCE):
            while not (first.heard_itself and first.heard_others):
                await asyncio.sleep(0.05)
    finally:
        await first.stop()
        await second.stop()


async def test_it_does_not_go_deaf_when_many_names_have_come_and_gone(monkeypatch):
    """Who went away behind a change of addresses was never said to; each browser begins anew."""
    monkeypatch.setattr(discovery_module, "MAX_SIGHTINGS", 3)
    there, resolved = [], asyncio.Queue()
    told = iter([["a", "b", "c", "d"], ["e", "f", "a", "a"], ["g"]])

    class Browser:
        def __init__(self, zeroconf, service_type, handlers):
            there[:] = next(told, [])
            for name in there:
                handlers[0](zeroconf, service_type, name, ServiceStateChange.Added)

        async def async_cancel(self):
            pass

    async def resolve(self, zeroconf, service_type, name):
        resolved.put_nowait(name)

    monkeypatch.setattr(discovery_module, "AsyncServiceBrowser", Browser)
    monkeypatch.setattr(Discovery, "_resolve", resolve)
    node = discovery(f"run-{uuid.uuid4().hex[:8]}", "x", 7001, Sightings(), browse_every=0.01)
    try:
        await node.start()
        async with asyncio.timeout(PATIENCE):
            names = [await resolved.get() for _ in range(7)]
    finally:
        await node.stop()
    assert names == ["a", "b", "c", "e", "f", "a", "g"]  # one question a name at a time


async def test_in_a_full_table_a_known_name_is_asked_for_again(monkeypatch):
    """It may have other addresses now."""
    monkeypatch.setattr(discovery_module, "MAX_SIGHTINGS", 1)
    resolved = []

    async def resolve(self, zeroconf, service_type, name):
        resolved.append(name)

    monkeypatch.setattr(Discovery, "_resolve", resolve)
    node = discovery("run", "x", 7001, Sightings())
    changes = ServiceStateChange.Added, ServiceStateChange.Updated
    for name, change in (("a", changes[0]), ("b", changes[0]), ("a", changes[1])):
        node._on_change(None, "", name, change)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert resolved == ["a", "a"]


def test_an_interface_that_hears_what_it_sends():
    """The loopback does; an address that no interface has does not."""
    assert loops_back("127.0.0.1")
    assert not loops_back("203.0.113.9")


def test_an_interface_without_multicast_hears_nothing(monkeypatch):
    """What the system says of it counts: Linux would loop the packet back."""
    flags = SimpleNamespace(flags="up,running")
    monkeypatch.setattr(discovery_module.psutil, "net_if_stats", lambda: {"tun0": flags})
    at = SimpleNamespace(address="127.0.0.1")
    monkeypatch.setattr(discovery_module.psutil, "net_if_addrs", lambda: {"tun0": [at]})
    assert not loops_back("127.0.0.1")
    flags.flags = "up,running,multicast"
    assert loops_back("127.0.0.1")


async def test_an_unknown_interface_is_one_clear_error():
    """The message names the setting to change."""
    lost = discovery("run", "a", 7001, Sightings(), interfaces=("203.0.113.9",))
    with pytest.raises(ListenError, match=r"network\.interfaces"):
        await lost.start()


async def test_a_machine_that_cannot_tell_its_addresses_is_one_clear_error(monkeypatch):
    """Addresses and names that the node was given are called all the same."""

    def refused():
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(discovery_module.ifaddr, "get_adapters", refused)
    given = ["model.path=m", "data.train=d", 'network.static_peers=["10.0.0.2:7000"]']
    settings, proposed = load(None, given), []
    swarm = SimpleNamespace(propose=lambda address, **_: proposed.append(address))
    search = Search(settings, settings.timing(), 7001, swarm)
    with pytest.raises(ListenError, match=r"addresses: .*not permitted.*set node\.advertise"):
        await search.start()
    assert proposed == ["10.0.0.2:7000"]
    await search.stop()


def test_addresses_to_announce(monkeypatch):
    """A host that is one address is announced as such; all interfaces are without loopback."""
    many = ["127.0.0.1", ("::1", 0, 0), ("fd00::2", 0, 0), ("fe80::2", 0, 2), "192.0.2.2"]
    for given, narrow, wide in (
        (many, ["192.0.2.2"], ["192.0.2.2", "fd00::2"]),
        (many[:2], ["127.0.0.1"], ["::1"]),
    ):
        adapter = SimpleNamespace(ips=[SimpleNamespace(ip=at) for at in given])
        with monkeypatch.context() as patched:
            patched.setattr(discovery_module.ifaddr, "get_adapters", lambda found=adapter: [found])
            assert own_addresses("0.0.0.0") == narrow
            assert own_addresses("::") == wide
    assert own_addresses("127.0.0.1") == ["127.0.0.1"]
    everywhere = own_addresses("0.0.0.0")
    assert own_addresses("only-outsiders-know.invalid") == everywhere
    assert everywhere
    assert everywhere == ["127.0.0.1"] or not any(a.startswith("127.") for a in everywhere)


@pytest.mark.parametrize(
    ("address", "at"), [("127.0.0.1", "127.0.0.1:7009"), ("fd00::1", "[fd00::1]:7009")]
)
async def test_an_invitation_is_found_by_who_joins_that_run(address, at):
    """And by nobody of another; an address of IPv6 is in brackets."""
    run = f"inv-{uuid.uuid4().hex[:8]}"
    async with inviting(run, 7009, [address]), asyncio.timeout(PATIENCE):
        while not (found := await inviters(run, 0.5)):
            pass
        assert found == [at]
        assert await inviters(f"{run}x", 0.5) == []


async def test_false_invitations_do_not_hold_up_the_true_one(monkeypatch):
    """Names without an address are all asked for at once; only when they are is any answered."""
    run, names, asked = "bbc", [f"false-{i}" for i in range(40)], asyncio.Event()
    waiting = []

    class Browser:
        def __init__(self, zeroconf, service_type, handlers):
            for name in (*names, "true"):
                handlers[0](name=name, state_change=ServiceStateChange.Added)

        async def async_cancel(self):
            pass

    class Info:
        port, properties = 7009, {b"run": run.encode()}

        def __init__(self, service_type, name):
            self.name = name

        async def async_request(self, zeroconf, timeout):
            waiting.append(self.name)
            if len(waiting) > len(names):
                asked.set()
            await asked.wait()
            return self.name == "true"

        def parsed_scoped_addresses(self, version):
            return ["192.0.2.2"]

    monkeypatch.setattr(discovery_module, "AsyncServiceBrowser", Browser)
    monkeypatch.setattr(discovery_module, "AsyncServiceInfo", Info)
    async with asyncio.timeout(PATIENCE):
        assert await inviters(run, 0) == ["192.0.2.2:7009"]
