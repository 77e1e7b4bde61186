"""Upstream fails: an order that can never succeed becomes a dead letter, and an outage kills no order."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest
import structlog

from app.dev.sandbox.process import Sandbox
from app.ledger import policy
from app.ledger.history import FetchFailed, FetchRequested
from app.ledger.rate_limit import WINDOW
from tests.lab import KEYS
from tests.lab_upstream import Shop, WorkerLab, worker_lab

DAY = 86_400
MANY = 700
MOST = 315
"""Requests in five minutes that the key of these tests allows."""


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, shop: Shop) -> Iterator[WorkerLab]:
    with worker_lab(redis_url, sandbox, {"shop": shop}, requests_per_window=MOST) as one:
        yield one


@pytest.mark.parametrize(
    ("fault", "reason", "calls"),
    [
        ({"kind": "status", "status": 400, "code": "generic_error"}, "bad_request", 5),
        ({"kind": "rubbish"}, "unreadable_answer", 5),
        ({"kind": "truncated"}, "unreadable_answer", 5),
        ({"kind": "wrong_order"}, "wrong_order", 5),
        ({"kind": "status", "status": 401}, "unauthorized", 5),
        ({"kind": "status", "status": 403}, "forbidden", 5),
        ({"kind": "status", "status": 302}, "redirected", 5),
        ({"kind": "status", "status": 404, "code": "generic_error"}, "not_found", 5),
        ({"kind": "status", "status": 404, "code": "resource_not_found"}, "order_missing", None),
    ],
    ids=["400", "rubbish", "truncated", "another order", "401", "403", "302", "uncoded 404", "404"],
)
def test_an_order_with_a_permanently_bad_answer_becomes_a_dead_letter(
    lab: WorkerLab, shop: Shop, fault: dict[str, Any], reason: str, calls: int | None
) -> None:
    poison, *others = lab.issue(4)
    lab.fault(order_id=poison.order_id, **fault)

    lab.run_for(1)
    assert sorted(shop.received) == sorted(order.order_id for order in others)
    lab.run_for(DAY)

    assert (lab.field("dead", poison), lab.pending(), lab.dead()) == (reason, 0, 1)
    made = len(lab.calls) - len(others)
    assert made == calls if calls else made < 20
    assert poison.order_id not in shop.called


def test_an_order_with_a_permanent_500_becomes_a_dead_letter_and_others_do_not(lab: WorkerLab, shop: Shop) -> None:
    """Other orders are answered, so it is this order's fault."""
    poison, *others = lab.issue(4)
    lab.fault(order_id=poison.order_id, kind="status", status=500)

    for _ in range(40):
        lab.run_for(3600)
        others += lab.issue(1)

    assert lab.field("dead", poison) == "http_500"
    assert len(lab.calls) - len(others) <= len(policy.RETRY_WAITS) + 1
    lab.run_for(600)
    assert sorted(shop.received) == sorted(order.order_id for order in others)


OUTAGES: Final[dict[str, dict[str, Any]]] = {
    "400": {"kind": "status", "status": 400, "code": "generic_error"},
    "200 with a page": {"kind": "rubbish"},
    "200 with half an order": {"kind": "truncated"},
    "403": {"kind": "status", "status": 403},
    "uncoded 404": {"kind": "status", "status": 404, "code": "generic_error"},
    "302": {"kind": "status", "status": 302},
    "500": {"kind": "status", "status": 500},
}
"""An outage may speak like a fault of one order."""


@pytest.mark.parametrize("number", [40, 3])
@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_costs_no_order_an_attempt_whatever_it_says(
    lab: WorkerLab, shop: Shop, outage: str, number: int
) -> None:
    """With many orders the breaker opens; with few, no other order is answered meanwhile."""
    shop_works = lab.issue(3)
    lab.run_for(1)
    orders = lab.issue(number)
    lab.fault(**OUTAGES[outage])

    lab.run_for(120)

    assert (lab.pending(), lab.dead()) == (number, 0)
    assert {lab.field(name, order) for order in orders for name in ("attempts", "client_errors")} == {None}
    assert len(lab.calls) < 30
    lab.clear_faults()
    lab.run_for(300)
    assert (lab.pending(), lab.dead(), len(shop.received)) == (0, 0, number + len(shop_works))


