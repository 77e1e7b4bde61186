"""Orders without an event are found in the order list and fetched, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger.ledger import Ledger
from app.reconcile.run import Reconcile, Report
from tests.lab import LEASE, PARTNER
from tests.lab_upstream import MINUTE, ReconcileLab, exit_code, forked, reconcile_lab


class Venue:
    """The company of one test, at upstream and lab."""

    def __init__(self, sandbox: Sandbox, tenant: str, lab: ReconcileLab) -> None:
        self.sandbox = sandbox
        self.tenant = tenant
        self.lab = lab

    def orders(self, count: int, **wish: Any) -> list[str]:
        """Make orders without an event."""
        address = {"tenant": self.tenant, "environment": "Production", "company": "Museum", "partner_id": PARTNER}
        made = self.sandbox.admin("POST", "orders", {**address, "count": count, **wish})["orders"]
        return [one["order_id"] for one in made]

    def settle(self, order_id: str, status: str) -> None:
        self.sandbox.admin("POST", "settle", {"order_id": order_id, "status": status})

    def fault(self, kind: str, **rule: Any) -> None:
        rule = {"kind": kind, "company_id": self.lab.company_id, "operation": "listOrdersByPartner"} | rule
        self.sandbox.admin("POST", "faults", rule)

    def fetched(self, count: int, **wish: Any) -> list[str]:
        """Make orders that are fetched already."""
        made = self.orders(count, **wish)
        self.lab.request_fetch(*map(self.key, made), queue="backfill")
        self.lab.fetch_backfill()
        return made

    def statuses(self, *order_ids: str) -> list[str | None]:
        return [self.lab.field("status", self.key(one)) for one in order_ids]

    def key(self, order_id: str) -> OrderKey:
        return OrderKey(self.lab.company_id, order_id)


@pytest.fixture
def venue(sandbox: Sandbox, redis_client: Redis, request: pytest.FixtureRequest) -> Iterator[Venue]:
    """A company that no other test uses, and an empty Redis."""
    tenant = request.node.name.replace("[", "-").replace("]", "")
    company_id = sandbox.company_id(tenant, "Production", "Museum")
    with reconcile_lab(redis_client, sandbox.url, tenant, company_id) as lab:
        yield Venue(sandbox, tenant, lab)
    sandbox.admin("PUT", "faults", [])


def test_orders_without_an_event_are_queued_once(venue: Venue) -> None:
    """Whatever their status; a pending or fetched order is not a discrepancy."""
    made = venue.orders(4, mix={"Issued": 1, "Draft": 1, "Error": 1, "Cancelled": 1})

    first, second = venue.lab.run(), venue.lab.run()

    assert (first.outcome, dict(first.discrepancies), second.queued) == ("complete", {"no_event": 4}, 0)
    assert sorted(venue.lab.queued("backfill")) == sorted(made)
    venue.lab.fetch_backfill()
    assert venue.lab.run().queued == 0
    assert set(venue.statuses(*made)) == {"Issued", "Draft", "Error", "Cancelled"}


def test_a_confirmed_and_a_cancelled_order_are_fetched_once_more(venue: Venue) -> None:
    """Neither sends an event (upstream.md 4)."""
    draft, issued = venue.fetched(2, mix={"Draft": 1, "Issued": 1})
    assert venue.lab.run().queued == 0
    if venue.lab.client.get_order(draft).order.status != "Draft":
        draft, issued = issued, draft

    venue.lab.client.confirm_order(draft, "PAID-1")
    venue.lab.client.delete_order(issued)
    report = venue.lab.run()

    assert dict(report.discrepancies) == {"changed": 2}
    venue.lab.fetch_backfill()
    assert venue.statuses(draft, issued) == ["Issued", "Cancelled"]
    assert venue.lab.run().queued == 0


def test_a_replaced_order_without_its_event_is_found(venue: Venue) -> None:
    """Its job differs: this is not the settlement that was fetched."""
    (order_id,) = venue.fetched(1)
    venue.settle(order_id, "Error")
    venue.settle(order_id, "Issued")

    assert dict(venue.lab.run().discrepancies) == {"no_event": 1}


def test_an_order_that_is_unsettled_for_ten_minutes_is_fetched(venue: Venue) -> None:
    """It is watched, since it does not change in the list; then the ledger rechecks it."""
    stuck, settles = venue.orders(2, mix={"Processing": 1})
    assert venue.lab.run().queued == 0
    assert set(venue.lab.checkpoint.watched()) == {stuck, settles}
    venue.settle(settles, "Issued")
    venue.lab.now += 9 * MINUTE
    assert dict(venue.lab.run().discrepancies) == {"no_event": 1}
    venue.lab.now += 2 * MINUTE

    assert dict(venue.lab.run().discrepancies) == {"stuck": 1}
    assert venue.lab.queued("backfill") == [settles, stuck]
    venue.lab.fetch_backfill()
    assert venue.lab.run().queued == 0
    assert venue.lab.checkpoint.watched() == {}


def test_a_dead_letter_for_a_missing_order_is_fetched_when_the_list_shows_it(venue: Venue) -> None:
    """Other dead letters need a person: the list does not show whether their cause is fixed."""
    there, killer = venue.orders(2)
    for order_id, reason in ((there, "order_missing"), (killer, "kills_worker")):
        venue.lab.request_fetch(venue.key(order_id), queue="backfill")
        venue.lab.dead_letter(venue.key(order_id), reason)

    report = venue.lab.run()

    assert dict(report.discrepancies) == {"no_event": 1}
    assert [venue.lab.field("dead", venue.key(one)) for one in (there, killer)] == [None, "kills_worker"]


def test_all_pages_are_read(venue: Venue) -> None:
    venue.lab.page_size = 3
    venue.orders(10)

    report = venue.lab.run()

    assert (report.pages, report.rows, report.queued) == (4, 10, 10)
    assert venue.lab.redis.keys("ota:permits:*") == []


def test_only_changes_since_the_checkpoint_are_read_again(venue: Venue) -> None:
    """For ten minutes the last page is read again, since row versions may commit out of order."""
    venue.fetched(5)
    assert venue.lab.run().rows == 5
    venue.lab.now += 5 * MINUTE
    assert venue.lab.run().rows == 5
    venue.lab.now += 6 * MINUTE
    venue.orders(1)

    assert (venue.lab.run().rows, venue.lab.run().rows) == (1, 1)


@pytest.mark.parametrize("kind", ["status", "rubbish", "truncated", "cut"])
def test_a_list_that_breaks_off_is_continued_by_the_next_run(venue: Venue, kind: str) -> None:
    """The pages before are queued and behind the checkpoint."""
    venue.lab.page_size = 2
    venue.orders(6)
    run = interrupted(venue.lab, before=lambda: venue.fault(kind, status=401)).run()
    assert (run.outcome, run.pages, run.queued) == ("failed", 1, 2)
    assert run.error is not None
    if kind == "status":
        run = venue.lab.run()
        assert (run.outcome, run.pages, run.error and run.error.reason) == ("failed", 0, "breaker_open")
    assert venue.lab.redis.keys("ota:permits:*") == []
    venue.sandbox.admin("PUT", "faults", [])
    venue.lab.now += 15 * MINUTE

    run = venue.lab.run()

    assert (run.outcome, run.rows, run.queued) == ("complete", 4, 4)


def interrupted(
    lab: ReconcileLab, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> Reconcile:
    """Return a run that calls `before` and `after` around each request of fetches."""
    ledger = Ledger(lab.redis, order_days=400, fetch_lease=LEASE)
    request_fetch = ledger.request_fetch

    def around(*arguments: Any, **named: Any) -> int:
        before()
        queued = request_fetch(*arguments, **named)
        after()
        return queued

    ledger.request_fetch = around  # type: ignore[method-assign]
    return lab.reconcile(ledger)


def test_a_kill_before_the_checkpoint_repeats_the_page_and_fetches_nothing_twice(venue: Venue) -> None:
    """The checkpoint has not moved, and the orders are pending, so they are not a discrepancy."""
    made = venue.orders(3)
    killed = interrupted(venue.lab, after=lambda: os.kill(os.getpid(), signal.SIGKILL))

    assert exit_code(forked(killed.run)) == -signal.SIGKILL

    venue.lab.now += 20 * MINUTE
    assert venue.lab.checkpoint.start(venue.lab.now) == 0
    report = venue.lab.run()
    assert (report.rows, report.queued) == (3, 0)
    assert sorted(venue.lab.queued("backfill")) == sorted(made)


def test_after_a_flush_of_redis_all_orders_are_fetched_again(venue: Venue) -> None:
    """Without a checkpoint the whole list is read; each run queues its share of a minute and the next continues.

    None is queued while those of the last run still wait: without a backfill worker the queue would grow for ever.
    """
    made = venue.fetched(60)
    assert venue.lab.run().queued == 0
    venue.lab.redis.flushall()
    venue.lab.per_minute = 25  # 0.8 of it: a page and 19 orders
    runs: list[Report] = []

    while not runs or runs[-1].outcome != "complete":
        runs.append(venue.lab.run())
        if len(runs) != 2:
            venue.lab.fetch_backfill()
        venue.lab.now += MINUTE

    assert [run.queued for run in runs] == [19, 19, 0, 19, 3]
    assert {run.outcome for run in runs[:-1]} == {"paced"}
    records = [venue.lab.record(venue.key(one)) for one in made]
    assert all(one["fetched_generation"] == one["generation"] == "1" for one in records)


def test_while_a_live_order_is_pending_a_run_uses_a_fifth_of_the_calls(venue: Venue) -> None:
    """The rest is for live orders; jobs in backfill count as used."""
    venue.orders(60)
    venue.lab.per_minute = 100
    live = venue.key("77777777-7777-4777-8777-777777777777")
    venue.lab.request_fetch(live)

    assert venue.lab.run().queued == 19
    assert (venue.lab.run().pages, len(venue.lab.queued("backfill"))) == (1, 19)
    assert venue.lab.try_start(live) == "fetch"


def test_two_machines_that_read_the_same_list_fetch_each_order_once(venue: Venue) -> None:
    """This holds without the lease, which only saves calls."""
    venue.orders(30)
    lab = venue.lab
    lab.page_size = 5

    pids = [forked(lab.reconcile().run) for _ in range(2)]
    assert [exit_code(pid) for pid in pids] == [0, 0]

    assert len(lab.queued("backfill")) == len(set(lab.queued("backfill"))) == 30
    lab.fetch_backfill()
    lab.now += 20 * MINUTE
    assert lab.run().queued == 0
    gets = [row["gets"] for row in venue.sandbox.admin("GET", f"orders?company_id={lab.company_id}")]
    assert gets == [1] * 30


def test_a_redis_that_dies_during_a_run_loses_nothing(sandbox: Sandbox, own_valkey: Valkey) -> None:
    """The run raises, the checkpoint stays, and the next run finds the same orders."""
    tenant = "redis-dies"
    company_id = sandbox.company_id(tenant, "Production", "Museum")
    with (
        Redis.from_url(own_valkey.url, retry=Retry(NoBackoff(), 0)) as redis,
        reconcile_lab(redis, sandbox.url, tenant, company_id) as lab,
    ):
        made = Venue(sandbox, tenant, lab).orders(3)
        with pytest.raises(RedisError):
            interrupted(lab, before=own_valkey.kill).run()
        own_valkey.restart()
        lab.now += 60 * MINUTE

        assert lab.checkpoint.start(lab.now) == 0
        assert lab.run().queued == 3
        assert sorted(lab.queued("backfill")) == sorted(made)
