"""The run's state on disk, written so that a crash at any moment leaves the previous one whole.

``state/manifest.json`` names every other file with its digest. A new block goes to a temporary
file, is synced and renamed, and only then does a new manifest replace the old one.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from deca_node.disk import translated, write_atomically
from deca_node.errors import OutputError

FORMAT = 1


@dataclass(frozen=True)
class SavedFile:
    """A file of the state folder and the xxh3_128 of its bytes."""

    file: str
    xxh3: str


@dataclass(frozen=True)
class Progress:
    """Where a run is: everything but tensors.

    ``visit`` and ``step`` come next; ``data_position`` counts examples consumed; ``bytes_sent``,
    ``bytes_received``, ``incomplete`` and ``seconds`` are totals so far.
    """

    visit: int = 0
    step: int = 0
    data_position: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    incomplete: int = 0
    seconds: float = 0.0
    finished: bool = False
    before: dict[str, Any] | None = None


@dataclass
class State:
    """What the manifest holds: progress, changed blocks, and the open visit's tensors."""

    progress: Progress = field(default_factory=Progress)
    blocks: dict[int, SavedFile] = field(default_factory=dict)
    active: SavedFile | None = None


class Checkpoint:
    """One node's output folder.

    Args:
        folder: node.output.
        identity: what makes this run this run (fingerprint and node name).
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._state_folder = folder / "state"
        self._identity = dict(identity)
        self._lock = FileLock(str(folder / ".lock"))
        self.state = State()

    def claim(self) -> bool:
        """Take the folder for this run, or recognise it as its own.

        Returns:
            Whether there is state to continue from.

        Raises:
            OutputError: it holds another run or strange files, another daemon uses it, or its
                manifest is damaged.
        """
        with translated(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise OutputError(
                    f"{self.folder}: another deca-node is using this folder; set node.output"
                ) from None
            mark = self.folder / "run.json"
            if mark.exists():
                self._recognise(mark)
            else:
                self._refuse_strangers()
                write_atomically(
                    mark, json.dumps({"format": FORMAT, **self._identity}, indent=2).encode()
                )
            self._state_folder.mkdir(exist_ok=True)
            manifest = self._state_folder / "manifest.json"
            if not manifest.exists():
                if (self.folder / "model").exists():
                    raise OutputError(
                        f"{self.folder / 'model'}: a finished model without its run's state; move "
                        "it away to begin the run anew"
                    )
                return False
            self.state = _read_manifest(manifest)
            return True

    def look(self) -> State:
        """The newest state, for reading only: nothing is claimed, locked or changed.

        A daemon may be using the folder and go on: a file that the state names may be gone by the
        time it is read; then there is a newer state.

        Raises:
            OutputError: the folder holds no run, another one, or no state; or it is damaged.
        """
        with translated(self.folder):
            self._recognise(self.folder / "run.json")
            manifest = self._state_folder / "manifest.json"
            if not manifest.exists():
                raise OutputError(f"{self.folder}: nothing is trained yet")
            self.state = _read_manifest(manifest)
            return self.state

    def _recognise(self, mark: Path) -> None:
        found = read_mark(mark)
        for name, value in self._identity.items():
            if found.get(name) != value:
                there = found.get(name, "absent")
                raise OutputError(
                    f"{self.folder}: holds another run ({name} is {there!r} there, {value!r} "
                    "here); set node.output to a new folder"
                )

    def _refuse_strangers(self) -> None:
        for name in ("history.jsonl", "summary.json", "model", "state"):
            if (self.folder / name).exists():
                raise OutputError(
                    f"{self.folder / name}: exists but the folder is no run's output (no "
                    "run.json); set node.output to a new folder"
                )

    def release(self) -> None:
        """Let another daemon use the folder."""
        self._lock.release()

    # --- writing

    def save_blocks(self, blocks: Mapping[int, Mapping[str, Tensor]], progress: Progress) -> None:
        """Keep blocks' values at the end of a visit, and forget the open visit's.

        Raises:
            DiskFullError, OutputError: the state on disk is the previous one.
        """
        self._commit(State(progress, self._with(blocks, progress), None))

    def save_visit(
        self,
        tensors: Mapping[str, Tensor] | None,
        progress: Progress,
        blocks: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Keep the progress, within a visit its x, m and v, and blocks not kept before.

        Raises:
            DiskFullError, OutputError: the state on disk is the previous one.
        """
        saved = self._with(blocks or {}, progress)
        active = None
        if tensors is not None:
            active = self._save_tensors(f"visit-{progress.visit}-{progress.step}", tensors)
        self._commit(State(progress, saved, active))

    def _with(
        self, blocks: Mapping[int, Mapping[str, Tensor]], progress: Progress
    ) -> dict[int, SavedFile]:
        stem = "block-{:04}-{}"
        return self.state.blocks | {
            block: self._save_tensors(stem.format(block, progress.visit), tensors)
            for block, tensors in blocks.items()
        }

    def _save_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> SavedFile:
        path = self._state_folder / f"{stem}.safetensors"
        with translated(path):
            temporary = path.with_suffix(".tmp")
            try:
                save_file(
                    {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary
                )
                _sync(temporary)
                digest = _digest(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return SavedFile(path.name, digest)

    def _commit(self, state: State) -> None:
        manifest = self._state_folder / "manifest.json"
        tree = {"format": FORMAT, **asdict(state)}
        with translated(manifest):
            write_atomically(manifest, json.dumps(tree, indent=1).encode())
            _sync(self._state_folder)
        self.state = state
        kept = {saved.file for saved in state.blocks.values()} | {"manifest.json"}
        if state.active:
            kept.add(state.active.file)
        with contextlib.suppress(OSError):  # the new state is kept; old files only take room
            for path in self._state_folder.iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    # --- reading

    def load(self, saved: SavedFile) -> dict[str, Tensor]:
        """Read a file of the state, its digest checked.

        Raises:
            OutputError: it is missing or damaged; the message names it.
        """
        path = self._state_folder / saved.file
        with translated(path):
            if _digest(path) != saved.xxh3:
                raise OutputError(
                    f"{path}: damaged (its digest is not the manifest's); restore it, or remove "
                    f"{self._state_folder} to begin the run anew"
                )
            return load_file(path)


def read_mark(mark: Path) -> dict[str, Any]:
    """What ``run.json`` says of the run that a folder holds.

    Raises:
        OutputError: it is missing, unreadable or damaged.
    """
    with translated(mark):
        try:
            found = json.loads(mark.read_bytes())
        except FileNotFoundError:
            raise OutputError(
                f"{mark.parent}: holds no run; set node.output to the folder of one"
            ) from None
        except ValueError:
            raise OutputError(f"{mark}: damaged; move the folder away or restore it") from None
    return found if isinstance(found, dict) else {}


def _read_manifest(path: Path) -> State:
    try:
        tree = json.loads(path.read_bytes())
        active = tree["active"]
        return State(
            Progress(**tree["progress"]),
            {int(block): SavedFile(**saved) for block, saved in tree["blocks"].items()},
            SavedFile(**active) if active else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(
            f"{path}: damaged; restore it, or remove {path.parent} to begin the run anew"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return str(digest.hexdigest())
