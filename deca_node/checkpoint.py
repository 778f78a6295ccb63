"""The run's state on disk, written so that a crash at any moment leaves a whole one.

``state/manifest.json`` names every other file with its digest and carries its own;
``manifest.previous.json`` is the one before, and the files it names are kept too. A new block goes
to a temporary file, is synced and renamed to a name that no other content ever has, and only then
does a new manifest replace the old one.
"""

import contextlib
import errno
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from weakref import WeakSet

import xxhash
from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from deca_node.blocks import Schedule
from deca_node.disk import in_output, sync, write_atomically
from deca_node.errors import OutputError, PayloadError

FORMAT = 2
MARK = "run.json"
MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
# A daemon commits in seconds at least, and between two looks at all that it keeps more than this
# many times only when it commits faster than the disk can be read.
MAX_LOOKS = 10
# Damaged files kept aside for whoever wants to look at them; older ones go.
MAX_DAMAGED = 4
# Unfinished transfers of one block that no longer run: two neighbours in turn, each of which may
# come back; older ones go.
MAX_PARTS_PER_BLOCK = 2

_READ_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"incoming-([0-9]{4,})-([0-9a-f]{32})\.part")
_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0)]


@with_config(_STRICT)
@dataclass(frozen=True)
class SavedFile:
    """A file of the state folder: its plain name, the xxh3_128 of its bytes and their number.

    ``visit`` is the index of the last visit that changed the block, or of the open visit.
    """

    file: Annotated[str, Field(pattern=r"^[a-z0-9-]+\.safetensors$")]
    xxh3: Annotated[str, Field(pattern=rf"^{_DIGEST.pattern}$")]
    bytes: _Count
    visit: _Count


@dataclass(frozen=True)
class Changed:
    """A block's values, and the index of the last visit that changed them."""

    visit: int
    tensors: Mapping[str, Tensor]


@with_config(_STRICT)
@dataclass(frozen=True)
class Progress:
    """Where a run is: everything but tensors.

    ``visit`` and ``step`` come next; ``data_position`` counts examples consumed; ``bytes_sent``,
    ``bytes_received``, ``incomplete`` and ``seconds`` are totals so far; ``caught_up`` counts the
    bytes of blocks fetched to catch up, ``passed_over`` the visits that were skipped by it.
    """

    visit: _Count = 0
    step: _Count = 0
    data_position: _Count = 0
    bytes_sent: _Count = 0
    bytes_received: _Count = 0
    incomplete: _Count = 0
    caught_up: _Count = 0
    passed_over: _Count = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    finished: bool = False
    before: dict[str, Any] | None = None


@with_config(_STRICT)
@dataclass(frozen=True)
class State:
    """What a manifest holds.

    ``blocks`` are those that the run has changed; ``active`` holds the open visit's tensors;
    ``peers`` are the last known addresses (HOST:PORT) by name; ``lost`` are blocks that were
    changed and whose values are not there any more.
    """

    progress: Progress = field(default_factory=Progress)
    blocks: dict[int, SavedFile] = field(default_factory=dict)
    active: SavedFile | None = None
    peers: dict[str, str] = field(default_factory=dict)
    lost: tuple[int, ...] = ()

    def files(self) -> set[SavedFile]:
        """All that it names."""
        return {*self.blocks.values(), *([self.active] if self.active else [])}


_STATE = TypeAdapter(State)


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


