"""The thread on which torch computes, while the event loop serves neighbours."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from deca_node import memory
from deca_node.waiting import done_before

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - says what happened, is no error
    """The node was told to end before its run was complete."""


async def unless_stopped(work: Awaitable[T], stopping: asyncio.Event, grace: float = 0.0) -> T:
    """The result of ``work``; once ``stopping`` is set it has ``grace`` seconds left.

    Raises:
        Stopped: it did not end in time, and goes on with nobody waiting for it.
    """
    result = asyncio.ensure_future(work)
    if not await done_before(stopping, result, end=False, grace=grace):
        raise Stopped
    return result.result()


class TrainingThread:
    """Runs one function after the other; a daemon, so that an abandoned one cannot hold the exit.

    An event loop must go on serving neighbours while torch computes.

    Attributes:
        device: where it computes, once that is known.
        is_busy: whether a function is running.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.is_busy = False
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, name="training", daemon=True).start()

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """See rounds.Worker.

        Raises:
            DeviceError: there was not enough memory for it.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.put((future, work))
        return future

    def _serve(self) -> None:
        while True:
            future, work = self._jobs.get()
            self.is_busy = True
            try:
                with memory.suffices(self.device):
                    result, error = work(), None
            except BaseException as raised:  # noqa: BLE001 - handed to whoever awaits it
                result, error = None, raised
            finally:
                self.is_busy = False
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_deliver, future, result, error)


def _deliver(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
