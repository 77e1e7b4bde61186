"""A short way to tell a story to the ledger: for scenarios with a name, step by step and by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from redis import Redis

from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger import keys, policy
from app.ledger.ledger import Ledger
from app.ledger.rq_jobs import LIVE, queue_key
from app.ledger.work import Delivery, DeliveryOutcome, FailOutcome, Failure, Fetch, StartOutcome, StoreOutcome
from tests.integration.ledger_model.parts import LEASE, Clock, awaited, content_of, event_of

ONE: Final = OrderKey("aaaaaaaa-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000001")
SAME_ID: Final = OrderKey("bbbbbbbb-0000-4000-8000-000000000002", ONE.order_id)


@contextmanager
def staged(redis: Redis, *sinks: str) -> Iterator[Stage]:
    """Open a stage with these sinks."""
    with asyncio.Runner() as runner:
        yield Stage(redis, runner.get_loop(), sinks)


class Stage:
    """The ledger, the inbox, and a clock that goes on when the story says so.

    Who is not named is the order ONE and the worker `w`.
    """

    def __init__(self, redis: Redis, loop: asyncio.AbstractEventLoop, sinks: Sequence[str] = ()) -> None:
        self.redis, self.clock = redis, Clock()
        self.ledger = Ledger(redis, order_days=400, fetch_lease=LEASE, sinks=sinks, clock=self.clock)
        self._inbox = Inbox(awaited(redis), dedup_days=7, event_days=90, clock=self.clock)
        self._loop = loop
        self._settled = 0

    @property
    def now(self) -> int:
        return self.clock.now

    def later(self, seconds: float) -> None:
        self.clock.now += round(seconds * 1000)

    def settle(self, order: OrderKey = ONE) -> str:
        """Let a new settlement be accepted; return what became of it: queued, coalesced."""
        self._settled += 1
        return self.hear(f"2026-11-22T10:00:00.{self._settled:07}Z", order)

    def hear(self, sent: str, order: OrderKey = ONE) -> str:
        """Accept an event with this timestamp; return queued, coalesced, duplicate or erased."""
        recorded = self._loop.run_until_complete(self._inbox.accept([event_of(order, sent)]))
        outcomes = {
            "queued": recorded.queued,
            "coalesced": recorded.coalesced,
            "duplicate": recorded.duplicates,
            "erased": recorded.erased,
        }
        (outcome,) = [name for name, count in outcomes.items() if count]
        return outcome

    def hear_at_once(self, *events: tuple[OrderKey, str]) -> tuple[int, int, int]:
        """Accept the events of one POST; return how many were queued, coalesced, duplicates."""
        posted = [event_of(order, sent) for order, sent in events]
        recorded = self._loop.run_until_complete(self._inbox.accept(posted))
        return recorded.queued, recorded.coalesced, recorded.duplicates

    def record(self, *events: OrderProcessed) -> None:
        """Record events as the spool drains them."""
        self._loop.run_until_complete(self._inbox.accept(events))

    def request(self, order: OrderKey = ONE, queue: Literal["live", "backfill"] = "live") -> int:
        return self.ledger.request_fetch([order], queue=queue, reason="refetch")

    def start(self, worker: str = "w", order: OrderKey = ONE) -> StartOutcome:
        return self.ledger.start_fetch(order, worker)[0]

    def fetch(self, worker: str = "w", order: OrderKey = ONE) -> Fetch:
        """Start a fetch, and insist that a getOrder is what is due."""
        what, fetch = self.ledger.start_fetch(order, worker)
        assert fetch is not None, what
        return fetch

    def store(
        self,
        fetch: Fetch,
        version: int,
        worker: str = "w",
        order: OrderKey = ONE,
        *,
        recheck: float | None = None,
        give_up: str = "",
    ) -> StoreOutcome:
        """Store upstream's content of that version; `recheck` (seconds) marks it unsettled."""
        recheck_ms = None if recheck is None else round(recheck * 1000)
        content = content_of(version)
        return self.ledger.store_fetch(order, worker, fetch, content, recheck_ms=recheck_ms, give_up=give_up).what

    def fail(
        self, fetch: Fetch, outcome: Failure, worker: str = "w", order: OrderKey = ONE, *, wait: float = 5
    ) -> FailOutcome:
        return self.ledger.fail_fetch(
            order, worker, fetch, outcome=outcome, reason=f"reason_{outcome}", wait_ms=round(wait * 1000)
        )

    def bring(self, version: int, worker: str = "w", order: OrderKey = ONE) -> StoreOutcome:
        """Fetch and store upstream's content of that version."""
        return self.store(self.fetch(worker, order), version, worker, order)

    def acquire(self, worker: str = "w") -> Delivery | None:
        return self.ledger.acquire_delivery(ONE, worker)

    def complete(
        self, delivery: Delivery, outcome: DeliveryOutcome = "succeeded", worker: str = "w", *, wait: float = 5
    ) -> None:
        self.ledger.complete_delivery(
            ONE, worker, delivery, outcome=outcome, reason="reason", wait_ms=round(wait * 1000)
        )

    def dispatch(self) -> int:
        """Return how many jobs were enqueued."""
        return self.ledger.dispatch_due().enqueued

    def waiting(self, queue: str = LIVE) -> int:
        """Return how many jobs wait in the queue."""
        return self.redis.llen(queue_key(queue))

    def field(self, name: str, order: OrderKey = ONE) -> str | None:
        value = self.redis.hget(keys.record(order), name)
        return value.decode() if isinstance(value, bytes) else value

    def due_in(self, order: OrderKey = ONE) -> float | None:
        """Return the seconds until somebody must look at the order, None when nobody need."""
        score = self.redis.zscore(keys.DUE, order.member)
        return None if score is None else (score - self.now) / 1000

    def is_dead(self, order: OrderKey = ONE) -> bool:
        return self.redis.zscore(keys.DEAD, order.member) is not None

    def days_kept(self, order: OrderKey = ONE) -> set[float | None]:
        """Return the days until each key of the order ends, None for one without an end."""
        names = (keys.record(order), keys.history(order), keys.content(order))
        left = [self.redis.pttl(name) for name in names if self.redis.exists(name)]
        return {None if ms == -1 else round(ms / policy.DAY, 2) for ms in left}
