"""What of a node reads a peer's bytes, each as a function of bytes that is held against its bounds.

A target answers with a word for what came of its input: ``ok``, or the reason of a refusal. It
raises what should not have been: any other error, a value mixed that is no number, a bound broken.
"""

import asyncio
import json
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from safetensors.torch import save

from deca_node.agreement import _Intake
from deca_node.checkpoint.incoming import Incoming
from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.consensus import Note, Tally, plan
from deca_node.errors import PayloadError, PeerError
from deca_node.kept import fits
from deca_node.limits import MAX_CONTACTS, MAX_MEMBERS, MAX_MESSAGE_BYTES
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import Records
from deca_node.references import Followed
from deca_node.robust import Aggregation, Arrivals
from deca_node.transport.connection import PEER
from deca_node.wire import (
    Layout,
    Receiver,
    TensorSpec,
    difference,
    metadata,
    parse,
    reference_metadata,
    snapshot,
)
from tests.fuzz.mutate import FLOATS, NUMBERS, Mutator
from tests.swarm import ToySwarm
from tests.virtual_time import VirtualTimeLoop

LAYOUT = Layout((TensorSpec("layers.0.w", (3, 5)), TensorSpec("layers.0.b", (300,))))
SERIAL, BASE = 7, 6
VALUES = torch.linspace(-1, 1, LAYOUT.numel)


def packed(messages):
    """Messages as one input: the length before each."""
    return b"".join(struct.pack("<I", len(message)) + message for message in messages)


def unpacked(data):
    """Messages of an input; what is cut off is left out."""
    found = []
    while len(data) >= 4 and len(found) < 64:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + min(length, 1 << 20)])
        data = data[4 + length :]
    return found


class Chunks:
    """One message, as wire.parse takes it."""

    name = "chunk"

    def seeds(self):
        foreign = pb_chunk(3, 0, b"abc")
        return [
            *snapshot(VALUES, LAYOUT, SERIAL, metadata("toy", "evil", SERIAL)).messages,
            foreign,
        ]

    def vary(self, mutator, data):
        return mutator.data(data)

    def run(self, data):
        try:
            chunk = parse(data)
        except PayloadError as error:
            return error.reason
        assert len(chunk.data) <= MAX_MESSAGE_BYTES
        return "ok"


def pb_chunk(serial, offset, data):
    """As another protobuf writer would write it."""
    from deca_node.pb.node_pb2 import Chunk

    digest = xxhash.xxh3_64_intdigest(data)
    return Chunk(serial=serial, offset=offset, xxh3=digest, data=data).SerializeToString()


class Streams:
    """A block's messages on an edge of some format, up to the mix."""

    def __init__(self, wire, *, noted=False):
        self.wire, self.noted = wire, noted
        self.name = f"stream-{'noted' if noted else wire.word}"

    def seeds(self):
        note = Notes.valid() if self.noted else None
        whole = snapshot(VALUES, LAYOUT, SERIAL, metadata("toy", "evil", SERIAL, note)).messages
        found = [packed(whole), packed(recut(whole, 3))]
        if self.wire is not Format.FP32:
            about = reference_metadata("toy", "evil", SERIAL, self.wire, BASE)
            size = LAYOUT.numel * self.wire.value_bytes
            scales = b"\x00\x3c" * 2 if self.wire is Format.INT8 else b""
            values = [b"\x11" * size]
            found.append(
                packed(difference(scales, values, LAYOUT, self.wire, SERIAL, about).messages)
            )
            about = reference_metadata("toy", "evil", SERIAL, self.wire, None)
            found.append(packed(snapshot(VALUES, LAYOUT, SERIAL, about).messages))
        return found

    def vary(self, mutator, data):
        messages = unpacked(data)
        if not messages or mutator.chance(0.05):
            return mutator.data(data)
        return packed(mutator.stream(messages))

    def run(self, data):
        receiver = Receiver(
            LAYOUT, SERIAL, "toy", "evil", noted=self.noted, wire=self.wire, base=BASE
        )
        followed, came = Followed(LAYOUT.numel), []
        first = 0
        try:
            for message in unpacked(data):
                arrived = receiver.feed(message)
                assert len(receiver._header or b"") <= LAYOUT.header_limit + MAX_MESSAGE_BYTES
                if arrived is None:
                    continue
                low, values = arrived
                assert low == first
                first += values.numel()
                assert first <= LAYOUT.numel
                assert np.isfinite(values.numpy()).all()
                if self.wire is not Format.FP32:
                    if not followed.values.numel():
                        followed.values = VALUES.clone()
                    values = followed.take(low, values, is_difference=receiver.is_difference)
                    assert np.isfinite(values.numpy()).all()
                came.append((low, values))
                if receiver.complete:
                    break
        except PayloadError as error:
            return error.reason
        assert receiver.complete == (first == LAYOUT.numel)
        if not receiver.complete:
            return "incomplete"
        arrivals, x = Arrivals(LAYOUT.numel, Aggregation("clipped")), VALUES.clone()
        arrivals.take("good", 0, VALUES, VALUES * 1.01, 0.3)
        for low, values in came:
            arrivals.take("evil", low, VALUES[low : low + values.numel()], values, 0.3)
        assert arrivals.mix_into(x).keys() == {"good", "evil"}
        assert float((x - VALUES).norm()) < 1.0, "one neighbour moved the block far"
        return "ok"


