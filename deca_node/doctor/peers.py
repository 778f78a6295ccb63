"""Whether the node's ports are free, and whom it would meet."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import Any, NoReturn

import structlog
from google.protobuf.message import Message

from deca_node import __version__, access, health
from deca_node.addresses import as_called_here, joined
from deca_node.config import Settings, Timing
from deca_node.doctor.checks import Check, Facts, Verdict, failed
from deca_node.doctor.network import ASK_SECONDS, running
from deca_node.errors import ListenError, PeerError, PeerRefused, TrustError, UnreachableError
from deca_node.membership import Peer, Phase, State
from deca_node.pb import node_pb2 as pb
from deca_node.prometheus import Endpoint, Measurements
from deca_node.search import Search
from deca_node.swarm import Identity, Position, Swarm
from deca_node.transport.client import ask_status
from deca_node.transport.server import GrpcTransport
from deca_node.waiting import happens

CLOSE_GRACE_SECONDS = 0.5


class _Desk:
    """Answers greetings and nothing else; remembers who called."""

    def __init__(self) -> None:
        self.callers: set[str] = set()
        self.swarm: Swarm | None = None

    async def hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """See transport.Handler."""
        if self.swarm is None:
            self._refuse(request)
        reply = await self.swarm.answer_hello(request, source)
        if not reply.refusal:
            self.callers.add(request.sender.node)
        return reply

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """See transport.Handler."""
        if self.swarm is not None:
            self.swarm.answer_goodbye(request)
        return pb.GoodbyeReply()

    async def open_visit(self, request: pb.VisitOffer) -> pb.VisitAnswer:
        """See transport.Handler."""
        self._refuse(request)

    async def settle_visit(self, request: pb.VisitDegree) -> pb.VisitAnswer:
        """See transport.Handler."""
        self._refuse(request)

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[bytes]:
        """See transport.Handler."""
        self._refuse(request)
        yield b""  # makes it a generator

    async def list_blocks(self, request: pb.ListBlocksRequest) -> pb.BlockList:
        """See transport.Handler."""
        self._refuse(request)

    async def fetch_block(self, request: pb.FetchBlockRequest) -> AsyncGenerator[bytes]:
        """See transport.Handler."""
        self._refuse(request)
        yield b""

    def _refuse(self, request: Message) -> NoReturn:
        del request
        raise PeerRefused("starting", "deca-node doctor is looking around")


def _drop(*_: Any) -> NoReturn:
    raise structlog.DropEvent


async def meet(facts: Facts, patience: float | None) -> list[Check]:
    """Listen as the node would, greet whoever can be found, and see who greets back."""
    settings, desk = facts.settings, _Desk()
    transport = GrpcTransport(settings.node.host, settings.node.port, facts.guard)
    try:
        port = await transport.listen(desk, None)
    except ListenError as error:
        return await _occupied(settings, desk, error)
    identity = Identity(
        settings.run.name,
        settings.node.name,
        secrets.randbits(63) | 1,
        facts.marks(),
        host=settings.node.advertise or "",
        port=port,
    )
    # Quick greetings, as there is somebody waiting for the result.
    timing = replace(settings.timing(), heartbeat=1.0, redial=0.5)
    changed = asyncio.Event()
    quiet = structlog.wrap_logger(None, processors=[_drop])  # the result says it all
    swarm = desk.swarm = Swarm(
        identity,
        transport,
        timing,
        lambda: Position(Phase.STARTING, 0),
        settings.schedule.steps,
        changed.set,
        quiet,
    )
    search = Search(settings, timing, port, swarm)
    checks = [
        Check("port", Verdict.OK, f"{settings.node.host}:{port} is free")
        if settings.node.port
        else Check("port", Verdict.OK, f"a free one is taken at each start, such as {port}")
    ]
    try:
        checks += await _other_ports(settings, desk)
        try:
            await search.start()
        except ListenError as error:
            checks.append(failed("zeroconf", error))
        limit = _call_back_seconds(settings.timing()) if patience is None else patience
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while not _complete(swarm, desk.callers, settings):
                    changed.clear()
                    await happens(changed, 0.1)
        checks += _judge(swarm, desk.callers, facts, port, limit)
        checks += [
            Check(
                "peers",
                Verdict.WARN,
                f"{name} has no address: {reason}",
                "correct network.dns_peers, or repair the name server or the service of that name",
            )
            for name, reason in sorted(search.named.failing.items())
        ]
        await swarm.goodbye(finished=False)
    finally:
        await search.stop()
        await swarm.close()
        await transport.close(CLOSE_GRACE_SECONDS)
    return checks


def _call_back_seconds(timing: Timing) -> float:
    """The longest pause, jitter included, before a peer that knew this address calls it again."""
    return timing.redial_max * 1.25 + 1


def _complete(swarm: Swarm, callers: set[str], settings: Settings) -> bool:
    """Whether there is nothing left to wait for."""
    peers = swarm.peers.values()
    static = settings.network.static_peers
    return (
        len(peers) >= settings.run.start_when - 1
        and all(p.state == State.REFUSED or (p.reached and p.name in callers) for p in peers)
        and not swarm.never_answered(static)
        and (len(peers) > 0 or not static)
    )


async def _other_ports(settings: Settings, desk: _Desk) -> list[Check]:
    """Whether those for health and metrics are free, beside node.port and each other."""
    node, metrics = settings.node, settings.metrics
    checks = []
    healthy = GrpcTransport(node.host, 0, health_port=node.health_port)
    try:
        if node.health_port is not None:
            try:
                await healthy.listen(desk, None)
                checks.append(_free("node.health_port", node.host, node.health_port))
            except ListenError as error:
                checks.append(failed("port", error))
        if metrics.port is not None:
            try:
                endpoint = Endpoint(metrics.host, metrics.port, Measurements(lambda: None))
                await asyncio.to_thread(endpoint.close)
                checks.append(_free("metrics.port", metrics.host, endpoint.port))
            except ListenError as error:
                checks.append(failed("port", error))
    finally:
        await healthy.close(CLOSE_GRACE_SECONDS)
    return checks


def _free(setting: str, host: str, port: int) -> Check:
    return Check("port", Verdict.OK, f"{joined(host, port)} is free, for {setting}")


async def _occupied(settings: Settings, desk: _Desk, error: ListenError) -> list[Check]:
    """Who has the port?"""
    node = settings.node
    there = joined(as_called_here(node.host), node.port)
    try:
        shown = await access.credentials([there])
        now = await ask_status(there, ASK_SECONDS, shown.get(there))
    except (PeerError, TrustError, UnreachableError):
        bad = failed("port", error)
    else:
        if (now.run, now.node) == (settings.run.name, node.name):
            return list(running(now))
        bad = Check(
            "port",
            Verdict.FAIL,
            f"port {node.port} is taken by node {now.node!r} of run {now.run!r}, pid {now.pid}",
            "set node.port (0 takes a free one)",
        )
    return [bad, *await _other_ports(settings, desk)]


def _judge(
    swarm: Swarm, callers: set[str], facts: Facts, port: int, waited: float
) -> Iterable[Check]:
    settings = facts.settings
    met = list(swarm.peers.values())  # who has left meanwhile was there, too
    for peer in sorted(met, key=lambda peer: peer.name):
        yield _peer(peer, peer.name in callers, facts, port, waited)
    for address, refusal in swarm.refusals.last.items():
        if refusal.reason == "name_taken":
            yield Check(
                "name",
                Verdict.FAIL,
                f"a node called {settings.node.name} is running already, says {refusal.node} at "
                f"{address}",
                "give this one another node.name, unless it is this very node",
            )
        elif refusal.reason != "other_run" or address in settings.network.static_peers:
            yield Check("peer", Verdict.FAIL, f"{refusal.node} at {address}: {refusal.detail}")
    for address in sorted(swarm.never_answered(settings.network.static_peers)):
        yield Check(
            "peer",
            Verdict.WARN,
            f"static peer {address} does not answer",
            "start the node there, open its port, or correct network.static_peers",
        )
    if not met and settings.run.start_when > 1:
        yield Check(
            "peers",
            Verdict.WARN,
            f"nobody else of run {settings.run.name} was found in {waited:.0f} s; "
            f"{settings.run.start_when} members are wanted",
            "start the others, then look again; across networks set network.static_peers",
        )
    view = health.View(
        name=settings.node.name,
        run=settings.run.name,
        port=port,
        phase=Phase.STARTING,
        wanted=settings.run.start_when,
        now=asyncio.get_running_loop().time(),
        looking=0.0,
        peers=met,
        told=swarm.told,
        version=__version__,
    )
    for finding in health.diagnose(view):
        kind = finding.key.partition(":")[0]
        if kind in ("clock", "version"):
            found, _, remedy = finding.text.partition("; ")
            yield Check(kind, Verdict.WARN, found, remedy)


def _peer(peer: Peer, called: bool, facts: Facts, port: int, waited: float) -> Check:
    found = f"{peer.name} at {peer.address}: "
    if peer.state == State.REFUSED:
        return Check("peer", Verdict.FAIL, found + peer.detail, "make them equal, here or there")
    if not peer.reached:
        return Check(
            "peer",
            Verdict.FAIL,
            f"{found}calls this node, but does not answer there",
            "open that port in the firewall there, or set node.advertise there",
        )
    if not called:
        return Check(
            "peer",
            Verdict.FAIL,
            f"{found}answers, but has not called back in {waited:.0f} s",
            f"open port {port}/tcp in the firewall here, or set node.advertise to an address "
            "that others can call",
        )
    compared = {f"model.{name}" for name in ("config", "dtype", "tokenizer", "weights")}
    unknown = sorted(compared - facts.marks().keys())
    same = "same settings and model"
    if unknown:
        same = f"same settings; {', '.join(unknown)} not compared"
    return Check(
        "peer",
        Verdict.OK,
        f"{found}reachable both ways, {same}",
        "--full reads the weights and compares them" if "model.weights" in unknown else "",
    )
