"""Nodes as child processes: started, watched, shown and ended."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.live import Live

from deca_node import registry, status
from deca_node.config import ENV_PREFIX, Settings
from deca_node.errors import SwarmError
from deca_node.pb import node_pb2 as pb
from deca_node.record import read_summary
from deca_node.transport.client import ask_all
from deca_node.waiting import happens

POLL_SECONDS = 1.0
ASK_SECONDS = 2.0
# Without a terminal a line now and then shows that it is alive.
SAY_SECONDS = 10.0
# A node ends within 5 s of SIGTERM; on a machine this busy we allow it more.
STOP_SECONDS = 20.0


def interruption() -> asyncio.Event:
    """An event that the signals by which people end a verb set from now on."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupted.set)
    return interrupted


async def supervise(
    nodes: Sequence[Settings],
    console: Console,
    enough: Callable[[Mapping[str, pb.NodeStatus | str]], bool] | None = None,
) -> bool:
    """Run all nodes until all have finished; False when a signal ended them.

    Args:
        nodes: whose settings are written.
        console: where the progress is shown.
        enough: asked again and again with what is known of the nodes; True ends them early.

    Raises:
        SwarmError: one failed; the others were stopped.
    """
    interrupted = interruption()
    children: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        show = stack.enter_context(display(console))
        try:
            for settings in nodes:
                log = stack.enter_context(log_of(settings).open("ab"))
                children[settings.node.name] = spawn(settings, log)
            known: dict[str, pb.NodeStatus | str] = dict.fromkeys(children, "starting")
            while any(child.poll() is None for child in children.values()):
                _check(nodes, children)
                known |= await poll(children)
                show(known)
                if await happens(interrupted, POLL_SECONDS):
                    return False
                if enough is not None and enough(known):
                    return True
            _check(nodes, children)
        finally:
            await asyncio.to_thread(end, children.values())
    for settings in nodes:
        if not has_finished(settings.node.output):
            raise SwarmError(f"{settings.node.name} was stopped; run the same command to resume")
    return True


def spawn(settings: Settings, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a node whose settings are written."""
    # What variables set is in node.toml already; there they must not win over what is per node.
    environment = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)
    }
    command = [sys.executable, "-m", "deca_node", "start", "--config"]
    return subprocess.Popen(  # noqa: S603 - our own program
        [*command, str(settings.node.output / "node.toml")],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and we pass it on
    )


def log_of(settings: Settings) -> Path:
    """Where a node's process writes."""
    return settings.node.output / "log.jsonl"


def _check(nodes: Sequence[Settings], children: Mapping[str, subprocess.Popen[bytes]]) -> None:
    for settings in nodes:
        if code := children[settings.node.name].poll():
            raise failure(settings, code)


def failure(settings: Settings, code: int) -> SwarmError:
    """That a node ended with an error, in its own words."""
    log = log_of(settings)
    return SwarmError(
        f"{settings.node.name} failed (exit code {code}): {last_words(log)}; see {log}"
    )


def last_words(log: Path) -> str:
    """What a node's log says last: an error's one line, or the last event."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = next((line for line in reversed(lines) if line.strip()), "its log is empty")
    try:
        record = json.loads(text)
    except ValueError:
        return text
    if not isinstance(record, dict):
        return text
    detail = str(record.get("exception", "")).strip().rpartition("\n")[2]
    return ": ".join(filter(None, [str(record.get("event", text)), detail]))


def end(children: Collection[subprocess.Popen[bytes]]) -> None:
    """End processes: kindly, all at the same time, and after a while by force."""
    for child in children:
        child.terminate()
    limit = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


async def poll(children: Mapping[str, subprocess.Popen[bytes]]) -> dict[str, pb.NodeStatus | str]:
    """Ask the nodes that answer for their status; of the others only those that ended are told."""
    names = {child.pid: name for name, child in children.items()}
    entries = [entry for entry in registry.local_nodes() if entry.pid in names]
    answers = await ask_all([entry.address for entry in entries], ASK_SECONDS)
    found: dict[str, pb.NodeStatus | str] = {
        names[entry.pid]: answer
        for entry, answer in zip(entries, answers, strict=True)
        if isinstance(answer, pb.NodeStatus)
    }
    return found | {name: "ended" for name, child in children.items() if child.poll() is not None}


@contextlib.contextmanager
def display(console: Console) -> Iterator[Callable[[Mapping[str, pb.NodeStatus | str]], None]]:
    """Yields what takes all nodes' states: a live table, or now and then a line."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda known: live.update(status.render_swarm(known), refresh=True)
        return
    began = time.monotonic()
    said = -math.inf

    def say(known: Mapping[str, pb.NodeStatus | str]) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            console.print(
                f"{status.duration(now - began)}  {progress_line(known)}",
                soft_wrap=True,
                highlight=False,
            )

    yield say


def progress_line(known: Mapping[str, pb.NodeStatus | str]) -> str:
    """All nodes in a line; those that do the same share a phrase."""
    phrases: dict[str, list[str]] = {}
    for name, state in known.items():
        phrases.setdefault(state if isinstance(state, str) else _phrase(state), []).append(name)
    return "; ".join(f"{', '.join(names)}: {phrase}" for phrase, names in phrases.items())


def _phrase(now: pb.NodeStatus) -> str:
    if now.waiting_for:
        return f"{status.phase(now.phase)}, {now.waiting_for}"
    loss = f", loss {now.loss:.3f}" if now.loss else ""
    return f"{status.phase(now.phase)} {now.steps_done}/{now.steps_total}{loss}"


def has_finished(folder: Path) -> bool:
    """Whether a node's run is complete.

    Raises:
        OutputError: its summary cannot be read.
    """
    return bool(read_summary(folder / "summary.json").get("finished"))
