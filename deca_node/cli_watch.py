"""The verbs that watch a swarm, and those that tell a running node what to do."""

import asyncio
import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from deca_node import access, registry, status, steering, survey, watch
from deca_node.errors import ConfigError, UnreachableError
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from deca_node.steering import ORDERS, Order

LOOK_SECONDS = 2.0

NodeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[NODE or HOST:PORT]",
        help="A node of this machine by name, or any by address; default: the only one here.",
    ),
]
AddressArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[NODE or HOST:PORT]", help="Where to begin; default: this machine's nodes."
    ),
]
TrustOption = Annotated[
    Path | None,
    typer.Option("--trust", help="Trust folder to ask with; default: that of the node's run."),
]


def register(app: typer.Typer, swarm: typer.Typer) -> None:
    """Add the verbs to ``deca-node`` and to ``deca-node swarm``."""
    for verb in (pause, resume, checkpoint, stop):
        app.command()(verb)
    app.command("watch")(watch_swarm)
    swarm.command("status")(swarm_status)


# --- telling a node


def target(given: str | None) -> str:
    """Where a node is told: its socket file on this machine, else HOST:PORT.

    Raises:
        ConfigError: none was given, and several nodes run here; with their names. Or as of
            access.named.
        UnreachableError: none runs here, or none of that name.
    """
    if given is not None:
        return access.named(given)
    here = registry.local_nodes()
    if len(here) == 1:
        return here[0].target
    names = ", ".join(f"{entry.run}/{entry.node}" for entry in here)
    if not here:
        raise UnreachableError("no node runs on this machine; give HOST:PORT of one elsewhere")
    raise ConfigError(f"several nodes run on this machine: {names}; name one")


def _tell(given: str | None, trust: Path | None, order: Order) -> None:
    typer.echo(asyncio.run(steering.tell(target(given), trust, order)))


def pause(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Pause a node after the step under way; it keeps serving the others.

    It saves its state first. The others do not wait for it, and count it as paused.
    """
    _tell(node, trust, ORDERS["pause"])


def resume(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Resume a paused node; it first fetches what the others have changed."""
    _tell(node, trust, ORDERS["resume"])


def checkpoint(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Let a node save its state now: after the step under way. Returns when it is on disk."""
    _tell(node, trust, ORDERS["checkpoint"])


def stop(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """End a node with its state saved, as SIGTERM does; `deca-node start` resumes it."""
    _tell(node, trust, ORDERS["stop"])


def export_of_node(node: str | None, name: str, trust: Path | None, *, consensus: bool) -> None:
    """Let a running node write its model into OUTPUT/exports/NAME."""
    _tell(node, trust, steering.export(name, consensus=consensus))


# --- watching


def swarm_status(
    address: AddressArgument = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="JSON for scripts: an object with nodes, edges, unreachable."),
    ] = False,
    trust: TrustOption = None,
) -> None:
    """Show all nodes that can be reached, and the edges between them.

    It asks the given node, or this machine's, then those that they know, and so on.
    """
    begin = access.targets(address)
    panorama = Panorama()
    observer = Observer(panorama, partial(access.link, trust=trust), lambda: begin, LOOK_SECONDS)
    asyncio.run(_look(panorama, observer, trust))
    if as_json:
        typer.echo(json.dumps(survey.as_json(panorama, time.monotonic())))
    else:
        status.make_console().print(survey.render(panorama, time.monotonic()))


async def _look(panorama: Panorama, observer: Observer, trust: Path | None) -> None:
    """Look once.

    Raises:
        TrustError: the trust folder that is named cannot be used.
        UnreachableError: nobody answers.
    """
    await access.credentials([], trust)
    await observer.look()
    if not panorama.statuses():
        silent = panorama.view(time.monotonic())["silent"]
        raise UnreachableError(f"no deca-node answers at {silent[0]['error']}")


def watch_swarm(
    address: AddressArgument = None,
    trust: TrustOption = None,
    every: Annotated[
        float, typer.Option("--every", min=0.2, max=60, help="Seconds between two updates.")
    ] = LOOK_SECONDS,
) -> None:
    """Watch the whole swarm in the terminal until Ctrl-C: curves, blocks, edges, events."""
    console = status.make_console()
    if not console.is_terminal:
        raise ConfigError("watch needs a terminal; for scripts: deca-node swarm status --json")
    asyncio.run(_watch(console, access.targets(address), trust, every))


async def _watch(console: Any, begin: list[str], trust: Path | None, every: float) -> None:
    panorama = Panorama()
    observer = Observer(panorama, partial(access.link, trust=trust), lambda: begin, every)
    await _look(panorama, observer, trust)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        await observer.run(
            lambda: live.update(watch.Screen(panorama, time.monotonic(), time.time()), refresh=True)
        )
