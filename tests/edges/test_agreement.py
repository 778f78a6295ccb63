"""Final agreement over the loopback transport, in virtual time, on plain tensors."""

import asyncio
import itertools
import math
import random

import pytest
import structlog
import torch

from deca_node.agreement import Agreeing, _Intake, _norm
from deca_node.blocks import Schedule, partition_layers
from deca_node.config import ConsensusSettings, ModelSettings, Timing
from deca_node.errors import PeerUnavailable
from deca_node.exchange import Exchange
from deca_node.limits import MAX_NOTE_BYTES
from deca_node.loopback import LoopbackNetwork
from deca_node.membership import Phase
from deca_node.models import LanguageModel
from deca_node.swarm import Identity, Position, Swarm
from deca_node.topology import TopologySpec, graph
from deca_node.wire import Layout, TensorSpec, metadata, snapshot
from tests.answers import Answers
from tests.mps import Mps
from tests.tiny import make_model
from tests.virtual_time import run

SIZE = 2000
LAYOUT = Layout((TensorSpec("w", (SIZE,)),))
TIMING = Timing.lan()
TOLERANCE = 1e-3


class PlainBlock:
    """A tensor in a block's place."""

    layout = LAYOUT

    def __init__(self, values):
        self.master = values

    def write_back(self):
        pass


class Member(Answers):
    """A node after its last round: two blocks of its own random values about a common mean."""

    def __init__(self, network, index, kind="ring", blocks=2, session=0, **settings):
        self.index = index
        self.name = f"n{index:02}"
        self.schedule = Schedule(partition_layers(blocks, 1), 3, 4, "ascending", 0)
        source = torch.Generator().manual_seed(index)
        base = torch.randn(SIZE, generator=torch.Generator().manual_seed(99))
        self.blocks = [base + 0.01 * torch.randn(SIZE, generator=source) for _ in range(blocks)]
        self.start = [values.clone() for values in self.blocks]
        self.phase, self.visit = Phase.AGREEING, self.schedule.visits
        self.view = lambda: self.swarm.members(self.visit)
        self.kind = kind
        self.rounds = 0
        self.results = []
        self.on_round = lambda block, rounds: None
        self.stopping = asyncio.Event()
        self.transport = network.transport(f"10.0.0.{index}", 7430)
        identity = Identity("run", self.name, session or 100 + index, {}, port=7430)
        self.swarm = Swarm(
            identity,
            self.transport,
            TIMING,
            lambda: Position(self.phase, self.visit),
            1,
            lambda: self.exchange.wake(),  # noqa: PLW0108 - made below
            structlog.get_logger(),
        )
        self.exchange = Exchange(self.swarm, TIMING, "run", self.stopping)
        self.settings = ConsensusSettings(**{"tolerance": TOLERANCE, **settings})

    # agreement.Model and Observer

    def activate(self, layers):
        return PlainBlock(self.blocks[layers.start])

    def release(self):
        pass

    def block_opened(self, block, edges, chosen):
        self.visit = edges.visit

    def round_done(self, block, rounds):
        self.rounds = rounds
        self.on_round(block, rounds)

    async def block_agreed(self, result):
        self.results.append(result)

    async def agree(self):
        async def worker(work):
            await asyncio.sleep(0.001)
            return work()

        def view():
            return graph(self.view(), TopologySpec(self.kind))

        return await Agreeing(
            self.schedule,
            self.settings,
            self,
            self.exchange,
            view,
            "run",
            self.name,
            self,
            worker,
            self.stopping,
        ).run()


async def meet(network, count, **options):
    members = [Member(network, i, **options) for i in range(count)]
    for member in members:
        await member.transport.listen(member, None)
    for one, other in itertools.permutations(members, 2):
        one.swarm.propose(other.transport.address)
    while any(len(member.swarm.members(0)) < count for member in members):
        await asyncio.sleep(0.01)
    return members


async def agreed(members):
    return await asyncio.gather(*(member.agree() for member in members))


def spread(values):
    """Largest ℓ2 distance between two of the nodes' blocks."""
    return max((float((a - b).norm()) for a, b in itertools.combinations(values, 2)), default=0.0)


def check_agreement(members, blocks, *, tolerance=TOLERANCE):
    """All within tolerance of each other, and at the mean of what they began with."""
    for block in blocks:
        before = [member.start[block] for member in members]
        after = [member.blocks[block] for member in members]
        assert spread(after) <= tolerance * spread(before)
        mean = torch.stack(before).mean(0)
        assert float((torch.stack(after).mean(0) - mean).norm()) < 1e-5 * float(mean.norm())


