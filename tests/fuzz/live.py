"""A real daemon under mutated requests over real sockets: gRPC, its framing, and raw HTTP/2.

The frames are written by hand (RFC 9113, and RFC 7541 without compression), so that any part of
them can be wrong.
"""

import asyncio
import json
import re
import struct
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from deca_node.limits import MAX_REQUEST_BYTES
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import ask_status
from deca_node.transport.connection import PEER, STATUS
from tests.cluster.daemons import Daemon
from tests.fuzz.mutate import Mutator
from tests.tiny import make_model

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CONNECTIONS, BATCH, BATCHES = 8, 24, 12
# Calls that are held back, as they should be, are given up after this.
PATIENCE_SECONDS = 0.15
# What grpc 1.83 prints when a caller turns away just as it is told of an error.
GRPC_TRACE = re.compile(
    r'Traceback [^\n]*\n(?:  File "src/python/grpcio/[^\n]*\n)+[^\n]*ExecuteBatchError[^\n]*\n'
)
# What a daemon may grow by beside what it trains: its callers' bounds (docs/robust.md).
GROWTH_BYTES = 192 << 20

METHODS = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for service in (PEER, STATUS)
    for method in service.methods
} | {
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest,
    "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        reflection_pb2.ServerReflectionRequest
    ),
}


def frame(kind, flags, stream, payload=b""):
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name, value):
    """A literal header field that is not indexed."""
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


def _length(number):
    if number < 127:
        return bytes([number])
    found, number = bytearray([127]), number - 127
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def headers(path, *more):
    """Of a gRPC call."""
    fields = [(b":path", path), (b":authority", b"x"), (b"te", b"trailers")]
    fields += [(b"content-type", b"application/grpc"), *more]
    return b"\x83\x86" + b"".join(header(name, value) for name, value in fields)


def call(stream, path, body, *more):
    """A call's frames: headers, and one message that ends it."""
    message = b"\0" + struct.pack(">I", len(body)) + body
    return [
        frame(HEADERS, END_HEADERS, stream, headers(path.encode(), *more)),
        frame(DATA, END_STREAM, stream, message),
    ]


def opening():
    """What a client begins with: room for all that the server will say."""
    wide = struct.pack(">HI", 4, 2**31 - 1)
    return (
        PREFACE
        + frame(SETTINGS, 0, 0, wide)
        + frame(SETTINGS, ACK, 0)
        + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
    )


class Connection:
    """One connection's reading side: which streams have ended, and whether it has."""

    def __init__(self):
        self.ended, self.over, self.changed = set(), False, asyncio.Event()
        self.statuses = Counter()

    async def read(self, reader, writer):
        try:
            while True:
                head = await reader.readexactly(9)
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big") & 2**31 - 1
                payload = await reader.readexactly(length)
                if kind == PING and not flags & ACK:
                    writer.write(frame(PING, ACK, 0, payload))
                ends = kind in (DATA, HEADERS) and flags & END_STREAM
                if kind == RST_STREAM or ends:
                    self.ended.add(stream)
                    self.changed.set()
        except (asyncio.IncompleteReadError, OSError):
            self.over = True
            self.changed.set()

    async def wait(self, streams, seconds):
        """Until these have ended, or the connection has."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.over and not streams <= self.ended:
                    self.changed.clear()
                    await self.changed.wait()


class Fuzzer:
    """Callers of one daemon."""

    def __init__(self, run, port, seed):
        self.run, self.port, self.seed = run, port, seed
        self.sent = 0
        self.given_up = 0
        self.broken = 0
        self.marks = []

    def valid(self, path, mutator):
        kind = METHODS[path]
        request = kind()
        if "sender" in request.DESCRIPTOR.fields_by_name:
            request.sender.CopyFrom(pb.Sender(run=self.run, node="evil", session=666))
        if path.endswith("Hello"):
            request.protocol, request.port, request.phase = 1, 9, pb.PHASE_TRAINING
            request.fingerprint.extend(self.marks)
        for name in ("visit", "serial"):
            if name in request.DESCRIPTOR.fields_by_name:
                setattr(request, name, mutator.draw.randrange(40))
        return request

    def one(self, mutator, stream):
        """Frames of one mutated request."""
        path = mutator.draw.choice(list(METHODS))
        request = self.valid(path, mutator)
        kind = mutator.draw.random()
        if kind < 0.35:
            mutator.message(request)
            with suppress(ValueError, DecodeError):
                return call(stream, path, request.SerializeToString()[: MAX_REQUEST_BYTES + 99])
        body = request.SerializeToString()
        if kind < 0.7:
            return call(stream, path, mutator.data(body))
        frames = call(stream, path, body)
        if kind < 0.76:  # the length and the compression flag before the message
            prefix = mutator.data(frames[1][9:14] + body)
            return [frames[0], frame(DATA, END_STREAM, stream, prefix)]
        if kind < 0.82:  # headers: more, longer, other
            names = [b"grpc-timeout", b"grpc-encoding", b"x-" + mutator.draw.randbytes(3), b":path"]
            values = [b"1H", b"gzip", b"identity", b"9" * 30, b"x" * mutator.draw.choice([9, 9000])]
            more = [
                (mutator.draw.choice(names), mutator.draw.choice(values))
                for _ in range(mutator.draw.choice([1, 3, 60]))
            ]
            return call(stream, path, body, *more)
        if kind < 0.88:  # HPACK
            return [frame(HEADERS, END_HEADERS, stream, mutator.data(frames[0][9:])), frames[1]]
        if kind < 0.94:  # frames of any kind
            raw = frame(
                mutator.draw.randrange(12),
                mutator.draw.randrange(64),
                mutator.draw.choice([0, stream, stream + 1, 2**31 - 1]),
                mutator.draw.randbytes(mutator.draw.choice([0, 4, 5, 6, 8, 40])),
            )
            return [frames[0], raw, frames[1]]
        return [mutator.data(b"".join(frames))]

    async def work(self, number, frames):
        """One caller's share of the frames."""
        done = 0
        while done < frames:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            connection = Connection()
            reading = asyncio.create_task(connection.read(reader, writer))
            try:
                writer.write(opening())
                stream = 1
                for _ in range(BATCHES):
                    streams = set()
                    for _ in range(min(BATCH, frames - done)):
                        if connection.over or writer.is_closing():
                            break
                        mutator = Mutator(f"{self.seed}/live/{number}/{done}")
                        writer.write(b"".join(self.one(mutator, stream)))
                        streams.add(stream)
                        stream, done = stream + 2, done + 1
                        self.sent += 1
                    await writer.drain()
                    await connection.wait(streams, PATIENCE_SECONDS)
                    if connection.over or done >= frames:
                        break
                    for late in streams - connection.ended:
                        self.given_up += 1
                        writer.write(frame(RST_STREAM, 0, late, struct.pack(">I", 8)))
            except OSError:
                pass
            finally:
                self.broken += connection.over
                writer.close()
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


