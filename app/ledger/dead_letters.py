"""Dead letters: orders whose fetch, and deliveries whose attempts, ended without success.

Where a method is asked for it, also deliveries that failed and wait for their next attempt, to be tried at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from typing import Any

import msgspec

from app.ids import OrderKey
from app.ledger.orders import Archive
from app.ledger.pages import MOST_LOOKED_AT, MOST_READ, Page, scored_page
from app.ledger.record import OrderRecord, SinkRecord
from app.ledger.redis import PAGE, Redis, Scored, oldest_first
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


class DeadCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many dead fetches (`sink` is ""), or deliveries to a sink, have a reason.

    `reason` ends before its first colon: `rejected` counts all that a sink rejected, for whatever reason of its own.
    """

    sink: str
    reason: str
    count: int


class DeadTotal(msgspec.Struct, frozen=True):
    """How many dead fetches and dead deliveries match; at least so many unless it `is_whole`."""

    fetches: int
    deliveries: int
    is_whole: bool

    @property
    def count(self) -> int:
        return self.fetches + self.deliveries


class DeadQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters; all conditions must hold. `since` and `until` are aware, inclusive: when it became one.

    `reason` may end before its first colon, as in DeadCount.
    """

    company_id: str | None = None
    sink: str | None = None
    reason: str | None = None
    since: datetime | None = None
    until: datetime

    def matches(self, letter: DeadLetter) -> bool:
        return (
            self.company_id in (None, letter.company_id)
            and self.sink in (None, letter.sink)
            and self.reason in (None, letter.reason, _general(letter.reason))
            and (self.since is None or letter.at >= self.since)
            and letter.at <= self.until
        )


class DeadLetters:
    """Reads dead letters; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._archive = Archive(redis)

    def counts(self) -> list[DeadCount]:
        """Return the kinds of dead letters with their numbers, by sink and reason.

        One whose record is lost counts for the reason that it had.
        """
        kinds = self._kinds()
        with self._redis.pipeline(transaction=False) as pipe:
            for kind in kinds:
                pipe.zcard(self._redis.names.dead_by("|".join(kind)))
            numbers = pipe.execute()
        return [
            DeadCount(sink=sink, reason=reason, count=count)
            for (sink, reason), count in zip(kinds, numbers, strict=True)
            if count
        ]

    def oldest_first(self, query: DeadQuery) -> Iterator[DeadLetter]:
        """Return the orders that match, then the deliveries that match, each from the oldest on."""
        return filter(None, self._looked_at(query))

    def entries(self, query: DeadQuery) -> Iterator[Scored]:
        """Return the same as entries, each with its ms: an order, and for a delivery a space and its sink.

        No record is read where the entries tell which match.
        """
        of_company = f"{query.company_id or ''}:"
        for entries in self._walk(query):
            if _needs_records(query):
                found = zip(entries, self._matching(query, entries), strict=True)
                yield from (entry for entry, letter in found if letter is not None)
            else:
                yield from (one for one in entries if query.company_id is None or one[0].startswith(of_company))

    def total(self, query: DeadQuery, most: int) -> DeadTotal:
        """Return how many match.

        Without a company, and with a reason that ends before its first colon, these are all. Otherwise it looks at no
        more than `most` fetches and as many deliveries, or at MOST_READ of both where it must read their records.
        """
        if _needs_records(query):
            letters = list(islice(self._looked_at(query), MOST_READ))
            matching = [letter for letter in letters if letter is not None]
            fetches = sum(not letter.sink for letter in matching)
            return DeadTotal(fetches, len(matching) - fetches, len(letters) < MOST_READ)
        low: Any = "-inf" if query.since is None else to_ms(query.since)
        high, of_company = to_ms(query.until), f"{query.company_id}:".encode()
        client: Any = self._redis
        counts, is_whole = [], True
        for zsets in self._zsets(query):
            count, left = 0, most
            for zset in zsets:
                if query.company_id is None:
                    count += client.zcount(zset, low, high)
                    continue
                members = client.zrange(zset, low, high, byscore=True, offset=0, num=left + 1)
                is_whole = is_whole and len(members) <= left
                count += sum(member.startswith(of_company) for member in members[:left])
                left -= min(left, len(members))
            counts.append(count)
        fetches, deliveries = counts
        return DeadTotal(fetches, deliveries, is_whole)

    def page(self, query: DeadQuery, after: str | None = None, limit: int = 50) -> Page[DeadLetter]:
        """Return a page of what matches, orders and deliveries together, oldest first; raises UnknownCursor."""
        return scored_page(
            self._redis,
            [*chain(*self._zsets(query))],
            partial(self._matching, query),
            after,
            limit,
            since=query.since,
            until=query.until,
            most=MOST_READ if _needs_records(query) else MOST_LOOKED_AT,
        )

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

    def _kinds(self) -> list[tuple[str, str]]:
        """Return sink and reason of each kind."""
        found: Any = self._redis.smembers(self._redis.names.dead_kinds)
        kinds = (kind.decode().partition("|") for kind in found)
        return sorted((sink, reason) for sink, _, reason in kinds)

    def _zsets(self, query: DeadQuery) -> tuple[list[str], list[str]]:
        """Return the lists of the fetches that may match, and those of the deliveries."""
        names = self._redis.names
        if query.reason == RECORD_GONE or (query.reason is None and query.sink is None):
            return [names.dead] if not query.sink else [], [names.dead_deliveries]
        reason = None if query.reason is None else _general(query.reason)
        wanted = [one for one in self._kinds() if query.sink in (None, one[0]) and reason in (None, one[1])]
        fetches = [names.dead_by("|".join(one)) for one in wanted if not one[0]]
        return fetches, [names.dead_by("|".join(one)) for one in wanted if one[0]]

    def _looked_at(self, query: DeadQuery) -> Iterator[DeadLetter | None]:
        """Return the dead letter of each entry that may match, None where it does not."""
        return chain.from_iterable(self._matching(query, entries) for entries in self._walk(query))

    def _walk(self, query: DeadQuery) -> Iterator[list[Scored]]:
        """Return pages of the entries that may match: those of fetches, then those of deliveries, each oldest first."""
        since = None if query.since is None else to_ms(query.since)
        # With an end: what is requeued and dies again meanwhile must not come again and again.
        until = to_ms(query.until)
        for zsets in self._zsets(query):
            walks = [chain.from_iterable(oldest_first(self._redis, zset, since, until)) for zset in zsets]
            merged = heapq.merge(*walks, key=itemgetter(1))
            while entries := list(islice(merged, PAGE)):
                yield entries

    def _matching(self, query: DeadQuery, entries: Sequence[Scored]) -> list[DeadLetter | None]:
        """Return the dead letter of each entry that `_zsets` has, None where it does not match."""
        if query.reason is not None and not _needs_records(query):
            # The list of a kind has no other, and where the record is lost it alone knows the reason.
            query = msgspec.structs.replace(query, reason=None)
        parts = [member.partition(" ") for member, _ in entries]
        of_company = f"{query.company_id}:"
        wanted = [
            (OrderKey.of(member), sink, score)
            for (member, _, sink), (_, score) in zip(parts, entries, strict=True)
            if query.company_id is None or member.startswith(of_company)
        ]
        records = self._archive.records([order for order, _, _ in wanted])
        letters = {
            (order.member, sink): _letter(order, sink, from_ms(score), record)
            for (order, sink, score), record in zip(wanted, records, strict=True)
        }
        found = (letters.get((member, sink)) for member, _, sink in parts)
        return [one if one is not None and query.matches(one) else None for one in found]


def _needs_records(query: DeadQuery) -> bool:
    """Return whether only the record tells whether an entry matches: the rest of a reason, or that there is none."""
    return query.reason is not None and (query.reason == RECORD_GONE or query.reason != _general(query.reason))


def _general(reason: str) -> str:
    return reason.partition(":")[0]


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
