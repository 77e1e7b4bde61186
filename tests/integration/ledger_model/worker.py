"""A worker process between two instructions, each of which may be its last: every step ends where a kill may come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.rq_jobs import queue_key
from app.ledger.work import Failure
from tests.integration.ledger_model.book import Book, InDelivery, Running
from tests.integration.ledger_model.parts import LEASE, Parts, content_of

RETRY = 5 * policy.SECOND
T = TypeVar("T")


@dataclass
class World:
    """What all share in one interleaving. `moment` counts its steps, `touched` is who the latest one was about."""

    parts: Parts
    books: dict[OrderKey, Book]
    moment: int = 0
    touched: frozenset[OrderKey] = frozenset()
    ids: set[bytes] = field(default_factory=set)

    @property
    def now(self) -> int:
        return self.parts.clock.now


@dataclass
class Worker:
    """Idle, with a job, fetching, or handing on, as workers/processor.py goes about it; public methods are steps."""

    world: World
    name: str
    queues: tuple[str, ...]
    job: OrderKey | None = None
    running: Running | None = None
    sinks_of: OrderKey | None = None
    in_delivery: InDelivery | None = None

    @property
    def order(self) -> OrderKey | None:
        """Return what it is busy with."""
        doing = self.running or self.in_delivery
        return doing.order if doing else self.job or self.sinks_of

    def work(self) -> None:
        """It goes on, without trouble."""
        if self.in_delivery is not None:
            self._delivered(self.in_delivery, "succeeded")
        elif self.sinks_of is not None:
            self._acquire(self.sinks_of)
        elif self.running is not None:
            if self.running.version is None:
                self.running.version = self.world.books[self.running.order].version
            else:
                self._finish(self.running)
        elif self.job is not None:
            self._begin(self.job)
        else:
            self._pop()

    def begin(self) -> None:
        """It takes a job and begins it, in one go."""
        if self.order is None:
            self.work()
        if self.job is not None:
            self.work()

    def fetch(self) -> None:
        """It takes a job, begins it and stores the answer, in one go."""
        self.begin()
        while self.running is not None:
            self.work()

    def unsettled(self, give_up: str) -> None:
        """Upstream answers that the order is being replaced."""
        if self.running is not None:
            if self.running.version is None:
                self.running.version = self.world.books[self.running.order].version
            self._finish(self.running, recheck_ms=2 * policy.MINUTE, give_up=give_up)

    def fail(self, what: Failure) -> None:
        """Upstream does not answer, or says that there is no such order."""
        running = self.running
        if running is None:
            return
        order, due = self._turn_to_sinks(running.order), self.world.now + RETRY
        became = self._tell(
            lambda: self.world.parts.ledger.fail_fetch(
                order, self.name, running.fetch, outcome=what, reason=what, wait_ms=RETRY
            )
        )
        running.wait(due)
        if what == "deleted_upstream" and became != "refused":
            self.world.books[order].take_deletion(running)

    def sink_fails(self) -> None:
        """The sink does not take the revision; it is tried again."""
        if self.in_delivery is not None:
            self._delivered(self.in_delivery, "retry")

    def sink_refuses(self) -> None:
        """The sink will never take the revision."""
        if self.in_delivery is not None:
            self._delivered(self.in_delivery, "dead")

    def _pop(self) -> None:
        queues = [queue_key(queue) for queue in self.queues]
        popped = self.world.parts.wire.execute_command("LMPOP", len(queues), *queues, "LEFT")
        if popped is None:
            return
        job_id = popped[1][0]
        assert job_id not in self.world.ids, f"{job_id} was used twice: RQ would skip the second"
        self.world.ids.add(job_id)
        self.job = OrderKey(job_id[2:38].decode(), job_id[39:75].decode())

    def _begin(self, order: OrderKey) -> None:
        self.world.touched, self.job = frozenset([order]), None
        what, fetch = self.world.parts.ledger.start_fetch(order, self.name)
        if fetch is not None:
            self.running = Running(order, fetch, self.world.moment, self.world.now + LEASE)
            self.world.books[order].begin(self.running, self.world.now)
        elif what == "deliver":
            self.sinks_of = order
        elif what == "dead":
            self.world.books[order].give_up()

    def _finish(self, running: Running, *, recheck_ms: int | None = None, give_up: str = "") -> None:
        order, book = self._turn_to_sinks(running.order), self.world.books[running.order]
        assert running.version is not None, "an answer is read before it is stored"
        content, now = content_of(running.version), self.world.now
        stored = self._tell(
            lambda: (
                self.world.parts.ledger.store_fetch(
                    order, self.name, running.fetch, content, recheck_ms=recheck_ms, give_up=give_up
                ).what
            )
        )
        assert (stored == "refused") == (book.stored_token > running.fetch.token), (stored, running)
        if stored != "refused":
            book.take(running, settled=recheck_ms is None)
            if recheck_ms is not None:
                running.wait(now + recheck_ms)

    def _turn_to_sinks(self, order: OrderKey) -> OrderKey:
        """End a fetch: what was fetched before is still to be delivered on, however this one ended."""
        self.world.touched, self.running = frozenset([order]), None
        if self.world.parts.sinks:
            self.sinks_of = order
        return order

    def _acquire(self, order: OrderKey) -> None:
        self.world.touched = frozenset([order])
        book, now = self.world.books[order], self.world.now
        delivery = self.world.parts.ledger.acquire_delivery(order, self.name)
        if delivery is None:
            self.sinks_of = None
            return
        assert book.in_delivery is None or book.in_delivery.lease_ends <= now, "two hand-ons of one order at once"
        assert delivery.revision > book.delivered, "a revision was delivered on that the sink has had"
        assert delivery.raw == b"%d" % (book.stored or 0), "not the content that is kept"
        self.in_delivery = book.in_delivery = InDelivery(order, delivery, now + policy.DELIVERY_LEASE)

    def _delivered(self, in_delivery: InDelivery, what: Literal["succeeded", "retry", "dead"]) -> None:
        order = in_delivery.order
        # What failed ends the job; after what went well comes the next sink.
        self.sinks_of = order if what == "succeeded" else None
        self.world.touched, self.in_delivery = frozenset([order]), None
        self.world.books[order].end(in_delivery, what)
        self._tell(
            lambda: self.world.parts.ledger.complete_delivery(
                order, self.name, in_delivery.delivery, outcome=what, reason="refused", wait_ms=RETRY
            )
        )

    def _tell(self, step: Callable[[], T]) -> T:
        """Say it once, or, as a worker does whose connection broke before the answer came, twice."""
        heard = step()
        if self.world.moment % 3 == 0:
            again = step()
            assert again == heard, f"told again, the ledger says {again} after {heard}"
        return heard
