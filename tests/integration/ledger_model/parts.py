"""What is driven: the ledger and the inbox on one connection, under a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.work import Content
from tests.integration.ledger_model.wire import Wire

START: Final = 1_700_000_000_000
LEASE: Final = 60 * policy.SECOND


class Clock:
    """The ledger's time, in ms: it goes on when the test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


class Parts:
    """What all interleavings of a test share."""

    def __init__(
        self,
        wire: Wire,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        ledger: Ledger,
        inbox: Inbox,
        sinks: Sequence[str] = (),
    ) -> None:
        self.wire, self.clock, self.ledger = wire, clock, ledger
        self.sinks = tuple(sinks)
        self._inbox, self._loop = inbox, loop

    def accept(self, events: Sequence[OrderProcessed]) -> tuple[int, int, int]:
        """Return how many were queued, coalesced and duplicates."""
        recorded = self._loop.run_until_complete(self._inbox.accept(events))
        return recorded.queued, recorded.coalesced, recorded.duplicates


def real_parts(wire: Wire, loop: asyncio.AbstractEventLoop, sinks: Sequence[str]) -> Parts:
    """Return the parts as the service puts them together."""
    clock = Clock()
    ledger = Ledger(wire, order_days=400, fetch_lease=LEASE, sinks=sinks, clock=clock)
    return Parts(wire, loop, clock, ledger, Inbox(awaited(wire), dedup_days=7, event_days=90, clock=clock), sinks)


def awaited(redis: Redis) -> AsyncRedis:
    """Return what Inbox knows of its client, over the wire that the ledger uses: all steps have one order."""
    return cast("AsyncRedis", _Awaited(redis))


class _Awaited:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def register_script(self, text: str) -> Callable[..., Awaitable[Any]]:
        script = self._redis.register_script(text)

        async def call(args: Sequence[Any]) -> Any:
            return script(args=args)

        return call


def event_of(order: OrderKey, sent: str) -> OrderProcessed:
    """Return an event of the order; `sent` is its timestamp, "" for none."""
    return OrderProcessed(
        company_id=order.company_id,
        order_id=order.order_id,
        status="Issued",
        reference="reference",
        timestamp=sent,
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
