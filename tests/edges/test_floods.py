"""Callers that want too much, over real sockets: each meets its bound, and others are served."""

import asyncio
import struct
from contextlib import asynccontextmanager, suppress

import pytest

from deca_node.admission import Places, Turns, network
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerError, PeerRefused
from deca_node.limits import (
    MAX_CALLS,
    MAX_CALLS_PER_ADDRESS,
    MAX_CONTACTS,
    MAX_MEMBERS,
    MAX_PULLS_PER_PEER,
    MAX_REQUEST_BYTES,
    MAX_STREAMS_PER_CONNECTION,
    MAX_TRANSFERS_PER_PEER,
    PEER_GREETINGS,
    PEER_GREETINGS_BURST,
    PEER_LINES,
    PEER_LINES_BURST,
    STATE_LINES,
    STATE_LINES_BURST,
    STRANGER_GREETINGS,
    STRANGER_GREETINGS_BURST,
)
from deca_node.pb import node_pb2 as pb
from deca_node.swarm.contacts import REFUSED_HEARTBEATS
from deca_node.transport import server as door
from deca_node.transport.server import GrpcTransport
from deca_node.wire import Layout, Receiver, TensorSpec, frame
from tests.edges.test_transport import Answers, sender
from tests.fuzz import live

HELLO, PULL = "/deca.v1.Peer/Hello", "/deca.v1.Peer/Pull"


@asynccontextmanager
async def served():
    """A handler on a port, and a link to it."""
    handler, server = Answers(), GrpcTransport("127.0.0.1", 0)
    port = await server.listen(handler, handler)
    link = server.link(f"127.0.0.1:{port}")
    try:
        yield handler, link, port
    finally:
        handler.hold.set()
        await link.close()
        await server.close(0)


class Raw:
    """A hand-made HTTP/2 connection."""

    def __init__(self, reader, writer):
        self.writer, self.connection = writer, live.Connection()
        self.reading = asyncio.create_task(self.connection.read(reader, writer))
        writer.write(live.opening())

    async def ended(self, *streams, seconds=20):
        """Wait until these have ended, or the connection; whether they have."""
        await self.connection.wait(set(streams), seconds)
        return self.connection.over or set(streams) <= self.connection.ended

    async def close(self):
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        self.writer.close()


