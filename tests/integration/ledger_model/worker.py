"""A worker process between two instructions, each of which may be its last: every step ends where a kill may come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.rq_jobs import queue_key
from app.ledger.work import Failure
from tests.integration.ledger_model.book import Book, Flight, HandOff
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
    lanes: tuple[str, ...]
    job: OrderKey | None = None
    flight: Flight | None = None
    sinks_of: OrderKey | None = None
    hand_off: HandOff | None = None

    @property
    def order(self) -> OrderKey | None:
        """Return what it is busy with."""
        doing = self.flight or self.hand_off
        return doing.order if doing else self.job or self.sinks_of

    def work(self) -> None:
        """It goes on, without trouble."""
        if self.hand_off is not None:
            self._handed(self.hand_off, "done")
        elif self.sinks_of is not None:
            self._hand(self.sinks_of)
        elif self.flight is not None:
            if self.flight.version is None:
                self.flight.version = self.world.books[self.flight.order].version
            else:
                self._finish(self.flight)
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
        while self.flight is not None:
            self.work()

    def unsettled(self, give_up: str) -> None:
        """Upstream answers that the order is being replaced."""
        if self.flight is not None:
            if self.flight.version is None:
                self.flight.version = self.world.books[self.flight.order].version
            self._finish(self.flight, look_at=self.world.now + 2 * policy.MINUTE, give_up=give_up)

    def fail(self, what: Failure) -> None:
        """Upstream does not answer, or says that there is no such order."""
        flight = self.flight
        if flight is None:
            return
        order, due = self._turn_to_sinks(flight.order), self.world.now + RETRY
        became = self._tell(
            lambda: self.world.parts.ledger.fail(
                order, self.name, flight.fetch, self.world.now, what=what, reason=what, due=due
            )
        )
        flight.wait(due)
        if what == "gone" and became != "refused":
            self.world.books[order].take_gone(flight)

    def sink_fails(self) -> None:
        """The sink does not take the revision; it is tried again."""
        if self.hand_off is not None:
            self._handed(self.hand_off, "again")

    def sink_refuses(self) -> None:
        """The sink will never take the revision."""
        if self.hand_off is not None:
            self._handed(self.hand_off, "dead")

    def _pop(self) -> None:
        lanes = [queue_key(lane) for lane in self.lanes]
        popped = self.world.parts.wire.execute_command("LMPOP", len(lanes), *lanes, "LEFT")
        if popped is None:
            return
        job_id = popped[1][0]
        assert job_id not in self.world.ids, f"{job_id} was used twice: RQ would skip the second"
        self.world.ids.add(job_id)
        self.job = OrderKey(job_id[2:38].decode(), job_id[39:75].decode())

    def _begin(self, order: OrderKey) -> None:
        self.world.touched, self.job = frozenset([order]), None
        what, fetch = self.world.parts.ledger.begin(order, self.name, self.world.now)
        if fetch is not None:
            self.flight = Flight(order, fetch, self.world.moment, self.world.now + LEASE)
            self.world.books[order].begin(self.flight, self.world.now)
        elif what == "hand":
            self.sinks_of = order
        elif what == "dead":
            self.world.books[order].give_up()

    def _finish(self, flight: Flight, *, look_at: int | None = None, give_up: str = "") -> None:
        order, book = self._turn_to_sinks(flight.order), self.world.books[flight.order]
        assert flight.version is not None, "an answer is read before it is stored"
        content, now = content_of(flight.version), self.world.now
        stored = self._tell(
            lambda: self.world.parts.ledger.finish(
                order, self.name, flight.fetch, content, now, look_at=look_at, give_up=give_up
            )[0]
        )
        assert (stored == "refused") == (book.stored_fence > flight.fetch.fence), (stored, flight)
        if stored != "refused":
            book.take(flight, settled=look_at is None)
            if look_at is not None:
                flight.wait(look_at)

    def _turn_to_sinks(self, order: OrderKey) -> OrderKey:
        """End a fetch: what was fetched before is still to be handed on, however this one ended."""
        self.world.touched, self.flight = frozenset([order]), None
        if self.world.parts.sinks:
            self.sinks_of = order
        return order

    def _hand(self, order: OrderKey) -> None:
        self.world.touched = frozenset([order])
        book, now = self.world.books[order], self.world.now
        hand_on = self.world.parts.ledger.hand(order, self.name, now)
        if hand_on is None:
            self.sinks_of = None
            return
        assert book.hand_off is None or book.hand_off.lease_ends <= now, "two hand-ons of one order at once"
        assert hand_on.revision > book.handed, "a revision was handed on that the sink has had"
        assert hand_on.raw == b"%d" % (book.stored or 0), "not the content that is kept"
        self.hand_off = book.hand_off = HandOff(order, hand_on, now + policy.HAND_LEASE)

    def _handed(self, hand_off: HandOff, what: Literal["done", "again", "dead"]) -> None:
        order, now = hand_off.order, self.world.now
        # What failed ends the job; after what went well comes the next sink.
        self.sinks_of = order if what == "done" else None
        self.world.touched, self.hand_off = frozenset([order]), None
        self.world.books[order].end(hand_off, what)
        self._tell(
            lambda: self.world.parts.ledger.handed(
                order, self.name, hand_off.hand_on, now, what=what, reason="refused", due=now + RETRY
            )
        )

    def _tell(self, step: Callable[[], T]) -> T:
        """Say it once, or, as a worker does whose connection broke before the answer came, twice."""
        heard = step()
        if self.world.moment % 3 == 0:
            again = step()
            assert again == heard, f"told again, the ledger says {again} after {heard}"
        return heard
