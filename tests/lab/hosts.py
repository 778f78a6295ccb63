"""Hosts of the laboratory as a test sees them: make them, link them, run daemons on them."""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import psutil

from deca_node.errors import PeerError
from deca_node.guard import Visitor
from deca_node.keyring import Keyring
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import ask_status
from deca_node.transport.connection import Credentials
from tests.cluster.daemons import Daemon
from tests.lab.server import PORT, SOCKETS
from tests.lab.switch import Link
from tests.warm import Process

REPOSITORY = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
STATUS_SECONDS = 5.0
# --kill-child: nor does the server outlive an `unshare` that was killed.
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


class LabError(Exception):
    """The laboratory could not do what it was asked."""


class Lab:
    """Hosts and the links between them, until it is closed or this process ends.

    Raises:
        LabError: namespaces or TAP devices cannot be made here.
    """

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._hosts: dict[str, str] = {}
        # In a session of its own: Ctrl-C is for the test, which then closes the laboratory.
        self._unshare = subprocess.Popen(
            [*_UNSHARE, sys.executable, "-m", "tests.lab.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env=_env(),
            start_new_session=True,
        )

    def close(self) -> None:
        """End every process of the laboratory; namespaces, devices and mounts go with them."""
        assert self._unshare.stdin is not None
        with contextlib.suppress(OSError):
            self._unshare.stdin.close()
        self._unshare.wait(10)

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._unshare.stdin is not None
        assert self._unshare.stdout is not None
        assert self._unshare.stderr is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._unshare.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._unshare.stdin.flush()
            line = self._unshare.stdout.readline()
        if not line:
            said = self._unshare.stderr.read().decode().strip().splitlines()
            raise LabError(said[-1] if said else "the laboratory's process ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LabError(answer["error"])
        return answer

    # --- hosts and links

    def clear(self, seed: int = 0) -> None:
        """End all processes and take all hosts away; ``seed`` decides losses and jitter anew."""
        self._links, self._hosts = {}, {}
        self._ask("clear", seed=seed)

    def host(self, name: str) -> str:
        """A new host; its IP address is returned."""
        number = len(self._hosts) + 1
        address = f"{NETWORK}.{number}"
        self._ask(
            "host", name=name, address=f"{address}/24", station=f"02:00:00:00:00:{number:02x}"
        )
        self._hosts[name] = address
        return address

    def address(self, name: str) -> str:
        """HOST:PORT of a host's daemon."""
        return f"{self._hosts[name]}:{PORT}"

    def move(self, name: str) -> str:
        """The host takes another address, as after a new DHCP lease; connections are lost."""
        old = self._hosts[name]
        new = f"{NETWORK}.{int(old.rpartition('.')[2]) + 100}"
        # Connections of an address that is gone would send nothing, not even that they are closed.
        self._ask(
            "ip",
            host=name,
            lines=[
                f"addr del {old}/24 dev eth0",
                f"addr add {new}/24 dev eth0",
                "route replace 224.0.0.0/4 dev eth0",
            ],
        )
        self._hosts[name] = new
        return new

    def link(self, source: str, target: str, **changes: Any) -> None:
        """Change one direction between two hosts; the keywords are Link's."""
        self._connect([(source, target)], changes)

    def links(self, **changes: Any) -> None:
        """Change all links in both directions."""
        self._connect(permutations(self._hosts, 2), changes)

    def uplink(self, name: str, **changes: Any) -> None:
        """Change what one host sends and receives; a ``rate`` is shared by all it talks to."""
        for other in self._hosts.keys() - {name}:
            self._connect([(name, other)], {"queue": f"from {name}", **changes})
            self._connect([(other, name)], {"queue": f"to {name}", **changes})

    def cut(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Nothing passes between the two sets any more."""
        others = set(others)
        pairs = [(a, b) for a in some for b in others]
        self._connect([*pairs, *((b, a) for a, b in pairs)], {"cut": True})

    def heal(self) -> None:
        """Undo every cut."""
        self._connect([pair for pair, link in self._links.items() if link.cut], {"cut": False})

    def _connect(self, pairs: Iterable[tuple[str, str]], changes: Mapping[str, Any]) -> None:
        for pair in pairs:
            self._links[pair] = replace(self._links.get(pair, Link()), **changes)
            self._ask("link", pairs=[pair], **asdict(self._links[pair]))

    # --- what runs on hosts

    def start(self, host: str, command: Sequence[str], log: Path) -> Process:
        """Start a process on a host; what it says is appended to ``log``."""
        answer = self._ask("start", host=host, command=list(command), env=_env(), log=str(log))
        return Process(self._ask, answer["pid"])

    def start_daemon(self, host: str, arguments: Sequence[str], log: Path) -> Process:
        """Start ``deca-node`` with arguments; it does not wait for its imports (see server)."""
        answer = self._ask("fork", host=host, arguments=list(arguments), env=_env(), log=str(log))
        return Process(self._ask, answer["pid"])

    def small_disk(self, name: str, size: int) -> Path:
        """A new file system of ``size`` bytes; the folder, as processes on the hosts see it."""
        path = Path("/run/disks") / name
        self._ask("mount", path=str(path), size=size)
        return path

    def seen(self, path: Path) -> Path:
        """Where this process sees a path of the hosts' own file systems."""
        return Path(f"/proc/{self._server}/root") / path.relative_to("/")

    @functools.cached_property
    def _server(self) -> int:
        (child,) = psutil.Process(self._unshare.pid).children()
        return child.pid

    def status(self, host: str, shown: Credentials | None = None) -> pb.NodeStatus | None:
        """Status of the host's daemon, asked inside the host; None while it does not answer."""
        try:
            question = ask_status(f"unix:{self.seen(SOCKETS / host)}", STATUS_SECONDS, shown)
            return asyncio.run(question)
        except PeerError:
            return None


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


class LabDaemon(Daemon):
    """A daemon on a host of the laboratory, of the host's name, with a network of its own."""

    deadline = 300.0  # bad links take their time

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        name: str,
        settings: Sequence[str],
        keyring: Keyring | None = None,
    ) -> None:
        trust = f"trust.folder={keyring.folder}" if keyring else "trust.insecure=true"
        self._shown = Visitor(keyring).credentials() if keyring else None
        network = [
            trust,
            "node.host=0.0.0.0",
            f"node.port={PORT}",
            "network.interfaces=[]",
            "network.preset=lan",
        ]
        super().__init__(folder, name, [*network, *settings])
        self.lab = lab

    def start(self, *, anew: bool = False) -> "LabDaemon":
        """Start it; ``anew`` in an interpreter of its own, which takes seconds more."""
        arguments = ["start"]
        for setting in self.settings:
            arguments += ["--set", setting]
        if anew:
            command = [sys.executable, "-m", "deca_node", *arguments]
            self.process = self.lab.start(self.name, command, self.log)
        else:
            self.process = self.lab.start_daemon(self.name, arguments, self.log)
        return self

    def status(self) -> pb.NodeStatus | None:
        return self.lab.status(self.name, self._shown)


@functools.cache
def unavailable() -> str:
    """Why there can be no laboratory here; empty when there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are a feature of Linux"
    for command, package in (
        ("unshare", "util-linux"),
        ("mount", "util-linux"),
        ("ip", "iproute2"),
    ):
        if shutil.which(command) is None:
            return f"the command {command} is missing; install {package}"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with Lab() as lab:
            lab.host("trial")
    except LabError as error:
        return f"network namespaces or TAP devices are not allowed here: {error}"
    return ""
