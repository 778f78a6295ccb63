"""Seeded fuzzing: ``python -m tests.fuzz.run --frames 1000000`` (`make fuzz`); see docs/robust.md.

Every input is a mutation of one that is kept: of the corpus, or of one that had another outcome
than all before it in this run. The same seed and number of frames give the same inputs.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import xxhash

from tests.fuzz import live
from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import all_targets

CORPUS = Path(__file__).parent / "corpus"
POOL = 400  # inputs of a target that are mutated further, at most
# One input may take this long on a busy machine; it is a thousand times what it takes.
HANG_SECONDS = 60
# What a process may grow by over a run: caches, allocator, tables up to their bounds.
GROWTH_BYTES = 128 << 20
# Of the frames, those that go over real sockets.
LIVE_SHARE = 0.1


def corpus(target):
    """The inputs that are kept of a target, and those that it begins with."""
    kept = sorted((CORPUS / target.name).glob("*")) if (CORPUS / target.name).exists() else []
    return [*target.seeds(), *(path.read_bytes() for path in kept)]


def keep(target, data, word):
    """Put an input into the corpus."""
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{word}-{xxhash.xxh3_64_hexdigest(data)}").write_bytes(data)


def hang(*_):
    raise AssertionError(f"one input took more than {HANG_SECONDS} s")


def attack(target, frames, seed, *, keeping=False):
    """Run so many mutated inputs; outcomes by word. What should not be is raised."""
    pool = corpus(target)
    outcomes = Counter()
    for data in pool:
        outcomes[target.run(data)] += 0
    signal.signal(signal.SIGALRM, hang)
    try:
        for index in range(frames):
            mutator = Mutator(f"{seed}/{target.name}/{index}")
            data = target.vary(mutator, pool[mutator.draw.randrange(len(pool))])
            signal.alarm(HANG_SECONDS)
            try:
                word = target.run(data)
            except BaseException as error:
                error.add_note(f"{target.name}: input {index} of seed {seed!r}, kept in {CORPUS}")
                keep(target, data, "defect")
                raise
            if word not in outcomes and len(pool) < POOL and len(data) < 1 << 13:
                pool.append(data)
                if keeping:
                    keep(target, data, "new")
            outcomes[word] += 1
    finally:
        signal.alarm(0)
    return outcomes


def in_process(frames, seed, *, keeping=False, tell=lambda text: None):
    """All targets of this process, by their shares; the frames that there were."""
    done = 0
    for target, share in all_targets(seed):
        process, begin = psutil.Process(), time.monotonic()
        count = round(frames * share)
        attack(target, max(1, count // 10), f"{seed}/warm", keeping=False)
        before = process.memory_info().rss
        outcomes = attack(target, count, seed, keeping=keeping)
        grown = process.memory_info().rss - before
        done += count + max(1, count // 10)
        rate = count / (time.monotonic() - begin)
        words = ", ".join(f"{word} {n}" for word, n in outcomes.most_common(12))
        answers = f", {target.answered} answers" if hasattr(target, "answered") else ""
        tell(f"{target.name}: {count} frames{answers}, {rate:.0f}/s, +{grown >> 20} MiB: {words}")
        assert grown < GROWTH_BYTES, f"{target.name}: {grown >> 20} MiB more than before"
        if hasattr(target, "close"):
            target.close()
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--keep", action="store_true", help="add new outcomes to the corpus")
    options = parser.parse_args()
    begin = time.monotonic()

    def tell(text):
        print(text, flush=True)  # noqa: T201 - what it is run for

    sockets = round(options.frames * LIVE_SHARE)
    done = in_process(options.frames - sockets, options.seed, keeping=options.keep, tell=tell)
    done += asyncio.run(live.attack(sockets, options.seed, tell))
    tell(f"{done} mutated frames in {time.monotonic() - begin:.0f} s: no defect")


if __name__ == "__main__":
    sys.exit(main())
