"""Reconciling: when it runs, and how orders without an event are found in the order list and fetched."""

from __future__ import annotations

import contextvars
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from app.dev.sandbox import process
from app.dev.sandbox.process import Sandbox
from app.dev.valkey import Valkey
from app.erased_file import ErasedFile
from app.ledger.ledger import Ledger
from app.ledger.redis import Redis
from app.ledger.work import Requested
from app.reconcile.compare import STUCK_AFTER
from app.reconcile.run import Reconcile, Report
from app.reconcile.state import AGAIN_AFTER, FIRST_AFTER, TRIGGER_EVERY, Schedule
from app.upstream.transport import DeadlineTransport
from tests.lab import KEYS, LEASE, PARTNER, VENUE
from tests.lab_upstream import MINUTE, ReconcileLab, exit_code, forked


class Venue(ReconcileLab):
    """The company of one test, at upstream and here."""

    def __init__(self, redis: Redis, http: DeadlineTransport, sandbox: Sandbox, tenant: str) -> None:
        self.sandbox, self.tenant = sandbox, tenant
        company_id = sandbox.company_id(tenant, "Production", "Museum")
        super().__init__(redis, http, sandbox.url, tenant, company_id)

    def orders(self, count: int, **wish: Any) -> list[str]:
        """Make orders without an event."""
        address = {"tenant": self.tenant, "environment": "Production", "company": "Museum", "partner_id": PARTNER}
        made = self.sandbox.admin("POST", "orders", {**address, "count": count, **wish})["orders"]
        return [one["order_id"] for one in made]

    def settle(self, order_id: str, status: str) -> None:
        self.sandbox.admin("POST", "settle", {"order_id": order_id, "status": status})

    def fetched(self, count: int, **wish: Any) -> list[str]:
        """Make orders that are fetched already."""
        made = self.orders(count, **wish)
        self.request_fetch(*map(self.key, made), queue="backfill")
        self.fetch_backfill()
        return made

    def statuses(self, *order_ids: str) -> list[str | None]:
        return [self.field("status", self.key(one)) for one in order_ids]


@pytest.fixture
def http() -> Iterator[DeadlineTransport]:
    with DeadlineTransport(5) as one:
        yield one


@pytest.fixture
def venue(
    sandbox: Sandbox, redis_client: Redis, http: DeadlineTransport, request: pytest.FixtureRequest
) -> Iterator[Venue]:
    """A company that no other test uses, and an empty Redis."""
    tenant = request.node.name.replace("[", "-").replace("]", "")
    yield Venue(redis_client, http, sandbox, tenant)
    sandbox.admin("PUT", "faults", [])


def test_an_erased_order_is_not_missed_after_redis_was_emptied(venue: Venue, tmp_path: Path) -> None:
    """Neither a settled one, nor one that settles never or is not listed any more."""
    settled, other, stuck = *venue.orders(2), *venue.orders(1, mix={"Processing": 1})
    venue.checkpoint.watch(["00000000-0000-4000-8000-000000000001", stuck], venue.now)
    venue.now += STUCK_AFTER + 1000
    venue.erased = ErasedFile(tmp_path / "erased")
    venue.erased.add([venue.key(one) for one in (settled, stuck, "00000000-0000-4000-8000-000000000001")])

    report = venue.run()

    assert (report.queued, venue.queued("backfill")) == (1, [other])
    assert venue.run().queued == 0


def test_orders_without_an_event_are_queued_once(venue: Venue) -> None:
    """Whatever their status; a pending or fetched order is not a discrepancy."""
    made = venue.orders(4, mix={"Issued": 1, "Draft": 1, "Error": 1, "Cancelled": 1})

    first, second = venue.run(), venue.run()

    assert (first.outcome, dict(first.discrepancies), second.queued) == ("complete", {"no_event": 4}, 0)
    assert sorted(venue.queued("backfill")) == sorted(made)
    venue.fetch_backfill()
    assert venue.run().queued == 0
    assert set(venue.statuses(*made)) == {"Issued", "Draft", "Error", "Cancelled"}


