"""The transport itself: listens on ports and on a socket file, and makes links."""

import logging
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection

from deca_node.addresses import joined
from deca_node.admission import Places
from deca_node.errors import ListenError
from deca_node.limits import (
    MAX_CALLS,
    MAX_CALLS_PER_ADDRESS,
    MAX_HEALTH_CHECKS,
    REQUEST_SECONDS,
)
from deca_node.transport import ControlHandler, Handler, StatusHandler
from deca_node.transport.client import GrpcLink
from deca_node.transport.connection import CONTROL, PEER, SERVER_OPTIONS, STATUS, Guard
from deca_node.transport.gate import Gate
from deca_node.transport.services import control_handlers, peer_handlers, status_handlers

# A reader that turns away within a stream is logged there as an error with a traceback; what it
# means for the run is in our own report.
logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
_log = logging.getLogger(__name__)


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
        self._health = health.aio.HealthServicer()

    async def listen(
        self,
        handler: Handler,
        status: StatusHandler | None,
        control: ControlHandler | None = None,
        socket: Path | None = None,
    ) -> int:
        """See Transport."""
        gate = Gate(Places(MAX_CALLS, MAX_CALLS_PER_ADDRESS), REQUEST_SECONDS)
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[gate])
        server.add_generic_rpc_handlers([peer_handlers(handler, self._patience, self._guard)])
        names = [PEER.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if status is not None:
            server.add_generic_rpc_handlers([status_handlers(status, self._patience, self._guard)])
            names.append(STATUS.full_name)
        if control is not None:
            server.add_generic_rpc_handlers([control_handlers(control, self._guard)])
            names.append(CONTROL.full_name)
        server.add_generic_rpc_handlers([_health_handlers(self._health)])
        reflection.enable_server_reflection(names, server)
        address = joined(self._host, self._port)
        try:
            if self._guard is None:
                found = server.add_insecure_port(address)
            else:
                found = _listen(server, address, self._guard)
        except RuntimeError:
            found = 0
        if found == 0:
            await server.stop(None)
            raise ListenError(
                f"{_cannot(address)}; set node.port (0 takes a free one) or node.host"
            )
        if socket is not None:
            _listen_locally(server, socket)
        await server.start()
        self._server = server
        for name in ("", PEER.full_name, STATUS.full_name):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self._health_port is not None:
            try:
                await self._serve_health(self._health_port)
            except ListenError:
                self._server = None
                await server.stop(None)
                raise
        return int(found)

    async def _serve_health(self, port: int) -> None:
        """For those who have no certificate, such as a kubelet: whether this node serves."""
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_HEALTH_CHECKS)
        server.add_generic_rpc_handlers([_health_handlers(self._health)])
        address = joined(self._host, port)
        try:
            found = server.add_insecure_port(address)
        except RuntimeError:
            found = 0
        if found == 0:
            await server.stop(None)
            raise ListenError(f"{_cannot(address)}; set node.health_port or node.host")
        await server.start()
        self._health_server = server

    def link(self, address: str) -> GrpcLink:
        """See Transport."""
        return GrpcLink(address, self._guard)

    async def close(self, grace: float) -> None:
        """See Transport."""
        await self._health.enter_graceful_shutdown()
        for server in (self._health_server, self._server):
            if server is not None:
                await server.stop(grace)


def _cannot(address: str) -> str:
    return f"cannot listen on {address}: the port is taken or the address is not this machine's"


def _health_handlers(servicer: Any) -> grpc.GenericRpcHandler:
    """The standard service's Check.

    Not its Watch, which clients are to do without where it is unimplemented: it has no end, so that
    it holds one of the places for calls, and one that does not read would hold up our own end.
    """
    check = grpc.unary_unary_rpc_method_handler(
        servicer.Check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check})


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


def _listen_locally(server: grpc.aio.Server, socket: Path) -> None:
    """Open a socket file for this user's own tools; its folder is the user's alone already."""
    try:
        server.add_insecure_port(f"unix:{socket}")
        socket.chmod(0o600)
    except (RuntimeError, OSError) as error:
        socket.unlink(missing_ok=True)
        _log.warning("no socket file for this machine's own tools: %s", error)
