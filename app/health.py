"""Readiness: can this process record events now, and how durably? Each check asks Redis or the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from app.intake.spool import Spool
from app.ledger import keys
from app.ledger.redis import VERSION, is_other_schema

State = Literal["ready", "degraded", "not ready"]

SECONDS: Final = 2.0
"""For all checks together: a prober has a time-out of its own, and takes no answer for a dead process."""

FRESH: Final = 0.5
"""A check writes to the disk of the spool and anybody may ask, so requests within this time share one result."""


class Check(msgspec.Struct, frozen=True):
    """One finding. If a `fatal` check fails, Redis takes no events."""

    name: str
    ok: bool
    detail: str
    fatal: bool = False


class Health:
    """Checks whether Redis takes writes and how durable they are, and whether the spool takes events."""

    def __init__(self, redis: Redis, spool: Spool | None = None) -> None:
        self._redis = redis
        self._spool = spool
        self._lock = asyncio.Lock()
        self._found: list[Check] = []
        self._found_at = -FRESH

    async def checks(self) -> list[Check]:
        """Return all findings, at most FRESH seconds old; never raises."""
        async with self._lock:
            if time.monotonic() - self._found_at >= FRESH:
                of_redis, of_spool = await asyncio.gather(self._of_redis(), self._of_spool())
                self._found = [*of_redis, *of_spool]
                self._found_at = time.monotonic()
        return self._found

    async def _of_redis(self) -> list[Check]:
        try:
            async with asyncio.timeout(SECONDS):
                found = await self._redis.info()
                durable = await self._durable(found)
                held: Any = await self._redis.get(keys.SCHEMA)
        except (RedisError, OSError, TimeoutError) as error:
            return [Check("redis", ok=False, detail=f"no answer ({type(error).__name__})", fatal=True)]
        other = is_other_schema(held)
        schema = f"holds data of another schema version than {VERSION}" if other else f"version {VERSION}"
        return [
            Check("redis", ok=True, detail="answers", fatal=True),
            _writable(found),
            durable,
            _memory(found),
            Check("schema", ok=not other, detail=schema, fatal=True),
        ]

    async def _of_spool(self) -> Iterable[Check]:
        if self._spool is None:
            return []
        try:
            async with asyncio.timeout(SECONDS):
                problem = await self._spool.problem()
                waiting = await self._spool.waiting()
        except TimeoutError:
            return [Check("spool", ok=False, detail="the disk does not answer")]
        except Exception as error:
            # Whatever it is, the prober must get an answer.
            return [Check("spool", ok=False, detail=f"fails ({type(error).__name__})")]
        count = "an unknown number of" if waiting is None else waiting
        return [
            Check("spool", ok=not problem, detail=problem or "takes events"),
            Check("backlog", ok=waiting == 0, detail=f"{count} events wait for Redis"),
        ]

    async def _durable(self, info: Mapping[str, Any]) -> Check:
        if not info.get("aof_enabled"):
            return Check("durable", ok=False, detail="appendonly is off: a restart of Redis loses what it holds")
        try:
            fsync = (await self._redis.config_get("appendfsync")).get("appendfsync", "unknown")
        except (RedisError, OSError) as error:
            # Managed Redis forbids CONFIG: the durability is unknown, which is not a fault.
            detail = "unverified: CONFIG is refused" if isinstance(error, ResponseError) else type(error).__name__
            return Check("durable", ok=True, detail=detail)
        return Check("durable", ok=fsync != "no", detail=f"appendonly yes, appendfsync {fsync}")

    @staticmethod
    def state(checks: Sequence[Check]) -> State:
        """Return the state that all findings together mean; events may go to Redis or to the spool."""
        failed = [check for check in checks if not check.ok]
        spooled = any(check.name == "spool" and check.ok for check in checks)
        if any(check.fatal for check in failed) and not spooled:
            return "not ready"
        return "degraded" if failed else "ready"


def _writable(info: Mapping[str, Any]) -> Check:
    if info.get("role") != "master":
        return Check("writable", ok=False, detail="this Redis is a replica", fatal=True)
    failed = info.get("aof_enabled") and info.get("aof_last_write_status") != "ok"
    return Check("writable", ok=not failed, detail="AOF write failed" if failed else "takes writes", fatal=True)


def _memory(info: Mapping[str, Any]) -> Check:
    policy, limit = info.get("maxmemory_policy", "unknown"), info.get("maxmemory", 0)
    if policy == "noeviction" and 0 < limit <= info.get("used_memory", 0):
        return Check("memory", ok=False, detail="Redis is full", fatal=True)
    return Check("memory", ok=policy == "noeviction" or not limit, detail=f"maxmemory-policy {policy}")