def test_an_order_that_reconcile_finds_has_the_id_of_the_run_and_one_with_an_event_keeps_its_own(venue: Venue) -> None:
    unannounced, announced = map(venue.key, venue.orders(2))
    venue.accept(announced)
    venue.fetch_and_store(announced, "order-draft")
    run = venue.reconcile()

    with capture_logs(processors=(merge_contextvars,)) as lines:
        contextvars.Context().run(run.run)

    found = {line["order_id"]: line["request_id"] for line in lines if line["event"] == "reconcile.discrepancy_found"}
    assert found == {unannounced.order_id: run.request_id, announced.order_id: "request-1"}
    assert [venue.field("request_id", one) for one in (unannounced, announced)] == [run.request_id, "request-1"]
    assert venue.reconcile().request_id != run.request_id


def test_a_confirmed_and_a_cancelled_order_are_fetched_once_more(venue: Venue) -> None:
    """Neither sends an event (upstream.md 4)."""
    draft, issued = venue.fetched(2, mix={"Draft": 1, "Issued": 1})
    assert venue.run().queued == 0
    if venue.client.get_order(draft).order.status != "Draft":
        draft, issued = issued, draft

    venue.client.confirm_order(draft, "PAID-1")
    venue.client.delete_order(issued)
    report = venue.run()

    assert dict(report.discrepancies) == {"changed": 2}
    venue.fetch_backfill()
    assert venue.statuses(draft, issued) == ["Issued", "Cancelled"]
    assert venue.run().queued == 0


def test_a_replaced_order_without_its_event_is_found(venue: Venue) -> None:
    """Its job differs: this is not the settlement that was fetched."""
    (order_id,) = venue.fetched(1)
    venue.settle(order_id, "Error")
    venue.settle(order_id, "Issued")

    assert dict(venue.run().discrepancies) == {"no_event": 1}


def test_an_order_that_is_unsettled_for_ten_minutes_is_fetched(venue: Venue) -> None:
    """It is watched, since it does not change in the list; then the ledger rechecks it."""
    stuck, settles = venue.orders(2, mix={"Processing": 1})
    assert venue.run().queued == 0
    assert set(venue.checkpoint.watched()) == {stuck, settles}
    venue.settle(settles, "Issued")
    venue.now += 9 * MINUTE
    assert dict(venue.run().discrepancies) == {"no_event": 1}
    venue.now += 2 * MINUTE

    assert dict(venue.run().discrepancies) == {"stuck": 1}
    assert venue.queued("backfill") == [settles, stuck]
    venue.fetch_backfill()
    assert venue.run().queued == 0
    assert venue.checkpoint.watched() == {}


def test_a_dead_letter_that_the_list_shows_settled_is_fetched_once_for_each_row(venue: Venue) -> None:
    """Its reason may have passed, except that an order killed its workers. It counts until it is fetched."""
    missing, refused, killer = map(venue.key, venue.orders(3))
    for order, reason in ((missing, "order_missing"), (refused, "bad_request"), (killer, "kills_worker")):
        venue.request_fetch(order, queue="backfill")
        venue.dead_letter(order, reason)

    first = venue.run()

    assert (dict(first.discrepancies), first.dead) == ({"dead": 2}, 1)
    assert [venue.field("dead", one) for one in (missing, refused, killer)] == [None, None, "kills_worker"]
    venue.dead_letter(refused, "bad_request")
    venue.fetch_backfill()
    second = venue.run()
    assert (second.queued, second.dead) == (0, 2)
    venue.settle(refused.order_id, "Cancelled")
    assert dict(venue.run().discrepancies) == {"dead": 1}
    venue.fetch_backfill()
    last = venue.run()
    assert (last.queued, last.dead, venue.statuses(refused.order_id)) == (0, 1, ["Cancelled"])


@pytest.mark.parametrize("hours", [None, 4, 72])
def test_a_pending_order_that_no_dispatcher_sees_is_due_at_once(venue: Venue, hours: int | None) -> None:
    """It is not in `due`, or stands there at a time that no wait reaches; one under a lease is being fetched."""
    lost, waiting, running = map(venue.key, venue.orders(3))
    venue.accept(lost, waiting, running)
    venue.start_fetch(running)
    venue.clear_queues()
    venue.redis.zrem(KEYS.due, lost.member, running.member)
    if hours is not None:
        venue.redis.zadd(KEYS.due, {lost.member: venue.now + hours * 60 * MINUTE})

    report, again = venue.run(), venue.run()

    assert (dict(report.discrepancies), again.queued) == ({"unscheduled": 1}, 0)
    assert venue.due().keys() == {lost, waiting}
    assert (venue.due_in(lost), venue.queued("live")) == (120, [lost.order_id] if hours is None else [])