@pytest.mark.parametrize("outage", OUTAGES)
def test_what_a_day_without_any_answer_ends_is_requeued_once_when_upstream_answers(
    lab: WorkerLab, shop: Shop, outage: str
) -> None:
    """Of a company with few orders no other is answered, so no one knows whose fault it is."""
    orders = lab.issue(3)
    lab.fault(**OUTAGES[outage])
    lab.run_for(policy.UNCOUNTED_FOR / 1000 + 3600)
    assert {lab.field("dead", order) for order in orders} == {"no_order_answered"}
    assert (lab.pending(), shop.received) == (0, [])
    lab.clear_faults()
    before = len(lab.calls)

    orders += lab.issue(1)
    lab.run_for(10)

    assert (lab.pending(), lab.dead()) == (0, 0)
    assert sorted(shop.received) == sorted(order.order_id for order in orders)
    assert len(lab.calls) - before == len(orders)
    requested = [entry.reason for entry in lab.history(orders[0]) if isinstance(entry, FetchRequested)]
    assert requested == ["upstream_answers"]


NO_SUCH_ORDER: Final[dict[str, Any]] = {"kind": "status", "status": 404, "code": "resource_not_found"}


@pytest.mark.parametrize(("number", "status"), [(8, "Issued"), (8, "Draft"), (3, "Draft")])
def test_an_outage_in_which_no_order_is_found_heals_by_itself(
    lab: WorkerLab, shop: Shop, number: int, status: str
) -> None:
    """A database was restored, or the route is gone. No other order comes afterwards, and none is called deleted."""
    orders = lab.issue(number)
    lab.accept(*orders, status=status)
    lab.fault(**NO_SUCH_ORDER)

    lab.run_for(3600)

    assert (lab.pending(), lab.dead()) == (number, 0)
    late = len(lab.calls)
    lab.run_for(3600)
    assert len(lab.calls) - late < 20
    lab.clear_faults()
    lab.run_for(policy.UNCOUNTED_LONGEST * 1.2 / 1000)
    assert (lab.pending(), lab.dead(), len(shop.received)) == (0, 0, number)


def test_a_deleted_draft_of_a_quiet_company_is_known_as_deleted_when_another_order_is_answered(
    lab: WorkerLab, shop: Shop
) -> None:
    (draft,) = lab.issue(1)
    lab.accept(draft, status="Draft")
    lab.fault(order_id=draft.order_id, **NO_SUCH_ORDER)
    lab.run_for(600)
    assert (lab.field("status", draft), lab.pending(), lab.dead()) == (None, 1, 0)

    (good,) = lab.issue(1)
    lab.run_for(0)
    assert shop.received == [good.order_id], "one missing order keeps no other back"
    lab.run_for(policy.UNCOUNTED_LONGEST * 1.2 / 1000)

    assert (lab.field("status", draft), lab.pending(), lab.dead()) == ("DeletedUpstream", 0, 0)


def test_each_answer_requeues_two_orders_and_an_order_that_stays_missing_ends_for_good(lab: WorkerLab) -> None:
    """For more than a day no order is found, and there are too few to open the breaker."""
    missing, *orders = lab.issue(4)
    lab.fault(**NO_SUCH_ORDER)
    lab.run_for(policy.UNCOUNTED_FOR / 1000 + 3600)
    assert {lab.field("dead", order) for order in (missing, *orders)} == {"no_order_answered"}
    lab.fault(order_id=missing.order_id, **NO_SUCH_ORDER)
    lab.now += 1000
    before = len(lab.calls)

    orders += lab.issue(1)
    lab.run_for(0)
    assert (lab.dead(), lab.pending()) == (len(orders) - 2, 2)
    lab.run_for(1000)

    assert (lab.dead(), lab.field("dead", missing)) == (1, "order_missing")
    for _ in range(3):
        orders += lab.issue(1)
        lab.run_for(1000)
    assert (lab.dead(), lab.pending()) == (1, 0)
    assert len(lab.calls) - before < len(orders) + 10


