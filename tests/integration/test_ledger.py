"""The ledger: which events cause a fetch, which answer is stored, what follows a failure, a crash or a lost answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from app.intake.envelope import OrderProcessed
from app.ledger import policy
from app.ledger.history import EventReceived, FetchRequested, FetchStarted, WorkerCrashed
from app.ledger.redis import Redis, client_of
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.ledger.work import Failure
from tests.lab import COALESCED, DUPLICATE, KEYS, LEASE, ONE, QUEUED, SAME_ID, START, VENUE, WORKER, Lab, order

GRACE, LEASE_SECONDS = policy.GRACE / 1000, LEASE / 1000
SENT = "2026-11-22T10:00:00.1234567Z"


def test_two_prefixes_have_no_key_in_common(bare: Lab, redis_url: str) -> None:
    """The same order in two deployments. RQ's list of all queues has those of both, and is of neither alone."""
    bare.accept(ONE)
    ours = bare.dump()
    with client_of(Redis, redis_url, "other") as client:
        other = Lab(client, sinks=(), now=START)
        other.accept(ONE)
        other.later(200)
        assert (other.dispatch(), other.try_start()) == (1, "fetch")
        assert (other.ledger.release_worker(WORKER, "killed"), other.request_fetch(ONE)) == (ONE, 1)

    changed = {name for name, value in bare.dump().items() if ours.get(name) != value}

    assert {name for name in changed if b"other" not in name} == {b"rq:queues"}
    assert ours.keys() <= bare.dump().keys()


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

    def test_two_orders_of_the_same_id_are_each_fetched_for_their_own_settlement(self, bare: Lab) -> None:
        assert [bare.accept(ONE, timestamp=SENT), bare.accept(SAME_ID, timestamp=SENT)] == [QUEUED, QUEUED]

        assert bare.fetch_and_store(ONE, 1) == "fetched"
        assert (bare.field("fetched_generation", SAME_ID), bare.due_in(SAME_ID)) == (None, GRACE)
        bare.fail_fetch("dead", SAME_ID)

        bare.accept(ONE)
        assert (bare.is_dead(ONE), bare.is_dead(SAME_ID)) == (False, True)

    @pytest.mark.parametrize("request_live", [Lab.accept, Lab.request_fetch], ids=["event", "refetch"])
    def test_an_order_in_backfill_gets_one_live_job(self, bare: Lab, request_live: Callable[[Lab], object]) -> None:
        bare.request_fetch(queue="backfill")
        assert (len(bare.queued(BACKFILL)), len(bare.queued(LIVE))) == (1, 0)

        request_live(bare)
        bare.request_fetch(queue="backfill")

        assert (len(bare.queued(BACKFILL)), len(bare.queued(LIVE))) == (1, 1)

    def test_a_request_for_backfill_leaves_in_live_what_is_pending_there(self, bare: Lab) -> None:
        """Live orders that failed wait for their next attempt; a replay must not put them behind the backlog."""
        bare.accept()
        bare.fail_fetch("retry")
        bare.request_fetch(queue="backfill")
        assert (len(bare.queued(BACKFILL)), len(bare.queued(LIVE)), bare.field("queue")) == (0, 2, LIVE)

        bare.fetch_and_store()
        bare.request_fetch(queue="backfill")
        assert (len(bare.queued(BACKFILL)), bare.field("queue")) == (1, BACKFILL), "nothing was pending"


@pytest.mark.parametrize(
    ("step", "follows"),
    [
        (lambda _: None, []),
        (lambda lab: lab.accept(), [EventReceived]),
        (lambda lab: lab.start_fetch(), [FetchStarted]),
        (lambda lab: lab.request_fetch(ONE), [FetchRequested]),
        (lambda lab: (lab.start_fetch(), lab.later(1), lab.accept()), [FetchStarted, EventReceived]),
    ],
    ids=["nothing", "another event", "a fetch", "a request", "both"],
)
def test_the_history_begins_with_the_first_event_whatever_comes_next(
    bare: Lab, step: Callable[[Lab], object], follows: list[type]
) -> None:
    bare.accept()
    ((event_id, _),) = cast("Any", bare.redis.xrange(KEYS.events))

    step(bare)

    first, *rest = bare.history()
    assert isinstance(first, EventReceived)
    assert (first.at_ms, first.event_id) == (START, event_id.decode())
    assert (first.status, first.outcome, first.secret) == ("Issued", "queued", "current")
    assert [type(one) for one in rest] == follows


