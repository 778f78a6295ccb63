"""The exchange over the loopback transport, in virtual time: deadlines cost no waiting."""

import asyncio
import contextlib
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import structlog
import torch

from deca_node.blocks import Schedule, partition_layers
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerRefused, PeerTimeout, PeerUnavailable
from deca_node.exchange import Exchange, send_rates
from deca_node.limits import (
    MAX_MEMBERS,
    MAX_PULL_SECONDS,
    PEER_GREETINGS,
    PEER_GREETINGS_BURST,
    PEER_LINES,
    PEER_LINES_BURST,
    STATE_LINES,
    STRANGER_GREETINGS,
    STRANGER_GREETINGS_BURST,
)
from deca_node.loopback import LoopbackNetwork
from deca_node.membership import Phase, State
from deca_node.mixing import mix_arrival
from deca_node.patience import DOUBTFUL_SECONDS
from deca_node.pb import node_pb2 as pb
from deca_node.swarm import Identity, Position, Swarm
from deca_node.topology import TopologySpec, graph
from deca_node.wire import (
    CHUNK_BYTES,
    CHUNK_ELEMENTS,
    Layout,
    TensorSpec,
    frame,
    metadata,
    parse,
    promised,
    snapshot,
)
from tests.answers import Answers
from tests.virtual_time import run

LAYOUT = Layout((TensorSpec("w", (600, 1000)),))  # three messages of values
TIMING = Timing.lan()
STEPS = 4


class Member(Answers):
    """A node without training: its block is a constant, its mix the real one."""

    def __init__(self, network, index, marks=None, timing=TIMING):
        self.name = f"n{index}"
        self.index = index
        self.visit = 0
        self.stopping = asyncio.Event()
        self.transport = network.transport(f"10.0.0.{index}", 7430)
        identity = Identity("run", self.name, 100 + index, marks or {"seed": "0"}, port=7430)
        self.swarm = Swarm(
            identity,
            self.transport,
            timing,
            lambda: Position(Phase.TRAINING, self.visit),
            STEPS,
            lambda: self.exchange.wake(),  # noqa: PLW0108 - made below
            structlog.get_logger(),
        )
        self.exchange = Exchange(self.swarm, timing, "run", self.stopping)
        self.values = torch.full((LAYOUT.numel,), float(index))

    async def listen(self):
        await self.transport.listen(self, None)

    async def open(self, wanted):
        return await self.exchange.open_visit(self.visit, STEPS, wanted, self.visit * STEPS)

    async def step(self, step):
        serial = self.visit * STEPS + step
        own = self.values.clone()
        await self.exchange.make_room()
        self.exchange.publish(snapshot(own, LAYOUT, serial, metadata("run", self.name, serial)))

        def mix(first, values, weight):
            part = slice(first, first + values.numel())
            mix_arrival(self.values[part], own[part], values, weight)

        return await self.exchange.gather(serial, LAYOUT, lambda _: mix)


async def meet(network, count):
    """``count`` members that all know each other."""
    return await acquainted([Member(network, i) for i in range(count)])


async def acquainted(members):
    """The members, once each knows all others."""
    for member in members:
        await member.listen()
    for member in members:
        for other in members:
            member.swarm.propose(other.transport.address)
    while any(len(member.swarm.members(member.visit)) < len(members) for member in members):
        await asyncio.sleep(0.01)
    return members


async def namesake(network, members):
    """Another node of the second one's name, which has been told of the first."""
    double = Member(network, 7)
    double.swarm.identity.node = members[1].name
    await double.listen()
    double.swarm.propose(members[0].transport.address)
    return double


def wanted(members, kind="ring"):
    made = graph([member.name for member in members], TopologySpec(kind))
    return [made[member.name] for member in members]


async def together(coroutines):
    return await asyncio.gather(*coroutines)


async def visiting(network, count):
    """``count`` members of a ring that have opened their visit."""
    members = await meet(network, count)
    await together(m.open(w) for m, w in zip(members, wanted(members), strict=True))
    return members


@pytest.mark.parametrize(
    ("total", "per_peer"), [(None, None), (2e6, None), (None, 2e6), (6e6, 2e6), (1e6, 2e6)]
)
def test_a_cap_on_sending_holds(total, per_peer):
    """In all, or to each of two neighbours; what a rest has saved up goes at once."""

    async def scenario():
        network = LoopbackNetwork()
        members = [Member(network, index) for index in range(3)]
        for member in members:
            rates = send_rates(total, per_peer)
            member.exchange = Exchange(member.swarm, TIMING, "run", member.stopping, rates)
        await acquainted(members)
        await together(m.open(w) for m, w in zip(members, wanted(members, "full"), strict=True))
        loop = asyncio.get_running_loop()
        began = loop.time()
        reports = await together(m.step(0) for m in members)
        assert all(report.complete for report in reports)
        (block,) = {member.exchange.bytes_sent / 2 for member in members}
        return loop.time() - began, block

    seconds, block = run(scenario())
    in_all = (2 * block - CHUNK_BYTES) / total if total else 0.0
    to_each = (block - CHUNK_BYTES) / per_peer if per_peer else 0.0
    least = max(in_all, to_each)
    assert least <= seconds + 1e-9
    assert seconds < 1.3 * least + 0.01


