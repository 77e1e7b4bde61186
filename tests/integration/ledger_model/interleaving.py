"""Which steps an interleaving is drawn from, how it is run, and how it ends: without faults, until all is quiet."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from app.store import keys
from app.store.jobs import BACKFILL, LIVE
from app.store.keys import OrderKey
from tests.integration.ledger_model.book import Lost
from tests.integration.ledger_model.driver import WORKERS, Driver, Parts

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


def _steps(weights: dict[Step, int]) -> list[Step]:
    return [step for step, weight in weights.items() for _ in range(weight)]


_each_worker = range(len(WORKERS))
STEPS: Final = _steps(
    {
        **{Step("work", (worker,)): 9 for worker in _each_worker},
        **{Step("settle", (order,)): weight for order, weight in ((ONE, 6), (SAME_ID, 3), (ANOTHER, 1))},
        Step("settle", (ONE, SAME_ID)): 1,
        Step("settle", (ONE, ONE)): 1,
        Step("settle_silently", (ONE,)): 1,
        Step("deliver"): 2,
        Step("repeat", (ONE,)): 1,
        Step("tick"): 4,
        **{Step("jump", (seconds,)): 1 for seconds in (6, 61, 121, 7200)},
        **{Step("crash", (worker,)): 2 for worker in _each_worker},
        Step("bury"): 2,
        **{Step("unsettled", (worker, "")): 1 for worker in _each_worker},
        Step("unsettled", (0, "unsettled")): 1,
        **{Step("fail", (worker, "again")): 1 for worker in _each_worker},
        **{Step("fail", (0, what)): 1 for what in ("park", "missing", "dead", "gone")},
        Step("fail", (1, "dead")): 1,
        Step("fail", (1, "gone")): 1,
        Step("nudge", (ONE,)): 1,
        Step("want", (ONE, LIVE)): 1,
        Step("want", (ONE, BACKFILL)): 1,
        Step("want", (ANOTHER, BACKFILL)): 1,
    }
)
"""What may happen, the frequent more often than once."""

SINK_STEPS: Final = _steps(
    {
        **{Step("sink_fails", (worker,)): 2 for worker in _each_worker},
        **{Step("sink_refuses", (worker,)): 1 for worker in _each_worker},
    }
)


def play(parts: Parts, steps: Sequence[Step], look: Callable[[Driver], None]) -> Driver:
    """Run the steps on an empty server, calling `look` after each."""
    driver = Driver(parts, ORDERS)
    for name, arguments in steps:
        driver.step(name, arguments)
        look(driver)
    return driver


def bring_home(driver: Driver, parts: Parts, look: Callable[[Driver], None]) -> None:
    """Let time run without faults until nobody has to look at any order again.

    Raises Lost when that does not happen, or an order is not home then, the dead only after they are revived.
    """
    driver.step("deliver", ())
    look(driver)
    _run_until_quiet(driver, parts, look)
    dead = [OrderKey.of(member.decode()) for member in parts.redis.execute_command("ZRANGE", keys.DEAD, 0, -1)]
    for order in dead:
        driver.step("want", (order, LIVE))
        look(driver)
    if dead:
        _run_until_quiet(driver, parts, look)
    for book in driver.books.values():
        content, digest = parts.redis.execute_command("GET", keys.content(book.order)), parts.redis.execute_command(
            "HGET", keys.record(book.order), "digest"
        )
        book.judge(zlib.decompress(content) if content else None, (digest or b"").decode())


def _run_until_quiet(driver: Driver, parts: Parts, look: Callable[[Driver], None]) -> None:
    for number, worker in enumerate(driver.workers):
        while not worker.is_idle:
            driver.step("work", (number,))
            look(driver)
    for _ in range(_MOST_ROUNDS):
        _empty_the_queues(driver, look)
        soonest = parts.redis.execute_command("ZRANGE", keys.DUE, 0, 0, "WITHSCORES")
        if not soonest:
            return
        parts.clock.now = max(driver.now, int(float(soonest[1])))
        driver.step("tick", ())
        look(driver)
    raise Lost(f"not quiet after {_MOST_ROUNDS} rounds")


def _empty_the_queues(driver: Driver, look: Callable[[Driver], None]) -> None:
    number = len(driver.workers) - 1
    while True:
        driver.step("work", (number,))
        look(driver)
        if driver.workers[number].is_idle and not driver.touched:
            return
