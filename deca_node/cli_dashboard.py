"""``deca-node dashboard``."""

import asyncio
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deca_node import access, registry, steering
from deca_node.addresses import checked_address, joined
from deca_node.errors import ConfigError, DecaError, UnreachableError
from deca_node.events import printable
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from deca_node.steering import ORDERS

PORT = 7480


def dashboard(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[HOST:PORT]...", help="Nodes; default: those of this machine."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to serve on; beyond loopback with --public.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port", "-p", min=0, max=65535, help="Port to serve on; 0 takes a free one."
        ),
    ] = PORT,
    public: Annotated[
        bool,
        typer.Option("--public", help="Let other machines look: no password, no encryption."),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A host name that browsers may use for it."
        ),
    ] = None,
    operate: Annotated[
        bool,
        typer.Option(
            "--operate", help="Let whoever opens the printed address pause or stop nodes."
        ),
    ] = False,
    walk: Annotated[
        bool, typer.Option("--walk/--no-walk", help="Also ask the peers of the nodes.")
    ] = True,
    trust: Annotated[
        Path | None,
        typer.Option("--trust", help="Trust folder to ask with; default: that of the nodes' run."),
    ] = None,
    interval: Annotated[
        float,
        typer.Option("--interval", min=0.2, max=60, help="Seconds between two updates."),
    ] = 1.0,
) -> None:
    """Serve a web page that shows a swarm live: graph, curves, schedule, events.

    It asks the nodes over gRPC and shows what they tell; without --operate it changes nothing.
    Nodes need not be running yet. Ctrl-C ends it.
    """
    given = _checked(addresses or ())
    try:
        from deca_node.dashboard import web  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(
            f"the dashboard needs the package {error.name}: pip install 'deca-node[dashboard]'"
        ) from None
    if operate and (public or not web.is_expected(host, frozenset(), public=False)):
        raise ConfigError(
            "--operate serves on the loopback only: leave out --host and --public, and reach it "
            "through a tunnel (ssh -L)"
        )
    if not public and not web.is_expected(host, frozenset(), public=False):
        raise ConfigError(
            f"--host {host} shows the swarm to every machine that reaches the port, without "
            "password or encryption; add --public if that is meant"
        )

    async def run() -> None:
        await access.credentials([], trust)  # says now what is wrong with the folder
        panorama = Panorama(walk=walk)
        feed = web.Feed(panorama, interval, given or ["this machine's nodes"])
        operator = (
            web.Operator(partial(_operate, panorama, trust), frozenset({*ORDERS, "export"}))
            if operate
            else None
        )
        app = web.make_app(
            feed,
            names=frozenset(name.lower() for name in allow_host or ()),
            public=public,
            operator=operator,
            refused=_say,
        )

        observer = Observer(
            panorama,
            partial(access.link, trust=trust),
            lambda: given or [entry.address for entry in registry.local_nodes()],
            interval,
        )
        with web.listen(host, port) as opened:
            at = f"http://{joined(host, opened.getsockname()[1])}/"
            if operator is not None:
                at += f"#operate={operator.token}"
            typer.echo(f"dashboard at {at}  (Ctrl-C ends it)")
            if operator is not None:
                typer.echo("whoever has that address can pause and stop nodes: keep it to yourself")
            if public:
                typer.echo("everybody who reaches that port can look; nothing is encrypted")
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await web.serve(app, feed, observer, opened, stop)

    asyncio.run(run())


async def _operate(panorama: Panorama, trust: Path | None, key: str, verb: str) -> str:
    """Tell a node that the page shows what to do; through its socket file if it runs here."""
    here = {entry.address: entry.target for entry in registry.local_nodes()}
    if verb == "export":
        order = steering.export(time.strftime("dashboard-%Y%m%d-%H%M%S"))
    else:
        order = ORDERS[verb]
    try:
        address = panorama.address(key)
        if address is None:
            raise UnreachableError("no node of that name answers now")
        said = printable(await steering.tell(here.get(address, address), trust, order))
    except DecaError as error:
        _say(f"{verb} {printable(key)}: {printable(str(error))}")
        raise
    _say(f"{verb} {printable(key)}: {said}")
    return said


def _say(line: str) -> None:
    """A line of the log of what pages asked for: the terminal."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}")


def _checked(addresses: Sequence[str]) -> list[str]:
    try:
        return [checked_address(address) for address in addresses]
    except ValueError as error:
        raise ConfigError(str(error)) from None
