"""An order is found by either reference, however many there are, and one that has ended its days is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from redis import Redis

from app import bootstrap
from app.dev.processes import Process
from app.ledger import keys, policy
from app.ledger.orders import References
from app.ledger.retention import MOST_ORDERS, Retention
from tests.eventually import eventually
from tests.integration.desk import MUSEUM, VENUE, Desk, open_desk, order

BOUGHT_AS, SOLD_AS = "CM-260601081502-9F3A", "PARTNER-ORDER-2026-00042"
DAY = policy.DAY


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


@pytest.fixture
def index(desk: Desk) -> References:
    return References(desk.redis)


@pytest.mark.parametrize("name", [BOUGHT_AS, SOLD_AS, SOLD_AS.lower(), f" {BOUGHT_AS} "])
def test_a_fetched_order_is_found_without_looking_through_others(desk: Desk, index: References, name: str) -> None:
    desk.hear(order(1))
    desk.bring_home(order(1))
    desk.redis.delete(keys.ORDERS, keys.DUE)

    assert index.orders(name) == [order(1)]


def test_the_same_reference_of_two_companies_names_two_orders(desk: Desk, index: References) -> None:
    for one in (order(1), order(1, MUSEUM)):
        desk.hear(one)
        desk.bring_home(one)

    assert index.orders(SOLD_AS) == [order(1), order(1, MUSEUM)]
    assert index.orders(SOLD_AS, MUSEUM) == [order(1, MUSEUM)]


def test_an_order_that_ended_or_was_erased_is_not_named_any_more(desk: Desk, index: References) -> None:
    for number in (1, 2):
        desk.hear(order(number))
        desk.bring_home(order(number))
    desk.redis.delete(keys.record(order(1)))

    assert index.orders(SOLD_AS) == [order(2)]


def test_an_entry_of_the_index_ends_a_week_after_its_record_can(desk: Desk) -> None:
    desk.hear(order(1))
    desk.bring_home(order(1))

    for name in (BOUGHT_AS, SOLD_AS):
        assert 406 * DAY < int(str(desk.redis.pttl(keys.reference(name)))) <= 407 * DAY


def test_an_order_that_was_never_fetched_is_found_by_what_its_event_said(desk: Desk, index: References) -> None:
    """Also when it is older than all that is searched: what is owed or dead is looked through first."""
    desk.hear(order(1), order(2))
    desk.give_up(order(2))
    desk.redis.delete(keys.ORDERS)

    assert index.orders("cm-00000000") == [order(1)]
    desk.redis.delete(keys.DUE)
    assert index.orders("cm-00000000", VENUE) == [order(2)]
    assert index.orders("cm-00000000", MUSEUM) == []


def test_a_blank_reference_does_not_name_the_order_that_has_none(desk: Desk, index: References) -> None:
    desk.redis.hset(keys.record(order(1)), "generation", 1)
    desk.redis.zadd(keys.ORDERS, {order(1).member: 1})

    assert (index.orders(""), index.orders(" ")) == ([], [])


@pytest.mark.parametrize("name", ["", " ", "\udcff", "x" * 10_000, "*"])
def test_an_odd_reference_names_nothing(index: References, name: str) -> None:
    assert index.orders(name) == []


def test_the_list_of_orders_loses_what_has_ended_and_nothing_that_is_owed(desk: Desk) -> None:
    """Ended, owed for longer than ORDER_DAYS, dead for as long, and one of today."""
    now = bootstrap.clock()
    long_ago = now - 500 * DAY
    desk.hear(*(order(number) for number in (1, 2, 3)), at=long_ago)
    desk.hear(order(4))
    desk.give_up(order(3))
    desk.redis.zadd(keys.ORDERS, {order(3).member: long_ago})
    desk.redis.delete(keys.record(order(1)))

    assert Retention(desk.redis, event_days=90, order_days=400).trim()[1] == 1

    left = sorted(member.decode() for member in desk.redis.zrange(keys.ORDERS, 0, -1))  # type: ignore[union-attr]  # sync
    assert left == [order(number).member for number in (2, 3, 4)]


def test_what_must_stay_hides_nothing_from_the_trimming(desk: Desk) -> None:
    """More dead letters of years ago than one call looks at: the next call goes on behind them."""
    kept = [order(number) for number in range(MOST_ORDERS + 1)]
    desk.redis.zadd(keys.ORDERS, {one.member: 1 for one in kept} | {order(9999).member: 2})
    for one in kept:
        desk.redis.hset(keys.record(one), "generation", 1)
    retention = Retention(desk.redis, event_days=90, order_days=400)

    removed = [retention.trim()[1] for _ in range(3)]

    assert removed == [0, 1, 0]
    assert desk.redis.zcard(keys.ORDERS) == len(kept)


def test_a_running_pool_trims_the_list(desk: Desk) -> None:
    desk.redis.zadd(keys.ORDERS, {order(1).member: 1})
    env = desk.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0"}
    with Process.start((sys.executable, "-m", "app.cli", "worker"), env=env, log=desk.folder / "worker.log"):
        eventually(lambda: not desk.redis.zcard(keys.ORDERS), 20, what="an empty list of orders")