@asynccontextmanager
async def raw(port):
    """A connection; what is sent on it is made by hand."""
    made = Raw(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield made
    finally:
        await made.close()


async def answers(link):
    """Whether an honest caller is answered."""
    return (await link.hello(pb.HelloRequest(sender=sender()), 20)).visit == 7


async def test_half_a_request_is_not_waited_for_for_ever(monkeypatch):
    """The call is ended after its time, and its place is free again; others are served."""
    monkeypatch.setattr(door, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(door, "MAX_CALLS", 4)
    monkeypatch.setattr(door, "MAX_CALLS_PER_ADDRESS", 4)
    async with served() as (_, link, port), raw(port) as slow:
        for stream in (1, 3, 5):
            headers = live.headers(HELLO.encode())
            slow.writer.write(live.frame(live.HEADERS, live.END_HEADERS, stream, headers))
            begun = b"\0" + struct.pack(">I", 1000) + b"x"
            slow.writer.write(live.frame(live.DATA, 0, stream, begun))
        assert await answers(link)
        assert await slow.ended(1, 3, 5)
        for _ in range(5):
            assert await answers(link)


async def test_more_calls_than_there_are_places_are_refused_by_name(monkeypatch):
    """At once, as busy; as soon as one has ended the next is served."""
    monkeypatch.setattr(door, "MAX_CALLS", 9)
    monkeypatch.setattr(door, "MAX_CALLS_PER_ADDRESS", 2)
    async with served() as (handler, link, _):
        held = [asyncio.create_task(link.open_visit(pb.VisitOffer(visit=1), 30)) for _ in range(2)]
        async with asyncio.timeout(20):
            for _ in held:
                await handler.opened.acquire()
        with pytest.raises(PeerRefused) as caught:
            await link.hello(pb.HelloRequest(sender=sender()), 20)
        assert caught.value.reason == "busy"
        handler.hold.set()
        await asyncio.gather(*held)
        assert await answers(link)


async def test_a_connection_has_only_so_many_streams():
    """The ones on top are refused; another connection is served."""
    async with served() as (handler, link, port), raw(port) as greedy:
        body = pb.PullRequest(sender=sender("hold")).SerializeToString()
        streams = range(1, 2 * (MAX_STREAMS_PER_CONNECTION + 8), 2)
        for stream in streams:
            greedy.writer.write(b"".join(live.call(stream, PULL, body)))
        on_top = [*streams][MAX_STREAMS_PER_CONNECTION:]
        assert await greedy.ended(*on_top)
        assert await answers(link)
        assert not handler.hold.is_set()


async def test_more_connections_than_allowed_are_turned_away(monkeypatch):
    """Those that are there stay; when some close there is room again."""
    few = [o for o in door.SERVER_OPTIONS if o[0] != "grpc.max_allowed_incoming_connections"]
    monkeypatch.setattr(
        door, "SERVER_OPTIONS", [*few, ("grpc.max_allowed_incoming_connections", 3)]
    )
    async with served() as (_, link, port):
        assert await answers(link)
        others = [Raw(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(6)]
        body = pb.HelloRequest(sender=sender()).SerializeToString()
        for other in others:
            with suppress(OSError):
                other.writer.write(b"".join(live.call(1, HELLO, body)))
        await asyncio.gather(*(other.ended(1) for other in others))
        assert sum(1 in other.connection.ended for other in others) == 2
        assert sum(other.connection.over for other in others) == 4
        assert await answers(link)
        for other in others:
            await other.close()
        again = None
        for _ in range(100):  # until the closed ones are known to be
            again = Raw(*await asyncio.open_connection("127.0.0.1", port))
            with suppress(OSError):
                again.writer.write(b"".join(live.call(1, HELLO, body)))
            await again.ended(1)
            await again.close()
            if 1 in again.connection.ended:
                break
        assert 1 in again.connection.ended


@pytest.mark.parametrize(
    "claim",
    [
        struct.pack(">BI", 0, 2**32 - 1) + b"x" * 100,  # 4 GB are to follow
        struct.pack(">BI", 1, 20) + b"x" * 20,  # compressed, in no format
        struct.pack(">BI", 0, MAX_REQUEST_BYTES + 1) + b"x" * (MAX_REQUEST_BYTES + 1),
        struct.pack(">BI", 0, 40_000) + b"\x0b" * 40_000,  # groups within groups
        struct.pack(">BI", 0, 0) + b"x" * 10,  # more than one message
    ],
)
async def test_claims_are_not_believed(claim):
    """The call ends, nothing is set aside for what is only announced, others are served."""
    async with served() as (_, link, port), raw(port) as liar:
        headers = live.headers(HELLO.encode())
        liar.writer.write(live.frame(live.HEADERS, live.END_HEADERS, 1, headers))
        for low in range(0, len(claim), 16_000):
            end = low + 16_000 >= len(claim)
            liar.writer.write(live.frame(live.DATA, int(end), 1, claim[low : low + 16_000]))
        assert await liar.ended(1)
        assert await answers(link)


async def test_headers_beyond_their_bound_end_the_call():
    """HTTP/2 metadata of 64 kB is refused."""
    async with served() as (_, link, port), raw(port) as liar:
        body = pb.HelloRequest(sender=sender()).SerializeToString()
        more = [(b"x-%d" % i, b"y" * 900) for i in range(16)]
        liar.writer.write(b"".join(live.call(1, HELLO, body, *more)))
        assert await liar.ended(1)
        assert await answers(link)


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes.fromhex("16030100c8010000c40303"), b"\0" * 4096],
)
async def test_who_speaks_something_else_is_let_go(words):
    """A browser, a TLS client, noise."""
    async with served() as (_, link, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(words)
        writer.write_eof()
        with suppress(OSError):
            await asyncio.wait_for(reader.read(), 30)  # until the server closes it
        writer.close()
        assert await answers(link)


async def test_a_call_that_is_none_is_told_so():
    """An unknown method, no request at all, a request that cannot be read."""
    async with served() as (_, link, port), raw(port) as odd:
        odd.writer.write(b"".join(live.call(1, "/deca.v1.Peer/Nothing", b"")))
        headers = live.headers(HELLO.encode())
        flags = live.END_HEADERS | live.END_STREAM
        odd.writer.write(live.frame(live.HEADERS, flags, 3, headers))
        odd.writer.write(b"".join(live.call(5, HELLO, b"\xff" * 50)))
        assert await odd.ended(1, 3, 5)
        assert not odd.connection.over
        with pytest.raises(PeerError):
            await link._call("Hello", pb.PullRequest(sender=sender("wrong")), 20)
        assert await answers(link)


async def test_a_path_that_is_no_text_silences_nobody():
    """It would end the server of grpc 1.84 and 1.85, and with calls under way the process."""
    async with served() as (_, link, port):
        for _ in range(20):
            async with raw(port) as bad:
                headers = live.headers(b"/deca.v1.\xff\xff/Hello")
                flags = live.END_HEADERS | live.END_STREAM
                bad.writer.write(live.frame(live.HEADERS, flags, 1, headers))
                await bad.ended(1)
            assert await answers(link)


def test_a_streams_header_is_no_longer_than_its_tensors_ask_for():
    """A claim of 4 MB of JSON is refused before it is kept or read."""
    layout = Layout((TensorSpec("w", (3,)),))
    receiver = Receiver(layout, 1, "run", "evil")
    with pytest.raises(PayloadError) as caught:
        receiver.feed(frame(1, 0, struct.pack("<Q", layout.header_limit + 1) + b"[" * 100))
    assert caught.value.reason == "too_long"
    assert layout.header_limit < 32 << 10
    about = {"format": "pt", "run": "r" * 64, "node": "n" * 64, "serial": "9" * 20}
    assert len(layout.header(about)) < layout.header_limit


def test_the_bounds_hold_an_honest_swarm():
    """All members on one machine, a full graph: no place and no greeting is refused."""
    each = MAX_PULLS_PER_PEER + MAX_TRANSFERS_PER_PEER
    places = Places(MAX_CALLS, MAX_CALLS_PER_ADDRESS)
    # Pulls of all neighbours; of those who catch up no more than a few are served.
    assert all(places.enter("10.0.0.1") for _ in range(MAX_PULLS_PER_PEER * (MAX_MEMBERS - 1)))
    assert each * MAX_MEMBERS < MAX_CALLS
    timing = Timing.local()
    known = Turns(PEER_GREETINGS, PEER_GREETINGS_BURST, MAX_MEMBERS)
    strangers = Turns(STRANGER_GREETINGS, STRANGER_GREETINGS_BURST, MAX_CONTACTS)
    # All start at once, each seen at two addresses.
    assert all(strangers.take("10.0.0.1", 0.0) for _ in range(2 * MAX_MEMBERS))
    for second in range(120):
        for node in range(MAX_MEMBERS):
            assert known.take(f"n{node}", second * timing.heartbeat * 0.5)
    # Everybody comes at once, is suspect, gone and there again: each change is a line of the log.
    lines = Turns(STATE_LINES, STATE_LINES_BURST, 1)
    lines_of = Turns(PEER_LINES, PEER_LINES_BURST, MAX_MEMBERS)
    for node in range(MAX_MEMBERS):
        assert all(lines_of.take(f"n{node}", 0.0) and lines.take("", 0.0) for _ in range(4))
    # Another run's nodes on the same machine, refused for as long as they are there.
    for tick in range(600):
        pause = REFUSED_HEARTBEATS * timing.heartbeat
        for node in range(MAX_MEMBERS):
            now = 100.0 + tick * pause + node * pause / MAX_MEMBERS
            assert strangers.take("10.0.0.1", now), (tick, node)


def test_who_greets_too_often_waits_and_keeps_nobody_else_out():
    """By address; of IPv6 by network; the table is bounded."""
    turns = Turns(2.0, 5.0, 3)
    assert [turns.take("a", 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert turns.take("b", 0.0)
    assert [turns.take("a", 1.0) for _ in range(3)] == [True, True, False]
    for name in "cdefgh":
        assert turns.take(name, 1.0)
    assert len(turns._buckets) == 3
    assert network("2001:db8::1:2:3:4") == network("2001:db8::ffff:0:0:9") == "2001:db8::/64"
    assert network("10.0.0.1") != network("10.0.0.2")
    assert network("what") == "what"
    assert network("fe80::1%eth0") == network("fe80::2%eth1") == "fe80::/64"
    assert network("::ffff:10.0.0.1") == "10.0.0.1"  # at a socket for both protocols


def test_a_caller_cannot_take_all_places():
    """Nor leave more than it took."""
    places = Places(4, 3)
    assert [places.enter("a") for _ in range(4)] == [True, True, True, False]
    assert places.enter("b")
    assert not places.enter("c")
    places.leave("a")
    assert places.enter("c")
