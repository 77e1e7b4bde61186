"""Orders, events and dead letters are read in pages: nothing is skipped or shown twice, also while orders change."""

from __future__ import annotations

import json

import msgspec
import pytest

from app.errors import NotKnown
from app.explain.order_view import view_of
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.dead_letters import DeadLetters, DeadQuery
from app.ledger.events import EventLog, EventQuery
from app.ledger.orders import MOST_SORTED, OrderQuery
from app.ledger.redis import PAGE, Redis, newest_first
from app.ledger.references import References
from app.times import from_ms
from tests.lab import KEYS, MUSEUM, ONE, VENUE, WORKER, Lab, content_of_answer, order
from tests.samples import sample

MANY = 2 * PAGE + 7
BOUGHT_AS, SOLD_AS = REFERENCES = ("CM-260601081502-9F3A", "PARTNER-ORDER-2026-00042")


@pytest.fixture
def references(redis_client: Redis) -> References:
    return References(redis_client)


@pytest.fixture
def log(redis_client: Redis) -> EventLog:
    return EventLog(redis_client)


def listed(lab: Lab, query: OrderQuery, now: int = 0) -> list[OrderKey]:
    return [record.key for record in lab.archive.newest_first(query, from_ms(now))]


class TestOrders:
    def test_orders_that_changed_in_the_same_millisecond_are_each_listed_once(self, lab: Lab) -> None:
        """More of one score than a page holds: a page boundary by score alone would loop, one by offset would skip."""
        orders = [order(number) for number in range(MANY)]
        lab.accept(*orders, at=1780000000000)
        lab.accept(*orders[:3], at=1780000000001)

        found = listed(lab, OrderQuery())

        assert sorted(found) == sorted(orders)
        assert sorted(found[:3]) == sorted(orders[:3])

    @pytest.mark.parametrize("due", [10, MOST_SORTED + 1])
    def test_pending_orders_are_listed_by_their_last_change(self, lab: Lab, due: int) -> None:
        """Not by their due times. They are read from `due`, or from the list of all orders where most are due."""
        now = lab.now
        lab.accept(order(1), at=now - 3000)
        lab.accept(order(2), order(3), at=now - 2000)
        lab.accept(order(4), at=now - 1000)
        lab.fetch_and_store(order(3))
        lab.redis.zrem(KEYS.due, order(3).member)
        lab.redis.zadd(KEYS.due, {order(1).member: now + 9_000_000})
        lab.redis.zadd(KEYS.due, {order(number).member: now for number in range(9, due + 9)})

        def pending(since: int, until: int) -> list[OrderKey]:
            query = OrderQuery(state="pending", since=from_ms(now - since), until=from_ms(now - until))
            return listed(lab, query, now)

        assert pending(3000, 0) == [order(4), order(2), order(1)]
        assert pending(2500, 1500) == [order(2)]

    def test_a_list_of_few_pending_orders_reads_no_others(self, lab: Lab) -> None:
        orders = [order(number) for number in range(MANY)]
        lab.accept(*orders)
        lab.redis.zrem(KEYS.due, *(one.member for one in orders[2:]))
        lab.redis.config_resetstat()

        found = listed(lab, OrderQuery(state="pending"))

        assert len(found) == 2
        assert lab.redis.info("commandstats")["cmdstat_hgetall"]["calls"] == 2

    def test_an_order_that_changes_while_the_list_is_read_is_not_shown_twice(self, redis_client: Redis) -> None:
        members = [order(number).member for number in range(MANY)]
        redis_client.zadd(KEYS.orders, {member: number for number, member in enumerate(members)})
        walk = newest_first(redis_client, KEYS.orders)
        found = next(walk)
        redis_client.zadd(KEYS.orders, {members[0]: MANY + 1})

        found += [one for page in walk for one in page]

        assert sorted(member for member, _ in found) == sorted(members[1:])

    def test_an_expired_order_does_not_end_the_list(self, lab: Lab) -> None:
        lab.accept(order(1), order(2), order(3))
        lab.redis.delete(KEYS.record(order(2)))

        assert sorted(listed(lab, OrderQuery())) == [order(1), order(3)]


class TestDeadLetters:
    def test_an_order_that_becomes_dead_again_while_they_are_read_is_shown_once(self, redis_client: Redis) -> None:
        redis_client.zadd(KEYS.dead, {order(number).member: number for number in range(MANY)})
        letters = DeadLetters(redis_client).oldest_first(DeadQuery(until=from_ms(MANY)))
        first = next(letters).key
        redis_client.zadd(KEYS.dead, {first.member: MANY + 1})

        rest = [letter.key for letter in letters]

        assert (len(rest), first in rest) == (MANY - 1, False)


class TestEvents:
    def test_events_are_read_in_both_directions(self, lab: Lab, log: EventLog) -> None:
        orders = [order(number) for number in range(MANY)]
        lab.accept(*orders)

        assert [event.key for event in log.oldest_first(EventQuery())] == orders
        assert [event.key for event in log.newest_first(EventQuery())] == orders[::-1]

    def test_events_are_found_by_time_inclusively(self, redis_client: Redis, log: EventLog) -> None:
        for ms in (1000, 2000, 2000, 3000):
            redis_client.xadd(KEYS.events, {"company": VENUE, "order": order(ms).order_id}, id=f"{ms}-*")

        found = [event.id for event in log.oldest_first(EventQuery(since=from_ms(2000), until=from_ms(2000)))]

        assert found == ["2000-0", "2000-1"]
        assert [event.id for event in log.newest_first(EventQuery(until=from_ms(1999)))] == ["1000-0"]

    def test_unknown_and_malformed_ids_are_left_out(self, lab: Lab, log: EventLog) -> None:
        lab.accept(order(1))
        known = next(log.oldest_first(EventQuery())).id

        assert [event.id for event in log.of_ids(["1-1", "rubbish", "-", "+", known, known])] == [known]


