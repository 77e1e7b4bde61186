"""The stranger who publishes: it sends until it is told 200, and remembers every event with both moments."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from threading import Event as Flag
from threading import Lock
from typing import Final

from tests.acceptance.strangers import System
from tests.chaos.plan import Batch, Event, Plan

SENDERS: Final = 4
_PAUSE: Final = 0.2
"""Seconds before the same POST is sent again."""


class Sender:
    """Sends the batches of a plan, each at its time or as soon after as a sender is free."""

    def __init__(self, system: System, plan: Plan) -> None:
        self._system = system
        self._batches = iter(plan.batches)
        self._lock = Lock()
        self._settling = Lock()
        self._stop = Flag()
        self._running: list[Future[None]] = []
        self._began = 0.0
        #: Unix seconds at which an event was first sent, and at which it was first answered 200.
        self.sent: dict[Event, float] = {}
        self.acknowledged: dict[Event, float] = {}
        #: What every POST was answered: the status, or the type of the error.
        self.answers: Counter[str] = Counter()

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send as long as the block lasts."""
        self._began = time.monotonic()
        with ThreadPoolExecutor(SENDERS) as threads:
            self._running = [threads.submit(self._send_all) for _ in range(SENDERS)]
            try:
                yield
            finally:
                self._stop.set()

    @property
    def busy(self) -> bool:
        """Return whether something is still to be sent; raises what a sender raised."""
        ended = [one for one in self._running if one.done()]
        for one in ended:
            one.result()
        return len(ended) < len(self._running)

    def _send_all(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                batch = next(self._batches, None)
            if batch is None:
                return
            self._stop.wait(self._began + batch.at - time.monotonic())
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        # One at a time: a repeat must not overtake the settlement that it announces.
        with self._settling:
            for event in batch.events:
                if event.forced and event not in self.sent:
                    self._settle(event)
                self.sent.setdefault(event, time.time())
        items = [self._system.event(event.order_id, event.status, timestamp=event.timestamp) for event in batch.events]
        while not self._stop.is_set():
            answer = self._post(items)
            with self._lock:
                self.answers[answer] += 1
            if answer == "200":
                now = time.time()
                for event in batch.events:
                    self.acknowledged.setdefault(event, now)
                return
            self._stop.wait(_PAUSE)

    def _settle(self, event: Event) -> None:
        wish = {"order_id": event.order_id, "company_id": self._system.company_id, "status": event.status}
        self._system.admin("POST", "settle", wish)

    def _post(self, items: list[dict[str, object]]) -> str:
        try:
            return str(self._system.post(*items)[0])
        except (OSError, HTTPException) as error:
            return type(getattr(error, "reason", None) or error).__name__
