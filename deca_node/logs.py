"""Logging, set up once: lines for people on a terminal, JSON lines for everything else.

Logs go to stderr. The program's own lines and those of its libraries take one path, through one
handler, so a reader never meets two formats.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from rich.console import Console
from rich.text import Text

from deca_node.events import printable
from deca_node.limits import MAX_SHOWN_CHARACTERS

# A progress bar must be drawn on this console: then lines appear above it, not through it.
console = Console(stderr=True)

_FIRST = ("time", "level", "event", "node", "run", "round", "block", "step")
# A daemon is one node, so what is bound holds for the whole process. Context variables would not
# do: a task or thread that began before the first visit would never name a round.
_bound: dict[str, Any] = {}


def bind(**values: Any) -> None:
    """Put values (node, run, round, block, step) on every line from now on; later ones win."""
    _bound.update(values)


def configure(*, human: bool, verbose: bool = False) -> None:
    """Set up the logging of this process; calling it again replaces the earlier set-up.

    Args:
        human: short coloured lines rather than JSON.
        verbose: also debug lines, one a step.
    """
    common: list[structlog.typing.Processor] = [
        _add_bound,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("%H:%M:%S", utc=False, key="time")
        if human
        else structlog.processors.TimeStamper("iso", utc=True, key="time"),
    ]
    render: list[structlog.typing.Processor] = (
        [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=console.is_terminal,
                pad_event_to=28,
                sort_keys=False,
                timestamp_key="time",
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if human
        else [
            structlog.processors.format_exc_info,
            _in_order,
            structlog.processors.JSONRenderer(),
        ]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        foreign_pre_chain=[*common, structlog.stdlib.ExtraAdder()],
    )
    handler = _ConsoleHandler() if human else _StderrHandler()
    handler.setFormatter(formatter)

    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("deca_node").setLevel(level)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_logger_of,
        cache_logger_on_first_use=False,  # module-level loggers outlive a second configure
    )


def _logger_of(*names: Any) -> logging.Logger:
    """Without a name the program's own, whatever module asks."""
    return logging.getLogger(names[0] if names else "deca_node")


def _add_bound(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name, value in _bound.items():
        event.setdefault(name, value)
    return event


def _printable(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Values may be what a peer has said: none of their letters is for the terminal to obey.

    JSON escapes them by itself.
    """
    for name, value in event.items():
        if isinstance(value, str) and name not in ("event", "exception", "stack"):
            event[name] = printable(value, MAX_SHOWN_CHARACTERS)
    return event


def _in_order(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {name: event[name] for name in _FIRST if name in event} | dict(event)


class _ConsoleHandler(logging.Handler):
    """Prints lines above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(Text.from_ansi(self.format(record)), soft_wrap=True)
        except Exception:  # noqa: BLE001 - a log line must not end what it reports on
            self.handleError(record)


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001
            self.handleError(record)
