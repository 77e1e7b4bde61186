"""A row of the order list against the local copy: every combination that decides about a paid order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from app.ledger.orders import LocalCopy
from app.reconcile.compare import STUCK_AFTER, Discrepancy, compare, compare_watched, row_digest
from app.times import to_ms
from app.upstream.decode import build
from app.upstream.models import Summary

VENUE = "11111111-1111-4111-8111-111111111111"
ORDER = "00000000-0000-4000-8000-000000000001"
RECEIVED = datetime(2026, 5, 15, 9, 30, tzinfo=UTC)
NOW = to_ms(RECEIVED) + 60_000
OLDEST = NOW - 400 * 86_400_000
OLD = "2020-01-01T00:00:00Z"


def row(status: str = "Issued", **fields: Any) -> Summary:
    given = {"orderId": ORDER, "status": status, "receivedAt": RECEIVED.isoformat(), "rowVersion": "7"}
    issued = {"paymentReference": "PAY-1", "manifestUrl": "https://x.example/m", "jobId": "JOB-1"}
    return build(Summary, given | issued | fields)


def copy(status: str = "Issued", **changes: Any) -> LocalCopy:
    """Return a fetched order as `row()` lists it."""
    values: dict[str, Any] = {"pending": False, "dead": "", "status": status, "fetched_ms": NOW - 1000}
    return LocalCopy(**(values | {"content": row(status or "Issued")} | changes))


def fetched_for(listed: Summary, **changes: Any) -> LocalCopy:
    """Return what a fetch that this very row caused has stored."""
    return copy(**changes, listed_row=row_digest(listed))


def without_content(**changes: Any) -> LocalCopy:
    return copy("", content=None, **changes)


def kind(row: Summary, copy: LocalCopy | None, *, unsettled_since: int | None = None, now: int = NOW) -> str | None:
    found = compare(VENUE, row, copy, unsettled_since=unsettled_since, now=now, oldest=OLDEST)
    return found.kind if isinstance(found, Discrepancy) else found


@pytest.mark.parametrize("status", ["Issued", "Draft", "Error", "Cancelled", "AStatusOfTomorrow"])
def test_a_settled_order_must_have_a_copy_with_its_status(status: str) -> None:
    """An unknown status counts as settled: the unsettled ones are known."""
    assert kind(row(status), None) == "no_event"
    assert kind(row(status), copy(status)) is None


@pytest.mark.parametrize(
    ("listed", "differs"),
    [
        (row("Cancelled"), "status"),
        (row(paymentReference="MANUALLY CONFIRMED"), "paymentReference"),
        (row(paymentReference=""), "paymentReference"),
        (row(manifestUrl="https://x.example/other"), "manifestUrl"),
        (row(manifestUrl=""), "manifestUrl"),
    ],
)
def test_a_change_without_an_event_names_the_fields_and_not_their_values(listed: Summary, differs: str) -> None:
    found = compare(VENUE, listed, copy(), unsettled_since=None, now=NOW, oldest=OLDEST)

    assert isinstance(found, Discrepancy)
    assert (found.kind, found.differs) == ("changed", (differs,))
    assert "x.example" not in repr(found)


@pytest.mark.parametrize(
    ("listed", "stored", "expected"),
    [
        (row(jobId="JOB-2"), copy(), "no_event"),
        # An older release of upstream may name the job in one of its two answers only.
        (row(jobId=""), copy(), None),
        (row(), copy(content=row(jobId="")), None),
        (row(jobId=""), copy(content=row(jobId="")), None),
        # getOrder omits an absent manifest, the list says "" (upstream.md 6).
        (row(manifestUrl=""), copy(content=row(manifestUrl=None)), None),
        # A pending fetch brings the change anyway.
        (row("Cancelled"), copy(pending=True), None),
        (row(), without_content(pending=True), None),
        # An order that was deleted and is listed again; its content shows the last status.
        (row(), copy("DeletedUpstream"), "changed"),
        # What a person discarded or erased stays so, and an unsettled order proves no dead letter wrong.
        *((row(), without_content(dead=one), None) for one in ("discarded", "erased")),
        *((row("Processing"), without_content(pending=True, dead=one), None) for one in ("bad_request", "unsettled")),
        # Work that no dispatcher starts, be it a fetch or a delivery.
        (row(), without_content(pending=True, unscheduled=True), "unscheduled"),
        (row("Processing"), copy("Draft", pending=True, unscheduled=True), "unscheduled"),
        (row(), copy(unscheduled=True), "unscheduled"),
        # An order older than ORDER_DAYS counts only with a copy, which is kept so long after its last change.
        (row("Cancelled", receivedAt=OLD), None, None),
        (row("Cancelled", receivedAt=OLD), copy(), "changed"),
        (row("Processing", receivedAt=OLD), None, None),
        (row(receivedAt=""), None, "no_event"),
    ],
)
def test_pending_discarded_and_old_orders_are_no_discrepancy(
    listed: Summary, stored: LocalCopy | None, expected: str | None
) -> None:
    assert kind(listed, stored) == expected


@pytest.mark.parametrize("listed", [row(), row("Draft"), row("AStatusOfTomorrow")])
@pytest.mark.parametrize(
    ("reason", "is_fetched"),
    [
        *((one, True) for one in ("order_missing", "unsettled", "bad_request", "unreadable_answer", "http_503")),
        # Each run would kill three workers.
        ("kills_worker", False),
    ],
)
def test_a_dead_letter_of_a_settled_order_is_fetched_once_for_each_row(
    listed: Summary, reason: str, is_fetched: bool
) -> None:
    """Its reason may have passed. What is not fetched is a discrepancy all the same."""
    dead = without_content(pending=True, dead=reason)
    again = msgspec.structs.replace(dead, listed_row=row_digest(listed))

    for stored, fetchable in ((dead, is_fetched), (again, False)):
        found = compare(VENUE, listed, stored, unsettled_since=None, now=NOW, oldest=OLDEST)
        assert isinstance(found, Discrepancy)
        assert (found.kind, found.fetchable, found.for_good) == ("dead", fetchable, False)


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        (row(manifestUrl=""), {}),
        (row("Draft"), {"status": "Issued"}),
        (row(), {"status": "DeletedUpstream"}),
        (row("Processing"), {"status": "Issued"}),
    ],
    ids=["a field left out", "another status", "deleted, and listed", "stuck in the list alone"],
)
def test_what_a_fetch_does_not_bring_in_line_differs_for_good_until_its_row_changes(
    listed: Summary, stored: dict[str, Any]
) -> None:
    changed = msgspec.structs.replace(listed, row_version=8)
    kept = fetched_for(listed, **stored)

    found = [compare(VENUE, one, kept, unsettled_since=0, now=NOW, oldest=OLDEST) for one in (listed, changed)]

    assert [isinstance(one, Discrepancy) and one.for_good for one in found] == [True, False]
    assert [isinstance(one, Discrepancy) and one.fetchable for one in found] == [False, True]


def test_what_no_dispatcher_starts_never_differs_for_good() -> None:
    """Its delivery was lost from `due` after a fetch for this row: another fetch makes it due."""
    found = compare(VENUE, row(), fetched_for(row(), unscheduled=True), unsettled_since=0, now=NOW, oldest=OLDEST)

    assert isinstance(found, Discrepancy)
    assert (found.kind, found.fetchable, found.for_good) == ("unscheduled", True, False)


@pytest.mark.parametrize("status", ["Submitted", "Scheduled", "Processing"])
def test_an_unsettled_order_is_watched_for_ten_minutes_and_then_stuck(status: str) -> None:
    received = to_ms(RECEIVED)
    assert kind(row(status), None, now=received + STUCK_AFTER - 1) == "watch"
    assert kind(row(status), None, now=received + STUCK_AFTER) == "stuck"
    assert kind(row(status, receivedAt=""), None) == "watch"


def test_the_time_of_a_replaced_order_counts_from_when_it_was_first_seen_unsettled() -> None:
    """replaceOrder does not change receivedAt."""
    later = NOW + 30 * 86_400_000
    assert kind(row("Submitted"), copy("Draft"), now=later) == "watch"
    assert kind(row("Submitted"), copy("Draft"), unsettled_since=later - STUCK_AFTER + 1, now=later) == "watch"
    assert kind(row("Submitted"), copy("Draft"), unsettled_since=later - STUCK_AFTER, now=later) == "stuck"


@pytest.mark.parametrize(
    ("stored", "is_stuck"),
    [
        (None, True),
        (copy("Draft", fetched_ms=NOW - 1), True),
        (copy("Issued", fetched_ms=NOW + 1), False),
        (copy("Processing", fetched_ms=NOW + 1), True),
        (copy("Draft", fetched_ms=NOW - 1, pending=True), False),
        (copy("Draft", fetched_ms=NOW - 1, pending=True, dead="unsettled"), False),
        (copy("Draft", fetched_ms=NOW - 1, dead="discarded"), False),
        (copy("Draft", fetched_ms=NOW + 1, pending=True, unscheduled=True), True),
    ],
)
def test_a_watched_order_that_is_not_listed_is_stuck_unless_it_is_pending_dead_or_fetched_since(
    stored: LocalCopy | None, is_stuck: bool
) -> None:
    """It was first seen unsettled at NOW."""
    found = compare_watched(VENUE, ORDER, stored, NOW)

    assert (found is not None) is is_stuck
