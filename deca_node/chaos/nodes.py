"""A node under faults: its process, and what its folder tells of it and must not lose."""

import contextlib
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deca_node import registry
from deca_node.config import Settings
from deca_node.errors import OutputError, SwarmError
from deca_node.faults import Fault
from deca_node.relay import Relay
from deca_node.testbed import processes
from deca_node.trail import Holding, Position, Trail, place, read_kept, resumed_at


@dataclass
class Restart:
    """A node's way back; seconds from its start to its next step, None when hurt before."""

    at: float
    node: str
    after: str
    kept: Position
    resumed: Position | None = None
    recovery_seconds: float | None = None


@dataclass
class Node:
    """A node of the disturbed run.

    Attributes:
        quiet_since: when it made its last step, or was healed; None before its first step since
            its last start.
        restart: its way back, until it is back.
        spared: it was hurt on its way back, and is left alone until it has made a step.
        read_log_from: where its log began at its last start; None when its beginning is known.
    """

    settings: Settings
    relay: Relay
    trail: Trail
    process: subprocess.Popen[bytes] | None = None
    port: int | None = None
    fault: Fault | None = None
    heal_at: float = 0.0
    started_at: float = 0.0
    quiet_since: float | None = None
    restart: Restart | None = None
    spared: bool = False
    read_log_from: int | None = None
    kept: Holding = field(default_factory=Holding)
    finished: bool = False

    @property
    def name(self) -> str:
        """Its name in the run."""
        return self.settings.node.name

    @property
    def log(self) -> Path:
        """Where its process writes."""
        return processes.log_of(self.settings)

    @property
    def steps_done(self) -> int:
        """Where in the schedule it is, counted in steps."""
        visit, step = self.trail.position
        return visit * self.settings.schedule.steps + step + 1

    def start(self, now: float) -> None:
        """Start its process."""
        with self.log.open("ab") as log:
            self.read_log_from = log.tell()
            self.process = processes.spawn(self.settings, log)
        self.started_at = now

    def reap(self) -> int | None:
        """The exit code of a process that has ended and was not reaped before."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process, self.port, self.quiet_since, self.restart = None, None, None, None
        self.read_log_from = None
        return code

    def check_kept(self) -> None:
        """What it had kept is still there when it is dead.

        Raises:
            SwarmError: it is not.
        """
        try:
            kept = read_kept(self.settings.node.output)
        except OutputError as error:
            raise SwarmError(f"{self.name} lost a state: {error}") from None
        gone = kept.lacks(self.kept)
        if kept.position < self.trail.kept:
            gone = place(self.trail.kept)
        if gone:
            raise SwarmError(
                f"{self.name} lost a state: it holds {place(kept.position)}, but had kept {gone}"
            )
        self.kept = kept

    def check_beginning(self) -> None:
        """When it starts again it begins where it had kept its state, or later.

        Raises:
            SwarmError: it begins earlier.
        """
        if self.read_log_from is None:
            return
        resumed = resumed_at(self.log, self.read_log_from)
        if resumed is None:
            return
        self.read_log_from = None
        if resumed < self.kept.position:
            raise SwarmError(
                f"{self.name} lost a state: it began again at {place(resumed)}, but had kept"
                f" {place(self.kept.position)}; see {self.log}"
            )
        if self.restart is not None:
            self.restart.resumed = resumed

    def listens_at(self) -> int | None:
        """The port that it listens on now."""
        if self.process is None:
            return None
        if self.port is None:
            pid = self.process.pid
            entry = next((one for one in registry.local_nodes() if one.pid == pid), None)
            self.port = int(entry.address.rpartition(":")[2]) if entry else None
        return self.port

    def calls_from(self, port: int) -> bool:
        """Whether a local port is its own."""
        if self.process is None:
            return False
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(self.process.pid).net_connections("tcp4")
            return any(one.laddr and one.laddr.port == port for one in connections)
        return False
