"""What the nodes of docker-compose.yml find when they start; it runs once, before them.

::

    /swarm/swarm.toml, a model, test rows  what all nodes share; they can only read it
    /nodes/node-0/train.jsonl              its own data, in a volume that no other node has
    /nodes/node-0/trust                    its key and certificate, likewise
    /authority                             the run's authority, and an operator's certificate
    /swarm/prepared.json                   the last to be written: says what was prepared

The demo's model and articles come from examples/bbc_demo.py. With DEMO=rehearsal it is a small
random model instead, and with a swarm.toml in /own it is what that folder holds.
"""

import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deca_node import cli, rehearsal, template
from deca_node.config import ModelSettings, flatten
from deca_node.disk import write_atomically
from deca_node.partition import write_shards

SWARM, NODES, AUTHORITY, OWN = Path("/swarm"), Path("/nodes"), Path("/authority"), Path("/own")
WORK = SWARM / ".work"  # what an interrupted run leaves is here, and removed by the next


def bbc(nodes: int) -> None:
    """SmolLM2 and four skewed shares of BBC News, as `make demo` has them."""
    import bbc_demo  # noqa: PLC0415 - needs packages that only the demo has
    import torch  # noqa: PLC0415

    from deca_node.models import LanguageModel  # noqa: PLC0415

    source = bbc_demo.find_model()
    print(f"converting {source.name}", flush=True)
    cache = WORK / "cache"
    LanguageModel.load(ModelSettings(path=source, cache=cache), torch.device("cpu"))
    (converted,) = (path for path in cache.iterdir() if path.is_dir())
    place_model(converted, source.stem)
    articles = WORK / "articles.jsonl"
    bbc_demo.write_articles(articles)
    share_out(articles, nodes, bbc_demo.CONCENTRATION, bbc_demo.TEST_PER_TOPIC)
    settings = tomllib.loads((bbc_demo.HERE / "demo.toml").read_text())
    write_settings(
        {**dict(flatten(settings)), "data.test": "test.jsonl", "model.path": source.stem}
    )


def small(nodes: int) -> None:
    """A random model of 0.9 million parameters, and rows that it can learn."""
    rehearsal.write_model(WORK / "model", seed=0)
    place_model(WORK / "model", "rehearsal")
    rows = WORK / "rows.jsonl"
    rehearsal.write_data(rows, 2000, seed=0)
    share_out(rows, nodes, concentration=0.5, test_per_label=50)
    labels = {label: label for label in rehearsal.LABELS}
    places = {"data.test": "test.jsonl", "model.path": "rehearsal"}
    names = {"run.name": "rehearsal", "data.labels": labels}
    write_settings({**rehearsal.SETTINGS, **names, **places})


def own(nodes: int) -> None:
    """What is in /own: swarm.toml, node-0.jsonl and so on, and what swarm.toml names."""
    needed = [OWN / f"node-{number}.jsonl" for number in range(nodes)]
    if missing := [str(path) for path in needed if not path.exists()]:
        sys.exit(f"prepare: not there: {', '.join(missing)}; docs/compose.md says what belongs in")
    for number in range(nodes):
        shutil.copyfile(OWN / f"node-{number}.jsonl", data_of(number))
    private = {path.name for path in OWN.glob("node-*.jsonl")}
    for path in OWN.iterdir():
        if path.is_dir():
            shutil.copytree(path, SWARM / path.name, dirs_exist_ok=True)
        elif path.name not in private:
            shutil.copyfile(path, SWARM / path.name)


def place_model(folder: Path, name: str) -> None:
    """Move a model to where all nodes read it."""
    shutil.rmtree(SWARM / name, ignore_errors=True)
    folder.rename(SWARM / name)


def write_settings(values: Mapping[str, Any]) -> None:
    """The file that all nodes read; paths in it are relative to it."""
    lines = [f"{key} = {template.value(given)}" for key, given in values.items()]
    (SWARM / "swarm.toml").write_text("\n".join([*lines, ""]))


def share_out(rows: Path, nodes: int, concentration: float, test_per_label: int) -> None:
    """Give each node's volume its share of the rows."""
    shards = WORK / "shards"
    counts = write_shards(
        rows,
        shards,
        nodes,
        concentration,
        seed=0,
        label_field="label",
        test_per_label=test_per_label,
    )
    for number, count in enumerate(counts):
        shutil.copyfile(shards / f"node-{number}.jsonl", data_of(number))
        print(f"node-{number}: {count}", flush=True)
    shutil.copyfile(shards / "test.jsonl", SWARM / "test.jsonl")


def data_of(number: int) -> Path:
    """A node's rows, in its own volume."""
    return NODES / f"node-{number}" / "train.jsonl"


def certify(nodes: int) -> None:
    """An authority for the run, and for each node a trust folder in its own volume."""
    settings = dict(flatten(tomllib.loads((SWARM / "swarm.toml").read_text())))
    words = ["--run", str(settings.get("run.name", "deca")), "--trust", str(AUTHORITY)]
    empty(AUTHORITY)
    deca_node("swarm", "init", "--node", "node-0", *words)
    for number in range(nodes):
        to = NODES / f"node-{number}" / "trust"
        shutil.rmtree(to, ignore_errors=True)
        deca_node("swarm", "issue", f"node-{number}", "--to", str(to), *words)


def deca_node(*words: str) -> None:
    """A verb of the command line."""
    try:
        cli.main(words)
    except SystemExit as ended:
        if ended.code:
            raise


def empty(folder: Path) -> None:
    """Remove what is in a volume, which itself has to stay."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> None:
    """Prepare what is not there yet; refuse to change a swarm that is."""
    nodes = int(os.environ["NODES"])
    demo = os.environ["DEMO"]
    kinds: dict[str, Callable[[int], None]] = {"bbc": bbc, "rehearsal": small, "own": own}
    if (OWN / "swarm.toml").exists():
        demo = "own"
    if demo not in kinds:
        sys.exit(f"prepare: DEMO={demo}: use bbc or rehearsal")
    wanted = {"nodes": nodes, "demo": demo}
    mark = SWARM / "prepared.json"
    if mark.exists():
        found = json.loads(mark.read_text())
        if found != wanted:
            sys.exit(
                f"prepare: the volumes hold a swarm of {found['nodes']} nodes ({found['demo']}), "
                f"wanted are {nodes} ({demo}); `down --volumes` removes it and its models"
            )
        print("prepared already")
        return
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    kinds[demo](nodes)
    certify(nodes)
    shutil.rmtree(WORK)
    os.sync()  # what the mark tells of outlasts a power cut wherever the mark does
    write_atomically(mark, json.dumps(wanted).encode())
    print("prepared")


if __name__ == "__main__":
    main()
