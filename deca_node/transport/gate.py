"""What stands before every call that is answered: places, and a time for its request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from deca_node.admission import Places, network
from deca_node.transport.connection import BUSY


def host_of(peer: str) -> str:
    """The IP address in gRPC's ``ipv4:1.2.3.4:567`` or ``ipv6:%5B::1%5D:567``."""
    kind, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]")
    return host if kind in ("ipv4", "ipv6") else "127.0.0.1"


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc] # grpc has no types
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
            caller = network(host_of(context.peer()))
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
