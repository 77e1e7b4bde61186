"""Old data is deleted, and pending orders never are. Days pass by injected time, or are read as PTTL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from redis import Redis

from app import audit
from app.audit import AuditEntry
from app.ledger import keys, policy
from app.ledger.retention import MOST_ENTRIES, Retention
from app.ledger.work import Delivery
from app.replay import Draft, Plans
from tests.integration.ledger_scenario import ONE, Scenario, open_scenario

SHOP: Final = "shop"
EVENT_DAYS: Final = 90


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Scenario]:
    """With the time of Redis, which the ids of a stream have."""
    with open_scenario(redis_client, SHOP) as opened:
        opened.now = now()
        yield opened


def now() -> int:
    return time.time_ns() // 1_000_000


def days(count: float) -> int:
    return round(count * policy.DAY)


def add_events(redis: Redis, ages_in_days: list[float]) -> None:
    """Add events to the stream, the oldest first, as if received so many days ago."""
    with redis.pipeline(transaction=False) as pipe:
        for number, age in enumerate(ages_in_days):
            pipe.xadd(keys.EVENTS, {"company": "c", "order": "o"}, id=f"{now() - days(age)}-{number}")
        pipe.execute()


def retention_of(redis: Redis, at: int | None = None) -> Retention:
    """Return a Retention at this time, or at that of Redis."""
    clock = None if at is None else lambda: at
    return Retention(redis, event_days=EVENT_DAYS, order_days=400, clock=clock)


class TestRetention:
    def test_old_events_are_deleted_without_new_ones(self, redis_client: Redis) -> None:
        """Also those that share a node of the stream with younger ones."""
        add_events(redis_client, [*[91.0] * 330, 90.01, 89.99, 1])
        retention = retention_of(redis_client)

        assert sum(retention.trim()[0] for _ in range(3)) == 331
        assert redis_client.xlen(keys.EVENTS) == 2

    def test_one_call_deletes_a_bounded_number(self, redis_client: Redis) -> None:
        """Redis serves others in between."""
        add_events(redis_client, [91.0] * (MOST_ENTRIES + 500))
        retention = retention_of(redis_client)

        first = retention.trim()[0]

        assert MOST_ENTRIES - 100 <= first <= MOST_ENTRIES
        assert first + retention.trim()[0] + retention.trim()[0] == MOST_ENTRIES + 500

    def test_it_trims_once_a_minute(self, redis_client: Redis) -> None:
        retention = retention_of(redis_client)
        retention.trim_each_minute()
        add_events(redis_client, [91.0])

        retention.trim_each_minute()

        assert redis_client.xlen(keys.EVENTS) == 1

    def test_old_entries_of_the_audit_and_the_list_of_replays_are_deleted(self, redis_client: Redis) -> None:
        redis_client.xadd(keys.AUDIT, {"what": "replay"}, id=f"{now() - days(91)}-0")
        audit.append(redis_client, AuditEntry(what="erase", who="", why="", selected="", orders=0))
        redis_client.zadd(keys.REPLAYS, {"old": now() - days(91), "new": now()})

        retention_of(redis_client).trim()

        assert [entry.what for _, entry in audit.newest_first(redis_client)] == ["erase"]
        assert redis_client.zrange(keys.REPLAYS, 0, -1) == [b"new"]

    def test_a_plan_expires_after_event_days(self, redis_client: Redis) -> None:
        draft = Draft(who="", why="", selected="", rate=1)
        plan = Plans(redis_client, event_days=EVENT_DAYS).file(draft, [(ONE.member, None)])

        for key in (keys.replay(plan.id), keys.replay_todo(plan.id)):
            assert days(EVENT_DAYS) - policy.MINUTE < int(redis_client.pttl(key)) <= days(EVENT_DAYS)

    def test_accept_trims_as_events_come(self, stage: Scenario) -> None:
        """By whole nodes of the stream, which costs nothing; the pool deletes the rest."""
        add_events(stage.redis, [91.0] * 400)

        stage.settle()

        assert stage.redis.xlen(keys.EVENTS) <= 101


def test_a_repeated_event_is_recognised_for_dedup_days(stage: Scenario) -> None:
    stage.accept("2026-11-22T10:00:00Z")
    (seen,) = stage.redis.keys("ota:seen:*")

    assert days(7) - policy.MINUTE < int(stage.redis.pttl(seen)) <= days(7)
    stage.redis.delete(seen)  # as its expiry does
    assert stage.accept("2026-11-22T10:00:00Z") != "duplicate"


UNFINISHED: Final[dict[str, Callable[[Scenario], object]]] = {
    "pending": Scenario.settle,
    "fetching": lambda stage: (stage.settle(), stage.fetch()),
    "deferred": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "deferred")),
    "not found": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "not_found")),
    "dead": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "dead")),
    "unsettled": lambda stage: (stage.settle(), stage.store(stage.fetch(), 1, recheck=0.001)),
    "a sink is behind": lambda stage: (stage.settle(), stage.fetch_and_store(1)),
    "a delivery is retried": lambda stage: (stage.settle(), stage.fetch_and_store(1), deliver(stage, "retry")),
    "a delivery is dead": lambda stage: (
        stage.settle(),
        stage.fetch_and_store(1),
        deliver(stage, "dead"),
        stage.acquire(),
    ),
    "fetched, and an event came": lambda stage: (delivered(stage), stage.settle()),
    "fetched, and a fetch requested": lambda stage: (delivered(stage), stage.request()),
    "dead again": lambda stage: (delivered(stage), stage.settle(), stage.fail(stage.fetch(), "dead"), stage.start()),
}


def deliver(stage: Scenario, what: Any) -> Delivery:
    taken = stage.acquire()
    assert taken is not None
    stage.complete(taken, what)
    return taken


def delivered(stage: Scenario) -> Delivery:
    stage.settle()
    stage.fetch_and_store(1)
    taken = deliver(stage, "succeeded")
    assert stage.acquire() is None
    return taken


@pytest.mark.parametrize("state", UNFINISHED)
def test_an_unfinished_order_never_expires(stage: Scenario, state: str) -> None:
    UNFINISHED[state](stage)

    assert stage.days_kept() == {None}
    assert retention_of(stage.redis, stage.now + days(5000)).trim()[1] == 0


def test_a_finished_order_expires_after_order_days_with_all_its_keys(stage: Scenario) -> None:
    delivered(stage)

    assert stage.days_kept() == {400.0}
    # As their expiry does: then the list drops the order.
    stage.redis.delete(keys.record(ONE), keys.history(ONE), keys.content(ONE))
    assert retention_of(stage.redis, stage.now + days(400) + 1).trim()[1] == 1
    assert stage.redis.zcard(keys.ORDERS) == 0


def test_the_hash_of_a_job_is_deleted_with_it_or_a_day_after_a_kill(stage: Scenario) -> None:
    """RQ reads both from the job; test_rq_contract.py runs one."""
    stage.settle()
    (job,) = stage.redis.keys("rq:job:*")

    assert stage.redis.hmget(job, "result_ttl", "failure_ttl") == [b"0", b"86400"]
