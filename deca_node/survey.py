"""One look at all nodes of a swarm that can be reached, for people and for scripts."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deca_node import status
from deca_node.panorama import Panorama, has_left

_SOUND = ("ok", "slow")
_STYLES = {"ok": "green", "gone": "red", "refused": "red"}


def render(panorama: Panorama, now: float) -> RenderableType:
    """A row per node, a line per node that does not answer, then one per edge.

    Args:
        panorama: what has been seen.
        now: by the clock that it was seen by.
    """
    view = panorama.view(now)
    statuses = panorama.statuses()
    rows = {
        _called(node, view): statuses[node["key"]]
        for run in view["runs"]
        for node in run["nodes"]
        if node["key"] in statuses
    }
    parts: list[RenderableType] = [status.render_swarm(rows)]
    missing = {name: f"no answer: {why}" for name, why in unreachable(view).items()}
    if missing or _left(view):
        # Not in the table: a reason is as wide as all of its columns.
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for name, why in missing.items():
            lines.add_row(status.text(name, "bold"), status.text(why, "red"))
        for name, how in _left(view).items():
            lines.add_row(status.text(name, "bold"), status.text(how, "dim"))
        parts += [Text(""), lines]
    if links := [link for run in view["runs"] for link in run["links"]]:
        parts += [Text(""), edges(links)]
    return Group(*parts)


def unreachable(view: Mapping[str, Any]) -> dict[str, str]:
    """Nodes that others know and addresses that were given where nobody answers: why."""
    missing = {one["address"]: one["error"] for one in view["silent"]}
    for run in view["runs"]:
        for node in run["nodes"]:
            if node["state"] == "heard" and not has_left(node):
                why = node["error"] or f"not asked, others find it {node['said']}"
                missing[_called(node, view)] = why
    return missing


def _left(view: Mapping[str, Any]) -> dict[str, str]:
    """Nodes of which others tell how they have left: finished or stopped."""
    return {
        _called(node, view): node["said"]
        for run in view["runs"]
        for node in run["nodes"]
        if has_left(node)
    }


def _called(node: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    name = node["node"] if len(view["runs"]) == 1 else node["key"]
    return str(name)


def edges(links: Iterable[Mapping[str, Any]], heading: str = "edge") -> Table:
    """Edges of a view as names, weight, rate, seconds waited, and state."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(heading, no_wrap=True)
    for each in ("weight", "rate", "waited"):
        table.add_column(each, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for link in links:
        told = sorted({f"{weight:.3f}" for weight in link["weights"] if weight is not None})
        table.add_row(
            Text(" — ".join(link[end].partition("/")[2] for end in "ab")),
            Text("/".join(told), "" if len(told) < 2 else "yellow"),
            Text(status.rate(link["rate"]) if link["rate"] else "-"),
            Text(status.duration(link["waited"])),
            Text(link["state"], _STYLES.get(link["state"], "yellow")),
        )
    return table


def as_json(panorama: Panorama, now: float) -> dict[str, Any]:
    """The same as plain values."""
    view = panorama.view(now)
    return {
        "nodes": [status.as_json(told) for told in panorama.statuses().values()],
        "edges": [
            {
                "run": run["run"],
                "ends": [link[end].partition("/")[2] for end in "ab"],
                "weights": link["weights"],
                "states": link["states"],
                "state": link["state"],
                "rate": link["rate"],
                "waited_seconds": link["waited"],
                "healthy": link["state"] in _SOUND,
            }
            for run in view["runs"]
            for link in sorted(run["links"], key=lambda link: (link["a"], link["b"]))
        ],
        "unreachable": unreachable(view),
    }
