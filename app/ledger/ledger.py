"""What workers, the pool and the CLI do to orders: each step is one script, atomic, and may be repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, Final, Literal

import msgspec

from app.ids import OrderKey, new_request_id
from app.ledger import policy
from app.ledger.content import pack, unpack
from app.ledger.redis import Redis, Script
from app.ledger.rq_jobs import JobTemplate
from app.ledger.work import (
    Content,
    Delivery,
    DeliveryOutcome,
    Dispatched,
    FailOutcome,
    Failure,
    Fetch,
    Origin,
    Requested,
    Started,
    Stored,
    WorkerEnd,
)

DISPATCH_LIMIT: Final = 500
"""Orders that one call of dispatch_due.lua reads; the dispatcher calls again while there are more."""

DIGESTS_KEPT: Final = 100
"""Revisions of an order, besides the latest, of which at least the digest is kept."""

_ORDERS_A_CALL: Final = 200
"""Orders of one call of request_fetch.lua: Redis serves others in between."""

_BOUNDS_IN_SECONDS: Final = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600, 14_400, 86_400)
LATENCY_BOUNDS: Final = tuple(round(seconds * 1000) for seconds in _BOUNDS_IN_SECONDS)
"""Upper bounds in ms of the histogram from event to fetched."""

CALL_BOUNDS: Final = (100, 250, 500, 1000, 2500, 5000, 10_000, 20_000)
"""Upper bounds in ms of the histogram of getOrder."""


class Ledger:
    """The record of every order, its counters and its clock.

    `order_days`: how long an order is kept after its last change; `revisions_kept`: revisions of an order whose content
    is kept, the latest among them; `fetch_lease`: ms; `sinks`: those of this process's pool; `clock` (ms since 1970)
    replaces the time of the Redis server in tests. Every method raises OtherSchema, and what redis-py raises.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        order_days: int,
        revisions_kept: int = 5,
        fetch_lease: int,
        sinks: Sequence[str] = (),
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.redis = redis
        self._keep = order_days * policy.DAY
        self._contents_kept = revisions_kept - 1
        self._fetch_lease = fetch_lease
        self._sinks = list(sinks)
        self._template = JobTemplate(redis.names)
        self._script = cache(partial(Script, redis, clock=clock))

    def start_fetch(self, order: OrderKey, worker: str, request: Mapping[str, Any] | None = None) -> Started:
        """Return what the order needs; a `fetch` has the fencing token that `store_fetch` and `fail_fetch` check.

        With a `request` (RateLimiter) it has asked for a permit too, in the same call.
        """
        called = time.monotonic()
        what, request_id, traceparents, *packed = self._call(
            "start_fetch",
            order,
            worker=worker,
            lease=self._fetch_lease,
            longest_lease=policy.LONGEST_LEASE,
            crashes_allowed=policy.CRASHES_ALLOWED,
            **(request or {}),
        )
        origin = Origin(request_id.decode(), traceparents.decode())
        if not packed:
            return Started(what.decode(), None, origin)
        fetch = msgspec.msgpack.decode(packed[0], type=Fetch)
        return Started("fetch", msgspec.structs.replace(fetch, deadline=called + self._fetch_lease / 1000), origin)

    def store_fetch(
        self,
        order: OrderKey,
        worker: str,
        fetch: Fetch,
        content: Content,
        *,
        recheck_ms: int | None = None,
        give_up: str = "",
    ) -> Stored:
        """Store an answer.

        `recheck_ms` marks an unsettled answer: the wait until the order is fetched again; `give_up` is the reason when
        it is not fetched again.
        """
        answer = self._call(
            "store_fetch",
            order,
            pack(content.raw),
            worker=worker,
            generation=fetch.generation,
            token=fetch.token,
            grace=policy.GRACE,
            job=self._template.fields(),
            recheck_ms=-1 if recheck_ms is None else recheck_ms,
            give_up=give_up,
            digest=content.digest,
            status=content.status,
            wallets=content.wallets,
            tickets=content.tickets,
            coupons=content.coupons,
            manifest=int(content.manifest),
            http=content.http_status,
            duration_ms=content.duration_ms,
            references=[self.redis.names.reference(one) for one in content.references],
            packed=order.packed,
            bounds=LATENCY_BOUNDS,
            call_bounds=CALL_BOUNDS,
            contents_kept=self._contents_kept,
            digests_kept=DIGESTS_KEPT,
        )
        return msgspec.msgpack.decode(answer, type=Stored)

    def fail_fetch(
        self,
        order: OrderKey,
        worker: str,
        fetch: Fetch,
        *,
        outcome: Failure,
        reason: str,
        wait_ms: int = 0,
        http_status: int | None = None,
        duration_ms: int = 0,
        unanswered: bool = False,
    ) -> FailOutcome:
        """Record that a fetch ended without an order; return what follows, which starts after `wait_ms`.

        `unanswered`: it is dead although perhaps every order failed; it is requeued when upstream answers another one.
        """
        follows: bytes = self._call(
            "fail_fetch",
            order,
            worker=worker,
            generation=fetch.generation,
            token=fetch.token,
            outcome=outcome,
            wait=wait_ms,
            reason=reason,
            http=http_status or 0,
            duration_ms=duration_ms,
            call_bounds=CALL_BOUNDS,
            unanswered=int(unanswered),
        )
        return follows.decode()  # type: ignore[return-value]  # the header of fail_fetch.lua names them

    def acquire_delivery(self, order: OrderKey, sink: str, worker: str) -> Delivery | None:
        """Acquire the delivery to a sink, None if it is not due or another worker makes it."""
        called = time.monotonic()
        answer = self._call(
            "acquire_delivery",
            order,
            sink=sink,
            worker=worker,
            lease=policy.DELIVERY_LEASE,
            longest_open=policy.BREAKER_LONGEST,
        )
        if answer is None:
            return None
        delivery = msgspec.msgpack.decode(answer[0], type=Delivery)
        deadline = called + policy.DELIVERY_LEASE / 1000
        return msgspec.structs.replace(delivery, raw=unpack(answer[1]), deadline=deadline)

    def complete_delivery(
        self,
        order: OrderKey,
        worker: str,
        delivery: Delivery,
        *,
        outcome: DeliveryOutcome,
        reason: str = "",
        failure: str = "",
        wait_ms: int = 0,
        duration_ms: int = 0,
        unavailable: bool = False,
    ) -> int:
        """Record how a delivery ended; after `retry` and `postponed` its next attempt starts after `wait_ms`.

        `reason` is that of the dead letter, `failure` the type and place of the error, for people. `unavailable`: the
        destination takes no order now. Return for how many ms this opened the breaker of the sink, 0 if it did not.
        """
        opened: int = self._call(
            "complete_delivery",
            order,
            worker=worker,
            sink=delivery.sink,
            revision=delivery.revision,
            digest=delivery.digest,
            outcome=outcome,
            wait=wait_ms,
            reason=reason,
            failure=failure or reason,
            duration_ms=duration_ms,
            unavailable=int(unavailable),
            grace=policy.GRACE,
            job=self._template.fields(),
            failures=policy.BREAKER_FAILURES,
            first_open=policy.BREAKER_FIRST,
            longest_open=policy.BREAKER_LONGEST,
        )
        return opened

    def return_job(self, order: OrderKey) -> Origin:
        """Put the job of a fetch, which this process has taken, back at the end of its queue."""
        found = self._script("return_job")(order=order.member, job=self._template.fields())
        return Origin(*(text.decode() for text in found or ()))

    def dispatch_due(self) -> Dispatched:
        """Enqueue a job for every order whose fetch is due, or whose delivery to one of the sinks is."""
        looked = enqueued = broken = 0
        for sink in ("", *self._sinks):
            seen = DISPATCH_LIMIT
            while seen == DISPATCH_LIMIT:
                seen, jobs, unreadable = self._script("dispatch_due")(
                    sink=sink,
                    grace=policy.GRACE,
                    longest=policy.LONGEST_WAIT,
                    farthest=policy.FARTHEST,
                    limit=DISPATCH_LIMIT,
                    keep=self._keep,
                    lease=policy.DELIVERY_LEASE,
                    longest_open=policy.BREAKER_LONGEST,
                    job=self._template.fields(),
                    sinks=self._sinks,
                )
                looked += seen
                enqueued += jobs
                broken += unreadable
        return Dispatched(looked, enqueued, broken)

    def request_fetch(
        self,
        orders: Iterable[OrderKey],
        *,
        queue: Literal["live", "backfill"],
        reason: str,
        listed_rows: Mapping[OrderKey, str] | None = None,
        request_id: str = "",
    ) -> Requested:
        """Request fetches without an event.

        `listed_rows`: digests of the rows in the order list that cause the requests; the records keep them.
        `request_id`: of this request, for orders that no event announced; a new one by default.
        """
        left, rows = iter(orders), listed_rows or {}
        request_id = request_id or new_request_id()
        requested = Requested()
        while chunk := list(islice(left, _ORDERS_A_CALL)):
            outcomes = self._script("request_fetch")(
                orders=[order.member for order in chunk],
                listed_rows=[rows.get(order, "") for order in chunk],
                queue=queue,
                reason=reason,
                request_id=request_id,
                grace=policy.GRACE,
                job=self._template.fields(),
            )
            requested += Requested(*(outcomes.count(number) for number in range(4)))
        return requested

    def release_worker(
        self,
        worker: str,
        how: WorkerEnd,
        fetches: Iterable[OrderKey] = (),
        deliveries: Iterable[tuple[OrderKey, str]] = (),
    ) -> OrderKey | None:
        """Make due what an ended worker had claimed, and return its order.

        `fetches` and `deliveries`, whose jobs may be lost with it, are due too.
        """
        member = self._script("release_worker")(
            worker=worker,
            how=how,
            fetches=[order.member for order in fetches],
            deliveries=[(order.member, sink) for order, sink in deliveries],
        )
        return OrderKey.of(member.decode()) if member else None

    def retry_delivery(self, order: OrderKey, sink: str) -> bool:
        """Give a delivery that is dead or waits for its next attempt all attempts, from now on.

        Return False if it was neither (any more).
        """
        return self._resolve(order, sink, "retry")

    def discard(self, order: OrderKey, sink: str = "") -> bool:
        """Discard a dead fetch, or a dead delivery, for good; return False if it was not dead (any more)."""
        return self._resolve(order, sink, "discard")

    def _resolve(self, order: OrderKey, sink: str, action: Literal["discard", "retry"]) -> bool:
        return bool(self._call("resolve_dead_letter", order, sink=sink, action=action))

    def _call(self, script: str, order: OrderKey, *blobs: bytes, **named: Any) -> Any:
        return self._script(script)(*blobs, order=order.member, keep=self._keep, sinks=self._sinks, **named)
