"""What several nodes tell, as one picture. Pure: time is an argument, in seconds.

Everything a node tells is hostile: in the picture texts are cut and made printable, numbers finite,
lists bounded; ``statuses`` alone hands out what was told, to status.py, which does that itself.
Who is asked beside the given addresses is what answering nodes say of their peers, within bounds.
"""

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from deca_node import status as words
from deca_node.addresses import is_address, is_own, split
from deca_node.curve import VALUES, Curve, Point
from deca_node.events import printable
from deca_node.limits import (
    MAX_BLOCKS_SHOWN,
    MAX_EVENTS,
    MAX_EVENTS_KEPT,
    MAX_HISTORY_POINTS,
    MAX_LABELS,
    MAX_LINKS_SHOWN,
    MAX_MEMBERS,
    MAX_NAME_BYTES,
    MAX_POINTS_SHOWN,
    MAX_PROPOSALS,
    MAX_WARNINGS_SHOWN,
)
from deca_node.pb import node_pb2 as pb

# A node that does not answer for so long is shown as gone; until then as it was, and stale.
GONE_SECONDS = 10.0
# One answer may be on its way for so much longer than another; to begin anew takes a node longer.
ANSWER_SECONDS = 5.0
# An address that only a peer named, and where no node has ever answered, is dropped.
MAX_VAIN_CALLS = 10
# An edge is slow when steps have waited for its blocks in this share of the last seconds.
SLOW_SHARE = 0.25
WAIT_WINDOW_SECONDS = 10.0
# Points of one node's curve that a browser is sent: as many as a wide chart has pixels, halved.
_POINTS_OF_ONE = (64, 600)
_LARGEST = 2**53 - 1  # JavaScript's largest whole number
# From bad to good: what the two ends say of an edge is shown as the worse of the two.
_LINK_STATES = ("gone", "refused", "suspect", "behind", "ahead", "one-sided", "slow", "ok")
_TROUBLE = frozenset({"warning", "suspect", "gone", "refused", "behind", "ahead", "silent"})
# What is said of who took leave, also of one that was never asked.
LEFT = ("finished", "stopped")
_ENDED = {pb.PHASE_SERVING: "finished", pb.PHASE_DONE: "finished", pb.PHASE_STOPPING: "stopped"}
# What is sent of every node, again and again; the rest of its status only when it is looked at.
_TOLD = (
    *("run", "node", "version", "phase", "round", "position", "step", "rounds", "blocks"),
    *("steps_per_visit", "block", "steps_done", "steps_total", "eta_seconds", "uptime_seconds"),
    *("loss", "gradient_norm", "h_norm", "disagreement", "degree", "own_weight"),
    *("incomplete_mixes", "device", "memory_bytes", "device_memory_bytes", "bytes_sent"),
    *("bytes_received", "send_rate", "receive_rate", "model", "waiting_for", "members_wanted"),
    *("catch_up_bytes", "catch_up_total", "method", "topology"),
    *("warnings", "label_counts", "block_disagreement", "round_order"),
)
_LENGTHS = {
    "warnings": MAX_WARNINGS_SHOWN,
    "label_counts": MAX_LABELS,
    "block_disagreement": MAX_BLOCKS_SHOWN,
    "round_order": MAX_BLOCKS_SHOWN,
    "peers": MAX_MEMBERS,
    "events": MAX_EVENTS,
}


@dataclass
class _Watched:
    """An address that is asked.

    ``by`` is the address of the node that named it, if no operator did; ``failing`` since when it
    does not answer; ``told_gone`` whether an event has said so; ``waits`` by peer the seconds that
    steps had waited for it, at moments of the last while; ``leavers`` by key how peers have left
    that took leave of it.
    """

    address: str
    given: bool
    by: str = ""
    status: pb.NodeStatus | None = None
    answered: float = -math.inf
    failing: float | None = None
    error: str = ""
    vain: int = 0
    told_gone: bool = False
    last_event: int = 0
    curve: Curve = field(default_factory=lambda: Curve(MAX_HISTORY_POINTS))
    waits: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    leavers: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return "" if self.status is None else _key(self.status.run, self.status.node)

    def state(self, now: float) -> str:
        """live, stale, gone, finished or stopped."""
        if self.failing is None:
            return "live"
        if self.status is not None and self.status.phase in _ENDED:
            return _ENDED[self.status.phase]
        return "gone" if now - self.answered > GONE_SECONDS else "stale"


