"""A node's status for people (rich) and for scripts (plain dicts)."""

import datetime as dt
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from google.protobuf.message import Message
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deca_node.events import printable
from deca_node.limits import (
    MAX_MEMBERS,
    MAX_NAME_BYTES,
    MAX_SHOWN_CHARACTERS,
    MAX_TIME,
    MAX_WARNINGS_SHOWN,
)
from deca_node.pb import node_pb2 as pb

_STATE_STYLES = {
    "alive": "green",
    "suspect": "yellow",
    "behind": "yellow",
    "ahead": "yellow",
    "gone": "red",
    "refused": "red",
}
PEER_STATES = frozenset({*_STATE_STYLES, "done"})
_BAR_WIDTH = 16
# Wider than any row: who reads what is piped takes it by lines.
_PIPE_WIDTH = 1_000_000
_MOST_BYTES = 1 << 64  # what the fields hold
_FOLDED_WIDTH = 12  # of a column that goes over several lines, at least


def make_console() -> Console:
    """A console on stdout; what is piped is neither cut nor folded to a terminal's width."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


# Units


def size(count: float) -> str:
    """Bytes in binary units: ``12.3 MiB``; ``?`` where it cannot be a number of bytes."""
    if not abs(count) <= _MOST_BYTES:  # also what is no number
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def rate(bytes_per_second: float) -> str:
    """Bytes per second in binary units."""
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    """Seconds as ``5s``, ``1m 05s``, ``2h 03m`` or ``3d 04h``; ``?`` where it cannot be one."""
    if not abs(seconds) < MAX_TIME:  # also what is no number
        return "?"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minutes}m {second:02}s" if minutes else f"{second}s"


def phase(value: int) -> str:
    """A phase of the wire as a word; a newer node's unknown phase as its number."""
    try:
        return pb.Phase.Name(pb.Phase.ValueType(value)).removeprefix("PHASE_").lower()
    except ValueError:
        return str(value)


def position(status: pb.NodeStatus) -> str:
    """Where in the schedule, counted from 1 for people: ``round 1/2 block 5 (3/30) step 7/48``."""
    if not status.steps_total:
        return "-"
    if status.steps_done >= status.steps_total:
        return "all steps done"
    return (
        f"round {status.round + 1}/{status.rounds}"
        f"  block {status.block} ({status.position + 1}/{status.blocks})"
        f"  step {min(status.step + 1, status.steps_per_visit)}/{status.steps_per_visit}"
    )


# For people


def text(told: str, style: str = "") -> Text:
    """What a node says, as a terminal may get it: nothing in it is markup or moves a cursor."""
    return Text(printable(told, MAX_SHOWN_CHARACTERS), style)


def _name(told: str, style: str = "") -> Text:
    """A word that a node says, in a column that is as wide as the longest."""
    return Text(printable(told, 2 * MAX_NAME_BYTES + 1), style)  # run and node


