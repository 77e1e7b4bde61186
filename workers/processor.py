"""The steps for the fetch of one order: start it, get a permit, getOrder, store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar

import msgspec
from structlog.contextvars import bind_contextvars, unbind_contextvars

from app import log
from app.deployment import Deployment
from app.erasure import Erasure
from app.errors import Denied, UpstreamError
from app.ids import OrderKey, trace_id
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import Redis, is_unavailable, retry_until
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.ledger.work import Content, Fetch, Origin
from app.traces import OFF, Tracer
from app.upstream.client import ChannelManager, Fetched

_log = log.get()
T = TypeVar("T")


class Connection(msgspec.Struct, frozen=True):
    """The client and the rate limiter of one company; `slug` names it in the log."""

    slug: str
    client: ChannelManager
    limiter: RateLimiter


class Processor:
    """Fetches one order at a time; a kill between any two steps loses nothing."""

    def __init__(
        self,
        ledger: Ledger,
        deployment: Deployment,
        connections: Mapping[str, Connection],
        erasure: Erasure,
        tracer: Tracer = OFF,
    ) -> None:
        self._ledger = ledger
        self._tracer = tracer
        self._deployment = deployment
        self._connections = connections
        self._erasure = erasure
        self._returned = 0
        """Jobs in a row that were for other pools."""

    def process(self, order: OrderKey, worker: str) -> None:
        """Fetch the order if a fetch is due.

        Where this pool lacks its company and another running pool has it, the job goes back for that pool.
        """
        if order.company_id not in self._connections and self._is_declared(order.company_id):
            self._return_job(order)
            return
        self._returned = 0
        if self._retried(partial(self._erasure.erase_again, order)):
            _log.warning("order.erased_again", **self._names(order))
        started = time.time_ns()
        connection = self._connections.get(order.company_id)
        request = connection.limiter.request(worker) if connection else None
        what, fetch, origin = self._retried(partial(self._ledger.start_fetch, order, worker, request))
        bind_origin(origin)
        if what in {"nothing", "held"}:
            _log.info("fetch.skipped", reason=what, **self._names(order))
            return
        if what == "dead":
            _log.error("order.dead_lettered", reason="kills_worker", **self._names(order))
            return
        if fetch is not None:
            queue = self._ledger.redis.names.rq_prefix + (fetch.queue or LIVE)
            with self._tracer.job(
                queue, origin.traceparents, started, **self._names(order), attempt=fetch.attempts + 1
            ):
                self._try_fetch(order, fetch, worker)

    def _try_fetch(self, order: OrderKey, fetch: Fetch, worker: str) -> None:
        try:
            self._fetch(order, fetch, worker)
        except Exception as error:
            # An internal error is a failed attempt, not a crash: three crashes make the dead letter `kills_worker`.
            is_redis = is_unavailable(error)
            decision = policy.of_redis_unavailable() if is_redis else policy.of_internal_error(fetch)
            self._fail(order, fetch, worker, decision)
            _log.error("job.failed", order_id=order.order_id, error=type(error).__name__, trace=log.trace_of(error))

    def _is_declared(self, company_id: str) -> bool:
        """Return whether a running pool has this company."""
        pools = self._retried(self._deployment.running).values()
        return any(company_id in pool.configuration.companies for pool in pools)

    def _return_job(self, order: OrderKey) -> None:
        """Put the job back for the pools that know its company, and step aside so that they get it.

        The pause grows while this worker gets nothing else, so that it does not take the same jobs again and again.
        """
        bind_origin(self._retried(partial(self._ledger.return_job, order)))
        _log.info("job.returned", reason="unknown_company", **self._names(order))
        time.sleep(policy.step_aside(self._returned) / 1000)
        self._returned += 1

    def _fetch(self, order: OrderKey, fetch: Fetch, worker: str) -> None:
        connection = self._connections.get(order.company_id)
        if connection is None:
            wait = policy.jittered(policy.no_company_wait(fetch.deferrals))
            self._fail(order, fetch, worker, policy.Decision("deferred", "unknown_company", wait))
            return
        queue: Literal["live", "backfill"] = "backfill" if fetch.queue == BACKFILL else "live"
        try:
            with connection.limiter.permit(
                queue, worker, order=order.member, deadline=fetch.deadline, asked=fetch.permit
            ) as permit:
                started = time.perf_counter()
                try:
                    fetched = connection.client.get_order(order.order_id)
                except UpstreamError as error:
                    duration = round((time.perf_counter() - started) * 1000)
                    decision = policy.of_order(error, fetch, permit.failed(error, fetch.missing_ms))
                    self._fail(order, fetch, worker, decision, error.http_status, duration)
                    return
        except Denied as denied:
            wait = policy.denied_wait(denied, fetch)
            self._fail(order, fetch, worker, policy.Decision("deferred", denied.reason, wait))
            return
        self._store(order, fetch, fetched, worker)

    def _store(self, order: OrderKey, fetch: Fetch, fetched: Fetched, worker: str) -> None:
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
        with self._tracer.script("store_fetch"):
            stored = retry_until(self._ledger.redis, fetch.deadline, store)
        self._tracer.outcome(stored.what, give_up if stored.what == "dead" else "")
        common = self._names(order)
        if stored.what in {"refused", "erased"}:
            _log.info("fetch.skipped", reason="superseded" if stored.what == "refused" else "erased", **common)
            return
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
        with self._tracer.script("fail_fetch"):
            became = retry_until(self._ledger.redis, fetch.deadline, fail)
        self._tracer.outcome(became, decision.reason if became in {"retry", "dead"} else "")
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
        return wait_for_redis(self._ledger.redis, step)

    def _names(self, order: OrderKey) -> dict[str, str]:
        """Return what names the order in the log."""
        connection = self._connections.get(order.company_id)
        return {"order_id": order.order_id, "company": connection.slug if connection else "unknown"}


def wait_for_redis(redis: Redis, step: Callable[[], T]) -> T:
    """Return what a step returns; while Redis is unavailable it is repeated for REDIS_WAIT."""
    return retry_until(redis, time.monotonic() + policy.REDIS_WAIT / 1000, step)


def bind_origin(origin: Origin) -> None:
    """Name the POST behind the order in every line that follows."""
    unbind_contextvars("request_id", "trace_id", "span_id")
    known = {"request_id": origin.request_id, "trace_id": trace_id(origin.traceparents.partition(" ")[0])}
    bind_contextvars(**{name: value for name, value in known.items() if value})
