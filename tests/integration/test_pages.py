"""Lists in pages: each row once, whatever happens in between; a bounded look; made-up cursors are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import pytest

from app import audit
from app.audit import AuditEntry
from app.errors import UnknownCursor
from app.ids import OrderKey
from app.ledger import dead_letters, policy
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.events import EventLog, EventQuery
from app.ledger.latency import Latency, read_latency
from app.ledger.order_lists import OrderLists
from app.ledger.orders import OrderQuery
from app.ledger.pages import Page, cursor_of
from app.ledger.record import OrderRecord
from app.replay import Plans
from app.snapshot import SnapshotReader
from app.times import from_ms
from tests.lab import KEYS, MUSEUM, VENUE, Lab, order

T = TypeVar("T")
HOUR: Final = 3600


def walk(read: Callable[[str | None], Page[T]], meanwhile: Callable[[], object] = lambda: None) -> list[T]:
    """Return the rows of all pages; `meanwhile` happens once, behind the first one."""
    return [row for page in pages_of(read, meanwhile) for row in page.rows]


def pages_of(
    read: Callable[[str | None], Page[T]], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[Page[T]]:
    page = read(None)
    yield page
    meanwhile()
    while page.next is not None:
        page = read(page.next)
        yield page


def numbers(rows: list[Any]) -> list[int]:
    return [int(row.order_id[-12:]) for row in rows]


def ever(lab: Lab) -> datetime:
    return from_ms(lab.now) + timedelta(days=1)


def died(lab: Lab, *which: int) -> None:
    lab.accept(*(order(number) for number in which))
    for number in which:
        lab.dead_letter(order(number))


def test_pages_of_dead_letters_hold_each_once_also_those_of_one_millisecond(shop: Lab) -> None:
    """Fetches and deliveries together, oldest first; one that was shown is discarded meanwhile, and another dies."""
    died(shop, *range(2, 12))
    shop.later(1)
    shop.accept_and_fetch(order(1))
    shop.dead_letter_delivery(order(1))
    shop.later(1)
    died(shop, 12)
    found, query = DeadLetters(shop.redis), DeadQuery(until=ever(shop))

    def meanwhile() -> None:
        shop.later(1)
        shop.ledger.discard(order(3))
        shop.ledger.discard(order(9))
        died(shop, 13)

    read = pages_of(lambda after: found.page(query, after, limit=3), meanwhile)
    rows = [(numbers(page.rows), page.next is None) for page in read]

    assert rows == [([2, 3, 4], False), ([5, 6, 7], False), ([8, 10, 11], False), ([1, 12, 13], True)]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"company_id": MUSEUM}, [3]),
        ({"sink": ""}, [1, 2, 3]),
        ({"sink": "shop"}, [4, 5]),
        ({"sink": "mail"}, []),
        ({"reason": "order_missing"}, [1, 3]),
        ({"reason": "rejected"}, [5]),
        ({"reason": "rejected: no"}, [5]),
        ({"reason": "rejected: yes"}, []),
        ({"since": 2, "until": 3}, [2, 3]),
    ],
)
def test_pages_of_dead_letters_are_filtered(shop: Lab, conditions: dict[str, Any], expected: list[int]) -> None:
    start = shop.now
    for number, reason in ((1, "order_missing"), (2, "bad_request"), (3, "order_missing")):
        shop.now = start + number * 1000
        one = order(number, MUSEUM if number == 3 else VENUE)
        shop.accept(one)
        shop.dead_letter(one, reason)
    for number, reason in ((4, "KeyError"), (5, "rejected: no")):
        shop.now = start + number * 1000
        shop.accept_and_fetch(order(number))
        shop.dead_letter_delivery(order(number), reason)
    times = {name: from_ms(start + conditions[name] * 1000) for name in ("since", "until") if name in conditions}
    query = DeadQuery(**({"until": ever(shop)} | conditions | times))

    assert numbers(walk(lambda after: DeadLetters(shop.redis).page(query, after, limit=1))) == expected


def test_a_page_whose_search_ends_early_has_a_cursor_to_go_on(shop: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "MOST_LOOKED_AT", 12)
    died(shop, *range(1, 30))
    shop.later(1)
    one = order(77, MUSEUM)
    shop.accept(one)
    shop.dead_letter(one)
    query = DeadQuery(company_id=MUSEUM, until=ever(shop))

    read = pages_of(lambda after: DeadLetters(shop.redis).page(query, after, limit=5))
    found = [(numbers(page.rows), page.searched_to, page.next is None) for page in read]

    at = from_ms(shop.now - 1000)
    assert found == [([], at, False), ([], at, False), ([77], None, True)]


def test_a_page_of_a_long_list_reads_little(shop: Lab) -> None:
    shop.redis.zadd(KEYS.dead, {order(number).member: number // 3000 for number in range(9_000)})
    shop.redis.config_resetstat()

    page = DeadLetters(shop.redis).page(DeadQuery(company_id=MUSEUM, until=ever(shop)))

    read: Any = shop.redis.info("commandstats")
    assert (page.rows, page.searched_to, page.next is None) == ([], from_ms(0), False)
    assert read["cmdstat_zrange"]["calls"] <= 20
    assert "cmdstat_hgetall" not in read


def test_pages_of_orders_show_those_that_change_meanwhile_in_front_only(shop: Lab) -> None:
    for number in range(1, 8):
        shop.accept_and_fetch(order(number))
        shop.later(1)
    lists, query = OrderLists(shop.redis), OrderQuery(company_id=VENUE)

    def meanwhile() -> None:
        shop.accept(order(2))

    rows = walk(lambda after: lists.page(query, from_ms(shop.now), after, limit=3), meanwhile)

    assert numbers(rows) == [7, 6, 5, 4, 3, 1]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (OrderQuery(state="dead"), [4]),
        (OrderQuery(state="pending"), [2]),
        (OrderQuery(state="deferred"), [3]),
        (OrderQuery(state="fetched"), [1]),
        (OrderQuery(status="issued", company_id=MUSEUM), [5]),
        (OrderQuery(status="cancelled"), []),
    ],
)
def test_pages_of_orders_are_filtered(shop: Lab, query: OrderQuery, expected: list[int]) -> None:
    shop.accept_and_fetch(order(1))
    shop.accept(order(2), order(3), order(4), order(5, MUSEUM))
    shop.fail_fetch("deferred", order(3))
    shop.dead_letter(order(4))
    shop.fail_fetch("deleted_upstream", order(5, MUSEUM))
    now = from_ms(shop.now)

    assert numbers(walk(lambda after: OrderLists(shop.redis).page(query, now, after, limit=1))) == expected


def test_a_dead_order_is_found_behind_any_number_of_others(shop: Lab) -> None:
    died(shop, 1)
    shop.redis.zadd(KEYS.orders, {order(number).member: shop.now + 1 for number in range(2, 1_000)})

    page = OrderLists(shop.redis).page(OrderQuery(state="dead"), from_ms(shop.now))

    assert (numbers(page.rows), page.searched_to, page.next) == ([1], None, None)


def test_the_lists_of_what_is_outstanding_are_those_that_the_snapshot_counts(shop: Lab) -> None:
    """One record is lost, one is broken, one delivery runs for the first time, and one for the second."""
    for number in range(1, 9):
        shop.accept_and_fetch(order(number))
    shop.accept(*(order(number) for number in range(11, 15)))
    for number in (1, 2, 3, 4):
        shop.deliver("retry", order(number), wait=number * 600)
    shop.later(2000)
    shop.start_delivery(order(1))
    shop.start_delivery(order(5))
    shop.redis.delete(KEYS.record(order(11)))
    shop.overwrite(KEYS.record(order(12)), b"broken")
    shop.overwrite(KEYS.record(order(6)), b"broken")
    lists, now = OrderLists(shop.redis), from_ms(shop.now)
    snapshot = SnapshotReader([]).read(shop.redis, shop.now)
    sink = snapshot.sinks["shop"]

    pending = walk(lambda after: lists.outstanding("", after, 3))
    behind = walk(lambda after: lists.outstanding("shop", after, 3))
    failing = walk(lambda after: lists.failing("shop", now, after, 3))

    assert (len(pending), len(behind), len(failing)) == (snapshot.due, sink.behind, sink.failing) == (4, 8, 4)
    assert sorted(numbers(pending)) == [11, 12, 13, 14]
    assert sorted(numbers(behind)) == [*range(1, 9)]
    assert sorted(numbers(failing)) == [1, 2, 3, 4]
    assert pending[0] == OrderRecord(**order(11)._asdict())


def test_the_list_of_refused_orders_looks_at_the_sample_of_the_snapshot(shop: Lab) -> None:
    members = {order(number).member: shop.now + number for number in range(1, 2 * policy.SAMPLE + 50)}
    shop.redis.zadd(KEYS.deliveries("shop"), members)
    for member in members:
        shop.redis.hset(KEYS.record(OrderKey.of(member)), mapping={"generation": 1, "revision": 1, "shop:attempts": 2})
    shop.redis.hset(KEYS.sinks, "shop", shop.now)

    found = walk(lambda after: OrderLists(shop.redis).failing("shop", from_ms(shop.now), after, 150))

    counted = SnapshotReader([]).read(shop.redis, shop.now).sinks["shop"].failing
    assert len(found) == counted == 2 * policy.SAMPLE
    assert numbers(found) == [*range(1, policy.SAMPLE + 1), *range(policy.SAMPLE + 50, 2 * policy.SAMPLE + 50)]


def test_pages_of_events_are_newest_first_and_new_ones_stay_in_front(shop: Lab) -> None:
    for number in range(1, 8):
        shop.accept(order(number, MUSEUM if number == 3 else VENUE))
    log, query = EventLog(shop.redis), EventQuery(company_id=VENUE, outcome="queued")

    rows = walk(lambda after: log.page(query, after, limit=2), lambda: shop.accept(order(8)))

    assert numbers(rows) == [7, 6, 5, 4, 2, 1]
    assert log.page(EventQuery(status="issued")).rows[0].order_id == order(8).order_id
    assert log.page(EventQuery(outcome="erased")).rows == []
    assert log.page(EventQuery(until=rows[-1].at), limit=9).rows[-1:] == rows[-1:]


def test_pages_of_the_audit_and_of_replays_are_newest_first(shop: Lab) -> None:
    plans = Plans(shop.redis, event_days=90, clock=shop.clock)
    made = []
    for number in range(1, 6):
        shop.later(1)
        made.append(plans.file([(order(number).member, None)], rate=1, who="ann", why=str(number)))
    plans.cancel(made[1], "ann", "")
    audit.append(shop.redis, KEYS, AuditEntry(what="drop", who="bob", why="6", selected="", orders=1))

    def read_audit(what: audit.Action | None) -> list[str]:
        return [entry.why or entry.what for _, entry in walk(lambda after: audit.page(shop.redis, after, 2, what=what))]

    assert read_audit(None) == ["6", "cancel", "5", "4", "3", "2", "1"]
    assert read_audit("replay") == ["5", "4", "3", "2", "1"]
    assert [plan.why for plan in walk(lambda after: plans.page(after, 2))] == ["5", "4", "3", "2", "1"]
    assert [plan.id for plan in walk(lambda after: plans.page(after, 1, state="cancelled"))] == [made[1].id]


CURSORS: Final = {
    "no_base64": "!",
    "a_bit_too_much": cursor_of("12 a").replace("YQ", "YR"),
    "no_text": "_-_-",
    "a_position": cursor_of("12"),
    "below_zero": cursor_of("-1 a"),
    "too_far": cursor_of(f"{10**16} a"),
    "empty": "",
    "huge": cursor_of("1 " + "a" * 1000),
}


@pytest.mark.parametrize("name", CURSORS)
def test_a_cursor_that_no_page_gave_is_refused(shop: Lab, name: str) -> None:
    cursor, now = CURSORS[name], from_ms(shop.now)
    plans = Plans(shop.redis, event_days=90)
    read: list[Callable[[], object]] = [
        lambda: DeadLetters(shop.redis).page(DeadQuery(until=now), cursor),
        lambda: OrderLists(shop.redis).page(OrderQuery(), now, cursor),
        lambda: OrderLists(shop.redis).failing("shop", now, cursor),
        lambda: EventLog(shop.redis).page(EventQuery(), cursor),
        lambda: audit.page(shop.redis, cursor),
        lambda: plans.page(cursor),
    ]

    for one in read:
        with pytest.raises(UnknownCursor):
            one()


def test_the_latency_of_each_company_is_the_bound_below_which_the_quantile_lies(shop: Lab) -> None:
    took = [*[0.2] * 10, *[9] * 8, 20, 100]
    for number, seconds in enumerate(took):
        shop.accept(order(number))
        shop.later(seconds)
        shop.fetch_and_store(order(number))
    shop.request_fetch(order(1))
    shop.fetch_and_store(order(1))
    shop.accept(order(1, MUSEUM))
    shop.later(2 * 86400)
    shop.fetch_and_store(order(1, MUSEUM))

    def read(later: int = 0) -> dict[str, Latency]:
        return read_latency(shop.redis, [VENUE, MUSEUM, "none"], 24, shop.now + later * HOUR * 1000)

    none = Latency(p50_ms=None, p95_ms=None, fetches=0)
    assert read(-48)[VENUE] == Latency(p50_ms=250, p95_ms=30_000, fetches=20)
    assert read() == {VENUE: none, MUSEUM: Latency(p50_ms=None, p95_ms=None, fetches=1), "none": none}
    assert read(23)[MUSEUM].fetches == 1
    assert read(24)[MUSEUM] == none
    kept = [shop.redis.ttl(key) for key in shop.redis.keys(KEYS.latency("*", "*"))]
    assert all(49 * HOUR - 60 < one <= 49 * HOUR for one in kept)
