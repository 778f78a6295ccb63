"""The run's state on disk, written so that a crash at any moment leaves a whole one.

``state/manifest.json`` names every other file with its digest and carries its own;
``manifest.previous.json`` is the one before, and the files it names are kept too. A new block goes
to a temporary file, is synced and renamed to a name that no other content ever has, and only then
does a new manifest replace the old one.
"""

import contextlib
import errno
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

import xxhash
from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from deca_node.blocks import Schedule
from deca_node.checkpoint.incoming import Incoming
from deca_node.checkpoint.manifest import (
    DIGEST,
    MANIFEST,
    PREVIOUS,
    Progress,
    SavedFile,
    State,
    parsed,
)
from deca_node.checkpoint.mark import MARK, check_mark, recognise
from deca_node.checkpoint.sealing import sealed
from deca_node.consensus import Agreement
from deca_node.disk import in_output, make_folder, sync, write_atomically
from deca_node.errors import OutputError, PayloadError

# A daemon commits in seconds at least, and between two looks at all that it keeps more than this
# many times only when it commits faster than the disk can be read.
MAX_LOOKS = 10
# Damaged files kept aside for whoever wants to look at them; older ones go.
MAX_DAMAGED = 4
# Unfinished transfers of one block that no longer run: two neighbours in turn, each of which may
# come back; older ones go.
MAX_PARTS_PER_BLOCK = 2

_AGREEMENT = TypeAdapter(Agreement)
_PART = re.compile(rf"incoming-([0-9]{{4,}})-({DIGEST.pattern})\.part")


@dataclass(frozen=True)
class Changed:
    """A block's values, and the index of the last visit that changed them."""

    visit: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Candidate:
    """A state found at start: the manifest as it was read, and what its files are worth."""

    content: bytes
    named: State
    damaged: dict[SavedFile, str]  # with what is wrong with each

    @property
    def usable(self) -> State:
        """The state without its damaged files."""
        lost = {b for b, saved in self.named.blocks.items() if saved in self.damaged}
        blocks = {b: saved for b, saved in self.named.blocks.items() if b not in lost}
        state = replace(self.named, blocks=blocks, lost=tuple(sorted(lost.union(self.named.lost))))
        if state.active in self.damaged:
            return replace(state, active=None, progress=replace(state.progress, step=0))
        return state

    @property
    def cost(self) -> tuple[int, bool]:
        """What is lost with it: a block weighs more than the steps of a visit."""
        return len(self.usable.lost), self.named.active in self.damaged