def test_an_order_in_due_without_a_record_is_fetched(venue: Venue) -> None:
    """The dispatcher removes what has no record from `due`; the list has the order."""
    (order_id,) = venue.orders(1)
    venue.accept(venue.key(order_id))
    venue.redis.delete(KEYS.record(venue.key(order_id)))

    assert dict(venue.run().discrepancies) == {"no_event": 1}
    assert venue.try_start(venue.key(order_id)) == "fetch"


@pytest.mark.parametrize("others", [0, 25, 60], ids=["empty", "behind", "overtaken"])
def test_where_row_versions_start_lower_again_the_whole_list_is_read(
    redis_client: Redis, http: DeadlineTransport, others: int
) -> None:
    """A restored database or another environment: nothing would be listed after the old checkpoint for ever.

    Or the row versions have passed it since, and the orders before would never be read.
    """
    with process.start() as first, process.start() as second:
        before = Venue(redis_client, http, first, "restored")
        before.fetched(50)
        assert before.run().rows == 50
        after = Venue(redis_client, http, second, "restored")
        made = after.orders(others, reference="AFTER") if others else []
        after.now += 11 * MINUTE

        report = after.run()
        after.now += 11 * MINUTE
        again = after.run()

    assert (report.started_over, report.outcome, again.started_over) == (True, "complete", False)
    assert sorted(after.queued("backfill")) == sorted(made)
    assert again.rows == min(others, 20)


def test_only_changes_since_the_checkpoint_are_read_again(venue: Venue) -> None:
    """The last 20 rows too, and for ten minutes the last page, since row versions may commit out of order."""
    venue.fetched(25)
    assert venue.run().rows == 25
    venue.now += 5 * MINUTE
    assert venue.run().rows == 25
    venue.now += 6 * MINUTE
    venue.orders(1)

    assert (venue.run().rows, venue.run().rows) == (21, 21)


@pytest.mark.parametrize("kind", ["status", "rubbish", "truncated", "cut"])
def test_a_list_that_breaks_off_is_continued_by_the_next_run(venue: Venue, kind: str) -> None:
    """The pages before are queued and behind the checkpoint, except for the last 20 rows."""
    venue.page_size = 25
    venue.orders(75)
    fault = {"kind": kind, "company_id": venue.company_id, "operation": "listOrdersByPartner", "status": 401}
    run = interrupted(venue, before=lambda: venue.sandbox.admin("POST", "faults", fault)).run()
    assert (run.outcome, run.pages, run.queued) == ("failed", 1, 25)
    assert run.error is not None
    if kind == "status":
        run = venue.run()
        assert (run.outcome, run.pages, run.error and run.error.reason) == ("failed", 0, "breaker_open")
    assert venue.redis.keys("ota:permits:*") == []
    venue.sandbox.admin("PUT", "faults", [])
    venue.now += 15 * MINUTE

    run = venue.run()

    assert (run.outcome, run.rows, run.queued) == ("complete", 70, 50)


