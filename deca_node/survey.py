"""A look at all nodes of a swarm that can be reached: asked one after the other whom they know."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deca_node import access, status
from deca_node.config import checked_address
from deca_node.errors import DecaError
from deca_node.limits import MAX_ADDRESS_BYTES, MAX_SURVEYED
from deca_node.pb import node_pb2 as pb
from deca_node.transport import ask_status

ASK_SECONDS = 3.0
# Asked at once: a laptop's look at a large swarm is to stay a look.
ASK_AT_ONCE = 16

Ask = Callable[[str], Awaitable[pb.NodeStatus]]
"""The status of the node at an address; raises DecaError."""


@dataclass
class Survey:
    """What a look found.

    Attributes:
        statuses: by address, of those that answered; one for each node.
        errors: by address, why another did not.
        names: by address, run and name of who is there, as others say.
    """

    statuses: dict[str, pb.NodeStatus] = field(default_factory=dict)
    errors: dict[str, DecaError] = field(default_factory=dict)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)

    def unreachable(self) -> dict[str, str]:
        """Nodes that others know and that did not answer, by name: why."""
        here = {(now.run, now.node) for now in self.statuses.values()}
        missing = {}
        for address, error in self.errors.items():
            run, name = self.names.get(address, ("", address))
            if (run, name) not in here:
                missing[plain(name)] = plain(str(error))
        return missing


@dataclass(frozen=True)
class Edge:
    """An edge between two nodes, as its ends see it.

    Attributes:
        ends: their names, in order.
        weights: w_ij as the first and the second end have it; None where it was not asked.
        states: of the other, as each end sees it; likewise.
        rate: bytes per second in both directions, as far as known.
        waited: seconds that steps of either end waited for the other.
    """

    ends: tuple[str, str]
    weights: tuple[float | None, float | None]
    states: tuple[str, str]
    rate: float
    waited: float

    @property
    def healthy(self) -> bool:
        """Whether both ends that were asked find the other alive and use the edge."""
        told = [weight for weight in self.weights if weight is not None]
        return all(told) and all(state in ("", "alive") for state in self.states)


async def walk(begin: Iterable[str], trust: Path | None = None, ask: Ask | None = None) -> Survey:
    """Ask nodes, then those that they know, and so on, MAX_SURVEYED at most.

    Args:
        begin: addresses, as HOST:PORT or of socket files.
        trust: the trust folder to ask with; None finds out for each.
        ask: in place of the network.
    """

    async def over_network(address: str) -> pb.NodeStatus:
        shown = await access.credentials([address], trust)
        return await ask_status(address, ASK_SECONDS, shown.get(address))

    ask = ask or over_network
    found = Survey()
    slots = asyncio.Semaphore(ASK_AT_ONCE)
    met: set[tuple[str, str]] = set()
    asked: set[str] = set()

    async def one(address: str) -> None:
        async with slots:
            try:
                found.statuses[address] = await ask(address)
            except DecaError as error:
                found.errors[address] = error

    coming = list(dict.fromkeys(begin))
    while coming:
        asked.update(coming)
        await asyncio.gather(*map(one, coming))
        following: dict[str, tuple[str, str]] = {}
        for address in coming:
            now = found.statuses.get(address)
            if now is None:
                continue
            if (now.run, now.node) in met:  # at another of its addresses
                del found.statuses[address]
                continue
            met.add((now.run, now.node))
            asked.add(now.address)
            for peer in now.peers:
                if peer.state != "refused":
                    following.setdefault(peer.address, (now.run, peer.node))
        new = [a for a, who in following.items() if a not in asked and who not in met]
        room = max(0, MAX_SURVEYED - len(asked))
        coming = [address for address in new if _is_address(address)][:room]
        found.names.update({address: following[address] for address in coming})
    return found


def _is_address(text: str) -> bool:
    """Whether what a node says of another can be called at all."""
    if len(text) > MAX_ADDRESS_BYTES or not text.isprintable():
        return False
    try:
        checked_address(text)
    except ValueError:
        return False
    return True


def plain(text: str) -> str:
    """A text that somebody else wrote, without what would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def edges(statuses: Iterable[pb.NodeStatus]) -> list[Edge]:
    """Each pair of neighbours once, in the order of their names."""
    seen: dict[tuple[str, str], dict[str, pb.PeerStatus]] = {}
    known = {now.node: now for now in statuses}
    for now in known.values():
        for peer in now.peers:
            ends = (min(now.node, peer.node), max(now.node, peer.node))
            seen.setdefault(ends, {})[now.node] = peer
    found = []
    for ends, views in sorted(seen.items()):
        if not any(peer.neighbour for peer in views.values()):
            continue
        sides = [views.get(name) for name in ends]
        found.append(
            Edge(
                ends,
                _pair([None if side is None else side.weight for side in sides]),
                _pair(["" if side is None else plain(side.state) for side in sides]),
                max(_rate(side) for side in sides),
                sum(side.waited_seconds for side in sides if side is not None),
            )
        )
    return found


def _pair(values: Sequence[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second


def _rate(side: pb.PeerStatus | None) -> float:
    return 0.0 if side is None else side.send_rate + side.receive_rate


# For people and scripts


def render(found: Survey) -> RenderableType:
    """A row per node, then a line per edge."""
    rows: dict[str, pb.NodeStatus | str] = {
        f"{now.run}/{now.node}": now
        for now in sorted(found.statuses.values(), key=lambda now: (now.run, now.node))
    }
    for name, why in sorted(found.unreachable().items()):
        rows[name] = f"no answer: {why}"
    parts: list[RenderableType] = [status.render_swarm(rows)]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("edge", "weight", "rate", "waited", "state"):
        table.add_column(heading, justify="left" if heading in ("edge", "state") else "right")
    for run in sorted({now.run for now in found.statuses.values()}):
        for edge in edges(now for now in found.statuses.values() if now.run == run):
            table.add_row(*cells(edge))
    if table.row_count:
        parts += [Text(""), table]
    return Group(*parts)


def cells(edge: Edge) -> list[Text]:
    """An edge as its names, weight, rate, seconds waited, and state."""
    first, second = edge.weights
    told = [f"{weight:.3f}" for weight in (first, second) if weight is not None]
    same = len(set(told)) < 2
    weights = told[0] if same else "/".join(told)
    seen = sorted({state for state in edge.states if state})
    style = "green" if edge.healthy else "yellow" if "alive" in seen else "red"
    return [
        Text(f"{plain(edge.ends[0])} — {plain(edge.ends[1])}"),
        Text(weights, "" if same else "yellow"),
        Text(status.rate(edge.rate) if edge.rate else "-"),
        Text(status.duration(edge.waited)),
        Text(", ".join(seen), style),
    ]


def as_json(found: Survey) -> dict[str, Any]:
    """The same as plain values."""
    runs = sorted({now.run for now in found.statuses.values()})
    return {
        "nodes": [status.as_json(now) for now in found.statuses.values()],
        "edges": [
            {
                "run": run,
                "ends": list(edge.ends),
                "weights": list(edge.weights),
                "states": list(edge.states),
                "rate": edge.rate,
                "waited_seconds": edge.waited,
                "healthy": edge.healthy,
            }
            for run in runs
            for edge in edges(now for now in found.statuses.values() if now.run == run)
        ],
        "unreachable": found.unreachable(),
    }
