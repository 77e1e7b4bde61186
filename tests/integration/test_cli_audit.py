"""`audit`: each change by hand is noted before it is made, with its author, time, reason and orders."""

from __future__ import annotations

import pytest

from app.ledger.keys import AUDIT
from tests.lab import VENUE, Lab, order


@pytest.fixture
def lab(lab: Lab) -> Lab:
    lab.env["USER"] = "ann"
    return lab


def test_each_change_by_hand_is_noted_with_its_author_and_selection(lab: Lab) -> None:
    dead = [order(number) for number in range(4)]
    lab.accept(*dead)
    for one in dead:
        lab.dead_letter(one)
    expected = lab.folder / "expected.csv"
    expected.write_text(f"orderId\n{order(9).order_id}\n")

    ended = lab.run_commands(
        [
            ("dead", "requeue", dead[0].order_id, "--yes"),
            ("dead", "drop", dead[1].order_id, dead[2].order_id, "--yes"),
            ("dead", "requeue", "--reason", "order_missing", "--company", "venue", "--yes"),
            ("orders", "refetch", dead[1].order_id, "--who", "ann@host", "--why", "ticket 77"),
            ("reconcile", "--from-file", str(expected), "--company", "venue", "--apply", "--yes"),
            ("orders", "confirm", dead[1].order_id, "--payment-reference", "canary-pay", "--yes"),
            ("audit", "--json"),
            ("audit", "--what", "requeue", "--limit", "1"),
            ("audit", "--what", "erase"),
        ]
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


def test_dry_runs_and_refused_changes_are_not_noted(lab: Lab) -> None:
    lab.accept(order(1))
    lab.dead_letter(order(1))

    ended = lab.run_commands(
        [
            ("dead", "requeue", "--all", "--dry-run"),
            ("dead", "drop", "--all"),
            ("orders", "refetch", order(2).order_id),
            ("orders", "cancel", order(1).order_id),
        ]
    )

    assert [one.code for one in ended] == [0, 2, 1, 2]
    assert lab.redis.exists(AUDIT) == 0


def test_of_an_erased_order_the_audit_keeps_only_the_erasure(lab: Lab) -> None:
    lab.accept(order(1))

    lab.run_commands([("orders", "refetch", order(1).order_id), ("orders", "erase", order(1).order_id, "--yes")])

    assert [one["what"] for one in lab.run_command("audit", "--json").objects] == ["erase"]
