"""The agreement after the last round: for each block, gossip until all nodes hold the same values.

Each block is one more block visit, whose steps are rounds of :mod:`deca_node.consensus`: publish
the block with a note, take the neighbours' blocks and notes, mix. Nothing is trained any more.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from deca_node.blocks import Schedule
from deca_node.config import ConsensusSettings
from deca_node.consensus import Agreement, Note, Plan, Tally, diameter, digest, plan, reached
from deca_node.errors import PayloadError
from deca_node.exchange import Exchange, Sink
from deca_node.membership import Edges
from deca_node.mixing import mix_measured
from deca_node.models import wide_device
from deca_node.moments import slices
from deca_node.rounds import Worker
from deca_node.topology import Graph
from deca_node.wire import Layout, Snapshot, metadata, snapshot


class Block(Protocol):
    """One block's values; models.ActiveBlock is one.

    ``layout`` names the tensors; ``master`` holds them, contiguous float32, shape (layout.numel,).
    """

    layout: Layout
    master: Tensor

    def write_back(self) -> None:
        """The model takes over what is in ``master``."""
        ...


class Model(Protocol):
    """Whose blocks are agreed on; models.LanguageModel is one."""

    def activate(self, layers: range) -> Block:
        """The layers as one block."""
        ...

    def release(self) -> None:
        """Let go of the block."""
        ...


@dataclass(frozen=True)
class BlockAgreement:
    """How it went with one block.

    Attributes:
        block: its number.
        kind: ``exact``, ``chebyshev`` or ``plain`` gossip; ``alone`` without any neighbour.
        rounds: exchanges, those included in which nodes told each other that they are done.
        before: largest difference between two neighbours at the beginning, as a share of ‖x‖₂.
        after: bound of the difference between any two of ``members`` at the end, likewise.
        reached: whether all of them know that the tolerance is met.
        members: who has these values.
        missing: who was in the graph and has not, or may have not.
        changed: whether the values are what the rounds with others have made of them, and not
            those that the node had before.
    """

    block: int
    kind: str
    rounds: int
    before: float
    after: float
    reached: bool
    members: frozenset[str]
    missing: frozenset[str]
    changed: bool


class Observer(Protocol):
    """Told what happens; may take its time only where it is awaited."""

    def block_opened(self, block: int, edges: Edges, chosen: Plan) -> None:
        """The edges for a block are settled."""
        ...

    def round_done(self, block: int, rounds: int) -> None:
        """So many rounds on the block are over."""
        ...

    async def block_agreed(self, result: BlockAgreement) -> None:
        """The block's values are final, agreed on or not; neighbours wait for the next one."""
        ...


