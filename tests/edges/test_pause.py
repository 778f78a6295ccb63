"""Pausing and resuming members, in whole swarms on the loopback network, in virtual time."""

import asyncio

import pytest

from deca_node.membership import Phase
from tests.edges.test_catchup import until, visits_of
from tests.swarm import ToySwarm
from tests.virtual_time import run


def waits(nodes, since):
    """What steps waited for neighbours since a moment, the longest."""
    return max(
        record.gathered.wait
        for node in nodes
        for when, _, record in node.story.steps
        if when > since
    )


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("steps", [3, 12])
def test_a_pause_costs_the_others_nothing_and_the_paused_node_comes_back_like_a_late_joiner(
    steps, stale
):
    """Nobody waits for it, at no step and no handshake; it fetches what changed and takes part."""

    async def scenario():
        swarm = ToySwarm(4, rounds=8, steps=steps, stale=stale)
        swarm.start()
        paused, *others = swarm.nodes
        clock = asyncio.get_running_loop().time
        await until(lambda: len(paused.story.steps) >= 2 * steps + 1)
        pace = clock() / len(others[1].story.steps)
        paused.member.pause()
        await until(lambda: paused.story.pauses)
        at, done, began = clock(), len(paused.story.steps), len(others[1].story.steps)
        await asyncio.sleep(60)
        assert len(paused.story.steps) == done
        # As fast as before, and all that while.
        assert len(others[1].story.steps) - began >= 0.8 * 60 / pace
        assert waits(others, at) < 2 * paused.pace
        seen = others[0].member.swarm.peers[paused.name]
        assert seen.phase == Phase.PAUSED
        assert "paused" in seen.detail
        for node in others:  # gone around from the next visit on
            assert paused.name not in node.story.steps[-1][2].edges.weights
        paused.member.resume()
        back = clock()
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)
        again = [record for when, _, record in paused.story.steps if when > back]
        assert again[0].step == 0
        assert paused.disk.fetched > 0
        assert visits_of(paused) == sorted(visits_of(paused))
        assert all(record.edges.weights for record in again)
        assert all(record.gathered.complete for record in again)
        assert waits(others, at) < 2 * paused.pace
        assert swarm.disagreement() < 1.0

    run(scenario())


def test_a_pause_that_nobody_noticed_is_no_absence():
    """Shorter than the others' step: the visit goes on with the same edges, nothing is fetched."""

    async def scenario():
        swarm = ToySwarm(3, rounds=4, steps=6)
        swarm.nodes[1].pace = swarm.nodes[2].pace = 5.0
        swarm.start()
        quick = swarm.nodes[0]
        await until(lambda: len(quick.story.steps) == 8)
        quick.member.pause()
        await until(lambda: quick.story.pauses)
        done = len(quick.story.steps)
        await asyncio.sleep(1)
        assert len(quick.story.steps) == done
        quick.member.resume()
        await swarm.finish()
        assert quick.disk.fetched == 0
        assert len(quick.story.steps) == swarm.schedule.total_steps
        for node in swarm.nodes:
            assert all(record.gathered.complete for _, _, record in node.story.steps)

    run(scenario())


def test_a_paused_node_alone_goes_on_where_it_was():
    async def scenario():
        swarm = ToySwarm(1, rounds=2, steps=4)
        swarm.start()
        node = swarm.nodes[0]
        await until(lambda: len(node.story.steps) >= 6)
        node.member.pause()
        await until(lambda: node.story.pauses)
        assert node.story.pauses[0][1]  # within a visit, whose state is to be kept
        values = node.model.values()
        await asyncio.sleep(500)
        assert (node.model.values() == values).all()
        node.member.resume()
        await swarm.finish()
        assert len(node.story.steps) == swarm.schedule.total_steps

    run(scenario())


def test_everybody_may_be_paused_and_come_back_one_by_one():
    """Whoever resumes trains, alone if need be; in the end all are one swarm again."""

    async def scenario():
        swarm = ToySwarm(3, rounds=12, steps=6)
        swarm.start()
        for index, node in enumerate(swarm.nodes):
            await until(lambda node=node, index=index: len(node.story.steps) >= 10 + 3 * index)
            node.member.pause()
            await until(lambda node=node: node.story.pauses)
        done = [len(node.story.steps) for node in swarm.nodes]
        await asyncio.sleep(300)
        assert [len(node.story.steps) for node in swarm.nodes] == done
        first, second, third = swarm.nodes
        for node in (first, second, third):
            node.member.resume()
            here = len(node.story.steps)
            await until(lambda node=node, here=here: len(node.story.steps) > here + 8)
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)
        for node in swarm.nodes:
            assert len(node.story.steps[-1][2].edges.weights) == 2
            assert node.story.steps[-1][2].gathered.complete

    run(scenario())


def test_a_paused_node_gives_blocks_and_greets():
    """A node that joins meanwhile gets what it lacks from the paused one as from any other."""

    async def scenario():
        swarm = ToySwarm(3, rounds=8, steps=3, start_when=2)
        swarm.start(0, 1)
        giver = swarm.nodes[0]
        await until(lambda: len(giver.story.steps) >= 13)
        for node in swarm.nodes[:2]:
            node.member.pause()
        await until(lambda: all(node.story.pauses for node in swarm.nodes[:2]))
        place = giver.member.visit
        late = swarm.nodes[2]
        late.start()
        await asyncio.sleep(30)
        assert not late.story.steps  # two members are to be there: who pauses does not count
        swarm.nodes[1].member.resume()
        await until(lambda: late.story.steps)
        assert late.story.steps[0][2].visit.index >= place
        assert giver.member.giver.bytes_sent > 0
        giver.member.resume()
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)

    run(scenario())


def test_a_node_that_pauses_before_the_start_is_waited_for():
    """It counts as missing, with the reason, until it resumes."""

    async def scenario():
        swarm = ToySwarm(3, rounds=2, steps=3)
        swarm.start(0)
        paused = swarm.nodes[0]
        await until(lambda: paused.member is not None and paused.member.phase == Phase.WAITING)
        paused.member.pause()
        assert paused.member.position().phase == Phase.PAUSED
        swarm.start(1, 2)
        await asyncio.sleep(60)
        assert not any(node.story.steps for node in swarm.nodes)
        paused.member.resume()
        await swarm.finish()
        for node in swarm.nodes:
            assert len(node.story.steps) == swarm.schedule.total_steps
            assert all(record.gathered.complete for _, _, record in node.story.steps)

    run(scenario())


def test_the_end_does_not_wait_for_a_paused_node():
    """The others finish and leave; the paused one goes on alone when it is let."""

    async def scenario():
        swarm = ToySwarm(3, rounds=3, steps=4)
        swarm.start()
        paused, *others = swarm.nodes
        await until(lambda: len(paused.story.steps) >= swarm.schedule.total_steps - 2)
        paused.member.pause()
        await until(lambda: paused.story.pauses)
        at = asyncio.get_running_loop().time()
        await until(lambda: all(node.story.finished for node in others))
        assert asyncio.get_running_loop().time() - at < 20
        paused.member.resume()
        await swarm.finish()
        assert paused.story.finished

    run(scenario())


def test_a_stop_ends_a_pause():
    async def scenario():
        swarm = ToySwarm(2, rounds=3, steps=4)
        swarm.start()
        node = swarm.nodes[0]
        await until(lambda: len(node.story.steps) >= 6)
        node.member.pause()
        await until(lambda: node.story.pauses)
        node.stopping.set()
        node.member.wake()
        await asyncio.wait_for(node.task, 60)

    run(scenario())
