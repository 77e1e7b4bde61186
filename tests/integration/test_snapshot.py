"""Snapshot, metrics and alerts over a real Valkey that the real scripts fill; hours pass by injected time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rq.suspension import resume, suspend

from app import bootstrap, times
from app.alerts import AlertStore
from app.api.keys import ApiKeys
from app.deployment import RETIRED_AFTER, Deployment
from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.errors import ConnectionFault, NotRecorded, OtherDeployment
from app.intake.spool import SpoolState
from app.ledger import policy
from app.ledger.due_check import DueCheck
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.policy import BREAKER_FAILURES
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import Redis
from app.ledger.rq_jobs import sink_queue
from app.metrics import GAUGES, Metrics, add, record_whole_list
from app.snapshot import CompanySnapshot, Snapshot, SnapshotReader
from tests.eventually import eventually
from tests.lab import API_KEY, KEYS, MUSEUM, SINK, VENUE, Lab, company, configuration, order
from tests.service import samples
from workers.background import log_alerts

MINUTE = 60_000
HOUR = 60 * MINUTE
FEED_ACK_ALERT = 1800
COMPANIES = (
    company("venue", VENUE, "Venue"),
    company("museum", MUSEUM, "Museum").model_copy(update={"np_partner_id": None}),
)
READER = SnapshotReader(COMPANIES)


def snapshot(lab: Lab, later: int = 0) -> Snapshot:
    return READER.read(lab.redis, lab.now + later)


def venue(lab: Lab) -> CompanySnapshot:
    return snapshot(lab).companies[VENUE]


def evaluated(lab: Lab, later: int = 0) -> list[tuple[str, str]]:
    """Evaluate the alerts as a pool does; return what was logged."""
    changes = log_alerts(AlertStore(lab.redis), snapshot(lab, later), FEED_ACK_ALERT)
    return [(change.action, change.condition.name) for change in changes]


def metrics(url: str, spooled: int | None = None) -> dict[str, float]:
    """Return what a web process answers, by name and label values."""

    async def state() -> SpoolState:
        return SpoolState("", spooled)

    async def ask() -> bytes:
        redis = bootstrap.for_web(url, DEFAULT_PREFIX)
        try:
            return await Metrics(redis, READER, COMPANIES, None if spooled is None else state, 900).text()
        finally:
            await redis.aclose()

    return samples(asyncio.run(ask()).decode())


def test_the_oldest_pending_fetch_is_shown_by_company_until_it_is_stored(lab: Lab) -> None:
    lab.accept(order(1), at=lab.now - 5 * MINUTE)
    lab.accept(order(2), at=lab.now - MINUTE)
    lab.accept(order(3, MUSEUM))
    lab.accept(order(4, "99999999-9999-4999-8999-999999999999"), at=lab.now - HOUR)

    assert max(snapshot(lab).elsewhere.values()) >= HOUR
    assert 5 * MINUTE <= venue(lab).oldest_pending_ms < 6 * MINUTE
    assert snapshot(lab).companies[MUSEUM].oldest_pending_ms < MINUTE

    lab.fetch_and_store(order(1))
    assert MINUTE <= venue(lab).oldest_pending_ms < 2 * MINUTE


def test_an_order_that_is_retried_later_stays_pending(lab: Lab) -> None:
    """It is due in two hours, after all others: the sample covers that end of `due` too."""
    lab.accept(order(1), at=lab.now - HOUR)
    lab.fail_fetch("retry", order(1), wait=2 * 3600)
    lab.accept(*(order(number) for number in range(2, policy.SAMPLE + 20)))

    assert venue(lab).oldest_pending_ms >= HOUR


def test_a_fetch_that_no_event_waits_for_is_not_late(lab: Lab) -> None:
    """Replays and refetches of what is fetched, dead letters until they are requeued, and unsettled orders."""
    lab.accept(*map(order, range(1, 5)), at=lab.now - 9 * HOUR)
    lab.fetch_and_store(order(1))
    lab.fetch_and_store(order(2))
    lab.request_fetch(order(1), queue="backfill")
    lab.request_fetch(order(2))
    lab.dead_letter(order(3))
    lab.store_fetch(lab.start_fetch(order(4)), "order-submitted", order=order(4), recheck=600)
    assert (snapshot(lab).due, venue(lab).oldest_pending_ms) == (3, 0)

    lab.request_fetch(order(3), queue="backfill")
    assert venue(lab).oldest_pending_ms >= 9 * HOUR
    lab.fetch_and_store(order(3))
    assert venue(lab).oldest_pending_ms == 0


def test_the_time_from_event_to_fetch_is_measured_once_an_event_and_not_for_a_refetch(lab: Lab) -> None:
    lab.accept(order(1), at=lab.now - 4000)
    fetch = lab.start_fetch(order(1))
    lab.store_fetch(fetch, order=order(1))
    lab.store_fetch(fetch, order=order(1))  # the answer to the first was lost

    measured = lab.counters("latency|")
    assert measured.pop(f"latency|{VENUE}|sum") >= 4000
    assert measured == {f"latency|{VENUE}|5000": 1}

    lab.request_fetch(order(1))
    lab.fetch_and_store(order(1))
    assert sum(lab.counters("latency|").values()) == 1 + lab.counters("latency|")[f"latency|{VENUE}|sum"]

    lab.accept_and_fetch(order(1))
    assert lab.counters("latency|")[f"latency|{VENUE}|250"] == 1


def test_an_event_during_a_fetch_is_measured_with_its_own_fetch(lab: Lab) -> None:
    lab.accept(order(1))
    fetch = lab.start_fetch(order(1))
    lab.accept(order(1))
    lab.store_fetch(fetch, order=order(1))
    assert lab.counters("latency|") == {}

    lab.fetch_and_store(order(1))
    assert lab.counters(f"latency|{VENUE}|250") == {f"latency|{VENUE}|250": 1}


def test_dead_letters_are_counted_by_reason_and_sink_and_fire(lab: Lab) -> None:
    other = order(2, MUSEUM)
    lab.redis.hset(KEYS.sinks, SINK, 1)
    lab.accept(order(1), other, order(3))
    assert evaluated(lab) == []
    lab.dead_letter(order(1))
    lab.dead_letter(other, reason="http_400", http_status=400)
    lab.fetch_and_store(order(3))
    lab.dead_letter_delivery(order(3))
    lab.accept_and_fetch(order(4))
    lab.deliver(order=order(4))

    assert lab.counters("dead|") == {f"dead|{VENUE}|order_missing": 1, f"dead|{MUSEUM}|http_400": 1}
    assert lab.counters("deliveries_dead_lettered|") == {f"deliveries_dead_lettered|{SINK}": 1}
    names = ["dead_deliveries", "dead_letters", "dead_letters"]
    assert sorted(evaluated(lab)) == [("firing", name) for name in names]
    assert sorted(evaluated(lab, 61 * MINUTE)) == [("resolved", name) for name in names]


@pytest.mark.parametrize("step", ["accept", "dispatch"])
def test_an_order_that_is_set_aside_because_of_its_key_fires(lab: Lab, step: str) -> None:
    lab.accept(order(1))
    evaluated(lab)
    lab.redis.delete(KEYS.record(order(1)))
    lab.redis.set(KEYS.record(order(1)), "of another program")
    if step == "accept":
        with pytest.raises(NotRecorded):
            lab.accept(order(1))
    else:
        lab.later(121)
        assert lab.ledger.dispatch_due().broken == 1

    fired = [name for action, name in evaluated(lab, MINUTE) if action == "firing"]
    assert "broken_orders" in fired
    assert ("resolved", "broken_orders") not in evaluated(lab, 120 * MINUTE)
    assert ("resolved", "broken_orders") in evaluated(lab, 122 * MINUTE)


def test_orders_that_a_sink_lacks_or_refuses_are_counted(lab: Lab) -> None:
    lab.accept_and_fetch(order(1))
    lab.accept_and_fetch(order(2))
    lab.deliver("retry", order(1), wait=3600)

    assert (snapshot(lab).sinks[SINK].behind, snapshot(lab).sinks[SINK].failing) == (2, 1)


@pytest.mark.parametrize(("attempts", "failing"), [(0, 0), (1, 1), (2, 1)])
def test_a_delivery_that_runs_counts_as_failing_only_if_an_attempt_before_it_failed(
    lab: Lab, attempts: int, failing: int
) -> None:
    """A sink that always has one under way does not fail."""
    lab.accept_and_fetch(order(1))
    for _ in range(attempts):
        lab.deliver("retry", order(1), wait=0)
    lab.start_delivery(order(1))

    assert snapshot(lab).sinks[SINK].failing == failing


@pytest.mark.parametrize(
    ("orders", "later", "fires"), [(1, 29, False), (1, 31, True), (2, 29, False), (3, 0, True)], ids=str
)
def test_a_sink_that_fails_for_everything_fires_within_a_minute_and_resolves_with_the_repair(
    lab: Lab, orders: int, later: int, fires: bool
) -> None:
    lab.declare()
    for number in range(orders + 1):
        lab.accept_and_fetch(order(number))
    for number in range(orders):
        lab.deliver("retry", order(number), reason="ValueError", failure="ValueError at shop.py:7", wait=600)

    changes = log_alerts(AlertStore(lab.redis), snapshot(lab, later * 1000), FEED_ACK_ALERT)

    fired = [(one.condition.name, one.condition.sink, one.condition.reason) for one in changes]
    assert fired == ([("sink_failing", SINK, "ValueError at shop.py:7")] if fires else [])
    lab.deliver(order=order(orders))
    assert evaluated(lab, later * 1000) == ([("resolved", "sink_failing")] if fires else [])


def test_a_bad_order_of_a_sink_that_takes_others_fires_after_ten_minutes(lab: Lab) -> None:
    lab.accept_and_fetch(order(1))
    lab.accept_and_fetch(order(2))
    lab.deliver("retry", order(1), wait=7200)
    lab.deliver(order=order(2))

    logged = [evaluated(lab, minutes * MINUTE) for minutes in (0, 9, 10, 11)]
    assert logged == [[], [], [("firing", "deliveries_failing")], []]


def test_the_event_rate_has_the_last_use_of_each_secret_and_the_new_events_of_each_hour(lab: Lab) -> None:
    """A duplicate shows that the sender works, but is not a new event."""
    at = lab.now - 3 * HOUR
    lab.accept(order(1), order(2), timestamp="2026-05-15T09:30:05Z", at=at)
    lab.accept(order(1), timestamp="2026-05-15T09:30:05Z", at=at + 2 * HOUR)

    assert AlertStore(lab.redis).hours(VENUE, lab.now) == {at // HOUR: 2}
    assert (venue(lab).current_secret_at, venue(lab).previous_secret_at) == (at + 2 * HOUR, 0)
    assert AlertStore(lab.redis).hours(VENUE, at + 40 * 24 * HOUR) == {}
    assert lab.redis.hkeys(KEYS.event_rate(VENUE)) == [b"secret:current"]


def test_a_breaker_counts_as_open_until_its_probe_is_overdue(lab: Lab) -> None:
    limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=MINUTE)
    limiter = RateLimiter(lab.redis, API_KEY, COMPANIES[0].path, limits)
    now = lab.now
    for _ in range(BREAKER_FAILURES):
        closed_ms = limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401)).closed_ms
    until = venue(lab).breaker_open_until
    assert (venue(lab).breaker_reason, venue(lab).breaker_http) == ("unauthorized", 401)
    assert now <= venue(lab).breaker_opened_at <= lab.now

    assert now < until <= lab.now + closed_ms
    assert snapshot(lab).companies[MUSEUM].breaker_open_until == 0
    logged = [evaluated(lab, later) for later in (0, until - now + MINUTE // 2, until - now + 2 * MINUTE)]
    assert logged == [[("firing", "breaker_open")], [], [("resolved", "breaker_open")]]
    (opened,) = snapshot(lab).open_breakers().items()
    assert opened[0] == "venue"
    assert (opened[1].reason, opened[1].http_status, times.to_ms(opened[1].probe_at)) == ("unauthorized", 401, until)


def test_a_suspended_rq_fires_at_once_and_resolves_with_resume(lab: Lab) -> None:
    suspend(lab.redis)
    assert evaluated(lab) == [("firing", "rq_suspended")]
    resume(lab.redis)
    assert evaluated(lab) == [("resolved", "rq_suspended")]


@pytest.mark.parametrize("command", ["requeue", "drop"])
def test_the_alerts_of_dead_letters_end_with_their_repair(lab: Lab, command: str) -> None:
    """At the next evaluation, also where another company, or an older one, still is a dead letter."""
    lab.accept(order(9))
    lab.dead_letter(order(9))
    lab.redis.zadd(KEYS.dead, {order(9).member: lab.now - HOUR})
    lab.declare()
    evaluated(lab)
    lab.accept(order(1), order(2, MUSEUM))
    lab.accept_and_fetch(order(3))
    lab.dead_letter(order(1))
    lab.dead_letter(order(2, MUSEUM))
    lab.dead_letter_delivery(order(3))
    assert evaluated(lab) == [("firing", "dead_letters"), ("firing", "dead_letters"), ("firing", "dead_deliveries")]
    lab.redis.delete(KEYS.pools)
    assert evaluated(lab, MINUTE) == [("firing", "sink_failing")]

    for number in (1, 3):
        assert lab.run_command("dead", command, order(number).order_id, "--yes").code == 0

    resolved = evaluated(lab, 2 * MINUTE)
    assert resolved == [("resolved", name) for name in ("dead_letters", "sink_failing", "dead_deliveries")]
    states = snapshot(lab).alert_states()
    assert states["dead_letters", "museum", ""].firing_at


def test_rejected_secrets_end_two_minutes_after_the_last_when_events_are_accepted_again(lab: Lab) -> None:
    evaluated(lab)
    add(lab.redis, {("rejected", VENUE): 1})
    assert evaluated(lab) == [("firing", "rejected_secrets")]
    assert evaluated(lab, 5 * MINUTE) == [], "no event was accepted since"

    lab.accept(order(1))
    assert evaluated(lab, MINUTE) == []
    assert evaluated(lab, 2 * MINUTE + 5000) == [("resolved", "rejected_secrets")]


def test_missed_events_end_with_a_whole_list_that_shows_none(lab: Lab) -> None:
    evaluated(lab)
    add(lab.redis, {("discrepancies", VENUE, "no_event"): 2})
    record_whole_list(lab.redis, VENUE, lab.now)
    assert ("firing", "missed_events") in evaluated(lab, 1)
    assert ("resolved", "missed_events") not in evaluated(lab, MINUTE)

    record_whole_list(lab.redis, VENUE, lab.now + 2 * MINUTE)
    assert ("resolved", "missed_events") in evaluated(lab, 3 * MINUTE)


def test_a_queue_has_its_length_and_the_age_of_its_first_job(lab: Lab) -> None:
    lab.accept(order(1), order(2))
    lab.request_fetch(order(3), queue="backfill")

    found = snapshot(lab, later=MINUTE)
    assert (found.queues["live"].jobs, found.queues["backfill"].jobs) == (2, 1)
    assert MINUTE <= found.queue_age_ms("live") < 2 * MINUTE

    lab.redis.delete(f"rq:job:{lab.jobs()[0]}")
    assert snapshot(lab, later=MINUTE).queue_age_ms("live") >= MINUTE


def test_the_dispatcher_lag_grows_while_no_dispatcher_runs(lab: Lab) -> None:
    lab.accept(order(1))

    assert snapshot(lab).dispatcher_lag_ms == 0
    assert snapshot(lab, later=10 * MINUTE).dispatcher_lag_ms > 7 * MINUTE


def test_a_snapshot_costs_the_same_with_many_orders(lab: Lab) -> None:
    """It reads a bounded number of records, whatever the number of orders."""
    lab.redis.zadd(KEYS.due, {f"{VENUE}:{number}": number for number in range(20_000)})
    lab.redis.config_resetstat()
    snapshot(lab)
    stats: Any = lab.redis.info("commandstats")

    assert stats["cmdstat_hmget"]["calls"] <= 2 * policy.SAMPLE * 2 + 10


def test_metrics_show_the_whole_state(lab: Lab, redis_url: str) -> None:
    lab.accept(order(1), at=lab.now - 10 * MINUTE)
    lab.accept_and_fetch(order(2, MUSEUM))
    of_sinks = f"p-{sink_queue(SINK)}-4", f"p-{sink_queue('live')}-5"
    lab.redis.hset(KEYS.pools, "p", json.dumps(heartbeat(lab.now, "p-live-1", "p-live-2", "p-backfill-3", *of_sinks)))
    record_whole_list(lab.redis, VENUE, 1_795_000_000_000)
    lab.redis.hset(KEYS.subscription(VENUE), "state", "missing")
    ApiKeys(lab.redis).create("desk", ("feed",))
    evaluated(lab)

    found = metrics(redis_url, spooled=3)

    assert found["ota_redis_up"] == 1
    assert (found["ota_spool_up"], found["ota_spool_waiting_events"]) == (1, 3)
    assert found["ota_oldest_pending_fetch_seconds venue"] >= 600
    assert found["ota_events_total museum queued"] == 1
    assert found["ota_requests_total 503"] == 0
    assert found["ota_event_to_fetch_seconds_count museum"] == 1
    assert (found["ota_queue_jobs live"], found[f"ota_queue_jobs {sink_queue(SINK)}"]) == (2, 1)
    assert found[f"ota_workers {sink_queue(SINK)}"] == 1
    assert (found["ota_pools"], found["ota_workers live"], found["ota_workers backfill"]) == (1, 2, 1)
    assert found["ota_reconcile_last_success_timestamp_seconds venue"] == 1_795_000_000
    assert found["ota_last_event_timestamp_seconds museum current"] > 0
    assert found["ota_alert venue subscription "] == 1
    assert found["ota_alert venue fetch_late "] == 1
    assert found["ota_alert museum fetch_late "] == 0
    assert (found["ota_feed_unacknowledged_orders desk"], found["ota_alert  feed_unacknowledged feed:desk"]) == (1, 0)
    assert {name.split()[0] for name in found} >= GAUGES.keys()


def test_without_redis_metrics_show_only_the_process_itself(own_valkey: Valkey) -> None:
    own_valkey.stop()

    known = {"ota_redis_up": 0, "ota_reconcile_interval_seconds venue": 900}
    assert metrics(own_valkey.url, spooled=7) == known | {"ota_spool_up": 1, "ota_spool_waiting_events": 7}
    assert metrics(own_valkey.url) == known


def test_a_late_fetch_fires_once_and_resolves_when_it_is_stored(lab: Lab) -> None:
    """Of all pools one evaluates each minute. One that is killed before it saves the alert leaves it to the next."""
    lab.accept(order(1))
    assert [AlertStore(lab.redis).acquire_turn() for _ in range(3)] == [True, False, False]
    assert 15_000 < int(lab.redis.pttl(KEYS.alerts_turn)) <= 19_000

    class Killed(AlertStore):
        def save(self, states: object) -> None:
            raise KeyboardInterrupt

    assert evaluated(lab, 1 * MINUTE) == []
    with pytest.raises(KeyboardInterrupt):
        log_alerts(Killed(lab.redis), snapshot(lab, 6 * MINUTE), FEED_ACK_ALERT)
    assert [evaluated(lab, later * MINUTE) for later in (6, 7)] == [[("firing", "fetch_late")], []]
    lab.fetch_and_store(order(1))
    assert evaluated(lab, 8 * MINUTE) == [("resolved", "fetch_late")]


def test_a_pool_without_heartbeats_fires_at_another_pool(lab: Lab) -> None:
    for name, ago in (("dead", 2 * MINUTE), ("living", 0)):
        lab.redis.hset(KEYS.pools, name, json.dumps(heartbeat(lab.now - ago, f"{name}-live-1")))

    assert evaluated(lab) == [("firing", "pool_silent")]
    lab.redis.hdel(KEYS.pools, "dead")
    assert evaluated(lab) == [("resolved", "pool_silent")]


def test_missed_events_fire_and_then_silence_until_an_event_comes(lab: Lab) -> None:
    """The silence is noticed at the evaluation after."""
    lab.accept(order(1), at=lab.now - HOUR)
    lab.fetch_and_store(order(1))
    evaluated(lab)
    add(lab.redis, {("discrepancies", VENUE, "no_event"): 3})

    assert evaluated(lab, 1 * MINUTE) == [("firing", "missed_events")]
    assert evaluated(lab, 2 * MINUTE) == [("firing", "silence")]
    lab.accept(order(2), at=lab.now + 2 * MINUTE)
    lab.fetch_and_store(order(2))
    assert evaluated(lab, 3 * MINUTE) == [("resolved", "silence")]


@pytest.mark.parametrize("fault", [lambda redis: redis.flushall(), lambda redis: redis.delete(KEYS.alerts)])
def test_a_flushed_redis_fires_nothing(lab: Lab, fault: Callable[[Redis], object]) -> None:
    lab.accept(order(1))
    lab.dead_letter(order(1))
    evaluated(lab)
    fault(lab.redis)

    assert evaluated(lab) == []


def test_an_unreadable_entry_hides_no_other_pool_or_alert(lab: Lab, redis_url: str) -> None:
    """A newer version, another program or a person may have written it."""
    odd = dict(enumerate([b"no JSON", b'{"at": "now"}', b"[]", b'{"workers": "\xff\xfe"}']))
    lab.redis.hset(KEYS.pools, "pool-a", json.dumps(heartbeat(lab.now, "a-live-1")))
    lab.redis.hset(KEYS.pools, mapping={b"odd %d \xff" % number: text for number, text in odd.items()})
    lab.accept(order(1), at=lab.now - HOUR)
    evaluated(lab)
    lab.redis.hset(KEYS.alerts, mapping={b"odd|%d \xff|" % number: text for number, text in odd.items()})

    shown = metrics(redis_url)
    status = lab.run_command("status")

    assert (shown["ota_pools"], shown["ota_alert venue fetch_late "]) == (1, 1)
    assert (status.code, "fetch_late venue" in status.out) == (1, True)
    assert evaluated(lab, 10_000) == []


def heartbeat(at: int, *workers: str) -> dict[str, object]:
    return {"machine": "m", "pid": 1, "started": "1", "workers": workers, "at": at}


def alert_of_a_pool(lab: Lab, folder: Path) -> dict[str, Any]:
    """Start a real pool; return its first alert once it has written heartbeats before and after."""
    program = [sys.executable, "-m", "app.cli", "worker"]
    env = lab.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    with Process.start(program, env=env, cwd=folder, log=folder / "log") as pool:
        line: dict[str, Any] = json.loads(pool.wait_for_line("alert.", 20))
        at = snapshot(lab).heartbeats()[0].at
        eventually(lambda: snapshot(lab).heartbeats()[0].at > at, what="the next heartbeat")
    return line


def test_a_running_pool_logs_an_alert_and_continues(lab: Lab, tmp_path: Path) -> None:
    lab.accept(order(1), at=lab.now - HOUR)

    line = alert_of_a_pool(lab, tmp_path)

    assert line["event"] == "alert.firing"
    assert (line["name"], line["company"], line["level"]) == ("fetch_late", "venue", "error")
    assert line["figure"] >= 3600
    assert line["runbook"] == "docs/operations.md#fetch-late"


def test_an_internal_error_in_the_alerts_is_logged_and_stops_no_pool(lab: Lab, tmp_path: Path) -> None:
    lab.redis.hset(KEYS.event_rate(VENUE), "hour:canary", 1)

    line = alert_of_a_pool(lab, tmp_path)

    assert (line["event"], line["error"]) == ("alert.failed", "ValueError")
    assert "canary" not in (tmp_path / "log").read_text()


def test_pools_that_differ_longer_than_a_rolling_change_takes_fire(lab: Lab) -> None:
    def minute(later: int, **changed: Any) -> list[tuple[str, str]]:
        lab.declare("first", ago=-60 * later)
        lab.declare("second", ago=-60 * later, **changed)
        return evaluated(lab, later * MINUTE)

    assert [minute(later, sinks=()) for later in range(12)] == [[]] * 10 + [[("firing", "pools_differ")], []]
    assert minute(12) == [("resolved", "pools_differ")]
    assert [minute(later, upstream="https://other.example.com") for later in (13, 14)] == [[], []]


def test_what_orders_wait_for_and_no_running_pool_has_fires_after_a_minute(lab: Lab) -> None:
    """A company that a pool once knew, one that none ever knew, and a sink."""
    stranger = "99999999-9999-4999-8999-999999999999"
    lab.accept_and_fetch(order(3))
    lab.declare("stopped", ago=HOUR / 1000)
    lab.redis.hdel(KEYS.pools, "stopped")
    lab.declare(sinks=(), companies=configuration((), "museum").companies)
    lab.accept(order(1), order(2, stranger), at=lab.now - 1000)

    assert evaluated(lab) == []
    lab.declare(ago=-60, sinks=(), companies=configuration((), "museum").companies)
    assert evaluated(lab, MINUTE) == [("firing", "undeclared")] * 3
    assert set(snapshot(lab, MINUTE).undeclared()) == {("venue", ""), (stranger, ""), ("", SINK)}
    lab.declare(ago=-120)
    assert evaluated(lab, 2 * MINUTE) == [("resolved", "undeclared")] * 2, "all but the stranger"


def test_companies_of_one_name_have_alerts_of_their_own(lab: Lab) -> None:
    """NP_COMPANY_ID was corrected: the former company belongs to the deployment for another day."""
    former = "99999999-9999-4999-8999-999999999999"
    lab.accept(*(order(number, former) for number in range(2)))
    for number in range(2):
        lab.dead_letter(order(number, former))
    lab.declare("former", companies={former: configuration((), "venue").companies[VENUE]})
    lab.declare("former")

    changes = [one for minute in range(3) for one in evaluated(lab, minute * MINUTE)]
    assert ("firing", "dead_letters") not in changes, "none is new"
    slugs = {key: one.slug for key, one in snapshot(lab).companies.items()}
    assert slugs == {former: former, VENUE: "venue", MUSEUM: "museum"}


def test_what_no_pool_declares_is_retired_after_a_day_in_which_pools_run(lab: Lab) -> None:
    """Its deliveries are no longer waited for: an order that lacks only these is complete, and expires.

    Its clock, its queue and the jobs there are deleted.
    """
    deployment = Deployment(lab.redis)
    lab.accept_and_fetch(order(1))
    lab.declare("former")
    lab.redis.hdel(KEYS.pools, "former")
    lab.declare(sinks=(), companies=configuration((), "museum").companies)

    assert [deployment.retire(deployment.running()) for _ in range(RETIRED_AFTER - 1)] == [[]] * (RETIRED_AFTER - 1)
    assert lab.run_command("orders", "explain", order(1).order_id).code == 1
    assert deployment.retire(deployment.running()) == [SINK, VENUE]

    assert lab.run_command("orders", "explain", order(1).order_id).code == 0
    assert deployment.companies().keys() == {MUSEUM}
    assert lab.redis.keys("rq:*sink*") + lab.redis.keys("rq:job:ota-d-*") + lab.redis.keys("*:deliveries:*") == []
    plain = Lab(lab.redis, sinks=(), now=lab.now + HOUR)
    assert (DueCheck(plain.redis).step(), plain.dispatch(), plain.days_kept()) == (1, 0, {400})


@pytest.mark.parametrize("flushed", [False, True])
def test_of_two_deployments_that_run_the_one_that_was_here_first_wins(lab: Lab, flushed: bool) -> None:
    """A stranger that took a gap has to go; so has one that was faster than the owner after Redis was flushed."""
    deployment, began = Deployment(lab.redis), lab.now - 60_000
    owner, stranger = (configuration((), name) for name in ("museum", "venue"))
    lab.declare("owner", since=60, companies=owner.companies)
    if flushed:
        lab.redis.flushall()
    else:
        lab.redis.hdel(KEYS.pools, "owner")
    lab.declare("stranger", since=30, companies=stranger.companies)

    if flushed:
        lab.declare("owner", since=60, companies=owner.companies)
        deployment.refuse_other(owner, "owner", began)
    else:
        deployment.refuse_other(owner)
        lab.declare("again", since=0, companies=owner.companies)
        deployment.refuse_other(owner, "again", lab.now)
    with pytest.raises(OtherDeployment, match=r"other companies \(museum\)"):
        deployment.refuse_other(stranger, "stranger", lab.now - 30_000)


def test_after_a_flush_the_place_of_a_company_is_that_of_the_pool_that_began_first(lab: Lab) -> None:
    owner = configuration((), "museum").companies
    elsewhere = msgspec.structs.replace(owner[MUSEUM], path="/other/Sandbox/Museum")
    lab.declare("stranger", since=30, companies={MUSEUM: elsewhere})
    lab.declare("owner", since=60, companies=owner)

    assert Deployment(lab.redis).companies()[MUSEUM].path == owner[MUSEUM].path


def test_a_company_can_replace_another_step_by_step(lab: Lab) -> None:
    """Both for a while, then the new one alone, with pools of both kinds at once."""
    deployment = Deployment(lab.redis)
    both, new = configuration(()), configuration((), "venue")
    lab.declare("old", since=300, companies=configuration((), "museum").companies)
    lab.redis.hdel(KEYS.pools, "old")
    lab.declare("both", since=200, companies=both.companies)

    deployment.refuse_other(new)
    lab.declare("new", since=0, companies=new.companies)
    deployment.refuse_other(new, "new", lab.now)
    deployment.refuse_other(both, "both", lab.now - 200_000)


def test_what_waits_for_a_pool_is_due_when_it_starts_and_nothing_else_is(lab: Lab) -> None:
    """Not an order whose job waits in a queue."""
    mine = configuration()
    lab.declare("former")
    lab.redis.hdel(KEYS.pools, "former")
    for number in (3, 4):
        lab.accept(order(number))
        lab.fail_fetch("deferred", order(number), reason="unknown_company")
    lab.redis.hset(KEYS.record(order(4)), "job", "live")
    lab.declare("plain", sinks=(), companies=configuration((), "museum").companies)

    def due() -> set[str]:
        found: Any = lab.redis.zrangebyscore(KEYS.due, 0, lab.now + 1000)
        return {one.decode() for one in found}

    assert due() == set()
    assert Deployment(lab.redis).wake("plain", configuration((), "museum")) == 0
    assert Deployment(lab.redis).wake("mine", mine) == 1
    assert due() == {order(3).member}
    assert lab.field("fetch_at", order(3)) is None


def test_a_sink_that_returns_within_the_day_goes_on_where_it_was(lab: Lab) -> None:
    """What came meanwhile has a job in its queue; what it took before and lost is due."""
    deployment = Deployment(lab.redis)
    lab.declare("former")
    lab.redis.hdel(KEYS.pools, "former")
    lab.declare("plain", sinks=())
    Lab(lab.redis, sinks=()).accept_and_fetch(order(1))
    for _ in range(RETIRED_AFTER - 1):
        deployment.retire(deployment.running())
    lab.declare("again")
    deployment.retire(deployment.running())

    assert (deployment.sinks(), lab.redis.exists(KEYS.undeclared)) == ((SINK,), 0)
    assert lab.queued(sink_queue(SINK)) == [order(1).order_id]
    lab.clear_queues()
    lab.now += 2 * MINUTE
    assert (lab.dispatch(), lab.start_delivery(order(1)).sink) == (1, SINK)