@dataclass
class Agreeing:
    """One node's part.

    Attributes:
        schedule: the run's blocks; their visits follow those of the training.
        settings: tolerance, above 0, and most rounds.
        model: whose blocks are agreed on.
        exchange: the neighbours.
        graph: the topology over the present members, asked for every block.
        run_name: the run's, for the headers of what is sent.
        node: this node's name, likewise.
        observer: told of blocks and rounds.
        worker: runs torch work on the training thread.
        stopping: ends it between two rounds.
    """

    schedule: Schedule
    settings: ConsensusSettings
    model: Model
    exchange: Exchange
    graph: Callable[[], Graph]
    run_name: str
    node: str
    observer: Observer
    worker: Worker
    stopping: asyncio.Event

    @property
    def rounds_per_visit(self) -> int:
        """Stride of the rounds' serials: with it they follow all those of the training."""
        return max(self.schedule.steps, self.settings.max_rounds)

    async def run(self) -> Agreement:
        """Agree on every block, one after the other, or until ``stopping`` is set.

        A block that is not agreed on when it stops, or when every neighbour is lost, has the
        values that it began with. One whose rounds ran out keeps what they have made of it.
        """
        results: list[BlockAgreement] = []
        for block in range(len(self.schedule.blocks)):
            if self.stopping.is_set():
                break
            results.append(result := await self._agree(block))
            await self.observer.block_agreed(result)
        await self.exchange.drain()
        # Whoever still asks for a round that will not come is told so, and is not kept waiting.
        await self._open(self.schedule.visits + len(self.schedule.blocks), frozenset(), 0)
        return self._summed(results)

    def _summed(self, results: list[BlockAgreement]) -> Agreement:
        whole = len(results) == len(self.schedule.blocks)
        everybody = frozenset[str]().union(*(r.members | r.missing for r in results))
        members = everybody.intersection(*(r.members for r in results))
        missing = everybody - members
        return Agreement(
            kind="+".join(sorted({r.kind for r in results})),
            rounds=sum(r.rounds for r in results),
            before=max((r.before for r in results), default=0.0),
            disagreement=max((r.after for r in results), default=0.0),
            complete=whole and all(r.reached for r in results) and len(members) > 1,
            members=tuple(sorted(members)),
            missing=tuple(sorted(missing)),
            tolerance=self.settings.tolerance,
        )

    async def _open(self, visit: int, wanted: frozenset[str], graph: int) -> Edges:
        stride = self.rounds_per_visit
        return await self.exchange.open_visit(visit, stride, wanted, visit * stride, graph)

    async def _agree(self, number: int) -> BlockAgreement:
        graph = self.graph()
        chosen = await self.worker(partial(self._plan, graph))
        mark = digest(graph, chosen)
        visit = self.schedule.visits + number
        edges = await self._open(visit, graph[self.node], mark)
        self.observer.block_opened(number, edges, chosen)
        block = await self.worker(partial(self.model.activate, self.schedule.blocks[number]))
        kept = await self.worker(block.master.clone)
        norm = await self.worker(partial(_norm, kept))
        tally = Tally(
            self.node,
            graph,
            frozenset(edges.weights),
            same=all(told == mark for told in edges.graphs.values()),
            chosen=chosen,
            tolerance=self.settings.tolerance,
            norm=norm,
        )
        keep = False
        try:
            while not tally.leaving and tally.round < self.settings.max_rounds:
                if not await self._round(block, kept, tally, visit):
                    break
                self.observer.round_done(number, tally.round)
            keep = tally.done or tally.round == self.settings.max_rounds
        finally:
            await self.worker(partial(self._put_back, block, None if keep else kept))
        members = reached(graph, self.node, tally.lost)
        scale = norm or 1.0
        return BlockAgreement(
            block=number,
            kind=("plain" if tally.plain else chosen.kind) if edges.weights else "alone",
            rounds=tally.round,
            before=tally.base / scale,
            after=tally.hops * (tally.apart if tally.done else tally.base) / scale,
            reached=tally.done,
            members=members,
            missing=frozenset(graph) - members,
            changed=keep and len(members) > 1,
        )

    def _put_back(self, block: Block, kept: Tensor | None) -> None:
        """What was agreed on goes into the model, or what was there before."""
        if kept is not None:
            block.master.copy_(kept)
        block.write_back()
        self.model.release()

    def _plan(self, graph: Graph) -> Plan:
        """Rounds after which the differences between neighbours are under the threshold."""
        hops = diameter(graph)
        checks = hops + 2  # a calm round at each distance, and one to say that all is done
        limit = max(1, self.settings.max_rounds - checks)
        return plan(graph, self.settings.tolerance / max(1, hops), limit)

    async def _round(self, block: Block, kept: Tensor, tally: Tally, visit: int) -> bool:
        """One exchange; False when the node is told to stop meanwhile."""
        serial = visit * self.rounds_per_visit + tally.round
        note = tally.note().model_dump_json()
        about = metadata(self.run_name, self.node, serial, note)
        await self.exchange.make_room(patient=True)
        own = await self.worker(partial(snapshot, block.master, block.layout, serial, about))
        if self.stopping.is_set():
            return False
        self.exchange.publish(own)
        intake = _Intake(tally, own, block.master)
        gathered = await self.exchange.gather(serial, block.layout, hear=intake.hear)
        if self.stopping.is_set():
            return False
        notes = {peer: intake.notes[peer] for peer in gathered.used}
        before = tally.neighbours
        left = {peer for peer, reason in gathered.missing.items() if reason == "ended"}
        differences = {peer: intake.difference(peer) for peer in notes}
        back = tally.close_round(notes, differences, left)
        if gone := before - tally.neighbours:
            self.exchange.give_up(gone)
        if back:
            await self.worker(partial(block.master.copy_, kept))
        return True


def _norm(values: Tensor) -> float:
    """‖x‖₂ in float64, in which no squares of float32 overflow."""
    wide = wide_device(values.device)
    # What must be moved is so by slices, as a block may be a large part of the memory.
    parts = [slice(None)] if wide == values.device else slices(values)
    moved = (values[part].to(wide) for part in parts)
    return math.hypot(*(float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in moved))


class _Intake:
    """Mixes one round's arrivals."""

    def __init__(self, tally: Tally, own: Snapshot, master: Tensor) -> None:
        self._tally, self._own, self._master = tally, own, master
        self._squares: dict[str, float] = defaultdict(float)
        self.notes: dict[str, Note] = {}

    def hear(self, peer: str, text: str) -> Sink:
        """See exchange.Hear."""
        try:
            note = self.notes[peer] = Note.model_validate_json(text)
        except (ValidationError, UnicodeEncodeError):
            raise PayloadError("header", f"not a note: {text[:100]!r}") from None
        factor = self._tally.factor(peer, note)

        def sink(first: int, values: Tensor, weight: float) -> None:
            for low, own in self._own.pieces(first, values.numel()):
                received = values[low - first :][: own.numel()]
                part = self._master[low : low + own.numel()]
                square = mix_measured(part, own, received, weight * factor)
                if math.isinf(square):
                    raise PayloadError("not_finite", f"a difference too large near element {low}")
                self._squares[peer] += square

        return sink

    def difference(self, peer: str) -> float:
        """‖x_j − x_i‖₂ of what came."""
        return math.sqrt(self._squares[peer])
