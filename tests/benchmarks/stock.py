"""Fills a Redis with many orders through the real scripts: 3 companies, 90 days, most fetched, some pending or dead.

The id of a stream entry is the event's time instead of the server's, so that 90 days are written in minutes.
`assert_same` writes one order of each kind in both ways and compares every key.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace
from redis import Redis

from app import bootstrap
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Inbox
from app.ledger import keys, policy
from app.ledger.ledger import LATENCY_BOUNDS, Ledger
from app.ledger.redis import packed, source
from app.ledger.rq_jobs import LIVE, JobTemplate, queue_key
from app.ledger.work import Content
from app.upstream.decode import digest
from app.upstream.models import parse_order

COMPANIES: Final = tuple(f"{number}1111111-1111-4111-8111-111111111111" for number in (1, 2, 3))
DAYS: Final = 90
ORDER_DAYS: Final = 400
DEDUP_DAYS: Final = 7
AT_ONCE: Final = 200
LEASE: Final = 60_000
VARIANTS: Final = 50
"""Different contents, with their own GUIDs and numbers: compressed they are as large as those of real orders."""

_WORKER: Final = "host-1-live-1"
_FIXTURE: Final = Path(__file__).parents[1] / "fixtures" / "order-issued.json"

Kind = Literal["fetched", "pending", "deferred", "dead"]


@dataclass(frozen=True)
class One:
    """An order and its event."""

    number: int
    order: OrderKey
    at: int
    kind: Kind

    @property
    def is_second(self) -> bool:
        return self.number % 50 == 49


@dataclass(frozen=True)
class Plan:
    """`count` events that end at `now` (ms)."""

    count: int
    now: int

    @property
    def young(self) -> int:
        """Return the time in ms after which an event is remembered."""
        return self.now - DEDUP_DAYS * policy.DAY

    def one(self, number: int) -> One:
        # Every fiftieth event is the second one of the order before.
        own = number - (number % 50 == 49)
        step = DAYS * policy.DAY - policy.MINUTE
        at = self.now - step + step * number // self.count
        order = OrderKey(COMPANIES[own // 50 % 3], f"{own:08x}-0000-4000-8000-{own:012}")
        return One(number, order, at, self._kind(own))

    def all(self) -> Iterator[One]:
        return map(self.one, range(self.count))

    @staticmethod
    def _kind(own: int) -> Kind:
        kinds: dict[int, Kind] = {7: "pending", 57: "deferred", 107: "dead"}
        return kinds.get(own % 200, "fetched")


def reference(one: One) -> str:
    return f"CM-{one.order.order_id[:8].upper()}"


def own_reference(one: One) -> str:
    return f"SHOP-{int(one.order.order_id[:8], 16):09}"


def contents() -> list[Content]:
    """Return answers of getOrder that differ as real orders do."""
    sample = _FIXTURE.read_text(encoding="utf-8")
    found = []
    for variant in range(VARIANTS):
        tree = json.loads(sample)
        for item in tree["items"]:
            for wallet in item["wallets"]:
                for part in (wallet, *wallet["assets"]):
                    for name, value in part.items():
                        if isinstance(value, str) and (name.lower().endswith("id") or "Number" in name):
                            part[name] = _scrambled(f"{variant} {name} {value}", value)
        raw = json.dumps(tree).encode()
        order = parse_order(raw)
        found.append(
            Content(
                raw=raw,
                digest=digest(raw),
                status=order.status,
                wallets=len(order.wallets),
                tickets=len(order.tickets),
                coupons=len(order.coupons),
                manifest=True,
                http_status=200,
                duration_ms=240,
            )
        )
    return found


def fill(redis: Redis, plan: Plan) -> Iterator[int]:
    """Write all orders; yield the number of written events after each call. Pending orders have their job in `live`."""
    stock = _Stock(redis, plan)
    left = plan.all()
    done = 0
    while chunk := list(islice(left, AT_ONCE)):
        stock.write(chunk)
        done += len(chunk)
        yield done
    stock.queue_pending()


class _Stock:
    def __init__(self, redis: Redis, plan: Plan) -> None:
        self._redis = redis
        self._plan = plan
        self._template = JobTemplate()
        self._contents = [(zlib.compress(one.raw), one) for one in contents()]
        accept = source("accept")
        assert accept.count("events, '*'") == 1
        self._accept = redis.register_script(accept.replace("events, '*'", "events, now .. '-*'"))
        self._script = {name: redis.script_load(source(name)) for name in ("start_fetch", "store_fetch", "fail_fetch")}
        self._waiting: list[str] = []

    def write(self, chunk: list[One]) -> None:
        self._record(chunk)
        self._fetch([one for one in chunk if not one.is_second])

    def queue_pending(self) -> None:
        """Push the jobs of pending orders to `live` again; all jobs were removed as workers do it."""
        for start in range(0, len(self._waiting), 1000):
            self._redis.rpush(queue_key(LIVE), *self._waiting[start : start + 1000])

    def _record(self, chunk: list[One]) -> None:
        """Record the events as the web process does; events older than DEDUP_DAYS leave no duplicate mark."""
        header = packed(
            now=chunk[-1].at,
            grace=policy.GRACE,
            dedup=DEDUP_DAYS * policy.DAY,
            kept=DAYS * policy.DAY,
            job=self._template.fields(),
        )
        arguments: list[Any] = [header]
        for one in chunk:
            arguments += [_digest(one, self._plan.young), *one.order, "Issued", reference(one), "current"]
            arguments += [f"{one.number:032x}", f"2026-06-01T08:15:02.{one.number % 1000:03}Z", one.at]
        self._accept(args=arguments)

    def _fetch(self, chunk: list[One]) -> None:
        jobs = [f"f-{one.order.company_id}-{one.order.order_id}-1" for one in chunk]
        self._waiting += [job for job, one in zip(jobs, chunk, strict=True) if one.kind == "pending"]
        taken = [f"rq:job:{job}" for job, one in zip(jobs, chunk, strict=True) if one.kind != "pending"]
        self._redis.delete(queue_key(LIVE), *taken)
        with self._redis.pipeline(transaction=False) as pipe:
            for one in (one for one in chunk if one.kind != "pending"):
                now = chunk[-1].at + 1000
                common = {"order": one.order.member, "worker": _WORKER, "keep": ORDER_DAYS * policy.DAY, "sinks": []}
                start = packed(now=now, lease=LEASE, crashes_allowed=policy.CRASHES_ALLOWED, **common)
                pipe.evalsha(self._script["start_fetch"], 0, start)
                common |= {"now": now + 500, "generation": 1 + (one.number % 50 == 48), "token": 1}
                if one.kind == "fetched":
                    content, order = self._contents[one.number % VARIANTS]
                    pipe.evalsha(self._script["store_fetch"], 0, packed(**common, **_stored(one, order)), content)
                else:
                    pipe.evalsha(self._script["fail_fetch"], 0, packed(**common, **FAILURES[one.kind]))
            answers = pipe.execute()
        assert all(b"fetch" in answer for answer in answers[::2])


FAILURES: Final[dict[str, dict[str, Any]]] = {
    "deferred": {"outcome": "deferred", "wait": 300_000, "reason": "breaker_open", "http": 0, "duration_ms": 0},
    "dead": {"outcome": "dead", "wait": 0, "reason": "order_missing", "http": 404, "duration_ms": 12},
}


def _stored(one: One, content: Content) -> dict[str, Any]:
    return {
        "delivery_lease": policy.DELIVERY_LEASE,
        "recheck_ms": -1,
        "give_up": "",
        "digest": content.digest,
        "status": content.status,
        "wallets": content.wallets,
        "tickets": content.tickets,
        "coupons": content.coupons,
        "manifest": 1,
        "http": 200,
        "duration_ms": 240,
        "references": [keys.reference(reference(one)), keys.reference(own_reference(one))],
        "bounds": LATENCY_BOUNDS,
    }


def assert_same(url: str) -> int:
    """Write orders of each kind in both ways to two other databases; return the number of equal keys.

    Raises AssertionError when one differs in type, value or in whether it expires.
    """
    plan = Plan(200, 1_780_000_000_000)
    chosen = [plan.one(number) for number in (0, 7, 48, 49, 57, 107)]
    with Redis.from_url(f"{url[:-1]}1") as real, Redis.from_url(f"{url[:-1]}2") as quick:
        stock = _Stock(quick, plan)
        stock.write(chosen)
        stock.queue_pending()
        _write_for_real(f"{url[:-1]}1", real, chosen, plan.young)
        found = [_dump(redis) for redis in (real, quick)]
        assert found[0] == found[1], _difference(*found)
        for redis in (real, quick):
            redis.flushdb()
    return len(found[0])


def _write_for_real(url: str, redis: Redis, chosen: list[One], young: int) -> None:
    now = chosen[-1].at

    async def accept() -> None:
        client = bootstrap.for_web(url)
        inbox = Inbox(client, dedup_days=DEDUP_DAYS, event_days=DAYS, clock=lambda: now)
        events = []
        for one in chosen:
            event = _Numbered(
                company_id=one.order.company_id,
                order_id=one.order.order_id,
                status="Issued",
                reference=reference(one),
                timestamp=f"2026-06-01T08:15:02.{one.number % 1000:03}Z",
                secret="current",
                request_id=f"{one.number:032x}",
                received=one.at,
                key=_digest(one, young),
            )
            events.append(event)
        try:
            await inbox.accept(events)
        finally:
            await client.aclose()

    asyncio.run(accept())
    moment = now
    ledger = Ledger(redis, order_days=ORDER_DAYS, fetch_lease=LEASE, clock=lambda: moment)
    for one in (one for one in chosen if one.kind != "pending" and not one.is_second):
        job: Any = f"f-{one.order.company_id}-{one.order.order_id}-1"
        redis.lrem(queue_key(LIVE), 0, job)
        redis.delete(f"rq:job:{job}")
        moment = now + 1000
        _, fetch = ledger.start_fetch(one.order, _WORKER)
        assert fetch is not None
        moment = now + 1500
        if one.kind == "fetched":
            references = (reference(one), own_reference(one))
            content = replace(contents()[one.number % VARIANTS], references=references)
            ledger.store_fetch(one.order, _WORKER, fetch, content)
        elif one.kind == "deferred":
            ledger.fail_fetch(one.order, _WORKER, fetch, outcome="deferred", reason="breaker_open", wait_ms=300_000)
        else:
            ledger.fail_fetch(
                one.order, _WORKER, fetch, outcome="dead", reason="order_missing", http_status=404, duration_ms=12
            )


def _dump(redis: Any) -> dict[str, Any]:
    """Return each key with its value and its lifetime in hours, without the times of jobs and the ids of entries."""
    found: dict[str, Any] = {}
    for key in sorted(redis.scan_iter()):
        name, kind = key.decode(), redis.type(key).decode()
        value: Any
        if kind == "hash":
            value = redis.hgetall(key)
            for field in (b"created_at", b"enqueued_at"):
                value.pop(field, None)
        elif kind == "zset":
            value = redis.zrange(key, 0, -1, withscores=True)
        elif kind == "list":
            value = (
                [_without_event_id(entry) for entry in redis.lrange(key, 0, -1)]
                if ":history:" in name
                else redis.lrange(key, 0, -1)
            )
        elif kind == "set":
            value = sorted(redis.smembers(key))
        elif kind == "stream":
            value = [fields for _, fields in redis.xrange(key)]
        else:
            value = redis.get(key)
        found[name] = (kind, value, round(redis.pttl(key) / 3_600_000))
    return found


def _without_event_id(packed_entry: bytes) -> list[Any]:
    kind, *values = msgspec.msgpack.decode(packed_entry)
    return [kind, values[0], *values[2:]] if kind == "event" else [kind, *values]


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return "\n".join(f"{name}: {one.get(name)!r} != {other.get(name)!r}" for name in names)


def _scrambled(seed: str, like: str) -> str:
    """Return a text with the same dashes and other letters and digits, the same for the same seed."""
    drawn = random.Random(seed)  # no secret: sample data
    digits = "0123456789abcdef" if re.search("[a-f]", like) else "0123456789"
    return "".join(drawn.choice(digits) if one in digits else one for one in like)


class _Numbered(OrderProcessed, frozen=True):
    """An event with the digest of `fill`."""

    key: str = ""

    @property
    def digest(self) -> str:
        return self.key


def _digest(one: One, young: int) -> str:
    return blake2b(f"{one.number}".encode(), digest_size=16).hexdigest() if one.at > young else ""
