"""Compressed edges over the loopback transport: bytes, sums, references that never part."""

import asyncio
import random
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import safetensors.torch
import torch

from deca_node.compression import MAX_SCALE_BITS, Format
from deca_node.errors import PayloadError, PeerRefused, PeerUnavailable
from deca_node.exchange.gathering import Gathering
from deca_node.loopback import LoopbackNetwork
from deca_node.mixing import mix_arrival
from deca_node.pb import node_pb2 as pb
from deca_node.pb.node_pb2 import Chunk
from deca_node.references import Followed, OwnReferences
from deca_node.transport.server import GrpcTransport
from deca_node.wire import (
    PREFIX_BYTES,
    SCALES,
    Layout,
    Receiver,
    TensorSpec,
    frame,
    metadata,
    reference_metadata,
    snapshot,
)
from tests.edges import test_exchange
from tests.edges.test_exchange import acquainted, together, wanted
from tests.swarm import ToySwarm
from tests.virtual_time import run

COMPRESSED = (Format.BF16, Format.INT8)
# Two messages of values and an odd end; tensors that do not end with a block of 256.
LAYOUT = Layout((TensorSpec("a", (300, 1000)), TensorSpec("b", (777,))))
SMALL = Layout((TensorSpec("a", (30, 100)), TensorSpec("b", (77,))))


class Member(test_exchange.Member):
    """A member with random values that wishes a format."""

    list_blocks = fetch_block = None  # nobody catches up here

    def __init__(self, network, index, wish=Format.INT8, layout=LAYOUT):
        super().__init__(network, index)
        self.wish, self.layout = wish, layout
        self.random = torch.Generator().manual_seed(index)
        self.values = torch.randn(layout.numel, generator=self.random)
        self.steps = 4

    async def open(self, wanted, step=0):
        serial = self.visit * self.steps + step
        return await self.exchange.open_visit(
            self.visit, self.steps, wanted, serial, wish=self.wish
        )

    def move(self, size=1e-4):
        """What a gradient does."""
        self.values += size * torch.randn(self.layout.numel, generator=self.random)

    async def step(self, step):
        serial = self.visit * self.steps + step
        half = self.values.clone()
        await self.exchange.make_room()
        made = snapshot(half, self.layout, serial, metadata("run", self.name, serial))
        self.fp32_bytes = sum(map(len, made.messages))
        self.exchange.encode(made, self.layout)
        self.exchange.publish(made)

        def mix(first, values, weight, own=None):
            for low, sent in (own or made).pieces(first, values.numel()):
                part = slice(low, low + sent.numel())
                mix_arrival(self.values[part], sent, values[low - first :][: len(sent)], weight)

        return await self.exchange.gather(serial, self.layout, lambda _: mix)


async def meet(count, wishes=None, layout=LAYOUT, steps=4, network=None):
    """Members that all know each other, with these wishes in turn."""
    network = network or LoopbackNetwork()
    wishes = wishes or [Format.INT8] * count
    members = [Member(network, i, wishes[i % len(wishes)], layout) for i in range(count)]
    for member in members:
        member.steps = steps
    return await acquainted(members)


async def open_all(members, kind="ring"):
    return await together(m.open(w) for m, w in zip(members, wanted(members, kind), strict=True))


def reference(member, wire):
    """The member's own x̂ as its newest snapshot has it."""
    return torch.cat(member.exchange._serving.encoded[wire].parts)


def references(member):
    """How many references the member keeps: its own, and its neighbours'."""
    exchange = member.exchange
    return len(exchange._gathering._followed) + len(exchange._references._last)


def assert_in_step(members):
    """Whoever follows a neighbour holds what that neighbour holds of itself, bit for bit."""
    by_name = {member.name: member for member in members}
    for member in members:
        for peer, followed in member.exchange._gathering._followed.items():
            own = reference(by_name[peer], member.exchange.edges.format(peer))
            assert torch.equal(followed.values, own)


# --- negotiation


