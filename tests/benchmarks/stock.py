"""Fills a Redis with many orders through the real scripts: 3 companies, 90 days, most home, some owed, parked, dead.

accept, begin, finish and fail are the scripts of app/ledger word for word, wrapped in functions so that one call does
200 orders; only the id of a stream entry is the event's own time instead of the server's, so that 90 days fit into
minutes. `assert_same` writes one order of each kind both ways and compares every key.
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

from msgspec.structs import replace
from redis import Redis

from app import bootstrap
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Entry, Inbox
from app.ledger import keys, policy
from app.ledger.guests import Guests
from app.ledger.ledger import Ledger
from app.ledger.redis import guarded, source
from app.ledger.rq_jobs import LIVE, QUEUES_KEY, JobTemplate, queue_key
from app.ledger.work import Content
from app.upstream.models import digest, parse_order

COMPANIES: Final = tuple(f"{number}1111111-1111-4111-8111-111111111111" for number in (1, 2, 3))
DAYS: Final = 90
ORDER_DAYS: Final = 400
DEDUP_DAYS: Final = 7
AT_ONCE: Final = 200
LEASE: Final = 60_000
VARIANTS: Final = 50
"""Contents, with GUIDs and numbers of their own: they are as large packed as those of real orders."""

_WORKER: Final = "host-1-live-1"
_FIXTURE: Final = Path(__file__).parents[1] / "fixtures" / "order-issued.json"

Kind = Literal["home", "owed", "parked", "dead"]


@dataclass(frozen=True)
class One:
    """An order and its event; `sent` is the second event of the order before."""

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
        """Return the ms after which an event is known again."""
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
        kinds: dict[int, Kind] = {7: "owed", 57: "parked", 107: "dead"}
        return kinds.get(own % 200, "home")


def reference(one: One) -> str:
    return f"CM-{one.order.order_id[:8].upper()}"


def own_reference(one: One) -> str:
    return f"SHOP-{int(one.order.order_id[:8], 16):09}"


def contents() -> list[Content]:
    """Return answers of getOrder that differ in what differs between real orders."""
    sample = _FIXTURE.read_text(encoding="utf-8")
    found = []
    for variant in range(VARIANTS):
        told = json.loads(sample)
        for item in told["items"]:
            for wallet in item["wallets"]:
                for part in (wallet, *wallet["assets"]):
                    for name, value in part.items():
                        if isinstance(value, str) and (name.lower().endswith("id") or "Number" in name):
                            part[name] = _scrambled(f"{variant} {name} {value}", value)
        raw = json.dumps(told).encode()
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
    """Write all orders; yield how many events are written after each call. What is owed has its job in `live`."""
    stock = _Stock(redis, plan)
    left = plan.all()
    done = 0
    while chunk := list(islice(left, AT_ONCE)):
        stock.write(chunk)
        done += len(chunk)
        yield done
    stock.queue_owed()


class _Stock:
    def __init__(self, redis: Redis, plan: Plan) -> None:
        self._redis = redis
        self._plan = plan
        self._template = JobTemplate()
        self._contents = [(zlib.compress(one.raw), one) for one in contents()]
        accept = source("accept")
        assert accept.count("KEYS[2], '*'") == 2
        accept = accept.replace("KEYS[2], '*'", "KEYS[2], received .. '-*'")
        self._accept = redis.register_script(guarded(accept))
        self._fetch = redis.register_script(guarded(_FETCH))
        self._owed: list[str] = []

    def write(self, chunk: list[One], guests: str | None = None) -> None:
        self._hear(chunk)
        self._bring_home([one for one in chunk if not one.is_second], guests)

    def queue_owed(self) -> None:
        """Put the jobs of what is owed back into `live`, from which all were taken as workers do."""
        for start in range(0, len(self._owed), 1000):
            self._redis.rpush(queue_key(LIVE), *self._owed[start : start + 1000])

    def _hear(self, chunk: list[One]) -> None:
        """Record the events as the web process does; what is older than DEDUP_DAYS is remembered no more."""
        arguments: list[Any] = [chunk[-1].at, policy.GRACE, DEDUP_DAYS * policy.DAY, DAYS * policy.DAY]
        arguments += [keys.PREFIX, LIVE, *self._template.fields()]
        for one in chunk:
            arguments += [_digest(one, self._plan.young), *one.order, "Issued", reference(one), "current"]
            arguments += [f"{one.number:032x}", f"2026-06-01T08:15:02.{one.number % 1000:03}Z", one.at]
        names = [keys.DUE, keys.EVENTS, queue_key(LIVE), QUEUES_KEY, keys.ORDERS, keys.COUNTERS, keys.DEAD]
        self._accept(keys=names, args=arguments)

    def _bring_home(self, chunk: list[One], guests: str | None) -> None:
        jobs = [f"f-{one.order.company_id}-{one.order.order_id}-1" for one in chunk]
        self._owed += [job for job, one in zip(jobs, chunk, strict=True) if one.kind == "owed"]
        gone = [f"rq:job:{job}" for job, one in zip(jobs, chunk, strict=True) if one.kind != "owed"]
        self._redis.delete(queue_key(LIVE), *gone)
        arguments: list[Any] = [LEASE, _WORKER, policy.CRASHES_ALLOWED, ORDER_DAYS * policy.DAY]
        arguments += [policy.HAND_LEASE]
        for one in (one for one in chunk if one.kind != "owed"):
            packed, content = self._contents[one.number % VARIANTS]
            arguments += [one.kind, one.order.member, chunk[-1].at + 1000, content.digest, packed]
            arguments += [content.status, content.wallets, content.tickets, content.coupons]
            arguments += [f"{one.number:020x}" if guests is None else guests]
            arguments += [keys.reference(reference(one)), keys.reference(own_reference(one))]
        self._fetch(keys=[keys.DUE, keys.DEAD, keys.holding(_WORKER), keys.ORDERS, keys.DEAD_SINKS], args=arguments)


_FETCH: Final = f"""
local all, given = KEYS, ARGV
local KEYS, ARGV
local function begin()
{source("begin")}
end
local function finish()
{source("finish")}
end
local function fail()
{source("fail")}
end
local due, dead, holding, orders, dead_sinks = unpack(all)
local lease, worker, crashes, keep, hand_lease = unpack(given, 1, 5)
for at = 6, #given, 12 do
  local kind, member, now, digest, content = unpack(given, at, at + 4)
  local record, trail, copy = 'ota:order:' .. member, 'ota:trail:' .. member, 'ota:content:' .. member
  KEYS = {{record, due, dead, trail, holding, copy}}
  ARGV = {{now, lease, worker, member, crashes, keep}}
  local begun = begin()
  assert(begun[1] == 'fetch', begun[1])
  now = tostring(tonumber(now) + 500)
  if kind == 'home' then
    KEYS = {{record, due, dead, trail, holding, copy, orders, dead_sinks, given[at + 10], given[at + 11]}}
    ARGV = {{now, member, begun[3], begun[2], keep, hand_lease, '', '', digest, content, given[at + 5], given[at + 6],
      given[at + 7], given[at + 8], '1', '200', '240', given[at + 9]}}
    assert(finish()[1] == 'home')
  elseif kind == 'parked' then
    ARGV = {{now, member, begun[3], begun[2], keep, 'park', tostring(tonumber(now) + 300000), 'breaker_open', '', '0'}}
    assert(fail() == 'parked')
  else
    ARGV = {{now, member, begun[3], begun[2], keep, 'dead', '0', 'order_missing', '404', '12'}}
    assert(fail() == 'dead')
  end
