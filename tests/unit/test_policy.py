"""The table "What upstream's answers mean": from an HTTP answer to the next state of the order and its key."""

from __future__ import annotations

import json

import httpx
import pytest

from app.errors import Unavailable, UnreadableAnswer, UpstreamError
from app.ledger import policy
from app.ledger.policy import MINUTE, SECOND
from app.ledger.work import Fetch
from app.upstream.client import refusal


def fetch(*, known: str = "Issued", **counts: int) -> Fetch:
    """Return a fetch with the counts given, others 0."""
    none = dict.fromkeys(("attempts", "rechecks", "deferrals", "client_errors", "missing_ms"), 0)
    return Fetch(generation=1, token=1, known_status=known, request_id="request", queue="live", **(none | counts))


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
        decision = policy.of_order(error, fetch(attempts=attempts, missing_ms=round(seconds * SECOND)), 0)
        assert (decision.outcome, decision.reason) == ("not_found", "order_not_found")
        waits.append(decision.wait_ms)

    assert waits == [spread(seconds) for seconds in policy.NOT_FOUND_WAITS[:4]]
    assert policy.of_key(error) == "answered"
    late = fetch(attempts=50, missing_ms=policy.NOT_FOUND_GRACE - 1)
    assert policy.of_order(error, late, 0).outcome == "not_found"


@pytest.mark.parametrize("known", ["Draft", "Error", "Issued", "Cancelled", "Submitted", "", "Unknown"])
def test_after_the_grace_a_404_is_final(known: str) -> None:
    """Only a Draft or Error order can be deleted (upstream.md 1); any other becomes a dead letter."""
    late = fetch(missing_ms=policy.NOT_FOUND_GRACE, known=known)
    decision = policy.of_order(answer(404, "resource_not_found"), late, 0)

    deleted = known in {"Draft", "Error"}
    assert decision.outcome == ("deleted_upstream" if deleted else "dead")
    assert decision.reason == ("order_not_found" if deleted else "order_missing")


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
@pytest.mark.parametrize("attempts", [0, 21, 1000])
def test_a_connection_fault_defers_the_order(status: int, code: str, reason: str, attempts: int) -> None:
    """The breaker opens; the order is deferred without using an attempt, however long it lasts."""
    error = answer(status, code)
    closed_ms = 5 * MINUTE
    decision = policy.of_order(error, fetch(attempts=attempts), closed_ms)

    assert policy.of_key(error) == "fault"
    assert (decision.outcome, decision.reason) == ("deferred", reason)
    assert decision.wait_ms > closed_ms


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answer(400, "generic_error"), "bad_request"),
        (answer(400), "bad_request"),
        (answer(422), "http_422"),
        (UnreadableAnswer("unreadable_answer", http_status=200), "unreadable_answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_400_or_an_unreadable_answer_gets_four_more_attempts(error: UpstreamError, reason: str) -> None:
    """A 400 is also any unhandled error of upstream (upstream.md 5); earlier failures of other kinds do not count."""
    decisions = [
        policy.of_order(error, fetch(client_errors=errors, attempts=9), 0)
        for errors in range(policy.CLIENT_ERROR_ATTEMPTS + 1)
    ]

    assert [one.outcome for one in decisions] == ["client_error"] * policy.CLIENT_ERROR_ATTEMPTS + ["dead"]
    assert {one.reason for one in decisions} == {reason}
    assert policy.of_key(error) == "answered"


@pytest.mark.parametrize(
    "error",
    [answer(408), answer(500), answer(502), answer(503), answer(504), Unavailable("timeout"), Unavailable("network")],
    ids=lambda error: error.reason,
)
def test_an_outage_is_retried_for_a_day(error: UpstreamError) -> None:
    decisions = [policy.of_order(error, fetch(attempts=attempts), 0) for attempts in range(len(policy.RETRY_WAITS) + 1)]

    *retries, last = decisions
    assert {one.outcome for one in retries} == {"retry"}
    assert (last.outcome, last.reason) == ("dead", error.reason)
    assert [one.wait_ms for one in retries] == [spread(seconds) for seconds in policy.RETRY_WAITS]
    assert 25 * 3600 < sum(policy.RETRY_WAITS) < 27 * 3600
    assert policy.of_key(error) == "failed"


def test_no_retry_comes_before_the_breaker_closes() -> None:
    closed_ms = 5 * MINUTE

    assert policy.of_order(answer(503), fetch(), closed_ms).wait_ms == closed_ms


def test_a_throttled_order_uses_no_attempt_however_often() -> None:
    error = answer(429, **{"retry-after": "30"})
    closed_ms = 30 * SECOND
    decision = policy.of_order(error, fetch(attempts=1000), closed_ms)

    assert error.retry_after == 30
    assert (decision.outcome, decision.reason) == ("deferred", "throttled")
    assert decision.wait_ms > closed_ms
    assert policy.of_key(error) == "answered"


def test_orders_that_failed_together_are_retried_at_different_times() -> None:
    waits = {policy.of_order(answer(503), fetch(attempts=3), 0).wait_ms for _ in range(50)}

    assert len(waits) > 10


def test_an_unsettled_order_is_rechecked_four_times_and_then_dead() -> None:
    """The last recheck comes after upstream has ended orders that were stuck in Processing for an hour."""
    *rechecks, (_, give_up) = [policy.of_unsettled(fetch(rechecks=number)) for number in range(5)]

    assert rechecks == [(spread(minutes * 60), "") for minutes in (2, 10, 30, 75)]
    assert give_up == "unsettled"


def test_a_decision_contains_no_text_of_upstream() -> None:
    errors = [answer(status, "canary_code") for status in range(300, 600)]

    assert not [error for error in errors if "canary" in repr(policy.of_order(error, fetch(), 0))]
