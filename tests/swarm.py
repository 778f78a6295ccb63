"""A whole swarm in one event loop: real members on the loopback network, a toy model, any clock.

Everything between the settings and the processes is the real thing: schedule, membership,
topology, exchange, DECA's update, catching up. What is a toy: the model (a few vectors, each with
its own optimum on every node) and the state, which is kept in memory and outlives a crash.
"""

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import torch
import xxhash
from safetensors.torch import load, save
from torch import nn

from deca_node.blocks import Schedule, partition_layers
from deca_node.compression import Format
from deca_node.config import Timing
from deca_node.errors import DiskFullError, PayloadError
from deca_node.kept import fits
from deca_node.loopback import LoopbackNetwork
from deca_node.member import Member, Run
from deca_node.membership import Phase
from deca_node.methods.deca import Deca
from deca_node.models import ActiveBlock, Prefix
from deca_node.moments import Rule
from deca_node.recovery import Kept
from deca_node.robust import MEAN
from deca_node.rounds import Start
from deca_node.swarm import Identity
from deca_node.topology import TopologySpec

# What the members log would cost more than what they do.
QUIET = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(50))
WIDTH = 48
LAYERS = 4


class ToyModel:
    """Layers of one vector each; the loss is the distance to this node's own optimum."""

    def __init__(self, optimum):
        self.layers = [nn.Parameter(torch.zeros(WIDTH), requires_grad=False) for _ in range(LAYERS)]
        self.optimum = optimum
        self._active = None

    def named(self, layers):
        return {f"layers.{index}.w": self.layers[index] for index in layers}

    def activate(self, layers):
        self._active = ActiveBlock(self.named(layers), torch.device("cpu"))
        return self._active

    def release(self):
        if self._active is not None:
            self._active.freeze()
        self._active = None

    def loss(self, batch, prefix=None):
        begin, depth = (0, 0) if prefix is None else (prefix.output, prefix.depth)
        return self._sum(begin, self.layers[depth:])

    def _sum(self, begin, layers):
        return sum((((layer - self.optimum) ** 2).mean() for layer in layers), begin)

    def prefix(self, batch, depth, stop):
        with torch.no_grad():
            return None if stop() else Prefix(batch, depth, self._sum(0, self.layers[:depth]))

    def resumes_exactly(self, prefix):
        return torch.equal(self.loss(None), self.loss(None, prefix))

    def values(self):
        return torch.stack([layer.detach().clone() for layer in self.layers])


class Part:
    """catchup.Partial in memory."""

    def __init__(self, disk, xxh3):
        self.disk, self.xxh3, self.data = disk, xxh3, bytearray()

    @property
    def size(self):
        return len(self.data)

    def write(self, data):
        if self.disk.full:
            self.disk.refused += 1
            raise DiskFullError("disk: no space left")
        self.data += data

    def close(self):
        pass


class Disk:
    """What survives a crash: kept blocks, the place in the run, fetched parts."""

    def __init__(self):
        self.blocks = {}  # block -> (Kept, bytes)
        self.parts = {}
        self.place = Start()
        self.lost = frozenset()
        self.fetched = 0
        self.full = False  # takes nothing that is fetched
        self.refused = 0


class Keeping:
    """member.Blocks on a Disk."""

    def __init__(self, disk, model, schedule):
        self.disk, self.model, self.schedule = disk, model, schedule

    def keep(self, block, visit):
        tensors = {n: t.detach() for n, t in self.model.named(self.schedule.blocks[block]).items()}
        data = save(tensors)
        kept = Kept(visit, len(data), xxhash.xxh3_128_hexdigest(data))
        self.disk.blocks[block] = (kept, data)
        self.disk.lost -= {block}

    def restore(self):
        for block, (_, data) in self.disk.blocks.items():
            self._load(block, load(bytes(data)))

    def _load(self, block, tensors):
        for name, parameter in self.model.named(self.schedule.blocks[block]).items():
            parameter.data.copy_(tensors[name])

    def lost(self):
        return self.disk.lost

    def kept(self):
        return {block: kept for block, (kept, _) in self.disk.blocks.items()}

    def open(self, block, xxh3):
        kept, data = self.disk.blocks.get(block, (None, b""))
        return io.BytesIO(data) if kept is not None and kept.xxh3 == xxh3 else None

    async def read(self, file, offset, size):
        return file.getvalue()[offset : offset + size]

    def versions(self):
        return {block: kept.visit for block, (kept, _) in self.disk.blocks.items()}

    def most_bytes(self):
        return dict.fromkeys(range(len(self.schedule.blocks)), 10_000)

    def begun(self):
        return {xxh3 for _, xxh3 in self.disk.parts}

    async def partial(self, block, xxh3):
        return self.disk.parts.setdefault((block, xxh3), Part(self.disk, xxh3))

    async def install(self, block, partial, visit):
        data = bytes(partial.data)
        self.disk.parts = {}
        if xxhash.xxh3_128_hexdigest(data) != partial.xxh3:
            raise PayloadError("digest", "not what was promised")
        tensors = load(data)
        fits(tensors, self.model.named(self.schedule.blocks[block]))
        self._load(block, tensors)
        self.disk.fetched += len(data)
        self.disk.blocks[block] = (Kept(visit, len(data), partial.xxh3), data)
        self.disk.lost -= {block}


