"""A sink may answer Retry (at another time) or Reject (never): neither is a failure of the sink."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from app.dev.sandbox.process import Sandbox
from app.ledger import policy
from app.ledger.history import DeliveryEnded
from app.sink_settings import of_specification
from tests.lab import KEYS
from tests.lab_upstream import WorkerLab, worker_lab
from tests.samples import document
from workers.sinks import Reject, Retry
from workers.sinks.build import build

HOUR = 3600
MODULE = """
import asyncio

calls, loops, answer = [], set(), lambda context: None

def take(order, context):
    calls.append(context)
    answer(context)

async def take_async(order, context):
    loops.add(asyncio.get_running_loop())
    await asyncio.sleep(0)
    take(order, context)

def take_nested(order, context):
    try:
        take(order, context)
    finally:
        calls.append(calls.pop())
"""


class NotSold(Reject):
    """A reason of a user, with arguments of its own."""

    def __init__(self, sku: int) -> None:
        self.sku = sku


class Later(Retry):
    def __init__(self) -> None:
        super().__init__(after=600)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the sink; `answer` is what the sink does with a call."""
    (tmp_path / "asking_shop.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import asking_shop  # type: ignore[import-not-found]  # written above

    monkeypatch.setattr(asking_shop, "calls", [])
    monkeypatch.setattr(asking_shop, "loops", set())
    return asking_shop


@pytest.fixture(params=["take", "take_async", "take_nested"])
def name(request: pytest.FixtureRequest) -> str:
    return f"python:asking_shop:{request.param}"


@pytest.fixture
def lab(redis_url: str, sandbox: Sandbox, module: Any, name: str) -> Iterator[WorkerLab]:
    sinks = build([of_specification(name)])
    with worker_lab(redis_url, sandbox, sinks) as one:
        yield one
    module.answer = raises(OSError)
    with pytest.raises(OSError):  # noqa: PT011  # it closes the loop of an async function
        sinks[name].deliver(document("order-issued"), cast("Any", None))


@pytest.fixture
def plain(redis_url: str, sandbox: Sandbox, module: Any) -> Iterator[WorkerLab]:
    """A lab with one sink, `python:asking_shop:take`."""
    with worker_lab(redis_url, sandbox, build([of_specification(TAKE)])) as one:
        yield one


TAKE = "python:asking_shop:take"


def raises(make: Callable[[], BaseException], times: int = 10**6) -> Callable[[Any], None]:
    """Return an answer that raises so many times, then takes the order."""
    left = [times]

    def answer(context: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise make()

    return answer


def failing(lab: WorkerLab, sink: str) -> bool:
    return bool(lab.redis.exists(KEYS.sink_failing(sink)))


def outcomes(lab: WorkerLab, order: Any) -> list[tuple[str, str]]:
    return [(one.outcome, one.reason) for one in lab.history(order) if isinstance(one, DeliveryEnded)]


@pytest.mark.parametrize(
    "make",
    [lambda: Retry(after=600), lambda: Retry(after=timedelta(minutes=10)), Later],
    ids=["seconds", "timedelta", "subclass"],
)
def test_a_retry_comes_after_the_time_that_it_names_and_uses_no_attempt(
    lab: WorkerLab, module: Any, name: str, make: Callable[[], BaseException]
) -> None:
    """More often than a sink may fail; each call has the same attempt, key and time of the fetch."""
    module.answer = raises(make, 30)
    (order,) = lab.issue()
    lab.run_for(1)
    fetched_at = lab.field("fetched_at", order)
    assert [lab.field(f"{name}:{field}", order) for field in ("attempts", "revision")] == ["0", "0"]
    assert lab.delivery_in(order) == pytest.approx(600, abs=2)

    lab.run_for(6 * HOUR)

    assert len(module.calls) == 31
    assert len(set(module.calls)) == 1
    assert len(module.loops) == name.endswith("async"), "connections of the sink belong to its loop"
    assert (module.calls[0].attempt, str(module.calls[0].fetched_at)) == (1, fetched_at)
    assert (len(lab.calls), failing(lab, name), lab.pending()) == (1, False, 0)
    assert [lab.field(f"{name}:{field}", order) for field in ("revision", "postponed", "error")] == ["1", None, None]
    first, *_, last = outcomes(lab, order)
    assert (first[0], first[1].partition(" at ")[0], last[0]) == ("postponed", type(make()).__name__, "succeeded")


@pytest.mark.parametrize(
    ("after", "seconds"), [(0, 5), (4.5, 5), (90, 90), (timedelta(days=30), 7200), (float("inf"), 7200)]
)
def test_the_time_of_a_retry_has_bounds(plain: WorkerLab, module: Any, after: float | timedelta, seconds: int) -> None:
    module.answer = raises(lambda: Retry(after=after))
    (order,) = plain.issue()

    with capture_logs() as lines:
        plain.work()

    assert int(plain.field(f"{TAKE}:next_at", order) or 0) == plain.now + seconds * 1000
    assert [(one["log_level"], one["due_in_s"]) for one in lines if one["event"] == "delivery.postponed"] == [
        ("info", seconds)
    ]
    plain.run_for(seconds - 1)
    assert len(module.calls) == 1
    plain.run_for(2)
    assert len(module.calls) == 2


def test_a_sink_that_asks_for_ever_gets_a_dead_letter_after_three_days_and_a_requeue_begins_anew(
    plain: WorkerLab, module: Any
) -> None:
    module.answer = raises(lambda: Retry(after=2 * HOUR))
    (order,) = plain.issue()

    plain.run_for(71 * HOUR)
    assert (plain.field(f"{TAKE}:dead", order), failing(plain, TAKE)) == (None, False)
    plain.run_for(3 * HOUR)

    assert plain.field(f"{TAKE}:dead", order) == policy.POSTPONED_TOO_LONG
    assert plain.field(f"{TAKE}:error", order) == "postponed_too_long (Retry at asking_shop.py:8)"
    assert (plain.pending(), len(plain.calls), failing(plain, TAKE)) == (0, 1, False)
    assert plain.ledger.retry_delivery(order, TAKE)
    plain.run_for(71 * HOUR)
    assert (plain.field(f"{TAKE}:dead", order), plain.pending()) == (None, 1)


def test_a_retry_does_not_hold_a_newer_revision_which_has_its_own_three_days(plain: WorkerLab, module: Any) -> None:
    module.answer = raises(lambda: Retry(after=2 * HOUR))
    (order,) = plain.issue()
    plain.run_for(60 * HOUR)
    before = plain.field(f"{TAKE}:postponed", order)

    plain.redis.hset(KEYS.record(order), "digest", "of other content")
    plain.request_fetch(order)
    plain.run_for(60 * HOUR)

    assert module.calls[-1].revision == 2
    assert module.calls[-1].fetched_at > module.calls[0].fetched_at
    assert (plain.field(f"{TAKE}:dead", order), before == plain.field(f"{TAKE}:postponed", order)) == (None, False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Reject("no such product"), "no such product"),
        (lambda: NotSold(7), "7"),
        (lambda: Reject("a\x1b[2J\n b" + 300 * "c"), "a\N{REPLACEMENT CHARACTER}[2J b" + 193 * "c"),
        (lambda: Reject(""), "no reason given"),
    ],
    ids=["text", "subclass", "control codes and length", "empty"],
)
def test_a_rejected_order_is_a_dead_letter_at_once_with_the_reason(
    lab: WorkerLab, module: Any, name: str, make: Callable[[], BaseException], reason: str
) -> None:
    module.answer = raises(make, 1)
    rejected, *others = lab.issue(3)

    with capture_logs() as lines:
        lab.run_for(2)

    assert [lab.field(f"{name}:{field}", rejected) for field in ("dead", "error")] == [f"rejected: {reason}", None]
    assert [lab.field(f"{name}:revision", one) for one in others] == ["1", "1"]
    assert (outcomes(lab, rejected), failing(lab, name)) == ([("rejected", reason)], False)
    assert [one["reason"] for one in lines if one["event"] == "delivery.dead_lettered"] == [f"rejected: {reason}"]
    lab.run_for(48 * HOUR)
    assert (len(module.calls), lab.pending()) == (3, 0)

    assert lab.ledger.retry_delivery(rejected, name)
    lab.run_for(1)

    assert (lab.field(f"{name}:revision", rejected), lab.redis.zcard(KEYS.dead_deliveries)) == ("1", 0)


