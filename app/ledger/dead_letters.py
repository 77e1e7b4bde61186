"""Dead letters: orders whose fetch, and deliveries whose attempts, ended without success.

Where a method is asked for it, also deliveries that failed and wait for their next attempt, to be tried at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from app.ids import OrderKey
from app.ledger.orders import Archive
from app.ledger.record import OrderRecord, SinkRecord
from app.ledger.redis import Redis, Scored, oldest_first
from app.times import from_ms, to_ms

RECORD_GONE = "record_gone"
"""Reason of a dead letter whose order has no record any more, or whose requeue was interrupted."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead order (`sink` is ""), or one dead delivery of it, since `at`, for `reason`."""

    company_id: str
    order_id: str
    sink: str
    at: datetime
    reason: str
    http_status: int | None
    status: str
    reference: str

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)


class DeadQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters; all conditions must hold. `since` and `until` are aware, inclusive: when it became one."""

    company_id: str | None = None
    sink: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime

    def matches(self, letter: DeadLetter) -> bool:
        return (
            self.company_id in (None, letter.company_id)
            and self.sink in (None, letter.sink)
            and self.reason in (None, letter.reason)
            and (self.since is None or letter.at >= self.since)
            and letter.at <= self.until
        )


class DeadLetters:
    """Reads dead letters; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._archive = Archive(redis)

    def oldest_first(self, query: DeadQuery) -> Iterator[DeadLetter]:
        """Return the orders that match, then the deliveries that match, each from the oldest on."""
        since = None if query.since is None else to_ms(query.since)
        # With an end: what is requeued and dies again meanwhile must not come again and again.
        until = to_ms(query.until)
        fetches = () if query.sink else (self._redis.names.dead,)
        for zset in (*fetches, self._redis.names.dead_deliveries):
            for page in oldest_first(self._redis, zset, since, until):
                yield from filter(query.matches, self._letters(page))

    def waiting(self, sink: str) -> Iterator[DeadLetter]:
        """Return the deliveries to a sink that failed and wait for their next attempt, the next one first.

        One that fails again meanwhile may come again.
        """
        for page in oldest_first(self._redis, self._redis.names.deliveries(sink)):
            orders = [OrderKey.of(member) for member, _ in page]
            for record in filter(None, self._archive.records(orders)):
                yield from (_waiting(record, one) for one in record.failing_sinks if one.name == sink)

    def of(self, order: OrderKey, *, waiting: bool = False) -> list[DeadLetter]:
        """Return the dead letters of one order, and if asked for those of its deliveries that wait."""
        record = self._archive.record(order)
        if record is None:
            return []
        own = [_letter(order, "", record.dead_at, record)] if record.dead and record.dead_at else []
        for sink in record.dead_sinks:
            score: Any = self._redis.zscore(self._redis.names.dead_deliveries, f"{order.member} {sink.name}")
            own.append(_letter(order, sink.name, from_ms(int(score or 0)), record))
        return own + [_waiting(record, sink) for sink in record.failing_sinks if waiting]

    def _letters(self, page: list[Scored]) -> Iterator[DeadLetter]:
        named = [(OrderKey.of(order), sink) for order, _, sink in (member.partition(" ") for member, _ in page)]
        records = self._archive.records([order for order, _ in named])
        for (order, sink), (_, score), record in zip(named, page, records, strict=True):
            yield _letter(order, sink, from_ms(score), record)


def _waiting(record: OrderRecord, sink: SinkRecord) -> DeadLetter:
    """Return a delivery that waits; `at` is its next attempt."""
    letter = _letter(record.key, sink.name, sink.next_at or from_ms(0), record)
    return msgspec.structs.replace(letter, reason=sink.error.partition(" ")[0])


def _letter(order: OrderKey, sink: str, at: datetime, found: OrderRecord | None) -> DeadLetter:
    record = found or OrderRecord(**order._asdict())
    reason = next((one.dead for one in record.sinks if one.name == sink), "") if sink else record.dead
    return DeadLetter(
        company_id=order.company_id,
        order_id=order.order_id,
        sink=sink,
        at=at,
        reason=reason or RECORD_GONE,
        http_status=None if sink else record.http_status,
        status=record.known_status,
        reference=record.reference,
    )
