"""Serves the panorama to browsers: the only file that knows starlette and uvicorn.

Read-only, unless it is made with an Operator: then who has its token may tell nodes what to do.
Against pages of other sites in the same browser: a request must name this server by an address or
an expected name (DNS rebinding), come from this page or from no page at all, and the page may load
and call nothing else (Content-Security-Policy).
"""

import asyncio
import contextlib
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deca_node import __version__
from deca_node.addresses import joined
from deca_node.admission import Turns
from deca_node.errors import DecaError, ListenError
from deca_node.events import printable
from deca_node.limits import (
    MAX_BROWSERS,
    MAX_NAME_BYTES,
    MAX_ORDER_BYTES,
    REFUSAL_LINES,
    REFUSAL_LINES_BURST,
)
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from deca_node.waiting import happens

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Nothing but this origin; no inline script or style, and no text can become markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A browser that lost the stream comes back after this time.
_RETRY_MS = 1500
# A stream without news says so, so that a browser can tell a quiet swarm from a dead connection.
_QUIET_SECONDS = 5.0


@dataclass(frozen=True)
class Operator:
    """Who may tell nodes what to do through the page.

    Attributes:
        tell: key of a node and verb; what the node says. Raises DecaError.
        verbs: that there are.
        token: who shows it is the operator. It is in no answer of this server.
    """

    tell: Callable[[str, str], Awaitable[str]]
    verbs: frozenset[str]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)


class Feed:
    """The panorama as its viewers get it: one picture a tick, whoever looks.

    Args:
        panorama: what is shown.
        interval: seconds between two ticks, told to the browser.
        given: the operator's words for what is watched.
    """

    def __init__(self, panorama: Panorama, interval: float, given: Sequence[str]) -> None:
        self.panorama = panorama
        self.closing = False
        self.viewers = 0
        self._interval, self._given = interval, list(given)
        self._ticked = asyncio.Event()
        self._view: dict[str, Any] | None = None

    def tick(self) -> None:
        """There may be news."""
        self._view = None
        self._ticked.set()
        self._ticked = asyncio.Event()

    def view(self) -> dict[str, Any]:
        """The picture now."""
        if self._view is None:
            self._view = self.panorama.view(time.monotonic())
        return {
            **self._view,
            "version": __version__,
            "time": round(time.time(), 1),
            "interval": self._interval,
            "given": self._given,
        }

    def whole(self) -> dict[str, Any]:
        """The picture with all events and curves."""
        return self.view() | self._grown(0, {})

    def _grown(self, event: int, steps: dict[str, int]) -> dict[str, Any]:
        return {
            "events": self.panorama.events(event, time.monotonic(), time.time()),
            "curves": self.panorama.curves(steps),
        }

    async def stream(self) -> AsyncGenerator[dict[str, Any]]:
        """The whole picture, then at every tick what is new; ends with the server."""
        last_event, steps = 0, dict[str, int]()
        first = True
        while not self.closing:
            ticked = self._ticked
            tree = self.view() | self._grown(last_event, steps)
            if tree["events"]:
                last_event = tree["events"][-1]["id"]
            for key, points in tree["curves"].items():
                steps[key] = points[-1][1]
            yield tree | {"whole": first}
            first = False
            await happens(ticked, _QUIET_SECONDS)

    def close(self) -> None:
        """End all streams."""
        self.closing = True
        self.tick()