@pytest.mark.parametrize(("trimmed", "found"), [("after", [EventReceived, FetchStarted]), ("before", [FetchStarted])])
def test_the_history_keeps_the_first_event_if_the_stream_had_it_when_the_next_thing_happened(
    bare: Lab, trimmed: str, found: list[type]
) -> None:
    bare.accept()
    if trimmed == "before":
        bare.redis.xtrim(KEYS.events, 0, approximate=False)

    bare.start_fetch()

    bare.redis.xtrim(KEYS.events, 0, approximate=False)
    assert [type(one) for one in bare.history()] == found


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
        assert bare.due_in() == GRACE
        self.late(bare, "Issued", bare.now - 60_000)

        names = ("last_event_status", "last_event_at", "first_at")
        assert bare.fields(*names) == ["Issued", str(bare.now - 60_000), str(bare.now - 120_000)]

    def test_the_status_of_a_later_fetch_is_kept(self, bare: Lab) -> None:
        """The latest status decides what a 404 means."""
        self.late(bare, "Draft", bare.now)
        bare.later(60)
        bare.fetch_and_store()
        bare.later(60)
        self.late(bare, "Error", bare.now - 90_000)

        assert bare.start_fetch().known_status == "Issued"


@pytest.fixture
def settled(bare: Lab) -> Lab:
    """One order, settled once."""
    bare.accept()
    return bare


class TestUnsettled:
    def test_an_unsettled_answer_is_stored_and_the_order_stays_pending(self, settled: Lab) -> None:
        assert settled.store_fetch(settled.start_fetch(), 1, recheck=120) == "pending"

        assert settled.fields("digest", "fetched_generation", "rechecks") == ["1", "0", "1"]
        assert settled.due_in() == 120

    def test_rechecks_are_counted_and_after_the_last_the_order_is_dead(self, settled: Lab) -> None:
        waits = []
        while not settled.is_dead():
            fetch = settled.start_fetch()
            recheck_ms, give_up = policy.of_unsettled(fetch)
            settled.store_fetch(fetch, 1, recheck=recheck_ms / 1000, give_up=give_up)
            if (due := settled.due_in()) is not None:
                waits.append(due / 60)
                settled.later(due)
                assert settled.dispatch() == 1

        assert waits == [pytest.approx(minutes, rel=0.2) for minutes in policy.RECHECK_WAITS]
        assert (settled.field("dead"), settled.due_in(), settled.days_kept()) == ("unsettled", None, {None})


class TestFailing:
    @pytest.mark.parametrize(("failure", "counts"), [("retry", ["1", None]), ("deferred", [None, "1"])])
    def test_a_deferral_uses_no_attempt(self, settled: Lab, failure: Failure, counts: list[str | None]) -> None:
        assert settled.fail_fetch(failure, wait=300) == failure

        assert (settled.fields("attempts", "deferrals"), settled.due_in()) == (counts, 300)
        assert settled.field("error") == f"reason_{failure}"

    def test_a_job_from_before_the_failure_makes_no_getorder(self, bare: Lab) -> None:
        bare.request_fetch(queue="backfill")
        bare.accept()
        bare.fail_fetch("retry", wait=300)

        assert (bare.try_start(worker="backfill-worker"), bare.due_in()) == ("nothing", 300)

        bare.later(300)
        assert (bare.dispatch(), bare.try_start()) == (1, "fetch")

    def test_the_first_404_is_remembered(self, settled: Lab) -> None:
        settled.fail_fetch("not_found", wait=2)
        settled.later(2)
        settled.dispatch()

        assert settled.start_fetch().missing_ms == 2000

    def test_a_failure_after_a_new_settlement_gives_the_new_one_its_own_fetch(self, settled: Lab) -> None:
        first = settled.start_fetch()
        settled.accept()

        assert settled.fail_fetch("dead", fetch=first) == "retry"

        assert (settled.is_dead(), settled.try_start()) == (False, "fetch")

    def test_the_failure_of_an_older_fetch_does_not_change_the_newer(self, settled: Lab) -> None:
        older = settled.start_fetch(worker="a")
        settled.accept()
        newer = settled.start_fetch(worker="b")

        assert settled.fail_fetch("dead", fetch=older, worker="a") == "refused"

        assert (settled.is_dead(), settled.field("worker")) == (False, "b")
        assert settled.store_fetch(newer, 2, worker="b") == "fetched"

    def test_a_dead_order_is_not_due_and_stays_pending_without_expiry(self, settled: Lab) -> None:
        assert settled.fail_fetch("dead") == "dead"

        assert (settled.due_in(), settled.is_dead(), settled.field("dead")) == (None, True, "reason_dead")
        assert (settled.fields("generation", "fetched_generation"), settled.days_kept()) == (["1", None], {None})
        assert (settled.try_start(), settled.dispatch()) == ("nothing", 0)

    @pytest.mark.parametrize("request_fetch", [Lab.accept, Lab.request_fetch], ids=["event", "request"])
    def test_a_dead_order_is_fetched_again_after(self, settled: Lab, request_fetch: Callable[[Lab], object]) -> None:
        settled.fail_fetch("dead")

        request_fetch(settled)

        assert (settled.is_dead(), settled.field("dead"), settled.due_in()) == (False, None, GRACE)
        assert settled.fetch_and_store() == "fetched"

    def test_a_deleted_order_is_not_pending_until_a_new_event(self, settled: Lab) -> None:
        assert settled.fail_fetch("deleted_upstream") == "deleted_upstream"

        assert (settled.due_in(), settled.field("status"), settled.days_kept()) == (None, "DeletedUpstream", {400})
        assert settled.accept() == QUEUED
        assert (settled.days_kept(), settled.fetch_and_store()) == ({None}, "fetched")


