"""run.json: whose output a folder is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deca_node.checkpoint.sealing import unsealed
from deca_node.disk import in_output
from deca_node.errors import OutputError

MARK = "run.json"
# What folders do not say that an earlier version has begun.
_ADDED = frozenset({"model.tokenizer"})


def check_mark(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a folder is this run's; one that may become it is not, yet.

    Args:
        folder: node.output; need not be there.
        identity: what makes this run this run, as far as it is known.

    Raises:
        OutputError: it holds another run, or strange files.
    """
    if (folder / MARK).exists():
        recognise(folder, identity)
        return True
    for name in ("history.jsonl", "summary.json", "model", "state"):
        if (folder / name).exists():
            raise OutputError(
                f"{folder / name}: exists, but the folder is not a run's output (no {MARK}); set "
                "node.output to a new folder"
            )
    return False


def recognise(folder: Path, identity: Mapping[str, str]) -> None:
    """Look whether a folder that is a run's is this one's.

    Raises:
        OutputError: it holds no run, another one, or its mark cannot be read.
    """
    found = read_mark(folder / MARK)
    for name, value in identity.items():
        if name in _ADDED and name not in found:
            continue
        if found.get(name) != value:
            there = found.get(name, "absent")
            raise OutputError(
                f"{folder}: holds another run ({name} is {there!r} there, {value!r} here); set "
                "node.output to a new folder"
            )


def read_mark(mark: Path) -> dict[str, Any]:
    """What ``run.json`` says of the run that a folder holds.

    Raises:
        OutputError: it is missing, unreadable, damaged, or of another format.
    """
    with in_output(mark):
        try:
            return unsealed(mark, mark.read_bytes())
        except FileNotFoundError:
            raise OutputError(
                f"{mark.parent}: holds no run; set node.output to the folder of one"
            ) from None
        except ValueError:
            raise OutputError(f"{mark}: damaged; move the folder away or restore it") from None
