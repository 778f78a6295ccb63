"""testbed.json: whose folder this is, and the seconds spent in it before now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deca_node.disk import translated, write_atomically
from deca_node.errors import OutputError


class Mark:
    """What was asked for in a folder, and the seconds spent in it before now."""

    def __init__(self, path: Path, intent: dict[str, Any]) -> None:
        self.path, self.intent, self.seconds = path, intent, 0.0

    @classmethod
    def claim(cls, out: Path, intent: dict[str, Any]) -> "Mark":
        """Take the folder, or recognise what an interrupted run of the same plan left there.

        A mark under which no node has begun holds nothing: a failed try is not in the way.

        Raises:
            OutputError: it holds something else.
        """
        path = out / "testbed.json"
        mark = cls(path, intent)
        elsewhere = "choose another --out or move it away"
        with translated(out):
            if (out / "results.json").exists():
                raise OutputError(f"{out}: this run is finished (results.json); {elsewhere}")
            if not path.exists():
                if any(out.glob("node-*")) or (out / "data").exists():
                    raise OutputError(f"{out}: holds nodes of another run; {elsewhere}")
                out.mkdir(parents=True, exist_ok=True)
                mark.add(0.0)
                return mark
            try:
                found = json.loads(path.read_bytes())
                held, seconds = dict(found["intent"]), float(found["seconds"])
            except (ValueError, TypeError, KeyError):
                raise OutputError(f"{path}: damaged; {elsewhere}") from None
            if not any(out.glob("node-*/run.json")):
                # No node has begun: what was asked for may be corrected, the data as well.
                for shard in (*out.glob("data/node-*.jsonl"), out / "data/test.jsonl"):
                    shard.unlink(missing_ok=True)
                mark.add(0.0)
                return mark
        old, new = _flat(held), _flat(json.loads(json.dumps(intent)))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise OutputError(
                    f"{out}: holds another run ({name} is {old.get(name)!r} there,"
                    f" {new.get(name)!r} here); {elsewhere}"
                )
        mark.seconds = seconds
        return mark

    def add(self, seconds: float) -> None:
        """Count time that was spent on the run."""
        self.seconds += seconds
        tree = {"intent": self.intent, "seconds": self.seconds}
        with translated(self.path):
            write_atomically(self.path, (json.dumps(tree, indent=2) + "\n").encode())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
