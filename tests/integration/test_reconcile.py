"""What no event told of comes home through the list, whatever dies on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev.sandbox.process import Sandbox, start
from app.dev.valkey import Valkey
from app.errors import ConnectionFault
from app.ids import OrderKey
from app.ledger.ledger import Ledger
from tests.integration.station import MINUTE, PARTNER, Station, in_a_child, station


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start(seed=3, options=("--settle-after", "0.05")) as one:
        yield one


class Venue:
    """The company of one test, on both sides."""

    def __init__(self, sandbox: Sandbox, tenant: str, here: Station) -> None:
        self.sandbox = sandbox
        self.tenant = tenant
        self.here = here

    def orders(self, count: int, **wish: Any) -> list[str]:
        """Make orders of which no event tells."""
        address = {"tenant": self.tenant, "environment": "Production", "company": "Museum", "partner_id": PARTNER}
        made = self.sandbox.admin("POST", "orders", {**address, "count": count, **wish})["orders"]
        return [one["order_id"] for one in made]

    def settle(self, order_id: str, status: str) -> None:
        self.sandbox.admin("POST", "settle", {"order_id": order_id, "status": status})

    def fault(self, kind: str, **rule: Any) -> None:
        rule = {"kind": kind, "company_id": self.here.company_id, "operation": "listOrdersByPartner"} | rule
        self.sandbox.admin("POST", "faults", rule)

    def home(self, count: int, **wish: Any) -> list[str]:
        """Make orders that have come home already."""
        made = self.orders(count, **wish)
        self.here.ledger.request_fetch([self.key(one) for one in made], queue="backfill", reason="test")
        self.here.bring_home()
        return made

    def key(self, order_id: str) -> OrderKey:
        return OrderKey(self.here.company_id, order_id)


@pytest.fixture
def venue(sandbox: Sandbox, redis_client: Redis, request: pytest.FixtureRequest) -> Iterator[Venue]:
    """A company that no other test uses, and an empty Redis."""
    tenant = request.node.name.replace("[", "-").replace("]", "")
    company_id = sandbox.company_id(tenant, "Production", "Museum")
    with station(redis_client, sandbox.url, tenant, company_id) as here:
        yield Venue(sandbox, tenant, here)
    sandbox.admin("PUT", "faults", [])


def test_what_no_event_told_of_is_queued_behind_the_live_ones_and_then_is_no_gap(venue: Venue) -> None:
    """Whatever it settled as; once it is home, or only owed, the list says nothing new."""
    made = venue.orders(4, mix={"Issued": 1, "Draft": 1, "Error": 1, "Cancelled": 1})

    first, second = venue.here.run(), venue.here.run()

    assert (first.outcome, dict(first.gaps), second.queued) == ("complete", {"no_event": 4}, 0)
    assert sorted(venue.here.owed()) == sorted(made)
    venue.here.bring_home()
    assert venue.here.run().queued == 0
    assert {one.status for one in map(venue.here.record, made) if one} == {"Issued", "Draft", "Error", "Cancelled"}


def test_a_confirmed_and_a_cancelled_order_are_fetched_once_more(venue: Venue) -> None:
    """No event tells of either (upstream.md 4)."""
    draft, issued = venue.home(2, mix={"Draft": 1, "Issued": 1})
    assert venue.here.run().queued == 0
    if venue.here.client.get_order(draft).order.status != "Draft":
        draft, issued = issued, draft

    venue.here.client.confirm_order(draft, "PAID-1")
    venue.here.client.delete_order(issued)
    report = venue.here.run()

    assert dict(report.gaps) == {"changed": 2}
    venue.here.bring_home()
    assert [one.status for one in map(venue.here.record, (draft, issued)) if one] == ["Issued", "Cancelled"]
    assert venue.here.run().queued == 0


def test_a_replaced_order_whose_event_was_lost_is_no_event(venue: Venue) -> None:
    """Its job is another: that settlement is not the one that we fetched."""
    (order_id,) = venue.home(1)
    venue.settle(order_id, "Error")
    venue.settle(order_id, "Issued")

    assert dict(venue.here.run().gaps) == {"no_event": 1}


def test_an_order_stuck_for_ten_minutes_is_looked_at_though_nothing_of_it_moves(venue: Venue) -> None:
    """The list says nothing new of it; what was seen unsettled is remembered, and then the ledger looks after it."""
    (order_id,) = venue.orders(1, mix={"Processing": 1})
    assert venue.here.run().queued == 0
    venue.here.now += 9 * MINUTE
    assert venue.here.run().queued == 0
    venue.here.now += 2 * MINUTE

    assert dict(venue.here.run().gaps) == {"stuck": 1}
    assert venue.here.owed() == [order_id]
    venue.here.bring_home()
    assert venue.here.run().queued == 0
    assert venue.here.cursor.watched() == {}


def test_a_stuck_order_that_settled_is_watched_no_more(venue: Venue) -> None:
    (order_id,) = venue.orders(1, mix={"Processing": 1})
    venue.here.run()
    assert list(venue.here.cursor.watched()) == [order_id]

    venue.settle(order_id, "Issued")

    assert dict(venue.here.run().gaps) == {"no_event": 1}
    assert venue.here.cursor.watched() == {}


def test_an_order_given_up_for_missing_comes_back_when_the_list_shows_it(venue: Venue) -> None:
    """Other dead letters are for people: the list cannot know whether their cause is mended."""
    there, killer = venue.orders(2)
    for order_id, reason in ((there, "order_missing"), (killer, "kills_worker")):
        key = venue.key(order_id)
        venue.here.ledger.request_fetch([key], queue="backfill", reason="test")
        _, fetch = venue.here.ledger.start_fetch(key, "w-live-1")
        assert fetch is not None
        venue.here.ledger.fail_fetch(key, "w-live-1", fetch, outcome="dead", reason=reason)

    report = venue.here.run()

    assert dict(report.gaps) == {"no_event": 1}
    found = venue.here.record(there), venue.here.record(killer)
    assert [one.dead for one in found if one] == ["", "kills_worker"]


def test_all_pages_are_read(venue: Venue) -> None:
    venue.here.page_size = 3
    venue.orders(10)

    report = venue.here.run()

    assert (report.pages, report.rows, report.queued) == (4, 10, 10)


def test_only_what_changed_since_is_read_again(venue: Venue) -> None:
    """Ten minutes later: until then the last page is read again, since row versions may commit out of order."""
    venue.home(5)
    assert venue.here.run().rows == 5
    venue.here.now += 5 * MINUTE
    assert venue.here.run().rows == 5
    venue.here.now += 6 * MINUTE
    venue.orders(1)

    assert (venue.here.run().rows, venue.here.run().rows) == (1, 1)


@pytest.mark.parametrize("kind", ["status", "rubbish", "truncated", "cut"])
def test_a_list_that_breaks_off_in_the_middle_costs_nothing(venue: Venue, kind: str) -> None:
    """The pages before are queued, the cursor stands behind them, and the next run has the rest."""
    venue.here.page_size = 2
    venue.orders(6)
    run = venue.here.parts(StrikesOnceQueued(venue, kind)).run()
    assert (run.outcome, run.pages, run.queued) == ("failed", 1, 2)
    assert run.error is not None
    assert _slots(venue.here.redis) == []
    venue.sandbox.admin("PUT", "faults", [])
    venue.here.now += 15 * MINUTE

    run = venue.here.run()

    assert (run.outcome, run.rows, run.queued) == ("complete", 4, 4)


class StrikesOnceQueued(Ledger):
    """A ledger during whose first step the list breaks."""

    def __init__(self, venue: Venue, kind: str) -> None:
        super().__init__(venue.here.redis, order_days=400, fetch_lease=60_000)
        self._venue, self._kind = venue, kind

    def request_fetch(self, orders: Iterable[OrderKey], **kwargs: Any) -> int:
        self._venue.fault(self._kind)
        return super().request_fetch(orders, **kwargs)


class DiesOnceQueued(Ledger):
    """A ledger whose process is killed right after it has owed orders a fetch."""

    def request_fetch(self, orders: Iterable[OrderKey], **kwargs: Any) -> int:
        super().request_fetch(orders, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_a_kill_between_queueing_and_the_cursor_repeats_the_page_and_fetches_nothing_twice(venue: Venue) -> None:
    """The cursor has not moved, and the orders are owed: so they are no gap."""
    made = venue.orders(3)
    ledger = DiesOnceQueued(venue.here.redis, order_days=400, fetch_lease=60_000)

    assert in_a_child(venue.here.parts(ledger).run) == -signal.SIGKILL

    venue.here.now += 20 * MINUTE
    assert venue.here.cursor.start(venue.here.now) == 0
    report = venue.here.run()
    assert (report.rows, report.queued) == (3, 0)
    assert sorted(venue.here.owed()) == sorted(made)


def test_a_flushed_redis_fills_up_again_by_itself(venue: Venue) -> None:
    """Without a cursor everything is read; each run queues its share of a minute and the next goes on."""
    made = venue.home(60)
    assert venue.here.run().queued == 0
    venue.here.redis.flushall()
    venue.here.per_minute = 25  # 0.8 of it: a page and 19 orders
    runs = []

    for _ in range(10):
        runs.append(venue.here.run())
        venue.here.bring_home()
        venue.here.now += MINUTE
        if runs[-1].outcome == "complete":
            break

    assert [run.queued for run in runs] == [19, 19, 19, 3]
    assert [run.outcome for run in runs] == ["paced", "paced", "paced", "complete"]
    records = [venue.here.record(one) for one in made]
    assert all(one is not None and one.fetched_generation == one.generation == 1 for one in records)


def test_while_a_live_order_is_owed_a_run_takes_a_fifth(venue: Venue) -> None:
    """The rest of the key's requests is for what guests wait for; what waits in backfill counts as taken."""
    venue.orders(60)
    venue.here.per_minute = 100
    live = venue.key("77777777-7777-4777-8777-777777777777")
    venue.here.ledger.request_fetch([live], queue="live", reason="test")

    assert venue.here.run().queued == 19
    assert (venue.here.run().pages, len(venue.here.owed())) == (1, 19)
    assert venue.here.ledger.start_fetch(live, "w-live-1")[1] is not None