def test_each_edge_has_the_more_compressed_of_its_ends_wishes():
    """One node may use several formats at once, and both ends name the same one."""

    async def scenario():
        members = await meet(3, [Format.FP32, Format.BF16, Format.INT8])
        edges = await open_all(members)
        assert edges[0].formats == {"n1": Format.BF16, "n2": Format.INT8}
        assert edges[1].formats == {"n0": Format.BF16, "n2": Format.INT8}
        assert edges[2].formats == {"n0": Format.INT8, "n1": Format.INT8}
        for step in range(3):
            assert all(report.complete for report in await together(m.step(step) for m in members))
            assert_in_step(members)
        assert members[1].exchange._serving.encoded.keys() == set(COMPRESSED)

    run(scenario())


def test_without_wishes_nothing_is_compressed():
    """A peer that says nothing has an fp32 edge, and nobody builds or holds a reference."""

    async def scenario():
        members = await meet(2, [Format.FP32])
        edges = await open_all(members)
        await together(m.step(0) for m in members)
        for member, edge in zip(members, edges, strict=True):
            assert edge.formats == {}
            assert member.exchange._serving.encoded == {}
            assert member.exchange._gathering._followed == {}

    run(scenario())


def test_a_format_that_is_none_or_not_the_edges_is_refused():
    """By its own reason, in the offer and in the pull."""

    async def scenario():
        members = await meet(2)
        sender = members[1].swarm.sender()
        offer = pb.VisitOffer(sender=sender, visit=0)
        offer.MergeFromString(b"\x20\x07")  # wire_format = 7
        with pytest.raises(PeerRefused) as caught:
            members[0].exchange.answer_offer(offer)
        assert caught.value.reason == "bad_format"
        await open_all(members)
        first = asyncio.ensure_future(members[0].step(0))
        await asyncio.sleep(0.1)  # published
        for other in (pb.WIRE_FORMAT_FP32, pb.WIRE_FORMAT_BF16):
            request = pb.PullRequest(sender=sender, serial=0, wire_format=other)
            with pytest.raises(PeerRefused) as caught:
                await anext(members[0].pull(request))
            assert caught.value.reason == "bad_format"
        await together([first, members[1].step(0)])

    run(scenario())


# --- the mix


@pytest.mark.parametrize("wishes", [[Format.BF16], [Format.INT8], [*Format, Format.INT8]])
def test_the_sum_over_all_nodes_stays(wishes):
    """What one end of an edge adds the other takes away, in every step, in every format."""

    async def scenario():
        members = await meet(4, wishes, SMALL)
        for visit in range(2):
            for member in members:
                member.visit = visit
            await open_all(members)
            for step in range(4):
                for member in members:
                    member.move()
                before = torch.stack([m.values for m in members]).double().sum(0)
                assert all(r.complete for r in await together(m.step(step) for m in members))
                after = torch.stack([m.values for m in members]).double().sum(0)
                assert float((after - before).abs().max()) < 2e-6

    run(scenario())


@pytest.mark.parametrize("wire", COMPRESSED)
def test_compressed_gossip_ends_where_all_agree(wire):
    """Without memory it would stall at the size of a rounding; with it the errors die out."""

    async def scenario():
        members = await meet(4, [wire], SMALL, steps=60)
        mean = torch.stack([m.values for m in members]).mean(0)
        await open_all(members)
        for step in range(60):
            await together(m.step(step) for m in members)
        for member in members:
            assert float((member.values - mean).abs().max()) < 1e-5

    run(scenario())


def test_the_first_mix_of_a_visit_is_as_good_as_fp32():
    """The reference begins as the whole block: the same values to the last bit."""

    async def scenario(wish):
        members = await meet(3, [wish])
        await open_all(members)
        await together(m.step(0) for m in members)
        return torch.stack([m.values for m in members])

    exact = run(scenario(Format.FP32))
    for wire in COMPRESSED:
        assert torch.equal(run(scenario(wire)), exact)


@pytest.mark.parametrize(("wire", "share"), [(Format.BF16, 0.52), (Format.INT8, 0.27)])
def test_a_visit_of_48_steps_sends_few_bytes(wire, share):
    """The whole first block, prefixes and headers included."""

    async def scenario():
        members = await meet(2, [wire], steps=48)
        await open_all(members)
        received = 0
        for step in range(48):
            for member in members:
                member.move()
            received += sum(r.received for r in await together(m.step(step) for m in members))
        assert received == sum(m.exchange.bytes_sent for m in members)
        assert received <= share * 2 * 48 * members[0].fp32_bytes

    run(scenario())


