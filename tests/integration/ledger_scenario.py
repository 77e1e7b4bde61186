"""The ledger and the inbox over a real Redis, under a clock of the test: one order step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox, Recorded
from app.ledger import keys, policy
from app.ledger.ledger import Ledger
from app.ledger.rq_jobs import LIVE, queue_key
from app.ledger.work import Content, Delivery, DeliveryOutcome, FailOutcome, Failure, Fetch, StartOutcome, StoreOutcome

START: Final = 1_700_000_000_000
LEASE: Final = 60 * policy.SECOND
ONE: Final = OrderKey("aaaaaaaa-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000001")
SAME_ID: Final = OrderKey("bbbbbbbb-0000-4000-8000-000000000002", ONE.order_id)


class Scenario:
    """The default order is ONE and the default worker `w`. `now` is in ms and changes only when the test changes it."""

    def __init__(self, redis: Redis, loop: asyncio.AbstractEventLoop, sinks: Sequence[str] = ()) -> None:
        self.redis, self.sinks, self.now = redis, tuple(sinks), START
        self.ledger = Ledger(redis, order_days=400, fetch_lease=LEASE, sinks=sinks, clock=self.clock)
        # One connection for both, so that all steps have one order.
        inbox_redis = cast("AsyncRedis", _AsyncScripts(redis))
        self._inbox = Inbox(inbox_redis, dedup_days=7, event_days=90, clock=self.clock)
        self._loop = loop
        self._settlements = 0

    def clock(self) -> int:
        return self.now

    def later(self, seconds: float) -> None:
        self.now += round(seconds * 1000)

    # The intake and requests.

    def settle(self, order: OrderKey = ONE) -> str:
        """Accept the event of a new settlement; return its outcome, as `accept` does."""
        self._settlements += 1
        return self.accept(f"2026-11-22T10:00:00.{self._settlements:07}Z", order)

    def accept(self, timestamp: str, order: OrderKey = ONE) -> str:
        """Accept an event; return its outcome: queued, coalesced, duplicate or erased."""
        recorded = self.accept_batch(event_of(order, timestamp))
        outcomes = {
            "queued": recorded.queued,
            "coalesced": recorded.coalesced,
            "duplicate": recorded.duplicates,
            "erased": recorded.erased,
        }
        (outcome,) = [name for name, count in outcomes.items() if count]
        return outcome

    def accept_batch(self, *events: OrderProcessed) -> Recorded:
        """Accept the events of one POST, or of the spool."""
        return self._loop.run_until_complete(self._inbox.accept(events))

    def request(self, order: OrderKey = ONE, queue: Literal["live", "backfill"] = "live") -> int:
        return self.ledger.request_fetch([order], queue=queue, reason="refetch")

    # Workers and the dispatcher.

    def start(self, worker: str = "w", order: OrderKey = ONE) -> StartOutcome:
        return self.ledger.start_fetch(order, worker)[0]

    def fetch(self, worker: str = "w", order: OrderKey = ONE) -> Fetch:
        """Start a fetch; raises AssertionError unless the order needs a getOrder now."""
        outcome, fetch = self.ledger.start_fetch(order, worker)
        assert fetch is not None, outcome
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

    def fetch_and_store(self, version: int, worker: str = "w", order: OrderKey = ONE) -> StoreOutcome:
        return self.store(self.fetch(worker, order), version, worker, order)

    def acquire(self, worker: str = "w") -> Delivery | None:
        return self.ledger.acquire_delivery(ONE, worker)

    def delivery(self, worker: str = "w") -> Delivery:
        """Acquire a delivery; raises AssertionError unless one is due."""
        delivery = self.acquire(worker)
        assert delivery is not None
        return delivery

    def complete(
        self, delivery: Delivery, outcome: DeliveryOutcome = "succeeded", worker: str = "w", *, wait: float = 5
    ) -> None:
        self.ledger.complete_delivery(
            ONE, worker, delivery, outcome=outcome, reason="reason", wait_ms=round(wait * 1000)
        )

    def deliver(self, outcome: DeliveryOutcome = "succeeded", worker: str = "w", *, wait: float = 5) -> Delivery:
        """Acquire a delivery and complete it with this outcome."""
        delivery = self.delivery(worker)
        self.complete(delivery, outcome, worker, wait=wait)
        return delivery

    def dispatch(self) -> int:
        """Return how many jobs were enqueued."""
        return self.ledger.dispatch_due().enqueued

    # What Redis holds.

    def waiting(self, queue: str = LIVE) -> int:
        """Return how many jobs wait in the queue."""
        return self.redis.llen(queue_key(queue))

    def field(self, name: str, order: OrderKey = ONE) -> str | None:
        value = self.redis.hget(keys.record(order), name)
        return value.decode() if isinstance(value, bytes) else value

    def fields(self, *names: str) -> list[str | None]:
        return [self.field(name) for name in names]

    def due_in(self, order: OrderKey = ONE) -> float | None:
        """Return the seconds until the order is due, None if it is not in `due`."""
        score = self.redis.zscore(keys.DUE, order.member)
        return None if score is None else (score - self.now) / 1000

    def is_dead(self, order: OrderKey = ONE) -> bool:
        return self.redis.zscore(keys.DEAD, order.member) is not None

    def days_kept(self, order: OrderKey = ONE) -> set[float | None]:
        """Return the days until each key of the order expires, None for one that does not expire."""
        names = (keys.record(order), keys.history(order), keys.content(order))
        left = [self.redis.pttl(name) for name in names if self.redis.exists(name)]
        return {None if ms == -1 else round(ms / policy.DAY, 2) for ms in left}


class _AsyncScripts:
    """What Inbox uses of its async client, over a synchronous one."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def register_script(self, text: str) -> Callable[..., Awaitable[Any]]:
        script = self._redis.register_script(text)

        async def call(args: Sequence[Any]) -> Any:
            return script(args=args)

        return call


@contextmanager
def open_scenario(redis: Redis, *sinks: str) -> Iterator[Scenario]:
    with asyncio.Runner() as runner:
        yield Scenario(redis, runner.get_loop(), sinks)


def event_of(order: OrderKey, timestamp: str) -> OrderProcessed:
    """Return an event of the order; `timestamp` is "" for none."""
    return OrderProcessed(
        company_id=order.company_id,
        order_id=order.order_id,
        status="Issued",
        reference="reference",
        timestamp=timestamp,
        secret="current",
    )


def content_of(version: int) -> Content:
    """Return upstream's answer while the order has this version."""
    return Content(
        raw=b"%d" % version,
        digest=str(version),
        status="Issued",
        wallets=1,
        tickets=1,
        coupons=0,
        manifest=True,
        http_status=200,
        duration_ms=1,
    )