def test_a_backlog_that_is_not_worked_off_is_not_added_to(venue: Venue) -> None:
    """Without a worker for backfill the queue would else grow for ever."""
    venue.orders(60)
    venue.here.per_minute = 25

    reports = [venue.here.run() for _ in range(3)]

    assert [(run.outcome, run.queued) for run in reports] == [("paced", 19), ("paced", 0), ("paced", 0)]


def test_an_open_breaker_is_left_alone(venue: Venue) -> None:
    venue.here.limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))

    report = venue.here.run()

    assert (report.outcome, report.error and report.error.reason) == ("failed", "breaker_open")
    assert report.pages == 0


def test_a_wrong_key_opens_the_breaker_for_the_fetches_too(venue: Venue) -> None:
    """A page is a call like any other: all workers of the key learn from it."""
    venue.fault("status", status=401)

    assert venue.here.run().error is not None
    until = int(venue.here.redis.hget(_breaker(venue.here.redis), "open_until") or 0)
    assert until > venue.here.now


def test_no_slot_and_no_page_are_left_behind_by_a_run(venue: Venue) -> None:
    venue.orders(3)
    venue.here.page_size = 1

    venue.here.run()

    assert _slots(venue.here.redis) == []


def test_two_machines_read_the_same_list_at_once_and_each_order_is_fetched_once(venue: Venue) -> None:
    """The lease spares the calls; without it, still nothing would be lost or fetched twice."""
    venue.orders(30)
    here = venue.here
    here.page_size = 5
    two = [here.parts(), here.parts()]

    pids = [_forked(run.run) for run in two]
    for pid in pids:
        os.waitpid(pid, 0)

    assert len(here.owed()) == len(set(here.owed())) == 30
    here.bring_home()
    here.now += 20 * MINUTE
    assert here.run().queued == 0
    gets = [row["gets"] for row in venue.sandbox.admin("GET", f"orders?company_id={here.company_id}")]
    assert gets == [1] * 30