end
"""


def assert_same(url: str) -> int:
    """Write orders of each kind both ways, into two other databases; return how many keys are equal.

    Raises AssertionError when one differs in type, value or in whether it expires.
    """
    plan = Plan(200, 1_780_000_000_000)
    chosen = [plan.one(number) for number in (0, 7, 48, 49, 57, 107)]
    addresses = ("guest@example.com",)
    with Redis.from_url(f"{url[:-1]}1") as real, Redis.from_url(f"{url[:-1]}2") as quick:
        for redis in (real, quick):
            redis.set(keys.SALT, "salt")
        stock = _Stock(quick, plan)
        stock.write(chosen, Guests(quick).digests(addresses))
        stock.queue_owed()
        _write_for_real(f"{url[:-1]}1", real, chosen, plan.young, addresses)
        found = [_dump(redis) for redis in (real, quick)]
        assert found[0] == found[1], _difference(*found)
        for redis in (real, quick):
            redis.flushdb()
    return len(found[0])


def _write_for_real(url: str, redis: Redis, chosen: list[One], young: int, addresses: tuple[str, ...]) -> None:
    now = chosen[-1].at

    async def accept() -> None:
        client = bootstrap.for_web(url)
        inbox = Inbox(client, dedup_days=DEDUP_DAYS, event_days=DAYS, clock=lambda: now)
        entries = []
        for one in chosen:
            event = OrderProcessed(
                company_id=one.order.company_id,
                order_id=one.order.order_id,
                status="Issued",
                reference=reference(one),
                timestamp=f"2026-06-01T08:15:02.{one.number % 1000:03}Z",
                secret="current",
            )
            entry = Entry.of(event, f"{one.number:032x}", one.at)
            entries.append(replace(entry, digest=_digest(one, young)))
        try:
            await inbox.record(entries)
        finally:
            await client.aclose()

    asyncio.run(accept())
    ledger = Ledger(redis, order_days=ORDER_DAYS, fetch_lease=LEASE)
    for one in (one for one in chosen if one.kind != "owed" and not one.is_second):
        job: Any = f"f-{one.order.company_id}-{one.order.order_id}-1"
        redis.lrem(queue_key(LIVE), 0, job)
        redis.delete(f"rq:job:{job}")
        _, fetch = ledger.begin(one.order, _WORKER, now + 1000)
        assert fetch is not None
        ends = now + 1500
        if one.kind == "home":
            references = (reference(one), own_reference(one))
            content = replace(contents()[one.number % VARIANTS], references=references, guests=addresses)
            ledger.finish(one.order, _WORKER, fetch, content, ends)
        elif one.kind == "parked":
            ledger.fail(one.order, _WORKER, fetch, ends, what="park", reason="breaker_open", due=ends + 300_000)
        else:
            why = "order_missing"
            ledger.fail(one.order, _WORKER, fetch, ends, what="dead", reason=why, http_status=404, duration_ms=12)


def _dump(redis: Any) -> dict[str, Any]:
    """Return every key with its value and its lifetime in hours, but for the time of a job and the ids of entries."""
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
            value = [re.sub(rb"\d+-\d+ ", b"ID ", line) for line in redis.lrange(key, 0, -1)]
        elif kind == "set":
            value = sorted(redis.smembers(key))
        elif kind == "stream":
            value = [fields for _, fields in redis.xrange(key)]
        else:
            value = redis.get(key)
        found[name] = (kind, value, round(redis.pttl(key) / 3_600_000))
    return found


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return "\n".join(f"{name}: {one.get(name)!r} != {other.get(name)!r}" for name in names)


def _scrambled(seed: str, like: str) -> str:
    """Return a text with the same dashes whose letters and digits are others, the same for the same seed."""
    drawn = random.Random(seed)  # no secret: sample data
    digits = "0123456789abcdef" if re.search("[a-f]", like) else "0123456789"
    return "".join(drawn.choice(digits) if one in digits else one for one in like)


def _digest(one: One, young: int) -> str:
    return blake2b(f"{one.number}".encode(), digest_size=16).hexdigest() if one.at > young else ""
