"""Snapshot, metrics and alerts over a real Valkey that the real scripts fill; hours pass by injected time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from redis import Redis

from app import bootstrap
from app.alerts import AlertStore
from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.errors import ConnectionFault
from app.ledger import keys
from app.ledger.rate_limit import Limits, RateLimiter, breaker_key
from app.ledger.work import Content
from app.metrics import GAUGES, Metrics, add, record_whole_list
from app.settings import Company
from app.snapshot import SAMPLE, CompanySnapshot, Snapshot, SnapshotReader
from tests.clock import now_ms
from tests.eventually import eventually
from tests.integration.desk import API_KEY, MUSEUM, PARTNER, SINK, VENUE, WORKER, Desk, open_desk, order
from workers.background import log_alerts

MINUTE = 60_000
HOUR = 60 * MINUTE
COMPANIES = tuple(
    Company(
        slug=slug,
        np_company_id=company_id,
        np_company=slug,
        np_tenant="tenant",
        np_environment="Production",
        np_api_key=SecretStr(API_KEY),
        client_state=SecretStr("state"),
        np_partner_id=partner_id,
    )
    for slug, company_id, partner_id in (("venue", VENUE, PARTNER), ("museum", MUSEUM, None))
)
READER = SnapshotReader(COMPANIES, (SINK,))
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


def snapshot(desk: Desk, later: int = 0) -> Snapshot:
    return READER.read(desk.redis, now_ms() + later)


def venue(desk: Desk) -> CompanySnapshot:
    return snapshot(desk).companies[VENUE]


def evaluated(desk: Desk, later: int = 0) -> list[tuple[str, str]]:
    """Evaluate the alerts as a pool does; return what was logged."""
    changes = log_alerts(AlertStore(desk.redis), READER, snapshot(desk, later))
    return [(change.action, change.condition.name) for change in changes]


def counters(desk: Desk, prefix: str) -> dict[str, int]:
    found: Any = desk.redis.hgetall(keys.COUNTERS)
    return {field.decode(): int(value) for field, value in found.items() if field.decode().startswith(prefix)}


def metrics(url: str, spooled: int | None = None) -> dict[str, float]:
    """Return what a web process answers, by name and label values."""

    async def count() -> int:
        return spooled or 0

    async def ask() -> bytes:
        redis = bootstrap.for_web(url)
        try:
            return await Metrics(redis, READER, None if spooled is None else count, 900).text()
        finally:
            await redis.aclose()

    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(asyncio.run(ask()).decode())
        for sample in family.samples
    }


def test_the_snapshot_of_an_empty_redis_is_empty(desk: Desk) -> None:
    found = snapshot(desk)

    assert (found.due, found.next_due_at, found.dispatcher_lag_ms) == (0, 0, 0)
    assert (found.queue_age_ms("live"), found.pools) == (0, {})
    assert found.companies[VENUE] == CompanySnapshot(0, 0, 0, 0, 0, 0)


def test_the_oldest_pending_fetch_is_shown_by_company_until_it_is_stored(desk: Desk) -> None:
    desk.hear(order(1), at=now_ms() - 5 * MINUTE)
    desk.hear(order(2), at=now_ms() - MINUTE)
    desk.hear(order(3, MUSEUM))

    assert 5 * MINUTE <= venue(desk).oldest_pending_ms < 6 * MINUTE
    assert snapshot(desk).companies[MUSEUM].oldest_pending_ms < MINUTE

    desk.bring_home(order(1))
    assert MINUTE <= venue(desk).oldest_pending_ms < 2 * MINUTE


def test_an_order_that_is_retried_later_stays_pending(desk: Desk) -> None:
    """It is due in two hours, after all others: the sample covers that end of `due` too."""
    desk.hear(order(1), at=now_ms() - HOUR)
    fetch = desk.begin(order(1))
    desk.ledger().fail_fetch(order(1), WORKER, fetch, outcome="retry", reason="http_500", wait_ms=2 * HOUR)
    desk.hear(*(order(number) for number in range(2, SAMPLE + 20)))

    assert venue(desk).oldest_pending_ms >= HOUR


def test_a_fetch_that_no_event_waits_for_is_not_late(desk: Desk) -> None:
    """Replays and refetches of what is fetched, dead letters and unsettled orders."""
    long_ago = now_ms() - 9 * HOUR
    desk.hear(*(order(number) for number in range(1, 5)), at=long_ago)
    desk.bring_home(order(1))
    desk.bring_home(order(2))
    desk.ledger().request_fetch([order(1)], queue="backfill", reason="replay")
    desk.ledger().request_fetch([order(2)], queue="live", reason="refetch")
    desk.give_up(order(3))
    desk.ledger().store_fetch(order(4), WORKER, desk.begin(order(4)), UNSETTLED, recheck_ms=10 * MINUTE)

    assert snapshot(desk).due == 3
    assert venue(desk).oldest_pending_ms == 0


def test_a_requeued_dead_letter_is_late_until_it_is_fetched(desk: Desk) -> None:
    desk.hear(order(1), at=now_ms() - 9 * HOUR)
    desk.give_up(order(1))
    assert venue(desk).oldest_pending_ms == 0

    desk.ledger().request_fetch([order(1)], queue="backfill", reason="requeue")
    assert venue(desk).oldest_pending_ms >= 9 * HOUR

    desk.bring_home(order(1))
    assert venue(desk).oldest_pending_ms == 0


def test_an_order_of_an_unknown_company_counts_as_other(desk: Desk) -> None:
    desk.hear(order(1, "99999999-9999-4999-8999-999999999999"), at=now_ms() - HOUR)

    assert snapshot(desk).elsewhere_oldest_pending_ms >= HOUR


def test_the_time_from_event_to_fetch_is_measured_once_an_event_and_not_for_a_refetch(desk: Desk) -> None:
    desk.hear(order(1), at=now_ms() - 4000)
    fetch = desk.begin(order(1))
    desk.store(order(1), fetch)
    desk.store(order(1), fetch)  # the answer to the first was lost

    measured = counters(desk, "latency|")
    assert measured.pop(f"latency|{VENUE}|sum") >= 4000
    assert measured == {f"latency|{VENUE}|5000": 1}

    desk.ledger().request_fetch([order(1)], queue="live", reason="refetch")
    desk.bring_home(order(1))
    assert sum(counters(desk, "latency|").values()) == 1 + counters(desk, "latency|")[f"latency|{VENUE}|sum"]

    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z")
    desk.bring_home(order(1))
    assert counters(desk, "latency|")[f"latency|{VENUE}|250"] == 1


def test_an_event_during_a_fetch_is_measured_with_its_own_fetch(desk: Desk) -> None:
    desk.hear(order(1))
    fetch = desk.begin(order(1))
    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z")
    desk.store(order(1), fetch)
    assert counters(desk, "latency|") == {}

    desk.bring_home(order(1))
    assert counters(desk, f"latency|{VENUE}|250") == {f"latency|{VENUE}|250": 1}


def test_dead_letters_are_counted_by_reason_and_sink(desk: Desk) -> None:
    other = order(2, MUSEUM)
    desk.hear(order(1), other, order(3))
    desk.give_up(order(1))
    desk.give_up(other, reason="http_400", http_status=400)
    desk.bring_home(order(3))
    desk.give_up_sink(order(3))

    assert counters(desk, "dead|") == {f"dead|{VENUE}|order_missing": 1, f"dead|{MUSEUM}|http_400": 1}
    assert counters(desk, "deliveries_dead_lettered|") == {f"deliveries_dead_lettered|{SINK}": 1}


def test_orders_that_a_sink_lacks_or_refuses_are_counted(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    desk.bring_home(order(1))
    desk.bring_home(order(2))
    delivery = desk.ledger().acquire_delivery(order(1), WORKER)
    assert delivery is not None
    desk.ledger().complete_delivery(order(1), WORKER, delivery, outcome="retry", reason="ValueError", wait_ms=HOUR)
    desk.redis.hset(keys.record(order(1)), f"{SINK}:attempts", 1)

    assert (snapshot(desk).sinks[SINK].behind, snapshot(desk).sinks[SINK].failing) == (2, 1)


def test_the_event_rate_has_the_last_use_of_each_secret_and_the_new_events_of_each_hour(desk: Desk) -> None:
    """A duplicate shows that the sender works, but is not a new event."""
    at = now_ms() - 3 * HOUR
    desk.hear(order(1), order(2), timestamp="2026-05-15T09:30:05Z", at=at)
    desk.hear(order(1), timestamp="2026-05-15T09:30:05Z", at=at + 2 * HOUR)

    assert AlertStore(desk.redis).hours(VENUE, now_ms()) == {at // HOUR: 2}
    assert (venue(desk).current_secret_at, venue(desk).previous_secret_at) == (at + 2 * HOUR, 0)
    assert AlertStore(desk.redis).hours(VENUE, at + 40 * 24 * HOUR) == {}
    assert desk.redis.hkeys(keys.event_rate(VENUE)) == [b"secret:current"]


def test_a_breaker_counts_as_open_until_its_probe_is_overdue(desk: Desk) -> None:
    limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=6000, permit_lease=MINUTE)
    limiter = RateLimiter(desk.redis, API_KEY, COMPANIES[0].path, limits)
    now = now_ms()
    closed_ms, _ = limiter.permit("live").failed(ConnectionFault("unauthorized", http_status=401))
    until = venue(desk).breaker_open_until

    assert now < until <= now_ms() + closed_ms
    assert snapshot(desk).companies[MUSEUM].breaker_open_until == 0
    logged = [evaluated(desk, later) for later in (0, until - now + MINUTE // 2, until - now + 2 * MINUTE)]
    assert logged == [[], [], []]
    desk.redis.hset(breaker_key(API_KEY, COMPANIES[0].path), "open_until", now + 9 * MINUTE)
    assert [evaluated(desk, later * MINUTE) for later in (0, 4, 5, 6, 11)] == [
        [],
        [],
        [("firing", "breaker_open")],
        [],
        [("resolved", "breaker_open")],
    ]


def test_a_queue_has_its_length_and_the_age_of_its_first_job(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    desk.ledger().request_fetch([order(3)], queue="backfill", reason="replay")

    found = snapshot(desk, later=MINUTE)
    assert (found.queues["live"].jobs, found.queues["backfill"].jobs) == (2, 1)
    assert MINUTE <= found.queue_age_ms("live") < 2 * MINUTE

    first: Any = desk.redis.lindex("rq:queue:live", 0)
    desk.redis.delete(f"rq:job:{first.decode()}")
    assert snapshot(desk, later=MINUTE).queue_age_ms("live") >= MINUTE


def test_the_dispatcher_lag_grows_while_no_dispatcher_runs(desk: Desk) -> None:
    desk.hear(order(1))

    assert snapshot(desk).dispatcher_lag_ms == 0
    assert snapshot(desk, later=10 * MINUTE).dispatcher_lag_ms > 7 * MINUTE


def test_a_snapshot_costs_the_same_with_many_orders(desk: Desk) -> None:
    """It reads a bounded number of records, whatever the number of orders."""
    desk.redis.zadd(keys.DUE, {f"{VENUE}:{number}": number for number in range(20_000)})
    desk.redis.config_resetstat()
    snapshot(desk)
    stats: Any = desk.redis.info("commandstats")

    assert stats["cmdstat_hmget"]["calls"] <= 2 * SAMPLE * 2 + 10


def test_metrics_show_the_whole_state(desk: Desk, redis_url: str) -> None:
    desk.hear(order(1), at=now_ms() - 10 * MINUTE)
    desk.hear(order(2, MUSEUM))
    desk.bring_home(order(2, MUSEUM))
    desk.redis.hset(keys.POOLS, "p", json.dumps(heartbeat(now_ms(), "p-live-1", "p-live-2", "p-backfill-3")))
    record_whole_list(desk.redis, VENUE, 1_795_000_000_000)
    evaluated(desk)

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


def test_without_redis_metrics_show_only_the_process_itself(own_valkey: Valkey) -> None:
    own_valkey.stop()

    known = {"ota_redis_up": 0, "ota_reconcile_interval_seconds venue": 900}
    assert metrics(own_valkey.url, spooled=7) == known | {"ota_spool_waiting_events": 7}
    assert metrics(own_valkey.url) == known


def test_one_pool_of_all_evaluates_each_minute(desk: Desk) -> None:
    watches = [AlertStore(desk.redis) for _ in range(3)]

    assert [watch.acquire_turn() for watch in watches] == [True, False, False]
    assert 55_000 < int(desk.redis.pttl(keys.ALERTS_TURN)) <= 59_000


def test_a_late_fetch_fires_once_and_resolves_when_it_is_stored(desk: Desk) -> None:
    desk.hear(order(1))

    assert [evaluated(desk, later * MINUTE) for later in (1, 6, 7)] == [[], [("firing", "fetch_late")], []]
    desk.bring_home(order(1))
    assert evaluated(desk, 8 * MINUTE) == [("resolved", "fetch_late")]


def test_a_pool_killed_before_it_saved_an_alert_leaves_it_to_the_next(desk: Desk) -> None:
    """An alert may be logged twice, but is never lost."""
    desk.hear(order(1))

    class Killed(AlertStore):
        def save(self, states: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        log_alerts(Killed(desk.redis), READER, snapshot(desk, 6 * MINUTE))

    assert evaluated(desk, 7 * MINUTE) == [("firing", "fetch_late")]


def test_new_dead_letters_fire(desk: Desk) -> None:
    desk.hear(order(1), order(2))
    assert evaluated(desk) == []
    desk.bring_home(order(1))
    desk.give_up_sink(order(1))
    desk.give_up(order(2))

    assert sorted(evaluated(desk)) == [("firing", "dead_deliveries"), ("firing", "dead_letters")]
    assert sorted(evaluated(desk, 61 * MINUTE)) == [("resolved", "dead_deliveries"), ("resolved", "dead_letters")]


def test_a_pool_without_heartbeats_fires_at_another_pool(desk: Desk) -> None:
    for name, ago in (("dead", 2 * MINUTE), ("living", 0)):
        desk.redis.hset(keys.POOLS, name, json.dumps(heartbeat(now_ms() - ago, f"{name}-live-1")))

    assert evaluated(desk) == [("firing", "pool_silent")]
    desk.redis.hdel(keys.POOLS, "dead")
    assert evaluated(desk) == [("resolved", "pool_silent")]


def test_missed_events_fire_and_then_silence_until_an_event_comes(desk: Desk) -> None:
    """The silence is noticed at the evaluation after."""
    desk.hear(order(1), at=now_ms() - HOUR)
    desk.bring_home(order(1))
    evaluated(desk)
    add(desk.redis, {("discrepancies", VENUE, "no_event"): 3})

    assert evaluated(desk, 1 * MINUTE) == [("firing", "missed_events")]
    assert evaluated(desk, 2 * MINUTE) == [("firing", "silence")]
    desk.hear(order(2), at=now_ms() + 2 * MINUTE)
    desk.bring_home(order(2))
    assert evaluated(desk, 3 * MINUTE) == [("resolved", "silence")]


def test_a_company_without_its_usual_events_is_silent(desk: Desk) -> None:
    """Four weeks of events go through the real script."""
    now = now_ms()
    week = 7 * 24 * HOUR
    for weeks in range(4, 0, -1):
        numbers = range(weeks * 10, weeks * 10 + 8)
        desk.hear(*(order(number) for number in numbers), at=now - weeks * week - now % HOUR + MINUTE)
        for number in numbers:
            desk.redis.delete(keys.record(order(number)))
    desk.redis.delete(keys.DUE)
    at = -(now % HOUR)

    assert evaluated(desk, at) == []
    assert evaluated(desk, at + 59 * MINUTE) == [("firing", "silence")]
    assert evaluated(desk, at + 60 * MINUTE) == []
    assert evaluated(desk, at + 119 * MINUTE) == [("repeated", "silence")]


@pytest.mark.parametrize("fault", [lambda redis: redis.flushall(), lambda redis: redis.delete(keys.ALERTS)])
def test_a_flushed_redis_fires_nothing(desk: Desk, fault: Callable[[Redis], object]) -> None:
    desk.hear(order(1))
    desk.give_up(order(1))
    evaluated(desk)
    fault(desk.redis)

    assert evaluated(desk) == []


def test_an_unreadable_entry_hides_no_other_pool_or_alert(desk: Desk, redis_url: str) -> None:
    """A newer version, another program or a person may have written it."""
    odd = dict(enumerate([b"no JSON", b'{"at": "now"}', b"[]", b'{"workers": "\xff\xfe"}']))
    desk.redis.hset(keys.POOLS, "pool-a", json.dumps(heartbeat(now_ms(), "a-live-1")))
    desk.redis.hset(keys.POOLS, mapping={b"odd %d \xff" % number: text for number, text in odd.items()})
    desk.hear(order(1), at=now_ms() - HOUR)
    evaluated(desk)
    desk.redis.hset(keys.ALERTS, mapping={b"odd|%d \xff|" % number: text for number, text in odd.items()})

    shown = metrics(redis_url)
    status = desk.run("status")

    assert (shown["ota_pools"], shown["ota_alert venue fetch_late "]) == (1, 1)
    assert (status.code, "fetch_late venue" in status.out) == (1, True)
    assert evaluated(desk, 10_000) == []


def _alert(output: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    return next((line for line in lines if line["event"].startswith("alert.")), {})


def heartbeat(at: int, *workers: str) -> dict[str, object]:
    return {"machine": "m", "pid": 1, "started": "1", "workers": workers, "at": at}


def alert_of_a_pool(desk: Desk, folder: Path) -> dict[str, Any]:
    """Start a real pool; return its first alert once it has written heartbeats before and after."""
    program = [sys.executable, "-m", "app.cli", "worker"]
    env = desk.env | {"WORKERS": "1", "BACKFILL_WORKERS": "0", "LOG_FORMAT": "json"}
    with Process.start(program, env=env, cwd=folder, log=folder / "log") as pool:
        line = eventually(lambda: _alert(pool.output), what="the alert")
        at = snapshot(desk).heartbeats()[0].at
        eventually(lambda: snapshot(desk).heartbeats()[0].at > at, what="the next heartbeat")
    return line


def test_a_running_pool_logs_an_alert_and_continues(desk: Desk, tmp_path: Path) -> None:
    desk.hear(order(1), at=now_ms() - HOUR)

    line = alert_of_a_pool(desk, tmp_path)

    assert line["event"] == "alert.firing"
    assert (line["name"], line["company"], line["level"]) == ("fetch_late", "venue", "error")
    assert line["figure"] >= 3600
    assert line["runbook"] == "docs/operations.md#fetch-late"


def test_an_internal_error_in_the_alerts_is_logged_and_stops_no_pool(desk: Desk, tmp_path: Path) -> None:
    desk.redis.hset(keys.event_rate(VENUE), "hour:canary", 1)

    line = alert_of_a_pool(desk, tmp_path)

    assert (line["event"], line["error"]) == ("alert.failed", "ValueError")
    assert "canary" not in (tmp_path / "log").read_text()
