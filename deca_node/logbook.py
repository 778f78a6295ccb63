"""What happens while a node trains and agrees: told, counted, written down.

It is the rounds.Observer and the agreement.Observer of a node.
"""

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any

from deca_node import logs
from deca_node.agreement import BlockAgreement
from deca_node.batches import BatchStream
from deca_node.blocks import Visit
from deca_node.consensus import Agreement, Plan
from deca_node.kept import KeptBlocks
from deca_node.member import Member
from deca_node.membership import Edges
from deca_node.prometheus import Measurements
from deca_node.record import EdgeTraffic, History, history_line
from deca_node.rounds import StepRecord
from deca_node.saving import Saving, tried_to_save
from deca_node.standing import Standing
from deca_node.tensorboard import Scalars, scalars


@dataclass(frozen=True)
class Books:
    """Where steps are written down.

    Attributes:
        history: history.jsonl.
        measurements: what Prometheus asks for.
        curves: what TensorBoard shows, where that is wanted.
    """

    history: History
    measurements: Measurements
    curves: Scalars | None


class Logbook:
    """See the module.

    Args:
        standing: where the node stands; is moved on.
        member: of the run.
        kept: its blocks.
        saving: of those, and of an open visit.
        batches: how far the data are read.
        books: where steps are written down.
        log: a structlog logger.

    Attributes:
        sent_before: bytes that had been sent at the last step's end, in this process.
    """

    def __init__(
        self,
        standing: Standing,
        member: Member,
        kept: KeptBlocks,
        saving: Saving,
        batches: BatchStream,
        books: Books,
        log: Any,
    ) -> None:
        self._standing, self._member, self._kept, self._saving = standing, member, kept, saving
        self._batches, self._books, self._log = batches, books, log
        self._caught_up_before = standing.progress.caught_up, standing.progress.passed_over
        self._retries: dict[str, int] = {}  # by peer, at the last step
        self.sent_before = 0
        before = standing.progress
        books.measurements.began(before.bytes_sent, before.bytes_received, before.incomplete)

    # --- rounds.Observer

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """See Observer."""
        self._standing.visit, self._standing.edges = visit, edges
        logs.bind(round=visit.round, block=visit.block, step=0)
        weights = {peer: round(weight, 4) for peer, weight in sorted(edges.weights.items())}
        if self._member.is_stopping:
            return
        if missing := sorted(wanted - set(edges.weights)):
            self._standing.warn(
                f"visit {visit.index} without neighbours {', '.join(missing)}", "neighbours"
            )
        self._log.info("visit", visit=visit.index, layers=str(visit.layers)[5:], weights=weights)

    async def step_done(self, record: StepRecord) -> None:
        """See Observer."""
        self._write_down(record)
        if self._saving.is_due:
            await self._saving.within_visit()

    def _write_down(self, record: StepRecord) -> None:
        logs.bind(step=record.step)
        standing = self._standing
        standing.step_done(record)
        exchange, gain = self._member.exchange, self._member.catch_up.gain
        sent, self.sent_before = exchange.bytes_sent - self.sent_before, exchange.bytes_sent
        lost = not record.gathered.complete or record.edges.degree != len(record.edges.weights)
        standing.at(record.visit.index, record.step + 1, self._batches.position)
        standing.progress = replace(
            standing.progress,
            bytes_sent=standing.progress.bytes_sent + sent,
            bytes_received=standing.progress.bytes_received + record.gathered.received,
            incomplete=standing.progress.incomplete + lost,
            caught_up=self._caught_up_before[0] + gain.bytes,
            passed_over=self._caught_up_before[1] + gain.visits,
        )
        if not math.isfinite(record.local.gradient_norm):
            standing.warn(
                f"gradient not finite at step {record.step}: counted as zero; if it keeps "
                "happening, start over with a lower optimizer.learning_rate, on all nodes alike",
                "gradient",
            )
        traffic = {peer: self._traffic(peer) for peer in record.gathered.edges}
        row, books = history_line(record, sent, traffic), self._books
        tried_to_save(standing, lambda: books.history.append(row))
        self._log.debug("step", **{key: row[key] for key in ("loss", "disagreement")})
        books.measurements.stepped(record)
        if (curves := books.curves) is not None:
            serial = self._kept.schedule.serial(record.visit.index, record.step)
            values = scalars(row, record.edges.weights)
            tried_to_save(standing, lambda: curves.write(serial, values))

    def _traffic(self, peer: str) -> EdgeTraffic:
        now, known = asyncio.get_running_loop().time(), self._member.swarm.traffic.of(peer)
        # A peer's count begins anew when it had to make way for others.
        again = max(0, known.retries - self._retries.get(peer, 0))
        self._retries[peer] = known.retries
        return EdgeTraffic(again, known.send_meter.rate(now), known.receive_meter.rate(now))

    async def paused(self, *, within: bool) -> None:
        """See Observer."""
        self._standing.paused()
        if within:
            await self._saving.within_visit()
        self._log.info("paused: serves what it has; deca-node resume lets it go on")

    async def visit_closed(self, visit: Visit) -> None:
        """See Observer."""
        self._standing.at(visit.index + 1, 0, self._batches.position)
        self._kept.changed(visit)
        await self._saving.between_visits()

    # --- agreement.Observer

    def block_opened(self, block: int, edges: Edges, chosen: Plan) -> None:
        """See Observer."""
        self._member.moved(self._kept.schedule.visits + block)
        self._standing.edges = edges
        plan = f"{len(chosen.factors)} {chosen.kind} rounds planned"
        self._log.info("agreeing on a block", block=block, neighbours=len(edges.weights), plan=plan)

    def round_done(self, block: int, rounds: int) -> None:
        """See Observer."""
        total = len(self._kept.schedule.blocks)
        self._standing.wait_for(f"the agreement: block {block + 1} of {total}, round {rounds}")

    async def block_agreed(self, result: BlockAgreement) -> None:
        """See Observer."""
        if result.changed:
            # What was agreed on before holds no more.
            self._standing.progress = replace(self._standing.progress, agreement=None)
            self._kept.agreed(result.block)
            self._saving.beside()  # neighbours wait for the next block, and not for this disk
        self._member.moved(self._kept.schedule.visits + result.block + 1)

    async def agreed(self, result: Agreement) -> None:
        """The agreement has ended; whatever comes next, it need not be repeated."""
        self._standing.progress = replace(self._standing.progress, agreement=result)
        await self._saving.between_visits()
