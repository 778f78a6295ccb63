"""What a swarm learns of its peers' clocks, versions and reachability, in virtual time."""

import asyncio
import contextlib
import math
import time

import pytest

from deca_node import __version__
from deca_node.config import Timing
from deca_node.errors import PeerRefused
from deca_node.fingerprint import PROTOCOL_VERSION
from deca_node.loopback import LoopbackNetwork
from deca_node.membership import Phase, State
from deca_node.pb import node_pb2 as pb
from deca_node.swarm.contacts import UNREACHED_SECONDS
from tests.edges.test_exchange import TIMING, Member, acquainted, greeting, meet, namesake
from tests.virtual_time import run


def test_peers_know_each_others_version_and_clock():
    """Both the caller and the called keep what the other said."""

    async def scenario():
        for member, other in zip(pair := await meet(LoopbackNetwork(), 2), pair[::-1], strict=True):
            told = member.swarm.told[other.name]
            assert told.version == __version__
            assert abs(told.clock) < 5
            assert not told.unreached

    run(scenario())


def test_odd_clocks_and_versions_are_harmless():
    """A clock that is off is noted, one that is none is not, and a long version is cut."""

    async def scenario():
        member = Member(LoopbackNetwork(), 0)
        for told, expected in ((time.time() + 95, 95), (math.nan, None), (1e300, None), (0, None)):
            request = greeting()
            request.time, request.version = told, "9" * 1000
            await member.hello(request, "10.0.0.77")
            clock = member.swarm.told["x"].clock
            assert clock is None if expected is None else abs(clock - expected) < 5
            assert len(member.swarm.told["x"].version) == 32
        await member.swarm.close()

    run(scenario())


@pytest.mark.parametrize("preset", ["lan", "wan"])
def test_machines_of_different_presets_stay_members(preset):
    """How often one greets is its own affair, within what any preset does."""

    async def scenario():
        network = LoopbackNetwork()
        timings = [getattr(Timing, preset)(), Timing.local()]
        members = [Member(network, i, timing=timing) for i, timing in enumerate(timings)]
        await acquainted(members)
        for _ in range(600):
            await asyncio.sleep(1)
            assert [member.swarm.members(0) for member in members] == [{"n0", "n1"}] * 2
            assert members[1].swarm.peers["n0"].state == State.ALIVE
        assert not members[0].swarm.refusals.count
        await asyncio.gather(*(member.swarm.close() for member in members))

    run(scenario())


def test_a_peer_that_cannot_be_called_is_told_so():
    """After a while of vain greetings, and no longer once they arrive."""

    async def scenario():
        network = LoopbackNetwork()
        member, other = Member(network, 0), Member(network, 1)
        await member.listen()
        other.swarm.propose(member.transport.address)  # it calls, but does not listen
        while "n1" not in member.swarm.peers:
            await asyncio.sleep(0.1)
        assert member.swarm.uncallable() == frozenset()
        await asyncio.sleep(2 * UNREACHED_SECONDS)
        assert member.swarm.uncallable() == {"n1"}
        assert other.swarm.told["n0"].unreached
        assert not other.swarm.uncallable()
        await other.listen()
        await asyncio.sleep(60)
        assert member.swarm.uncallable() == frozenset()
        assert not other.swarm.told["n0"].unreached
        assert member.swarm.members(0) == {"n0", "n1"}
        await member.swarm.close()
        await other.swarm.close()

    run(scenario())


