"""Checks before a run: would this node start, fit, and meet its peers?

Nothing is written to the output folder, and a running swarm is not disturbed: the checker meets
peers as a node that is still starting, which nobody counts as a member, and takes its leave.
"""

import asyncio
import contextlib
import datetime as dt
import json
import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import psutil
import structlog
import torch
from google.protobuf.message import Message
from rich.table import Table
from rich.text import Text

from deca_node import __version__, access, estimate, health, registry, status
from deca_node.blocks import Schedule
from deca_node.compression import Format
from deca_node.config import Settings, Timing, is_loopback
from deca_node.data import Example, examples, label_counts, label_token_ids, label_words, read_rows
from deca_node.discovery import Discovery, loops_back, multicast_addresses, own_addresses
from deca_node.dns import NamedPeers
from deca_node.errors import (
    ConfigError,
    DecaError,
    ListenError,
    PeerError,
    PeerRefused,
    TrustError,
    UnreachableError,
)
from deca_node.fingerprint import PROTOCOL_VERSION, fingerprint, schedule_for
from deca_node.guard import Guard
from deca_node.keyring import Keyring
from deca_node.membership import Peer, Phase, State
from deca_node.methods.choose import added, kept_arrivals, state_bytes
from deca_node.models import LanguageModel, Outline, outline, pick_device, pick_dtype
from deca_node.pb import node_pb2 as pb
from deca_node.swarm import Identity, Position, Swarm
from deca_node.transport.client import ask_status
from deca_node.transport.server import GrpcTransport
from deca_node.waiting import happens

# Up to this size the weights are read for their digest without being asked for: some seconds.
QUICK_BYTES = 2 << 30
# Above this share of what is free a run is likely to meet another program's needs.
TIGHT = 0.8
ASK_SECONDS = 3.0
CLOSE_GRACE_SECONDS = 0.5


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what to do about it where something is to be done."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass
class Facts:
    """What the checks so far have found out about this machine's part of the run.

    Attributes:
        settings: the node's.
        device: where it would compute.
        model: its model, without the weights.
        weights: their digest, where it was computed.
        longest: tokens of the longest example.
        trained: trained tokens of an example, at most.
        added: parameters of the adapters that are trained, None without any.
        running: the status of the very node, where it runs on this machine.
        guard: whom it would believe, where it meets others under TLS.
    """

    settings: Settings
    device: torch.device | None = None
    model: Outline | None = None
    weights: str | None = None
    longest: int = 0
    trained: int = 0
    added: int | None = None
    running: pb.NodeStatus | None = None
    guard: Guard | None = None

    @property
    def dtype(self) -> str | None:
        """Precision of the frozen weights."""
        return pick_dtype(self.settings.model.dtype, self.device) if self.device else None

    @property
    def schedule(self) -> Schedule | None:
        """Blocks, rounds and steps."""
        if self.model is None:
            return None
        with contextlib.suppress(ConfigError):  # said by the check of the model
            return schedule_for(self.settings, len(self.model.shape.layers))
        return None

    def work(self) -> tuple[estimate.Shape, estimate.Work] | None:
        """What a step does, for the estimates; None where the model cannot be read."""
        if self.model is None or self.schedule is None:
            return None
        data = self.settings.data
        return self.model.shape, estimate.Work(
            blocks=self.schedule.blocks,
            element=4 if self.dtype == "fp32" else 2,
            batch=data.batch_size,
            tokens=self.longest or data.max_tokens,
            trained=self.trained or data.max_tokens,
            checkpointing=self.settings.model.gradient_checkpointing,
            sent=Format.named(self.settings.network.wire_format).value_bytes,
            neighbours=_most_neighbours(self.settings),
            stale=self.settings.schedule.staleness == 1,
            added=self.added,
            state=state_bytes(self.settings),
            kept=kept_arrivals(self.settings, _most_neighbours(self.settings)),
        )

    def marks(self) -> dict[str, str]:
        """The run's fingerprint as far as it is known."""
        marks = fingerprint(
            self.settings,
            self.schedule or Schedule((), 0, 0, "ascending", 0),
            (self.model and self.model.config_digest) or "",
            self.weights or "",
            self.dtype or "",
        )
        if self.schedule is None:
            marks = {name: mark for name, mark in marks.items() if "schedule." not in name}
        return {name: mark for name, mark in marks.items() if mark or "model." not in name}