# --- references and faults


def pulls_of(members, name):
    """Fault filter: streams that come from a member."""
    address = next(m.transport.address for m in members if m.name == name)
    return lambda call: call.method == "Pull" and call.target == address


@pytest.mark.parametrize("wire", COMPRESSED)
@pytest.mark.parametrize("where", range(5))
def test_a_broken_stream_costs_a_whole_one_next(wire, where):
    """Wherever it breaks off: the half-advanced reference is thrown away, and asked for anew."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(2, [wire], network=network)
        await open_all(members)
        await together(m.step(0) for m in members)
        is_hit, seen = pulls_of(members, "n1"), []

        def fault(call, index, message):
            if is_hit(call):
                seen.append((call.request.HasField("base"), call.request.serial))
                if call.request.serial == 1 and index == where:
                    raise PeerUnavailable("cut")
            return message

        network.fault = fault
        messages = len(members[1].exchange._serving.encoded[wire].whole.messages)
        for step in range(1, 4):
            for member in members:
                member.move()
            report, other = await together(m.step(step) for m in members)
            assert other.complete
            cut = step == 1 and where < messages + (wire is Format.INT8)
            assert report.complete != cut
            if step < 3:
                assert_in_step(members)
                assert ("n1" in members[0].exchange._gathering._followed) != cut
        if where < messages + (wire is Format.INT8):
            assert {base for base, serial in seen if serial == 2} == {False}
        assert {base for base, serial in seen if serial == 3} == {True}

    run(scenario())


@pytest.mark.parametrize("at", [1, 2])
def test_a_neighbour_without_a_reference_gets_it_whole_at_any_step(at):
    """Others go on with differences in the same step; what it gets is what they hold."""

    async def scenario():
        members = await meet(3)
        await open_all(members)
        for step in range(at):
            await together(m.step(step) for m in members)
        members[0].exchange._gathering._followed.clear()  # as after a restart within the visit
        begin = members[0].exchange.bytes_sent, members[1].exchange.bytes_sent
        for member in members:
            member.move()
        reports = await together(m.step(at) for m in members)
        assert all(report.complete for report in reports)
        assert reports[0].received > 3 * reports[1].received
        assert members[0].exchange.bytes_sent - begin[0] < members[1].exchange.bytes_sent - begin[1]
        assert_in_step(members)

    run(scenario())


def test_references_are_freed_when_the_visit_ends():
    """After its last step, and where it ends early at the next one's beginning."""

    async def scenario():
        members = await meet(2)
        await open_all(members)
        for step in range(4):
            await together(m.step(step) for m in members)
            left = [references(member) for member in members]
            assert left == ([0, 0] if step == 3 else [2, 2])
        for visit in (1, 2):
            for member in members:
                member.visit = visit
            await open_all(members)
            assert not any(references(member) for member in members)
            await together(m.step(0) for m in members)

    run(scenario())


def test_a_late_reader_gets_the_step_it_asks_for():
    """The reference of the step before stays as it was while the sender goes on."""

    async def scenario():
        members = await meet(2)
        await open_all(members)
        sender = members[1].swarm.sender()
        making = asyncio.create_task(members[0].step(0))
        await asyncio.sleep(0)
        request = pb.PullRequest(sender=sender, serial=0, wire_format=pb.WIRE_FORMAT_INT8)
        stream = members[0].pull(request)
        receiver = Receiver(LAYOUT, 0, "run", "n0", wire=Format.INT8)
        receiver.feed(await anext(stream))
        first = members[0].values.clone()
        making.cancel()
        members[0].move()
        following = asyncio.create_task(members[0].step(1))
        await asyncio.sleep(0)
        followed = Followed(LAYOUT.numel)
        async for message in stream:
            followed.take(*receiver.feed(message), is_difference=receiver.is_difference)
        assert receiver.complete
        assert torch.equal(followed.values, first)
        following.cancel()

    run(scenario())


