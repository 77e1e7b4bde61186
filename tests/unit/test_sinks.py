"""SINKS names functions of the user; a worker refuses settings whose function cannot be called."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from app.errors import SettingsError
from app.upstream.models import parse_order
from tests.samples import sample
from workers.sinks import Context, build

ORDER = parse_order(sample("order-issued"))
CONTEXT = Context(
    idempotency_key="company/order/3",
    company_id="company",
    order_id="order",
    revision=3,
    attempt=2,
    request_id="request",
)
MODULE = """
import asyncio

seen = []
value = 5

def on_order(order, context):
    seen.append((order, context))

class Shop:
    pass

class AsyncShop:
    async def __call__(self, order, context):
        await on_order_async(order, context)

loops, open_tasks = [], []

async def on_order_async(order, context):
    loops.append(asyncio.get_running_loop())
    if context.attempt == 1:
        raise LookupError("canary")
    if context.attempt == 3:
        open_tasks.append(asyncio.current_task())
        await asyncio.sleep(60)
    await asyncio.sleep(0)
    seen.append((order, context))

async_shop = AsyncShop()

def yields(order, context):
    yield order

async def yields_async(order, context):
    yield order

def one(order):
    pass

def three(order, context, more):
    pass

def named(*, order, context):
    pass
"""


@pytest.fixture(autouse=True)
def _modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_for_tests.py").write_text(MODULE)
    (tmp_path / "shop_that_breaks.py").write_text("raise LookupError('canary')")
    (tmp_path / "shop_with_a_typo.py").write_text("def canary(")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_called_with_the_order_and_its_context() -> None:
    import shop_for_tests  # type: ignore[import-not-found]  # written by the fixture above

    shop_for_tests.seen.clear()
    build(["python:shop_for_tests:on_order"])["python:shop_for_tests:on_order"].deliver(ORDER, CONTEXT)

    assert shop_for_tests.seen == [(ORDER, CONTEXT)]


def test_sinks_are_in_the_order_of_the_setting_and_their_exceptions_reach_the_caller() -> None:
    names = ["python:shop_for_tests:on_order", "python:operator:is_", "python:operator:lt"]
    sinks = build(names)

    assert list(sinks) == names
    assert build(()) == {}
    with pytest.raises(TypeError):
        sinks["python:operator:lt"].deliver(ORDER, CONTEXT)


@pytest.mark.parametrize("name", ["on_order_async", "async_shop"])
def test_an_async_function_is_awaited_on_one_loop_that_an_error_closes(name: str) -> None:
    import shop_for_tests as shop

    def on_alarm(*_: object) -> None:
        raise TimeoutError

    shop.seen.clear()
    shop.loops.clear()
    shop.open_tasks.clear()
    (sink,) = build([f"python:shop_for_tests:{name}"]).values()
    for _ in range(2):
        sink.deliver(ORDER, CONTEXT)
    with pytest.raises(LookupError):
        sink.deliver(ORDER, replace(CONTEXT, attempt=1))
    sink.deliver(ORDER, CONTEXT)
    # RQ's time limit is such a signal.
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            sink.deliver(ORDER, replace(CONTEXT, attempt=3))
    finally:
        signal.signal(signal.SIGALRM, before)
    sink.deliver(ORDER, CONTEXT)

    assert shop.seen == [(ORDER, CONTEXT)] * 4
    assert shop.open_tasks[0].cancelled()
    with pytest.raises(LookupError):
        sink.deliver(ORDER, replace(CONTEXT, attempt=1))
    assert [shop.loops.index(loop) for loop in shop.loops] == [0, 0, 0, 3, 3, 5, 5]


@pytest.mark.parametrize(
    ("specification", "problem"),
    [
        ("canary", "is not of the form python:package.module:function"),
        ("python", "is not of the form python:package.module:function"),
        ("python:", "is not of the form python:package.module:function"),
        ("python:json", "is not of the form python:package.module:function"),
        ("python::canary", "is not of the form python:package.module:function"),
        ("https://user:canary@example.com", "is not of the form python:package.module:function"),
        ("python:no_such_canary:f", "cannot be imported (ModuleNotFoundError)"),
        ("python:json:canary", "cannot be imported (AttributeError)"),
        ("python:.canary:f", "cannot be imported (TypeError)"),
        ("python:shop_that_breaks:f", "cannot be imported (LookupError)"),
        ("python:shop_with_a_typo:f", "cannot be imported (SyntaxError)"),
        ("python:shop_for_tests:value", "is not callable"),
        ("python:shop_for_tests:one", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:three", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:named", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:Shop", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:yields", "is a generator: calling it would run nothing of it"),
        ("python:shop_for_tests:yields_async", "is a generator: calling it would run nothing of it"),
    ],
)
def test_a_specification_that_cannot_be_called_is_refused(specification: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        build(["python:operator:is_", specification])

    assert str(refused.value) == f"SINKS: number 2 {problem}"


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsError, match=r"^SINKS: number 1 .*\nSINKS: number 3 [^\n]*$"):
        build(["ftp:x", "python:operator:is_", "python:no_such:f"])
