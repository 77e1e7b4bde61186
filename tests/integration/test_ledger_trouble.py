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

        assert stage.store(stage.fetch(), 1, look_at=stage.now + 120_000) == "again"

        assert (stage.field("digest"), stage.field("done"), stage.field("looks")) == ("1", "0", "1")
        assert stage.due_in() == 120

    def test_looks_are_counted_and_after_the_last_the_order_is_dead(self, stage: Stage) -> None:
        stage.settle()
        waits = []
        while not stage.is_dead():
            fetch = stage.fetch()
            look_at, give_up = policy.of_look(fetch, stage.now)
            stage.store(fetch, 1, look_at=look_at, give_up=give_up)
            if (due := stage.due_in()) is not None:
                waits.append(due / 60)
                stage.later(due)
                assert stage.tick() == 1

        assert waits == [pytest.approx(minutes, rel=0.2) for minutes in policy.LOOKS]
        assert (stage.field("dead"), stage.due_in(), stage.days_kept()) == ("unsettled", None, {None})

    def test_an_event_starts_the_looks_anew(self, stage: Stage) -> None:
        stage.settle()
        stage.store(stage.fetch(), 1, look_at=stage.now + 120_000)

        stage.settle()

        assert stage.fetch().looks == 0


class TestFailing:
    def test_a_failure_burns_a_try_and_waits_for_its_time(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "again", wait=300) == "again"

        assert (stage.field("tries"), stage.due_in(), stage.field("error")) == ("1", 300, "reason_again")

    def test_a_job_left_over_from_before_the_failure_makes_no_getorder(self, stage: Stage) -> None:
        stage.want(queue="backfill")
        stage.settle()
        stage.fail(stage.fetch(), "again", wait=300)

        assert stage.begin("backfill-worker") == "nothing"
        assert stage.due_in() == 300
        stage.later(300)
        assert (stage.tick(), stage.begin()) == (1, "fetch")

    def test_a_parked_order_burns_no_try(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "park", wait=30) == "parked"

        assert (stage.field("tries"), stage.field("parks"), stage.due_in()) == (None, "1", 30)

    def test_the_first_404_is_remembered_until_another_answer_comes(self, stage: Stage) -> None:
        stage.settle()
        first = stage.now
        stage.fail(stage.fetch(), "missing", wait=2)
        stage.later(2)
        stage.tick()
        assert stage.fetch().missing == first

        stage.settle()
        assert stage.fetch().missing == 0

    def test_a_failure_after_a_new_settlement_gives_the_new_one_its_own_fetch(self, stage: Stage) -> None:
        stage.settle()
        first = stage.fetch()
        stage.settle()

        assert stage.fail(first, "dead") == "again"

        assert (stage.is_dead(), stage.begin()) == (False, "fetch")

    def test_a_dead_order_leaves_due_stays_owed_and_has_no_end(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "dead") == "dead"

        assert (stage.due_in(), stage.is_dead(), stage.field("dead")) == (None, True, "reason_dead")
        assert (stage.field("wanted"), stage.field("done"), stage.days_kept()) == ("1", None, {None})
        assert (stage.begin(), stage.tick()) == ("nothing", 0)

    @pytest.mark.parametrize("revive", [Stage.settle, Stage.want], ids=["an event", "a request"])
    def test_a_dead_order_is_revived_by(self, stage: Stage, revive: Callable[[Stage], object]) -> None:
        stage.settle()
        stage.fail(stage.fetch(), "dead")

        revive(stage)

        assert (stage.is_dead(), stage.field("dead"), stage.due_in()) == (False, None, GRACE)
        assert stage.bring_home(1) == "home"

    def test_gone_owes_nothing_until_an_event_ends_it(self, stage: Stage) -> None:
        stage.settle()

        assert stage.fail(stage.fetch(), "gone") == "gone"

        assert (stage.due_in(), stage.field("status"), stage.days_kept()) == (None, "Gone", {400})
        assert stage.settle() == "queued"
        assert (stage.days_kept(), stage.bring_home(1)) == ({None}, "home")

    def test_gone_is_not_undone_by_an_older_answer(self, stage: Stage) -> None:
        stage.settle()
        older = stage.fetch("a")
        stage.settle()
        stage.fail(stage.fetch("b"), "gone", "b")

        assert stage.store(older, 1, "a") == "refused"

        assert stage.field("status") == "Gone"
