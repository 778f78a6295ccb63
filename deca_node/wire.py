"""A block's values <-> a stream of messages that joins to one valid safetensors file.

Message layout (a ``deca.v1.Chunk``; all integers little-endian)::

    09 serial:u64  11 offset:u64  19 xxh3:u64  22 length:varint padded to 4 bytes  data

The prefix is 32 bytes long, so that it is written and read by hand in one struct, and the payload
stays aligned. The first message's data is the safetensors header, the following ones carry the
values: fp32, little-endian, the tensors in header order without gaps.

On a compressed edge a stream carries the sender's reference x̂ (references.py): the whole of it, as
above, or as the difference from the one of ``base``, a serial that the header then names. Values of
a difference are BF16; or I8, after one more tensor, their scales.
"""

import json
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, overload

import numpy as np
import torch
import xxhash
from google.protobuf.message import DecodeError
from torch import Tensor

from deca_node.compression import (
    INT8_BLOCK,
    Format,
    are_finite,
    are_scales,
    from_bf16,
    from_int8,
    scale_count,
)
from deca_node.errors import PayloadError, PeerRefused
from deca_node.limits import (
    CHUNK_BYTES,
    MAX_ABOUT_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADER_BYTES_PER_TENSOR,
    MAX_MESSAGE_BYTES,
    MAX_NOTE_BYTES,
)
from deca_node.pb.node_pb2 import Chunk

# Received bytes are only read; torch warns that it cannot enforce that.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

assert sys.byteorder == "little", "the wire format is little-endian, and so must this machine be"  # noqa: S101

_PREFIX = struct.Struct("<BQBQBQBBBBB")
PREFIX_BYTES = _PREFIX.size
_TAGS = (0x09, 0x11, 0x19, 0x22)
ELEMENT_BYTES = 4
CHUNK_ELEMENTS = CHUNK_BYTES // ELEMENT_BYTES
DTYPE = Format.FP32.dtype
# The tensor of an int8 stream that no model has.
SCALES = "__scales__"
SCALE_BYTES = 2