class Incoming:
    """A block on its way from a peer, in a file that a restart finds again.

    Attributes:
        block: the block's index.
        xxh3: the digest that the whole file must have.
        path: the part file.
        size: bytes there.
    """

    def __init__(self, path: Path, block: int, xxh3: str) -> None:
        """Open a part file or begin one; reads what is there to go on with its digest.

        Raises:
            DiskFullError, OutputError: it cannot be opened or read.
        """
        self.path, self.block, self.xxh3 = path, block, xxh3
        self.size = 0
        self._digest = xxhash.xxh3_128()
        with in_output(path):
            # Unbuffered: what a full disk did not take is not counted.
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            while piece := self._file.read(_READ_BYTES):
                self._digest.update(piece)
                self.size += len(piece)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._file.closed

    def write(self, data: bytes | memoryview) -> None:
        """Append. How much a peer may send is the caller's to bound.

        Raises:
            DiskFullError, OutputError: a part of it may be there; ``size`` says how much.
        """
        left = memoryview(data)
        with in_output(self.path):
            while left:
                written = self._file.write(left)
                self._digest.update(left[:written])
                self.size += written
                left = left[written:]

    def read(self) -> dict[str, Tensor]:
        """The block's tensors by name; call it when all bytes are there.

        That names, shapes, dtypes and values are right is the caller's to check.

        Raises:
            PayloadError: the digest differs (``digest``), or it is not a safetensors file
                (``malformed``); the part is removed then.
            OutputError: it cannot be read.
        """
        self.verify()
        try:
            with in_output(self.path):
                if self.path.stat().st_size != self.size:
                    raise OutputError(f"{self.path}: changed by something else while it came in")
                return self._parsed()
        except PayloadError:
            self.discard()
            raise

    def _parsed(self) -> dict[str, Tensor]:
        try:
            return load_file(self.path)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - a hostile header gets far: into torch's own
            raise PayloadError(
                "malformed", f"block {self.block}: not a safetensors file ({error})"
            ) from None

    def verify(self) -> None:
        """Check the digest of all bytes.

        Raises:
            PayloadError: it differs; the part is removed.
        """
        found = self._digest.hexdigest()
        if found != self.xxh3:
            self.discard()
            raise PayloadError(
                "digest",
                f"block {self.block}: {self.size} bytes with digest {found} arrived, announced "
                f"was {self.xxh3}",
            )

    def keep(self, path: Path) -> None:
        """Sync it and give it its place among the kept files.

        Raises:
            DiskFullError, OutputError: it is where it was.
        """
        with in_output(self.path):
            sync(self.path)
            self.path.replace(path)

    def close(self) -> None:
        """Let go of the file; a part stays and can be opened again."""
        self._file.close()

    def discard(self) -> None:
        """Remove it."""
        self._file.close()
        with contextlib.suppress(OSError):  # it only takes room, and the clean-up tries again
            self.path.unlink(missing_ok=True)