async def examine(
    settings: Settings,
    *,
    full: bool = False,
    patience: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """All checks, one after the other; none of them ends the others.

    Args:
        settings: the node's.
        full: read the weights, however large, so that peers can compare them.
        patience: seconds to wait for peers; None: as long as theirs may take to call back.
        tell: called with what is being looked at.
    """
    facts = Facts(settings)
    checks = [_settings(facts)]
    tell("this machine's nodes")
    await _find_running(facts)
    for name, look in (
        ("device", _device),
        ("model", _model),
        ("data", _data),
        ("weights", _full_weights if full else _weights),
        ("memory", _memory),
        ("disk", _disk),
        ("trust", _trust),
    ):
        tell(name)
        checks += await asyncio.to_thread(_guarded, name, look, facts)
    tell("multicast")
    checks += await _multicast(facts)
    if facts.running is not None:
        return [*checks, *_running(facts.running)]
    if settings.needs_trust() and facts.guard is None:
        return [*checks, Check("peers", Verdict.WARN, "not looked for without a certificate")]
    tell("port and peers")
    return [*checks, *await _meet(facts, patience)]


def _guarded(name: str, look: Callable[[Facts], Iterable[Check]], facts: Facts) -> list[Check]:
    try:
        return list(look(facts))
    except DecaError as error:
        return [failed(name, error)]


def failed(name: str, error: DecaError) -> Check:
    """A check that ended in an error; by the errors' custom its remedy follows the semicolon."""
    found, _, remedy = " ".join(str(error).split()).partition("; ")
    return Check(name, Verdict.FAIL, found, remedy)


# Settings, model, data


def _settings(facts: Facts) -> Check:
    run, network = facts.settings.run, facts.settings.network
    found = (
        f"node {facts.settings.node.name} of run {run.name}, {run.start_when} members wanted, "
        f"preset {network.preset}"
    )
    named = network.static_peers or network.dns_peers
    if run.start_when > 1 and not network.zeroconf and not named:
        return Check(
            "settings",
            Verdict.WARN,
            f"{found}; it knows no way to find others",
            "set network.zeroconf = true, network.static_peers or network.dns_peers, unless others "
            "name this node",
        )
    return Check("settings", Verdict.OK, found)


def _device(facts: Facts) -> Iterable[Check]:
    facts.device = device = pick_device(facts.settings.node.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = facts.settings.node.threads or torch.get_num_threads()
    about = name or f"{threads} threads of {psutil.cpu_count()} processors"
    yield Check("device", Verdict.OK, f"{device}, {about}, weights in {facts.dtype}")


def _model(facts: Facts) -> Iterable[Check]:
    chosen = facts.settings
    facts.model = found = outline(chosen.model)
    layers, granularity = len(found.shape.layers), chosen.schedule.layers_per_block
    schedule_for(chosen, layers)
    facts.added = added(chosen, found)
    how = f"in blocks of {granularity}" if chosen.run.method == "deca" else "at once"
    if facts.added is not None:
        how = f"with adapters of {facts.added / 1e6:,.2f} million"
    yield Check(
        "model",
        Verdict.OK,
        f"{found.architecture}, {found.shape.parameters / 1e6:,.0f} million parameters, "
        f"{layers} layers {how}",
    )


def _data(facts: Facts) -> Iterable[Check]:
    data = facts.settings.data
    rows = read_rows(data.train)
    if facts.model is None:
        found = f"{len(rows):,} rows; whether they fit the task is not known without the model"
        yield Check("data", Verdict.WARN, found)
        return
    tokenizer = facts.model.tokenizer
    train = examples(rows, data, tokenizer, data.train)
    facts.longest, facts.trained = _sizes(train)
    words = label_words(train, data) if data.task == "classification" else {}
    if words:
        label_token_ids(words, data, tokenizer)
    labels = ", ".join(f"{label} {count}" for label, count in label_counts(train).items())
    found = f"{len(rows):,} rows, {len(train):,} examples of at most {facts.longest} tokens"
    if data.test is not None:
        test = examples(read_rows(data.test), data, tokenizer, data.test, words or None)
        found += f", {len(test):,} to test"
    yield Check("data", Verdict.OK, found + (f"; {labels}" if labels else ""))


def _sizes(found: Sequence[Example]) -> tuple[int, int]:
    return max(len(one.input_ids) for one in found), max(sum(one.completion) for one in found)


def _weights(facts: Facts) -> Iterable[Check]:
    model = facts.model
    if model is None or model.to_convert or model.weight_bytes > QUICK_BYTES:
        return  # what was not compared is told beside the peers
    if _free_memory() > 2 * model.weight_bytes:
        yield from _full_weights(facts)


def _full_weights(facts: Facts) -> Iterable[Check]:
    if facts.model is None or facts.dtype is None:
        return
    chosen = facts.settings.model.model_copy(update={"dtype": facts.dtype})
    model = LanguageModel.load(chosen, torch.device("cpu"))
    facts.weights = model.weights_digest()
    facts.model = replace(facts.model, config_digest=model.config_digest(), to_convert=False)
    yield Check("weights", Verdict.OK, f"readable, digest {facts.weights[:12]}… in {facts.dtype}")


# Trust


def _trust(facts: Facts) -> Iterable[Check]:
    settings = facts.settings
    if not settings.needs_trust():
        if is_loopback(settings.node.host):
            yield Check("trust", Verdict.OK, "plain text, on this machine only")
        else:
            found = "plain text on the network: whoever reaches the port can join the run"
            yield Check("trust", Verdict.WARN, found, "make certificates (docs/securing.md)")
        return
    keyring = Keyring.of_run(settings.trust_folder(), settings.run.name)
    facts.guard = guard = Guard(keyring, settings.node.name, settings.trust.allow)
    ends = dt.datetime.fromtimestamp(guard.ends, dt.UTC).strftime("%Y-%m-%d")
    found = f"{settings.node.name} is certified until {ends}, in {keyring.folder}"
    if guard.revoked:
        found += f"; revoked: {', '.join(sorted(guard.revoked))}"
    if guard.is_renewal_due and not keyring.has_authority:
        remedy = "run a node where the authority's key is, or have this one invited anew"
        yield Check("trust", Verdict.WARN, found, remedy)
    else:
        yield Check("trust", Verdict.OK, found)
    for line in keyring.readable_by_others():
        yield Check("trust", Verdict.WARN, *line.split("; ", 1))


# Memory and disk


def _most_neighbours(settings: Settings) -> int:
    """With how many this node exchanges at most, if the members are those that it waits for."""
    kind, others = settings.topology.kind, max(1, settings.run.start_when - 1)
    if kind == "explicit":
        return sum(settings.node.name in edge for edge in settings.topology.edges)
    return min(2, others) if kind == "ring" else others


def _memory(facts: Facts) -> Iterable[Check]:
    sizes = facts.work()
    if facts.running is not None or sizes is None or facts.device is None:
        return
    need = estimate.memory(*sizes)
    parts = ", ".join(
        f"{name} {status.size(count)}" for name, count in asdict(need).items() if count
    )
    host = need.hosting
    if facts.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(facts.device)
        yield _fits(f"memory of {facts.device}", need.computing, free, parts)
        host += need.weights  # they pass through on their way to the device
        parts = "process, snapshots, references and the weights while they are loaded"
    else:
        host += need.computing
    yield _fits("memory", host, _free_memory(), parts)


def _fits(name: str, need: int, free: int, parts: str) -> Check:
    found = f"about {status.size(need)} needed of {status.size(free)} free ({parts})"
    if need <= TIGHT * free:
        return Check(name, Verdict.OK, found)
    remedy = (
        "lower data.batch_size or data.max_tokens, or set model.gradient_checkpointing = true; on "
        'all nodes alike: schedule.layers_per_block, model.dtype = "bf16"'
    )
    return Check(name, Verdict.WARN if need <= free else Verdict.FAIL, found, remedy)


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's if less."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no limit is the word max
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, max(0, limit - used))
    return free


def _disk(facts: Facts) -> Iterable[Check]:
    output = facts.settings.node.output
    yield from _belongs(output, facts)
    sizes, schedule = facts.work(), facts.schedule
    if sizes is None or schedule is None or facts.model is None:
        return
    need = estimate.disk(*sizes, schedule.total_steps)
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    found = f"state {status.size(need.state)}, model {status.size(need.model)}"
    wanted: dict[Path, tuple[int, str]] = {output: (max(0, need.total - there), found)}
    if facts.model.to_convert:
        size, cache = estimate.converted(facts.model.shape), facts.settings.model.cache
        home, other = _existing(output), _existing(cache)
        if home.stat().st_dev == other.stat().st_dev:
            wanted[output] = (wanted[output][0] + size, f"{found}, converted {status.size(size)}")
        else:
            wanted[cache] = (size, f"converted {status.size(size)}")
    for folder, (size, parts) in wanted.items():
        yield _room(folder, size, parts)


def _belongs(output: Path, facts: Facts) -> Iterable[Check]:
    """Whether the output folder is this run's, or free."""
    mark = output / "run.json"
    try:
        held = json.loads(mark.read_bytes())
        own = {**facts.marks(), "node": facts.settings.node.name}
        other = [name for name in own if held.get(name, own[name]) != own[name]]
    except (FileNotFoundError, NotADirectoryError):
        other = []
    except (OSError, ValueError, AttributeError):
        yield Check(
            "output", Verdict.FAIL, f"{mark}: damaged", "move the folder away or restore it"
        )
        return
    if other:
        yield Check(
            "output",
            Verdict.FAIL,
            f"{output} holds another run: {other[0]} is {held[other[0]]!r} there, "
            f"{own[other[0]]!r} here",
            "set node.output to a new folder",
        )


def _room(folder: Path, need: int, parts: str) -> Check:
    place = _existing(folder)
    if _obstacle(folder) is not None:
        found = f"{_obstacle(folder)} is a file, not a folder"
        return Check("disk", Verdict.FAIL, found, "set node.output elsewhere")
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("disk", Verdict.FAIL, f"{place} is not writable", "set node.output elsewhere")
    free = shutil.disk_usage(place).free
    found = f"{folder}: at most {status.size(need)} to write, {status.size(free)} free ({parts})"
    if need <= TIGHT * free:
        return Check("disk", Verdict.OK, found)
    verdict = Verdict.WARN if need <= free else Verdict.FAIL
    return Check("disk", verdict, found, "free some, or set node.output (or model.cache) elsewhere")


def _existing(path: Path) -> Path:
    """The folder that is there already, of those that lead to ``path``."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _obstacle(path: Path) -> Path | None:
    """What is in the way of a folder at ``path``."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.is_file()), None)


# This machine's network


async def _multicast(facts: Facts) -> list[Check]:
    network = facts.settings.network
    if not network.zeroconf:
        return [Check("multicast", Verdict.OK, "not used: network.zeroconf is off")]
    places = await asyncio.to_thread(multicast_addresses, network.interfaces)
    heard = await asyncio.gather(*(asyncio.to_thread(loops_back, at) for at in places))
    deaf = [at for at, hears in zip(places, heard, strict=True) if not hears]
    if not deaf:
        return [Check("multicast", Verdict.OK, f"goes round on {', '.join(places)}")]
    alone = len(deaf) == len(places)
    named = network.static_peers or network.dns_peers
    needed = alone and not named and facts.settings.run.start_when > 1
    return [
        Check(
            "multicast",
            Verdict.FAIL if needed else Verdict.WARN,
            f"does not come back on {', '.join(deaf)}",
            "allow port 5353/udp there, choose other network.interfaces, or set "
            "network.static_peers",
        )
    ]


async def _find_running(facts: Facts) -> None:
    own = facts.settings
    for entry in registry.local_nodes():
        if (entry.run, entry.node) == (own.run.name, own.node.name):
            with contextlib.suppress(PeerError, TrustError):
                shown = await access.credentials([entry.address])
                facts.running = await ask_status(
                    entry.address, ASK_SECONDS, shown.get(entry.address)
                )


def _running(now: pb.NodeStatus) -> Iterable[Check]:
    """The node is there already: it knows its own peers, and must not be disturbed."""
    about = f"{status.phase(now.phase)} at {now.address}, pid {now.pid}, {now.version}"
    yield Check("node", Verdict.OK, f"{now.node} is running: {about}")
    for warning in now.warnings:
        yield Check("node", Verdict.WARN, warning)
    for peer in now.peers:
        well = peer.state in ("alive", "done")
        found = f"{peer.node} at {peer.address}: {peer.state}"
        yield Check(
            "peer",
            Verdict.OK if well else Verdict.WARN,
            found + (f", {peer.detail}" if peer.detail else ""),
        )


# Peers


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


async def _meet(facts: Facts, patience: float | None) -> list[Check]:
    """Listen as the node would, greet whoever can be found, and see who greets back."""
    settings, desk = facts.settings, _Desk()
    transport = GrpcTransport(settings.node.host, settings.node.port, facts.guard)
    try:
        port = await transport.listen(desk, None)
    except ListenError as error:
        return await _occupied(settings, error)
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
    discovery = named = None
    checks = [
        Check("port", Verdict.OK, f"{settings.node.host}:{port} is free")
        if settings.node.port
        else Check("port", Verdict.OK, f"a free one is taken at each start, such as {port}")
    ]
    try:
        for address in settings.network.static_peers:
            swarm.propose(address, lasting=True)
        named = NamedPeers(settings.network.dns_peers, timing.browse, swarm.propose)
        if settings.network.zeroconf:
            try:
                discovery = await _discover(settings, port, timing, swarm)
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
                "correct network.dns_peers, or mend the name server or the service of that name",
            )
            for name, reason in sorted(named.failing.items())
        ]
        await swarm.goodbye(finished=False)
    finally:
        if named is not None:
            await named.stop()
        if discovery is not None:
            await discovery.stop()
        await swarm.close()
        await transport.close(CLOSE_GRACE_SECONDS)
    return checks


