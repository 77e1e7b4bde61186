"""Looking up walks in pages: nothing is skipped or shown twice, also while orders change."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis

from app import bootstrap
from app.ids import OrderKey
from app.ledger import events
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.events import EventLog, EventQuery
from app.ledger.orders import MOST_SORTED, Archive, OrderQuery, References
from app.ledger.redis import PAGE, newest_first, oldest_first
from app.times import from_ms
from tests.integration.desk import MUSEUM, VENUE, Desk, open_desk, order

MANY = 2 * PAGE + 7


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


def test_orders_that_changed_in_the_same_millisecond_are_each_listed_once(desk: Desk) -> None:
    """More of one score than a page holds: an edge by score alone would loop, one by offset would skip."""
    orders = [order(number) for number in range(MANY)]
    desk.hear(*orders, at=1_780_000_000_000)
    desk.hear(*orders[:3], at=1_780_000_000_001)

    found = [record.key for record in Archive(desk.redis).newest_first(OrderQuery(), from_ms(0))]

    assert sorted(found) == sorted(orders)
    assert sorted(found[:3]) == sorted(orders[:3])


@pytest.mark.parametrize("on_the_clock", [10, MOST_SORTED + 1])
def test_the_owed_are_listed_by_their_last_change_not_by_when_they_are_looked_at(desk: Desk, on_the_clock: int) -> None:
    """From the clock, or where most orders stand on it from the list of all."""
    now = bootstrap.clock()
    desk.hear(order(1), at=now - 3000)
    desk.hear(order(2), order(3), at=now - 2000)
    desk.hear(order(4), at=now - 1000)
    desk.bring_home(order(3))
    desk.redis.zrem("ota:due", order(3).member)
    desk.redis.zadd("ota:due", {order(1).member: now + 9_000_000})
    desk.redis.zadd("ota:due", {order(number).member: now for number in range(9, on_the_clock + 9)})

    def listed(since: int, until: int) -> list[OrderKey]:
        query = OrderQuery(state="pending", since=from_ms(now - since), until=from_ms(now - until))
        return [record.key for record in Archive(desk.redis).newest_first(query, from_ms(now))]

    assert listed(3000, 0) == [order(4), order(2), order(1)]
    assert listed(2500, 1500) == [order(2)]


def test_a_list_of_the_few_that_are_owed_reads_no_others(desk: Desk) -> None:
    orders = [order(number) for number in range(MANY)]
    desk.hear(*orders)
    desk.redis.zrem("ota:due", *(one.member for one in orders[2:]))
    desk.redis.config_resetstat()

    found = list(Archive(desk.redis).newest_first(OrderQuery(state="pending"), from_ms(0)))

    assert len(found) == 2
    assert desk.redis.info("commandstats")["cmdstat_hgetall"]["calls"] == 2


def test_an_order_that_changes_while_the_list_is_read_is_not_shown_twice(desk: Desk) -> None:
    orders = [order(number) for number in range(MANY)]
    for number, one in enumerate(orders):
        desk.redis.zadd("ota:orders", {one.member: number})
    walk = newest_first(desk.redis, "ota:orders")
    found = next(walk)
    desk.redis.zadd("ota:orders", {orders[0].member: MANY + 1})

    found += [one for page in walk for one in page]

    members = [member for member, _ in found]
    assert len(members) == len(set(members))
    assert set(members) == {one.member for one in orders[1:]}


def test_letters_that_leave_while_they_are_read_hide_no_others(desk: Desk) -> None:
    for number in range(MANY):
        desk.redis.zadd("ota:dead", {order(number).member: number})
    found = []
    for page in oldest_first(desk.redis, "ota:dead"):
        found += page
        desk.redis.zrem("ota:dead", *(member for member, _ in page))

    assert [score for _, score in found] == list(range(MANY))


def test_what_dies_again_while_letters_are_read_does_not_come_again(desk: Desk) -> None:
    desk.redis.zadd("ota:dead", {order(number).member: number for number in range(MANY)})
    letters = DeadLetters(desk.redis).oldest_first(DeadQuery(until=from_ms(MANY)))
    first = next(letters).key
    desk.redis.zadd("ota:dead", {first.member: MANY + 1})

    rest = [letter.key for letter in letters]

    assert len(rest) == MANY - 1
    assert first not in rest


def test_events_are_walked_in_both_directions(desk: Desk) -> None:
    orders = [order(number) for number in range(MANY)]
    desk.hear(*orders)
    log = EventLog(desk.redis)

    oldest_first = [event.key for event in log.oldest_first(EventQuery())]
    newest_first = [event.key for event in log.newest_first(EventQuery())]

    assert oldest_first == orders
    assert newest_first == orders[::-1]


def test_events_are_found_by_time_inclusively(desk: Desk) -> None:
    for ms in (1000, 2000, 2000, 3000):
        desk.redis.xadd("ota:events", {"company": VENUE, "order": order(ms).order_id}, id=f"{ms}-*")
    log = EventLog(desk.redis)

    found = [event.id for event in log.oldest_first(EventQuery(since=from_ms(2000), until=from_ms(2000)))]

    assert found == ["2000-0", "2000-1"]
    assert [event.id for event in log.newest_first(EventQuery(until=from_ms(1999)))] == ["1000-0"]


def test_events_by_order_come_from_its_trail(desk: Desk) -> None:
    desk.hear(order(1), status="Draft")
    desk.hear(order(2))
    desk.hear(order(1), status="Issued")

    found = EventLog(desk.redis).of_order(order(1))

    assert [(event.order_id, event.status) for event in found] == [
        (order(1).order_id, "Draft"),
        (order(1).order_id, "Issued"),
    ]


def test_ids_that_are_none_or_not_there_are_left_out(desk: Desk) -> None:
    desk.hear(order(1))
    log = EventLog(desk.redis)
    known = next(log.oldest_first(EventQuery())).id

    found = log.of_ids(["1-1", "rubbish", "-", "+", known, known])

    assert [event.id for event in found] == [known]


def test_a_list_whose_order_has_ended_its_days_goes_on(desk: Desk) -> None:
    desk.hear(order(1), order(2), order(3))
    desk.redis.delete(f"ota:order:{order(2).member}")

    found = [record.key for record in Archive(desk.redis).newest_first(OrderQuery(), from_ms(0))]

    assert sorted(found) == [order(1), order(3)]


def test_an_order_is_read_back_as_it_was_fetched(desk: Desk) -> None:
    desk.hear(order(1))
    assert Archive(desk.redis).order(order(1)) is None

    desk.bring_home(order(1))

    stored = Archive(desk.redis).order(order(1))
    assert stored is not None
    assert (stored.order_id, stored.status) == (order(1).order_id, "Issued")
    assert [ticket.reference_number for ticket in stored.tickets] == ["TK-000123456", "TK-000123457"]


def test_the_same_order_id_of_two_companies_is_two_orders(desk: Desk) -> None:
    desk.hear(order(1), order(1, MUSEUM))
    found = Archive(desk.redis)

    assert found.of_companies(order(1).order_id, [VENUE, MUSEUM]) == [order(1), order(1, MUSEUM)]
    assert found.of_companies(order(1).order_id, [MUSEUM]) == [order(1, MUSEUM)]
    assert found.of_any_company(order(1).order_id) == [order(1), order(1, MUSEUM)]
    assert found.of_any_company(order(2).order_id) == []


def test_an_order_is_found_by_either_reference_in_any_case(desk: Desk) -> None:
    other = OrderKey(VENUE, "abcdef12-0000-4000-8000-000000000001")
    desk.hear(order(1), other)
    desk.bring_home(order(1), sellToOrderReference="SHOP-0815")
    desk.bring_home(other, sellToOrderReference="SHOP-4711")
    found = References(desk.redis)

    assert found.orders("cm-ABCDEF12") == [other]
    assert found.orders("shop-0815") == [order(1)]
    assert found.orders("SHOP-9999") == []


def test_limits_hold_for_the_state_and_the_last_change(desk: Desk) -> None:
    now = bootstrap.clock()
    desk.hear(order(1), at=now - 60_000)
    desk.hear(order(2), at=now - 1_000)
    desk.bring_home(order(2))
    found = Archive(desk.redis)

    def keys(query: OrderQuery) -> list[OrderKey]:
        return [record.key for record in found.newest_first(query, from_ms(now))]

    assert keys(OrderQuery(state="pending")) == [order(1)]
    assert keys(OrderQuery(state="fetched")) == [order(2)]
    assert keys(OrderQuery(since=from_ms(now) - timedelta(seconds=30))) == [order(2)]
    assert keys(OrderQuery(until=from_ms(now) - timedelta(seconds=30))) == [order(1)]
    assert keys(OrderQuery(company_id=MUSEUM)) == []
    assert events.is_event_id("1780301702417-0")
