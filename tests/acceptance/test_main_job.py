"""The main job: a webhook comes in, and moments later the order is there, fetched once."""

from __future__ import annotations

import json
import re

from app.dev.sandbox.submission import order_body
from app.dev.stack import PARTNER_ID
from tests.eventually import eventually
from tests.service import Service, ask


def test_a_settled_order_comes_home_with_wallets_tickets_coupons_and_manifest_for_one_get_order(whole: Service) -> None:
    """The whole way: createOrder, event, POST, job, getOrder, stored record, one log line, `orders show`."""
    order_id = whole.create("MAIN-1", "31001", "PKG-100")
    fetched = whole.wait_fetched(order_id)

    assert len(fetched) == 1
    line = fetched[0]
    assert (line["status"], line["wallets"], line["tickets"], line["coupons"], line["manifest"], line["revision"]) == (
        "Issued",
        2,
        2,
        1,
        True,
        1,
    )
    request = next(r for r in whole.log("web", "request") if r["request_id"] == line["request_id"])
    assert (request["status"], request["queued"]) == (200, 1)
    assert whole.row(order_id)["gets"] == 1

    code, shown = whole.cli("orders", "show", order_id)
    assert code == 0
    assert shown[0]["state"] == "fetched"
    assert shown[0]["status"] == "Issued"


def test_a_draft_and_an_error_come_home_as_what_they_are(whole: Service) -> None:
    """Draft has wallets and no manifest, Error has neither."""
    draft = whole.create("MAIN-2", "31001", payment="")
    error = whole.create("MAIN-3", "FAIL-1")
    lines = [whole.wait_fetched(one)[0] for one in (draft, error)]

    assert [(one["status"], one["tickets"], one["manifest"]) for one in lines] == [
        ("Draft", 1, False),
        ("Error", 0, False),
    ]


def test_an_order_that_is_replaced_settles_again_and_costs_one_more_get_order(whole: Service) -> None:
    """An Error order repaired by replaceOrder: same orderId, second event, second revision."""
    order_id = whole.create("MAIN-4", "FAIL-1")
    whole.wait_fetched(order_id)
    status, _ = ask(
        "PUT",
        whole.api(f"channelManager/{order_id}"),
        order_body(PARTNER_ID, "MAIN-4", payment_reference="PAY-1"),
        whole.key,
    )
    assert status == 200

    fetched = whole.wait_fetched(order_id, times=2)

    assert [(one["status"], one["revision"]) for one in fetched] == [("Error", 1), ("Issued", 2)]
    assert whole.row(order_id)["gets"] == 2


def test_the_same_event_again_never_causes_a_second_get_order(whole: Service) -> None:
    """Five more deliveries with the same timestamp are duplicates."""
    order_id = whole.create("MAIN-5", "31001")
    whole.wait_fetched(order_id)
    whole.admin("POST", "fire", {"order_id": order_id, "times": 5, "timestamp": "last"})

    eventually(
        lambda: sum(r.get("duplicates", 0) for r in whole.log("web", "request")) == 5,
        10,
        what="five duplicates",
    )
    marker = whole.create("MAIN-6", "31001")
    whole.wait_fetched(marker)
    assert whole.row(order_id)["gets"] == 1


def test_a_users_function_gets_each_revision_once_with_its_idempotency_key(bare: Service) -> None:
    """SINKS=python:... is called with the order and a context, and what it raises is tried again without a getOrder."""
    (bare.folder / "shop.py").write_text(
        "import json, pathlib\n"
        "def on_order(order, context):\n"
        f"    path = pathlib.Path({str(bare.folder / 'sink.jsonl')!r})\n"
        "    line = [context.idempotency_key, context.attempt, order.status, len(order.tickets)]\n"
        "    with path.open('a') as out: out.write(json.dumps(line) + chr(10))\n"
        "    if context.attempt == 1: raise RuntimeError(order.sell_to_name)\n"
    )
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0", SINKS="python:shop:on_order")
    bare.subscribe()
    order_id = bare.create("SINK-1", "31001")

    handed = eventually(lambda: bare.log("worker", "delivery.succeeded"), 20, what="the sink took it at the second try")

    calls = [json.loads(line) for line in (bare.folder / "sink.jsonl").read_text().splitlines()]
    key = calls[0][0]
    assert re.fullmatch(f"{bare.company_id}/{order_id}/1/[0-9a-f]{{12}}", key)
    assert calls == [[key, 1, "Issued", 1], [key, 2, "Issued", 1]]
    assert (handed[0]["order_id"], handed[0]["revision"]) == (order_id, 1)
    assert bare.row(order_id)["gets"] == 1
    assert "Jane Doe" not in (bare.folder / "worker.log").read_text()


def test_a_replay_goes_through_the_backfill_queue_and_fetches_the_order_again(whole: Service) -> None:
    """`events replay --order` owes the order another fetch; unchanged content makes no new revision."""
    order_id = whole.create("REPLAY-1", "31001")
    whole.wait_fetched(order_id)

    code, _ = whole.cli("events", "replay", "--order", order_id, "--force", "--yes")

    assert code == 0
    again = whole.wait_fetched(order_id, times=2)[1]
    assert (again["queue"], again["revision"], again["changed"]) == ("backfill", 1, False)


def test_upstream_never_has_to_answer_429_though_more_workers_than_slots_fetch_at_once(bare: Service) -> None:
    """Eight workers share five slots through Redis; every order costs one getOrder."""
    bare.admin("PATCH", "settings", {"latency_ms": 30, "queue": 0})
    bare.start("web")
    assert bare.post(*map(bare.event, bare.issue(60)))[0] == 200
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="0")

    eventually(lambda: len(bare.log("worker", "order.fetched")) == 60, 20, what="60 orders came home")

    stats = bare.admin("GET", "stats")
    assert sum(stats["throttled"].values()) == 0
    assert stats["most_active"] == 5
    assert [row["gets"] for row in bare.admin("GET", "orders")] == [1] * 60


def test_a_sink_that_cannot_be_imported_stops_the_start_with_a_clear_line(bare: Service) -> None:
    """Starting it again cannot help, so the exit code says that the settings are wrong."""
    worker = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="0", SINKS="python:no_such_shop:on_order")

    assert worker.wait(20) == 2
    assert "SINKS: number 1 cannot be imported" in bare.log("worker", "service.bad_settings")[0]["problems"][0]