def test_a_peer_that_comes_back_is_not_yet_one_that_cannot_be_called():
    """While it was down it could not answer; what counts is since it calls again."""

    async def scenario():
        network = LoopbackNetwork()
        member = Member(network, 0)
        await member.listen()
        request = greeting(session=1)
        assert not (await member.hello(request, "10.0.0.77")).unreached  # and is called in vain
        await asyncio.sleep(60)
        assert not (await member.hello(request, "10.0.0.77")).unreached  # after a cut
        await asyncio.sleep(UNREACHED_SECONDS - 1)
        request.sender.session = 2
        assert not (await member.hello(request, "10.0.0.77")).unreached  # after a restart
        assert member.swarm.uncallable() == frozenset()
        for _ in range(10):
            await asyncio.sleep(1)
            reply = await member.hello(request, "10.0.0.77")
        assert reply.unreached
        assert member.swarm.uncallable() == {"x"}
        await member.swarm.close()

    run(scenario())


def test_a_peer_that_comes_back_is_called_back_at_once():
    """Not at the next try of a contact that has long been tried in vain: visits begin meanwhile."""

    async def scenario():
        network = LoopbackNetwork()
        member, other = Member(network, 0), Member(network, 1)
        await member.listen()
        member.swarm.propose(other.transport.address, lasting=True)
        for pause in (31.3, 33.7, 36.1):  # wherever in its backoff it is
            await asyncio.sleep(pause)
            await other.listen()
            other.swarm.propose(member.transport.address)
            await asyncio.sleep(0.3)
            assert member.swarm.members(0) == {"n0", "n1"}
            await other.swarm.close()
            network.kill(other.transport.address)
            other = Member(network, 1)
            other.swarm.identity.session += 1000
        await member.swarm.close()

    run(scenario())


def test_a_static_peer_has_never_answered_until_it_once_did():
    """One that has finished and left is no cause for alarm."""

    async def scenario():
        network = LoopbackNetwork()
        member, other = Member(network, 0), Member(network, 1)
        static = [other.transport.address, "10.0.0.99:7430"]
        for address in static:
            member.swarm.propose(address, lasting=True)
        await asyncio.sleep(1)
        assert member.swarm.never_answered(static) == set(static)
        await other.listen()
        await asyncio.sleep(30)
        assert member.swarm.never_answered(static) == {static[1]}
        network.kill(static[0])
        await asyncio.sleep(60)
        assert member.swarm.never_answered(static) == {static[1]}
        await member.swarm.close()

    run(scenario())


def test_who_is_starting_may_not_know_its_whole_fingerprint():
    """What it tells must be equal; the rest is compared once it acts."""

    async def scenario():
        member = Member(LoopbackNetwork(), 0, {"seed": "0", "model.weights": "abc"})
        request = greeting()
        assert "model.weights" in (await member.hello(request, "10.0.0.77")).refusal
        request.phase = pb.PHASE_STARTING
        assert (await member.hello(request, "10.0.0.77")).refusal == ""
        assert member.swarm.peers["x"].state == State.ALIVE
        assert member.swarm.members(0) == {"n0"}
        wrong = greeting(seed="1")
        wrong.phase = pb.PHASE_STARTING
        assert "seed is '0' here, '1' there" in (await member.hello(wrong, "10.0.0.77")).refusal
        request.phase = pb.PHASE_TRAINING
        assert "model.weights" in (await member.hello(request, "10.0.0.77")).refusal
        assert member.swarm.peers["x"].state == State.REFUSED
        await member.swarm.close()

    run(scenario())


def test_a_refusal_is_told_from_where_one_stands():
    """Here is this node and there the other, whoever of the two said no first."""

    async def scenario():
        network = LoopbackNetwork()
        members = [Member(network, i, {"seed": str(i)}) for i in range(2)]
        for member in members:
            await member.listen()
        members[0].swarm.propose(members[1].transport.address)
        while not all(member.swarm.peers for member in members):
            await asyncio.sleep(0.1)
        assert members[0].swarm.peers["n1"].detail == "seed is '0' here, '1' there"
        assert members[1].swarm.peers["n0"].detail == "seed is '1' here, '0' there"
        await asyncio.gather(*(member.swarm.close() for member in members))

    run(scenario())


