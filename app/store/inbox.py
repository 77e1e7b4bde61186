"""The async side of the ledger: requests of one moment are recorded by one call of accept.lua (group commit).

While a call is under way, what comes meanwhile waits and goes together in the next one: the slower Redis is, the
larger the groups, and each request still has its own answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import msgspec
from redis.asyncio import Redis

from app.errors import NotRecorded
from app.events import OrderProcessed
from app.store import clockwork, keys
from app.store.jobs import LIVE, QUEUES_KEY, JobTemplate, queue_key
from app.store.scripts import source

GROUP: Final = 256
"""Events a call: Redis serves others in between. One POST is never split, so a larger one makes a larger call."""

CALLS: Final = 2
"""Calls under way at once. With one, web and Redis take turns: each idles while the other works."""

FEW: Final = 16
"""Requests that are not divided: a call costs as much as ten events."""

QUEUED, COALESCED, DUPLICATE = range(3)


class Recorded(msgspec.Struct, frozen=True):
    """What became of the events of one POST."""

    queued: int
    coalesced: int
    duplicates: int


class _Waiting(msgspec.Struct):
    size: int
    arguments: list[Any]
    answer: asyncio.Future[list[int]]


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
        self._accept = redis.register_script(source("accept"))
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
        self._dedup = dedup_days * clockwork.DAY
        self._kept = event_days * clockwork.DAY
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._writers: set[asyncio.Task[None]] = set()

    async def accept(self, events: Sequence[OrderProcessed], request_id: str) -> Recorded:
        """Record the events of one POST in one step with those of the same moment.

        Raises NotRecorded (`redis_unavailable`): then none of them, or all without our knowing, are recorded.
        """
        arguments: list[Any] = []
        for event in events:
            arguments += (
                event.digest,
                event.company_id,
                event.order_id,
                event.status_word,
                event.reference,
                event.secret,
                request_id,
                event.timestamp,
            )
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(len(events), arguments, answer))
        if len(self._writers) < CALLS:
            self._writers.add(asyncio.create_task(self._write()))
        outcomes = await answer
        return Recorded(outcomes.count(QUEUED), outcomes.count(COALESCED), outcomes.count(DUPLICATE))

    async def _write(self) -> None:
        group: list[_Waiting] = []
        try:
            while self._waiting:
                group = self._next_group()
                await self._write_group(group)
        except Exception as error:
            # Who waits would meet the same Redis, one time-out after the other: all are told now.
            for one in [*group, *self._waiting]:
                if not one.answer.done():
                    one.answer.set_exception(NotRecorded("redis_unavailable", type(error).__name__))
            self._waiting.clear()
        finally:
            # Here and not in a callback, which comes a turn later: who arrives in between would find no free writer.
            self._writers.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next_group(self) -> list[_Waiting]:
        """Take half of who waits: while Redis works on one half, the answers to the other are written."""
        share = max(len(self._waiting) // CALLS, FEW)
        group = [self._waiting.popleft()]
        size = group[0].size
        while self._waiting and len(group) < share and size + self._waiting[0].size <= GROUP:
            group.append(self._waiting.popleft())
            size += group[-1].size
        return group

    async def _write_group(self, group: list[_Waiting]) -> None:
        now = self._clock()
        arguments = [
            now,
            clockwork.GRACE,
            self._dedup,
            now - self._kept,
            keys.PREFIX,
            LIVE,
            *self._template.fields(),
        ]
        for one in group:
            arguments += one.arguments
        outcomes = await self._accept(keys=self._keys, args=arguments)
        at = 0
        for one in group:
            # A client that hung up took its future with it; the others' answers are not touched.
            if not one.answer.done():
                one.answer.set_result(outcomes[at : at + one.size])
            at += one.size
