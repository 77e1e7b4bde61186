"""What becomes of an order that upstream does not answer for, or not yet: each test is a sentence about one order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from app.ledger import policy
from tests.integration.ledger_model.stage import Stage, staged

GRACE = policy.GRACE / 1000


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client) as opened:
        yield opened


class TestUnsettled:
    def test_an_unsettled_answer_is_stored_and_the_order_stays_owed(self, stage: Stage) -> None:
        stage.settle()

        assert stage.store(stage.fetch(), 1, recheck=120) == "pending"

        assert (stage.field("digest"), stage.field("fetched_generation"), stage.field("rechecks")) == ("1", "0", "1")
        assert stage.due_in() == 120

    def test_looks_are_counted_and_after_the_last_the_order_is_dead(self, stage: Stage) -> None:
        stage.settle()
        waits = []
        while not stage.is_dead():
            fetch = stage.fetch()
            recheck_ms, give_up = policy.of_unsettled(fetch)
            stage.store(fetch, 1, recheck=recheck_ms / 1000, give_up=give_up)
            if (due := stage.due_in()) is not None:
                waits.append(due / 60)
                stage.later(due)
                assert stage.dispatch() == 1

        assert waits == [pytest.approx(minutes, rel=0.2) for minutes in policy.RECHECK_WAITS]
        assert (stage.field("dead"), stage.due_in(), stage.days_kept()) == ("unsettled", None, {None})

    def test_an_event_starts_the_looks_anew(self, stage: Stage) -> None:
        stage.settle()
        stage.store(stage.fetch(), 1, recheck=120)

        stage.settle()

        assert stage.fetch().rechecks == 0


class TestFailing:
    def test_a_failure_burns_a_try_and_waits_for_its_time(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "retry", wait=300) == "retry"

        assert (stage.field("attempts"), stage.due_in(), stage.field("error")) == ("1", 300, "reason_retry")

    def test_a_job_left_over_from_before_the_failure_makes_no_getorder(self, stage: Stage) -> None:
        stage.request(queue="backfill")
        stage.settle()
        stage.fail(stage.fetch(), "retry", wait=300)

        assert stage.start("backfill-worker") == "nothing"
        assert stage.due_in() == 300
        stage.later(300)
        assert (stage.dispatch(), stage.start()) == (1, "fetch")

    def test_a_parked_order_burns_no_try(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "deferred", wait=30) == "deferred"

        assert (stage.field("attempts"), stage.field("deferrals"), stage.due_in()) == (None, "1", 30)

    def test_the_first_404_is_remembered_until_another_answer_comes(self, stage: Stage) -> None:
        stage.settle()
        stage.fail(stage.fetch(), "not_found", wait=2)
        stage.later(2)
        stage.dispatch()
        assert stage.fetch().missing_ms == 2000

        stage.settle()
        assert stage.fetch().missing_ms == 0

    def test_a_failure_after_a_new_settlement_gives_the_new_one_its_own_fetch(self, stage: Stage) -> None:
        stage.settle()
        first = stage.fetch()
        stage.settle()

        assert stage.fail(first, "dead") == "retry"

        assert (stage.is_dead(), stage.start()) == (False, "fetch")

    def test_a_dead_order_leaves_due_stays_owed_and_has_no_end(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "dead") == "dead"

        assert (stage.due_in(), stage.is_dead(), stage.field("dead")) == (None, True, "reason_dead")
        assert (stage.field("generation"), stage.field("fetched_generation"), stage.days_kept()) == ("1", None, {None})
        assert (stage.start(), stage.dispatch()) == ("nothing", 0)

    @pytest.mark.parametrize("revive", [Stage.settle, Stage.request], ids=["an event", "a request"])
    def test_a_dead_order_is_revived_by(self, stage: Stage, revive: Callable[[Stage], object]) -> None:
        stage.settle()
        stage.fail(stage.fetch(), "dead")

        revive(stage)

        assert (stage.is_dead(), stage.field("dead"), stage.due_in()) == (False, None, GRACE)
        assert stage.bring(1) == "fetched"

    def test_gone_owes_nothing_until_an_event_ends_it(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "deleted_upstream") == "deleted_upstream"

        assert (stage.due_in(), stage.field("status"), stage.days_kept()) == (None, "DeletedUpstream", {400})
        assert stage.settle() == "queued"
        assert (stage.days_kept(), stage.bring(1)) == ({None}, "fetched")

    def test_gone_is_not_undone_by_an_older_answer(self, stage: Stage) -> None:
        stage.settle()
        older = stage.fetch("a")
        stage.settle()
        stage.fail(stage.fetch("b"), "deleted_upstream", "b")

        assert stage.store(older, 1, "a") == "refused"

        assert stage.field("status") == "DeletedUpstream"
