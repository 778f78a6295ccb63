"""Real multicast DNS on the loopback interface."""

import asyncio
import uuid

import pytest

from deca_node.discovery import Discovery, own_addresses
from deca_node.errors import ListenError

PATIENCE = 30.0  # a bound on failure; multicast answers within two seconds


def discovery(run, node, port, sighted, browse_every=3.0, interfaces=("127.0.0.1",)):
    return Discovery(
        run=run,
        node=node,
        port=port,
        protocol=1,
        addresses=["127.0.0.1"],
        interfaces=interfaces,
        browse_every=browse_every,
        sighted=sighted,
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


async def test_an_unknown_interface_is_one_clear_error():
    """The message names the setting to change."""
    lost = discovery("run", "a", 7001, Sightings(), interfaces=("203.0.113.9",))
    with pytest.raises(ListenError, match=r"network\.interfaces"):
        await lost.start()


def test_addresses_to_announce():
    """A host that is one address is announced as such; all interfaces are without loopback."""
    assert own_addresses("127.0.0.1") == ["127.0.0.1"]
    everywhere = own_addresses("0.0.0.0")
    assert own_addresses("only-outsiders-know.invalid") == everywhere
    assert everywhere
    assert everywhere == ["127.0.0.1"] or not any(a.startswith("127.") for a in everywhere)
