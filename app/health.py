"""Readiness: can this process record events now, and how durably?

It records an event as intake does instead of asking whether that would work: a Redis user may be allowed to ask and not
to record, or the other way round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from redis.exceptions import RedisError, ResponseError

from app.errors import OldServer, OtherSchema
from app.ledger.redis import VERSION, cause, code, is_refusal, old_server
from app.ledger.redis import AsyncRedis as Redis

if TYPE_CHECKING:
    from app.intake.spool import Spool

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
    """Checks whether Redis takes events and how durable they are, and whether the spool takes events.

    `probe` records an event in Redis and deletes it again (Inbox.probe).
    """

    def __init__(self, probe: Callable[[], Awaitable[None]], redis: Redis, spool: Spool | None = None) -> None:
        self._probe = probe
        self._redis: Any = redis  # not all of redis-py is typed
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
        answers = Check("redis", ok=True, detail="answers", fatal=True)
        try:
            async with asyncio.timeout(SECONDS):
                await self._probe()
        except OtherSchema as error:
            return [answers, Check("schema", ok=False, detail=str(error), fatal=True)]
        except (RedisError, OSError, TimeoutError) as error:
            if not is_refusal(error):
                return [Check("redis", ok=False, detail=cause(error, self._redis), fatal=True)]
            old = await self._old_server()
            refused = f"records no events ({code(error)})" if old is None else str(old)
            return [answers, Check("writable", ok=False, detail=refused, fatal=True), *await self._durable()]
        return [
            answers,
            Check("writable", ok=True, detail="records events", fatal=True),
            Check("schema", ok=True, detail=f"version {VERSION}", fatal=True),
            *await self._durable(),
        ]

    async def _old_server(self) -> OldServer | None:
        try:
            async with asyncio.timeout(SECONDS):
                return old_server(await self._redis.execute_command("HELLO"))
        except (RedisError, OSError, TimeoutError):
            return None

    async def _durable(self) -> list[Check]:
        """Return what INFO and CONFIG tell of the durability; a user may be forbidden to run them, without a fault."""
        try:
            async with asyncio.timeout(SECONDS):
                info = await self._redis.info()
                fsync = await self._fsync() if info.get("aof_enabled") else ""
        except (RedisError, OSError, TimeoutError) as error:
            refused = "unverified: INFO is refused" if isinstance(error, ResponseError) else type(error).__name__
            return [Check("durable", ok=isinstance(error, ResponseError), detail=refused)]
        policy, limit = info.get("maxmemory_policy", "unknown"), info.get("maxmemory", 0)
        memory = Check("memory", ok=policy == "noeviction" or not limit, detail=f"maxmemory-policy {policy}")
        if not info.get("aof_enabled"):
            lost = "appendonly is off: a restart of Redis loses what it holds"
            return [Check("durable", ok=False, detail=lost), memory]
        return [Check("durable", ok=fsync != "no", detail=f"appendonly yes, appendfsync {fsync}"), memory]

    async def _fsync(self) -> str:
        try:
            return str((await self._redis.config_get("appendfsync")).get("appendfsync", "unknown"))
        except ResponseError:
            return "unverified: CONFIG is refused"

    async def _of_spool(self) -> Iterable[Check]:
        if self._spool is None:
            return []
        problem, waiting = await self._spool.state()
        count = "an unknown number of" if waiting is None else waiting
        return [
            Check("spool", ok=not problem, detail=problem or "takes events"),
            Check("backlog", ok=waiting == 0, detail=f"{count} events wait for Redis"),
        ]

    @staticmethod
    def state(checks: Sequence[Check]) -> State:
        """Return the state that all findings together mean; events may go to Redis or to the spool."""
        failed = [check for check in checks if not check.ok]
        spooled = any(check.name == "spool" and check.ok for check in checks)
        if any(check.fatal for check in failed) and not spooled:
            return "not ready"
        return "degraded" if failed else "ready"
