"""What working ahead hides of the exchange, on SmolLM2-135M: `make bench-overlap`.

Two nodes on this machine exchange blocks over a link of a set rate: a cable (veth, shaped by tc)
between two network namespaces, or where these cannot be had each node's own cap
(network.send_rate). First one alone tells the seconds of a step; then the rate is set so that a
block travels for a given part of a step, and both train a round with network.overlap off and on, in
turns. Printed as JSON, and as a table: for the first, the middle and the last block, per step, the
seconds of the gradient, those worked ahead, and the exposed wait, in which nothing was computed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from bbc_demo import find_model, write_articles  # noqa: E402 - needs the path above

LIMIT = 900.0
LAYERS = 30
# Root in the new namespaces, whoever makes them.
UNSHARE = ("unshare", "--user", "--map-root-user", "--net")
INSIDE = "OVERLAP_BENCH_INSIDE"


class Loopback:
    """Both nodes on this machine's loopback, each capped by its own setting."""

    kind = "network.send_rate on loopback"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def host(self, _):
        """What a command begins with to run on a node's host, and the host's address."""
        return (), "127.0.0.1"

    def shape(self, rate):
        """Settings of the nodes, for links of ``rate`` MB/s."""
        return [f"network.send_rate={rate}"]


class Cable:
    """A network namespace for each node, and a shaped cable between them.

    This process is in the first one already, a new one.
    """

    kind = "tc tbf on veth"
    _addresses = ("10.77.0.1", "10.77.0.2")

    def __enter__(self):
        # It ends with this process, whatever becomes of that.
        keeper = ["unshare", "--net", "sh", "-c", "echo; read forever"]
        self._holder = subprocess.Popen(keeper, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._holder.stdout.readline()  # the other namespace is there
        peer = str(self._holder.pid)
        self._do(0, "ip", "link", "add", "cable0", "type", "veth", "peer", "cable1", "netns", peer)
        for node, address in enumerate(self._addresses):
            self._do(node, "ip", "link", "set", "lo", "up")
            self._do(node, "ip", "addr", "add", f"{address}/24", "dev", f"cable{node}")
            self._do(node, "ip", "link", "set", f"cable{node}", "up")
            self._do(node, "ip", "route", "add", "224.0.0.0/4", "dev", f"cable{node}")
        return self

    def __exit__(self, *_):
        self._holder.communicate()

    def _do(self, node, *command):
        prefix, _ = self.host(node)
        subprocess.run([*prefix, *command], check=True)

    def host(self, node):
        """See Loopback."""
        inside = ("nsenter", f"--net=/proc/{self._holder.pid}/ns/net") if node else ()
        return inside, self._addresses[node]

    def shape(self, rate):
        """See Loopback. A burst of 10 ms, and a queue of 50 ms as of a switch's port."""
        bits, burst = f"{rate * 8e6:.0f}bit", f"{rate * 1e4:.0f}b"
        for node in range(len(self._addresses)):
            shaped = ("rate", bits, "burst", burst, "latency", "50ms")
            self._do(node, "tc", "qdisc", "replace", "dev", f"cable{node}", "root", "tbf", *shaped)
        return []


def can_make_namespaces():
    """Whether a shaped cable can be had here."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return False
    probe = "ip link add a0 type veth peer a1 && tc qdisc add dev a0 root tbf "
    probe += "rate 8mbit burst 16kb latency 50ms && unshare --net true"
    command = [*UNSHARE, "sh", "-c", probe]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def train(folder, name, links, nodes, settings):
    """Train with so many nodes; their histories."""
    processes, outs = [], []
    for index in range(nodes):
        out = folder / name / f"node-{index}"
        prefix, address = links.host(index)
        command = [*prefix, sys.executable, "-m", "deca_node", "start"]
        own = [
            f"run.name=overlap-{os.getpid()}-{name}",
            f"run.start_when={nodes}",
            f"node.name=node-{index}",
            f"node.output={out}",
            f"node.host={address}",
            "node.port=0",
            "node.threads=1",
            f'network.interfaces=["{address}"]',
            "trust.insecure=true",
        ]
        for setting in own + settings:
            command += ["--set", setting]
        out.parent.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}-{index}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process.pid, {cores[index % len(cores)]} if nodes == 1 else cores)
        processes.append(process)
        outs.append(out)
    limit = time.monotonic() + LIMIT
    for index, process in enumerate(processes):
        if process.wait(limit - time.monotonic()):
            sys.exit((folder / f"{name}-{index}.log").read_text()[-2000:])
    return [
        [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        for out in outs
    ]


def medians(histories, blocks):
    """By block, medians over all nodes and steps but a visit's first two and last."""
    found = {}
    for block in (0, blocks // 2, blocks - 1):
        rows = [row for history in histories for row in history if row["block"] == block]
        last = max(row["step"] for row in rows)
        # The second step holds what was worked ahead against a whole pass, once for each block.
        rows = [row for row in rows if 1 < row["step"] < last]
        keys = ("seconds_step", "seconds_gradient", "seconds_ahead", "seconds_wait",
                "seconds_exposed", "seconds_mix", "seconds_update")  # fmt: skip
        found[block] = {key: statistics.median(row[key] for row in rows) for key in keys}
    return found


def run(folder, links, arguments):
    articles = folder / "articles.jsonl"
    write_articles(articles)
    blocks = LAYERS // arguments.layers
    settings = [
        f"model.path={find_model()}",
        "model.dtype=fp32",
        f"data.train={articles}",
        f"data.max_tokens={arguments.tokens}",
        "schedule.rounds=1",
        f"schedule.layers_per_block={arguments.layers}",
        "optimizer.learning_rate=1e-4",
        *arguments.set,
    ]
    [alone] = train(folder, "alone", links, 1, [*settings, "schedule.steps=4"])
    step = statistics.median(row["seconds_step"] for row in alone)
    kept = next((folder / "alone" / "node-0" / "state").glob("block-*.safetensors"))
    megabytes = kept.stat().st_size / 1e6
    rate = megabytes / (arguments.share * step)
    shaped = links.shape(rate)
    results = {"off": [], "on": []}
    for repeat in range(arguments.repeats):
        for overlap in results:
            histories = train(
                folder,
                f"{overlap}-{repeat}",
                links,
                2,
                [
                    *settings,
                    *shaped,
                    f"schedule.steps={arguments.steps}",
                    f"network.overlap={'true' if overlap == 'on' else 'false'}",
                ],
            )
            results[overlap] += histories
    off, on = (medians(results[name], blocks) for name in ("off", "on"))
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "link": links.kind,
        "step_alone_seconds": step,
        "block_megabytes": megabytes,
        "rate_megabytes_per_second": rate,
        "transfer_share_of_step": arguments.share,
        "blocks": {
            block: {
                "off": off[block],
                "on": on[block],
                "hidden": 1 - on[block]["seconds_exposed"] / off[block]["seconds_exposed"],
            }
            for block in off
        },
    }


def table(results):
    """The same for people."""
    rows = [("block", "overlap", "step", "gradient", "ahead", "wait", "exposed", "hidden")]
    for block, found in results["blocks"].items():
        for name in ("off", "on"):
            cells = [f"{found[name][f'seconds_{key}']:.3f}" for key in rows[0][2:7]]
            hidden = f"{found['hidden']:.0%}" if name == "on" else ""
            rows.append((str(block), name, *cells, hidden))
    return "\n".join("  ".join(f"{cell:>8}" for cell in row) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.4, help="of a step, for a transfer")
    parser.add_argument("--layers", type=int, default=3, help="per block")
    parser.add_argument("--steps", type=int, default=6, help="per visit")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--loopback", action="store_true", help="cap the nodes, shape no link")
    arguments = parser.parse_args()
    inside = INSIDE in os.environ
    if not (inside or arguments.loopback):
        if can_make_namespaces():
            os.environ[INSIDE] = "1"
            os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv])
        print(f"no shaped cable to be had here: {Loopback.kind}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, Cable() if inside else Loopback() as links:
        results = run(Path(folder), links, arguments)
    print(json.dumps(results, indent=2))
    print(table(results))


if __name__ == "__main__":
    main()
