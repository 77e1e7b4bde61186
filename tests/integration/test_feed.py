"""The pull feed in the ledger: positions, cursors, consumers, and the alert for what stays unacknowledged."""

from __future__ import annotations

from collections import Counter
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.alerts import AlertStore
from app.api.keys import ApiKeys
from app.erasure import Erasure
from app.errors import UnknownCursor
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.feed import Entry, Feed, cursor_of, position_of
from app.ledger.redis import Redis
from app.ledger.retention import Retention
from app.snapshot import Snapshot, SnapshotReader
from tests.lab import KEYS, ONE, START, Lab, company, order
from workers.background import log_alerts

TWO, THREE = order(2), order(3)
FAR = 10**15


def erase(lab: Lab, one: OrderKey) -> None:
    erasure = Erasure(lab.redis, order_days=400)
    traces = erasure.traces(one)
    assert traces is not None
    assert erasure.erase(traces) is not None


def followed(feed: Feed, position: int = 0, limit: int = 2) -> list[Entry]:
    """Return what a consumer sees that follows the feed from a position to its end."""
    seen: list[Entry] = []
    while page := feed.after(position, limit):
        seen += page
        position = page[-1].position
    return seen


@pytest.fixture
def feed(bare: Lab) -> Feed:
    return Feed(bare.redis)


def test_orders_come_in_the_order_of_their_contents_and_each_once(bare: Lab, feed: Feed) -> None:
    """All in one ms: a page may end between any two of them."""
    for one, version in ((ONE, 1), (TWO, 1), (THREE, 1), (ONE, 2)):
        bare.accept_and_fetch(one, version)

    assert [(one.order, one.position) for one in followed(feed)] == [
        (TWO, START + 1),
        (THREE, START + 2),
        (ONE, START + 3),
    ]


def test_a_position_is_the_time_in_ms(bare: Lab, feed: Feed) -> None:
    bare.accept_and_fetch(ONE, 1)
    bare.later(60)
    bare.accept_and_fetch(TWO, 1)

    assert [one.position for one in followed(feed)] == [START, START + 60_000]


def test_a_fetch_without_a_change_keeps_the_place(bare: Lab, feed: Feed) -> None:
    for one in (ONE, TWO, ONE):
        bare.accept_and_fetch(one, 1)

    assert [one.order for one in followed(feed)] == [ONE, TWO]


@pytest.mark.parametrize("damage", [b"damaged", None, b""])
def test_an_order_that_was_unreadable_comes_again_when_it_is_fetched_again(
    bare: Lab, feed: Feed, damage: bytes | None
) -> None:
    """Its readers have passed over it, and its content is what it was."""
    for one in (ONE, TWO):
        bare.accept_and_fetch(one, 1)
    cursor = followed(feed)[-1].position
    bare.overwrite(KEYS.content(ONE), damage)
    bare.request_fetch(ONE)
    bare.fetch_and_store(ONE, 1)

    assert [one.order for one in followed(feed, cursor)] == [ONE]
    assert bare.field("revision") == "1"


def test_an_answer_that_came_too_late_is_not_in_the_feed(bare: Lab, feed: Feed) -> None:
    bare.accept()
    late = bare.start_fetch()
    bare.later(200)
    bare.accept()
    bare.fetch_and_store(ONE, 2, worker="w-live-2")
    before = followed(feed)

    assert bare.store_fetch(late, 1) == "refused"
    assert followed(feed) == before


def test_an_erased_order_and_one_that_ended_its_days_leave_the_feed(bare: Lab, feed: Feed) -> None:
    for one in (ONE, TWO, THREE):
        bare.accept_and_fetch(one, 1)
    erase(bare, TWO)
    bare.accept(ONE)  # pending: it has no end
    bare.later(401 * 86_400)
    Retention(bare.redis, event_days=90, order_days=400, clock=bare.clock).trim()

    assert [one.order for one in followed(feed)] == [ONE]


@pytest.mark.parametrize("seconds", [0, 60, -3600])
@pytest.mark.parametrize("latest_is_erased", [False, True])
def test_a_new_revision_is_behind_every_cursor_whatever_the_clock_does(
    bare: Lab, feed: Feed, seconds: int, latest_is_erased: bool
) -> None:
    """Also when the order with the highest position is gone, and the clock of Redis is set back."""
    bare.accept_and_fetch(ONE, 1)
    cursor = followed(feed)[-1].position
    if latest_is_erased:
        erase(bare, ONE)
    bare.later(seconds)
    bare.accept_and_fetch(TWO, 1)

    assert [one.order for one in followed(feed, cursor)] == [TWO]


