"""Folders of a model that are there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deca_node import memory
from deca_node.disk import is_full, is_unwritable, sync
from deca_node.errors import DecaError, DeviceError, DiskFullError, OutputError, first_line


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` once it is whole, and vanishes otherwise.

    Raises:
        DiskFullError: the disk is full.
        DeviceError: there is not enough memory to write it.
        OutputError: it cannot be written for another reason.
    """
    place = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a writer that was killed
        place.mkdir(parents=True)
        yield place
        for entry in (*place.rglob("*"), place):  # chat templates may have a folder of their own
            if entry.is_file():
                entry.chmod(place.stat().st_mode & 0o666)  # safetensors keeps its file to itself
            sync(entry)  # or a power cut could leave the new name on empty files
        place.rename(folder)
    except Exception as error:  # noqa: BLE001 - transformers, tokenizers, safetensors: each its own
        raise write_error(folder, error) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_error(folder: Path, error: Exception) -> DecaError:
    """What to raise where a folder could not be written."""
    if is_full(error):
        return DiskFullError(f"{folder.parent}: no space left on this disk; free some and repeat")
    if memory.is_out(error):
        return DeviceError(f"{folder}: not enough memory to write it; free some and repeat")
    reason = getattr(error, "strerror", None) or first_line(error)
    remedy = "; name a folder in one that can be written" if is_unwritable(error) else ""
    return OutputError(f"{folder}: cannot be written: {reason}{remedy}")
