"""The hand-on: revisions go to the sinks one at a time and in order per order, each sink with its own tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from app import log
from app.errors import ReceiverError
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import Patience
from app.ledger.work import Handed, HandOn
from app.upstream.models import parse_order
from workers.sinks import Context, Sink

_log = log.get()


class Delivery:
    """Hands on what is stored; never calls getOrder."""

    def __init__(
        self, *, ledger: Ledger, sinks: Mapping[str, Sink], patience: Patience, clock: Callable[[], int]
    ) -> None:
        self._ledger = ledger
        self._sinks = sinks
        self._patience = patience
        self._clock = clock

    def deliver(self, order: OrderKey, worker: str, slug: str) -> None:
        """Hand on what the sinks have not had, until none is behind, or one fails."""
        while self._sinks and (hand_on := self._next(order, worker)) is not None:
            if not self._hand(order, hand_on, worker, slug):
                return

    def _next(self, order: OrderKey, worker: str) -> HandOn | None:
        return self._patience.run(
            lambda: self._ledger.hand(order, worker, self._clock()), self._clock() + policy.REDIS_PATIENCE
        )

    def _hand(self, order: OrderKey, hand_on: HandOn, worker: str, slug: str) -> bool:
        """Return whether the sink took it; if not, the job ends: its time limit may be spent."""
        common = {
            "order_id": order.order_id,
            "company": slug,
            "sink": hand_on.sink,
            "revision": hand_on.revision,
        }
        context = Context(
            idempotency_key=hand_on.idempotency_key(order),
            company_id=order.company_id,
            order_id=order.order_id,
            revision=hand_on.revision,
            attempt=hand_on.tries,
            request_id=hand_on.request_id,
        )
        if hand_on.tries > len(policy.TRIES) + 1 or hand_on.crashes >= policy.CRASHES_ALLOWED:
            self._handed(order, worker, hand_on, "dead", reason="kills_worker")
            _log.error("order.hand_dead", reason="kills_worker", tries=hand_on.tries - 1, **common)
            return False
        started = perf_counter()
        try:
            self._sinks[hand_on.sink].deliver(parse_order(hand_on.raw), context)
        except BaseException as error:
            # The user's code may raise anything, RQ's time limit too; only its type is kept.
            duration = round((perf_counter() - started) * 1000)
            self._failed(order, hand_on, worker, error, duration, common)
            return False
        duration = round((perf_counter() - started) * 1000)
        self._handed(order, worker, hand_on, "done", duration_ms=duration)
        _log.info("order.handed", duration_ms=duration, **common)
        return True

    def _handed(
        self,
        order: OrderKey,
        worker: str,
        hand_on: HandOn,
        what: Handed,
        *,
        reason: str = "-",
        due: int = 0,
        duration_ms: int = 0,
    ) -> None:
        now = self._clock()
        self._patience.run(
            lambda: self._ledger.handed(
                order, worker, hand_on, now, what=what, reason=reason, due=due, duration_ms=duration_ms
            ),
            min(hand_on.until, now + 2 * policy.REDIS_PATIENCE),
        )

    def _failed(
        self,
        order: OrderKey,
        hand_on: HandOn,
        worker: str,
        error: BaseException,
        duration_ms: int,
        common: dict[str, object],
    ) -> None:
        reason = "unreadable_answer" if isinstance(error, ReceiverError) else type(error).__name__
        wait = policy.until_next_try(hand_on.tries - 1)
        if wait is None:
            self._handed(order, worker, hand_on, "dead", reason=reason, duration_ms=duration_ms)
            _log.error("order.hand_dead", reason=reason, tries=hand_on.tries, **common)
            return
        due = self._clock() + wait
        self._handed(order, worker, hand_on, "again", reason=reason, due=due, duration_ms=duration_ms)
        _log.warning(
            "order.hand_failed",
            error=reason,
            tries=hand_on.tries,
            due_in_s=round(wait / 1000, 1),
            trace=log.trace_of(error),
            **common,
        )