def test_after_a_flush_old_cursors_stay_valid(bare: Lab, feed: Feed) -> None:
    bare.accept_and_fetch(ONE, 1)
    cursor = followed(feed)[-1].position
    bare.redis.flushall()
    bare.later(1)
    bare.accept_and_fetch(ONE, 1)

    assert [one.order for one in followed(feed, cursor)] == [ONE]
    assert feed.acknowledge("desk", cursor) == cursor


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("change"), st.integers(1, 5)),
            st.tuples(st.just("erase"), st.integers(1, 5)),
            st.tuples(st.just("read"), st.integers(1, 3)),
            st.tuples(st.just("clock"), st.integers(-5, 5)),
        ),
        max_size=30,
    )
)
def test_who_follows_next_sees_the_latest_revision_of_each_order(
    redis_client: Redis, steps: list[tuple[str, int]]
) -> None:
    """Whatever changes, is erased, or happens to the clock while somebody pages."""
    redis_client.flushall()
    lab, feed = Lab(redis_client, sinks=(), now=START), Feed(redis_client)
    versions: Counter[OrderKey] = Counter()
    erased: set[OrderKey] = set()
    seen: dict[OrderKey, str | None] = {}
    position = 0

    def read(limit: int) -> bool:
        nonlocal position
        page = feed.after(position, limit)
        seen.update({one.order: lab.field("revision", one.order) for one in page})
        position = page[-1].position if page else position
        return bool(page)

    for what, number in steps:
        one = order(number)
        if what == "change" and one not in erased:
            versions[one] += 1
            lab.accept_and_fetch(one, versions[one])
        elif what == "erase" and one in versions:
            erase(lab, one)
            erased.add(one)
        elif what == "read":
            read(number)
        elif what == "clock":
            lab.now += number
    while read(2):
        pass

    kept = versions.keys() - erased
    assert {one: seen.get(one) for one in kept} == {one: str(versions[one]) for one in kept}


def test_writers_at_once_get_positions_of_their_own_and_a_reader_beside_them_misses_none(
    redis_client: Redis, redis_url: str
) -> None:
    def write(writer: int) -> None:
        with Redis.from_url(redis_url) as client:
            lab = Lab(client, sinks=())
            for number in range(20):
                lab.accept_and_fetch(order(100 * writer + number), 1, worker=f"w-{writer}")

    writers = [Thread(target=write, args=(number,)) for number in range(1, 5)]
    for one in writers:
        one.start()
    feed = Feed(redis_client)
    seen: list[Entry] = []
    while any(one.is_alive() for one in writers):
        seen += feed.after(seen[-1].position if seen else 0, 3)
    for one in writers:
        one.join()
    seen += followed(feed, seen[-1].position if seen else 0)

    assert len({one.position for one in seen}) == len({one.order for one in seen}) == len(seen) == 80


def test_a_cursor_moves_forward_and_never_back(bare: Lab, feed: Feed) -> None:
    for one in (ONE, TWO):
        bare.accept_and_fetch(one, 1)
    first, second = (one.position for one in followed(feed))

    assert feed.acknowledged("desk") == 0
    assert [feed.acknowledge("desk", one) for one in (first, second, first, 0)] == [first, second, second, second]
    assert feed.acknowledged("desk") == second
    assert feed.acknowledged("billing") == 0


@pytest.mark.parametrize("ahead", [0, 1, 60_000, FAR])
def test_a_cursor_that_was_never_given_is_refused(lab: Lab, ahead: int) -> None:
    """The next revision could come at it or below it, and the consumer would miss it."""
    lab.accept_and_fetch(ONE, 1)
    feed = Feed(lab.redis)
    lab.now += 1000  # no order comes any more

    with pytest.raises(UnknownCursor):
        feed.acknowledge("desk", lab.now + ahead)
    assert feed.acknowledged("desk") == 0


