"""Waiting for an event, but not for ever; for work, until an event; an event that comes again."""

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


async def done_before(
    event: asyncio.Event,
    work: "asyncio.Future[Any]",
    *,
    end: bool,
    within: float | None = None,
    grace: float = 0.0,
) -> bool:
    """Whether work is done before an event is set; its result, or error, is the caller's to take.

    Args:
        event: is waited for no more when this returns or is cancelled.
        work: a task or another future.
        end: cancel work that is not done by then, and wait until it has ended; else it goes on with
            nobody waiting for it.
        within: seconds after which neither is waited for.
        grace: seconds that the work has left when it is not done by then.
    """
    happened = asyncio.create_task(event.wait())
    either: set[asyncio.Future[Any]] = {work, happened}
    try:
        await asyncio.wait(either, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        if grace and not work.done():
            await asyncio.wait({work}, timeout=grace)
        return work.done()
    finally:
        over = either if end else {happened}
        for each in over:
            each.cancel()
        await asyncio.gather(*over, return_exceptions=True)


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
