"""What is wrong now, as far as one node can tell, and what to do about it.

Pure: findings are a function of what the node knows; time is an argument, in seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deca_node.events import printable
from deca_node.membership import Peer, Phase, State

# A node that starts needs this long to be found: mDNS answers in 2 s, a greeting is repeated for
# some seconds. Before that, silence means nothing.
PATIENCE_SECONDS = 15.0
# Clocks that NTP keeps differ by milliseconds. No decision here depends on them, but logs of
# several nodes that are further apart than this cannot be read side by side.
CLOCK_SECONDS = 30.0
# Peers lost within one deadline of each other were lost to one cause.
TOGETHER_SECONDS = 15.0
# One late block is a machine that swaps, or a packet lost; so many in a row are a pace.
LATE_STEPS = 5
# A refusal is repeated at least every 94 s while its cause lasts: 5 heartbeats of 15 s, the largest
# that network.heartbeat may be, and a quarter more by jitter.
REFUSAL_SECONDS = 120.0
# One condition is told of this many peers, the rest are counted: strangers must not fill the log.
MAX_TOLD = 5
_TEXT_CHARACTERS = 200  # of what a peer said, in a finding


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    ``key`` is the same as long as it lasts (log it once), ``text`` one line that names the remedy.
    """

    key: str
    text: str


@dataclass(frozen=True)
class Told:
    """What a peer said of itself in its last greeting or answer.

    Attributes:
        version: of its program; empty when it told none.
        clock: seconds that its clock is ahead of ours, to within a call's duration; None when it
            told no time.
        unreached: it has called the address that we announce for a while, in vain.
    """

    version: str = ""
    clock: float | None = None
    unreached: bool = False


@dataclass(frozen=True)
class Refusal:
    """A greeting that ended in a refusal.

    Attributes:
        node: the other one.
        reason: why, in a word.
        detail: why.
        at: when, in the node's seconds.
        theirs: the other one refused this node, which itself had nothing against it.
    """

    node: str
    reason: str
    detail: str
    at: float
    theirs: bool = False


@dataclass(frozen=True)
class View:
    """What a node knows of its surroundings.

    Attributes:
        name: this node.
        run: its run.
        port: the TCP port it listens on.
        phase: what it is doing.
        wanted: run.start_when.
        now: the clock of the peers' ``last_seen`` and the refusals' ``at``.
        looking: seconds since it began to look for others.
        peers: all that it knows of.
        told: what they said of themselves, by name.
        version: of this node's program.
        neighbours: those of the open visit; None before the first one.
        isolated: the topology gives this node no edge, on purpose.
        most: the largest number of members ever seen at once, this node included.
        zeroconf: whether it announces itself by multicast.
        heard_itself: its own announcement came back.
        heard_others: an announcement of any other node came.
        static: network.static_peers.
        silent: those of them that have never answered.
        unresolved: names of network.dns_peers that have no address now, and why.
        uncallable: peers that we have called for a while, in vain.
        refusals: recent ones of callers and called that are no peers, by address.
        late: see late_steps.
    """

    name: str
    run: str
    port: int
    phase: Phase
    wanted: int
    now: float
    looking: float
    peers: Sequence[Peer] = ()
    told: Mapping[str, Told] = field(default_factory=dict)
    version: str = ""
    neighbours: frozenset[str] | None = None
    isolated: bool = False
    most: int = 1
    zeroconf: bool = False
    heard_itself: bool = False
    heard_others: bool = False
    static: Sequence[str] = ()
    silent: frozenset[str] = frozenset()
    unresolved: Mapping[str, str] = field(default_factory=dict)
    uncallable: frozenset[str] = frozenset()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    late: Mapping[str, int] = field(default_factory=dict)


def late_steps(
    before: Mapping[str, int], late: Iterable[str], came: Iterable[str]
) -> dict[str, int]:
    """How many steps in a row each neighbour was late, after one step more.

    A neighbour of which nothing is known in this step keeps its count.

    Args:
        before: the counts so far.
        late: whose blocks were not here in time, or only in part.
        came: whose were.
    """
    on_time = set(came)
    counts = {peer: count for peer, count in before.items() if peer not in on_time}
    return counts | {peer: counts.get(peer, 0) + 1 for peer in late}


def diagnose(view: View) -> list[Finding]:
    """All that is wrong now; nothing once the run is over here."""
    if view.phase in (Phase.SERVING, Phase.DONE, Phase.STOPPING):
        return []
    return [
        *_alone(view),
        *_parted(view),
        *_refused(view),
        *_unreachable(view),
        *_uncallable(view),
        *_late(view),
        *_silent(view),
        *_unresolved(view),
        *_multicast(view),
        *_clocks(view),
        *_versions(view),
    ]


def in_contact(peer: Peer) -> bool:
    """Whether a peer of this run is there, wherever it is in the schedule."""
    return peer.state not in (State.GONE, State.REFUSED)