def _number(value: float, digits: int) -> str:
    """With so many digits after the point, where nobody has made it long on purpose."""
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3g}"


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    Attributes:
        heading: what is above it.
        right: its cells end at one place instead of beginning there.
        folds: a cell may go over several lines.
        goes: where the terminal is too narrow for all, the column with the highest number goes
            first; 0 stays.
    """

    heading: str
    right: bool = False
    folds: bool = False
    goes: int = 0


class _Fitted:
    """A table that leaves columns out rather than cut or fold names, addresses and numbers."""

    def __init__(self, columns: Sequence[_Column]) -> None:
        self._columns = columns
        self._rows: list[tuple[RenderableType, ...]] = []

    def add_row(self, *cells: RenderableType) -> None:
        """Add a row; cells that are missing are empty."""
        self._rows.append((*cells, *[""] * (len(self._columns) - len(cells))))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        wide = options.update(width=_PIPE_WIDTH)
        needs, empty = {}, {}
        for at, column in enumerate(self._columns):
            cells = [column.heading, *(row[at] for row in self._rows)]
            needs[at] = max(Measurement.get(console, wide, cell).maximum for cell in cells)
            if column.folds:
                needs[at] = min(needs[at], _FOLDED_WIDTH)
            empty[at] = all(str(cell) in ("", "-") for cell in cells[1:])

        def fits() -> bool:  # with two spaces between columns
            return sum(needs.values()) + 2 * (len(needs) - 1) <= options.max_width

        expendable = [at for at in needs if self._columns[at].goes]
        for at in sorted(expendable, key=lambda at: (not empty[at], -self._columns[at].goes)):
            if fits():
                break
            del needs[at]
        table = Table(box=None, header_style="dim", pad_edge=False)
        whole = fits()
        for column in (self._columns[at] for at in needs):
            table.add_column(
                column.heading,
                justify="right" if column.right else "left",
                no_wrap=whole and not column.folds,
                overflow="fold",
            )
        for row in self._rows:
            table.add_row(*(row[at] for at in needs))
        yield table


def render(status: pb.NodeStatus) -> RenderableType:
    """All about one node."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("node", text(status.node, "bold").append_text(text(f"  run {status.run}")))
    facts.add_row("phase", _phase(status))
    if status.waiting_for:
        facts.add_row("waiting for", text(status.waiting_for))
    if status.catch_up_total:
        facts.add_row("fetched", _fetched(status))
    facts.add_row("position", position(status))
    facts.add_row("progress", _progress(status))
    if status.loss:
        facts.add_row(
            "loss", f"{_number(status.loss, 4)}  gradient norm {status.gradient_norm:.3g}"
        )
        facts.add_row("disagreement", f"{status.disagreement:.3g}")
    facts.add_row("degree", f"{status.degree}  own weight {_number(status.own_weight, 3)}")
    if status.incomplete_mixes:
        facts.add_row("incomplete mixes", str(status.incomplete_mixes))
    memory = size(status.memory_bytes)
    if status.device_memory_bytes:
        memory += f"  on the device {size(status.device_memory_bytes)}"
    facts.add_row("model", text(status.model))
    facts.add_row("device", text(f"{status.device}  memory {memory}"))
    facts.add_row("sent", f"{size(status.bytes_sent)}  {rate(status.send_rate)}")
    facts.add_row("received", f"{size(status.bytes_received)}  {rate(status.receive_rate)}")
    facts.add_row("address", text(f"{status.address}  pid {status.pid}  {status.version}"))
    facts.add_row("security", _security(status))
    facts.add_row("up", duration(status.uptime_seconds))
    if status.refusals:
        facts.add_row("refused", text(_reasons(status.refusals), "yellow"))
    for warning in status.warnings[:MAX_WARNINGS_SHOWN]:
        facts.add_row("warning", text(warning, "yellow"))
    return Group(facts, render_peers(status.peers)) if status.peers else facts