def start(folder):
    """A daemon that trains alone for as long as it is let."""
    model = make_model(folder / "model", "llama", layers=2)
    data = folder / "data.jsonl"
    rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"run.name=fuzz-{uuid.uuid4().hex[:8]}", "run.start_when=1", f"model.path={model}",
        "model.dtype=fp32", f"data.train={data}", "network.zeroconf=false",
        "schedule.rounds=100000", "schedule.steps=50", "node.save_every=0",
    ]  # fmt: skip
    return Daemon(folder, "good", settings).start()


async def attack(frames, seed="0", tell=lambda text: None):
    """Send so many mutated frames to a daemon; it must live, train and answer, and stay small."""
    with tempfile.TemporaryDirectory() as scratch:
        daemon = start(Path(scratch))
        try:
            status = await asyncio.to_thread(daemon.until, lambda s: s.steps_done > 20)
            try:
                return await _attack(daemon, status, frames, seed, tell)
            except OSError as error:
                code = daemon.process.poll()
                log = daemon.log.read_text()[-3000:]
                raise AssertionError(f"cannot be called; exit code {code}:\n{log}") from error
        finally:
            daemon.end(9)
            daemon.wait()


async def _attack(daemon, status, frames, seed, tell):
    port = int(status.address.rpartition(":")[2])
    fuzzer = Fuzzer(status.run, port, seed)
    process = psutil.Process(daemon.process.pid)

    async def all_of(frames, seed):
        fuzzer.seed = seed
        share = -(-frames // CONNECTIONS)
        await asyncio.gather(*(fuzzer.work(number, share) for number in range(CONNECTIONS)))

    await all_of(max(CONNECTIONS, frames // 10), f"{seed}/warm")
    before, begin = process.memory_info().rss, time.monotonic()
    await all_of(frames, seed)
    seconds = time.monotonic() - begin
    assert daemon.process.poll() is None, daemon.log.read_text()[-3000:]
    after = await ask_status(status.address, 30)
    later = await asyncio.to_thread(daemon.until, lambda s: s.steps_done > after.steps_done)
    grown = process.memory_info().rss - before
    log = GRPC_TRACE.sub("", daemon.log.read_text())
    tell(
        f"live: {fuzzer.sent} frames, {frames / seconds:.0f}/s, {fuzzer.broken} connections ended"
        f" by the daemon, {fuzzer.given_up} calls held back, +{grown >> 20} MiB,"
        f" {later.steps_done} steps trained,"
        f" refused: {dict(later.refusals)}"
    )
    assert "Traceback" not in log, log[max(0, log.index("Traceback") - 900) :][:2500]
    assert grown < GROWTH_BYTES, f"{grown >> 20} MiB more than before"
    return fuzzer.sent
