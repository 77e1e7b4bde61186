"""Workers, a pool, tickers and senders, one step at a time, over the real ledger and inbox of a real server.

Every step of a worker ends where a kill may come: after the pop, after `begin`, after the answer, after `finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from app.store import clockwork
from app.store.jobs import BACKFILL, LIVE, queue_key
from app.store.keys import OrderKey
from app.store.work import Failure
from tests.integration.ledger_model.book import Book, Flight, HandOff, Worker
from tests.integration.ledger_model.parts import LEASE, START, Parts, content_of, event_of

WORKERS: Final = ((LIVE,), (LIVE,), (BACKFILL, LIVE))
"""The last one stands for the workers of both queues."""


class Driver:
    """One interleaving from an empty server on. Its public methods are the steps; each names who is meant.

    `touched` tells which orders the latest step was about.
    """

    def __init__(self, parts: Parts, orders: Sequence[OrderKey]) -> None:
        parts.wire.execute_command("FLUSHDB")
        parts.clock.now = START
        self._parts, self._ledger = parts, parts.ledger
        self.books = {order: Book(order) for order in orders}
        self.workers = [Worker(f"w{number}", lanes) for number, lanes in enumerate(WORKERS)]
        self.ghosts: list[Worker] = []
        self.touched: frozenset[OrderKey] = frozenset()
        self._moment = 0
        self._outbox: list[OrderKey] = []
        self._ids: set[bytes] = set()
        self._born = len(WORKERS)

    @property
    def now(self) -> int:
        return self._parts.clock.now

    def step(self, name: str, arguments: Sequence[Any]) -> None:
        """Let one thing happen, a moment and a millisecond after the last."""
        self._moment += 1
        self._parts.clock.now += 1
        self.touched = frozenset()
        getattr(self, name)(*arguments)

    def everyone(self) -> None:
        self.touched = frozenset(self.books)

    # What upstream and its sender do.

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
            self.touched = frozenset([order])
            assert self._parts.accept([event_of(order, sent)]) == (0, 0, 1), "a repeated event was not dropped"

    def want(self, order: OrderKey, lane: str) -> None:
        """Ops ask for the order: replay, refetch, requeue."""
        self.touched = frozenset([order])
        self._ledger.want([order], self.now, queue="live" if lane == LIVE else "backfill", why="refetch")
        self.books[order].settled.append(self._moment)

    # What a worker does.

    def work(self, number: int) -> None:
        """A worker goes on, without trouble."""
        worker = self.workers[number]
        if worker.hand_off is not None:
            self._handed(worker, worker.hand_off)
        elif worker.sinks_of is not None:
            self._hand(worker, worker.sinks_of)
        elif worker.flight is not None:
            if worker.flight.version is None:
                worker.flight.version = self.books[worker.flight.order].version
            else:
                self._finish(worker, worker.flight)
        elif worker.job is not None:
            self._begin(worker, worker.job)
        else:
            self._pop(worker)

    def begin(self, number: int) -> None:
        """A worker takes a job and begins it, in one go."""
        if self.workers[number].order is None:
            self.work(number)
        if self.workers[number].job is not None:
            self.work(number)

    def fetch(self, number: int) -> None:
        """A worker takes a job, begins it and stores the answer, in one go."""
        self.begin(number)
        while self.workers[number].flight is not None:
            self.work(number)

    def unsettled(self, number: int, give_up: str) -> None:
        """Upstream answers that the order is being replaced."""
        worker = self.workers[number]
        if worker.flight is not None:
            if worker.flight.version is None:
                worker.flight.version = self.books[worker.flight.order].version
            self._finish(worker, worker.flight, look_at=self.now + 2 * clockwork.MINUTE, give_up=give_up)

    def fail(self, number: int, what: Failure) -> None:
        """Upstream does not answer, or says that there is no such order."""
        worker = self.workers[number]
        flight = worker.flight
        if flight is None:
            return
        self.touched, worker.flight = frozenset([flight.order]), None
        due = self.now + 5000
        became = self._ledger.fail(flight.order, worker.name, flight.fetch, self.now, what=what, reason=what, due=due)
        flight.wait(due, self.now)
        if what == "gone" and became != "refused":
            self.books[flight.order].take_gone(flight)

    def sink_fails(self, number: int) -> None:
        """The sink does not take the revision; it is tried again."""
        worker = self.workers[number]
        if worker.hand_off is not None:
            self._handed(worker, worker.hand_off, what="again")

    def sink_refuses(self, number: int) -> None:
        """The sink will never take the revision."""
        worker = self.workers[number]
        if worker.hand_off is not None:
            self._handed(worker, worker.hand_off, what="dead")

    def crash(self, number: int) -> None:
        """A worker is killed where it stands; another takes its place."""
        self.ghosts.append(self.workers[number])
        self.workers[number] = Worker(f"w{self._born}", WORKERS[number])
        self._born += 1

    # What the pool does.

    def bury(self) -> None:
        """The pool finds the worker that died last. That the pool dies as well is the interleaving without this."""
        if not self.ghosts:
            return
        ghost = self.ghosts.pop()
        self.touched = frozenset([ghost.order] if ghost.order else [])
        self._ledger.abandon(ghost.name, self.now)
        if ghost.flight is not None:
            ghost.flight.repeatable = True
        if ghost.job is not None:
            self._ledger.nudge([ghost.job], self.now)
            self.books[ghost.job].hurry()

    def tick(self) -> None:
        self.everyone()
        self._ledger.tick(self.now)

    def nudge(self, order: OrderKey) -> None:
        self.touched = frozenset([order])
        self._ledger.nudge([order], self.now)
        self.books[order].hurry()

    def jump(self, seconds: int) -> None:
        """Nothing happens for a while."""
        self._parts.clock.now += seconds * 1000

    def _accept(self, orders: Sequence[OrderKey]) -> None:
        self.touched = frozenset(orders)
        events = []
        for number, order in enumerate(orders):
            # Every other event has no timestamp: it is never a duplicate.
            sent = f"{self._moment}.{number}" if self._moment % 2 else ""
            self.books[order].last_event = sent or self.books[order].last_event
            events.append(event_of(order, sent))
        queued, coalesced, duplicates = self._parts.accept(events)
        assert (queued + coalesced, duplicates) == (len(orders), 0), "a new event was dropped"
        for order in orders:
            self.books[order].settled.append(self._moment)

    def _pop(self, worker: Worker) -> None:
        lanes = [queue_key(lane) for lane in worker.lanes]
        popped = self._parts.wire.execute_command("LMPOP", len(lanes), *lanes, "LEFT")
        if popped is None:
            return
        job_id = popped[1][0]
        assert job_id not in self._ids, f"{job_id} was used twice: RQ would skip the second"
        self._ids.add(job_id)
        worker.job = OrderKey(job_id[2:38].decode(), job_id[39:75].decode())

    def _begin(self, worker: Worker, order: OrderKey) -> None:
        self.touched, worker.job = frozenset([order]), None
        what, fetch = self._ledger.begin(order, worker.name, self.now)
        if fetch is not None:
            worker.flight = Flight(order, fetch, self._moment, self.now + LEASE)
            self.books[order].begin(worker.flight, self.now)
        elif what == "hand":
            worker.sinks_of = order

    def _finish(self, worker: Worker, flight: Flight, *, look_at: int | None = None, give_up: str = "") -> None:
        order, book = flight.order, self.books[flight.order]
        self.touched, worker.flight = frozenset([order]), None
        assert flight.version is not None, "an answer is read before it is stored"
        stored, _, _ = self._ledger.finish(
            order, worker.name, flight.fetch, content_of(flight.version), self.now, look_at=look_at, give_up=give_up
        )
        assert (stored == "refused") == (book.stored_fence > flight.fetch.fence), (stored, flight)
        if stored == "refused":
            return
        book.take(flight, settled=look_at is None)
        if look_at is not None:
            flight.wait(look_at, self.now)
        if self._parts.sinks:
            worker.sinks_of = order

    def _hand(self, worker: Worker, order: OrderKey) -> None:
        self.touched = frozenset([order])
        hand_on = self._ledger.hand(order, worker.name, self.now)
        if hand_on is None:
            worker.sinks_of = None
            return
        for other in self.workers:
            if other is not worker and other.hand_off is not None and other.hand_off.order == order:
                assert other.hand_off.lease_ends <= self.now, "two hand-ons of one order at once"
        assert hand_on.revision > self.books[order].handed, "a revision was handed on that the sink has had"
        assert hand_on.raw == b"%d" % (self.books[order].stored or 0), "not the content that is kept"
        worker.hand_off = HandOff(order, hand_on, self.now + clockwork.HAND_LEASE)

    def _handed(self, worker: Worker, hand_off: HandOff, what: str = "done") -> None:
        order = hand_off.order
        self.touched, worker.hand_off, worker.sinks_of = frozenset([order]), None, order
        book = self.books[order]
        if what == "done":
            book.handed = max(book.handed, hand_off.hand_on.revision)
            self._ledger.handed(order, worker.name, hand_off.hand_on, self.now, what="done")
        elif what == "again":
            due = self.now + 5000
            self._ledger.handed(order, worker.name, hand_off.hand_on, self.now, what="again", due=due)
        else:
            book.refused.add(hand_off.hand_on.revision)
            self._ledger.handed(order, worker.name, hand_off.hand_on, self.now, what="dead", reason="refused")
