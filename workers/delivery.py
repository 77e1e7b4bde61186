"""The steps for one delivery: acquire it, call the sink, record how it ended.

Revisions go to a sink one at a time and in order per order, each sink with its own attempts. A delivery never calls
getOrder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from structlog.contextvars import bound_contextvars

from app import log
from app.erasure import Erasure
from app.errors import ReceiverError
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import retry_until
from app.ledger.work import Delivery, DeliveryOutcome, Origin
from app.upstream.models import parse_order
from workers.processor import bind_origin, wait_for_redis
from workers.sinks import Context, Reject, Retry, Sink, SinkOutput, failure_of, show_traceback

_log = log.get()


class Deliverer:
    """Delivers one revision at a time to the sinks of this process; a kill between any two steps loses nothing."""

    def __init__(
        self,
        ledger: Ledger,
        sinks: Mapping[str, Sink],
        companies: Mapping[str, str],
        erasure: Erasure,
        output: SinkOutput,
    ) -> None:
        """`companies`: their slugs by id; `output` logs what a sink prints."""
        self._ledger = ledger
        self._sinks = sinks
        self._companies = companies
        self._erasure = erasure
        self._output = output

    def process(self, order: OrderKey, sink: str, worker: str) -> None:
        """Deliver the latest revision to the sink, if that is due; raises KeyError for a sink that this one lacks."""
        own, redis = self._sinks[sink], self._ledger.redis
        if wait_for_redis(redis, partial(self._erasure.erase_again, order)):
            _log.warning("order.erased_again", **self._names(order))
        acquire = partial(self._ledger.acquire_delivery, order, sink, worker)
        if (delivery := wait_for_redis(redis, acquire)) is not None:
            self._deliver(order, delivery, own, worker)

    def _deliver(self, order: OrderKey, delivery: Delivery, sink: Sink, worker: str) -> None:
        # An event may have come since the fetch.
        bind_origin(Origin(delivery.request_id, delivery.traceparent))
        attempts = delivery.attempts
        started = time.perf_counter()
        outcome: DeliveryOutcome = "succeeded"
        reason, failure, wait, trace = "", "", 0, ""
        if attempts > len(policy.RETRY_WAITS) + 1 or delivery.crashes >= policy.CRASHES_ALLOWED:
            outcome, reason, attempts = "dead", "kills_worker", attempts - 1
        else:
            try:
                context = Context(
                    idempotency_key=delivery.idempotency_key(order),
                    company_id=order.company_id,
                    order_id=order.order_id,
                    revision=delivery.revision,
                    attempt=delivery.attempts,
                    request_id=delivery.request_id,
                    fetched_at=delivery.fetched_at,
                )
                names = {"sink": delivery.sink, **self._names(order)}
                with bound_contextvars(**names), self._output.caught():
                    sink.deliver(parse_order(delivery.raw), context)
            except Reject as rejected:
                outcome, reason, failure = "rejected", f"rejected: {rejected.reason}", rejected.reason
            except Retry as asked:
                outcome, wait = "postponed", policy.postponed_wait(asked.seconds)
                failure = failure_of(sink.package, asked)
                if delivery.postponed_ms >= policy.POSTPONED_FOR:
                    outcome, wait, reason = "dead", 0, policy.POSTPONED_TOO_LONG
                    failure = f"{reason} ({failure})"
            except BaseException as error:
                # The user's code may raise anything, and so may RQ's time limit.
                reason = "unreadable_answer" if isinstance(error, ReceiverError) else type(error).__name__
                failure = reason if isinstance(error, ReceiverError) else failure_of(sink.package, error)
                trace = log.trace_of(error)
                show_traceback(delivery.sink, error)
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
            failure=failure,
            wait_ms=wait,
            duration_ms=duration,
        )
        deadline = min(delivery.deadline, time.monotonic() + 2 * policy.REDIS_WAIT / 1000)
        retry_until(self._ledger.redis, deadline, complete)
        common = {"sink": delivery.sink, "revision": delivery.revision, **self._names(order)}
        due_in_s = round(wait / 1000, 1)
        if outcome == "succeeded":
            _log.info("delivery.succeeded", duration_ms=duration, **common)
        elif outcome in {"dead", "rejected"}:
            _log.error("delivery.dead_lettered", reason=reason, attempts=attempts, **common)
        elif outcome == "postponed":
            _log.info("delivery.postponed", due_in_s=due_in_s, **common)
        else:
            _log.warning("delivery.failed", error=reason, attempts=attempts, due_in_s=due_in_s, trace=trace, **common)

    def _names(self, order: OrderKey) -> dict[str, str]:
        """Return what names the order in the log."""
        return {"order_id": order.order_id, "company": self._companies.get(order.company_id, "unknown")}
