"""Pictures: of a testbed, every node's loss and disagreement; of an experiment, its curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from deca_node.metrics import Band

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# Paul Tol's light scheme, so that a label is not taken for a node.
LABEL_COLOURS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#AAAA00", "#DDDDDD")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Share of a new value in the running mean that the loss is drawn as.
SMOOTHING = 0.2


def draw(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    label_counts: Mapping[str, Mapping[str, int]],
    path: Path,
) -> None:
    """Write the picture as a PNG.

    Args:
        histories: node name -> the rows of its history.jsonl.
        label_counts: node name -> label -> number of rows it trains on; may be empty.
        path: the file.
    """
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        labelled = any(label_counts.values())
        figure = Figure(figsize=(13 if labelled else 9, 3.8), layout="constrained", dpi=130)
        panels = figure.subplots(1, 3 if labelled else 2)
        _lines(panels[0], histories, "loss", "Loss (running mean)", smooth=True)
        _lines(panels[1], histories, "disagreement", "Disagreement ‖x½ − x_next‖", smooth=False)
        if any((row["disagreement"] or 0) > 0 for rows in histories.values() for row in rows):
            panels[1].set_yscale("log")
        panels[0].legend(frameon=False)
        if labelled:
            _bars(panels[2], label_counts)
        figure.savefig(path, format="png")


def _lines(
    axes: Any,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    key: str,
    title: str,
    *,
    smooth: bool,
) -> None:
    for number, (node, rows) in enumerate(histories.items()):
        # A value that is none (the loss was not finite) or has no logarithm leaves a gap.
        values = [row[key] if row[key] else float("nan") for row in rows]
        axes.plot(
            range(1, len(values) + 1),
            running_mean(values) if smooth else values,
            label=node,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            markevery=(number, max(1, len(values) // 8)),
            markersize=4,
            linewidth=1.3,
        )
    longest = max(histories.values(), key=len, default=())
    for place in range(1, len(longest)):
        if longest[place]["visit"] != longest[place - 1]["visit"]:
            axes.axvline(place + 0.5, color="#cccccc", linewidth=0.7, zorder=0)
    axes.set(title=title, xlabel="step (grey: next block)", xlim=(1, max(2, len(longest))))
    axes.locator_params(axis="x", integer=True)


def draw_curves(
    panels: Mapping[str, Mapping[str, Band]], label: str, paths: Sequence[Path], *, log: bool
) -> None:
    """Write a picture of curves side by side.

    Args:
        panels: title -> label of a line -> the line; lines of one label have one colour.
        label: of what is drawn.
        paths: the files; the suffix decides on the format.
        log: whether its axis is logarithmic.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    # The same results give the same files.
    with mpl.rc_context({**style, "svg.hashsalt": "deca-node"}):
        figure = Figure(figsize=(1.6 + 4.2 * columns, 3.4 * rows), layout="constrained", dpi=130)
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        places = [axes for row in grid for axes in row]
        for axes, (title, lines) in zip(places, panels.items(), strict=False):
            for name, curve in lines.items():
                number = names.index(name)
                colour = COLOURS[number % len(COLOURS)]
                # Steps without a value are drawn over, and single values marked. What is not finite
                # is a gap.
                told = [
                    point
                    for point in zip(curve.steps, curve.mean, curve.spread, strict=True)
                    if not math.isnan(point[1]) or point[0] in curve.broken
                ]
                steps = [step for step, _, _ in told]
                axes.plot(
                    steps,
                    [mean for _, mean, _ in told],
                    label=name,
                    marker="." if any(map(math.isnan, curve.mean)) else None,
                    color=colour,
                    linestyle=("-", "--", ":", "-.")[number // len(COLOURS) % 4],
                    linewidth=1.3,
                )
                # A band that reaches below zero has no place on a logarithmic axis.
                low = [max(m - s, m / 10) if log else m - s for _, m, s in told]
                high = [m + s for _, m, s in told]
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set(title=title, xlabel="step")
            axes.locator_params(axis="x", integer=True)  # there is no half of a step
            if log:
                axes.set_yscale("log")
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        for row in grid:
            row[0].set_ylabel(label)
        handles = {
            name: line
            for axes in places
            for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right upper")
        for path in paths:
            # Without the date, for the same reason.
            about = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, metadata=about)


def running_mean(values: Sequence[float]) -> list[float]:
    """An exponential mean that starts at the first value and steps over NaN."""
    means: list[float] = []
    mean = float("nan")
    for value in values:
        if value == value:  # noqa: PLR0124 - not NaN
            mean = value if mean != mean else mean + SMOOTHING * (value - mean)  # noqa: PLR0124
        means.append(mean)
    return means


def _bars(axes: Any, label_counts: Mapping[str, Mapping[str, int]]) -> None:
    nodes = list(label_counts)
    labels = sorted({label for counts in label_counts.values() for label in counts})
    left = [0] * len(nodes)
    for number, label in enumerate(labels):
        counts = [label_counts[node].get(label, 0) for node in nodes]
        axes.barh(
            nodes,
            counts,
            left=left,
            label=label,
            color=LABEL_COLOURS[number % len(LABEL_COLOURS)],
            edgecolor="white",
            linewidth=0.8,
        )
        left = [sum(pair) for pair in zip(left, counts, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Training rows per node and label", xlabel="rows")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
