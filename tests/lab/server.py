"""The laboratory's own process: first of its process namespace, so that all ends with it.

It reads a JSON request a line from stdin and answers each with a line on stdout. When stdin
closes, because the laboratory was closed or whoever opened it died, it ends, and the kernel ends
every process it started and takes back namespaces, devices and mounts.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.lab.switch import Link, Switch
from tests.warm import Forked, become, import_all

NAMESPACES = Path("/run/netns")
SOCKETS = Path("/run/lab")
PORT = 7430  # where every host's daemon listens
# From linux/sched.h and linux/if_tun.h.
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
MAX_FRAME = 65536

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside(host: str) -> Iterator[None]:
    """Sockets opened, devices made and processes started meanwhile are the host's."""
    with Path("/proc/self/ns/net").open("rb") as own, (NAMESPACES / host).open("rb") as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _move_to(host: str) -> None:
    with (NAMESPACES / host).open("rb") as namespace:
        _enter(namespace.fileno())


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _tell(*command: str, lines: str = "") -> None:
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _runtime_folder(host: str) -> str:
    """What daemons of one machine tell each other through files is each host's own."""
    folder = Path("/run/user") / host
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder)


class Server:
    """See the module."""

    def __init__(self) -> None:
        self._switch = Switch()
        self._taps: dict[str, int] = {}
        self._processes: dict[int, subprocess.Popen[bytes] | Forked] = {}
        self._ways_in: dict[str, asyncio.Task[asyncio.Server]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        _tell("mount", "-t", "tmpfs", "tmpfs", "/run")
        NAMESPACES.mkdir()
        SOCKETS.mkdir()

    async def serve(self) -> None:
        """Answer requests until stdin closes."""
        reader = asyncio.StreamReader()
        await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            request = json.loads(line)
            try:
                answer = getattr(self, f"do_{request.pop('do')}")(**request) or {}
            except OSError as error:
                answer = {"error": str(error)}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    # --- requests, in the order they come: the frames of others wait the few milliseconds

    def do_clear(self, seed: int) -> None:
        """End all processes and take all hosts away; the next ones find a new switch."""
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)
            process.wait()
        for name, tap in self._taps.items():
            self._loop.remove_reader(tap)
            os.close(tap)
            self._ways_in[name].result().close()
            (SOCKETS / name).unlink()
            _tell("ip", "netns", "del", name)
        self._processes, self._taps, self._ways_in = {}, {}, {}
        self._switch = Switch(seed)

    def do_host(self, name: str, address: str, station: str) -> None:
        """A new host: a namespace, its Ethernet device, its address, a way in for questions."""
        _tell("ip", "netns", "add", name)
        with inside(name):
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TAP | IFF_NO_PI))
        steps = [
            "link set lo up",
            f"link set eth0 address {station}",
            f"addr add {address} dev eth0",
            "link set eth0 up",
            "route add 224.0.0.0/4 dev eth0",
        ]
        _tell("ip", "-n", name, "-batch", "-", lines="\n".join(steps))
        self._taps[name] = tap
        self._switch.attach(name, bytes.fromhex(station.replace(":", "")))
        self._loop.add_reader(tap, self._frames_came, name, tap)
        way_in = socket.socket(socket.AF_UNIX)
        way_in.bind(str(SOCKETS / name))
        way_in.listen()
        self._ways_in[name] = self._loop.create_task(
            asyncio.start_unix_server(partial(self._question, name), sock=way_in)
        )

    def do_link(self, pairs: list[tuple[str, str]], **settings: Any) -> None:
        """Set directions."""
        for source, target in pairs:
            self._switch.connect(source, target, Link(**settings))

    def do_ip(self, host: str, lines: list[str]) -> None:
        """Run ``ip`` commands on a host."""
        _tell("ip", "-n", host, "-batch", "-", lines="\n".join(lines))

    def do_mount(self, path: str, size: int) -> None:
        """A file system of so many bytes; only this process's children see it."""
        Path(path).mkdir(parents=True)
        _tell("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)

    def do_start(
        self, host: str, command: list[str], env: dict[str, str], log: str
    ) -> dict[str, int]:
        """Start a process on a host; its output is appended to a file."""
        env = {**env, "XDG_RUNTIME_DIR": _runtime_folder(host)}
        with inside(host), Path(log).open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env
            )
        self._processes[process.pid] = process
        return {"pid": process.pid}

    def do_fork(
        self, host: str, arguments: list[str], env: dict[str, str], log: str
    ) -> dict[str, int]:
        """Start ``deca-node`` on a host without the seconds that its imports take.

        The process is a copy of this one, which imports them once; from ``main`` on it is what
        ``do_start`` would have made.
        """
        import_all()
        env = {**env, "XDG_RUNTIME_DIR": _runtime_folder(host)}
        pid = os.fork()
        if pid == 0:
            become(arguments, env, log, partial(_move_to, host))
        self._processes[pid] = Forked(pid)
        return {"pid": pid}

    def do_signal(self, pid: int, number: int) -> None:
        """Send a signal to a process that was started here; none when it has ended."""
        self._processes[pid].send_signal(number)

    def do_poll(self, pid: int) -> dict[str, int | None]:
        """The exit status, null while it runs."""
        return {"code": self._processes[pid].poll()}

    # --- frames

    def _frames_came(self, name: str, tap: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._switch.accept(name, os.read(tap, MAX_FRAME), time.monotonic())
        self._send_due()

    def _send_due(self) -> None:
        for target, frame in self._switch.due(time.monotonic()):
            # The device is down, or its queue is full: the frame is lost, as on a wire.
            with contextlib.suppress(OSError):
                os.write(self._taps[target], frame)
        if self._timer is not None:
            self._timer.cancel()
        release = self._switch.next_release()
        self._timer = None if release is None else self._loop.call_at(release, self._send_due)

    # --- questions

    async def _question(
        self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry a connection from outside to the host's daemon, past the switch."""
        with contextlib.closing(writer):
            with inside(host):
                end = socket.socket()
            end.setblocking(False)
            try:
                await self._loop.sock_connect(end, ("127.0.0.1", PORT))
            except OSError:
                end.close()
                return
            inner, outer = await asyncio.open_connection(sock=end)
            with contextlib.closing(outer):
                ways = [
                    asyncio.create_task(_carry(reader, outer)),
                    asyncio.create_task(_carry(inner, writer)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(MAX_FRAME):
            writer.write(piece)
            await writer.drain()


async def _main() -> None:
    await Server().serve()


if __name__ == "__main__":
    # epoll counts in milliseconds, select in microseconds: links are faster than the former.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_main())
    os._exit(0)  # nobody is asked whether he is ready
