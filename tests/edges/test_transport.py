"""One contract, two transports: what loopback promises, gRPC keeps, and the other way round."""

import asyncio
import gc
import socket
import sys
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from deca_node.errors import (
    REASONS,
    ListenError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnavailable,
)
from deca_node.loopback import LoopbackNetwork
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink, ask_all, ask_status
from deca_node.transport.gate import host_of
from deca_node.transport.server import GrpcTransport
from deca_node.wire import frame


class Answers:
    """A handler with canned answers that remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.hold = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.opened = asyncio.Semaphore(0)  # one for each offer that came

    async def hello(self, request, source):
        self.asked.append((request.sender.node, source))
        if request.sender.run == "wrong":
            raise PeerRefused("other_run", "this is run 'right'")
        return pb.HelloReply(visit=7)

    async def open_visit(self, request):
        self.opened.release()
        await self.hold.wait()
        return pb.VisitAnswer(visit=request.visit)

    async def settle_visit(self, request):
        return pb.VisitAnswer(visit=request.visit + request.degree)

    async def pull(self, request):
        try:
            for index in range(request.serial):
                yield frame(request.serial, index, bytes([index]) * 1000)
            if request.sender.run == "hold":
                await self.hold.wait()
            if request.sender.run == "refuse":
                raise PeerRefused("passed", "too late")
        finally:
            self.cancelled.set()

    async def list_blocks(self, request):
        return pb.BlockList(visit=request.after)

    async def fetch_block(self, request):
        yield frame(request.block, request.offset, b"x" * 1000)

    async def goodbye(self, request):
        return pb.GoodbyeReply()

    async def get_status(self):
        return pb.NodeStatus(node="bob", peers=[pb.PeerStatus(node="eve")])

    async def get_history(self, request):
        return pb.HistoryReply(
            points=[pb.HistoryPoint(first=request.after + 1, last=request.limit)]
        )

    async def watch_status(self, interval):
        try:
            for step in range(3 if interval == 0 else sys.maxsize):
                yield pb.NodeStatus(step=step, waiting_for="" if interval == 0 else "x" * 2**20)
        finally:
            self.cancelled.set()


@pytest.fixture(params=["loopback", "grpc"])
def make(request):
    """A function that makes a transport on a free port."""
    network = LoopbackNetwork()
    if request.param == "grpc":
        return lambda port=0: GrpcTransport("127.0.0.1", port)
    return lambda port=0: network.transport("127.0.0.1", port)


@asynccontextmanager
async def serving(make):
    """A served handler and a link to it."""
    handler, server, client = Answers(), make(), make()
    port = await server.listen(handler, handler)
    link = client.link(f"127.0.0.1:{port}")
    try:
        yield handler, server, link, port
    finally:
        handler.hold.set()
        await link.close()
        await server.close(0)


def sender(run="right"):
    return pb.Sender(run=run, node="alice", session=3)


async def test_unary_calls_arrive_and_are_answered(make):
    """Every call reaches its method and its answer comes back."""
    async with serving(make) as (handler, _, link, _):
        assert (await link.hello(pb.HelloRequest(sender=sender()), 5)).visit == 7
        assert handler.asked == [("alice", "127.0.0.1")]
        answer = await link.settle_visit(pb.VisitDegree(visit=4, degree=2), 5)
        assert answer.visit == 6
        assert await link.goodbye(pb.GoodbyeRequest(), 5) == pb.GoodbyeReply()


async def test_a_refusal_keeps_its_reason(make):
    """PeerRefused crosses the wire with the word under which it is counted."""
    async with serving(make) as (_, _, link, _):
        with pytest.raises(PeerRefused, match="this is run 'right'") as caught:
            await link.hello(pb.HelloRequest(sender=sender("wrong")), 5)
        assert caught.value.reason == "other_run"


async def test_streams_arrive_in_order_and_whole(make):
    """Messages of a pull are the bytes that the handler gave."""
    async with serving(make) as (_, _, link, _):
        messages = [m async for m in link.pull(pb.PullRequest(sender=sender(), serial=5), 5)]
        assert messages == [frame(5, i, bytes([i]) * 1000) for i in range(5)]


async def test_a_stream_may_end_in_a_refusal(make):
    """What came before a refusal is delivered, then the refusal is raised."""
    async with serving(make) as (_, _, link, _):
        got = []
        with pytest.raises(PeerRefused) as caught:
            async for message in link.pull(pb.PullRequest(sender=sender("refuse"), serial=2), 5):
                got.append(message)  # noqa: PERF401 - kept although the stream then fails
        assert caught.value.reason == "passed"
        assert len(got) == 2


async def test_a_slow_answer_is_a_timeout(make):
    """The caller waits as long as it said, for calls and for streams."""
    async with serving(make) as (_, _, link, _):
        with pytest.raises(PeerTimeout):
            await link.open_visit(pb.VisitOffer(), 0.05)
        with pytest.raises(PeerTimeout):
            async for _ in link.pull(pb.PullRequest(sender=sender("hold")), 0.05):
                pass


async def test_leaving_a_stream_ends_it_at_the_server(make):
    """A reader that turns away does not leave the server waiting."""
    async with serving(make) as (handler, _, link, _):
        request = pb.PullRequest(sender=sender("hold"), serial=1)
        async with aclosing(link.pull(request, 30)) as messages:
            async for _ in messages:
                break
        await asyncio.wait_for(handler.cancelled.wait(), 5)


async def test_a_link_that_we_close_is_unavailable_to_whoever_uses_it():
    """Calls under way and later ones fail as PeerUnavailable, not as a cancelled task."""
    transport = GrpcTransport("127.0.0.1", 0)
    port = await transport.listen(Answers(), None)
    link = transport.link(f"127.0.0.1:{port}")

    async def read():
        async for _ in link.pull(pb.PullRequest(sender=sender("hold"), serial=1), 30):
            begun.set()

    begun = asyncio.Event()
    calls = [
        asyncio.create_task(read()),
        asyncio.create_task(link.open_visit(pb.VisitOffer(), 30)),
    ]
    await asyncio.wait_for(begun.wait(), 5)
    await link.close()
    for call in calls:
        with pytest.raises(PeerUnavailable):
            await asyncio.wait_for(call, 5)
    with pytest.raises(PeerUnavailable):
        await link.hello(pb.HelloRequest(sender=sender()), 5)
    with pytest.raises(PeerUnavailable):
        await read()
    await transport.close(0)


async def test_nobody_there_is_unavailable(make):
    """Calling an address where nobody listens fails at once, as PeerUnavailable."""
    link = make().link("127.0.0.1:9")
    with pytest.raises(PeerUnavailable):
        await link.hello(pb.HelloRequest(), 5)
    with pytest.raises(PeerUnavailable):
        async for _ in link.pull(pb.PullRequest(), 5):
            pass
    await link.close()


async def test_a_server_that_goes_away_becomes_unavailable(make):
    """After the server closed, calls fail, and a stream under way ends with an error."""
    async with serving(make) as (_, server, link, _):
        await link.hello(pb.HelloRequest(sender=sender()), 5)
        await server.close(0)
        with pytest.raises(PeerError):
            await link.hello(pb.HelloRequest(sender=sender()), 5)


async def test_a_taken_port_is_one_clear_line(make):
    """Listening on a used port names the port and the setting."""
    async with serving(make) as (handler, _, _, port):
        with pytest.raises(ListenError, match=str(port)):
            await make(port).listen(handler, handler)


async def test_status_is_served_beside_the_peers():
    """GetStatus, GetHistory and WatchStatus answer; a dead address is an error of that entry."""
    async with serving(lambda port=0: GrpcTransport("127.0.0.1", port)) as (_, _, link, port):
        alive, dead = await ask_all([f"127.0.0.1:{port}", "127.0.0.1:9"], 5)
        assert alive.node == "bob"
        assert isinstance(dead, PeerUnavailable)
        assert [status.step async for status in link.watch_status(0)] == [0, 1, 2]
        [point] = await link.get_history(3, 9, 5)
        assert (point.first, point.last) == (4, 9)
        with pytest.raises(PeerUnavailable):
            await ask_status("127.0.0.1:9", 5)


async def test_a_watcher_that_does_not_read_is_let_go():
    """After the time that a reader has for a message; what it would have been told is dropped."""
    handler, server = Answers(), GrpcTransport("127.0.0.1", 0, patience=0.2)
    port = await server.listen(handler, handler)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = channel.unary_stream(
                "/deca.v1.Status/WatchStatus",
                request_serializer=pb.WatchStatusRequest.SerializeToString,
            )
            call = watch(pb.WatchStatusRequest(interval_seconds=1))
            await call.read()
            await asyncio.wait_for(handler.cancelled.wait(), 20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert "too_slow" in caught.value.details()
    finally:
        await server.close(0)


async def test_health_and_reflection_work_without_our_protos():
    """Standard tools see the services and their health, as grpcurl and orchestrators do."""
    async with serving(lambda port=0: GrpcTransport("127.0.0.1", port)) as (_, _, _, port):
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "deca.v1.Peer", "deca.v1.Status"):
                reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # it would have no end
                await anext(aiter(stub.Watch(health_pb2.HealthCheckRequest())))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

        def reflect():
            with grpc.insecure_channel(address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                found = database.FindFileContainingSymbol("deca.v1.Status")
                return set(database.get_services()), {s.name for s in found.service}

        services, described = await asyncio.to_thread(reflect)
        assert {"deca.v1.Peer", "deca.v1.Status", "grpc.health.v1.Health"} <= services
        assert described == {"Control", "Peer", "Status"}


def test_a_port_for_health_that_is_taken_leaves_nothing_open(capsys):
    """Nor does anything speak after the error, when the event loop is gone."""
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.create_server(("127.0.0.1", 0)) as own,
    ):
        taken, port = (each.getsockname()[1] for each in (other, own))
        own.close()
        transport = GrpcTransport("127.0.0.1", port, health_port=taken)
        with pytest.raises(ListenError, match=f"{taken}: the port is taken .* node.health_port"):
            asyncio.run(transport.listen(Answers(), None))
        socket.create_server(("127.0.0.1", port)).close()
        del transport
        gc.collect()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "another program is there, not a node"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a web server is there"),
        (None, "Connection refused"),
    ],
    ids=["another program", "a web server", "nothing"],
)
async def test_what_is_at_a_port_is_said_in_a_few_words(greeting, words):
    """Without gRPC's own story of it, and whose address it was; no certificate is to blame."""

    async def greet(_, writer):
        writer.write(greeting)
        await writer.drain()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    if greeting is None:
        server.close()
        await server.wait_closed()
    try:
        with pytest.raises(PeerUnavailable, match=words) as told:
            await ask_status(f"127.0.0.1:{port}", 30)
        assert str(told.value).startswith(f"127.0.0.1:{port}: ")
        assert len(str(told.value)) < 80
    finally:
        server.close()


