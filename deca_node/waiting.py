"""Waiting for an event, but not for ever."""

import asyncio


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
