"""State on disk: whole or not at all, named when damaged, nobody else's folder."""

import errno
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from deca_node import checkpoint
from deca_node.blocks import Schedule
from deca_node.checkpoint import Changed, Checkpoint, sealing
from deca_node.checkpoint.manifest import Progress
from deca_node.checkpoint.mark import check_mark
from deca_node.curve import Curve
from deca_node.disk import translated
from deca_node.errors import DiskFullError, OutputError, PayloadError
from deca_node.record import History

IDENTITY = {"run.seed": "0", "node": "a"}
TENSORS = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
SCHEDULE = Schedule([range(i, i + 1) for i in range(4)], 3, 4, "ascending", 0)


def changed(visit, value=None):
    return Changed(visit, TENSORS if value is None else {"w": torch.full((5,), float(value))})


@pytest.fixture
def kept(tmp_path):
    """A folder with one saved block, let go of again."""
    store = Checkpoint(tmp_path / "out", IDENTITY, SCHEDULE)
    assert store.claim() is False
    store.save({2: changed(2)}, Progress(visit=3, data_position=40), peers={"b": "10.0.0.2:7000"})
    store.release()
    return tmp_path / "out"


def reopened(folder):
    store = Checkpoint(folder, IDENTITY, SCHEDULE)
    assert store.claim() is True
    return store


@contextmanager
def opened(folder):
    store = reopened(folder)
    try:
        yield store
    finally:
        store.release()


