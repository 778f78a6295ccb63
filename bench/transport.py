"""How close an exchange comes to what the socket can do: `make bench`.

Two processes on loopback, in one run and interleaved, each size and repetition one after the other:
raw TCP from Python; gRPC alone, with the project's settings and messages and nothing else of it,
which says how much of the distance to TCP is gRPC's own; the project's transport; an exchange as a
daemon does it (publish, messages with checksums made while the first ones are sent, pull, check,
mix into the block); both in plain text and under TLS with both ends checked; and hivemind's
averager of the same tensor where it is installed (the extra `bench`).

Prints medians, their ratio to raw TCP of the same run, and CPU seconds per GB over both ends;
writes all of it as JSON and a picture, and says which bar is missed.
"""

import argparse
import asyncio
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
import structlog
import torch
from torch import nn

from deca_node import memory
from deca_node.blocks import Visit
from deca_node.config import Timing
from deca_node.exchange import Exchange
from deca_node.guard import Guard
from deca_node.identity import Authority, new_key, new_request
from deca_node.keyring import Keyring
from deca_node.keyring import Pair as KeyPair
from deca_node.membership import Phase
from deca_node.methods.deca import Deca
from deca_node.models import ActiveBlock
from deca_node.moments import Rule
from deca_node.pb import node_pb2 as pb
from deca_node.swarm import Identity, Position, Swarm
from deca_node.transport.connection import CLIENT_OPTIONS, SERVER_OPTIONS
from deca_node.transport.server import GrpcTransport
from deca_node.worker import TrainingThread

MB = 1_000_000
NAMES = ("a", "b")
STEPS = 1_000_000  # one visit is enough
PIECE = 1 << 20
QUIET = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(50))

# Case: (bytes flow both ways, raw case it is held against).
CASES = {
    "tcp one-way": (False, "tcp one-way"),
    "tcp both ways": (True, "tcp both ways"),
    "gRPC alone one-way": (False, "tcp one-way"),
    "gRPC alone both ways": (True, "tcp both ways"),
    "transport one-way": (False, "tcp one-way"),
    "transport both ways": (True, "tcp both ways"),
    "transport one-way, mTLS": (False, "tcp one-way"),
    "transport both ways, mTLS": (True, "tcp both ways"),
    "exchange one-way": (False, "tcp one-way"),
    "exchange both ways": (True, "tcp both ways"),
    "exchange both ways, mTLS": (True, "tcp both ways"),
    "hivemind both ways": (True, "tcp both ways"),
}
# Least ratio to raw TCP at 64 MB.
BARS = {
    "transport one-way": 0.50,
    "transport both ways": 0.50,
    "exchange both ways": 0.38,
    "exchange both ways, mTLS": 0.27,
}
MOST_CPU_PER_GB = {"transport one-way": 1.0, "transport both ways": 1.0}
# Least times as fast as hivemind at 64 MB.
AGAINST_HIVEMIND = {"exchange both ways": 4.0, "exchange both ways, mTLS": 3.0}
BAR_SIZE = 64


# --- one end


class OneTensor:
    """Stands for a model whose only block is one vector."""

    def __init__(self, count):
        values = torch.rand(count, generator=torch.Generator().manual_seed(count))
        self._parameters = {"w": nn.Parameter(values, requires_grad=False)}

    def activate(self, layers):
        return ActiveBlock(self._parameters, torch.device("cpu"))

    def release(self):
        pass


class Side:
    """One node on one transport: the daemon's swarm and exchange; answers peers."""

    def __init__(self, name, guard):
        self.name = name
        self.stopping = asyncio.Event()
        self.transport = GrpcTransport("127.0.0.1", 0, guard)
        self.ready = []
        self.serial = -1

    async def listen(self):
        port = await self.transport.listen(self, None)
        identity = Identity("bench", self.name, 1 + NAMES.index(self.name), {"seed": "0"})
        identity.port = port
        timing = Timing.local()
        self.swarm = Swarm(
            identity,
            self.transport,
            timing,
            lambda: Position(Phase.TRAINING, 0),
            STEPS,
            lambda: self.exchange.wake(),  # noqa: PLW0108 - made below
            QUIET,
        )
        self.exchange = Exchange(self.swarm, timing, "bench", self.stopping)
        return f"127.0.0.1:{port}"

    async def meet(self, address, other):
        self.link = self.transport.link(address)
        await self.link.hello(self.swarm.greeting(), 10)  # under TLS it learns who is there
        self.swarm.propose(address, lasting=True)
        while other not in self.swarm.members(0):
            await self.exchange.changed()
        edges = await self.exchange.open_visit(0, STEPS, frozenset({other}), 0)
        assert edges.weights, "the two ends made no edge"

    # transport.Handler

    async def hello(self, request, source):
        return await self.swarm.answer_hello(request, source)

    async def open_visit(self, request):
        return self.exchange.answer_offer(request)

    async def settle_visit(self, request):
        return self.exchange.answer_degree(request)

    async def pull(self, request):
        if not request.sender.run:  # the transport alone
            for message in self.ready:
                yield message
            return
        async for message in self.exchange.answer_pull(request):
            yield message

    async def list_blocks(self, request):
        return pb.BlockList()

    async def fetch_block(self, request):
        yield b""

    async def goodbye(self, request):
        return pb.GoodbyeReply()


