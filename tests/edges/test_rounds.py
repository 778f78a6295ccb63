"""What a visit is gone on with takes memory, and a file's place on the disk, only until it is."""

import asyncio
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from deca_node.blocks import Schedule, partition_layers
from deca_node.membership import Edges
from deca_node.methods import Local, Settled
from deca_node.rounds import Rounds, Start
from deca_node.worker import TrainingThread


class Alone:
    """No neighbours at all."""

    overtaken = early = False

    async def open_visit(self, *_args, **_options):
        return Edges(0, 1, {})


class Method:
    """State that is copied as a visit is gone on with; ``given`` sees whether it lives on."""

    stale, overlaps, layout = False, False, None

    def __init__(self):
        self.given = weakref.WeakSet()
        self.opened = []

    def open(self, visit, saved):
        self.opened.append((visit.index, saved is not None))
        self._x = torch.zeros(4) if saved is None else saved["x"].clone()

    def state(self):
        return {"x": self._x}

    def close(self):
        self.given.add(self._x)
        self._x = None

    def gradient(self, _batch):
        return Local(1.0, 1.0)

    def exchanges(self, _step):
        return False

    def advance(self, step):
        pass

    def settle(self, _step):
        return Settled(0.0, 0.0, 0.0)


class Watch:
    """Counts what is kept of what a visit was gone on with, step by step."""

    def __init__(self, method):
        self.method, self.kept = method, []

    def visit_opened(self, *_):
        pass

    async def visit_closed(self, visit):
        pass

    async def paused(self, *, within):
        pass

    async def step_done(self, record):
        gc.collect()
        self.kept.append(len(self.method.given))


class Pause:
    """Costs the visit that is open at the fourth time of asking."""

    def __init__(self, wanted):
        self.asked, self._wanted = 0, wanted

    @property
    def wanted(self):
        self.asked += 1
        return self._wanted and self.asked == 4

    async def __call__(self):
        return True


@pytest.mark.parametrize(
    ("saved", "anew", "pause", "opened"),
    [
        (True, False, False, [(0, True), (1, False)]),  # a restart within a visit
        (True, True, False, [(0, False), (1, False)]),  # the same, but others have gone on
        (False, False, True, [(0, False), (0, True), (1, False)]),  # a pause within one
    ],
)
async def test_saved_state_is_let_go_once_the_visit_is_open(saved, anew, pause, opened):
    """Though whoever began the run has its start until the end, as a node does."""
    method = Method()
    watch = Watch(method)

    def restored():
        tensors = {"x": torch.ones(4)}
        method.given.update(tensors.values())
        return Start(0, 2, tensors)

    async def catch_up(visit, *, overtaken):
        return visit, anew

    start = restored() if saved else Start()
    run = Rounds(
        schedule=Schedule(partition_layers(2, 1), 1, 6, "ascending", 0),
        method=method,
        exchange=Alone(),
        batches=SimpleNamespace(position=0, next=object),
        neighbours=lambda _: frozenset(),
        catch_up=catch_up,
        pause=Pause(pause),
        observer=watch,
        worker=TrainingThread(),
        stopping=asyncio.Event(),
    )
    assert await run.run(start) == (2, 0)
    assert method.opened == opened
    assert watch.kept == [0] * len(watch.kept)
    assert (start.visit, start.step) == (0, 2 if saved else 0)
