"""Falling behind and catching up, in whole swarms on the loopback network, in virtual time."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from deca_node.catchup import MAX_DISK_FAILURES, RETRY_SECONDS, CatchUp
from deca_node.config import Timing
from deca_node.errors import PayloadError, PeerRefused, PeerTimeout
from deca_node.giving import transfer_seconds
from deca_node.member import REJOIN_SECONDS
from deca_node.membership import Phase, State
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import STUCK_FACTOR, Kept
from deca_node.swarm import Position
from tests.swarm import Part, ToySwarm
from tests.virtual_time import run


def visits_of(node):
    return [record.visit.index for _, _, record in node.story.steps]


async def until(condition):
    async with asyncio.timeout(2000):
        await asyncio.sleep(0.05)
        while not condition():
            await asyncio.sleep(0.05)


def test_an_undisturbed_swarm_learns_together():
    """The toy swarm does what a swarm should: everybody ends near the common optimum."""

    async def scenario():
        swarm = ToySwarm(4, rounds=12, steps=6)
        swarm.start()
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)
        assert all(len(node.story.steps) == swarm.schedule.total_steps for node in swarm.nodes)
        assert all(record.gathered.complete for n in swarm.nodes for _, _, record in n.story.steps)
        assert swarm.error() < 0.5
        assert swarm.disagreement() < 0.5

    run(scenario())


@pytest.mark.parametrize("step", [1, 5, 14, 30])
def test_a_late_joiner_takes_part_after_fetching_what_changed(step):
    """It gets the changed blocks, enters at a visit's start and from then on misses nothing."""

    async def scenario():
        swarm = ToySwarm(4, rounds=4, steps=3, start_when=3)
        swarm.start(0, 1, 2)
        first = swarm.nodes[0]
        await until(lambda: len(first.story.steps) >= step)
        changed = len(first.disk.blocks)
        late = swarm.nodes[3]
        late.start()
        await swarm.finish()
        assert late.story.finished
        visits = visits_of(late)
        begun = first.story.steps[step - 1][2].visit.index
        assert visits[0] <= begun + 2
        assert visits == sorted(visits)
        assert len(visits) == 3 * (swarm.schedule.visits - visits[0])
        assert all(record.gathered.complete for _, _, record in late.story.steps)
        assert all(record.edges.weights for _, _, record in late.story.steps)
        one = next(iter(late.disk.blocks.values()))[0].bytes
        assert late.disk.fetched <= one * (changed + 2)  # and those of the visits meanwhile
        for node in swarm.nodes[:3]:  # nobody waited in vain
            assert max(record.gathered.wait for _, _, record in node.story.steps) < 5
        assert swarm.disagreement() < 1.0

    run(scenario())


def test_a_killed_node_comes_back_into_step():
    """It resumes from its last visit, fetches the blocks that changed since, and takes part."""

    async def scenario():
        swarm = ToySwarm(4, rounds=5, steps=3)
        swarm.start()
        victim = swarm.nodes[1]
        await until(lambda: len(victim.story.steps) >= 10)
        await victim.kill()
        kept = dict(victim.disk.blocks)
        gone_at = swarm.nodes[0].member.visit
        await until(lambda: swarm.nodes[0].member.visit >= gone_at + 2)
        changed = sum(
            theirs.visit > kept[block][0].visit if block in kept else True
            for block, (theirs, _) in swarm.nodes[0].disk.blocks.items()
        )
        victim.disk.fetched = 0
        victim.start()
        await swarm.finish()
        one = next(iter(victim.disk.blocks.values()))[0].bytes
        assert 0 < victim.disk.fetched <= 1.1 * one * (changed + 1)
        again = [record for _, life, record in victim.story.steps if life == 2]
        assert again[0].visit.index > gone_at
        assert again[0].step == 0
        assert all(record.gathered.complete for record in again)
        assert all(record.edges.weights for record in again)
        assert all(node.story.finished for node in swarm.nodes)

    run(scenario())


