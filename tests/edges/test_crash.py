"""The state on disk through power cuts, SIGKILL and full disks.

What takes a process or a mount of its own runs this file as a script (see the end).
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save

from deca_node import checkpoint, disk
from deca_node.blocks import Schedule
from deca_node.checkpoint import Changed, Checkpoint, incoming
from deca_node.checkpoint.manifest import Progress
from deca_node.errors import DiskFullError

BLOCKS, STEPS = 3, 3
SCHEDULE = Schedule([range(i, i + 1) for i in range(BLOCKS)], 10**6, STEPS, "ascending", 0)
KILLS = 200


@pytest.fixture
def quick(tmp_path):
    """A folder in memory where there is one: a real disk takes 10 ms for each sync."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as place:
        yield Path(place)


def open_store(folder):
    store = Checkpoint(folder, {"node": "a"}, SCHEDULE)
    store.claim()
    return store


def values(visit, step=0, size=64):
    """What a block holds after a visit, or the open visit's tensors after a step."""
    return {"w": torch.full((size,), float(visit * STEPS + step))}


def fetch(store, visit, size=64):
    """A block of that visit comes from a peer, or what was missing of it."""
    content = save(values(visit, size=size))
    part = store.incoming(visit % BLOCKS, xxhash.xxh3_128_hexdigest(content))
    try:
        part.write(content[part.size :])
    except DiskFullError:
        part.close()
        raise
    return visit % BLOCKS, (part, visit)


def check_whole(store, size=64):
    """The state is all that the run had at its place, of that place, and loadable."""
    progress = store.state.progress
    last = range(max(progress.visit - BLOCKS, 0), progress.visit)
    assert {saved.visit for saved in store.state.blocks.values()} == set(last)
    for block, saved in store.state.blocks.items():
        assert saved.visit % BLOCKS == block
        assert torch.equal(store.load(saved)["w"], values(saved.visit, size=size)["w"])
    assert (store.state.active is not None) == (progress.step > 0)
    if store.state.active:
        tensors = store.load(store.state.active)
        assert torch.equal(tensors["w"], values(progress.visit, progress.step, size)["w"])
    assert (store.lost, store.warnings) == ((), ())


# --- power cuts


SAVES = (
    lambda store: store.save({0: Changed(0, values(0))}, Progress(visit=1)),
    lambda store: store.save({}, Progress(visit=1, step=1), values(1, 1)),
    lambda store: store.save({}, Progress(visit=1, step=2), values(1, 2), peers={"b": "b:1"}),
    lambda store: store.save({1: Changed(1, values(1))}, Progress(visit=2)),
    lambda store: store.adopt(dict(fetch(store, v) for v in (2, 3)), Progress(visit=4)),
    lambda store: store.save(
        {1: Changed(4, values(4)), 2: Changed(5, values(5))},
        Progress(visit=6, step=1),
        values(6, 1),
    ),
    lambda store: store.adopt(dict([fetch(store, 6)]), Progress(visit=7)),
    lambda store: store.save({}, Progress(visit=7, finished=True)),
)


class PowerCut(BaseException):
    """Nothing handles it, as nothing handles the real one."""