def test_a_difference_between_versions_of_the_program_is_told_as_one():
    """Who upgraded one node of four learns why it is refused."""

    async def scenario():
        member = Member(LoopbackNetwork(), 0, {"seed": "0", "new.field": "1"})
        request = greeting()
        other = f"(deca-node {__version__} here, 9.9 there)"
        for version, hint in ((__version__, "there"), ("9.9", other)):
            request.version, request.protocol = version, PROTOCOL_VERSION
            refusal = (await member.hello(request, "10.0.0.77")).refusal
            assert refusal.startswith("settings_differ: new.field is '1' here, 'absent' there")
            assert refusal.endswith(hint)
            request.protocol = PROTOCOL_VERSION + 1
            refusal = (await member.hello(request, "10.0.0.77")).refusal
            assert refusal.startswith(f"protocol: version {PROTOCOL_VERSION} here")
            assert refusal.endswith(hint)
        await member.swarm.close()

    run(scenario())


def test_refusals_of_those_that_are_no_peers_are_kept_until_they_are_welcome():
    """So that status can say which name is taken, and stops once it is not."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        request = greeting(node="n1", session=77)
        assert "name_taken" in (await members[0].hello(request, "10.0.0.77")).refusal
        refusal = members[0].swarm.refusals.last["10.0.0.77:7430"]
        assert (refusal.node, refusal.reason) == ("n1", "name_taken")
        request.sender.node = "n2"
        assert (await members[0].hello(request, "10.0.0.77")).refusal == ""
        assert members[0].swarm.refusals.last == {}
        assert members[0].swarm.peers["n2"].phase == Phase.WAITING
        await asyncio.gather(*(member.swarm.close() for member in members))

    run(scenario())


def test_who_refuses_this_node_still_does_when_it_calls():
    """Of two nodes of one name the second is called by those that refuse it, and accepts them."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 2)
        second = await namesake(network, members)
        at = members[0].transport.address
        while at not in second.swarm.refusals.last:
            await asyncio.sleep(0.1)
        request = greeting(node="n0", session=members[0].swarm.identity.session)
        request.host, request.port = at.split(":")[0], int(at.split(":")[1])
        assert (await second.hello(request, request.host)).refusal == ""
        assert second.swarm.refusals.last[at].reason == "name_taken"
        second.swarm.identity.node = "n2"
        while second.swarm.refusals.last:
            await asyncio.sleep(0.1)
        assert second.swarm.peers["n0"].reached
        await asyncio.gather(*(member.swarm.close() for member in (*members, second)))

    run(scenario())


def test_who_names_ever_new_hosts_keeps_nobody_out():
    """A member that gives another host with each greeting, none of which answers in time."""

    async def scenario():
        network = LoopbackNetwork(delay=lambda _, to: 1000.0 if to.startswith("10.66.") else 0.0)
        member, joiner = Member(network, 0), Member(network, 1)
        await member.listen()
        await joiner.listen()
        for number in range(600):
            request = greeting()
            request.host = f"10.66.{number >> 8}.{number & 255}"
            with contextlib.suppress(PeerRefused):  # too many
                await member.hello(request, "10.66.0.0")
            await asyncio.sleep(0.3)
        joiner.swarm.propose(member.transport.address)
        await asyncio.sleep(2 * TIMING.heartbeat)
        assert "n1" in member.swarm.members(0)
        await member.swarm.close()
        await joiner.swarm.close()

    run(scenario())


def test_a_swarm_that_is_closed_answers_and_calls_nobody():
    """As with node.stay: the run is over here, others may still greet."""

    async def scenario():
        network = LoopbackNetwork()
        member, other = await meet(network, 2)
        await member.swarm.close()
        asked = []
        network.fault = lambda call, _, message: asked.append(call.source) or message
        reply = await member.hello(greeting(), "10.0.0.77")
        assert not reply.refusal
        await asyncio.sleep(100)
        assert set(asked) == {other.transport.address}
        await other.swarm.close()

    run(scenario())
