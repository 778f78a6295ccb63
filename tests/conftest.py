"""What every test gets."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from deca_node import logs


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
