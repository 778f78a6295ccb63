"""A block on its way from a peer."""

import contextlib
import hashlib
from pathlib import Path

import xxhash
from safetensors.torch import load_file
from torch import Tensor

from deca_node.disk import in_output, sync
from deca_node.errors import OutputError, PayloadError


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
        with in_output(path):
            # Unbuffered: what a full disk did not take is not counted.
            self._file = path.open("ab+", buffering=0)
            self._file.seek(0)
            self._digest = hashlib.file_digest(self._file, xxhash.xxh3_128)
            self.size = self._file.tell()

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
