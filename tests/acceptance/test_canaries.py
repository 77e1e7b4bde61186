"""Invariant 8: secrets and personal data are in the stored orders and nowhere else."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from redis import Redis

from tests.eventually import eventually
from tests.service import Service, ask

PEOPLE = ("guest@example.com", "Jane Doe")


def test_no_secret_and_no_personal_data_is_in_logs_redis_or_its_file(bare: Service) -> None:
    """Runs with marked secrets, names, e-mails and tickets and with failures, then searches everywhere."""
    (bare.folder / "shop.py").write_text(
        "def on_order(order, context):\n    raise RuntimeError(repr(order), order.raw)\n"
    )
    bare.variables["CLIENT_STATE_PREVIOUS"] = "canary-previous-client-state"
    bare.variables["OPS_TOKEN"] = "canary-ops-token"
    bare.start("web")
    bare.start("worker", WORKERS="2", BACKFILL_WORKERS="1", SINKS="python:shop:on_order")
    bare.subscribe()
    wrong = "canary-wrong-client-state"
    order_id = bare.create("CANARY-1", "31001", "PKG-100")
    eventually(lambda: bare.log("worker", "delivery.failed"), 15, what="the sink failed")
    missing = bare.event("00000000-0000-4000-8000-000000000001", clientState="canary-previous-client-state")
    assert bare.post(missing, bare.event(order_id, clientState=wrong))[0] == 200
    assert bare.post(bare.event(order_id, clientState=wrong))[0] == 401
    assert ask("POST", f"{bare.webhook}?validationToken=canary-token", b"canary-body")[0] == 400
    bare.admin("POST", "faults", {"kind": "rubbish", "operation": "getOrder", "calls": 1})
    bare.admin("POST", "faults", {"kind": "status", "operation": "getOrder", "status": 400, "calls": 1})
    again = bare.create("CANARY-2", "31001")
    bare.wait_fetched(again, within=30)
    eventually(lambda: bare.log("worker", "fetch.retry_scheduled"), 15, what="a fetch failed")

    with Redis.from_url(bare.variables["REDIS_URL"]) as redis:
        contents = [redis.get(key) for key in redis.scan_iter("ota:content:*")]
        other = {key: _everything(redis, key) for key in redis.scan_iter("*") if not key.startswith(b"ota:content:")}
    orders = [json.loads(zlib.decompress(content)) for content in contents if isinstance(content, bytes)]
    tickets = [a["referenceNumber"] for o in orders for i in o["items"] for w in i["wallets"] for a in w["assets"]]
    assert len(tickets) == 4
    secrets = [bare.variables["CLIENT_STATE"], bare.variables["NP_API_KEY"], wrong]
    secrets += [bare.variables["CLIENT_STATE_PREVIOUS"], bare.variables["OPS_TOKEN"], "canary-token", "canary-body"]
    canaries = [one.encode() for one in (*secrets, *PEOPLE, *tickets)]

    for log in ("web.log", "worker.log", "cli.log"):
        _assert_clean(log, _read(bare.folder / log), canaries)
    for key, value in other.items():
        _assert_clean(key.decode(), key + value, canaries)
    for path in bare.valkey.data_dir.rglob("*.aof"):
        _assert_clean(path.name, path.read_bytes(), canaries)


def _assert_clean(where: str, text: bytes, canaries: list[bytes]) -> None:
    found = [canary for canary in canaries if canary in text]
    assert not found, f"{found} in {where}"


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _everything(redis: Redis, key: bytes) -> bytes:
    """Return the value of a key of any type."""
    readers: dict[Any, Any] = {
        b"hash": redis.hgetall,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"zset": lambda key: redis.zrange(key, 0, -1),
        b"set": redis.smembers,
        b"stream": redis.xrange,
        b"string": redis.get,
    }
    return repr(readers[redis.type(key)](key)).encode()