class TestCrashes:
    @pytest.mark.parametrize("older_crash", [False, True])
    def test_the_third_crash_of_one_settlement_is_a_dead_letter(self, settled: Lab, older_crash: bool) -> None:
        if older_crash:
            settled.start_fetch(worker="w0")
            settled.accept()
            settled.ledger.release_worker("w0", "killed")
        for crash in range(1, policy.CRASHES_ALLOWED + 1):
            settled.start_fetch(worker=f"w{crash}")
            released = [settled.ledger.release_worker(f"w{crash}", "killed") for _ in range(2)]
            assert (released, settled.due_in(), settled.dispatch()) == ([ONE, None], 0, 1)

        assert settled.try_start() == "dead"

        assert (settled.field("dead"), settled.is_dead(), settled.due_in()) == ("kills_worker", True, None)
        crashes = [entry.worker for entry in settled.history() if isinstance(entry, WorkerCrashed)]
        assert crashes == [*(["w0"] if older_crash else []), "w1", "w2", "w3"]

    def test_the_end_of_a_lease_counts_as_a_crash(self, settled: Lab) -> None:
        settled.start_fetch()
        assert settled.due_in() == LEASE_SECONDS
        settled.later(LEASE_SECONDS)
        assert settled.dispatch() == 1

        settled.start_fetch()

        assert settled.field("crashes") == "1"
        assert [type(entry) for entry in settled.history()][-2:] == [WorkerCrashed, FetchStarted]

    def test_a_fetch_that_ends_resets_the_crashes(self, settled: Lab) -> None:
        settled.start_fetch(worker="a")
        settled.ledger.release_worker("a", "killed")

        settled.fail_fetch("retry", worker="b")

        assert settled.field("crashes") is None

    def test_a_new_event_resets_all_that_earlier_fetches_left(self, settled: Lab) -> None:
        names = ("rechecks", "attempts", "first_404_at", "error", "crashes")
        settled.store_fetch(settled.start_fetch(worker="a"), 1, worker="a", recheck=120)
        settled.later(120)
        settled.fail_fetch("not_found", worker="b")
        settled.later(600)
        settled.start_fetch(worker="c")
        settled.ledger.release_worker("c", "killed")
        settled.dispatch()
        settled.start_fetch(worker="d")
        assert None not in settled.fields(*names)

        settled.accept()

        assert settled.fields(*names, "http") == [None] * 6

    def test_a_worker_that_ends_by_itself_releases_its_fetch_without_a_crash(self, settled: Lab) -> None:
        """It lost Redis for too long, or a stop cut it off: no fault of the order."""
        for number in range(policy.CRASHES_ALLOWED + 1):
            settled.start_fetch(worker=f"w{number}")
            assert settled.ledger.release_worker(f"w{number}", "ended") == ONE
            assert (settled.due_in(), settled.dispatch()) == (0, 1)

        assert settled.fetch_and_store() == "fetched"
        assert WorkerCrashed not in {type(entry) for entry in settled.history()}

    def test_an_order_that_another_worker_fetches_now_is_not_released(self, settled: Lab) -> None:
        settled.start_fetch(worker="a")
        settled.accept()
        settled.start_fetch(worker="b")

        assert settled.ledger.release_worker("a", "killed") is None
        assert settled.due_in() == LEASE_SECONDS

    def test_a_settled_answer_after_the_end_of_its_lease_ends_a_dead_letter(self, settled: Lab) -> None:
        slow = settled.start_fetch(worker="slow")
        settled.later(LEASE_SECONDS)
        settled.fail_fetch("dead", worker="b")
        assert settled.is_dead()

        assert settled.store_fetch(slow, 1, worker="slow") == "fetched"

        assert (settled.is_dead(), settled.field("dead"), settled.days_kept()) == (False, None, {400})

    def test_a_failure_or_an_unsettled_answer_after_the_end_of_its_lease_does_not(self, settled: Lab) -> None:
        for _ in range(policy.CRASHES_ALLOWED):
            slow = settled.start_fetch()
            settled.later(LEASE_SECONDS)
        assert settled.try_start(worker="b") == "dead"

        assert settled.fail_fetch("retry", fetch=slow) == "refused"
        assert settled.store_fetch(slow, 1, recheck=1) == "pending"

        assert (settled.is_dead(), settled.due_in()) == (True, None)


