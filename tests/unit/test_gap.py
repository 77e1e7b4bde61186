"""A row of the list against what the ledger holds: every combination that decides about a paid order."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app.ledger.orders import Holding
from app.reconcile.compare import STUCK_AFTER, Gap, judge, of_watched
from app.times import to_ms
from app.upstream.decode import build
from app.upstream.models import Summary

VENUE = "11111111-1111-4111-8111-111111111111"
ORDER = "00000000-0000-4000-8000-000000000001"
RECEIVED = datetime(2026, 5, 15, 9, 30, tzinfo=UTC)
NOW = to_ms(RECEIVED) + 60_000
OLDEST = NOW - 400 * 86_400_000


def row(status: str = "Issued", **fields: Any) -> Summary:
    given = {"orderId": ORDER, "status": status, "receivedAt": RECEIVED.isoformat(), "rowVersion": "7"}
    issued = {"paymentReference": "PAY-1", "manifestUrl": "https://x.example/m", "jobId": "JOB-1"}
    return build(Summary, given | issued | fields)


def held(status: str = "Issued", **changes: Any) -> Holding:
    """Return an order that is home, as `row()` lists it."""
    values: dict[str, Any] = {"pending": False, "dead": "", "status": status, "fetched_ms": NOW - 1000}
    return Holding(**(values | {"copy": row(status or "Issued")} | changes))


def verdict(row: Summary, holding: Holding | None, *, open_since: int | None = None, now: int = NOW) -> str | None:
    found = judge(VENUE, row, holding, open_since=open_since, now=now, oldest=OLDEST)
    return found.kind if isinstance(found, Gap) else found


@pytest.mark.parametrize("status", ["Issued", "Draft", "Error", "Cancelled", "A word of tomorrow"])
def test_what_we_no_event_of_is_a_gap_however_it_settled(status: str) -> None:
    """An unknown word is settled: the words for "still working" are known."""
    assert verdict(row(status), None) == "no_event"


@pytest.mark.parametrize("status", ["Issued", "Draft", "Error", "Cancelled"])
def test_what_is_home_as_listed_is_no_gap(status: str) -> None:
    assert verdict(row(status), held(status)) is None


@pytest.mark.parametrize(
    ("listed", "differs"),
    [
        (row("Cancelled"), ("status",)),
        (row(paymentReference="MANUALLY CONFIRMED"), ("paymentReference",)),
        (row(paymentReference=""), ("paymentReference",)),
        (row(manifestUrl="https://x.example/other"), ("manifestUrl",)),
        (row(manifestUrl=""), ("manifestUrl",)),
    ],
)
def test_what_changed_without_an_event_is_told_by_the_names_of_the_fields(
    listed: Summary, differs: tuple[str, ...]
) -> None:
    """The values stay where they are: a link opens a door."""
    found = judge(VENUE, listed, held(), open_since=None, now=NOW, oldest=OLDEST)

    assert isinstance(found, Gap)
    assert (found.kind, found.differs) == ("changed", differs)
    assert "x.example" not in repr(found)


def test_another_job_is_another_settlement_of_which_we_no_event() -> None:
    assert verdict(row(jobId="JOB-2"), held()) == "no_event"


@pytest.mark.parametrize(("listed", "copy"), [("", "JOB-1"), ("JOB-1", ""), ("", "")])
def test_a_job_that_only_one_answer_names_is_no_gap(listed: str, copy: str) -> None:
    """Else an older release of upstream, whose two answers differ for ever, would be asked for ever."""
    assert verdict(row(jobId=listed), held(copy=row(jobId=copy))) is None


def test_an_absent_and_an_empty_manifest_are_the_same() -> None:
    """getOrder omits it, the list says "" (upstream.md 6)."""
    assert verdict(row(manifestUrl=""), held(copy=row(manifestUrl=None))) is None


def test_an_order_that_is_owed_a_fetch_is_no_gap() -> None:
    assert verdict(row("Cancelled"), held(pending=True)) is None
    assert verdict(row(), held("", pending=True, copy=None)) is None


@pytest.mark.parametrize(("reason", "expected"), [("order_missing", "changed"), ("unsettled", "changed")])
def test_a_dead_letter_that_the_list_contradicts_is_a_gap(reason: str, expected: str) -> None:
    assert verdict(row(), held("Processing", pending=True, dead=reason)) == expected
    assert verdict(row(), held("", pending=True, dead=reason, copy=None)) == "no_event"


@pytest.mark.parametrize("reason", ["kills_worker", "bad_request", "unreadable_answer", "internal_error"])
def test_any_other_dead_letter_is_for_people(reason: str) -> None:
    """Reviving it at each look would kill three workers each time."""
    assert verdict(row(), held("", pending=True, dead=reason, copy=None)) is None
    assert verdict(row("Processing"), held("", pending=True, dead=reason, copy=None)) is None


def test_what_people_dropped_for_good_stays_dropped() -> None:
    assert verdict(row(), held("", dead="discarded", copy=None)) is None
    assert verdict(row("Processing"), held("", dead="discarded", copy=None)) is None


def test_an_order_gone_and_listed_again_is_a_gap() -> None:
    """Its copy still shows what it was."""
    assert verdict(row(), held("DeletedUpstream")) == "changed"


@pytest.mark.parametrize("status", ["Submitted", "Scheduled", "Processing"])
def test_an_unsettled_order_is_watched_for_ten_minutes_and_then_stuck(status: str) -> None:
    received = to_ms(RECEIVED)
    assert verdict(row(status), None, now=received + STUCK_AFTER - 1) == "watch"
    assert verdict(row(status), None, now=received + STUCK_AFTER) == "stuck"


def test_an_order_being_replaced_is_measured_from_when_it_was_first_seen_so() -> None:
    """receivedAt is not moved by replaceOrder."""
    later = NOW + 30 * 86_400_000
    assert verdict(row("Submitted"), held("Draft"), now=later) == "watch"
    assert verdict(row("Submitted"), held("Draft"), open_since=later - STUCK_AFTER + 1, now=later) == "watch"
    assert verdict(row("Submitted"), held("Draft"), open_since=later - STUCK_AFTER, now=later) == "stuck"


def test_without_a_time_of_receipt_an_unsettled_order_is_watched() -> None:
    assert verdict(row("Submitted", receivedAt=""), None) == "watch"


def test_an_order_older_than_order_days_is_wanted_only_if_we_have_it() -> None:
    """Ours counts ORDER_DAYS from its last change."""
    old = row("Cancelled", receivedAt="2020-01-01T00:00:00Z")

    assert verdict(old, None) is None
    assert verdict(old, held()) == "changed"
    assert verdict(row("Processing", receivedAt="2020-01-01T00:00:00Z"), None) is None
    assert verdict(row(receivedAt=""), None) == "no_event"


@pytest.mark.parametrize(
    ("holding", "is_gap"),
    [
        (None, True),
        (held("Draft", fetched_ms=NOW - 1), True),
        (held("Issued", fetched_ms=NOW + 1), False),
        (held("Processing", fetched_ms=NOW + 1), True),
        (held("Draft", fetched_ms=NOW - 1, pending=True), False),
        (held("Draft", fetched_ms=NOW - 1, pending=True, dead="unsettled"), False),
        (held("Draft", fetched_ms=NOW - 1, dead="discarded"), False),
    ],
)
def test_a_watched_order_that_the_list_shows_no_more_is_stuck_unless_the_ledger_knows_better(
    holding: Holding | None, is_gap: bool
) -> None:
    """It was first seen unsettled at NOW; fetched settled since, its event came."""
    found = of_watched(VENUE, ORDER, holding, NOW)

    assert (found is not None and found.kind == "stuck") is is_gap
