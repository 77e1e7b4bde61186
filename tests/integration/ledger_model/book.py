"""What really happened to one order, kept apart from the ledger: the judge of the property test.

Moments count the steps of an interleaving; times are the ledger's ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from app.ids import OrderKey
from app.ledger.work import Delivery, Fetch


class Lost(AssertionError):
    """An order was not fetched, or another promise about it was broken in the end."""


@dataclass
class Running:
    """One fetch: begun, perhaps read (`version` is what upstream answered), perhaps ended.

    `repeatable`: it failed, or its worker is known to be dead, so that its settlement may be fetched again, but not
    before `not_before`.
    """

    order: OrderKey
    fetch: Fetch
    moment: int
    lease_ends: int
    version: int | None = None
    repeatable: bool = False
    not_before: int = 0

    def wait(self, until: int) -> None:
        """Note that the fetch ended without a settled answer, and when it is to be repeated."""
        self.repeatable, self.not_before = True, until


@dataclass
class InDelivery:
    """A revision on its way into a sink."""

    order: OrderKey
    delivery: Delivery
    lease_ends: int


@dataclass
class Book:
    """Upstream's version of an order, and which settlements were fetched."""

    order: OrderKey
    version: int = 0
    settled: list[int] = field(default_factory=list)
    covered: int = -1
    stored: int | None = None
    stored_token: int = 0
    deleted: bool = False
    latest: Running | None = None
    delivered: int = 0
    in_delivery: InDelivery | None = None
    refused: set[int] = field(default_factory=set)
    last_event: str = ""

    def begin(self, running: Running, now: int) -> None:
        """Raise AssertionError for a second getOrder of the same settlement without a reason."""
        last = self.latest
        if last is not None:
            assert running.fetch.token > last.fetch.token, "a fence was given twice"
            if running.fetch.generation == last.fetch.generation:
                assert last.repeatable or last.lease_ends <= now, f"{running} repeats {last} for no reason"
                assert last.not_before <= now, f"{running} repeats {last} too early"
        self.latest = running

    def give_up(self) -> None:
        """Raise AssertionError if an order is given up for the crashes of an older settlement's fetches."""
        assert self.latest is not None
        assert self.latest.fetch.generation == len(self.settled), f"{self.settled} was given up for {self.latest}"

    def take(self, running: Running, *, settled: bool) -> None:
        """Note that the ledger took the answer of this fetch."""
        self.stored_token = running.fetch.token
        self.stored = running.version
        self.deleted = False
        self._cover(running, settled)

    def take_deletion(self, running: Running) -> None:
        """Note that the ledger took it from this fetch that the order is no more."""
        self.stored_token = running.fetch.token
        self.deleted = True
        self._cover(running, settled=True)

    def end(self, in_delivery: InDelivery, what: str) -> None:
        """Note what a sink did with a revision."""
        if self.in_delivery is in_delivery:
            self.in_delivery = None
        if what == "succeeded":
            self.delivered = max(self.delivered, in_delivery.delivery.revision)
        elif what == "dead":
            self.refused.add(in_delivery.delivery.revision)

    def judge(self, content: bytes | None) -> None:
        """Raise Lost unless every settlement was fetched after it was accepted, and the newest content is kept."""
        missed = [moment for moment in self.settled if moment > self.covered]
        if missed:
            raise Lost(f"{self.order.member}: accepted at {missed}, fetched last at {self.covered}")
        if not self.settled or self.deleted:
            return
        expected = b"%d" % self.version
        if content != expected:
            raise Lost(f"{self.order.member}: {content!r} is kept, upstream has {expected!r}")

    def _cover(self, running: Running, settled: bool) -> None:
        if settled:
            self.covered = max(self.covered, running.moment)
