"""A swarm as a picture in a terminal: curves, the block schedule as a strip, edges, events.

What is shown is a function of what was seen (Picture) and the terminal's size (Screen).
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from deca_node import status, survey
from deca_node.pb import node_pb2 as pb
from deca_node.survey import Survey, plain

# Of each curve: an hour at a look every 2 s; a curve is drawn from the last that fit.
MAX_POINTS = 1800
MAX_EVENTS = 200
_BARS = "▁▂▃▄▅▆▇█"
# For terminals whose encoding has none of these.
_ASCII = str.maketrans(_BARS + "▶·—─…", "_.-:=+*#" + ">.--~")
_DONE, _NOW, _TO_COME = "█", "▶", "·"
_NARROW = 120
_MAX_NAME = 20
# A wide table without its names, blocks and curves.
_WIDE_REST = 82
_TITLE_ROWS = 2


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line: each column is the mean of its share of ``values``, NaN left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def strip(now: pb.NodeStatus, width: int) -> str:
    """The blocks of a round as cells: done, under way, to come; several to a cell if need be."""
    if not now.blocks or width < 1:
        return ""
    cells = min(width, now.blocks)
    if now.steps_total and now.steps_done >= now.steps_total:
        return _DONE * cells
    here = min(now.position * cells // now.blocks, cells - 1)
    return _DONE * here + _NOW + _TO_COME * (cells - here - 1)


class Picture:
    """What has been seen so far."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[str, str], pb.NodeStatus] = {}
        self.lost: dict[tuple[str, str], float] = {}  # since when they do not answer
        self.curves: dict[tuple[str, str], deque[tuple[float, float]]] = {}
        self.events: deque[tuple[float, str, str]] = deque(maxlen=MAX_EVENTS)  # time, text, style
        self._where: dict[tuple[str, str], str] = {}

    def addresses(self) -> list[str]:
        """Where nodes have answered: to be asked again, even when nobody knows them any more."""
        return list(self._where.values())

    def look(self, found: Survey, now: float) -> None:
        """Take in a look at the swarm.

        Args:
            found: what answered.
            now: the time of day, seconds since 1970.
        """
        seen = {(each.run, each.node): each for each in found.statuses.values()}
        self._where.update(
            {(each.run, each.node): address for address, each in found.statuses.items()}
        )
        for key, each in sorted(seen.items()):
            for text, style in changes(self.nodes.get(key), each):
                self.events.append((now, f"{plain(each.node)}: {text}", style))
            if key in self.lost:
                del self.lost[key]
                self.events.append((now, f"{plain(each.node)}: answers again", "green"))
            before = self.nodes.get(key)
            self.nodes[key] = each
            moved = before is None or before.steps_done != each.steps_done
            if each.loss and moved:
                curve = self.curves.setdefault(key, deque(maxlen=MAX_POINTS))
                curve.append((each.loss, each.disagreement))
        for key, each in self.nodes.items():
            ended = each.phase in (pb.PHASE_DONE, pb.PHASE_STOPPING, pb.PHASE_SERVING)
            if key not in seen and key not in self.lost:
                self.lost[key] = now
                word = "has ended" if ended else "does not answer"
                self.events.append((now, f"{plain(each.node)}: {word}", "" if ended else "red"))


def changes(before: pb.NodeStatus | None, now: pb.NodeStatus) -> Iterable[tuple[str, str]]:
    """What is worth telling of a node since its status before: text and style."""
    if before is None:
        yield f"seen, {status.phase(now.phase)}", ""
        return
    if before.pid != now.pid:
        yield "was started again", "yellow"
    if before.phase != now.phase:
        yield status.phase(now.phase), ""
    elif before.round != now.round:
        yield f"round {now.round + 1} of {now.rounds}", ""
    known = {peer.node: peer.state for peer in before.peers}
    for peer in now.peers:
        if peer.node in known and known[peer.node] != peer.state:
            style = "green" if peer.state == "alive" else "yellow"
            yield f"finds {plain(peer.node)} {plain(peer.state)}", style
    for warning in now.warnings:
        if warning not in before.warnings:
            yield plain(warning), "yellow"


