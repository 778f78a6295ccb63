"""What sending while the update is still under way gains: `make bench-early`.

Two processes on loopback, as in bench/transport.py. Each has a gradient; timed is from there until
both have updated their block, sent it, and mixed what came, with the block published after the
update and before it, in turns, over links of several rates.
"""

import argparse
import asyncio
import functools
import json
import os
import statistics
import time

import torch
from transport import MB, NAMES, OneTensor, Pair, Side, describe

from deca_node import memory
from deca_node.blocks import Visit
from deca_node.exchange import send_rates
from deca_node.methods.deca import Deca
from deca_node.moments import Rule
from deca_node.worker import TrainingThread


class End:
    """One of the two processes."""

    def __init__(self, name, megabytes):
        self.name, self.serial = name, -1
        self.model = OneTensor(megabytes * MB // 4)
        self.method = Deca(self.model, Rule(1e-4), "bench", name)
        self.gradient = torch.randn(megabytes * MB // 4)

    async def listen(self):
        self.side = Side(self.name, None)
        self.worker = TrainingThread()
        return await self.side.listen()

    async def meet(self, address):
        await self.side.meet(address, NAMES[1 - NAMES.index(self.name)])
        self.method.open(Visit(0, 0, 0, 0, range(1)), None)

    async def run(self, early, rate):
        """One step; begin and end on one clock, and the seconds of the update."""
        exchange, method = self.side.exchange, self.method
        exchange._serving._rates = send_rates(rate)
        self.serial += 1
        self.model._parameters["w"].grad = self.gradient
        await exchange.make_room()
        begin = time.monotonic()
        update = functools.partial(method.advance, self.serial)
        if early:
            exchange.publish(method.promise(self.serial))
            busy = asyncio.ensure_future(self.worker(update))
        else:
            await self.worker(update)
            updated = time.monotonic()
            exchange.publish(await self.worker(functools.partial(method.outgoing, self.serial)))
            busy = None
        gathered = await exchange.gather(
            self.serial, method.layout, busy=busy, intake=method.intake
        )
        assert gathered.complete, gathered
        end = time.monotonic()
        await self.worker(functools.partial(method.settle, self.serial))
        return begin, end, 0.0 if early else updated - begin


def end_main(connection, name, megabytes):
    """Do what the parent says, one thing after the other."""
    memory.tune()
    torch.set_num_threads(1)

    async def serve():
        end = End(name, megabytes)
        while (command := await asyncio.to_thread(connection.recv)) is not None:
            verb, *arguments = command
            connection.send(await getattr(end, verb)(*arguments))

    asyncio.run(serve())
    os._exit(0)


def measure(megabytes, rates, repeat):
    pair = Pair(end_main, (NAMES[0], megabytes), (NAMES[1], megabytes))
    try:
        first, second = pair.ask(("listen",), ("listen",))
        pair.ask(("meet", second), ("meet", first))
        found = {rate: {"after": [], "early": [], "update": []} for rate in rates}
        for repetition in range(repeat + 1):
            for rate, rows in found.items():
                for early in (False, True):
                    command = ("run", early, rate * MB if rate else None)
                    times = pair.ask(command, command)
                    if repetition:  # the first warms up
                        seconds = max(t[1] for t in times) - min(t[0] for t in times)
                        rows["early" if early else "after"].append(seconds)
                        if not early:
                            rows["update"].append(max(t[2] for t in times))
        return found
    finally:
        pair.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=42)
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 125, 50], metavar="MB/S")
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    about = describe()
    found = measure(arguments.megabytes, arguments.rates, arguments.repeat)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'MB/s':>6}  update s  after s  early s  ratio (range of single pairs)")
    rows = {}
    for rate, row in found.items():
        update, after, early = (statistics.median(row[k]) for k in ("update", "after", "early"))
        ratios = sorted(e / a for e, a in zip(row["early"], row["after"], strict=True))
        print(
            f"{rate or 'any':>6}  {update:8.3f} {after:8.3f} {early:8.3f}  {early / after:.2f}"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        rows[rate] = {"update": update, "after": after, "early": early, "ratios": ratios}
    print(json.dumps({"about": about, "megabytes": arguments.megabytes, "rates": rows}))


if __name__ == "__main__":
    main()
