"""The gateway's limits of one API key: calls at once, calls waiting, calls in the window; beyond them 429.

Source: https://api.navipartner.com/limits. Whether a refused call counts is not documented: here it does not.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque

from app.dev.sandbox.http import Receive, Refusal, disconnected
from app.dev.sandbox.settings import Settings


class KeyLimits:
    """The calls of one API key (upstream: of the Entra app behind it)."""

    def __init__(self) -> None:
        self.active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._times: deque[float] = deque()
        self.reset_counts()

    def reset_counts(self) -> None:
        """Reset the counts; calls under way and the sliding window stay."""
        self.most_active = self.active
        self.most_waiting = len(self._waiting)
        self.refused: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Return how many calls wait for a slot."""
        return len(self._waiting)

    def count(self, settings: Settings) -> None:
        """Count a call in the sliding window; raises Refusal (429) when the window is full."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - settings.window:
            self._times.popleft()
        if len(self._times) >= settings.requests:
            self.refused["window"] += 1
            raise Refusal(429, None, "Too Many Requests")
        self._times.append(now)

    async def acquire(self, settings: Settings, receive: Receive) -> bool:
        """Take a slot, waiting for one if needed; return False if the caller disconnects meanwhile.

        Raises Refusal (429) when the queue is full.
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
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({turn, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not turn.done():
                self._waiting.remove(turn)
        return turn.done()

    def release(self, settings: Settings) -> None:
        """Give the slot to the call that has waited longest."""
        self.active -= 1
        while self._waiting and self.active < settings.slots:
            self._take()
            self._waiting.popleft().set_result(None)

    def _take(self) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