def _alone(view: View) -> Iterable[Finding]:
    if view.wanted <= 1 or view.isolated:
        return
    here = [peer for peer in view.peers if in_contact(peer)]
    if view.phase == Phase.TRAINING:
        finished = here and all(peer.state == State.DONE for peer in here)
        if view.neighbours is None or view.neighbours or finished:
            return
        why = _listed(f"{peer.name} {peer.state}: {peer.detail or peer.address}" for peer in here)
        yield Finding(
            "alone",
            "no neighbour in this block visit, training alone; "
            + (f"known: {why}; they are met again at a later visit" if here else _LOOK),
        )
    elif not here and view.looking >= PATIENCE_SECONDS and not _is_refused(view):
        yield Finding(
            "alone",
            f"no other node of run {view.run!r} answers; start the others with the same run.name, "
            "or name one of them in network.static_peers"
            + (" (multicast may be blocked between them and us)" if view.zeroconf else ""),
        )


_LOOK = (
    "nobody answers any more; check that the others run and the network between is up "
    "(they are met again by themselves), or name one in network.static_peers"
)


def _parted(view: View) -> Iterable[Finding]:
    """Members are missing although the run goes on: crashed, or on the far side of a cut.

    Who said goodbye has left and is not missing. From here a cut cannot be told from a crash,
    except that it takes several at once.
    """
    if view.phase != Phase.TRAINING or view.wanted <= 1:
        return
    here = sum(in_contact(peer) for peer in view.peers) + 1
    left = sum(peer.state == State.GONE and peer.phase == Phase.STOPPING for peer in view.peers)
    lost = sorted(
        (p for p in view.peers if p.state == State.GONE and p.phase != Phase.STOPPING),
        key=lambda peer: (peer.last_seen, peer.name),
    )
    expected = max(view.wanted, view.most)
    if here + left >= expected:
        return
    names = _listed(sorted(peer.name for peer in lost))
    if len(lost) > 1 and lost[-1].last_seen - lost[0].last_seen <= TOGETHER_SECONDS:
        text = (
            f"{names} vanished together: the swarm seems cut in two parts, and both train on; "
            f"check the network between here and {_line(lost[0].address)} (they merge by "
            "themselves once it is up)"
        )
    elif lost:
        text = (
            f"{names} vanished, {here} of {expected} members are here; start them again with the "
            "same command, or check the network between (they are met again by themselves)"
        )
    else:
        text = (
            f"{here} of {expected} members are here while we train: the swarm may be in two parts; "
            "start the missing ones, or name one of them in network.static_peers"
        )
    yield Finding("parted", text)


def _refused_peers(view: View) -> list[Peer]:
    return [
        peer
        for peer in view.peers
        if peer.state == State.REFUSED and view.now - peer.last_seen < REFUSAL_SECONDS
    ]


def _refusals(view: View) -> dict[str, Refusal]:
    return {
        address: refusal
        for address, refusal in view.refusals.items()
        if view.now - refusal.at < REFUSAL_SECONDS
    }


def _is_refused(view: View) -> bool:
    """Whether a node of this run is there, which is told by its refusal."""
    others = any(refusal.reason != "other_run" for refusal in _refusals(view).values())
    return others or bool(_refused_peers(view))


def _refused(view: View) -> Iterable[Finding]:
    found = [
        Finding(
            f"refused:{_line(peer.name)}",
            f"{_line(peer.name)} and this node refuse each other: {_line(peer.detail)}; make the "
            "two equal and restart the one that is wrong",
        )
        for peer in _refused_peers(view)
    ]
    for address, refusal in _refusals(view).items():
        if refusal.reason == "other_run" and address not in view.static:
            continue  # other runs on the same network are normal
        remedy = _REMEDIES.get(refusal.reason, "see both nodes' logs")
        found.append(
            Finding(
                f"refused:{_line(address)}",
                f"{_line(refusal.node)} at {_line(address)} and this node refuse each other: "
                f"{_line(refusal.detail or refusal.reason)}; {remedy}",
            )
        )
    yield from _few(found, "refused", "more nodes are refused; see the log")


_REMEDIES = {
    "other_run": "correct network.static_peers, or run.name",
    "protocol": "install the same version of deca-node on both",
    "name_taken": "give each node its own name (node.name)",
    "bad_address": "set node.advertise there to a host that can be called",
    "handshake": "both need certificates of one authority, or neither (docs/securing.md)",
    "revoked": "a revoked node can be invited under another name",
    "expired": "invite it anew where the authority's key is (docs/securing.md)",
    "not_allowed": "name it in trust.allow there, or clear that list",
    "full": "see docs/protocol.md on the size of a run",
}


def _unreachable(view: View) -> Iterable[Finding]:
    told = [peer.name for peer in view.peers if in_contact(peer) and _told(view, peer).unreached]
    if told:
        yield Finding(
            "unreachable",
            f"{_listed(sorted(told))} cannot call this node: open port {view.port}/tcp in the "
            "firewall here, or set node.advertise to the address that others can call",
        )


