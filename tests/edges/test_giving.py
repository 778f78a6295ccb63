"""Handing out kept blocks: when a node leaves, and what callers that hang up cost."""

import asyncio
import contextlib
import io
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from deca_node.config import Timing
from deca_node.errors import PeerRefused
from deca_node.exchange import send_rates
from deca_node.giving import LATER, MAX_DRAIN_SECONDS, QUIET_SECONDS, Giver
from deca_node.limits import (
    CHUNK_BYTES,
    LIST_HOLD_SECONDS,
    MAX_QUEUED_TRANSFERS,
    MAX_TRANSFERS,
    MAX_TRANSFERS_PER_PEER,
)
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import Kept
from deca_node.wire import parse
from tests.virtual_time import run

BLOCKS = 5
SIZE = 20 * CHUNK_BYTES
RATE = 50e6
DIGEST = "0" * 32
TIMING = Timing.lan()


class Shelf:
    """giving.Shelf with blocks of zeros."""

    def kept(self):
        return {block: Kept(9, SIZE, DIGEST) for block in range(BLOCKS)}

    def open(self, block, xxh3):
        return io.BytesIO() if xxh3 == DIGEST else None

    async def read(self, file, offset, size):
        return bytes(min(size, SIZE - offset))


class Peers:
    """giving.Peers that have all been greeted."""

    def __init__(self):
        self.reasons = []

    def sender(self):
        return pb.Sender(run="toy", node="me", session=1)

    def check_sender(self, sender):
        return sender.node

    def trouble(self, peer, error):
        self.reasons.append((peer, error.reason))


def giver(rates=None, position=lambda: (10, False, 0), timing=TIMING):
    """One that has ended its training."""
    peers = Peers()
    return peers, Giver(peers, Shelf(), position, timing, RATE, rates or send_rates())


def asked(name, block=0, offset=0):
    sender = pb.Sender(run="toy", node=name, session=2)
    return pb.FetchBlockRequest(sender=sender, block=block, xxh3=DIGEST, offset=offset)


async def fetch(leaving, name, block, pause=0.0):
    async with aclosing(leaving.answer_fetch(asked(name, block))) as stream:
        async for message in stream:
            assert message
            await asyncio.sleep(pause)


async def drained(leaving, caller, *, expecting=False):
    """Seconds that a giver stays once somebody calls."""
    task = asyncio.create_task(caller)
    await asyncio.sleep(0.01)
    begin = asyncio.get_running_loop().time()
    await leaving.drain(expecting=expecting)
    seconds = asyncio.get_running_loop().time() - begin
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return seconds


def test_a_list_waits_until_the_visit_is_over():
    """It comes at that moment, or as it is when it was held back long enough."""

    async def scenario():
        place, clock = [10], asyncio.get_running_loop().time
        _, giving = giver(position=lambda: (place[0], False, 0))
        answer = asyncio.create_task(giving.answer_list(pb.ListBlocksRequest(after=10)))
        await asyncio.sleep(1)
        assert not answer.done()
        place[0] = 11
        giving.moved()
        assert (await answer).visit == 11
        assert clock() == pytest.approx(1, abs=0.01)
        assert (await giving.answer_list(pb.ListBlocksRequest(after=10))).visit == 11
        assert clock() == pytest.approx(1, abs=0.01)
        assert (await giving.answer_list(pb.ListBlocksRequest(after=11))).visit == 11
        assert clock() == pytest.approx(1 + LIST_HOLD_SECONDS, abs=0.01)

    run(scenario())


def test_the_last_node_stays_until_a_joiner_has_all_blocks():
    """Also between two of them, when nothing is under way."""

    async def scenario():
        _, leaving = giver()
        got = []

        async def joiner():
            await leaving.answer_list(pb.ListBlocksRequest())
            for block in range(BLOCKS):
                await asyncio.sleep(0.8 * QUIET_SECONDS)  # it keeps the one before
                # Nearly as long as one block may take, five times.
                await fetch(leaving, "late", block, 0.8 * TIMING.step_deadline / 20)
                got.append(block)

        seconds = await drained(leaving, joiner())
        assert got == list(range(BLOCKS))
        assert seconds > BLOCKS * 0.8 * TIMING.step_deadline

    run(scenario())


