"""Can invariant 1 be kept right now? A typed list of checks, each of which really asks."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

State = Literal["ready", "degraded", "not ready"]


class Check(msgspec.Struct, frozen=True):
    """One finding. `fatal`: without it nothing can be promised; else the promise is weaker than it should be."""

    name: str
    ok: bool
    detail: str
    fatal: bool


class Health:
    """Asks Redis whether it takes writes and how durable they are."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def checks(self) -> list[Check]:
        """Return all findings; never raises."""
        try:
            found = await self._redis.info("persistence")
            replication = await self._redis.info("replication")
            memory = await self._redis.info("memory")
        except (RedisError, OSError) as error:
            return [Check("redis", ok=False, detail=f"no answer ({type(error).__name__})", fatal=True)]
        return [
            Check("redis", ok=True, detail="answers", fatal=True),
            _writable(found, replication),
            await self._durable(found),
            _evicts_nothing(memory),
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