async def _discover(settings: Settings, port: int, timing: Timing, swarm: Swarm) -> Discovery:
    discovery = Discovery(
        run=settings.run.name,
        node=settings.node.name,
        port=port,
        protocol=PROTOCOL_VERSION,
        addresses=await asyncio.to_thread(
            own_addresses, settings.node.advertise or settings.node.host
        ),
        interfaces=settings.network.interfaces,
        browse_every=timing.browse,
        sighted=swarm.sighted,
    )
    await discovery.start()
    return discovery


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


async def _occupied(settings: Settings, error: ListenError) -> list[Check]:
    """Who has the port?"""
    node = settings.node
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(node.host, node.host)  # noqa: S104
    there = f"{host}:{node.port}"
    try:
        shown = await access.credentials([there])
        now = await ask_status(there, ASK_SECONDS, shown.get(there))
    except (PeerError, TrustError, UnreachableError):
        return [failed("port", error)]
    if (now.run, now.node) == (settings.run.name, node.name):
        return list(_running(now))
    return [
        Check(
            "port",
            Verdict.FAIL,
            f"port {node.port} is taken by node {now.node!r} of run {now.run!r}, pid {now.pid}",
            "set node.port (0 takes a free one)",
        )
    ]


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
                "give this one another node.name, unless it is that one",
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
        return Check("peer", Verdict.FAIL, found + peer.detail, "make the two equal, here or there")
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
    unknown = sorted({"model.config", "model.weights", "model.dtype"} - facts.marks().keys())
    same = "same settings and model"
    if unknown:
        same = f"same settings; {', '.join(unknown)} not compared"
    return Check(
        "peer",
        Verdict.OK,
        f"{found}reachable both ways, {same}",
        "--full reads the weights and compares them" if "model.weights" in unknown else "",
    )


# Results


_STYLES: Mapping[Verdict, str] = {
    Verdict.OK: "green",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "bold red",
}


def render(checks: Iterable[Check]) -> Table:
    """For people."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("remedy", overflow="fold")
    for one in checks:
        table.add_row(
            Text(one.check),
            Text(one.verdict, _STYLES[one.verdict]),
            status.text(one.found),
            status.text(one.remedy),
        )
    return table


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """For scripts."""
    return {
        "ok": all(one.verdict != Verdict.FAIL for one in checks),
        "checks": [asdict(one) for one in checks],
    }