def recut(messages, pieces):
    """The same values in more messages."""
    from deca_node.wire import frame

    head, body = parse(messages[0]), parse(messages[1])
    data, size = bytes(body.data), -(-len(body.data) // (4 * pieces)) * 4
    cut = [data[low : low + size] for low in range(0, len(data), size)]
    return [messages[0]] + [
        frame(SERIAL, len(head.data) + index * size, part) for index, part in enumerate(cut)
    ]


GRAPH = {name: frozenset({"good", "evil", "n2"} - {name}) for name in ("good", "evil", "n2")}


class Notes:
    """What stands beside a block in final agreement, up to a round's end."""

    name = "note"
    PLAN = plan(GRAPH, 1e-3, 50)
    OWN = snapshot(VALUES, LAYOUT, SERIAL, metadata("toy", "good", SERIAL))

    @staticmethod
    def valid():
        return Notes.tally().note().model_dump_json()

    @staticmethod
    def tally():
        return Tally(
            "good", GRAPH, frozenset({"evil", "n2"}), same=True,
            chosen=Notes.PLAN, tolerance=1e-3, norm=1.0,
        )  # fmt: skip

    def seeds(self):
        lost = Notes.tally().note().model_copy(update={"lost": (("evil", "n2"),), "fault": 3})
        return [Notes.valid().encode(), lost.model_dump_json().encode()]

    def vary(self, mutator, data):
        if mutator.chance(0.5):
            return mutator.data(data)
        with suppress(ValueError, RecursionError):
            tree = json.loads(data)
            for name in list(tree) if isinstance(tree, dict) else []:
                if mutator.chance(0.3):
                    tree[name] = mutator.draw.choice(
                        [
                            *NUMBERS,
                            *FLOATS,
                            True,
                            False,
                            None,
                            "x",
                            [["evil", "n2"]],
                            [["evil", "good"]] * 9,
                        ]
                    )
            return json.dumps(tree).encode()
        return data

    def run(self, data):
        tally = Notes.tally()
        intake = _Intake(tally, Notes.OWN, VALUES.clone())
        try:
            sink = intake.hear("evil", data.decode("utf-8", errors="surrogateescape"))
        except PayloadError as error:
            return error.reason
        sink(0, VALUES * 1.5, 0.3)
        friend = Note.model_validate_json(Notes.valid())
        for _ in range(3):
            notes = {"evil": intake.notes["evil"], "n2": friend}
            tally.close_round(notes, dict.fromkeys(notes, 0.5))
            Note.model_validate_json(tally.note().model_dump_json())  # what it says can be read
            assert len(tally.lost) <= 3
        return f"ok {tally.done} {tally.plain}"


class Files:
    """A kept block's file from a peer that chose its digest itself."""

    name = "file"

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._expected = {"a": torch.zeros(3, 5), "b": torch.zeros(40, dtype=torch.bfloat16)}

    def seeds(self):
        return [save(self._expected), save({"a": torch.ones(3, 5)})]

    def vary(self, mutator, data):
        return mutator.data(data)

    def run(self, data):
        path = Path(self._folder.name) / "part"
        incoming = Incoming(path, 0, xxhash.xxh3_128_hexdigest(data))
        try:
            incoming.write(data)
            tensors = incoming.read()
            fits(tensors, self._expected)
        except PayloadError as error:
            return error.reason
        finally:
            incoming.discard()
            path.unlink(missing_ok=True)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        return "ok"


# What a member answers; who is known by certificates is asked for nothing here.
REQUESTS = {
    method.name: GetMessageClass(method.input_type)
    for method in PEER.methods
    if "sender" in method.input_type.fields_by_name
}
REPLIES = {
    "Hello": pb.HelloReply, "OpenVisit": pb.VisitAnswer, "SettleVisit": pb.VisitAnswer,
    "ListBlocks": pb.BlockList,
}  # fmt: skip


EVIL = {"run": "toy", "node": "evil", "session": 666}


class Swarm:
    """Two members that train in virtual time, and a peer that calls them and answers nonsense.

    An input is the number of a call, and the request's bytes. What the members ask of the peer is
    answered with mutations, too, drawn from the same seed.
    """

    name = "member"
    METHODS = tuple(sorted(REQUESTS))

    def __init__(self, seed="0"):
        self.answered = 0
        self._mutator = Mutator(f"answers/{seed}")
        self._loop = VirtualTimeLoop()
        self._swarm = ToySwarm(
            2, rounds=10**6, steps=3, kind="full", timing=Timing.lan(),
            aggregation=Aggregation("clipped"),
        )  # fmt: skip
        self._swarm.network.handlers["10.0.0.99:7430"] = self
        self._loop.run_until_complete(self._begin())

    async def _begin(self):
        self._swarm.start()
        while not all(node.story.steps for node in self._swarm.nodes):
            await asyncio.sleep(1)
        await self._greet()

    async def _greet(self):
        member = self._swarm.nodes[0].member
        await member.hello(self._valid("Hello"), "10.0.0.99")

    def _valid(self, method):
        kind = REQUESTS[method]
        request = kind(sender=pb.Sender(**EVIL))
        if method == "Hello":
            request.protocol, request.port, request.phase = 1, 7430, pb.PHASE_TRAINING
            request.fingerprint.add(name="seed", value="0")
            request.visit = self._swarm.nodes[0].member.visit
        return request

    def seeds(self):
        found = []
        for number, method in enumerate(self.METHODS):
            request = self._valid(method)
            for name in ("visit", "serial"):
                if name in request.DESCRIPTOR.fields_by_name:
                    setattr(request, name, 3)
            if method == "FetchBlock":
                request.xxh3 = "0" * 32
            found.append(bytes([number]) + request.SerializeToString())
        return found

    def vary(self, mutator, data):
        number = data[0] % len(self.METHODS) if data else 0
        body = data[1:]
        if mutator.chance(0.6):
            request = self._valid(self.METHODS[number])
            with suppress(DecodeError):
                request.MergeFromString(body)
            request.sender.CopyFrom(pb.Sender(**EVIL))
            for name in ("visit", "serial"):  # near to where the members are
                if name in request.DESCRIPTOR.fields_by_name and mutator.chance(0.5):
                    visit = self._swarm.nodes[0].member.visit + mutator.draw.randrange(-1, 2)
                    setattr(request, name, max(0, visit * (1 if name == "visit" else 3)))
            mutator.message(request)
            with suppress(ValueError):  # a string that cannot be written
                return bytes([number]) + request.SerializeToString()
        return bytes([number]) + mutator.data(body, 1 << 14)

    def run(self, data):
        if not data:
            return "nothing"
        method = self.METHODS[data[0] % len(self.METHODS)]
        try:
            request = REQUESTS[method].FromString(data[1:])
        except DecodeError:
            return f"{method} undecodable"
        node = self._swarm.nodes[0]
        word = self._loop.run_until_complete(self._call(node.member, method, request))
        for each in self._swarm.nodes:
            if not each.alive:
                each.task.result()
            swarm, asked = each.member.swarm, each.member.exchange._serving._visit.asked
            assert len(swarm.peers) <= MAX_MEMBERS
            assert len(swarm._contacts) <= MAX_CONTACTS
            kept = swarm.refusals.last, swarm.refusals._said, swarm._contacts._vain
            assert max(map(len, kept)) <= MAX_CONTACTS
            assert max(map(len, (swarm.told, swarm.traffic, asked))) <= MAX_MEMBERS
            assert all(torch.isfinite(layer).all() for layer in each.model.layers)
        return f"{method} {word}"

    async def _call(self, member, method, request):
        answer = {
            "Hello": lambda: member.hello(request, "10.0.0.99"),
            "OpenVisit": lambda: member.open_visit(request),
            "SettleVisit": lambda: member.settle_visit(request),
            "ListBlocks": lambda: member.list_blocks(request),
            "Goodbye": lambda: member.goodbye(request),
            "Pull": lambda: self._read(member.pull(request)),
            "FetchBlock": lambda: self._read(member.fetch_block(request)),
        }[method]
        try:
            async with asyncio.timeout(5):  # of virtual time
                reply = await answer()
        except PeerError as error:
            return error.reason
        except TimeoutError:
            return "held"
        finally:
            if self._mutator.chance(0.02):
                with suppress(PeerError):
                    await self._greet()
        if method == "Hello":
            assert reply.ByteSize() < 1 << 18
            return reply.refusal.partition(":")[0] or "met"
        return "ok"

    async def _read(self, stream):
        count = 0
        async for _ in stream:
            count += 1
        return count

    # --- what the peer answers (transport.Handler)

    def _reply(self, method, reply):
        self.answered += 1
        if self._mutator.chance(0.5):
            self._mutator.message(reply)
        elif self._mutator.chance(0.3):
            with suppress(DecodeError):
                reply = REPLIES[method].FromString(self._mutator.data(reply.SerializeToString()))
        return reply

    async def hello(self, request, source):
        sender, marks = pb.Sender(**EVIL), request.fingerprint
        reply = pb.HelloReply(sender=sender, protocol=1, fingerprint=marks, visit=request.visit)
        reply.phase = pb.PHASE_TRAINING
        return self._reply("Hello", reply)

    async def open_visit(self, request):
        member = self._swarm.nodes[0].member
        with suppress(PeerError):  # an edge needs both ends' offers
            offer = pb.VisitOffer(sender=pb.Sender(**EVIL), visit=request.visit)
            await member.open_visit(offer)
        accepted = pb.VisitAnswer(verdict=pb.VisitAnswer.VERDICT_ACCEPTED, visit=request.visit)
        return self._reply("OpenVisit", accepted)

    async def settle_visit(self, request):
        with suppress(PeerError):
            degree = pb.VisitDegree(sender=pb.Sender(**EVIL), visit=request.visit, degree=2)
            await self._swarm.nodes[0].member.settle_visit(degree)
        return self._reply("SettleVisit", pb.VisitAnswer(verdict=pb.VisitAnswer.VERDICT_ACCEPTED))

    async def pull(self, request):
        layout = self._swarm.nodes[0].method.layout
        about = metadata("toy", "evil", request.serial)
        whole = snapshot(torch.ones(layout.numel), layout, request.serial, about).messages
        self.answered += 1
        for message in self._mutator.stream(whole) if self._mutator.chance(0.7) else whole:
            yield message

    async def list_blocks(self, request):
        return self._reply("ListBlocks", pb.BlockList(sender=pb.Sender(**EVIL), visit=3))

    async def fetch_block(self, request):
        self.answered += 1
        yield self._mutator.data(b"abc")

    async def goodbye(self, request):
        return pb.GoodbyeReply()

    def close(self):
        async def end():
            for node in self._swarm.nodes:
                await node.kill()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self._loop.run_until_complete(end())
        self._loop.close()


class Replies:
    """Answers to what a member asks: greetings, and what a peer has to hand out."""

    name = "reply"

    def __init__(self):
        self._live = Swarm("replies")
        self._node = self._live._swarm.nodes[1]

    def seeds(self):
        hello = pb.HelloReply(sender=pb.Sender(**EVIL), protocol=1, phase=3, visit=3)
        hello.fingerprint.add(name="seed", value="0")
        hello.known.add(node="n7", address="10.0.0.7:7430")
        state = pb.BlockState(block=1, visit=1, bytes=100, xxh3="0" * 32)
        listed = pb.BlockList(sender=hello.sender, visit=3, blocks=[state])
        return [b"\0" + hello.SerializeToString(), b"\1" + listed.SerializeToString()]

    def vary(self, mutator, data):
        body, kind = data[1:], data[0] % 2 if data else 0
        message = (pb.HelloReply, pb.BlockList)[kind]()
        if mutator.chance(0.6):
            with suppress(DecodeError):
                message.MergeFromString(body)
            mutator.message(message)
            with suppress(ValueError):
                return bytes([kind]) + message.SerializeToString()
        return bytes([kind]) + mutator.data(body, 1 << 14)

    def run(self, data):
        kind = data[0] % 2 if data else 0
        try:
            message = (pb.HelloReply, pb.BlockList)[kind].FromString(data[1:])
        except DecodeError:
            return "undecodable"
        return self._live._loop.run_until_complete(self._take(kind, message))

    async def _take(self, kind, message):
        member = self._node.member
        try:
            if kind == 0:
                link = member.swarm._contacts._transport.link("10.0.0.99:7430")
                word = member.swarm._take_reply(message, "10.0.0.99:7430", link).name.lower()
            else:
                found = await member.catch_up._ask("evil", _Says(message), None)
                member.catch_up._records = Records()
                word = "refused" if found is None else "ok"
        except PeerError as error:
            return error.reason
        assert len(member.swarm.peers) <= MAX_MEMBERS
        assert len(member.swarm._contacts) <= MAX_CONTACTS
        return word

    def close(self):
        self._live.close()


class _Says:
    """A link whose other end answers this."""

    def __init__(self, reply):
        self._reply = reply

    async def list_blocks(self, request, timeout):
        return self._reply


def all_targets(seed="0"):
    """All of them, and what share of the frames each gets."""
    return [
        (Chunks(), 0.2),
        (Streams(Format.FP32), 0.2),
        (Streams(Format.FP32, noted=True), 0.1),
        (Streams(Format.BF16), 0.1),
        (Streams(Format.INT8), 0.1),
        (Notes(), 0.1),
        (Files(), 0.02),
        (Replies(), 0.06),
        (Swarm(seed), 0.12),
    ]
