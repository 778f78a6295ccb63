"""Something that happens again and again, and who waits for it."""

import asyncio

from deca_node.waiting import Pulse


async def test_a_beat_before_a_waiting_task_begins_is_not_lost():
    """As when the loop already holds a stop signal at the moment that the task is made."""
    pulse = Pulse()
    asyncio.get_running_loop().call_soon(pulse.beat)
    async with asyncio.timeout(10):
        await asyncio.create_task(pulse.wait())


async def test_who_comes_after_a_beat_waits_for_the_next():
    pulse = Pulse()
    pulse.beat()
    waiting = asyncio.create_task(pulse.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    pulse.beat()
    await waiting
