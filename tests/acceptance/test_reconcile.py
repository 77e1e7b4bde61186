"""Orders of refused events are fetched through the order list."""

from __future__ import annotations

import os
import re
import secrets
import signal

from rq.suspension import resume, suspend

from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service, ask, children


def test_a_wrong_client_state_in_the_settings_costs_no_order(bare: Service) -> None:
    """A mistake in a rotation: the event is answered 401 and not stored, and its order is fetched seconds later."""
    bare.start("web", CLIENT_STATE=secrets.token_hex(16))
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    bare.subscribe()

    order_id = bare.create("ROTATED-1", "31001")

    bare.wait_fetched(order_id, within=10)
    assert [line["status"] for line in bare.log("web", "request")] == [401]
    assert bare.cli("events", "list")[1] == []
    (alert,) = bare.log("web", "auth.alert")
    assert (alert["company"], alert["items"], alert["level"]) == (bare.company_id, 1, "error")
    assert "ota-receiver check" in alert["advice"]
    (ran,) = bare.log("worker", "reconcile.finished")
    assert (ran["cause"], ran["outcome"], ran["queued"]) == ("rejected_events", "complete", 1)


def test_a_flood_of_forged_events_causes_one_reconcile_and_one_alert(bare: Service) -> None:
    """Guessed secrets cause at most one call upstream in five minutes, those of an unknown company none."""
    bare.start("web", OPS_TOKEN="ops")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    unknown = "99999999-9999-4999-8999-999999999999"
    assert bare.post(bare.event(secrets.token_hex(16), companyId=unknown))[0] == 401
    eventually(lambda: bare.log("web", "request"), what="the refusal is logged")
    assert bare.log("web", "auth.alert") == []
    forged = bare.event(secrets.token_hex(16), clientState="guessed")
    statuses = {bare.post(forged)[0] for _ in range(500)}
    eventually(lambda: bare.log("worker", "reconcile.finished"), 10, what="the list is read")
    statuses |= {bare.post(forged)[0] for _ in range(500)}

    assert statuses == {401}
    eventually(lambda: _rejected(bare) == 1000, what="all are counted")
    assert len(bare.log("worker", "reconcile.finished")) == 1
    assert len(bare.log("web", "auth.alert")) == 1
    assert bare.admin("GET", "stats")["operations"]["listOrdersByPartner"] == {"200": 1}


def test_a_hanging_order_list_delays_neither_fetches_nor_the_stop_of_the_pool(bare: Service) -> None:
    """A separate process reads the list, and a stopping pool does not wait for it."""
    bare.start("web")
    pool = bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    bare.subscribe()
    bare.admin("POST", "faults", {"kind": "hang", "operation": "listOrdersByPartner", "seconds": 60})
    assert bare.post(bare.event(secrets.token_hex(16), clientState="old"))[0] == 401
    eventually(lambda: bare.admin("GET", "stats")["active"] == 1, 10, what="the list hangs")
    assert len(children(pool.pid)) == 3

    order_id = bare.create("MEANWHILE-1", "31001")
    bare.wait_fetched(order_id)
    assert bare.cli("health", "--role", "worker")[0] == 0
    os.kill(pool.pid, signal.SIGTERM)

    assert pool.wait(15) == 0
    assert bare.log("worker", "reconcile.failed") == []


def test_an_order_that_no_dispatcher_sees_is_told_and_fetched(bare: Service) -> None:
    """Its record says that it is pending; in `due` it is not, and its job is lost."""
    bare.start("web")
    bare.subscribe()
    order_id = bare.create("LOST-1", "31001")
    with Redis.from_url(bare.valkey.url) as redis:
        eventually(lambda: redis.zcard(KEYS.due) == 1, 10, what="the event is recorded")
        code, (found,) = bare.cli("orders", "explain", order_id)
        assert (code, "no worker pool runs" in found["next"]) == (1, True)
        redis.delete(KEYS.due, "rq:queue:ota-live")

        code, (found,) = bare.cli("orders", "explain", order_id)
        listed = bare.cli("reconcile")
        applied = bare.cli("reconcile", "--apply", "--yes")[0]

        assert (code, found["complete"], "no dispatcher sees it" in found["next"]) == (1, False, True)
        assert (listed[0], [one["kind"] for one in listed[1]], applied) == (1, ["unscheduled"], 0)
        suspend(redis)
        bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
        assert "RQ is suspended" in bare.cli("orders", "explain", order_id)[1][0]["next"]
        assert (bare.cli("status")[0], bare.fetched(order_id)) == (1, [])
        resume(redis)
    bare.wait_fetched(order_id, within=10)
    assert bare.log("worker", "dispatcher.orders_found") == []
    assert bare.cli("orders", "explain", order_id)[0] == 0


def _rejected(bare: Service) -> int:
    code, text = ask("GET", f"{bare.web_url}/metrics", headers={"authorization": "Bearer ops"})
    assert code == 200
    found = re.search(r'^ota_items_rejected_total\{company="default"\} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0