def interrupted(
    lab: ReconcileLab, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> Reconcile:
    """Return a run that calls `before` and `after` around each request of fetches."""
    ledger = Ledger(lab.redis, order_days=400, fetch_lease=LEASE)
    request_fetch = ledger.request_fetch

    def around(*arguments: Any, **named: Any) -> Requested:
        before()
        queued = request_fetch(*arguments, **named)
        after()
        return queued

    ledger.request_fetch = around  # type: ignore[method-assign]
    return lab.reconcile(ledger)


def test_a_kill_before_the_checkpoint_repeats_the_page_and_fetches_nothing_twice(venue: Venue) -> None:
    """The checkpoint has not moved, and the orders are pending, so they are not a discrepancy."""
    made = venue.orders(3)
    killed = interrupted(venue, after=lambda: os.kill(os.getpid(), signal.SIGKILL))

    assert exit_code(forked(killed.run)) == -signal.SIGKILL

    venue.now += 20 * MINUTE
    assert venue.checkpoint.start(venue.now) == 0
    report = venue.run()
    assert (report.rows, report.queued) == (3, 0)
    assert sorted(venue.queued("backfill")) == sorted(made)


def test_after_a_flush_of_redis_all_orders_are_fetched_again(venue: Venue) -> None:
    """Without a checkpoint the whole list is read; each run queues its share of a minute and the next continues.

    None is queued while those of the last run still wait: without a backfill worker the queue would grow for ever.
    """
    made = venue.fetched(60)
    assert venue.run().queued == 0
    venue.redis.flushall()
    venue.per_minute = 25  # 0.8 of it: a page and 19 orders
    runs: list[Report] = []

    while not runs or runs[-1].outcome != "complete":
        runs.append(venue.run())
        if len(runs) != 2:
            venue.fetch_backfill()
        venue.now += MINUTE

    assert [run.queued for run in runs] == [19, 19, 0, 19, 3]
    assert {run.outcome for run in runs[:-1]} == {"paced"}
    records = [venue.record(venue.key(one)) for one in made]
    assert all(one["fetched_generation"] == one["generation"] == "1" for one in records)


def test_while_a_live_order_is_pending_a_run_uses_a_fifth_of_the_calls(venue: Venue) -> None:
    """The rest is for live orders; jobs in backfill count as used."""
    venue.orders(60)
    venue.per_minute = 100
    live = venue.key("77777777-7777-4777-8777-777777777777")
    venue.request_fetch(live)

    assert venue.run().queued == 19
    assert (venue.run().pages, len(venue.queued("backfill"))) == (1, 19)
    assert venue.try_start(live) == "fetch"


def test_two_machines_that_read_the_same_list_fetch_each_order_once(venue: Venue) -> None:
    """This holds without the lease, which only saves calls."""
    venue.orders(30)
    venue.page_size = 5

    pids = [forked(venue.reconcile().run) for _ in range(2)]
    assert [exit_code(pid) for pid in pids] == [0, 0]

    assert len(venue.queued("backfill")) == len(set(venue.queued("backfill"))) == 30
    venue.fetch_backfill()
    venue.now += 20 * MINUTE
    assert venue.run().queued == 0
    gets = [row["gets"] for row in venue.sandbox.admin("GET", f"orders?company_id={venue.company_id}")]
    assert gets == [1] * 30


def test_a_redis_that_dies_during_a_run_loses_nothing(sandbox: Sandbox, own_valkey: Valkey) -> None:
    """The run raises, the checkpoint stays, and the next run finds the same orders."""
    with Redis.from_url(own_valkey.url, retry=Retry(NoBackoff(), 0)) as redis, DeadlineTransport(5) as http:
        venue = Venue(redis, http, sandbox, "redis-dies")
        made = venue.orders(3)
        with pytest.raises(RedisError):
            interrupted(venue, before=own_valkey.kill).run()
        own_valkey.restart()
        venue.now += 60 * MINUTE

        assert venue.checkpoint.start(venue.now) == 0
        assert venue.run().queued == 3
        assert sorted(venue.queued("backfill")) == sorted(made)


NOW = 1_795_000_000_000
EVERY = 15 * MINUTE


@pytest.fixture
def schedule(redis_client: Redis) -> Schedule:
    return Schedule(redis_client, VENUE, lease=60_000, every=EVERY)


def trigger(redis: Redis) -> None:
    """Count a rejected event, as the web process does."""
    redis.hincrby(KEYS.reconcile(VENUE), "triggers", 1)


def run(schedule: Schedule, now: int) -> str | None:
    """Run to the end if a run is due; return its cause."""
    with schedule.acquire(now) as due:
        if due is None:
            return None
        schedule.complete(due, now + EVERY)
        return due.cause


def test_the_first_run_is_due_after_a_minute_and_the_next_after_each_interval(schedule: Schedule) -> None:
    first, second = NOW + FIRST_AFTER, NOW + FIRST_AFTER + EVERY

    causes = [run(schedule, at) for at in (NOW, first - 1, first, second - 1, second)]

    assert causes == [None, None, "scheduled", None, "scheduled"]


def test_rejected_events_cause_one_run_at_once_and_the_next_later(schedule: Schedule, redis_client: Redis) -> None:
    """Events rejected after a run started cause another: its list may not have had their orders."""
    trigger(redis_client)
    trigger(redis_client)
    assert [run(schedule, NOW), run(schedule, NOW + 1000)] == ["rejected_events", None]
    with schedule.acquire(NOW + EVERY) as due:
        assert due is not None
        trigger(redis_client)
        schedule.complete(due, NOW + 2 * EVERY)

    assert run(schedule, NOW + EVERY + 1) == "rejected_events"
    trigger(redis_client)
    assert run(schedule, NOW + EVERY + TRIGGER_EVERY) is None
    assert run(schedule, NOW + EVERY + 1 + TRIGGER_EVERY) == "rejected_events"


@pytest.mark.parametrize("planned", [7 * 24 * 60 * MINUTE, EVERY + 1])
def test_the_next_run_is_at_most_the_period_of_now_away(schedule: Schedule, redis_client: Redis, planned: int) -> None:
    """RECONCILE_EVERY was longer when it was planned, or the clock of Redis was ahead."""
    redis_client.hset(KEYS.reconcile(VENUE), "next_run_at", NOW + planned)

    causes = [run(schedule, at) for at in (NOW, NOW + EVERY - 1, NOW + EVERY, NOW + 2 * EVERY - 1, NOW + 2 * EVERY)]

    assert causes == [None, None, "scheduled", None, "scheduled"]


@pytest.mark.parametrize("field", ["not_before", "next_trigger_at"])
def test_a_wait_that_a_clock_set_ahead_holds_no_run_back(schedule: Schedule, redis_client: Redis, field: str) -> None:
    trigger(redis_client)
    redis_client.hset(KEYS.reconcile(VENUE), field, NOW + 24 * 60 * MINUTE)

    assert run(schedule, NOW) == "rejected_events"


def test_one_machine_runs_at_a_time_and_then_nothing_is_due(schedule: Schedule, redis_client: Redis) -> None:
    other = Schedule(redis_client, VENUE, lease=60_000, every=EVERY)
    run(schedule, NOW)
    later = NOW + FIRST_AFTER
    with schedule.acquire(later) as due:
        assert due is not None
        assert 0 < int(redis_client.pttl(KEYS.reconcile_lease(VENUE))) <= 60_000
        assert run(other, later) is None
        schedule.complete(due, later + EVERY)

    assert run(other, later + 1) is None


def test_a_run_that_died_is_due_again_after_a_minute(schedule: Schedule) -> None:
    """It must not start again each second."""
    run(schedule, NOW)
    later = NOW + FIRST_AFTER
    with pytest.raises(ZeroDivisionError), schedule.acquire(later):
        raise ZeroDivisionError

    assert run(schedule, later + 1000) is None
    assert run(schedule, later + AGAIN_AFTER) == "scheduled"


def test_a_run_that_outlasts_its_lease_ends_without_an_error(schedule: Schedule, redis_client: Redis) -> None:
    trigger(redis_client)
    with schedule.acquire(NOW):
        redis_client.delete(KEYS.reconcile_lease(VENUE))

    assert redis_client.exists(KEYS.reconcile_lease(VENUE)) == 0


def test_a_postponed_run_continues_a_minute_later_whatever_the_cause(schedule: Schedule, redis_client: Redis) -> None:
    trigger(redis_client)
    with schedule.acquire(NOW) as due:
        assert due is not None
        schedule.postpone(NOW + AGAIN_AFTER)
    trigger(redis_client)

    assert run(schedule, NOW + AGAIN_AFTER - 1) is None
    assert run(schedule, NOW + AGAIN_AFTER) == "scheduled"


def test_after_a_flush_of_redis_the_schedule_starts_again(schedule: Schedule, redis_client: Redis) -> None:
    run(schedule, NOW)
    run(schedule, NOW + FIRST_AFTER)
    redis_client.flushall()

    assert run(schedule, NOW + FIRST_AFTER + 1) is None
    assert run(schedule, NOW + 2 * FIRST_AFTER + 1) == "scheduled"
