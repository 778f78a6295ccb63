"""Whole swarms in virtual time: working ahead changes nothing, mixing late hides the links."""

import asyncio
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from deca_node.config import Timing
from tests.swarm import ToySwarm
from tests.virtual_time import run


def story(pace=1.0, nodes=4, **options):
    """A swarm that has ended, and the virtual seconds that it took."""

    async def scenario():
        swarm = ToySwarm(nodes, rounds=3, steps=8, **options)
        for node in swarm.nodes:
            node.pace = pace
        swarm.start()
        await swarm.finish()
        return swarm, asyncio.get_running_loop().time()

    return run(scenario())


def test_a_step_mixes_what_was_published_in_the_step_before():
    """Nobody is missed; a visit's first step has nothing to mix, its last one two steps' blocks."""
    swarm, _ = story(stale=True)
    for node in swarm.nodes:
        sizes = [record.gathered.received for _, _, record in node.story.steps]
        for size, (_, _, record) in zip(sizes, node.story.steps, strict=True):
            expected = [] if record.step == 0 else sorted(record.edges.weights)
            assert sorted(record.gathered.used) == expected
            assert not record.gathered.missing
            assert not record.gathered.partial
            assert size == {0: 0, 7: 2 * sizes[1]}.get(record.step, sizes[1])


def test_working_ahead_changes_no_number():
    """Whole runs, bit for bit; of two nodes: with more the order of arrivals rounds sums."""
    (ahead, _), (plain, _) = story(nodes=2), story(nodes=2, overlap=False)
    assert torch.equal(ahead.models(), plain.models())
    for one, other in zip(ahead.nodes, plain.nodes, strict=True):
        for (_, _, record), (_, _, same) in zip(one.story.steps, other.story.steps, strict=True):
            assert record.local == same.local
            assert record.settled == same.settled
    assert any(node.method._exact for node in ahead.nodes)
    assert not any(node.method._exact for node in plain.nodes)


def test_time_that_nobody_waits_costs_a_neighbour_no_budget():
    """Links slower than a visit's whole budget, hidden behind long steps: all blocks are used."""
    timing = replace(Timing.lan(), wait_budget=2.0)
    swarm, _ = story(stale=True, delay=lambda: 2.0, timing=timing, pace=20.0)
    for node in swarm.nodes:
        for _, _, record in node.story.steps:
            assert record.step == 0 or sorted(record.gathered.used) == sorted(record.edges.weights)


def test_told_to_stop_a_late_node_keeps_what_has_come():
    """Within a visit: the mix under way is taken in, and the state kept is after it."""

    async def scenario():
        swarm = ToySwarm(3, rounds=3, steps=8, stale=True)
        ended = asyncio.Event()

        def after(node, record):
            if node.index == 0 and record.visit.index == 1 and record.step == 4:
                asyncio.get_running_loop().call_later(0.1, node.stopping.set)
                asyncio.get_running_loop().call_later(0.2, ended.set)

        swarm.after_step = after
        swarm.start()
        await ended.wait()
        node = swarm.nodes[0]
        await asyncio.sleep(2)
        assert not node.method._late.any()
        assert node.method._block is not None
        await node.kill()
        await swarm.finish()

    run(scenario())


def test_late_mixing_learns_and_agrees():
    """Both more slowly than fresh mixing where nodes pull apart, but far from being alone."""
    fresh, _ = story()
    late, _ = story(stale=True)
    alone, _ = story(kind="explicit")
    assert late.error() < fresh.error() + 0.1 < 0.9
    assert late.disagreement() < 0.2 * alone.disagreement()


def step_seconds(swarm):
    """Virtual seconds between a visit's later steps."""
    return statistics.median(
        later - earlier
        for node in swarm.nodes
        for (earlier, _, _), (later, _, record) in pairwise(node.story.steps)
        if record.step > 1
    )


def test_late_mixing_hides_slow_links():
    """Links slower than what is worked ahead cost a fresh swarm time, a late one none."""
    near, far = (story(stale=True, delay=lambda s=s: s)[0] for s in (0.001, 0.2))
    assert step_seconds(far) == pytest.approx(step_seconds(near), abs=0.01)
    near, far = (story(delay=lambda s=s: s)[0] for s in (0.001, 0.2))
    assert step_seconds(far) > step_seconds(near) + 0.1
