"""Invariant 8: secrets and personal data are in the stored orders and nowhere else."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator

import pytest

from app.ledger.content import unpack
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab_upstream import Upstream, fake_upstream, says
from tests.service import OPS_TOKEN, VISITOR, Service, ask

PEOPLE = ("guest@example.com", "Jane Doe")

SINKS = """
[sinks.hook]
kind = "https"
url = "{hook}/canary-path?token=canary-of-the-hook"
allow_private = true
secret = "whsec_{secret}"
headers_file = "headers"

[sinks.warehouse]
kind = "sql"
url = "postgresql+psycopg://canary-user:canary-password@127.0.0.1:1/canary-database"

[sinks.stream]
kind = "redis-stream"
url = "redis://canary-user:canary-password@127.0.0.1:{redis}/0"
"""

FAILURES = {
    "python:shop:on_order": "RuntimeError",
    "hook": "HTTP 422",
    "warehouse": "cannot connect: OperationalError",
    "stream": "Redis WRONGPASS",
}


@pytest.fixture
def hook() -> Iterator[Upstream]:
    with fake_upstream() as server:
        yield server


def _failures(bare: Service) -> dict[str, str]:
    """Return the latest failure of each sink."""
    return {line["sink"]: line["error"] for line in bare.log("worker", "delivery.failed")}


def test_no_secret_and_no_personal_data_is_in_logs_redis_or_its_file(bare: Service, hook: Upstream) -> None:
    """Runs with marked secrets, names, e-mails and tickets and with failures, then searches everywhere."""
    (bare.folder / "shop.py").write_text(
        "def on_order(order, context):\n    raise RuntimeError(repr(order), order.sell_to_name, order.sell_to_email)\n"
    )
    hook.will(says(422, b"canary-answer", location="https://canary-location"))
    (bare.folder / "headers").write_text("Authorization: Basic canary-authorization")
    secret = b64encode(b"canary-secret-of-the-hook").decode()
    declared = SINKS.format(hook=hook.url, secret=secret, redis=bare.valkey.port)
    (bare.folder / "sinks.toml").write_text(declared)
    bare.variables |= {"SINKS": "python:shop:on_order", "SINKS_FILE": str(bare.folder / "sinks.toml")}
    bare.variables["CLIENT_STATE_PREVIOUS"] = "canary-previous-client-state"
    bare.variables["OPS_TOKEN"] = OPS_TOKEN
    bare.start("web")
    bare.start("api")
    bare.start("ops")
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1", SINK_WORKERS="1")
    bare.subscribe()
    wrong = "canary-wrong-client-state"
    order_id = bare.create("CANARY-1", "31001", "PKG-100")
    eventually(lambda: _failures(bare).keys() == FAILURES.keys(), 15, what="each sink failed")
    assert _failures(bare) == FAILURES
    key = bare.cli("keys", "create", "--name", "desk", "--scope", "feed", "--scope", "orders:read")[1][0]["key"]
    api, caller = f"http://127.0.0.1:{bare.variables['API_PORT']}", {"authorization": f"Bearer {key}"}
    for query in (f"orders/{order_id}", f"orders/{order_id}/history", "orders?reference=canary-reference", "feed"):
        assert ask("GET", f"{api}/{query}", headers=caller)[0] == 200
    assert ask("GET", f"{api}/canary-path?canary-query", headers=caller)[0] == 404
    page = f"http://127.0.0.1:{bare.variables['OPS_PORT']}"
    for query in ("", f"orders/{order_id}", "search?q=canary-guest", "canary-path", "?canary-query=1"):
        assert ask("GET", f"{page}/{query}", headers=VISITOR)[0] in {200, 400, 404}
    shown = [bare.cli(*one.split()) for one in ("check", "status", "keys list", "audit", "sinks migrate warehouse")]
    (bare.folder / "shown.log").write_text(repr(shown))
    missing = bare.event("00000000-0000-4000-8000-000000000001", clientState="canary-previous-client-state")
    assert bare.post(missing, bare.event(order_id, clientState=wrong))[0] == 200
    assert bare.post(bare.event(order_id, clientState=wrong))[0] == 401
    assert ask("POST", f"{bare.webhook}?validationToken=canary-token", b"canary-body")[0] == 400
    bare.admin("POST", "faults", {"kind": "rubbish", "operation": "getOrder", "calls": 1})
    bare.admin("POST", "faults", {"kind": "status", "operation": "getOrder", "status": 400, "calls": 1})
    again = bare.create("CANARY-2", "31001")
    eventually(lambda: bare.log("worker", "fetch.retry_scheduled"), 15, what="a fetch failed")
    eventually(lambda: again in [line.get("order_id") for line in bare.log("worker")], 15, what="its event came")
    assert bare.cli("orders", "refetch", again)[0] == 0
    bare.wait_fetched(again)

    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        contents = [unpack(redis.get(key)) for key in redis.scan_iter("ota:content:*")]
    orders = [json.loads(content) for content in contents]
    tickets = [a["referenceNumber"] for o in orders for i in o["items"] for w in i["wallets"] for a in w["assets"]]
    assert len(tickets) == 4
    secrets = [bare.variables["CLIENT_STATE"], bare.variables["NP_API_KEY"], wrong]
    secrets += [bare.variables["CLIENT_STATE_PREVIOUS"], bare.variables["OPS_TOKEN"], "canary-token", "canary-body"]
    secrets += ["canary-", secret, key, key.rpartition("_")[2]]

    # The append-only file has every value that was ever written to Redis; contents are compressed.
    logs = [bare.folder / f"{name}.log" for name in ("web", "worker", "api", "ops", "cli", "shown")]
    files = list(bare.valkey.data_dir.rglob("*.aof"))
    assert any(order_id.encode() in path.read_bytes() for path in files)
    for path in (*logs, *files):
        text = path.read_bytes() if path.exists() else b""
        assert [one for one in (*secrets, *PEOPLE, *tickets) if one.encode() in text] == [], path.name
