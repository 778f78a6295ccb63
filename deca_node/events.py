"""What happened to a node lately, in a bounded list: what its log says, less the routine.

Pure but for ``Heard``, which stands between the node and its log.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deca_node.limits import MAX_EVENTS, MAX_NAME_BYTES, MAX_REASON_BYTES


@dataclass(frozen=True)
class Event:
    """One thing that happened; ``at`` is in the node's seconds, ``peer`` whom it is about."""

    serial: int
    at: float
    kind: str
    text: str
    peer: str = ""


# The log's line, by its event: the kind, and what of the line's values is told. Lines that are not
# here are told when they are warnings.
_TOLD: Mapping[str, tuple[str, str]] = {
    "listening": ("started", "started, deca-node {version}"),
    "ready": ("ready", "ready at visit {visit}, step {step}"),
    "resuming": ("ready", "resumes at visit {visit}, step {step}"),
    "peer alive": ("joined", "joined"),
    "peer suspect": ("suspect", "suspect: {detail}"),
    "peer gone": ("gone", "gone: {detail}"),
    "peer done": ("finished", "has finished the run"),
    "peer behind": ("behind", "behind: {detail}"),
    "peer ahead": ("ahead", "ahead: {detail}"),
    "peer refused": ("refused", "refused: {reason} {detail}"),
    "refused": ("refused", "refused: {reason}: {detail}"),
    "members are here": ("ready", "{members}"),
    "catching up": ("catching up", "catching up from visit {visit}"),
    "caught up": ("caught up", "caught up, {megabytes} MB fetched, goes on at visit {visit}"),
    "resolved": ("resolved", "resolved: {finding}"),
    "agreeing": ("agreeing", "agreeing on one model"),
    "agreed": ("agreed", "agreed on one model in {rounds} rounds"),
    "not agreed": ("warning", "the nodes did not agree on one model"),
    "saved": ("saved", "saved its state at visit {visit}, step {step}"),
    "stopping": ("stopped", "stopping"),
    "finished": ("finished", "finished, model written"),
}
# Of these only the last in a row is kept.
_ROUTINE = frozenset({"saved"})


def describe(warned: bool, event: str, values: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Kind, text and peer of a line of the log; None when it is not worth telling.

    Args:
        warned: the line is a warning, or worse.
        event: the line's text.
        values: what stands beside it; nothing of it that the table does not name is told.
    """
    peer = str(values.get("peer", ""))[:MAX_NAME_BYTES]
    if event in _TOLD:
        kind, pattern = _TOLD[event]
        text = pattern.format_map(_Blank(values)).rstrip(": ")
    elif warned:
        kind, text = "warning", event
    else:
        return None
    return kind, printable(text), peer


class _Blank(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return ""


def printable(text: str, limit: int = MAX_REASON_BYTES) -> str:
    """A text as a part of one line, of bounded length."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in cut)


class Ring:
    """The latest events; older ones make way."""

    def __init__(self, limit: int = MAX_EVENTS) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._serial = 0

    def add(self, now: float, kind: str, text: str, peer: str = "") -> None:
        """Note an event."""
        if kind in _ROUTINE and self._events and self._events[-1].kind == kind:
            self._events.pop()
        self._serial += 1
        self._events.append(Event(self._serial, now, kind, text, peer))

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))


class Heard:
    """A structlog logger that also notes in a ring what is worth telling.

    Args:
        log: where everything goes.
        ring: where some of it goes as well.
        clock: the node's seconds.
    """

    def __init__(self, log: Any, ring: Ring, clock: Callable[[], float]) -> None:
        self._log, self._ring, self._clock = log, ring, clock

    def debug(self, event: str, **values: Any) -> None:
        """See structlog."""
        self._note(False, event, values)
        self._log.debug(event, **values)

    def info(self, event: str, **values: Any) -> None:
        """See structlog."""
        self._note(False, event, values)
        self._log.info(event, **values)

    def warning(self, event: str, **values: Any) -> None:
        """See structlog."""
        self._note(True, event, values)
        self._log.warning(event, **values)

    def error(self, event: str, **values: Any) -> None:
        """See structlog."""
        self._note(True, event, values)
        self._log.error(event, **values)

    def exception(self, event: str, **values: Any) -> None:
        """See structlog."""
        self._note(True, event, values)
        self._log.exception(event, **values)

    def _note(self, warned: bool, event: str, values: Mapping[str, Any]) -> None:
        told = describe(warned, event, values)
        if told is not None:
            self._ring.add(self._clock(), *told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)
