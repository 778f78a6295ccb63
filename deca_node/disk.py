"""Writing files: in one piece or not at all, and a full disk told from other trouble."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import filelock
from safetensors import SafetensorError

from deca_node.errors import DiskFullError, OutputError

_FULL = errno.ENOSPC, errno.EDQUOT
# Of a folder that cannot be made or written, or has a file in its place.
_UNWRITABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR


def is_full(error: Exception) -> bool:
    """Whether an error means that there is no room left.

    tokenizers and safetensors give the system's error number as text only.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    text = str(error)
    return "No space left" in text or any(f"os error {code})" in text for code in _FULL)


def is_unwritable(error: Exception) -> bool:
    """Whether an error means that this place cannot be written, and another one might be."""
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


@contextmanager
def translated(path: Path, elsewhere: str = "choose another folder") -> Iterator[None]:
    """Turn a full disk into DiskFullError and other trouble with files into OutputError.

    Args:
        path: what is read or written.
        elsewhere: what helps where no room can be made, or nothing be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise DiskFullError(
                f"{path}: no space left on the disk; free some or {elsewhere}"
            ) from None
        text = f"{path}: {getattr(error, 'strerror', None) or error}"
        if is_unwritable(error):
            text += f"; {elsewhere} that can be written"
        raise OutputError(text) from None


def in_output(path: Path) -> AbstractContextManager[None]:
    """As ``translated``, for what a node keeps in node.output."""
    return translated(path, "set node.output to another folder")


def make_folder(folder: Path) -> None:
    """Make a folder, and those that lead to it, where it is not there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # as /proc says it, where nothing can be made
        raise PermissionError(errno.EACCES, "no folder can be created there", str(folder)) from None


@contextmanager
def alone(folder: Path, verb: str) -> Iterator[None]:
    """Keep other processes of the same verb out of a folder, which is made if need be.

    Raises:
        OutputError: another one works there, or it cannot be made.
    """
    lock = filelock.FileLock(folder / ".lock")
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise OutputError(
                f"{folder}: another `deca-node {verb}` is working there now"
            ) from None
    try:
        yield
    finally:
        lock.release()


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder; one of before, or of a process that was killed as it wrote, gives way."""
    newer = folder.with_name(folder.name + ".new")
    with translated(newer):
        if newer.exists():
            shutil.rmtree(newer)
    write(newer)
    with translated(folder):
        if folder.exists():
            shutil.rmtree(folder)
        newer.replace(folder)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to where they outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new content is there.

    The folder is synced too: what was renamed in it before lasts when this returns.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