def files(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_was_saved_is_read_again(kept):
    """Blocks, progress, peers and an open visit's tensors come back bit for bit."""
    store = reopened(kept)
    assert store.state.progress == Progress(visit=3, data_position=40)
    assert store.state.blocks[2].visit == 2
    loaded = store.load(store.state.blocks[2])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    before = {"loss": 1.5, "by label": {"a": None}}
    store.save({}, Progress(visit=3, step=2, before=before), {"x": torch.zeros(3)})
    store.release()
    again = reopened(kept)
    assert again.state.progress == Progress(visit=3, step=2, before=before)
    assert again.state.peers == {"b": "10.0.0.2:7000"}
    assert again.state.active.visit == 3
    assert torch.equal(again.load(again.state.active)["x"], torch.zeros(3))
    assert (again.warnings, again.lost) == ((), ())


def test_a_visit_writes_its_block_and_the_manifests_only(kept):
    """Other blocks' files are not touched; what two manifests back was needed goes."""
    store = reopened(kept)
    store.save({0: changed(4)}, Progress(visit=5))
    untouched = kept / "state" / store.state.blocks[2].file
    before = untouched.stat()
    store.save({}, Progress(visit=5, step=1), {"x": torch.zeros(3)})
    store.save({1: changed(5)}, Progress(visit=6))
    assert untouched.stat() == before
    store.save({2: changed(6)}, Progress(visit=7))
    names = [saved.file for saved in store.state.blocks.values()]
    assert files(kept) == sorted(
        [*names, untouched.name, "manifest.json", "manifest.previous.json"]
    )
    store.save({3: changed(7)}, Progress(visit=8))
    assert untouched.name not in files(kept)


def test_a_file_being_served_stays_readable_when_superseded(kept):
    """Who fetches a block gets the whole of the one that was announced."""
    store = reopened(kept)
    saved = store.state.blocks[2]
    file = store.open(saved)
    for visit in (6, 7, 8):
        store.save({2: changed(visit, visit)}, Progress(visit=visit + 1))
    assert xxhash.xxh3_128_hexdigest(file.read()) == saved.xxh3
    file.close()
    with pytest.raises(OutputError, match=saved.file):
        store.open(saved)


@pytest.mark.parametrize("moment", ["save_file", "write_atomically"])
def test_a_full_disk_leaves_the_previous_state(kept, monkeypatch, moment):
    """Whichever write finds no room, the old manifest and the files it names stay good."""

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = reopened(kept)
    before = files(kept)
    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(DiskFullError, match="no space left"):
        store.save({1: changed(1), 2: changed(6, 6)}, Progress(visit=7))
    monkeypatch.undo()
    assert files(kept) == before  # what could not be used takes no room
    assert store.state.progress.visit == 3
    with store.open(store.state.blocks[2]):
        store.release()
    again = reopened(kept)
    assert again.state.progress.visit == 3
    assert torch.equal(again.load(again.state.blocks[2])["w"], TENSORS["w"])
    again.save({2: changed(6, 6)}, Progress(visit=7))
    again.release()
    assert reopened(kept).state.progress.visit == 7


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_told_from_other_trouble(tmp_path, number):
    """Libraries that give the system's number as text only, too."""
    for error in (OSError(number, "x"), SafetensorError(f"Error (os error {number})")):
        with pytest.raises(DiskFullError, match="free some"), translated(tmp_path):
            raise error
    with pytest.raises(OutputError, match="x"), translated(tmp_path):
        raise OSError(errno.EIO, "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_systems_own_full_disk_is_recognised(tmp_path):
    """ENOSPC as the kernel gives it becomes DiskFullError."""
    with (
        pytest.raises(DiskFullError),
        translated(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")


# --- damage


def test_a_damaged_file_brings_the_previous_state_back(kept):
    """A flipped byte in what only the newest state names: named, and the state before is used."""
    with opened(kept) as store:
        store.save({2: changed(6, 6), 1: changed(5, 5)}, Progress(visit=7))
        name = store.state.blocks[2].file
    flip(kept / "state" / name)
    for _ in range(2):  # looking changes nothing
        with opened(kept) as store:
            assert store.state.progress.visit == 3
            assert store.lost == ()
            assert torch.equal(store.load(store.state.blocks[2])["w"], TENSORS["w"])
            (warning,) = store.warnings
            assert warning.endswith(f"{name}: damaged; the state before is used (visit 3, step 0)")
    with opened(kept) as store:
        for visit in (3, 4):
            store.save({visit % 4: changed(visit)}, Progress(visit=visit + 1))
        assert f"{name}.damaged" in files(kept)
    with opened(kept) as store:
        assert store.warnings == ()


def test_a_block_without_a_good_copy_is_lost_and_stays_so(kept):
    """The rest is used, and no later save or restart forgets that the block is missing."""
    with opened(kept) as store:
        name = store.state.blocks[2].file
        store.save({3: changed(3)}, Progress(visit=4))
    (kept / "state" / name).unlink()
    with opened(kept) as store:
        assert (store.lost, list(store.state.blocks)) == ((2,), [3])
        assert store.state.progress.visit == 4
        (warning,) = store.warnings
        assert f"{name}: missing" in warning
        assert "block 2 is lost" in warning
        for visit in (4, 5):
            store.save({visit % 4: changed(visit)}, Progress(visit=visit + 1))
    with opened(kept) as store:
        assert store.lost == (2,)
        (warning,) = store.warnings
        assert "state/block-0002-*.safetensors: found damaged at an earlier start" in warning
        store.save({2: changed(6)}, Progress(visit=7))
        assert store.lost == ()
    with opened(kept) as store:
        assert (store.lost, store.warnings) == ((), ())


def test_a_damaged_open_visit_begins_anew(kept):
    """When no other state is better, only the steps of the visit are lost."""
    with opened(kept) as store:
        store.save({}, Progress(visit=3, step=2), {"x": torch.zeros(3)})
        name = store.state.active.file
        (kept / "state" / "manifest.previous.json").write_text("")
    flip(kept / "state" / name)
    with opened(kept) as store:
        assert (store.state.active, store.state.progress) == (None, Progress(visit=3))
        assert "manifest.previous.json: damaged" in store.warnings[0]
        assert f"{name}: damaged; visit 3 begins anew" in store.warnings[1]


def test_steps_of_a_visit_are_lost_rather_than_a_block(kept):
    """Of two damaged states the one that costs less is used, be it the older one."""
    with opened(kept) as store:
        store.save({}, Progress(visit=3, step=2), {"x": torch.zeros(3)})
        visit = store.state.active.file
        store.save({3: changed(3)}, Progress(visit=4))
        block = store.state.blocks[3].file
    for name in (visit, block):
        flip(kept / "state" / name)
    with opened(kept) as store:
        assert store.lost == ()
        assert (store.state.progress, list(store.state.blocks)) == (Progress(visit=3), [2])


def test_a_file_that_the_disk_cannot_read_counts_as_damaged(kept, monkeypatch):
    """EIO is a damaged disk; trouble that is not the file's own ends the start instead."""
    real, trouble = checkpoint._digest, errno.EIO

    def failing(path):
        if path.name.startswith("block-0003"):
            raise OSError(trouble, os.strerror(trouble))
        return real(path)

    with opened(kept) as store:
        store.save({3: changed(3)}, Progress(visit=4))
    monkeypatch.setattr(checkpoint, "_digest", failing)
    with opened(kept) as store:
        assert store.state.progress.visit == 3
        assert "cannot be read; the state before is used" in store.warnings[0]
    trouble = errno.EMFILE
    with pytest.raises(OutputError, match=r"block-0003.*Too many open files"):
        reopened(kept)


def test_values_that_are_no_numbers_are_kept_too(kept):
    """An evaluation of a model that has diverged must not make the state unreadable."""
    with opened(kept) as store:
        store.save({}, Progress(visit=3, before={"loss": math.nan, "best": math.inf}))
    with opened(kept) as store:
        assert math.isnan(store.state.progress.before["loss"])
        assert store.state.progress.before["best"] == math.inf


def test_a_state_that_could_not_be_read_again_is_not_written(kept):
    """A defect of the program shows at the save, with the good state still there."""
    with opened(kept) as store:
        before = files(kept)
        with pytest.raises(ValueError, match="outside the run"):
            store.save({0: changed(0)}, Progress(visit=SCHEDULE.visits + 1))
        assert files(kept) == before
        assert store.state.progress.visit == 3


def test_a_visit_may_be_kept_between_its_last_step_and_its_end(kept):
    """A save is due after any step."""
    with opened(kept) as store:
        store.save({}, Progress(visit=3, step=SCHEDULE.steps), {"x": torch.zeros(3)})
    with opened(kept) as store:
        assert (store.state.progress.step, store.warnings) == (SCHEDULE.steps, ())


def test_damaged_files_kept_aside_are_few(kept):
    """Nothing piles up, however often a disk fails."""
    for visit in range(3, 11):
        with opened(kept) as store:
            store.save({visit % 4: changed(visit)}, Progress(visit=visit + 1))
        (kept / "state" / "manifest.json").write_text("{}")
        (kept / "state" / f"block-{visit}.safetensors.damaged").write_text("")
    with opened(kept) as store:
        store.save({0: changed(8)}, Progress(visit=9))
    aside = [name for name in files(kept) if name.endswith(".damaged")]
    assert len(aside) == checkpoint.MAX_DAMAGED
    assert "manifest.json.damaged" in aside


@pytest.mark.parametrize("text", ["", "{", "[]", '{"progress": {}}', "[" * 100_000, "\xff"])
def test_a_damaged_manifest_is_named(kept, text):
    """Alone, whatever stands in it, the answer is one clear error; else the previous is used."""
    manifest = kept / "state" / "manifest.json"
    manifest.write_text(text)
    store = Checkpoint(kept, IDENTITY, SCHEDULE)
    with pytest.raises(OutputError, match=r"manifest\.json: damaged.*previous.* is missing"):
        store.claim()
    store.release()


@pytest.mark.parametrize("text", ["", "{", None])
def test_a_damaged_manifest_gives_way_to_the_previous_one(kept, text):
    """Torn or gone: the warning names it and the place where the run goes on."""
    with opened(kept) as store:
        store.save({3: changed(3)}, Progress(visit=4))
    manifest = kept / "state" / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    what = "missing" if text is None else "damaged"
    with opened(kept) as store:
        assert store.state.progress.visit == 3
        (warning,) = store.warnings
        assert f"manifest.json: {what}; the state before is used (visit 3, step 0)" in warning
        store.save({3: changed(3)}, Progress(visit=4))
    with opened(kept) as store:
        assert (store.state.progress.visit, store.warnings) == (4, ())


def resealed(path, change):
    """Edit a sealed file as somebody would who knows how its digest is made."""
    tree = json.loads(path.read_text())
    del tree["xxh3"]
    change(tree)
    path.write_text(json.dumps({"xxh3": sealing.seal(tree), **tree}))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["blocks"]["2"].update(file="../../other/block-2.safetensors"),
        lambda tree: tree["blocks"]["2"].update(file="/etc/passwd"),
        lambda tree: tree["blocks"]["2"].update(file="manifest.json"),
        lambda tree: tree["blocks"]["2"].update(xxh3="x" * 32),
        lambda tree: tree["blocks"]["2"].update(visit=13),
        lambda tree: tree["blocks"]["2"].update(bytes=-1),
        lambda tree: tree["blocks"].update({"4": tree["blocks"]["2"]}),
        lambda tree: tree["blocks"].update({"-1": tree["blocks"]["2"]}),
        lambda tree: tree["progress"].update(visit=13),
        lambda tree: tree["progress"].update(visit=-1),
        lambda tree: tree["progress"].update(visit="3"),
        lambda tree: tree["progress"].update(step=5),
        lambda tree: tree["progress"].update(seconds=float("nan")),
        lambda tree: tree["progress"].update(more=1),
        lambda tree: tree.update(active=tree["blocks"]["2"]),
        lambda tree: tree.update(lost=[7]),
        lambda tree: tree.update(peers=["b"]),
    ],
)
def test_numbers_and_names_are_held_against_the_schedule(kept, change):
    """Even with a good digest, a manifest names no file elsewhere and no place outside the run."""
    resealed(kept / "state" / "manifest.json", change)
    store = Checkpoint(kept, IDENTITY, SCHEDULE)
    with pytest.raises(OutputError, match=r"manifest\.json: damaged"):
        store.claim()


def test_an_edit_is_recognised(kept):
    """A manifest that somebody changed by hand is not trusted."""
    manifest = kept / "state" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"visit": 3', '"visit": 4'))
    with pytest.raises(OutputError, match=r"manifest\.json: damaged"):
        Checkpoint(kept, IDENTITY, SCHEDULE).claim()


def test_a_folder_that_says_nothing_of_the_tokenizer_is_still_the_runs(tmp_path):
    """An earlier version made it; one that names another tokenizer is another run's."""
    (tmp_path / "run.json").write_bytes(sealing.sealed({"run.seed": "0"}))
    assert check_mark(tmp_path, {"run.seed": "0", "model.tokenizer": "t"})
    (tmp_path / "run.json").write_bytes(sealing.sealed({"run.seed": "0", "model.tokenizer": "u"}))
    with pytest.raises(OutputError, match=r"model\.tokenizer is 'u' there, 't' here"):
        check_mark(tmp_path, {"run.seed": "0", "model.tokenizer": "t"})


def test_a_folder_that_says_less_than_a_run_is_not_its_own(tmp_path):
    (tmp_path / "run.json").write_bytes(sealing.sealed({"run.seed": "0"}))
    with pytest.raises(OutputError, match="node is 'absent' there, 'a' here"):
        check_mark(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", ["run.json", "state/manifest.json"])
@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused_with_both_versions(kept, name, version):
    """Neither read nor replaced by an older state: the version that wrote it can go on."""
    with opened(kept) as store:
        store.save({3: changed(3)}, Progress(visit=4))
    if version == 1:  # it had no digest
        tree = json.loads((kept / name).read_text())
        del tree["xxh3"]
        (kept / name).write_text(json.dumps({**tree, "format": 1}))
    else:
        resealed(kept / name, lambda tree: tree.update(format=version))
    words = rf"{name}: written in format {version}, this deca-node reads format {sealing.FORMAT}"
    with pytest.raises(OutputError, match=words):
        Checkpoint(kept, IDENTITY, SCHEDULE).claim()


@pytest.fixture(scope="module")
def damageable():
    """A folder with two states and an open visit, and what each of its states holds."""
    folder = Path(tempfile.mkdtemp()) / "out"
    store = Checkpoint(folder, IDENTITY, SCHEDULE)
    store.claim()
    store.save({0: changed(0, 0)}, Progress(visit=1))
    store.save({1: changed(1, 1), 2: changed(2, 2)}, Progress(visit=3))
    older = store.state
    store.save(
        {0: changed(4, 4)}, Progress(visit=4, step=2), {"x": torch.full((5,), 4.0)}, {"b": "b:1"}
    )
    states = {state.progress.visit: state for state in (older, store.state)}
    store.release()
    yield folder, states
    shutil.rmtree(folder.parent)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_never_gives_wrong_values(damageable, data):
    """Any bytes of any files flipped, cut off or gone: a known state, its blocks right or lost."""
    source, states = damageable
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        shutil.copytree(source, folder)
        everything = [*sorted((folder / "state").iterdir()), folder / "run.json"]
        for path in data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=3)):
            content = path.read_bytes() if path.exists() else b""
            kind = data.draw(st.sampled_from(["flip", "cut", "remove", "zero"]))
            spot = data.draw(st.integers(0, max(len(content) - 1, 0)))
            if kind == "remove" and path.name != "run.json":
                path.unlink(missing_ok=True)
            elif kind == "cut":
                path.write_bytes(content[:spot])
            elif content:
                bits = data.draw(st.integers(1, 255)) if kind == "flip" else content[spot]
                path.write_bytes(
                    content[:spot] + bytes([content[spot] ^ bits]) + content[spot + 1 :]
                )
        store = Checkpoint(folder, IDENTITY, SCHEDULE)
        try:
            found = store.claim()
        except OutputError as error:
            assert str(folder) in str(error)  # noqa: PT017 - the other outcome is as good
            return
        finally:
            store.release()
        if not found:
            assert not list((folder / "state").glob("manifest*"))
            return
        expected = states[store.state.progress.visit]
        assert store.state.blocks.items() <= expected.blocks.items()
        assert {*store.state.blocks, *store.lost} == set(expected.blocks)
        for saved in store.state.blocks.values():
            assert torch.equal(store.load(saved)["w"], torch.full((5,), float(saved.visit)))
        if store.state.active:
            assert torch.equal(store.load(store.state.active)["x"], torch.full((5,), 4.0))
        progress = store.state.progress
        assert progress.step == (expected.progress.step if store.state.active else 0)
        if store.lost or store.state != states[4]:
            assert store.warnings


# --- blocks from peers


def transfer(value=7.0):
    content = save({"w": torch.full((5,), value)})
    return content, xxhash.xxh3_128_hexdigest(content)


def test_a_transfer_goes_on_after_a_restart(kept):
    """What came is there, its digest goes on, and one commit makes all fetched blocks the state."""
    contents, digests = zip(*(transfer(v) for v in (1.0, 3.0)), strict=True)
    with opened(kept) as store:
        first = store.incoming(1, digests[0])
        first.write(contents[0][:30])
        store.save({0: changed(4)}, Progress(visit=5))  # leaves it alone
        first.close()
    with opened(kept) as store:
        assert store.begun() == {digests[0]}
        parts = {1: store.incoming(1, digests[0]), 3: store.incoming(3, digests[1])}
        assert [part.size for part in parts.values()] == [30, 0]
        parts[1].write(memoryview(contents[0])[30:])
        parts[3].write(contents[1])
        for block, part in parts.items():
            assert torch.equal(part.read()["w"], torch.full((5,), float(block)))
        store.adopt({1: (parts[1], 5), 3: (parts[3], 7)}, Progress(visit=8), {"c": "10.0.0.3:7000"})
        assert not any(name.endswith(".part") for name in files(kept))
    with opened(kept) as store:
        assert store.state.progress.visit == 8
        assert store.state.peers == {"c": "10.0.0.3:7000"}
        assert {b: saved.visit for b, saved in store.state.blocks.items()} == {
            0: 4, 1: 5, 2: 2, 3: 7,
        }  # fmt: skip
        for block in (1, 3):
            saved = store.state.blocks[block]
            assert (saved.bytes, saved.xxh3) == (len(contents[0]), digests[block // 2])
            assert torch.equal(store.load(saved)["w"], torch.full((5,), float(block)))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_transfer_is_refused_and_removed(data):
    """Any byte changed, missing or too many: reason digest, nothing left to go on with."""
    content, digest = transfer()
    spot = data.draw(st.integers(0, len(content) - 1))
    bits = data.draw(st.integers(1, 255))
    damaged = data.draw(
        st.sampled_from(
            [
                content[:spot],
                content + b"x",
                content[:spot] + bytes([content[spot] ^ bits]) + content[spot + 1 :],
            ]
        )
    )
    with tempfile.TemporaryDirectory() as place:
        store = Checkpoint(Path(place), IDENTITY, SCHEDULE)
        store.claim()
        part = store.incoming(0, digest)
        part.write(damaged)
        with pytest.raises(PayloadError, match="block 0") as caught:
            part.read()
        assert caught.value.reason == "digest"
        with pytest.raises(PayloadError):
            store.adopt({0: (part, 1)}, Progress(visit=2))
        assert store.state.blocks == {}
        assert files(Path(place)) == []
        assert store.incoming(0, digest).size == 0
        store.release()


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"not json",
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
        b'{"w":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[0,9223372036854775809],"data_offsets":[4,4]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 0, 1 << 40, (1 << 64) - 1])
def test_a_peers_malformed_file_is_refused_and_removed(kept, header, length):
    """Its digest is the announced one, and still it is no block: reason malformed."""
    prefix = (len(header) if length is None else length).to_bytes(8, "little")
    content = prefix + header + b"\0\0\x80\x3f"
    store = reopened(kept)
    part = store.incoming(1, xxhash.xxh3_128_hexdigest(content))
    part.write(content)
    with pytest.raises(PayloadError) as caught:
        part.read()
    assert caught.value.reason == "malformed"
    assert not part.path.exists()


@pytest.mark.parametrize(
    ("block", "digest"),
    [
        (1, "../../escape"),
        (1, "A" * 32),
        (1, "a" * 31),
        (1, "a" * 32 + "/../../escape"),
        (1, ""),
        (4, "a" * 32),
        (-1, "a" * 32),
    ],
)
def test_a_peers_digest_is_checked_before_it_names_a_file(kept, block, digest):
    """It becomes part of a file's name: nothing but 32 hexadecimal digits."""
    before = files(kept)
    with pytest.raises(PayloadError) as caught:
        reopened(kept).incoming(block, digest)
    assert caught.value.reason == "malformed"
    assert files(kept) == before


def test_unfinished_transfers_do_not_pile_up(kept):
    """Few per block; none of a block kept since, and none when the run is complete."""
    store = reopened(kept)
    for value in range(6):
        store.incoming(1, transfer(value)[1]).close()
    store.incoming(3, transfer()[1]).close()
    parts = [name for name in files(kept) if name.endswith(".part")]
    assert [name[:13] for name in parts] == ["incoming-0001"] * 2 + ["incoming-0003"]
    running = store.incoming(1, transfer(9)[1])
    store.save({1: changed(5)}, Progress(visit=6))
    parts = [name for name in files(kept) if name.endswith(".part")]
    assert parts == sorted([running.path.name, f"incoming-0003-{transfer()[1]}.part"])
    with pytest.raises(ValueError, match="already under way"):
        store.incoming(1, transfer(9)[1])
    running.discard()
    store.save({}, Progress(visit=12, finished=True))
    assert not any(name.endswith(".part") for name in files(kept))


def test_a_disk_that_takes_a_write_in_parts_gets_all_of_it(kept, monkeypatch):
    """As one that is nearly full does."""
    content, digest = transfer()
    store = reopened(kept)
    part = store.incoming(1, digest)
    file = part._file
    few = SimpleNamespace(write=lambda data: file.write(data[:50]), close=file.close)
    monkeypatch.setattr(part, "_file", few)
    part.write(content)
    assert part.size == len(content)
    part.verify()
    assert part.path.read_bytes() == content
    few.close()


def test_a_transfer_under_way_keeps_its_part_whoever_else_gives_the_block(kept):
    """It is the oldest, and would have been removed under whoever writes it."""
    store = reopened(kept)
    content, digest = transfer(7)
    running = store.incoming(1, digest)
    running.write(content[:20])
    os.utime(running.path, (0, 0))
    for value in range(3):
        store.incoming(1, transfer(value)[1]).close()
    running.write(content[20:])
    assert torch.equal(running.read()["w"], torch.full((5,), 7.0))


def test_of_two_transfers_of_a_block_the_slower_ones_part_goes(kept):
    """Two givers race for it: once one is adopted, what the other brought is of no use."""
    store = reopened(kept)
    (winning, digest), (losing, other) = transfer(7), transfer(9)
    winner, loser = store.incoming(1, digest), store.incoming(1, other)
    loser.write(losing[:10])
    winner.write(winning)
    loser.close()
    assert store.begun() == {digest, other}
    store.adopt({1: (winner, 5)}, Progress(visit=6))
    assert store.begun() == frozenset()
    assert store.state.blocks[1].xxh3 == digest


def test_a_failed_adoption_can_be_tried_again(kept, monkeypatch):
    """A full disk at the manifest: the fetched blocks need not be fetched again."""
    content, digest = transfer()
    store = reopened(kept)
    part = store.incoming(1, digest)
    part.write(content)
    before = files(kept)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(DiskFullError):
        store.adopt({1: (part, 5)}, Progress(visit=6))
    monkeypatch.undo()
    assert files(kept) == before
    store.save({0: changed(4)}, Progress(visit=5))
    store.adopt({1: (part, 5)}, Progress(visit=6))
    store.release()
    again = reopened(kept)
    assert torch.equal(again.load(again.state.blocks[1])["w"], torch.full((5,), 7.0))


# --- whose folder


def test_another_runs_folder_is_refused_with_the_difference(kept):
    """The differing field and both values are in the message; the folder is as it was."""
    with pytest.raises(OutputError, match=r"run\.seed is '0' there, '5' here"):
        Checkpoint(kept, {**IDENTITY, "run.seed": "5"}, SCHEDULE).claim()
    assert reopened(kept).state.progress.visit == 3


def test_a_folder_in_use_is_refused(kept):
    """Two daemons do not write into one folder."""
    first = reopened(kept)
    with pytest.raises(OutputError, match="another deca-node is using"):
        Checkpoint(kept, IDENTITY, SCHEDULE).claim()
    first.release()
    reopened(kept)


@pytest.mark.parametrize("name", ["history.jsonl", "summary.json", "model", "state"])
def test_a_strangers_files_are_not_overwritten(tmp_path, name):
    """A folder that holds files of these names but is no run's output is refused."""
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=name):
        Checkpoint(tmp_path, IDENTITY, SCHEDULE).claim()


@pytest.mark.parametrize("torn", ['{"visit": 2, "st', '{"visit": 1, "step": 2}'])
@pytest.mark.parametrize("kept", [6, 9])
def test_history_takes_back_what_will_be_done_again(tmp_path, torn, kept):
    """Lines from the resumed step on, and a line torn by a crash, are dropped."""
    path = tmp_path / "history.jsonl"
    rows = [{"visit": v, "step": s} for v in range(3) for s in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:kept]) + torn)
    before = path.stat().st_ino
    history = History(path, first_serial=6, steps_per_visit=4, curve=Curve(64))
    history.append(rows[6])
    history.close()
    assert path.stat().st_ino != before  # for those who follow it, as `tail -F` and trail.py do
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:7]


def test_history_drops_a_last_line_that_has_no_end(tmp_path):
    """What is appended would be in the same line."""
    path = tmp_path / "history.jsonl"
    rows = [{"visit": 0, "step": s} for s in range(3)]
    path.write_text("\n".join(json.dumps(row) for row in rows[:2]))
    history = History(path, first_serial=2, steps_per_visit=4, curve=Curve(64))
    history.append(rows[2])
    history.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [rows[0], rows[2]]
