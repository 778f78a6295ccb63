"""The algorithm as the paper prints it: for each round, block and step: train, exchange, fold."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import Tensor

from deca_node.batches import Batch
from deca_node.blocks import Schedule, Visit
from deca_node.compression import Format
from deca_node.exchange import Exchange, Gathered
from deca_node.membership import Edges
from deca_node.methods import Local, Method, Settled
from deca_node.wire import Snapshot
from deca_node.worker import Stopped, unless_stopped

T = TypeVar("T")

# A gradient under way when the node is told to stop gets this long to end; then it is abandoned,
# which loses nothing: it has changed no parameter yet.
STOP_GRACE_SECONDS = 1.5


@dataclass
class Seconds:
    """Where a step's wall time went.

    Attributes:
        gradient: the gradient, without what was computed ahead in the step before.
        swap: waiting for neighbours' blocks and mixing them, without what an update took meanwhile.
        ahead: of that, computing for the next step's gradient.
        step: all of it; the rest is the local update, publishing and what follows the mix.
    """

    gradient: float
    swap: float = 0.0
    ahead: float = 0.0
    step: float = 0.0


@dataclass(frozen=True)
class StepRecord:
    """Everything worth keeping about one finished step.

    Attributes:
        visit: the block visit.
        step: within it.
        local: loss and gradient.
        settled: what the mix did.
        gathered: what came from whom; when stale, of the step before.
        edges: the visit's.
        seconds: where the time went.
    """

    visit: Visit
    step: int
    local: Local
    settled: Settled
    gathered: Gathered
    edges: Edges
    seconds: Seconds


@dataclass
class Start:
    """Where to begin: visit and step, and the visit's saved state when in the middle of one.

    The state is taken once: it is as large as the visit's own, and what was read from a file keeps
    its place on the disk. Whoever has this to tell visit and step keeps nothing else alive.
    """

    visit: int = 0
    step: int = 0
    saved: Mapping[str, Tensor] | None = None

    def take(self) -> Mapping[str, Tensor] | None:
        """The saved state, of which this is rid."""
        saved, self.saved = self.saved, None
        return saved


class Batches(Protocol):
    """Resumable mini-batches; batches.BatchStream is one."""

    position: int

    def next(self) -> Batch:
        """The next mini-batch."""
        ...


class ReadAhead:
    """Batches of which the next can be had before its turn; ``position`` is as if it had not."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._next: tuple[int, Batch, int] | None = None

    @property
    def position(self) -> int:
        """Where the batch that ``next`` gives begins."""
        return self._batches.position

    @position.setter
    def position(self, position: int) -> None:
        self._batches.position = position

    def peek(self) -> Batch:
        """The batch that ``next`` will give: the same object."""
        if self._next is None or self._next[0] != self.position:
            before = self.position
            batch = self._batches.next()
            self._next = before, batch, self.position
            self.position = before
        return self._next[1]

    def next(self) -> Batch:
        """See Batches."""
        batch = self.peek()
        assert self._next is not None  # noqa: S101 - peek sees to it
        self.position = self._next[2]
        return batch


class Observer(Protocol):
    """Told what happens; may take its time only where it is awaited."""

    def visit_opened(self, visit: Visit, edges: Edges, wanted: frozenset[str]) -> None:
        """Edges of the visit are settled; ``wanted`` are those that the topology asked for."""
        ...

    async def step_done(self, record: StepRecord) -> None:
        """A step is complete."""
        ...

    async def paused(self, *, within: bool) -> None:
        """This node takes no part from now on; ``within`` says that a visit is open."""
        ...

    async def visit_closed(self, visit: Visit) -> None:
        """The block's values are final for this visit."""
        ...


class CatchUp(Protocol):
    """The way back into step with the others; catchup.CatchUp is one."""

    async def __call__(self, visit: int, *, overtaken: bool) -> tuple[int, bool]:
        """The visit to go on with, the given one when there is nothing to catch up with.

        And whether blocks have changed: then a visit is begun anew, whatever was saved of it.

        Args:
            visit: about to begin; their number at the end.
            overtaken: no edge of it could be had, because the neighbours are past its beginning.
        """
        ...


class Pause(Protocol):
    """Taking no part for a while; member.Member has one."""

    @property
    def wanted(self) -> bool:
        """Whether this node is to pause."""
        ...

    async def __call__(self) -> bool:
        """Pause until it is not wanted any more, or the node is told to stop.

        Returns:
            Whether neighbours have gone on in the open visit without this node.
        """
        ...


class Worker(Protocol):
    """Runs a function that computes, away from the event loop."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """The function's result, in time."""
        ...


