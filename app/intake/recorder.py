"""Group commit: requests that arrive together share one call of accept.lua, which records their events in Redis.

While a write is under way, later callers wait and share the next one. The slower the store, the larger the groups, and
each caller still gets its own answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, TypeVar, cast

import msgspec
from redis.exceptions import RedisError, ResponseError

from app.errors import NotRecorded, OtherSchema
from app.intake.envelope import OrderProcessed
from app.ledger import policy
from app.ledger.redis import VERSION, cause, code, fresh, is_other_schema, other_schema, packed, source
from app.ledger.redis import AsyncRedis as Redis
from app.ledger.rq_jobs import LIVE, QUEUES_KEY, JobTemplate, queue_key
from app.traces import ExportingTracer

GROUP: Final = 256
"""Events per write, so that Redis serves others in between. Only a larger POST is a larger write."""

LARGEST: Final = 4 * GROUP
"""Events of one POST per write. A script takes 40 ms for them, and can unpack no more than about 8,000."""

CALLS: Final = 2
"""Calls of Redis under way at once. With one, web and Redis take turns: each idles while the other works."""

FEW: Final = 16
"""While fewer callers wait they share one call, and there is no second one: a call costs as much as ten events."""

FIRST_SECONDS: Final = 0.6
"""The first try of a call: the network may have forgotten an idle connection, so that no answer ever comes."""

CALL_SECONDS: Final = 1.0
"""The second try, on a new connection: connecting, authentication and loading the script have time-outs too."""

DROP_SECONDS: Final = 0.1
"""For closing the idle connections before the second try, which does not need them closed."""

ACCEPT_SECONDS: Final = 1.5
"""One POST, from its arrival to the answer of Redis; with the spool's PUT_SECONDS it stays below 2.5 s."""

QUEUED, COALESCED, DUPLICATE, ERASED, REFUSED = range(5)

_PROBE_KEYS: Final = (
    *("schema", "due", "orders", "events", "counters", "seen:probe"),
    *("order:probe:probe", "event-rate:probe"),
)
"""What accept.lua writes besides the job, without the prefix of all keys."""

_NO_SPAN: Final = nullcontext()

T = TypeVar("T")


class Recorded(msgspec.Struct, frozen=True):
    """Events of one POST by outcome.

    `spooled`: on disk until Redis is available. `erased`: recorded without a fetch, since their orders were erased.
    """

    queued: int
    coalesced: int
    duplicates: int
    spooled: int = 0
    erased: int = 0


class _Waiting(msgspec.Struct, eq=False):
    events: Sequence[OrderProcessed]
    answer: asyncio.Future[Sequence[int]]
    deadline: float | None