class Panorama:
    """The picture of all nodes that are watched.

    Args:
        walk: also ask the peers of those that answer.
    """

    def __init__(self, *, walk: bool = True) -> None:
        self._walk = walk
        self._watched: dict[str, _Watched] = {}
        self._given: tuple[str, ...] = ()
        self._aliases: dict[str, str] = {}  # given addresses of nodes that answer at another one
        self._edges: dict[tuple[str, str], None] = {}  # pairs that have been edges, oldest first
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS_KEPT)
        self._event_id = 0

    # --- whom to ask

    def give(self, addresses: Iterable[str]) -> None:
        """The operator's addresses; what was given before stays if a node has answered there."""
        self._given = tuple(addresses)[:MAX_MEMBERS]
        self._aliases = {a: key for a, key in self._aliases.items() if a in self._given}
        here = {one.key for one in self._watched.values() if one.failing is None}
        for address in self._given:
            if self._aliases.get(address) in here:
                continue
            self._watched.setdefault(address, _Watched(address, given=True)).given = True
        for address, one in list(self._watched.items()):
            if one.given and address not in self._given:
                one.given = False
                if one.status is None:
                    del self._watched[address]

    def addresses(self) -> list[str]:
        """All that are to be asked."""
        return list(self._watched)

    def _propose(self, status: pb.NodeStatus, source: str) -> None:
        """Ask a node's peers too.

        A node elsewhere must not make us call this machine's own services, and one that lies must
        not crowd out the others.
        """
        known = {one.key for one in self._watched.values()}
        named = sum(one.by == source and one.status is None for one in self._watched.values())
        for peer in status.peers[:MAX_MEMBERS]:
            if len(self._watched) >= MAX_MEMBERS or named >= MAX_PROPOSALS:
                return
            if (
                peer.state in ("gone", "refused", "done")
                or peer.address in self._watched
                or _key(status.run, peer.node) in known
            ):
                continue
            if not is_address(peer.address):
                continue
            if _is_local(peer.address) and not _is_local(source):
                continue
            self._watched[peer.address] = _Watched(peer.address, given=False, by=source)
            named += 1

    def statuses(self) -> dict[str, pb.NodeStatus]:
        """What nodes told last, as they told it, by key."""
        return {one.key: one.status for one in self._watched.values() if one.status is not None}

    def address(self, key: str) -> str | None:
        """Where a node that answers now is asked."""
        here = (one for one in self._watched.values() if one.key == key and one.failing is None)
        return next((one.address for one in here), None)

    # --- what comes back

    def answered(self, address: str, status: pb.NodeStatus, now: float) -> None:
        """A node has told its status."""
        one = self._watched.get(address)
        if one is None:
            return
        key = _key(status.run, status.node)
        if self._is_spare(one, status):
            del self._watched[address]
            if one.given:
                self._aliases[address] = key
            return
        before = one.status
        if before is not None and (one.key != key or _is_anew(before, status, now - one.answered)):
            one.curve, one.last_event = Curve(MAX_HISTORY_POINTS), 0
            one.waits.clear()
        one.status, one.answered, one.failing, one.error, one.vain = status, now, None, "", 0
        if one.told_gone:
            one.told_gone = False
            self._tell(one, now, "answers", "answers again")
        self._take_events(one, status, now)
        self._take_waits(one, status, now)
        one.leavers = _leavers(status)
        for peer in status.peers[:MAX_MEMBERS]:
            if peer.neighbour:
                pair = _pair(key, _key(status.run, peer.node))
                self._edges.pop(pair, None)
                self._edges[pair] = None
        while len(self._edges) > MAX_LINKS_SHOWN:
            del self._edges[next(iter(self._edges))]
        if self._walk:
            self._propose(status, address)

    def _is_spare(self, one: _Watched, status: pb.NodeStatus) -> bool:
        """Whether an address has nothing new: a known node's other one, or another run's node.

        A node that came back at another address takes the place of the one that is silent.
        """
        namer = self._watched.get(one.by)
        if namer is not None and namer.status is not None and namer.status.run != status.run:
            return True
        key = _key(status.run, status.node)
        for other in [other for other in self._watched.values() if other.key == key]:
            if other is one:
                continue
            if other.failing is None and (other.given or not one.given):
                return True
            one.told_gone |= other.told_gone
            del self._watched[other.address]
        return False

    def failed(self, address: str, error: str, now: float) -> None:
        """A node has not answered."""
        one = self._watched.get(address)
        if one is None:
            return
        one.vain += 1
        one.error = printable(error)
        if one.failing is None:
            one.failing = now
        if one.status is None:
            if not one.given and one.vain >= MAX_VAIN_CALLS:
                del self._watched[address]
        elif not one.told_gone and self._state(one, now) == "gone":
            one.told_gone = True
            self._tell(one, now, "silent", f"does not answer at {one.address}")

    def seen_until(self, address: str) -> int | None:
        """The last step of which a node's curve is known here; None when none is."""
        one = self._watched.get(address)
        return one.curve.last if one is not None else None

    def steps_made(self, address: str, points: Iterable[pb.HistoryPoint]) -> None:
        """A node has told of its steps."""
        one = self._watched.get(address)
        if one is None:
            return
        for point in list(points)[:MAX_HISTORY_POINTS]:
            if point.first <= point.last <= _LARGEST:
                values = {name: getattr(point, name) for name in VALUES}
                one.curve.add(Point(point.first, point.last, **values))

    def _take_events(self, one: _Watched, status: pb.NodeStatus, now: float) -> None:
        for event in status.events[-MAX_EVENTS:]:
            if event.serial <= one.last_event:
                continue
            one.last_event = event.serial
            age = event.age_seconds if 0 <= event.age_seconds < _LARGEST else 0.0
            self._tell(one, now - age, _name(event.kind), printable(event.text), event.peer)

    def _tell(self, one: _Watched, at: float, kind: str, text: str, peer: str = "") -> None:
        self._event_id += 1
        self._events.append(
            {
                "id": self._event_id,
                "at": at,
                "key": one.key,
                "node": one.key.partition("/")[2],
                "kind": kind,
                "text": text,
                "peer": _name(peer) if peer else "",
                "trouble": kind in _TROUBLE,
            }
        )

    @staticmethod
    def _take_waits(one: _Watched, status: pb.NodeStatus, now: float) -> None:
        names = {peer.node: peer for peer in status.peers[:MAX_MEMBERS] if peer.neighbour}
        one.waits = {name: one.waits.get(name, deque()) for name in names}
        for name, waits in one.waits.items():
            waits.append((now, names[name].waited_seconds))
            while now - waits[0][0] > WAIT_WINDOW_SECONDS:
                waits.popleft()

    # --- the picture

    def view(self, now: float) -> dict[str, Any]:
        """All nodes and edges by run, and the addresses where no node has answered yet."""
        met = [one for one in self._watched.values() if one.status is not None]
        runs = sorted({_name(one.status.run) for one in met if one.status is not None})
        return {
            "runs": [
                self._run(run, [one for one in met if one.key.startswith(f"{run}/")], now)
                for run in runs
            ],
            "silent": [
                {"address": one.address, "error": one.error}
                for one in self._watched.values()
                if one.given and one.status is None
            ],
        }

    def _run(self, run: str, met: Sequence[_Watched], now: float) -> dict[str, Any]:
        nodes = {one.key: self._card(one, now) for one in met}
        for one in met:
            if one.status is None or one.failing is not None:
                continue
            for peer in one.status.peers[:MAX_MEMBERS]:
                key = _key(run, peer.node)
                said = one.leavers.get(key, _word(peer.state))
                if key in nodes:
                    if nodes[key]["state"] == "heard" and nodes[key]["said"] in ("gone", "suspect"):
                        nodes[key]["said"] = said  # of who left some hear only that it is gone
                elif len(nodes) < MAX_MEMBERS:
                    nodes[key] = {
                        "key": key,
                        "run": run,
                        "node": _name(peer.node),
                        "address": printable(peer.address),
                        "state": "heard",
                        "said": said,
                        "error": self._error(peer.address),
                    }
        links = sorted(
            self._links(run, met, nodes),
            key=lambda link: (_LINK_STATES.index(link["state"]), link["a"], link["b"]),
        )
        return {
            "run": run,
            "nodes": [nodes[key] for key in sorted(nodes, key=_natural)],
            "links": links[:MAX_LINKS_SHOWN],
            "links_left_out": max(0, len(links) - MAX_LINKS_SHOWN),
            "summary": _summary(nodes.values()),
        }

    def _error(self, address: str) -> str:
        return self._watched[address].error if address in self._watched else ""

    def _state(self, one: _Watched, now: float) -> str:
        """A node's state; one that is silent may have taken leave of others before."""
        state = one.state(now)
        if state not in ("stale", "gone") or one.status is None:
            return state
        key = one.key
        for other in self._watched.values():
            if other.failing is None and key in other.leavers:
                return other.leavers[key]
        return state

    def _card(self, one: _Watched, now: float) -> dict[str, Any]:
        assert one.status is not None  # noqa: S101
        tree = words.as_json(one.status, _TOLD)
        card = {name: _clean(tree[name], _LENGTHS.get(name, 0)) for name in _TOLD}
        return {
            **card,
            "key": one.key,
            "run": _name(tree["run"]),
            "node": _name(tree["node"]),
            "address": one.address,
            "state": self._state(one, now),
            "age": round(now - one.answered, 1),
            "error": one.error,
        }

    def _links(
        self, run: str, met: Sequence[_Watched], nodes: Mapping[str, Any]
    ) -> Iterable[dict[str, Any]]:
        said: dict[tuple[str, str], dict[str, pb.PeerStatus]] = {}
        shares: dict[tuple[str, str], float] = {}
        for one in met:
            if one.status is None or one.failing is not None:
                continue
            for peer in one.status.peers[:MAX_MEMBERS]:
                pair = _pair(one.key, _key(run, peer.node))
                if pair[0] != pair[1] and (peer.neighbour or pair in self._edges):
                    said.setdefault(pair, {})[one.key] = peer
                    shares[pair] = max(shares.get(pair, 0.0), _waiting(one.waits.get(peer.node)))
        for pair in self._edges:
            said.setdefault(pair, {})
        for (a, b), ends in said.items():
            if a not in nodes or b not in nodes:
                continue  # of another run, or beyond MAX_MEMBERS
            state = _link_state((nodes[a], nodes[b]), ends, shares.get((a, b), 0.0))
            if not state:
                continue  # was an edge once, and both ends are well without it
            yield {
                "a": a,
                "b": b,
                "state": state,
                "weights": [_number(ends[key].weight) if key in ends else None for key in (a, b)],
                "states": [_word(ends[key].state) if key in ends else "" for key in (a, b)],
                "seen": max((_number(row.last_seen_seconds) for row in ends.values()), default=0),
                "waited": sum(_number(row.waited_seconds) for row in ends.values()),
                "waiting": round(shares.get((a, b), 0.0), 2),
                "retries": sum(_clean(row.retries, 0) for row in ends.values()),
                "refusals": sum(
                    _clean(count, 0) for row in ends.values() for count in row.refusals.values()
                ),
                "rate": max(
                    (_number(r.send_rate + r.receive_rate) for r in ends.values()), default=0
                ),
                "bytes": max(
                    (_clean(row.bytes_sent + row.bytes_received, 0) for row in ends.values()),
                    default=0,
                ),
                "detail": next((printable(row.detail) for row in ends.values() if row.detail), ""),
            }

    def details(self, key: str, now: float) -> dict[str, Any] | None:
        """The whole status of one node; None when there is none of that name."""
        for one in self._watched.values():
            if one.status is not None and one.key == key:
                tree = words.as_json(one.status)
                return self._card(one, now) | {
                    name: _clean(value, _LENGTHS.get(name, MAX_MEMBERS))
                    for name, value in tree.items()
                    if name not in (*_TOLD, "address")
                }
        return None

    # --- what grows: told from where the receiver is

    def events(self, after: int, now: float, wall: float) -> list[dict[str, Any]]:
        """Events with a larger id than ``after``; their ``at`` as seconds since 1970.

        Args:
            after: 0 for all.
            now: the clock that the events were noted by.
            wall: the same moment, in seconds since 1970.
        """
        return [
            event | {"at": round(wall + event["at"] - now, 1)}
            for event in self._events
            if event["id"] > after
        ]

    def curves(self, after: Mapping[str, int]) -> dict[str, list[list[float | None]]]:
        """New points by node: first and last step, and ``curve.VALUES`` in their order.

        Args:
            after: by node, the last step that the receiver has; whole curves, thinned, of others.
        """
        met = [one for one in self._watched.values() if one.status is not None]
        low, high = _POINTS_OF_ONE
        limit = min(max(MAX_POINTS_SHOWN // max(len(met), 1), low), high)
        found = {}
        for one in met:
            last = after.get(one.key)
            if last is not None and one.curve.last is not None and one.curve.last < last:
                last = None  # it went back: begun anew
            points = one.curve.points(last, limit)
            if points:
                found[one.key] = [
                    [point.first, point.last, *(_short(getattr(point, name)) for name in VALUES)]
                    for point in points
                ]
        return found


def has_left(node: Mapping[str, Any]) -> bool:
    """Whether a node of a view was never asked, and others tell that it took leave."""
    return node["state"] == "heard" and node["said"] in LEFT


def _summary(cards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A run at a glance, from those of its nodes that answer."""
    cards = list(cards)
    live = [card for card in cards if card["state"] == "live"]
    told = [card for card in cards if card["state"] != "heard"]
    trained = [card for card in live if card["loss"]]
    shares = [c["steps_done"] / c["steps_total"] for c in live or told if c["steps_total"]]
    warnings: dict[str, list[str]] = {}
    for card in live:
        for text in card["warnings"]:
            warnings.setdefault(text, []).append(card["node"])
    return {
        "nodes": sum(not has_left(card) for card in cards),
        "live": len(live),
        "wanted": max((card["members_wanted"] for card in told), default=0),
        "states": Counter(card["said"] if has_left(card) else card["state"] for card in cards),
        "phases": Counter(str(card["phase"]) for card in live),
        "progress": sum(shares) / len(shares) if shares else None,
        "eta_seconds": max((card["eta_seconds"] or 0 for card in live), default=0),
        "bytes_sent": sum(card["bytes_sent"] for card in told),
        "rate": sum(card["send_rate"] or 0 for card in live),
        "loss": median(card["loss"] for card in trained) if trained else None,
        "disagreement": median(card["disagreement"] or 0 for card in trained) if trained else None,
        "warnings": [
            {"text": text, "nodes": names}
            for text, names in sorted(warnings.items(), key=lambda item: -len(item[1]))
        ][:MAX_WARNINGS_SHOWN],
    }


def _link_state(
    ends: Sequence[Mapping[str, Any]], said: Mapping[str, pb.PeerStatus], share: float
) -> str:
    """How an edge is; empty where there is none and nobody is missing."""
    found = {_word(row.state) for row in said.values()}
    over = any(end["state"] in LEFT or end.get("said") in LEFT for end in ends)
    if "done" in found or over:
        return ""
    if "gone" in {end["state"] for end in ends}:
        found.add("gone")
    for state in _LINK_STATES[:5]:
        if state in found:
            return state
    edges = [row.neighbour for row in said.values()]
    if not any(edges):
        return ""
    if len(edges) == 2 and not all(edges):
        return "one-sided"
    return "slow" if share > SLOW_SHARE else "ok"


def _waiting(waits: deque[tuple[float, float]] | None) -> float:
    """In which share of the last while steps waited for a peer's blocks."""
    if not waits or waits[-1][0] - waits[0][0] < WAIT_WINDOW_SECONDS / 4:
        return 0.0
    share = (waits[-1][1] - waits[0][1]) / (waits[-1][0] - waits[0][0])
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def _leavers(status: pb.NodeStatus) -> dict[str, str]:
    """Peers that a node knows to have finished or stopped, by key; of the same key the first."""
    found: dict[str, str] = {}
    for peer in status.peers[:MAX_MEMBERS]:
        if peer.state == "done":
            found.setdefault(_key(status.run, peer.node), "finished")
        elif peer.state == "gone" and peer.phase == pb.PHASE_STOPPING:
            found.setdefault(_key(status.run, peer.node), "stopped")
    return found


def _key(run: str, node: str) -> str:
    """What a node is called in the picture."""
    return f"{_name(run)}/{_name(node)}"


def _is_anew(before: pb.NodeStatus, now: pb.NodeStatus, passed: float) -> bool:
    """Whether another process answers; in a container each has the same number.

    Args:
        before: what was told last.
        now: what is told.
        passed: seconds between the two.
    """
    grown = now.uptime_seconds - before.uptime_seconds
    return before.pid != now.pid or grown < max(0.0, passed - ANSWER_SECONDS)


def _pair(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)


def _natural(key: str) -> list[int | str]:
    """node-2 comes before node-10."""
    parts = re.split(r"([0-9]+)", key)  # every second one is a number
    return [int(part) if at % 2 else part for at, part in enumerate(parts)]


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    return is_own(split(address)[0])


def _name(text: str) -> str:
    """A name without what could end the key's run, for a browser to show."""
    cut = text.encode()[:MAX_NAME_BYTES].decode(errors="ignore").replace("/", "?")
    return printable(cut) or "?"


def _word(state: str) -> str:
    return state if state in words.PEER_STATES else "unknown"


def _number(value: float) -> float:
    """A finite number that is no amount below zero."""
    return round(value, 6) if 0 <= value <= _LARGEST else 0.0


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _clean(value: Any, length: int) -> Any:
    """A plain value of a message with bounds: texts, numbers, and lists of at most ``length``."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return min(value, _LARGEST)
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, Mapping):
        some = list(value.items())[:length] if length else list(value.items())[:MAX_MEMBERS]
        return {printable(str(name)): _clean(one, MAX_MEMBERS) for name, one in some}
    return [_clean(one, MAX_MEMBERS) for one in value[:length]]