def test_a_node_alone_goes_on_alone():
    """With nobody to catch up with, a restart continues where it was."""

    async def scenario():
        swarm = ToySwarm(1, rounds=2, steps=3)
        swarm.start()
        node = swarm.nodes[0]
        await until(lambda: len(node.story.steps) >= 7)
        await node.kill()
        node.start()
        await swarm.finish()
        again = [record for _, life, record in node.story.steps if life == 2]
        assert (again[0].visit.index, again[0].step) == (2, 0)
        assert node.story.finished
        assert node.disk.fetched == 0

    run(scenario())


def test_all_nodes_restarted_go_on_together():
    """A power cut: everybody comes back from its own last state, and nobody trains alone."""

    async def scenario():
        swarm = ToySwarm(4, rounds=4, steps=3)
        swarm.start()
        await until(lambda: len(swarm.nodes[0].story.steps) >= 16)
        for node in swarm.nodes:
            await node.kill()
        places = {node.disk.place.visit for node in swarm.nodes}
        swarm.start()
        await swarm.finish()
        for node in swarm.nodes:
            again = [record for _, life, record in node.story.steps if life == 2]
            assert again[0].visit.index in range(max(places), max(places) + 2)
            assert all(record.gathered.complete for record in again)
            assert all(record.edges.weights for record in again)
        assert all(node.story.finished for node in swarm.nodes)

    run(scenario())


@pytest.mark.parametrize("paces", [(1.0, 1.0), (1.0, 3.0)])
def test_two_halves_of_a_cut_ring_become_one_swarm_again(paces):
    """Both sides train on; healed, the one behind catches up and all exchange in full again."""

    async def scenario():
        swarm = ToySwarm(4, rounds=20, steps=3)
        swarm.start()
        await until(lambda: swarm.nodes[0].member.visit >= 4)
        swarm.cut([0, 1], [2, 3])
        for node in swarm.nodes[2:]:
            node.pace = paces[1]
        before = [len(node.story.steps) for node in swarm.nodes]
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(120)
        during = [len(node.story.steps) for node in swarm.nodes]
        assert all(b - a >= 6 for a, b in zip(before, during, strict=True))  # both sides train on
        for node in swarm.nodes[2:]:
            node.pace = 1.0
        swarm.heal()
        healed = clock()

        def met():
            return all(
                len(node.member.swarm.members(swarm.schedule.visits)) == 4
                or node.member.position().phase == Phase.CATCHING_UP
                for node in swarm.nodes
                if node.alive
            )

        await until(met)
        assert clock() - healed < 10
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)
        for node in swarm.nodes:
            late = [record for when, _, record in node.story.steps if when > healed + 60]
            assert late
            assert all(len(record.edges.weights) == 2 for record in late)
            assert all(record.gathered.complete for record in late)
        assert swarm.disagreement() < 1.0

    run(scenario())


def test_a_frozen_node_costs_the_others_one_deadline():
    """Nobody waits for it twice, and when it thaws it catches up."""

    async def scenario():
        swarm = ToySwarm(4, rounds=20, steps=3)  # the others are still training when it thaws
        swarm.start()
        frozen = swarm.nodes[2]
        await until(lambda: len(frozen.story.steps) >= 6)
        frozen.thawed.clear()
        swarm.cut([2], [0, 1, 3])
        at = asyncio.get_running_loop().time()
        await asyncio.sleep(150)
        swarm.heal()
        frozen.thawed.set()
        await swarm.finish()
        for node in (swarm.nodes[0], swarm.nodes[1], swarm.nodes[3]):
            times = [when for when, _, _ in node.story.steps]
            gaps = [b - a for a, b in pairwise(times) if b > at]
            lost = sum(gap - 1.5 for gap in gaps if gap > 1.5)
            assert lost < swarm.timing.step_deadline + swarm.timing.rpc + 5, gaps
        again = [record for when, _, record in frozen.story.steps if when > at + 152]
        assert again
        assert all(record.gathered.complete for record in again[3:])
        entered = [record for record in again if record.visit.index > again[0].visit.index + 1]
        assert entered
        assert all(record.edges.weights for record in entered)

    run(scenario())


