"""Something that happens again and again, and who waits for it; work, or an event before it."""

import asyncio

import pytest

from deca_node.waiting import Pulse, done_before
from tests.virtual_time import run


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


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(
    ("takes", "options", "done", "seconds"),
    [
        (3.0, {}, True, 3.0),
        (9.0, {}, False, 5.0),
        (9.0, {"grace": 1.0}, False, 6.0),
        (5.5, {"grace": 1.0}, True, 5.5),
        (9.0, {"within": 2.0}, False, 2.0),
    ],
)
def test_work_is_waited_for_until_an_event(takes, options, done, seconds, end):
    """Then it is ended, or goes on by itself; no task is left behind but that."""

    async def scenario():
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(5.0, event.set)
        work = asyncio.create_task(asyncio.sleep(takes, "result"))
        begin = loop.time()
        assert await done_before(event, work, end=end, **options) == done
        assert loop.time() - begin == pytest.approx(seconds)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert left == (set() if done or end else {work})
        assert work.cancelled() == (end and not done)

    run(scenario())


@pytest.mark.parametrize("end", [True, False])
def test_who_is_cancelled_in_it_leaves_no_waiting_task_behind(end):
    """But the work, where that is to go on."""

    async def scenario():
        work = asyncio.create_task(asyncio.sleep(9.0))
        waiting = asyncio.create_task(done_before(asyncio.Event(), work, end=end))
        await asyncio.sleep(1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert left == (set() if end else {work})

    run(scenario())
