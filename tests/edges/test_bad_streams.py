"""Bad streams over real sockets: refused with a named reason, counted, nothing mixed, all freed."""

import asyncio
import gc
import tracemalloc
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import structlog
import torch

from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import PeerRefused
from deca_node.exchange import Exchange
from deca_node.limits import CHUNK_BYTES, MAX_MESSAGE_BYTES
from deca_node.membership import Phase
from deca_node.mixing import mix_arrival
from deca_node.pb import node_pb2 as pb
from deca_node.swarm import Identity, Position, Swarm
from deca_node.transport.server import GrpcTransport
from deca_node.wire import (
    Layout,
    TensorSpec,
    frame,
    metadata,
    parse,
    reference_metadata,
    snapshot,
)
from tests.answers import Answers

LAYOUT = Layout((TensorSpec("w", (2, 1024, 1024)),))  # 8 MB, eight messages of values
# What a stream leaves behind for a moment: tasks, gRPC's calls. Far below one message.
LITTLE = CHUNK_BYTES // 4
TIMING = replace(Timing.local(), step_deadline=20.0)
PATIENCE = 0.3


class Side(Answers):
    """Swarm and exchange of one node on a real port."""

    def __init__(self, name, timing):
        self.name = name
        self.stopping = asyncio.Event()
        self.timing = timing
        self.transport = GrpcTransport("127.0.0.1", 0, patience=PATIENCE)
        self.values = torch.full((LAYOUT.numel,), 1.0 if name == "good" else 2.0)

    async def listen(self):
        port = await self.transport.listen(self, None)
        identity = Identity("run", self.name, ord(self.name[0]), {"seed": "0"}, port=port)
        self.swarm = Swarm(
            identity,
            self.transport,
            self.timing,
            lambda: Position(Phase.TRAINING, 0),
            100,
            lambda: self.exchange.wake(),  # noqa: PLW0108 - made below
            structlog.get_logger(),
        )
        self.exchange = Exchange(self.swarm, self.timing, "run", self.stopping)
        return f"127.0.0.1:{port}"

    def publish(self, serial):
        about = metadata("run", self.name, serial)
        self.exchange.publish(snapshot(self.values, LAYOUT, serial, about))

    async def gather(self, serial):
        own = self.values.clone()

        def mix(first, values, weight):
            part = slice(first, first + values.numel())
            mix_arrival(self.values[part], own[part], values, weight)

        return await self.exchange.gather(serial, LAYOUT, lambda _: mix)

    async def list_blocks(self, request):
        return pb.BlockList()

    async def fetch_block(self, request):
        yield b""

    async def refused(self, peer, reason):
        """Returns when the reason is counted."""
        while not (known := self.swarm.traffic.get(peer)) or not known.refusals[reason]:
            await self.exchange.changed()


class Evil(Side):
    """Sends what the test says in place of its block."""

    crime = None

    async def pull(self, request):
        about = metadata("run", "evil", request.serial)
        good = snapshot(self.values, LAYOUT, request.serial, about).messages
        async for message in self.crime(good, request.serial):
            yield message


@asynccontextmanager
async def neighbours(timing=TIMING):
    """A good node and an evil one with an edge between them."""
    good, evil = Side("good", timing), Evil("evil", timing)
    addresses = [await side.listen() for side in (good, evil)]
    good.swarm.propose(addresses[1])
    evil.swarm.propose(addresses[0])
    for side in (good, evil):
        while len(side.swarm.members(0)) < 2:
            await side.exchange.changed()
    edges = await asyncio.gather(
        good.exchange.open_visit(0, 100, frozenset({"evil"}), 0),
        evil.exchange.open_visit(0, 100, frozenset({"good"}), 0),
    )
    assert all(each.weights for each in edges)
    try:
        yield good, evil, addresses[0]
    finally:
        for side in (good, evil):
            await side.swarm.close()
            await side.transport.close(0)


async def truncated(good, serial):
    yield good[0]
    yield good[1][:-5]


async def ends_early(good, serial):
    yield good[0]


async def repeated(good, serial):
    yield good[0]
    yield good[0]


async def reordered(good, serial):
    yield good[0]
    yield good[2]


async def oversized(good, serial):
    yield good[0]
    yield b"\0" * (MAX_MESSAGE_BYTES + 1)


async def corrupted(good, serial):
    yield good[0]
    yield good[1][:-1] + bytes([good[1][-1] ^ 1])


async def mislabelled(good, serial):
    yield frame(serial, 0, LAYOUT.header(metadata("run", "somebody", serial)))


async def another_format(good, serial):
    header = LAYOUT.header(metadata("run", "evil", serial)).replace(b'"F32"', b'"F16"')
    yield frame(serial, 0, header)


async def wrong_format_id(good, serial):
    about = reference_metadata("run", "evil", serial, Format.INT8, None)
    yield frame(serial, 0, LAYOUT.header(about))


async def difference_from_nothing(good, serial):
    header = LAYOUT.header({**metadata("run", "evil", serial), "base": "0"})
    yield frame(serial, 0, header)


