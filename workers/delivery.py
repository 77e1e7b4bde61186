"""The steps for one delivery: acquire it, call the sink, record how it ended.

Revisions go to a sink one at a time and in order per order, each sink with its own attempts. A delivery never calls
getOrder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec
from structlog.contextvars import bound_contextvars

from app import log
from app.erasure import Erasure
from app.errors import ReceiverError
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import retry_until
from app.ledger.rq_jobs import sink_queue
from app.ledger.work import Delivery, DeliveryOutcome, Origin
from app.order_document import OrderDocument
from app.traces import OFF, Tracer
from app.upstream.models import parse_order
from workers.processor import bind_origin, wait_for_redis
from workers.sinks.contract import Context, Disable, Failed, Reject, Retry, Sink, Unavailable
from workers.sinks.output import SinkOutput, failure_of, show_traceback

KILLS_WORKER: Final = "kills_worker"
"""Reason code of a dead delivery whose attempts ended their workers, or ran until the pool did."""

_log = log.get()


class _Ended(msgspec.Struct, frozen=True):
    """How a delivery ended, as `complete_delivery` records it; `trace` for the log."""

    outcome: DeliveryOutcome
    reason: str = ""
    failure: str = ""
    wait_ms: int = 0
    trace: str = ""
    unavailable: bool = False


class Deliverer:
    """Delivers one revision at a time to the sinks of this process; a kill between any two steps loses nothing."""

    def __init__(
        self,
        ledger: Ledger,
        sinks: Mapping[str, Sink],
        filters: Mapping[str, Callable[[str, str], str]],
        slug_of: Callable[[str], str],
        erasure: Erasure,
        output: SinkOutput,
        tracer: Tracer = OFF,
    ) -> None:
        """`filters`: why a sink does not get an order (SinkSettings.unwanted); `slug_of` names a company by its id.

        `output` logs what a sink prints.
        """
        self._ledger = ledger
        self._sinks = sinks
        self._filters = filters
        self._slug_of = slug_of
        self._erasure = erasure
        self._output = output
        self._tracer = tracer

    def process(self, order: OrderKey, sink: str, worker: str) -> None:
        """Deliver the latest revision to the sink, if that is due; raises KeyError for a sink that this one lacks."""
        own, redis = self._sinks[sink], self._ledger.redis
        company = wait_for_redis(redis, partial(self._slug_of, order.company_id))
        if wait_for_redis(redis, partial(self._erasure.erase_again, order)):
            _log.warning("order.erased_again", order_id=order.order_id, company=company)
        acquire = partial(self._ledger.acquire_delivery, order, sink, worker)
        began = time.time_ns()
        if (delivery := wait_for_redis(redis, acquire)) is None:
            return
        # An event may have come since the fetch.
        bind_origin(Origin(delivery.request_id, delivery.traceparents))
        queue = redis.names.rq_prefix + sink_queue(sink)
        with self._tracer.job(
            queue,
            delivery.traceparents,
            began,
            order_id=order.order_id,
            company=company,
            sink=sink,
            revision=delivery.revision,
            attempt=delivery.attempts,
        ) as traceparent:
            self._deliver(order, company, delivery, own, worker, traceparent)

    def _deliver(
        self, order: OrderKey, company: str, delivery: Delivery, sink: Sink, worker: str, traceparent: str
    ) -> None:
        started = time.perf_counter()
        names = {"order_id": order.order_id, "company": company, "sink": delivery.sink}
        with bound_contextvars(**names):
            ended = self._attempt(order, company, delivery, sink, traceparent)
        duration = round((time.perf_counter() - started) * 1000)
        complete = partial(
            self._ledger.complete_delivery,
            order,
            worker,
            delivery,
            outcome=ended.outcome,
            reason=ended.reason,
            failure=ended.failure,
            wait_ms=ended.wait_ms,
            duration_ms=duration,
            unavailable=ended.unavailable,
        )
        deadline = min(delivery.deadline, time.monotonic() + 2 * policy.REDIS_WAIT / 1000)
        with self._tracer.script("complete_delivery"):
            opened_ms = retry_until(self._ledger.redis, deadline, complete)
        is_failure = ended.outcome not in {"succeeded", "skipped", "postponed"}
        self._tracer.outcome(ended.outcome, ended.reason if is_failure else "")
        common = names | {"revision": delivery.revision}
        attempts, due_in_s = delivery.attempts, round(ended.wait_ms / 1000, 1)
        if ended.outcome == "succeeded":
            _log.info("delivery.succeeded", duration_ms=duration, **common)
        elif ended.outcome == "skipped":
            _log.info("delivery.skipped", reason=ended.failure, **common)
        elif ended.outcome in {"dead", "rejected"}:
            # Of the last one nothing was tried.
            attempts -= ended.reason == KILLS_WORKER
            _log.error("delivery.dead_lettered", reason=ended.reason, attempts=attempts, **common)
        elif ended.outcome == "postponed":
            _log.info("delivery.postponed", due_in_s=due_in_s, **common)
        elif ended.outcome == "disabled":
            _log.error("sink.disabled", reason=ended.reason, **common)
        else:
            trace = ended.trace
            _log.warning(
                "delivery.failed", error=ended.reason, attempts=attempts, due_in_s=due_in_s, trace=trace, **common
            )
        if opened_ms:
            _log.warning("sink.unavailable", sink=delivery.sink, reason=ended.reason, due_in_s=opened_ms // 1000)

    def _attempt(self, order: OrderKey, company: str, delivery: Delivery, sink: Sink, traceparent: str) -> _Ended:
        """Call the sink, unless it is not to get this order or its attempts are used up; return how that ended."""
        if delivery.attempts > len(policy.DELIVERY_WAITS) + 1 or delivery.crashes >= policy.CRASHES_ALLOWED:
            return _Ended("dead", KILLS_WORKER)
        try:
            document = _document(order, company, delivery)
            if unwanted := self._filters[delivery.sink](company, document.status):
                return _Ended("skipped", failure=unwanted)
            context = Context(
                idempotency_key=document.idempotency_key,
                company_id=order.company_id,
                order_id=order.order_id,
                revision=delivery.revision,
                attempt=delivery.attempts,
                request_id=delivery.request_id,
                fetched_at=delivery.fetched_at,
                traceparent=traceparent,
            )
            with self._output.caught():
                sink.deliver(document, context)
        except Reject as rejected:
            return _Ended("rejected", f"rejected: {rejected.reason}", rejected.reason)
        except Retry as asked:
            failure = failure_of(sink.package, asked)
            if delivery.postponed_ms >= policy.POSTPONED_FOR:
                return _Ended("dead", policy.POSTPONED_TOO_LONG, f"{policy.POSTPONED_TOO_LONG} ({failure})")
            return _Ended("postponed", failure=failure, wait_ms=policy.postponed_wait(asked.seconds))
        except Disable as wants_none:
            return _Ended("disabled", wants_none.reason)
        except BaseException as error:
            # The user's code may raise anything, and so may RQ's time limit.
            reason = failure = "unreadable_answer"
            if not isinstance(error, ReceiverError):
                reason, failure = type(error).__name__, failure_of(sink.package, error)
            if isinstance(error, Failed):
                reason = error.reason
            show_traceback(delivery.sink, error)
            is_away = isinstance(error, Unavailable)
            wait = policy.delivery_wait(delivery.attempts - 1, error.after if isinstance(error, Unavailable) else None)
            outcome: DeliveryOutcome = "dead" if wait is None else "retry"
            return _Ended(outcome, reason, failure, wait or 0, log.trace_of(error), is_away)
        return _Ended("succeeded")


def _document(order: OrderKey, company: str, delivery: Delivery) -> OrderDocument:
    """Return what is delivered; raises UnreadableAnswer."""
    found = parse_order(delivery.raw)
    return OrderDocument(
        company=company,
        company_id=order.company_id,
        order_id=order.order_id,
        revision=delivery.revision,
        digest=delivery.digest,
        fetched_at=delivery.fetched_at,
        idempotency_key=delivery.idempotency_key(order),
        status=found.status,
        order=found,
    )
