"""What has ended its days goes, and nothing that is owed does: days are counted by injected time, or read as PTTL."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from redis import Redis

from app.audit import Audit, Deed
from app.ledger import keys, policy
from app.ledger.retention import MOST_ENTRIES, Retention
from app.ledger.work import Delivery
from app.replay import Draft, Plans
from tests.integration.ledger_model.stage import ONE, Stage, staged

SHOP: Final = "shop"
EVENT_DAYS: Final = 90


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    """By the time of the machine: the ids of a stream are by the clock of Redis."""
    with staged(redis_client, SHOP) as opened:
        opened.clock.now = now()
        yield opened


def now() -> int:
    return time.time_ns() // 1_000_000


def days(count: float) -> int:
    return round(count * policy.DAY)


def add_events(redis: Redis, ages_in_days: list[float]) -> None:
    """Put events into the stream, the oldest first, as if they had come so many days ago."""
    with redis.pipeline(transaction=False) as pipe:
        for number, age in enumerate(ages_in_days):
            pipe.xadd(keys.EVENTS, {"company": "c", "order": "o"}, id=f"{now() - days(age)}-{number}")
        pipe.execute()


def kept(redis: Redis, at: int | None = None) -> Retention:
    """Return what trims, at this time or at that of Redis."""
    clock = None if at is None else lambda: at
    return Retention(redis, event_days=EVENT_DAYS, order_days=400, clock=clock)


class TestRetention:
    def test_old_events_go_though_no_new_one_comes(self, redis_client: Redis) -> None:
        """To the very last: also those that share a node of the stream with younger ones."""
        add_events(redis_client, [*[91.0] * 330, 90.01, 89.99, 1])
        retention = kept(redis_client)

        assert sum(retention.trim()[0] for _ in range(3)) == 331
        assert redis_client.xlen(keys.EVENTS) == 2

    def test_a_call_removes_only_so_many(self, redis_client: Redis) -> None:
        """Redis serves others in between."""
        add_events(redis_client, [91.0] * (MOST_ENTRIES + 500))
        retention = kept(redis_client)

        first = retention.trim()[0]

        assert MOST_ENTRIES - 100 <= first <= MOST_ENTRIES
        assert first + retention.trim()[0] + retention.trim()[0] == MOST_ENTRIES + 500

    def test_it_trims_once_a_minute(self, redis_client: Redis) -> None:
        retention = kept(redis_client)
        retention.trim_each_minute()
        add_events(redis_client, [91.0])

        retention.trim_each_minute()

        assert redis_client.xlen(keys.EVENTS) == 1

    def test_the_audit_and_the_list_of_replays_end_too(self, redis_client: Redis) -> None:
        deed: Any = dict.fromkeys(Deed.__struct_fields__, "x") | {"orders": 0}
        redis_client.xadd(keys.AUDIT, deed, id=f"{now() - days(91)}-0")
        redis_client.xadd(keys.AUDIT, deed)
        redis_client.zadd(keys.REPLAYS, {"old": now() - days(91), "new": now()})

        kept(redis_client).trim()

        assert len(list(Audit(redis_client, event_days=EVENT_DAYS).newest_first())) == 1
        assert redis_client.zrange(keys.REPLAYS, 0, -1) == [b"new"]

    def test_a_plan_ends_by_itself(self, redis_client: Redis) -> None:
        draft = Draft(who="", why="", selected="", rate=1)
        plan = Plans(redis_client, event_days=EVENT_DAYS).file(draft, [(ONE.member, None)], now())

        for key in (keys.replay(plan.id), keys.replay_todo(plan.id)):
            assert days(EVENT_DAYS) - policy.MINUTE < int(redis_client.pttl(key)) <= days(EVENT_DAYS)

    def test_accept_trims_as_events_come(self, stage: Stage) -> None:
        """By whole nodes of the stream, which costs nothing; the pool does the rest."""
        add_events(stage.redis, [91.0] * 400)

        stage.settle()

        assert stage.redis.xlen(keys.EVENTS) <= 101


def test_an_event_is_known_again_for_dedup_days(stage: Stage) -> None:
    stage.hear("2026-11-22T10:00:00Z")
    (seen,) = stage.redis.keys("ota:seen:*")

    assert days(7) - policy.MINUTE < int(stage.redis.pttl(seen)) <= days(7)
    stage.redis.delete(seen)  # as its end does
    assert stage.hear("2026-11-22T10:00:00Z") != "duplicate"


OWED: Final[dict[str, Callable[[Stage], object]]] = {
    "owed": Stage.settle,
    "fetching": lambda stage: (stage.settle(), stage.fetch()),
    "parked": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "deferred")),
    "missing": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "not_found")),
    "dead": lambda stage: (stage.settle(), stage.fail(stage.fetch(), "dead")),
    "unsettled": lambda stage: (stage.settle(), stage.store(stage.fetch(), 1, recheck=0.001)),
    "a sink is behind": lambda stage: (stage.settle(), stage.bring(1)),
    "a sink will be tried again": lambda stage: (stage.settle(), stage.bring(1), hand(stage, "retry")),
    "a sink was given up": lambda stage: (stage.settle(), stage.bring(1), hand(stage, "dead"), stage.acquire()),
    "home, and an event came": lambda stage: (home(stage), stage.settle()),
    "home, and somebody asks": lambda stage: (home(stage), stage.request()),
    "dead once more": lambda stage: (home(stage), stage.settle(), stage.fail(stage.fetch(), "dead"), stage.start()),
}


def hand(stage: Stage, what: Any) -> Delivery:
    taken = stage.acquire()
    assert taken is not None
    stage.complete(taken, what)
    return taken


def home(stage: Stage) -> Delivery:
    stage.settle()
    stage.bring(1)
    taken = hand(stage, "succeeded")
    assert stage.acquire() is None
    return taken


@pytest.mark.parametrize("state", OWED)
def test_what_is_owed_has_no_end(stage: Stage, state: str) -> None:
    OWED[state](stage)

    assert stage.days_kept() == {None}
    assert kept(stage.redis, stage.now + days(5000)).trim()[1] == 0


def test_what_is_home_ends_after_order_days_with_all_that_names_it(stage: Stage) -> None:
    home(stage)

    assert stage.days_kept() == {400.0}
    # As their end does: nothing else holds the order then, and the list lets it go.
    stage.redis.delete(keys.record(ONE), keys.history(ONE), keys.content(ONE))
    assert kept(stage.redis, stage.now + days(400) + 1).trim()[1] == 1
    assert stage.redis.zcard(keys.ORDERS) == 0


def test_the_hash_of_a_job_ends_with_it_and_of_one_that_was_killed_after_a_day(stage: Stage) -> None:
    """RQ reads both from the job; test_rq_contract.py works one off."""
    stage.settle()
    (job,) = stage.redis.keys("rq:job:*")

    assert stage.redis.hmget(job, "result_ttl", "failure_ttl") == [b"0", b"86400"]
