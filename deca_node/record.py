"""The run's record for people and scripts: history.jsonl and summary.json."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from deca_node.curve import Curve, Point
from deca_node.disk import in_output, write_atomically
from deca_node.errors import DecaError
from deca_node.rounds import StepRecord


class EdgeTraffic(NamedTuple):
    """What is known of an edge beside a step's exchange.

    Attributes:
        retries: calls that had to be made again since the last step with that peer.
        send_rate: bytes per second of blocks, a mean over the last seconds (swarm.traffic), and
            ``receive_rate`` likewise.
    """

    retries: int
    send_rate: float
    receive_rate: float


def history_line(
    record: StepRecord, bytes_sent: int, traffic: Mapping[str, EdgeTraffic]
) -> dict[str, Any]:
    """One step as a flat row. Seconds are wall time, bytes are those of this step.

    Args:
        record: of the step.
        bytes_sent: to all neighbours.
        traffic: by neighbour of the step.
    """
    gathered, seconds = record.gathered, record.seconds
    return {
        "round": record.visit.round,
        "position": record.visit.position,
        "block": record.visit.block,
        "step": record.step,
        "visit": record.visit.index,
        "loss": finite(record.local.loss),
        "gradient_norm": finite(record.local.gradient_norm),
        "h_norm": finite(record.settled.h_norm),
        "discrepancy": finite(record.settled.discrepancy),
        "disagreement": finite(record.settled.disagreement),
        "bytes_sent": bytes_sent,
        "bytes_received": gathered.received,
        "degree": record.edges.degree,
        "neighbours": sorted(gathered.used),
        "partial": sorted(gathered.partial),
        "missing": gathered.missing,
        **({"clipped": dict(record.settled.clipped)} if record.settled.clipped else {}),
        "edges": {
            peer: {
                "wait": round(edge.wait, 6),
                "received": edge.received,
                "sent": edge.sent,
                "retries": traffic[peer].retries,
                "send_rate": round(traffic[peer].send_rate),
                "receive_rate": round(traffic[peer].receive_rate),
            }
            for peer, edge in sorted(gathered.edges.items())
        },
        "seconds_gradient": round(seconds.gradient, 6),
        "seconds_update": round(seconds.step - seconds.gradient - seconds.swap, 6),
        "seconds_ahead": round(seconds.ahead, 6),
        "seconds_wait": round(gathered.wait - gathered.mix, 6),
        "seconds_mix": round(gathered.mix, 6),
        "seconds_exposed": round(gathered.exposed, 6),
        "seconds_step": round(seconds.step, 6),
    }


def _point(row: dict[str, Any], steps_per_visit: int) -> Point:
    """A line as a point of the curve."""
    serial = row["visit"] * steps_per_visit + row["step"]

    def value(name: str) -> float:
        found = row.get(name)
        return float(found) if isinstance(found, int | float) else math.nan

    return Point(
        serial,
        serial,
        value("loss"),
        value("gradient_norm"),
        value("h_norm"),
        value("disagreement"),
        value("seconds_step"),
    )


def finite(value: float) -> float | None:
    """JSON has no NaN: a loss that is none is null."""
    return value if math.isfinite(value) else None


def finite_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same of all numbers of a row."""
    return {
        name: finite(value) if isinstance(value, float) else value for name, value in row.items()
    }


class History:
    """history.jsonl, appended to step by step.

    A run that resumes takes back the lines from its starting point on, which it will do again.

    Args:
        path: the file.
        first_serial: the step that comes next.
        steps_per_visit: of the schedule.
        curve: gets a point for every line that is kept or appended.
    """

    def __init__(self, path: Path, first_serial: int, steps_per_visit: int, curve: Curve) -> None:
        self._path, self._steps, self._curve = path, steps_per_visit, curve
        with in_output(path):
            content, end = path.read_bytes() if path.exists() else b"", 0
            for line in io.BytesIO(content):
                try:
                    point = _point(json.loads(line), steps_per_visit)
                except (ValueError, KeyError, TypeError):
                    break  # a line torn by a crash, and whatever follows it
                if point.first >= first_serial or not line.endswith(b"\n"):
                    break
                curve.add(point)
                end += len(line)
            # A new file, so that whoever follows the old one sees that it is another.
            write_atomically(path, content[:end])
            self._file: IO[str] = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            DecaError: it could not be written.
        """
        self._curve.add(_point(row, self._steps))
        with in_output(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; what could not be written is lost and was reported."""
        try:
            with in_output(self._path):
                self._file.close()
        except DecaError:
            return


def read_summary(path: Path) -> dict[str, Any]:
    """What summary.json says; empty when there is none, or a damaged one."""
    with in_output(path):
        try:
            tree = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
    return tree if isinstance(tree, dict) else {}


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write summary.json in one piece."""
    with in_output(path):
        write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