@pytest.mark.parametrize(
    ("kind", "count", "used", "rounds"),
    [
        ("ring", 8, "exact", 4 + 4 + 2),  # eigenvalues, diameter, being calm and saying so
        ("ring", 2, "plain", 1 + 1 + 2),
        ("full", 5, "plain", 1 + 1 + 2),
        ("bipartite", 5, "exact", 3 + 2 + 2),
    ],
)
def test_all_nodes_end_with_one_model(kind, count, used, rounds):
    """Every block is within tolerance, at the mean of all, after the rounds one can count."""

    async def scenario():
        members = await meet(LoopbackNetwork(), count, kind=kind)
        results = await agreed(members)
        check_agreement(members, range(2))
        for result in results:
            assert result.complete
            assert (result.kind, result.rounds) == (used, 2 * rounds)
            assert result.members == tuple(member.name for member in members)
            assert result.missing == ()
            assert result.disagreement < TOLERANCE * result.before

    run(scenario())


def test_random_graphs_use_chebyshev():
    """Many distinct eigenvalues: the factors of the interval take fewer rounds."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 16, kind="erdos_renyi", blocks=1)
        results = await agreed(members)
        assert {result.kind for result in results} == {"chebyshev"}
        assert all(result.complete for result in results)
        check_agreement(members, [0])

    run(scenario())


def leave_at(network, member, rounds, *, politely=False):
    """The node dies, or is told to stop, after so many rounds on its first block."""
    closing = []

    def watch(block, done):
        if (block, done) == (0, rounds):
            if not politely:
                network.kill(member.transport.address)
            member.stopping.set()
            member.exchange.wake()
            closing.append(asyncio.create_task(member.swarm.close()))

    member.on_round = watch


@pytest.mark.parametrize("politely", [False, True])
@pytest.mark.parametrize("rounds", range(1, 11))
def test_a_peer_that_drops_out_leaves_the_others_agreed(rounds, politely):
    """Whenever it happens the others end within tolerance and know who is missing."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 8)
        leave_at(network, members[3], rounds, politely=politely)
        results = await agreed(members)
        living = [member for member in members if member.index != 3]
        for member in living:
            result = results[member.index]
            assert result.complete
            assert result.missing == ("n03",)
            assert result.members == tuple(each.name for each in living)
            assert member.results[0].kind == ("plain" if rounds < 4 else "exact")
        for block in range(2):
            before = spread([member.start[block] for member in members])
            assert spread([member.blocks[block] for member in living]) <= TOLERANCE * before
        if rounds < 4:  # the living went back: their mean is that of what they began with
            check_agreement(living, [0])
        gone = results[3]
        assert not gone.complete
        if rounds < 9:  # no verdict yet: what it keeps is what it had
            assert torch.equal(members[3].blocks[0], members[3].start[0])
        assert torch.equal(members[3].blocks[1], members[3].start[1])

    run(scenario())


def test_losing_everybody_gives_the_block_back():
    """A node whose neighbours all die keeps no half-way state."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 5)
        for member in members[1:]:
            leave_at(network, member, 1)
        results = await agreed(members)
        assert not results[0].complete
        assert results[0].members == ("n00",)
        for block in range(2):
            assert torch.equal(members[0].blocks[block], members[0].start[block])

    run(scenario())


def test_other_views_of_the_members_fall_back_to_plain_gossip():
    """Two nodes that do not see a third mix as the edges allow, and all still agree."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 8)
        for member in members[:2]:
            member.view = lambda member=member: member.swarm.members(0) - {"n05"}
        results = await agreed(members)
        check_agreement(members, range(2))
        assert all(result.complete and result.kind == "plain" for result in results)

    run(scenario())


@pytest.mark.parametrize(("seed", "share"), [*((s, 0.01) for s in range(6)), (6, 0.05), (7, 0.05)])
def test_lost_blocks_cost_rounds_and_no_agreement(seed, share):
    """Single contributions that fail on the way: plain rounds make up for them."""

    async def scenario():
        network = LoopbackNetwork()

        def fault(call, index, message):
            where = f"{seed}/{call.source}/{call.target}/{getattr(call.request, 'serial', '')}"
            # By place, not by turn: in which order nodes are called is nobody's promise.
            if call.method == "Pull" and random.Random(where).random() < share:
                raise PeerUnavailable("cut")
            return message

        members = await meet(network, 8)
        network.fault = fault
        results = await agreed(members)
        assert all(result.complete and not result.missing for result in results)
        for block in range(2):
            before = spread([member.start[block] for member in members])
            assert spread([member.blocks[block] for member in members]) <= TOLERANCE * before

    run(scenario())