async def stale(good, serial):
    yield good[0]
    chunk = parse(good[1])
    yield frame(serial - 1, chunk.offset, chunk.data)


async def not_finite(good, serial):
    yield good[0]
    chunk = parse(good[1])
    yield frame(serial, chunk.offset, bytes(chunk.data[:-4]) + b"\0\0\xc0\x7f")


CRIMES = {
    truncated: "malformed",
    ends_early: "incomplete",
    repeated: "gap",
    reordered: "gap",
    oversized: "too_long",
    corrupted: "checksum",
    mislabelled: "header",
    another_format: "shape",
    wrong_format_id: "bad_format",
    difference_from_nothing: "header",
    stale: "wrong_step",
    not_finite: "not_finite",
}


async def test_every_crime_has_its_reason_and_leaves_nothing_behind():
    """The reason is counted, not a value is mixed, and Python's memory is where it was."""
    async with neighbours() as (good, evil, _):
        before = good.values.clone()
        tracemalloc.start()
        try:
            for serial, (crime, reason) in enumerate([(truncated, "malformed"), *CRIMES.items()]):
                evil.crime = crime
                counted = good.swarm.traffic["evil"].refusals[reason] if serial else 0
                gc.collect()
                held = tracemalloc.get_traced_memory()[0]
                gathered = await good.gather(serial + 1)
                gc.collect()
                assert gathered.missing == {"evil": reason}, crime
                assert good.swarm.traffic["evil"].refusals[reason] == counted + 1
                assert torch.equal(good.values, before)
                if serial:  # the first fills caches
                    assert tracemalloc.get_traced_memory()[0] - held < LITTLE, crime
        finally:
            tracemalloc.stop()


async def test_one_byte_a_second_costs_one_deadline():
    """Each byte comes, none is enough: the step ends without the neighbour, who is late."""
    left = asyncio.Event()

    async def drip(good, serial):
        try:
            for offset, byte in enumerate(parse(good[0]).data):
                yield frame(serial, offset, bytes([byte]))
                await asyncio.sleep(1)
        finally:
            left.set()

    async with neighbours(replace(TIMING, step_deadline=1.5)) as (good, evil, _):
        before = good.values.clone()
        evil.crime = drip
        gathered = await good.gather(1)
        assert gathered.missing == {"evil": "late"}
        assert good.swarm.traffic["evil"].refusals["late"] == 1
        assert torch.equal(good.values, before)
        await asyncio.wait_for(left.wait(), 10)  # the stream is given up at its other end as well


async def test_who_never_reads_is_let_go():
    """A pull that nobody reads ends as too_slow and holds neither a place nor the block."""
    async with neighbours() as (good, evil, address):
        good.publish(0)
        request = pb.PullRequest(sender=evil.swarm.sender(), serial=0).SerializeToString()
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_stream("/deca.v1.Peer/Pull")(request)
            await asyncio.wait_for(good.refused("evil", "too_slow"), 20)
            while good.exchange._serving._pulls:
                await good.exchange.changed()
            assert not good.exchange._serving._reading
            held = good.exchange._serving.held
            assert len(held.messages) == held.count  # others may still have it
            await good.exchange.make_room()
            assert held.messages == []
            # Who reads after all gets what was under way, and the reason.
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.details().startswith("too_slow")


async def test_a_wrong_format_id_in_a_call_is_refused():
    """In a pull, where the edge has another one, and in an offer, where it is none at all."""
    async with neighbours() as (good, evil, address):
        good.publish(0)
        link = evil.transport.link(address)
        sender = evil.swarm.sender()
        for wire in (pb.WIRE_FORMAT_BF16, 99):
            with pytest.raises(PeerRefused) as caught:
                await anext(
                    link.pull(pb.PullRequest(sender=sender, serial=0, wire_format=wire), 20)
                )
            assert caught.value.reason == "bad_format"
        with pytest.raises(PeerRefused) as caught:
            await link.open_visit(pb.VisitOffer(sender=sender, visit=1, wire_format=99), 20)
        assert caught.value.reason == "bad_format"
        assert not good.exchange._serving._pulls
        assert good.exchange.edges.formats == {}
        # The edge goes on as it was.
        stream = link.pull(pb.PullRequest(sender=sender, serial=0), 20)
        assert parse(await anext(stream)).serial == 0
        await stream.aclose()
        await link.close()


async def test_pulls_at_once_are_counted():
    """A peer has two pulls under way, however many it asks for."""
    async with neighbours() as (good, evil, address):
        link = evil.transport.link(address)
        request = pb.PullRequest(sender=evil.swarm.sender(), serial=0)
        waiting = [asyncio.ensure_future(anext(link.pull(request, 20))) for _ in range(2)]
        while good.exchange._serving._pulls["evil"] < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(PeerRefused) as caught:
            await anext(link.pull(request, 20))
        assert caught.value.reason == "too_many_pulls"
        good.publish(0)
        assert all(await asyncio.gather(*waiting))
        await link.close()
