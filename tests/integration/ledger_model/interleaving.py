"""Which steps an interleaving is drawn from, how it is run, and how it ends: without faults, until all is quiet."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from hypothesis import strategies as st

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.integration.ledger_model.book import Lost
from tests.integration.ledger_model.driver import WORKERS, Driver
from tests.integration.ledger_model.parts import Parts

ONE: Final = OrderKey("aaaaaaaa-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000001")
SAME_ID: Final = OrderKey("bbbbbbbb-0000-4000-8000-000000000002", ONE.order_id)
ANOTHER: Final = OrderKey(ONE.company_id, "00000000-0000-4000-8000-000000000002")
ORDERS: Final = (ONE, SAME_ID, ANOTHER)
_NAMES: Final = {ONE: "ONE", SAME_ID: "SAME_ID", ANOTHER: "ANOTHER"}
_MOST_ROUNDS: Final = 60


class Step(NamedTuple):
    """A step by name; a counterexample prints as the calls that it is."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(_NAMES.get(one, repr(one)) for one in self.arguments)})"


_each = range(len(WORKERS))


def _of_each(name: str, *more: str) -> list[Step]:
    return [Step(name, (worker, *more)) for worker in _each]


_ALWAYS: Final = [
    *_of_each("work") * 4,
    *_of_each("begin") * 3,
    *[Step("settle", (ONE,))] * 6,
    *[Step("dispatch")] * 3,
]
_SOMETIMES: Final = [
    [*[Step("settle", (SAME_ID,))] * 3, Step("settle", (ANOTHER,)), Step("settle", (ONE, SAME_ID))],
    [*[Step("settle_silently", (ONE,))] * 2, *[Step("deliver")] * 3],
    [Step("settle", (ONE, ONE)), Step("repeat", (ONE,))],
    [Step("jump", (6,)), *[Step("jump", (61,))] * 4],
    [*[Step("jump", (121,))] * 2, Step("jump", (7200,))],
    _of_each("kill") * 2,
    [Step("release")] * 4,
    _of_each("unsettled", ""),
    _of_each("unsettled", "unsettled"),
    [*_of_each("fail", "retry"), Step("fail", (0, "client_error"))],
    [*_of_each("fail", "deferred"), *_of_each("fail", "not_found")],
    _of_each("fail", "dead"),
    _of_each("fail", "deleted_upstream"),
    [Step("wake", (ONE,))] * 4,
    [Step("request", (ONE, LIVE))],
    [*[Step("request", (ONE, BACKFILL))] * 2, Step("request", (ANOTHER, BACKFILL))],
]
_OF_SINKS: Final = [
    _of_each("sink_fails") * 3,
    _of_each("sink_refuses") * 3,
    [Step("retry_delivery", (ONE,))] * 2,
    [Step("jump", (151,))] * 3,
    _of_each("fetch") * 2,
]
OF_CLOCKS: Final = [
    [Step("set_clock", (180,)), Step("set_clock", (-180,))] * 2,
    [Step("set_clock", (3600,)), Step("set_clock", (-3600,))] * 2,
    [Step("set_clock", (86400,)), Step("set_clock", (-86400,))] * 2,
]
"""Machines whose clocks differ by minutes, and clocks that jump; each family goes both ways."""


def interleavings(sinks: Sequence[str], more: Sequence[Sequence[Step]] = ()) -> st.SearchStrategy[list[Step]]:
    """Return what draws an interleaving: first which kinds of trouble it may hold, then its steps.

    What needs four faults of one kind would else hardly ever be seen among sixteen kinds. `more` are further kinds.
    """
    families = [*_SOMETIMES, *(_OF_SINKS if sinks else []), *more]

    # Not the bits of a number: Hypothesis prefers small ones, and the last families would hardly ever be drawn.
    each = st.lists(st.booleans(), min_size=len(families), max_size=len(families))

    def of(drawn: tuple[list[bool], int]) -> st.SearchStrategy[list[Step]]:
        choice, length = drawn
        chosen = [step for one, family in zip(choice, families, strict=True) if one for step in family]
        # Left to itself Hypothesis prefers lists that are too short for two faults to meet.
        return st.lists(st.sampled_from([*_ALWAYS, *chosen]), min_size=length, max_size=length)

    return st.tuples(each, st.integers(4, 40)).flatmap(of)


def play(parts: Parts, steps: Sequence[Step], look: Callable[[Driver], None]) -> Driver:
    """Run the steps on an empty server, calling `look` after each."""
    driver = Driver(parts, ORDERS)
    for name, arguments in steps:
        driver.step(name, arguments)
        look(driver)
    return driver


def settle_down(driver: Driver, parts: Parts, look: Callable[[Driver], None]) -> None:
    """Let time run without faults until nobody has to look at any order again.

    Raises Lost when that does not happen, or an order is not fetched then, the dead only after they are requeued.
    """
    driver.step("deliver")
    look(driver)
    _run_until_quiet(driver, parts, look)
    dead = [OrderKey.of(member.decode()) for member in parts.wire.execute_command("ZRANGE", keys.DEAD, 0, -1)]
    for order in dead:
        driver.step("request", (order, LIVE))
        look(driver)
    if dead:
        _run_until_quiet(driver, parts, look)
    contents = parts.wire.execute_command("MGET", *map(keys.content, driver.books))
    for book, content in zip(driver.books.values(), contents, strict=True):
        book.judge(zlib.decompress(content) if content else None)


def _run_until_quiet(driver: Driver, parts: Parts, look: Callable[[Driver], None]) -> None:
    for number, worker in enumerate(driver.workers):
        while worker.order is not None:
            driver.step("work", (number,))
            look(driver)
    for _ in range(_MOST_ROUNDS):
        _empty_the_queues(driver, look)
        soonest = parts.wire.execute_command("ZRANGE", keys.DUE, 0, 0, "WITHSCORES")
        if not soonest:
            return
        parts.clock.now = max(driver.now, int(float(soonest[1])))
        driver.step("dispatch")
        look(driver)
    raise Lost(f"not quiet after {_MOST_ROUNDS} rounds")


def _empty_the_queues(driver: Driver, look: Callable[[Driver], None]) -> None:
    number = len(driver.workers) - 1
    while True:
        driver.step("work", (number,))
        look(driver)
        if driver.workers[number].order is None and not driver.touched:
            return
