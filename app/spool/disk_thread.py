"""A thread for a disk that may hang: what must not wait goes first, and the process can end without it."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

FIRST: Final = 0
LATER: Final = 1

T = TypeVar("T")
_Task = tuple[int, int, Callable[[], None]]


class DiskThread:
    """One daemon thread: unlike an executor's it is not waited for when the process ends."""

    def __init__(self) -> None:
        self._tasks: queue.PriorityQueue[_Task] = queue.PriorityQueue()
        self._number = itertools.count()
        self._thread: threading.Thread | None = None

    async def run(self, priority: int, call: Callable[..., T], *arguments: object) -> T:
        """Return what the call returns; those of a lower `priority` go first, others in turn."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                value = call(*arguments)
            except BaseException as error:
                _tell(loop, answer, answer.set_exception, error)
            else:
                _tell(loop, answer, answer.set_result, value)

        self._tasks.put((priority, next(self._number), work))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="spool", daemon=True)
            self._thread.start()
        return await answer

    def _work(self) -> None:
        while True:
            self._tasks.get()[2]()


def _tell(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Any], tell: Callable[[Any], None], word: Any) -> None:
    def if_awaited() -> None:
        if not answer.done():
            tell(word)

    try:
        loop.call_soon_threadsafe(if_awaited)
    except RuntimeError:
        # The loop has ended: nobody waits for the disk any more.
        return
