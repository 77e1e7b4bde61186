"""The steps for one order: start the fetch, get a permit, getOrder, store, then the deliveries to the sinks.

Revisions go to the sinks one at a time and in order per order, each sink with its own attempts. A delivery never calls
getOrder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar

import msgspec
from structlog.contextvars import bind_contextvars, bound_contextvars, unbind_contextvars

from app import log
from app.deployment import Deployment
from app.erasure import Erasure
from app.errors import Denied, ReceiverError, UpstreamError
from app.ids import OrderKey, trace_id
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import is_unavailable, retry_until
from app.ledger.rq_jobs import BACKFILL
from app.ledger.work import Content, Delivery, DeliveryOutcome, Elsewhere, Fetch, Origin
from app.order_document import OrderDocument
from app.upstream.client import ChannelManager, Fetched
from app.upstream.models import parse_order
from workers.sinks.contract import Context, Failed, Reject, Retry, Sink
from workers.sinks.output import SinkOutput, failure_of, show_traceback

_log = log.get()
T = TypeVar("T")


class Connection(msgspec.Struct, frozen=True):
    """The client and the rate limiter of one company; `slug` names it in the log."""

    slug: str
    client: ChannelManager
    limiter: RateLimiter


class Processor:
    """Fetches and delivers one order at a time; a kill between any two steps loses nothing."""

    def __init__(
        self,
        ledger: Ledger,
        deployment: Deployment,
        connections: Mapping[str, Connection],
        sinks: Mapping[str, Sink],
        erasure: Erasure,
    ) -> None:
        self._ledger = ledger
        self._deployment = deployment
        self._connections = connections
        self.sinks = sinks
        self._erasure = erasure
        self.output = SinkOutput()
        self._returned = 0
        """Jobs in a row that were for other pools."""

    def process(self, order: OrderKey, worker: str) -> None:
        """Fetch the order if a fetch is due, then deliver the revisions that its sinks do not have yet.

        Where another running pool has what this one lacks, the company or a sink, the job goes back for that pool.
        """
        if order.company_id not in self._connections and self._is_declared("companies", order.company_id):
            self._return_job(order)
            return
        if self._retried(partial(self._erasure.erase_again, order)):
            _log.warning("order.erased_again", **self._names(order))
        what, fetch, origin = self._retried(partial(self._ledger.start_fetch, order, worker))
        _bind(origin)
        if what in {"nothing", "held"}:
            _log.info("fetch.skipped", reason=what, **self._names(order))
            return
        if what == "dead":
            _log.error("order.dead_lettered", reason="kills_worker", **self._names(order))
            return
        deliveries = True
        if fetch is not None:
            self._returned = 0
            try:
                deliveries = self._fetch(order, fetch, worker)
            except Exception as error:
                # An internal error is a failed attempt, not a crash: three crashes make the dead letter `kills_worker`.
                is_redis = is_unavailable(error)
                decision = policy.of_redis_unavailable() if is_redis else policy.of_internal_error(fetch)
                self._fail(order, fetch, worker, decision)
                _log.error("job.failed", order_id=order.order_id, error=type(error).__name__, trace=log.trace_of(error))
        # Also after a failed fetch: an earlier revision may still wait for delivery.
        while deliveries:
            delivery = self._retried(partial(self._ledger.acquire_delivery, order, worker))
            if isinstance(delivery, Elsewhere):
                if self._is_declared("sinks", delivery.sink):
                    self._return_job(order, delivery.sink)
                    return
                break
            deliveries = delivery is not None and self._deliver(order, delivery, worker)
        self._returned = 0

    def _is_declared(self, kind: Literal["companies", "sinks"], name: str) -> bool:
        """Return whether a running pool has this company or sink."""
        pools = self._retried(self._deployment.running).values()
        return any(name in getattr(pool.configuration, kind) for pool in pools)

    def _return_job(self, order: OrderKey, sink: str = "") -> None:
        """Put the job back for the pools that know its company or sink, and step aside so that they get it.

        The pause grows while this worker gets nothing else, so that it does not take the same jobs again and again.
        """
        _bind(self._retried(partial(self._ledger.return_job, order)))
        _log.info("job.returned", reason="no_sink" if sink else "unknown_company", sink=sink, **self._names(order))
        time.sleep(policy.step_aside(self._returned) / 1000)
        self._returned += 1

    def _fetch(self, order: OrderKey, fetch: Fetch, worker: str) -> bool:
        """Fetch and store the order; return whether a delivery may be due."""
        connection = self._connections.get(order.company_id)
        if connection is None:
            wait = policy.jittered(policy.no_company_wait(fetch.deferrals))
            self._fail(order, fetch, worker, policy.Decision("deferred", "unknown_company", wait))
            return True
        queue: Literal["live", "backfill"] = "backfill" if fetch.queue == BACKFILL else "live"
        try:
            with connection.limiter.permit(queue, worker, order=order.member, deadline=fetch.deadline) as permit:
                started = time.perf_counter()
                try:
                    fetched = connection.client.get_order(order.order_id)
                except UpstreamError as error:
                    duration = round((time.perf_counter() - started) * 1000)
                    decision = policy.of_order(error, fetch, permit.failed(error, fetch.missing_ms))
                    self._fail(order, fetch, worker, decision, error.http_status, duration)
                    return True
        except Denied as denied:
            wait = policy.denied_wait(denied, fetch)
            self._fail(order, fetch, worker, policy.Decision("deferred", denied.reason, wait))
            return True
        return self._store(order, fetch, fetched, worker)

    def _store(self, order: OrderKey, fetch: Fetch, fetched: Fetched, worker: str) -> bool:
        """Store the answer; return whether a delivery may be due."""
        found = fetched.order
        content = Content(
            raw=fetched.raw,
            digest=fetched.digest,
            status=found.status,
            wallets=len(found.wallets),
            tickets=len(found.tickets),
            coupons=len(found.coupons),
            manifest=found.manifest_url is not None,
            http_status=fetched.http_status,
            duration_ms=round(fetched.seconds * 1000),
            references=found.references,
        )
        recheck_ms, give_up = (None, "") if found.settled else policy.of_unsettled(fetch)
        store = partial(self._ledger.store_fetch, order, worker, fetch, content, recheck_ms=recheck_ms, give_up=give_up)
        stored = retry_until(self._ledger.redis, fetch.deadline, store)
        common = self._names(order)
        if stored.what in {"refused", "erased"}:
            _log.info("fetch.skipped", reason="superseded" if stored.what == "refused" else "erased", **common)
            return True
        _log.info(
            "order.fetched",
            status=content.status,
            revision=stored.revision,
            changed=stored.changed,
            wallets=content.wallets,
            tickets=content.tickets,
            coupons=content.coupons,
            manifest=content.manifest,
            duration_ms=content.duration_ms,
            http_status=content.http_status,
            queue=fetch.queue,
            **common,
        )
        if stored.what == "dead":
            _log.error("order.dead_lettered", reason=give_up, **common)
        for member, request_id in stored.requeued:
            names = self._names(OrderKey.of(member))
            _log.info("order.requeued", reason="upstream_answers", request_id=request_id, **names)
        return stored.what != "fetched"

    def _fail(
        self,
        order: OrderKey,
        fetch: Fetch,
        worker: str,
        decision: policy.Decision,
        http_status: int | None = None,
        duration_ms: int = 0,
    ) -> None:
        fail = partial(
            self._ledger.fail_fetch,
            order,
            worker,
            fetch,
            outcome=decision.outcome,
            reason=decision.reason,
            wait_ms=decision.wait_ms,
            http_status=http_status,
            duration_ms=duration_ms,
            unanswered=decision.unanswered,
        )
        became = retry_until(self._ledger.redis, fetch.deadline, fail)
        common = {"http_status": http_status, **self._names(order)}
        wait = {"reason": decision.reason, "due_in_s": round(decision.wait_ms / 1000, 1)}
        if became == "dead":
            _log.error("order.dead_lettered", reason=decision.reason, attempts=fetch.attempts + 1, **common)
        elif became == "deleted_upstream":
            _log.info("order.deleted_upstream", **common)
        elif became == "deferred":
            _log.info("fetch.deferred", **wait, **common)
        elif became == "retry":
            _log.warning("fetch.retry_scheduled", attempts=fetch.attempts + 1, **wait, **common)

    def _retried(self, step: Callable[[], T]) -> T:
        """Return what a step returns; while Redis is unavailable it is repeated for REDIS_WAIT."""
        return retry_until(self._ledger.redis, time.monotonic() + policy.REDIS_WAIT / 1000, step)

    def _deliver(self, order: OrderKey, delivery: Delivery, worker: str) -> bool:
        """Call the sink; return whether it took the revision.

        A failure ends the deliveries of this job, since its time limit may be used up.
        """
        # An event may have come since the fetch.
        _bind(Origin(delivery.request_id, delivery.traceparent))
        attempts = delivery.attempts
        started = time.perf_counter()
        outcome: DeliveryOutcome = "succeeded"
        reason, failure, wait, trace = "", "", 0, ""
        package = self.sinks[delivery.sink].package
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
                with bound_contextvars(**names), self.output.caught():
                    self.sinks[delivery.sink].deliver(self._document(order, delivery), context)
            except Reject as rejected:
                outcome, reason, failure = "rejected", f"rejected: {rejected.reason}", rejected.reason
            except Retry as asked:
                outcome, wait = "postponed", policy.postponed_wait(asked.seconds)
                failure = failure_of(package, asked)
                if delivery.postponed_ms >= policy.POSTPONED_FOR:
                    outcome, wait, reason = "dead", 0, policy.POSTPONED_TOO_LONG
                    failure = f"{reason} ({failure})"
            except BaseException as error:
                # The user's code may raise anything, and so may RQ's time limit.
                reason = "unreadable_answer" if isinstance(error, ReceiverError) else type(error).__name__
                reason = error.reason if isinstance(error, Failed) else reason
                failure = reason if isinstance(error, ReceiverError) else failure_of(package, error)
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
        return outcome == "succeeded"

    def _document(self, order: OrderKey, delivery: Delivery) -> OrderDocument:
        """Return what is delivered; raises UnreadableAnswer."""
        found = parse_order(delivery.raw)
        return OrderDocument(
            company=self._names(order)["company"],
            company_id=order.company_id,
            order_id=order.order_id,
            revision=delivery.revision,
            digest=delivery.digest,
            fetched_at=delivery.fetched_at,
            idempotency_key=delivery.idempotency_key(order),
            status=found.status,
            order=found,
        )

    def _names(self, order: OrderKey) -> dict[str, str]:
        """Return what names the order in the log."""
        connection = self._connections.get(order.company_id)
        return {"order_id": order.order_id, "company": connection.slug if connection else "unknown"}


def _bind(origin: Origin) -> None:
    """Name the POST behind the order in every line that follows."""
    unbind_contextvars("request_id", "trace_id")
    known = {"request_id": origin.request_id, "trace_id": trace_id(origin.traceparent)}
    bind_contextvars(**{name: value for name, value in known.items() if value})
