"""Many nodes in one process, on a virtual clock.

Everything between the settings and the process is what daemons run: schedule, membership, topology,
exchange, mixing, method, catching up. What is not real: the network (loopback.py), the time, and
the disk. All nodes compute on one thread, one after the other; a step takes what the experiment
says on the virtual clock, whatever it takes here.

Frozen weights are there once: each node's model is a twin that holds only the layers it has
changed. With very many nodes, everybody greeting everybody, quadratic in their number, is the one
part that can be left out (``Cell.everybody``): the graph is then that over all nodes, drawn once,
and each node is given its neighbours' addresses in place of finding everybody's.
"""

import asyncio
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import structlog
import torch
from torch import Tensor

from deca_node import topology, wire
from deca_node.batches import Batch, BatchStream, Example
from deca_node.blocks import Schedule, Visit
from deca_node.compression import FLOAT_MAX, Format
from deca_node.errors import PayloadError, PeerUnavailable
from deca_node.evaluation import evaluate
from deca_node.experiment import Cell, LinksSection
from deca_node.loopback import Call, LoopbackNetwork
from deca_node.member import REJOIN_SECONDS, Member, Run
from deca_node.membership import Edges, Phase
from deca_node.methods import Method, choose
from deca_node.models import LanguageModel, wide_device
from deca_node.record import finite, finite_values
from deca_node.rounds import Start, StepRecord
from deca_node.shelf import HeldBlocks
from deca_node.swarm import Identity
from deca_node.topology import Graph
from deca_node.wire import Snapshot

T = TypeVar("T")
Row = dict[str, Any]

# What the members log would cost more than what they do.
_QUIET = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(50))
_PORT = 7430
# Visits that some node, dead or far behind, has not ended; for each a block is kept.
_OPEN_VISITS = 4


@dataclass(frozen=True)
class Material:
    """What the nodes of a cell work on.

    Attributes:
        model: the base model; it is not changed.
        schedule: rounds, blocks, steps.
        shards: each node's examples.
        test: held-out examples, may be empty.
        completions: of the labels, as ``evaluate`` wants them.
    """

    model: LanguageModel
    schedule: Schedule
    shards: Sequence[Sequence[Example]]
    test: Sequence[Example]
    completions: Mapping[str, Sequence[int]]


