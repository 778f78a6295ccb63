"""Who is in the run, and which edges hold for a block visit.

Pure: decisions are functions of (state, event, now, options); time is an argument, in seconds.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

from deca_node.compression import Format, agreed
from deca_node.limits import MAX_MEMBERS
from deca_node.mixing import metropolis_hastings


class Phase(IntEnum):
    """What a node is doing; the numbers are those of the wire."""

    UNKNOWN = 0
    STARTING = 1
    WAITING = 2
    TRAINING = 3
    SERVING = 4
    DONE = 5
    STOPPING = 6
    CATCHING_UP = 7
    AGREEING = 8
    PAUSED = 9

    @classmethod
    def _missing_(cls, value: object) -> "Phase":  # noqa: ARG003 - the enum's own signature
        """A phase that a later version of the protocol may add."""
        return cls.UNKNOWN


class State(StrEnum):
    """What this node thinks of a peer."""

    ALIVE = "alive"
    SUSPECT = "suspect"  # silent or failing, still hoped for
    GONE = "gone"  # out of the member set until heard again
    BEHIND = "behind"  # of the run, but too many visits behind ours to exchange with
    AHEAD = "ahead"  # of the run, but so far on that we must catch up first
    DONE = "done"  # finished the run
    REFUSED = "refused"  # another run, other settings, another protocol


@dataclass(frozen=True)
class Peer:
    """One peer as this node knows it.

    ``session`` changes when the peer restarts; ``last_seen`` is in the caller's seconds;
    ``reached`` says that a greeting of ours got through, and not only one of the peer's; ``entry``
    is the visit in which a peer that catches up will take part, 0 while it does not know; ``down``
    says that its connection broke or nobody listens, while a silent peer may only be slow; ``left``
    says that it took leave, which holds for the session.
    """

    name: str
    session: int
    address: str
    state: State
    phase: Phase
    visit: int
    last_seen: float
    detail: str = ""
    reached: bool = True
    entry: int = 0
    down: bool = False
    left: bool = False


def near_visits(members: int, steps_per_visit: int) -> int:
    """How many visits two members that exchange, if only through others, can be apart.

    A node ends no step before its neighbours have published theirs, so members d edges apart are
    at most d steps apart, and d is below the number of members.
    """
    return max(1, -(-(members - 1) // steps_per_visit))


FINISHED = (Phase.SERVING, Phase.DONE)


def exchanges(peer: Peer) -> bool:
    """Whether a peer may exchange in this run, now or once one of the two has caught up."""
    return peer.state in (State.ALIVE, State.SUSPECT, State.AHEAD, State.BEHIND)


def heard(
    known: Peer | None,
    *,
    name: str,
    session: int,
    address: str,
    phase: Phase,
    visit: int,
    own_visit: int,
    near: int,
    now: float,
    reached: bool = True,
    entry: int = 0,
) -> Peer:
    """A greeting came from, or was answered by, a peer of this run.

    A peer more than ``near`` visits from ours (near_visits) is not in step with us, whatever took
    it there, a restart, a cut or a long sleep: waiting for it at a visit would be in vain. The one
    behind catches up. Of one that took leave this is late: its goodbye was faster.
    """
    same = known is not None and known.session == session
    if same and known is not None and known.left:
        return known
    peer = Peer(
        name,
        session,
        address,
        State.ALIVE,
        phase,
        visit,
        now,
        reached=reached or (same and known is not None and known.reached),
        entry=entry,
    )
    if phase == Phase.STOPPING:
        return replace(peer, state=State.GONE, detail="stopping")
    if phase in FINISHED:
        return replace(peer, state=State.DONE, detail="finished the run")
    if phase == Phase.CATCHING_UP:
        when = f"takes part from visit {entry}" if entry else "fetching blocks"
        return replace(peer, detail=f"catching up: {when}")
    return _placed(peer, own_visit, near)


def _placed(peer: Peer, own_visit: int, near: int) -> Peer:
    """The peer as alive, ahead or behind."""
    paused = "paused by its operator" if peer.phase == Phase.PAUSED else ""
    if abs(peer.visit - own_visit) <= near:
        return replace(peer, state=State.ALIVE, detail=paused)
    state = State.AHEAD if peer.visit > own_visit else State.BEHIND
    where = f"at visit {peer.visit}, we are at {own_visit}"
    return replace(peer, state=state, detail=f"{paused} {where}".strip())


def overhauled(peer: Peer, own_visit: int, near: int) -> Peer:
    """The peer after we have moved to another visit: who was ahead may be in step with us now.

    Who is in step stays so until it is heard: we know where it was, and move a moment before it.
    """
    if peer.state != State.AHEAD:
        return peer
    return _placed(peer, own_visit, near)


# Greetings that find nobody, one after the other, before a peer counts as gone: one may hit a
# restart, two a slow one.
GONE_AFTER_FAILURES = 3


def failed(
    peer: Peer, now: float, gone_after: float, failures: int, detail: str, *, down: bool = False
) -> Peer:
    """Greetings failed ``failures`` times in a row: suspect first, gone when it goes on.

    A peer is gone after three greetings that found nobody, or after ``gone_after`` seconds of
    silence; it is a member again as soon as it is heard. One that has finished and serves no more
    stays done, since nobody expects it to answer.
    """
    serves = peer.state == State.DONE and peer.phase == Phase.SERVING
    if peer.state in (State.DONE, State.REFUSED, State.GONE) and not serves:
        return peer
    silence = now - peer.last_seen
    if silence >= gone_after or failures >= GONE_AFTER_FAILURES:
        return replace(peer, state=State.GONE, detail=f"silent for {silence:.0f} s: {detail}")
    if peer.state in (State.BEHIND, State.AHEAD, State.DONE):
        return peer
    return replace(peer, state=State.SUSPECT, detail=detail, down=peer.down or down)


def departed(peer: Peer, now: float, *, finished: bool) -> Peer:
    """The peer said goodbye."""
    if finished:
        state, phase, detail = State.DONE, Phase.DONE, "finished the run"
    else:
        state, phase, detail = State.GONE, Phase.STOPPING, "said goodbye"
    return replace(peer, state=state, phase=phase, last_seen=now, detail=detail, left=True)


def takes_part(peer: Peer, visit: int) -> bool:
    """Whether a present peer comes to a visit.

    One that is still starting (loading, evaluating) does not, nor one that is paused, nor one that
    catches up, unless it has said that this is where it enters.
    """
    if peer.phase == Phase.CATCHING_UP:
        return 0 < peer.entry <= visit
    return peer.phase in (Phase.WAITING, Phase.TRAINING, Phase.AGREEING)


def members(own: str, peers: Iterable[Peer], visit: int) -> frozenset[str]:
    """This node and those that come to a visit: the set that the topology is made from.

    A peer that we cannot call is not waited for.
    """
    present = (State.ALIVE, State.SUSPECT)
    return frozenset(
        {
            own,
            *(
                peer.name
                for peer in peers
                if peer.state in present and peer.reached and takes_part(peer, visit)
            ),
        }
    )


def came_to(peers: Iterable[Peer], visit: int) -> frozenset[str]:
    """Peers of the run that are there, or were when it had come to this visit; others have left."""
    return frozenset(
        peer.name
        for peer in peers
        if peer.reached
        and peer.state != State.REFUSED
        and (peer.state != State.GONE or peer.visit >= visit)
    )


def may_come(peers: Iterable[Peer]) -> bool:
    """Whether a peer of the run is away, or on its way back, and so may ask for blocks."""
    away = (State.GONE, State.SUSPECT, State.BEHIND)
    coming = (Phase.STARTING, Phase.WAITING, Phase.CATCHING_UP)
    return any(
        peer.reached
        and peer.state != State.REFUSED
        and (peer.state in away or peer.phase in coming)
        for peer in peers
    )


def ready(own: str, peers: Iterable[Peer], wanted: int) -> tuple[bool, str]:
    """Whether enough members are there to begin, and a line saying who is (and is not).

    Those too far ahead or behind count: one of the two will catch up.
    """
    known = list(peers)
    acting = (Phase.WAITING, Phase.TRAINING, Phase.AGREEING, Phase.CATCHING_UP)
    running = (State.ALIVE, State.SUSPECT, State.AHEAD, State.BEHIND)
    here = sorted(
        {
            own,
            *(
                peer.name
                for peer in known
                if peer.state == State.DONE
                or (peer.state in running and peer.reached and peer.phase in acting)
            ),
        }
    )
    if len(here) >= wanted:
        return True, f"{len(here)} of {wanted} members: {', '.join(here)}"
    others = [_why_not(peer) for peer in known if peer.name not in here]
    missing = wanted - len(here)
    text = f"{missing} of {wanted} members missing; here: {', '.join(here)}"
    return False, text + (f"; not counted: {'; '.join(sorted(others))}" if others else "")


def _why_not(peer: Peer) -> str:
    if peer.state != State.ALIVE:
        return f"{peer.name} {peer.state}: {peer.detail}"
    if not peer.reached:
        return f"{peer.name} calls us, but does not answer at {peer.address}"
    if peer.phase == Phase.PAUSED:
        return f"{peer.name} {peer.detail}"
    return f"{peer.name} still starting"


class Verdict(IntEnum):
    """Answer to an edge's offer; the numbers are those of the wire."""

    ACCEPTED = 1
    PASSED = 2
    NOT_WANTED = 4


