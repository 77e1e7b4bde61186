"""The table "What upstream's answers mean": from an HTTP answer to the next state of the order and its key."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from app.errors import Unavailable, UnreadableAnswer, UpstreamError
from app.ledger import policy
from app.ledger.policy import DAY, MINUTE, SECOND
from app.ledger.work import Fetch, Released
from app.upstream.client import refusal

CLOSED = Released(5 * MINUTE, opened=False, answered_at=0)
"""The breaker is open."""
OTHERS_ANSWERED = Released(0, opened=False, answered_at=2)
"""A call began after the first failure of a fetch, and was answered well."""
NONE_ANSWERED = Released(0, opened=False, answered_at=1)


def fetch(*, known: str = "Issued", **counts: int) -> Fetch:
    """Return a fetch with the counts given, others 0, of an order that has failed before."""
    none = dict.fromkeys(("attempts", "rechecks", "deferrals", "client_errors", "missing_ms", "failing_ms"), 0)
    counts = none | {"failing_since": 1} | counts
    return Fetch(generation=1, token=1, known_status=known, queue="live", permit=None, **counts)


def answer(status: int, code: str = "", **headers: str) -> UpstreamError:
    """Return the error that an answer with this status and error body becomes."""
    body = json.dumps({"code": code, "message": "canary"}).encode() if code else b"<html>"
    return refusal(status, httpx.Headers(headers), body)


def spread(seconds: float) -> object:
    """Return what equals every wait (ms) of so many seconds, ±20 %."""
    return pytest.approx(seconds * SECOND, rel=0.2)


def test_a_404_with_its_code_means_not_yet_while_the_grace_lasts() -> None:
    """The event is sent on commit, so an order appears within seconds, not hours. Other failures do not shorten it."""
    error = answer(404, "resource_not_found")
    waits = []
    for attempts, seconds in enumerate((0, 10, 60, 119.9)):
        decision = policy.of_order(error, fetch(attempts=attempts, missing_ms=round(seconds * SECOND)), OTHERS_ANSWERED)
        assert (decision.outcome, decision.reason) == ("not_found", "order_not_found")
        waits.append(decision.wait_ms)

    assert waits == [spread(seconds) for seconds in policy.NOT_FOUND_WAITS[:4]]
    assert policy.of_key(error, policy.NOT_FOUND_GRACE - 1) == "missing"
    late = fetch(attempts=50, missing_ms=policy.NOT_FOUND_GRACE - 1)
    assert policy.of_order(error, late, OTHERS_ANSWERED).outcome == "not_found"


@pytest.mark.parametrize("known", ["Draft", "Error", "Issued", "Cancelled", "Submitted", "", "Unknown"])
def test_after_the_grace_a_404_is_final(known: str) -> None:
    """Only a Draft or Error order can be deleted (upstream.md 1); any other becomes a dead letter."""
    late = fetch(missing_ms=policy.NOT_FOUND_GRACE, known=known)
    decision = policy.of_order(answer(404, "resource_not_found"), late, OTHERS_ANSWERED)

    deleted = known in {"Draft", "Error"}
    assert decision.outcome == ("deleted_upstream" if deleted else "dead")
    assert decision.reason == ("order_not_found" if deleted else "order_missing")
    assert not decision.unanswered
    assert policy.of_key(answer(404, "resource_not_found"), policy.NOT_FOUND_GRACE) == "failed"


@pytest.mark.parametrize("known", ["Draft", "Issued"])
@pytest.mark.parametrize("released", [NONE_ANSWERED, CLOSED], ids=["none answered", "breaker open"])
def test_a_404_is_not_final_while_no_other_order_is_answered(known: str, released: Released) -> None:
    """Perhaps every order gets it: then a Draft is not deleted either."""
    late = fetch(missing_ms=policy.NOT_FOUND_GRACE, failing_ms=policy.NOT_FOUND_GRACE, known=known)

    assert policy.of_order(answer(404, "resource_not_found"), late, released).outcome == "uncounted"


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "", "unauthorized"),
        (403, "generic_error", "forbidden"),
        (404, "", "not_found"),
        (404, "generic_error", "not_found"),
        (404, "saas_tenant_not_found", "tenant_not_found"),
        (400, "saas_environment_not_found", "environment_not_found"),
        (404, "saas_company_not_found", "company_not_found"),
        (301, "", "redirected"),
        (302, "", "redirected"),
        (307, "", "redirected"),
    ],
)
def test_a_connection_fault_is_named_by_its_cause(status: int, code: str, reason: str) -> None:
    error = answer(status, code)

    assert (policy.of_key(error), policy.of_order(error, fetch(), NONE_ANSWERED).reason) == ("failed", reason)


ANY_FAILURE = pytest.mark.parametrize(
    "error",
    [
        answer(400, "generic_error"),
        answer(401),
        answer(403, "generic_error"),
        answer(404),
        answer(302),
        answer(503),
        UnreadableAnswer("unreadable_answer", http_status=200),
        Unavailable("timeout"),
    ],
    ids=lambda error: error.reason,
)
"""Any of them may be the fault of one order, or an outage that speaks so."""


@ANY_FAILURE
@pytest.mark.parametrize("counts", [{}, {"attempts": 1000, "client_errors": 1000, "failing_ms": 1000 * DAY}])
def test_while_the_breaker_is_open_no_failure_counts(error: UpstreamError, counts: Any) -> None:
    """The order waits longer than the others, so that the probe is made for another one."""
    decision = policy.of_order(error, fetch(**counts), CLOSED)

    assert (decision.outcome, decision.reason) == ("uncounted", error.reason)
    assert decision.wait_ms > CLOSED.closed_ms + policy.LONGEST_DEFERRAL * 0.79


@ANY_FAILURE
def test_a_failure_counts_only_if_another_order_was_answered_since_the_first(error: UpstreamError) -> None:
    first = fetch(failing_since=0)
    long_ago = fetch(failing_ms=12 * policy.MINUTE)

    assert policy.of_order(error, first, OTHERS_ANSWERED).outcome == "uncounted"
    assert policy.of_order(error, long_ago, NONE_ANSWERED).outcome == "uncounted"
    assert policy.of_order(error, long_ago, OTHERS_ANSWERED).outcome in {"retry", "client_error"}


@ANY_FAILURE
def test_an_order_that_fails_while_no_other_is_answered_ends_after_a_day(error: UpstreamError) -> None:
    """Its waits double up to half an hour. Then somebody must look, and it is requeued when upstream answers."""
    waits = [policy.of_order(error, fetch(failing_ms=ms), NONE_ANSWERED).wait_ms for ms in (0, 5000, 600_000, DAY)]
    last = policy.of_order(error, fetch(failing_ms=policy.UNCOUNTED_FOR), NONE_ANSWERED)

    assert waits == [spread(seconds) for seconds in (5, 5, 600, 1800)]
    assert (last.outcome, last.reason, last.unanswered) == ("dead", "no_order_answered", True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answer(400, "generic_error"), "bad_request"),
        (answer(400), "bad_request"),
        (answer(422), "http_422"),
        (answer(401), "unauthorized"),
        (answer(403), "forbidden"),
        (answer(404), "not_found"),
        (answer(302), "redirected"),
        (UnreadableAnswer("unreadable_answer", http_status=200), "unreadable_answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_refused_or_unreadable_order_gets_four_more_attempts(error: UpstreamError, reason: str) -> None:
    """A 400 is also any unhandled error of upstream (upstream.md 5); earlier failures of other kinds do not count."""
    decisions = [
        policy.of_order(error, fetch(client_errors=errors, attempts=9), OTHERS_ANSWERED)
        for errors in range(policy.CLIENT_ERROR_ATTEMPTS)
    ]

    assert [one.outcome for one in decisions] == ["client_error"] * (policy.CLIENT_ERROR_ATTEMPTS - 1) + ["dead"]
    assert [one.wait_ms for one in decisions] == [*(spread(seconds) for seconds in policy.RETRY_WAITS[1:4]), 0]
    assert {(one.reason, one.unanswered) for one in decisions} == {(reason, False)}
    assert policy.of_key(error) == "failed"


@pytest.mark.parametrize(
    "error",
    [answer(408), answer(500), answer(502), answer(503), answer(504), Unavailable("timeout"), Unavailable("network")],
    ids=lambda error: error.reason,
)
def test_an_outage_is_retried_for_a_day(error: UpstreamError) -> None:
    decisions = [
        policy.of_order(error, fetch(attempts=attempts), OTHERS_ANSWERED) for attempts in range(len(policy.RETRY_WAITS))
    ]

    *retries, last = decisions
    assert {one.outcome for one in retries} == {"retry"}
    assert (last.outcome, last.reason) == ("dead", error.reason)
    assert [one.wait_ms for one in retries] == [spread(seconds) for seconds in policy.RETRY_WAITS[1:]]
    assert 25 * 3600 < sum(policy.RETRY_WAITS) < 27 * 3600
    assert policy.of_key(error) == "failed"


@pytest.mark.parametrize("released", [OTHERS_ANSWERED, NONE_ANSWERED], ids=["others answered", "none answered"])
def test_no_retry_comes_before_a_retry_after(released: Released) -> None:
    assert policy.of_order(answer(503, **{"retry-after": "900"}), fetch(), released).wait_ms == 900 * SECOND


def test_a_throttled_order_uses_no_attempt_however_often() -> None:
    error = answer(429, **{"retry-after": "30"})
    closed_ms = 30 * SECOND
    decision = policy.of_order(error, fetch(attempts=1000), Released(closed_ms, opened=False, answered_at=2))

    assert error.retry_after == 30
    assert (decision.outcome, decision.reason) == ("deferred", "throttled")
    assert decision.wait_ms > closed_ms
    assert policy.of_key(error) == "unknown"


def test_orders_that_failed_together_are_retried_at_different_times() -> None:
    waits = {policy.of_order(answer(503), fetch(attempts=3), OTHERS_ANSWERED).wait_ms for _ in range(50)}

    assert len(waits) > 10


def test_an_unsettled_order_is_rechecked_four_times_and_then_dead() -> None:
    """The last recheck comes after upstream has ended orders that were stuck in Processing for an hour."""
    *rechecks, (_, give_up) = [policy.of_unsettled(fetch(rechecks=number)) for number in range(5)]

    assert rechecks == [(spread(minutes * 60), "") for minutes in (2, 10, 30, 75)]
    assert give_up == "unsettled"


def test_a_decision_contains_no_text_of_upstream() -> None:
    errors = [answer(status, "canary_code") for status in range(300, 600)]

    assert not [error for error in errors if "canary" in repr(policy.of_order(error, fetch(), OTHERS_ANSWERED))]
