"""A run's curves as TensorBoard event files; the only file that imports tensorboardX.

Not its SummaryWriter: that hands events to a thread which a full disk ends, after which the next
ones are waited for without end. Here a step's trouble is the caller's to hear of.
"""

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from deca_node.disk import make_folder, translated
from deca_node.errors import ConfigError

# A flush waits for the disk; TensorBoard looks for news every 30 s.
FLUSH_SECONDS = 30.0


def scalars(row: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, float]:
    """A step's values by TensorBoard tag.

    Args:
        row: as in history.jsonl (record.history_line); a value that is none is left out.
        weights: w_ij by neighbour.
    """
    values = {
        "loss": row["loss"],
        "norm/gradient": row["gradient_norm"],
        "norm/h": row["h_norm"],
        "discrepancy": row["discrepancy"],
        "disagreement": row["disagreement"],
        f"disagreement_by_block/{row['block']:03}": row["disagreement"],
        "schedule/block": row["block"],
        "schedule/round": row["round"],
        "bytes/sent": row["bytes_sent"],
        "bytes/received": row["bytes_received"],
        **{
            f"seconds/{name}": row[f"seconds_{name}"]
            for name in ("step", "gradient", "update", "ahead", "wait", "mix", "exposed")
        },
        **{f"weight/{peer}": weight for peer, weight in weights.items()},
        **{f"wait/{peer}": edge["wait"] for peer, edge in row["edges"].items()},
    }
    return {tag: float(value) for tag, value in values.items() if value is not None}


def tensorboardx() -> tuple[Any, Any, Any]:
    """What writes events, and the modules of their messages.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter  # noqa: PLC0415 - an extra
        from tensorboardX.proto import event_pb2, summary_pb2  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "tensorboard.folder needs tensorboardX; pip install 'deca-node[tensorboard]', or "
            "remove the setting"
        ) from None
    return EventsWriter, event_pb2, summary_pb2


def _in_place(folder: Path) -> AbstractContextManager[None]:
    return translated(folder, "set tensorboard.folder to another folder")


class Scalars:
    """An event file that grows by a step at a time.

    Args:
        folder: made if need be; each start adds a file.
        first_serial: of the first step to come. TensorBoard then forgets the steps from there on
            that an earlier life wrote, since they are done again.

    Raises:
        ConfigError: tensorboardX is not installed.
        DiskFullError, OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_serial: int) -> None:
        writer, event_pb2, self._summary = tensorboardx()
        self._event, self._folder = event_pb2, folder
        with _in_place(folder):
            make_folder(folder)
            # The process's number, too: a second start within a second must not truncate the file.
            self._writer: Any = writer(str(folder / "events"), f".{os.getpid()}")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            event = event_pb2.Event(wall_time=time.time(), step=first_serial, session_log=start)
            self._writer.write_event(event)
            self._writer.flush()
        self._flushed = time.monotonic()

    def write(self, serial: int, values: Mapping[str, float]) -> None:
        """Add a step's values.

        Raises:
            DiskFullError, OutputError: they could not be written.
        """
        value = self._summary.Summary.Value
        summary = self._summary.Summary(
            value=[value(tag=tag, simple_value=number) for tag, number in values.items()]
        )
        event = self._event.Event(wall_time=time.time(), step=serial, summary=summary)
        with _in_place(self._folder):
            self._writer.write_event(event)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Close the file.

        Raises:
            DiskFullError, OutputError: its end could not be written.
        """
        with _in_place(self._folder):
            self._writer.close()
