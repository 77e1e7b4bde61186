"""Deliveries: revisions go to the sinks one at a time and in order per order, each sink with its own attempts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from time import perf_counter

from app import log
from app.errors import ReceiverError
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import retry_until
from app.ledger.work import Delivery, DeliveryOutcome
from app.upstream.models import parse_order
from workers.sinks import Context, Sink

_log = log.get()


class Deliverer:
    """Delivers stored revisions; never calls getOrder."""

    def __init__(self, *, ledger: Ledger, sinks: Mapping[str, Sink]) -> None:
        self._ledger = ledger
        self._sinks = sinks

    def deliver(self, order: OrderKey, worker: str, slug: str) -> None:
        """Deliver until all sinks are up to date, or one fails: then the time limit of the job may be used up."""
        while self._sinks and (delivery := self._acquire(order, worker)) is not None:
            if not self._deliver(order, delivery, worker, slug):
                return

    def _acquire(self, order: OrderKey, worker: str) -> Delivery | None:
        deadline = time.monotonic() + policy.REDIS_WAIT / 1000
        return retry_until(self._ledger.redis, deadline, lambda: self._ledger.acquire_delivery(order, worker))

    def _deliver(self, order: OrderKey, delivery: Delivery, worker: str, slug: str) -> bool:
        """Return whether the sink took the revision."""
        common: dict[str, object] = {
            "order_id": order.order_id,
            "company": slug,
            "sink": delivery.sink,
            "revision": delivery.revision,
        }
        attempts = delivery.attempts
        if attempts > len(policy.RETRY_WAITS) + 1 or delivery.crashes >= policy.CRASHES_ALLOWED:
            self._complete(order, worker, delivery, "dead", reason="kills_worker")
            _log.error("delivery.dead_lettered", reason="kills_worker", attempts=attempts - 1, **common)
            return False
        context = Context(
            idempotency_key=delivery.idempotency_key(order),
            company_id=order.company_id,
            order_id=order.order_id,
            revision=delivery.revision,
            attempt=attempts,
            request_id=delivery.request_id,
        )
        started = perf_counter()
        try:
            self._sinks[delivery.sink].deliver(parse_order(delivery.raw), context)
        except BaseException as error:
            # The user's code may raise anything, and so may RQ's time limit; only the type is recorded.
            duration = round((perf_counter() - started) * 1000)
            reason = "unreadable_answer" if isinstance(error, ReceiverError) else type(error).__name__
            wait = policy.retry_wait(attempts - 1)
            if wait is None:
                self._complete(order, worker, delivery, "dead", reason=reason, duration_ms=duration)
                _log.error("delivery.dead_lettered", reason=reason, attempts=attempts, **common)
                return False
            self._complete(order, worker, delivery, "retry", reason=reason, wait_ms=wait, duration_ms=duration)
            _log.warning(
                "delivery.failed",
                error=reason,
                attempts=attempts,
                due_in_s=round(wait / 1000, 1),
                trace=log.trace_of(error),
                **common,
            )
            return False
        duration = round((perf_counter() - started) * 1000)
        self._complete(order, worker, delivery, "succeeded", duration_ms=duration)
        _log.info("delivery.succeeded", duration_ms=duration, **common)
        return True

    def _complete(
        self,
        order: OrderKey,
        worker: str,
        delivery: Delivery,
        outcome: DeliveryOutcome,
        *,
        reason: str = "",
        wait_ms: int = 0,
        duration_ms: int = 0,
    ) -> None:
        deadline = min(delivery.deadline, time.monotonic() + 2 * policy.REDIS_WAIT / 1000)
        retry_until(
            self._ledger.redis,
            deadline,
            lambda: self._ledger.complete_delivery(
                order, worker, delivery, outcome=outcome, reason=reason, wait_ms=wait_ms, duration_ms=duration_ms
            ),
        )
