"""`orders explain`: one page about an order, and an exit code that says whether it is complete."""

from __future__ import annotations

import re

import pytest

from app import bootstrap
from app.ids import OrderKey
from app.ledger import keys
from app.ledger.ledger import Ledger
from app.ledger.work import Failure
from tests.command import Ended
from tests.lab import MUSEUM, SINK, WORKER, Lab, order

SECRETS = ("TK-000123456", "CP-0009981", "141234529930210327", "Jane Doe", "guest@example.com", "PAY-987654")


def explain(lab: Lab, one: OrderKey | str, *options: str, **env: str) -> Ended:
    ended = lab.run_command("orders", "explain", one if isinstance(one, str) else one.order_id, *options, **env)
    if "--json" not in options:
        assert max(map(len, ended.out.splitlines()), default=0) <= 80
    return ended


def flat(ended: Ended) -> str:
    return re.sub(r"\s+", " ", ended.out)


def fetch(lab: Lab, one: OrderKey) -> None:
    lab.accept(one)
    lab.fetch_and_store(one)


def deliver(lab: Lab, one: OrderKey) -> None:
    found = lab.ledger.acquire_delivery(one, WORKER)
    assert found is not None
    lab.ledger.complete_delivery(one, WORKER, found, outcome="succeeded", duration_ms=7)


def test_a_fetched_and_delivered_order_is_complete(lab: Lab) -> None:
    fetch(lab, order(1))
    deliver(lab, order(1))

    page, line = explain(lab, order(1)), explain(lab, order(1), "--json")

    assert (page.code, line.code) == (0, 0)
    for text in (
        "COMPLETE: fetched, Issued",
        "2 wallets, 2 tickets, 1 coupon, a manifest; revision 1",
        "(HTTP 200 in 42 ms)",
        "(secret current)",
        "event: fetched after",
    ):
        assert text in page.out
    assert [secret for secret in SECRETS if secret in page.out + line.out] == []
    (found,) = line.objects
    assert [step["what"] for step in found["steps"]] == ["event", "started", "stored", "delivery"]
    assert (found["complete"], found["outstanding"]) == (True, [])
    assert 0 <= found["durations"]["fetched_ms"] <= found["durations"]["delivered_ms"] < 60_000
    for name in ("CM-260601081502-9F3A", "partner-order-2026-00042", "cm-00000000"):
        assert explain(lab, name).code == 0


def test_without_its_delivery_an_order_is_not_complete(lab: Lab) -> None:
    fetch(lab, order(1))

    ended = explain(lab, order(1))

    assert ended.code == 1
    assert "NOT COMPLETE: fetched, Issued" in ended.out
    assert f"{SINK}: revision 1 not delivered yet" in ended.out
    assert "next attempt" in ended.out
    assert "next      Nothing: delivery is attempted at " in ended.out
    assert "tickets are here" not in ended.out


def test_the_advice_for_a_sink_without_a_planned_delivery_works(lab: Lab) -> None:
    """A sink that was added to the settings after the order was complete."""
    fetch(lab, order(1))
    deliver(lab, order(1))
    assert lab.ledger.acquire_delivery(order(1), WORKER) is None
    sinks = {"SINKS": f"{SINK},python:json:loads"}
    replay = ("events", "replay", "--order", order(1).order_id, "--to-sinks")

    ended, advised = explain(lab, order(1), **sinks), lab.run_command(*replay, "--yes", "--dry-run", **sinks)

    assert ended.code == 1
    assert "pending python:json:loads: revision 1 not delivered yet next No attempt is planned." in flat(ended)
    assert f"ota-receiver {' '.join(replay)}" in flat(ended)
    assert advised.code == 0, advised.err


def test_an_unknown_status_is_left_out(lab: Lab) -> None:
    lab.redis.hset(keys.record(order(1)), mapping={"generation": 1})

    assert "NOT COMPLETE: pending\n" in explain(lab, order(1)).out


