"""How the process gets memory from the system and shares its interpreter: set once, at start.

And what is said where there is none left.

A block is exchanged in messages of 1 MB, as many as its size, made and dropped again every step.
glibc's malloc maps each of them anew by default and gives it back when freed, so that every byte of
every step is a page fault first: a quarter of the time of an exchange (docs/performance.md).
"""

import ctypes
import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deca_node.errors import DeviceError

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

# Messages come from the heap; single allocations from here on, as a model's weights, are mapped.
MMAP_THRESHOLD_BYTES = 16 << 20
# Free memory at the end of the heap that is kept for the next step: a block and its messages.
TRIM_THRESHOLD_BYTES = 256 << 20
# The heap grows in steps of this, in place of 128 kB.
TOP_PAD_BYTES = 16 << 20
# Freed by gRPC's threads, memory is to be used by ours: one heap for all. They allocate rarely.
ARENAS = 1

# A thread that wants the interpreter gets it from one that computes in Python after this long. At
# Python's own 5 ms the threads that carry messages stand still most of the time.
SWITCH_SECONDS = 5e-4

# How torch's allocators for the CPU and MPS, and NVIDIA's libraries, say in a RuntimeError that
# there is none left.
_OUT = re.compile(
    "CPUAllocator: (can't|not enough)|out of memory|STATUS_ALLOC_FAILED|Cannot allocate|bad_alloc"
)
_OF_HOST = re.compile("CPUAllocator|Cannot allocate|bad_alloc")
LESS_A_STEP = "lower data.batch_size or data.max_tokens, or set model.gradient_checkpointing = true"


def tune() -> None:
    """Set both, as far as the platform has them: musl and macOS have no such malloc."""
    sys.setswitchinterval(SWITCH_SECONDS)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, value in (
        (_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_TOP_PAD, TOP_PAD_BYTES),
        (_ARENA_MAX, ARENAS),
    ):
        mallopt(parameter, value)


def is_out(error: BaseException) -> bool:
    """Whether an error means that no memory is left, of a device or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _OUT.search(str(error)) is not None


@contextmanager
def suffices(device: torch.device, remedy: str = LESS_A_STEP) -> Iterator[None]:
    """Tell of the end of all memory in a line.

    Args:
        device: where is computed.
        remedy: what takes less.

    Raises:
        DeviceError: there is no more; that may be others' doing, and so over at the next try.
    """
    try:
        yield
    except Exception as error:
        if not is_out(error):
            raise
        tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        more = f" ({tried[0][0].lower()}{tried[0][1:]})" if tried else ""
        host = isinstance(error, MemoryError | OSError) or _OF_HOST.search(str(error))
        place = "this machine" if host else str(device)
        raise DeviceError(f"{place}: out of memory{more}; {remedy}") from None
