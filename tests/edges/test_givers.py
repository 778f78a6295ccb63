"""Givers that are slow, silent or false, and what it costs who catches up: in virtual time."""

import asyncio
from contextlib import asynccontextmanager

import pytest
import xxhash

from deca_node import wire
from deca_node.blocks import Schedule, partition_layers
from deca_node.catchup import CatchUp
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerRefused, PeerTimeout
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import (
    MAX_FLIGHTS,
    MAX_REST_SECONDS,
    MAX_VAIN_TRIES,
    REST_FACTOR,
    STUCK_FACTOR,
)
from tests.swarm import QUIET
from tests.virtual_time import run

BLOCKS = 5
SIZE, PIECE = 2_000_000, 20_000
FAST = 0.1  # seconds a message: 10 for a block
SLOW = 1.2  # 120 for a block, just above the least rate
VISIT = BLOCKS  # the first of the second round
TIMING = Timing.lan()


def content(block, giver=""):
    seed = xxhash.xxh3_64_digest(f"{block}{giver}".encode())
    return seed * (SIZE // len(seed))


class Giver:
    """transport.Link to one that is ahead.

    Attributes:
        pause: seconds before a message, by its number; may raise what the call fails with.
        data: its files by block; ``sent`` what it sends in their place, where that differs.
    """

    def __init__(self, name, blocks=range(BLOCKS), pause=lambda _: FAST, same=False):
        self.pause = pause
        self.data = {block: content(block, "" if same else name) for block in blocks}
        self.sent = {}
        self.asked = []
        self.bytes = self.open = 0

    async def list_blocks(self, request, timeout):
        blocks = [
            pb.BlockState(
                block=block, visit=block, bytes=SIZE, xxh3=xxhash.xxh3_128_hexdigest(data)
            )
            for block, data in self.data.items()
        ]
        return pb.BlockList(visit=VISIT, closed=False, blocks=blocks)

    async def fetch_block(self, request, timeout):
        self.asked.append(asyncio.get_running_loop().time())
        self.open += 1
        try:
            async with asyncio.timeout(timeout):
                data = self.sent.get(request.block, self.data[request.block])
                for offset in range(request.offset, SIZE, PIECE):
                    await asyncio.sleep(self.pause(offset // PIECE))
                    piece = data[offset : offset + PIECE]
                    self.bytes += len(piece)
                    yield wire.frame(request.block, offset, piece)
        except TimeoutError:
            raise PeerTimeout("no answer in time") from None
        finally:
            self.open -= 1


class Peers:
    """catchup.Peers, who are all there."""

    def __init__(self, links):
        self.links, self.reasons = links, []

    def sender(self):
        return pb.Sender(run="toy", node="me", session=1)

    def givers(self):
        return dict(self.links)

    def visit_of(self, peer):
        return VISIT

    def is_paused(self, peer):
        return False

    def trouble(self, peer, error):
        self.reasons.append((peer, error.reason))

    def told_visit(self, peer, visit):
        pass


class Part:
    """catchup.Partial in memory."""

    def __init__(self, xxh3):
        self.xxh3, self.data, self.is_open = xxh3, bytearray(), False

    @property
    def size(self):
        return len(self.data)

    def write(self, data):
        assert self.is_open
        self.data += data

    def close(self):
        self.is_open = False


class Store:
    """Refuses to open a part twice, as the one on disk does."""

    def __init__(self):
        self.parts, self.blocks, self.most_open = {}, {}, 0

    def versions(self):
        return {block: block for block in self.blocks}

    def lost(self):
        return ()

    def most_bytes(self):
        return dict.fromkeys(range(BLOCKS), SIZE)

    def begun(self):
        return {xxh3 for _, xxh3 in self.parts}

    async def partial(self, block, xxh3):
        part = self.parts.setdefault((block, xxh3), Part(xxh3))
        if part.is_open:
            raise ValueError("already under way")
        part.is_open = True
        await asyncio.sleep(0.01)  # another thread reads what is there
        here = [each for (of, _), each in self.parts.items() if of == block and each.is_open]
        self.most_open = max(self.most_open, len(here))
        return part

    async def install(self, block, partial, visit):
        assert block not in self.blocks
        assert not any(
            part.is_open for (of, _), part in self.parts.items() if of == block and part != partial
        )
        await asyncio.sleep(0.01)
        if xxhash.xxh3_128_hexdigest(bytes(partial.data)) != partial.xxh3:
            del self.parts[block, partial.xxh3]
            raise PayloadError("digest", "not what was promised")
        self.blocks[block] = bytes(partial.data)
        self.parts = {key: part for key, part in self.parts.items() if key[0] != block}


class Joiner:
    """One that catches up, at its first visit."""

    def __init__(self, links):
        self.links, self.peers, self.store = links, Peers(links), Store()
        self.stopping = asyncio.Event()
        schedule = Schedule(partition_layers(BLOCKS, 1), 4, 3, "ascending", 0)
        self.catch_up = CatchUp(
            self.peers,
            self.store,
            schedule,
            TIMING,
            lambda visit, others: any(other > visit for other in others),
            lambda _: frozenset(links),
            lambda: None,
            self.stopping,
            QUIET,
        )

    async def __call__(self):
        """Catch up; seconds that it took, and the visit that comes next."""
        begin = asyncio.get_running_loop().time()
        entry, _ = await self.catch_up(0, overtaken=False)
        return asyncio.get_running_loop().time() - begin, entry


@asynccontextmanager
async def joiner(**links):
    """Nothing of it is left behind."""
    before = asyncio.all_tasks()
    made = Joiner(links)
    yield made
    assert asyncio.all_tasks() == before
    assert not any(link.open for link in links.values())
    assert not any(part.is_open for part in made.store.parts.values())
    assert made.store.most_open <= MAX_FLIGHTS


@pytest.mark.parametrize("same", [False, True])
def test_a_slow_giver_holds_nobody_up(same):
    """The last block comes from another; of the same file what is here is not fetched again."""

    async def scenario():
        slow = Giver("a", pause=lambda _: SLOW, same=same)
        fast = Giver("b", same=same), Giver("c", same=same)
        async with joiner(a=slow, b=fast[0], c=fast[1]) as late:
            seconds, entry = await late()
        assert entry == VISIT
        assert seconds < 35  # 20 for the four blocks that the fast ones give, 10 for the slow one's
        assert len(late.store.blocks) == BLOCKS
        total = slow.bytes + fast[0].bytes + fast[1].bytes
        assert total == BLOCKS * SIZE if same else total < (BLOCKS + 0.5) * SIZE
        assert late.catch_up.gain.fetched == BLOCKS * SIZE
        assert late.catch_up.unusable == set()
        assert late.peers.reasons == []

    run(scenario())


def test_a_single_block_does_not_wait_for_a_slow_giver():
    """Where nobody has given anything yet, the others are tried after a step's deadline."""

    async def scenario():
        links = {name: Giver(name, blocks=[2]) for name in "abc"}
        links["a"].pause = lambda _: SLOW
        async with joiner(**links) as late:
            seconds, entry = await late()
        assert entry == VISIT
        assert seconds < TIMING.step_deadline + 12
        assert links["b"].bytes + links["c"].bytes == SIZE  # one other is enough

    run(scenario())


def test_givers_alike_do_not_compete():
    """No byte is sent twice where nobody is much slower than the others."""

    async def scenario():
        paces = {"a": FAST, "b": 1.4 * FAST, "c": 1.8 * FAST}
        links = {name: Giver(name, pause=lambda _, pace=pace: pace) for name, pace in paces.items()}
        async with joiner(**links) as late:
            seconds, _ = await late()
        assert sum(link.bytes for link in links.values()) == BLOCKS * SIZE
        assert seconds < 37

    run(scenario())


def test_the_fastest_are_asked_first():
    """Who was slow gets the next block only when all others have one."""

    async def scenario():
        links = {name: Giver(name) for name in "abc"}
        links["a"].pause = lambda _: SLOW
        async with joiner(**links) as late:
            await late()
            asked = len(links["a"].asked)
            del late.store.blocks[0], late.store.blocks[1]
            await late()
        assert len(links["a"].asked) == asked
        assert len(late.store.blocks) == BLOCKS

    run(scenario())


@pytest.mark.parametrize("same", [False, True])
def test_who_stops_just_before_the_end_is_overtaken(same):
    """However little is to come, it is not waited for much longer than another takes."""

    async def scenario():
        stuck = Giver("a", pause=lambda index: FAST / 2 if index < 98 else 19.0, same=same)
        async with joiner(a=stuck, b=Giver("b", same=same)) as late:
            seconds, entry = await late()
        assert entry == VISIT
        assert len(late.store.blocks) == BLOCKS
        assert seconds < 85

    run(scenario())


def test_two_slow_givers_of_a_block_do_not_shut_out_the_third():
    """A block is fetched from two at once; the slower of them makes room."""

    async def scenario():
        links = {name: Giver(name, blocks=[2]) for name in "abc"}
        links["a"].pause = links["b"].pause = lambda _: SLOW
        links["c"].data[0] = content(0, "c")
        links["c"].pause = lambda index: 0.7
        async with joiner(**links) as late:
            seconds, _ = await late()
        # c is busy for 70 s, when a is nearly half done; then it takes another 70.
        assert seconds < 125
        assert len(late.store.blocks) == 2

    run(scenario())


def test_garbage_that_comes_first_costs_no_good_byte():
    """Who wins by sending anything is found out; the other goes on where it was."""

    async def scenario():
        slow, liar = Giver("a", blocks=[2], pause=lambda _: SLOW), Giver("b", blocks=[2])
        liar.sent[2] = bytes(SIZE)
        async with joiner(a=slow, b=liar) as late:
            _, entry = await late()
        assert entry == VISIT
        assert late.store.blocks[2] == slow.data[2]
        assert slow.bytes < SIZE + 2 * PIECE
        assert late.catch_up.unusable == {"b"}
        assert ("b", "digest") in late.peers.reasons

    run(scenario())


def test_garbage_in_a_part_that_another_completes_is_not_its_fault():
    """One that claims another's digest spoils what that one adds to, once."""

    async def scenario():
        liar = Giver("a", blocks=[2], pause=lambda _: SLOW, same=True)
        liar.sent[2] = bytes(SIZE)
        good = Giver("b", blocks=[2], same=True)
        async with joiner(a=liar, b=good) as late:
            seconds, entry = await late()
        assert entry == VISIT
        assert late.store.blocks[2] == good.data[2]
        assert "b" not in late.catch_up.unusable
        assert seconds < 60

    run(scenario())


def refusing(_):
    raise PeerRefused("passed", "cannot be read here")


def hanging(_):
    return 1000.0


def refusing_after(count):
    def pause(index):
        return FAST if index < count else refusing(index)

    return pause


@pytest.mark.parametrize("pause", [refusing, hanging])
def test_a_giver_that_gives_nothing_is_left_alone_for_a_while(pause):
    """It lists blocks that nobody else has: three tries, and the run goes on without it."""

    async def scenario():
        loop = asyncio.get_running_loop()
        giver = Giver("a", pause=pause)
        async with joiner(a=giver) as late:
            seconds, entry = await late()
            assert entry == 0
            assert late.catch_up.unusable == {"a"}
            assert len(giver.asked) == MAX_VAIN_TRIES
            assert seconds < MAX_VAIN_TRIES * (TIMING.step_deadline + 5)
            await asyncio.sleep(0.5 * REST_FACTOR * seconds)
            assert (await late())[1] == 0  # it costs nothing meanwhile
            assert len(giver.asked) == MAX_VAIN_TRIES
            left_alone = loop.time()
            await asyncio.sleep(0.5 * REST_FACTOR * seconds)
            giver.pause = lambda _: FAST  # it was only cut off
            assert (await late())[1] == VISIT
            assert loop.time() - left_alone < MAX_REST_SECONDS

    run(scenario())


def test_whoever_gives_a_little_of_ever_new_files_does_not_hold_us_for_ever():
    """Bytes alone are no progress."""

    async def scenario():
        giver = Giver("a", blocks=[2], pause=refusing_after(1))
        honest = giver.list_blocks

        async def changing(request, timeout):
            giver.data[2] = content(2, f"{len(giver.asked)}")
            return await honest(request, timeout)

        giver.list_blocks = changing
        async with joiner(a=giver) as late:
            seconds, entry = await late()
        assert entry == 0
        assert seconds < 60

    run(scenario())


def test_a_line_that_breaks_often_gets_there():
    """What broke off goes on where it was: that is progress."""

    async def scenario():
        giver = Giver("a", blocks=[2])
        breaks = iter(range(5, 100, 6))
        limit = [next(breaks)]

        def pause(index):
            if index >= limit[0]:
                limit[0] = next(breaks, 100)
                raise PeerTimeout("broke off")
            return FAST

        giver.pause = pause
        async with joiner(a=giver) as late:
            _, entry = await late()
        assert entry == VISIT
        assert giver.bytes == SIZE

    run(scenario())


def test_who_was_ahead_and_is_so_no_more_leaves_no_others_stuck():
    """Those behind it make their steps as before, only not as far."""

    async def scenario():
        clock = asyncio.get_running_loop().time
        pace = 0.8 * STUCK_FACTOR * TIMING.step_deadline  # of a step, of three
        begin = clock()

        def listing(visit, until):
            async def listed(request, timeout):
                if clock() - begin > until:
                    raise PeerRefused("stopping", "no")
                step = int((clock() - begin) // pace)
                if visit == VISIT and step >= 3:
                    return pb.BlockList(visit=VISIT + 1)
                return pb.BlockList(visit=visit, closed=True, step=min(step, 3))

            return listed

        links = {name: Giver(name) for name in "ab"}
        links["a"].list_blocks = listing(VISIT + 4, 100)
        links["b"].list_blocks = listing(VISIT, 1e6)
        async with joiner(**links) as late:
            seconds, entry = await late()
        assert entry == VISIT + 1
        assert seconds == pytest.approx(3 * pace, abs=10)

    run(scenario())


def test_stopping_ends_every_flight():
    """Also while two race for a block."""

    async def scenario():
        links = {name: Giver(name, blocks=[2], pause=lambda _: SLOW) for name in "abc"}
        async with joiner(**links) as late:
            task = asyncio.create_task(late())
            await asyncio.sleep(TIMING.step_deadline + 5)
            assert sum(link.open for link in links.values()) == 2
            late.stopping.set()
            assert (await task)[1] == 0
            await asyncio.sleep(0)

    run(scenario())