@pytest.mark.parametrize("quiet", [600, policy.UNCOUNTED_FOR // 1000 + 3600], ids=["minutes", "a day"])
def test_an_order_that_is_really_missing_ends_in_a_company_with_few_orders(lab: WorkerLab, quiet: int) -> None:
    """Once others are answered; after a day without any it is requeued for that, once."""
    (missing,) = lab.issue(1)
    lab.fault(order_id=missing.order_id, **NO_SUCH_ORDER)
    lab.run_for(quiet)
    assert lab.field("dead", missing) == (None if quiet == 600 else "no_order_answered")

    for _ in range(4):
        lab.issue(1)
        lab.run_for(600)

    assert lab.field("dead", missing) == "order_missing"
    assert len([entry for entry in lab.history(missing) if isinstance(entry, FetchRequested)]) == (quiet != 600)


@pytest.mark.parametrize("way", ["requeued", "discarded"])
def test_what_a_person_has_done_with_a_dead_letter_stands(lab: WorkerLab, way: str) -> None:
    (poison,) = lab.issue(1)
    lab.fault(order_id=poison.order_id, **OUTAGES["400"])
    lab.run_for(policy.UNCOUNTED_FOR / 1000 + 3600)
    assert lab.field("dead", poison) == "no_order_answered"
    if way == "requeued":
        lab.request_fetch(poison)
        lab.work()
    else:
        lab.ledger.discard(poison)

    for _ in range(4):
        lab.issue(1)
        lab.run_for(120)

    assert (lab.field("dead", poison), lab.pending()) == ("bad_request" if way == "requeued" else None, 0)
    requested = [entry.reason for entry in lab.history(poison) if isinstance(entry, FetchRequested)]
    assert requested == (["refetch"] if way == "requeued" else [])


@pytest.mark.parametrize("outage", OUTAGES)
def test_one_bad_order_delays_no_other(lab: WorkerLab, shop: Shop, outage: str) -> None:
    """Neither 40 others at once, nor the next one of a company with an order an hour."""
    lab.issue(20)
    (poison,) = lab.issue(1)
    lab.issue(20)
    lab.fault(order_id=poison.order_id, **OUTAGES[outage])

    lab.run_for(0)

    assert len(shop.received) == 40
    lab.run_for(600)
    if outage != "500":
        assert lab.is_dead(poison)
    for _ in range(4):
        (lonely,) = lab.issue(1)
        lab.fault(order_id=lonely.order_id, **OUTAGES[outage])
        lab.run_for(600)
        (good,) = lab.issue(1)
        lab.run_for(0)
        assert good.order_id in shop.received


def test_the_probe_is_made_for_an_order_that_did_not_open_the_breaker(lab: WorkerLab, shop: Shop) -> None:
    bad = lab.issue(5)
    lab.sandbox.admin(
        "PUT", "faults", [{"operation": "getOrder", "order_id": one.order_id, **OUTAGES["403"]} for one in bad]
    )
    lab.run_for(1)
    good = lab.issue(1)
    lab.run_for(1)
    assert shop.received == []

    lab.run_for((policy.BREAKER_FIRST + policy.LONGEST_DEFERRAL) / 1000)

    assert len(shop.received) == len(good)
    for _ in range(10):
        lab.issue(1)
        lab.run_for(600)
    assert {lab.field("dead", one) for one in bad} == {"forbidden"}


def test_requests_of_the_dead_are_logged(lab: WorkerLab, capsys: pytest.CaptureFixture[str]) -> None:
    (order,) = lab.issue(1)
    lab.fault(**OUTAGES["400"])
    lab.run_for(policy.UNCOUNTED_FOR / 1000 + 3600)
    lab.clear_faults()
    structlog.reset_defaults()

    lab.issue(1)
    lab.work()

    (line,) = [line for line in capsys.readouterr().out.splitlines() if "order.requeued" in line]
    assert order.order_id in line


def test_each_call_is_counted_once_by_its_outcome_and_its_time_and_a_denied_one_never(lab: WorkerLab) -> None:
    for status in (429, 404, 503):
        lab.fault(kind="status", status=status, code="resource_not_found", calls=1)
        (called,) = lab.issue(1)
        lab.work()
        assert lab.field("http", called) == str(status)
        if status == 429:
            (denied,) = lab.issue(1)
            lab.work()
            assert (lab.field("error", denied), lab.field("http", denied)) == ("throttled", "0")
        lab.run_for(7200)
    (repeated,) = lab.issue(1)
    fetch = lab.start_fetch(repeated)
    for _ in range(2):
        lab.store_fetch(fetch, order=repeated)

    counted = Counter[str]()
    for name, times in lab.counters(f"get_order|{lab.company_id}|").items():
        _, _, outcome, bucket = name.split("|")
        counted[f"{outcome} ms" if bucket == "sum" else outcome] += times
    assert {name: times for name, times in counted.items() if " " not in name} == {
        "throttled": 1,
        "not_found": 1,
        "failed": 1,
        "ok": 5,
    }
    assert counted["ok ms"] >= 42
    assert lab.counters("throttled") == {"throttled|get_order": 1}


class Refused(Exception):
    """What the sinks of these tests raise."""


@pytest.mark.parametrize(
    "error", [Refused, SystemExit, KeyboardInterrupt, TimeoutError], ids=lambda kind: kind.__name__
)
def test_a_delivery_always_refused_is_a_dead_letter(lab: WorkerLab, shop: Shop, error: type[BaseException]) -> None:
    """Whatever the sink raises: bounded attempts, one getOrder, and a reason that names only the type."""

    def refuse(order_id: str) -> None:
        if order_id == poison.order_id:
            raise error("canary")

    shop.trouble = refuse
    poison, *others = lab.issue(4)

    lab.run_for(1)
    assert sorted(shop.received) == sorted(order.order_id for order in others)
    lab.run_for(4 * DAY)

    assert lab.field("shop:dead", poison) == error.__name__
    assert shop.called.count(poison.order_id) == len(policy.DELIVERY_WAITS) + 1
    assert len(lab.calls) == 4
    assert (lab.pending(), lab.redis.zcard(KEYS.dead_deliveries), lab.dead()) == (0, 1, 0)
    assert "canary" not in repr(lab.history(poison))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Writing 20,000 log lines of deferred orders takes half the time of a test."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()


def most_in_a_window(calls: list[int]) -> int:
    """Return the largest number of calls within upstream's five minutes."""
    return max(number + 1 - bisect_left(calls, call - WINDOW + 1000) for number, call in enumerate(calls))


def test_after_half_an_hour_of_outage_all_orders_are_fetched_at_the_allowed_rate(lab: WorkerLab) -> None:
    lab.issue(MANY)
    lab.fault(kind="status", status=503)

    lab.run_for(30 * 60)

    assert (lab.pending(), lab.dead()) == (MANY, 0)
    probes, runs = len(lab.calls), lab.runs
    # Only probes of the breaker reach upstream; each order runs about once per opening.
    assert probes < 30
    assert runs < 11 * MANY
    lab.clear_faults()
    lab.run_for(20 * 60)
    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) - probes == MANY
    assert most_in_a_window(lab.calls) <= MOST
    assert lab.runs - runs < 2 * MANY


def test_after_an_expired_key_is_replaced_all_orders_are_fetched(lab: WorkerLab) -> None:
    """A refused key uses no attempt of any order, however long it lasts."""
    orders = lab.issue(100)
    lab.fault(kind="status", status=401)
    lab.run_for(3600)
    assert (lab.pending(), lab.dead()) == (len(orders), 0)
    assert {lab.field(name, order) for order in orders for name in ("attempts", "client_errors")} == {None}
    refused = len(lab.calls)
    assert refused < 100

    lab.clear_faults()
    lab.use_key("second-key")
    lab.run_for(10 * 60)

    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) == refused + len(orders)


@pytest.mark.parametrize(("retry_after", "wait"), [("90", 90), (None, 5)], ids=["Retry-After", "no Retry-After"])
def test_no_worker_calls_while_the_key_is_throttled(lab: WorkerLab, retry_after: str | None, wait: int) -> None:
    """A 429 defers all orders of the key, uses no attempt, and makes no dead letter."""
    orders = lab.issue(100)
    lab.fault(kind="status", status=429, calls=3, retry_after=retry_after)

    lab.run_for(30 * 60)

    assert (lab.pending(), lab.dead()) == (0, 0)
    assert len(lab.calls) == len(orders) + 3
    pauses = [later - sooner for sooner, later in zip(lab.calls, lab.calls[1:], strict=False)]
    assert all(pause >= wait * 1000 for pause in pauses[:3])
    assert not any(
        isinstance(entry, FetchFailed) and entry.outcome == "retry" for order in orders for entry in lab.history(order)
    )