def test_each_attempt_is_shown_with_its_answer_and_the_reason_to_wait(lab: Lab) -> None:
    lab.accept(order(1))
    now = bootstrap.clock()
    ledger = Ledger(lab.redis, order_days=400, fetch_lease=60_000, sinks=(SINK,), clock=lambda: now)
    failures: tuple[tuple[Failure, str, int | None, int], ...] = (
        ("retry", "http_503", 503, 84),
        ("deferred", "breaker_open", None, 0),
        ("deferred", "breaker_open", None, 0),
    )
    for outcome, reason, http, ms in failures:
        _, started = ledger.start_fetch(order(1), WORKER)
        assert started is not None
        ledger.fail_fetch(
            order(1), WORKER, started, outcome=outcome, reason=reason, http_status=http, duration_ms=ms, wait_ms=60_000
        )
        now += 60_000

    ended = explain(lab, order(1))

    assert ended.code == 1
    for text in (
        "NOT COMPLETE: deferred",
        "fetch 1 failed: http_503 (HTTP 503 in 84 ms), will retry",
        "fetch 3 failed: breaker_open, deferred, does not count as an attempt; 2 times until",
        "fetch deferred: upstream unavailable (breaker_open); next attempt",
        "ota-receiver check",
    ):
        assert text in flat(ended)


def test_duplicates_are_one_line(lab: Lab) -> None:
    for _ in range(40):
        lab.accept(order(1), timestamp="2026-06-01T08:15:02Z")

    ended = explain(lab, order(1))

    assert "39 times until" in flat(ended)
    assert len(ended.out.splitlines()) < 14


def test_a_dead_letter_has_a_reason_and_an_advice(lab: Lab) -> None:
    lab.accept(order(1))
    lab.dead_letter(order(1), "order_missing", 404)

    ended = explain(lab, order(1))

    assert (ended.code, "the fetch is a dead letter: order_missing" in ended.out) == (1, True)
    assert f"dead requeue {order(1).order_id}" in flat(ended)


def test_a_running_fetch_is_shown_with_its_worker(lab: Lab) -> None:
    lab.accept(order(1))
    lab.start_fetch(order(1))

    ended = explain(lab, order(1))

    assert (ended.code, "fetching" in ended.out, WORKER in ended.out) == (1, True, True)


@pytest.mark.parametrize("text", ["4711", "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"])
def test_an_unknown_order_is_explained_with_commands_that_search_further(lab: Lab, text: str) -> None:
    page, line = explain(lab, text), explain(lab, text, "--json")

    assert (page.code, page.out, line.code) == (1, "", 1)
    assert text in page.err
    assert "\n  ota-receiver reconcile --from-zero --apply\n" in page.err
    assert max(map(len, page.err.splitlines())) <= 80
    assert (line.objects[0]["state"], line.objects[0]["complete"]) == ("unknown", False)


def test_of_two_orders_with_one_reference_the_company_must_be_given(lab: Lab) -> None:
    for one in (order(1), order(1, MUSEUM)):
        fetch(lab, one)
        deliver(lab, one)

    assert explain(lab, "CM-260601081502-9F3A").code == 2
    assert explain(lab, "CM-260601081502-9F3A", "--company", "museum").code == 0


def test_a_cut_history_says_so(lab: Lab) -> None:
    for number in range(210):
        lab.accept(order(1), timestamp=f"2026-06-01T08:15:02.{number:03}Z")

    ended = explain(lab, order(1))

    assert "older ones are gone" in ended.out
    assert len(ended.out.splitlines()) < 20


def test_a_replay_is_shown_beside_the_duration_of_the_event(lab: Lab) -> None:
    lab.accept(order(1), at=bootstrap.clock() - 23000)
    lab.fetch_and_store(order(1))
    lab.run_command("events", "replay", "--since", "1h", "--force", "--rate", "5000", "--yes")
    lab.fetch_and_store(order(1))

    page, (found,) = explain(lab, order(1)), explain(lab, order(1), "--json").objects

    assert re.search(r"took +event: fetched after 2\d s\n +replay:\w{6}: fetched after", page.out)
    assert found["durations"]["fetched_ms"] >= 23_000
    assert found["durations"]["requested"]["fetched_ms"] < 20_000