@dataclass
class Rounds:
    """One node's run.

    Attributes:
        schedule: rounds, blocks, steps.
        method: what is trained, exchanged and mixed.
        exchange: the neighbours.
        batches: the local data.
        neighbours: wanted neighbours in a visit, by the topology over the members present; asked
            at the start of every visit.
        catch_up: asked before every visit, when one was missed, and at the end.
        pause: asked before every visit and step.
        observer: told of visits and steps.
        worker: runs torch work on the training thread.
        stopping: ends the run between two steps.
        wire_format: what this node wishes for its edges.
        is_open: whether a visit is open in ``method``.
    """

    schedule: Schedule
    method: Method
    exchange: Exchange
    batches: Batches
    neighbours: Callable[[int], frozenset[str]]
    catch_up: CatchUp
    pause: Pause
    observer: Observer
    worker: Worker
    stopping: asyncio.Event
    wire_format: Format = Format.FP32
    is_open: bool = False

    def __post_init__(self) -> None:
        self._reader = ReadAhead(self.batches)
        # When stale: blocks on their way, and what is done when they are needed.
        self._travelling: asyncio.Task[Gathered] | None = None
        self._needed: asyncio.Future[None] = asyncio.Future()
        self._abandoned = False  # a gradient, which the training thread still computes

    async def run(self, start: Start) -> tuple[int, int]:
        """Run the schedule from ``start`` to its end, or until ``stopping`` is set.

        What ``start`` has of a visit is taken from it.

        Returns:
            Visit and step that come next; the number of visits and 0 when the run is complete.
            When it stops within a visit, the visit stays open in ``method``.
        """
        here = Start(start.visit, start.step, start.take())
        while here.visit < self.schedule.visits:
            await self._pause()
            entry, anew = await self.catch_up(here.visit, overtaken=False)
            if entry == here.visit:
                here = Start(here.visit) if anew else here
                wanted = self.neighbours(here.visit)
                serial = self.schedule.serial(here.visit, here.step)
                edges = await self.exchange.open_visit(
                    here.visit, self.schedule.steps, wanted, serial, wish=self.wire_format
                )
                if self.exchange.overtaken and not self.stopping.is_set():
                    entry, anew = await self.catch_up(here.visit, overtaken=True)
                    here = Start(here.visit) if anew and entry == here.visit else here
            if entry != here.visit:
                # What was trained of a visit that is passed over is in the neighbours' blocks.
                here = Start(entry)
                continue
            if self.stopping.is_set():
                return here.visit, here.step
            done = await self._visit(here, edges, wanted)
            if done == self.schedule.steps:
                here = Start(here.visit + 1)
            elif self.stopping.is_set():
                return here.visit, done
            else:
                here = await self._enter_anew(here.visit, done)
                if self.stopping.is_set():
                    return here.visit, here.step
        # Others may have agreed since this node ended its training; it can have their blocks.
        await self.catch_up(here.visit, overtaken=False)
        return here.visit, 0

    async def _pause(self) -> bool:
        """Pause if that is wanted; whether the open visit is lost by it."""
        if not self.pause.wanted or self.stopping.is_set():
            return False
        await self._take_in()
        await self.observer.paused(within=self.is_open)
        return await self.pause() and not self.stopping.is_set()

    async def _enter_anew(self, visit: int, step: int) -> Start:
        """Neighbours went on while this node was paused: take part again like a late joiner."""
        saved = await self.worker(self._set_aside)
        self.is_open = False
        entry, anew = await self.catch_up(visit, overtaken=True)
        return Start(visit, step, saved) if (entry, anew) == (visit, False) else Start(entry)

    def _set_aside(self) -> Mapping[str, Tensor]:
        """Close the visit half-way; what it takes to go on with it."""
        saved = self.method.state()
        self.method.close()
        return saved

    async def _visit(self, start: Start, edges: Edges, wanted: frozenset[str]) -> int:
        """The steps of one visit; returns the number done.

        Fewer than all when told to stop, or when a pause has cost it the rest.
        """
        visit = self.schedule.visit(start.visit)
        await self.worker(partial(self.method.open, visit, start.take()))
        self.is_open = True
        self.observer.visit_opened(visit, edges, wanted)
        try:
            for step in range(start.step, self.schedule.steps):
                if await self._pause():
                    return step
                record = None if self.stopping.is_set() else await self._step(visit, step, edges)
                if record is None:
                    await self._take_in()
                    return step
                await self.observer.step_done(record)
        finally:
            if self._travelling is not None and not self.stopping.is_set():  # an error
                self._travelling.cancel()
                await asyncio.gather(self._travelling, return_exceptions=True)
        await self.worker(self.method.close)
        self.is_open = False
        await self.observer.visit_closed(visit)
        return self.schedule.steps

    async def _step(self, visit: Visit, step: int, edges: Edges) -> StepRecord | None:
        """One inner step, (3) to (10); None when the node is told to stop before its gradient."""
        begin = time.perf_counter()
        position = self._reader.position
        batch = self._reader.next()
        try:
            local = await unless_stopped(
                self.worker(partial(self.method.gradient, batch)), self.stopping, STOP_GRACE_SECONDS
            )
        except Stopped:
            self._reader.position = position
            self._abandoned = True
            return None
        seconds = Seconds(time.perf_counter() - begin)
        update = partial(self.method.advance, step)
        serial = self.schedule.serial(visit.index, step)
        last = step + 1 == self.schedule.steps
        gathered = Gathered()
        if not (edges.weights and self.method.exchanges(step)):
            await self.worker(update)
        elif self.method.stale:
            await self.worker(update)
            gathered = await self._swap_late(serial, seconds)
        else:
            gathered = await self._swap(serial, seconds, update, last=last)
        settled = await self.worker(partial(self.method.settle, step))
        if last:
            began = time.perf_counter()
            gathered.add(await self._take_in())
            seconds.swap += time.perf_counter() - began
        seconds.step = time.perf_counter() - begin
        return StepRecord(visit, step, local, settled, gathered, edges, seconds)

    async def _swap(
        self, serial: int, seconds: Seconds, update: Callable[[], None], *, last: bool
    ) -> Gathered:
        """Update and publish, and mix what comes, while the visit's next batch is worked ahead.

        Where the edges allow it what is updated is on its way before the rest of the block is.
        """
        first: Callable[[], None] | None = update
        promised = self.method.promise(serial) if self.exchange.early else None
        if promised is not None:
            room = await self.exchange.make_room()
        else:
            await self.worker(update)
            room = await self.exchange.make_room()
            promised, first = await self.worker(partial(self._outgoing, serial)), None
        self.exchange.publish(promised)
        began = time.perf_counter()
        following = self._reader.peek() if self.method.overlaps and not last else None
        busy = asyncio.ensure_future(self.worker(partial(self._meanwhile, first, following)))
        travelling = asyncio.ensure_future(self._gather(serial, busy))
        try:
            updating, seconds.ahead = await busy
            gathered = await travelling
        finally:
            travelling.cancel()  # the update failed
        seconds.swap = room + time.perf_counter() - began - updating
        gathered.waited(room)
        return gathered

    def _meanwhile(
        self, update: Callable[[], None] | None, batch: Batch | None
    ) -> tuple[float, float]:
        """The update if it is still to be made, then what can be done for the next batch.

        Returns:
            Seconds of both.
        """
        begin = time.perf_counter()
        if update is not None:
            update()
        updated = time.perf_counter()
        if batch is not None:
            self.method.ahead(batch, self.stopping.is_set)
        return updated - begin, time.perf_counter() - updated

    async def _swap_late(self, serial: int, seconds: Seconds) -> Gathered:
        """Publish, and mix what has come of the step before, which had a gradient's time for it.

        Only then is this step's block published, so that one snapshot is enough here, too.
        """
        began = time.perf_counter()
        gathered = await self._landed()
        gathered.waited(await self.exchange.make_room())
        seconds.swap = time.perf_counter() - began
        self.exchange.publish(await self.worker(partial(self._outgoing, serial)))
        self._needed = asyncio.get_running_loop().create_future()
        self._travelling = asyncio.create_task(self._gather(serial, self._needed))
        return gathered

    def _gather(self, serial: int, busy: "asyncio.Future[Any]") -> Coroutine[Any, Any, Gathered]:
        return self.exchange.gather(
            serial, self.method.layout, intake=self.method.intake, busy=busy
        )

    async def _landed(self) -> Gathered:
        """What travels, once it has arrived; from now on it is waited for."""
        if self._travelling is None:
            return Gathered()
        self._needed.set_result(None)
        gathered = await self._travelling
        self._travelling = None
        return gathered

    async def _take_in(self) -> Gathered:
        """What travels is mixed in now; told to stop, only what has arrived."""
        if self._travelling is None:
            return Gathered()
        gathered = await self._landed()
        # The training thread may be minutes from the end of a gradient that was given up.
        worker = asyncio.to_thread if self._abandoned else self.worker
        await worker(self.method.absorb)
        return gathered

    def _outgoing(self, serial: int) -> Snapshot:
        """What the step hands out, in every format in use."""
        snapshot = self.method.outgoing(serial)
        self.exchange.encode(snapshot, self.method.layout)
        return snapshot
