"""Names that stand for all nodes: with a resolver of the test's own, and with this machine's."""

import asyncio
import contextlib
import threading

import pytest

from deca_node.config import load
from deca_node.dns import NamedPeers, callable_addresses, resolve
from deca_node.errors import ConfigError
from deca_node.limits import MAX_NAMED_ADDRESSES, MAX_SIGHTINGS

PATIENCE = 30.0  # a bound on failure
NAME = "deca.default.svc.cluster.local:7430"


class Names:
    """A name server whose answers a test sets; it says when it was asked once more."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self._loop = asyncio.get_running_loop()
        self._again = asyncio.Event()

    def __call__(self, host, port):
        self.asked.append((host, port))
        self._loop.call_soon_threadsafe(self._again.set)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def until_asked_again(self):
        """Two questions from now, so that the first one's answer has been dealt with."""
        for _ in range(2):
            self._again.clear()
            await asyncio.wait_for(self._again.wait(), PATIENCE)


@contextlib.asynccontextmanager
async def following(answer, seen, name=NAME):
    names = Names(answer)
    peers = NamedPeers([name], 0.01, seen.append, names)
    try:
        yield names, peers
    finally:
        await peers.stop()


async def test_all_addresses_of_a_name_are_proposed_again_and_again():
    """Of both families, with the port of the setting; who comes later, too."""
    seen = []
    async with following(["10.0.0.1", "fd00::1"], seen) as (names, _):
        await names.until_asked_again()
        assert set(seen) == {"10.0.0.1:7430", "[fd00::1]:7430"}
        seen.clear()
        names.answer = ["10.0.0.1", "10.0.0.7"]
        await names.until_asked_again()
    assert {"10.0.0.1:7430", "10.0.0.7:7430"} <= set(seen)
    assert set(names.asked) == {("deca.default.svc.cluster.local", 7430)}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(-2, "Name or service not known"), "Name or service not known"),
        (MemoryError(), "MemoryError"),
        (ValueError("embedded null byte"), "embedded null byte"),
    ],
)
async def test_a_name_server_that_fails_is_asked_again_and_reported_meanwhile(error, reason):
    """Nothing ends, whatever is raised; the reason is there until an answer comes."""
    seen = []
    async with following(error, seen) as (names, peers):
        await names.until_asked_again()
        assert peers.failing == {NAME: reason}
        names.answer = ["10.0.0.1"]
        await names.until_asked_again()
        assert peers.failing == {}
        assert "10.0.0.1:7430" in seen


async def test_where_no_thread_can_be_had_it_is_tried_again(monkeypatch):
    """As in a crowded container."""
    real, tried = threading.Thread.start, asyncio.Event()

    def crowded(thread):
        if thread.name != "dns":
            return real(thread)
        tried.set()
        raise RuntimeError("can't start new thread")

    seen = []
    monkeypatch.setattr(threading.Thread, "start", crowded)
    async with following(["10.0.0.1"], seen) as (names, peers):
        await asyncio.wait_for(tried.wait(), PATIENCE)
        assert peers.failing == {NAME: "can't start new thread"}
        monkeypatch.setattr(threading.Thread, "start", real)
        await names.until_asked_again()
        assert peers.failing == {}
    assert "10.0.0.1:7430" in seen


async def test_a_name_server_that_hangs_does_not_hold_up_the_end():
    """Its thread is left to itself, and its late answer is for nobody."""
    asked, over = threading.Event(), threading.Event()
    seen = []

    def hang(_host, _port):
        asked.set()
        over.wait(PATIENCE)
        return ["10.0.0.1"]

    peers = NamedPeers([NAME], 0.01, seen.append, hang)
    assert await asyncio.to_thread(asked.wait, PATIENCE)
    await asyncio.wait_for(peers.stop(), PATIENCE)
    over.set()
    assert seen == []


def test_what_a_name_server_can_make_us_call_is_bounded():
    """Addresses twice, of nobody, of groups, or no addresses are left out; so are too many."""
    odd = ["0.0.0.0", "::", "224.0.0.251", "ff02::fb", "nonsense", "10.0.0.1", "10.0.0.1"]
    assert callable_addresses(odd) == ["10.0.0.1"]
    many = [f"10.0.{number // 256}.{number % 256}" for number in range(1, 5000)]
    assert callable_addresses(many) == many[:MAX_NAMED_ADDRESSES]
    assert MAX_NAMED_ADDRESSES < MAX_SIGHTINGS  # room for contacts found by other ways


def test_this_machine_resolves_what_its_hosts_file_says():
    """And says which names it does not know."""
    assert set(resolve("localhost", 7430)) & {"127.0.0.1", "::1"}
    for unknown in ("no-such-name.invalid", f"{'x' * 64}.invalid"):
        with pytest.raises(OSError, match=r".+"):
            resolve(unknown, 7430)


async def test_a_real_name_is_followed():
    """With this machine's resolver, as a node does."""
    found = asyncio.Event()
    peers = NamedPeers(["localhost:7430"], 0.01, lambda _: found.set())
    try:
        await asyncio.wait_for(found.wait(), PATIENCE)
    finally:
        await peers.stop()
    assert peers.failing == {}


def test_a_name_without_a_port_is_refused(monkeypatch):
    """One line with the key."""
    monkeypatch.setenv("DECA_MODEL__PATH", "m")
    monkeypatch.setenv("DECA_DATA__TRAIN", "t")
    with pytest.raises(ConfigError, match=r"network\.dns_peers.*not HOST:PORT"):
        load(None, ['network.dns_peers=["deca.default.svc"]'])