class Witness:
    """Everything that anybody published as its reference, and everything that was used of it."""

    def __init__(self, monkeypatch):
        self.published, self.used, self.whole = {}, 0, 0
        encode, gather = OwnReferences.encode, Gathering.gather
        witness = self

        def encoding(self, made, layout, formats, run, node):
            encode(self, made, layout, formats, run, node)
            for wire, encoded in made.encoded.items():
                seen = witness.published.setdefault((node, made.serial, wire), [])
                seen.append(torch.cat(encoded.parts))

        async def gathering(self, step, *arguments):
            report = await gather(self, step, *arguments)
            for peer in report.used:
                wire = step.edges.format(peer)
                if wire is not Format.FP32:
                    followed = self._followed[peer]
                    lives = witness.published[peer, step.serial, wire]
                    assert followed.serial == step.serial
                    assert any(torch.equal(followed.values, life) for life in lives)
                    witness.used += 1
            for peer in (*report.partial, *report.missing):
                assert peer not in self._followed
            return report

        monkeypatch.setattr(OwnReferences, "encode", encoding)
        monkeypatch.setattr(Gathering, "gather", gathering)


@pytest.mark.parametrize("wire", [*COMPRESSED, None])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_happens_desynchronises(seed, wire, monkeypatch):
    """Messages lost, damaged, repeated, stale; nodes late, dead and back: bit for bit."""
    source = random.Random(f"{seed}/{wire}")
    witness = Witness(monkeypatch)
    earlier = defaultdict(list)  # messages of a connection, which lives as long as its ends
    done = {"faults": 0}

    def fault(call, index, message):
        if call.method != "Pull":
            return message
        before = earlier[call.source, call.target]
        before.append(message)
        del before[:-40]
        if source.random() > 0.03:
            return message
        done["faults"] += 1
        what = source.choice(["lost", "damaged", "other", "other"])
        if what == "lost":
            raise PeerUnavailable("lost")
        if what == "damaged":
            where = source.randrange(len(message))
            return message[:where] + bytes([message[where] ^ 1 << source.randrange(8)])
        return source.choice(before)  # repeated, or stale

    def happen(node, record):
        if node.index and source.random() < 0.02 and done["faults"]:
            asyncio.get_running_loop().call_soon(asyncio.ensure_future, again(node))

    async def again(node):
        if node.alive and not node.story.finished:
            await node.kill()
            for ends in [ends for ends in earlier if node.address in ends]:
                del earlier[ends]
            await asyncio.sleep(source.uniform(0, 40))
            node.start()

    def wishes(index):
        return wire if wire is not None else list(Format)[(index + 1) % 3]

    async def scenario():
        swarm = ToySwarm(
            5,
            rounds=3,
            steps=8,
            delay=lambda: source.choice([0.001, 0.01, 0.3]),
            after_step=happen,
            wire_format=wishes,
        )
        swarm.network.fault = fault
        for node in swarm.nodes:
            node.pace = source.choice([0.3, 1.0, 1.0, 2.5])
        swarm.start()
        await swarm.finish()
        while not all(node.story.finished for node in swarm.nodes):
            await asyncio.sleep(50)
            await swarm.finish()

    run(scenario())
    assert done["faults"] >= 10  # of some 20 to 80, as the story goes
    assert witness.used > 200  # of some 300 to 500: by far most of what was sent


class Sockets:
    """In place of a LoopbackNetwork: each node listens on a free port of this machine."""

    def transport(self, host, port):
        return GrpcTransport("127.0.0.1", 0)


