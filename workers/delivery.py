"""Deliveries: revisions go to the sinks one at a time and in order per order, each sink with its own attempts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

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

    def __init__(self, ledger: Ledger, sinks: Mapping[str, Sink]) -> None:
        self._ledger = ledger
        self._sinks = sinks

    def deliver(self, order: OrderKey, worker: str, slug: str) -> None:
        """Deliver until all sinks are up to date, or one fails: then the time limit of the job may be used up."""
        is_delivered = bool(self._sinks)
        while is_delivered:
            deadline = time.monotonic() + policy.REDIS_WAIT / 1000
            delivery = retry_until(self._ledger.redis, deadline, partial(self._ledger.acquire_delivery, order, worker))
            is_delivered = delivery is not None and self._deliver(order, delivery, worker, slug)

    def _deliver(self, order: OrderKey, delivery: Delivery, worker: str, slug: str) -> bool:
        """Return whether the sink took the revision."""
        attempts = delivery.attempts
        started = time.perf_counter()
        outcome: DeliveryOutcome = "succeeded"
        reason, wait, trace = "", 0, ""
        if attempts > len(policy.RETRY_WAITS) + 1 or delivery.crashes >= policy.CRASHES_ALLOWED:
            outcome, reason, attempts = "dead", "kills_worker", attempts - 1
        else:
            try:
                self._sinks[delivery.sink].deliver(parse_order(delivery.raw), _context(order, delivery))
            except BaseException as error:
                # The user's code may raise anything, and so may RQ's time limit; only the type is recorded.
                reason = "unreadable_answer" if isinstance(error, ReceiverError) else type(error).__name__
                trace = log.trace_of(error)
                next_wait = policy.retry_wait(attempts - 1)
                outcome, wait = ("dead", 0) if next_wait is None else ("retry", next_wait)
        duration = round((time.perf_counter() - started) * 1000)
        complete = partial(
            self._ledger.complete_delivery,
            order,
            worker,
            delivery,
            outcome=outcome,
            reason=reason,
            wait_ms=wait,
            duration_ms=duration,
        )
        deadline = min(delivery.deadline, time.monotonic() + 2 * policy.REDIS_WAIT / 1000)
        retry_until(self._ledger.redis, deadline, complete)
        common = {"order_id": order.order_id, "company": slug, "sink": delivery.sink, "revision": delivery.revision}
        if outcome == "succeeded":
            _log.info("delivery.succeeded", duration_ms=duration, **common)
        elif outcome == "dead":
            _log.error("delivery.dead_lettered", reason=reason, attempts=attempts, **common)
        else:
            due_in_s = round(wait / 1000, 1)
            _log.warning("delivery.failed", error=reason, attempts=attempts, due_in_s=due_in_s, trace=trace, **common)
        return outcome == "succeeded"


def _context(order: OrderKey, delivery: Delivery) -> Context:
    return Context(
        idempotency_key=delivery.idempotency_key(order),
        company_id=order.company_id,
        order_id=order.order_id,
        revision=delivery.revision,
        attempt=delivery.attempts,
        request_id=delivery.request_id,
    )
