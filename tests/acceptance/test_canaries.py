"""Invariant 8: secrets and people's data are in the stored order, and nowhere else."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from redis import Redis

from tests.eventually import eventually
from tests.service import Service, ask

PEOPLE = ("guest@example.com", "Jane Doe")


def test_no_secret_and_nothing_about_people_is_in_logs_redis_aof_job_hashes_or_dead_letters(bare: Service) -> None:
    """A run with marked secrets, names, e-mails and tickets, with failures of every kind, then a search everywhere."""
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
        kept = {key: _everything(redis, key) for key in redis.scan_iter("*") if not key.startswith(b"ota:content:")}
    orders = [json.loads(zlib.decompress(content)) for content in contents if isinstance(content, bytes)]
    tickets = [a["referenceNumber"] for o in orders for i in o["items"] for w in i["wallets"] for a in w["assets"]]
    assert len(tickets) == 4
    secrets = [bare.variables["CLIENT_STATE"], bare.variables["NP_API_KEY"], wrong]
    secrets += [bare.variables["CLIENT_STATE_PREVIOUS"], bare.variables["OPS_TOKEN"], "canary-token", "canary-body"]
    canaries = [one.encode() for one in (*secrets, *PEOPLE, *tickets)]

    for log in ("web.log", "worker.log", "cli.log"):
        _assert_clean(log, _read(bare.folder / log), canaries)
    for key, value in kept.items():
        _assert_clean(key.decode(), key + value, canaries)
    for path in bare.valkey.data_dir.rglob("*.aof"):
        _assert_clean(path.name, path.read_bytes(), canaries)


def _assert_clean(where: str, text: bytes, canaries: list[bytes]) -> None:
    found = [canary for canary in canaries if canary in text]
    assert not found, f"{found} in {where}"


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _everything(redis: Redis, key: bytes) -> bytes:
    """Return all that a key holds, whatever its type."""
    kind = redis.type(key)
    if kind == b"hash":
        return repr(redis.hgetall(key)).encode()
    if kind == b"list":
        return repr(redis.lrange(key, 0, -1)).encode()
    if kind == b"zset":
        return repr(redis.zrange(key, 0, -1)).encode()
    if kind == b"set":
        return repr(redis.smembers(key)).encode()
    if kind == b"stream":
        return repr(redis.xrange(key)).encode()
    return repr(redis.get(key)).encode()
