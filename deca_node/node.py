"""One node: builds the rooms, owns start and stop."""

import asyncio
import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch

from deca_node import __version__, logs, memory, registry
from deca_node.addresses import as_called_here, joined
from deca_node.agreement import Agreeing
from deca_node.batches import BatchStream
from deca_node.blocks import Schedule
from deca_node.checkpoint import Checkpoint
from deca_node.compression import Format
from deca_node.config import Settings, is_loopback
from deca_node.consensus import Agreement, extends
from deca_node.control import Control
from deca_node.errors import DiskFullError, ListenError, OutputError
from deca_node.evaluation import evaluate
from deca_node.events import Heard, Ring
from deca_node.fingerprint import agreement_marks
from deca_node.guard import Guard
from deca_node.kept import KeptBlocks
from deca_node.keyring import Keyring
from deca_node.limits import MAX_MEMBERS
from deca_node.loading import Loaded, load
from deca_node.logbook import Books, Logbook
from deca_node.lookout import Lookout
from deca_node.member import Member, Run
from deca_node.membership import Phase, State, came_to
from deca_node.methods import Method
from deca_node.methods.choose import build
from deca_node.models import pick_device
from deca_node.outcome import Outcome
from deca_node.pb import node_pb2 as pb
from deca_node.prometheus import SCRAPE_SECONDS, Endpoint, Measurements
from deca_node.reception import Reception
from deca_node.record import History, finite_values
from deca_node.rounds import Start
from deca_node.saving import Saving, tried_to_save
from deca_node.search import Search, check_interfaces
from deca_node.standing import Standing
from deca_node.swarm import Identity
from deca_node.tensorboard import Scalars
from deca_node.topology import TopologySpec
from deca_node.transport import Transport
from deca_node.transport.server import GrpcTransport
from deca_node.upkeep import Upkeep
from deca_node.waiting import Pulse, happens
from deca_node.worker import Stopped, TrainingThread, unless_stopped

T = TypeVar("T")

# Calls under way when the node ends.
CLOSE_GRACE_SECONDS = 0.5
# Between two tries to write the finished model to a full disk.
ROOM_SECONDS = 5.0
# Of what is done each second: more would fill the log with one defect in many words.
MAX_DEFECTS_TOLD = 8


