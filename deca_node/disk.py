"""Writing files: in one piece or not at all, and a full disk told from other trouble."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deca_node.errors import DiskFullError, OutputError

_FULL = errno.ENOSPC, errno.EDQUOT


def is_full(error: Exception) -> bool:
    """Whether an error means that there is no room left.

    tokenizers and safetensors give the system's error number as text only.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    text = str(error)
    return "No space left" in text or any(f"os error {code})" in text for code in _FULL)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn a full disk into DiskFullError and other trouble with files into OutputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full(error):
            raise DiskFullError(
                f"{path}: no space left on the disk; free some or set node.output elsewhere"
            ) from None
        raise OutputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


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
