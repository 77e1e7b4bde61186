"""The steps for one order, over arguments only: begin, a slot, getOrder, finish, and the hand-on to the sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Final

import msgspec
from structlog.contextvars import bind_contextvars

from app import log
from app.errors import UpstreamError
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.rate_limit import Budget, NotNow, Slot
from app.ledger.redis import Patience, is_away
from app.ledger.rq_jobs import BACKFILL
from app.ledger.work import Content, Fetch
from app.upstream.client import ChannelManager, Fetched
from workers.delivery import Delivery

NO_COMPANY_WAIT: Final = 15 * policy.MINUTE
"""Until an order of a company that the settings no longer name is looked at again."""

_log = log.get()


class Connection(msgspec.Struct, frozen=True):
    """How one company's orders are fetched."""

    slug: str
    client: ChannelManager
    budget: Budget


class Processor:
    """Does what an order is owed; every step may be the last before a kill, and none loses the order."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        connections: Mapping[str, Connection],
        delivery: Delivery,
        patience: Patience,
        clock: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._connections = connections
        self._delivery = delivery
        self._patience = patience
        self._clock = clock

    def process(self, order: OrderKey, worker: str) -> None:
        """Fetch the order if it is owed a fetch, then hand on what its sinks have not had."""
        slug = self._slug(order)
        what, fetch = self._patience.run(
            lambda: self._ledger.begin(order, worker, self._clock()), self._clock() + policy.REDIS_PATIENCE
        )
        if what in {"nothing", "held"}:
            _log.info("order.not_needed", order_id=order.order_id, company=slug, verdict=what)
            return
        if what == "dead":
            _log.error("order.dead", order_id=order.order_id, company=slug, reason="kills_worker")
            return
        if fetch is not None:
            bind_contextvars(request_id=fetch.request_id)
            self._fetch_or_let_go(order, fetch, worker)
        # Also after a fetch that failed: what was fetched before is still to be handed on.
        self._delivery.deliver(order, worker, slug)

    def _fetch_or_let_go(self, order: OrderKey, fetch: Fetch, worker: str) -> None:
        """Fetch; a fault of our own is a failed try and no crash, whose count ends in `kills_worker`."""
        try:
            self._fetch(order, fetch, worker)
        except Exception as error:
            now = self._clock()
            decision = policy.of_redis_away(now) if is_away(error) else policy.of_own_fault(fetch, now)
            self._fail(order, fetch, worker, decision)
            _log.error("job.failed", order_id=order.order_id, error=type(error).__name__, trace=log.trace_of(error))

    def _fetch(self, order: OrderKey, fetch: Fetch, worker: str) -> None:
        connection = self._connections.get(order.company_id)
        if connection is None:
            due = self._clock() + policy.spread(NO_COMPANY_WAIT)
            self._fail(order, fetch, worker, policy.Decision("park", "unknown_company", due))
            return
        slot = connection.budget.take("backfill" if fetch.lane == BACKFILL else "live", self._clock, worker)
        if isinstance(slot, NotNow):
            due = slot.until + policy.until_next_turn(fetch.parks)
            self._fail(order, fetch, worker, policy.Decision("park", slot.reason, due))
            return
        started = perf_counter()
        try:
            fetched = connection.client.get_order(order.order_id)
        except UpstreamError as error:
            duration = round((perf_counter() - started) * 1000)
            now = self._clock()
            closed_until = self._give(connection, slot, error, fetch.until)
            decision = policy.of_order(error, fetch, now, closed_until)
            self._fail(order, fetch, worker, decision, http_status=error.http_status, duration_ms=duration)
            return
        except BaseException:
            connection.budget.give(slot, "failed", self._clock())
            raise
        self._patience.run(lambda: connection.budget.give(slot, "answered", self._clock()), fetch.until)
        self._store(order, fetch, fetched, worker)

    def _give(self, connection: Connection, slot: Slot, error: UpstreamError, until: int) -> int:
        wait = error.retry_after
        if wait is None and error.http_status == 429:
            wait = policy.THROTTLED_WAIT
        how = policy.of_connection(error)
        closed_until, opened = self._patience.run(
            lambda: connection.budget.give(slot, how, self._clock(), retry_after=wait), until
        )
        if opened:
            _log.error(
                "upstream.breaker_opened",
                company=connection.slug,
                reason=error.reason,
                http_status=error.http_status,
                open_s=round((closed_until - self._clock()) / 1000),
            )
        return closed_until

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
            guests=found.addresses,
        )
        now = self._clock()
        look_at, give_up = (None, "") if found.settled else policy.of_look(fetch, now)
        stored, revision, changed = self._patience.run(
            lambda: self._ledger.finish(order, worker, fetch, content, now, look_at=look_at, give_up=give_up),
            fetch.until,
        )
        if stored in {"refused", "erased"}:
            why = "superseded" if stored == "refused" else "erased"
            _log.info("order.not_needed", order_id=order.order_id, company=self._slug(order), verdict=why)
            return
        _log.info(
            "order.fetched",
            order_id=order.order_id,
            company=self._slug(order),
            status=content.status,
            revision=revision,
            changed=changed,
            wallets=content.wallets,
            tickets=content.tickets,
            coupons=content.coupons,
            manifest=content.manifest,
            duration_ms=content.duration_ms,
            http_status=content.http_status,
            lane=fetch.lane,
        )
        if stored == "dead":
            _log.error("order.dead", order_id=order.order_id, company=self._slug(order), reason=give_up)

    def _fail(
        self,
        order: OrderKey,
        fetch: Fetch,
        worker: str,
        decision: policy.Decision,
        *,
        http_status: int | None = None,
        duration_ms: int = 0,
    ) -> None:
        now = self._clock()
        became = self._patience.run(
            lambda: self._ledger.fail(
                order,
                worker,
                fetch,
                now,
                what=decision.what,
                reason=decision.reason,
                http_status=http_status,
                due=decision.due,
                duration_ms=duration_ms,
            ),
            fetch.until,
        )
        common = {"order_id": order.order_id, "company": self._slug(order), "http_status": http_status}
        due_in = round((decision.due - now) / 1000, 1)
        if became == "dead":
            _log.error("order.dead", reason=decision.reason, tries=fetch.tries + 1, **common)
        elif became == "gone":
            _log.info("order.gone", **common)
        elif became == "parked":
            _log.info("order.parked", reason=decision.reason, due_in_s=due_in, **common)
        elif became == "again":
            _log.warning("order.again", reason=decision.reason, tries=fetch.tries + 1, due_in_s=due_in, **common)

    def _slug(self, order: OrderKey) -> str:
        connection = self._connections.get(order.company_id)
        return connection.slug if connection else "unknown"
