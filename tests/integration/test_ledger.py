"""Events and counters of the ledger: which events cause a fetch, and which answer is stored. See also test_inbox.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.intake.envelope import OrderProcessed
from app.ledger import keys, policy
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.lab import COALESCED, DUPLICATE, LEASE, ONE, QUEUED, SAME_ID, Lab

GRACE = policy.GRACE / 1000
SENT = "2026-11-22T10:00:00.1234567Z"


class TestAccepting:
    def test_a_duplicate_of_a_fetched_order_causes_no_fetch(self, bare: Lab) -> None:
        bare.accept(timestamp=SENT)
        bare.fetch_and_store()

        assert bare.accept(timestamp=SENT) == DUPLICATE

        assert (bare.due_in(), bare.try_start()) == (None, "nothing")

    def test_an_event_without_timestamp_is_never_a_duplicate_only_coalesced(self, bare: Lab) -> None:
        assert [bare.accept(timestamp=""), bare.accept(timestamp="")] == [QUEUED, COALESCED]
        assert bare.fetch_and_store() == "fetched"

        assert bare.accept(timestamp="") == QUEUED
        assert bare.try_start() == "fetch"

    @pytest.mark.parametrize("request_live", [Lab.accept, Lab.request_fetch], ids=["event", "refetch"])
    def test_an_order_that_waits_in_backfill_gets_one_live_job(
        self, bare: Lab, request_live: Callable[[Lab], object]
    ) -> None:
        bare.request_fetch(queue="backfill")
        assert (len(bare.queued(BACKFILL)), len(bare.queued(LIVE))) == (1, 0)

        request_live(bare)
        bare.request_fetch(queue="backfill")

        assert (len(bare.queued(BACKFILL)), len(bare.queued(LIVE))) == (1, 1)

    def test_the_history_keeps_the_last_200_entries(self, bare: Lab) -> None:
        for number in range(205):
            bare.accept(timestamp=str(number))

        assert bare.redis.llen(keys.history(ONE)) == 200


class TestLateEvents:
    """An event that waited in a spool is recorded late: it does not replace what a newer event wrote."""

    def late(self, bare: Lab, status: str, received: int) -> None:
        bare.accept_events(OrderProcessed(*ONE, status, f"CM-{status}", "", "current", f"request-{status}", received))

    def test_it_is_fetched_and_does_not_replace_a_newer_event(self, bare: Lab) -> None:
        self.late(bare, "Issued", bare.now)
        self.late(bare, "Error", bare.now - 60_000)

        names = ("last_event_status", "reference", "request_id", "last_event_at", "generation")
        assert bare.fields(*names) == ["Issued", "CM-Issued", "request-Issued", str(bare.now), "2"]

    def test_it_replaces_an_older_event(self, bare: Lab) -> None:
        self.late(bare, "Error", bare.now - 120_000)
        self.late(bare, "Issued", bare.now - 60_000)

        assert bare.fields("last_event_status", "last_event_at") == ["Issued", str(bare.now - 60_000)]

    def test_a_new_order_is_dated_by_when_its_event_was_received(self, bare: Lab) -> None:
        self.late(bare, "Issued", bare.now - 60_000)

        assert bare.fields("first_at", "last_event_at") == [str(bare.now - 60_000)] * 2
        assert bare.due_in() == GRACE

    def test_the_status_of_a_later_fetch_is_kept(self, bare: Lab) -> None:
        """The latest status decides what a 404 means."""
        self.late(bare, "Draft", bare.now)
        bare.later(60)
        bare.fetch_and_store()
        bare.later(60)
        self.late(bare, "Error", bare.now - 90_000)

        assert bare.start_fetch().known_status == "Issued"


class TestCounters:
    def test_a_settlement_accepted_after_a_fetch_started_causes_another_fetch(self, bare: Lab) -> None:
        bare.accept()
        first = bare.start_fetch()
        bare.accept()

        assert bare.store_fetch(first, 1) == "pending"

        assert bare.start_fetch().generation == 2

    def test_one_settlement_is_fetched_once_however_many_jobs_run(self, bare: Lab) -> None:
        bare.accept()
        assert bare.fetch_and_store() == "fetched"

        assert [bare.try_start(), bare.try_start(worker="another")] == ["nothing", "nothing"]

    def test_a_settlement_is_not_fetched_by_two_workers_at_once(self, bare: Lab) -> None:
        bare.accept()
        bare.start_fetch(worker="a")
        due = bare.due_in()

        assert bare.try_start(worker="b") == "held"

        assert (bare.due_in(), bare.field("worker")) == (due, "a")

    @pytest.mark.parametrize("first", ["older", "newer"])
    def test_of_two_running_fetches_the_older_is_stored_only_if_it_ends_first(self, bare: Lab, first: str) -> None:
        bare.accept()
        older = bare.start_fetch(worker="a")
        bare.accept()
        newer = bare.start_fetch(worker="b")

        if first == "older":
            assert bare.store_fetch(older, 1, worker="a") == "pending"
            assert bare.field("worker") == "b"
            assert bare.store_fetch(newer, 2, worker="b") == "fetched"
        else:
            assert bare.store_fetch(newer, 2, worker="b") == "fetched"
            assert bare.store_fetch(older, 1, worker="a") == "refused"

        assert bare.fields("digest", "revision") == ["2", "2" if first == "older" else "1"]

    def test_the_revision_rises_with_new_content_only(self, bare: Lab) -> None:
        revisions = []
        for version in (1, 1, 2, 2, 1):
            bare.accept()
            bare.fetch_and_store(answer=version)
            revisions.append(bare.field("revision"))

        assert revisions == ["1", "1", "2", "2", "3"]

    @pytest.mark.parametrize("end", ["store", "fail"])
    def test_a_fetch_of_an_erased_order_writes_nothing(self, bare: Lab, end: str) -> None:
        bare.accept()
        fetch = bare.start_fetch()
        bare.redis.delete(keys.record(ONE), keys.history(ONE), keys.content(ONE))

        assert (bare.store_fetch(fetch, 1) if end == "store" else bare.fail_fetch("retry", fetch=fetch)) == "refused"

        assert bare.redis.exists(keys.record(ONE), keys.history(ONE), keys.content(ONE)) == 0


class TestTwoCompanies:
    """Two companies may have an order of the same orderId: nothing of one changes the other."""

    def test_each_is_fetched_for_its_own_settlement(self, bare: Lab) -> None:
        assert [bare.accept(ONE, timestamp=SENT), bare.accept(SAME_ID, timestamp=SENT)] == [QUEUED, QUEUED]

        assert bare.fetch_and_store(ONE, 1) == "fetched"

        assert (bare.field("fetched_generation", SAME_ID), bare.due_in(SAME_ID)) == (None, GRACE)
        assert bare.fetch_and_store(SAME_ID, 7) == "fetched"
        assert (bare.field("digest", ONE), bare.field("digest", SAME_ID)) == ("1", "7")

    def test_each_has_its_own_dead_letter(self, bare: Lab) -> None:
        for order in (ONE, SAME_ID):
            bare.accept(order)
            bare.fail_fetch("dead", order)

        bare.accept(ONE)

        assert (bare.is_dead(ONE), bare.is_dead(SAME_ID)) == (False, True)

    def test_each_has_its_own_worker(self, bare: Lab) -> None:
        for worker, order in (("a", ONE), ("b", SAME_ID)):
            bare.accept(order)
            bare.start_fetch(order, worker=worker)

        assert bare.ledger.release_worker("b", "killed") == SAME_ID

        assert (bare.due_in(ONE), bare.due_in(SAME_ID)) == (LEASE / 1000, 0)
