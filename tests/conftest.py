"""What every test gets."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from deca_node import logs

SLOW_TIMEOUT = 1800.0  # s; the demo takes up to 12 minutes beside other tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked slow or long may take minutes."""
    for item in items:
        minutes = item.get_closest_marker("slow") or item.get_closest_marker("long")
        if minutes and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched: Any) -> None:
    """A test that took its worker with it has failed; xdist would begin its file with it again."""
    for unit in sched.workqueue.values():
        if crashitem in unit:
            unit[crashitem] = True


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A verb that ran in this process has set up its logging."""
    root, own = logging.getLogger(), logging.getLogger("deca_node")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    logs._bound.clear()
