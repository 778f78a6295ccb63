"""A real daemon whose only neighbour is hostile: everything is refused, counted, survived."""

import asyncio
import json
import uuid

import grpc
import pytest
import torch

from deca_node.errors import PeerError
from deca_node.limits import MAX_MESSAGE_BYTES
from deca_node.pb import node_pb2 as pb
from deca_node.transport.server import GrpcTransport
from deca_node.wire import Layout, TensorSpec, frame, metadata, parse, snapshot
from tests.cluster.daemons import Daemon
from tests.tiny import make_model

STEPS = 8


class Evil:
    """Speaks the protocol well enough to become a neighbour, then sends what it likes."""

    def __init__(self, run, target):
        self.run, self.target = run, target
        self.transport = GrpcTransport("127.0.0.1", 0)
        self.session = 666
        self.marks = []
        self.link = self.transport.link(target)
        self.offers = set()
        self.port = 0
        self.good = []

    @property
    def sender(self):
        return pb.Sender(run=self.run, node="evil", session=self.session)

    def greeting(self):
        return pb.HelloRequest(
            sender=self.sender,
            protocol=1,
            fingerprint=self.marks,
            port=self.port,
            phase=pb.PHASE_TRAINING,
        )

    async def join(self):
        self.port = await self.transport.listen(self, None)
        refused = await self.link.hello(self.greeting(), 5)
        assert refused.refusal.startswith("settings_differ")
        self.marks = refused.fingerprint  # a fingerprint keeps accidents out, not attackers
        assert (await self.link.hello(self.greeting(), 5)).refusal == ""

    async def hello(self, request, source):
        return pb.HelloReply(
            sender=self.sender, protocol=1, fingerprint=self.marks, phase=pb.PHASE_TRAINING
        )

    async def open_visit(self, request):
        if request.visit not in self.offers:
            self.offers.add(request.visit)
            offer = pb.VisitOffer(sender=self.sender, visit=request.visit)
            self.background = asyncio.create_task(self.link.open_visit(offer, 5))
        return pb.VisitAnswer(verdict=pb.VisitAnswer.VERDICT_ACCEPTED)

    async def settle_visit(self, request):
        degree = pb.VisitDegree(sender=self.sender, visit=request.visit, degree=1)
        self.telling = asyncio.create_task(self.link.settle_visit(degree, 5))
        return pb.VisitAnswer(verdict=pb.VisitAnswer.VERDICT_ACCEPTED)

    async def list_blocks(self, request):
        return pb.BlockList(visit=10**15)

    async def fetch_block(self, request):
        yield b"\xff" * 100

    async def goodbye(self, request):
        return pb.GoodbyeReply()

    async def pull(self, request):
        """A different crime each step, told apart by the step's number."""
        serial = request.serial
        real = [
            m async for m in self.link.pull(pb.PullRequest(sender=self.sender, serial=serial), 30)
        ]
        mine = [m.replace(b'"node":"good"', b'"node":"evil"') for m in real]
        header = frame(serial, 0, parse(mine[0]).data)
        body = parse(mine[1])
        crimes = {
            0: [b"\xff" * 100],
            1: [header, mine[1][:-1] + bytes([mine[1][-1] ^ 1])],
            2: [header, frame(serial, body.offset, b"\xff" * len(body.data))],
            3: [header, frame(serial + 1, body.offset, body.data)],
            4: [real[0]],
            5: [self.wrong_shape(serial)],
            6: [header, *mine[1:], frame(serial, body.offset + len(body.data), b"\0" * 4)],
            7: [b"\0" * (MAX_MESSAGE_BYTES + 1)],
        }
        for message in crimes[serial % STEPS]:
            yield message

    def wrong_shape(self, serial):
        layout = Layout((TensorSpec("w", (3,)),))
        about = metadata(self.run, "evil", serial)
        return snapshot(torch.zeros(3), layout, serial, about).messages[0]


@pytest.fixture
def daemon(tmp_path):
    model = make_model(tmp_path / "model", "llama", layers=2)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{i}", "label": "ab"[i % 2]}) + "\n" for i in range(9))
    )
    run = f"hostile-{uuid.uuid4().hex[:8]}"
    settings = [
        f"run.name={run}",
        "run.start_when=2",
        f"model.path={model}",
        "model.dtype=fp32",
        f"data.train={data}",
        "network.zeroconf=false",
        f"schedule.steps={STEPS}",
        "schedule.rounds=1",
        "schedule.layers_per_block=2",
    ]
    daemon = Daemon(tmp_path, "good", settings).start()
    yield daemon
    daemon.end(9)


async def test_every_crime_is_counted_and_the_run_ends_well(daemon):
    """The daemon trains to its end, alone in effect, and says why it refused what."""
    status = await asyncio.to_thread(daemon.until, lambda s: s.waiting_for.startswith("1 of 2"))
    evil = Evil(status.run, status.address)
    # Strangers first: wrong run, no greeting, nonsense on the wire.
    for sender in (
        pb.Sender(run="other", node="x", session=1),
        pb.Sender(run=status.run, node="x", session=1),
        pb.Sender(run=status.run, node="\n" * 3000, session=1),
    ):
        with pytest.raises(PeerError):
            await evil.link.open_visit(pb.VisitOffer(sender=sender), 5)
    reply = await evil.link.hello(
        pb.HelloRequest(sender=pb.Sender(run="other", node="x"), port=9), 5
    )
    assert reply.refusal.startswith("other_run")
    reply = await evil.link.hello(
        pb.HelloRequest(sender=pb.Sender(run=status.run, node="x"), port=9, host="h" * 200_000), 5
    )
    assert reply.refusal.startswith("bad_address")
    async with grpc.aio.insecure_channel(status.address) as channel:
        for path in ("/deca.v1.Peer/Hello", "/deca.v1.Peer/Pull", "/deca.v1.Peer/Nothing"):
            call = channel.unary_unary(path)
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"\xff\xff\xff\xff", timeout=5)
    await evil.join()
    seen = {}

    async def watch():
        async for status in evil.link.watch_status(0.1):
            seen.update(status.refusals)

    watching = asyncio.create_task(watch())
    code = await asyncio.to_thread(daemon.wait)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await evil.transport.close(0)
    assert code == 0, daemon.log.read_text()[-3000:]
    history = daemon.history()
    assert len(history) == STEPS
    reasons = [row["missing"].get("evil") for row in history]
    assert reasons == [
        "malformed",
        "checksum",
        "not_finite",
        "wrong_step",
        "header",
        "shape",
        None,  # more than a block: what is whole was taken, the rest never read
        "too_long",
    ]
    assert history[6]["neighbours"] == ["evil"]
    assert {
        "other_run",
        "stranger",
        "bad_address",
        "settings_differ",
        "malformed",
        "checksum",
    } <= set(seen)
    losses = [row["loss"] for row in history]
    assert all(loss is not None for loss in losses)
