"""A time-out that can be set and lifted again and again, and counts from when it was first set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `missed` when it was set and not lifted for `seconds`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, missed: Callable[[], None]) -> None:
        self._loop = loop
        self._missed = missed
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Start counting, unless it counts already."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._over)

    def lift(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _over(self) -> None:
        self._timer = None
        self._missed()