class Checkpoint:
    """One node's output folder. Saving and serving may happen on different threads.

    Args:
        folder: node.output.
        identity: what makes this run this run (fingerprint and node name).
        schedule: bounds of the numbers that a manifest may hold.

    Attributes:
        state: what is in use, and on disk after each save.
        warnings: one line for each thing found damaged, with what is used in its place.
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
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise OutputError(
                    f"{self.folder}: another deca-node is using this folder; set node.output"
                ) from None
            if not check_mark(self.folder, self._identity):
                write_atomically(self.folder / MARK, _sealed(self._identity))
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
            _recognise(self.folder, self._identity)
            manifest = self._state_folder / MANIFEST
            for _ in range(MAX_LOOKS):
                content, _ = _readable(manifest)
                if not self._find_state():
                    raise OutputError(f"{self.folder}: nothing is trained yet")
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
        warnings = []
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
                state = self._parsed(path, content)
            except ValueError:
                return None, "damaged"
        damaged = {}
        for saved in state.files():
            if trouble := self._trouble(saved):
                damaged[saved] = trouble
        return _Candidate(content, state, damaged), ""

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

    def _parsed(self, path: Path, content: bytes) -> State:
        """Check and read a manifest.

        Raises:
            ValueError: it is torn, edited, or holds what this run cannot have.
            OutputError: it is of another format.
        """
        state = _STATE.validate_json(_canonical(_unsealed(path, content)))
        schedule, progress = self._schedule, state.progress
        if progress.visit > schedule.visits or progress.step > schedule.steps:
            raise ValueError("a place outside the run")
        # Blocks of the whole run's end carry the number of visits.
        if any(saved.visit > schedule.visits for saved in state.files()):
            raise ValueError("a visit outside the run")
        if any(not 0 <= block < len(schedule.blocks) for block in {*state.blocks, *state.lost}):
            raise ValueError("a block that the model does not have")
        if state.active is not None and state.active.visit != progress.visit:
            raise ValueError("tensors of another visit than the open one")
        return state

    def release(self) -> None:
        """Let another daemon use the folder."""
        self._lock.release()

    # --- writing

    def save_blocks(
        self,
        blocks: Mapping[int, Changed],
        progress: Progress,
        peers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep blocks' values at the end of a visit, and forget the open visit's.

        ``peers`` replaces the known addresses; None leaves them.

        Raises:
            DiskFullError, OutputError: the state in use is the previous one, and so is that on
                disk, unless all was written and only syncing the folder failed.
        """
        self.save_visit(None, progress, blocks, peers)

    def save_visit(
        self,
        tensors: Mapping[str, Tensor] | None,
        progress: Progress,
        blocks: Mapping[int, Changed] | None = None,
        peers: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the progress, within a visit its x, m and v, and blocks not kept before.

        Raises:
            DiskFullError, OutputError: see ``save_blocks``.
        """
        with self._writing:
            done: Iterable[int] = ()
            try:
                saved = {
                    block: self._save_tensors(f"block-{block:04}", changed)
                    for block, changed in (blocks or {}).items()
                }
                active = None
                if tensors is not None:
                    active = self._save_tensors("visit", Changed(progress.visit, tensors))
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
            peers: as in ``save_blocks``.

        Raises:
            PayloadError: a file's digest is not the announced one; that part is removed.
            DiskFullError, OutputError: see ``save_blocks``; all parts are as they were, and open.
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
        content = _sealed(asdict(state))
        self._parsed(manifest, content)  # better now than at the next start
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
                named |= {saved.file for saved in self._parsed(path, path.read_bytes()).files()}
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
        if not _DIGEST.fullmatch(xxh3) or not 0 <= block < len(self._schedule.blocks):
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


def check_mark(folder: Path, identity: Mapping[str, str]) -> bool:
    """Whether a folder is this run's; one that may become it is not, yet.

    Args:
        folder: node.output; need not be there.
        identity: what makes this run this run, as far as it is known.

    Raises:
        OutputError: it holds another run, or strange files.
    """
    if (folder / MARK).exists():
        _recognise(folder, identity)
        return True
    for name in ("history.jsonl", "summary.json", "model", "state"):
        if (folder / name).exists():
            raise OutputError(
                f"{folder / name}: exists but the folder is no run's output (no {MARK}); set "
                "node.output to a new folder"
            )
    return False


def _recognise(folder: Path, identity: Mapping[str, str]) -> None:
    found = read_mark(folder / MARK)
    for name, value in identity.items():
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
            return _unsealed(mark, mark.read_bytes())
        except FileNotFoundError:
            raise OutputError(
                f"{mark.parent}: holds no run; set node.output to the folder of one"
            ) from None
        except ValueError:
            raise OutputError(f"{mark}: damaged; move the folder away or restore it") from None


def _file_name(stem: str, visit: int, digest: str) -> str:
    """With the digest in it, no file is ever written over by another content."""
    return f"{stem}-{visit}-{digest}.safetensors"


def _canonical(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


def _seal(tree: Mapping[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(_canonical(tree).encode()))


def _sealed(values: Mapping[str, Any]) -> bytes:
    """JSON for people to read, with the format's number and its own digest."""
    tree = json.loads(json.dumps({"format": FORMAT, **values}))  # keys as they will be read
    return json.dumps({"xxh3": _seal(tree), **tree}, indent=1).encode()


def _unsealed(path: Path, content: bytes) -> dict[str, Any]:
    """Undo ``_sealed``.

    Raises:
        ValueError: it is not what was written.
        OutputError: it was written in another format.
    """
    try:
        tree = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(tree, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - damage, whatever its kind
    seal, written = tree.pop("xxh3", None), tree.get("format")
    good = seal == _seal(tree)
    # Format 1 had no digest.
    if isinstance(written, int) and written != FORMAT and (good or seal is None):
        raise OutputError(
            f"{path}: written in format {written}, this deca-node reads format {FORMAT}; go on "
            "with the version that wrote it, or set node.output to a new folder"
        )
    if not good:
        raise ValueError("its digest is another")
    del tree["format"]
    return tree


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
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return str(digest.hexdigest())