class Batches:
    """batches.BatchStream without data."""

    position = 0

    def next(self):
        self.position += 1
        return object()


@dataclass
class Story:
    """What happened to one node, over all its lives."""

    steps: list = field(default_factory=list)  # (time, life, StepRecord)
    visits: list = field(default_factory=list)  # (life, Visit, Edges)
    pauses: list = field(default_factory=list)  # (time, whether within a visit)
    finished: bool = False


class ToyNode:
    """One node of a ToySwarm; it can be killed and started again."""

    def __init__(self, swarm, index):
        self.swarm, self.index = swarm, index
        self.name = f"n{index}"
        self.address = f"10.0.0.{index + 1}:7430"
        self.disk, self.story = Disk(), Story()
        self.life = 0
        self.task = None
        self.member = None
        self.model = None
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.pace = 1.0  # seconds a step

    @property
    def alive(self):
        return self.task is not None and not self.task.done()

    def start(self):
        self.life += 1
        self.task = asyncio.create_task(self._live())

    async def kill(self):
        self.swarm.network.kill(self.address)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.member.swarm.close()

    async def _live(self):
        swarm = self.swarm
        self.model = ToyModel(swarm.optimum(self.index))
        keeping = Keeping(self.disk, self.model, swarm.schedule)
        keeping.restore()
        host, _, port = self.address.partition(":")
        transport = swarm.network.transport(host, int(port))
        session = 1 + self.index + 1000 * self.life
        identity = Identity("toy", self.name, session, {"seed": "0"}, port=int(port))
        self.stopping = asyncio.Event()
        run = Run(
            swarm.schedule,
            swarm.topology,
            swarm.timing,
            1e9,
            wire_format=swarm.wire_format(self.index),
        )
        self.member = member = Member(
            run, identity, transport, keeping, self.stopping, lambda: None, QUIET
        )
        member.visit = self.disk.place.visit
        await transport.listen(member, None)
        member.enter(Phase.WAITING)
        for node in swarm.nodes:
            if node is not self:
                member.swarm.propose(node.address, lasting=True)
        await member.wait_for_members(
            swarm.start_when, swarm.waits, resumed=self.disk.place.visit > 0
        )
        member.enter(Phase.TRAINING)
        rule = Rule(learning_rate=swarm.learning_rate)
        self.method = method = Deca(
            self.model,
            rule,
            "toy",
            self.name,
            overlap=swarm.overlap,
            stale=swarm.stale,
            aggregation=swarm.aggregation,
        )
        watch = _Watch(self, keeping)
        await member.train(self.disk.place, method, Batches(), watch, self._work)
        self.disk.place = Start(swarm.schedule.visits)
        member.enter(Phase.SERVING)
        await member.exchange.drain()
        member.exchange.release()
        self.story.finished = True
        await member.leave(finished=True)
        await transport.close(0)

    async def _work(self, work):
        await self.thawed.wait()
        await asyncio.sleep(self.pace / 4)  # gradient, update, snapshot, ahead, fold
        await self.thawed.wait()
        return work()