async def killed_without_block_1(swarm):
    """The first node of a swarm that has trained, been killed, and found this block damaged."""
    swarm.start()
    node = swarm.nodes[0]
    await until(lambda: len(node.story.steps) >= 13)
    for each in swarm.nodes:
        await each.kill()
    del node.disk.blocks[1]
    node.disk.lost = frozenset({1})
    return node


def test_a_lost_block_is_fetched_from_a_neighbour():
    """A node whose file of a block is damaged gets the block back from whoever has it."""

    async def scenario():
        swarm = ToySwarm(3, rounds=4, steps=3)
        node = await killed_without_block_1(swarm)
        swarm.start()
        await until(lambda: node.disk.fetched > 0)
        assert node.disk.lost == frozenset()
        assert 1 in node.disk.blocks
        await swarm.finish()
        assert all(each.story.finished for each in swarm.nodes)

    run(scenario())


def test_a_lost_block_is_asked_for_until_somebody_has_it():
    """The first that is there has lost it, too; the one that comes later has it."""

    async def scenario():
        swarm = ToySwarm(3, rounds=6, steps=3, kind="full", start_when=2)
        swarm.start()
        await until(lambda: all(each.disk.place.visit >= 6 for each in swarm.nodes))
        for each in swarm.nodes:
            await each.kill()
        node, other, late = swarm.nodes
        block = swarm.schedule.visit(node.disk.place.visit + 3).block  # not trained very soon
        for each in (node, other):
            del each.disk.blocks[block]
            each.disk.lost, each.disk.fetched = frozenset({block}), 0
        node.start()
        other.start()
        begun = len(node.story.steps)
        await until(lambda: len(node.story.steps) > begun)
        late.start()
        await until(lambda: not node.disk.lost)
        assert node.disk.fetched > 0
        await swarm.finish()
        # Asking at each visit costs none; fetching may.
        again = [record.visit.index for _, life, record in node.story.steps if life == 2]
        assert len(set(again)) >= swarm.schedule.visits - again[0] - 2

    run(scenario())


def test_whoever_waits_for_a_lost_block_says_so():
    """Else an operator sees only that members are missing, for ever."""

    async def scenario():
        swarm = ToySwarm(2, rounds=4, steps=3)
        node = await killed_without_block_1(swarm)
        said = []
        swarm.waits = said.append
        node.start()
        await asyncio.sleep(2 * REJOIN_SECONDS)
        assert node.member.phase == Phase.WAITING
        assert "block 1 is lost here" in said[-1]
        await node.kill()

    run(scenario())


@pytest.mark.parametrize("seconds", [3.0, 40.0])
def test_a_full_disk_while_catching_up_ends_nothing(seconds):
    """Short of room it tries again, then trains on where it was; with room it gets into step."""

    async def scenario():
        swarm = ToySwarm(4, rounds=12, steps=3)
        swarm.start()
        victim = swarm.nodes[1]
        await until(lambda: len(victim.story.steps) >= 10)
        await victim.kill()
        gone_at = victim.disk.place.visit
        await until(lambda: swarm.nodes[0].member.visit >= gone_at + 3)
        before = dict(victim.disk.blocks)
        victim.disk.full = True
        victim.start()
        await until(lambda: victim.disk.refused)
        assert victim.disk.blocks == before  # what it had is as it was
        await asyncio.sleep(seconds)
        victim.disk.full = False
        await swarm.finish()
        again = [record for _, life, record in victim.story.steps if life == 2]
        went_on_where_it_was = again[0].visit.index <= gone_at + 1
        assert went_on_where_it_was == (seconds > MAX_DISK_FAILURES * RETRY_SECONDS)
        assert all(node.story.finished for node in swarm.nodes)
        assert again[-1].visit.index == swarm.schedule.visits - 1
        assert again[-1].edges.weights
        assert victim.disk.fetched > 0
        for node in (swarm.nodes[0], *swarm.nodes[2:]):
            assert len(node.story.steps) == swarm.schedule.total_steps  # nobody else was held up

    run(scenario())


