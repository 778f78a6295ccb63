"""Waiting for an event, but not for ever; an event that comes again."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal


async def happens(event: asyncio.Event, within: float) -> bool:
    """Whether the event is set within so many seconds.

    Not ``asyncio.wait_for``: before Python 3.12 that loses a cancellation which comes at the
    moment the event is set, and a task that was told to end goes on for ever.
    """
    try:
        async with asyncio.timeout(within):
            await event.wait()
    except TimeoutError:
        return False
    return True


class Pulse:
    """Something that happens again and again: who waits is woken the next time."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def beat(self) -> None:
        """It happens now."""
        self._next.set()
        self._next = asyncio.Event()

    def wait(self) -> Coroutine[Any, Any, Literal[True]]:
        """Returns the next time after this call, even where a task begins to await it later."""
        return self._next.wait()

    async def comes(self, within: float) -> bool:
        """Whether it happens within so many seconds."""
        return await happens(self._next, within)
