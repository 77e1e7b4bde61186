"""The chaos run with its targets; the short form takes most of a minute."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import plan as plans
from tests.chaos.run import LONG, SHORT, Size, run
from tests.chaos.sinks import Content, Sink, Taken
from tests.service import service

SEED = 1
FIRST = Taken(0, "A", 1, "one", ("TK-1",), "as first sent")
SECOND = Taken(0, "A", 2, "two", ("TK-2",), "as sent later")


def test_a_seed_repeats_its_plan_and_every_part_is_killed_and_valkey_frozen() -> None:
    plan = SHORT.plan(SEED)

    assert plan == SHORT.plan(SEED)
    assert plan != SHORT.plan(SEED + 1)
    done = Counter(kill.kind for kill in plan.kills)
    assert set(done) == {*plans.KILL_KINDS, "freeze"}
    assert sum(done[kind] for kind in plans.KILL_KINDS) == SHORT.kills >= 12
    assert plan.events == SHORT.events
    assert {len(events) for events in plan.settlements.values()} == {1, 2}


@pytest.mark.parametrize(
    ("requests", "problem"),
    [
        ((FIRST, FIRST, SECOND, SECOND), ""),
        ((SECOND,), ""),
        ((FIRST, FIRST), "shop never got the latest content of A"),
        ((), "shop never got the latest content of A"),
        ((FIRST, SECOND, FIRST), "shop got A out of order: [1, 2, 1]"),
        ((FIRST, replace(SECOND, revision=1)), "shop got one revision of A with different keys or contents"),
        ((SECOND, replace(SECOND, body_digest="other")), "shop got one revision of A with different keys or contents"),
        ((replace(SECOND, tickets=("TK-1",)), SECOND), "shop got content of A that upstream never had"),
        ((SECOND, replace(SECOND, order_id="B")), "shop got content of B that upstream never had"),
    ],
)
def test_what_a_sink_got_is_compared_with_what_upstream_had(requests: tuple[Taken, ...], problem: str) -> None:
    upstream = {"A": [Content("one", ("TK-1",)), Content("two", ("TK-2",))]}
    # The list is in the order of reading, which may differ from that of the connections.
    taken = [replace(one, number=number) for number, one in enumerate(requests)][::-1]

    assert problem in {"", *Sink("shop", taken).problems(upstream)}
    assert bool(problem) == bool([*Sink("shop", taken).problems(upstream)])


@pytest.mark.parametrize("size", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)], ids=["short", "long"])
def test_no_event_is_lost_and_no_get_order_wasted_while_everything_is_killed(tmp_path: Path, size: Size) -> None:
    """Web, workers, the pool and Valkey die by SIGKILL, Valkey freezes, the Channel Manager and two sinks fail.

    All is fetched and delivered.
    """
    with service(tmp_path) as one:
        result = run(one, size.plan(SEED), size)

    assert all(result.targets.values()), result
