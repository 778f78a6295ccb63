"""The services that a node answers, and who has a say in each."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from deca_node.admission import Places, network
from deca_node.errors import PeerError, PeerRefused
from deca_node.limits import KEPT_WATCHERS, MAX_WATCHERS, MAX_WATCHERS_PER_CALLER
from deca_node.pb import node_pb2 as pb
from deca_node.transport import Caller, ControlHandler, Handler, StatusHandler
from deca_node.transport.connection import CONTROL, PEER, STATUS, Guard
from deca_node.transport.gate import host_of
from deca_node.trust import holder


def caller_of(context: grpc.aio.ServicerContext) -> Caller:
    """Who makes a call. TLS has checked the certificate when the connection was made."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    shown = holder(name.decode(errors="replace") for name in names)
    local = context.peer().startswith("unix:")
    if shown is None:
        return Caller(local=local)
    return Caller(shown.node, shown.operator, local)


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
        PeerRefused: its certificate has expired, was revoked, or is not on the list.
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


def peer_handlers(handler: Handler, patience: float, guard: Guard | None) -> grpc.GenericRpcHandler:
    """What other nodes ask; ``patience`` is what a reader may take for one message, in seconds."""

    def unary(answer: Callable[[Any, str], Awaitable[Any]], name: str) -> Any:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                _check_peer(context, guard, request.sender)
                return await answer(request, host_of(context.peer()))
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
            # On another thread, as it waits for the disk.
            certificate = await asyncio.to_thread(
                guard.renew_for, _certificate(context), request.request
            )
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
                            await messages.athrow(_unread(patience))
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


def _unread(patience: float) -> PeerRefused:
    return PeerRefused("too_slow", f"a message unread for {patience:g} s")


def status_handlers(
    status: StatusHandler, patience: float, guard: Guard | None
) -> grpc.GenericRpcHandler:
    """What people and scripts ask; ``patience`` as for ``peer_handlers``."""
    kept = Places(KEPT_WATCHERS, KEPT_WATCHERS)
    others = Places(MAX_WATCHERS - KEPT_WATCHERS, MAX_WATCHERS_PER_CALLER)

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

    async def watch(request: pb.WatchStatusRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            caller = admitted(context, guard)
            places = kept if caller.local or caller.operator else others
            name = caller.node or network(host_of(context.peer()))
            if not places.enter(name):
                raise PeerRefused(
                    "too_many_watchers",
                    "too many watch it already; ask for the status now and then",
                )
            try:
                async with aclosing(status.watch_status(request.interval_seconds)) as states:
                    async for now in states:
                        admitted(context, guard)  # it may be out since it asked
                        try:
                            async with asyncio.timeout(patience):
                                await context.write(now)
                        except TimeoutError:
                            raise _unread(patience) from None
            finally:
                places.leave(name)
        except PeerError as error:
            await _refuse(context, error)

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


def control_handlers(control: ControlHandler, guard: Guard | None) -> grpc.GenericRpcHandler:
    """What an operator asks for."""

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
