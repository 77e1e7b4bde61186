"""What the ledger promises of one order, each a sentence told to the real scripts: its events, counters and crashes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from app.ledger import keys, policy
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.integration.ledger_model.parts import LEASE
from tests.integration.ledger_model.stage import ONE, Stage, staged

GRACE = policy.GRACE / 1000
LEASE_SECONDS = LEASE / 1000
SENT = "2026-11-22T10:00:00.1234567Z"


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client) as opened:
        yield opened


class TestAccepting:
    def test_the_same_event_again_is_a_duplicate_and_owes_nothing_more(self, stage: Stage) -> None:
        assert [stage.hear(SENT), stage.hear(SENT)] == ["queued", "duplicate"]

        assert (stage.field("generation"), stage.field("duplicates"), stage.waiting()) == ("1", "1", 1)

    def test_a_duplicate_of_an_order_at_home_causes_no_fetch(self, stage: Stage) -> None:
        stage.hear(SENT)
        stage.bring(1)

        assert stage.hear(SENT) == "duplicate"

        assert (stage.due_in(), stage.start()) == (None, "nothing")

    def test_an_event_is_remembered_for_dedup_days(self, stage: Stage) -> None:
        stage.hear(SENT)

        (seen,) = stage.redis.keys("ota:seen:*")
        assert stage.redis.pttl(seen) == pytest.approx(7 * policy.DAY, abs=policy.MINUTE)

    def test_an_item_without_timestamp_is_never_a_duplicate_only_coalesced(self, stage: Stage) -> None:
        assert [stage.hear(""), stage.hear("")] == ["queued", "coalesced"]
        assert stage.bring(1) == "fetched"

        assert stage.hear("") == "queued"
        assert stage.start() == "fetch"

    def test_events_that_come_while_a_live_job_waits_share_its_fetch(self, stage: Stage) -> None:
        assert [stage.settle(), stage.settle(), stage.settle()] == ["queued", "coalesced", "coalesced"]

        assert (stage.waiting(), stage.fetch().generation) == (1, 3)

    def test_two_events_of_one_order_in_one_post_make_one_job(self, stage: Stage) -> None:
        assert stage.hear_at_once((ONE, "a"), (ONE, "b"), (ONE, "a")) == (1, 1, 1)

        assert (stage.waiting(), stage.field("generation")) == (1, "2")

    def test_a_refetch_through_live_does_not_wait_behind_a_replay(self, stage: Stage) -> None:
        """What people ask for now goes past what they asked for at leisure."""
        stage.request(queue="backfill")
        stage.request(queue="live")
        stage.request(queue="backfill")

        assert (stage.waiting(LIVE), stage.waiting(BACKFILL)) == (1, 1)

    def test_an_order_that_waits_in_backfill_gets_a_live_job(self, stage: Stage) -> None:
        stage.request(queue="backfill")
        assert (stage.waiting(BACKFILL), stage.waiting(LIVE)) == (1, 0)

        assert stage.settle() == "queued"

        assert (stage.waiting(BACKFILL), stage.waiting(LIVE)) == (1, 1)

    def test_what_is_accepted_stands_in_due_at_once(self, stage: Stage) -> None:
        stage.settle()

        assert stage.due_in() == GRACE

    def test_the_trail_keeps_the_last_200_lines(self, stage: Stage) -> None:
        for number in range(205):
            stage.hear(str(number))

        assert stage.redis.llen(keys.history(ONE)) == 200


class TestCounters:
    def test_a_settlement_accepted_after_a_fetch_began_causes_another_fetch(self, stage: Stage) -> None:
        stage.settle()
        first = stage.fetch()
        stage.settle()

        assert stage.store(first, 1) == "pending"

        assert stage.fetch().generation == 2

    def test_one_settlement_is_fetched_once_however_many_jobs_come(self, stage: Stage) -> None:
        stage.settle()
        assert stage.bring(1) == "fetched"

        assert [stage.start(), stage.start("another")] == ["nothing", "nothing"]

    def test_the_same_settlement_is_held_while_another_worker_fetches_it(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch("a")
        due = stage.due_in()

        assert stage.start("b") == "held"

        assert (stage.due_in(), stage.field("worker")) == (due, "a")

    def test_of_two_fetches_under_way_the_older_is_refused_when_it_finishes_last(self, stage: Stage) -> None:
        stage.settle()
        older = stage.fetch("a")
        stage.settle()
        newer = stage.fetch("b")

        assert stage.store(newer, 2, "b") == "fetched"
        assert stage.store(older, 1, "a") == "refused"

        assert (stage.field("digest"), stage.field("revision")) == ("2", "1")

    def test_of_two_fetches_under_way_the_older_may_store_first(self, stage: Stage) -> None:
        stage.settle()
        older = stage.fetch("a")
        stage.settle()
        newer = stage.fetch("b")

        assert stage.store(older, 1, "a") == "pending"
        assert stage.field("worker") == "b"
        assert stage.store(newer, 2, "b") == "fetched"

        assert (stage.field("digest"), stage.field("revision")) == ("2", "2")

    def test_the_revision_rises_with_new_content_only(self, stage: Stage) -> None:
        seen = []
        for version in (1, 1, 2, 2, 1):
            stage.settle()
            stage.bring(version)
            seen.append(stage.field("revision"))

        assert seen == ["1", "1", "2", "2", "3"]

    def test_the_failure_of_an_older_fetch_does_not_touch_the_newer(self, stage: Stage) -> None:
        stage.settle()
        older = stage.fetch("a")
        stage.settle()
        newer = stage.fetch("b")

        assert stage.fail(older, "dead", "a") == "refused"

        assert (stage.is_dead(), stage.field("worker"), stage.store(newer, 2, "b")) == (False, "b", "fetched")

    def test_an_order_erased_during_its_fetch_leaves_nothing_behind(self, stage: Stage) -> None:
        for what in ("store", "fail"):
            stage.settle()
            fetch = stage.fetch()
            stage.redis.delete(keys.record(ONE), keys.history(ONE), keys.content(ONE))

            assert (stage.store(fetch, 1) if what == "store" else stage.fail(fetch, "retry")) == "refused"

            assert stage.redis.exists(keys.record(ONE), keys.history(ONE), keys.content(ONE)) == 0


class TestCrashes:
    def test_the_third_crash_of_its_fetch_makes_the_order_dead(self, stage: Stage) -> None:
        stage.settle()
        for crash in range(1, 4):
            stage.fetch(f"w{crash}")
            stage.ledger.release_worker(f"w{crash}", "killed")
            assert stage.dispatch() == 1

        assert stage.start() == "dead"

        assert (stage.field("dead"), stage.is_dead(), stage.due_in()) == ("kills_worker", True, None)

    def test_a_crash_is_counted_when_the_lease_ends_too(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch()
        assert stage.due_in() == LEASE_SECONDS
        stage.later(LEASE_SECONDS)
        assert stage.dispatch() == 1

        stage.fetch()

        assert stage.field("crashes") == "1"

    def test_a_fetch_that_ends_otherwise_forgets_the_crashes(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch("a")
        stage.ledger.release_worker("a", "killed")

        stage.fail(stage.fetch("b"), "retry", "b")

        assert stage.field("crashes") is None

    def test_a_new_event_starts_with_no_crashes_and_no_error_of_the_one_before(self, stage: Stage) -> None:
        stage.settle()
        stage.fail(stage.fetch("a"), "retry", "a")
        stage.later(600)
        stage.fetch("b")
        stage.ledger.release_worker("b", "killed")
        stage.dispatch()
        stage.fetch("c")
        assert (stage.field("crashes"), stage.field("error")) != (None, None)

        stage.settle()

        assert [stage.field(name) for name in ("crashes", "error", "http", "tries")] == [None] * 4

    def test_what_an_ended_worker_held_is_due_at_once(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch("a")

        assert stage.ledger.release_worker("a", "killed") == ONE
        assert stage.due_in() == 0
        assert stage.ledger.release_worker("a", "killed") is None

    def test_a_fetch_that_fails_after_an_older_one_has_stored_changes_nothing(self, stage: Stage) -> None:
        stage.settle()
        slow = stage.fetch("slow")
        stage.later(LEASE_SECONDS)
        repeat = stage.fetch("repeat")
        assert stage.store(slow, 1, "slow") == "fetched"

        assert stage.fail(repeat, "dead", "repeat") == "refused"

        assert (stage.is_dead(), stage.due_in(), stage.days_kept()) == (False, None, {400})

    def test_what_another_worker_fetches_by_now_is_not_abandoned(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch("a")
        stage.settle()
        stage.fetch("b")

        assert stage.ledger.release_worker("a", "killed") is None
        assert stage.due_in() == LEASE_SECONDS

    def test_a_worker_taken_for_dead_may_still_bring_its_order_home(self, stage: Stage) -> None:
        stage.settle()
        slow = stage.fetch("slow")
        stage.later(LEASE_SECONDS)
        stage.fail(stage.fetch("b"), "dead", "b")
        assert stage.is_dead()

        assert stage.store(slow, 1, "slow") == "fetched"

        assert (stage.is_dead(), stage.field("dead"), stage.days_kept()) == (False, None, {400})

    def test_what_is_told_late_and_is_no_settled_answer_does_not_revive_a_dead_order(self, stage: Stage) -> None:
        stage.settle()
        for _ in range(policy.CRASHES_ALLOWED):
            slow = stage.fetch()
            stage.later(LEASE_SECONDS)
        assert stage.start("b") == "dead"

        assert stage.fail(slow, "retry") == "refused"
        assert stage.store(slow, 1, recheck=1) == "pending"

        assert (stage.is_dead(), stage.due_in()) == (True, None)