def make_app(
    feed: Feed,
    *,
    names: frozenset[str] = frozenset(),
    public: bool = False,
    operator: Operator | None = None,
    refused: Callable[[str], None] = lambda _: None,
) -> ASGIApp:
    """The web application.

    Args:
        feed: what is shown.
        names: further names by which browsers may call this server.
        public: callers from other machines may call it by its addresses.
        operator: who may do more than look; nobody if there is none.
        refused: takes a line for the log about a request that was turned away (403); within the
            bound of such lines.
    """
    refusals = _Refusals(refused)
    page = {
        file.name: file.read_bytes()
        for file in resources.files("deca_node.dashboard").joinpath("page").iterdir()
        if file.name.rpartition(".")[2] in _TYPES
    }

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in page:
            return PlainTextResponse("no such page\n", 404)
        return Response(page[name], media_type=_TYPES[name.rpartition(".")[2]])

    async def state(_: Request) -> Response:
        return JSONResponse(feed.whole())

    async def node(request: Request) -> Response:
        key = request.query_params.get("key", "")[: 2 * MAX_NAME_BYTES + 1]
        found = feed.panorama.details(key, time.monotonic())
        return JSONResponse(found or {"error": "no node of that name"}, 200 if found else 404)

    async def stream(_: Request) -> Response:
        if feed.viewers >= MAX_BROWSERS:
            return PlainTextResponse(
                f"{MAX_BROWSERS} browsers are watching already; close one\n", 503
            )

        async def messages() -> AsyncGenerator[str]:
            feed.viewers += 1
            try:
                yield f"retry: {_RETRY_MS}\n\n"
                async for tree in feed.stream():
                    yield f"data: {json.dumps(tree, separators=(',', ':'))}\n\n"
            finally:
                feed.viewers -= 1

        return StreamingResponse(messages(), media_type="text/event-stream")

    async def alive(_: Request) -> Response:
        return PlainTextResponse("serving\n")

    async def operate(request: Request) -> Response:
        assert operator is not None  # noqa: S101
        if refusal := _not_from_the_operator(request, operator):
            refusals.add(request, refusal)
            return JSONResponse({"error": refusal}, 403)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_ORDER_BYTES:
                return JSONResponse({"error": "too long"}, 413)
        try:
            order = json.loads(body)
            key, verb = str(order["key"]), str(order["verb"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return JSONResponse({"error": "send an object with key and verb"}, 400)
        if verb not in operator.verbs:
            return JSONResponse({"error": f"{verb[:20]!r} is not a verb"}, 400)
        try:
            return JSONResponse({"said": await operator.tell(key, verb)})
        except DecaError as error:
            return JSONResponse({"error": str(error)}, 409)

    routes = [
        Route("/", file),
        Route("/page/{name}", file),
        Route("/api/state", state),
        Route("/api/node", node),
        Route("/api/stream", stream),
        Route("/healthz", alive),
    ]
    if operator is not None:
        routes.append(Route("/api/operate", operate, methods=["POST"]))
    return _Guard(Starlette(routes=routes), names, refusals, public=public)


class _Refusals:
    """Lines about requests that were turned away; of a flood a few, and how many there were."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._untold = tell, 0
        self._turns = Turns(REFUSAL_LINES, REFUSAL_LINES_BURST, 1)

    def add(self, request: HTTPConnection, why: str) -> None:
        """Tell of one more, if its turn has come."""
        if not self._turns.take("", time.monotonic()):
            self._untold += 1
            return
        caller = request.client.host if request.client else "?"
        method, path = request.scope["method"][:10], request.scope["path"][:40]
        line = printable(f"refused {method} {path} from {caller}")
        if host := request.headers.get("host"):
            line += printable(f" (called {host[:60]})")
        if origin := request.headers.get("origin"):
            line += printable(f" (page of {origin[:60]})")
        line += f": {why.strip()}"
        if self._untold:
            line += f"; {self._untold} more since the last such line"
            self._untold = 0
        # The terminal may know no other letters, or be gone: neither is the caller's to see.
        with contextlib.suppress(OSError, ValueError):
            self._tell(line.encode("ascii", "backslashreplace").decode())


class _Guard:
    """Turns away who was sent by another site, and puts the headers on every answer."""

    def __init__(
        self, app: ASGIApp, names: frozenset[str], refusals: _Refusals, *, public: bool
    ) -> None:
        self._app, self._names, self._public = app, names, public
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        app = self._app
        if refusal := self._refusal(Headers(scope=scope), scope["path"]):
            self._refusals.add(HTTPConnection(scope), refusal)
            app = PlainTextResponse(refusal, 403)
        await app(scope, receive, guarded)

    def _refusal(self, headers: Headers, path: str) -> str:
        if not is_expected(headers.get("host", ""), self._names, public=self._public):
            return (
                "this dashboard is not called by that name; use its address, "
                "or start it with --allow-host NAME\n"
            )
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and path != "/":
            return "another site's page may not ask this dashboard\n"
        return ""


def _not_from_the_operator(request: Request, operator: Operator) -> str:
    """Why a request may only look; empty when it may do more.

    The token is enough. That a page of this server sends it, and that a browser cannot be made to
    send it by a form, holds even if the token should be lost.
    """
    headers = request.headers
    if headers.get("origin") != f"http://{headers.get('host', '')}":
        return "only this dashboard's own page may operate nodes"
    if headers.get("content-type") != "application/json":
        return "send JSON"
    shown = headers.get("x-deca-operator", "").encode()
    if not secrets.compare_digest(shown, operator.token.encode()):
        return "this page was not opened with the address that `dashboard --operate` printed"
    return ""


def is_expected(host: str, names: frozenset[str], *, public: bool) -> bool:
    """Whether a Host header names this server as its users do.

    An address cannot be rebound by a hostile DNS server; a name can.
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))  # an IPv6 one ends like a port
    except ValueError:
        bare = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        bare = bare.strip("[]").rstrip(".").lower()
        if bare == "localhost" or bare in names:
            return True
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            return False
    return public or address.is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise ListenError(
            f"cannot serve the dashboard at {joined(host, port)}: {error.strerror or error}; "
            "choose another --port (0 takes a free one) or --host"
        ) from None


class _Server(uvicorn.Server):
    """Without signal handlers: whoever calls ``serve`` decides what ends it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: ASGIApp, feed: Feed, observer: Observer, opened: socket.socket, stop: asyncio.Event
) -> None:
    """Serve until told to stop."""
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            proxy_headers=False,  # whoever calls could write any name into the lines of refusals
            server_header=False,
            lifespan="off",
            ws="none",
            http="h11",
            h11_max_incomplete_event_size=16 << 10,
            limit_concurrency=4 * MAX_BROWSERS,
            timeout_graceful_shutdown=1,
        )
    )

    async def end() -> None:
        await stop.wait()
        server.should_exit = True
        feed.close()

    ending = asyncio.create_task(end())
    observing = asyncio.create_task(observer.run(feed.tick))
    observing.add_done_callback(lambda _: stop.set())  # a defect must not leave a frozen page
    try:
        await server.serve(sockets=[opened])
    finally:
        for task in (ending, observing):
            task.cancel()
        await asyncio.gather(ending, observing, return_exceptions=True)
    if not observing.cancelled() and (error := observing.exception()) is not None:
        raise error
