"""Short seeded runs of the fuzzer; `make fuzz` does the million (docs/robust.md)."""

import asyncio

import pytest

from tests.fuzz import live, run
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import Chunks


def test_a_few_thousand_mutated_frames_break_nothing():
    """All that reads a peer's bytes, in this process; and all that the corpus keeps."""
    assert run.in_process(4_000, "short") >= 4_000


def test_a_defect_would_be_found_and_kept(tmp_path, monkeypatch):
    """A parser that cannot bear a byte of 255 is found out, and its input is kept."""
    target = Chunks()

    def fragile(data):
        if 255 in data:
            raise ValueError("255")
        return "ok"

    monkeypatch.setattr(target, "run", fragile)
    monkeypatch.setattr(target, "seeds", lambda: [b"abc"])
    monkeypatch.setattr(run, "CORPUS", tmp_path)
    with pytest.raises(ValueError, match="255"):
        run.attack(target, 10_000, "0")
    (kept,) = (tmp_path / "chunk").iterdir()
    assert 255 in kept.read_bytes()


def test_equal_seeds_give_equal_inputs():
    """So that what was found can be found again."""
    one, other, third = Mutator("a"), Mutator("a"), Mutator("b")
    data = [[m.data(b"x" * 100) for _ in range(20)] for m in (one, other, third)]
    assert data[0] == data[1] != data[2]


@pytest.mark.slow
def test_mutated_frames_in_process():
    """Another seed than the short run's."""
    assert run.in_process(30_000, "slow") >= 30_000


@pytest.mark.slow
def test_mutated_frames_over_real_sockets():
    """A real daemon trains on, answers, stays small, and writes no traceback."""
    assert asyncio.run(live.attack(4_000, "slow")) >= 4_000
