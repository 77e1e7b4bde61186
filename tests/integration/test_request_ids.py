"""One request_id is on every line of an order: that of the POST with its latest event."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from app.deployment import Deployment
from app.dev.sandbox.process import Sandbox
from app.heartbeat import DeclaredCompany
from app.ids import OrderKey, traceparent
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.replay import Plans
from app.upstream.client import Fetched
from tests.lab import KEYS, LEASE, ONE, Lab, event_of, order
from tests.lab_upstream import Shop, WorkerLab, worker_lab
from workers.processor import Processor

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
OTHER_TRACE = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"


def given(trace: str) -> str:
    return f"00-{trace}-00f067aa0ba902b7-01"


class FailsOnce:
    def __init__(self) -> None:
        self._calls = count(1)

    def __call__(self, order_id: str) -> None:
        if next(self._calls) == 1:
            raise ValueError


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox) -> Iterator[WorkerLab]:
    with worker_lab(redis_url, sandbox, {"shop": Shop(FailsOnce())}) as one:
        yield one


def announce(lab: Lab, order: OrderKey, request_id: str, trace: str = "") -> None:
    """Accept an event of the order as a POST with this id brings it."""
    lab.accept_events(replace(event_of(order), request_id=request_id, traceparent=given(trace) if trace else ""))


def issued(lab: WorkerLab, request_id: str, trace: str = "") -> OrderKey:
    """Issue an order whose only event came with this id."""
    (made,) = lab.sandbox.admin("POST", "orders", {"count": 1, "events": 0})["orders"]
    key = OrderKey(lab.company_id, made["order_id"])
    announce(lab, key, request_id, trace)
    return key


def logged(steps: Callable[[], object]) -> list[dict[str, Any]]:
    """Return the lines of some steps, which begin with no id of an earlier one."""
    with capture_logs(processors=(merge_contextvars,)) as lines:
        contextvars.Context().run(steps)
    return [dict(line) for line in lines]


def ids(lines: list[dict[str, Any]]) -> dict[str, set[object]]:
    """Return event -> request ids of its lines."""
    return {line["event"]: {one.get("request_id") for one in lines if one["event"] == line["event"]} for line in lines}


def test_from_a_failed_fetch_to_a_repeated_delivery_each_line_has_the_id_and_the_trace_of_the_post(
    lab: WorkerLab,
) -> None:
    key = issued(lab, "post-1", TRACE)
    lab.fault(kind="status", status=503, calls=1)

    lines = logged(lambda: lab.run_for(7200))

    path = ["fetch.deferred", "order.fetched", "delivery.failed", "delivery.succeeded"]
    assert [line["event"] for line in lines if line["event"] in path] == path
    assert {line["order_id"] for line in lines} == {key.order_id}
    assert {line.get("request_id") for line in lines} == {"post-1"}
    assert {line.get("trace_id") for line in lines} == {TRACE}


def test_a_later_event_replaces_id_and_trace_also_by_one_without_a_trace(lab: WorkerLab) -> None:
    key = issued(lab, "post-1", TRACE)
    lab.work()
    announce(lab, key, "post-2", OTHER_TRACE)
    second = logged(lab.work)
    announce(lab, key, "post-3")
    third = logged(lab.work)

    assert {(line["request_id"], line["trace_id"]) for line in second} == {("post-2", OTHER_TRACE)}
    assert {(line["request_id"], line.get("trace_id")) for line in third} == {("post-3", None)}


def test_an_event_that_comes_during_a_fetch_gives_its_id_to_the_delivery_and_the_next_fetch(lab: WorkerLab) -> None:
    key = issued(lab, "post-1", TRACE)
    get_order = lab.connection.client.get_order

    def overtaken(order_id: str) -> Fetched:
        lab.connection.client.get_order = get_order  # type: ignore[method-assign]
        announce(lab, key, "post-2")
        return get_order(order_id)

    lab.connection.client.get_order = overtaken  # type: ignore[method-assign]

    lines = logged(lab.work)

    found = [(line["event"], line["request_id"], line.get("trace_id")) for line in lines]
    assert found == [
        ("order.fetched", "post-1", TRACE),
        ("order.fetched", "post-2", None),
        ("delivery.failed", "post-2", None),
    ]


def test_another_worker_that_recovers_the_order_of_a_killed_one_logs_the_same_id(lab: WorkerLab) -> None:
    key = issued(lab, "post-1")
    lab.start_fetch(key, "killed")
    held = logged(lab.work)
    lab.ledger.release_worker("killed", "killed")

    lines = logged(lambda: lab.run_for(3600))

    assert ids(held) == {"fetch.skipped": {"post-1"}}
    assert ids(lines)["order.fetched"] == ids(lines)["delivery.succeeded"] == {"post-1"}
    assert {line["request_id"] for line in lines} == {"post-1"}


def test_orders_that_have_nothing_to_do_or_that_kill_workers_are_logged_with_their_id(lab: WorkerLab) -> None:
    key = issued(lab, "post-1")
    for number in range(policy.CRASHES_ALLOWED):
        lab.start_fetch(key, f"w{number}")
        lab.later(LEASE / 1000 + 1)

    dead = logged(lambda: lab.processor.process(key, "w"))
    nothing = logged(lambda: lab.processor.process(key, "w"))

    assert ids(dead) == {"order.dead_lettered": {"post-1"}}
    assert ids(nothing) == {"fetch.skipped": {"post-1"}}


def test_a_job_for_another_pool_goes_back_with_the_id_of_its_order(lab: WorkerLab) -> None:
    key = issued(lab, "post-1", TRACE)
    lab.now = None
    lab.declare(companies={key.company_id: DeclaredCompany("venue", "/path", "breaker")}, sinks=("shop",))
    ledger = Ledger(lab.redis, order_days=400, fetch_lease=LEASE, clock=lab.clock)
    other = Processor(ledger, Deployment(lab.redis), {}, lab.erasure)

    lines = logged(lambda: other.process(key, "w"))

    assert ids(lines)["job.returned"] == {"post-1"}
    assert {line["trace_id"] for line in lines} == {TRACE}


def test_a_requeued_order_is_logged_with_its_own_id_and_not_with_that_of_the_answered_one(lab: WorkerLab) -> None:
    issued(lab, "lost")
    lab.fault(kind="status", status=500)
    lab.run_for(policy.UNCOUNTED_FOR / 1000 + 3600)
    lab.clear_faults()
    issued(lab, "answered")

    lines = logged(lambda: lab.run_for(10))

    assert ids(lines)["order.requeued"] == {"lost"}
    assert ids(lines)["order.fetched"] == {"lost", "answered"}


def test_a_request_by_hand_keeps_the_id_of_an_order_and_gives_one_to_an_order_without(shop: Lab) -> None:
    announce(shop, ONE, "post-1", TRACE)
    shop.request_fetch(ONE, order(2), order(3))

    assert shop.field("request_id") == "post-1"
    first, second = (shop.field("request_id", order(number)) for number in (2, 3))
    assert first == second
    assert re.fullmatch("[0-9a-f]{16}", first or "")
    announce(shop, order(2), "post-2")
    assert shop.field("request_id", order(2)) == "post-2"


def test_a_replay_gives_its_id_to_an_order_without_one(shop: Lab) -> None:
    announce(shop, ONE, "post-1")
    announce(shop, order(2), "post-2")
    shop.redis.delete(KEYS.record(ONE))
    plans = Plans(shop.redis, event_days=90, clock=shop.clock)
    members = ((one.member, None) for one in (ONE, order(2)))
    plan = plans.file(members, rate=100, sinks=(), selected="", who="ann@host", why="")
    shop.later(1)

    assert plans.feed(plan).state == "done"
    assert (shop.field("request_id"), shop.field("request_id", order(2))) == (plan.id, "post-2")


def test_an_event_that_waited_in_the_spool_behind_a_later_one_changes_no_id(shop: Lab) -> None:
    announce(shop, ONE, "post-2", TRACE)
    shop.accept_events(replace(event_of(ONE), request_id="post-1", received=shop.now - 1000))

    assert shop.fields("request_id", "traceparent") == ["post-2", given(TRACE)]


def test_while_a_job_waits_the_record_has_the_traces_of_the_last_eight_events_that_it_serves(shop: Lab) -> None:
    traces = [f"{number:032x}" for number in range(1, 12)]
    for number, trace in enumerate(traces):
        announce(shop, ONE, f"post-{number}", trace)
    latest = shop.ledger.start_fetch(ONE, "w").origin
    announce(shop, ONE, "during-the-fetch", TRACE)
    announce(shop, ONE, "without-a-trace")
    during = shop.fields("request_id", "traceparent")
    announce(shop, ONE, "another", OTHER_TRACE)

    assert (latest.request_id, latest.traceparents.split(" ")) == ("post-10", [*map(given, traces[:2:-1])])
    # The first one is that of the POST in request_id.
    assert during == ["without-a-trace", f" {given(TRACE)}"]
    assert shop.field("traceparent") == f"{given(OTHER_TRACE)} {given(TRACE)}"


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (given(TRACE), given(TRACE)),
        ("cc" + given(TRACE)[2:], given(TRACE)),
        ("cc" + given(TRACE)[2:] + "-what-a-later-version-adds", given(TRACE)),
        (given(TRACE) + "-more", ""),
        ("ff" + given(TRACE)[2:], ""),
        (given(TRACE).upper(), ""),
        (given("0" * 32), ""),
        (given(TRACE).replace("00f067aa0ba902b7", "0" * 16), ""),
        ("cc" + given(TRACE)[2:] + "more", ""),
        (given(TRACE)[:-1], ""),
        (f" {given(TRACE)}", ""),
        ("", ""),
    ],
)
def test_a_traceparent_is_read_as_w3c_wants_it(header: str, found: str) -> None:
    assert traceparent(header.encode()) == found