@pytest.mark.parametrize(("kind", "count"), [("ring", 4), ("full", 5), ("ring", 2)])
def test_a_visit_mixes_with_metropolis_hastings_weights(kind, count):
    """Every node ends with its row of W times everybody's values, and the mean stays."""

    async def scenario():
        members = await meet(LoopbackNetwork(), count)
        edges = await together(
            m.open(w) for m, w in zip(members, wanted(members, kind), strict=True)
        )
        reports = await together(m.step(0) for m in members)
        for member, edge, report in zip(members, edges, reports, strict=True):
            expected = edge.own_weight * member.index + sum(
                weight * int(peer[1:]) for peer, weight in edge.weights.items()
            )
            torch.testing.assert_close(
                member.values, torch.full_like(member.values, expected), rtol=0, atol=1e-6
            )
            assert report.complete
            assert sorted(report.used) == sorted(edge.weights)
        mean = torch.stack([m.values for m in members]).mean(0)
        torch.testing.assert_close(mean, torch.full_like(mean, (count - 1) / 2), rtol=0, atol=1e-6)

    run(scenario())


def test_many_visits_bring_everybody_together():
    """Repeated visits and steps lead a ring to the common mean."""

    async def life(member, wish):
        for visit in range(6):
            member.visit = visit
            await member.open(wish)
            for step in range(STEPS):
                assert (await member.step(step)).complete

    async def scenario():
        members = await meet(LoopbackNetwork(), 4)
        await together(life(m, w) for m, w in zip(members, wanted(members), strict=True))
        for member in members:
            assert float((member.values - 1.5).abs().max()) < 1e-5

    run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_slow_and_uneven_networks_lose_nothing(seed):
    """Whatever order delays put the messages in, every edge is used by both ends in every step."""
    source = random.Random(seed)

    async def life(member, wish):
        for visit in range(4):
            member.visit = visit
            await member.open(wish)
            for step in range(2):
                report = await member.step(step)
                assert report.complete
                assert sorted(report.used) == sorted(wish)

    async def scenario():
        network = LoopbackNetwork(delay=lambda _a, _b: source.choice([0, 0, 0.01, 0.3, 1.0]))
        members = await meet(network, 4)
        await together(life(m, w) for m, w in zip(members, wanted(members), strict=True))
        for member in members:  # nobody was given up, refused or waited for in vain
            assert all(not traffic.refusals for traffic in member.swarm.traffic.values())

    run(scenario())


def test_a_silent_neighbour_costs_one_deadline_and_its_weight():
    """It is waited for once; then the others go on at full speed, its weight with themselves."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 3)
        clock = asyncio.get_running_loop().time
        begin = clock()
        reports = await together(m.step(0) for m in members[:2])  # n2 publishes nothing
        assert clock() - begin == pytest.approx(TIMING.step_deadline, abs=0.5)
        begin = clock()
        again = await together(m.step(1) for m in members[:2])
        assert clock() - begin < 0.5
        for report, other in zip([*reports, *again], "1010", strict=True):
            assert report.used == [f"n{other}"]
            assert report.missing == {"n2": "late"}
        assert float(members[0].values[0] + members[1].values[0]) == pytest.approx(1.0)

    run(scenario())


@pytest.mark.parametrize("known", [False, True])
def test_a_dead_neighbour_costs_nothing_but_its_share(known):
    """A broken connection is known at once and waited for by nobody."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 3)
        network.kill(members[2].transport.address)
        while known and any(m.swarm.peers["n2"].state != State.GONE for m in members[:2]):
            await asyncio.sleep(0.1)
        clock = asyncio.get_running_loop().time
        begin = clock()
        reports = await together(m.step(0) for m in members[:2])
        assert clock() - begin < 0.5
        assert [r.missing for r in reports] == [{"n2": "unavailable"}] * 2

    run(scenario())


def test_the_next_visit_heals_around_the_dead():
    """Gone members leave the topology, and the weights are those of the smaller graph."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 4)
        network.kill(members[2].transport.address)
        left = [m for m in members if m.index != 2]
        while any("n2" in m.swarm.members(0) for m in left):
            await asyncio.sleep(0.1)
        assert all(m.swarm.peers["n2"].state == State.GONE for m in left)
        edges = await together(m.open(w) for m, w in zip(left, wanted(left), strict=True))
        for edge in edges:
            assert edge.weights == pytest.approx(dict.fromkeys(edge.weights, 1 / 3))
            assert len(edge.weights) == 2

    run(scenario())


def test_a_neighbour_that_never_comes_costs_a_visit_deadline():
    """A living peer that stays in another visit holds the others up only so long."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        clock = asyncio.get_running_loop().time
        begin = clock()
        edges = await together(
            m.open(w) for m, w in zip(members[:2], wanted(members)[:2], strict=True)
        )
        assert clock() - begin == pytest.approx(TIMING.visit_deadline, abs=1)
        assert [set(edge.weights) for edge in edges] == [{"n1"}, {"n0"}]
        assert [m.swarm.traffic["n2"].refusals["late"] for m in members[:2]] == [1, 1]
        late = await members[2].open(wanted(members)[2])  # everybody has closed
        assert late.weights == {}

    run(scenario())


def test_a_degree_that_no_neighbour_can_have_is_refused():
    """No weight follows from it, and it must not get as far as that."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        told = pb.VisitDegree(sender=members[1].swarm.sender(), visit=0, degree=0)
        with pytest.raises(PeerRefused) as caught:
            members[0].exchange.answer_degree(told)
        assert caught.value.reason == "bad_degree"

    run(scenario())


GARBAGE = {
    "malformed": lambda m: b"\xff" * len(m),
    "checksum": lambda m: m[:-1] + bytes([m[-1] ^ 1]),
    "wrong_step": lambda m: frame(99, parse(m).offset, m[32:]),
    "gap": lambda m: frame(parse(m).serial, parse(m).offset + 4, m[32:]),
    "not_finite": lambda m: frame(parse(m).serial, parse(m).offset, b"\xff" * (len(m) - 32)),
    "too_long": lambda m: m + b"\0" * (2 << 20),
}


@pytest.mark.parametrize("reason", GARBAGE)
@pytest.mark.parametrize("where", [1, 2])
def test_garbage_is_counted_and_the_run_goes_on(reason, where):
    """A bad message is refused with its reason; what came before it stays a convex mix."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 2)

        def fault(call, index, message):
            bad = call.method == "Pull" and call.target.startswith("10.0.0.1:") and index == where
            return GARBAGE[reason](message) if bad else message

        network.fault = fault
        report, honest = await together(m.step(0) for m in members)
        assert honest.complete
        if where == 1:
            assert report.missing == {"n1": reason}
            assert torch.equal(members[0].values, torch.zeros(LAYOUT.numel))
        else:
            assert report.partial == ["n1"]
            assert set(members[0].values.tolist()) == {0.0, 0.5}
        assert not report.complete
        assert members[0].swarm.traffic["n1"].refusals == {reason: 1}
        assert members[0].exchange._patience.worth({"n1"})  # it was not late
        assert not report.late
        network.fault = lambda call, index, message: message
        assert (await together(m.step(1) for m in members))[0].complete

    run(scenario())


