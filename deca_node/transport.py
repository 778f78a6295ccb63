"""How nodes reach each other: the interface, and its implementation over gRPC.

The only file that imports grpc. Its exceptions become PeerErrors here, and ours status codes.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

# gRPC has no setting for the least version of TLS. It has one for the ciphers of TLS 1.2, and this
# one needs an RSA certificate, of which a run has none: what is left is TLS 1.3. Read once, when
# gRPC is loaded.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES128-GCM-SHA256"
# Its own lines about handshakes and headers that are wrong, with which a caller could fill a disk;
# what they mean for the run is in our own log.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deca_node.admission import Places, network
from deca_node.errors import (
    ListenError,
    PeerError,
    PeerRefused,
    PeerTimeout,
    PeerUnavailable,
    known_reason,
)
from deca_node.limits import (
    HANDSHAKE_SECONDS,
    IDLE_SECONDS,
    MAX_CALLS,
    MAX_CALLS_PER_ADDRESS,
    MAX_CONNECTIONS,
    MAX_HEALTH_CHECKS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_REASON_BYTES,
    MAX_REQUEST_BYTES,
    MAX_STREAMS_PER_CONNECTION,
    REQUEST_SECONDS,
    STREAM_WINDOW_BYTES,
)
from deca_node.pb import node_pb2 as pb
from deca_node.trust import common_name, holder, is_name, node_name


@dataclass(frozen=True)
class Caller:
    """Who makes a call, as far as the connection proves it.

    Attributes:
        node: the node that the caller's certificate names; None in plain text, and for operators.
        operator: it showed an operator's certificate of this run.
        local: it came through this machine's own socket file, which its owner alone can open.
    """

    node: str | None = None
    operator: bool = False
    local: bool = False


class Handler(Protocol):
    """What a node answers its peers. A PeerRefused raised here reaches the caller as one."""

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """Answer a greeting; ``source`` is the caller's IP address."""
        ...

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """Take an edge's offer."""
        ...

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """Take a neighbour's degree."""
        ...

    def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """Yield the messages of a published block, waiting for it first.

        A reader that does not take one in time is thrown into it as PeerRefused ``too_slow``.
        """
        ...

    async def list_blocks(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """Tell which blocks are kept here, in which version."""
        ...

    def fetch_block(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """Yield the messages of a kept block's file."""
        ...

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """Note that the sender leaves."""
        ...


class StatusHandler(Protocol):
    """What a node answers people and scripts."""

    async def get_status(self) -> pb.NodeStatus:
        """The status now."""
        ...

    def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """The status now and every ``interval`` seconds until the run ends."""
        ...

    async def get_history(self, request: pb.GetHistoryRequest) -> pb.HistoryReply:
        """The steps made so far, thinned."""
        ...


class ControlHandler(Protocol):
    """What a node answers its operator. A PeerRefused raised here reaches the caller as one."""

    async def pause(self, request: pb.PauseRequest) -> pb.PauseReply:
        """Take no part after the step under way."""
        ...

    async def resume(self, request: pb.ResumeRequest) -> pb.ResumeReply:
        """Take part again."""
        ...

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointReply:
        """Save between two steps."""
        ...

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        """End as after SIGTERM."""
        ...

    async def export(self, request: pb.ExportRequest) -> pb.ExportReply:
        """Write the model as last saved."""
        ...


class Link(Protocol):
    """Calls to one peer. All raise PeerUnavailable, PeerTimeout or PeerRefused."""

    async def hello(self, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """Greet."""
        ...

    async def open_visit(self, request: pb.VisitOffer, timeout: float) -> pb.VisitAnswer:
        """Offer an edge."""
        ...

    async def settle_visit(self, request: pb.VisitDegree, timeout: float) -> pb.VisitAnswer:
        """Tell the degree."""
        ...

    def pull(self, request: pb.PullRequest, timeout: float) -> AsyncGenerator[bytes]:
        """Receive a block's messages; ends early when the iterator is closed."""
        ...

    async def list_blocks(self, request: pb.ListBlocksRequest, timeout: float) -> pb.BlockList:
        """Ask which blocks the peer keeps."""
        ...

    def fetch_block(self, request: pb.FetchBlockRequest, timeout: float) -> AsyncGenerator[bytes]:
        """Receive a kept block's file; ends early when the iterator is closed."""
        ...

    async def goodbye(self, request: pb.GoodbyeRequest, timeout: float) -> pb.GoodbyeReply:
        """Take leave."""
        ...

    async def renew(self, request: bytes, timeout: float) -> bytes:
        """Ask for a new certificate of this node; only who has the authority's key gives one."""
        ...

    async def close(self) -> None:
        """Give up the connection."""
        ...


class Transport(Protocol):
    """A way to be reached and to reach."""

    async def listen(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None = None,
        socket: Path | None = None,
    ) -> int:
        """Start answering; returns the port. Raises ListenError.

        Args:
            handler: answers peers.
            status: answers people.
            control: answers operators, where the transport can tell them from others.
            socket: a file to listen on as well, for tools of the same user on this machine; where
                that fails it is not there afterwards.
        """
        ...

    def link(self, address: str) -> Link:
        """A link to HOST:PORT; nothing is sent before the first call."""
        ...

    async def close(self, grace: float) -> None:
        """Stop answering; calls under way have ``grace`` seconds to end."""
        ...


# A reader that turns away within a stream is logged there as an error with a traceback; what it
# means for the run is in our own report.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
_log = logging.getLogger(__name__)

# Between two tries to listen again where grpc's server has ended.
RELISTEN_SECONDS = 0.1

# A connection that another has replaced may end the calls under way on it.
OLD_CONNECTION_SECONDS = 60.0
# What a handshake may take; a cut that heals is noticed so much later.
HANDSHAKE_MS = 4_000
# Connections to a node are made anew so often: the certificate of who answers is looked at by TLS
# alone, and only then.
RECONNECT_SECONDS = 3600.0

PEER = pb.DESCRIPTOR.services_by_name["Peer"]
STATUS = pb.DESCRIPTOR.services_by_name["Status"]
CONTROL = pb.DESCRIPTOR.services_by_name["Control"]

_COMMON: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # Else that is where gRPC begins to refuse some of them, and all only from twice as much.
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Bandwidth probing and small frames halve the rate of long streams (docs/protocol.md).
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.max_frame_size", 16_777_215),
    # A peer that goes silent without closing is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.so_reuseport", 0),  # two nodes on one port would share its callers
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # under the client's keepalive
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
    ("grpc.http2.settings_timeout", HANDSHAKE_SECONDS * 1000),
]
CLIENT_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.lookahead_bytes", STREAM_WINDOW_BYTES),
    ("grpc.enable_http_proxy", 0),  # peers are on this network
    ("grpc.use_local_subchannel_pool", 1),
    # The default backoff grows to two minutes; a restarted neighbour is wanted back sooner.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
# That least pause is also what a connection has to be made in, and the other end of a handshake may
# be a machine that trains.
_SECURE_CLIENT = [
    *(option for option in CLIENT_OPTIONS if option[0] != "grpc.min_reconnect_backoff_ms"),
    ("grpc.min_reconnect_backoff_ms", HANDSHAKE_MS),
]


@dataclass(frozen=True)
class Credentials:
    """What is shown on connections, and by whom those of others must be signed. All PEM.

    Attributes:
        key: private.
        certificate: of the key.
        authority: certificate of the run's authority.
        run: the run's name.
    """

    key: bytes
    certificate: bytes
    authority: bytes
    run: str

    def channel(self, address: str, node: str | None = None) -> grpc.aio.Channel:
        """A channel to a node of the run, or to the one of that name only."""
        ours = grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)
        name = common_name(self.run) if node is None else node_name(self.run, node)
        named = ("grpc.ssl_target_name_override", name)
        return grpc.aio.secure_channel(address, ours, options=[*_SECURE_CLIENT, named])

    def configuration(self) -> Any:
        """The same for a server's port."""
        pair = [(self.key, self.certificate)]
        return grpc.ssl_server_certificate_configuration(pair, self.authority)


class Guard(Protocol):
    """Whom a node believes, beyond what TLS checks when a connection is made.

    Attributes:
        refused: calls that were refused for who made them, by reason.
    """

    refused: Counter[str]

    def credentials(self) -> Credentials:
        """What to show now; another object once it has changed."""
        ...

    def admit(self, certificate: bytes) -> Caller:
        """Who shows a certificate (PEM) in a call; PeerRefused when its holder has no say."""
        ...

    def vouch(self, node: str) -> None:
        """Raises PeerRefused when a node is not to be called either."""
        ...

    def digest(self) -> int:
        """Of the names of revoked nodes, 0 when there are none."""
        ...

    def revocations(self) -> pb.Revocations:
        """All that are known."""
        ...

    def learn(self, told: pb.Revocations) -> None:
        """Keep those that are new and signed; PeerRefused when one is not signed."""
        ...

    def renew_for(self, certificate: bytes, request: bytes) -> bytes:
        """A new certificate for who shows an old one; PeerRefused when it gets none here."""
        ...


def _listen(server: grpc.aio.Server, address: str, guard: Guard) -> int:
    """Open a port for callers that show a certificate of the run; its number, 0 without success."""
    shown = guard.credentials()

    def changed() -> Any:
        nonlocal shown
        if (now := guard.credentials()) is shown:
            return None
        shown = now
        return now.configuration()

    ours = grpc.dynamic_ssl_server_credentials(
        shown.configuration(), changed, require_client_authentication=True
    )
    return int(server.add_secure_port(address, ours))


# What a caller is told for whom there is no place.
BUSY = "too many calls are open"


def _path(service: Any, method: str) -> str:
    return f"/{service.full_name}/{method}"


# What gRPC says of a handshake that failed, by a part of it, and what that means.
_HANDSHAKES = (
    ("http1.x server", "a web server is there (a dashboard?), not a node"),
    ("WRONG_VERSION_NUMBER", "answers, but not under TLS: a node without it, or another program"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is over, or another authority's than our run's"),
    ("Hostname Verification Check failed", "its certificate names another node or another run"),
)


def _translate(error: grpc.aio.AioRpcError, address: str) -> PeerError:
    said = str(error.details() or "")
    details = next((text for sign, text in _HANDSHAKES if sign in said), said)[:MAX_REASON_BYTES]
    code = error.code()
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return PeerTimeout(f"{address}: no answer in time")
    if details != said[:MAX_REASON_BYTES]:
        return PeerRefused("handshake", f"{address}: {details}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return PeerUnavailable(f"{address}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details == BUSY:
        return PeerRefused("busy", f"{address}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PeerRefused("too_long", f"{address}: {details}")
    if code is not grpc.StatusCode.FAILED_PRECONDITION:
        return PeerRefused(code.name.lower(), f"{address}: {details}")
    reason, _, text = details.partition(": ")  # as _refuse wrote it
    return PeerRefused(known_reason(reason), f"{address}: {text}")


class _Connection:
    """A channel and the calls that can be made on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.unary: dict[str, Callable[..., Awaitable[Any]]] = {}
        asked = {"GetStatus", "ListPeers", "GetHistory"}
        for service, names in ((PEER, None), (STATUS, asked), (CONTROL, None)):
            for method in service.methods:
                if method.server_streaming or (names and method.name not in names):
                    continue
                self.unary[method.name] = channel.unary_unary(
                    _path(service, method.name),
                    request_serializer=GetMessageClass(method.input_type).SerializeToString,
                    response_deserializer=GetMessageClass(method.output_type).FromString,
                )
        # No deserializer: the payload is read where it lies (wire.parse).
        self.pull = channel.unary_stream(
            _path(PEER, "Pull"), request_serializer=pb.PullRequest.SerializeToString
        )
        self.fetch = channel.unary_stream(
            _path(PEER, "FetchBlock"), request_serializer=pb.FetchBlockRequest.SerializeToString
        )
        self.watch = channel.unary_stream(
            _path(STATUS, "WatchStatus"),
            request_serializer=pb.WatchStatusRequest.SerializeToString,
            response_deserializer=pb.NodeStatus.FromString,
        )


class GrpcLink:
    """Calls to one address, in plain text without a guard.

    Under TLS the first greeting accepts any node of the run and learns its name; all else goes over
    a second connection, which that node alone can answer.

    Args:
        address: HOST:PORT.
        guard: of the calling node.
        credentials: in place of a guard, for calls that no node's name matters to.
    """

    def __init__(
        self, address: str, guard: Guard | None = None, credentials: Credentials | None = None
    ) -> None:
        self.address = address
        self._guard = guard
        self._closed = False
        self._node: str | None = None  # whose certificate the second connection asks for
        self._uncertain = True  # somebody else may be there now: ask for the name again
        self._outdated = False  # the second connection is to be replaced whoever answers
        self._credentials = credentials or (guard.credentials() if guard else None)
        self._since = time.monotonic()
        self._connection = self._connect()
        self._named = self._connection
        self._closing: set[asyncio.Task[None]] = set()
        self._compared = 0, 0  # digests of revocations, ours and theirs, whose lists were swapped

    def _connect(self, node: str | None = None) -> _Connection:
        if self._credentials is None:
            return _Connection(grpc.aio.insecure_channel(self.address, options=CLIENT_OPTIONS))
        return _Connection(self._credentials.channel(self.address, node))

    async def _call(
        self, name: str, request: Any, timeout: float, connection: _Connection | None = None
    ) -> Any:
        with self._translated():
            reply = await (connection or self._proven()).unary[name](request, timeout=timeout)
        if reply is None:  # what grpc gives for bytes that it cannot decode
            raise PeerRefused("malformed", f"{self.address}: not an answer to {name}")
        return reply

    def _proven(self) -> _Connection:
        """The connection on which only the node that was met can answer."""
        if self._guard is not None:
            if self._node is None:
                raise PeerUnavailable(f"{self.address}: not met yet")
            self._guard.vouch(self._node)
        return self._named

    async def _greet(self, guard: Guard, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """Greet, and be sure of who answers."""
        request.revoked = guard.digest()
        now = time.monotonic()
        if guard.credentials() is not self._credentials or now - self._since > RECONNECT_SECONDS:
            self._credentials, self._since = guard.credentials(), now
            old, self._connection = self._connection, self._connect()
            self._uncertain = self._outdated = True
            self._leave(old)
        try:
            if self._uncertain:
                first = await self._call("Hello", request, timeout, self._connection)
                self._name(guard, first.sender.node)
            reply: pb.HelloReply = await self._call("Hello", request, timeout)
        except PeerError:
            self._uncertain = True
            raise
        if reply.sender.node != self._node:
            raise PeerRefused(
                "impostor",
                f"{self.address}: has the certificate of {self._node}, says it is another",
            )
        self._uncertain = False
        digests = guard.digest(), reply.revoked
        if digests[0] != digests[1] and digests != self._compared:
            told = await self._call("ExchangeRevocations", guard.revocations(), timeout)
            guard.learn(told)
            self._compared = digests
            guard.vouch(reply.sender.node)
        return reply

    def _name(self, guard: Guard, node: str) -> None:
        """From now on only this node is to answer."""
        if not is_name(node):
            raise PeerRefused("bad_name", f"{self.address}: no name of a node")
        guard.vouch(node)
        if node != self._node or self._outdated:
            self._outdated = False
            old, self._node, self._named = self._named, node, self._connect(node)
            self._leave(old)

    def _leave(self, connection: _Connection) -> None:
        """Close a connection that is used no more; what is under way on it may end."""
        if connection not in (self._connection, self._named):
            closing = asyncio.ensure_future(connection.channel.close(OLD_CONNECTION_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def hello(self, request: pb.HelloRequest, timeout: float) -> pb.HelloReply:
        """See Link."""
        if self._guard is not None:
            return await self._greet(self._guard, request, timeout)
        reply: pb.HelloReply = await self._call("Hello", request, timeout)
        return reply

    async def renew(self, request: bytes, timeout: float) -> bytes:
        """See Link."""
        asked = pb.RenewRequest(request=request)
        reply: pb.RenewReply = await self._call("Renew", asked, timeout)
        return reply.certificate

    async def exchange_revocations(self, ours: pb.Revocations, timeout: float) -> pb.Revocations:
        """Tell a node who is out of the run; returns what it knows."""
        return await self._call("ExchangeRevocations", ours, timeout)  # type: ignore[no-any-return]

    async def open_visit(self, request: pb.VisitOffer, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        reply: pb.VisitAnswer = await self._call("OpenVisit", request, timeout)
        return reply

    async def settle_visit(self, request: pb.VisitDegree, timeout: float) -> pb.VisitAnswer:
        """See Link."""
        reply: pb.VisitAnswer = await self._call("SettleVisit", request, timeout)
        return reply

    async def goodbye(self, request: pb.GoodbyeRequest, timeout: float) -> pb.GoodbyeReply:
        """See Link."""
        reply: pb.GoodbyeReply = await self._call("Goodbye", request, timeout)
        return reply

    async def list_blocks(self, request: pb.ListBlocksRequest, timeout: float) -> pb.BlockList:
        """See Link."""
        reply: pb.BlockList = await self._call("ListBlocks", request, timeout)
        return reply

    def pull(self, request: pb.PullRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._messages(lambda: self._proven().pull(request, timeout=timeout))

    def fetch_block(self, request: pb.FetchBlockRequest, timeout: float) -> AsyncGenerator[bytes]:
        """See Link."""
        return self._messages(lambda: self._proven().fetch(request, timeout=timeout))

    async def _messages(self, begin: Callable[[], Any]) -> AsyncGenerator[bytes]:
        with self._translated():
            call = begin()
            coming = asyncio.ensure_future(call.read())
            try:
                while (message := await coming) is not grpc.aio.EOF:
                    # The next one is asked for before this one is looked at, so that it is taken
                    # apart by gRPC's threads meanwhile.
                    coming = asyncio.ensure_future(call.read())
                    await asyncio.sleep(0)  # the task begins
                    self._proven()  # it may be out of the run since it was asked
                    yield message
            finally:
                call.cancel()
                coming.cancel()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of grpc as ours; what it raises when we have closed the channel as well."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.address) from None
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise PeerUnavailable(f"{self.address}: given up") from None

    async def get_status(self, timeout: float) -> pb.NodeStatus:
        """The node's status."""
        status: pb.NodeStatus = await self._call("GetStatus", pb.GetStatusRequest(), timeout)
        return status

    async def control(self, verb: str, request: Any, timeout: float) -> Any:
        """Tell the node something, as its operator: a call of the service Control by its name."""
        return await self._call(verb, request, timeout)

    async def get_history(
        self, after: int | None, limit: int, timeout: float
    ) -> Sequence[pb.HistoryPoint]:
        """At most ``limit`` points of the node's steps after step ``after``, of all if None."""
        request = pb.GetHistoryRequest(after=after, limit=limit)
        reply: pb.HistoryReply = await self._call("GetHistory", request, timeout)
        return reply.points

    async def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """The node's status, again and again until it ends."""
        call = self._named.watch(pb.WatchStatusRequest(interval_seconds=interval))
        try:
            async for status in call:
                yield status
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.address) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """See Link."""
        self._closed = True
        for task in list(self._closing):
            task.cancel()
        for connection in {self._connection, self._named}:
            await connection.channel.close()


class GrpcTransport:
    """gRPC on one port, in plain text or under TLS.

    Args:
        host: interface address to listen on.
        port: 0 takes a free one.
        guard: whom it believes; without one nothing is encrypted, and anybody is anybody.
        patience: seconds that a reader may take for one message of a stream.
        health_port: where the health service answers besides, alone and always in plain text.
    """

    def __init__(
        self,
        host: str,
        port: int,
        guard: Guard | None = None,
        patience: float = 60.0,
        health_port: int | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._guard = guard
        self._patience = patience
        self._health_port = health_port
        self._server: grpc.aio.Server | None = None
        self._health_server: grpc.aio.Server | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._health = health.aio.HealthServicer()

    async def listen(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None = None,
        socket: Path | None = None,
    ) -> int:
        """See Transport."""
        begin = partial(self._serve, handler, status, control, socket)
        port = await begin(self._port)
        self._keep_serving(lambda: self._server, partial(begin, port))
        if self._health_port is not None:
            await self._serve_health(self._health_port)
            again = partial(self._serve_health, self._health_port)
            self._keep_serving(lambda: self._health_server, again)
        return port

    async def _serve(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None,
        socket: Path | None,
        port: int,
    ) -> int:
        gate = _Gate(Places(MAX_CALLS, MAX_CALLS_PER_ADDRESS), REQUEST_SECONDS)
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[gate])
        server.add_generic_rpc_handlers([_peer_handlers(handler, self._patience, self._guard)])
        names = [PEER.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if status is not None:
            server.add_generic_rpc_handlers([_status_handlers(status, self._guard)])
            names.append(STATUS.full_name)
        if control is not None:
            server.add_generic_rpc_handlers([_control_handlers(control, self._guard)])
            names.append(CONTROL.full_name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            address = f"{host}:{port}"
            if self._guard is None:
                found = server.add_insecure_port(address)
            else:
                found = _listen(server, address, self._guard)
        except RuntimeError:
            found = 0
        if found == 0:
            raise ListenError(
                f"cannot listen on {host}:{port}: the port is taken or the address is not "
                "this machine's; set node.port (0 takes a free one) or node.host"
            )
        if socket is not None:
            _listen_locally(server, socket)
        await server.start()
        self._server = server
        for name in ("", PEER.full_name, STATUS.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return int(found)

    def _keep_serving(
        self,
        server: Callable[[], grpc.aio.Server | None],
        serve: Callable[[], Coroutine[Any, Any, int]],
    ) -> None:
        self._keepers.append(asyncio.create_task(self._serve_anew(server, serve)))

    @staticmethod
    async def _serve_anew(
        server: Callable[[], grpc.aio.Server | None],
        serve: Callable[[], Coroutine[Any, Any, int]],
    ) -> None:
        """Serve anew when grpc has ended: a call whose path is not UTF-8 ends its loop (1.85)."""
        while (current := server()) is not None:
            try:
                await current.wait_for_termination()
            except UnicodeDecodeError as error:
                _log.warning(
                    "a caller's path ended the server, which begins anew: %s", error.reason
                )
            else:
                return
            while True:
                try:
                    await serve()
                    break
                except ListenError:  # the one that has ended may not have let go of it yet
                    await asyncio.sleep(RELISTEN_SECONDS)

    async def _serve_health(self, port: int) -> int:
        """For those who have no certificate, such as a kubelet: whether this node serves."""
        check = grpc.unary_unary_rpc_method_handler(
            self._health.Check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_HEALTH_CHECKS)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})]
        )
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            found = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            found = 0
        if found == 0:
            raise ListenError(f"cannot listen on {host}:{port}; set node.health_port")
        await server.start()
        self._health_server = server
        return int(found)

    def link(self, address: str) -> GrpcLink:
        """See Transport."""
        return GrpcLink(address, self._guard)

    async def close(self, grace: float) -> None:
        """See Transport."""
        await self._health.enter_graceful_shutdown()
        for server in (self._health_server, self._server):
            if server is not None:
                with suppress(UnicodeDecodeError):  # what ended it, once more
                    await server.stop(grace)
        # Only now: who is cancelled while it waits for a server's end takes that end with it.
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)


def _host_of(peer: str) -> str:
    """The IP address in gRPC's ``ipv4:1.2.3.4:567`` or ``ipv6:%5B::1%5D:567``."""
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    return host if kind in ("ipv4", "ipv6") else "127.0.0.1"


def caller_of(context: grpc.aio.ServicerContext) -> Caller:
    """Who makes a call. TLS has checked the certificate when the connection was made."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    shown = holder(name.decode(errors="replace") for name in names)
    local = context.peer().startswith("unix:")
    if shown is None:
        return Caller(local=local)
    return Caller(shown.node, shown.operator, local)


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
    """Counts the calls that are open, and gives each a time by which its request must be there.

    gRPC itself would wait for ever for the rest of a request of which it has the first bytes, and
    write a traceback where it cannot tell a caller that has gone what was wrong with its call.
    """

    def __init__(self, places: Places, seconds: float) -> None:
        self._places, self._seconds = places, seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Put the gate in front of a handler, whatever its kind: as one that reads by itself."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._gated(_unimplemented))
        several = handler.request_streaming
        if handler.response_streaming:
            inner = handler.stream_stream if several else handler.unary_stream
            made, answer = grpc.stream_stream_rpc_method_handler, _stream_answers(inner)
        else:
            answer = handler.stream_unary if several else handler.unary_unary
            made = grpc.stream_unary_rpc_method_handler
        outer = self._gated(answer if several else _with_first(answer))
        return made(outer, handler.request_deserializer, handler.response_serializer)

    def _gated(self, answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            caller = network(_host_of(context.peer()))
            try:
                if not self._places.enter(caller):
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY)
                try:
                    return await answer(self._timely(requests, context), context)
                finally:
                    self._places.leave(caller)
            except grpc.aio.InternalError:  # nobody is there any more to be told
                raise asyncio.CancelledError from None

        return call

    async def _timely(
        self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    request = await anext(requests, grpc.aio.EOF)
            except TimeoutError:
                text = f"no request within {self._seconds:g} s"
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a request")
            if request is grpc.aio.EOF:
                return
            yield request


async def _unimplemented(_: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such call")


def _with_first(answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A handler of one request as one that is given an iterator."""

    async def call(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        request = await anext(requests, None)
        if request is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a call without a request")
        return await answer(request, context)

    return call


def _stream_answers(inner: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
    """A handler that yields its answers, or writes them itself, as one that writes them."""

    async def call(asked: Any, context: grpc.aio.ServicerContext) -> None:
        answers = inner(asked, context)
        if hasattr(answers, "__aiter__"):
            async with aclosing(answers):
                async for answer in answers:
                    await context.write(answer)
        else:
            await answers

    return call


async def _refuse(context: grpc.aio.ServicerContext, error: PeerError) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.reason}: {error}")


def _unary(service: Any, name: str, call: Callable[..., Awaitable[Any]]) -> Any:
    kind = service.methods_by_name[name]
    return grpc.unary_unary_rpc_method_handler(
        call,
        request_deserializer=GetMessageClass(kind.input_type).FromString,
        response_serializer=GetMessageClass(kind.output_type).SerializeToString,
    )


def _certificate(context: grpc.aio.ServicerContext) -> bytes:
    """What the caller has shown, PEM; empty in plain text."""
    shown = context.auth_context().get("x509_pem_cert", ())
    return bytes(shown[0]) if shown else b""


def admitted(context: grpc.aio.ServicerContext, guard: Guard | None) -> Caller:
    """Who makes a call, and has a say in the run.

    Raises:
        PeerRefused: its certificate is over, was taken back, or is not on the list.
    """
    caller = caller_of(context)
    if guard is None or caller.local:
        return caller
    # The list of ciphers (above) leaves TLS 1.3 only; this holds where another one has set it.
    if b"TLSv1.2" in context.auth_context().get("ssl_tls_version", ()):
        raise PeerRefused("no_certificate", "TLS 1.3 is needed")
    try:
        return guard.admit(_certificate(context))
    except PeerRefused as error:
        guard.refused[error.reason] += 1
        raise


def _check_peer(context: grpc.aio.ServicerContext, guard: Guard | None, sender: pb.Sender) -> None:
    """Raises PeerRefused when a peer's call is made by none, or in the name of another."""
    caller = admitted(context, guard)
    if guard is None or sender.node == caller.node:
        return
    reason = "not_a_node" if caller.node is None else "impostor"
    guard.refused[reason] += 1
    whose = "no node" if caller.node is None else caller.node
    raise PeerRefused(reason, f"this is the certificate of {whose}")


def _peer_handlers(
    handler: Handler, patience: float, guard: Guard | None
) -> grpc.GenericRpcHandler:
    def unary(answer: Callable[[Any, str], Awaitable[Any]], name: str) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                _check_peer(context, guard, request.sender)
                return await answer(request, _host_of(context.peer()))
            except PeerError as error:
                await _refuse(context, error)

        return _unary(PEER, name, call)

    async def hello(request: pb.HelloRequest, source: str) -> pb.HelloReply:
        reply = await handler.hello(request, source)
        if guard is not None:
            reply.revoked = guard.digest()
        return reply

    async def exchange_revocations(
        request: pb.Revocations, context: grpc.aio.ServicerContext
    ) -> Any:
        try:
            if guard is None:
                raise PeerRefused("no_certificate", "nobody is known by a certificate here")
            admitted(context, guard)
            guard.learn(request)
            return guard.revocations()
        except PeerError as error:
            await _refuse(context, error)

    async def renew(request: pb.RenewRequest, context: grpc.aio.ServicerContext) -> Any:
        try:
            if guard is None:
                raise PeerRefused("no_authority", "there are no certificates here")
            admitted(context, guard)
            certificate = guard.renew_for(_certificate(context), request.request)
            return pb.RenewReply(certificate=certificate)
        except PeerError as error:
            await _refuse(context, error)

    def stream(answer: Callable[[Any], AsyncGenerator[bytes]], name: str) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
            try:
                _check_peer(context, guard, request.sender)
                async with aclosing(answer(request)) as messages:
                    async for message in messages:
                        if guard is not None:  # it may be out since it asked
                            guard.vouch(request.sender.node)
                        try:
                            async with asyncio.timeout(patience):
                                await context.write(message)
                        except TimeoutError:
                            slow = PeerRefused("too_slow", f"a message unread for {patience:g} s")
                            await messages.athrow(slow)
            except PeerError as error:
                await _refuse(context, error)

        kind = PEER.methods_by_name[name]
        return grpc.unary_stream_rpc_method_handler(
            call, request_deserializer=GetMessageClass(kind.input_type).FromString
        )

    return grpc.method_handlers_generic_handler(
        PEER.full_name,
        {
            "Hello": unary(hello, "Hello"),
            "OpenVisit": unary(lambda request, _: handler.open_visit(request), "OpenVisit"),
            "SettleVisit": unary(lambda request, _: handler.settle_visit(request), "SettleVisit"),
            "Goodbye": unary(lambda request, _: handler.goodbye(request), "Goodbye"),
            "ListBlocks": unary(lambda request, _: handler.list_blocks(request), "ListBlocks"),
            "Pull": stream(handler.pull, "Pull"),
            "FetchBlock": stream(handler.fetch_block, "FetchBlock"),
            "ExchangeRevocations": _unary(PEER, "ExchangeRevocations", exchange_revocations),
            "Renew": _unary(PEER, "Renew", renew),
        },
    )


def _status_handlers(status: StatusHandler, guard: Guard | None) -> grpc.GenericRpcHandler:
    async def get(_: pb.GetStatusRequest, context: grpc.aio.ServicerContext) -> Any:
        try:
            admitted(context, guard)
        except PeerError as error:
            await _refuse(context, error)
        return await status.get_status()

    async def peers(_: pb.ListPeersRequest, context: grpc.aio.ServicerContext) -> Any:
        return pb.ListPeersReply(peers=(await get(pb.GetStatusRequest(), context)).peers)

    async def history(
        request: pb.GetHistoryRequest, context: grpc.aio.ServicerContext
    ) -> pb.HistoryReply:
        try:
            admitted(context, guard)
        except PeerError as error:
            await _refuse(context, error)
        return await status.get_history(request)

    async def watch(
        request: pb.WatchStatusRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.NodeStatus]:
        try:
            admitted(context, guard)
        except PeerError as error:
            await _refuse(context, error)
        try:
            async with aclosing(status.watch_status(request.interval_seconds)) as states:
                async for now in states:
                    admitted(context, guard)
                    yield now
        except PeerError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    return grpc.method_handlers_generic_handler(
        STATUS.full_name,
        {
            "GetStatus": grpc.unary_unary_rpc_method_handler(
                get, pb.GetStatusRequest.FromString, pb.NodeStatus.SerializeToString
            ),
            "ListPeers": grpc.unary_unary_rpc_method_handler(
                peers, pb.ListPeersRequest.FromString, pb.ListPeersReply.SerializeToString
            ),
            "GetHistory": grpc.unary_unary_rpc_method_handler(
                history, pb.GetHistoryRequest.FromString, pb.HistoryReply.SerializeToString
            ),
            "WatchStatus": grpc.unary_stream_rpc_method_handler(
                watch, pb.WatchStatusRequest.FromString, pb.NodeStatus.SerializeToString
            ),
        },
    )


def _listen_locally(server: grpc.aio.Server, socket: Path) -> None:
    """Open a socket file for this user's own tools; its folder is the user's alone already."""
    try:
        server.add_insecure_port(f"unix:{socket}")
        socket.chmod(0o600)
    except (RuntimeError, OSError) as error:
        socket.unlink(missing_ok=True)
        _log.warning("no socket file for this machine's own tools: %s", error)


def _control_handlers(control: ControlHandler, guard: Guard | None) -> grpc.GenericRpcHandler:
    def unary(name: str, answer: Callable[[Any], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                caller = admitted(context, guard)
                if not (caller.local or caller.operator):
                    await context.abort(
                        grpc.StatusCode.PERMISSION_DENIED,
                        "a node is told what to do through its own machine's socket file, or with "
                        "the operator's certificate",
                    )
                return await answer(request)
            except PeerError as error:
                await _refuse(context, error)

        return _unary(CONTROL, name, call)

    answers: dict[str, Callable[[Any], Awaitable[Any]]] = {
        "Pause": control.pause,
        "Resume": control.resume,
        "Checkpoint": control.checkpoint,
        "Stop": control.stop,
        "Export": control.export,
    }
    return grpc.method_handlers_generic_handler(
        CONTROL.full_name, {name: unary(name, answer) for name, answer in answers.items()}
    )


async def ask_status(
    address: str, timeout: float, credentials: Credentials | None = None
) -> pb.NodeStatus:
    """One node's status, asked in plain text without credentials.

    Raises:
        PeerError: it does not answer as a deca node does.
    """
    link = GrpcLink(address, credentials=credentials)
    try:
        return await asyncio.wait_for(link.get_status(timeout), timeout + 1)
    except TimeoutError:
        raise PeerTimeout(f"{address}: no answer in {timeout:g} s") from None
    finally:
        await link.close()


async def ask_all(
    addresses: Sequence[str],
    timeout: float,
    credentials: Mapping[str, Credentials] | None = None,
) -> list[pb.NodeStatus | PeerError]:
    """Status of several nodes at once; a node that does not answer gives its error.

    Args:
        addresses: HOST:PORT each.
        timeout: seconds.
        credentials: by address, what to show; all others are asked in plain text.
    """

    async def one(address: str) -> pb.NodeStatus | PeerError:
        try:
            return await ask_status(address, timeout, (credentials or {}).get(address))
        except PeerError as error:
            return error

    return list(await asyncio.gather(*map(one, addresses)))