class _Watch:
    """rounds.Observer: keeps the state, writes the story, lets faults happen."""

    def __init__(self, node, keeping):
        self.node, self.keeping = node, keeping

    def visit_opened(self, visit, edges, wanted):
        self.node.story.visits.append((self.node.life, visit, edges))

    async def step_done(self, record):
        now = asyncio.get_running_loop().time()
        self.node.story.steps.append((now, self.node.life, record))
        self.node.swarm.check(self.node, record)
        self.node.swarm.after_step(self.node, record)

    async def paused(self, *, within):
        self.node.story.pauses.append((asyncio.get_running_loop().time(), within))

    async def visit_closed(self, visit):
        self.keeping.keep(visit.block, visit.index)
        self.node.disk.place = Start(visit.index + 1)


class ToySwarm:
    """Nodes, their network and what is done to them.

    Args:
        count: nodes.
        rounds, steps: of the schedule; a block is one layer.
        kind: of the topology.
        after_step: called with the node and the record after every step.
        stale, overlap: see methods.deca.Deca.
        wire_format: what each node, by index, wishes for its edges.
        aggregation: see methods.deca.Deca.
    """

    def __init__(
        self,
        count,
        *,
        rounds=4,
        steps=3,
        kind="ring",
        timing=None,
        start_when=None,
        delay: Callable[[], float] = lambda: 0.001,
        after_step=lambda node, record: None,
        learning_rate=0.05,
        spread=1.0,
        stale=False,
        overlap=True,
        wire_format=lambda index: Format.FP32,
        aggregation=MEAN,
    ):
        self.schedule = Schedule(partition_layers(LAYERS, 1), rounds, steps, "ascending", 0)
        self.topology = TopologySpec(kind)
        self.timing = timing or Timing.lan()
        self.learning_rate = learning_rate
        self.spread = spread
        self.stale, self.overlap = stale, overlap
        self.wire_format = wire_format
        self.aggregation = aggregation
        self.start_when = count if start_when is None else start_when
        self.cuts = set()  # directed pairs of addresses
        self.network = LoopbackNetwork(
            delay=lambda a, b: 1e6 if (a, b) in self.cuts or (b, a) in self.cuts else delay()
        )
        self.after_step = after_step
        self.waits = lambda who: None
        self.nodes = [ToyNode(self, index) for index in range(count)]

    def optimum(self, index):
        """Every node pulls another way; together they pull to 1."""
        angle = torch.arange(WIDTH) + index * WIDTH / max(1, len(self.nodes))
        return 1.0 + self.spread * torch.sin(2 * torch.pi * angle / WIDTH)

    def cut(self, some, others):
        """No message passes between the two groups of indices."""
        for a in some:
            for b in others:
                self.cuts.add((self.nodes[a].address, self.nodes[b].address))

    def heal(self):
        self.cuts.clear()

    def start(self, *indices):
        for index in indices or range(len(self.nodes)):
            self.nodes[index].start()

    async def finish(self, limit=4000.0):
        """Wait until every node that runs has ended; what one of them raised is raised here."""
        async with asyncio.timeout(limit):
            await self._finish()

    async def _finish(self):
        while running := [node.task for node in self.nodes if node.alive]:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled():
                    task.result()

    def models(self):
        return torch.stack([node.model.values() for node in self.nodes if node.story.finished])

    def disagreement(self):
        """Largest distance of a finished node's model from the mean."""
        models = self.models()
        return float((models - models.mean(0)).flatten(1).norm(dim=1).max())

    def error(self):
        """Distance of the mean model from the common optimum, 1 everywhere, a value."""
        return float((self.models().mean(0) - 1.0).abs().mean())

    # --- invariants (protocol.md)

    def check(self, node, record):
        edges = record.edges
        assert 0 <= edges.own_weight <= 1 + 1e-9
        assert abs(sum(edges.weights.values()) + edges.own_weight - 1) < 1e-9
        assert len(edges.weights) <= edges.degree
        assert set(record.gathered.used) | set(record.gathered.partial) <= set(edges.weights)
        assert all(torch.isfinite(layer).all() for layer in node.model.layers)
        for other in self.nodes:
            if other.name in edges.weights and other.alive and other.story.visits:
                for life, visit, theirs in reversed(other.story.visits):
                    if visit.index == record.visit.index and life == other.life:
                        back = theirs.weights.get(node.name)
                        assert back is None or abs(back - edges.weights[other.name]) < 1e-12
                        break
