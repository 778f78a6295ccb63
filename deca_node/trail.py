"""What a node's folder tells of it, as it runs or after a kill: steps made, state kept."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deca_node.errors import OutputError

Position = tuple[int, int]
"""Visit and step that come next."""


@dataclass(frozen=True)
class Holding:
    """The state that a node's folder holds; the base model's where it holds none.

    Attributes:
        position: where the node would begin.
        versions: by block, the last visit that changed it.
    """

    position: Position = (0, 0)
    versions: Mapping[int, int] = field(default_factory=dict)

    def lacks(self, earlier: "Holding") -> str:
        """What an earlier state had and this one has not; empty when nothing is lost.

        A visit under way may begin anew where newer blocks came from other nodes.
        """
        for block, visit in sorted(earlier.versions.items()):
            if self.versions.get(block, -1) < visit:
                return f"block {block} of visit {visit}"
        begun_anew = self.position[0] == earlier.position[0] and self.versions != earlier.versions
        if self.position < earlier.position and not begun_anew:
            return place(earlier.position)
        return ""


def place(position: Position) -> str:
    """In words."""
    return f"visit {position[0]} step {position[1]}"


def read_kept(folder: Path) -> Holding:
    """What a node's folder holds.

    Raises:
        OutputError: the manifest is damaged.
    """
    path = folder / "state" / "manifest.json"
    try:
        tree = json.loads(path.read_bytes())
        progress = tree["progress"]
        position = int(progress["visit"]), int(progress["step"]) if tree["active"] else 0
        return Holding(position, {int(b): int(s["visit"]) for b, s in tree["blocks"].items()})
    except FileNotFoundError:
        return Holding()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path}: damaged: {error!r}") from None


class Trail:
    """Follows history.jsonl, which is written anew at every start and appended to at every step.

    Args:
        path: the file; it need not be there yet.
        steps_per_visit: of the schedule.

    Attributes:
        position: visit and step of the last line seen.
        kept: what the node must have kept, since it went on to a later visit after a whole one.
    """

    def __init__(self, path: Path, steps_per_visit: int) -> None:
        self._path, self._steps = path, steps_per_visit
        self._inode, self._offset = 0, 0
        self.position: Position = (0, -1)
        self.kept: Position = (0, 0)

    def look(self) -> int:
        """Read on; returns how many steps were made since the last look."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                anew = inode != self._inode
                if anew:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        if anew:
            # Lines that are there after a start were written before it; later ones are no more.
            last = json.loads(lines[-1]) if lines else {"visit": 0, "step": -1}
            self.position = int(last["visit"]), int(last["step"])
            return 0
        for line in lines:
            row = json.loads(line)
            visit, step = int(row["visit"]), int(row["step"])
            if visit > self.position[0] and self.position[1] == self._steps - 1:
                self.kept = max(self.kept, (self.position[0] + 1, 0))
            self.position = visit, step
        return len(lines)


def resumed_at(log: Path, offset: int) -> Position | None:
    """Where a node says that it begins, in what its log holds from ``offset`` on; None: not yet."""
    with log.open("rb") as file:
        file.seek(offset)
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torn, or not ours
            if isinstance(event, dict) and event.get("event") in ("resuming", "ready"):
                return int(event["visit"]), int(event["step"])
    return None
