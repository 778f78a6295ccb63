"""One node: builds the rooms, owns start and stop."""

import asyncio
import contextlib
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import psutil
import torch

from deca_node import __version__, logs, membership, registry, topology
from deca_node.blocks import Schedule, Visit, partition_layers
from deca_node.checkpoint import Checkpoint, Progress
from deca_node.config import Settings
from deca_node.data import (
    BatchStream,
    Example,
    examples,
    label_counts,
    label_token_ids,
    label_words,
    read_rows,
)
from deca_node.discovery import Discovery, own_addresses
from deca_node.errors import DecaError, ListenError, PeerRefused
from deca_node.evaluation import evaluate
from deca_node.exchange import Exchange
from deca_node.fingerprint import PROTOCOL_VERSION, fingerprint
from deca_node.limits import MAX_WATCHERS
from deca_node.membership import Edges, Phase, State
from deca_node.methods.deca import Deca
from deca_node.models import LanguageModel, pick_device
from deca_node.moments import Rule
from deca_node.pb import node_pb2 as pb
from deca_node.record import History, history_line, write_summary
from deca_node.rounds import Rounds, Start, StepRecord
from deca_node.swarm import Identity, Swarm
from deca_node.transport import GrpcTransport, Transport
from deca_node.worker import Stopped, TrainingThread, unless_stopped

T = TypeVar("T")

# A node that starts again within a run waits this long for its old members, then goes on without.
REJOIN_SECONDS = 30.0
# How often a waiting node says who is missing.
REMIND_SECONDS = 10.0
WATCH_INTERVAL_SECONDS = (0.1, 3600.0)
# Calls under way when the node ends.
CLOSE_GRACE_SECONDS = 0.5
MAX_WARNINGS = 20


