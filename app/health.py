"""Readiness: can this process record events now, and how durably? Each check asks Redis or the disk."""

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
"""For all checks together: a prober has a time-out of its own, and takes no answer for a dead process."""


FRESH: Final = 0.5
"""A check writes to the disk of the spool and anybody may ask, so requests within this time share one result."""


class EventBuffer(Protocol):
    """Something that keeps events while Redis is unavailable."""

    async def problem(self) -> str: ...

    async def waiting(self) -> int | None: ...


class Check(msgspec.Struct, frozen=True):
    """One finding. A failed `fatal` check means not ready, any other failed one means degraded."""

    name: str
    ok: bool
    detail: str
    fatal: bool


class Health:
    """Checks whether Redis takes writes and how durable they are, and whether the spool takes events."""

    def __init__(self, redis: Redis, spool: EventBuffer | None = None) -> None:
        self._redis = redis
        self._spool = spool
        self._lock = asyncio.Lock()
        self._found: list[Check] = []
        self._found_at = -FRESH

    async def checks(self) -> list[Check]:
        """Return all findings, at most FRESH seconds old; never raises.

        While the spool works, no problem of Redis is fatal: events wait on the disk.
        """
        async with self._lock:
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
        except (RedisError, OSError, TimeoutError) as error:
            return [Check("redis", ok=False, detail=f"no answer ({type(error).__name__})", fatal=True)]
        return [
            Check("redis", ok=True, detail="answers", fatal=True),
            _writable(found, replication),
            durable,
            _memory(memory),
            _schema(held),
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
            # Whatever it is, the prober must get an answer.
            return [Check("spool", ok=False, detail=f"fails ({type(error).__name__})", fatal=True)]
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
            # Managed Redis forbids CONFIG: the durability is unknown, which is not a fault.
            detail = "unverified: CONFIG is refused" if isinstance(error, ResponseError) else type(error).__name__
            return Check("durable", ok=True, detail=detail, fatal=False)
        return Check("durable", ok=fsync != "no", detail=f"appendonly yes, appendfsync {fsync}", fatal=False)

    @staticmethod
    def state(checks: list[Check]) -> State:
        """Return the state that all findings together mean."""
        if any(not check.ok and check.fatal for check in checks):
            return "not ready"
        return "ready" if all(check.ok for check in checks) else "degraded"


def _schema(held: bytes | None) -> Check:
    other = is_other_schema(held)
    detail = f"holds data of another schema version than {VERSION}" if other else f"version {VERSION}"
    return Check("schema", ok=not other, detail=detail, fatal=True)


def _writable(persistence: dict[str, Any], replication: dict[str, Any]) -> Check:
    if replication.get("role") != "master":
        return Check("writable", ok=False, detail="this Redis is a replica", fatal=True)
    failed = persistence.get("aof_enabled") and persistence.get("aof_last_write_status") != "ok"
    return Check("writable", ok=not failed, detail="AOF write failed" if failed else "takes writes", fatal=True)


def _memory(memory: dict[str, Any]) -> Check:
    policy = memory.get("maxmemory_policy", "unknown")
    full = 0 < memory.get("maxmemory", 0) <= memory.get("used_memory", 0)
    if full and policy == "noeviction":
        return Check("memory", ok=False, detail="Redis is full", fatal=True)
    bounded = memory.get("maxmemory", 0) > 0
    ok = policy == "noeviction" or not bounded
    return Check("memory", ok=ok, detail=f"maxmemory-policy {policy}", fatal=False)