def test_nobody_is_waited_for_that_does_not_ask():
    """Without a joiner a node leaves at once; with one, soon after its last question."""

    async def scenario():
        _, leaving = giver()
        assert await drained(leaving, asyncio.sleep(0)) == 0
        seconds = await drained(leaving, leaving.answer_list(pb.ListBlocksRequest()))
        assert seconds == pytest.approx(QUIET_SECONDS, abs=0.1)

    run(scenario())


def test_who_is_away_has_a_moment_to_come():
    """It has not asked yet when the node begins to leave: it gets all, or costs five seconds."""

    async def scenario():
        _, leaving = giver()
        seconds = await drained(leaving, asyncio.sleep(0), expecting=True)
        assert seconds == pytest.approx(QUIET_SECONDS, abs=0.1)

        async def late():
            await asyncio.sleep(0.8 * QUIET_SECONDS)
            await leaving.answer_list(pb.ListBlocksRequest())

        seconds = await drained(leaving, late(), expecting=True)
        assert seconds == pytest.approx(1.8 * QUIET_SECONDS, abs=0.1)

    run(scenario())


def test_a_joiner_that_drips_or_asks_for_ever_is_left():
    """A block has a step's deadline; the same ones again and again have an end, too."""

    async def scenario():
        _, leaving = giver()
        seconds = await drained(leaving, fetch(leaving, "slow", 0, 0.2 * TIMING.step_deadline))
        assert seconds == pytest.approx(TIMING.step_deadline)

        async def again():
            while True:
                await fetch(leaving, "evil", 0, 0.04 * TIMING.step_deadline)

        assert await drained(leaving, again()) == pytest.approx(MAX_DRAIN_SECONDS)

    run(scenario())


@pytest.mark.parametrize("capped", [False, True])
def test_who_hangs_up_leaves_no_debt_that_others_pay(capped):
    """What was not sent counts for nothing, and who asked for it is counted."""

    async def scenario():
        peers, giving = giver(send_rates(RATE / 2) if capped else None)
        clock = asyncio.get_running_loop().time

        async def first(name):
            begin = clock()
            async with aclosing(giving.answer_fetch(asked(name))) as stream:
                await anext(stream)
            return clock() - begin

        assert await first("honest") == 0
        hung_up = 0
        while clock() < 10:
            calls = [asyncio.create_task(first("evil")) for _ in range(2)]
            await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            hung_up += 2
        assert await first("honest") < 4 * CHUNK_BYTES / RATE
        assert peers.reasons.count(("evil", "hung_up")) == hung_up

    run(scenario())


def test_who_has_the_last_byte_may_turn_away():
    """A joiner reads no further than that."""

    async def scenario():
        peers, giving = giver()
        async with aclosing(giving.answer_fetch(asked("late", offset=SIZE - 1))) as stream:
            await anext(stream)
        assert peers.reasons == []

    run(scenario())


def test_a_version_that_is_no_longer_here_is_not_answered_with_another():
    """Whoever asked would take it for garbage, and leave its giver alone."""

    async def scenario():
        _, giving = giver()
        request = asked("a")
        request.xxh3 = "1" * 32
        with pytest.raises(PeerRefused) as caught:
            await anext(giving.answer_fetch(request))
        assert caught.value.reason == "passed"

    run(scenario())


def test_nobody_has_more_places_than_its_share_and_the_queue_has_an_end():
    """Who is one too many is told so at once; a place that was given back is free."""

    async def scenario():
        _, giving = giver()
        clock, open_ = asyncio.get_running_loop().time, []

        async def begin(name, block=0):
            stream = giving.answer_fetch(asked(name, block))
            await anext(stream)
            open_.append(stream)

        async def refused(name):
            asked_at = clock()
            with pytest.raises(PeerRefused) as caught:
                await begin(name, 4)
            return caught.value.reason == LATER and clock() == asked_at

        for block in range(MAX_TRANSFERS_PER_PEER):
            await begin("a", block)
        assert await refused("a")
        await begin("b")
        await open_.pop(0).aclose()
        await begin("a", 3)
        for stream in open_:
            await stream.aclose()
        crowd = [f"n{number}" for number in range(MAX_TRANSFERS + MAX_QUEUED_TRANSFERS)]
        waiting = [asyncio.create_task(begin(name)) for name in crowd]
        await asyncio.sleep(0.1)
        assert await refused("c")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario())


