"""The gateway's limits for one API key: so many at once, so many waiting, so many in the window, else 429.

Source: https://api.navipartner.com/limits; how a refused call counts is not documented: here it does not.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque

from app.dev.sandbox.http import Receive, Refusal, hung_up
from app.dev.sandbox.settings import Settings


class Gate:
    """The calls of one API key (upstream: of the Entra app behind it)."""

    def __init__(self) -> None:
        self.active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._times: deque[float] = deque()
        self.forget()

    def forget(self) -> None:
        """Start counting anew; calls under way and the sliding window stay."""
        self.most_active = self.active
        self.most_waiting = len(self._waiting)
        self.refused: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Return how many calls wait for a slot."""
        return len(self._waiting)

    def count(self, settings: Settings) -> None:
        """Count a call in the sliding window; raises Refusal (429) when that is full."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - settings.window:
            self._times.popleft()
        if len(self._times) >= settings.requests:
            self.refused["window"] += 1
            raise Refusal(429, None, "Too Many Requests")
        self._times.append(now)

    async def enter(self, settings: Settings, receive: Receive) -> bool:
        """Take a slot, waiting for one if need be; False if the caller hung up meanwhile.

        Raises Refusal: 429 when the queue is full, 503 when waiting took too long.
        """
        if self.active < settings.slots and not self._waiting:
            self._take()
            return True
        if len(self._waiting) >= settings.queue:
            self.refused["queue"] += 1
            raise Refusal(429, None, "Too Many Requests")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        gone = asyncio.ensure_future(hung_up(receive))
        try:
            await asyncio.wait({turn, gone}, timeout=settings.queue_wait, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not turn.done():
                self._waiting.remove(turn)
        if turn.done():
            return True
        if gone.done():
            return False
        raise Refusal(503, None, "Service Unavailable")

    def leave(self, settings: Settings) -> None:
        """Give the slot back; the call that has waited longest takes it."""
        self.active -= 1
        while self._waiting and self.active < settings.slots:
            self._take()
            self._waiting.popleft().set_result(None)

    def _take(self) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