async def test_a_host_that_is_called_like_a_scheme_is_a_host(tmp_path, monkeypatch):
    """gRPC would open the socket file 80 for ``unix:80``, wherever the node was started."""
    monkeypatch.chdir(tmp_path)
    handler, server = Answers(), GrpcTransport("127.0.0.1", 0)
    await server.listen(handler, handler, None, Path("80"))
    try:
        link = server.link("unix:80")
        with pytest.raises(PeerError):
            await link.hello(pb.HelloRequest(), 5)
        await link.close()
        assert not handler.asked
        link = GrpcLink(f"unix:{tmp_path}/80")  # as this machine's own list has it
        assert (await link.get_status(5)).node == "bob"
        await link.close()
    finally:
        await server.close(0)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.7:567", "192.0.2.7"),
        ("ipv6:%5B2001:db8::7%5D:567", "2001:db8::7"),
        ("ipv6:[2001:db8::7]:567", "2001:db8::7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:567", "fe80::1%eth0"),
        ("unix:", "127.0.0.1"),
    ],
)
def test_where_a_caller_is(peer, host):
    """Of what gRPC says of a call's other end."""
    assert host_of(peer) == host


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED],
)
async def test_an_errors_text_is_the_other_ends_and_no_letter_of_it_is_obeyed(code):
    """It goes into logs, statuses and to terminals."""
    told = await _refused(code, "stranger: \x1b]52;c;eA==\x07\x1b[2J\r\n" + "x" * 5000)
    assert str(told).isprintable()
    assert "]52;c;eA==" in str(told)
    assert len(str(told)) < 400


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, "unimplemented"),
        (grpc.StatusCode.INVALID_ARGUMENT, "invalid_argument"),
        (grpc.StatusCode.PERMISSION_DENIED, "permission_denied"),
        (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated"),
        (grpc.StatusCode.DATA_LOSS, "refused"),
        (grpc.StatusCode.FAILED_PRECONDITION, "refused"),
    ],
)
async def test_an_errors_word_is_one_of_ours_whatever_the_other_end_says(code, reason):
    """Under it the fault is counted: a label of metrics."""
    told = await _refused(code, "gibberish: as it likes")
    assert told.reason == reason
    assert reason in {*REASONS, "refused"}
    assert "as it likes" in str(told)


async def _refused(code, text):
    """What is made of an answer with this code and text."""

    async def rude(request, context):
        await context.abort(code, text)

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(rude)
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("deca.v1.Status", {"GetStatus": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(PeerError) as told:
            await ask_status(f"127.0.0.1:{port}", 30)
    finally:
        await server.stop(0)
    return told.value
