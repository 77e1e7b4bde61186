"""Makes and feeds the plans of replays that were made or resumed on the ops page, for as long as its process runs.

After a restart, however the process ended, it goes on with the plans that it finds. Several processes share a plan: no
order is fed twice, and its rate is kept (app/replay.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from threading import Event, Thread
from typing import Final

from app import log
from app.ledger.redis import Redis, retry_until
from app.replay import Plan, Plans

LOOK_EVERY: Final = 1.0
"""Seconds between two looks for plans: a reader who has made one sees it begin."""

AFTER_ERROR: Final = 30.0
"""Seconds until what failed with an internal error is tried again."""

_log = log.get()


class Feeder:
    """Feeds each plan in a thread of its own; while Redis is away it waits.

    The threads end with the process, at any instruction, which harms no plan. `connect` opens a client: one that finds
    Redis away closes its connections, so no two threads share one.
    """

    def __init__(self, connect: Callable[[], Redis], *, event_days: int) -> None:
        self._connect = connect
        self._event_days = event_days
        self._threads: dict[str, Thread] = {}
        self._stopped = Event()

    def start(self) -> None:
        """Begin, in threads that do not keep the process alive."""
        self._stopped.clear()
        Thread(target=self._look, name="plans", daemon=True).start()

    def stop(self) -> None:
        """End soon: each thread ends with its next step."""
        self._stopped.set()

    def _look(self) -> None:
        with self._connect() as redis:
            plans = Plans(redis, event_days=self._event_days)
            while not self._stopped.is_set():
                self._attempt("plans", partial(retry_until, redis, inf, partial(self._start_new, plans)))
                self._stopped.wait(LOOK_EVERY)

    def _start_new(self, plans: Plans) -> None:
        self._threads = {plan_id: one for plan_id, one in self._threads.items() if one.is_alive()}
        for plan in plans.of_ops():
            if plan.id not in self._threads:
                thread = Thread(target=self._attempt, args=(plan.id, partial(self._feed, plan)), daemon=True)
                self._threads[plan.id] = thread
                thread.start()

    def _feed(self, plan: Plan) -> None:
        with self._connect() as redis:
            plans = Plans(redis, event_days=self._event_days)
            retry_until(redis, inf, partial(self._run, plans, plan))

    def _run(self, plans: Plans, plan: Plan) -> None:
        for _ in plans.run(plan):
            if self._stopped.is_set():
                return

    def _attempt(self, what: str, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            _log.error("replay.failed", what=what, error=type(error).__name__, trace=log.trace_of(error))
            self._stopped.wait(AFTER_ERROR)