class TestRepeatedCalls:
    """A worker repeats a call whose answer was lost with the connection: the second call changes nothing."""

    def everything(self, bare: Lab) -> tuple[object, ...]:
        """Return all that is stored of the order."""
        return bare.record(), bare.history(), bare.due_in(), bare.is_dead(), bare.days_kept()

    def test_a_repeated_start_is_the_same_fetch_and_no_crash(self, settled: Lab) -> None:
        settled.start_fetch(worker="a")

        again = settled.start_fetch(worker="a")

        assert settled.fields("crashes", "fencing_token") == [None, str(again.token)]
        assert settled.store_fetch(again, 1, worker="a") == "fetched"

    @pytest.mark.parametrize(
        ("recheck", "give_up", "outcome"),
        [(None, "", "fetched"), (120, "", "pending"), (1, "unsettled", "dead")],
    )
    def test_a_repeated_store_returns_the_same_and_changes_nothing(
        self, settled: Lab, recheck: float | None, give_up: str, outcome: str
    ) -> None:
        fetch = settled.start_fetch()
        assert settled.store_fetch(fetch, 1, recheck=recheck, give_up=give_up) == outcome
        before = self.everything(settled)

        assert settled.store_fetch(fetch, 1, recheck=recheck, give_up=give_up) == outcome

        assert self.everything(settled) == before

    def test_a_store_repeated_after_the_next_fetch_failed_keeps_its_attempts(self, settled: Lab) -> None:
        fetch = settled.start_fetch(worker="a")
        settled.store_fetch(fetch, 1, worker="a")
        settled.accept()
        settled.fail_fetch("retry", worker="b")

        settled.store_fetch(fetch, 1, worker="a")

        assert settled.field("attempts") == "1"

    @pytest.mark.parametrize(
        ("failure", "outcome"),
        [
            *((one, "retry") for one in ("retry", "client_error", "not_found")),
            *((one, one) for one in ("deferred", "dead", "deleted_upstream")),
        ],
    )
    def test_a_repeated_failure_is_counted_once(self, settled: Lab, failure: Failure, outcome: str) -> None:
        fetch = settled.start_fetch()
        assert settled.fail_fetch(failure, fetch=fetch) == outcome
        before = self.everything(settled)

        assert settled.fail_fetch(failure, fetch=fetch) == outcome

        assert self.everything(settled) == before

    def test_the_failure_of_a_worker_taken_for_dead_is_counted_too(self, settled: Lab) -> None:
        fetch = settled.start_fetch(worker="slow")
        settled.ledger.release_worker("slow", "killed")

        assert settled.fail_fetch("retry", fetch=fetch, worker="slow") == "retry"

        assert settled.field("attempts") == "1"


@pytest.mark.parametrize("command", [("dead", "requeue", "--yes"), ("dead", "drop", "--yes"), ("orders", "refetch")])
def test_what_a_person_has_resolved_no_answer_of_another_order_requeues(lab: Lab, command: tuple[str, ...]) -> None:
    """It would take one of the two places that each answer has for the dead letters of an outage."""
    lab.accept(order(1), order(2))
    for one in (order(1), order(2)):
        lab.fail_fetch("dead", one, reason=policy.NO_ORDER_ANSWERED, unanswered=True)

    assert lab.run_command(*command, order(1).order_id).code == 0

    left: Any = lab.redis.zrange(KEYS.prefix + "unanswered:" + VENUE, 0, -1)
    assert left == [order(2).member.encode()]
