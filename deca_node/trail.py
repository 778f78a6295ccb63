"""What a node's folder tells of it, as it runs or after a kill: steps made, state kept."""

import json
from pathlib import Path

from deca_node.errors import OutputError

Position = tuple[int, int]
"""Visit and step that come next."""


def read_kept(folder: Path) -> Position:
    """The position of the state that a node's folder holds; the beginning where it holds none.

    Raises:
        OutputError: the manifest is damaged.
    """
    path = folder / "state" / "manifest.json"
    try:
        tree = json.loads(path.read_bytes())
        progress = tree["progress"]
        return int(progress["visit"]), int(progress["step"]) if tree["active"] else 0
    except FileNotFoundError:
        return 0, 0
    except (OSError, ValueError, KeyError, TypeError) as error:
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
                inode = self._path.stat().st_ino
                if inode != self._inode:
                    # Lines that are there after a start were written before it.
                    self._inode, self._offset = inode, file.seek(0, 2)
                    return 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return 0
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
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
