"""The verbs that watch a swarm, and those that tell a running node what to do."""

import asyncio
import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live

from deca_node import access, registry, status, survey, watch
from deca_node.config import checked_address
from deca_node.errors import ConfigError, ControlError, OutputError, PeerError, UnreachableError
from deca_node.observer import Observer
from deca_node.panorama import Panorama
from deca_node.pb import node_pb2 as pb

TELL_SECONDS = 10.0
# A step may take minutes, and a model is written after all of it was read.
SAVE_SECONDS = 1800.0
LOOK_SECONDS = 2.0

NodeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[NODE or HOST:PORT]",
        help="A node of this machine by its name, or any by its address; else the only one here.",
    ),
]
AddressArgument = Annotated[
    str | None,
    typer.Argument(metavar="[HOST:PORT]", help="Where to begin; else at this machine's nodes."),
]
TrustOption = Annotated[
    Path | None,
    typer.Option("--trust", help="Trust folder to ask with; else that of the node's run."),
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
        ConfigError: no address, and several nodes here; with their names.
        UnreachableError: no node of that name here.
    """
    here = registry.local_nodes()
    if given is None:
        if len(here) == 1:
            return here[0].target
        names = ", ".join(f"{entry.run}/{entry.node}" for entry in here)
        if not here:
            raise UnreachableError("no node runs on this machine; give HOST:PORT for another one")
        raise ConfigError(f"several nodes run on this machine: {names}; name one")
    found = [e for e in here if given in (e.node, f"{e.run}/{e.node}", e.address)]
    if len(found) > 1:
        names = ", ".join(f"{entry.run}/{entry.node}" for entry in found)
        raise ConfigError(f"{given}: several nodes are called so: {names}; name the run, too")
    if found:
        return found[0].target
    if ":" not in given:
        raise UnreachableError(
            f"{given}: no node of that name runs on this machine; `deca-node status` lists them, "
            "and HOST:PORT reaches another machine's"
        )
    try:
        return checked_address(given)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def tell(given: str | None, trust: Path | None, verb: str, request: Any, seconds: float) -> Any:
    """Make a call of the service Control.

    Raises:
        UnreachableError: nobody answers, or not in time.
        ControlError: the node refuses.
        OutputError: what was to be written is there already, or could not be.
    """
    return asyncio.run(_tell(target(given), trust, verb, request, seconds))


async def _tell(address: str, trust: Path | None, verb: str, request: Any, seconds: float) -> Any:
    link = await access.link(address, trust)
    try:
        return await link.control(verb, request, seconds)
    except PeerError as error:
        if error.reason in ("unavailable", "late"):
            raise UnreachableError(f"no deca-node answers at {error}") from None
        if error.reason in ("exists", "failed", "not_saved"):
            raise OutputError(str(error)) from None
        raise ControlError(f"{verb.lower()} refused by {error}") from None
    finally:
        await link.close()


def pause(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Let a node take no part after the step under way; it goes on serving the others.

    It saves its state first. The others do not wait for it, and count it as paused.
    """
    said = tell(node, trust, "Pause", pb.PauseRequest(), TELL_SECONDS)
    typer.echo("it was to pause already" if said.already else "pauses after the step under way")


def resume(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Let a paused node take part again; it fetches first what the others have changed."""
    said = tell(node, trust, "Resume", pb.ResumeRequest(), TELL_SECONDS)
    typer.echo("it was not to pause" if said.already else "takes part again")


def checkpoint(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """Let a node save its state now: after the step under way. Returns when it is on disk."""
    said = tell(node, trust, "Checkpoint", pb.CheckpointRequest(), SAVE_SECONDS)
    typer.echo(f"saved at block visit {said.visit + 1}, {said.step} steps done in it")


def stop(node: NodeArgument = None, trust: TrustOption = None) -> None:
    """End a node with its state saved, as SIGTERM does; `deca-node start` resumes it."""
    said = tell(node, trust, "Stop", pb.StopRequest(), TELL_SECONDS)
    typer.echo(f"stops: process {said.pid}")


def export_of_node(node: str | None, name: str, trust: Path | None, *, consensus: bool) -> str:
    """Let a running node write its model into OUTPUT/exports/NAME; where that is, and what."""
    request = pb.ExportRequest(name=name, consensus=consensus)
    said = tell(node, trust, "Export", request, SAVE_SECONDS)
    return f"wrote {said.path} on the node's machine: {said.model}"


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
    asyncio.run(_look(panorama, observer))
    if as_json:
        typer.echo(json.dumps(survey.as_json(panorama, time.monotonic())))
    else:
        status.make_console().print(survey.render(panorama, time.monotonic()))


async def _look(panorama: Panorama, observer: Observer) -> None:
    """Look once.

    Raises:
        UnreachableError: nobody answers.
    """
    await observer.look()
    if not panorama.statuses():
        silent = panorama.view(time.monotonic())["silent"]
        raise UnreachableError(f"no deca-node answers at {silent[0]['error']}")


def watch_swarm(
    address: AddressArgument = None,
    trust: TrustOption = None,
    every: Annotated[
        float, typer.Option("--every", min=0.2, max=60, help="Seconds between two looks.")
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
    await _look(panorama, observer)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        await observer.run(
            lambda: live.update(watch.Screen(panorama, time.monotonic(), time.time()), refresh=True)
        )
