"""Seeded mutations: of bytes, of protobuf messages, of streams of a block's messages."""

import random
import struct

from deca_node.wire import frame, parse

# Lengths, counts and numbers at which parsers go wrong.
NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -1.0, 1e-300, 1e38, 1.7e308, float("inf"), float("-inf"), float("nan")]
WORDS = [
    "",
    "\0",
    "é",
    "\u202e",
    "\n",
    "%s%n",
    "../..",
    "x" * 63,
    "x" * 65,
    "y" * 600,
    "::1",
    "[::1",
]
# What stands in a header or a note, or would be there if somebody meant harm.
TOKENS = [b"[" * 2000, b"{" * 500, b'{"a":' * 300, b"9" * 5000, b"1e999", b"NaN", b"-Infinity"]
TOKENS += [b"null", b'"\\ud800"', b'"__metadata__":', b'"wire_format":"int8"', b'"base":"0"', b"-0"]
TOKENS += [
    b'"__scales__":',
    b'"note":',
    b"18446744073709551616",
    b'"data_offsets":[0,-1]',
    b",",
    b"}",
]


class Mutator:
    """Mutations that one random generator draws."""

    def __init__(self, seed: str) -> None:
        self.draw = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def data(self, data: bytes, most: int = 1 << 16) -> bytes:
        """Other bytes: one change, seldom many."""
        found = bytearray(data)
        for _ in range(1 + int(self.draw.expovariate(1.0))):
            self._once(found)
        return bytes(found[:most])

    def _once(self, found: bytearray) -> None:
        draw, size = self.draw, len(found)
        at = draw.randrange(size + 1)
        kind = draw.randrange(9)
        if kind == 0 and size:
            found[at % size] ^= 1 << draw.randrange(8)
        elif kind == 1 and size:
            found[at % size] = draw.randrange(256)
        elif kind == 2:
            del found[at : at + 1 + int(draw.expovariate(0.1))]
        elif kind == 3:
            found[at:at] = draw.randbytes(1 + int(draw.expovariate(0.1)))
        elif kind == 4:
            begin = draw.randrange(size + 1)
            found[at:at] = found[begin : begin + draw.randrange(64)]
        elif kind == 5:
            form = draw.choice(["<B", "<H", "<I", "<Q", ">I", ">H"])
            width = struct.calcsize(form)
            number = struct.pack(form, draw.choice(NUMBERS) % 256**width)
            found[at : at + (width if draw.random() < 0.7 else 0)] = number
        elif kind == 6:
            found[at : at + draw.randrange(8)] = draw.choice(TOKENS)
        elif kind == 7:
            del found[at:]
        else:
            found[at : at + 10] = _varint(draw.choice(NUMBERS))

    def message(self, message) -> None:
        """Set fields of a protobuf message, and of those in it, to values that nobody means."""
        for field in message.DESCRIPTOR.fields:
            if not self.chance(0.25):
                continue
            if field.is_repeated:
                if field.message_type is not None and not field.message_type.GetOptions().map_entry:
                    for _ in range(self.draw.choice([1, 2, 70, 300])):
                        self.message(getattr(message, field.name).add())
            elif field.message_type is not None:
                self.message(getattr(message, field.name))
            elif self.chance(0.1):
                message.ClearField(field.name)
            else:
                setattr(message, field.name, self._value(field))

    def _value(self, field):
        draw = self.draw
        kind = field.cpp_type
        if kind in (field.CPPTYPE_STRING,):
            return draw.choice(WORDS) if field.type == field.TYPE_STRING else draw.randbytes(9)
        if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            return draw.choice(FLOATS)
        if kind == field.CPPTYPE_BOOL:
            return draw.random() < 0.5
        if kind in (field.CPPTYPE_INT32, field.CPPTYPE_ENUM):
            return draw.choice([0, 1, 2, 3, 9, -1, 2**31 - 1])
        width = 32 if kind == field.CPPTYPE_UINT32 else 64
        return draw.choice(NUMBERS) % 2**width if self.chance(0.6) else draw.randrange(20)

    def stream(self, messages: list[bytes]) -> list[bytes]:
        """A block's messages: their bytes, or, with right checksums, what they carry."""
        found = list(messages)
        for _ in range(1 + (self.draw.random() < 0.2)):
            at = self.draw.randrange(len(found))
            kind = self.draw.randrange(8)
            if kind == 0:
                found[at] = self.data(found[at])
            elif kind == 1:
                found[at:at] = [found[self.draw.randrange(len(found))]]
            elif kind == 2 and len(found) > 1:
                del found[at]
            elif kind == 3:
                other = self.draw.randrange(len(found))
                found[at], found[other] = found[other], found[at]
            else:  # past the checksum, where the parsers are
                found = self._rewritten(found, at)
        return found

    def _rewritten(self, messages: list[bytes], at: int) -> list[bytes]:
        parts = []
        for index, message in enumerate(messages):
            try:
                chunk = parse(message)
            except Exception:  # noqa: BLE001 - mutated already
                return messages
            data = bytes(chunk.data)
            parts.append((chunk.serial, self.data(data) if index == at else data))
        if self.chance(0.3):  # cut otherwise
            serial, whole = parts[0][0], b"".join(data for _, data in parts)
            border = self.draw.randrange(len(whole) + 1)
            parts = [(serial, whole[:border]), (serial, whole[border:])]
        offset, found = 0, []
        for serial, data in parts:
            found.append(frame(serial, offset, data))
            offset += len(data)
        return found


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
