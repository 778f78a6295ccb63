"""What came of a run: each node's measures, how far their models are apart, a table, a picture."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import safe_open

from deca_node import status
from deca_node.config import Settings
from deca_node.disk import translated
from deca_node.errors import OutputError
from deca_node.record import finite, read_summary

# Elements of a tensor that are compared at once: 16 MB a node as float32.
SLICE = 4_000_000
_SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1", "perplexity": "perplexity"}


@dataclass(frozen=True)
class Measure:
    """One node's results, from its summary.json."""

    node: str
    label_counts: Mapping[str, int]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    bytes_sent: int
    bytes_received: int


def measured(folder: Path) -> Measure:
    """A finished node's results.

    Raises:
        OutputError: its summary is missing or damaged.
    """
    path = folder / "summary.json"
    summary = read_summary(path)
    try:
        return Measure(
            summary["node"],
            summary["label_counts"],
            summary["before"] or {},
            summary["after"] or {},
            summary["bytes_sent"],
            summary["bytes_received"],
        )
    except (KeyError, TypeError):
        raise OutputError(f"{path}: missing or damaged") from None


def summarise(
    measures: Sequence[Measure],
    disagreement: float,
    wall_seconds: float,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds; accuracies are null where nothing was classified."""
    after = [measure.after.get("accuracy") for measure in measures]
    known = [value for value in after if value is not None]
    complete = len(known) == len(measures)
    return {
        "nodes": [
            {
                "node": measure.node,
                "label_counts": dict(measure.label_counts),
                "before": _scores(measure.before),
                "after": _scores(measure.after),
                "bytes_sent": measure.bytes_sent,
                "bytes_received": measure.bytes_received,
            }
            for measure in measures
        ],
        "mean_after_accuracy": sum(known) / len(known) if complete else None,
        "min_after_accuracy": min(known) if complete else None,
        "disagreement": finite(disagreement),
        "wall_seconds": round(wall_seconds, 1),
        "settings": dict(settings),
    }


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evaluation.get(name) for name in ("accuracy", "macro_f1")}


def results_table(measures: Sequence[Measure]) -> Table:
    """Every node's labels, scores and bytes."""
    labels = sorted({label for measure in measures for label in measure.label_counts})
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("node", no_wrap=True)
    for label in labels:
        table.add_column(Text(label), justify="right", overflow="fold")
    scores = [name for name in _SCORES if any(m.after.get(name) is not None for m in measures)]
    for name in scores:
        table.add_column(_SCORES[name], justify="right", no_wrap=True)
    for heading in ("sent", "received"):
        table.add_column(heading, justify="right", no_wrap=True)
    for measure in measures:
        table.add_row(
            Text(measure.node, "bold"),
            *(str(measure.label_counts.get(label, 0)) for label in labels),
            *(
                f"{_number(measure.before, name)} → {_number(measure.after, name)}"
                for name in scores
            ),
            status.size(measure.bytes_sent),
            status.size(measure.bytes_received),
        )
    return table


def _number(evaluation: Mapping[str, Any], name: str) -> str:
    value = evaluation.get(name)
    return "-" if value is None else f"{value:.3f}"


def disagreement(models: Sequence[Path]) -> float:
    """Root mean square over nodes of ‖x_i − x̄‖, over all parameters of the exported models.

    Reads slice by slice: models need not fit in memory together.

    Raises:
        OutputError: a model is missing, or they are not of one shape.
    """
    total = 0.0
    with ExitStack() as stack:
        stores = [_open_model(folder, stack) for folder in models]
        if any(store.keys() != stores[0].keys() for store in stores):
            raise OutputError(f"{models[0].parent.parent}: the exported models differ in tensors")
        for name in stores[0]:
            parts = [store[name].get_slice(name) for store in stores]
            shape = parts[0].get_shape()
            if any(part.get_shape() != shape for part in parts):
                raise OutputError(f"{models[0].parent.parent}: {name} differs in shape")
            for rows in _row_slices(shape):
                x = torch.stack([part[rows].to(torch.float32) for part in parts])
                total += (x - x.mean(0)).square().sum(dtype=torch.float64).item()
    return math.sqrt(total / len(models))


def _row_slices(shape: Sequence[int]) -> Iterator[Any]:
    if not shape:
        yield ...
        return
    rows = max(1, SLICE // max(1, math.prod(shape[1:])))
    for low in range(0, shape[0], rows):
        yield slice(low, min(low + rows, shape[0]))


def _open_model(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    store: dict[str, Any] = {}
    with translated(folder):
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            store |= dict.fromkeys(file.keys(), file)
    if not store:
        raise OutputError(f"{folder}: holds no safetensors file")
    return store


def draw_picture(
    nodes: Sequence[Settings], measures: Sequence[Measure], path: Path, console: Console
) -> list[Path]:
    """Draw how the nodes learned: the picture's path, nothing where matplotlib is absent."""
    try:
        from deca_node.plots import draw  # noqa: PLC0415 - matplotlib is optional
    except ImportError:
        console.print("no picture: it needs matplotlib, pip install 'deca-node\\[plots]'")
        return []
    histories = {
        settings.node.name: [
            json.loads(line)
            for line in (settings.node.output / "history.jsonl").read_text("utf-8").splitlines()
        ]
        for settings in nodes
    }
    with translated(path):
        draw(histories, {measure.node: measure.label_counts for measure in measures}, path)
    return [path]
