"""Events and counters of the ledger: which events cause a fetch, and which answer is stored. See also test_inbox.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.intake.envelope import OrderProcessed
from app.ledger import keys, policy
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.integration.ledger_scenario import LEASE, ONE, SAME_ID, Scenario

GRACE = policy.GRACE / 1000
SENT = "2026-11-22T10:00:00.1234567Z"


class TestAccepting:
    def test_a_duplicate_of_a_fetched_order_causes_no_fetch(self, scenario: Scenario) -> None:
        scenario.accept(SENT)
        scenario.fetch_and_store(1)

        assert scenario.accept(SENT) == "duplicate"

        assert (scenario.due_in(), scenario.start()) == (None, "nothing")

    def test_an_event_without_timestamp_is_never_a_duplicate_only_coalesced(self, scenario: Scenario) -> None:
        assert [scenario.accept(""), scenario.accept("")] == ["queued", "coalesced"]
        assert scenario.fetch_and_store(1) == "fetched"

        assert scenario.accept("") == "queued"
        assert scenario.start() == "fetch"

    @pytest.mark.parametrize("request_live", [Scenario.settle, Scenario.request], ids=["event", "refetch"])
    def test_an_order_that_waits_in_backfill_gets_one_live_job(
        self, scenario: Scenario, request_live: Callable[[Scenario], object]
    ) -> None:
        scenario.request(queue="backfill")
        assert (scenario.waiting(BACKFILL), scenario.waiting(LIVE)) == (1, 0)

        request_live(scenario)
        scenario.request(queue="backfill")

        assert (scenario.waiting(BACKFILL), scenario.waiting(LIVE)) == (1, 1)

    def test_a_request_for_backfill_leaves_in_live_what_is_pending_there(self, scenario: Scenario) -> None:
        """Live orders that failed wait for their next attempt; a replay must not put them behind the backlog."""
        scenario.settle()
        scenario.fail(scenario.fetch(), "retry")
        scenario.request(queue="backfill")
        assert (scenario.waiting(BACKFILL), scenario.waiting(LIVE), scenario.field("queue")) == (0, 2, LIVE)

        scenario.fetch_and_store(1)
        scenario.request(queue="backfill")
        assert (scenario.waiting(BACKFILL), scenario.field("queue")) == (1, BACKFILL), "nothing was pending"

    def test_the_history_keeps_the_last_200_entries(self, scenario: Scenario) -> None:
        for number in range(205):
            scenario.accept(str(number))

        assert scenario.redis.llen(keys.history(ONE)) == 200


class TestLateEvents:
    """An event that waited in a spool is recorded late: it does not replace what a newer event wrote."""

    def late(self, scenario: Scenario, status: str, received: int) -> None:
        scenario.accept_batch(
            OrderProcessed(*ONE, status, f"CM-{status}", "", "current", f"request-{status}", received)
        )

    def test_it_is_fetched_and_does_not_replace_a_newer_event(self, scenario: Scenario) -> None:
        self.late(scenario, "Issued", scenario.now)
        self.late(scenario, "Error", scenario.now - 60_000)

        names = ("last_event_status", "reference", "request_id", "last_event_at", "generation")
        assert scenario.fields(*names) == ["Issued", "CM-Issued", "request-Issued", str(scenario.now), "2"]

    def test_it_replaces_an_older_event(self, scenario: Scenario) -> None:
        self.late(scenario, "Error", scenario.now - 120_000)
        self.late(scenario, "Issued", scenario.now - 60_000)

        assert scenario.fields("last_event_status", "last_event_at") == ["Issued", str(scenario.now - 60_000)]

    def test_a_new_order_is_dated_by_when_its_event_was_received(self, scenario: Scenario) -> None:
        self.late(scenario, "Issued", scenario.now - 60_000)

        assert scenario.fields("first_at", "last_event_at") == [str(scenario.now - 60_000)] * 2
        assert scenario.due_in() == GRACE

    def test_the_status_of_a_later_fetch_is_kept(self, scenario: Scenario) -> None:
        """The latest status decides what a 404 means."""
        self.late(scenario, "Draft", scenario.now)
        scenario.later(60)
        scenario.fetch_and_store(1)
        scenario.later(60)
        self.late(scenario, "Error", scenario.now - 90_000)

        assert scenario.fetch().known_status == "Issued"


class TestCounters:
    def test_a_settlement_accepted_after_a_fetch_started_causes_another_fetch(self, scenario: Scenario) -> None:
        scenario.settle()
        first = scenario.fetch()
        scenario.settle()

        assert scenario.store(first, 1) == "pending"

        assert scenario.fetch().generation == 2

    def test_one_settlement_is_fetched_once_however_many_jobs_run(self, scenario: Scenario) -> None:
        scenario.settle()
        assert scenario.fetch_and_store(1) == "fetched"

        assert [scenario.start(), scenario.start("another")] == ["nothing", "nothing"]

    def test_a_settlement_is_not_fetched_by_two_workers_at_once(self, scenario: Scenario) -> None:
        scenario.settle()
        scenario.fetch("a")
        due = scenario.due_in()

        assert scenario.start("b") == "held"

        assert (scenario.due_in(), scenario.field("worker")) == (due, "a")

    @pytest.mark.parametrize("first", ["older", "newer"])
    def test_of_two_running_fetches_the_older_is_stored_only_if_it_ends_first(
        self, scenario: Scenario, first: str
    ) -> None:
        scenario.settle()
        older = scenario.fetch("a")
        scenario.settle()
        newer = scenario.fetch("b")

        if first == "older":
            assert scenario.store(older, 1, "a") == "pending"
            assert scenario.field("worker") == "b"
            assert scenario.store(newer, 2, "b") == "fetched"
        else:
            assert scenario.store(newer, 2, "b") == "fetched"
            assert scenario.store(older, 1, "a") == "refused"

        assert scenario.fields("digest", "revision") == ["2", "2" if first == "older" else "1"]

    def test_the_revision_rises_with_new_content_only(self, scenario: Scenario) -> None:
        revisions = []
        for version in (1, 1, 2, 2, 1):
            scenario.settle()
            scenario.fetch_and_store(version)
            revisions.append(scenario.field("revision"))

        assert revisions == ["1", "1", "2", "2", "3"]

    @pytest.mark.parametrize("end", ["store", "fail"])
    def test_a_fetch_of_an_erased_order_writes_nothing(self, scenario: Scenario, end: str) -> None:
        scenario.settle()
        fetch = scenario.fetch()
        scenario.redis.delete(keys.record(ONE), keys.history(ONE), keys.content(ONE))

        assert (scenario.store(fetch, 1) if end == "store" else scenario.fail(fetch, "retry")) == "refused"

        assert scenario.redis.exists(keys.record(ONE), keys.history(ONE), keys.content(ONE)) == 0


class TestTwoCompanies:
    """Two companies may have an order of the same orderId: nothing of one changes the other."""

    def test_each_is_fetched_for_its_own_settlement(self, scenario: Scenario) -> None:
        assert [scenario.accept(SENT, ONE), scenario.accept(SENT, SAME_ID)] == ["queued", "queued"]

        assert scenario.fetch_and_store(1, order=ONE) == "fetched"

        assert (scenario.field("fetched_generation", SAME_ID), scenario.due_in(SAME_ID)) == (None, GRACE)
        assert scenario.fetch_and_store(7, order=SAME_ID) == "fetched"
        assert (scenario.field("digest", ONE), scenario.field("digest", SAME_ID)) == ("1", "7")

    def test_each_has_its_own_dead_letter(self, scenario: Scenario) -> None:
        for order in (ONE, SAME_ID):
            scenario.settle(order)
            scenario.fail(scenario.fetch(order=order), "dead", order=order)

        scenario.settle(ONE)

        assert (scenario.is_dead(ONE), scenario.is_dead(SAME_ID)) == (False, True)

    def test_each_has_its_own_worker(self, scenario: Scenario) -> None:
        for worker, order in (("a", ONE), ("b", SAME_ID)):
            scenario.settle(order)
            scenario.fetch(worker, order)

        assert scenario.ledger.release_worker("b", "killed") == SAME_ID

        assert (scenario.due_in(ONE), scenario.due_in(SAME_ID)) == (LEASE / 1000, 0)