class Disk:
    """Stands at the system calls, cuts the power before one of them, and knows what may be left.

    A file's bytes last once it is synced; before, any part of them may be there. A rename or a
    removal lasts once its folder is synced; before, each may have happened or not.
    """

    def __init__(self, folder, monkeypatch, cut=None):
        self.folder, self.cut, self.calls = folder, cut, 0
        self.synced = {}  # inode -> bytes
        self.lasting = {}  # name -> bytes
        self.pending = []  # (name gone, name made, its bytes)
        self._replace, self._unlink = os.replace, os.unlink
        for name in ("fsync", "replace", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, name))

    def _call(self):
        if self.calls == self.cut:
            raise PowerCut
        self.calls += 1

    def _name(self, path):
        return str(Path(path).relative_to(self.folder))

    def _bytes(self, path):
        """What a power cut leaves of a file."""
        content = Path(path).read_bytes()
        whole = self.synced.get(Path(path).stat().st_ino) == content
        return content if whole else content[: len(content) // 2]

    def fsync(self, descriptor):
        self._call()
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.synced[os.fstat(descriptor).st_ino] = path.read_bytes()
            return
        inside = {self._name(p): p for p in path.iterdir() if p.is_file() and p.name != ".lock"}
        parent = Path(self._name(path))
        self.lasting = {n: c for n, c in self.lasting.items() if Path(n).parent != parent}
        self.lasting.update({name: self._bytes(p) for name, p in inside.items()})
        self.pending = [op for op in self.pending if Path(op[0]).parent != parent]

    def replace(self, source, target):
        self._call()
        content = self._bytes(source)
        self._replace(source, target)
        self.pending.append((self._name(source), self._name(target), content))

    def unlink(self, path):
        self._call()
        self._unlink(path)
        self.pending.append((self._name(path), None, b""))

    def remains(self):
        """Every content of the folder that the power cut may have left."""
        now = [p for p in self.folder.rglob("*") if p.is_file() and p.name != ".lock"]
        whole = {self._name(p): p.read_bytes() for p in now}
        # Half written: the process may have ended before this call, too.
        torn = {name: c for p in now if (c := self._bytes(p)) != whole[name := self._name(p)]}
        yield whole  # only the process ended
        yield {**whole, **torn}
        for happened in itertools.product((False, True), repeat=len(self.pending)):
            left = dict(self.lasting)
            for (gone, made, content), did in zip(self.pending, happened, strict=True):
                if did:
                    left.pop(gone, None)
                    left.update({made: content} if made else {})
            yield left
            yield {**left, **torn}


def run_saves(folder, live):
    """Save one after the other into a new folder, until the end or the power cut."""
    store = Checkpoint(folder, {"node": "a"}, SCHEDULE)
    try:
        store.claim()
        live.append(store.state)
        for write in SAVES:
            write(store)
            live.append(store.state)
    finally:
        store.release()


def cut_everywhere(place):
    """Cut the power at each system call of all saves and look at all that may be left.

    Returns:
        How many cuts, and how many different remains were looked at.
    """
    with pytest.MonkeyPatch.context() as patch:
        whole = place / "whole"
        reference = Disk(whole, patch)
        states = []
        run_saves(whole, states)
    looked = 0
    for cut in range(reference.calls):
        folder = place / f"cut-{cut}"
        done = []
        with pytest.MonkeyPatch.context() as patch:
            power = Disk(folder, patch, cut)
            with pytest.raises(PowerCut):
                run_saves(folder, done)
        allowed = states[max(len(done) - 1, 0) : len(done) + 1]
        seen = set()
        for remains in power.remains():
            key = frozenset(remains.items())
            if key in seen:
                continue
            seen.add(key)
            after = place / "after"
            (after / "state").mkdir(parents=True)
            for name, content in remains.items():
                (after / name).write_bytes(content)
            if "run.json" not in remains:  # made before everything else
                assert not done
                (after / "state").rmdir()
            look(after, allowed, states)
            shutil.rmtree(after)
        looked += len(seen)
        shutil.rmtree(folder)
    return reference.calls, looked


def look(folder, allowed, states):
    """The state is one of those allowed, and the run goes on from it to the same end."""
    store = open_store(folder)
    assert store.state in allowed
    check_whole(store)
    ahead = SAVES[states.index(store.state) :]
    for write in ahead:
        write(store)
    assert store.state == states[-1]
    named = {saved.file for state in states[-2:] for saved in state.files()}
    here = {path.name for path in (folder / "state").iterdir()}
    if ahead:  # a save cleans up
        assert here == named | {"manifest.json", "manifest.previous.json"}
    store.release()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see what is synced")
def test_a_power_cut_at_any_call_leaves_the_state_before_or_after(quick):
    """Never a mix, whichever unsynced bytes and names are lost; and the run goes on."""
    cuts, looked = cut_everywhere(quick)
    assert cuts > 10 * len(SAVES)
    assert looked > 3 * cuts


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see what is synced")
@pytest.mark.parametrize("module", [checkpoint, incoming, disk])
def test_the_simulated_power_cut_finds_a_sync_left_out(quick, monkeypatch, module):
    """Without syncing the block files, or the folder, the test above would fail."""
    monkeypatch.setattr(module, "sync", lambda path: None)
    with pytest.raises(AssertionError):
        cut_everywhere(quick)


# --- SIGKILL


def script(*words):
    """The command that runs this file as a script."""
    return [sys.executable, "-m", "tests.edges.test_crash", *map(str, words)]


def run_script(command):
    return subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_sigkill_at_200_moments_of_saving_loses_nothing(quick):
    """Each restart finds a whole state, not older than the last save that had returned."""
    ended = run_script(script("killed", quick / "out", 7))
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["kills"] == KILLS
    assert report["saves"] > KILLS
    assert report["unfinished"] > KILLS // 10  # the kills did fall into saves


SIZE = 16384  # a tensor of 64 kB takes the system several writes


def save_for_ever(folder, acknowledge):
    """What a child does until it is killed: saves of all kinds, each told when it returned."""
    store = open_store(folder)
    progress = store.state.progress
    os.write(acknowledge, b"0 0\n")
    while True:
        visit, step = progress.visit, progress.step
        if step < STEPS - 1:
            progress = Progress(visit, step + 1)
            store.save({}, progress, values(visit, step + 1, SIZE))
        elif visit % 4 < 2:
            progress = Progress(visit + 1)
            changed = Changed(visit, values(visit, size=SIZE))
            store.save({visit % BLOCKS: changed}, progress)
        else:
            progress = Progress(visit + 2)
            store.adopt(dict(fetch(store, v, SIZE) for v in (visit, visit + 1)), progress)
        os.write(acknowledge, f"{progress.visit} {progress.step}\n".encode())


def killed(folder, seed):
    """Kill saving children at random moments; look at what they left."""
    moments = random.Random(seed)
    began = time.monotonic()
    saves = unfinished = 0
    reached = (0, 0)
    for _ in range(KILLS):
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                save_for_ever(folder, theirs)
            os._exit(1)
        os.close(theirs)
        with os.fdopen(ours, "rb") as told:
            assert told.readline() == b"0 0\n"
            lines = []
            for _ in range(moments.randint(1, 3)):
                start = time.monotonic()
                lines.append(told.readline())
            # Within the next save or so, however busy the machine is.
            time.sleep(moments.uniform(0, 1.2) * (time.monotonic() - start))
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            lines += told.readlines()
        saves += len(lines)
        reached = max([reached, *(tuple(map(int, line.split())) for line in lines)])
        store = open_store(folder)
        here = {path.name for path in (folder / "state").iterdir()}
        unfinished += not here <= store._named() | {checkpoint.MANIFEST, checkpoint.PREVIOUS}
        place = (store.state.progress.visit, store.state.progress.step)
        assert place >= reached, (place, reached)
        check_whole(store, SIZE)
        store.release()
    seconds = round(time.monotonic() - began, 2)
    report = {"kills": KILLS, "saves": saves, "unfinished": unfinished, "seconds": seconds}
    sys.stdout.write(json.dumps(report))


# --- full disks


def test_a_disk_that_is_really_full_leaves_the_state_before(tmp_path):
    """Whatever room is left, a save works or changes nothing; with room it works again."""
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=512k tmpfs "$1" || exit 77; shift; exec "$@"'
    if shutil.which("unshare") is None:
        pytest.skip("a small file system of one's own needs the unshare command")
    folder = tmp_path / "disk"
    folder.mkdir()
    ended = run_script([*own, "sh", "-c", mount, "sh", str(folder), *script("full", folder)])
    if ended.returncode == 77 or ended.stderr.startswith("unshare:"):
        pytest.skip(f"no small file system of one's own: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    for kind in ("block", "visit", "adopt"):
        assert report[f"{kind} full"] > 0
        assert report[f"{kind} saved"] > 0


def fetch_and_adopt(store, visit, size):
    block, (part, _) = fetch(store, visit, size)
    with contextlib.closing(part):
        store.adopt({block: (part, visit)}, Progress(visit + 1))


def full(folder):
    """Save with all amounts of room, page by page."""
    size = 4096  # 16 kB a file
    output, filler = folder / "out", folder / "filler"
    outcomes = Counter()
    store = open_store(output)
    for visit in range(BLOCKS):
        changed = Changed(visit, values(visit, size=size))
        store.save({visit % BLOCKS: changed}, Progress(visit + 1))
    for room, kind in itertools.product(range(20), ("block", "visit", "adopt")):
        visit, before = store.state.progress.visit, store.state
        block = {visit % BLOCKS: Changed(visit, values(visit, size=size))}
        system = os.statvfs(folder)
        filler.write_bytes(b"\0" * max(0, system.f_bavail - room) * system.f_bsize)

        attempt = {
            "block": partial(store.save, block, Progress(visit + 1)),
            "adopt": partial(fetch_and_adopt, store, visit, size),
            "visit": partial(store.save, block, Progress(visit + 1, 1), values(visit + 1, 1, size)),
        }[kind]
        try:
            attempt()
            outcomes[f"{kind} saved"] += 1
        except DiskFullError:
            outcomes[f"{kind} full"] += 1
            assert store.state == before
            store.release()
            found = open_store(output)
            assert found.state == before
            check_whole(found, size)
            found.release()
            assert Checkpoint.claim(store)
            filler.unlink()
            attempt()
        filler.unlink(missing_ok=True)
        assert store.state.progress.visit == visit + 1
        store.release()
        store = open_store(output)
        check_whole(store, size)
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        full(Path(sys.argv[2]))
