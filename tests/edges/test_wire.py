"""The wire format: valid safetensors, valid protobuf, and nothing damaged gets through."""

import json
import struct
from contextlib import suppress

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from deca_node.errors import PayloadError
from deca_node.limits import CHUNK_BYTES, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, MAX_NOTE_BYTES
from deca_node.pb.node_pb2 import Chunk
from deca_node.wire import (
    CHUNK_ELEMENTS,
    PREFIX_BYTES,
    Layout,
    Receiver,
    TensorSpec,
    frame,
    metadata,
    parse,
    promised,
    snapshot,
)

LAYOUT = Layout((TensorSpec("a.weight", (1000, 300)), TensorSpec("b.bias", (7,))))
ABOUT = metadata("run", "bob", 5)


@pytest.fixture(scope="module")
def flat():
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def messages(flat):
    return snapshot(flat, LAYOUT, 5, ABOUT).messages


def receive(messages):
    """All values, as one tensor."""
    receiver = Receiver(LAYOUT, 5, "run", "bob")
    parts = [receiver.feed(message) for message in messages]
    assert receiver.complete
    return torch.cat([part[1] for part in parts if part])


def refusal(message, before=(), layout=LAYOUT):
    """The reason for which a receiver refuses a message."""
    receiver = Receiver(layout, 5, "run", "bob")
    for earlier in before:
        receiver.feed(earlier)
    with pytest.raises(PayloadError) as caught:
        receiver.feed(message)
    return caught.value.reason


def test_values_survive_the_journey(flat, messages):
    """What is received equals what was sent, bit for bit."""
    assert len(messages) == 3
    assert torch.equal(receive(messages), flat)


def test_a_message_is_made_once_all_of_its_values_are_final(flat, messages):
    """Until then neither is it sent, nor is what a neighbour has there mixed in."""
    made, numel = promised(LAYOUT, 5, ABOUT), LAYOUT.numel
    for end, count, covered in (
        (0, 1, 0),
        (CHUNK_ELEMENTS - 1, 1, 0),
        (CHUNK_ELEMENTS, 2, CHUNK_ELEMENTS),
        (numel - 1, 2, CHUNK_ELEMENTS),
        (numel, 3, numel),
    ):
        made.grow(flat, end)
        assert len(made.messages) == count
        assert [made.has(index) for index in range(3)] == [index < count for index in range(3)]
        assert made.covers(covered)
        assert count == 3 or not made.covers(covered + 1)
    assert made.messages == messages


def test_the_joined_payload_is_a_safetensors_file(flat, messages, tmp_path):
    """Saved to disk, the data of the messages opens with the safetensors library."""
    path = tmp_path / "block.safetensors"
    path.write_bytes(b"".join(Chunk.FromString(message).data for message in messages))
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["a.weight"], flat[:300_000].view(1000, 300))
    assert torch.equal(tensors["b.bias"], flat[300_000:])
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == ABOUT


def test_hand_framed_messages_are_protobuf(messages):
    """Any protobuf reader decodes the messages, and a prefix is 32 bytes."""
    chunk = Chunk.FromString(messages[1])
    assert chunk.serial == 5
    assert chunk.xxh3 == xxhash.xxh3_64_intdigest(chunk.data)
    assert len(chunk.data) == CHUNK_BYTES
    assert len(messages[1]) == CHUNK_BYTES + PREFIX_BYTES == CHUNK_BYTES + 32
    assert max(map(len, messages)) <= MAX_MESSAGE_BYTES


def test_another_writers_protobuf_is_understood(flat, messages):
    """A peer that uses an ordinary protobuf library, in other chunk sizes, is received too."""
    data = b"".join(Chunk.FromString(message).data for message in messages)
    header = 8 + struct.unpack_from("<Q", data)[0]
    sizes = [header, 4000, 400_000, len(data) - header - 404_000]
    theirs, offset = [], 0
    for size in sizes:
        part = data[offset : offset + size]
        digest = xxhash.xxh3_64_intdigest(part)
        theirs.append(Chunk(serial=5, offset=offset, xxh3=digest, data=part).SerializeToString())
        offset += size
    assert torch.equal(receive(theirs), flat)