def test_a_file_that_cannot_be_read_is_no_longer_here(monkeypatch):
    """It is refused as what has been superseded: whoever asked goes to another giver."""

    async def read(self, file, offset, size):
        raise OSError(5, "Input/output error")

    async def scenario():
        peers, giving = giver()
        with pytest.raises(PeerRefused, match="cannot be read here: Input/output error") as caught:
            await anext(giving.answer_fetch(asked("a")))
        assert caught.value.reason == "passed"
        assert not peers.reasons

    monkeypatch.setattr(Shelf, "read", read)
    run(scenario())


def test_a_place_is_kept_for_its_time_while_others_queue():
    """They make nobody begin anew at each message."""

    async def scenario():
        _, giving = giver()
        streams = [giving.answer_fetch(asked(f"n{number}")) for number in range(MAX_TRANSFERS)]
        for stream in streams:
            await anext(stream)
        queued = asyncio.create_task(anext(giving.answer_fetch(asked("late"))))
        await asyncio.sleep(0.4 * TIMING.step_deadline)  # it waits for half of that at most
        assert not queued.done()
        for stream in streams:
            assert await anext(stream)
            await stream.aclose()
        await queued

    run(scenario())


def test_slow_readers_take_turns_while_others_queue():
    """Each has its place for a step_deadline and a message; what came before that it keeps."""

    async def scenario():
        peers, giving = giver()
        clock, ended = asyncio.get_running_loop().time, asyncio.Event()
        refused = []

        async def slow(name, block):
            got = 0
            while not ended.is_set():
                try:
                    async with aclosing(giving.answer_fetch(asked(name, block, got))) as stream:
                        async for message in stream:
                            got += len(parse(message).data)
                            await asyncio.sleep(0.9 * TIMING.step_deadline)
                except PeerRefused as error:
                    refused.append((error.reason, got))
                    await asyncio.sleep(0.1)

        others = [asyncio.create_task(slow(name, block)) for name in ("a", "b") for block in (0, 1)]
        await asyncio.sleep(5 * TIMING.step_deadline)
        assert not refused  # as long as nobody waits for their places
        begin, got = clock(), 0
        while got < SIZE:
            with contextlib.suppress(PeerRefused):
                async with aclosing(giving.answer_fetch(asked("fast", 2, got))) as stream:
                    async for message in stream:
                        got += len(parse(message).data)
        assert clock() - begin < 2 * TIMING.step_deadline
        assert {reason for reason, _ in refused} == {"too_many_transfers"}
        assert all(part > CHUNK_BYTES for _, part in refused)
        assert not peers.reasons  # nobody has done anything wrong
        ended.set()
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize("preset", ["local", "lan", "wan"])
def test_no_answer_is_held_back_longer_than_any_asker_waits(preset):
    """Presets may differ between machines: the giver's is not the asker's."""
    timings = [Timing.local(), Timing.lan(), Timing.wan()]

    async def scenario():
        _, leaving = giver(timing=getattr(Timing, preset)())
        clock = asyncio.get_running_loop().time
        sender = pb.Sender(run="toy", node="ann", session=2)
        begin = clock()
        await leaving.answer_list(pb.ListBlocksRequest(sender=sender, after=10))
        assert 0 < clock() - begin < min(timing.rpc for timing in timings)
        places = [fetching(leaving, f"n{number}") for number in range(MAX_TRANSFERS)]
        async with AsyncExitStack() as stack:
            for place in places:
                await stack.enter_async_context(place)
            begin = clock()
            with pytest.raises(PeerRefused):
                await fetch(leaving, "ann", 0)
            assert 0 < clock() - begin < min(timing.step_deadline for timing in timings)

    run(scenario())


@asynccontextmanager
async def fetching(leaving, name):
    """A place of the giver's, taken and not used."""
    async with aclosing(leaving.answer_fetch(asked(name))) as stream:
        assert await anext(stream)
        yield
