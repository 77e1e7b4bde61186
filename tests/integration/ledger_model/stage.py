"""A short way to tell a story to the ledger: for scenarios with a name, step by step and by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from redis import Redis

from app.ids import OrderKey
from app.intake.recorder import Entry, Inbox
from app.ledger import keys, policy
from app.ledger.ledger import Ledger
from app.ledger.rq_jobs import LIVE, queue_key
from app.ledger.work import Begun, Failed, Failure, Fetch, HandOn, Stored
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
        self.ledger = Ledger(redis, order_days=400, fetch_lease=LEASE, sinks=sinks)
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
        recorded = self._loop.run_until_complete(self._inbox.accept([event_of(order, sent)], "request"))
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
        recorded = self._loop.run_until_complete(self._inbox.accept(posted, "request"))
        return recorded.queued, recorded.coalesced, recorded.duplicates

    def record(self, *entries: Entry) -> None:
        """Record entries as the spool drains them."""
        self._loop.run_until_complete(self._inbox.record(entries))

    def want(self, order: OrderKey = ONE, queue: Literal["live", "backfill"] = "live") -> int:
        return self.ledger.want([order], self.now, queue=queue, why="refetch")

    def begin(self, worker: str = "w", order: OrderKey = ONE) -> Begun:
        return self.ledger.begin(order, worker, self.now)[0]

    def fetch(self, worker: str = "w", order: OrderKey = ONE) -> Fetch:
        """Begin, and insist that a getOrder is what is due."""
        what, fetch = self.ledger.begin(order, worker, self.now)
        assert fetch is not None, what
        return fetch

    def store(
        self,
        fetch: Fetch,
        version: int,
        worker: str = "w",
        order: OrderKey = ONE,
        *,
        look_at: int | None = None,
        give_up: str = "",
    ) -> Stored:
        """Finish with upstream's content of that version; `look_at` marks it unsettled."""
        content = content_of(version)
        return self.ledger.finish(order, worker, fetch, content, self.now, look_at=look_at, give_up=give_up)[0]

    def fail(self, fetch: Fetch, what: Failure, worker: str = "w", order: OrderKey = ONE, *, wait: float = 5) -> Failed:
        due = self.now + round(wait * 1000)
        return self.ledger.fail(order, worker, fetch, self.now, what=what, reason=f"reason_{what}", due=due)

    def bring_home(self, version: int, worker: str = "w", order: OrderKey = ONE) -> Stored:
        return self.store(self.fetch(worker, order), version, worker, order)

    def hand(self, worker: str = "w") -> HandOn | None:
        return self.ledger.hand(ONE, worker, self.now)

    def handed(
        self, hand_on: HandOn, what: Literal["done", "again", "dead"] = "done", worker: str = "w", *, wait: float = 5
    ) -> None:
        due = self.now + round(wait * 1000)
        self.ledger.handed(ONE, worker, hand_on, self.now, what=what, reason="reason", due=due)

    def tick(self) -> int:
        """Return how many jobs were pushed."""
        return self.ledger.tick(self.now)[1]

    def waiting(self, lane: str = LIVE) -> int:
        """Return how many jobs wait in the queue."""
        return self.redis.llen(queue_key(lane))

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
        names = (keys.record(order), keys.trail(order), keys.content(order))
        left = [self.redis.pttl(name) for name in names if self.redis.exists(name)]
        return {None if ms == -1 else round(ms / policy.DAY, 2) for ms in left}