async def test_compressed_edges_work_over_real_sockets():
    """Differences, a lost reference, and requests in a format or from a base that do not fit."""
    members = [Member(Sockets(), i) for i in range(2)]
    try:
        for member in members:
            member.swarm.identity.port = await member.transport.listen(member, None)
            member.swarm.identity.host = "127.0.0.1"
            members[0].swarm.propose(f"127.0.0.1:{member.swarm.identity.port}")
        while any(len(member.swarm.members(0)) < 2 for member in members):
            await asyncio.sleep(0.01)
        await open_all(members)
        received = []
        for step in range(3):
            if step == 2:
                members[0].exchange._gathering._followed.clear()
            reports = await together(m.step(step) for m in members)
            assert all(report.complete for report in reports)
            assert_in_step(members)
            received.append([report.received for report in reports])
        assert received[1][0] < 0.27 * received[0][0]
        assert received[2][0] == pytest.approx(received[0][0], rel=1e-3)
        assert received[2][1] == pytest.approx(received[1][1], rel=1e-3)

        # It goes on handing out what its reader has.
        members[0].exchange._serving._let_go = lambda: None
        last = asyncio.ensure_future(members[0].step(3))
        await members[0].exchange.changed()
        link = members[1].swarm.link("n0")
        request = pb.PullRequest(sender=members[1].swarm.sender(), serial=3)
        with pytest.raises(PeerRefused) as caught:
            await anext(link.pull(request, 5))
        assert caught.value.reason == "bad_format"
        for base, size in ((0, received[0][0]), (2, received[1][0]), (7, received[0][0])):
            request = pb.PullRequest(
                sender=members[1].swarm.sender(), serial=3, wire_format=2, base=base
            )
            got = sum([len(message) async for message in link.pull(request, 5)])
            assert got == pytest.approx(size, rel=1e-3)
        await together([last, members[1].step(3)])
    finally:
        for member in members:
            await member.swarm.close()
            await member.transport.close(0)


# --- the stream