class TestReferences:
    def test_the_same_reference_of_two_companies_finds_two_orders(self, lab: Lab, references: References) -> None:
        for one in (order(1), order(1, MUSEUM)):
            lab.accept_and_fetch(one)

        assert references.orders(SOLD_AS) == [order(1), order(1, MUSEUM)]
        assert references.orders(SOLD_AS, MUSEUM) == [order(1, MUSEUM)]

    @pytest.mark.parametrize("reference", [BOUGHT_AS, SOLD_AS, SOLD_AS.lower(), f" {BOUGHT_AS} "])
    def test_an_order_is_found_by_either_reference(self, lab: Lab, references: References, reference: str) -> None:
        lab.accept_and_fetch(order(1))
        lab.redis.delete(KEYS.orders, KEYS.due)

        assert references.orders(reference) == [order(1)]

    def test_an_expired_or_erased_order_is_not_found(self, lab: Lab, references: References) -> None:
        for number in (1, 2):
            lab.accept_and_fetch(order(number))
        lab.redis.delete(KEYS.record(order(1)))

        assert references.orders(SOLD_AS) == [order(2)]

    def test_an_index_entry_expires_a_week_after_its_record_can(self, lab: Lab) -> None:
        lab.accept_and_fetch(order(1))

        for reference in (BOUGHT_AS, SOLD_AS):
            assert 406 < int(str(lab.redis.pttl(KEYS.reference(reference)))) / policy.DAY <= 407

    def test_a_fetched_order_needs_at_most_2400_bytes(self, bare: Lab) -> None:
        """Its places in the list of orders and in the feed are 280 of them."""
        answer = msgspec.json.encode(json.loads(sample("order-issued")))  # as upstream sends it: without blanks
        bare.accept()
        bare.ledger.store_fetch(ONE, WORKER, bare.start_fetch(), content_of_answer(answer))

        keys = [*(name(ONE) for name in (KEYS.record, KEYS.content, KEYS.history)), *map(KEYS.reference, REFERENCES)]
        sizes = [int(str(bare.redis.memory_usage(key, samples=0))) for key in keys]
        assert sum(sizes) <= 2400 - 280, sizes

    def test_an_unfetched_order_is_found_by_the_reference_of_its_event(self, lab: Lab, references: References) -> None:
        """Also when it is older than all that is searched: pending and dead orders are searched, too."""
        lab.accept(order(1), order(2))
        lab.dead_letter(order(2))
        lab.redis.delete(KEYS.orders)

        assert references.orders("cm-00000000") == [order(1), order(2)]
        lab.redis.delete(KEYS.due)
        assert references.orders("cm-00000000", VENUE) == [order(2)]
        assert references.orders("cm-00000000", MUSEUM) == []

    @pytest.mark.parametrize("reference", ["", " ", "\udcff", "x" * 10_000, "*"])
    def test_an_odd_reference_finds_nothing(self, redis_client: Redis, references: References, reference: str) -> None:
        """Also where an order has none."""
        redis_client.hset(KEYS.record(order(1)), "generation", 1)
        redis_client.zadd(KEYS.orders, {order(1).member: 1})

        assert references.orders(reference) == []


class TestFind:
    """What a view finds by the text that a person gives."""

    @pytest.fixture
    def lab(self, lab: Lab) -> Lab:
        """The order 1 of both companies was fetched, the order 2 of the venue was not."""
        for one in (order(1), order(1, MUSEUM)):
            lab.accept_and_fetch(one)
        lab.accept(order(2))
        return lab

    @pytest.mark.parametrize("text", [order(1).order_id, order(1).order_id.upper(), SOLD_AS, f" {BOUGHT_AS.lower()} "])
    def test_a_whole_name_finds_the_orders_of_every_company_or_of_one(self, lab: Lab, text: str) -> None:
        assert lab.stores().find(text) == [order(1), order(1, MUSEUM)]
        assert lab.stores().find_whole(text, MUSEUM) == [order(1, MUSEUM)]

    def test_an_order_id_of_a_company_that_is_chosen_and_does_not_have_it_finds_nothing(self, lab: Lab) -> None:
        """Also where another company has it, which is looked for among all that ever sent an event."""
        assert lab.stores().find(order(2).order_id) == [order(2)]
        assert lab.stores().find_whole(order(2).order_id, MUSEUM) == []

    def test_the_beginning_of_an_order_id_finds_what_begins_so_unless_it_is_a_whole_name(self, lab: Lab) -> None:
        stores = lab.stores()

        assert stores.find("00000000-0000-4") == [order(1), order(2), order(1, MUSEUM)]
        assert stores.find_beginning("00000000-0000-4", MUSEUM) == [order(1, MUSEUM)]
        assert stores.find_whole("00000000-0000-4") == []

    @pytest.mark.parametrize("text", ["", " ", "000", "*", "\udcff"])
    def test_nothing_is_found_by_less_than_a_name(self, lab: Lab, text: str) -> None:
        assert lab.stores().find(text) == []

    def test_the_words_for_an_order_name_its_company_only_where_another_has_the_same_id(self, lab: Lab) -> None:
        assert lab.stores().words_for(order(2)) == order(2).order_id
        assert lab.stores().words_for(order(1, MUSEUM)) == f"{order(1).order_id} --company museum"

    def test_a_view_of_an_order_without_a_record_is_refused(self, lab: Lab) -> None:
        with pytest.raises(NotKnown, match="has no record"):
            view_of(lab.stores(), order(3))