class GroupCommit:
    """Passes the events of all callers that wait to `write`, which returns one outcome per event, or none at all.

    At most `calls` writes are under way at once. Each has until the deadline of its oldest caller, and who still waits
    came later: so each caller has an answer by its own deadline, without a timer of its own.
    """

    def __init__(self, write: Callable[[list[OrderProcessed]], Awaitable[Sequence[int]]], calls: int) -> None:
        self._write = write
        self._calls = calls
        self._waiting: deque[_Waiting] = deque()
        self._writers: set[asyncio.Task[None]] = set()

    async def put(self, events: Sequence[OrderProcessed], seconds: float | None) -> Sequence[int]:
        """Return the outcomes of these events; raises what `write` raises, and TimeoutError within `seconds`, if given.

        A caller that is cancelled before its turn is not written.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(events, loop.create_future(), loop.time() + seconds if seconds else None)
        self._waiting.append(one)
        if not self._writers or (len(self._writers) < self._calls and len(self._waiting) >= FEW):
            self._writers.add(asyncio.create_task(self._write_all()))
        try:
            return await one.answer
        except asyncio.CancelledError:
            # Events must not accumulate behind a store that hangs.
            with suppress(ValueError):
                self._waiting.remove(one)
            raise

    async def _write_all(self) -> None:
        group: list[_Waiting] = []
        try:
            # Fewer than FEW are left to the other writer, which goes on until none waits.
            while self._waiting and (len(self._writers) == 1 or len(self._waiting) >= FEW):
                group = self._next_group()
                try:
                    async with asyncio.timeout_at(group[0].deadline) as limit:
                        outcomes = await self._write([event for one in group for event in one.events])
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    # The store may only be slow: the next callers have their turn.
                    _fail(group, error)
                    continue
                start = 0
                for one in group:
                    end = start + len(one.events)
                    if not one.answer.done():
                        one.answer.set_result(outcomes[start:end])
                    start = end
        except Exception as error:
            # The waiting callers would get the same error, each after a time-out: all get it now.
            _fail([*group, *self._waiting], error)
            self._waiting.clear()
        finally:
            # Not in a callback, which runs a turn of the loop later: until then a caller would start no writer.
            self._writers.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _next_group(self) -> list[_Waiting]:
        """Return an even share: while the store works on one half, the answers to the other are written."""
        share = max(len(self._waiting) // self._calls, FEW)
        group = [self._waiting.popleft()]
        size = len(group[0].events)
        while self._waiting and len(group) < share and size + len(self._waiting[0].events) <= GROUP:
            group.append(self._waiting.popleft())
            size += len(group[-1].events)
        return group


def _fail(callers: Iterable[_Waiting], error: Exception) -> None:
    for one in callers:
        if not one.answer.done():
            one.answer.set_exception(error)


class Inbox:
    """Records events in Redis and requests a fetch of their orders, atomically."""

    def __init__(
        self,
        redis: Redis,
        *,
        dedup_days: int,
        event_days: int,
        clock: Callable[[], int] | None = None,
        tracer: ExportingTracer | None = None,
    ) -> None:
        self._redis = redis
        self._tracer = tracer
        self._accept = redis.register_script(source("accept"))
        self._template = JobTemplate(redis.names)
        self._dedup = dedup_days * policy.DAY
        self._kept = event_days * policy.DAY
        self._clock = clock
        self._group = GroupCommit(self._write, CALLS)

    async def accept(self, events: Sequence[OrderProcessed]) -> Recorded:
        """Record the events of one POST within ACCEPT_SECONDS: in one step, or one for each LARGEST of them.

        Raises NotRecorded: `redis_unavailable` (a step did not happen, or it had no answer; sent again, what was
        recorded is a duplicate), `other_schema` (Redis holds data of another version), `record_refused` (all are
        recorded but those of orders whose keys are broken).
        """
        try:
            put = self._group.put(events, ACCEPT_SECONDS) if len(events) <= LARGEST else self._put_parts(events)
            outcomes = await put
        except Exception as error:
            raise self.refusal(error) from None
        if REFUSED in outcomes:
            # The whole POST is refused, since it has one answer: when it is sent again the others are duplicates.
            raise NotRecorded("record_refused", "ResponseError")
        return Recorded(
            outcomes.count(QUEUED),
            outcomes.count(COALESCED),
            outcomes.count(DUPLICATE),
            erased=outcomes.count(ERASED),
        )

    async def _put_parts(self, events: Sequence[OrderProcessed]) -> Sequence[int]:
        outcomes: list[int] = []
        async with asyncio.timeout(ACCEPT_SECONDS):
            for start in range(0, len(events), LARGEST):
                outcomes += await self._group.put(events[start : start + LARGEST], ACCEPT_SECONDS)
        return outcomes

    def refusal(self, error: Exception) -> NotRecorded:
        """Return why Redis recorded nothing, from an error of the script or of `probe`."""
        if other := other_schema(error):
            return NotRecorded("other_schema", type(other).__name__, str(other))
        return NotRecorded("redis_unavailable", code(error), cause(error, self._redis))

    async def probe(self) -> None:
        """Record an event as `accept` does, under keys of its own, and delete it again in the same transaction.

        Raises RedisError, OSError or TimeoutError when Redis does not record events, and OtherSchema.
        """
        await self._try_twice(self._probe)

    async def _probe(self, redis: Redis) -> None:
        names = redis.names
        # No KEY_PREFIX has a colon: another deployment's may be `ota-probe`.
        job = self._template.fields() | {"names": f"{names.rq_prefix}:probe-"}
        queue = queue_key(f":probe-{LIVE}", names)
        async with redis.pipeline(transaction=True) as pipe:
            pipe.get(names.schema)
            event = ("probe", "probe", "probe", "Issued", "", "current", "", "", 0)
            await self._accept(args=[self._header(prefix=names.probe, job=job, events=[event])], client=pipe)
            pipe.unlink(*(names.probe + name for name in _PROBE_KEYS), queue)
            pipe.unlink(f"{names.probe}job:{job['layout']}:{LIVE}", f"{job['prefix']}{job['names']}f-probe-probe-1")
            pipe.srem(QUEUES_KEY, queue)
            held, outcomes, *_ = await pipe.execute()
        if is_other_schema(held):
            raise OtherSchema(held.decode(errors="replace"), VERSION)
        if outcomes != [QUEUED]:
            raise ResponseError("the event was not recorded")

    async def _write(self, events: list[OrderProcessed]) -> list[int]:
        traces = {event.request_id: event.traceparent for event in events if event.traceparent}
        header = self._header(traces=traces, events=[event.arguments() for event in events])
        span: AbstractContextManager[None] = _NO_SPAN
        if self._tracer is not None:
            span = self._tracer.send(self._redis.names.rq_prefix + LIVE, traces.values(), len(events))
        with span:
            return cast("list[int]", await self._try_twice(lambda redis: self._accept(args=[header], client=redis)))

    def _header(self, **named: Any) -> bytes:
        now = None if self._clock is None else self._clock()
        given = {"job": self._template.fields(), "traces": {}} | named
        return packed(self._redis.names, now=now, grace=policy.GRACE, dedup=self._dedup, kept=self._kept, **given)

    async def _try_twice(self, call: Callable[[Redis], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                return await call(self._redis)
        except (RedisError, OSError, TimeoutError) as error:
            if other_schema(error):
                raise
        # Whatever made the old connection useless (the network forgot it, the server closed it, or is no primary now)
        # concerns the other idle ones too. TLS waits for the other side to close them: not here.
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(DROP_SECONDS):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
        # Not of the pool: meanwhile other calls give their connections back to it, and those may be as useless.
        async with asyncio.timeout(CALL_SECONDS), fresh(self._redis) as redis:
            return await call(redis)