@pytest.mark.parametrize("position", [0, 1, 99, 1_700_000_000_000, 9_999_999_999_999_999])
def test_a_cursor_names_its_position(position: int) -> None:
    assert position_of(cursor_of(position)) == position


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "0",
        "MA==",
        " MA",
        "MA\n",
        "MDE",
        "LTE",
        "MB",
        "!!",
        "MTcwMDAwMDAwMDAwMDAwMDAwMDA",
        "é",
        "KzE",
        "MS41",
        "4pml",
    ],
)
def test_no_other_text_is_a_cursor(text: str) -> None:
    """Not `01`, `-1`, `+1`, `1.5`, seventeen digits or more, other digits, padding, blanks, or a second spelling."""
    with pytest.raises(UnknownCursor):
        position_of(text)


def test_a_consumer_may_begin_at_the_end_and_one_with_a_place_keeps_it(bare: Lab, feed: Feed) -> None:
    bare.accept_and_fetch(ONE, 1)

    assert feed.start_at_end("desk")
    assert followed(feed, feed.acknowledged("desk")) == []
    bare.accept_and_fetch(TWO, 1)
    assert not feed.start_at_end("desk")
    assert [one.order for one in followed(feed, feed.acknowledged("desk"))] == [TWO]


def snapshot(lab: Lab, later_s: float) -> Snapshot:
    return SnapshotReader([company("venue", ONE.company_id, "Venue")]).read(lab.redis, lab.now + round(later_s * 1000))


def alerts(lab: Lab, later_s: float, limit_s: int = 1800) -> list[tuple[str, str]]:
    """Evaluate the alerts so many seconds later; return what begins or ends of the feed's."""
    changes = log_alerts(AlertStore(lab.redis), snapshot(lab, later_s), limit_s)
    return [(one.action, one.condition.sink) for one in changes if one.condition.name == "feed_unacknowledged"]


def test_what_a_consumer_does_not_acknowledge_fires_for_it_alone_until_it_does(lab: Lab) -> None:
    keys, feed = ApiKeys(lab.redis), Feed(lab.redis)
    for name in ("billing", "desk"):
        keys.create(name, ("feed",))
    keys.create("reader", ("orders:read",))
    lab.accept_and_fetch(ONE, 1)
    lab.accept_and_fetch(TWO, 1)
    first, second = (one.position for one in feed.after(0, 9))
    feed.acknowledge("desk", second)

    assert alerts(lab, 1790) == []
    assert alerts(lab, 1810) == [("firing", "feed:billing")]
    assert {name: one.behind for name, one in snapshot(lab, 0).consumers.items()} == {"billing": 2, "desk": 0}
    feed.acknowledge("billing", first)
    assert alerts(lab, 1830) == []
    feed.acknowledge("billing", second)
    assert alerts(lab, 1850) == [("resolved", "feed:billing")]


def test_no_alert_is_for_a_consumer_whose_keys_are_revoked_and_none_with_the_setting_zero(lab: Lab) -> None:
    keys = ApiKeys(lab.redis)
    first, second = (keys.create("desk", ("feed",))[0] for _ in range(2))
    lab.accept_and_fetch(ONE, 1)

    assert alerts(lab, 1e6, limit_s=0) == []
    keys.revoke(first)
    assert alerts(lab, 1810) == [("firing", "feed:desk")]
    keys.revoke(second)
    assert alerts(lab, 1830) == [("resolved", "feed:desk")]


def test_a_new_consumer_has_its_time_from_its_key_and_not_from_the_oldest_order(lab: Lab) -> None:
    """Otherwise each new consumer would begin with an alert."""
    long_ago = lab.now - policy.DAY
    lab.accept(at=long_ago)
    kept, lab.now = lab.now, long_ago
    lab.fetch_and_store(ONE, 1)
    lab.now = kept
    key = ApiKeys(lab.redis).create("desk", ("feed",))[0]

    assert alerts(lab, 1790) == []
    assert alerts(lab, 1810) == [("firing", "feed:desk")]
    assert ApiKeys(lab.redis).all()[key].name == "desk"


def test_a_damaged_key_hides_no_other_consumer(lab: Lab) -> None:
    ApiKeys(lab.redis).create("desk", ("feed",))
    for short, text in (("a", "no JSON"), ("b", "{}"), ("c", "[]"), ("d", '{"name":1,"scopes":2,"revoked_at":"x"}')):
        lab.redis.hset(KEYS.api_keys, short, text)
    lab.accept_and_fetch(ONE, 1)

    assert alerts(lab, 1810) == [("firing", "feed:desk")]
    assert [one.name for one in ApiKeys(lab.redis).all().values()] == ["desk"]