def test_a_last_word_that_is_lost_costs_nobody_its_agreement():
    """Who did not hear that the others are done finds them gone, and knows what that means."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 8, blocks=1)
        last = 3 * 500 + 4 + 4 + 2 - 1  # of the fourth visit

        def fault(call, index, message):
            ours = call.source == members[0].transport.address
            if call.method == "Pull" and ours and call.request.serial == last:
                raise PeerUnavailable("cut")
            return message

        network.fault = fault
        results = await agreed(members)
        assert all(result.complete and not result.missing for result in results)
        assert results[0].rounds == results[4].rounds + 1

    run(scenario())


def test_a_late_finisher_is_waited_for():
    """One still trains for most of the visit deadline: nobody begins without it."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 8)
        late = members[3]
        late.phase, late.visit = Phase.TRAINING, late.schedule.visits - 1
        late.swarm.nudge()

        async def come():
            await asyncio.sleep(0.75 * TIMING.visit_deadline)
            late.phase, late.visit = Phase.AGREEING, late.schedule.visits
            late.swarm.nudge()
            return await late.agree()

        others = [member.agree() for member in members if member is not late]
        results = await asyncio.gather(come(), *others)
        assert all(result.complete and not result.missing for result in results)
        assert all(result.kind == "exact" for result in results)
        check_agreement(members, range(2))

    run(scenario())


@pytest.mark.parametrize("passage", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.1, 1.5])
def test_a_slow_neighbour_is_waited_for_in_every_round(share, passage):
    """Up to the step deadline: over a block that is more than a visit's budget, and all agree.

    Who is slower than that is left out and named, and not those who waited for it as long.
    """

    async def scenario():
        network = LoopbackNetwork()
        network.passage = lambda _call, _nbytes: passage
        members = await meet(network, 12, blocks=1)
        pull = members[3].pull

        async def slowly(request):
            await asyncio.sleep(share * TIMING.step_deadline)
            async for message in pull(request):
                yield message

        members[3].pull = slowly
        results = await agreed(members)
        if share < 1:
            assert all(result.complete and not result.missing for result in results)
            assert all(result.kind == "exact" for result in results)
            check_agreement(members, [0])
        else:
            others = [result for result in results if result is not results[3]]
            assert all(result.complete and result.missing == ("n03",) for result in others)
            assert not results[3].complete
            assert torch.equal(members[3].blocks[0], members[3].start[0])

    run(scenario())


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.2, 2.0, 20.0])
@pytest.mark.parametrize("rounds", [2, 5, 9])
def test_one_started_again_in_the_agreement_hangs_nobody(rounds, pause):
    """It finds the blocks under way closed; the others agree, and all come to an end."""

    async def scenario():
        network = LoopbackNetwork()
        members = await meet(network, 8, blocks=6)
        died = asyncio.Event()

        def watch(block, done):
            if (block, done) == (1, rounds):
                network.kill(members[3].transport.address)
                members[3].stopping.set()
                members[3].exchange.wake()
                died.set()

        members[3].on_round = watch

        async def again():
            await died.wait()
            await members[3].swarm.close()
            await asyncio.sleep(pause)
            member = Member(network, 3, blocks=6, session=999)
            await member.transport.listen(member, None)
            for other in members:
                member.swarm.propose(other.transport.address)
            return await member.agree()

        late, *results = await asyncio.gather(again(), *(m.agree() for m in members))
        # Killed in a block's last round and back within a second, before the next block begins, it
        # took part in every block as far as the others can tell; it knows itself that it did not.
        unnoticed = rounds == 9 and pause < 1
        for index in {*range(8)} - {3}:
            assert results[index].complete
            if not unnoticed:
                assert "n03" in results[index].missing
                assert len(results[index].members) == 7
        assert not late.complete
        living = [member for member in members if member.index != 3]
        for block in range(6):
            before = spread([member.start[block] for member in members])
            assert spread([member.blocks[block] for member in living]) <= TOLERANCE * before
        assert asyncio.get_running_loop().time() < 10 * TIMING.visit_deadline

    run(scenario())


def test_rounds_that_run_out_are_said_and_kept():
    """Too few rounds for the tolerance: not complete, but nearer than before."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 16, blocks=1, tolerance=1e-6, max_rounds=14)
        results = await agreed(members)
        assert not any(result.complete for result in results)
        assert all(result.rounds == 14 for result in results)
        before = spread([member.start[0] for member in members])
        assert spread([member.blocks[0] for member in members]) < 0.5 * before

    run(scenario())


def test_nodes_that_agree_already_do_so_again():
    """Equal blocks stay equal: rounding is not taken for disagreement."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 4, blocks=1)
        for member in members:
            member.blocks[0] = members[0].start[0] + 1e-8 * member.blocks[0]
        results = await agreed(members)
        assert all(result.complete for result in results)

    run(scenario())


