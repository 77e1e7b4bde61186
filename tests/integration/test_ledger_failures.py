"""What becomes of an order when a fetch fails, its worker dies, or the answer of a script is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.ledger import keys, policy
from app.ledger.work import Failure
from tests.integration.ledger_scenario import LEASE, ONE, Scenario

GRACE = policy.GRACE / 1000
LEASE_SECONDS = LEASE / 1000


@pytest.fixture
def settled(scenario: Scenario) -> Scenario:
    """One order, settled once."""
    scenario.settle()
    return scenario


class TestUnsettled:
    def test_an_unsettled_answer_is_stored_and_the_order_stays_pending(self, settled: Scenario) -> None:
        assert settled.store(settled.fetch(), 1, recheck=120) == "pending"

        assert settled.fields("digest", "fetched_generation", "rechecks") == ["1", "0", "1"]
        assert settled.due_in() == 120

    def test_rechecks_are_counted_and_after_the_last_the_order_is_dead(self, settled: Scenario) -> None:
        waits = []
        while not settled.is_dead():
            fetch = settled.fetch()
            recheck_ms, give_up = policy.of_unsettled(fetch)
            settled.store(fetch, 1, recheck=recheck_ms / 1000, give_up=give_up)
            if (due := settled.due_in()) is not None:
                waits.append(due / 60)
                settled.later(due)
                assert settled.dispatch() == 1

        assert waits == [pytest.approx(minutes, rel=0.2) for minutes in policy.RECHECK_WAITS]
        assert (settled.field("dead"), settled.due_in(), settled.days_kept()) == ("unsettled", None, {None})


class TestFailing:
    def test_a_failure_uses_an_attempt_and_waits_for_its_time(self, settled: Scenario) -> None:
        assert settled.fail(settled.fetch(), "retry", wait=300) == "retry"

        assert (settled.fields("attempts", "error"), settled.due_in()) == (["1", "reason_retry"], 300)

    def test_a_job_from_before_the_failure_makes_no_getorder(self, scenario: Scenario) -> None:
        scenario.request(queue="backfill")
        scenario.settle()
        scenario.fail(scenario.fetch(), "retry", wait=300)

        assert (scenario.start("backfill-worker"), scenario.due_in()) == ("nothing", 300)

        scenario.later(300)
        assert (scenario.dispatch(), scenario.start()) == (1, "fetch")

    def test_a_deferred_order_uses_no_attempt(self, settled: Scenario) -> None:
        assert settled.fail(settled.fetch(), "deferred", wait=30) == "deferred"

        assert (settled.fields("attempts", "deferrals"), settled.due_in()) == ([None, "1"], 30)

    def test_the_first_404_is_remembered(self, settled: Scenario) -> None:
        settled.fail(settled.fetch(), "not_found", wait=2)
        settled.later(2)
        settled.dispatch()

        assert settled.fetch().missing_ms == 2000

    def test_a_failure_after_a_new_settlement_gives_the_new_one_its_own_fetch(self, settled: Scenario) -> None:
        first = settled.fetch()
        settled.settle()

        assert settled.fail(first, "dead") == "retry"

        assert (settled.is_dead(), settled.start()) == (False, "fetch")

    def test_the_failure_of_an_older_fetch_does_not_change_the_newer(self, settled: Scenario) -> None:
        older = settled.fetch("a")
        settled.settle()
        newer = settled.fetch("b")

        assert settled.fail(older, "dead", "a") == "refused"

        assert (settled.is_dead(), settled.field("worker"), settled.store(newer, 2, "b")) == (False, "b", "fetched")

    def test_a_failure_after_an_older_fetch_was_stored_changes_nothing(self, settled: Scenario) -> None:
        slow = settled.fetch("slow")
        settled.later(LEASE_SECONDS)
        repeated = settled.fetch("repeated")
        assert settled.store(slow, 1, "slow") == "fetched"

        assert settled.fail(repeated, "dead", "repeated") == "refused"

        assert (settled.is_dead(), settled.due_in(), settled.days_kept()) == (False, None, {400})

    def test_a_dead_order_is_not_due_and_stays_pending_without_expiry(self, settled: Scenario) -> None:
        assert settled.fail(settled.fetch(), "dead") == "dead"

        assert (settled.due_in(), settled.is_dead(), settled.field("dead")) == (None, True, "reason_dead")
        assert (settled.fields("generation", "fetched_generation"), settled.days_kept()) == (["1", None], {None})
        assert (settled.start(), settled.dispatch()) == ("nothing", 0)

    @pytest.mark.parametrize("revive", [Scenario.settle, Scenario.request], ids=["event", "request"])
    def test_a_dead_order_is_fetched_again_after(self, settled: Scenario, revive: Callable[[Scenario], object]) -> None:
        settled.fail(settled.fetch(), "dead")

        revive(settled)

        assert (settled.is_dead(), settled.field("dead"), settled.due_in()) == (False, None, GRACE)
        assert settled.fetch_and_store(1) == "fetched"

    def test_a_deleted_order_is_not_pending_until_a_new_event(self, settled: Scenario) -> None:
        assert settled.fail(settled.fetch(), "deleted_upstream") == "deleted_upstream"

        assert (settled.due_in(), settled.field("status"), settled.days_kept()) == (None, "DeletedUpstream", {400})
        assert settled.settle() == "queued"
        assert (settled.days_kept(), settled.fetch_and_store(1)) == ({None}, "fetched")

    def test_an_older_answer_does_not_replace_a_deletion(self, settled: Scenario) -> None:
        older = settled.fetch("a")
        settled.settle()
        settled.fail(settled.fetch("b"), "deleted_upstream", "b")

        assert settled.store(older, 1, "a") == "refused"

        assert settled.field("status") == "DeletedUpstream"


class TestCrashes:
    def test_a_killed_workers_fetch_is_due_at_once(self, settled: Scenario) -> None:
        settled.fetch("a")

        assert settled.ledger.release_worker("a", "killed") == ONE
        assert settled.due_in() == 0
        assert settled.ledger.release_worker("a", "killed") is None

    @pytest.mark.parametrize("crash_of_older_settlement", [False, True])
    def test_the_third_crash_of_one_settlements_fetches_makes_the_order_dead(
        self, settled: Scenario, crash_of_older_settlement: bool
    ) -> None:
        if crash_of_older_settlement:
            settled.fetch("w0")
            settled.settle()
            settled.ledger.release_worker("w0", "killed")
        for crash in range(1, policy.CRASHES_ALLOWED + 1):
            settled.fetch(f"w{crash}")
            settled.ledger.release_worker(f"w{crash}", "killed")
            assert settled.dispatch() == 1

        assert settled.start() == "dead"

        assert (settled.field("dead"), settled.is_dead(), settled.due_in()) == ("kills_worker", True, None)

    def test_an_event_during_the_last_crash_gives_the_order_new_attempts(self, settled: Scenario) -> None:
        for number in range(policy.CRASHES_ALLOWED):
            settled.fetch(f"w{number}")
            if number == policy.CRASHES_ALLOWED - 1:
                settled.settle()
            settled.ledger.release_worker(f"w{number}", "killed")

        assert (settled.fetch("new").generation, settled.field("crashes")) == (2, None)

    def test_the_end_of_a_lease_counts_as_a_crash(self, settled: Scenario) -> None:
        settled.fetch()
        assert settled.due_in() == LEASE_SECONDS
        settled.later(LEASE_SECONDS)
        assert settled.dispatch() == 1

        settled.fetch()

        assert settled.field("crashes") == "1"

    def test_a_fetch_that_ends_resets_the_crashes(self, settled: Scenario) -> None:
        settled.fetch("a")
        settled.ledger.release_worker("a", "killed")

        settled.fail(settled.fetch("b"), "retry", "b")

        assert settled.field("crashes") is None

    def test_a_new_event_resets_all_that_earlier_fetches_left(self, settled: Scenario) -> None:
        names = ("rechecks", "attempts", "first_404_at", "error", "crashes")
        settled.store(settled.fetch("a"), 1, "a", recheck=120)
        settled.later(120)
        settled.fail(settled.fetch("b"), "not_found", "b")
        settled.later(600)
        settled.fetch("c")
        settled.ledger.release_worker("c", "killed")
        settled.dispatch()
        settled.fetch("d")
        assert None not in settled.fields(*names)

        settled.settle()

        assert settled.fields(*names, "http") == [None] * 6

    def test_a_worker_that_ends_by_itself_releases_its_fetch_without_a_crash(self, settled: Scenario) -> None:
        """It lost Redis for too long, or a stop cut it off: no fault of the order."""
        for number in range(policy.CRASHES_ALLOWED + 1):
            settled.fetch(f"w{number}")
            assert settled.ledger.release_worker(f"w{number}", "ended") == ONE
            assert (settled.due_in(), settled.dispatch()) == (0, 1)

        assert settled.fetch_and_store(1) == "fetched"

    def test_an_order_that_another_worker_fetches_now_is_not_released(self, settled: Scenario) -> None:
        settled.fetch("a")
        settled.settle()
        settled.fetch("b")

        assert settled.ledger.release_worker("a", "killed") is None
        assert settled.due_in() == LEASE_SECONDS

    def test_a_settled_answer_after_the_end_of_its_lease_ends_a_dead_letter(self, settled: Scenario) -> None:
        slow = settled.fetch("slow")
        settled.later(LEASE_SECONDS)
        settled.fail(settled.fetch("b"), "dead", "b")
        assert settled.is_dead()

        assert settled.store(slow, 1, "slow") == "fetched"

        assert (settled.is_dead(), settled.field("dead"), settled.days_kept()) == (False, None, {400})

    def test_a_failure_or_an_unsettled_answer_after_the_end_of_its_lease_does_not(self, settled: Scenario) -> None:
        for _ in range(policy.CRASHES_ALLOWED):
            slow = settled.fetch()
            settled.later(LEASE_SECONDS)
        assert settled.start("b") == "dead"

        assert settled.fail(slow, "retry") == "refused"
        assert settled.store(slow, 1, recheck=1) == "pending"

        assert (settled.is_dead(), settled.due_in()) == (True, None)


class TestRepeatedCalls:
    """A worker repeats a call whose answer was lost with the connection: the second call changes nothing."""

    def everything(self, scenario: Scenario) -> tuple[object, ...]:
        """Return all that is stored of the order."""
        history = scenario.redis.lrange(keys.history(ONE), 0, -1)
        record = scenario.redis.hgetall(keys.record(ONE))
        return (record, history, scenario.due_in(), scenario.is_dead(), scenario.days_kept())

    def test_a_repeated_start_is_the_same_fetch_and_no_crash(self, settled: Scenario) -> None:
        settled.fetch("a")

        again = settled.fetch("a")

        assert settled.fields("crashes", "fencing_token") == [None, str(again.token)]
        assert settled.store(again, 1, "a") == "fetched"

    @pytest.mark.parametrize(
        ("recheck", "give_up", "outcome"),
        [(None, "", "fetched"), (120, "", "pending"), (1, "unsettled", "dead")],
    )
    def test_a_repeated_store_returns_the_same_and_changes_nothing(
        self, settled: Scenario, recheck: float | None, give_up: str, outcome: str
    ) -> None:
        fetch = settled.fetch()
        assert settled.store(fetch, 1, recheck=recheck, give_up=give_up) == outcome
        before = self.everything(settled)

        assert settled.store(fetch, 1, recheck=recheck, give_up=give_up) == outcome

        assert self.everything(settled) == before

    def test_a_repeated_store_returns_again_that_a_delivery_is_due(self, shop: Scenario) -> None:
        shop.settle()
        fetch = shop.fetch()

        assert [shop.store(fetch, 2), shop.store(fetch, 2)] == ["deliver", "deliver"]

    def test_a_store_repeated_after_the_next_fetch_failed_keeps_its_attempts(self, settled: Scenario) -> None:
        fetch = settled.fetch("a")
        settled.store(fetch, 1, "a")
        settled.settle()
        settled.fail(settled.fetch("b"), "retry", "b")

        settled.store(fetch, 1, "a")

        assert settled.field("attempts") == "1"

    @pytest.mark.parametrize(
        ("failure", "outcome"),
        [
            ("retry", "retry"),
            ("client_error", "retry"),
            ("not_found", "retry"),
            ("deferred", "deferred"),
            ("dead", "dead"),
            ("deleted_upstream", "deleted_upstream"),
        ],
    )
    def test_a_repeated_failure_is_counted_once(self, settled: Scenario, failure: Failure, outcome: str) -> None:
        fetch = settled.fetch()
        assert settled.fail(fetch, failure) == outcome
        before = self.everything(settled)

        assert settled.fail(fetch, failure) == outcome

        assert self.everything(settled) == before

    def test_the_failure_of_a_worker_taken_for_dead_is_counted_too(self, settled: Scenario) -> None:
        fetch = settled.fetch("slow")
        settled.ledger.release_worker("slow", "killed")

        assert settled.fail(fetch, "retry", "slow") == "retry"

        assert settled.field("attempts") == "1"
