"""What catching up costs, on SmolLM2-135M: `make bench-recovery`.

One node trains alone until every block has changed. Then others join with the base model, one
after the other; the last is killed (SIGKILL) in the middle of a visit and started again, at once or
when every block has changed. Printed as JSON:

- the giver's seconds per gradient while it hands out its blocks, and between joins while it does
  not, and the ratio of their medians;
- blocks that each joiner fetched, against those that changed before and while it did;
- for each restart, seconds from the start of the process to what the node logs, and to the end of
  its next step.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from bbc_demo import find_model, write_articles  # noqa: E402 - needs the path above

LIMIT = 600.0
BLOCKS = 5  # 30 layers, 6 at a time


class Daemon:
    """One `deca-node start`."""

    def __init__(self, name, folder, settings, core):
        self.core = core
        self.out = folder / name
        self.log = folder / f"{name}.log"
        self.command = [sys.executable, "-m", "deca_node", "start"]
        for setting in [f"node.name={name}", f"node.output={self.out}", *settings]:
            self.command += ["--set", setting]
        self.process = None

    def start(self):
        self.began = time.time()
        with self.log.open("ab") as log:
            # As installed: compiled once, not at every start.
            kept = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=kept)
        os.sched_setaffinity(self.process.pid, {self.core})

    def rows(self):
        path = self.out / "history.jsonl"
        if not path.exists():
            return []
        whole = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return [json.loads(line) for line in whole]

    def events(self):
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def until(self, condition):
        limit = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                sys.exit(f"recovery: {self.log} says\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(60)


def moment(event):
    """Seconds since 1970 of a log line."""
    return datetime.fromisoformat(event["time"]).timestamp()


def since(daemon, event):
    """Log lines of the daemon's present life."""
    return [e for e in daemon.events() if e["event"] == event and moment(e) > daemon.began]


def seconds(rows):
    return [row["seconds_gradient"] for row in rows]


def run(folder, joins, restarts, extra):
    articles = folder / "articles.jsonl"
    write_articles(articles)
    settings = [
        f"run.name=recovery-{os.getpid()}",
        "run.start_when=1",
        "node.host=127.0.0.1",
        "node.port=0",
        "node.threads=1",
        'network.interfaces=["127.0.0.1"]',
        f"model.path={find_model()}",
        "model.dtype=fp32",
        f"data.train={articles}",
        "data.max_tokens=48",
        "schedule.rounds=1000",
        "schedule.steps=4",
        "schedule.layers_per_block=6",
        "optimizer.learning_rate=1e-4",
        *extra,
    ]
    # One core each: what the joiner computes must not count as the giver's.
    cores = sorted(os.sched_getaffinity(0))[:2]
    giver = Daemon("giver", folder, settings, cores[0])
    giver.start()
    joiner = None
    alone, giving, joined = [], [], []
    try:
        giver.until(lambda: len(giver.rows()) >= BLOCKS * 4 + 1)
        for index in range(joins):
            if joiner is not None:
                joiner.end()
            quiet = len(giver.rows()) + 1
            giver.until(lambda quiet=quiet: len(giver.rows()) >= quiet + 10)
            alone += seconds(giver.rows()[quiet:])
            joiner = Daemon(f"joiner-{index}", folder, [*settings, "run.start_when=2"], cores[-1])
            joiner.start()
            during, found = join(giver, joiner)
            giving += during
            joined.append(found)
        slower = statistics.median(giving) / statistics.median(alone) - 1
        return {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "giver_seconds_per_gradient": {
                "not giving": [statistics.median(alone), len(alone)],
                "giving": [statistics.median(giving), len(giving)],
            },
            "giver_slower_by": round(slower, 3),
            "joins": joined,
            "restarts_at_once": [restart(giver, joiner, 0) for _ in range(restarts)],
            "restarts_all_blocks_later": [
                restart(giver, joiner, BLOCKS * 4 + 1) for _ in range(restarts)
            ],
        }
    finally:
        for daemon in (giver, joiner):
            if daemon is not None and daemon.process.poll() is None:
                daemon.end(signal.SIGKILL)


def join(giver, joiner):
    """The giver's seconds per gradient while the joiner fetches, and what it fetched."""
    joiner.until(lambda: since(joiner, "catching up"))
    begun = len(giver.rows())
    joiner.until(lambda: since(joiner, "caught up"))
    during = giver.rows()[begun:]
    fetched = [event["bytes"] for event in since(joiner, "fetched")]
    took = moment(since(joiner, "caught up")[0]) - moment(since(joiner, "catching up")[0])
    joiner.until(lambda: len(joiner.rows()) >= 2)
    return seconds(during), {
        "seconds": round(took, 1),
        "megabytes": round(sum(fetched) / 1e6),
        # Every block, and once more each that a visit changed meanwhile.
        "blocks_changed": BLOCKS + len({row["visit"] for row in during}) - 1,
        "blocks_fetched": len(fetched),
    }


def restart(giver, joiner, missed):
    """Kill the joiner within a visit, start it when it has missed so many steps."""
    joiner.until(lambda: joiner.rows()[-1]["step"] == 1)
    killed = time.time()
    joiner.end(signal.SIGKILL)
    known = len(giver.rows())
    giver.until(lambda: len(giver.rows()) >= known + missed)
    last = joiner.rows()[-1]
    waited = time.time() - killed
    joiner.start()
    joiner.until(lambda: since(joiner, "visit"))
    joiner.until(lambda: joiner.rows()[-1:] not in ([], [last]))
    timeline = {
        name: round(moment(found[0]) - joiner.began, 1)
        for name in ("listening", "resuming", "catching up", "caught up", "visit")
        if (found := since(joiner, name))
    }
    fetched = len(since(joiner, "fetched"))
    step = round(time.time() - joiner.began, 1)
    return {"down": round(waited, 1), **timeline, "step": step, "blocks_fetched": fetched}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--joins", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=3, help="of each kind")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), arguments.joins, arguments.restarts, arguments.set)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