def test_parts_of_a_graph_given_in_parts_keep_their_own_pace():
    """Nodes without a path between them never catch up with each other."""

    async def scenario():
        swarm = ToySwarm(2, rounds=4, steps=3, kind="explicit")
        swarm.nodes[1].pace = 4.0
        swarm.start()
        await swarm.finish()
        assert all(len(node.story.steps) == swarm.schedule.total_steps for node in swarm.nodes)

    run(scenario())


def test_who_comes_when_all_have_finished_training_gets_their_model():
    """While the others still serve, a straggler far behind takes their blocks and ends."""

    async def scenario():
        swarm = ToySwarm(3, rounds=3, steps=3, start_when=2)
        swarm.start(0, 1)
        await until(lambda: swarm.nodes[0].member is not None)
        await until(lambda: swarm.nodes[0].member.visit >= swarm.schedule.visits - 1)
        swarm.nodes[2].start()
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)
        assert swarm.nodes[2].disk.fetched > 0

    run(scenario())


BAD = {
    "checksum": lambda m: m[:-1] + bytes([m[-1] ^ 1]),
    "malformed": lambda m: b"\xff" * len(m),
    "gap": lambda m: m[:10] + bytes([m[10] ^ 8]) + m[11:],
    "wrong_step": lambda m: m[:1] + bytes([m[1] ^ 1]) + m[2:],
    "too_long": lambda m: m + b"\0" * (2 << 20),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_giver_of_garbage_is_named_and_another_one_used(reason):
    """What a giver sends is refused with its reason; the joiner gets its blocks elsewhere."""

    async def scenario():
        swarm = ToySwarm(4, rounds=5, steps=3, start_when=3)
        liar = swarm.nodes[0].address

        def fault(call, index, message):
            bad = call.method == "FetchBlock" and call.target == liar
            return BAD[reason](message) if bad else message

        swarm.network.fault = fault
        swarm.start(0, 1, 2)
        await until(lambda: len(swarm.nodes[0].story.steps) >= 14)
        late = swarm.nodes[3]
        late.start()
        await swarm.finish()
        assert late.story.finished
        assert late.member.swarm.traffic["n0"].refusals[reason] >= 1
        assert all(record.gathered.complete for _, _, record in late.story.steps)

    run(scenario())


def test_a_liar_about_what_it_has_is_not_believed():
    """Impossible visits, blocks, sizes and digests are refused; honest givers are used."""

    async def scenario():
        swarm = ToySwarm(4, rounds=5, steps=3, start_when=3)
        swarm.start(0, 1, 2)
        await until(lambda: len(swarm.nodes[0].story.steps) >= 14)
        giver = swarm.nodes[0].member.giver
        honest = giver.answer_list
        lies = iter(
            [
                lambda reply: setattr(reply, "visit", 10**9),
                lambda reply: setattr(reply.blocks[0], "block", 77),
                lambda reply: setattr(reply.blocks[0], "visit", 10**12),
                lambda reply: setattr(reply.blocks[0], "bytes", 1 << 60),
                lambda reply: setattr(reply.blocks[0], "xxh3", "../../etc/passwd"),
            ]
        )

        async def lying(request):
            reply = await honest(request)
            next(lies, lambda reply: None)(reply)
            return reply

        giver.answer_list = lying
        late = swarm.nodes[3]
        late.start()
        await swarm.finish()
        assert late.story.finished
        assert late.member.swarm.traffic["n0"].refusals["bad_list"] == 1

    run(scenario())


@pytest.mark.parametrize("error", [PeerRefused("passed", "cannot be read"), PeerTimeout("late")])
def test_one_that_is_ahead_and_gives_nothing_halts_nobody(error):
    """It was alone, went on, and came back with blocks that it lists and never hands out."""

    async def scenario():
        swarm = ToySwarm(4, rounds=8, steps=3)
        ahead = swarm.nodes[3]

        def fault(call, index, message):
            if call.method == "FetchBlock" and call.target == ahead.address:
                raise error
            return message

        swarm.network.fault = fault
        swarm.start()
        await until(lambda: swarm.nodes[0].member is not None and swarm.nodes[0].member.visit >= 2)
        swarm.cut([3], [0, 1, 2])
        for node in swarm.nodes[:3]:
            node.pace = 20.0
        await until(lambda: ahead.member.visit >= swarm.nodes[0].member.visit + 6)
        for node in swarm.nodes[:3]:
            node.pace = 1.0
        ahead.pace = 10_000.0  # it stays where it is
        swarm.heal()
        async with asyncio.timeout(2000):
            await asyncio.gather(*(node.task for node in swarm.nodes[:3]))
        assert all(node.story.finished for node in swarm.nodes[:3])
        last = [record for _, _, record in swarm.nodes[0].story.steps][-3:]
        assert all(set(record.edges.weights) == {"n1", "n2"} for record in last)
        await ahead.kill()

    run(scenario())


def refusing(error):
    async def answer(request):
        raise error

    return answer


async def silent(request):
    await asyncio.sleep(1e6)


@pytest.mark.parametrize(
    ("visit", "lists"),
    [
        (16, refusing(PeerRefused("stopping", "no"))),
        (16, silent),
        (16, None),
        (10**6, refusing(PeerRefused("stopping", "no"))),
    ],
    ids=["refuses", "is silent", "lists what it has", "cannot be there"],
)
def test_who_only_says_that_it_is_ahead_parts_nobody(visit, lists):
    """Its greetings make the others ask it for a list, and not leave each other's graph."""

    async def scenario():
        swarm = ToySwarm(4, rounds=4, steps=6)
        *honest, liar = swarm.nodes
        swarm.start()
        await until(lambda: all(node.member and node.member.visit >= 2 for node in swarm.nodes))
        liar.member.swarm._position = lambda: Position(Phase.TRAINING, visit)
        if lists is not None:
            liar.member.giver.answer_list = lists
        begin = asyncio.get_running_loop().time()
        async with asyncio.timeout(4000):
            await asyncio.gather(*(node.task for node in honest))
        seconds = asyncio.get_running_loop().time() - begin
        others = {node.name for node in honest}
        for node in honest:
            assert len(node.story.visits) == swarm.schedule.visits
            # One visit may have been begun just when it began to lie.
            assert all(edges.weights for _, _, edges in node.story.visits)
            for _, _, edges in node.story.visits[4:-1]:  # in the last one it seems to be in step
                assert edges.weights.keys() == others - {node.name}
            refused = node.member.swarm.peers[liar.name].state == State.REFUSED
            assert refused == (visit > swarm.schedule.visits)
        assert seconds < 14 * 6 + 60
        await liar.kill()

    run(scenario())


@pytest.mark.parametrize(("pace", "alone"), [(6.0, 0), (60.0, 2)])
def test_a_late_joiner_waits_for_steps_that_take_longer_than_their_deadline(pace, alone):
    """A gradient has no deadline. Whoever knows no step's length yet gives up, and tries again."""

    async def scenario():
        timing = replace(Timing.lan(), step_deadline=3.0)
        swarm = ToySwarm(2, rounds=3, steps=6, start_when=1, timing=timing)
        for node in swarm.nodes:
            node.pace = pace
        first, late = swarm.nodes
        first.start()
        while len(first.story.steps) < 14:
            await asyncio.sleep(pace)
        swarm.start_when = 2
        late.start()
        await swarm.finish(100_000)
        edges = [bool(edges.weights) for _, _, edges in late.story.visits]
        assert edges.count(False) <= alone
        assert all(edges[alone:])
        assert len(edges) > alone + 2

    run(scenario())


def test_one_that_is_ahead_and_makes_no_step_is_waited_for_once():
    """It says that it is in a visit, which the others would enter after it."""

    async def scenario():
        swarm = ToySwarm(4, rounds=12, steps=6)
        *honest, stuck = swarm.nodes
        swarm.start()
        await until(lambda: all(node.member and node.member.visit >= 2 for node in swarm.nodes))
        last = swarm.schedule.visits

        async def listing(request):
            return pb.BlockList(sender=stuck.member.swarm.sender(), visit=last - 2, closed=True)

        stuck.member.swarm._position = lambda: Position(Phase.TRAINING, last - 2)
        stuck.member.giver.answer_list = listing
        begin = asyncio.get_running_loop().time()
        async with asyncio.timeout(4000):
            await asyncio.gather(*(node.task for node in honest))
        seconds = asyncio.get_running_loop().time() - begin
        assert seconds < STUCK_FACTOR * swarm.timing.step_deadline + last * 6
        for node in honest:
            assert len(node.story.visits) == last
            assert sum(not edges.weights for _, _, edges in node.story.visits) <= 2
        await stuck.kill()

    run(scenario())


def test_who_dies_while_it_serves_is_asked_no_more():
    """It had finished and was ahead of all; two that come later train with each other."""

    async def scenario():
        swarm = ToySwarm(3, rounds=2, steps=3, start_when=1)
        first, *late = swarm.nodes
        first.start()
        await until(lambda: first.member is not None)
        first.member.exchange.drain = lambda: asyncio.sleep(1e6)
        first.member.giver.answer_list = refusing(PeerRefused("stopping", "no"))
        await until(lambda: first.member.phase == Phase.SERVING)
        swarm.start_when = 2
        swarm.start(1, 2)
        await until(lambda: all(n.member and "n0" in n.member.swarm.givers() for n in late))
        await first.kill()
        await asyncio.sleep(swarm.timing.gone_after)
        for node in late:
            assert node.member.swarm.peers["n0"].state == State.GONE
            assert "n0" not in node.member.swarm.givers()
        await swarm.finish()
        for node in late:
            assert len(node.story.visits) == swarm.schedule.visits
            assert sum(not edges.weights for _, _, edges in node.story.visits) <= 1

    run(scenario())


def test_who_caught_up_in_part_is_no_liar():
    """It keeps newer blocks at an older place, and gives them to whoever comes later."""

    async def scenario():
        swarm = ToySwarm(3, rounds=6, steps=6, start_when=1)
        ahead, partly, late = swarm.nodes
        ahead.start()
        await until(lambda: ahead.member is not None and ahead.member.visit >= 8)
        partly.start()
        await until(lambda: partly.disk.fetched)
        await ahead.kill()
        await until(lambda: partly.member.visit >= 2)
        assert max(kept.visit for kept, _ in partly.disk.blocks.values()) > partly.member.visit
        swarm.start_when = 2
        late.start()
        await swarm.finish()
        assert "bad_list" not in late.member.swarm.traffic.of("n1").refusals
        assert all(edges.weights for _, _, edges in late.story.visits)
        assert late.story.visits[-1][1].index == swarm.schedule.visits - 1

    run(scenario())


def test_strangers_get_no_kept_block():
    """Lists and blocks are for greeted members of this run."""

    async def scenario():
        swarm = ToySwarm(2, rounds=2, steps=3)
        swarm.start()
        await until(lambda: len(swarm.nodes[0].story.steps) >= 4)
        link = swarm.network.transport("10.9.9.9", 1).link(swarm.nodes[0].address)
        stranger = pb.Sender(run="toy", node="eve", session=9)
        with pytest.raises(PeerRefused) as caught:
            await link.list_blocks(pb.ListBlocksRequest(sender=stranger), 5)
        assert caught.value.reason == "stranger"
        with pytest.raises(PeerRefused):
            async for _ in link.fetch_block(pb.FetchBlockRequest(sender=stranger), 5):
                pass
        await swarm.finish()

    run(scenario())


async def a_giver():
    """A swarm, its first member, and a block that this has kept."""
    swarm = ToySwarm(2, rounds=2, steps=3)
    swarm.start()
    await until(lambda: len(swarm.nodes[0].story.steps) >= 4)
    member = swarm.nodes[0].member
    return swarm, member, *next(iter(member.giver._shelf.kept().items()))


async def _fetched(giver, request):
    return [message async for message in giver.answer_fetch(request)]


@pytest.mark.parametrize("beyond", [1, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_an_offset_beyond_the_file_is_refused_and_counted(beyond):
    """Whatever a caller asks for, it gets a reason: 64 bits are more than a file's offset has."""

    async def scenario():
        swarm, member, block, kept = await a_giver()
        sender = swarm.nodes[1].member.swarm.sender()
        offset = beyond if beyond > 1 else kept.bytes + 1
        request = pb.FetchBlockRequest(sender=sender, block=block, xxh3=kept.xxh3, offset=offset)
        with pytest.raises(PeerRefused) as caught:
            await _fetched(member.giver, request)
        assert caught.value.reason == "bad_request"
        assert member.swarm.traffic["n1"].refusals["bad_request"] == 1
        request.offset = kept.bytes  # all of it is there already
        assert await _fetched(member.giver, request) == []
        await swarm.finish()

    run(scenario())


def test_who_takes_a_file_too_slowly_is_told_so_and_counted():
    """Also where every single message is read in time: a place is kept from others all the while.

    Nothing interrupts the caller at a message: what it does with one is its own.
    """

    async def scenario():
        swarm, member, block, kept = await a_giver()

        async def dripping(file, offset, size):
            return file.getvalue()[offset : offset + 1]

        member.giver._shelf.read = dripping
        sender = swarm.nodes[1].member.swarm.sender()
        request = pb.FetchBlockRequest(sender=sender, block=block, xxh3=kept.xxh3)
        taken = 0
        limit = transfer_seconds(kept.bytes, swarm.timing)
        with pytest.raises(PeerRefused) as caught:
            async for _ in member.giver.answer_fetch(request):
                taken += 1
                await asyncio.sleep(limit / 4)
        assert caught.value.reason == "too_slow"
        assert 4 <= taken <= 5
        assert member.swarm.traffic["n1"].refusals["too_slow"] == 1
        del member.giver._shelf.read
        await swarm.finish()

    run(scenario())


def test_a_transfer_cut_in_the_middle_goes_on_where_it_was():
    """What had come is not asked for again, also after a restart of the joiner."""

    async def scenario():
        swarm = ToySwarm(3, rounds=6, steps=3, start_when=2)
        swarm.start(0, 1)
        await until(lambda: len(swarm.nodes[0].story.steps) >= 14)
        late = swarm.nodes[2]
        late.start()
        await until(lambda: late.member is not None and len(late.member.swarm.givers()) == 2)
        giver = swarm.nodes[0]
        block, (kept, data) = next(iter(giver.disk.blocks.items()))
        part = Part(late.disk, kept.xxh3)
        part.write(data[:100])
        link = late.member.swarm.givers()["n0"]
        assert isinstance(late.member.catch_up, CatchUp)
        await late.member.catch_up._receive(link, block, kept, part)
        assert bytes(part.data) == data
        wrong = Kept(kept.visit, kept.bytes + 10, kept.xxh3)
        with pytest.raises(PayloadError, match="ended early"):
            await late.member.catch_up._receive(link, block, wrong, Part(late.disk, kept.xxh3))
        await swarm.finish()

    run(scenario())


def test_peers_far_apart_are_told_apart():
    """Status shows who is ahead and who is behind."""

    async def scenario():
        swarm = ToySwarm(2, rounds=12, steps=2)
        swarm.start()
        await until(lambda: swarm.nodes[0].member is not None and swarm.nodes[0].member.visit >= 2)
        swarm.cut([0], [1])
        swarm.nodes[1].thawed.clear()
        await until(lambda: swarm.nodes[0].member.visit >= 8)
        swarm.heal()
        await until(
            lambda: (
                swarm.nodes[0].member.swarm.peers["n1"].state == State.BEHIND
                and swarm.nodes[1].member.swarm.peers["n0"].state == State.AHEAD
            )
        )
        swarm.nodes[1].thawed.set()
        await swarm.finish()
        assert all(node.story.finished for node in swarm.nodes)

    run(scenario())