def test_a_stream_that_ends_early_is_incomplete():
    """A neighbour that dies within its stream leaves a partial contribution."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 2)

        def fault(call, index, message):
            if call.method == "Pull" and call.target.startswith("10.0.0.1:") and index == 2:
                raise PeerUnavailable("cut")
            return message

        network.fault = fault
        report, _ = await together(m.step(0) for m in members)
        assert report.partial == ["n1"]

    run(scenario())


def test_other_settings_are_refused_on_both_sides_with_the_field():
    """Two nodes whose settings differ know which one, and exchange nothing."""

    async def scenario():
        network = LoopbackNetwork()
        one, other = Member(network, 0), Member(network, 1, {"seed": "1"})
        for member in (one, other):
            await member.listen()
        one.swarm.propose(other.transport.address)
        await asyncio.sleep(1)
        for me, them in ((one, other), (other, one)):
            peer = me.swarm.peers[them.name]
            assert peer.state == State.REFUSED
            assert "seed is" in peer.detail
            assert them.name not in me.swarm.members(0)

    run(scenario())


def test_two_nodes_with_one_name_are_kept_apart():
    """A second node of the same name is refused and told to change it."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 2)
        await namesake(network, members)
        await asyncio.sleep(0.5)
        assert members[0].swarm.refusals.count["name_taken"] >= 1
        assert members[0].swarm.peers["n1"].session == 101

    run(scenario())


def test_strangers_get_no_block():
    """Who has not greeted, or is no neighbour, cannot pull."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 4)
        outsider = Member(network, 9)
        for asking, reason in ((outsider, "stranger"), (members[2], "not_a_neighbour")):
            link = asking.transport.link(members[0].transport.address)
            request = pb.PullRequest(sender=asking.swarm.sender(), serial=0)
            with pytest.raises(PeerRefused) as caught:
                async for _ in link.pull(request, 5):
                    pass
            assert caught.value.reason == reason
        await published(members[0], 0)  # there to be had, but not by everybody
        with pytest.raises(PeerRefused) as caught:
            await anext(pulled(members, 0, by=2))
        assert caught.value.reason == "passed"

    run(scenario())


async def published(member, serial):
    """What the member hands out from now on."""
    made = snapshot(member.values, LAYOUT, serial, metadata("run", member.name, serial))
    member.exchange.publish(made)
    return made


def pulled(members, serial, by=1):
    """The first member's answer to another one."""
    request = pb.PullRequest(sender=members[by].swarm.sender(), serial=serial)
    return members[0].exchange.answer_pull(request)