def test_nobody_agrees_alone():
    """Without any neighbour nothing is complete, and nothing changes."""

    async def scenario():
        (member,) = await meet(LoopbackNetwork(), 1)
        (result,) = await agreed([member])
        assert (result.kind, result.complete, result.members) == ("alone", False, ("n00",))
        assert torch.equal(member.blocks[0], member.start[0])

    run(scenario())


@pytest.mark.parametrize(
    "note", ["", "[]", "\ud800", '{"plain": 1}', "x" * (MAX_NOTE_BYTES + 1), None]
)
def test_a_note_that_is_none_is_refused(note):
    """What does not parse or is too long ends the neighbour's contribution, counted by reason."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 2)
        await asyncio.gather(
            *(m.exchange.open_visit(3, 500, frozenset({o.name}), 1500) for m, o in pairs(members))
        )
        about = metadata("run", "n01", 1500, note)
        members[1].exchange.publish(snapshot(members[1].blocks[0], LAYOUT, 1500, about))
        own = snapshot(members[0].blocks[0], LAYOUT, 1500, metadata("run", "n00", 1500, "{}"))
        intake = _Intake(None, own, members[0].blocks[0])
        report = await members[0].exchange.gather(1500, LAYOUT, hear=intake.hear)
        assert report.missing == {"n01": "header"}
        assert torch.equal(members[0].blocks[0], members[0].start[0])

    def pairs(members):
        return zip(members, reversed(members), strict=True)

    run(scenario())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_models_end_with_the_same_layers(dtype, tmp_path):
    """With real models: every block of the one is that of the other, and the rest is untouched.

    In bf16 up to a unit in the last place, since what is nearly equal may be a tie.
    """
    torch.manual_seed(7)
    folder = make_model(tmp_path / "model", "llama")
    models = [
        LanguageModel.load(ModelSettings(path=folder, dtype=dtype), torch.device("cpu"))
        for _ in range(8)
    ]
    layers = [range(low, low + 2) for low in (0, 2)]
    with torch.no_grad():
        for model, block in itertools.product(models, layers):
            for tensor in model.block_tensors(block).values():
                tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype), alpha=0.01)
    head = models[0].module.get_input_embeddings().weight.clone()

    async def scenario():
        members = await meet(LoopbackNetwork(), 8)
        for member, model in zip(members, models, strict=True):
            member.schedule = Schedule(layers, 1, 4, "descending", 0)
            member.activate, member.release = model.activate, model.release
        assert all(result.complete for result in await agreed(members))

    run(scenario())
    for block, (one, other) in itertools.product(layers, itertools.combinations(models, 2)):
        theirs = other.block_tensors(block)
        for name, tensor in one.block_tensors(block).items():
            mine, its = tensor.float(), theirs[name].float()
            # What is left in fp32 is less; of tiny numbers it is more than their last place.
            allowed = torch.full_like(mine, 1e-6)
            if dtype == "bf16":
                _, exponent = torch.frexp(torch.maximum(mine.abs(), its.abs()))
                allowed = torch.maximum(allowed, torch.ldexp(torch.ones_like(mine), exponent - 8))
            assert bool(((mine - its).abs() <= allowed).all()), name
    assert torch.equal(models[0].module.get_input_embeddings().weight, head)
    assert not any(p.requires_grad for p in models[0].module.parameters())


@pytest.mark.parametrize("value", [1e17, 3e38])
def test_a_neighbour_with_huge_values_ends_nobody(value):
    """Squares of 1e17 overflow float32, and differences to 3e38 themselves; all come to an end."""

    async def scenario():
        members = await meet(LoopbackNetwork(), 4, blocks=1, max_rounds=12)
        members[1].blocks[0].fill_(value)
        members[1].blocks[0][1::2].neg_()
        results = await agreed(members)
        assert len(results) == 4
        assert all(math.isfinite(result.disagreement) for result in results)
        assert all(math.isfinite(result.before) for result in results)

    run(scenario())


def test_the_norm_of_a_block_needs_no_float64_of_its_device():
    """MPS; on the CPU it is torch's own to the last bit."""
    values = 1e30 * torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    assert _norm(values) == exact
    assert _norm(values.as_subclass(Mps)) == pytest.approx(exact, rel=1e-12)
