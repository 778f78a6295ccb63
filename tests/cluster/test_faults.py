"""Hundreds of random fault schedules: whole swarms in virtual time, invariants after every step.

Faults are injected at a node's step (node, round, block, step): killed and started again later,
frozen, cut off in part or whole, slowed down, messages lost or damaged. Whatever happens,
everybody ends, the weights stay those of an average (ToySwarm.check), and what was learned is
there at the end.
"""

import asyncio
import random
from functools import lru_cache

import pytest

from deca_node.errors import PeerUnavailable
from tests.swarm import ToySwarm
from tests.virtual_time import run

ROUNDS = 4
FAULTS = ("kill", "freeze", "cut", "split", "slow", "loss", "garbage")


LONG = [
    pytest.param(seed, marks=[pytest.mark.long, pytest.mark.timeout(600)])
    for seed in range(60, 240)
]


class Trouble:
    """Decides from a seed what happens at which step, and undoes it some time later."""

    def __init__(self, seed, swarm):
        self.source = random.Random(seed)
        self.swarm = swarm
        self.tasks = set()
        self.share_lost = self.share_damaged = 0.0
        self.happened = []
        nodes, steps = len(swarm.nodes), swarm.schedule.total_steps
        self.planned = {
            (self.source.randrange(nodes), self.source.randrange(steps)): self.source.choice(FAULTS)
            for _ in range(self.source.randint(2, 6))
        }
        swarm.after_step = self.after_step
        swarm.network.fault = self.message

    def after_step(self, node, record):
        at = (node.index, record.visit.index * self.swarm.schedule.steps + record.step)
        if (what := self.planned.pop(at, None)) is not None:
            self.happened.append((what, *at))
            task = asyncio.create_task(getattr(self, what)(node))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def message(self, call, index, message):
        if self.source.random() < self.share_lost:
            raise PeerUnavailable("lost")
        if message and self.source.random() < self.share_damaged:
            return message[:-1] + bytes([message[-1] ^ 1])
        return message

    async def spell(self):
        await asyncio.sleep(self.source.choice([0.5, 5.0, 20.0, 60.0]))

    async def kill(self, node):
        await asyncio.sleep(2 * self.source.random())  # in a gradient, a mix, a handshake
        if node.alive and sum(each.alive for each in self.swarm.nodes) > 1:
            await node.kill()
            await self.spell()
            node.start()

    async def freeze(self, node):
        node.thawed.clear()
        self.swarm.cut([node.index], [n.index for n in self.swarm.nodes if n is not node])
        await self.spell()
        self.swarm.heal()
        node.thawed.set()

    async def cut(self, node):
        self.swarm.cut([node.index], [self.source.randrange(len(self.swarm.nodes))])
        await self.spell()
        self.swarm.heal()

    async def split(self, node):
        everybody = list(range(len(self.swarm.nodes)))
        self.source.shuffle(everybody)
        middle = self.source.randrange(1, len(everybody))
        self.swarm.cut(everybody[:middle], everybody[middle:])
        await self.spell()
        self.swarm.heal()

    async def slow(self, node):
        node.pace = 8.0
        await self.spell()
        node.pace = 1.0

    async def loss(self, node):
        self.share_lost = 0.1
        await self.spell()
        self.share_lost = 0.0

    async def garbage(self, node):
        self.share_damaged = 0.1
        await self.spell()
        self.share_damaged = 0.0

    async def finish(self):
        while self.tasks or any(node.alive for node in self.swarm.nodes):
            await self.swarm.finish()
            if self.tasks:
                await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)


def build(seed):
    source = random.Random(f"size/{seed}")
    return ToySwarm(
        source.choice([2, 3, 4, 6]),
        rounds=ROUNDS,
        steps=source.choice([1, 3, 6]),
        kind=source.choice(["ring", "full", "erdos_renyi", "bipartite"]),
        delay=lambda: source.choice([0.001, 0.02, 0.2]),
        stale=random.Random(f"stale/{seed}").random() < 0.25,
    )


@lru_cache
def undisturbed(count, steps, kind, stale):
    """Error and duration of the same swarm when nothing happens to it."""

    async def scenario():
        swarm = ToySwarm(count, rounds=ROUNDS, steps=steps, kind=kind, stale=stale)
        swarm.start()
        await swarm.finish()
        return swarm.error(), asyncio.get_running_loop().time()

    return run(scenario())


@pytest.mark.parametrize("seed", [*range(60), *LONG])
def test_whatever_happens_everybody_ends_and_has_learned(seed):
    """Random faults at random steps: no hang, no broken average, no lost learning."""

    async def scenario():
        swarm = build(seed)
        trouble = Trouble(seed, swarm)
        swarm.start()
        try:
            await trouble.finish()
        except TimeoutError:
            pytest.fail(f"{trouble.happened}: {[vars(node.story) for node in swarm.nodes]}"[:2000])
        assert all(node.story.finished for node in swarm.nodes), trouble.happened
        return swarm, trouble.happened, asyncio.get_running_loop().time()

    swarm, happened, elapsed = run(scenario())
    steps, kind = swarm.schedule.steps, swarm.topology.kind
    error, duration = undisturbed(len(swarm.nodes), steps, kind, swarm.stale)
    assert swarm.error() <= error + 0.05, happened
    # Each fault costs its own time and what is waited for those whom it hit, once.
    timing = swarm.timing
    each = 60 + timing.step_deadline + timing.visit_deadline + timing.rpc
    assert elapsed <= 1.5 * duration + each * len(happened), happened
