"""What is asked for, and the settings, data and folders of nodes that follow from it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deca_node import template
from deca_node.config import DataSettings, Settings, load
from deca_node.data import label_of, words_of
from deca_node.disk import translated, write_atomically
from deca_node.errors import DataError
from deca_node.partition import write_shards
from deca_node.rows import place, read_rows


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        nodes: how many.
        config: settings of all nodes; ``base_settings`` says which of them are ours.
        overrides: ``section.key=value`` on top.
        train: labelled data to split with ``concentration``, ``seed`` and ``label_field``.
        shards: folder of ready shards, in place of ``train``.
        test: held-out data, the same for all.
        test_per_label: rows of each label to hold out of ``train`` in place of ``test``.
        concentration: of the Dirichlet distribution.
        seed: of the split.
        label_field: None takes the setting data.label_field.
        out: folder for everything.
        isolated: no edges, for comparison.
    """

    nodes: int
    config: Path | None
    overrides: tuple[str, ...]
    train: Path | None
    shards: Path | None
    test: Path | None
    test_per_label: int
    concentration: float
    seed: int
    label_field: str | None
    out: Path
    isolated: bool


def base_settings(plan: Plan, out: Path, preset: str = "local") -> Settings:
    """Settings that all nodes share; environment variables are read here and not by the nodes.

    Ours, whatever was given: name, addresses and output of each node, its share of the data, how
    many are waited for, how they meet (zeroconf on the loopback interface), that they end with the
    run, and a run's name that is no other's. ``preset`` and the threads are ours only where they
    were not given.

    Raises:
        ConfigError: a setting is wrong.
    """
    data = template.value(str(plan.train or plan.shards))  # in its place until there are shards
    settings = load(plan.config, [*plan.overrides, f"data.train={data}"])
    update: dict[str, dict[str, Any]] = {
        "node": {
            "host": "127.0.0.1",
            "port": 0,
            "advertise": None,
            "advertise_port": None,
            "output": out,
            "stay": False,
            "health_port": None,
        },
        "run": {"name": own_name(settings.run.name, out), "start_when": plan.nodes},
        "network": {
            "zeroconf": True,
            "interfaces": ("127.0.0.1",),
            "static_peers": (),
            "dns_peers": (),
        },
        "metrics": {"port": None},
        "model": {
            "path": settings.model.path.absolute(),
            "cache": settings.model.cache.absolute(),
        },
        "topology": {"kind": "explicit", "edges": ()} if plan.isolated else {},
        "data": {"label_field": plan.label_field} if plan.label_field else {},
    }
    if "threads" not in settings.node.model_fields_set:
        update["node"]["threads"] = max(1, torch.get_num_threads() // plan.nodes)
    if "preset" not in settings.network.model_fields_set:
        update["network"]["preset"] = preset
    return updated(settings, update)


def own_name(run: str, out: Path) -> str:
    """A run name of this folder alone, so that two testbeds on one machine never meet."""
    digest = hashlib.sha256(str(out).encode()).hexdigest()[:6]
    return f"{run[:41]}-{digest}"  # 48 characters at most


def updated(settings: Settings, update: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings with others in their place: section -> name -> value."""
    return settings.model_copy(
        update={
            section: getattr(settings, section).model_copy(update=dict(values))
            for section, values in update.items()
        }
    )


def node_settings(plan: Plan, base: Settings, out: Path) -> list[Settings]:
    """Write the shards if need be, and give each node its own settings.

    Raises:
        DataError: there are too few shards, or the data cannot be split.
    """
    folder = plan.shards.absolute() if plan.shards else out / "data"
    if plan.train is not None and not (folder / "node-0.jsonl").exists():
        write_shards(
            plan.train,
            folder,
            plan.nodes,
            plan.concentration,
            plan.seed,
            label_field=base.data.label_field,
            test_per_label=plan.test_per_label,
            settings=base.data,
        )
    trains = [folder / f"node-{number}.jsonl" for number in range(plan.nodes)]
    if absent := [str(path) for path in trains if not path.is_file()]:
        raise DataError(f"{absent[0]}: no such file; {plan.nodes} nodes need as many shards")
    test = plan.test or base.data.test
    if test is None and (folder / "test.jsonl").is_file():
        test = folder / "test.jsonl"
    labels = base.data.labels
    if base.data.task == "classification" and not labels:
        labels = _all_labels([*trains, *([test] if test else [])], base.data)
    return [
        updated(
            base,
            {
                "node": {"name": f"node-{number}", "output": out / f"node-{number}"},
                "data": {
                    "train": train,
                    "test": test.absolute() if test else None,
                    "labels": labels,
                },
            },
        )
        for number, train in enumerate(trains)
    ]


def _all_labels(paths: Sequence[Path], data: DataSettings) -> dict[str, str]:
    """Every label of the whole data set as its own word: a node alone would not know them all."""
    found = (
        label_of(row, data.label_field, data.labels, place(path, index))
        for path in paths
        for index, row in enumerate(read_rows(path))
    )
    return words_of(found, data)


def write_settings(settings: Settings) -> None:
    """Make a node's folder and write there what it reads its settings from.

    Raises:
        DiskFullError, OutputError: it cannot be written.
    """
    folder = settings.node.output
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "node.toml", template.document(settings).encode())