class LosesRedis(Ledger):
    """A ledger whose Redis is killed when the first orders are to be queued."""

    def __init__(self, redis: Redis, valkey: Valkey) -> None:
        super().__init__(redis, order_days=400, fetch_lease=60_000)
        self._valkey = valkey

    def request_fetch(self, orders: Iterable[OrderKey], **kwargs: Any) -> int:
        self._valkey.kill()
        return super().request_fetch(orders, **kwargs)


def test_a_redis_that_dies_in_mid_run_costs_nothing(sandbox: Sandbox, own_valkey: Valkey) -> None:
    """The run ends with an error, no cursor was moved, and the next run finds what this one found."""
    tenant = "redis-dies"
    company_id = sandbox.company_id(tenant, "Production", "Museum")
    with (
        Redis.from_url(own_valkey.url, retry=Retry(NoBackoff(), 0)) as redis,
        station(redis, sandbox.url, tenant, company_id) as here,
    ):
        made = Venue(sandbox, tenant, here).orders(3)
        with pytest.raises(RedisError):
            here.parts(LosesRedis(redis, own_valkey)).run()
        own_valkey.restart()
        here.now += 60 * MINUTE

        assert here.cursor.start(here.now) == 0
        assert here.run().queued == 3
        assert sorted(here.owed()) == sorted(made)


def _forked(call: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    return pid


def _breaker(redis: Redis) -> str:
    found: Any = redis.keys("ota:breaker:*")
    return str(found[0].decode())


def _slots(redis: Redis) -> list[Any]:
    found: Any = redis.keys("ota:permits:*")
    return list(found)
