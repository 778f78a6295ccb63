"""What an exchange takes of real memory: in a process of its own, neighbours in another one."""

import asyncio
import functools
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import structlog
import torch
from torch import nn

from deca_node import memory
from deca_node.blocks import Visit
from deca_node.config import Timing
from deca_node.exchange import Exchange
from deca_node.limits import CHUNK_BYTES, STREAM_WINDOW_BYTES
from deca_node.membership import Phase
from deca_node.methods.deca import Deca
from deca_node.models import ActiveBlock
from deca_node.moments import Rule
from deca_node.pb import node_pb2 as pb
from deca_node.swarm import Identity, Position, Swarm
from deca_node.transport.server import GrpcTransport
from deca_node.wire import metadata, snapshot
from tests.answers import Answers

BLOCK_BYTES = 96 << 20
STEPS = 3
# What a neighbour may add: its stream's window, and three messages: the one being checked, the
# next one, one being sent.
NEIGHBOUR_BYTES = STREAM_WINDOW_BYTES + 3 * CHUNK_BYTES
# What gRPC and Python add: 12 to 30 MiB, by how their threads happen to meet and where the heap has
# room. Less than half a block, so that a second copy would show.
LITTLE = 40 << 20
QUIET = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(50))


class OneTensor:
    """Stands for a model whose only block is one vector."""

    def __init__(self):
        values = torch.ones(BLOCK_BYTES // 4)
        self._parameters = {"w": nn.Parameter(values, requires_grad=False)}

    def activate(self, layers):
        return ActiveBlock(self._parameters, torch.device("cpu"))

    def backward(self):
        """A gradient that takes no memory, so that freeing it hides no other copy."""
        [parameter] = self._parameters.values()
        parameter.grad = torch.ones(1).expand_as(parameter)

    def release(self):
        pass


class Side(Answers):
    """Swarm and exchange of one node on a real port."""

    def __init__(self, name):
        self.name = name
        self.stopping = asyncio.Event()
        self.transport = GrpcTransport("127.0.0.1", 0)

    async def listen(self):
        port = await self.transport.listen(self, None)
        timing = Timing.local()
        self.swarm = Swarm(
            Identity("run", self.name, 1 + int(self.name[1:]), {"seed": "0"}, port=port),
            self.transport,
            timing,
            lambda: Position(Phase.TRAINING, 0),
            100,
            lambda: self.exchange.wake(),  # noqa: PLW0108 - made below
            QUIET,
        )
        self.exchange = Exchange(self.swarm, timing, "run", self.stopping)
        return f"127.0.0.1:{port}"

    async def list_blocks(self, request):
        return pb.BlockList()

    async def fetch_block(self, request):
        yield b""

    async def meet(self, addresses, wanted):
        for address in addresses:
            self.swarm.propose(address)
        while not wanted <= self.swarm.members(0):
            await self.exchange.changed()
        edges = await self.exchange.open_visit(0, 100, wanted, 0)
        assert edges.weights.keys() == wanted


def resident(what):
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(what)]
    return 1024 * int(line.split()[1])


def forget_peak():
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def nowhere(peer):
    """What comes is checked, and mixed into nothing."""
    return lambda *_: None


async def neighbours(pipe, count):
    """Give and take the same block at each step, and keep nothing."""
    sides = [Side(f"n{1 + index}") for index in range(count)]
    pipe.send([await side.listen() for side in sides])
    address = await asyncio.to_thread(pipe.recv)
    await asyncio.gather(*(side.meet([address], {"n0"}) for side in sides))
    method = Deca(OneTensor(), Rule(1e-4), "run", "n1")
    method.open(Visit(0, 0, 0, 0, range(1)), None)
    for step in range(STEPS):
        for side in sides:
            await side.exchange.make_room()
            about = metadata("run", side.name, step)
            side.exchange.publish(snapshot(method.state()["x"], method.layout, step, about))
        reports = await asyncio.gather(
            *(side.exchange.gather(step, method.layout, nowhere) for side in sides)
        )
        assert all(report.complete for report in reports)
    await asyncio.gather(*(side.exchange.drain() for side in sides))


async def node(pipe, count, early):
    """A node's updates and exchanges, as rounds.py has them; tells how far its memory went up.

    ``early``: the block is on its way while it is still being updated.
    """
    side = Side("n0")
    address = await side.listen()
    addresses = await asyncio.to_thread(pipe.recv)
    pipe.send(address)
    await side.meet(addresses, {f"n{1 + index}" for index in range(count)})
    model = OneTensor()
    method = Deca(model, Rule(1e-4), "run", "n0")
    method.open(Visit(0, 0, 0, 0, range(1)), None)
    method.settle(0)  # all of x, m and v has been touched
    forget_peak()
    before = resident("VmRSS")
    for step in range(STEPS):
        model.backward()
        update = functools.partial(method.advance, step)
        if early:
            assert side.exchange.early
            made = method.promise(step)
            await side.exchange.make_room()
        else:
            await asyncio.to_thread(update)
            await side.exchange.make_room()
            made = await asyncio.to_thread(functools.partial(method.outgoing, step))
        side.exchange.publish(made)
        del made
        busy = asyncio.ensure_future(asyncio.to_thread(update)) if early else None
        report = await side.exchange.gather(step, method.layout, intake=method.intake, busy=busy)
        assert report.complete
        method.settle(step)
    await side.exchange.drain()
    return resident("VmHWM") - before


def run_part(part, other, result, *arguments):
    memory.tune()
    torch.set_num_threads(1)
    result.send(asyncio.run(part(other, *arguments)))
    os._exit(0)


def growth(count, early):
    """Bytes by which a node's memory goes up over some steps with so many neighbours."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ends = []
    for part, other, *arguments in ((node, ours, count, early), (neighbours, theirs, count)):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=run_part, args=(part, other, writer, *arguments))
        process.start()
        writer.close()
        ends.append((process, reader))
    try:
        return ends[0][1].recv()
    finally:
        for process, _ in ends:
            process.kill()
            process.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_exchange_takes_one_copy_of_the_block_whatever_the_number_of_neighbours():
    """In bytes of the process; each further neighbour adds no more than its window."""
    cases = [(1, False), (2, False), (4, False), (4, True)]
    grown = {case: growth(*case) for case in cases}
    for (count, _), more in grown.items():
        assert BLOCK_BYTES < more < BLOCK_BYTES + count * NEIGHBOUR_BYTES + LITTLE, grown
