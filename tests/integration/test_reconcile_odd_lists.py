"""Odd order lists: rows that commit late, unreadable rows, page keys that repeat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.ledger.redis import Redis
from app.reconcile.compare import STUCK_AFTER
from app.upstream.transport import DeadlineTransport
from tests.lab import VENUE, order
from tests.lab_upstream import MINUTE, Asked, ReconcileLab, Upstream, says_json


class OddList:
    """An order list whose rows a test writes; each page has two. `odd` replaces the answer, if it is set.

    getOrder answers the same with `changed` fields.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.rows: list[dict[str, Any]] = []
        self.odd: object = None
        self.changed: dict[str, Any] = {}
        self._upstream = upstream
        upstream.will(lambda: says_json(self._answer(upstream.asked[-1]))())

    @property
    def asked(self) -> list[int]:
        """Return the row version that each request named."""
        return [int(one.query["lastRowVersion"]) for one in self._upstream.asked]

    @property
    def fetched(self) -> int:
        """Return the number of getOrder calls."""
        return sum("/orders/" not in one.target for one in self._upstream.asked)

    def _answer(self, asked: Asked) -> object:
        if "/orders/" not in asked.target:
            return next(row for row in self.rows if row["orderId"] in asked.target) | {"items": []} | self.changed
        if self.odd is not None:
            return self.odd
        query = asked.query
        since, at = int(query["lastRowVersion"]), int(query.get("pageKey", "0"))
        rows = sorted(self.rows, key=_version)
        found = [row for row in rows if _version(row) > since]
        more = len(found) > at + 2
        return {"morePages": more, "nextPageKey": str(at + 2) if more else "", "data": found[at : at + 2]}

    def commit(self, number: int, version: object, status: str = "Issued", **more: Any) -> str:
        """Add a row to the list; return its order id."""
        order_id = order(number).order_id
        self.rows = [row for row in self.rows if row["orderId"] != order_id]
        self.rows.append({"orderId": order_id, "status": status, "rowVersion": str(version), **more})
        return order_id


def _version(row: dict[str, Any]) -> float:
    """Return where the row stands in the list; one whose version is no number stands last."""
    try:
        return float(row["rowVersion"])
    except ValueError:
        return math.inf


@pytest.fixture
def orders(upstream: Upstream) -> OddList:
    return OddList(upstream)


@pytest.fixture
def lab(upstream: Upstream, redis_client: Redis) -> Iterator[ReconcileLab]:
    with DeadlineTransport(5) as http:
        yield ReconcileLab(redis_client, http, upstream.url, "tenant", VENUE)


def test_a_row_that_commits_late_with_a_lower_version_is_found(lab: ReconcileLab, orders: OddList) -> None:
    """Versions are given before the commit: nine minutes after 200 was seen, 150 may still appear."""
    orders.commit(1, 100)
    orders.commit(2, 200)
    assert lab.run().queued == 2
    lab.now += 9 * MINUTE
    late = orders.commit(3, 150)

    assert lab.run().queued == 1
    assert late in lab.queued("backfill")


def test_old_checkpoints_are_deleted(lab: ReconcileLab, orders: OddList) -> None:
    """Of those old enough, only the highest is used. As texts, 90 would come after 100, and nothing new be listed."""
    for number in range(1, 60):
        orders.commit(number, number * 10)
        lab.run()
        lab.now += MINUTE

    assert int(lab.redis.zcard(f"ota:reconcile-checkpoints:{VENUE}")) <= 11
    assert orders.asked[-1] == 299, "before the last 20 rows of ten minutes ago"


def test_reading_a_page_again_keeps_the_time_of_its_checkpoint(lab: ReconcileLab, orders: OddList) -> None:
    """In a quiet night the last page stays the same and must not be read for more than ten minutes."""
    for number in range(1, 31):
        orders.commit(number, number)
    for _ in range(4):
        lab.run()
        lab.now += 4 * MINUTE

    assert lab.run().rows == 20


ABSURD = [10**18, 2**63 - 1, 10**30, -7, "NaN", "rubbish", "1e400"]


@pytest.mark.parametrize("version", ABSURD)
def test_one_absurd_row_version_hides_no_later_order(lab: ReconcileLab, orders: OddList, version: object) -> None:
    for number in range(1, 31):
        orders.commit(number, number)
    orders.commit(31, version)
    for number in range(32, 35):
        lab.run()
        lab.now += 11 * MINUTE
        late = orders.commit(number, number)

        assert (lab.run().queued, lab.queued("backfill")[-1]) == (1, late)


def test_an_absurd_row_version_hides_no_new_start(lab: ReconcileLab, orders: OddList) -> None:
    """The one row that is still listed after the checkpoint proves nothing."""
    for number in range(1, 31):
        orders.commit(number, 1000 + number)
    orders.commit(31, 10**18)
    lab.run()
    lab.now += 11 * MINUTE
    for number in range(1, 31):
        orders.commit(number, number)
    late = orders.commit(32, 31)

    report = lab.run()

    assert (report.started_over, report.queued, lab.queued("backfill")[-1]) == (True, 1, late)