def _uncallable(view: View) -> Iterable[Finding]:
    found = [
        Finding(
            f"uncallable:{_line(peer.name)}",
            f"{_line(peer.name)} calls us, but does not answer at {_line(peer.address)}: open that "
            "port in the firewall there, or set node.advertise there",
        )
        for peer in view.peers
        if peer.name in view.uncallable and in_contact(peer) and peer.state != State.DONE
    ]
    yield from _few(found, "uncallable", "more peers call us and do not answer")


def _late(view: View) -> Iterable[Finding]:
    """Neighbours that train, but are mixed without: of no use to us while it lasts.

    The suspect are no slow ones; what they are is told when it is known.
    """
    if view.phase != Phase.TRAINING:
        return
    found = [
        Finding(
            f"late:{_line(peer.name)}",
            f"{_line(peer.name)}'s blocks come too late, {steps} steps in a row: we mix without "
            "it; lower data.batch_size there if it computes slowly, check the link if that is "
            "slow, or raise network.step_deadline and network.wait_budget here",
        )
        for peer in view.peers
        if (steps := view.late.get(peer.name, 0)) >= LATE_STEPS
        and peer.name in (view.neighbours or ())
        and peer.state == State.ALIVE
        and peer.phase == Phase.TRAINING
    ]
    yield from _few(found, "late", "more neighbours' blocks come too late")


def _silent(view: View) -> Iterable[Finding]:
    if view.looking >= PATIENCE_SECONDS:
        for address in view.static:
            if address in view.silent:
                yield Finding(
                    f"silent:{address}",
                    f"static peer {address} has never answered; start the node there, open its "
                    "port, or correct network.static_peers",
                )


def _unresolved(view: View) -> Iterable[Finding]:
    for name, reason in sorted(view.unresolved.items()):
        yield Finding(
            f"unresolved:{name}",
            f"{name} has no address ({_line(reason)}); correct network.dns_peers, or repair the "
            "name server or the service of that name",
        )


def _multicast(view: View) -> Iterable[Finding]:
    deaf = view.zeroconf and not view.heard_itself and not view.heard_others
    if deaf and view.looking >= PATIENCE_SECONDS:
        yield Finding(
            "multicast",
            "multicast does not work here: not even this node's own announcement is heard; allow "
            "port 5353/udp, choose other network.interfaces, or set network.static_peers",
        )


def _clocks(view: View) -> Iterable[Finding]:
    clocks = {
        peer.name: clock
        for peer in view.peers
        if in_contact(peer) and (clock := _told(view, peer).clock) is not None
    }
    off = {name: clock for name, clock in clocks.items() if abs(clock) > CLOCK_SECONDS}
    ahead = [clock > 0 for clock in off.values()]
    if len(off) > 1 and len(off) == len(clocks) and (all(ahead) or not any(ahead)):
        least = min(off.values(), key=abs)
        yield Finding(
            "clock",
            f"the clock of this machine is at least {_far(least)} "
            f"{'behind' if least > 0 else 'ahead of'} that of all {len(off)} peers; set it (NTP)",
        )
        return
    found = [
        Finding(
            f"clock:{_line(name)}",
            f"the clock of {_line(name)} is {_far(clock)} {'ahead of' if clock > 0 else 'behind'} "
            "ours; set the wrong one (NTP)",
        )
        for name, clock in sorted(off.items())
    ]
    yield from _few(found, "clock", "more clocks differ from ours")


def _versions(view: View) -> Iterable[Finding]:
    found = [
        Finding(
            f"version:{_line(peer.name)}",
            f"{_line(peer.name)} runs deca-node {_line(version)}, this is {view.version}; install "
            "the same version on both",
        )
        for peer in view.peers
        if in_contact(peer) and (version := _told(view, peer).version) not in ("", view.version)
    ]
    yield from _few(found, "version", "more peers run another version")


def _told(view: View, peer: Peer) -> Told:
    return view.told.get(peer.name, _NOTHING)


_NOTHING = Told()


def _few(found: Sequence[Finding], key: str, rest: str) -> Iterable[Finding]:
    yield from found[:MAX_TOLD]
    if len(found) > MAX_TOLD:
        yield Finding(f"{key}:more", f"{len(found) - MAX_TOLD} {rest}")


def _listed(words: Iterable[str]) -> str:
    some = list(map(_line, words))
    more = f" and {len(some) - MAX_TOLD} more" if len(some) > MAX_TOLD else ""
    return ", ".join(some[:MAX_TOLD]) + more


def _line(text: str) -> str:
    """What a peer said, as a part of one line."""
    return printable(text, _TEXT_CHARACTERS)


def _far(seconds: float) -> str:
    far = abs(seconds)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if far >= 2 * length:
            return f"{far / length:.0f} {unit}"
    return f"{far:.0f} s"
