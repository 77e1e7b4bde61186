"""The chaos run with its targets; the short form takes most of a minute."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import plan as plans
from tests.chaos import table
from tests.chaos.run import LONG, SHORT, Size, run
from tests.service import service

SEED = 1


def test_a_seed_repeats_its_plan_and_every_part_is_killed_and_valkey_frozen() -> None:
    plan = plans.draw(SEED, SHORT.events, SHORT.kills, SHORT.seconds)

    assert plan == plans.draw(SEED, SHORT.events, SHORT.kills, SHORT.seconds)
    assert plan != plans.draw(SEED + 1, SHORT.events, SHORT.kills, SHORT.seconds)
    done = Counter(kill.kind for kill in plan.kills)
    assert set(done) == {*plans.KILL_KINDS, "freeze"}
    assert sum(done[kind] for kind in plans.KILL_KINDS) == SHORT.kills >= 12
    assert len(plan.events) == SHORT.events
    settlements = Counter(event.payload.order_id for event in plan.events)
    assert set(settlements.values()) == {1, 2}
    assert max(len(post.shots) for post in plan.posts) <= plans.LARGEST_BATCH


@pytest.mark.parametrize("size", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)], ids=["short", "long"])
def test_no_event_is_lost_and_no_get_order_wasted_while_everything_is_killed(tmp_path: Path, size: Size) -> None:
    """Web, workers, the pool and Valkey die by SIGKILL, Valkey freezes, the Channel Manager fails; all is fetched."""
    with service(tmp_path) as one:
        result = run(one, plans.draw(SEED, size.events, size.kills, size.seconds), size)

    assert all(met for _, met in result.targets), "\n".join([*table.targets(result), *table.faults(result)])
    assert sum(result.found.injected.values()) > 0
