"""Several real nodes on one machine: split the data, start them, watch, compare their results.

Each node is a ``deca-node start`` process with a folder of its own::

    OUT/testbed.json      what was asked for, so that the same command resumes
    OUT/data/             the shards, when they were made here
    OUT/node-0/           node.toml, log.jsonl and what the node writes
    OUT/results.json, OUT/results.png
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from deca_node import status
from deca_node.config import Settings
from deca_node.disk import alone, translated, write_atomically
from deca_node.testbed.layout import Plan, base_settings, node_settings, write_settings
from deca_node.testbed.mark import Mark
from deca_node.testbed.processes import supervise
from deca_node.testbed.results import disagreement, draw_picture, measured, results_table, summarise


def run(plan: Plan) -> None:
    """Run a testbed to its end and write its results.

    Raises:
        SwarmError: a node did not finish; the others were stopped.
        OutputError: the folder holds something else, or a finished run.
        KeyboardInterrupt: interrupted; all nodes have ended with their state saved.
        DecaError: settings or data cannot be used.
    """
    out = plan.out.absolute()
    base = base_settings(plan, out)
    with alone(out, "testbed"):
        _run(plan, base, out)


def _run(plan: Plan, base: Settings, out: Path) -> None:
    began = time.monotonic()
    console = status.make_console()
    mark = Mark.claim(out, _intent(plan, base))
    nodes = node_settings(plan, base, out)
    for settings in nodes:
        write_settings(settings)
    try:
        finished = asyncio.run(supervise(nodes, console))
    finally:
        mark.add(time.monotonic() - began)
    if not finished:
        console.print(f"stopped, state saved in {plan.out}; the same command resumes")
        raise KeyboardInterrupt

    measures = [measured(settings.node.output) for settings in nodes]
    models = [settings.node.output / "model" for settings in nodes]
    results = summarise(measures, disagreement(models), mark.seconds, mark.intent)
    picture = draw_picture(nodes, measures, out / "results.png", console)
    # The last file to be written: its presence says that the run is complete.
    with translated(out):
        write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    console.print(results_table(measures))
    console.print(
        f"disagreement {results['disagreement']:.4g}"
        f"  wall time {status.duration(results['wall_seconds'])}",
        highlight=False,
    )
    for path in [out / "results.json", *picture, *models]:  # named as the user named the folder
        console.print(str(plan.out / path.relative_to(out)), soft_wrap=True, highlight=False)


def _intent(plan: Plan, base: Settings) -> dict[str, Any]:
    """What makes this testbed this testbed."""
    held = {
        "nodes": plan.nodes,
        "train": plan.train,
        "shards": plan.shards,
        "test": plan.test,
        "test_per_label": plan.test_per_label,
        "concentration": plan.concentration,
        "seed": plan.seed,
        "isolated": plan.isolated,
    }
    intent = {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in held.items()
    }
    settings = base.model_dump(
        mode="json", exclude={"node": {"threads", "output"}, "data": {"train"}}
    )
    return {**intent, "settings": settings}
