"""Meeting peers: contacts become peers by a greeting, and stay so by greeting again.

Discovery only proposes contacts, which are greeted again and again (contacts.py). What a greeting
means is decided in membership.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deca_node import __version__, membership
from deca_node.addresses import is_address, joined
from deca_node.admission import Turns, network
from deca_node.config import Timing
from deca_node.errors import PeerError, PeerRefused, PeerTimeout, PeerUnavailable, known_reason
from deca_node.events import printable
from deca_node.fingerprint import PROTOCOL_VERSION, difference
from deca_node.health import Told
from deca_node.limits import (
    MAX_CONTACTS,
    MAX_FINGERPRINT_BYTES,
    MAX_FINGERPRINT_FIELDS,
    MAX_MEMBERS,
    MAX_NAME_BYTES,
    MAX_TIME,
    MAX_VERSION_BYTES,
    PEER_GREETINGS,
    PEER_GREETINGS_BURST,
    PEER_LINES,
    PEER_LINES_BURST,
    STATE_LINES,
    STATE_LINES_BURST,
    STRANGER_GREETINGS,
    STRANGER_GREETINGS_BURST,
)
from deca_node.membership import Peer, Phase, State
from deca_node.pb import node_pb2 as pb
from deca_node.swarm.contacts import Answer, Contacts, Origin
from deca_node.swarm.refusals import DETAIL_CHARACTERS, NAMELESS, Refusals
from deca_node.swarm.traffic import RateMeter, TrafficTable
from deca_node.transport import Link, Transport

# States of a peer that answers, or has just called.
_ANSWERING = (State.ALIVE, State.DONE, State.BEHIND, State.AHEAD)

# The same trouble with the same peer is logged this often; it is counted every time.
REPEAT_SECONDS = 30.0

# The reason of a call to a peer that greeted us a moment ago: nobody's fault.
UNMET = "unmet"

# Reasons why two do not even greet: a certificate is missing, over, taken back or another's.
_OF_TRUST = ("handshake", "no_certificate", "expired", "revoked", "not_allowed", "impostor")

# A node that stops, starts, goes on without us, or has a block from a faster giver is nothing to
# warn about.
_USUAL = ("passed", "ended", "stopping", "starting", "paused", "hung_up")

# Why a peer that was revoked is gone.
REVOKED = "revoked: out of the run"


@dataclass(frozen=True)
class Position:
    """Where this node is: its phase, its visit and, catching up, the visit where it enters."""

    phase: Phase
    visit: int
    entry: int = 0


@dataclass
class Identity:
    """Who this node is, and what it tells in every greeting."""

    run: str
    node: str
    session: int
    fingerprint: Mapping[str, str]
    host: str = ""
    port: int = 0


class Swarm:
    """The peers of one node.

    Args:
        identity: this node.
        transport: how to reach others.
        timing: heartbeat and backoff.
        position: where this node is, asked at every greeting.
        steps_per_visit: of the schedule, which bounds how far apart members can be.
        changed: called after every change of a peer's state.
        log: a structlog logger.
        last_visit: the highest that a peer can be at; None where the schedule is not known.

    Attributes:
        gossips: whether peers are told of each other, so that everybody greets everybody.
        peers: those of the run that have greeted or answered, by name.
        traffic: what went on with each of them.
        told: what they say of themselves.
        refusals: callers that were refused, and addresses where this node was.
        send_meter: bytes sent to all of them lately; receive_meter likewise.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        timing: Timing,
        position: Callable[[], Position],
        steps_per_visit: int,
        changed: Callable[[], None],
        log: Any,
        last_visit: int | None = None,
    ) -> None:
        self.identity = identity
        self.gossips = True
        self.peers: dict[str, Peer] = {}
        self.traffic = TrafficTable()
        self.told: dict[str, Told] = {}
        self.refusals = Refusals(log)
        self.send_meter, self.receive_meter = RateMeter(), RateMeter()
        self._peer_turns = Turns(PEER_GREETINGS, PEER_GREETINGS_BURST, MAX_MEMBERS)
        self._restart_turns = Turns(PEER_GREETINGS, PEER_GREETINGS_BURST, MAX_CONTACTS)
        self._stranger_turns = Turns(STRANGER_GREETINGS, STRANGER_GREETINGS_BURST, MAX_CONTACTS)
        self._timing = timing
        self._position = position
        self._steps_per_visit = steps_per_visit
        self._last_visit = last_visit
        self._changed = changed
        self._log = log
        self._contacts = Contacts(self, transport, timing, identity.session, log)
        self._links: dict[str, tuple[str, Link]] = {}
        self._duplicates: dict[str, int] = {}  # further addresses of a session that is met
        self._complained: dict[tuple[str, str], float] = {}
        self._state_lines = Turns(STATE_LINES, STATE_LINES_BURST, 1)
        self._state_lines_of = Turns(PEER_LINES, PEER_LINES_BURST, MAX_MEMBERS)

    # --- contacts

    def propose(self, address: str, *, lasting: bool = False) -> None:
        """Somebody may be at HOST:PORT, says the operator, or whom the operator has named.

        Args:
            address: where.
            lasting: never drop it (static peers).
        """
        self._propose(address, Origin.OPERATOR, lasting=lasting)

    def sighted(self, address: str) -> None:
        """Somebody may be at HOST:PORT, says an announcement on the local network."""
        self._propose(address, Origin.NETWORK)

    def _propose(
        self, address: str, origin: Origin, *, lasting: bool = False, by: str = ""
    ) -> None:
        if not self._is_spare(address):
            self._contacts.add(address, origin=origin, lasting=lasting, by=by)

    def _is_spare(self, address: str) -> bool:
        """Whether it is a further address of a peer whose first one works."""
        session = self._duplicates.get(address)
        return session is not None and any(
            peer.session == session and peer.state in _ANSWERING and not self._is_failing(peer.name)
            for peer in self.peers.values()
        )

    def _is_failing(self, peer: str) -> bool:
        """Whether the peer's link does not reach it any more, whatever it tells us itself."""
        held = self._links.get(peer)
        return held is not None and self._contacts.is_failing(held[0])

    def was_met(self, address: str) -> bool:
        """See contacts.Greeter: a peer of this run that has not finished.

        It may be behind a cut that lasts: it is called for as long as the run does.
        """
        ended = (State.DONE, State.REFUSED)
        return any(
            peer.address == address and peer.reached and peer.state not in ended
            for peer in self.peers.values()
        )

    async def greet(self, address: str, link: Link) -> Answer:
        """See contacts.Greeter."""
        return self._take_reply(await link.hello(self.greeting(), self._timing.rpc), address, link)

    def dropped(self, link: Link) -> None:
        """See contacts.Greeter."""
        self._links = {n: (a, lk) for n, (a, lk) in self._links.items() if lk is not link}

    def nudge(self) -> None:
        """Greet everybody now: this node's phase changed."""
        self._contacts.greet_all()

    def greeting(self) -> pb.HelloRequest:
        """What this node says of itself."""
        here = self._position()
        return pb.HelloRequest(
            sender=self.sender(),
            protocol=PROTOCOL_VERSION,
            fingerprint=self._fields(),
            port=self.identity.port,
            host=self.identity.host,
            phase=pb.Phase.Name(here.phase),
            visit=here.visit,
            entry=here.entry,
            version=__version__,
            time=time.time(),
        )

    def _take_reply(self, reply: pb.HelloReply, address: str, link: Link) -> Answer:
        self._contacts.found(address)
        if reply.sender.session == self.identity.session:
            return Answer.ITSELF
        # Our own words first: what differs is then told as ours here and theirs there.
        objection = self._objection(reply, address)
        if refusal := objection or reply.refusal:
            self._refused(reply.sender, address, refusal, theirs=not objection)
            return Answer.REFUSED
        name = reply.sender.node
        held = self._links.get(name)
        known = self.peers.get(name)
        same = held and held[1] is not link and known and known.session == reply.sender.session
        if same and known and known.state in _ANSWERING and not self._is_failing(name):
            if len(self._duplicates) >= MAX_CONTACTS:
                self._duplicates.clear()
            self._duplicates[address] = reply.sender.session
            return Answer.DUPLICATE  # the same node at another of its addresses
        self._links[name] = (address, link)
        self._heard(reply, address, reached=True)
        self._note(reply.sender, address, reply)
        for contact in reply.known[:MAX_MEMBERS]:
            self._proposed_by_peer(contact, name)
        return Answer.MET

    def unanswered(self, address: str, failures: int, error: PeerError) -> None:
        """See contacts.Greeter."""
        if error.reason in _OF_TRUST:
            self.refusals.note(address, NAMELESS, error.reason, str(error), self._now())
        for name, (at, _) in list(self._links.items()):
            if at == address and name in self.peers:
                self._update(
                    membership.failed(
                        self.peers[name],
                        self._now(),
                        self._timing.gone_after,
                        failures,
                        str(error),
                        down=isinstance(error, PeerUnavailable),
                    )
                )
        if failures == 1:
            self._log.debug("no answer", address=address, reason=str(error))

    def _proposed_by_peer(self, contact: pb.Contact, by: str) -> None:
        known = self.peers.get(contact.node)
        if contact.node != self.identity.node and (
            known is None or known.state in (State.GONE, State.SUSPECT)
        ):
            self._propose(contact.address, Origin.PEER, by=by)

    # --- answering greetings

    async def answer_hello(self, request: pb.HelloRequest, source: str) -> pb.HelloReply:
        """Answer a greeting; the caller becomes a peer when it belongs to this run."""
        here = self._position()
        reply = pb.HelloReply(
            sender=self.sender(),
            protocol=PROTOCOL_VERSION,
            phase=pb.Phase.Name(here.phase),
            visit=here.visit,
            entry=here.entry,
            version=__version__,
            time=time.time(),
        )
        if request.sender.session == self.identity.session:
            return reply
        self._admit(request.sender, source)
        host = request.host or source
        address = joined(host, request.port)
        if not is_address(address):
            address = f"{source}:0"  # what is kept and logged below
            refusal = "bad_address: host or port cannot be called"
        else:
            refusal = self._objection(request, address)
        if refusal:
            reply.refusal = refusal
            reply.fingerprint.extend(self._fields())
            self._refused(request.sender, address, refusal)
            return reply
        reply.fingerprint.extend(self._fields())
        if self.gossips:
            reply.known.extend(self._known())
        if self._is_back(request.sender):
            self._contacts.welcome(address)
        self._heard(request, address)
        self._note(request.sender, address, request)
        reply.unreached = self._cannot_call(request.sender.node, address)
        held = self._links.get(request.sender.node)
        if held is None or held[0] != address:
            self._propose(address, Origin.CALLER, by=request.sender.node)
        return reply

    def _admit(self, sender: pb.Sender, source: str) -> None:
        """Refuse who greets too often: each greeting is compared, and answered at length."""
        known, now = self.peers.get(sender.node), self._now()
        if known is None:
            admitted = self._stranger_turns.take(network(source), now)
        elif known.session == sender.session:
            admitted = self._peer_turns.take(sender.node, now)
        else:  # of each place, so that nobody uses up the turns of a peer that restarts elsewhere
            admitted = self._restart_turns.take(f"{network(source)} {sender.node}", now)
        if not admitted:
            self.refusals.count["too_many_greetings"] += 1
            raise PeerRefused("too_many_greetings", "greet less often")

    def answer_goodbye(self, request: pb.GoodbyeRequest) -> None:
        """A peer takes leave."""
        name = self.check_sender(request.sender)
        self._update(membership.departed(self.peers[name], self._now(), finished=request.finished))

    def _objection(self, said: pb.HelloRequest | pb.HelloReply, address: str) -> str:
        """Why who says this cannot be a peer, as ``reason: text``; empty when it can.

        Who is still starting may not know all of its fingerprint yet: what either side leaves out
        is compared once it acts.
        """
        own, sender, fields = self.identity, said.sender, said.fingerprint
        if not _is_name(sender.node) or not _is_name(sender.run):
            return "bad_name: node and run names are 1 to 64 printable characters"
        if sender.run != own.run:
            return f"other_run: run.name is {own.run!r} here, {sender.run!r} there"
        if said.protocol != PROTOCOL_VERSION:
            differ = f"version {PROTOCOL_VERSION} here, {said.protocol} there"
            return f"protocol: {differ}{_programs(said.version)}"
        if len(fields) > MAX_FINGERPRINT_FIELDS or any(
            len(f.name) + len(f.value) > MAX_FINGERPRINT_BYTES for f in fields
        ):
            return "bad_fingerprint: too long"
        ours, theirs = dict(own.fingerprint), {f.name: f.value for f in fields}
        if Phase.STARTING in (said.phase, self._position().phase):
            known_to_both = ours.keys() & theirs.keys()
            ours, theirs = ({k: d[k] for k in d if k in known_to_both} for d in (ours, theirs))
        if found := difference(ours, theirs):
            return f"settings_differ: {found}{_programs(said.version)}"
        if self._last_visit is not None and said.visit > self._last_visit:
            return f"bad_visit: the run has {self._last_visit}, {said.visit} there"
        known = self.peers.get(sender.node)
        if sender.node == own.node or (
            known is not None
            and known.session != sender.session
            and known.state in _ANSWERING
            and known.address != address
            and self._now() - known.last_seen < 2 * self._timing.heartbeat
        ):
            return f"name_taken: another node is called {sender.node!r}; set node.name"
        if known is None and not self._has_room():
            return f"full: {MAX_MEMBERS} peers are known here"
        return ""

    def _has_room(self) -> bool:
        """Whether the table of peers can take one more."""
        return len(self.peers) < MAX_MEMBERS or any(map(_makes_way, self.peers.values()))

    def _make_room(self) -> None:
        """Of those who cannot be exchanged with, the one not heard of for longest makes way."""
        if len(self.peers) < MAX_MEMBERS:
            return
        spare = filter(_makes_way, self.peers.values())
        if oldest := min(spare, key=lambda peer: peer.last_seen, default=None):
            for table in (self.peers, self.traffic, self._links, self.told):
                table.pop(oldest.name, None)

    def _refused(
        self, sender: pb.Sender, address: str, refusal: str, *, theirs: bool = False
    ) -> None:
        word, _, text = printable(refusal).partition(": ")
        reason = known_reason(word)
        self.refusals.count[reason] += 1
        name = sender.node if _is_name(sender.node) else "?"
        known = self.peers.get(name)
        # Who uses the name of a peer that we have must not take its place.
        replaceable = known is None or (
            known.session == sender.session or known.state in (State.GONE, State.REFUSED)
        )
        ours = sender.run == self.identity.run and name not in ("?", self.identity.node)
        if reason in ("settings_differ", "bad_visit") and ours and replaceable:
            if known is None and not self._has_room():
                return
            phase, now = Phase.UNKNOWN, self._now()
            self._update(
                Peer(
                    name,
                    sender.session,
                    address,
                    State.REFUSED,
                    phase,
                    0,
                    now,
                    text[:DETAIL_CHARACTERS],
                )
            )
            return
        self.refusals.note(address, name, reason, text, self._now(), theirs=theirs)

    # --- what is known of the peers' surroundings (health)

    def never_answered(self, addresses: Collection[str]) -> frozenset[str]:
        """Those of ``addresses`` that were called and have not answered once."""
        return self._contacts.never_answered(addresses)

    def uncallable(self) -> frozenset[str]:
        """Peers that have greeted us, and whose address we have called for a while in vain."""
        return frozenset(
            peer.name for peer in self.peers.values() if self._cannot_call(peer.name, peer.address)
        )

    def _is_back(self, sender: pb.Sender) -> bool:
        """Whether a caller has not called for a while: it was down, or cut off from us."""
        known = self.peers.get(sender.node)
        return (
            known is None
            or known.session != sender.session
            or self._now() - known.last_seen > self._timing.redial_max + self._timing.rpc
        )

    def _cannot_call(self, name: str, address: str) -> bool:
        held = self._links.get(name)
        if held is not None and not self._contacts.is_silent(held[0]):
            return False  # it answers at this address, or at another of its own
        return self._contacts.is_unreached(address)

    def _note(self, sender: pb.Sender, address: str, said: pb.HelloRequest | pb.HelloReply) -> None:
        """Keep what a peer says of itself."""
        self.refusals.forget(address, reached=isinstance(said, pb.HelloReply))
        told_time = math.isfinite(said.time) and 0 < said.time < MAX_TIME
        before = self.told.get(sender.node, Told())
        self.told[sender.node] = Told(
            printable(said.version, MAX_VERSION_BYTES),
            said.time - time.time() if told_time else None,
            said.unreached if isinstance(said, pb.HelloReply) else before.unreached,
        )

    # --- what the rest of the node asks (exchange.Neighbourhood)

    def sender(self) -> pb.Sender:
        """See Neighbourhood."""
        own = self.identity
        return pb.Sender(run=own.run, node=own.node, session=own.session)

    def link(self, peer: str) -> Link | None:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        if known is None or not (known.state in (State.ALIVE, State.SUSPECT) or _serves(known)):
            return None
        if known.phase == Phase.CATCHING_UP and not membership.takes_part(
            known, self._position().visit
        ):
            return None
        return self._link(peer)

    def _link(self, peer: str) -> Link:
        held = self._links.get(peer)
        return held[1] if held else _Unmet()

    def givers(self) -> dict[str, Link]:
        """Peers that can hand out blocks to a node that catches up."""
        giving = (Phase.TRAINING, Phase.WAITING, Phase.AGREEING, Phase.SERVING, Phase.PAUSED)
        return {
            peer.name: self._link(peer.name)
            for peer in self.peers.values()
            if peer.state in (State.ALIVE, State.AHEAD, State.DONE)
            and peer.phase in giving
            and peer.reached
        }

    def is_suspect(self, peer: str) -> bool:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        return known is None or not (known.state == State.ALIVE or _serves(known))

    def visit_of(self, peer: str) -> int:
        """See giving.Peers."""
        known = self.peers.get(peer)
        return 0 if known is None else known.visit

    def is_paused(self, peer: str) -> bool:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        return known is not None and known.phase == Phase.PAUSED

    def is_down(self, peer: str) -> bool:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        return known is not None and known.down

    def trouble(self, peer: str, error: PeerError) -> None:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        if known is None or error.reason == UNMET:
            return
        self.traffic.of(peer).refusals[error.reason] += 1
        if isinstance(error, PeerUnavailable):
            if held := self._links.get(peer):
                self._contacts.broke(held[0])
            self._update(
                membership.failed(
                    known, self._now(), self._timing.gone_after, 0, str(error), down=True
                )
            )
        elif not isinstance(error, PeerTimeout):
            usual = error.reason in _USUAL
            now, key = self._now(), (peer, error.reason)
            if now - self._complained.get(key, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                if len(self._complained) >= MAX_CONTACTS:
                    self._complained.clear()
                self._complained[key] = now
                level = self._log.debug if usual else self._log.warning
                level("refused", peer=peer, reason=error.reason, detail=str(error))

    def seen(self, peer: str) -> None:
        """See Neighbourhood."""
        known = self.peers.get(peer)
        if known is not None and known.state in (State.ALIVE, State.SUSPECT):
            self._update(
                replace(known, state=State.ALIVE, last_seen=self._now(), detail="", down=False)
            )

    def sent(self, peer: str, nbytes: int) -> None:
        """See Neighbourhood."""
        traffic, now = self.traffic.of(peer), self._now()
        traffic.sent += nbytes
        traffic.send_meter.add(now, nbytes)
        self.send_meter.add(now, nbytes)

    def received(self, peer: str, nbytes: int) -> None:
        """See Neighbourhood."""
        traffic, now = self.traffic.of(peer), self._now()
        traffic.received += nbytes
        traffic.receive_meter.add(now, nbytes)
        self.receive_meter.add(now, nbytes)

    def waited(self, peer: str, seconds: float) -> None:
        """See Neighbourhood."""
        self.traffic.of(peer).waited += seconds

    def retried(self, peer: str) -> None:
        """See Neighbourhood."""
        self.traffic.of(peer).retries += 1

    def check_sender(self, sender: pb.Sender) -> str:
        """See Neighbourhood."""
        known = self.peers.get(sender.node)
        if sender.run != self.identity.run:
            self.refusals.count["other_run"] += 1
            raise PeerRefused("other_run", f"this is run {self.identity.run!r}")
        if known is None or known.session != sender.session or known.state == State.REFUSED:
            self.refusals.count["stranger"] += 1
            raise PeerRefused("stranger", "say Hello first")
        return sender.node

    @property
    def near_visits(self) -> int:
        """How many visits from ours a peer in step can be."""
        others = sum(map(membership.exchanges, self.peers.values()))
        return membership.near_visits(others + 1, self._steps_per_visit)

    def members(self, visit: int) -> frozenset[str]:
        """The set that a visit's topology is made from."""
        self.sweep()
        return membership.members(self.identity.node, self.peers.values(), visit)

    def told_visit(self, peer: str, visit: int) -> None:
        """A peer has told its visit beside its greetings."""
        known = self.peers.get(peer)
        if known is not None and visit > known.visit:
            self._update(replace(known, visit=visit))

    def moved(self) -> None:
        """This node's visit changed, perhaps by many: see who is in step with it now."""
        here, near = self._position().visit, self.near_visits
        for peer in list(self.peers.values()):
            self._update(membership.overhauled(peer, here, near))

    def sweep(self) -> None:
        """Let go of members that have been silent too long."""
        now = self._now()
        for peer in list(self.peers.values()):
            if now - peer.last_seen >= self._timing.gone_after:
                self._update(
                    membership.failed(peer, now, self._timing.gone_after, 0, "no greeting")
                )

    def put_out(self, name: str) -> None:
        """A peer was revoked: nothing is asked of it any more, and nothing answered."""
        known = self.peers.get(name)
        if known is None or known.detail == REVOKED:
            return
        self._links.pop(name, None)
        gone = membership.departed(known, self._now(), finished=False)
        self._update(replace(gone, detail=REVOKED))

    # --- end

    async def goodbye(self, *, finished: bool, timeout: float = 1.0) -> None:
        """Tell everybody that this node leaves; nobody is waited for longer than ``timeout``."""
        request = pb.GoodbyeRequest(sender=self.sender(), finished=finished)
        alive = [link for _, link in self._links.values()]
        await asyncio.gather(
            *(link.goodbye(request, timeout) for link in alive), return_exceptions=True
        )

    async def close(self) -> None:
        """Stop greeting and give up all links."""
        await self._contacts.close()

    # --- inner

    def _heard(
        self, greeting: pb.HelloRequest | pb.HelloReply, address: str, *, reached: bool = False
    ) -> None:
        sender = greeting.sender
        known = self.peers.get(sender.node)
        same = known is not None and known.session == sender.session
        # Another address of a peer that we can call is no reason to leave the one that works.
        keep = (
            known is not None
            and same
            and not reached
            and known.state in _ANSWERING
            and not self._is_failing(known.name)
        )
        peer = membership.heard(
            known,
            name=sender.node,
            session=sender.session,
            address=known.address if keep and known is not None else address,
            phase=Phase(greeting.phase),
            visit=greeting.visit,
            own_visit=self._position().visit,
            near=self.near_visits,
            now=self._now(),
            reached=reached,
            entry=greeting.entry,
        )
        if same and not reached and peer.state == State.ALIVE and self._is_failing(peer.name):
            # It lives, but where we call it nobody answers: not worth waiting for until it does.
            detail = "calls us, but does not answer"
            peer = replace(peer, state=State.SUSPECT, down=True, detail=detail)
        self._update(peer)

    def _update(self, peer: Peer) -> None:
        known = self.peers.get(peer.name)
        if known is None:
            self._make_room()
        self.peers[peer.name] = peer
        if known is not None and (known.phase, known.reached, known.entry) != (
            peer.phase,
            peer.reached,
            peer.entry,
        ):
            self._changed()
        if known is None or (known.state, known.session) != (peer.state, peer.session):
            self._tell(peer)
            self._changed()

    def _tell(self, peer: Peer) -> None:
        """Log a peer's state, unless there were many such lines lately: it stands in the status."""
        now = self._now()
        if not (self._state_lines_of.take(peer.name, now) and self._state_lines.take("", now)):
            return
        level = (
            self._log.info
            if peer.state in (State.ALIVE, State.DONE) or peer.phase == Phase.STOPPING
            else self._log.warning
        )
        level(f"peer {peer.state}", peer=peer.name, address=peer.address, detail=peer.detail)

    def _fields(self) -> list[pb.FingerprintField]:
        items = self.identity.fingerprint.items()
        return [pb.FingerprintField(name=name, value=value) for name, value in items]

    def _known(self) -> list[pb.Contact]:
        return [
            pb.Contact(node=peer.name, address=peer.address)
            for peer in self.peers.values()
            if peer.state in (State.ALIVE, State.AHEAD, State.BEHIND)
        ]

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class _Unmet:
    """Stands for the link to a peer that greeted us and has not been greeted back yet."""

    def __getattr__(self, name: str) -> Any:
        raise PeerError(UNMET, "not greeted back yet")


def _makes_way(peer: Peer) -> bool:
    return peer.state in (State.REFUSED, State.GONE, State.BEHIND, State.AHEAD)


def _serves(peer: Peer) -> bool:
    """Whether a peer that has finished still hands out its last block."""
    return peer.state == State.DONE and peer.phase == Phase.SERVING


def _programs(theirs: str) -> str:
    """A likely cause of a difference: the other one runs another version of the program."""
    if theirs in ("", __version__):
        return ""
    return f" (deca-node {__version__} here, {printable(theirs, MAX_VERSION_BYTES)} there)"


def _is_name(text: str) -> bool:
    return 0 < len(text.encode()) <= MAX_NAME_BYTES and text.isprintable()