class Node:
    """One node of a run, from start to end.

    Args:
        settings: all of them.
        log: a structlog logger.
        progress: called with the status about once a second, on the event loop's thread.
        transport: how to reach others; gRPC when not given.

    Raises:
        ConfigError: no edge of the topology is this node's.
        TrustError: it has no certificate and needs one.
    """

    def __init__(
        self,
        settings: Settings,
        log: Any,
        progress: Callable[[pb.NodeStatus], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        settings.check_edges()
        self.settings = settings
        self.timing = settings.timing()
        ring = Ring()
        self._log = log = Heard(log, ring, time.monotonic)
        self._report = progress
        self._guard = None
        if transport is None and settings.needs_trust():
            keyring = Keyring.of_run(settings.trust_folder(), settings.run.name)
            self._guard = Guard(keyring, settings.node.name, settings.trust.allow)
        self._transport = transport or GrpcTransport(
            settings.node.host,
            settings.node.port,
            self._guard,
            patience=self.timing.step_deadline,
            health_port=settings.node.health_port,
        )
        self._session = secrets.randbits(63) | 1  # 0 would be an unset field
        self._standing = Standing(settings, log, ring, self._guard)
        self._upkeep = (
            Upkeep(self._guard, self._standing.warn, log) if self._guard is not None else None
        )
        self._lookout = Lookout(settings, log)
        self._stopping = asyncio.Event()
        self._reception = Reception(self._standing, self._lookout, self._stopping)
        self._member: Member | None = None
        self._search: Search | None = None
        self._left = False
        self._worker: TrainingThread
        self._measurements = Measurements(self._status_elsewhere)
        self._met_before: dict[str, str] = {}
        self._outcome = Outcome(settings)
        self._had: Agreement | None = None  # what was agreed on before this start, if it was

    # --- life

    async def run(self) -> bool:
        """Run to the end.

        Returns:
            True when the run is complete, False when a signal ended it with its state saved.

        Raises:
            DecaError: it could not start, or could not write its result.
        """
        memory.tune()
        self._changed = Pulse()
        self._control = Control(self.settings, self._standing, self.stop, self._stopping)
        self._worker = TrainingThread()
        loop = self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGTERM, self.stop)
            loop.add_signal_handler(signal.SIGINT, self._interrupted)
        logs.bind(node=self.settings.node.name, run=self.settings.run.name)
        async with contextlib.AsyncExitStack() as stack:
            ticker = asyncio.create_task(self._tick())
            stack.callback(ticker.cancel)
            if self._upkeep is not None:
                stack.push_async_callback(self._upkeep.end)
            try:
                return await self._live(stack)
            except Stopped:
                return False
            finally:
                ended = self._standing.phase in (Phase.SERVING, Phase.DONE)
                self._enter(Phase.DONE if ended else Phase.STOPPING)

    @property
    def is_computing(self) -> bool:
        """Whether its thread is at work, as on an abandoned gradient after the end."""
        return self._worker.is_busy

    def stop(self) -> None:
        """End the run soon, its state saved (SIGTERM, SIGINT)."""
        if not self._stopping.is_set():
            self._log.info("stopping")
            self._stopping.set()
            if self._member is not None:
                self._member.wake()
            self._changed.beat()

    def _interrupted(self) -> None:
        """Ctrl-C: as :meth:`stop`; another one ends the process at once, as a save may hang."""
        self._loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._log.info("Ctrl-C again ends at once, without saving; what was saved before is kept")
        self.stop()

    async def _live(self, stack: contextlib.AsyncExitStack) -> bool:
        settings, standing = self.settings, self._standing
        standing.device = self._worker.device = pick_device(settings.node.device)
        if settings.node.threads:
            torch.set_num_threads(settings.node.threads)
        network = settings.network
        if not network.static_peers and not network.dns_peers:
            check_interfaces(network)  # now, as a model may take minutes to read; see _join
        port = await self._listen(stack)
        loaded = await load(settings, standing, self._compute, stack)
        self._met_before = loaded.checkpoint.state.peers
        before = standing.progress
        if before.agreement is not None and before.agreement.complete:
            self._had = before.agreement
        kept = KeptBlocks(
            loaded.checkpoint,
            loaded.model,
            loaded.schedule,
            self._worker,
            lambda: standing.progress,
            self._addresses,
        )
        if before.finished and not self._is_agreement_due:
            self._log.info(
                "this run is finished; set node.output to a new folder to run again",
                model=self._outcome.shown,
            )
            if settings.node.stay:  # who greets is told so, as before the restart
                self._make_member(loaded.marks, port, loaded.schedule, kept)
            await self._stay()
            return True
        standing.progress = replace(before, finished=False)
        start = await self._compute(partial(self._restore, loaded.checkpoint, kept))
        books = self._open_books(stack, loaded.schedule, start)
        self._log.info(
            "resuming" if loaded.resumed else "ready",
            model=standing.model,
            device=str(standing.device),
            blocks=len(loaded.schedule.blocks),
            steps=loaded.schedule.total_steps,
            examples=len(loaded.corpus.train),
            labels=standing.label_counts,
            visit=start.visit,
            step=start.step,
            output=str(settings.node.output.absolute()),
        )
        await self._evaluate_before(loaded)
        member = await self._meet(stack, loaded, kept, port)
        method = build(settings, loaded.model, settings.node.name)
        saving = Saving(
            kept,
            method.state,
            standing,
            self._control,
            self._worker,
            settings.node.save_every,
            (start.visit, start.step),
            self._log,
        )
        logbook = Logbook(standing, member, kept, saving, loaded.batches, books, self._log)
        if not await self._train(start, member, method, kept, logbook, saving, loaded.batches):
            return False
        try:
            agreed = await self._come_to_one_model(member, loaded, logbook)
            if before.finished and not agreed:
                await self._end_as_before(member, kept)
            else:
                await self._finish(member, kept, loaded, logbook.sent_before)
        except Stopped:  # which is no success before all is saved
            where = "in the agreement" if member.phase == Phase.AGREEING else "before the end"
            self._enter(Phase.STOPPING)
            await self._leave_saved(asyncio.to_thread(_nothing if kept.is_saved else kept.save))
            self._log.info(f"stopped {where}, state saved")
            raise
        await self._stay()
        return True

    async def _listen(self, stack: contextlib.AsyncExitStack) -> int:
        """Answer from now on; the port at which others call."""
        settings = self.settings
        if self._guard is None and not is_loopback(settings.node.host):
            self._standing.warn(
                "plain text (trust.insecure): whoever reaches this port can read the blocks, join "
                "the run and contribute to it"
            )
        socket = registry.socket_path()
        if socket is not None:
            stack.callback(socket.unlink, missing_ok=True)
        desk = self._reception
        port = await self._transport.listen(desk, desk, self._control, socket)
        if socket is None or not socket.exists():
            socket = None
            self._log.warning("no socket file: pause, resume and so on need a certificate")
        stack.push_async_callback(self._transport.close, CLOSE_GRACE_SECONDS)
        here = as_called_here(settings.node.host)
        called = settings.node.advertise_port or port
        self._standing.address = joined(settings.node.advertise or here, called)
        trust = str(settings.trust_folder().absolute()) if self._guard is not None else ""
        entry = (
            joined(here, port),
            settings.run.name,
            settings.node.name,
            trust,
            str(socket or ""),
        )
        stack.enter_context(registry.announce(*entry))
        if settings.metrics.port is not None:
            endpoint = Endpoint(settings.metrics.host, settings.metrics.port, self._measurements)
            # A scrape under way is answered by this loop.
            stack.push_async_callback(asyncio.to_thread, endpoint.close)
            at = joined(settings.metrics.host, endpoint.port)
            self._log.info("metrics", address=f"http://{at}/metrics")
        self._log.info("listening", address=f"{settings.node.host}:{port}", version=__version__)
        return called

    def _open_books(
        self, stack: contextlib.AsyncExitStack, schedule: Schedule, start: Start
    ) -> Books:
        """Where steps are written down from the start on."""
        settings, standing = self.settings, self._standing
        serial = schedule.serial(start.visit, start.step)
        history = History(
            settings.node.output / "history.jsonl", serial, schedule.steps, standing.curve
        )
        stack.callback(history.close)
        curves = None
        if settings.tensorboard.folder is not None:
            curves = Scalars(settings.tensorboard.folder / settings.node.name, serial)
            stack.callback(tried_to_save, standing, curves.close)
        return Books(history, self._measurements, curves)

    async def _evaluate_before(self, loaded: Loaded) -> None:
        standing = self._standing
        if standing.progress.before is None and loaded.corpus.test:
            standing.waiting_for = "the evaluation before training"
            before = await self._evaluate(loaded)
            standing.progress = replace(standing.progress, before=before)
            self._log.info("before training", **before)

    async def _meet(
        self, stack: contextlib.AsyncExitStack, loaded: Loaded, kept: KeptBlocks, port: int
    ) -> Member:
        """Become a member of the run, once enough others are there."""
        member = self._make_member(loaded.marks, port, loaded.schedule, kept)
        await self._join(stack, member, port)
        is_over = self._standing.progress.visit >= loaded.schedule.visits
        if not is_over or self._is_agreement_due or kept.lost():
            # All that had agreed are needed to do so anew, and who was missing is why they do.
            wanted = len({*self._had.members, *self._had.missing}) if self._had else 0
            why = await member.wait_for_members(
                max(self.settings.run.start_when, wanted),
                self._standing.wait_for,
                resumed=loaded.resumed,
            )
            if self._stopping.is_set():
                raise Stopped
            if why:
                self._standing.warn(why)
        return member

    async def _train(
        self,
        start: Start,
        member: Member,
        method: Method,
        kept: KeptBlocks,
        logbook: Logbook,
        saving: Saving,
        batches: BatchStream,
    ) -> bool:
        """Go through the visits that are left; False when told to stop, the state saved."""
        standing = self._standing
        standing.waiting_for = ""
        if not member.is_to_pause:
            self._enter(Phase.TRAINING)
        standing.began = time.monotonic()
        end, is_open = await member.train(start, method, batches, logbook, self._worker)
        if end.visit >= kept.schedule.visits:
            standing.at(end.visit, 0, batches.position)
            return True
        self._enter(Phase.STOPPING)
        untouched = not is_open and (end.visit, end.step) == saving.at
        standing.at(end.visit, end.step, batches.position)
        # A gradient that was abandoned may keep the training thread; outside of a visit that is at
        # most putting a fetched block in its place, which must come first.
        await self._leave_saved(
            asyncio.to_thread(partial(kept.save, method.state()))
            if is_open
            else self._worker(_nothing if untouched else kept.save)
        )
        self._log.info("stopped, state saved", visit=end.visit, step=end.step)
        return False

    async def _leave_saved(self, saving: Awaitable[None]) -> None:
        """Save at the same time as the goodbyes, each of which may take a second.

        Raises:
            DecaError: it could not be saved.
        """
        _, saved = await asyncio.gather(self._leave(), saving, return_exceptions=True)
        if isinstance(saved, BaseException):
            raise saved

    @property
    def _is_agreement_finer(self) -> bool:
        """Whether the settings ask for more than was agreed on before."""
        return self._had is None or self._had.tolerance > self.settings.consensus.tolerance

    @property
    def _is_agreement_due(self) -> bool:
        """Whether the run ends with an agreement that is still to come, or wanted once more."""
        # Who was missing can come to an agreement only with those that have one already.
        is_wanted = self._had is None or bool(self._had.missing) or self._is_agreement_finer
        return self.settings.consensus.tolerance > 0 and is_wanted

    async def _come_to_one_model(self, member: Member, loaded: Loaded, logbook: Logbook) -> bool:
        """Agree, where that is still to be done and may be; whether it was done now.

        Raises:
            Stopped: told to stop before the end.
        """
        if self._is_agreement_due:
            self._enter(Phase.AGREEING)
            await self._wait_for_late(member)
            if self._stopping.is_set():
                raise Stopped
            if self._may_agree(member):
                await self._agree(member, loaded, logbook)
                return True
        if self._had is not None:  # an earlier process had come so far
            member.moved(loaded.schedule.visits + len(loaded.schedule.blocks))
        return False

    def _may_agree(self, member: Member) -> bool:
        """Whether an agreement may begin: none that there was before becomes two."""
        had = self._had
        if had is None:
            return True
        here = frozenset(member.graph(member.visit))
        if extends(frozenset(had.members), here, finer=self._is_agreement_finer):
            return True
        among = ", ".join(had.members)
        away = ", ".join(sorted({*had.members, *had.missing} - here)) or "nobody"
        self._standing.warn(
            f"kept the agreement of {among}, not here: {away}; start all of them together to "
            "agree again"
        )
        return False

    async def _end_as_before(self, member: Member, kept: KeptBlocks) -> None:
        """A finished run is started again, and nothing came of it."""
        self._enter(Phase.SERVING)
        self._standing.waiting_for = "nodes catching up to fetch their blocks"
        await unless_stopped(member.hand_out(), self._stopping)
        self._standing.waiting_for = ""
        self._standing.progress = replace(self._standing.progress, finished=True)
        if not kept.is_saved:  # a block was damaged here, and fetched
            await self._until_there_is_room(kept.save)
        self._log.info("finished as before", model=self._outcome.shown)

    async def _agree(self, member: Member, loaded: Loaded, logbook: Logbook) -> None:
        """Bring all nodes to one model.

        Raises:
            Stopped: told to stop before all was agreed on.
        """
        self._log.info("agreeing", tolerance=self.settings.consensus.tolerance)
        agreement = await Agreeing(
            loaded.schedule,
            self.settings.consensus,
            loaded.model,
            member.exchange,
            lambda: member.graph(member.visit),
            self.settings.run.name,
            self.settings.node.name,
            logbook,
            self._worker,
            self._stopping,
        ).run()
        self._standing.waiting_for = ""
        if self._stopping.is_set() and not agreement.complete:
            raise Stopped
        # Who was away when it began, and came back to find it under way, is in no graph of it.
        last_round = loaded.schedule.visits - len(loaded.schedule.blocks)
        met = came_to(member.swarm.peers.values(), last_round)
        missing = met.union(agreement.missing).difference(agreement.members)
        agreement = replace(agreement, missing=tuple(sorted(missing)))
        if not agreement.complete:
            self._standing.warn(
                "the nodes did not all agree on one model; start them all again with the same "
                "consensus.tolerance"
            )
        elif agreement.missing:
            self._standing.warn(
                f"agreed without {', '.join(agreement.missing)}; start all of them again to agree "
                "once more"
            )
        self._log.info(
            "agreed" if agreement.complete else "not agreed",
            rounds=agreement.rounds,
            disagreement=agreement.disagreement,
            members=", ".join(agreement.members),
        )
        await logbook.agreed(agreement)

    async def _wait_for_late(self, member: Member) -> None:
        """Give those who still train, or catch up, the time that a visit gives its neighbours.

        Neighbours are waited for anyway; but a node with which a skipped one has lost touch takes
        part only when it has caught up, and all should see one graph.
        """
        loop = asyncio.get_running_loop()
        limit = loop.time() + self.timing.visit_deadline
        coming = (State.ALIVE, State.SUSPECT, State.BEHIND)
        while not self._stopping.is_set() and (left := limit - loop.time()) > 0:
            late = sorted(
                peer.name
                for peer in member.swarm.peers.values()
                if peer.reached
                and peer.state in coming
                and peer.phase in (Phase.TRAINING, Phase.CATCHING_UP)
            )
            if not late:
                break
            self._standing.waiting_for = f"{', '.join(late)} to end the training"
            await self._changed.comes(min(left, 1.0))

    async def _finish(
        self,
        member: Member,
        kept: KeptBlocks,
        loaded: Loaded,
        sent_before: int,
    ) -> None:
        """Serve neighbours, evaluate, write the model and the record.

        Raises:
            Stopped: told to stop before the end.
        """
        exchange, standing, model = member.exchange, self._standing, loaded.model
        self._enter(Phase.SERVING)
        unserved = asyncio.create_task(exchange.drain())
        agreement = standing.progress.agreement
        if agreement is not None and agreement.complete and not kept.are_agreed:
            # A block of it was damaged since, and there was nobody to have it from.
            standing.progress = replace(
                standing.progress, agreement=replace(agreement, complete=False)
            )
        if not kept.is_saved:  # the disk was full when the last visits ended
            standing.waiting_for = "room for the last blocks"
            # In other trouble neighbours get the last block first; all is saved again below.
            with contextlib.suppress(OutputError):
                await self._until_there_is_room(kept.save)
        after = None
        if loaded.corpus.test:
            standing.waiting_for = "the evaluation after training"
            after = await self._evaluate(loaded)
            self._log.info("after training", **after)
        standing.waiting_for = "neighbours to fetch the last block"
        if late := await unserved:
            standing.warn(f"did not fetch our last block: {', '.join(sorted(late))}")
        exchange.release()
        standing.waiting_for = "nodes catching up to fetch their blocks"
        await unless_stopped(member.hand_out(), self._stopping)
        # Neighbours fetch the last block after our last step.
        sent = standing.progress.bytes_sent + exchange.bytes_sent - sent_before
        standing.progress = replace(standing.progress, bytes_sent=sent)
        standing.waiting_for = "the model to be written"
        await self._until_there_is_room(partial(self._outcome.write_model, model))
        progress = replace(standing.progress, finished=True, seconds=standing.seconds())
        await self._until_there_is_room(
            partial(self._outcome.write_summary, standing, progress, after)
        )
        standing.progress = progress
        await self._until_there_is_room(kept.save)
        standing.waiting_for = ""
        note = {"note": model.note} if model.note else {}
        seconds = round(progress.seconds, 1)
        self._log.info("finished", model=self._outcome.shown, seconds=seconds, **note)

    async def _stay(self) -> None:
        """Where that is wanted, answer status until a signal: the run is finished."""
        if self.settings.node.stay:
            await self._leave()
            self._enter(Phase.DONE)
            self._standing.waiting_for = "a signal to end"
            await self._stopping.wait()

    async def _until_there_is_room(self, write: Callable[[], None]) -> None:
        """Write what the run was for; a full disk is waited for, as nothing else is left to do.

        Raises:
            DiskFullError: told to end while it waited.
            Stopped: told to end while it wrote.
            OutputError: it cannot be written for another reason.
        """
        while True:
            try:
                await self._compute(write)
            except DiskFullError as error:
                self._standing.warn(f"waiting for room to finish: {error}")
                if await happens(self._stopping, ROOM_SECONDS):
                    raise
            else:
                return

    # --- parts of starting

    def _restore(self, checkpoint: Checkpoint, kept: KeptBlocks) -> Start:
        kept.saved_blocks()
        state = checkpoint.state
        tensors = checkpoint.load(state.active) if state.active else None
        step = state.progress.step if tensors is not None else 0
        return Start(state.progress.visit, step, tensors)

    def _make_member(
        self, marks: dict[str, str], port: int, schedule: Schedule, kept: KeptBlocks
    ) -> Member:
        settings, chosen = self.settings, self.settings.topology
        identity = Identity(
            settings.run.name,
            settings.node.name,
            self._session,
            {**marks, **agreement_marks(settings)},
            host=settings.node.advertise or "",
            port=port,
        )
        run = Run(
            schedule,
            TopologySpec(chosen.kind, chosen.p, chosen.edges, settings.run.seed),
            self.timing,
            settings.network.catch_up_rate * 1e6,
            settings.network.catch_up_share
            * (torch.get_num_threads() if self._standing.device.type == "cpu" else 1),
            _per_second(settings.network.send_rate),
            _per_second(settings.network.send_rate_per_peer),
            Format.named(settings.network.wire_format),
        )
        member = Member(
            run, identity, self._transport, kept, self._stopping, self._changed.beat, self._log
        )
        member.visit = self._standing.progress.visit
        self._member = self._control.member = self._reception.member = member
        return member

    async def _join(
        self,
        stack: contextlib.AsyncExitStack,
        member: Member,
        port: int,
    ) -> None:
        """Begin to meet the others."""
        settings = self.settings
        stack.push_async_callback(self._leave)
        self._lookout.begin()
        self._enter(Phase.WAITING)
        self._search = Search(settings, self.timing, port, member.swarm)
        for address in self._met_before.values():
            member.swarm.propose(address, lasting=True)
        try:
            await self._search.start()
        except ListenError as error:
            if not settings.network.static_peers and not settings.network.dns_peers:
                raise
            self._standing.warn(str(error))

    async def _leave(self) -> None:
        """Take leave of peers and discovery; does nothing the second time."""
        member, search = self._member, self._search
        if member is None or self._left:
            return
        self._left = True
        ends = [member.leave(finished=self._standing.progress.finished)]
        if search is not None:
            ends.append(search.stop())
        await asyncio.gather(*ends, return_exceptions=True)

    async def _evaluate(self, loaded: Loaded) -> dict[str, Any]:
        found = await self._compute(
            partial(
                evaluate,
                loaded.model,
                loaded.corpus.test,
                loaded.corpus.completions,
                self.settings.data.batch_size,
                self._stopping.is_set,
            )
        )
        if found is None:
            raise Stopped
        return finite_values(asdict(found))

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run on the training thread; gives up at once when told to stop."""
        return await unless_stopped(self._worker(work), self._stopping)

    # --- during the run

    def _enter(self, phase: Phase) -> None:
        self._standing.phase = phase
        if self._member is not None:
            self._member.enter(phase)

    def _addresses(self) -> dict[str, str]:
        """Where peers were last met, for the state on disk."""
        if self._member is None:
            return {}
        # Asked on the training thread while the event loop meets others.
        peers = list(self._member.swarm.peers.values())
        met = {peer.name: peer.address for peer in peers if peer.state != State.REFUSED}
        return dict(list(({**self._met_before, **met}).items())[-MAX_MEMBERS:])

    async def _tick(self) -> None:
        broken: set[str] = set()
        while True:
            for look in (self._sweep, self._look_around, self._look_at_trust, self._show):
                try:
                    look()
                except Exception as error:  # noqa: BLE001 - a defect must not end the others
                    if (kind := repr(error)) not in broken and len(broken) < MAX_DEFECTS_TOLD:
                        broken.add(kind)
                        self._log.exception("defect in what is done each second, going on")
            await self._changed.comes(1.0)

    def _sweep(self) -> None:
        if self._member is not None and not self._left:
            self._member.swarm.sweep()

    def _look_around(self) -> None:
        if self._member is not None and self._search is not None and not self._left:
            standing = self._standing
            met = frozenset(standing.edges.weights) if standing.visit is not None else None
            self._lookout.look(self._member, self._search, met, standing.late)

    def _look_at_trust(self) -> None:
        # One that stays when its run is over answers still, and may be revoked or renewed.
        if self._upkeep is not None and (not self._left or self._standing.phase == Phase.DONE):
            self._upkeep.look(None if self._left else self._member)

    def _show(self) -> None:
        if self._report is not None:
            self._report(self.status())

    # --- what is told of it

    def status(self) -> pb.NodeStatus:
        """Everything there is to know about this node now."""
        return self._reception.status()

    def _status_elsewhere(self) -> pb.NodeStatus | None:
        """The same, asked on another thread than the loop's; None when the loop is too busy."""
        asked = asyncio.run_coroutine_threadsafe(self._reception.get_status(), self._loop)
        try:
            return asked.result(SCRAPE_SECONDS)
        except TimeoutError:
            asked.cancel()
            return None


def _per_second(megabytes: float | None) -> float | None:
    return None if megabytes is None else megabytes * 1e6


def _nothing() -> None:
    """What there is to save when nothing has changed."""
