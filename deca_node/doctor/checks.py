"""What checks find out, and what they come to."""

import contextlib
from dataclasses import dataclass
from enum import StrEnum

import torch

from deca_node import estimate
from deca_node.blocks import Schedule
from deca_node.compression import Format
from deca_node.config import Settings, has
from deca_node.errors import ConfigError, DecaError
from deca_node.fingerprint import fingerprint, schedule_for
from deca_node.guard import Guard
from deca_node.methods.choose import kept_arrivals, state_bytes
from deca_node.models import Outline, pick_dtype
from deca_node.pb import node_pb2 as pb


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what to do about it where something is to be done."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass
class Facts:
    """What the checks so far have found out about this machine's part of the run.

    Attributes:
        settings: the node's.
        device: where it would compute.
        model: its model, without the weights.
        weights: their digest, where it was computed.
        longest: tokens of the longest example.
        trained: trained tokens of an example, at most.
        added: parameters of the adapters that are trained, None without any.
        running: the status of the very node, where it runs on this machine.
        guard: whom it would believe, where it meets others under TLS.
    """

    settings: Settings
    device: torch.device | None = None
    model: Outline | None = None
    weights: str | None = None
    longest: int = 0
    trained: int = 0
    added: int | None = None
    running: pb.NodeStatus | None = None
    guard: Guard | None = None

    @property
    def dtype(self) -> str | None:
        """Precision of the frozen weights."""
        return pick_dtype(self.settings.model.dtype, self.device) if self.device else None

    @property
    def schedule(self) -> Schedule | None:
        """Blocks, rounds and steps."""
        if self.model is None:
            return None
        with contextlib.suppress(ConfigError):  # said by the check of the model
            return schedule_for(self.settings, len(self.model.shape.layers))
        return None

    def work(self) -> tuple[estimate.Shape, estimate.Work] | None:
        """What a step does, for the estimates; None where the model cannot be read."""
        if self.model is None or self.schedule is None:
            return None
        data = self.settings.data
        return self.model.shape, estimate.Work(
            blocks=self.schedule.blocks,
            element=4 if self.dtype == "fp32" else 2,
            batch=data.batch_size,
            tokens=self.longest or data.max_tokens,
            trained=self.trained or data.max_tokens,
            checkpointing=self.settings.model.gradient_checkpointing,
            sent=Format.named(self.settings.network.wire_format).value_bytes,
            neighbours=most_neighbours(self.settings),
            stale=self.settings.schedule.staleness == 1,
            added=self.added,
            state=state_bytes(self.settings),
            kept=kept_arrivals(self.settings, most_neighbours(self.settings)),
            merged=has(self.settings.run.method, "lora"),
        )

    def marks(self) -> dict[str, str]:
        """The run's fingerprint as far as it is known."""
        marks = fingerprint(
            self.settings,
            self.schedule or Schedule((), 0, 0, "ascending", 0),
            (self.model and self.model.config_digest) or "",
            self.weights or "",
            (self.model and self.model.tokenizer_digest) or "",
            self.dtype or "",
        )
        if self.schedule is None:
            marks = {name: mark for name, mark in marks.items() if "schedule." not in name}
        return {name: mark for name, mark in marks.items() if mark or "model." not in name}


def failed(name: str, error: DecaError) -> Check:
    """A check that ended in an error; by the errors' custom its remedy follows the semicolon."""
    found, _, remedy = " ".join(str(error).split()).partition("; ")
    return Check(name, Verdict.FAIL, found, remedy)


def most_neighbours(settings: Settings) -> int:
    """With how many this node exchanges at most, if the members are those that it waits for."""
    kind, others = settings.topology.kind, max(1, settings.run.start_when - 1)
    if kind == "explicit":
        return sum(settings.node.name in edge for edge in settings.topology.edges)
    return min(2, others) if kind == "ring" else others
