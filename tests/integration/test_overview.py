"""The receiver as a whole, as `status` and the ops page show it: each figure after the steps that cause it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from rq.suspension import suspend

from app import bootstrap, times
from app.alerts import HOUR, WEEK, AlertStore
from app.api.keys import ApiKeys
from app.deployment import Deployment
from app.errors import ConnectionFault, Throttled
from app.explain import overview
from app.explain.overview import HOURS_SHOWN, Company, Overview
from app.ledger.latency import Latency
from app.ledger.policy import BREAKER_FAILURES, MINUTE
from app.ledger.rate_limit import Limits, RateLimiter
from app.metrics import record_whole_list
from app.reconcile.state import Checkpoint, Schedule
from app.snapshot import SnapshotReader
from app.subscriptions import SubscriptionMemory, SubscriptionStatus
from tests.lab import API_KEY, KEYS, MUSEUM, SINK, VENUE, Lab, configuration, order
from workers.background import log_alerts

LIMITS = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=MINUTE)


def read(lab: Lab) -> Overview:
    return overview.read(lab.stores())


def company(lab: Lab, slug: str = "venue") -> Company:
    return next(one for one in read(lab).companies if one.slug == slug)


def declare(lab: Lab) -> None:
    """Write what a pool does that has the settings of the lab's commands."""
    lab.declare(companies=bootstrap.configuration(lab.stores().settings).companies)


def limiter(lab: Lab, slug: str = "Venue") -> RateLimiter:
    return RateLimiter(lab.redis, API_KEY, f"/tenant/Sandbox/{slug}", LIMITS)


def open_breaker(lab: Lab) -> None:
    for _ in range(BREAKER_FAILURES):
        limiter(lab).permit("live").failed(ConnectionFault("unauthorized", http_status=401))


def fail_the_sink(lab: Lab, *, unavailable: bool = False) -> None:
    for number in range(1, 7):
        lab.accept_and_fetch(order(number))
    for number in range(1, 6):
        lab.deliver("retry", order(number), failure="ValueError at shop.py:7", wait=600, unavailable=unavailable)


def of_another_pool(lab: Lab) -> None:
    lab.redis.delete(KEYS.pools)
    lab.declare("another", companies=configuration((), "museum").companies)
    lab.accept(order(1), at=lab.now - 5000)


def lose_due_times(lab: Lab) -> None:
    lab.accept(order(1))
    lab.redis.delete(KEYS.due)


def test_a_receiver_with_nothing_to_do_is_ok(lab: Lab) -> None:
    lab.declare()

    found = read(lab)

    assert (found.status, found.sentence) == ("ok", "No order is pending; no alert.")


@pytest.mark.parametrize(
    ("orders", "pending"),
    [(1, "1 order is pending, the oldest for 4 min"), (3, "3 orders are pending, the oldest for 4 min")],
)
def test_the_sentence_has_the_pending_orders_and_the_age_of_the_oldest_of_any_company(
    lab: Lab, orders: int, pending: str
) -> None:
    lab.declare()
    lab.accept(order(1, MUSEUM), at=lab.now - 4 * MINUTE)
    if orders > 1:
        lab.accept(*(order(number) for number in range(2, orders + 1)))

    assert (read(lab).status, read(lab).sentence) == ("ok", f"{pending}; no alert.")

    lab.fetch_and_store(order(1, MUSEUM))
    lab.request_fetch(order(1, MUSEUM))
    assert "of" not in read(lab).sentence.split(), "no event waits for what a person requests"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (lambda lab: suspend(lab.redis), "RQ is suspended"),
        (lambda lab: lab.redis.delete(KEYS.pools), "No worker pool runs"),
        (open_breaker, "Nothing is fetched for venue"),
        (fail_the_sink, f"Nothing is delivered to {SINK}"),
        (lambda lab: fail_the_sink(lab, unavailable=True), f"Nothing is delivered to {SINK}"),
        (lambda lab: Deployment(lab.redis).disable(SINK, "by hand"), f"Sink {SINK} is disabled"),
        (of_another_pool, "No pool has venue"),
        (lose_due_times, "1 order without a due time"),
    ],
    ids=["rq", "no pool", "breaker", "sink fails", "sink away", "sink disabled", "undeclared", "unscheduled"],
)
def test_what_needs_a_look_begins_the_sentence_and_status_ends_with_1(
    lab: Lab, cause: Callable[[Lab], object], words: str
) -> None:
    declare(lab)
    assert lab.run_command("status").code == 0
    cause(lab)

    found, page = read(lab), lab.run_command("status")

    assert (found.status, found.sentence.partition("; ")[0]) == ("look", words)
    assert (page.code, page.out.split("\n")[0]) == (1, found.sentence)
    assert lab.run_command("status", "--json").objects[0]["sentence"] == found.sentence


