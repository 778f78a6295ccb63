"""What catching up costs, on SmolLM2-135M: `make bench-recovery`.

One node trains alone until every block has changed. Then a second one joins with the base model,
is killed (SIGKILL) in the middle of a visit, and started again. Printed as
JSON:

- the giver's seconds per gradient before and while it hands out its blocks, and their ratio;
- blocks that the joiner fetched, against those that changed before and while it did;
- for each restart, seconds from the start of the killed node's process to what it logs, and to the
  end of its next step.
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


class Daemon:
    """One `deca-node start`."""

    def __init__(self, name, folder, settings):
        self.out = folder / name
        self.log = folder / f"{name}.log"
        self.command = [sys.executable, "-m", "deca_node", "start"]
        for setting in [f"node.name={name}", f"node.output={self.out}", *settings]:
            self.command += ["--set", setting]
        self.process = None

    def start(self):
        self.began = time.time()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

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


def median(rows):
    return statistics.median(row["seconds_gradient"] for row in rows)


def run(folder, runs):
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
    ]
    giver = Daemon("giver", folder, settings)
    joiner = Daemon("joiner", folder, [*settings, "run.start_when=2"])
    giver.start()
    try:
        giver.until(lambda: len(giver.rows()) >= 5 * 4 + 9)
        before = giver.rows()[-8:]  # nothing runs but the giver
        joiner.start()
        joiner.until(lambda: since(joiner, "catching up"))
        begun = len(giver.rows())
        joiner.until(lambda: since(joiner, "caught up"))
        during = giver.rows()[begun:]
        fetched = [event["bytes"] for event in since(joiner, "fetched")]
        # Every block, and once more each that a visit changed meanwhile.
        visits = {row["visit"] for row in giver.rows()[begun:]}
        changed = 5 + len(visits) - 1
        seconds = moment(since(joiner, "caught up")[0]) - moment(since(joiner, "catching up")[0])
        joiner.until(lambda: len(joiner.rows()) >= 2)
        return {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "giver_seconds_per_gradient": {"before": median(before), "during": median(during)},
            "giver_slower_by": median(during) / median(before) - 1,
            "catching_up_seconds": seconds,
            "megabytes_fetched": sum(fetched) / 1e6,
            "blocks_changed": changed,
            "blocks_fetched": len(fetched),
            "restarts": [restart(giver, joiner) for _ in range(runs)],
        }
    finally:
        for daemon in (giver, joiner):
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.end(signal.SIGKILL)


def restart(giver, joiner):
    """Kill the joiner within a visit and start it two visits later; seconds from its start."""
    joiner.until(lambda: joiner.rows()[-1]["step"] == 1)
    joiner.end(signal.SIGKILL)
    known = len(giver.rows())
    giver.until(lambda: len(giver.rows()) >= known + 9)
    last = joiner.rows()[-1]
    joiner.start()
    joiner.until(lambda: since(joiner, "visit"))
    joiner.until(lambda: joiner.rows()[-1:] not in ([], [last]))
    timeline = {
        name: round(moment(found[0]) - joiner.began, 1)
        for name in ("listening", "resuming", "catching up", "caught up", "visit")
        if (found := since(joiner, name))
    }
    return {**timeline, "step": round(time.time() - joiner.began, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), arguments.restarts)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
