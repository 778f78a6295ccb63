"""What serving costs the training, and the training the serving: `make bench`.

One process is a node whose training thread computes (a small loop in torch); another one pulls its
published block as fast as it can, or fetches its kept blocks at the default catch-up rate. With
--core the node has one core. Printed, alone, while it serves and while it gives, in turns:
milliseconds per training step, by the clock and of all the process's CPU time (what a step would
take on one core that nobody else uses), and CPU seconds that the node spends per GB.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from transport import NAMES, OneTensor, Pair, Side, describe

from deca_node import memory
from deca_node.blocks import Visit
from deca_node.config import NetworkSettings, Timing
from deca_node.exchange import send_rates
from deca_node.giving import COST_BYTES, Giver
from deca_node.kept import read_piece
from deca_node.methods.deca import Deca
from deca_node.moments import Rule
from deca_node.pacing import WorkBudget
from deca_node.pb import node_pb2 as pb
from deca_node.recovery import Kept

BLOCK = 64_000_000


class Shelf:
    """One kept file (catchup.Shelf)."""

    def __init__(self, path):
        self.path = path

    def kept(self):
        return {0: Kept(1, BLOCK, "0" * 32)}

    def open(self, block, xxh3):
        return self.path.open("rb")

    read = staticmethod(read_piece)


class Node(Side):
    """A node that trains, serves and gives."""

    def __init__(self):
        super().__init__(NAMES[0], None)
        self.times, self.spent = [], 0.0

    async def start(self, core):
        if core is not None:
            os.sched_setaffinity(0, {core})
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "block"
        path.write_bytes(os.urandom(BLOCK))
        address = await self.listen()
        network = NetworkSettings()
        self.budget = WorkBudget(network.catch_up_share, COST_BYTES)
        self.giver = Giver(
            self,
            Shelf(path),
            lambda: (1, True),
            Timing.local(),
            network.catch_up_rate * 1e6,
            send_rates(),
            self.budget,
        )
        method = Deca(OneTensor(BLOCK // 4), Rule(1e-4), "bench", self.name)
        method.open(Visit(0, 0, 0, 0, range(1)), None)
        self.ready = method.outgoing(0).messages
        threading.Thread(target=self._train, daemon=True).start()
        return address

    def check_sender(self, sender):
        return "b"

    def fetch_block(self, request):
        return self.giver.answer_fetch(request)

    def _train(self):
        weights = torch.rand(256, 256)
        while True:
            begin = time.perf_counter()
            spent = time.thread_time()
            for _ in range(20):
                values = torch.relu(torch.rand(64, 256) @ weights)
                weights += 1e-9 * values.T @ values
            self.spent += time.thread_time() - spent
            self.times.append(time.perf_counter() - begin)

    async def take(self):
        """Seconds per step since the last call, and CPU seconds: of the steps, of the process."""
        times, self.times = self.times, []
        return times, self.spent, time.process_time()


class Reader:
    """The other process: reads all the time, or rests."""

    async def start(self, address, core):
        if core is not None:
            os.sched_setaffinity(0, set(os.sched_getaffinity(0)) - {core} or {core})
        self.link = Side("b", None).transport.link(address)

    async def read(self, how, seconds):
        got, end = 0, time.monotonic() + seconds
        begin = time.monotonic()
        while time.monotonic() < end:
            if how == "rest":
                await asyncio.sleep(0.05)
                continue
            stream = (
                self.link.pull(pb.PullRequest(), 60)
                if how == "serving"
                else self.link.fetch_block(
                    pb.FetchBlockRequest(sender=pb.Sender(run="b"), xxh3="0" * 32), 60
                )
            )
            async for message in stream:
                got += len(message)
                if time.monotonic() > end:
                    break
            await stream.aclose()
        return got, time.monotonic() - begin


def part_main(connection, part):
    memory.tune()
    torch.set_num_threads(1)

    async def serve():
        each = Node() if part == "node" else Reader()
        while (command := await asyncio.to_thread(connection.recv)) is not None:
            verb, *arguments = command
            connection.send(await getattr(each, verb)(*arguments))

    asyncio.run(serve())
    os._exit(0)


def measure(core, repeat, seconds):
    parts = Pair(part_main, ("node",), ("reader",))
    node, reader = parts.pipes

    def ask(pipe, *command):
        pipe.send(command)
        return pipe.recv()

    address = ask(node, "start", core)
    ask(reader, "start", address, core)
    steps = {"rest": [], "serving": [], "giving": []}
    rates = {how: [] for how in steps}
    for _ in range(repeat):
        for how, found in steps.items():
            _, before, all_before = ask(node, "take")
            got, took = ask(reader, "read", how, seconds)
            times, after, all_after = ask(node, "take")
            spent, total = after - before, all_after - all_before
            found.append((statistics.mean(times), total / len(times), spent / len(times)))
            rates[how].append((got / took / 1e6, (total - spent) / max(got, 1) * 1e9))
    parts.close()

    def median(rows, index):
        return statistics.median(row[index] for row in rows)

    return {
        how: {
            "milliseconds_a_step": round(1000 * median(found, 0), 3),
            "slower_by": round(median(found, 0) / median(steps["rest"], 0) - 1, 3),
            "cpu_milliseconds_a_step": round(1000 * median(found, 1), 3),
            "slower_by_cpu": round(median(found, 1) / median(found, 2) - 1, 3),
            "megabytes_per_second": round(median(rates[how], 0), 1),
            "cpu_seconds_per_gigabyte": round(median(rates[how], 1), 2) if how != "rest" else None,
        }
        for how, found in steps.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--core", type=int, help="the node's only core; the reader has the others")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    results = {"about": describe()}
    results |= measure(arguments.core, arguments.repeat, arguments.seconds)
    text = json.dumps(results, indent=2)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "serving.json").write_text(text)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
