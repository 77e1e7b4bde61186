"""Whatever happens in whatever order, every settlement is fetched after it was accepted, and none twice for nothing.

Hypothesis draws the order of events; the real scripts run on a real server. `INTERLEAVINGS` is how many, and
`INTERLEAVINGS_SEED` repeats a run: the seed is printed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from app.dev.valkey import Valkey
from tests.integration.ledger_model.audit import WILL_END, Audit, Snapshots
from tests.integration.ledger_model.driver import Driver, Parts
from tests.integration.ledger_model.interleaving import ORDERS, Step, bring_home, interleavings, play
from tests.integration.ledger_model.wire import Wire

INTERLEAVINGS: Final = int(os.environ.get("INTERLEAVINGS", "5000"))
# In CI the same ones each time, so that a failure is the fault of the change that it is shown for.
SEED: Final = int(os.environ.get("INTERLEAVINGS_SEED") or ("1" if os.environ.get("CI") else secrets.randbelow(2**32)))
SINK: Final = "shop"


@pytest.fixture
def wire(valkey: Valkey) -> Iterator[Wire]:
    with Wire(valkey.url) as opened:
        yield opened


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as opened:
        yield opened


def explore(run: Callable[[list[Step]], None], sinks: Sequence[str], number: int) -> int:
    """Run `run` for different interleavings, at least `number` if it does not fail; return how many."""
    seen: set[tuple[Step, ...]] = set()

    @hypothesis.seed(SEED)
    @settings(
        # A few are drawn twice.
        max_examples=number + number // 20,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(interleavings(sinks))
    def one(drawn: list[Step]) -> None:
        seen.add(tuple(drawn))
        run(drawn)

    one()
    return len(seen)


@pytest.mark.parametrize(("sinks", "share"), [((), 1.0), ((SINK,), 0.3)], ids=["without sinks", "with a sink"])
def test_no_interleaving_loses_a_settlement(
    wire: Wire,
    runner: asyncio.Runner,
    sinks: tuple[str, ...],
    share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After every step what is owed stands in `due`; in the end all is home, content and sinks at the newest."""
    parts = Parts(wire, runner, sinks)
    snapshots = Snapshots(wire, ORDERS, sinks)

    def run(drawn: list[Step]) -> None:
        audit = Audit(snapshots, ORDERS, sinks)

        def look(driver: Driver) -> None:
            if driver.touched:
                audit.look(driver.touched)

        driver = play(parts, drawn, look)
        bring_home(driver, parts, look)
        for order, row in audit.rows.items():
            assert not row.owes(()), row
            assert not row.owed_a_hand_on(sinks), row
            assert not row.sink_dead or row.revision in driver.books[order].refused, row
            if row.wanted and not row.owes(sinks):
                ends = {row.record, row.trail} | ({row.content} if row.revision else set())
                assert ends == {WILL_END}, f"{order.member} would be kept for ever: {row}"

    number = round(INTERLEAVINGS * share)
    different = explore(run, sinks, number)
    with capsys.disabled():
        print(f"\n{different} interleavings, seed {SEED}")  # noqa: T201  # the count is the point
    assert different >= number