assert CHUNK_ELEMENTS % INT8_BLOCK == 0, "a message has whole int8 blocks"  # noqa: S101


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of one fp32 tensor of a block."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """The tensors of one flat buffer, in order."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def numel(self) -> int:
        """Elements in the flat buffer; asked for with every message."""
        return sum(spec.numel for spec in self.tensors)

    @property
    def header_limit(self) -> int:
        """Bytes that a peer's header of these tensors may have."""
        names = sum(len(spec.name.encode()) for spec in self.tensors)
        room = names + len(self.tensors) * MAX_HEADER_BYTES_PER_TENSOR
        return min(MAX_HEADER_BYTES, room + MAX_ABOUT_BYTES + MAX_NOTE_BYTES)

    def table(self, wire: Format = Format.FP32) -> dict[str, Any]:
        """The safetensors header without its metadata, of values in a format."""
        table: dict[str, Any] = {}
        offset = 0
        if wire is Format.INT8:
            count = scale_count(self.numel)
            offset = count * SCALE_BYTES
            table[SCALES] = {
                "dtype": Format.BF16.dtype,
                "shape": [count],
                "data_offsets": [0, offset],
            }
        for spec in self.tensors:
            end = offset + spec.numel * wire.value_bytes
            table[spec.name] = {
                "dtype": wire.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        return table

    def header(self, metadata: Mapping[str, str], wire: Format = Format.FP32) -> bytes:
        """Length and JSON header of a safetensors file, padded to a multiple of 8 bytes."""
        tree = {"__metadata__": dict(metadata), **self.table(wire)}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class Pieces(Protocol):
    """Float32 values of a block that are read in pieces."""

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """``count`` values from element ``first`` on, cut at borders of its own.

        Yields:
            Index of a piece's first element, and its float32 values (CPU, read-only).
        """
        ...


@dataclass
class Snapshot:
    """One published state of a block: messages built once, handed to every neighbour.

    It may be published while its messages are still being made (``promised``, ``grow``).

    Attributes:
        serial: the step that it belongs to.
        messages: the header's and then the values' messages.
        count: of the messages in the end, also once they are released.
        encoded: what neighbours on compressed edges get in its place, by format.
        grown: called after each message that ``grow`` has made, on its thread.
    """

    serial: int
    messages: Sequence[bytes]
    encoded: dict[Format, "Encoded"] = field(default_factory=dict)
    count: int = 0
    grown: Callable[[], None] = field(default=lambda: None, repr=False)

    def __post_init__(self) -> None:
        self.count = self.count or len(self.messages)
        self._header_bytes = len(self.messages[0]) - PREFIX_BYTES if self.messages else 0
        self._made = len(self.messages)

    def grow(self, flat: Tensor, end: int) -> None:
        """Make the messages of values of which all elements lie before ``end``.

        Args:
            flat: the whole block, contiguous float32, any device; final up to ``end``.
            end: at most its number of elements, and then everything is made.
        """
        while self._made < self.count:
            low = (self._made - 1) * CHUNK_ELEMENTS
            high = min(low + CHUNK_ELEMENTS, flat.numel())
            if high > end:
                break
            data = flat[low:high].cpu().numpy().view("u1").data
            message = frame(self.serial, self._header_bytes + low * ELEMENT_BYTES, data)
            messages = self.messages
            if isinstance(messages, list) and messages:  # not released meanwhile
                messages.append(message)
            self._made += 1
            self.grown()

    def covers(self, end: int) -> bool:
        """Whether the messages of all elements before ``end`` are made, or were."""
        return self._made == self.count or (self._made - 1) * CHUNK_ELEMENTS >= end

    def has(self, index: int) -> bool:
        """Whether a message is made, or was."""
        return index < self._made

    def release(self) -> None:
        """Give the memory back, also from under a reader that has stopped reading."""
        self.messages = []
        for encoded in self.encoded.values():
            encoded.release()

    def message(self, index: int) -> bytes:
        """One message.

        Raises:
            PeerRefused: they are released.
        """
        if not self.messages:
            raise PeerRefused("passed", f"step {self.serial} was read too slowly")
        return self.messages[index]

    def values(self, index: int) -> Tensor:
        """Values of data message ``index`` (0-based): float32 on CPU, read-only."""
        return _floats(memoryview(self.messages[index + 1])[PREFIX_BYTES:])

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """See Pieces; cut at the messages' borders."""
        return _pieces(self.values, first, count)


@dataclass
class Encoded:
    """The reference x̂ of one format as it is after a step; immutable, so that it can be read late.

    Attributes:
        base: the serial of the reference before, None where there is none.
        difference: from that reference, None likewise.
        whole: x̂ itself; its messages are made as they are read, which few neighbours do.
        parts: x̂, float32, CPU, CHUNK_ELEMENTS values each.
    """

    base: int | None
    difference: Snapshot | None
    whole: Snapshot
    parts: list[Tensor]

    def answer(self, base: int | None) -> Snapshot:
        """What a neighbour gets that holds the reference of ``base``, or none."""
        return self.difference if self.difference is not None and base == self.base else self.whole

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """See Pieces."""
        return _pieces(self.parts.__getitem__, first, count)

    def release(self) -> None:
        """Give the memory back, also from under a reader that has stopped reading."""
        for snapshot in (self.difference, self.whole):
            if snapshot is not None:
                snapshot.release()
        self.parts = []


def _pieces(part: Callable[[int], Tensor], first: int, count: int) -> Iterator[tuple[int, Tensor]]:
    end = first + count
    while first < end:
        index, inside = divmod(first, CHUNK_ELEMENTS)
        piece = part(index)[inside : inside + end - first]
        yield first, piece
        first += piece.numel()


class _Whole(Sequence[bytes]):
    """The messages of float32 values, each made when it is asked for."""

    def __init__(self, serial: int, header: bytes, parts: Sequence[Tensor]) -> None:
        self._serial, self._header, self._parts = serial, header, parts

    def __len__(self) -> int:
        return 1 + len(self._parts)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        if index == 0:
            return frame(self._serial, 0, self._header)
        before = (index - 1) * CHUNK_ELEMENTS * ELEMENT_BYTES
        data = self._parts[index - 1].numpy().view("u1").data
        return frame(self._serial, len(self._header) + before, data)


def whole(
    parts: Sequence[Tensor], layout: Layout, serial: int, about: Mapping[str, str]
) -> Snapshot:
    """Float32 values that are not copied, as messages.

    Args:
        parts: CHUNK_ELEMENTS values each but the last, float32, CPU; never written to again.
        layout: names and shapes.
        serial: the step's number.
        about: the header's metadata.
    """
    return Snapshot(serial, _Whole(serial, layout.header(about), parts))


def difference(
    scales: bytes,
    values: Sequence[bytes | memoryview],
    layout: Layout,
    wire: Format,
    serial: int,
    about: Mapping[str, str],
) -> Snapshot:
    """Quantised values as messages.

    Args:
        scales: bf16, of int8 values; else empty.
        values: those of CHUNK_ELEMENTS elements each, but for the last.
        layout: names and shapes.
        wire: the values' format.
        serial: the step's number.
        about: the header's metadata, with the serial that they are the difference from.
    """
    header = layout.header(about, wire)
    messages, offset = [], 0
    cut = (scales[low : low + CHUNK_BYTES] for low in range(0, len(scales), CHUNK_BYTES))
    for data in (header, *cut, *values):
        messages.append(frame(serial, offset, data))
        offset += len(data)
    return Snapshot(serial, messages)


def metadata(run: str, node: str, serial: int, note: str | None = None) -> dict[str, str]:
    """What the safetensors header says about where the block comes from, and a note beside it."""
    about = {"format": "pt", "run": run, "node": node, "serial": str(serial)}
    return about if note is None else {**about, "note": note}


def reference_metadata(
    run: str, node: str, serial: int, wire: Format, base: int | None
) -> dict[str, str]:
    """The same of a reference; with a base, of the difference from that one."""
    about = {**metadata(run, node, serial), "wire_format": wire.word}
    return about if base is None else {**about, "base": str(base)}


def frame(serial: int, offset: int, data: bytes | memoryview) -> bytes:
    """One message: 32 bytes of prefix and the payload (at most 2^28 − 1 bytes)."""
    length = len(data)
    return b"".join(
        (
            _PREFIX.pack(
                _TAGS[0],
                serial,
                _TAGS[1],
                offset,
                _TAGS[2],
                xxhash.xxh3_64_intdigest(data),
                _TAGS[3],
                length & 0x7F | 0x80,
                length >> 7 & 0x7F | 0x80,
                length >> 14 & 0x7F | 0x80,
                length >> 21,
            ),
            data,
        )
    )


def snapshot(flat: Tensor, layout: Layout, serial: int, about: Mapping[str, str]) -> Snapshot:
    """Copy a flat fp32 buffer (any device) into messages ready to send.

    Args:
        flat: contiguous float32, shape (layout.numel,).
        layout: names and shapes.
        serial: the step's number.
        about: the header's metadata.
    """
    made = promised(layout, serial, about)
    made.grow(flat, flat.numel())
    return made


def promised(layout: Layout, serial: int, about: Mapping[str, str]) -> Snapshot:
    """The same with no more than its header: the values follow with ``grow``."""
    count = 1 + -(-layout.numel // CHUNK_ELEMENTS)
    return Snapshot(serial, [frame(serial, 0, layout.header(about))], count=count)


@dataclass(frozen=True)
class Parsed:
    """A decoded message."""

    serial: int
    offset: int
    xxh3: int
    data: memoryview


def parse(message: bytes) -> Parsed:
    """Decode a message: our own framing without a copy, any other protobuf writer's with one.

    Raises:
        PayloadError: ``too_long`` or ``malformed``.
    """
    if len(message) > MAX_MESSAGE_BYTES:
        raise PayloadError("too_long", f"message of {len(message)} bytes")
    if len(message) >= PREFIX_BYTES:
        t0, serial, t1, offset, t2, digest, t3, a, b, c, d = _PREFIX.unpack_from(message)
        if (t0, t1, t2, t3) == _TAGS and a & b & c & 0x80 and d < 0x80:
            length = (a & 0x7F) | (b & 0x7F) << 7 | (c & 0x7F) << 14 | d << 21
            if length == len(message) - PREFIX_BYTES:
                return Parsed(serial, offset, digest, memoryview(message)[PREFIX_BYTES:])
    try:
        chunk = Chunk.FromString(message)
    except DecodeError:
        raise PayloadError("malformed", "not a Chunk message") from None
    return Parsed(chunk.serial, chunk.offset, chunk.xxh3, memoryview(chunk.data))


def checked(message: bytes, serial: int, offset: int) -> Parsed:
    """Decode a message and check that it is the next of its stream, and whole.

    Raises:
        PayloadError: ``too_long``, ``malformed``, ``wrong_step``, ``gap`` or ``checksum``.
    """
    chunk = parse(message)
    if chunk.serial != serial:
        raise PayloadError("wrong_step", f"serial {chunk.serial}, asked for {serial}")
    if chunk.offset != offset:
        raise PayloadError("gap", f"offset {chunk.offset}, expected {offset}")
    if not chunk.data:
        raise PayloadError("malformed", "empty message")
    if xxhash.xxh3_64_intdigest(chunk.data) != chunk.xxh3:
        raise PayloadError("checksum", f"at offset {chunk.offset}")
    return chunk


class Receiver:
    """Checks one neighbour's stream message by message; only checked values leave it.

    Args:
        layout: what this node itself holds; the sender's must be the same.
        serial: the step asked for.
        run: the run's name, which the header must carry.
        node: the sender's name, which the header must carry.
        noted: whether the header must carry a note, too, of at most MAX_NOTE_BYTES; else none.
        wire: the edge's format.
        base: the serial of the reference that this node holds of the sender, if it does.

    Attributes:
        note: the note once the header is there, unchecked otherwise.
        is_difference: whether the values are to be added to the reference of ``base``; known once
            the header is there.
    """

    def __init__(
        self,
        layout: Layout,
        serial: int,
        run: str,
        node: str,
        *,
        noted: bool = False,
        wire: Format = Format.FP32,
        base: int | None = None,
    ) -> None:
        self._layout = layout
        self._about = metadata(run, node, serial)
        self._noted = noted
        self._wire, self._base = wire, base
        self._packed = Format.FP32  # as the values are written
        self._scales = bytearray()
        self._scale_bytes = 0
        self.note: str | None = None
        self.is_difference = False
        self._serial = serial
        self._offset = 0
        self._header: bytearray | None = bytearray()
        self._values = 0

    @property
    def complete(self) -> bool:
        """Whether every element has arrived."""
        return self._header is None and self._values == self._layout.numel

    def feed(self, message: bytes) -> tuple[int, Tensor] | None:
        """Check one message.

        Returns:
            Index of the first element and the float32 values (CPU, read-only), or None for a
            message of the header or of scales.

        Raises:
            PayloadError: with the failed check as its reason: ``too_long``, ``malformed``,
                ``wrong_step``, ``gap``, ``checksum``, ``header``, ``shape``, ``not_finite``;
                ``bad_format``, ``wrong_base``, ``bad_scale`` on a compressed edge.
        """
        chunk = checked(message, self._serial, self._offset)
        self._offset += len(chunk.data)
        if self._header is not None:
            self._feed_header(chunk.data)
            return None
        if len(self._scales) < self._scale_bytes:
            self._feed_scales(chunk.data)
            return None
        if len(chunk.data) % self._packed.value_bytes:
            raise PayloadError("malformed", f"{len(chunk.data)} bytes are not whole elements")
        first = self._values
        if first + len(chunk.data) // self._packed.value_bytes > self._layout.numel:
            raise PayloadError("too_long", "more values than the block has")
        values = self._unpack(chunk.data, first)
        self._values += values.numel()
        return first, values

    def _unpack(self, data: memoryview, first: int) -> Tensor:
        """The float32 values of a message, all of them finite."""
        if self._packed is Format.INT8:
            scales = np.frombuffer(self._scales, np.uint16)
            return torch.from_numpy(from_int8(scales, np.frombuffer(data, np.int8), first))
        if self._packed is Format.BF16:
            bits = np.frombuffer(data, np.uint16)
            if not are_finite(bits):
                raise PayloadError("not_finite", f"NaN or infinity near element {first}")
            return torch.from_numpy(from_bf16(bits))
        values = _floats(data)
        # NumPy, because torch would use its thread pool for so many and stall on busy cores.
        if not np.isfinite(values.numpy()).all():
            raise PayloadError("not_finite", f"NaN or infinity near element {first}")
        return values

    def _feed_scales(self, data: memoryview) -> None:
        if len(self._scales) + len(data) > self._scale_bytes:
            raise PayloadError("malformed", "values in the scales' message")
        self._scales += data
        if len(self._scales) < self._scale_bytes:
            return
        bits = np.frombuffer(self._scales, np.uint16)
        if not are_finite(bits):
            raise PayloadError("not_finite", "NaN or infinity among the scales")
        if not are_scales(bits):
            raise PayloadError("bad_scale", "a scale that is negative or too large")

    def _feed_header(self, data: memoryview) -> None:
        assert self._header is not None  # noqa: S101 - narrows the type
        self._header += data
        if len(self._header) < 8:
            return
        (length,) = struct.unpack_from("<Q", self._header)
        if length > self._layout.header_limit:
            raise PayloadError("too_long", f"header of {length} bytes")
        if len(self._header) < 8 + length:
            return
        if len(self._header) > 8 + length:
            raise PayloadError("header", "values in the header's message")
        try:
            tree = json.loads(bytes(self._header[8:]))
        except (ValueError, RecursionError):
            raise PayloadError("header", "not JSON") from None
        if not isinstance(tree, dict):
            raise PayloadError("header", "not a JSON object")
        about = tree.pop("__metadata__", None)
        note = about.pop("note", None) if self._noted and isinstance(about, dict) else None
        if self._noted and not (isinstance(note, str) and len(note) <= MAX_NOTE_BYTES):
            raise PayloadError("header", f"a note is needed, of at most {MAX_NOTE_BYTES} bytes")
        if isinstance(about, dict):
            self._read_format(about)
        if about != self._about:
            raise PayloadError("header", f"about {str(about)[:100]}, expected {self._about}")
        expected = self._layout.table(self._packed)
        self._scale_bytes = expected.get(SCALES, {"data_offsets": [0, 0]})["data_offsets"][1]
        if tree != expected:
            raise PayloadError("shape", _difference(tree, expected))
        self._header = None
        self.note = note

    def _read_format(self, about: dict[str, Any]) -> None:
        """Take the format and the base out of a header's metadata."""
        named = about.pop("wire_format", Format.FP32.word)
        if named != self._wire.word:
            raise PayloadError("bad_format", f"{str(named)[:100]} in place of {self._wire.word}")
        base = about.pop("base", None) if self._wire is not Format.FP32 else None
        if base is None:
            return
        if self._base is None or base != str(self._base):
            raise PayloadError("wrong_base", f"difference from {str(base)[:100]}, not {self._base}")
        self.is_difference, self._packed = True, self._wire


def _floats(data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.float32)


def _difference(tree: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    for name, spec in expected.items():
        if tree.get(name) != spec:
            return f"{name}: {str(tree.get(name))[:100]}, expected {spec}"
    extra: Sequence[str] = sorted(set(tree) - set(expected))
    return f"unexpected tensor {extra[0][:100]!r}"