def _security(status: pb.NodeStatus) -> Text:
    if not status.certificate_ends:
        return text(status.security, "yellow" if "PLAIN TEXT" in status.security else "")
    try:
        ends = dt.datetime.fromtimestamp(status.certificate_ends, dt.UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        ends = "?"  # no calendar's day
    out = f"  revoked: {', '.join(status.revoked)}" if status.revoked else ""
    return text(f"{status.security}, until {ends}{out}")


_PEER_COLUMNS = (
    _Column("peer"),
    _Column("state"),
    _Column("phase", goes=6),
    _Column("weight", right=True, goes=2),
    _Column("format", right=True, goes=9),
    _Column("visit", right=True, goes=7),
    _Column("seen", right=True, goes=1),
    _Column("sent", right=True, goes=5),
    _Column("received", right=True, goes=4),
    _Column("waited", right=True, goes=8),
    _Column("retries", right=True, goes=10),
    _Column("refused", folds=True, goes=3),
    _Column("address"),
    _Column("detail", folds=True),
)


def render_peers(peers: Iterable[pb.PeerStatus]) -> RenderableType:
    """What a node knows of its peers."""
    table = _Fitted(_PEER_COLUMNS)
    for peer in islice(peers, MAX_MEMBERS):
        table.add_row(
            _name(peer.node, "bold" if peer.neighbour else ""),
            _name(peer.state, _STATE_STYLES.get(peer.state, "")),
            phase(peer.phase),
            _number(peer.weight, 3) if peer.neighbour else "-",
            _name(peer.wire_format or "-"),
            str(peer.visit),
            f"{duration(peer.last_seen_seconds)} ago",
            _traffic(peer.bytes_sent, peer.send_rate),
            _traffic(peer.bytes_received, peer.receive_rate),
            duration(peer.waited_seconds),
            str(peer.retries or "-"),
            text(_reasons(peer.refusals)),
            text(peer.address),
            text(peer.detail),
        )
    return table


_SWARM_COLUMNS = (
    _Column("node"),
    _Column("phase"),
    _Column("", goes=5),
    _Column("step", right=True, goes=2),
    _Column("left", right=True, goes=3),
    _Column("loss", right=True, goes=1),
    _Column("disagreed", right=True, goes=4),
    _Column("received", right=True, goes=7),
    _Column("sent", right=True, goes=6),
    _Column("neighbours", folds=True),
)


def render_swarm(statuses: Mapping[str, pb.NodeStatus | str]) -> RenderableType:
    """One row per node.

    Args:
        statuses: by a name of each, in the order of the rows; a word stands for a node of which
            there is no status and says why. Nodes of several runs show theirs, those of one name
            their addresses.
    """
    table = _Fitted(_SWARM_COLUMNS)
    told = [status for status in statuses.values() if not isinstance(status, str)]
    runs = {status.run for status in told}
    names = Counter((status.run, status.node) for status in told)
    for name, status in statuses.items():
        if isinstance(status, str):
            table.add_row(text(name, "bold"), text(status, "dim"))
            continue
        trained = status.loss != 0  # unset until this process has done a step
        neighbours = ", ".join(peer.node for peer in status.peers if peer.neighbour)
        called = _name(status.node if len(runs) == 1 else f"{status.run}/{status.node}", "bold")
        if names[status.run, status.node] > 1:
            called.append_text(text(f" {status.address}", "dim"))
        table.add_row(
            called,
            _phase(status),
            _catch_up_bar(status, 8) if status.catch_up_total else _bar(status, 8),
            f"{status.steps_done}/{status.steps_total}" if status.steps_total else "-",
            duration(status.eta_seconds) if status.eta_seconds else "-",
            _number(status.loss, 3) if trained else "-",
            f"{status.disagreement:.3g}" if trained else "-",
            size(status.bytes_received),
            size(status.bytes_sent),
            text(f"waits for {status.waiting_for}" if status.waiting_for else neighbours or "-"),
        )
    return table


def render_line(status: pb.NodeStatus) -> RenderableType:
    """Where one node is, in a line."""
    if status.catch_up_total:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(phase(status.phase), _fetched(status), text(status.waiting_for, "dim"))
        return grid
    if not status.loss or status.phase == pb.PHASE_AGREEING:
        return text(f"{phase(status.phase)}  {status.waiting_for}", "dim")
    neighbours = ", ".join(peer.node for peer in status.peers if peer.neighbour)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        _bar(status),
        position(status),
        f"loss {_number(status.loss, 3)}",
        text(f"with {neighbours}" if neighbours else "alone"),
        f"{duration(status.eta_seconds)} left" if status.eta_seconds else phase(status.phase),
    )
    return grid


def _phase(status: pb.NodeStatus) -> Text:
    word = phase(status.phase)
    return text(word, {"training": "green", "done": "green", "stopping": "red"}.get(word, "yellow"))


def _bar(status: pb.NodeStatus, width: int = _BAR_WIDTH) -> ProgressBar:
    return ProgressBar(max(status.steps_total, 1), status.steps_done, width=width)


def _catch_up_bar(status: pb.NodeStatus, width: int = _BAR_WIDTH) -> ProgressBar:
    return ProgressBar(status.catch_up_total, status.catch_up_bytes, width=width)


def _fetched(status: pb.NodeStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    amounts = f"{size(status.catch_up_bytes)} of {size(status.catch_up_total)}"
    grid.add_row(_catch_up_bar(status), amounts)
    return grid


def _progress(status: pb.NodeStatus) -> RenderableType:
    if not status.steps_total:
        return "-"
    grid = Table.grid(padding=(0, 1))
    share = status.steps_done / status.steps_total
    eta = f", about {duration(status.eta_seconds)} left" if status.eta_seconds else ""
    grid.add_row(
        _bar(status), f"{share:.0%}  {status.steps_done} of {status.steps_total} steps{eta}"
    )
    return grid


def _traffic(count: float, per_second: float) -> str:
    return f"{size(count)}  {rate(per_second)}" if per_second else size(count)


def _reasons(refusals: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(refusals.items()))


# For scripts


def as_json(message: Message, only: Collection[str] | None = None) -> dict[str, Any]:
    """A message as plain values, with every field (or ``only`` these) under its name in the .proto.

    Enums are lower-case words without their prefix, NaN and infinity are None. 64-bit numbers stay
    numbers: protobuf's own JSON mapping would make texts of them.
    """
    return {
        field.name: _plain(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if only is None or field.name in only
    }


def _plain(field: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    if field.is_repeated:
        return [_single(field, item) for item in value]
    return _single(field, value)


def _single(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        prefix = f"{field.enum_type.name.upper()}_"
        return known.name.removeprefix(prefix).lower() if known else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
