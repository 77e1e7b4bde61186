"""What people do to orders by hand: refetch, requeue, redeliver, discard. Commands and the ops page do the same.

Each writes who and why to the audit first, since it may be interrupted, then acts, and returns what happened. None
brings back an order that was erased.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Final, Literal

import msgspec

from app.audit import LONGEST_TEXT, Action, AuditEntry, append
from app.ids import OrderKey
from app.ledger.dead_letters import RECORD_GONE, DeadLetter, DeadLetters
from app.ledger.ledger import Ledger
from app.ledger.orders import Archive
from app.ledger.work import Requested
from app.replay import Plans

_AT_ONCE: Final = 200
"""Orders in one call of request_fetch.lua: between two calls Redis serves others."""

_RATE: Final = 1000.0
"""Orders a second of the plan for one redelivery: it waits for a millisecond."""

Step = Callable[[int], None]
"""Gets the size of each part of the work that is done."""


class Requeued(msgspec.Struct, frozen=True):
    """Dead letters that were requeued: their fetches, and the deliveries that are due now.

    `sinks` are those of all their deliveries, also of those that were neither dead nor waiting any more.
    """

    fetches: Requested
    deliveries: int
    sinks: frozenset[str]


class Operations:
    """The operations of one person, `who`, for one reason, `why`.

    Every method raises OtherSchema, and what redis-py raises. `selected` says in words what it is about, for the audit.
    """

    def __init__(self, ledger: Ledger, plans: Plans, *, who: str, why: str) -> None:
        self._ledger = ledger
        self._plans = plans
        self._archive = Archive(ledger.redis)
        self._dead_letters = DeadLetters(ledger.redis)
        self._who = who
        self._why = why

    def refetch(
        self,
        orders: Mapping[OrderKey, str],
        *,
        queue: Literal["live", "backfill"],
        what: Literal["refetch", "reconcile"],
        selected: str,
        step: Step = lambda _: None,
    ) -> Requested:
        """Request fetches, in the order given; when interrupted, the first ones are queued.

        `orders`: of each the digest of the row in the order list that causes its request, "" without one. Repeated, it
        adds no job where one waits already.
        """
        self._note(what, selected, len(orders))
        # A request would set the time of the last change of an erased order, which then would be kept longer.
        erased = self._archive.erased_among([*orders])
        left, done = iter([order for order in orders if order not in erased]), Requested(erased=len(erased))
        while chunk := list(islice(left, _AT_ONCE)):
            done += self._ledger.request_fetch(chunk, queue=queue, reason=what, listed_rows=orders)
            step(len(chunk))
        return done

    def requeue(
        self,
        letters: Iterable[DeadLetter],
        *,
        queue: Literal["live", "backfill"],
        selected: str,
        count: int,
        step: Step = lambda _: None,
    ) -> Requeued:
        """Request the fetches of dead orders, and make dead deliveries, and those that wait, due now.

        At most `count` of the letters: what fails again meanwhile would come again. Repeated, it does nothing to
        deliveries, and adds no job to an order where one waits.
        """
        self._note("requeue", selected, count)
        left = islice((letter for letter in letters if letter.reason != RECORD_GONE), count)
        fetches, deliveries, sinks = Requested(), 0, set[str]()
        while chunk := list(islice(left, _AT_ONCE)):
            orders = [letter.key for letter in chunk if not letter.sink]
            fetches += self._ledger.request_fetch(orders, queue=queue, reason="requeue")
            sinks.update(letter.sink for letter in chunk if letter.sink)
            deliveries += sum(self._ledger.retry_delivery(letter.key, letter.sink) for letter in chunk if letter.sink)
            step(len(chunk))
        return Requeued(fetches, deliveries, frozenset(sinks))

    def discard(self, letters: Iterable[DeadLetter], *, selected: str, count: int, step: Step = lambda _: None) -> int:
        """Discard dead letters for good; return how many still were dead letters. Repeated, it does nothing."""
        self._note("drop", selected, count)
        discarded = 0
        for letter in letters:
            discarded += self._ledger.discard(letter.key, letter.sink)
            step(1)
        return discarded

    def redeliver(self, order: OrderKey, sink: str) -> Literal["queued", "waiting", "passed"]:
        """Deliver the stored revision to a sink again, without a fetch.

        A delivery that is dead or waits for its next attempt is requeued, another one is a replay of this one order.
        `queued`: it is due now. `waiting`: it was outstanding already, without a failure. `passed`: nothing is stored,
        it was erased, or ended meanwhile. Repeated, it changes nothing until the delivery has ended; then the sink gets
        it once more, with the same idempotency key.
        """
        selected = f"{order.member} to {sink}"
        letters = [one for one in self._dead_letters.of(order, waiting=True) if one.sink == sink]
        if letters:
            done = self.requeue(letters, queue="live", selected=selected, count=1)
            return "queued" if done.deliveries else "passed"
        plan = self._plans.file(
            [(order.member, None)], rate=_RATE, sinks=(sink,), selected=selected, who=self._who, why=self._why
        )
        while (fed := self._plans.feed(plan)).state == "open":
            time.sleep(fed.wait / 1000)
        ended = self._plans.of(plan.id)
        if ended is None or ended.passed:
            return "passed"
        return "queued" if ended.queued else "waiting"

    def _note(self, what: Action, selected: str, orders: int) -> None:
        redis = self._ledger.redis
        entry = AuditEntry(what=what, who=self._who, why=self._why, selected=selected[:LONGEST_TEXT], orders=orders)
        append(redis, redis.names, entry)
