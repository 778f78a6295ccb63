"""JSON that carries the format's number and its own digest, so that damage shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from deca_node.errors import OutputError

FORMAT = 2


def canonical(tree: Mapping[str, Any]) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def seal(tree: Mapping[str, Any]) -> str:
    """The digest that values carry, the xxh3_128 of their canonical JSON."""
    return str(xxhash.xxh3_128_hexdigest(canonical(tree).encode()))


def sealed(values: Mapping[str, Any]) -> bytes:
    """JSON for people to read, with the format's number and its own digest."""
    tree = json.loads(json.dumps({"format": FORMAT, **values}))  # keys as they will be read
    return json.dumps({"xxh3": seal(tree), **tree}, indent=1).encode()


def unsealed(path: Path, content: bytes) -> dict[str, Any]:
    """Undo ``sealed``.

    Raises:
        ValueError: it is not what was written.
        OutputError: it was written in another format.
    """
    try:
        tree = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - damage, whatever its kind
    found, written = tree.pop("xxh3", None), tree.get("format")
    good = found == seal(tree)
    # Format 1 had no digest.
    if isinstance(written, int) and written != FORMAT and (good or found is None):
        raise OutputError(
            f"{path}: written in format {written}, this deca-node reads format {FORMAT}; continue "
            "with the version that wrote it, or set node.output to a new folder"
        )
    if not good:
        raise ValueError("its digest does not match")
    del tree["format"]
    return tree