@pytest.mark.parametrize(("deleted", "started_over"), [(18, False), (20, True)])
def test_deleted_orders_alone_cause_no_new_start(
    lab: ReconcileLab, orders: OddList, deleted: int, started_over: bool
) -> None:
    """Draft orders vanish from the list. Where all of the last 20 did, the whole list is read once more."""
    for number in range(1, 31):
        orders.commit(number, number, status="Draft")
    lab.run()
    lab.now += 11 * MINUTE
    del orders.rows[-deleted:]

    report = lab.run()
    lab.now += 11 * MINUTE

    assert (report.started_over, lab.run().started_over) == (started_over, False)


FOR_GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a field that the list leaves out": ({"manifestUrl": ""}, {"manifestUrl": "https://x.example/m"}),
    "another status": ({"status": "Draft"}, {"status": "Issued"}),
    "another job": ({"jobId": "JOB-1"}, {"jobId": "JOB-2"}),
    "unsettled in the list alone": (
        {"status": "Processing", "receivedAt": "2020-01-01T00:00:00Z"},
        {"status": "Error"},
    ),
}


@pytest.mark.parametrize("case", FOR_GOOD)
def test_what_a_fetch_does_not_bring_in_line_is_fetched_once_and_reported_once(
    lab: ReconcileLab, orders: OddList, case: str
) -> None:
    """Until its row changes: then it is fetched once more."""
    listed, orders.changed = FOR_GOOD[case]
    order_id = orders.commit(1, 100, **listed)
    lab.accept(lab.key(order_id))
    lab.fetch_and_store(lab.key(order_id), **orders.changed)
    for version, fetched in ((100, 1), (200, 2)):
        orders.commit(1, version, **listed)
        with capture_logs() as lines:
            for _ in range(5):
                report = lab.run()
                lab.fetch_backfill()
                lab.now += 15 * MINUTE

        assert (report.queued, orders.fetched) == (0, fetched)
        assert [one["order_id"] for one in lines if one["event"] == "reconcile.differs_for_good"] == [order_id]
        assert sum(one["event"] == "reconcile.discrepancy_found" for one in lines) == 1


def test_unreadable_rows_hide_no_others(lab: ReconcileLab, orders: OddList) -> None:
    good = orders.commit(1, 100)
    orders.rows[:0] = [
        {"orderId": "rubbish", "status": "Issued", "rowVersion": "99"},
        {"orderId": "00000000-0000-4000-8000-000000000009", "rowVersion": "101"},
    ]

    report = lab.run()

    assert (report.outcome, report.queued, report.unreadable) == ("complete", 1, 2)
    assert lab.queued("backfill") == [good]


def test_rows_without_a_version_are_compared_and_leave_the_checkpoint(lab: ReconcileLab, orders: OddList) -> None:
    """As if upstream ignored `sync`: everything is listed each time and nothing is missed."""
    orders.odd = [{"orderId": order(1).order_id, "status": "Issued"}]

    assert lab.run().queued == 1
    lab.now += 20 * MINUTE
    assert lab.run().queued == 0
    assert orders.asked == [0, 0]


@pytest.mark.parametrize(
    "odd",
    [
        {"morePages": True, "nextPageKey": "again", "data": []},
        {"data": "rubbish"},
        "rubbish",
        [],
        {"morePages": False, "nextPageKey": "", "data": [None, 7, []]},
    ],
)
def test_an_odd_answer_hangs_no_run_and_moves_no_checkpoint(lab: ReconcileLab, orders: OddList, odd: object) -> None:
    """A repeated page key would be followed for ever."""
    orders.odd = odd

    report = lab.run()

    assert (report.outcome in {"complete", "failed"}, report.queued) == (True, 0)
    assert lab.checkpoint.start(lab.now + 60 * MINUTE) == 0


def test_an_order_older_than_order_days_is_not_fetched(lab: ReconcileLab, orders: OddList) -> None:
    """Its record would have expired."""
    orders.commit(1, 100, receivedAt="2019-01-01T00:00:00Z")
    young = orders.commit(2, 101, receivedAt="2026-11-01T00:00:00Z")
    lab.now = 1_795_300_000_000

    lab.run()

    assert lab.queued("backfill") == [young]


def test_an_unsettled_order_received_long_ago_is_fetched_at_once(lab: ReconcileLab, orders: OddList) -> None:
    """One with a time of receipt in the future is watched first."""
    lab.now = 1_795_300_000_000
    old = orders.commit(1, 100, status="Scheduled", receivedAt="2026-11-01T00:00:00Z")
    ahead = orders.commit(2, 101, status="Processing", receivedAt="2027-11-01T00:00:00Z")

    assert dict(lab.run().discrepancies) == {"stuck": 1}
    assert lab.queued("backfill") == [old]
    lab.now += STUCK_AFTER
    assert dict(lab.run().discrepancies) == {"stuck": 1}
    assert lab.queued("backfill") == [old, ahead]
