"""The rights that a Redis user needs: those of the list suffice, and all of them are used."""

from __future__ import annotations

import re
import sys
from functools import partial
from typing import Any, Final

import pytest

from app.ledger.redis import Redis
from app.ledger.rights import NEEDED, OPTIONAL, RQ_KEYS, acl_name
from tests.eventually import eventually
from tests.service import OPS_TOKEN, VISITOR, Service, ask

LISTED: Final = {acl_name(command): who for who, commands in NEEDED.items() for command in commands}


def become(bare: Service, admin: Any, *rules: str) -> None:
    """Give the service a Redis user with these rules."""
    admin.execute_command("ACL", "SETUSER", "ota", "reset", "on", ">secret", *rules)
    bare.variables["REDIS_URL"] = f"redis://ota:secret@127.0.0.1:{bare.valkey.port}/0"


def denied(redis: Any) -> set[tuple[str, ...]]:
    return {(one["object"], one["context"], one["reason"]) for one in redis.acl_log()}


@pytest.mark.parametrize("prefix", [pytest.param("ota", marks=pytest.mark.nightly), "shop-2"])
def test_the_whole_service_runs_with_the_rights_of_the_list_and_uses_all_of_them(bare: Service, prefix: str) -> None:
    """No key has the default prefix where there is another."""
    bare.variables |= {"KEY_PREFIX": prefix, "OPS_TOKEN": "to-read-only", "OPS_ACT_TOKEN": OPS_TOKEN}
    (bare.folder / "shop.py").write_text(
        "def on_order(order, context):\n    if context.attempt == 1: raise RuntimeError\n"
    )
    bare.variables |= {"SINKS": "python:shop:on_order", "RECONCILE_EVERY": "60", "UPSTREAM_CONCURRENCY": "1"}
    with Redis.from_url(bare.variables["REDIS_URL"]) as admin:
        redis: Any = admin
        redis.execute_command("ACL", "LOG", "RESET")
        redis.config_resetstat()
        commands = (f"+{one}" for one in (*LISTED, *OPTIONAL))
        become(bare, redis, f"~{prefix}:*", *(f"~{pattern}" for pattern in RQ_KEYS), "-@all", *commands)
        bare.start("web")
        bare.start("api")
        bare.start("ops")
        pool = bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1")
        bare.run([sys.executable, "-m", "app.cli", "events", "tail"], "tail.log")
        # One permit and two workers: one of them waits for it.
        bare.admin("POST", "faults", {"kind": "latency", "operation": "getOrder", "calls": 6, "seconds": 0.1})
        order_ids = bare.issue(6)
        assert bare.post(*map(bare.event, order_ids))[1]["queued"] == 6
        delivered = partial(bare.log, "worker", "delivery.succeeded")
        eventually(lambda: denied(redis) or len(delivered()) == 6, 20, what="all are delivered")
        assert denied(redis) == set()

        for arguments in (
            ["check"],
            ["status"],
            ["health", "--role", "worker", "--ready"],
            ["orders", "list"],
            ["orders", "explain", order_ids[0][:13]],
            ["orders", "refetch", order_ids[0]],
            ["events", "list"],
            ["events", "replay", "--since", "1h", "--force", "--rate", "100", "--yes"],
            ["replays", "list"],
            ["dead", "list"],
            ["reconcile"],
            ["audit"],
            ["keys", "create", "--name", "desk", "--scope", "feed", "--scope", "orders:read", "--from-now"],
            *[["orders", "erase", order_ids[1], "--why", "asked", "--yes"]] * 2,
        ):
            code, out = bare.cli(*arguments)[:2]
            assert code in (0, 1), (arguments, code, out)
            assert not re.search("NOPERM|may not:", str(out))
        key = bare.cli("keys", "create", "--name", "desk", "--scope", "feed", "--scope", "orders:read")[1][0]["key"]
        api, caller = f"http://127.0.0.1:{bare.variables['API_PORT']}", {"authorization": f"Bearer {key}"}
        for path in (
            "orders?reference=x",
            "orders",
            f"orders/{order_ids[0]}",
            f"orders/{order_ids[0]}/history",
            "feed",
        ):
            assert ask("GET", f"{api}/{path}", headers=caller)[0] == 200
        ops = f"http://127.0.0.1:{bare.variables['OPS_PORT']}"
        for path in ("", "healthz", "events", "orders", "dead", "replays", "audit"):
            assert ask("GET", f"{ops}/{path}", headers=VISITOR)[0] == 200
        redis.zadd(f"{prefix}:dead", {f"{bare.company_id}:{order_ids[2]}": 1})
        form = {"content-type": "application/x-www-form-urlencoded", "origin": ops}
        assert ask("POST", f"{ops}/dead/plan", b"plan=abcdef&until=2100-01-01&why=x", VISITOR | form)[0] == 200
        assert ask("POST", f"{api}/feed/ack", {"cursor": "MA"}, caller)[0] == 200
        for path in (f"orders/{order_ids[0]}", f"search?q={order_ids[0][:13]}&all=1"):
            assert ask("GET", f"{ops}/{path}", headers=VISITOR)[0] == 200
        pool.kill()
        pool = bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
        eventually(lambda: bare.log("worker", "pool.recovered"), 10, what="the dead pool is found")
        late = {"cmdstat_lmove", "cmdstat_xread", "cmdstat_rename"}
        what = "both queues and the events are read, and the plan of the ops page is made"
        eventually(lambda: late <= redis.info("commandstats").keys(), 10, what=what)
        assert pool.stop(20) == 0

        assert denied(redis) == set()
        used = {one.removeprefix("cmdstat_") for one in redis.info("commandstats")}
        assert {*LISTED} - used == set(), "listed, but never used"
        assert {name.split(b":")[0] for name in redis.scan_iter()} == {prefix.encode(), b"rq"}