class Simulation:
    """One cell of an experiment, from start to end.

    Args:
        cell: what is simulated.
        material: what the nodes work on.
        tell: takes rows of results: ``step`` (one node's), ``visit`` (all nodes').
    """

    def __init__(self, cell: Cell, material: Material, tell: Callable[[Row], None]) -> None:
        self.cell, self.material, self.tell = cell, material, tell
        self.timing = cell.settings.timing()
        # By then all that live have greeted each other again and again, who is silent is gone, and
        # who came back goes on: one that still waits for members, beside others that do, will wait
        # for ever.
        self.patience = self.timing.gone_after + REJOIN_SECONDS
        # All compute in turn here: there is no time to work ahead in.
        network = cell.settings.network.model_copy(update={"overlap": False})
        self.settings = cell.settings.model_copy(update={"network": network})
        self.stopping = asyncio.Event()
        links = Links(cell.world.links, cell.seed)
        self.network = LoopbackNetwork(links.delay, links.fault, passage=links.passage)
        self._graphs: dict[frozenset[str], Graph] = {}
        self._spreads: dict[int, Spread] = {}
        self._whole = frozenset(cell.nodes)
        self.nodes = [SimulatedNode(self, number, name) for number, name in enumerate(cell.nodes)]
        attacks = cell.world.faults.attacks
        self.honest = [node for node in self.nodes if node.name not in attacks]

    async def run(self) -> None:
        """Run until every node that lives has finished; what one raises is raised here.

        Nodes that wait for members that will not come stay unfinished.
        """
        deaths = self.cell.world.faults.deaths
        fates = [
            asyncio.create_task(node.suffer(deaths[node.name]))
            for node in self.nodes
            if node.name in deaths
        ]
        for node in self.nodes:
            node.start()
        try:
            while running := [node.task for node in self.nodes if node.alive] + [
                fate for fate in fates if not fate.done()
            ]:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    if not task.cancelled():
                        task.result()
                if not any(node.alive or node.returns for node in self.nodes):
                    break
            for index in sorted(self._spreads):
                self._tell_spread(index)
        finally:
            for task in (*fates, *(node.task for node in self.nodes)):
                task.cancel()
            await asyncio.gather(
                *fates, *(node.task for node in self.nodes), return_exceptions=True
            )

    def waits(self, node: "SimulatedNode") -> None:
        """A node waits for members; where all that live do so in vain, that is the end."""
        if node.waits_in_vain and not any(
            other.returns or (other.alive and not other.waits_in_vain) for other in self.nodes
        ):
            self.stopping.set()

    def draw(self, names: frozenset[str]) -> Graph:
        """The graph over these members; over all nodes where not everybody greets everybody."""
        names = names if self.cell.everybody else self._whole
        if names not in self._graphs:
            self._graphs[names] = topology.graph(names, self.cell.spec)
        return self._graphs[names]

    def closed(self, visit: Visit, values: Mapping[str, Tensor]) -> None:
        """An honest node has ended a visit; when all have, their spread is told."""
        spread = self._spreads.setdefault(visit.index, Spread())
        spread.add(values)
        spread.time = asyncio.get_running_loop().time()
        if spread.count == len(self.honest):
            self._tell_spread(visit.index)
        while len(self._spreads) > _OPEN_VISITS:
            self._tell_spread(min(self._spreads))

    def _tell_spread(self, index: int) -> None:
        spread = self._spreads.pop(index)
        self.tell(
            {
                "kind": "visit",
                "visit": index,
                "block": self.material.schedule.visit(index).block,
                "nodes": spread.count,
                "time": round(spread.time, 6),
                "disagreement": finite(spread.rms),
            }
        )

    def disagreement(self) -> float:
        """Root mean square over finished nodes of ‖x_i − x̄‖, over all layers.

        NaN where a weight is not finite, or no node has finished.
        """
        models = [node.model for node in self.honest if node.finished]
        square = 0.0
        for layers in self.material.schedule.blocks:
            spread = Spread()
            for model in models:
                spread.add(model.block_tensors(layers))
            square += spread.rms**2
        return math.sqrt(square)

    def finished_model(self) -> LanguageModel | None:
        """The model of the first honest node that has finished."""
        return next((node.model for node in self.honest if node.finished), None)

    def measure(self, stop: Callable[[], bool] = lambda: False) -> list[Row]:
        """Test the models of the finished nodes, or of some of them."""
        chosen, test = self.cell.world.experiment.measured, self.material.test
        nodes = [node for node in self.honest if node.finished]
        if chosen is not None and chosen < len(nodes):
            nodes = [nodes[index * len(nodes) // chosen] for index in range(chosen)]
        rows = []
        for node in nodes if test else []:
            size = self.cell.settings.data.batch_size
            found = evaluate(node.model, test, self.material.completions, size, stop)
            if found is not None:
                rows.append({"kind": "node", "node": node.name, **finite_values(asdict(found))})
        return rows


class SimulatedNode:
    """One node; it can die and come back.

    Attributes:
        name, address: for its peers.
        task: its present life.
        finished: it has done the whole run.
        returns: it is dead and will come back.
        bytes_sent, bytes_received: of blocks, over all its lives.
        owed: virtual seconds of computing that the next job takes.
    """

    def __init__(self, simulation: Simulation, number: int, name: str) -> None:
        self._simulation, self._number, self.name = simulation, number, name
        self.address = _address(number)
        world, settings = simulation.cell.world, simulation.cell.settings
        draw = random.Random(f"deca/speed/{simulation.cell.seed}/{number}")  # noqa: S311 - no secret
        drawn = world.compute.seconds * math.exp(draw.gauss(0.0, world.compute.spread))
        self.seconds = world.compute.nodes.get(name, drawn)
        material = simulation.material
        pad = material.model.tokenizer.pad_id
        self._stream = BatchStream(
            material.shards[number], settings.data.batch_size, settings.run.seed, pad
        )
        self._blocks = HeldBlocks(material.schedule)
        self._start, self._position = Start(), 0
        self._life = 0
        self._member: Member | None = None
        self._waits_since: float | None = None
        self.task: asyncio.Task[None]
        self.finished = self.returns = False
        self.bytes_sent = self.bytes_received = 0
        self.owed = 0.0

    @property
    def alive(self) -> bool:
        """Whether it runs now."""
        return not self.task.done()

    @property
    def waits_in_vain(self) -> bool:
        """Whether it waits for members, and has for longer than any come."""
        since, now = self._waits_since, asyncio.get_running_loop().time()
        return since is not None and now - since > self._simulation.patience

    @property
    def model(self) -> LanguageModel:
        """Its model."""
        return self._blocks.model

    def start(self) -> None:
        """Begin a life."""
        self._life += 1
        self.returns, self._waits_since = False, None
        self.task = asyncio.create_task(self._live())

    async def suffer(self, times: Sequence[float]) -> None:
        """Die at the first of the times, come back at the second if there is one."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(times[0] - loop.time())
        if not self.alive:
            return
        self.returns = len(times) == 2
        self._simulation.network.kill(self.address)
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        if self._member is not None:
            await self._member.swarm.close()
        if self.returns:
            await asyncio.sleep(times[1] - loop.time())
            self.start()

    async def _live(self) -> None:
        simulation = self._simulation
        cell, schedule = simulation.cell, simulation.material.schedule
        model = simulation.material.model.twin()
        choose.prepare(cell.settings, model)
        self._blocks.put_into(model)
        self._stream.position = self._position
        run, settings = cell.settings.run, cell.settings
        transport = simulation.network.transport(self.address.rpartition(":")[0], _PORT)
        # Settings are equal by construction; what is left of a greeting is what can differ.
        identity = Identity(run.name, self.name, self._session(), {}, port=_PORT)
        rate = settings.network.catch_up_rate * 1e6
        member = self._member = Member(
            Run(
                schedule,
                cell.spec,
                simulation.timing,
                rate,
                wire_format=Format.named(settings.network.wire_format),
            ),
            identity,
            transport,
            self._blocks,
            simulation.stopping,
            _nothing,
            _QUIET,
            simulation.draw,
        )
        member.visit = self._start.visit
        await transport.listen(member, None)
        member.enter(Phase.WAITING)
        wanted = self._meet(member)
        self._waits_since = asyncio.get_running_loop().time()
        await member.wait_for_members(
            wanted, lambda _: simulation.waits(self), resumed=self._start.visit > 0
        )
        self._waits_since = None
        if simulation.stopping.is_set():
            await member.swarm.close()
            return
        member.enter(Phase.TRAINING)
        method = choose.build(simulation.settings, self.model, self.name)
        if (factor := cell.world.faults.attacks.get(self.name)) is not None:
            method = cast(Method, _Attack(method, run.name, self.name, factor))
        batches, watch = _Metered(self, self._stream), _Watch(self, member)
        await member.train(self._start, method, batches, watch, self._work)
        self._start = Start(schedule.visits)
        member.enter(Phase.SERVING)
        await member.exchange.drain()
        self.bytes_sent += watch.sent()  # of the last block, to those that were behind
        member.exchange.release()
        await member.hand_out()
        self.finished = True
        await member.leave(finished=True)
        await transport.close(0)

    def _meet(self, member: Member) -> int:
        """Give the member the others' addresses; for how many, itself included, it waits."""
        nodes = self._simulation.nodes
        if self._simulation.cell.everybody:
            others = [node for node in nodes if node is not self]
        else:
            neighbours = self._simulation.draw(frozenset())[self.name]
            others = [node for node in nodes if node.name in neighbours]
            member.swarm.gossips = False
        for node in others:
            member.swarm.propose(node.address, lasting=True)
        return 1 + len(others)

    def _session(self) -> int:
        return 1 + self._number + len(self._simulation.nodes) * self._life

    async def _work(self, work: Callable[[], T]) -> T:
        """rounds.Worker: computes here, and takes what the experiment says."""
        owed, self.owed = self.owed, 0.0
        if owed:
            await asyncio.sleep(owed)
        return work()

    def step_done(self, record: StepRecord, sent: int) -> None:
        """A step is complete; ``sent`` are the bytes of it."""
        received = record.gathered.received
        self.bytes_sent += sent
        self.bytes_received += received
        row: Row = {
            "kind": "step",
            "node": self.name,
            "visit": record.visit.index,
            "step": record.step,
            "time": round(asyncio.get_running_loop().time(), 6),
            "loss": finite(record.local.loss),
            "disagreement": finite(record.settled.disagreement),
            "discrepancy": finite(record.settled.discrepancy),
            "neighbours": len(record.gathered.used),
            "bytes_sent": sent,
            "bytes_received": received,
        }
        if not record.gathered.complete:
            row["partial"], row["missing"] = record.gathered.partial, record.gathered.missing
        self._simulation.tell(row)

    def visit_closed(self, visit: Visit) -> None:
        """A visit has ended; a later life goes on behind it."""
        values = self._blocks.closed(visit)
        self._start, self._position = Start(visit.index + 1), self._stream.position
        if self in self._simulation.honest:
            self._simulation.closed(visit, values)


class _Attack:
    """methods.Method of a node that sends other blocks than those that it has."""

    def __init__(self, method: Method, run: str, node: str, factor: float) -> None:
        self._method, self._about, self._factor = method, (run, node), factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def outgoing(self, serial: int) -> Snapshot:
        """See Method."""
        true, layout = self._method.outgoing(serial), self._method.layout
        flat = torch.cat([true.values(index) for index in range(true.count - 1)])
        false = flat.mul_(self._factor).clamp_(-FLOAT_MAX, FLOAT_MAX)
        return wire.snapshot(false, layout, serial, wire.metadata(*self._about, serial))


class _Metered:
    """rounds.Batches: a batch that is drawn is a step that must be computed."""

    def __init__(self, node: SimulatedNode, stream: BatchStream) -> None:
        self._node, self._stream = node, stream

    @property
    def position(self) -> int:
        """See Batches."""
        return self._stream.position

    @position.setter
    def position(self, value: int) -> None:
        self._stream.position = value

    def next(self) -> Batch:
        """See Batches."""
        self._node.owed += self._node.seconds
        return self._stream.next()


class _Watch:
    """rounds.Observer."""

    def __init__(self, node: SimulatedNode, member: Member) -> None:
        self._node, self._member, self._sent = node, member, 0

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """See Observer."""

    async def step_done(self, record: StepRecord) -> None:
        """See Observer."""
        self._node.step_done(record, self.sent())

    def sent(self) -> int:
        """Bytes of blocks that were sent since the last call."""
        before, self._sent = self._sent, self._member.exchange.bytes_sent
        return self._sent - before

    async def paused(self, *, within: bool) -> None:
        """See Observer. Nobody pauses a simulated node."""

    async def visit_closed(self, visit: Visit) -> None:
        """See Observer."""
        self._node.visit_closed(visit)


class Links:
    """What happens to messages.

    Args:
        section: delay, loss and bandwidth of every link.
        seed: of chance.
    """

    def __init__(self, section: LinksSection, seed: int) -> None:
        self._section = section
        self._chance = random.Random(f"deca/links/{seed}")  # noqa: S311 - no secret
        self._free: dict[tuple[str, str], float] = {}  # when a link has sent what it was given

    def delay(self, source: str, target: str) -> float:
        """See LoopbackNetwork."""
        del source, target
        if not self._section.jitter:
            return self._section.delay
        return self._section.delay + self._chance.uniform(0.0, self._section.jitter)

    def fault(self, call: Call, index: int, message: bytes) -> bytes:
        """See LoopbackNetwork."""
        del index
        if message and self._section.loss and self._chance.random() < self._section.loss:
            lost = f"{call.target}: a message was lost"
            # A file that breaks off is no false one, for which its giver would be left alone.
            raise (
                PeerUnavailable(lost)
                if call.method == "FetchBlock"
                else PayloadError("incomplete", lost)
            )
        return message

    def passage(self, call: Call, nbytes: int) -> float:
        """See LoopbackNetwork. Messages wait for those before them on the same link."""
        if self._section.bandwidth is None:
            return 0.0
        link, now = (call.target, call.source), asyncio.get_running_loop().time()
        begin = max(now, self._free.get(link, 0.0))
        self._free[link] = begin + nbytes / (self._section.bandwidth * 1e6)
        return self._free[link] - now


class Spread:
    """How far apart blocks of equal shapes are: root mean square of their distance from the mean.

    Welford's algorithm: one pass, and no difference of large numbers.

    Attributes:
        count: blocks so far.
        time: when the last one came, seconds of the virtual clock.
    """

    def __init__(self) -> None:
        self.count, self.time = 0, 0.0
        self._mean: dict[str, Tensor] = {}
        self._square = 0.0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """One more block: by name, floating tensors of the shapes of those before it."""
        self.count += 1
        for name, tensor in tensors.items():
            x = tensor.float()
            if name not in self._mean:
                self._mean[name] = x.clone()
                continue
            mean = self._mean[name]
            off = x - mean
            mean.add_(off, alpha=1 / self.count)
            square = off.mul_(x - mean).to(wide_device(off.device))
            self._square += float(torch.sum(square, dtype=torch.float64))

    @property
    def rms(self) -> float:
        """√(mean over the blocks of ‖x_i − x̄‖²); NaN of none, or where a value is not finite."""
        if not self.count or not math.isfinite(self._square):
            return math.nan
        return math.sqrt(max(0.0, self._square) / self.count)


def summary(simulation: Simulation, rows: Sequence[Row], measures: Sequence[Row]) -> Row:
    """What a cell comes to: means over nodes, their spread (population standard deviation), worst.

    Where a node's value is not finite these three are None: a mean of those that have not diverged
    would flatter the method. ``diverged`` counts such nodes.

    Args:
        simulation: it has ended.
        rows: what it told.
        measures: what ``measure`` gave.
    """
    honest = {node.name for node in simulation.honest}
    steps = [row for row in rows if row["kind"] == "step" and row["node"] in honest]
    finished = [node for node in simulation.nodes if node.finished]
    row: Row = {
        "kind": "summary",
        "nodes": len(simulation.nodes),
        "finished": len(finished),
        "loss": _last_loss(steps),
        "bytes_sent": statistics.fmean(node.bytes_sent for node in simulation.nodes),
        "virtual_seconds": max((row["time"] for row in steps), default=0.0),
        "incomplete_mixes": sum("missing" in row for row in steps),
        "diverged": len({row["node"] for row in (*steps, *measures) if row["loss"] is None}),
    }
    # DeCAF's nodes have factors of their own, equal products or not: their distance says nothing.
    if simulation.settings.run.method != "decaf":
        row["disagreement"] = finite(simulation.disagreement())
    for score, worst in (("accuracy", min), ("macro_f1", min), ("perplexity", max), ("loss", max)):
        told = [row[score] for row in measures]
        values = [value for value in told if value is not None]
        if values:
            name, whole = f"test_{score}", len(values) == len(told)
            row[name] = statistics.fmean(values) if whole else None
            row[f"{name}_spread"] = statistics.pstdev(values) if whole else None
            row[f"{name}_worst"] = worst(values) if whole else None
    return row


def _last_loss(steps: Sequence[Row]) -> float | None:
    """Mean over nodes and over the last tenth of the run, of each node's steps.

    None where one of them is not finite, or there are none.
    """
    by_node: dict[str, list[float | None]] = {}
    for row in steps:
        by_node.setdefault(row["node"], []).append(row["loss"])
    tails = [values[-max(1, len(values) // 10) :] for values in by_node.values()]
    means = [
        statistics.fmean(v for v in tail if v is not None) for tail in tails if None not in tail
    ]
    return statistics.fmean(means) if means and len(means) == len(tails) else None


def _address(number: int) -> str:
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}:{_PORT}"


def _nothing() -> None:
    """Nobody watches a simulated node's phase."""
