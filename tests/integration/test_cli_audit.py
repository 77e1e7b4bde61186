"""`audit`: each change by hand is noted before it is made, with its author, time, reason and orders."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis import Redis

from app.ledger.keys import AUDIT
from tests.integration.desk import VENUE, Desk, open_desk, order


@pytest.fixture
def desk(redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    found = open_desk(redis_client, redis_url, tmp_path)
    found.env["USER"] = "ann"
    return found


def test_each_change_by_hand_is_noted_with_its_author_and_selection(desk: Desk) -> None:
    dead = [order(number) for number in range(4)]
    desk.hear(*dead)
    for one in dead:
        desk.give_up(one)
    expected = desk.folder / "expected.csv"
    expected.write_text(f"orderId\n{order(9).order_id}\n")

    ended = desk.run_each(
        [
            ("dead", "requeue", dead[0].order_id, "--yes"),
            ("dead", "drop", dead[1].order_id, dead[2].order_id, "--yes"),
            ("dead", "requeue", "--reason", "order_missing", "--company", "venue", "--yes"),
            ("orders", "refetch", dead[1].order_id, "--who", "ann@desk", "--why", "ticket 77"),
            ("reconcile", "--from-file", str(expected), "--company", "venue", "--apply", "--yes"),
            # Upstream cannot be reached. The change is noted although it was not made.
            ("orders", "confirm", dead[1].order_id, "--payment-reference", "canary-pay", "--yes"),
            ("audit", "--json"),
            ("audit", "--what", "requeue", "--limit", "1"),
            ("audit", "--what", "erase"),
        ],
    )

    noted = [(one["what"], one["selected"].partition(" until=")[0], one["orders"]) for one in ended[-3].objects]
    assert noted == [
        ("order-confirm", dead[1].member, 1),
        ("reconcile", order(9).member, 1),
        ("refetch", dead[1].member, 1),
        ("requeue", f"company={VENUE} reason=order_missing", 1),
        ("drop", "2 orders", 2),
        ("requeue", dead[0].member, 1),
    ]
    assert [one["why"] for one in ended[-3].objects if one["what"] == "refetch"] == ["ticket 77"]
    assert {one["who"].partition("@")[0] for one in ended[-3].objects} == {"ann"}
    assert "canary-pay" not in ended[-3].out
    assert (ended[-2].code, ended[-2].out.count("order_missing"), ended[-2].out.count("ann@")) == (0, 1, 1)
    assert (ended[-1].code, ended[-1].err) == (0, "The audit is empty.\n")


def test_dry_runs_and_refused_changes_are_not_noted(desk: Desk) -> None:
    desk.hear(order(1))
    desk.give_up(order(1))

    ended = desk.run_each(
        [
            ("dead", "requeue", "--all", "--dry-run"),
            ("dead", "drop", "--all"),
            ("orders", "refetch", order(2).order_id),
            ("orders", "cancel", order(1).order_id),
        ],
    )

    assert [one.code for one in ended] == [0, 2, 1, 2]
    assert desk.redis.exists(AUDIT) == 0


def test_of_an_erased_order_the_audit_keeps_only_the_erasure(desk: Desk) -> None:
    desk.hear(order(1))

    desk.run_each([("orders", "refetch", order(1).order_id), ("orders", "erase", order(1).order_id, "--yes")])

    assert [one["what"] for one in desk.run("audit", "--json").objects] == ["erase"]
