"""The async side of the ledger: requests of one moment are recorded by one call of accept.lua (group commit).

While a call is under way, what comes meanwhile waits and goes together in the next one: the slower Redis is, the
larger the groups, and each request still has its own answer, within CALL_SECONDS + PATIENCE whatever Redis does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import msgspec
from msgspec.structs import astuple
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.errors import NotRecorded
from app.intake.envelope import OrderProcessed
from app.ledger import keys, policy
from app.ledger.redis import guarded, newer_data, source
from app.ledger.rq_jobs import LIVE, QUEUES_KEY, JobTemplate, queue_key

GROUP: Final = 256
"""Events a call: Redis serves others in between. One POST is never split, so a larger one makes a larger call."""

CALLS: Final = 2
"""Calls under way at once. With one, web and Redis take turns: each idles while the other works."""

FEW: Final = 16
"""Requests that are not divided: a call costs as much as ten events."""

CALL_SECONDS: Final = 1.0
"""One call with all it needs: connecting, logging in, loading the script. Each of them has a time-out too."""

PATIENCE: Final = 0.5
"""Seconds a POST waits for its call to begin; looked at when a call ends, so it may be one call more."""

QUEUED, COALESCED, DUPLICATE, ERASED, REFUSED = range(5)


class Recorded(msgspec.Struct, frozen=True):
    """What became of the events of one POST.

    `spooled`: kept on disk until Redis is back. `erased`: recorded, and nothing is owed: their orders were erased.
    """

    queued: int
    coalesced: int
    duplicates: int
    spooled: int = 0
    erased: int = 0


class Entry(msgspec.Struct, frozen=True):
    """What is kept of an event, as accept.lua takes it and as the spool holds it; no clientState is in it.

    `digest` is "" for an event that cannot be a duplicate, `received` ms since 1970.
    """

    digest: str
    company_id: str
    order_id: str
    status: str
    reference: str
    secret: str
    request_id: str
    sent: str
    received: int

    @classmethod
    def of(cls, event: OrderProcessed, request_id: str, received: int) -> Entry:
        """Return the entry of an authenticated event."""
        return cls(
            event.digest,
            event.company_id,
            event.order_id,
            event.status_word,
            event.reference,
            event.secret,
            request_id,
            event.timestamp,
            received,
        )


class _Waiting(msgspec.Struct):
    entries: Sequence[Entry]
    answer: asyncio.Future[list[int]]
    since: float


class Inbox:
    """Records events and owes their orders a fetch, atomically; raises NotRecorded when Redis did not say so."""

    def __init__(
        self,
        redis: Redis,
        *,
        dedup_days: int,
        event_days: int,
        clock: Callable[[], int],
    ) -> None:
        self._redis = redis
        self._accept = redis.register_script(guarded(source("accept")))
        self._template = JobTemplate()
        self._keys = [
            keys.DUE,
            keys.EVENTS,
            queue_key(LIVE),
            QUEUES_KEY,
            keys.ORDERS,
            keys.COUNTERS,
            keys.DEAD,
        ]
        self._dedup = dedup_days * policy.DAY
        self._kept = event_days * policy.DAY
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._writers: set[asyncio.Task[None]] = set()

    async def accept(self, events: Sequence[OrderProcessed], request_id: str) -> Recorded:
        """Record the events of one POST; see `record`."""
        received = self._clock()
        return await self.record([Entry.of(event, request_id, received) for event in events])

    async def record(self, entries: Sequence[Entry]) -> Recorded:
        """Record the events of one POST in one step with those of the same moment.

        Raises NotRecorded: `redis_unavailable` (then none of them, or all without our knowing, are recorded), or
        `newer_data` (then none: what stands in Redis is a newer version's), or `record_refused` (then all but those of
        orders whose keys are broken).
        """
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._waiting.append(_Waiting(entries, answer, loop.time()))
        if len(self._writers) < CALLS:
            self._writers.add(asyncio.create_task(self._write()))
        outcomes = await answer
        if REFUSED in outcomes:
            # Said of the whole POST, since a sender hears one word for all: said again, the others are duplicates.
            raise NotRecorded("record_refused", "ResponseError")
        return Recorded(
            outcomes.count(QUEUED),
            outcomes.count(COALESCED),
            outcomes.count(DUPLICATE),
            erased=outcomes.count(ERASED),
        )

    async def probe(self) -> bool:
        """Return whether Redis takes writes, ours too; asked anew: an old connection may lead to a former primary."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
                await self._redis.set(keys.PROBE, 1, px=10 * policy.SECOND)
                await self._accept(keys=self._keys, args=self._header(self._clock()))
        except (RedisError, OSError, TimeoutError):
            return False
        return True

    async def _write(self) -> None:
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group = self._next_group()
                await self._write_group(group)
                self._tell_the_late()
        except Exception as error:
            # Who waits would meet the same Redis, one time-out after the other: all are told now.
            _tell([*group, *self._waiting], error)
            self._waiting.clear()
        finally:
            # Here and not in a callback, which comes a turn later: who arrives in between would find no free writer.
            self._writers.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _tell_the_late(self) -> None:
        """Let go of who waited too long: behind a slow Redis the queue would grow for ever."""
        longest = asyncio.get_running_loop().time() - PATIENCE
        while self._waiting and self._waiting[0].since < longest:
            _tell([self._waiting.popleft()], TimeoutError())

    def _next_group(self) -> list[_Waiting]:
        """Take half of who waits: while Redis works on one half, the answers to the other are written."""
        share = max(len(self._waiting) // CALLS, FEW)
        group = [self._waiting.popleft()]
        size = len(group[0].entries)
        while self._waiting and len(group) < share and size + len(self._waiting[0].entries) <= GROUP:
            group.append(self._waiting.popleft())
            size += len(group[-1].entries)
        return group

    async def _write_group(self, group: list[_Waiting]) -> None:
        arguments = self._header(self._clock())
        for one in group:
            for entry in one.entries:
                arguments += astuple(entry)
        async with asyncio.timeout(CALL_SECONDS):
            outcomes = await self._accept(keys=self._keys, args=arguments)
        at = 0
        for one in group:
            # A client that hung up took its future with it; the others' answers are not touched.
            if not one.answer.done():
                one.answer.set_result(outcomes[at : at + len(one.entries)])
            at += len(one.entries)

    def _header(self, now: int) -> list[Any]:
        return [
            now,
            policy.GRACE,
            self._dedup,
            self._kept,
            keys.PREFIX,
            LIVE,
            *self._template.fields(),
        ]


def _tell(waiting: Sequence[_Waiting], error: Exception) -> None:
    newer = newer_data(error)
    reason, cause = ("newer_data", newer) if newer else ("redis_unavailable", error)
    for one in waiting:
        if not one.answer.done():
            one.answer.set_exception(NotRecorded(reason, type(cause).__name__))
