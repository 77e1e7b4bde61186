"""Odd order lists: rows that commit late, unreadable rows, page keys that repeat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from redis import Redis

from app.reconcile.compare import STUCK_AFTER
from tests.lab_upstream import MINUTE, ReconcileLab, reconcile_lab

VENUE = "11111111-1111-4111-8111-111111111111"


class Upstream:
    """A list whose rows a test writes; each page has two. `odd` replaces the answer, if it is set."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.odd: object = None
        self.asked: list[int] = []
        self.url = ""

    def answer(self, query: dict[str, list[str]]) -> object:
        since, at = int(query["lastRowVersion"][0]), int(query.get("pageKey", ["0"])[0])
        self.asked.append(since)
        if self.odd is not None:
            return self.odd
        found = sorted(
            (row for row in self.rows if int(row["rowVersion"]) > since), key=lambda row: int(row["rowVersion"])
        )
        more = len(found) > at + 2
        return {"morePages": more, "nextPageKey": str(at + 2) if more else "", "data": found[at : at + 2]}

    def commit(self, number: int, version: int, status: str = "Issued", **more: Any) -> str:
        """Add a row to the list; return its order id."""
        order_id = f"00000000-0000-4000-8000-{number:012}"
        self.rows = [row for row in self.rows if row["orderId"] != order_id]
        self.rows.append({"orderId": order_id, "status": status, "rowVersion": str(version), **more})
        return order_id


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    fake = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server looks for
            body = json.dumps(fake.answer(parse_qs(urlsplit(self.path).query))).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the test's output to itself."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lab(upstream: Upstream, redis_client: Redis) -> Iterator[ReconcileLab]:
    with reconcile_lab(redis_client, upstream.url, "tenant", VENUE) as one:
        yield one


def test_a_row_that_commits_late_with_a_lower_version_is_found(lab: ReconcileLab, upstream: Upstream) -> None:
    """Versions are given before the commit: nine minutes after 200 was seen, 150 may still appear."""
    upstream.commit(1, 100)
    upstream.commit(2, 200)
    assert lab.run().queued == 2
    lab.now += 9 * MINUTE
    late = upstream.commit(3, 150)

    assert lab.run().queued == 1
    assert late in lab.queued("backfill")


def test_versions_are_compared_as_numbers(lab: ReconcileLab, upstream: Upstream) -> None:
    """As texts, 99 would come after 100, and nothing new would be listed."""
    upstream.commit(1, 99)
    lab.run()
    lab.now += MINUTE
    upstream.commit(2, 100)
    lab.run()
    lab.now += 11 * MINUTE

    lab.run()

    assert upstream.asked[-1] == 100


def test_old_checkpoints_are_deleted(lab: ReconcileLab, upstream: Upstream) -> None:
    """Of those old enough, only the highest is used."""
    for number in range(1, 40):
        upstream.commit(number, number * 10)
        lab.run()
        lab.now += MINUTE

    assert int(lab.redis.zcard(f"ota:reconcile-checkpoints:{VENUE}")) <= 11


def test_reading_a_page_again_keeps_the_time_of_its_checkpoint(lab: ReconcileLab, upstream: Upstream) -> None:
    """In a quiet night the last page stays the same and must not be read for more than ten minutes."""
    upstream.commit(1, 100)
    for _ in range(4):
        lab.run()
        lab.now += 4 * MINUTE

    assert lab.run().rows == 0


def test_unreadable_rows_hide_no_others(lab: ReconcileLab, upstream: Upstream) -> None:
    good = upstream.commit(1, 100)
    upstream.rows[:0] = [
        {"orderId": "rubbish", "status": "Issued", "rowVersion": "99"},
        {"orderId": "00000000-0000-4000-8000-000000000009", "rowVersion": "101"},
    ]

    report = lab.run()

    assert (report.outcome, report.queued, report.unreadable) == ("complete", 1, 2)
    assert lab.queued("backfill") == [good]


def test_rows_without_a_version_are_compared_and_leave_the_checkpoint(lab: ReconcileLab, upstream: Upstream) -> None:
    """As if upstream ignored `sync`: everything is listed each time and nothing is missed."""
    order_id = "00000000-0000-4000-8000-000000000001"
    upstream.odd = [{"orderId": order_id, "status": "Issued"}]

    assert lab.run().queued == 1
    lab.now += 20 * MINUTE
    assert lab.run().queued == 0
    assert upstream.asked == [0, 0]


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
def test_an_odd_answer_neither_hangs_a_run_nor_moves_the_checkpoint(
    lab: ReconcileLab, upstream: Upstream, odd: object
) -> None:
    """A repeated page key would be followed for ever."""
    upstream.odd = odd

    report = lab.run()

    assert (report.outcome in {"complete", "failed"}, report.queued) == (True, 0)
    assert lab.checkpoint.start(lab.now + 60 * MINUTE) == 0


def test_an_order_older_than_order_days_is_not_fetched(lab: ReconcileLab, upstream: Upstream) -> None:
    """Its record would have expired."""
    upstream.commit(1, 100, receivedAt="2019-01-01T00:00:00Z")
    young = upstream.commit(2, 101, receivedAt="2026-11-01T00:00:00Z")
    lab.now = 1_795_300_000_000

    lab.run()

    assert lab.queued("backfill") == [young]


def test_an_unsettled_order_received_long_ago_is_fetched_at_once(lab: ReconcileLab, upstream: Upstream) -> None:
    """One with a time of receipt in the future is watched first."""
    lab.now = 1_795_300_000_000
    old = upstream.commit(1, 100, status="Scheduled", receivedAt="2026-11-01T00:00:00Z")
    ahead = upstream.commit(2, 101, status="Processing", receivedAt="2027-11-01T00:00:00Z")

    assert dict(lab.run().discrepancies) == {"stuck": 1}
    assert lab.queued("backfill") == [old]
    lab.now += STUCK_AFTER
    assert dict(lab.run().discrepancies) == {"stuck": 1}
    assert lab.queued("backfill") == [old, ahead]
