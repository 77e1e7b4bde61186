"""Can invariant 1 be kept right now? A typed list of checks, each of which really asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Final, Literal, Protocol

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from app.ledger import keys
from app.ledger.redis import VERSION, is_other_schema

State = Literal["ready", "degraded", "not ready"]

SECONDS: Final = 2.0
"""For all checks together: who asks has a time-out of its own, and no answer is taken for a dead process."""


CLOCKS_APART: Final = 10.0
"""Seconds that two clocks may differ: no retry comes noticeably too early or too late."""


FRESH: Final = 0.5
"""Anybody may ask, and each look writes to the disk that keeps the events: many askers share one look."""


class Keeps(Protocol):
    """Something that keeps events while Redis is away."""

    async def problem(self) -> str: ...

    async def waiting(self) -> int | None: ...


class Check(msgspec.Struct, frozen=True):
    """One finding. `fatal`: without it nothing can be promised; else the promise is weaker than it should be."""

    name: str
    ok: bool
    detail: str
    fatal: bool


class Health:
    """Asks Redis whether it takes writes and how durable they are, and the spool, if there is one, whether it does."""

    def __init__(self, redis: Redis, spool: Keeps | None = None) -> None:
        self._redis = redis
        self._spool = spool
        self._one_at_a_time = asyncio.Lock()
        self._found: list[Check] = []
        self._found_at = -FRESH

    async def checks(self) -> list[Check]:
        """Return all findings, at most FRESH seconds old; never raises.

        With a spool that works nothing about Redis is fatal: events are taken, and wait on the disk.
        """
        async with self._one_at_a_time:
            if time.monotonic() - self._found_at >= FRESH:
                self._found = await self._look()
                self._found_at = time.monotonic()
        return self._found

    async def _look(self) -> list[Check]:
        of_redis, of_spool = await asyncio.gather(self._of_redis(), self._of_spool())
        if any(check.fatal and check.ok for check in of_spool):
            of_redis = [msgspec.structs.replace(check, fatal=False) for check in of_redis]
            of_spool = [msgspec.structs.replace(check, fatal=False) for check in of_spool]
        elif all(check.ok for check in of_redis if check.fatal):
            of_spool = [msgspec.structs.replace(check, fatal=False) for check in of_spool]
        return [*of_redis, *of_spool]

    async def _of_redis(self) -> list[Check]:
        try:
            async with asyncio.timeout(SECONDS):
                found = await self._redis.info("persistence")
                replication = await self._redis.info("replication")
                memory = await self._redis.info("memory")
                durable = await self._durable(found)
                held: Any = await self._redis.get(keys.SCHEMA)
                seconds, microseconds = await self._redis.time()
        except (RedisError, OSError, TimeoutError) as error:
            return [Check("redis", ok=False, detail=f"no answer ({type(error).__name__})", fatal=True)]
        return [
            Check("redis", ok=True, detail="answers", fatal=True),
            _writable(found, replication),
            durable,
            _evicts_nothing(memory),
            _ours_to_read(held),
            same_clock(seconds + microseconds / 1e6, time.time()),
        ]

    async def _of_spool(self) -> Iterable[Check]:
        if self._spool is None:
            return []
        try:
            async with asyncio.timeout(SECONDS):
                problem = await self._spool.problem()
                waiting = await self._spool.waiting()
        except TimeoutError:
            return [Check("spool", ok=False, detail="the disk does not answer", fatal=True)]
        except Exception as error:
            # Whatever it is, it is told as a finding: who asks for readiness must get an answer.
            return [Check("spool", ok=False, detail=f"it fails ({type(error).__name__})", fatal=True)]
        return [
            Check("spool", ok=not problem, detail=problem or "takes events", fatal=True),
            Check(
                "backlog",
                ok=waiting == 0,
                detail=f"{'an unknown number of' if waiting is None else waiting} events wait for Redis",
                fatal=False,
            ),
        ]

    async def _durable(self, persistence: dict[str, Any]) -> Check:
        if not persistence.get("aof_enabled"):
            detail = "appendonly is off: a restart of Redis loses what it holds"
            return Check("durable", ok=False, detail=detail, fatal=False)
        try:
            fsync = (await self._redis.config_get("appendfsync")).get("appendfsync", "unknown")
        except (RedisError, OSError) as error:
            # Managed Redis forbids CONFIG: that is no fault, only unknown.
            detail = "unverified: CONFIG is refused" if isinstance(error, ResponseError) else type(error).__name__
            return Check("durable", ok=True, detail=detail, fatal=False)
        return Check("durable", ok=fsync != "no", detail=f"appendonly yes, appendfsync {fsync}", fatal=False)

    @staticmethod
    def state(checks: list[Check]) -> State:
        """Return one word for all findings."""
        if any(not check.ok and check.fatal for check in checks):
            return "not ready"
        return "ready" if all(check.ok for check in checks) else "degraded"


def _ours_to_read(held: bytes | None) -> Check:
    newer = is_other_schema(held)
    detail = "holds data of a newer version of this service" if newer else f"version {VERSION}"
    return Check("schema", ok=not newer, detail=detail, fatal=True)


def same_clock(theirs: float, ours: float) -> Check:
    """Return whether the clock of Redis's machine and ours, both in seconds since 1970, agree.

    Machines that agree with it agree with each other: retries, leases and the budget of a key are kept in their time.
    """
    apart = abs(theirs - ours)
    detail = f"differs from Redis's by {apart:.0f} s" if apart > CLOCKS_APART else "agrees with Redis's"
    return Check("clock", ok=apart <= CLOCKS_APART, detail=detail, fatal=False)


def _writable(persistence: dict[str, Any], replication: dict[str, Any]) -> Check:
    if replication.get("role") != "master":
        return Check("writable", ok=False, detail="this Redis is a replica", fatal=True)
    failed = persistence.get("aof_enabled") and persistence.get("aof_last_write_status") != "ok"
    return Check("writable", ok=not failed, detail="AOF write failed" if failed else "takes writes", fatal=True)


def _evicts_nothing(memory: dict[str, Any]) -> Check:
    policy = memory.get("maxmemory_policy", "unknown")
    full = 0 < memory.get("maxmemory", 0) <= memory.get("used_memory", 0)
    if full and policy == "noeviction":
        return Check("memory", ok=False, detail="Redis is full", fatal=True)
    bounded = memory.get("maxmemory", 0) > 0
    ok = policy == "noeviction" or not bounded
    return Check("memory", ok=ok, detail=f"maxmemory-policy {policy}", fatal=False)
