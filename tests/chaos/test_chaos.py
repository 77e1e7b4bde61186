"""The chaos run with its targets; the short form takes most of a minute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import plan as plans
from tests.chaos.run import LONG, SHORT, Size, run
from tests.service import service

SEED = 1


def test_a_seed_repeats_its_plan_and_every_part_is_killed_and_valkey_frozen() -> None:
    plan = SHORT.plan(SEED)

    assert plan == SHORT.plan(SEED)
    assert plan != SHORT.plan(SEED + 1)
    done = Counter(kill.kind for kill in plan.kills)
    assert set(done) == {*plans.KILL_KINDS, "freeze"}
    assert sum(done[kind] for kind in plans.KILL_KINDS) == SHORT.kills >= 12
    assert plan.events == SHORT.events
    assert {len(events) for events in plan.settlements.values()} == {1, 2}


@pytest.mark.parametrize("size", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)], ids=["short", "long"])
def test_no_event_is_lost_and_no_get_order_wasted_while_everything_is_killed(tmp_path: Path, size: Size) -> None:
    """Web, workers, the pool and Valkey die by SIGKILL, Valkey freezes, the Channel Manager fails; all is fetched."""
    with service(tmp_path) as one:
        result = run(one, size.plan(SEED), size)

    assert all(result.targets.values()), result