class Bare:
    """A server and a channel of gRPC's own, which carry the messages and do nothing with them."""

    METHOD = "pull"

    def __init__(self):
        self.ready = []

    async def listen(self):
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        pull = grpc.unary_stream_rpc_method_handler(self._answer)
        handler = grpc.method_handlers_generic_handler("bench", {self.METHOD: pull})
        self.server.add_generic_rpc_handlers([handler])
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    def meet(self, address):
        self.channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self.call = self.channel.unary_stream(f"/bench/{self.METHOD}")

    async def _answer(self, request, context):
        for message in self.ready:
            await context.write(message)

    async def pull(self):
        """Bytes that came."""
        got, call = 0, self.call(b"")
        while (message := await call.read()) is not grpc.aio.EOF:
            got += len(message)
        return got


class End:
    """One of the two processes."""

    def __init__(self, name, guard):
        self.name = name
        self.bare = Bare()
        self.sides = {"": Side(name, None), "mTLS": Side(name, guard)}

    async def listen(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.worker = TrainingThread()
        addresses = {kind: await side.listen() for kind, side in self.sides.items()}
        bare = await self.bare.listen()
        return {"tcp": self.server.getsockname(), "bare": bare, **addresses}

    async def meet(self, addresses):
        """Connect the raw sockets, one a direction, and let the nodes meet."""
        other = NAMES[1 - NAMES.index(self.name)]
        self.outgoing = socket.create_connection(addresses["tcp"])
        self.incoming, _ = await asyncio.to_thread(self.server.accept)
        self.bare.meet(addresses["bare"])
        await asyncio.gather(*(s.meet(addresses[k], other) for k, s in self.sides.items()))

    async def size(self, megabytes):
        """Make what is sent, and buffers for what comes, all touched."""
        self.count = megabytes * MB // 4
        self.method = None
        self.sent = self.received = None
        gc.collect()
        self.received = bytearray(b"\1" * (4 * self.count))
        self.method = Deca(OneTensor(self.count), Rule(1e-4), "bench", self.name)
        self.method.open(Visit(0, 0, 0, 0, range(1)), None)
        self.sent = memoryview(bytes(self.method.outgoing(0).messages[1])[:PIECE])
        for side in self.sides.values():
            side.exchange.release()
            side.ready = self.bare.ready = self.method.outgoing(0).messages

    async def run(self, case, sends, receives):
        """One repetition of this end's part: begin, end (one clock for all), CPU seconds."""
        kind = "mTLS" if case.endswith("mTLS") else ""
        side = self.sides[kind]
        if case.startswith("exchange"):
            side.serial += 1
            if not sends:  # its own snapshot is made, but not part of what is measured
                self.method.outgoing(side.serial)
        cpu, begin = time.process_time(), time.monotonic()
        if case.startswith("tcp"):
            await asyncio.to_thread(self._tcp, sends, receives)
        elif case.startswith("gRPC alone"):
            if receives:
                self._check(await self.bare.pull())
        elif case.startswith("transport"):
            if receives:
                await self._pull(side)
        else:
            await self._exchange(side, sends, receives)
        return begin, time.monotonic(), cpu

    async def rest(self, cpu):
        """CPU seconds since, when the other end is done too."""
        return time.process_time() - cpu

    def _tcp(self, sends, receives):
        sender = threading.Thread(target=self._send) if sends else None
        if sender is not None:
            sender.start()
        if receives:
            view, at = memoryview(self.received), 0
            while at < len(view):
                at += self.incoming.recv_into(view[at : at + PIECE])
        if sender is not None:
            sender.join()

    def _send(self):
        left = 4 * self.count
        while left:
            self.outgoing.sendall(self.sent[: min(left, PIECE)])
            left -= min(left, PIECE)

    async def _pull(self, side):
        got, request = 0, pb.PullRequest(sender=pb.Sender(node=self.name))
        async for message in side.link.pull(request, 60):
            got += len(message)
        self._check(got)

    def _check(self, got):
        assert got > 4 * self.count, f"{got} bytes came"

    async def _exchange(self, side, sends, receives):
        made = None
        if sends:  # as rounds.py does, but for the update
            block = self.method.state()["x"]
            promised = self.method.promise(side.serial)
            await side.exchange.make_room()
            side.exchange.publish(promised)
            made = self.worker(functools.partial(promised.grow, block, block.numel()))
        if receives:
            gathered = await side.exchange.gather(
                side.serial, self.method.layout, self.method.intake
            )
            assert gathered.complete, gathered
        if made is not None:
            await made


def end_main(connection, name, trust):
    """Do what the parent says, one thing after the other."""
    memory.tune()
    torch.set_num_threads(1)

    async def serve():
        end = End(name, Guard(Keyring(trust), name))
        while (command := await asyncio.to_thread(connection.recv)) is not None:
            verb, *arguments = command
            connection.send(await getattr(end, verb)(*arguments))

    asyncio.run(serve())
    os._exit(0)


def hivemind_main(connection, sizes):
    """One peer of hivemind: averages a tensor of each size when told."""
    import hivemind  # noqa: PLC0415 - the other processes do without

    multiprocessing.set_start_method("fork", force=True)  # which its own processes need
    torch.set_num_threads(1)
    known = connection.recv()
    time.sleep(1.0 if known else 0.0)  # the first one's daemon may not listen yet
    here = ["/ip4/127.0.0.1/tcp/0"]
    dht = hivemind.DHT(start=True, initial_peers=known, host_maddrs=here)
    connection.send([str(address) for address in dht.get_visible_maddrs()])
    averagers = {
        megabytes: hivemind.DecentralizedAverager(
            [torch.rand(megabytes * MB // 4)],
            dht,
            start=True,
            prefix=f"bench{megabytes}",
            target_group_size=2,
            min_group_size=2,
            min_matchmaking_time=2.0,
            request_timeout=2.0,
        )
        for megabytes in sizes
    }
    connection.send(None)
    while (megabytes := connection.recv()) is not None:
        # The group forms first; the clock runs from the trigger.
        control = averagers[megabytes].step(
            gather=None, wait=False, require_trigger=True, timeout=60
        )
        while control.stage.name != "AWAITING_TRIGGER" and not control.done():
            time.sleep(0.01)
        connection.send(None)
        connection.recv()
        begin = time.monotonic()
        control.allow_allreduce()
        control.result()
        connection.send((begin, time.monotonic(), None))
    for averager in averagers.values():
        averager.shutdown()
    dht.shutdown()
    os._exit(0)


# --- both ends


class Pair:
    """The two processes of one kind."""

    def __init__(self, target, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for each in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *each))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, first, second):
        for pipe, command in zip(self.pipes, (first, second), strict=True):
            pipe.send(command)
        return [pipe.recv() for pipe in self.pipes]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(10)
            process.kill()


def run_case(ours, theirs, case, megabytes):
    """Seconds and CPU seconds (None where it is not counted) of one repetition."""
    both = CASES[case][0]
    if case.startswith("hivemind"):
        theirs.ask(megabytes, megabytes)
        times = theirs.ask(True, True)
    else:
        times = ours.ask(("run", case, True, both), ("run", case, both, True))
    seconds = max(end for _, end, _ in times) - min(begin for begin, _, _ in times)
    if case.startswith("hivemind"):
        return seconds, None
    return seconds, sum(ours.ask(*(("rest", cpu) for _, _, cpu in times)))


def make_trust(folder):
    """A trust folder for each end, by one authority."""
    authority = Authority.new("bench", time.time())
    for name in NAMES:
        keyring = Keyring.made(folder / name, authority.certificate)
        key = new_key()
        certificate = authority.issue(new_request(key), name, time.time(), 1.0)
        keyring.keep_node(name, KeyPair(key, certificate))


def measure(sizes, repeat, with_hivemind, folder):
    make_trust(folder)
    ours = Pair(end_main, *((name, folder / name) for name in NAMES))
    theirs = None
    try:
        first, second = ours.ask(("listen",), ("listen",))
        ours.ask(("meet", second), ("meet", first))
        if with_hivemind and importlib.util.find_spec("hivemind") is not None:
            theirs = Pair(hivemind_main, (sizes,), (sizes,))
            theirs.pipes[0].send([])
            known = theirs.pipes[0].recv()
            theirs.pipes[1].send(known)
            theirs.pipes[1].recv()
            for pipe in theirs.pipes:
                pipe.recv()
        cases = [case for case in CASES if theirs is not None or "hivemind" not in case]
        found = {}
        for megabytes in sizes:
            ours.ask(("size", megabytes), ("size", megabytes))
            found[megabytes] = runs = {case: [] for case in cases}
            for repetition in range(repeat + 1):
                for case in cases:
                    # hivemind's matchmaking takes seconds a time.
                    if "hivemind" in case and repetition > max(3, repeat // 3):
                        continue
                    once = run_case(ours, theirs, case, megabytes)
                    if repetition:  # the first warms up
                        runs[case].append(once)
        return found
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()


def summarise(found):
    """Medians, rates, ratios and CPU seconds per GB, by size and case."""
    results = {}
    for megabytes, runs in found.items():
        results[megabytes] = rows = {}
        medians = {case: statistics.median(s for s, _ in once) for case, once in runs.items()}
        for case, once in runs.items():
            both, raw = CASES[case]
            moved = megabytes * (2 if both else 1)
            cpu = [c for _, c in once if c is not None]
            rows[case] = {
                "seconds": round(medians[case], 4),
                "range": [round(min(once)[0], 4), round(max(once)[0], 4)],
                "gigabytes_per_second": round(moved / 1000 / medians[case], 3),
                "ratio_to_tcp": round(medians[raw] / medians[case], 3),
                "cpu_seconds_per_gigabyte": round(statistics.median(cpu) / moved * 1000, 2)
                if cpu
                else None,
            }
    return results


def missed(rows):
    """What does not reach its bar, in words."""
    lines = [
        f"{case}: {rows[case]['ratio_to_tcp']} of raw TCP, not {least}"
        for case, least in BARS.items()
        if case in rows and rows[case]["ratio_to_tcp"] < least
    ]
    lines += [
        f"{case}: {rows[case]['cpu_seconds_per_gigabyte']} CPU s per GB, not {most}"
        for case, most in MOST_CPU_PER_GB.items()
        if case in rows and rows[case]["cpu_seconds_per_gigabyte"] > most
    ]
    peer = rows.get("hivemind both ways")
    for case, least in AGAINST_HIVEMIND.items():
        if peer is not None and case in rows:
            times = peer["seconds"] / rows[case]["seconds"]
            if times < least:
                lines.append(f"{case}: {times:.1f} times hivemind, not {least}")
    return lines


def describe():
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "congestion_control": control.read_text().strip() if control.exists() else "unknown",
        "load": os.getloadavg()[0],
    }


def draw(results, path):
    import matplotlib.pyplot as plt  # noqa: PLC0415 - an extra

    sizes = list(results)
    cases = [case for case in CASES if case in results[sizes[0]] and not case.startswith("tcp")]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    height = 0.8 / len(sizes)
    for index, megabytes in enumerate(sizes):
        ratios = [results[megabytes][case]["ratio_to_tcp"] for case in cases]
        at = [row + index * height for row in range(len(cases))]
        axes.barh(at, ratios, height, label=f"{megabytes} MB")
    for row, case in enumerate(cases):
        if case in BARS:
            axes.plot([BARS[case]] * 2, [row - height / 2, row + 0.8 - height / 2], "k--", lw=1)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xlabel("rate, as a share of raw TCP in the same run (dashed: the bar at 64 MB)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[14, 64, 256], metavar="MB")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--no-hivemind", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    about = describe()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.sizes, arguments.repeat, not arguments.no_hivemind, Path(folder))
    results = summarise(found)
    for megabytes, rows in results.items():
        print(f"\n{megabytes} MB{'':22}  ms   GB/s  of TCP  CPU s/GB")
        for case, row in rows.items():
            cpu = row["cpu_seconds_per_gigabyte"]
            print(
                f"{case:26}{1000 * row['seconds']:6.0f} {row['gigabytes_per_second']:6.2f}"
                f" {row['ratio_to_tcp']:7.2f}  {'-' if cpu is None else f'{cpu:.2f}':>8}"
            )
    below = missed(results.get(BAR_SIZE, {}))
    fine = "every bar is reached" if BAR_SIZE in results else f"the bars are of {BAR_SIZE} MB"
    print("\n" + ("\n".join(below) or fine))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "transport.json"
    path.write_text(json.dumps({"about": about, "results": results, "missed": below}, indent=2))
    if importlib.util.find_spec("matplotlib") is not None:
        draw(results, arguments.out / "transport.png")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
