"""A swarm as a picture in a terminal: curves, the block schedule as a strip, edges, events."""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from deca_node import status, survey
from deca_node.curve import VALUES
from deca_node.panorama import Panorama, has_left

_BARS = "▁▂▃▄▅▆▇█"
# For terminals whose encoding has none of these.
_ASCII = str.maketrans(_BARS + "▶·—─…", "_.-:=+*#" + ">.--~")
_DONE, _NOW, _TO_COME = "█", "▶", "·"
_NARROW = 120
_MAX_NAME = 20
# A wide table without its names, blocks and curves.
_WIDE_REST = 82
# What several nodes tell of one peer within so many seconds is one line.
_TOGETHER_SECONDS = 10.0
_WORDS = {"stale": "no answer", "gone": "gone"}
# A node's curve begins with first and last step of each point.
_LOSS, _APART = 2 + VALUES.index("loss"), 2 + VALUES.index("disagreement")

Points = Sequence[Sequence[float | None]]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A curve in one line: each column is the mean of its share of ``values``, NaN left out."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def strip(node: Mapping[str, Any], width: int) -> str:
    """The blocks of a round as cells: done, under way, to come; several to a cell if need be."""
    if not node["blocks"] or width < 1:
        return ""
    cells = min(width, int(node["blocks"]))
    if node["steps_total"] and node["steps_done"] >= node["steps_total"]:
        return _DONE * cells
    here = min(int(node["position"] * cells // node["blocks"]), cells - 1)
    return _DONE * here + _NOW + _TO_COME * (cells - here - 1)


class Screen:
    """What has been seen of a swarm, in the size of the terminal, whatever that is at the moment.

    Args:
        panorama: what has been seen.
        now: the time by the clock that it was seen by.
        wall: the same moment, in seconds since 1970.
    """

    def __init__(self, panorama: Panorama, now: float, wall: float) -> None:
        self._panorama, self._now, self._wall = panorama, now, wall

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See rich."""
        screen = self._drawn(options.max_width, options.height or console.height)
        if console.encoding.startswith("utf"):
            yield screen
            return
        for segment in console.render(screen, options):
            text = segment.text.translate(_ASCII).encode(console.encoding, "replace")
            yield segment._replace(text=text.decode(console.encoding))

    def _drawn(self, width: int, height: int) -> RenderableType:
        view = self._panorama.view(self._now)
        curves = self._panorama.curves({})
        nodes = [node for run in view["runs"] for node in run["nodes"]]
        links = [link for run in view["runs"] for link in run["links"]]
        title = [_line(_title(run), width, "bold") for run in view["runs"]]
        loss = sparkline(_mean(list(curves.values()), _LOSS), width - len("loss "))
        title.append(_line(f"loss {loss}", width, "cyan"))
        # Events get what the tables leave, and at least three lines of them.
        room = height - len(title) - 3
        shown = nodes[: max(1, room)]
        parts: list[RenderableType] = [
            *title,
            _nodes(shown, curves, width, several=len(view["runs"]) > 1),
        ]
        room -= len(shown) + 1
        near = links[: max(0, room - 4)]  # those in trouble come first
        if near:
            more = f" ({len(near)} of {len(links)})" if len(near) < len(links) else ""
            parts.append(survey.edges(near, f"edge{more}"))
            room -= len(near) + 1
        events = _told(self._panorama.events(0, self._now, self._wall))
        lines = [_line(text, width, style) for text, style in events[-max(1, room + 2) :]]
        return Group(*parts, Text("─" * width, "dim"), *lines)


def _line(text: str, width: int, style: str) -> Text:
    line = Text(text, style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    return line


def _title(run: Mapping[str, Any]) -> str:
    summary = run["summary"]
    words = [run["run"], f"{summary['live']} of {summary['nodes']} nodes answer"]
    if summary["loss"]:
        words.append(f"median loss {summary['loss']:.3f}")
    if summary["progress"]:
        words.append(f"{summary['progress']:.0%}")
    if summary["eta_seconds"]:
        words.append(f"{status.duration(summary['eta_seconds'])} left")
    return "  ".join(words)


def _mean(curves: Sequence[Points], value: int) -> list[float]:
    """Of the last points of several curves, as many as the shortest has."""
    if not curves:
        return []
    length = min(map(len, curves))
    columns = zip(*(curve[-length:] for curve in curves), strict=True)
    told = [[one for point in column if (one := point[value]) is not None] for column in columns]
    return [sum(values) / len(values) for values in told if values]


def _nodes(
    nodes: Sequence[Mapping[str, Any]], curves: Mapping[str, Points], width: int, *, several: bool
) -> Table:
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
    names = [node["key"] if several else node["node"] for node in nodes]
    cells = 12 if width < 160 else 24
    longest = min(_MAX_NAME, max(map(len, names), default=0))
    spark = 10 if narrow else max(5, min(30, (width - _WIDE_REST - cells - longest) // 2))
    for name, node in zip(names, nodes, strict=True):
        table.add_row(*_row(name, node, curves.get(node["key"], ()), cells, spark, narrow))
    return table


def _row(
    name: str, node: Mapping[str, Any], points: Points, cells: int, spark: int, narrow: bool
) -> list[Text]:
    if node["state"] == "heard":
        asked = "" if has_left(node) else ", not asked"
        return [Text(name, "bold"), Text(f"{node['said']}{asked}", "dim")]
    live = node["state"] == "live"
    word = (
        str(node["phase"]).replace("_", " ") if live else _WORDS.get(node["state"], node["state"])
    )
    style = "green" if word in ("training", "done", "finished") else "yellow" if live else "red"
    loss, apart = node["loss"], node["disagreement"]
    row = [
        Text(name, "bold"),
        Text(word, style),
        Text(strip(node, cells)),
        Text(f"{loss:.3f}" if loss else "-"),
        Text(sparkline([point[_LOSS] for point in points], spark), "cyan"),
        Text("-" if apart is None or not loss else f"{apart:.2g}"),
    ]
    if not narrow:
        row += [
            Text(sparkline([point[_APART] for point in points], spark), "magenta"),
            Text(status.rate(node["receive_rate"]) if node["receive_rate"] else "-"),
            Text(status.rate(node["send_rate"]) if node["send_rate"] else "-"),
            Text(status.size(node["memory_bytes"])),
        ]
    if not live:
        for cell in row[2:]:
            cell.style = "dim"
    return row


def _told(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lines and their styles; what several nodes say of one peer together is one."""
    found: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: event["at"]):
        for other in found[-40:]:
            if (
                (event["peer"], event["kind"]) == (other["peer"], other["kind"])
                and (event["peer"] or event["text"] == other["text"])
                and event["at"] - other["at"] < _TOGETHER_SECONDS
                and event["node"] not in other["nodes"]
            ):
                other["nodes"].append(event["node"])
                break
        else:
            found.append({**event, "nodes": [event["node"]]})
    lines = []
    for event in found:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        nodes = sorted(event["nodes"])
        names = ", ".join(nodes if len(nodes) < 4 else [*nodes[:2], f"{len(nodes) - 2} more"])
        text = f"{event['peer'] or names} {event['text']}"
        by = f" (says {names})" if event["peer"] else ""
        lines.append((f"{at} {text}{by}", "yellow" if event["trouble"] else ""))
    return lines
