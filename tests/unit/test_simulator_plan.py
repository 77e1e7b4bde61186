"""A simulation sends the wanted share of each misbehaviour, and the same again for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest

from app.dev.sandbox.webhooks import Payload
from app.dev.simulator.audit import Calls, Evidence, Expected, Stored, audit, name
from app.dev.simulator.run import Options, Plan, make
from app.dev.simulator.sender import Answer, Origin, Post, Shot

ORIGIN = Origin("11111111-1111-4111-8111-111111111111", "Venue", "Right-Secret")
ORDERS = [Payload(f"00000000-0000-4000-8000-{number:012}", f"CM-{number}", "Issued") for number in range(100)]
OPTIONS = Options(orders=100, duplicates=0.1, late=0.05, bad_secret=0.04, batch=7, rate=None, seed=1)


def made(**changed: Any) -> Plan:
    return make(msgspec.structs.replace(OPTIONS, **changed), ORDERS, ORIGIN)


def test_each_share_is_met_and_every_order_has_one_genuine_event() -> None:
    found = made()

    kinds = Counter(shot.kind for shot in found.shots)
    assert kinds == {"genuine": 100, "duplicate": 10, "forged": 4}
    assert {shot.order_id for shot in found.shots if shot.kind == "genuine"} == {order.order_id for order in ORDERS}
    assert sum(shot.kind == "genuine" for post in found.late for shot in post.shots) == 5
    assert {len(post.shots) for post in found.first} <= set(range(1, 8))
    assert sum(found.repeats.values()) == 10


@pytest.mark.parametrize("name", ["duplicates", "late", "bad_secret"])
def test_a_share_above_0_makes_at_least_one_and_0_makes_none(name: str) -> None:
    def count(share: float) -> int:
        found = made(**{"duplicates": 0.0, "late": 0.0, "bad_secret": 0.0} | {name: share})
        return len(found.shots) - 100 + sum(shot.kind == "genuine" for post in found.late for shot in post.shots)

    assert (count(0.0), count(0.0001)) == (0, 1)


def test_forged_events_have_wrong_secrets_and_one_is_alone_in_its_post() -> None:
    """Half of them name an order that is fetched by then, so that accepting one costs a countable getOrder."""
    found = made(bad_secret=0.1)

    forged = [shot for shot in found.shots if shot.kind == "forged"]
    assert ORIGIN.client_state not in {shot.event.client_state for shot in forged}
    assert len({shot.event.client_state for shot in forged}) == 5
    assert (found.first[0].forged, len(found.first[0].shots)) == (True, 1)
    assert len(found.ghosts) == 5
    late = [shot for post in found.late for shot in post.shots if shot.kind == "forged"]
    assert {shot.order_id for shot in late} <= {order.order_id for order in ORDERS}


def test_the_seed_repeats_the_plan() -> None:
    def sent(seed: int) -> list[list[tuple[str, str]]]:
        return [[(shot.kind, shot.order_id) for shot in post.shots] for post in made(seed=seed).first]

    assert sent(1) == sent(1) != sent(2)


def test_all_documented_wrappers_are_sent() -> None:
    bodies = [json.loads(post.body) for post in made(batch=2).first]
    shapes = {next((name for name in ("values", "value") if name in body), "bare") for body in bodies}

    assert shapes == {"values", "value", "bare"}


def test_the_audit_names_each_order_that_is_lost_or_recorded_twice() -> None:
    events = {
        order.order_id: ORIGIN.event(
            order.order_id, order.buy_from_order_reference, order.status, "2026-05-15T09:30:05Z"
        )
        for order in ORDERS[:3]
    }
    lost, twice, unsent = events
    post = Post(tuple(Shot("genuine", events[one]) for one in (lost, twice)), "values")
    evidence = Evidence(
        [Answer(post, "200", 0.0, 0.0, {})],
        {twice: Calls(2, 2)},
        exact=True,
        stored=dict.fromkeys(events, Stored(None, None)),
        recorded={name(events[twice]): 2},
    )

    found = audit([Expected(order_id, (event,)) for order_id, event in events.items()], evidence)

    missing = ["it has no record", "its event Issued 2026-05-15T09:30:05Z is not recorded"]
    assert found == {
        lost: ["acknowledged, but never fetched (0 getOrders without an order)", *missing],
        twice: [
            "2 getOrders for one settlement",
            "it has no record",
            "its event Issued 2026-05-15T09:30:05Z is recorded 2 times",
        ],
        unsent: ["never acknowledged: not sent", *missing],
    }