class Node:
    """One node of a run, from start to end.

    Args:
        settings: all of them.
        log: a structlog logger.
        progress: called with the status about once a second and after every step, on the event
            loop's thread.
        transport: how to reach others; gRPC when not given.
    """

    def __init__(
        self,
        settings: Settings,
        log: Any,
        progress: Callable[[pb.NodeStatus], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.settings = settings
        self.timing = settings.timing()
        self._log = log
        self._report = progress or (lambda _: None)
        self._transport = transport or GrpcTransport(settings.node.host, settings.node.port)
        self._session = secrets.randbits(63) | 1  # 0 would be an unset field
        self._started = time.monotonic()
        self._phase = Phase.STARTING
        self._waiting_for = "the model"
        self._warnings: list[str] = []
        self._watchers = 0
        self._progress = Progress()
        self._seconds_before = 0.0
        self._run_began: float | None = None
        self._steps_here = 0
        self._last: StepRecord | None = None
        self._visit: Visit | None = None
        self._edges = Edges(-1)
        self._address = ""
        self._schedule: Schedule | None = None
        self._swarm: Swarm | None = None
        self._exchange: Exchange | None = None
        self._discovery: Discovery | None = None
        self._left = False
        self._pending: dict[int, range] = {}  # blocks whose last save failed
        self._history: History | None = None
        self._checkpoint: Checkpoint | None = None
        self._sent_before_step = 0
        self._device = torch.device("cpu")
        self._model_name = settings.model.path.name

    # --- life

    async def run(self) -> bool:
        """Run to the end.

        Returns:
            True when the run is complete, False when a signal ended it with its state saved.

        Raises:
            DecaError: it could not start, or could not write its result.
        """
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._worker = TrainingThread()
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        logs.bind(node=self.settings.node.name, run=self.settings.run.name)
        async with contextlib.AsyncExitStack() as stack:
            ticker = asyncio.create_task(self._tick())
            stack.callback(ticker.cancel)
            try:
                return await self._live(stack)
            except Stopped:
                return False
            finally:
                self._phase = Phase.DONE if self._phase == Phase.SERVING else Phase.STOPPING

    def stop(self) -> None:
        """End the run soon, its state saved (SIGTERM, SIGINT)."""
        if not self._stopping.is_set():
            self._log.info("stopping")
            self._stopping.set()
            self._wake()

    async def _live(self, stack: contextlib.AsyncExitStack) -> bool:
        settings = self.settings
        self._device = pick_device(settings.node.device)
        if settings.node.threads:
            torch.set_num_threads(settings.node.threads)
        port = await self._transport.listen(self, self)
        stack.push_async_callback(self._transport.close, CLOSE_GRACE_SECONDS)
        here = _reachable(settings.node.host)
        called = settings.node.advertise_port or port  # by others
        self._address = _joined(settings.node.advertise or here, called)
        entry = _joined(here, port), settings.run.name, settings.node.name
        stack.enter_context(registry.announce(*entry))
        self._log.info("listening", address=f"{settings.node.host}:{port}", version=__version__)

        model = await self._compute(partial(LanguageModel.load, settings.model, self._device))
        self._model_name = model.name
        self._schedule = schedule = Schedule(
            partition_layers(model.n_layers, settings.schedule.layers_per_block),
            settings.schedule.rounds,
            settings.schedule.steps,
            settings.schedule.order,
            settings.run.seed,
        )
        marks = fingerprint(
            settings,
            schedule,
            await self._compute(model.config_digest),
            await self._compute(model.weights_digest),
            model.dtype,
        )
        self._checkpoint = checkpoint = Checkpoint(
            settings.node.output, {**marks, "node": settings.node.name}
        )
        stack.callback(checkpoint.release)
        # The data first: what is wrong with it must not mark the folder as this run's.
        self._waiting_for = "the data"
        train, test, counts, completions = await self._compute(partial(self._read_data, model))
        resumed = checkpoint.claim()
        self._progress = checkpoint.state.progress
        self._seconds_before = self._progress.seconds
        if self._progress.finished:
            self._log.info(
                "this run is finished; set node.output to a new folder to run again",
                model=str(settings.node.output / "model"),
            )
            return True

        batches = BatchStream(
            train, settings.data.batch_size, settings.run.seed, model.tokenizer.pad_id
        )
        batches.position = self._progress.data_position
        start = await self._compute(partial(self._restore, model, schedule))
        self._history = History(
            settings.node.output / "history.jsonl",
            schedule.serial(start.visit, start.step),
            schedule.steps,
        )
        stack.callback(self._history.close)
        self._log.info(
            "resuming" if resumed else "ready",
            model=model.name,
            device=str(self._device),
            blocks=len(schedule.blocks),
            steps=schedule.total_steps,
            examples=len(train),
            labels=counts,
            visit=start.visit,
            step=start.step,
        )
        before = self._progress.before
        if before is None and test:
            self._waiting_for = "the evaluation before training"
            before = await self._evaluate(model, test, completions)
            self._progress = replace(self._progress, before=before)
            self._log.info("before training", **before)

        await self._join(stack, marks, called)
        if start.visit < schedule.visits:
            await self._wait_for_members(resumed=resumed)
        method = Deca(
            model,
            Rule(**settings.optimizer.model_dump()),
            settings.run.name,
            settings.node.name,
        )
        assert self._exchange is not None  # noqa: S101 - _join made it
        self._phase, self._waiting_for = Phase.TRAINING, ""
        self._run_began = time.monotonic()
        self._tell_everybody()
        rounds = Rounds(
            schedule,
            method,
            self._exchange,
            batches,
            self._neighbours,
            _Keeper(self, model, batches),
            self._worker,
            self._stopping,
        )
        visit, step = await rounds.run(start)
        self._progress = self._at(visit, step, batches.position)
        if visit < schedule.visits:
            self._phase = Phase.STOPPING
            # At the same time as the goodbyes, each of which may take a second.
            _, saved = await asyncio.gather(
                self._leave(),
                asyncio.to_thread(
                    checkpoint.save_visit, method.state(), self._progress, self._unsaved(model)
                ),
                return_exceptions=True,
            )
            if isinstance(saved, BaseException):
                raise saved
            self._log.info("stopped, state saved", visit=visit, step=step)
            return False
        await self._finish(model, test, completions, counts)
        return True

    async def _finish(
        self,
        model: LanguageModel,
        test: list[Example],
        completions: dict[str, list[int]],
        counts: dict[str, int],
    ) -> None:
        """Serve neighbours, evaluate, write the model and the record."""
        assert self._exchange is not None  # noqa: S101
        assert self._checkpoint is not None  # noqa: S101
        self._phase = Phase.SERVING
        self._tell_everybody()
        unserved = asyncio.create_task(self._exchange.drain())
        after = None
        if test:
            self._waiting_for = "the evaluation after training"
            after = await self._evaluate(model, test, completions)
            self._log.info("after training", **after)
        self._waiting_for = "neighbours to fetch the last block"
        if late := await unserved:
            self._warn(f"did not fetch our last block: {', '.join(sorted(late))}")
        self._exchange.release()
        # Neighbours fetch the last block after our last step.
        sent = self._progress.bytes_sent + self._exchange.bytes_sent - self._sent_before_step
        self._progress = replace(self._progress, bytes_sent=sent)
        self._waiting_for = "the model to be written"
        folder = self.settings.node.output / "model"
        if not folder.exists():
            await self._compute(partial(model.export, folder))
        progress = replace(self._progress, finished=True, seconds=self._seconds())
        summary = {
            "run": self.settings.run.name,
            "node": self.settings.node.name,
            "finished": True,
            "label_counts": counts,
            "before": progress.before,
            "after": after,
            "bytes_sent": progress.bytes_sent,
            "bytes_received": progress.bytes_received,
            "steps": self._schedule.total_steps if self._schedule else 0,
            "seconds": round(progress.seconds, 3),
            "incomplete_mixes": progress.incomplete,
            "model": str(folder),
            "device": str(self._device),
            "version": __version__,
            "settings": self.settings.model_dump(mode="json"),
        }
        write_summary(self.settings.node.output / "summary.json", summary)
        self._checkpoint.save_visit(None, progress, self._unsaved(model))
        self._progress = progress
        self._waiting_for = ""
        self._log.info("finished", model=str(folder), seconds=round(progress.seconds, 1))

    # --- parts of starting

    def _read_data(
        self, model: LanguageModel
    ) -> tuple[list[Example], list[Example], dict[str, int], dict[str, list[int]]]:
        data = self.settings.data
        train = examples(read_rows(data.train), data, model.tokenizer, data.train)
        words = label_words(train, data) if data.task == "classification" else {}
        completions = label_token_ids(words, data, model.tokenizer) if words else {}
        test: list[Example] = []
        if data.test is not None:
            test = examples(read_rows(data.test), data, model.tokenizer, data.test, words or None)
        return train, test, label_counts(train), completions

    def _restore(self, model: LanguageModel, schedule: Schedule) -> Start:
        assert self._checkpoint is not None  # noqa: S101
        state = self._checkpoint.state
        for block, saved in state.blocks.items():
            model.load_block(schedule.blocks[block], self._checkpoint.load(saved))
        tensors = self._checkpoint.load(state.active) if state.active else None
        step = state.progress.step if tensors is not None else 0
        return Start(state.progress.visit, step, tensors)

    async def _join(
        self,
        stack: contextlib.AsyncExitStack,
        marks: dict[str, str],
        port: int,
    ) -> None:
        """Begin to meet the others."""
        settings = self.settings
        identity = Identity(
            settings.run.name,
            settings.node.name,
            self._session,
            marks,
            host=settings.node.advertise or "",
            port=port,
        )
        self._swarm = swarm = Swarm(
            identity, self._transport, self.timing, self._position, self._wake, self._log
        )
        self._exchange = Exchange(swarm, self.timing, settings.run.name, self._stopping)
        stack.push_async_callback(self._leave)
        for address in settings.network.static_peers:
            swarm.propose(address, lasting=True)
        if settings.network.zeroconf:
            await self._discover(port)
        self._phase = Phase.WAITING
        self._tell_everybody()

    async def _wait_for_members(self, *, resumed: bool) -> None:
        """Wait until enough members are there; not for ever where they cannot come."""
        assert self._swarm is not None  # noqa: S101
        swarm, name = self._swarm, self.settings.node.name
        begin = time.monotonic()
        reminded = 0.0
        while not self._stopping.is_set():
            swarm.sweep()
            enough, self._waiting_for = membership.ready(
                name, swarm.peers.values(), self.settings.run.start_when
            )
            waited = time.monotonic() - begin
            if enough:
                self._log.info("members are here", members=self._waiting_for)
                return
            begun = any(peer.state == State.BEHIND for peer in swarm.peers.values())
            if (resumed or begun) and waited > REJOIN_SECONDS:
                why = "after a restart" if resumed else "in a run that began without this node"
                self._warn(f"going on {why}: {self._waiting_for}")
                return
            if waited >= reminded:
                self._log.info("waiting", who=self._waiting_for)
                reminded = waited + REMIND_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        raise Stopped

    async def _discover(self, port: int) -> None:
        settings = self.settings
        advertised = settings.node.advertise
        assert self._swarm is not None  # noqa: S101
        discovery = Discovery(
            run=settings.run.name,
            node=settings.node.name,
            port=port,
            protocol=PROTOCOL_VERSION,
            addresses=await asyncio.to_thread(own_addresses, advertised or settings.node.host),
            interfaces=settings.network.interfaces,
            browse_every=self.timing.browse,
            sighted=self._swarm.propose,
        )
        try:
            await discovery.start()
        except ListenError as error:
            if not settings.network.static_peers:
                raise
            self._warn(str(error))
            return
        self._discovery = discovery

    async def _leave(self) -> None:
        """Take leave of peers and discovery; does nothing the second time."""
        swarm, discovery = self._swarm, self._discovery
        self._discovery = None
        if swarm is None or self._left:
            return
        self._left = True
        ends = [swarm.goodbye(finished=self._progress.finished)]
        if discovery is not None:
            ends.append(discovery.stop())
        await asyncio.gather(*ends, return_exceptions=True)
        await swarm.close()

    async def _evaluate(
        self, model: LanguageModel, test: list[Example], completions: dict[str, list[int]]
    ) -> dict[str, Any]:
        found = await self._compute(
            partial(
                evaluate,
                model,
                test,
                completions,
                self.settings.data.batch_size,
                self._stopping.is_set,
            )
        )
        if found is None:
            raise Stopped
        return asdict(found)

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run on the training thread; gives up at once when told to stop."""
        return await unless_stopped(self._worker(work), self._stopping)

    # --- during the run

    def _neighbours(self) -> frozenset[str]:
        assert self._swarm is not None  # noqa: S101
        chosen = self.settings.topology
        spec = topology.TopologySpec(chosen.kind, chosen.p, chosen.edges, self.settings.run.seed)
        return topology.graph(self._swarm.members(), spec)[self.settings.node.name]

    def _position(self) -> tuple[Phase, int]:
        return self._phase, self._visit.index if self._visit else self._progress.visit

    def _at(self, visit: int, step: int, data_position: int) -> Progress:
        return replace(
            self._progress,
            visit=visit,
            step=step,
            data_position=data_position,
            seconds=self._seconds(),
        )

    def _seconds(self) -> float:
        began = self._run_began
        return self._seconds_before + (time.monotonic() - began if began is not None else 0.0)

    def _save(self, write: Callable[[], None]) -> bool:
        """Write; trouble with the disk is said and costs what was to be written, not the run."""
        try:
            write()
        except DecaError as error:
            self._warn(f"not saved: {error}")
            return False
        return True

    def _warn(self, text: str) -> None:
        self._log.warning(text)
        if text not in self._warnings:
            self._warnings = [*self._warnings[-MAX_WARNINGS + 1 :], text]

    def _wake(self) -> None:
        if self._exchange is not None:
            self._exchange.wake()
        self._changed.set()
        self._changed = asyncio.Event()

    def _tell_everybody(self) -> None:
        if self._swarm is not None:
            self._swarm.nudge()

    async def _tick(self) -> None:
        while True:
            if self._swarm is not None and not self._left:
                self._swarm.sweep()
            self._report(self.status())
            await asyncio.sleep(1.0)

    # --- answers to peers (transport.Handler)

    def _met(self) -> tuple[Swarm, Exchange]:
        if self._swarm is None or self._exchange is None:
            raise PeerRefused("starting", "this node is still loading its model")
        return self._swarm, self._exchange

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """See Handler."""
        return await self._met()[0].answer_hello(request, source)

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """See Handler."""
        return self._met()[1].answer_offer(request)

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """See Handler."""
        return self._met()[1].answer_degree(request)

    def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """See Handler."""
        return self._met()[1].answer_pull(request)

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """See Handler."""
        self._met()[0].answer_goodbye(request)
        return pb.GoodbyeReply()

    # --- answers to people (transport.StatusHandler)

    async def get_status(self) -> pb.NodeStatus:
        """See StatusHandler."""
        return self.status()

    async def watch_status(self, interval: float) -> AsyncGenerator[pb.NodeStatus]:
        """See StatusHandler."""
        if self._watchers >= MAX_WATCHERS:
            raise PeerRefused("too_many_watchers", f"at most {MAX_WATCHERS}")
        low, high = WATCH_INTERVAL_SECONDS
        pause = min(max(interval if interval > 0 else 1.0, low), high)
        self._watchers += 1
        try:
            while not self._stopping.is_set():
                yield self.status()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
        finally:
            self._watchers -= 1

    def status(self) -> pb.NodeStatus:
        """Everything there is to know about this node now."""
        settings, now = self.settings, time.monotonic()
        status = pb.NodeStatus(
            run=settings.run.name,
            node=settings.node.name,
            version=__version__,
            phase=pb.Phase.Name(self._phase),
            uptime_seconds=now - self._started,
            device=str(self._device),
            memory_bytes=psutil.Process().memory_info().rss,
            bytes_sent=self._progress.bytes_sent,
            bytes_received=self._progress.bytes_received,
            incomplete_mixes=self._progress.incomplete,
            address=self._address,
            model=self._model_name,
            waiting_for=self._waiting_for,
            warnings=self._warnings,
            pid=os.getpid(),
            members_wanted=settings.run.start_when,
        )
        if self._device.type == "cuda":
            status.device_memory_bytes = torch.cuda.memory_allocated(self._device)
        if self._schedule is not None:
            self._add_position(status, self._schedule, now)
        if self._last is not None:
            status.loss = self._last.local.loss
            status.gradient_norm = self._last.local.gradient_norm
            status.disagreement = self._last.settled.disagreement
        if self._swarm is not None:
            self._add_peers(status, self._swarm)
        return status

    def _add_position(self, status: pb.NodeStatus, schedule: Schedule, now: float) -> None:
        visit = self._visit.index if self._visit else self._progress.visit
        step = self._last.step + 1 if self._last and self._last.visit is self._visit else 0
        if self._visit is None:
            step = self._progress.step
        done = min(schedule.serial(visit, step), schedule.total_steps)
        status.rounds, status.blocks = schedule.rounds, len(schedule.blocks)
        status.steps_per_visit, status.steps_total = schedule.steps, schedule.total_steps
        cursor = schedule.cursor(visit, step)
        status.round, status.position, status.step = cursor.round, cursor.position, cursor.step
        status.block = schedule.visit(min(visit, schedule.visits - 1)).block
        status.steps_done = done
        if self._run_began is not None and self._steps_here:
            pace = (now - self._run_began) / self._steps_here
            status.eta_seconds = pace * (schedule.total_steps - done)
        status.degree = len(self._edges.weights)
        status.own_weight = self._edges.own_weight

    def _add_peers(self, status: pb.NodeStatus, swarm: Swarm) -> None:
        clock = asyncio.get_running_loop().time()
        status.send_rate = swarm.send_meter.rate(clock)
        status.receive_rate = swarm.receive_meter.rate(clock)
        for reason, count in swarm.strangers.items():
            status.refusals[reason] += count
        for name, peer in sorted(swarm.peers.items()):
            traffic = swarm.traffic.get(name)
            row = status.peers.add(
                node=name,
                address=peer.address,
                state=str(peer.state),
                phase=pb.Phase.Name(peer.phase),
                visit=peer.visit,
                neighbour=name in self._edges.weights,
                weight=self._edges.weights.get(name, 0.0),
                last_seen_seconds=max(0.0, clock - peer.last_seen),
                detail=peer.detail,
            )
            if traffic is not None:
                row.bytes_sent, row.bytes_received = traffic.sent, traffic.received
                for reason, count in traffic.refusals.items():
                    row.refusals[reason] = count
                    status.refusals[reason] += count

    # --- what the rounds tell (through _Keeper)

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """The visit's edges are settled."""
        self._visit, self._edges = visit, edges
        logs.bind(round=visit.round, block=visit.block, step=0)
        weights = {peer: round(weight, 4) for peer, weight in sorted(edges.weights.items())}
        if self._stopping.is_set():
            return
        if missing := sorted(wanted - set(edges.weights)):
            self._warn(f"visit {visit.index} without neighbours {', '.join(missing)}")
        isolated = self.settings.topology.kind == "explicit"
        if not edges.weights and self.settings.run.start_when > 1 and not isolated:
            self._warn(f"visit {visit.index}: no neighbour at all, training alone")
        self._log.info("visit", visit=visit.index, layers=str(visit.layers)[5:], weights=weights)

    def step_done(self, record: StepRecord, data_position: int) -> None:
        """A step is complete."""
        assert self._exchange is not None  # noqa: S101
        assert self._history is not None  # noqa: S101
        logs.bind(step=record.step)
        self._last = record
        self._steps_here += 1
        sent = self._exchange.bytes_sent - self._sent_before_step
        self._sent_before_step = self._exchange.bytes_sent
        lost = not record.gathered.complete or record.edges.degree != len(record.edges.weights)
        self._progress = replace(
            self._at(record.visit.index, record.step + 1, data_position),
            bytes_sent=self._progress.bytes_sent + sent,
            bytes_received=self._progress.bytes_received + record.gathered.received,
            incomplete=self._progress.incomplete + lost,
        )
        if not math.isfinite(record.local.gradient_norm):
            self._warn(f"gradient not finite at step {record.step}: counted as zero")
        row = history_line(record, sent)
        history = self._history
        self._save(lambda: history.append(row))
        self._log.debug("step", **{key: row[key] for key in ("loss", "disagreement")})
        self._report(self.status())

    async def visit_closed(self, model: LanguageModel, visit: Visit, data_position: int) -> None:
        """The block is final for this visit: keep it."""
        assert self._checkpoint is not None  # noqa: S101
        checkpoint = self._checkpoint
        self._progress = self._at(visit.index + 1, 0, data_position)
        progress = self._progress
        self._pending[visit.block] = visit.layers
        saved = await self._worker(
            lambda: self._save(lambda: checkpoint.save_blocks(self._unsaved(model), progress))
        )
        if saved:
            self._pending.clear()

    def _unsaved(self, model: LanguageModel) -> dict[int, dict[str, torch.Tensor]]:
        """Blocks that the state on disk does not have: later state must not go without them."""
        return {block: model.block_tensors(layers) for block, layers in self._pending.items()}


class _Keeper:
    """rounds.Observer: adds to what happens what the node needs to keep it."""

    def __init__(self, node: Node, model: LanguageModel, batches: BatchStream) -> None:
        self._node, self._model, self._batches = node, model, batches

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """See Observer."""
        self._node.visit_opened(visit, edges, wanted)

    def step_done(self, record: StepRecord) -> None:
        """See Observer."""
        self._node.step_done(record, self._batches.position)

    async def visit_closed(self, visit: Visit) -> None:
        """See Observer."""
        await self._node.visit_closed(self._model, visit, self._batches.position)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reachable(host: str) -> str:
    """What callers on this machine can use for an address that means all interfaces."""
    return "127.0.0.1" if host in ("0.0.0.0", "") else "::1" if host == "::" else host  # noqa: S104