async def waits(members):
    """A pull of a step that is not there yet."""
    waiting = asyncio.create_task(anext(pulled(members, 0)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    return waiting


@pytest.mark.parametrize("where", ["gather", "make_room", "drain"])
def test_stopping_ends_every_wait(where):
    """A node told to stop goes on at once, whatever its neighbour has or gives."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        clock, exchange = asyncio.get_running_loop().time, members[0].exchange
        if where == "gather":
            waiting = asyncio.create_task(members[0].step(0))
        else:
            await published(members[0], 0)
            await anext(stream := pulled(members, 0))
            waiting = asyncio.create_task(getattr(exchange, where)())
        await asyncio.sleep(1)
        assert not waiting.done()
        begin = clock()
        members[0].stopping.set()
        exchange.wake()
        await waiting
        assert clock() - begin < 0.001
        assert not members[0].swarm.traffic["n1"].refusals  # it has done nothing wrong
        if where != "gather":
            await stream.aclose()

    run(scenario())


def test_who_has_no_edge_any_more_is_told_so():
    """Also when it has been waiting for the next block."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        waiting = await waits(members)
        members[0].exchange.give_up({"n1"})
        with pytest.raises(PeerRefused) as caught:
            await asyncio.wait_for(waiting, 0.001)
        assert caught.value.reason == "not_a_neighbour"

    run(scenario())


def test_who_rests_says_so_and_is_told_whether_it_was_missed():
    """By a neighbour that went on: until the next visit it has no part then."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        exchange = members[0].exchange

        async def paused(by):
            with pytest.raises(PeerRefused) as caught:
                await asyncio.wait_for(anext(pulled(members, exchange.edges.visit * STEPS, by)), 1)
            return caught.value.reason == "paused"

        for visit in range(2):
            for member in members[:2]:
                member.visit = visit
            await together(m.open(w) for m, w in zip(members[:2], pair, strict=True))
            assert not exchange._serving.resting
            exchange.rest()
            assert await paused(2)  # no neighbour
            assert not exchange.wake_up()
            if visit:
                break
            waiting = await waits(members)
            exchange.rest()
            with pytest.raises(PeerRefused, match="takes no part"):
                await asyncio.wait_for(waiting, 0.001)
            assert await paused(2)
            assert exchange.wake_up()
            assert await paused(1)

    pair = [frozenset({"n1"}), frozenset({"n0"})]
    run(scenario())


def test_draining_waits_for_the_last_reader():
    """A finished node serves its last block until its neighbour has it."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        first = asyncio.create_task(members[0].step(0))
        await asyncio.sleep(3)
        assert not first.done()
        await members[1].step(0)
        await first
        assert members[0].exchange._serving.held is None  # its memory is free already
        assert await members[0].exchange.drain() == frozenset()
        members[0].exchange.release()

    run(scenario())


@pytest.mark.parametrize("gone", [False, True])
def test_draining_ends_without_a_reader_that_does_not_come(gone):
    """After a deadline; at once where it is gone."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 2)
        await published(members[0], 0)
        if gone:
            network.kill(members[1].transport.address)
            while members[0].swarm.peers["n1"].state != State.GONE:
                await asyncio.sleep(0.1)
        clock = asyncio.get_running_loop().time
        begin = clock()
        assert await members[0].exchange.drain() == (frozenset() if gone else {"n1"})
        seconds = 0 if gone else TIMING.step_deadline
        assert clock() - begin == pytest.approx(seconds, abs=0.01)

    run(scenario())


def test_a_last_message_that_was_not_taken_was_not_sent():
    """Whoever has all but that has no block, and nothing was heard of it."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        seen, serving = [], members[0].exchange._serving
        members[0].swarm.seen = seen.append
        made = await published(members[0], 0)
        stream = pulled(members, 0)
        for _ in range(made.count):
            await anext(stream)
        with pytest.raises(PeerRefused):
            await stream.athrow(PeerRefused("too_slow", "does not read"))
        assert (serving._published.failed, serving._published.have) == ({"n1"}, set())
        assert members[0].swarm.traffic["n1"].refusals == {"too_slow": 1}
        assert not seen
        assert len([message async for message in pulled(members, 0)]) == made.count
        assert seen == ["n1"]
        assert serving.held is None

    run(scenario())


def test_a_second_stream_to_one_that_has_all_keeps_no_block_alive():
    """It ends with the step, as any other."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        made = await published(members[0], 0)
        await anext(stream := pulled(members, 0))
        assert len([message async for message in pulled(members, 0)]) == made.count
        await members[0].exchange.make_room()
        assert made.messages == []
        with pytest.raises(PeerRefused):
            await anext(stream)

    run(scenario())


def test_a_reader_that_hangs_up_has_had_nothing_of_what_was_to_come():
    """Where what is sent has a cap: the next one does not wait for it."""
    rate = 1e6

    async def scenario():
        network = LoopbackNetwork()
        members = [Member(network, index) for index in range(2)]
        for member in members:
            rates = send_rates(rate)
            member.exchange = Exchange(member.swarm, TIMING, "run", member.stopping, rates)
        await acquainted(members)
        await together(m.open(w) for m, w in zip(members, wanted(members), strict=True))
        made = await published(members[0], 0)

        async def read():
            return [message async for message in pulled(members, 0)]

        for _ in range(10):
            reading = asyncio.create_task(read())
            await asyncio.sleep(0.01)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        clock = asyncio.get_running_loop().time
        begin = clock()
        block = sum(map(len, await read()))
        assert block == sum(map(len, made.messages))
        assert clock() - begin <= block / rate + 0.1

    run(scenario())


def test_what_an_edge_carries_is_counted_at_both_ends():
    """By step, by neighbour and in all."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        reports = [await together(m.step(step) for m in members) for step in range(2)]
        for index, (member, other) in enumerate(zip(members, members[::-1], strict=True)):
            mine = [report[index] for report in reports]
            edges = [report.edges[other.name] for report in mine]
            traffic, late = member.swarm.traffic[other.name], member.exchange._serving.end_step([])
            assert [edge.received for edge in edges] == [report.received for report in mine]
            assert sum(edge.received for edge in edges) == traffic.received
            assert traffic.received == other.exchange.bytes_sent
            assert sum(edge.sent for edge in edges) + late[other.name] == traffic.sent
            assert traffic.sent == member.exchange.bytes_sent

    run(scenario())


def test_there_is_never_more_than_one_snapshot():
    """However many neighbours have not read: what is superseded gives its memory back."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 5)
        await together(m.open(w) for m, w in zip(members, wanted(members, "full"), strict=True))
        made = []
        for serial in range(3):
            await members[0].exchange.make_room()
            assert all(old.messages == [] for old in made)
            made.append(snapshot(members[0].values, LAYOUT, serial, metadata("r", "n0", serial)))
            members[0].exchange.publish(made[-1])
        assert len(made[-1].messages) == made[-1].count

    run(scenario())


def test_a_block_travels_and_is_mixed_as_far_as_it_is_updated():
    """Each end gets what the other has made so far, and mixes only where it has made its own."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        own = [m.values.clone() for m in members]
        made = [promised(LAYOUT, 0, metadata("run", m.name, 0)) for m in members]
        mixed = [0, 0]
        for member, each in zip(members, made, strict=True):
            assert member.exchange.early
            member.exchange.publish(each)

        def intake(index, peer):
            def take(first, values, weight):
                mixed[index] = first + len(values)
                part = slice(first, mixed[index])
                mix_arrival(members[index].values[part], own[index][part], values, weight)

            return take

        gathering = [
            asyncio.create_task(m.exchange.gather(0, LAYOUT, partial(intake, i)))
            for i, m in enumerate(members)
        ]
        progress = [(0, 0), (1, 0), (1, 2), (2, 2), (3, 3)]
        for parts in progress:
            for index, count in enumerate(parts):
                end = min(count * CHUNK_ELEMENTS, LAYOUT.numel)
                made[index].grow(own[index], end)
            await asyncio.sleep(1)
            reached = min(min(parts) * CHUNK_ELEMENTS, LAYOUT.numel)
            assert mixed == [reached, reached]
        for report in await together(gathering):
            assert report.complete
            assert report.mix < 1
        assert torch.equal(members[0].values, torch.full((LAYOUT.numel,), 0.5))
        assert torch.equal(members[0].values, members[1].values)

    run(scenario())


def test_a_reader_of_a_block_that_is_never_finished_is_told():
    """Released while it is being made: the reader ends, and what is made later goes nowhere."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        made = promised(LAYOUT, 0, metadata("run", "n0", 0))
        members[0].exchange.publish(made)
        stream = members[0].pull(pb.PullRequest(sender=members[1].swarm.sender(), serial=0))
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(1)
        members[0].exchange.release()
        with pytest.raises(PeerRefused, match="too slowly"):
            await reading
        made.grow(members[0].values, LAYOUT.numel)
        assert made.messages == []

    run(scenario())


def test_room_is_made_when_the_readers_are_done():
    """A neighbour under way is waited for; one that has stopped reading costs one deadline."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        exchange, clock = members[0].exchange, asyncio.get_running_loop().time
        request = pb.PullRequest(sender=members[1].swarm.sender())
        for serial, stalls in enumerate((False, True)):
            request.serial = serial
            old = snapshot(members[0].values, LAYOUT, serial, metadata("run", "n0", serial))
            exchange.publish(old)
            stream = members[0].pull(request)
            await anext(stream)
            begin = clock()
            room = asyncio.create_task(exchange.make_room())
            await asyncio.sleep(2)
            assert not room.done()
            assert len(old.messages) == old.count
            if not stalls:
                assert len([m async for m in stream]) == old.count - 1
            await room
            assert clock() - begin == pytest.approx(TIMING.step_deadline if stalls else 2, abs=0.1)
            assert exchange._serving.held is None
            if stalls:
                with pytest.raises(PeerRefused, match="too slowly"):
                    await anext(stream)
            await stream.aclose()

    run(scenario())


def test_who_asks_before_a_visits_edges_are_known_has_asked():
    """A new neighbour that has its own edges first gets no less time to read than the others."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        asked, asking = members
        opening = asyncio.create_task(asked.open(frozenset({"n1"})))
        await asyncio.sleep(0.1)
        assert not opening.done()
        stream = asked.pull(pb.PullRequest(sender=asking.swarm.sender(), serial=0))
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)
        await asking.open(frozenset({"n0"}))
        await opening
        made = snapshot(asked.values, LAYOUT, 0, metadata("run", "n0", 0))
        asked.exchange.publish(made)
        await first
        clock = asyncio.get_running_loop().time
        begin = clock()
        room = asyncio.create_task(asked.exchange.make_room())
        await asyncio.sleep(2 * TIMING.rpc)
        assert not room.done()
        assert len([m async for m in stream]) == made.count - 1
        await room
        assert clock() - begin < TIMING.step_deadline
        assert not asked.exchange._serving._visit.idle

    run(scenario())


def test_callers_without_an_edge_leave_no_trace_of_what_they_asked():
    """Before a visit's edges are known anybody may ask: nothing of it is kept."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        stream = members[0].pull(pb.PullRequest(sender=members[1].swarm.sender(), serial=0))
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        assert not members[0].exchange._serving._visit.asked

    run(scenario())


@pytest.mark.parametrize("error", [PayloadError("checksum", "hit"), PeerUnavailable("reset")])
def test_streams_that_break_off_both_ways_cost_no_waiting(error):
    """Who failed to fetch a step's block will not come for it again."""

    async def scenario():
        network = LoopbackNetwork()
        members = await visiting(network, 2)

        def fault(call, index, message):
            if call.method == "Pull" and call.request.serial == 1:
                raise error
            return message

        network.fault = fault
        begin = asyncio.get_running_loop().time()
        for step in range(STEPS):
            reports = await together(m.step(step) for m in members)
            assert all(report.complete == (step != 1) for report in reports)
        assert asyncio.get_running_loop().time() - begin < 1

    run(scenario())


def test_who_gives_but_never_fetches_costs_one_call_in_a_visit(monkeypatch):
    """Not a deadline in every step."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        await together(m.open(w) for m, w in zip(members, wanted(members, "full"), strict=True))
        deaf = members[1].swarm.link("n0")

        async def nothing(request, timeout):
            raise PeerTimeout("lost on the way")
            yield b""

        monkeypatch.setattr(deaf, "pull", nothing)
        clock = asyncio.get_running_loop().time
        took = []
        for step in range(STEPS):
            begin = clock()
            await together(m.step(step) for m in members)
            took.append(clock() - begin)
        assert sum(took) < TIMING.rpc + 1
        assert len(took) > 2

    run(scenario())


def test_serials_of_the_schedule_match_the_visits_that_neighbours_derive():
    """The exchange finds a serial's visit with the schedule's own numbers."""
    schedule = Schedule(partition_layers(6, 2), 2, STEPS, "ascending", 0)
    for visit in map(schedule.visit, range(schedule.visits)):
        for step in range(STEPS):
            assert schedule.serial(visit.index, step) // STEPS == visit.index


def greeting(run="run", node="x", session=9, seed="0", port=7430, host="10.0.0.77"):
    field = pb.FingerprintField(name="seed", value=seed)
    sender = pb.Sender(run=run, node=node, session=session)
    return pb.HelloRequest(
        sender=sender, protocol=1, fingerprint=[field], port=port, host=host, phase=pb.PHASE_WAITING
    )


def test_an_impostor_does_not_take_a_peers_place():
    """A stranger with other settings and a member's name, or ours, changes nothing."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        before = members[0].swarm.peers["n1"]
        for name in ("n1", "n0"):
            reply = await members[0].hello(greeting(node=name, seed="1"), "10.0.0.66")
            assert reply.refusal
        after = members[0].swarm.peers
        assert after.keys() == {"n1"}
        assert (after["n1"].session, after["n1"].state) == (before.session, State.ALIVE)
        assert members[0].swarm.link("n1") is not None

    run(scenario())


@pytest.mark.parametrize("finished", [False, True])
def test_a_goodbye_that_overtakes_a_greeting_and_its_reply_holds(finished):
    """The session that left does not come back by what it sent before; a new one does."""

    class Late:
        """A link whose reply to a greeting is on its way while the goodbye comes."""

        async def hello(self, request, timeout):
            await member.goodbye(pb.GoodbyeRequest(sender=said.sender, finished=finished))
            return pb.HelloReply(
                sender=said.sender, protocol=1, fingerprint=said.fingerprint, phase=said.phase
            )

        async def goodbye(self, request, timeout):
            return pb.GoodbyeReply()

    async def scenario():
        left = (State.DONE, Phase.DONE) if finished else (State.GONE, Phase.STOPPING)
        await member.hello(said, "10.0.0.77")
        assert member.swarm.peers["x"].state == State.ALIVE
        await member.swarm.greet("10.0.0.77:7430", Late())
        assert (member.swarm.peers["x"].state, member.swarm.peers["x"].phase) == left
        await member.hello(said, "10.0.0.77")
        assert (member.swarm.peers["x"].state, member.swarm.peers["x"].phase) == left
        await asyncio.sleep(60)  # it is called in vain
        assert (member.swarm.peers["x"].state, member.swarm.peers["x"].phase) == left
        await member.hello(greeting(session=10), "10.0.0.77")
        assert member.swarm.peers["x"].state == State.ALIVE
        await member.swarm.close()

    member, said = Member(LoopbackNetwork(), 0), greeting()
    run(scenario())


def test_a_table_full_of_the_refused_makes_room():
    """However many strangers were refused, a member still gets in, and memory is bounded."""

    async def scenario():
        network = LoopbackNetwork()
        member = Member(network, 0)
        await member.listen()
        for i in range(MAX_MEMBERS + 50):
            await member.hello(greeting(node=f"s{i}", session=i + 1, seed="1"), "10.0.0.66")
        assert len(member.swarm.peers) <= MAX_MEMBERS
        assert (await member.hello(greeting(node="good"), "10.0.0.7")).refusal == ""
        await member.swarm.close()

    run(scenario())


@pytest.mark.parametrize(
    ("callers", "most", "answered"),
    [
        ("sessions", PEER_LINES_BURST, PEER_GREETINGS_BURST),  # one name, as if it started anew
        ("goodbyes", PEER_LINES_BURST, PEER_GREETINGS_BURST),  # and took leave each time
        ("names", 100, None),
        ("settings", 100, None),
    ],
)
def test_nobody_fills_the_log_by_coming_and_going(callers, most, answered, monkeypatch):
    """Whatever a caller changes with each greeting."""
    monkeypatch.setattr("deca_node.swarm.STATE_LINES_BURST", 100)
    seconds, rate = 10, STRANGER_GREETINGS

    async def scenario():
        member = Member(LoopbackNetwork(), 0)
        await member.listen()
        let_in = 0
        for i in range(int(seconds * rate)):
            one = callers in ("sessions", "goodbyes")
            said = greeting(
                node="x" if one else f"x{i}",
                session=10 + i,
                seed="1" if callers == "settings" else "0",
                port=7430 if one else 1 + i,
            )
            with contextlib.suppress(PeerRefused):
                reply = await member.hello(said, "10.0.0.77")
                let_in += not reply.refusal
                if callers in ("goodbyes", "names"):
                    await member.goodbye(pb.GoodbyeRequest(sender=said.sender))
            await asyncio.sleep(1 / rate)
        await member.swarm.close()
        return let_in

    with structlog.testing.capture_logs() as logged:
        let_in = run(scenario())
    lines = sum(line["event"].startswith("peer ") for line in logged)
    assert lines > most // 2
    assert lines <= most + seconds * (PEER_LINES if answered else STATE_LINES) + 1
    if answered:
        # And the first, as a stranger.
        assert let_in <= 1 + answered + seconds * PEER_GREETINGS + 1


def test_two_nodes_of_one_name_do_not_fill_the_log_of_a_third():
    """They are refused in turn, for as long as both are there."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        swarm, seconds = members[0].swarm, 600
        for i in range(seconds):  # in turn a peer and not: its address is forgotten, and told anew
            at = f"10.0.0.{5 + i % 2}:7430"
            swarm.refusals.note(at, "n1", "name_taken", "another node is called 'n1'", float(i))
            swarm.refusals.forget(at)
        return seconds

    with structlog.testing.capture_logs() as logged:
        seconds = run(scenario())
    lines = sum(line["event"] == "peer refused" for line in logged)
    assert PEER_LINES_BURST <= lines <= PEER_LINES_BURST + seconds * PEER_LINES + 1


def test_a_caller_under_a_peers_name_uses_up_none_of_its_turns():
    """Elsewhere somebody greets as it without end: it is heard, and when it starts anew, too."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        for i in range(2 * STRANGER_GREETINGS_BURST):
            with contextlib.suppress(PeerRefused):
                await members[0].hello(greeting(node="n1", session=1000 + i), "10.0.0.66")
        for session in (101, 102):
            same = greeting(node="n1", session=session, host="10.0.0.1")
            assert not (await members[0].hello(same, "10.0.0.1")).refusal
        for member in members:
            await member.swarm.close()

    run(scenario())


def test_who_calls_but_cannot_be_called_is_no_member():
    """A peer behind a firewall is not waited for at visits; nor is one long silent."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        await members[0].hello(greeting(node="walled"), "10.0.0.77")
        assert members[0].swarm.peers["walled"].state == State.ALIVE
        assert members[0].swarm.members(0) == {"n0", "n1"}
        await asyncio.sleep(TIMING.gone_after + 1)
        members[0].swarm.sweep()
        assert members[0].swarm.peers["walled"].state == State.GONE
        assert members[0].swarm.members(0) == {"n0", "n1"}

    run(scenario())


def test_a_lone_late_neighbour_is_recorded_and_may_come_back():
    """With nobody else to wait for, the steps without it are counted, and it is still pulled."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        first, second = [await members[0].step(step) for step in range(2)]
        assert first.missing == second.missing == {"n1": "late"}
        assert not second.complete
        assert second.wait < 1
        back = asyncio.create_task(members[1].step(2))
        assert not members[0].exchange._patience.worth({"n1"})
        assert (await members[0].step(2)).used == ["n1"]
        assert members[0].exchange._patience.worth({"n1"})  # it is waited for again
        await back

    run(scenario())


def test_a_ready_block_is_taken_of_one_that_is_waited_for_no_more():
    """Its budget is gone, and its block is there."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        members[0].exchange._patience.waited({"n1"}, TIMING.wait_budget)
        ready = asyncio.create_task(members[1].step(0))
        await asyncio.sleep(1)
        assert (await members[0].step(0)).used == ["n1"]
        await ready

    run(scenario())


def test_a_step_that_is_over_before_it_begins_has_had_nobody():
    """As where the node is told to stop: nobody was asked, and all are missing."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        members[0].stopping.set()
        report = await members[0].step(0)
        assert report.missing == {"n1": "late"}
        assert not report.complete

    run(scenario())


async def gathers(member, busy_seconds):
    """A member's first exchange while it computes for so long; the report, and the seconds."""
    clock = asyncio.get_running_loop().time
    begin = clock()
    member.exchange.publish(snapshot(member.values, LAYOUT, 0, metadata("run", member.name, 0)))
    busy = asyncio.ensure_future(asyncio.sleep(busy_seconds))
    report = await member.exchange.gather(0, LAYOUT, lambda _: lambda *_: None, busy=busy)
    return report, clock() - begin


@pytest.mark.parametrize("late", [0.0, 0.5, 2.5, 3.5])
def test_a_step_waits_from_when_its_node_has_nothing_else_to_do(late):
    """However long it computed before, a slower neighbour has its deadline after that."""
    busy = 3 * TIMING.step_deadline

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)

        async def slower():
            await asyncio.sleep(late * TIMING.step_deadline)
            return await members[1].step(0)

        (report, took), theirs = await asyncio.gather(gathers(members[0], busy), slower())
        assert report.used == ["n1"]
        assert theirs.used == ["n0"]
        assert took == pytest.approx(late * TIMING.step_deadline, abs=0.1)
        exposed = max(0.0, late * TIMING.step_deadline - busy)
        assert report.exposed == pytest.approx(exposed, abs=0.1)
        budget = members[0].exchange._patience.budget("n1")
        assert budget == pytest.approx(TIMING.wait_budget - exposed, abs=0.1)
        assert report.edges["n1"].wait == pytest.approx(took, abs=0.1)
        assert members[0].swarm.traffic["n1"].waited == report.edges["n1"].wait

    run(scenario())


@pytest.mark.parametrize("drips", [False, True])
def test_a_silent_neighbour_costs_one_deadline_after_what_its_node_computes(drips):
    """Whether it sends nothing or a message now and then; its stream is closed with the step."""
    busy = 3 * TIMING.step_deadline

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        streams = []

        async def hostile(request):
            streams.append(request.serial)
            try:
                made = snapshot(members[1].values, LAYOUT, 0, metadata("run", "n1", 0))
                for message in made.messages if drips else ():
                    await asyncio.sleep(1.4 * TIMING.step_deadline)
                    yield message
                await asyncio.sleep(math.inf)
            finally:
                streams.remove(request.serial)

        members[1].exchange.answer_pull = hostile
        report, took = await gathers(members[0], busy)
        assert took == pytest.approx(busy + TIMING.step_deadline, abs=0.1)
        assert report.exposed == pytest.approx(TIMING.step_deadline, abs=0.1)
        assert not report.used
        assert not members[0].exchange._patience.worth({"n1"})
        assert not streams

    run(scenario())


def test_a_stream_is_not_held_open_for_ever():
    """A node that computes for hours gives its places at its neighbours back."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)
        gathering = asyncio.create_task(gathers(members[0], 3 * MAX_PULL_SECONDS))
        await asyncio.sleep(MAX_PULL_SECONDS)
        assert members[1].exchange._serving._pulls == {"n0": 1}
        await asyncio.sleep(TIMING.step_deadline + 1)
        assert not members[1].exchange._serving._pulls
        report, _ = await gathering
        assert report.missing == {"n1": "late"}
        assert members[0].exchange._patience.worth({"n1"})  # nobody waited for it

    run(scenario())


def test_a_neighbour_that_is_always_late_uses_up_its_budget():
    """It is waited for, then skipped for the rest of the visit, then waited for again."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        clock = asyncio.get_running_loop().time
        slow, others = members[2], members[:2]
        lateness = TIMING.step_deadline - 1  # never a missed deadline
        steps = int(TIMING.wait_budget / lateness) + 3

        async def drag(count):
            for step in range(count):
                await asyncio.sleep(lateness)
                await slow.step(step)

        async def life(member):
            spent = []
            for step in range(steps):
                begin = clock()
                await member.step(step)
                spent.append(clock() - begin)
            return spent

        await together(m.open(w) for m, w in zip(members, wanted(members), strict=True))
        dragging = asyncio.create_task(drag(steps))
        for spent in await together(life(member) for member in others):
            assert sum(spent) == pytest.approx(TIMING.wait_budget, rel=0.15)
            assert spent[-1] < 1
        dragging.cancel()
        for member in members:
            member.visit = 1
        await together(m.open(w) for m, w in zip(members, wanted(members), strict=True))
        assert all(member.exchange._patience.worth({"n2"}) for member in others)

    run(scenario())


BUDGET, DEADLINE = TIMING.wait_budget, TIMING.step_deadline


@pytest.mark.parametrize(
    ("delays", "most"),
    [
        ({"n1": lambda _: 20.0}, BUDGET),
        ({"n1": lambda _: 20.0, "n2": lambda _: math.inf}, BUDGET + DEADLINE),
        ({"n1": lambda _: 20.0, "n2": lambda _: 45.0}, BUDGET + DEADLINE),
        (
            # The second has used up its own budget when the first begins to be late, after it.
            {
                "n1": lambda step: 0.0 if step < 15 else 20.0,
                "n2": lambda step: 25.0 if step < 15 else 19.9,
            },
            2 * BUDGET,
        ),
        ({"n1": lambda step: 0.0 if step % 2 else math.inf}, BUDGET),
    ],
    ids=["late", "beside one that hangs", "beside a later one", "after a doubtful one", "at times"],
)
def test_a_budget_bounds_what_a_late_neighbour_costs_a_visit(delays, most, monkeypatch):
    """Whatever others do meanwhile, and whether its blocks come at all."""

    async def scenario():
        members = await meet(LoopbackNetwork(), len(delays) + 1)
        asking = members[0]
        await together(m.open(w) for m, w in zip(members, wanted(members, "full"), strict=True))

        def late(peer):
            async def pull(request, _timeout):
                serial = request.serial
                await asyncio.sleep(min(delays[peer](serial), 1e6))
                for message in snapshot(
                    asking.values, LAYOUT, serial, metadata("run", peer, serial)
                ).messages:
                    yield message

            return pull

        for peer in delays:
            monkeypatch.setattr(asking.swarm.link(peer), "pull", late(peer))
        clock = asyncio.get_running_loop().time
        begin, steps = clock(), 60
        for step in range(steps):
            await asking.exchange.gather(step, LAYOUT)
        return clock() - begin - steps * DOUBTFUL_SECONDS

    assert run(scenario()) <= most + 0.1


def test_nodes_that_see_different_members_do_not_wait_for_each_other():
    """Who is not wanted is told so at once, also when it asked before we came."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        clock = asyncio.get_running_loop().time
        begin = clock()
        # n0 and n1 want each other; n2 wants n0, which has another view.
        early = asyncio.create_task(members[2].open(frozenset({"n0"})))
        await asyncio.sleep(1)
        edges = await together(
            [members[0].open(frozenset({"n1"})), members[1].open(frozenset({"n0"}))]
        )
        assert [set(e.weights) for e in edges] == [{"n1"}, {"n0"}]
        assert (await early).weights == {}
        assert clock() - begin < 2 * TIMING.heartbeat + 1

    run(scenario())


def test_who_lets_a_visit_wait_is_not_waited_for_again():
    """The second visit costs one call's timeout, not another deadline; until it comes to one."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 3)
        clock = asyncio.get_running_loop().time
        spent = []
        for visit, count in enumerate((2, 2, 3, 2)):
            begin = clock()
            for member in members[:count]:
                member.visit = visit
            here = zip(members[:count], wanted(members)[:count], strict=True)
            edges = await together(member.open(others) for member, others in here)
            assert all(len(each.weights) == count - 1 for each in edges)
            spent.append(clock() - begin)
        assert spent[0] == pytest.approx(TIMING.visit_deadline, abs=1)
        assert spent[1] < TIMING.rpc + TIMING.heartbeat + 1
        assert spent[3] == pytest.approx(TIMING.visit_deadline, abs=1)
        # Said when it begins to be so, not again and again.
        assert [m.swarm.traffic["n2"].refusals["late"] for m in members[:2]] == [2, 2]

    run(scenario())


def test_a_stalled_reader_gives_memory_back():
    """A reader that stops in the middle of a stream does not keep an old block alive."""

    async def scenario():
        members = await visiting(LoopbackNetwork(), 2)

        def publish(serial):
            made = snapshot(members[0].values, LAYOUT, serial, metadata("run", "n0", serial))
            members[0].exchange.publish(made)
            return made

        old = publish(0)
        stream = members[0].pull(pb.PullRequest(sender=members[1].swarm.sender(), serial=0))
        await anext(stream)
        publish(1)
        assert old.messages == []
        with pytest.raises(PeerRefused) as caught:
            await anext(stream)
        assert caught.value.reason == "passed"
        assert not members[0].exchange._serving._published.failed  # that was of the step before

    run(scenario())


def test_only_those_that_can_exchange_count_for_how_far_apart_members_are():
    """Names that have gone, finished or were refused make no chain of neighbours longer."""

    async def scenario():
        member, *_ = await meet(LoopbackNetwork(), 4)
        swarm = member.swarm
        swarm._steps_per_visit = 1
        assert swarm.near_visits == 3
        like = swarm.peers["n1"]
        for state in (State.GONE, State.DONE, State.REFUSED):
            for index in range(60):
                name = f"{state}{index}"
                swarm.peers[name] = replace(like, name=name, state=state)
        assert swarm.near_visits == 3
        swarm.peers["n2"] = replace(like, name="n2", state=State.AHEAD)
        assert swarm.near_visits == 3

    run(scenario())