def published(wire, seed=0, moves=1, layout=LAYOUT, size=1e-4):
    """References of steps 5, 6… of a sender n1, and the values that its block then had."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.numel, generator=draw)
    own, made = OwnReferences(), []
    for serial in range(5, 6 + moves):
        half = snapshot(values, layout, serial, metadata("run", "n1", serial))
        own.encode(half, layout, {wire}, "run", "n1")
        made.append(half.encoded[wire])
        values = values + size * torch.randn(layout.numel, generator=draw)
    return made


@pytest.mark.parametrize("wire", COMPRESSED)
def test_every_stream_is_a_safetensors_file(wire):
    """Whole or difference: the joined data opens with the safetensors library and tells all."""
    first, second = published(wire)
    for encoded, kind in ((first.answer(None), "F32"), (second.answer(5), wire.dtype)):
        data = b"".join(Chunk.FromString(message).data for message in encoded.messages)
        tensors = safetensors.torch.load(data)
        about = safetensors.deserialize(data)
        assert {name for name, _ in about} - {SCALES} == {"a", "b"}
        assert {spec["dtype"] for name, spec in about if name != SCALES} == {kind}
        assert tensors["a"].shape == (300, 1000)
        if SCALES in tensors:
            assert tensors[SCALES].dtype == torch.bfloat16
            flat = torch.cat([tensors["a"].flatten(), tensors["b"]]).float()
            scales = tensors[SCALES].float().repeat_interleave(256)[: LAYOUT.numel]
            moved = torch.cat(second.parts) - torch.cat(first.parts)
            torch.testing.assert_close(flat * scales, moved, rtol=0, atol=1e-6)
        head = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
        assert f'"wire_format":"{wire.word}"' in head
        assert ('"base":"5"' in head) == (kind != "F32")
    assert second.answer(4) is second.answer(None) is second.whole


@pytest.mark.parametrize("wire", COMPRESSED)
def test_another_writers_messages_are_received(wire):
    """An ordinary protobuf writer cuts where it likes, but between header, scales and values."""
    first, second = published(wire)
    header, *rest = (Chunk.FromString(m).data for m in second.difference.messages)
    scales = len(rest.pop(0)) if wire is Format.INT8 else 0
    data = b"".join(Chunk.FromString(m).data for m in second.difference.messages)
    borders = sorted({0, len(header), len(header) + scales // 4 * 2, len(header) + scales})
    borders += [len(header) + scales + 2 * n for n in (1, 100, 777, 50_000)] + [len(data)]
    receiver = Receiver(LAYOUT, 6, "run", "n1", wire=wire, base=5)
    followed = Followed(LAYOUT.numel)
    followed.take(0, torch.cat(first.parts), is_difference=False)
    for low, high in pairwise(borders):
        if arrived := receiver.feed(frame(6, low, data[low:high])):
            followed.take(*arrived, is_difference=receiver.is_difference)
    assert receiver.complete
    assert torch.equal(followed.values, torch.cat(second.parts))


def refusal(messages, wire=Format.INT8, base=5, layout=LAYOUT):
    receiver = Receiver(layout, 6, "run", "n1", wire=wire, base=base)
    with pytest.raises(PayloadError) as caught:
        for message in messages:
            receiver.feed(message)
    return caught.value.reason


def test_every_damage_of_a_compressed_stream_has_its_reason():
    """Format, base, scales and values are each checked before anything is advanced."""
    _, second, third = published(Format.INT8, moves=2)
    header, scales, *values = second.difference.messages
    after = len(header) - PREFIX_BYTES

    def bad_scales(bits):
        changed = np.frombuffer(scales[PREFIX_BYTES:], np.uint16).copy()
        changed[1] = bits
        return [header, frame(6, after, changed.tobytes())]

    assert refusal(bad_scales(0x7FC0)) == "not_finite"
    assert refusal(bad_scales(0x7F80)) == "not_finite"
    assert refusal(bad_scales(0xBF80)) == "bad_scale"
    assert refusal(bad_scales(MAX_SCALE_BITS + 1)) == "bad_scale"
    assert refusal([header], wire=Format.BF16) == "bad_format"
    assert refusal([header], wire=Format.FP32, base=None) == "bad_format"
    assert refusal([header], base=4) == "wrong_base"
    assert refusal([header], base=None) == "wrong_base"
    assert refusal([third.difference.messages[0]]) == "wrong_step"
    assert refusal([header, values[0]]) == "gap"
    assert refusal([header, scales, scales]) == "gap"
    joined = scales[PREFIX_BYTES:] + values[0][PREFIX_BYTES:]
    assert refusal([header, frame(6, after, joined)]) == "malformed"
    assert refusal([header], layout=Layout(LAYOUT.tensors[:1])) == "shape"
    end = after + sum(len(m) - PREFIX_BYTES for m in (scales, *values))
    assert refusal([header, scales, *values, frame(6, end, b"\0")]) == "too_long"
    plain = snapshot(torch.zeros(LAYOUT.numel), LAYOUT, 6, metadata("run", "n1", 6))
    assert refusal(plain.messages) == "bad_format"
    whole_as_difference = reference_metadata("run", "n1", 6, Format.INT8, 5)
    assert refusal([frame(6, 0, LAYOUT.header(whole_as_difference))]) == "shape"


def test_bf16_values_that_are_no_numbers_are_refused():
    """NaN and infinity; half a value, too."""
    _, second = published(Format.BF16)
    header, values, *_ = second.difference.messages
    data = np.frombuffer(values[PREFIX_BYTES:], np.uint16).copy()
    after = len(header) - PREFIX_BYTES
    for bits in (0x7F80, 0xFF80, 0x7FC0):
        data[123] = bits
        bad = [header, frame(6, after, data.tobytes())]
        assert refusal(bad, wire=Format.BF16) == "not_finite"
    assert refusal([header, frame(6, after, b"\0" * 3)], wire=Format.BF16) == "malformed"


def test_flipped_bits_never_change_a_reference():
    """Any one bit of any message: it is noticed, or it changes nothing."""
    layout = Layout((TensorSpec("w", (7, 50)),))
    first, second = published(Format.INT8, layout=layout)
    source = random.Random(0)
    for _ in range(400):
        messages = list(second.difference.messages)
        index = source.randrange(len(messages))
        broken = bytearray(messages[index])
        where = source.randrange(len(broken) * 8)
        broken[where // 8] ^= 1 << where % 8
        messages[index] = bytes(broken)
        receiver = Receiver(layout, 6, "run", "n1", wire=Format.INT8, base=5)
        followed = Followed(layout.numel)
        followed.take(0, torch.cat(first.parts), is_difference=False)
        try:
            for message in messages:
                if arrived := receiver.feed(message):
                    followed.take(*arrived, is_difference=receiver.is_difference)
        except PayloadError:
            continue
        assert receiver.complete
        assert torch.equal(followed.values, torch.cat(second.parts))
