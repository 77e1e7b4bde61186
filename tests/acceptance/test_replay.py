"""A replay with real workers: through the backfill queue, and to the sinks without a getOrder."""

from __future__ import annotations

from tests.eventually import eventually
from tests.service import Service


def test_a_replay_to_sinks_costs_no_get_order_and_each_replay_uses_the_backfill_queue(bare: Service) -> None:
    """The sink gets the same idempotency key again."""
    calls = bare.folder / "calls"
    (bare.folder / "shop.py").write_text(
        "def on_order(order, context):\n"
        f"    with open({str(calls)!r}, 'a') as out: out.write(context.idempotency_key + chr(10))\n"
    )
    bare.variables["SINKS"] = "python:shop:on_order"
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    orders = bare.issue(3)
    assert bare.post(*(bare.event(one) for one in orders))[0] == 200
    eventually(lambda: len(bare.log("worker", "delivery.succeeded")) == 3, 20, what="three orders are delivered")
    once = sorted(calls.read_text().splitlines())

    code, (sent,) = bare.cli("events", "replay", "--since", "1h", "--to-sinks", "--rate", "100", "--yes", "--json")
    eventually(lambda: len(bare.log("worker", "delivery.succeeded")) == 6, 20, what="three orders are delivered again")

    assert (code, sent["queued"]) == (0, 3)
    assert sorted(calls.read_text().splitlines()) == sorted(once * 2)
    assert [bare.row(one)["gets"] for one in orders] == [1, 1, 1]
    assert all("-backfill-" in line["worker"] for line in bare.log("worker", "delivery.succeeded")[3:])

    code, (fetched,) = bare.cli("events", "replay", "--since", "1h", "--force", "--rate", "100", "--yes", "--json")
    eventually(lambda: len(bare.log("worker", "order.fetched")) == 6, 20, what="three orders are fetched again")

    assert (code, fetched["queued"]) == (0, 3)
    assert [line["queue"] for line in bare.log("worker", "order.fetched")] == ["live"] * 3 + ["backfill"] * 3
    assert len(bare.log("worker", "delivery.succeeded")) == 6