class Checkpoint:
    """One node's output folder. Saving and serving may happen on different threads.

    Args:
        folder: node.output.
        identity: what makes this run this run (fingerprint and node name).
        schedule: bounds of the numbers that a manifest may hold.

    Attributes:
        state: what is in use, and on disk after each save.
        warnings: one line for each thing found damaged, with what is used in its place, and for
            each block that is lost since an earlier start.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], schedule: Schedule) -> None:
        self.folder = folder
        self.state = State()
        self.warnings: tuple[str, ...] = ()
        self._state_folder = folder / "state"
        self._identity = dict(identity)
        self._schedule = schedule
        # Of the process, not of a thread: who claims need not be who releases.
        self._lock = FileLock(str(folder / ".lock"), thread_local=False)
        self._writing = threading.Lock()
        self._content: bytes | None = None  # the manifest of the state in use
        self._damaged: set[str] = set()
        self._incoming: WeakSet[Incoming] = WeakSet()
        self._counting = threading.Lock()

    @property
    def lost(self) -> tuple[int, ...]:
        """Blocks that the run had changed and of which no good file is left."""
        return self.state.lost

    # --- opening

    def claim(self) -> bool:
        """Take the folder for this run, or recognise it as its own.

        Reads all that is kept once, to check digests. When something of the newest state is
        damaged, the one before is used, or where that does not help, the newest without the
        damaged blocks; see ``warnings`` and ``lost``. Nothing kept is changed.

        Returns:
            Whether there is state to continue from.

        Raises:
            OutputError: it holds another run or strange files, another daemon uses it, it was
                written in another format, or no manifest is usable.
        """
        with in_output(self.folder):
            make_folder(self.folder)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise OutputError(
                    f"{self.folder}: another deca-node is using this folder; set node.output"
                ) from None
            if not check_mark(self.folder, self._identity):
                write_atomically(self.folder / MARK, sealed(self._identity))
            if not self._state_folder.is_dir():
                self._state_folder.mkdir()
                sync(self.folder)
            return self._find_state()

    def look(self) -> State:
        """The newest state, for reading only: nothing is claimed, locked or changed.

        Reads all that is kept once, to check digests, and chooses as ``claim`` does; ``warnings``
        and ``lost`` say whether that is not the newest state, or not whole. A daemon may be using
        the folder and go on: a file that the state names may be gone by the time it is read; then
        there is a newer state.

        Raises:
            OutputError: the folder holds no run, another one, or no usable state.
        """
        with in_output(self.folder):
            recognise(self.folder, self._identity)
            manifest = self._state_folder / MANIFEST
            for _ in range(MAX_LOOKS):
                content, _ = _readable(manifest)
                if not self._find_state():
                    raise OutputError(f"{self.folder}: nothing has been trained yet")
                # What is missing may have been replaced while it was looked at.
                if not self.warnings or _readable(manifest)[0] == content:
                    return self.state
        raise OutputError(f"{self.folder}: changes faster than it can be read; try again")

    def _find_state(self) -> bool:
        """Choose the newest state that is whole, or else the one that costs least."""
        self.warnings = ()
        newest, trouble = self._candidate(MANIFEST)
        if newest is not None and not newest.damaged:
            self._use(newest)
            self.warnings = self._lost_before(newest)
            return True
        before, older_trouble = self._candidate(PREVIOUS)
        if trouble == older_trouble == "missing":
            if (self.folder / "model").exists():
                raise OutputError(
                    f"{self.folder / 'model'}: a finished model without its run's state; move "
                    "it away to begin the run anew"
                )
            return False
        found = [candidate for candidate in (newest, before) if candidate is not None]
        if not found:
            raise OutputError(
                f"{self._state_folder / MANIFEST}: {trouble}, and {PREVIOUS} is {older_trouble}; "
                f"restore one, or remove {self._state_folder} to begin the run anew"
            )
        chosen = min(found, key=lambda candidate: candidate.cost)  # the newest of equals
        self._use(chosen)
        progress = chosen.named.progress
        place = f"the state before is used (visit {progress.visit}, step {progress.step})"
        warnings = [*self._lost_before(chosen)]
        if newest is None:
            warnings.append(f"{self._state_folder / MANIFEST}: {trouble}; {place}")
        elif chosen is before:
            warnings += [
                f"{self._state_folder / saved.file}: {what}; {place}"
                for saved, what in newest.damaged.items()
                if saved not in chosen.damaged
            ]
        elif before is None and older_trouble != "missing":
            warnings.append(
                f"{self._state_folder / PREVIOUS}: {older_trouble}; there is no older state"
            )
        for block, saved in chosen.named.blocks.items():
            if saved in chosen.damaged:
                warnings.append(
                    f"{self._state_folder / saved.file}: {chosen.damaged[saved]}; there is no "
                    f"older copy, so block {block} is lost"
                )
        if (active := chosen.named.active) in chosen.damaged:
            warnings.append(
                f"{self._state_folder / active.file}: {chosen.damaged[active]}; visit "
                f"{progress.visit} begins anew"
            )
        self.warnings = tuple(warnings)
        self._damaged = {saved.file for candidate in found for saved in candidate.damaged}
        if newest is None:
            self._damaged.add(MANIFEST)
        return True

    def _lost_before(self, candidate: _Candidate) -> tuple[str, ...]:
        """A line for each block that a manifest names as lost."""
        return tuple(
            f"{self._state_folder / f'block-{block:04}'}-*.safetensors: found damaged at an "
            f"earlier start, so block {block} is lost"
            for block in candidate.named.lost
        )

    def _use(self, candidate: _Candidate) -> None:
        self.state, self._content = candidate.usable, candidate.content

    def _candidate(self, name: str) -> tuple[_Candidate | None, str]:
        """A manifest with its files checked, or None and why not."""
        path = self._state_folder / name
        with in_output(path):
            content, trouble = _readable(path)
            if content is None:
                return None, trouble
            try:
                state = self._with_agreement(parsed(path, content, self._schedule))
            except ValueError:
                return None, "damaged"
        damaged = {}
        for saved in state.files():
            if trouble := self._trouble(saved):
                damaged[saved] = trouble
        return _Candidate(content, state, damaged), ""

    def _with_agreement(self, state: State) -> State:
        """What was agreed on; of a run that an earlier version finished only summary.json tells."""
        progress, end = state.progress, self._schedule.visits
        agreed = all(saved.visit == end for saved in state.blocks.values())
        if not (progress.finished and agreed) or progress.agreement is not None:
            return state
        try:
            summary = json.loads((self.folder / "summary.json").read_bytes())
            told = _AGREEMENT.validate_json(json.dumps(summary["consensus"]))
        except (OSError, ValueError, KeyError, TypeError):
            return state
        return replace(state, progress=replace(progress, agreement=told))

    def _trouble(self, saved: SavedFile) -> str:
        """What is wrong with a file; empty when nothing."""
        path = self._state_folder / saved.file
        with in_output(path):
            try:
                good = path.stat().st_size == saved.bytes and _digest(path) == saved.xxh3
            except FileNotFoundError:
                return "missing"
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return "cannot be read"
        return "" if good else "damaged"

    def release(self) -> None:
        """Let another daemon use the folder."""
        self._lock.release()

    # --- writing

    def save(
        self,
        blocks: Mapping[int, Changed],
        progress: Progress,
        open_visit: Mapping[str, Tensor] | None = None,
        peers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep blocks' values, the progress, and the open visit's tensors.

        Args:
            blocks: those that changed; the others stay as they were kept.
            progress: where the run is.
            open_visit: x, m and v of the visit under way; None, as at its end, forgets them.
            peers: the last known addresses; None leaves those that are kept.

        Raises:
            DiskFullError, OutputError: the state in use is the previous one, and so is that on
                disk, unless all was written and only syncing the folder failed.
        """
        with self._writing:
            done: Iterable[int] = ()
            try:
                saved = {
                    block: self._save_tensors(f"block-{block:04}", changed)
                    for block, changed in blocks.items()
                }
                active = None
                if open_visit is not None:
                    active = self._save_tensors("visit", Changed(progress.visit, open_visit))
                self._commit(progress, saved, active, peers)
                done = saved
            finally:
                self._clean_up(done)

    def adopt(
        self,
        incoming: Mapping[int, tuple[Incoming, int]],
        progress: Progress,
        peers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep blocks that came from peers, all or none, and forget the open visit's tensors.

        Args:
            incoming: each block's whole file and the last visit that changed it.
            progress: where the run goes on.
            peers: as in ``save``.

        Raises:
            PayloadError: a file's digest is not the announced one; that part is removed.
            DiskFullError, OutputError: see ``save``; all parts are as they were, and open.
        """
        with self._writing:
            moved: list[tuple[Incoming, Path]] = []
            saved: dict[int, SavedFile] = {}
            done: Iterable[int] = ()
            try:
                for block, (part, visit) in incoming.items():
                    part.verify()
                    name = _file_name(f"block-{block:04}", visit, part.xxh3)
                    part.keep(self._state_folder / name)
                    moved.append((part, self._state_folder / name))
                    saved[block] = SavedFile(name, part.xxh3, part.size, visit)
                self._commit(progress, saved, None, peers)
                done = saved
                for part, _ in incoming.values():
                    part.close()
            finally:
                named = self._named()
                for part, path in moved:
                    if path.name not in named:
                        with contextlib.suppress(OSError):  # it is fetched again then
                            path.replace(part.path)
                self._clean_up(done)

    def _save_tensors(self, stem: str, changed: Changed) -> SavedFile:
        temporary = self._state_folder / f"{stem}.tmp"
        tensors = {name: t.detach().cpu().contiguous() for name, t in changed.tensors.items()}
        with in_output(temporary):
            try:
                save_file(tensors, temporary)
                sync(temporary)
                digest, size = _digest(temporary), temporary.stat().st_size
                name = _file_name(stem, changed.visit, digest)
                temporary.replace(self._state_folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        self._damaged.discard(name)
        return SavedFile(name, digest, size, changed.visit)

    def _commit(
        self,
        progress: Progress,
        saved: Mapping[int, SavedFile],
        active: SavedFile | None,
        peers: Mapping[str, str] | None,
    ) -> None:
        """Make new files the state, by one rename."""
        old = self.state
        state = State(
            progress,
            {**old.blocks, **saved},
            active,
            dict(old.peers if peers is None else peers),
            tuple(block for block in old.lost if block not in saved),
        )
        manifest = self._state_folder / MANIFEST
        content = sealed(asdict(state))
        parsed(manifest, content, self._schedule)  # better now than at the next start
        with in_output(manifest):
            # Either syncs the folder: the new files last before a manifest names them.
            if self._content is None:
                sync(self._state_folder)
            else:
                write_atomically(self._state_folder / PREVIOUS, self._content)
            if MANIFEST in self._damaged:  # the state in use is in the other one
                with contextlib.suppress(OSError):
                    manifest.replace(manifest.with_name(MANIFEST + ".damaged"))
                self._damaged.discard(MANIFEST)
            write_atomically(manifest, content)
        self.state, self._content = state, content

    def _named(self) -> set[str]:
        """Files of the state in use and of the manifests on disk."""
        named = {saved.file for saved in self.state.files()}
        for name in (MANIFEST, PREVIOUS):
            path = self._state_folder / name
            with contextlib.suppress(OSError, ValueError, OutputError):
                state = parsed(path, path.read_bytes(), self._schedule)
                named |= {saved.file for saved in state.files()}
        return named

    def _clean_up(self, changed: Iterable[int]) -> None:
        """Remove what is not wanted any more; leftovers only take room until the next time.

        A part goes when its block was kept in another way, or when the run is complete.
        """
        wanted = {MANIFEST, PREVIOUS, *self._named()}
        running = self._running()
        obsolete = set(changed)
        with contextlib.suppress(OSError):
            for path in sorted(self._state_folder.iterdir()):
                if path.name in wanted or path in running or path.suffix == ".damaged":
                    continue
                part = _PART.fullmatch(path.name)
                if part and int(part[1]) not in obsolete and not self.state.progress.finished:
                    continue
                with contextlib.suppress(OSError):
                    if path.name in self._damaged:
                        path.replace(path.with_name(path.name + ".damaged"))
                    else:
                        path.unlink(missing_ok=True)
            _remove_oldest(self._state_folder.glob("*.damaged"), MAX_DAMAGED)

    # --- blocks from peers

    def begun(self) -> frozenset[str]:
        """Digests of the files of which broken off transfers left a part."""
        with contextlib.suppress(OSError):
            names = (path.name for path in self._state_folder.glob("incoming-*.part"))
            return frozenset(part[2] for name in names if (part := _PART.fullmatch(name)))
        return frozenset()

    def incoming(self, block: int, xxh3: str) -> Incoming:
        """Begin a transfer, or go on with one that was broken off.

        Args:
            block: its index.
            xxh3: digest of the whole file, as a peer announced it.

        Raises:
            PayloadError: ``malformed``: no digest, or no block of this model.
            DiskFullError, OutputError: the file cannot be opened.
            ValueError: this transfer is already under way.
        """
        if not DIGEST.fullmatch(xxh3) or not 0 <= block < len(self._schedule.blocks):
            raise PayloadError("malformed", f"block {block} with digest {xxh3[:40]!r}")
        path = self._state_folder / f"incoming-{block:04}-{xxh3}.part"
        running = self._running()
        if path in running:
            raise ValueError(f"{path.name}: already under way")
        with contextlib.suppress(OSError):
            others = set(self._state_folder.glob(f"incoming-{block:04}-*.part"))
            _remove_oldest(others - running - {path}, MAX_PARTS_PER_BLOCK - 1)
        part = Incoming(path, block, xxh3)
        with self._counting:
            self._incoming.add(part)
        return part

    def _running(self) -> set[Path]:
        with self._counting:
            return {part.path for part in self._incoming if not part.closed}

    # --- reading

    def open(self, saved: SavedFile) -> BinaryIO:
        """Open a kept file to serve it; it stays readable when it is superseded meanwhile.

        Raises:
            OutputError: it is gone.
        """
        path = self._state_folder / saved.file
        with in_output(path):
            return path.open("rb")

    def load(self, saved: SavedFile) -> dict[str, Tensor]:
        """Read a file of the state, whose digest was checked by ``claim`` or made by a save.

        Raises:
            OutputError: it cannot be read; the message names it.
        """
        path = self._state_folder / saved.file
        with in_output(path):
            return load_file(path)


def _file_name(stem: str, visit: int, digest: str) -> str:
    """With the digest in it, no file is ever written over by another content."""
    return f"{stem}-{visit}-{digest}.safetensors"


def _readable(path: Path) -> tuple[bytes | None, str]:
    """A file's bytes, or None and what is wrong with it."""
    try:
        return path.read_bytes(), ""
    except FileNotFoundError:
        return None, "missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None, "cannot be read"


def _remove_oldest(paths: Iterable[Path], kept: int) -> None:
    """Remove all but the ``kept`` that were written last."""
    newest = sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in newest[kept:]:
        path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
