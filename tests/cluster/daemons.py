"""Real `deca-node start` daemons on this machine, for tests."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from deca_node.errors import PeerTimeout, PeerUnavailable
from deca_node.guard import Visitor
from deca_node.keyring import Keyring
from deca_node.pb import node_pb2 as pb
from deca_node.registry import local_nodes
from deca_node.transport.client import ask_status
from tests import warm

DEADLINE = 240.0  # a bound on failure; nothing waits this long when all is well


class Daemon:
    """One daemon, its folder and its log."""

    deadline = DEADLINE

    def __init__(self, folder: Path, name: str, settings: Sequence[str]) -> None:
        self.folder, self.name = folder, name
        self.output = folder / name
        self.log = folder / f"{name}.log"
        self.settings = [
            f"node.name={name}",
            "node.host=127.0.0.1",
            "node.port=0",
            "node.threads=1",
            f"node.output={self.output}",
            'network.interfaces=["127.0.0.1"]',
            "network.preset=local",
            *settings,
        ]
        self.run_name = next(s for s in settings if s.startswith("run.name=")).partition("=")[2]
        self.process: warm.Process | None = None

    def start(self) -> "Daemon":
        options = [word for setting in self.settings for word in ("--set", setting)]
        self.process = warm.start(["start", *options], os.environ, self.log)
        return self

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(self.deadline)

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    def events(self) -> list[dict]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def history(self) -> list[dict]:
        path = self.output / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())

    def status(self) -> pb.NodeStatus | None:
        """The status, or None while it does not answer yet."""
        for entry in local_nodes():
            if (entry.run, entry.node) == (self.run_name, self.name):
                shown = Visitor(Keyring(Path(entry.trust))).credentials() if entry.trust else None
                try:
                    return asyncio.run(ask_status(entry.address, 5, shown))
                except (PeerTimeout, PeerUnavailable):  # a busy machine
                    return None
        return None

    def until(self, reached) -> pb.NodeStatus:
        """Ask again and again until the status satisfies a condition."""
        limit = time.monotonic() + self.deadline
        while time.monotonic() < limit:
            assert self.process is not None
            assert self.process.poll() is None, (
                f"{self.name} ended:\n{self.log.read_text()[-3000:]}"
            )
            status = self.status()
            if status is not None and reached(status):
                return status
            time.sleep(0.05)  # between two questions to another process
        raise AssertionError(f"{self.name} never got there:\n{self.log.read_text()[-3000:]}")


def end_all(daemons: Sequence[Daemon]) -> None:
    """Leave none of them behind, whatever the test did."""
    for daemon in daemons:
        if daemon.process:
            daemon.end(signal.SIGKILL)
            daemon.process.wait()