def test_of_several_troubles_the_one_that_stops_most_comes_first(lab: Lab) -> None:
    """What is pending and the alerts follow from it."""
    declare(lab)
    fail_the_sink(lab)
    suspend(lab.redis)

    assert read(lab).sentence == f"RQ is suspended; nothing is delivered to {SINK}; no order is pending; no alert."

    lab.redis.delete(KEYS.pools)
    assert read(lab).sentence.startswith("No worker pool runs; RQ is suspended; ")


def test_dead_letters_are_in_the_sentence_also_when_their_alert_has_ended(lab: Lab) -> None:
    """The alert ends an hour after the latest of them; the orders wait on."""
    lab.declare()
    lab.accept_and_fetch(order(1))
    lab.dead_letter_delivery(order(1))
    assert (read(lab).status, read(lab).sentence) == ("ok", "No order is pending; no alert; 1 dead letter.")

    lab.accept(order(2))
    lab.dead_letter(order(2))

    assert read(lab).sentence.endswith("; 2 dead letters.")


def test_an_alert_has_what_it_is_about_since_when_and_its_runbook(lab: Lab) -> None:
    lab.declare()
    lab.accept(order(1), at=lab.now - 6 * MINUTE)
    log_alerts(AlertStore(lab.redis), SnapshotReader(lab.stores().settings.companies).read(lab.redis), 1800)

    found = read(lab)

    (alert,) = found.alerts
    assert (alert.subject, alert.reason, alert.count) == ("fetch_late venue", "", None)
    assert alert.runbook == "docs/operations.md#fetch-late"
    assert found.now - alert.since < timedelta(minutes=1)
    assert (found.status, found.sentence) == ("look", "1 order is pending, the oldest for 6 min; 1 alert.")


def test_the_events_of_each_hour_stand_beside_the_usual_of_that_hour(lab: Lab) -> None:
    """The second lowest of four weeks; of the current hour only the part that has passed. Duplicates are none."""
    hour = lab.now // HOUR * HOUR
    for week, events in enumerate((5, 2, 9, 4), 1):
        at = hour - 3 * HOUR + MINUTE - week * WEEK
        lab.accept(*(order(week * 10 + number) for number in range(events)), at=at)
    for _ in range(2):
        lab.accept(order(1), order(2), timestamp="2026-05-15T09:30:05Z", at=hour - 3 * HOUR)
    lab.accept(order(3))

    found = company(lab).hours

    assert len(found) == HOURS_SHOWN
    assert [times.to_ms(found[place].at) for place in (0, -4, -1)] == [hour - 47 * HOUR, hour - 3 * HOUR, hour]
    assert [(found[place].events, found[place].usual) for place in (-4, -3)] == [(2, 4), (0, 0)]
    assert found[-1].events == 1
    assert {(one.events, one.usual) for one in company(lab, "museum").hours} == {(0, None)}


def test_of_the_current_hour_the_usual_reaches_until_now(lab: Lab) -> None:
    for week in (1, 2, 3):
        lab.accept(*(order(week * 1000 + number) for number in range(100)), at=lab.now - week * WEEK)
    passed = lab.now % HOUR / HOUR

    usual = company(lab).hours[-1].usual

    assert usual is not None
    assert usual == pytest.approx(100 * passed, abs=1)


def test_a_company_has_its_unsettled_orders_subscription_and_last_event(lab: Lab) -> None:
    at = lab.now - 2 * MINUTE
    lab.accept(order(1), at=at)
    Checkpoint(lab.redis, VENUE).watch([order(2).order_id, order(3).order_id], at)
    SubscriptionMemory(lab.redis, VENUE).record(SubscriptionStatus("venue", "missing", "none is there"))

    venue, museum = company(lab), company(lab, "museum")

    assert (venue.unsettled, venue.subscription, venue.pending_s in (120, 121)) == (2, "missing", True)
    assert venue.unsettled_since == venue.last_event_at == times.from_ms(at)
    assert (museum.unsettled, museum.subscription, museum.pending_s) == (0, "", 0)
    assert museum.unsettled_since is museum.last_event_at is None


def test_a_company_has_the_time_from_event_to_fetch_of_its_fetches(lab: Lab) -> None:
    for number, seconds in enumerate((4, 4, 90), 1):
        lab.accept(order(number), at=lab.now - seconds * 1000)
        lab.fetch_and_store(order(number))

    assert company(lab).latency == Latency(p50_ms=5000, p95_ms=120_000, fetches=3)
    assert company(lab, "museum").latency.fetches == 0


