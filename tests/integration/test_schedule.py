"""When a company is reconciled: on schedule or after rejected events, and on one machine at a time."""

from __future__ import annotations

import pytest
from redis import Redis

from app.ledger import keys
from app.reconcile.state import AGAIN_AFTER, FIRST_AFTER, TRIGGER_EVERY, Schedule

VENUE = "11111111-1111-4111-8111-111111111111"
NOW = 1_795_000_000_000
EVERY = 900_000


@pytest.fixture
def schedule(redis_client: Redis) -> Schedule:
    return Schedule(redis_client, VENUE, lease=60_000)


def trigger(redis: Redis) -> None:
    """Count a rejected event, as the web process does."""
    redis.hincrby(keys.reconcile(VENUE), "triggers", 1)


def run(schedule: Schedule, now: int) -> str | None:
    """Run to the end if a run is due; return its cause."""
    with schedule.acquire(now) as due:
        if due is None:
            return None
        schedule.complete(due, now + EVERY)
        return due.cause


def test_the_first_run_is_due_after_a_minute_and_the_next_after_each_interval(schedule: Schedule) -> None:
    first, second = NOW + FIRST_AFTER, NOW + FIRST_AFTER + EVERY

    causes = [run(schedule, at) for at in (NOW, first - 1, first, second - 1, second)]

    assert causes == [None, None, "scheduled", None, "scheduled"]


def test_rejected_events_cause_one_run_at_once_and_the_next_after_five_minutes(
    schedule: Schedule, redis_client: Redis
) -> None:
    """Events rejected after a run started cause another: its list may not have had their orders."""
    trigger(redis_client)
    trigger(redis_client)
    assert [run(schedule, NOW), run(schedule, NOW + 1000)] == ["rejected_events", None]
    with schedule.acquire(NOW + EVERY) as due:
        assert due is not None
        trigger(redis_client)
        schedule.complete(due, NOW + 2 * EVERY)

    assert run(schedule, NOW + EVERY + 1) == "rejected_events"
    trigger(redis_client)
    assert run(schedule, NOW + EVERY + TRIGGER_EVERY) is None
    assert run(schedule, NOW + EVERY + 1 + TRIGGER_EVERY) == "rejected_events"


def test_one_machine_runs_at_a_time_and_the_other_then_finds_nothing_due(
    schedule: Schedule, redis_client: Redis
) -> None:
    other = Schedule(redis_client, VENUE, lease=60_000)
    run(schedule, NOW)
    later = NOW + FIRST_AFTER
    with schedule.acquire(later) as due:
        assert due is not None
        assert 0 < int(redis_client.pttl(keys.reconcile_lease(VENUE))) <= 60_000
        assert run(other, later) is None
        schedule.complete(due, later + EVERY)

    assert run(other, later + 1) is None


def test_a_run_that_died_is_due_again_after_a_minute(schedule: Schedule) -> None:
    """It must not start again each second."""
    run(schedule, NOW)
    later = NOW + FIRST_AFTER
    with pytest.raises(ZeroDivisionError), schedule.acquire(later):
        raise ZeroDivisionError

    assert run(schedule, later + 1000) is None
    assert run(schedule, later + AGAIN_AFTER) == "scheduled"


def test_a_run_that_outlasts_its_lease_ends_without_an_error(schedule: Schedule, redis_client: Redis) -> None:
    trigger(redis_client)
    with schedule.acquire(NOW):
        redis_client.delete(keys.reconcile_lease(VENUE))

    assert redis_client.exists(keys.reconcile_lease(VENUE)) == 0


def test_a_postponed_run_continues_a_minute_later_whatever_the_cause(schedule: Schedule, redis_client: Redis) -> None:
    trigger(redis_client)
    with schedule.acquire(NOW) as due:
        assert due is not None
        schedule.postpone(NOW + AGAIN_AFTER)
    trigger(redis_client)

    assert run(schedule, NOW + AGAIN_AFTER - 1) is None
    assert run(schedule, NOW + AGAIN_AFTER) == "scheduled"


def test_after_a_flush_of_redis_the_schedule_starts_again(schedule: Schedule, redis_client: Redis) -> None:
    run(schedule, NOW)
    run(schedule, NOW + FIRST_AFTER)
    redis_client.flushall()

    assert run(schedule, NOW + FIRST_AFTER + 1) is None
    assert run(schedule, NOW + 2 * FIRST_AFTER + 1) == "scheduled"
