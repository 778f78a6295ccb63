"""Which nodes run on this machine: one small file per daemon in a folder of this user.

It lets the verbs of this machine's user find them without an address, and a testbed its nodes. A
daemon does not need it: where the folder cannot be used, addresses must be named.
"""

import contextlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import structlog

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """A node of this machine.

    Attributes:
        address: HOST:PORT as reached from this machine.
        run: the run's name.
        node: the node's.
        pid: of the daemon.
        trust: its trust folder, empty when it answers in plain text.
        socket: its socket file, which its user alone can open; empty when it has none.
    """

    address: str
    run: str
    node: str
    pid: int
    trust: str = ""
    socket: str = ""

    @property
    def target(self) -> str:
        """What this machine's tools call: the socket file, which asks for no certificate."""
        return f"unix:{self.socket}" if self.socket else self.address


# The system's bound on a socket's path with its end: 108 bytes on Linux, 104 on macOS.
MAX_SOCKET_PATH_BYTES = 103
# A folder for which there is always room in it; _own refuses one that is not this user's alone.
_SHORTEST = "/tmp"  # noqa: S108 # nosec B108


def socket_path() -> Path | None:
    """Where a node of this process can have its socket file; None where there is no place."""
    name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    short = Path(_SHORTEST) / f"deca-node-{os.getuid()}"
    for candidate in (_folder, lambda: _own(short)):
        try:
            path = candidate() / name
        except OSError:
            continue
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
    return None


@contextlib.contextmanager
def announce(
    address: str, run: str, node: str, trust: str = "", socket: str = ""
) -> Iterator[None]:
    """List this process's node, called at HOST:PORT, for as long as the context lasts."""
    entry = Entry(address, run, node, os.getpid(), trust, socket)
    port = address.rpartition(":")[2]
    try:
        folder = _folder()
        path = folder / f"{entry.pid}-{port}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        _log.warning(
            "this node is not listed on this machine; give its address to status",
            reason=str(error),
        )
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def local_nodes() -> list[Entry]:
    """The nodes that run on this machine now, in order of run and name.

    Files that dead processes left are removed.
    """
    found = []
    try:
        paths = list(_folder().glob("*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            entry = Entry(**json.loads(path.read_bytes()))
            alive = psutil.pid_exists(entry.pid)
        except (OSError, ValueError, TypeError):
            continue  # just gone, or another version's
        if alive:
            found.append(entry)
        else:
            for left in (path, *([Path(entry.socket)] if entry.socket else [])):
                with contextlib.suppress(OSError):
                    left.unlink()
    return sorted(found, key=lambda entry: (entry.run, entry.node, entry.address))


def _folder() -> Path:
    """This user's folder, made if need be.

    Raises:
        OSError: it cannot be made, or is not this user's alone.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK):
        folder = Path(runtime) / "deca-node"
    else:
        folder = Path(tempfile.gettempdir()) / f"deca-node-{os.getuid()}"
    return _own(folder)


def _own(folder: Path) -> Path:
    """The folder, made if need be, and certainly this user's alone; see _folder."""
    folder.mkdir(mode=0o700, exist_ok=True)
    # In a shared folder anybody could have made it first, to tell us of nodes that are theirs.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder
