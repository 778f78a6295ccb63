"""What an operator tells a running node, and what it says to that."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deca_node import access
from deca_node.errors import ControlError, OutputError, PeerError, UnreachableError
from deca_node.events import printable
from deca_node.limits import MAX_SHOWN_CHARACTERS
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink

TELL_SECONDS = 10.0
# A step may take minutes, and a model is written after all of it was read.
SAVE_SECONDS = 1800.0


@dataclass(frozen=True)
class Order:
    """A call of the service Control.

    Attributes:
        call: its name.
        request: what goes with it.
        said: the reply, in words.
        seconds: until it is given up.
    """

    call: str
    request: Any
    said: Callable[[Any], str]
    seconds: float = TELL_SECONDS


ORDERS = {
    "pause": Order(
        "Pause",
        pb.PauseRequest(),
        lambda r: "already paused, or about to" if r.already else "pauses after the step under way",
    ),
    "resume": Order(
        "Resume",
        pb.ResumeRequest(),
        lambda r: "was not paused" if r.already else "takes part again",
    ),
    "checkpoint": Order(
        "Checkpoint",
        pb.CheckpointRequest(),
        lambda r: f"saved at block visit {r.visit + 1}, {r.step} steps done in it",
        SAVE_SECONDS,
    ),
    "stop": Order("Stop", pb.StopRequest(), lambda r: f"stops: process {r.pid}"),
}


def export(name: str, *, consensus: bool = False) -> Order:
    """To write the model into OUTPUT/exports/NAME."""
    return Order(
        "Export",
        pb.ExportRequest(name=name, consensus=consensus),
        lambda r: f"wrote {r.path} on the node's machine: {r.model}",
        SAVE_SECONDS,
    )


async def tell(address: str, trust: Path | None, order: Order) -> str:
    """Make the call; what the node says.

    Raises:
        UnreachableError: nobody answers, or not in time.
        ControlError: the node refuses, or answers in plain text.
        OutputError: what was to be written is there already, or could not be.
        TrustError: there is no certificate to show here.
    """
    shown = await access.credentials([address], trust)
    link = GrpcLink(address, credentials=shown.get(address))
    verb = order.call.lower()
    try:
        if access.is_plain(address, shown):
            await link.get_status(TELL_SECONDS)  # that nobody is there is another error
            raise ControlError(
                f"{verb} refused: {address} answers in plain text, where anyone on the network "
                "path could answer for it; type it on the node's machine, which has its socket "
                "file, or give the trust folder with the operator's certificate (--trust)"
            )
        said = order.said(await link.control(order.call, order.request, order.seconds))
        return printable(said, MAX_SHOWN_CHARACTERS)
    except PeerError as error:
        if error.reason in ("unavailable", "late"):
            raise UnreachableError(f"no deca-node answers at {error}") from None
        if error.reason in ("exists", "failed", "not_saved"):
            raise OutputError(str(error)) from None
        raise ControlError(f"{verb} refused by {error}") from None
    finally:
        await link.close()