def test_a_company_has_its_breaker_and_the_retry_after_of_its_key(lab: Lab) -> None:
    declare(lab)
    assert (company(lab).breaker, company(lab).throttled_until) == (None, None)
    open_breaker(lab)
    limiter(lab, "Museum").permit("live").failed(Throttled("throttled", http_status=429, retry_after=300))
    limited_until = lab.now + 300_000

    venue = company(lab)

    assert venue.breaker is not None
    assert (venue.breaker.reason, venue.breaker.http_status) == ("unauthorized", 401)
    assert venue.breaker_words.startswith("unauthorized (HTTP 401) since ")
    assert venue.throttled_until is not None
    assert abs(times.to_ms(venue.throttled_until) - limited_until) < 5000


def test_a_company_has_the_last_and_the_next_run_over_its_order_list(lab: Lab) -> None:
    now = lab.now
    assert company(lab).reconciled_at is company(lab).reconcile_at is None
    schedule = Schedule(lab.redis, VENUE, lease=MINUTE, every=HOUR)
    assert schedule.due(now) is None
    assert company(lab).reconcile_at == times.from_ms(now + MINUTE)
    with schedule.acquire(now + MINUTE) as run:
        assert run is not None
        schedule.complete(run, now + HOUR)
        record_whole_list(lab.redis, VENUE, now + MINUTE)

    venue = company(lab)

    assert (venue.reconciled_at, venue.reconcile_at) == (times.from_ms(now + MINUTE), times.from_ms(now + HOUR))
    assert company(lab, "museum").reconcile_at is None


def test_each_pool_has_its_workers_its_heartbeat_and_what_it_has_otherwise(lab: Lab) -> None:
    """One that has stopped writing is there until its heartbeat is removed, and does not run."""
    lab.declare("host-1", since=60)
    lab.declare("host-2", since=30, sinks=())
    lab.declare("host-3", since=90, ago=60)

    found = read(lab)

    assert found.running == 2
    pools = {one.name: one for one in found.pools}
    assert {name: (one.runs, one.differs) for name, one in pools.items()} == {
        "host-1": (True, ()),
        "host-2": (True, (f"no sink {SINK}",)),
        "host-3": (False, ()),
    }
    assert timedelta(seconds=60) <= found.now - pools["host-3"].at < timedelta(seconds=90)


def test_each_sink_and_each_consumer_of_the_feed_says_what_it_lacks(lab: Lab) -> None:
    lab.declare()
    ApiKeys(lab.redis).create("desk", ("feed",))
    fail_the_sink(lab)

    found = read(lab)

    ((sink,), (consumer,)) = found.sinks, found.consumers
    assert sink.words() == "6 orders behind; nothing delivered for 0 s: 5 attempts failed, ValueError at shop.py:7"
    assert (sink.behind, sink.fails, sink.needs_a_look, sink.held) == (6, True, True, "")
    assert (consumer.behind, consumer.words()) == (6, "6 orders unacknowledged, the oldest for 0 s")

    Deployment(lab.redis).disable(SINK, "by hand")
    (sink,) = read(lab).sinks
    assert sink.words() == f"6 orders behind; {sink.held}"
    assert sink.held.endswith(f": by hand. To go on: ota-receiver sinks enable {SINK}")


def test_dead_letters_are_counted_by_sink_and_reason(lab: Lab) -> None:
    assert read(lab).dead == ()
    lab.accept(order(1), order(2, MUSEUM), order(3))
    for one, reason in ((order(1), "order_missing"), (order(2, MUSEUM), "order_missing"), (order(3), "unsettled")):
        lab.dead_letter(one, reason)
    for number in (4, 5):
        lab.accept_and_fetch(order(number))
        lab.dead_letter_delivery(order(number))

    found = read(lab)

    counted = {(one.sink, one.reason): one.count for one in found.dead}
    assert counted == {("", "order_missing"): 2, ("", "unsettled"): 1, (SINK, "ValueError"): 2}
    assert (found.dead_letters, found.dead_deliveries, found.dead_deliveries_to(SINK)) == (3, 2, 2)


def test_it_costs_the_same_with_twice_the_orders_and_changes_nothing(lab: Lab) -> None:
    lab.declare()
    calls = []
    for start in (1, 501):
        lab.accept(*(order(number) for number in range(start, start + 500)))
        stored, before = lab.dump(), commands(lab)
        read(lab)
        calls.append(commands(lab) - before)
        assert lab.dump() == stored

    assert calls[0] - calls[1] == pytest.approx(0, abs=5)


def commands(lab: Lab) -> int:
    """Return how many commands the server has run."""
    found: Any = lab.redis.info("stats")
    return int(found["total_commands_processed"])