class Screen:
    """The picture in the size of the terminal, whatever that is at the moment."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        width = options.max_width
        height = options.height or console.height
        screen = _screen(self._picture, width, height)
        if console.encoding.startswith("utf"):
            yield screen
            return
        for segment in console.render(screen, options):
            text = segment.text.translate(_ASCII).encode(console.encoding, "replace")
            yield segment._replace(text=text.decode(console.encoding))


def _screen(picture: Picture, width: int, height: int) -> RenderableType:
    keys = sorted(picture.nodes)
    statuses = [picture.nodes[key] for key in keys if key not in picture.lost]
    pairs = survey.edges(statuses)
    # Events get what the tables leave, and at least three lines of them.
    room = height - _TITLE_ROWS - 3
    nodes = _nodes(picture, keys[: max(1, room)], width)
    room -= min(len(keys), max(1, room)) + 1
    parts: list[RenderableType] = [_title(picture, statuses, width), nodes]
    shown = pairs[: max(0, room - 4)]
    if shown:
        parts.append(_edges(shown, len(pairs), width))
        room -= len(shown) + 2
    lines = [
        Text(f"{time.strftime('%H:%M:%S', time.localtime(at))} {text}", style, no_wrap=True)
        for at, text, style in list(picture.events)[-max(1, room + 2) :]
    ]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(*parts, Text("─" * width, "dim"), *lines)


def _title(picture: Picture, statuses: Sequence[pb.NodeStatus], width: int) -> RenderableType:
    trained = [now for now in statuses if now.loss]
    runs = sorted({plain(run) for run, _ in picture.nodes})
    words = [", ".join(runs), f"{len(statuses)} of {len(picture.nodes)} nodes answer"]
    if trained:
        words.append(f"mean loss {sum(now.loss for now in trained) / len(trained):.3f}")
        done = sum(now.steps_done for now in trained) / sum(now.steps_total for now in trained)
        words.append(f"{done:.0%}")
        if left := max(now.eta_seconds for now in trained):
            words.append(f"{status.duration(left)} left")
    line = Text("  ".join(words), "bold", no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    curve = _mean_curve(picture)
    label = "loss "
    spark = Text(label + sparkline([loss for loss, _ in curve], width - len(label)), "cyan")
    spark.no_wrap = True
    return Group(line, spark)


def _mean_curve(picture: Picture) -> list[tuple[float, float]]:
    """The mean of the nodes' last points, as many as the shortest has."""
    curves = [list(curve) for curve in picture.curves.values() if curve]
    if not curves:
        return []
    length = min(map(len, curves))
    tails = [curve[-length:] for curve in curves]
    return [
        (sum(a for a, _ in points) / len(points), sum(b for _, b in points) / len(points))
        for points in zip(*tails, strict=True)
    ]


def _nodes(picture: Picture, keys: Sequence[tuple[str, str]], width: int) -> RenderableType:
    narrow = width < _NARROW
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1), expand=False)
    table.add_column("node", no_wrap=True, max_width=14 if narrow else _MAX_NAME)
    table.add_column("phase", no_wrap=True)
    table.add_column("blocks", no_wrap=True)
    table.add_column("loss", no_wrap=True, justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("disagr." if narrow else "disagreement", no_wrap=True, justify="right")
    if not narrow:
        table.add_column("", no_wrap=True)
        table.add_column("in", no_wrap=True, justify="right")
        table.add_column("out", no_wrap=True, justify="right")
        table.add_column("memory", no_wrap=True, justify="right")
    several = len({run for run, _ in picture.nodes}) > 1
    names = {key: plain("/".join(key) if several else key[1]) for key in keys}
    cells = 12 if width < 160 else 24
    longest = min(_MAX_NAME, max(map(len, names.values())))
    spark = 10 if narrow else max(5, min(30, (width - _WIDE_REST - cells - longest) // 2))
    for key in keys:
        now, curve = picture.nodes[key], list(picture.curves.get(key, ()))
        lost = key in picture.lost
        word = "no answer" if lost else status.phase(now.phase).replace("_", " ")
        style = "red" if lost else "green" if word in ("training", "done") else "yellow"
        points = curve[-MAX_POINTS:]
        row = [
            Text(names[key], "bold"),
            Text(word, style),
            Text(strip(now, cells)),
            Text(f"{now.loss:.3f}" if now.loss else "-"),
            Text(sparkline([loss for loss, _ in points], spark), "cyan"),
            Text(f"{now.disagreement:.2g}" if now.loss else "-"),
        ]
        if not narrow:
            row += [
                Text(sparkline([apart for _, apart in points], spark), "magenta"),
                Text(status.rate(now.receive_rate) if now.receive_rate else "-"),
                Text(status.rate(now.send_rate) if now.send_rate else "-"),
                Text(status.size(now.memory_bytes)),
            ]
        table.add_row(*row, style="dim" if lost else "")
    return table


def _edges(pairs: Sequence[survey.Edge], total: int, width: int) -> RenderableType:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1))
    more = f" ({len(pairs)} of {total})" if len(pairs) < total else ""
    table.add_column(f"edge{more}", no_wrap=True, max_width=max(16, width - 48))
    for heading in ("weight", "rate", "waited"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("state", no_wrap=True)
    for edge in pairs:
        table.add_row(*survey.cells(edge))
    return table
