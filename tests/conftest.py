"""What every test gets."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from deca_node import logs

SLOW_TIMEOUT = 1800.0  # s; the demo takes up to 12 minutes beside other tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked slow or long may take minutes."""
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


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
    logs.unbind()