@dataclass(frozen=True)
class Edges:
    """The edges of a visit, fixed for all its steps.

    ``weights`` maps neighbours to w_ij; ``degree`` is the number announced to them; ``graphs`` has
    the digests that they told of the graph that they see, 0 where it does not matter to them;
    ``formats`` says how values travel on each edge, fp32 where it says nothing.
    """

    visit: int
    degree: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    graphs: Mapping[str, int] = field(default_factory=dict)
    formats: Mapping[str, Format] = field(default_factory=dict)

    def format(self, peer: str) -> Format:
        """How values travel between this node and a peer."""
        return self.formats.get(peer, Format.FP32)

    @property
    def own_weight(self) -> float:
        """w_ii."""
        return 1 - sum(self.weights.values())


@dataclass(frozen=True)
class Offer:
    """A peer's latest offer; ``step`` is the first that it will do of the visit."""

    visit: int
    session: int
    step: int = 0
    wish: Format = Format.FP32


# Neighbours that stopped together, and resume within a visit, are at most one step apart; those
# further apart would only wait for each other.
NEAR_STEPS = 1


class VisitAgreement:
    """Settles edges and degrees of one visit after another, with no clock and no network.

    An edge exists when each end's offer was accepted by the other before it closed the visit.
    Only each peer's latest offer and degree are kept, until their visit is over. Where names come
    and go, those that have gone make room (``make_room``).
    """

    def __init__(self, visit: int) -> None:
        self.visit = visit
        self.closed = False
        self._begun = False
        self._step = 0
        self._wanted: frozenset[str] = frozenset()
        self._offers: dict[str, Offer] = {}
        self._degrees: dict[str, tuple[int, int]] = {}
        self._graphs: dict[str, int] = {}
        self._answers: dict[str, Verdict] = {}
        self._edges: frozenset[str] = frozenset()
        self._wish: Format | None = Format.FP32
        self._formats: dict[str, Format] = {}

    def begin(
        self, visit: int, wanted: frozenset[str], step: int = 0, wish: Format | None = Format.FP32
    ) -> None:
        """This node enters a visit at a step and wants edges with ``wanted``, in a format.

        Without a wish all edges have fp32, whatever the neighbours wish.
        """
        self._step, self._wish = step, wish
        self.visit, self._wanted, self.closed, self._begun = visit, wanted, False, True
        self._answers, self._edges = {}, frozenset()
        self._forget(
            {peer for peer, offer in self._offers.items() if offer.visit < visit},
            {peer for peer, (of, _) in self._degrees.items() if of < visit},
        )

    @property
    def known(self) -> frozenset[str]:
        """Peers of whom something is kept."""
        return frozenset(self._offers.keys() | self._degrees.keys())

    def make_room(self, is_out: Callable[[str], bool]) -> None:
        """To be called before a peer's word is taken: where many are kept, who is out is forgotten.

        As many as members can be in a run are kept, and those that this visit is agreed on with.

        Args:
            is_out: whether a peer is gone; offers of one that comes back are made anew.
        """
        if max(len(self._offers), len(self._degrees)) < MAX_MEMBERS:
            return
        out = {peer for peer in self.known - self._wanted if is_out(peer)}
        self._forget(out, out)

    def _forget(self, offers: set[str], degrees: set[str]) -> None:
        for peer in offers:
            self._offers.pop(peer, None)
        for peer in degrees:
            self._degrees.pop(peer, None)
            self._graphs.pop(peer, None)

    def offered(
        self, peer: str, visit: int, session: int, step: int = 0, wish: Format = Format.FP32
    ) -> Verdict:
        """A peer offers an edge for a visit; the answer is binding for both.

        Accepted offers become edges where both begin at about the same step, which both can tell.
        """
        earlier = self._offers.get(peer)
        if visit < self.visit or (visit == self.visit and self.closed):
            repeated = visit == self.visit and peer in self._edges
            same = earlier is not None and earlier.session == session
            return Verdict.ACCEPTED if repeated and same else Verdict.PASSED
        if visit == self.visit and self._begun and peer not in self._wanted:
            return Verdict.NOT_WANTED
        self._offers[peer] = Offer(visit, session, step, wish)
        return Verdict.ACCEPTED

    def answered(self, peer: str, verdict: Verdict) -> None:
        """A peer answered our offer for the current visit."""
        self._answers[peer] = verdict

    @property
    def overtaken(self) -> bool:
        """Whether the visit was closed with no edge because neighbours had gone on without us."""
        passed = any(verdict is Verdict.PASSED for verdict in self._answers.values())
        passed = passed or any(
            offer.visit == self.visit and offer.step > self._step + NEAR_STEPS
            for peer, offer in self._offers.items()
            if self._answers.get(peer) is Verdict.ACCEPTED
        )
        return self.closed and not self._edges and passed

    def undecided(self) -> frozenset[str]:
        """Wanted peers that may still become edges of the current visit."""
        return frozenset(peer for peer in self._wanted if not self._decided(peer))

    def _decided(self, peer: str) -> bool:
        answer = self._answers.get(peer)
        if answer is None:
            return False
        if answer is not Verdict.ACCEPTED:
            return True
        offer = self._offers.get(peer)
        return offer is not None and offer.visit >= self.visit

    def close(self) -> frozenset[str]:
        """Fix the edges, accepted both ways for this very visit, and the format of each."""
        self.closed = True
        self._edges = frozenset(
            peer
            for peer in self._wanted
            if self._answers.get(peer) is Verdict.ACCEPTED
            and peer in self._offers
            and self._offers[peer].visit == self.visit
            and abs(self._offers[peer].step - self._step) <= NEAR_STEPS
        )
        # Now: a peer that is fast may offer the next visit before we know all degrees of this one.
        self._formats = {
            peer: wire
            for peer in sorted(self._edges)
            if self._wish is not None
            and (wire := agreed(self._wish, self._offers[peer].wish)) is not Format.FP32
        }
        return self._edges

    def degree(self, peer: str, visit: int, degree: int, graph: int = 0) -> None:
        """A peer told its number of edges in a visit (early arrivals are kept), and its graph."""
        if visit >= self.visit:
            self._degrees[peer] = (visit, degree)
            self._graphs[peer] = graph

    def unsettled(self) -> frozenset[str]:
        """Edges whose other end has not told its degree yet."""
        return frozenset(
            peer for peer in self._edges if self._degrees.get(peer, (-1, 0))[0] != self.visit
        )

    def settle(self) -> Edges:
        """Weights of the edges whose degrees are known; the others carry nothing this visit."""
        # Sorted: sums over the edges are then the same to the last bit whenever a run is repeated.
        settled = sorted(self._edges - self.unsettled())
        degrees = {peer: self._degrees[peer][1] for peer in settled}
        weights = metropolis_hastings(len(self._edges), degrees)
        graphs = {peer: self._graphs[peer] for peer in degrees}
        formats = {peer: wire for peer, wire in self._formats.items() if peer in degrees}
        return Edges(self.visit, len(self._edges), weights, graphs, formats)
