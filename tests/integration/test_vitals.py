"""The vital signs and the alerts over a real Valkey, filled through the real scripts; hours pass by injected time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from app import bootstrap
from app.alerts import Change, Watch
from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.errors import ConnectionFault
from app.ids import OrderKey
from app.ledger import keys
from app.ledger.rate_limit import Limits, RateLimiter, breaker_key
from app.ledger.work import Content
from app.metrics import GAUGES, Metrics, add, mark
from app.snapshot import SAMPLE, CompanyVitals, Subject, Vitals, VitalSigns
from tests.eventually import eventually
from tests.integration.desk import API_KEY, MUSEUM, SINK, VENUE, WORKER, Desk, open_desk, order
from workers.background import evaluate

MINUTE = 60_000
HOUR = 60 * MINUTE
SUBJECTS = (
    Subject("venue", VENUE, breaker_key(API_KEY, "/venue")),
    Subject("museum", MUSEUM, breaker_key(API_KEY, "/museum")),
)
SIGNS = VitalSigns(SUBJECTS, (SINK,))
UNSETTLED = Content(
    raw=b"{}",
    digest="unsettled",
    status="Processing",
    wallets=0,
    tickets=0,
    coupons=0,
    manifest=False,
    http_status=200,
    duration_ms=1,
)


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    return open_desk(redis_client, redis_url, tmp_path)


def vitals(desk: Desk, later: int = 0) -> Vitals:
    return SIGNS.read(desk.redis, bootstrap.clock() + later)


def venue(desk: Desk, later: int = 0) -> CompanyVitals:
    return vitals(desk, later).companies[VENUE]


def look(desk: Desk, later: int = 0) -> list[tuple[str, str]]:
    """Look at the alerts as a pool does; return what was told."""
    changes: list[Change] = evaluate(Watch(desk.redis), SIGNS, vitals(desk, later))
    return [(change.what, change.sign.name) for change in changes]


def kept(desk: Desk, prefix: str) -> dict[str, int]:
    found: Any = desk.redis.hgetall(keys.COUNTERS)
    return {field.decode(): int(value) for field, value in found.items() if field.decode().startswith(prefix)}


def metrics(url: str, spooled: int | None = None) -> dict[str, float]:
    """Return what a web process answers, by name and label values."""

    async def count() -> int:
        return spooled or 0

    async def ask() -> bytes:
        redis = bootstrap.for_web(url)
        try:
            return await Metrics(redis, SIGNS, None if spooled is None else count, {"venue": 900}).text()
        finally:
            await redis.aclose()

    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(asyncio.run(ask()).decode())
        for sample in family.samples
    }


def test_nothing_is_read_off_an_empty_redis(desk: Desk) -> None:
    found = vitals(desk)

    assert (found.due, found.soonest, found.late, found.waited("live"), found.pools) == (0, 0, 0, 0, {})
    assert found.companies[VENUE] == CompanyVitals(0, 0, 0, 0, 0, 0)


def test_the_longest_owed_fetch_is_told_by_company_until_it_is_home(desk: Desk) -> None:
    desk.hear(order(1), at=bootstrap.clock() - 5 * MINUTE)
    desk.hear(order(2), at=bootstrap.clock() - MINUTE)
    desk.hear(order(3, MUSEUM))

    assert 5 * MINUTE <= venue(desk).oldest_owed < 6 * MINUTE
    assert vitals(desk).companies[MUSEUM].oldest_owed < MINUTE

    desk.bring_home(order(1))
    assert MINUTE <= venue(desk).oldest_owed < 2 * MINUTE


def test_an_order_whose_fetch_fails_again_and_again_is_still_owed(desk: Desk) -> None:
    """Its next look lies two hours ahead, behind all that wait: it is looked for from that end too."""
    desk.hear(order(1), at=bootstrap.clock() - HOUR)
    fetch = desk.begin(order(1))
    desk.ledger().fail_fetch(order(1), WORKER, fetch, outcome="retry", reason="http_500", wait_ms=2 * HOUR)
    desk.hear(*(order(number) for number in range(2, SAMPLE + 20)))

    assert venue(desk).oldest_owed >= HOUR


def test_what_no_event_waits_for_is_not_late(desk: Desk) -> None:
    """Replays, wishes of people, what was given up, and what had not settled: their events are old, or have a time."""
    long_ago = bootstrap.clock() - 9 * HOUR
    desk.hear(*(order(number) for number in range(1, 6)), at=long_ago)
    desk.bring_home(order(1))
    desk.bring_home(order(2))
    desk.ledger().request_fetch([order(1)], queue="backfill", reason="replay")
    desk.ledger().request_fetch([order(2)], queue="live", reason="refetch")
    desk.give_up(order(3))
    desk.give_up(order(5))
    desk.ledger().request_fetch([order(5)], queue="backfill", reason="requeue")
    desk.ledger().store_fetch(order(4), WORKER, desk.begin(order(4)), UNSETTLED, recheck_ms=10 * MINUTE)

    assert vitals(desk).due == 4
    assert venue(desk).oldest_owed == 0


def test_an_order_of_a_company_that_the_settings_do_not_name_is_told_of_as_other(desk: Desk) -> None:
    desk.hear(order(1, "99999999-9999-4999-8999-999999999999"), at=bootstrap.clock() - HOUR)

    assert vitals(desk).elsewhere >= HOUR


def test_the_way_home_is_measured_once_an_event_and_never_for_a_wish(desk: Desk) -> None:
    desk.hear(order(1), at=bootstrap.clock() - 4000)
    fetch = desk.begin(order(1))
    desk.store(order(1), fetch)
    desk.store(order(1), fetch)  # the answer to the first was lost

    measured = kept(desk, "latency|")
    assert measured.pop(f"latency|{VENUE}|sum") >= 4000
    assert measured == {f"latency|{VENUE}|5000": 1}

    desk.ledger().request_fetch([order(1)], queue="live", reason="refetch")
    desk.bring_home(order(1))
    assert sum(kept(desk, "latency|").values()) == 1 + kept(desk, "latency|")[f"latency|{VENUE}|sum"]

    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z")
    desk.bring_home(order(1))
    assert kept(desk, "latency|")[f"latency|{VENUE}|250"] == 1


def test_an_event_during_the_fetch_is_measured_when_its_own_fetch_is_home(desk: Desk) -> None:
    desk.hear(order(1))
    fetch = desk.begin(order(1))
    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z")
    desk.store(order(1), fetch)
    assert kept(desk, "latency|") == {}

    desk.bring_home(order(1))
    assert kept(desk, f"latency|{VENUE}|250") == {f"latency|{VENUE}|250": 1}


def test_what_was_given_up_is_counted_by_reason_and_sink(desk: Desk) -> None:
    desk.hear(order(1), order(2), order(3))
    desk.give_up(order(1))
    desk.give_up(order(2), reason="http_400", http_status=400)
    desk.bring_home(order(3))
    desk.give_up_sink(order(3))

    assert kept(desk, "dead|") == {f"dead|{VENUE}|order_missing": 1, f"dead|{VENUE}|http_400": 1}
    assert kept(desk, "deliveries_dead_lettered|") == {f"deliveries_dead_lettered|{SINK}": 1}


def test_a_sink_that_is_behind_or_refuses_is_told_of(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    desk.bring_home(order(1))
    desk.bring_home(order(2))
    delivery = desk.ledger().acquire_delivery(order(1), WORKER)
    assert delivery is not None
    desk.ledger().complete_delivery(order(1), WORKER, delivery, outcome="retry", reason="ValueError", wait_ms=HOUR)
    desk.redis.hset(keys.record(order(1)), f"{SINK}:attempts", 1)

    assert (vitals(desk).sinks[SINK].behind, vitals(desk).sinks[SINK].failing) == (2, 1)


def test_the_pulse_tells_when_each_secret_was_used_and_how_many_events_an_hour_had(desk: Desk) -> None:
    """A duplicate is a sign of life, and no news."""
    at = bootstrap.clock() - 3 * HOUR
    desk.hear(order(1), order(2), timestamp="2026-05-15T09:30:05Z", at=at)
    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z", at=at + 2 * HOUR)

    assert Watch(desk.redis).hours(VENUE, bootstrap.clock()) == {at // HOUR: 2}
    assert (venue(desk).current_seen, venue(desk).previous_seen) == (at + 2 * HOUR, 0)
    assert Watch(desk.redis).hours(VENUE, at + 40 * 24 * HOUR) == {}
    assert desk.redis.hkeys(keys.event_rate(VENUE)) == [b"secret:current"]


def test_a_breaker_is_open_until_a_probe_is_answered_or_nobody_probes(desk: Desk) -> None:
    limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=MINUTE)
    limiter = RateLimiter(desk.redis, API_KEY, "/venue", limits)
    now = bootstrap.clock()
    closed_ms, _ = limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))
    until = venue(desk).breaker_until

    assert now < until <= bootstrap.clock() + closed_ms
    assert vitals(desk).companies[MUSEUM].breaker_until == 0
    told = [look(desk, later) for later in (0, until - now + MINUTE // 2, until - now + 2 * MINUTE)]
    assert told == [[], [], []]
    desk.redis.hset(SUBJECTS[0].breaker, "open_until", now + 9 * MINUTE)
    assert [look(desk, later * MINUTE) for later in (0, 4, 5, 6, 11)] == [
        [],
        [],
        [("raised", "breaker_open")],
        [],
        [("cleared", "breaker_open")],
    ]


def test_queues_are_told_by_their_length_and_their_first_job(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    desk.ledger().request_fetch([order(3)], queue="backfill", reason="replay")

    found = vitals(desk, later=MINUTE)
    assert (found.queues["live"].jobs, found.queues["backfill"].jobs) == (2, 1)
    assert MINUTE <= found.waited("live") < 2 * MINUTE

    first: Any = desk.redis.lindex("rq:queue:live", 0)
    desk.redis.delete(f"rq:job:{first.decode()}")
    assert vitals(desk, later=MINUTE).waited("live") >= MINUTE


def test_a_ticker_that_stands_still_is_told_by_what_is_past_its_time(desk: Desk) -> None:
    desk.hear(order(1))

    assert vitals(desk).late == 0
    assert vitals(desk, later=10 * MINUTE).late > 7 * MINUTE


def test_one_look_costs_the_same_with_many_orders(desk: Desk) -> None:
    """It reads a bounded number of records, whatever the number of orders."""
    desk.redis.zadd(keys.DUE, {f"{VENUE}:{number}": number for number in range(20_000)})
    desk.redis.config_resetstat()
    vitals(desk)
    stats: Any = desk.redis.info("commandstats")

    assert stats["cmdstat_hmget"]["calls"] <= 2 * SAMPLE * 2 + 10


def test_metrics_show_the_whole(desk: Desk, redis_url: str) -> None:
    desk.hear(order(1), at=bootstrap.clock() - 10 * MINUTE)
    desk.hear(order(2, MUSEUM))
    desk.bring_home(order(2, MUSEUM))
    desk.redis.hset(keys.POOLS, "p", json.dumps(_census(bootstrap.clock(), "p-live-1", "p-live-2", "p-backfill-3")))
    mark(desk.redis, ("reconciled", VENUE), 1_795_000_000_000)
    look(desk)

    found = metrics(redis_url, spooled=3)

    assert found["ota_redis_up"] == 1
    assert found["ota_spool_waiting_events"] == 3
    assert found["ota_oldest_pending_fetch_seconds venue"] >= 600
    assert found["ota_events_total museum queued"] == 1
    assert found["ota_event_to_fetch_seconds_count museum"] == 1
    assert found["ota_queue_jobs live"] == 2
    assert (found["ota_pools"], found["ota_workers live"], found["ota_workers backfill"]) == (1, 2, 1)
    assert found["ota_reconcile_last_success_timestamp_seconds venue"] == 1_795_000_000
    assert found["ota_last_event_timestamp_seconds museum current"] > 0
    assert found["ota_alert venue fetch_late "] == 1
    assert found["ota_alert museum fetch_late "] == 0
    assert {name.split()[0] for name in found} >= GAUGES.keys()


def test_without_redis_metrics_show_what_this_process_knows(own_valkey: Valkey) -> None:
    own_valkey.stop()

    known = {"ota_redis_up": 0, "ota_reconcile_interval_seconds venue": 900}
    assert metrics(own_valkey.url, spooled=7) == known | {"ota_spool_waiting_events": 7}
    assert metrics(own_valkey.url) == known


def test_one_pool_of_all_looks_each_minute(desk: Desk) -> None:
    watches = [Watch(desk.redis) for _ in range(3)]

    assert [watch.take_turn() for watch in watches] == [True, False, False]
    assert 55_000 < int(desk.redis.pttl(keys.ALERTS_TURN)) <= 59_000


def test_a_late_fetch_is_told_once_and_again_when_it_is_home(desk: Desk) -> None:
    desk.hear(order(1))

    assert [look(desk, later * MINUTE) for later in (1, 6, 7)] == [[], [("raised", "fetch_late")], []]
    desk.bring_home(order(1))
    assert look(desk, 8 * MINUTE) == [("cleared", "fetch_late")]


def test_a_pool_killed_before_it_kept_what_it_told_leaves_it_to_be_told_again(desk: Desk) -> None:
    """Twice is better than never."""
    desk.hear(order(1))

    class Killed(Watch):
        def save(self, states: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(desk.redis), SIGNS, vitals(desk, 6 * MINUTE))

    assert look(desk, 7 * MINUTE) == [("raised", "fetch_late")]


def test_new_dead_letters_and_hand_ons_are_told(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    assert look(desk) == []
    desk.bring_home(order(1))
    desk.give_up_sink(order(1))
    desk.give_up(order(2))

    assert sorted(look(desk)) == [("raised", "dead_deliveries"), ("raised", "dead_letters")]
    assert sorted(look(desk, 61 * MINUTE)) == [("cleared", "dead_deliveries"), ("cleared", "dead_letters")]


def test_a_pool_that_beats_no_more_is_told_of_by_another(desk: Desk) -> None:
    for name, ago in (("dead", 2 * MINUTE), ("living", 0)):
        desk.redis.hset(keys.POOLS, name, json.dumps(_census(bootstrap.clock() - ago, f"{name}-live-1")))

    assert look(desk) == [("raised", "pool_silent")]
    desk.redis.hdel(keys.POOLS, "dead")
    assert look(desk) == [("cleared", "pool_silent")]


def test_a_company_whose_missed_events_were_found_is_silent_until_one_comes(desk: Desk) -> None:
    """The list shows settled orders of which no event told: found, the look after tells of silence."""
    desk.hear(order(1), at=bootstrap.clock() - HOUR)
    desk.bring_home(order(1))
    look(desk)
    add(desk.redis, {("gaps", VENUE, "never_heard"): 3})

    assert look(desk, 1 * MINUTE) == [("raised", "missed_events")]
    assert look(desk, 2 * MINUTE) == [("raised", "silence")]
    desk.hear(order(2), at=bootstrap.clock() + 2 * MINUTE)
    desk.bring_home(order(2))
    assert look(desk, 3 * MINUTE) == [("cleared", "silence")]


def test_a_company_that_is_quiet_when_it_usually_is_not_is_silent(desk: Desk) -> None:
    """Heard through the real script, four weeks long."""
    now = bootstrap.clock()
    week = 7 * 24 * HOUR
    for weeks in range(4, 0, -1):
        numbers = range(weeks * 10, weeks * 10 + 8)
        desk.hear(*(order(number) for number in numbers), at=now - weeks * week - now % HOUR + MINUTE)
        for number in numbers:
            desk.redis.delete(keys.record(order(number)))
    desk.redis.delete(keys.DUE)
    at = -(now % HOUR)

    assert look(desk, at) == []
    assert look(desk, at + 59 * MINUTE) == [("raised", "silence")]
    assert look(desk, at + 60 * MINUTE) == []
    assert look(desk, at + 119 * MINUTE) == [("again", "silence")]


@pytest.mark.parametrize("fault", [lambda redis: redis.flushall(), lambda redis: redis.delete(keys.ALERTS)])
def test_a_flushed_redis_raises_nothing(desk: Desk, fault: Callable[[Redis], object]) -> None:
    desk.hear(order(1))
    desk.give_up(order(1))
    look(desk)
    fault(desk.redis)

    assert look(desk) == []


@pytest.mark.parametrize("odd", [b"no JSON", b'{"beat": "now"}', b"[]", b'{"workers": "\xff\xfe"}'])
def test_an_odd_entry_among_pools_or_alerts_hides_no_other(desk: Desk, redis_url: str, odd: bytes) -> None:
    """A newer version of ours, another program or a hand may have written it."""
    desk.redis.hset(keys.POOLS, "pool-a", json.dumps(_census(bootstrap.clock(), "a-live-1")))
    desk.redis.hset(keys.POOLS, b"odd \xff", odd)
    desk.hear(order(1), at=bootstrap.clock() - HOUR)
    look(desk)
    desk.redis.hset(keys.ALERTS, b"odd|\xff|" + VENUE.encode(), odd)

    shown = metrics(redis_url)
    status = desk.run("status")

    assert (shown["ota_pools"], shown["ota_alert venue fetch_late "]) == (1, 1)
    assert status.code == 1
    assert "fetch_late venue" in status.out
    assert look(desk, 10_000) == []
    assert keys.POOLS.encode() in desk.redis.keys("ota:pools")


def _alert(output: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    return next((line for line in lines if line["event"].startswith("alert.")), {})


def _census(beat: int, *workers: str) -> dict[str, object]:
    return {"machine": "m", "pid": 1, "started": "1", "workers": workers, "beat": beat}


def test_a_running_pool_tells_of_an_alert_at_once_and_lives_on(desk: Desk, tmp_path: Path) -> None:
    """As a process; takes about three seconds."""
    desk.hear(order(1), at=bootstrap.clock() - HOUR)
    program = [sys.executable, "-m", "app.cli", "worker"]
    env = desk.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    with Process.start(program, env=env, cwd=tmp_path, log=tmp_path / "log") as pool:
        line = eventually(lambda: _alert(pool.output), what="the alert")
        beat = vitals(desk).heartbeats()[0].beat
        eventually(lambda: vitals(desk).heartbeats()[0].beat > beat, what="it beats on")

    assert line["event"] == "alert.firing"
    assert (line["name"], line["company"], line["level"]) == ("fetch_late", "venue", "error")
    assert line["figure"] >= 3600
    assert line["runbook"] == "docs/operations.md#fetch-late"


def test_a_fault_of_ours_in_looking_is_logged_and_stops_no_pool(desk: Desk, tmp_path: Path) -> None:
    """What stands there was written by whoever it was; fetching goes on."""
    desk.redis.hset(keys.event_rate(VENUE), "hour:canary", 1)
    program = [sys.executable, "-m", "app.cli", "worker"]
    env = desk.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    with Process.start(program, env=env, cwd=tmp_path, log=tmp_path / "log") as pool:
        line = eventually(lambda: _alert(pool.output), what="it is told")
        beat = vitals(desk).heartbeats()[0].beat
        eventually(lambda: vitals(desk).heartbeats()[0].beat > beat, what="it beats on")

    assert (line["event"], line["error"]) == ("alert.failed", "ValueError")
    assert "canary" not in (tmp_path / "log").read_text()


def test_orders_are_counted_by_their_company(desk: Desk) -> None:
    one = OrderKey(MUSEUM, order(1).order_id)
    desk.hear(one)
    desk.give_up(one)

    assert kept(desk, "dead") == {f"dead|{MUSEUM}|order_missing": 1}
