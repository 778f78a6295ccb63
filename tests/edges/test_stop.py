"""Told to stop while a gradient takes long: it is given up, and what has arrived is taken in."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from deca_node import rounds
from deca_node.blocks import Schedule, partition_layers
from deca_node.errors import DiskFullError
from deca_node.exchange import Gathered
from deca_node.membership import Edges
from deca_node.methods import Local, Settled
from deca_node.rounds import Rounds, Start
from deca_node.worker import TrainingThread

EDGES = Edges(0, 1, {"bob": 0.5})


class Exchange:
    """A neighbour whose blocks come at once."""

    overtaken = early = False

    async def open_visit(self, *_args, **_options):
        return EDGES

    async def make_room(self):
        return 0.0

    def publish(self, snapshot):
        pass

    def encode(self, snapshot, layout):
        pass

    async def gather(self, *_args, busy, **_options):
        await busy
        return Gathered()


class Stale:
    """A method with ``schedule.staleness = 1`` whose second gradient lasts until it is let go."""

    stale, overlaps, layout, intake = True, False, None, None

    def __init__(self):
        self.called, self.stuck, self.release = [], threading.Event(), threading.Event()

    def gradient(self, _batch):
        if "outgoing" in self.called:
            self.stuck.set()
            self.release.wait()
        return Local(1.0, 1.0)

    def exchanges(self, _step):
        return True

    def settle(self, _step):
        return Settled(0.0, 0.0, 0.0)

    def __getattr__(self, name):
        return lambda *_: self.called.append(name)


class Watch:
    """Hears nothing."""

    def visit_opened(self, *_):
        pass

    async def step_done(self, record):
        pass


async def test_what_travels_is_taken_in_beside_a_gradient_that_was_given_up(monkeypatch):
    """``absorb`` does not wait for its turn behind it: a stop must take seconds, not minutes."""
    monkeypatch.setattr(rounds, "STOP_GRACE_SECONDS", 0.01)
    method, stopping = Stale(), asyncio.Event()

    async def no_pause():
        return False

    async def nothing_to_catch_up(visit, *, overtaken):
        return visit, False

    no_pause.wanted = False
    run = Rounds(
        schedule=Schedule(partition_layers(2, 1), 1, 4, "ascending", 0),
        method=method,
        exchange=Exchange(),
        batches=SimpleNamespace(position=0, next=object),
        neighbours=lambda _: frozenset({"bob"}),
        catch_up=nothing_to_catch_up,
        pause=no_pause,
        observer=Watch(),
        worker=TrainingThread(),
        stopping=stopping,
    )
    running = asyncio.create_task(run.run(Start()))
    stuck = asyncio.ensure_future(asyncio.to_thread(method.stuck.wait, 20))
    await asyncio.wait({running, stuck}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running
    stopping.set()
    try:
        async with asyncio.timeout(20):
            assert await running == (0, 1)
    finally:
        method.release.set()
    assert method.called[-1] == "absorb"


ABANDONED = """
import threading
import torch
from deca_node import cli, node
from deca_node.errors import DiskFullError
from deca_node.worker import TrainingThread

async def run(self):
    self._worker = TrainingThread()
    inside = threading.Event()
    def gradient():
        inside.set()
        one = torch.ones(256, 256)
        while True:
            one = one @ one
    self._worker(gradient)
    inside.wait()
    raise DiskFullError("out/state: no space left on the disk")

node.Node.run = run
cli.main(["start", "--set", "model.path=m", "--set", "data.train=d", "--insecure"])
"""


def test_a_gradient_that_was_given_up_does_not_change_the_exit_code():
    """Python's end under a thread that is inside torch is an abort."""
    ended = subprocess.run(
        [sys.executable, "-c", ABANDONED],
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == DiskFullError.exit_code, ended.stderr
    assert "no space left" in ended.stderr


TOLD_EARLY = """
import os, signal, sys
from deca_node.__main__ import main

verb, at = sys.argv[1:]

class Importing:
    def find_spec(self, name, path, target=None):
        if name == at:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Importing())
sys.argv = ["deca-node", verb, "--set", "model.path=m", "--set", "data.train=d"]
main()
"""


@pytest.mark.parametrize(
    ("verb", "at", "code"),
    [
        ("start", "deca_node.cli", 0),
        ("start", "deca_node.node", 0),
        ("doctor", "deca_node.cli", -signal.SIGTERM),  # has not done what it was to do
    ],
)
def test_a_node_that_is_told_to_stop_while_it_still_imports_ends(verb, at, code):
    """The first process of a container would not, without a handler, and be killed later."""
    ended = subprocess.run(
        [sys.executable, "-c", TOLD_EARLY, verb, at],
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