def test_every_damage_has_its_reason(messages):
    """Each check refuses what it is there for, and says so in one word."""
    header, first, second = messages
    body = bytearray(first)
    body[-1] ^= 1
    assert refusal(bytes(body), [header]) == "checksum"
    assert refusal(second, [header]) == "gap"
    assert refusal(header, [header]) == "gap"
    assert refusal(frame(6, 0, header[PREFIX_BYTES:])) == "wrong_step"
    assert refusal(b"\xff" * 40) == "malformed"
    assert refusal(b"") == "wrong_step"  # as a Chunk all its fields are 0
    assert refusal(b"\0" * (MAX_MESSAGE_BYTES + 1)) == "too_long"
    assert refusal(header, layout=Layout(LAYOUT.tensors[:1])) == "shape"
    # A stream of them would never end.
    assert refusal(frame(5, 0, b"")) == "malformed"
    assert refusal(frame(5, len(header) - PREFIX_BYTES, b""), [header]) == "malformed"


def test_numbers_that_are_none_are_refused():
    """One NaN or infinity refuses the message it is in."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        values = torch.zeros(LAYOUT.numel)
        values[123] = bad
        head, first, _ = snapshot(values, LAYOUT, 5, ABOUT).messages
        assert refusal(first, [head]) == "not_finite"


def test_more_values_than_the_block_has_are_refused(messages):
    """A peer cannot make the receiver take more than the block holds."""
    end = len(b"".join(message[PREFIX_BYTES:] for message in messages))
    assert refusal(frame(5, end, b"\0" * 8), messages) == "too_long"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"not json", "header"),
        (b"[1, 2]", "header"),
        (b"{}", "header"),
        (json.dumps({"__metadata__": {**ABOUT, "node": "eve"}}).encode(), "header"),
        (json.dumps({"__metadata__": {**ABOUT, "run": "other"}}).encode(), "header"),
        (json.dumps({"__metadata__": ABOUT}).encode(), "shape"),
        (
            json.dumps(
                {
                    "__metadata__": ABOUT,
                    **LAYOUT.table(),
                    "x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
                }
            ).encode(),
            "shape",
        ),
        (b"[" * 1_000, "header"),
        (b"[" * 100_000, "too_long"),
    ],
)
def test_foreign_headers_are_refused(text, reason):
    """A header of another run, node or shape, or none at all, is refused before any value."""
    assert refusal(frame(5, 0, struct.pack("<Q", len(text)) + text)) == reason


def test_a_header_that_claims_to_be_huge_is_refused_at_once():
    """The claim alone suffices: nothing is collected up to it."""
    assert refusal(frame(5, 0, struct.pack("<Q", MAX_HEADER_BYTES + 1))) == "too_long"


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_random_bytes_never_raise_anything_else(blob):
    """Whatever comes, the answer is a PayloadError or a parsed message."""
    with suppress(PayloadError):
        parse(blob)


SMALL = Layout((TensorSpec("w", (5, 3)),))
SMALL_VALUES = torch.arange(15.0)
SMALL_MESSAGES = snapshot(SMALL_VALUES, SMALL, 5, ABOUT).messages


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_flipped_bits_never_change_the_mix(data):
    """A flipped bit is noticed, or it changes nothing (a tag that names another field of 0)."""
    index = data.draw(st.integers(0, 1))
    broken = [bytearray(message) for message in SMALL_MESSAGES]
    where = data.draw(st.integers(0, len(broken[index]) * 8 - 1))
    broken[index][where // 8] ^= 1 << where % 8
    receiver = Receiver(SMALL, 5, "run", "bob")
    taken = []
    with suppress(PayloadError):
        taken = [receiver.feed(bytes(message)) for message in broken]
    if taken and receiver.complete:
        assert torch.equal(torch.cat([part[1] for part in taken if part]), SMALL_VALUES)


def test_a_note_travels_in_the_header(flat):
    """Where notes are expected the header brings one; the tensors are read as ever."""
    about = metadata("run", "bob", 5, "all well")
    receiver = Receiver(LAYOUT, 5, "run", "bob", noted=True)
    assert receiver.note is None
    for message in snapshot(flat, LAYOUT, 5, about).messages:
        receiver.feed(message)
    assert receiver.complete
    assert receiver.note == "all well"


@pytest.mark.parametrize(
    ("noted", "about"),
    [
        (False, metadata("run", "bob", 5, "unasked")),
        (True, ABOUT),
        (True, metadata("run", "bob", 5, "x" * (MAX_NOTE_BYTES + 1))),
        (True, {**metadata("run", "bob", 5, "note"), "more": "x"}),
        (True, metadata("run", "eve", 5, "note")),
    ],
)
def test_headers_say_what_is_asked_and_no_more(flat, noted, about):
    """A missing, unasked or overlong note, or anything beside it, is refused."""
    receiver = Receiver(LAYOUT, 5, "run", "bob", noted=noted)
    with pytest.raises(PayloadError) as caught:
        receiver.feed(snapshot(flat, LAYOUT, 5, about).messages[0])
    assert caught.value.reason == "header"
    assert receiver.note is None
