"""What is older than its days is deleted, and what is pending is not. Days pass by a clock of the test or as PTTL."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from app import audit
from app.dev.processes import Process
from app.ledger import policy
from app.ledger.redis import Redis
from app.ledger.retention import MOST_ENTRIES, MOST_ORDERS, Retention
from app.ledger.work import Delivery
from app.replay import Plans
from tests.eventually import eventually
from tests.lab import DUPLICATE, KEYS, ONE, Lab, now_ms, order

EVENT_DAYS: Final = 90
SENT: Final = "2026-11-22T10:00:00Z"


def days(count: float) -> int:
    return round(count * policy.DAY)


def add_events(redis: Redis, ages_in_days: list[float]) -> None:
    """Put events into the stream, the oldest first, as if they came so many days ago."""
    with redis.pipeline(transaction=False) as pipe:
        for number, age in enumerate(ages_in_days):
            pipe.xadd(KEYS.events, {"company": "c", "order": "o"}, id=f"{now_ms() - days(age)}-{number}")
        pipe.execute()


def retention_of(redis: Redis, at: int | None = None) -> Retention:
    """Return what trims, at this time or at that of Redis."""
    clock = None if at is None else lambda: at
    return Retention(redis, event_days=EVENT_DAYS, order_days=400, clock=clock)


class TestEvents:
    def test_old_events_are_deleted_without_new_ones(self, redis_client: Redis) -> None:
        """To the very last: also those that share a node of the stream with younger ones."""
        add_events(redis_client, [*[91.0] * 330, 90.01, 89.99, 1])
        retention = retention_of(redis_client)

        assert sum(retention.trim()[0] for _ in range(3)) == 331
        assert redis_client.xlen(KEYS.events) == 2

    def test_one_call_removes_a_limited_number_and_accept_whole_nodes(self, shop: Lab) -> None:
        """Redis serves others in between. To remove whole nodes of the stream costs an accept nothing."""
        add_events(shop.redis, [91.0] * (MOST_ENTRIES + 500))
        retention = retention_of(shop.redis)

        assert MOST_ENTRIES - 100 <= retention.trim()[0] <= MOST_ENTRIES

        shop.now = now_ms()
        shop.accept()
        assert shop.redis.xlen(KEYS.events) <= 101

    def test_it_trims_once_a_minute(self, redis_client: Redis) -> None:
        retention = retention_of(redis_client)
        retention.trim_each_minute()
        add_events(redis_client, [91.0])

        retention.trim_each_minute()

        assert redis_client.xlen(KEYS.events) == 1

    def test_audit_and_replays_are_trimmed_and_a_plan_expires(self, redis_client: Redis) -> None:
        redis_client.xadd(KEYS.audit, {"what": "erase"}, id=f"{now_ms() - days(91)}-0")
        plan = Plans(redis_client, event_days=EVENT_DAYS).file([(ONE.member, None)], rate=1)
        redis_client.zadd(KEYS.replays, {"old": now_ms() - days(91)})

        retention_of(redis_client).trim()

        assert [entry.what for _, entry in audit.newest_first(redis_client)] == ["replay"]
        assert redis_client.zrange(KEYS.replays, 0, -1) == [plan.id.encode()]
        for key in (KEYS.replay(plan.id), KEYS.replay_todo(plan.id)):
            assert days(EVENT_DAYS) - policy.MINUTE < int(redis_client.pttl(key)) <= days(EVENT_DAYS)


PENDING: Final[dict[str, Callable[[Lab], object]]] = {
    "pending": Lab.accept,
    "fetching": lambda shop: (shop.accept(), shop.start_fetch()),
    "deferred": lambda shop: (shop.accept(), shop.fail_fetch("deferred")),
    "not found": lambda shop: (shop.accept(), shop.fail_fetch("not_found")),
    "dead": lambda shop: (shop.accept(), shop.fail_fetch("dead")),
    "unsettled": lambda shop: (shop.accept(), shop.store_fetch(shop.start_fetch(), 1, recheck=0.001)),
    "not delivered": Lab.accept_and_fetch,
    "delivery failed": lambda shop: (shop.accept_and_fetch(), shop.deliver("retry")),
    "delivery dead": lambda shop: (shop.accept_and_fetch(), shop.deliver("dead"), shop.acquire_delivery()),
    "delivered, then an event": lambda shop: (delivered(shop), shop.accept()),
    "delivered, then a request": lambda shop: (delivered(shop), shop.request_fetch()),
    "delivered, then dead": lambda shop: (delivered(shop), shop.accept(), shop.fail_fetch("dead"), shop.try_start()),
}


def delivered(shop: Lab) -> Delivery:
    shop.accept_and_fetch()
    delivery = shop.deliver()
    assert shop.acquire_delivery() is None
    return delivery


class TestOrders:
    @pytest.mark.parametrize("state", PENDING)
    def test_a_pending_order_does_not_expire(self, shop: Lab, state: str) -> None:
        PENDING[state](shop)

        assert shop.days_kept() == {None}
        assert retention_of(shop.redis, shop.now + days(5000)).trim()[1] == 0

    @pytest.mark.parametrize(("change", "left"), [("event", 400), ("duplicate", 10)])
    def test_days_count_from_the_last_change_and_a_duplicate_is_none(self, bare: Lab, change: str, left: int) -> None:
        bare.accept(timestamp=SENT)
        bare.fetch_and_store()
        for name in (KEYS.record(ONE), KEYS.history(ONE), KEYS.content(ONE)):
            bare.redis.pexpire(name, 10 * policy.DAY)  # as after 390 days

        if change == "event":
            bare.accept_and_fetch(answer=2)
        else:
            assert bare.accept(timestamp=SENT) == DUPLICATE

        assert bare.days_kept() == {left}

    def test_the_list_loses_expired_orders_and_nothing_that_is_pending(self, bare: Lab) -> None:
        """Expired, pending for longer than ORDER_DAYS, dead for as long, and one of today."""
        orders = [order(number) for number in (1, 2, 3)]
        bare.now = long_ago = now_ms() - days(500)
        for one in orders:
            bare.accept(one)
        bare.fail_fetch("dead", orders[2])
        bare.now = now_ms()
        bare.accept(order(4))
        bare.redis.delete(KEYS.record(orders[0]))
        assert bare.redis.zscore(KEYS.orders, orders[2].member) == long_ago

        assert retention_of(bare.redis).trim()[1] == 1

        left: Any = bare.redis.zrange(KEYS.orders, 0, -1)
        assert sorted(left) == [order(number).member.encode() for number in (2, 3, 4)]

    def test_a_lowered_order_days_counts_for_the_orders_that_are_stored(self, bare: Lab) -> None:
        """All keys of an order are deleted; not those of a tombstone, of what is pending, or of a later change."""
        long_ago = now_ms() - days(400.5)
        fetched, erased, pending, new, delivered, late = (order(number) for number in range(1, 7))
        bare.now = long_ago
        for one in (fetched, erased, pending, delivered):
            bare.accept_and_fetch(one)
        bare.accept_and_fetch(fetched, paymentReference="PAY-2")
        bare.now = now_ms()
        for one in (new, late):
            bare.accept_and_fetch(one)
        # Its delivery was a dead letter for long, and has succeeded just now.
        bare.redis.zadd(KEYS.orders, {late.member: long_ago})
        bare.redis.hset(KEYS.record(erased), "erased_at", long_ago)
        bare.redis.zadd(KEYS.due, {pending.member: now_ms()})
        bare.redis.pexpire(KEYS.record(delivered), days(1))

        assert retention_of(bare.redis).trim()[1] == 1

        kept = [
            bare.redis.exists(KEYS.record(one), KEYS.content(one), KEYS.history(one)) for one in (erased, new, late)
        ]
        assert (bare.days_kept(fetched), kept) == (set(), [3, 3, 3])
        assert {bool(bare.record(one)) for one in (pending, delivered)} == {True}

    def test_orders_that_must_stay_do_not_stop_the_trimming(self, redis_client: Redis) -> None:
        """More old dead letters than one call reads: the next call goes on behind them."""
        stay = [order(number) for number in range(MOST_ORDERS + 1)]
        redis_client.zadd(KEYS.orders, {one.member: 1 for one in stay} | {order(9999).member: 2})
        for one in stay:
            redis_client.hset(KEYS.record(one), "generation", 1)
        retention = retention_of(redis_client)

        removed = [retention.trim()[1] for _ in range(3)]

        assert removed == [0, 1, 0]
        assert redis_client.zcard(KEYS.orders) == len(stay)

    def test_a_running_pool_trims_the_list(self, lab: Lab, redis_client: Redis, tmp_path: Path) -> None:
        redis_client.zadd(KEYS.orders, {order(1).member: 1})
        env = lab.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0"}
        with Process.start((sys.executable, "-m", "app.cli", "worker"), env=env, log=tmp_path / "worker.log"):
            eventually(lambda: not redis_client.zcard(KEYS.orders), 20, what="the list of orders is empty")
