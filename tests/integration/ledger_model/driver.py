"""Senders, ops, a pool, its dispatcher and its workers, one step at a time, over the real ledger and inbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from app.ids import OrderKey
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.integration.ledger_model.book import Book
from tests.integration.ledger_model.parts import START, Parts, event_of
from tests.integration.ledger_model.worker import Worker, World

WORKERS: Final = ((LIVE,), (LIVE,), (BACKFILL, LIVE))
"""The last one stands for the workers of both queues."""


class Driver:
    """One interleaving from an empty server on. Steps are public methods, of this class or of a worker by number."""

    def __init__(self, parts: Parts, orders: Sequence[OrderKey]) -> None:
        parts.wire.execute_command("FLUSHDB")
        parts.clock.now = START
        self._parts, self._ledger = parts, parts.ledger
        self._world = World(parts, {order: Book(order) for order in orders})
        self.workers = [Worker(self._world, f"w{number}", queues) for number, queues in enumerate(WORKERS)]
        self._ghosts: list[Worker] = []
        self._outbox: list[OrderKey] = []
        self._born = len(WORKERS)

    @property
    def now(self) -> int:
        return self._world.now

    @property
    def books(self) -> dict[OrderKey, Book]:
        return self._world.books

    @property
    def touched(self) -> frozenset[OrderKey]:
        """Return the orders that the latest step was about."""
        return self._world.touched

    def step(self, name: str, arguments: Sequence[Any] = ()) -> None:
        """Let one thing happen, a moment and a millisecond after the last."""
        self._world.moment += 1
        self._parts.clock.now += 1
        self._touch()
        if hasattr(Worker, name):
            number, *rest = arguments
            getattr(self.workers[number], name)(*rest)
        else:
            getattr(self, name)(*arguments)

    # What upstream, its sender and ops do.

    def settle(self, *orders: OrderKey) -> None:
        """Orders settle, and one POST tells."""
        for order in orders:
            self.books[order].version += 1
        self._accept(orders)

    def settle_silently(self, order: OrderKey) -> None:
        """An order settles; its event is still on the way."""
        self.books[order].version += 1
        self._outbox.append(order)

    def deliver(self) -> None:
        """The events on the way arrive together."""
        orders, self._outbox = self._outbox, []
        if orders:
            self._accept(orders)

    def repeat(self, order: OrderKey) -> None:
        """The sender sends the latest event of an order again."""
        sent = self.books[order].last_event
        if sent:
            self._touch(order)
            assert self._parts.accept([event_of(order, sent)]) == (0, 0, 1), "a repeated event was not dropped"

    def request(self, order: OrderKey, queue: str) -> None:
        """Ops ask for the order: replay, refetch, requeue."""
        self._touch(order)
        self._ledger.request_fetch([order], queue="live" if queue == LIVE else "backfill", reason="refetch")
        self.books[order].settled.append(self._world.moment)

    def retry_delivery(self, order: OrderKey) -> None:
        """Ops give a dead delivery new attempts."""
        self._touch(order)
        self._ledger.retry_delivery(order, self._parts.sinks[0])

    # What happens to workers, and what the pool does about it.

    def kill(self, number: int) -> None:
        """A worker is killed where it stands; another takes its place."""
        self._ghosts.append(self.workers[number])
        self.workers[number] = Worker(self._world, f"w{self._born}", WORKERS[number])
        self._born += 1

    def release(self) -> None:
        """The pool finds the worker that died last. That the pool dies as well is the interleaving without this."""
        if not self._ghosts:
            return
        ghost = self._ghosts.pop()
        if ghost.order is not None:
            self._touch(ghost.order)
        self._ledger.release_worker(ghost.name, "killed", [] if ghost.job is None else [ghost.job])
        if ghost.running is not None:
            ghost.running.repeatable = True
        if ghost.in_delivery is not None:
            ghost.in_delivery.lease_ends = self.now

    def dispatch(self) -> None:
        self._touch(*self.books)
        self._ledger.dispatch_due()

    def wake(self, order: OrderKey) -> None:
        self._touch(order)
        self._ledger.release_worker("nobody", "ended", [order])

    def jump(self, seconds: int) -> None:
        """Nothing happens for a while."""
        self._parts.clock.now += seconds * 1000

    def set_clock(self, seconds: int) -> None:
        """The clock is set on, or back, as one that was wrong is, or as that of another machine differs.

        What was under way, or was to wait, may now be repeated: by this clock its time is over, or never was.
        """
        self._parts.clock.now += seconds * 1000
        for book in self.books.values():
            if book.latest is not None:
                book.latest.wait(0)
            if book.in_delivery is not None:
                book.in_delivery.lease_ends = 0

    def _accept(self, orders: Sequence[OrderKey]) -> None:
        self._touch(*orders)
        events = []
        for number, order in enumerate(orders):
            # Every other event has no timestamp: it is never a duplicate.
            sent = f"{self._world.moment}.{number}" if self._world.moment % 2 else ""
            self.books[order].last_event = sent or self.books[order].last_event
            events.append(event_of(order, sent))
        queued, coalesced, duplicates = self._parts.accept(events)
        assert (queued + coalesced, duplicates) == (len(orders), 0), "a new event was dropped"
        for order in orders:
            self.books[order].settled.append(self._world.moment)

    def _touch(self, *orders: OrderKey) -> None:
        self._world.touched = frozenset(orders)