def test_a_rejection_shows_that_the_sink_works_and_a_retry_shows_nothing(plain: WorkerLab, module: Any) -> None:
    plain.issue()
    module.answer = raises(lambda: OSError())
    plain.work()
    assert failing(plain, TAKE)

    module.answer = raises(lambda: Retry(after=5), 1)
    plain.issue()
    plain.work()
    assert failing(plain, TAKE)

    module.answer = raises(lambda: Reject("unknown"), 1)
    plain.issue()
    plain.work()
    assert not failing(plain, TAKE)


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"statuses": ("Draft", "Error")}, "status Issued"),
        ({"companies": ("museum",)}, "company venue"),
        ({"companies": ("venue",), "statuses": ("Issued",)}, ""),
    ],
)
def test_a_sink_gets_only_the_companies_and_statuses_that_it_names(
    plain: WorkerLab, module: Any, filters: dict[str, tuple[str, ...]], reason: str
) -> None:
    plain.deliverer = plain.deliver_to({TAKE: of_specification(TAKE).model_copy(update=filters).unwanted})
    (order,) = plain.issue()

    with capture_logs() as lines:
        plain.work()

    assert outcomes(plain, order) == [("skipped", reason) if reason else ("succeeded", "")]
    assert [one["reason"] for one in lines if one["event"] == "delivery.skipped"] == [reason] * bool(reason)
    assert (len(module.calls), plain.field(f"{TAKE}:revision", order), plain.pending()) == (int(not reason), "1", 0)
    assert not failing(plain, TAKE)


def _chained() -> BaseException:
    error = KeyboardInterrupt()
    error.__cause__ = Reject("canary")
    return error


@pytest.mark.parametrize(
    "make",
    [_chained, lambda: ExceptionGroup("canary", [Retry(after=5)]), lambda: Exception(Reject("canary"))],
    ids=["raised from it", "in a group", "as an argument"],
)
def test_what_only_contains_a_reject_or_a_retry_is_a_failure(
    plain: WorkerLab, module: Any, make: Callable[[], BaseException]
) -> None:
    module.answer = raises(make)
    (order,) = plain.issue()

    plain.work()

    assert outcomes(plain, order) == [("retry", f"{type(make()).__name__} at asking_shop.py:8")]
    assert (plain.field(f"{TAKE}:attempts", order), failing(plain, TAKE)) == ("1", True)
