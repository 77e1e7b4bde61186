"""Reading orders: records, contents and histories; by id, or in lists."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any, Final

import msgspec
from redis.exceptions import ResponseError

from app.errors import BrokenRecord, UnreadableAnswer
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.content import unpack
from app.ledger.history import Entry, read_history
from app.ledger.keys import Keys
from app.ledger.record import OrderRecord, State, parse_record
from app.ledger.redis import PAGE, Redis, Scored, is_wrong_type, newest_first, oldest_first
from app.ledger.rq_jobs import BACKFILL, queue_key
from app.times import from_ms, to_ms
from app.upstream.decode import build, decode
from app.upstream.models import Order, Summary, parse_order

ON_THE_CLOCK: Final = frozenset({"pending", "deferred", "fetching"})
"""States of orders that all stand in `due`."""

MOST_SORTED: Final = 20_000
"""Orders of `due` that are sorted by their last change for a list of one state."""

MOST_SEARCHED: Final = 15_000
"""Orders of each list that are searched for what no index has: a look-up must be fast."""

MOST_ALIKE: Final = 10
"""Orders after which the search for ids with one beginning ends: more of the id is needed then."""

_SCANNED_A_CALL: Final = 5_000
_RECORDS_A_CALL: Final = 500
CONTENTS_A_CALL: Final = 200
"""Orders a round trip: contents can be large, and Redis serves others in between."""


class OrderQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which orders to list; all conditions must hold.

    `since` and `until` are aware, inclusive, and mean the last change; `status` is that of the latest event or fetch,
    in any case.
    """

    company_id: str | None = None
    status: str | None = None
    state: State | None = None
    since: datetime | None = None
    until: datetime | None = None

    def matches(self, record: OrderRecord, now: datetime) -> bool:
        return (
            (self.company_id is None or record.company_id == self.company_id)
            and (self.status is None or record.known_status.casefold() == self.status.casefold())
            and (self.state is None or record.state(now) == self.state)
        )


class Archive:
    """Reads orders; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def record(self, order: OrderKey) -> OrderRecord | None:
        """Return the record of one order, None if there is none.

        Raises BrokenRecord.
        """
        (found,) = self._read([order])
        if isinstance(found, BrokenRecord):
            raise found
        return found

    def records(
        self, orders: Sequence[OrderKey], broken: Callable[[BrokenRecord], object] = lambda _: None
    ) -> list[OrderRecord | None]:
        """Return the record of each order, None without one; a broken one is passed to `broken`, and is None too."""
        found: list[OrderRecord | None] = []
        for one in self._read(orders):
            if isinstance(one, BrokenRecord):
                broken(one)
                found.append(None)
            else:
                found.append(one)
        return found

    def _read(self, orders: Sequence[OrderKey]) -> list[OrderRecord | BrokenRecord | None]:
        names = self._redis.names
        found = read_each(self._redis, orders, _get_record(names))
        return [_parsed(order, answer, names) for order, (answer,) in zip(orders, found, strict=True)]

    def copies(self, orders: Sequence[OrderKey]) -> list[LocalCopy | None]:
        """Return what reconciling compares with the list, of each order; None where the ledger has no record."""
        names = self._redis.names
        answers = read_each(self._redis, orders, _get_record(names), get_content(names), at_once=CONTENTS_A_CALL)
        found = [
            (_parsed(order, fields, names), packed) for order, (fields, packed) in zip(orders, answers, strict=True)
        ]
        lost = self.unscheduled([record.key for record, _ in found if isinstance(record, OrderRecord)])
        return [
            _local_copy(record, packed, is_unscheduled=order in lost)
            for order, (record, packed) in zip(orders, found, strict=True)
        ]

    def unscheduled(self, orders: Sequence[OrderKey]) -> dict[OrderKey, list[str]]:
        """Return those whose outstanding fetch or delivery no dispatcher starts, and the clocks (keys) that lack them.

        They are not on the clock, or stand there at a time that no wait reaches. An order that a worker fetches now is
        none of them, nor is one that waits for an operator only.
        """
        names = self._redis.names
        sinks: Any = self._redis.hkeys(names.sinks) if orders else []
        clocks = {"": names.due, **{sink.decode(): names.deliveries(sink.decode()) for sink in sinks}}
        found: dict[OrderKey, list[str]] = {}
        for at in range(0, len(orders), _RECORDS_A_CALL):
            chunk = orders[at : at + _RECORDS_A_CALL]
            # One moment for all: a record that a step ends between two questions would look like one without a time.
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.time()
                for order in chunk:
                    pipe.ttl(names.record(order))
                    pipe.hgetall(names.record(order))
                    for clock in clocks.values():
                        pipe.zscore(clock, order.member)
                (seconds, _), *answers = pipe.execute(raise_on_error=False)
            farthest, now = seconds * policy.SECOND + policy.FARTHEST, from_ms(seconds * policy.SECOND)
            each = 2 + len(clocks)
            for number, order in enumerate(chunk):
                ttl, fields, *scores = answers[number * each : (number + 1) * each]
                # What has neither outstanding work nor a dead letter expires.
                record = _parsed(order, fields, names) if ttl == -1 else None
                if not isinstance(record, OrderRecord):
                    continue
                on = {name for name, score in zip(clocks, scores, strict=True) if score and score <= farthest}
                if missing := [clocks[one] for one in record.clocks(now, clocks) if one not in on]:
                    found[order] = missing
        return found

    def order(self, order: OrderKey) -> Order | None:
        """Return the order as it was last fetched, None if it never was.

        Raises UnreadableAnswer if what is stored is no order.
        """
        try:
            packed: Any = self._redis.get(self._redis.names.content(order))
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            packed = error
        return None if packed is None else parse_order(unpack(packed))

    def stored(self, orders: Sequence[OrderKey]) -> list[StoredOrder | BrokenRecord | None]:
        """Return record and content of each order, which belong together: they are read in one step."""
        names = self._redis.names
        with self._redis.pipeline(transaction=True) as pipe:
            for order in orders:
                pipe.hgetall(names.record(order))
                pipe.get(names.content(order))
            answers = pipe.execute(raise_on_error=False)
        found: list[StoredOrder | BrokenRecord | None] = []
        for order, fields, packed in zip(orders, answers[::2], answers[1::2], strict=True):
            for answer in (fields, packed):
                if isinstance(answer, Exception) and not is_wrong_type(answer):
                    raise answer
            record = _parsed(order, fields, names)
            found.append(StoredOrder(record, packed) if isinstance(record, OrderRecord) else record)
        return found

    def erased_among(self, orders: Sequence[OrderKey]) -> set[OrderKey]:
        """Return the erased orders among these: they are not fetched or delivered any more."""
        found = read_fields(self._redis, orders, "erased_at")
        return {order for order, (erased_at,) in zip(orders, found, strict=True) if erased_at}

    def history(self, order: OrderKey) -> tuple[Entry, ...]:
        """Return what happened to the order, as `read_history` does."""
        return read_history(self._redis, order)

    def due(self, order: OrderKey, sink: str = "") -> datetime | None:
        """Return when its fetch is due, or its delivery to a sink; None if it is not outstanding or is dead."""
        names = self._redis.names
        score = self._redis.zscore(names.deliveries(sink) if sink else names.due, order.member)
        return None if score is None else from_ms(int(score))

    def newest_first(
        self, query: OrderQuery, now: datetime, broken: Callable[[BrokenRecord], object] = lambda _: None
    ) -> Iterator[OrderRecord]:
        """Return the orders that match, the one that changed last first; broken ones are passed to `broken`."""
        since = None if query.since is None else to_ms(query.since)
        until = None if query.until is None else to_ms(query.until)
        if query.state in ON_THE_CLOCK and self._redis.zcard(self._redis.names.due) <= MOST_SORTED:
            found = self._on_the_clock(since, until)
        else:
            # Becoming a dead letter is a change like another: the few dead letters need no walk through all orders.
            zset = self._redis.names.dead if query.state == "dead" else self._redis.names.orders
            found = newest_first(self._redis, zset, since, until)
        for page in found:
            orders = [OrderKey.of(member) for member, _ in page]
            wanted = [one for one in orders if query.company_id in (None, one.company_id)]
            for record in self.records(wanted, broken):
                # An order that has ended its days may stand in the list a little longer.
                if record is not None and query.matches(record, now):
                    yield record

    def of_companies(self, order_id: str, company_ids: Iterable[str]) -> list[OrderKey]:
        """Return the orders with this id that these companies have."""
        orders = [OrderKey(company_id, order_id) for company_id in company_ids]
        found = read_each(self._redis, orders, lambda pipe, order: pipe.exists(self._redis.names.record(order)))
        return [order for order, (exists,) in zip(orders, found, strict=True) if exists]

    def of_any_company(self, order_id: str) -> list[OrderKey]:
        """Return the orders with this id, also of companies that the settings no longer name.

        Such a company is known by its counters: of each, events were counted, or gaps of its list.
        """
        fields: Any = self._redis.hkeys(self._redis.names.counters)
        counted = (field.decode(errors="replace").split("|") for field in fields)
        companies = {labels[0] for metric, *labels in counted if metric in {"events", "discrepancies"} and labels}
        return self.of_companies(order_id, sorted(companies))

    def beginning_with(self, prefix: str, company_id: str | None) -> list[OrderKey]:
        """Return orders whose id begins so; the search ends when it has more than MOST_ALIKE.

        No index has the ids in order: Redis looks at all of them, a million in about a second.
        """
        names, pattern = self._redis.names, f"{company_id or '*'}:{prefix}*"
        found: set[OrderKey] = set()
        for zset in (names.orders, names.due, names.dead):
            cursor = -1
            while cursor and len(found) <= MOST_ALIKE:
                answer: Any = self._redis.zscan(zset, max(cursor, 0), match=pattern, count=_SCANNED_A_CALL)
                cursor, members = answer
                found |= {OrderKey.of(member.decode()) for member, _ in members}
        return self._stored(found)

    def newest_beginning_with(self, prefix: str) -> list[OrderKey]:
        """Return those whose id begins so among the newest MOST_SEARCHED orders, pending ones and dead ones."""
        names, wanted, found = self._redis.names, f":{prefix}".encode(), set[OrderKey]()
        for zset in (names.orders, names.due, names.dead):
            members: Any = self._redis.zrevrange(zset, 0, MOST_SEARCHED - 1)
            found |= {OrderKey.of(one.decode()) for one in members if wanted in one}
        return self._stored(found)

    def count(self) -> int:
        """Return how many orders there are, a little more where some have ended their days."""
        return int(self._redis.zcard(self._redis.names.orders))

    def _stored(self, orders: Iterable[OrderKey]) -> list[OrderKey]:
        every = sorted(orders)
        held = read_fields(self._redis, every, "generation")
        return [order for order, (generation,) in zip(every, held, strict=True) if generation]

    def _on_the_clock(self, since: int | None, until: int | None) -> Iterator[list[Scored]]:
        """Return the orders of `due` in pages, the one that changed last first."""
        # An order whose due time moves meanwhile is read again at the end of the walk: a dict holds it once.
        members = dict(chain.from_iterable(oldest_first(self._redis, self._redis.names.due)))
        scores = read_each(
            self._redis,
            map(OrderKey.of, members),
            lambda pipe, order: pipe.zscore(self._redis.names.orders, order.member),
        )
        changed = [
            (member, int(score))
            for member, (score,) in zip(members, scores, strict=True)
            if score is not None and (since or 0) <= score and (until is None or score <= until)
        ]
        changed.sort(key=lambda one: one[1], reverse=True)
        return (changed[at : at + PAGE] for at in range(0, len(changed), PAGE))

    def backfill(self) -> int:
        """Return how many jobs wait in backfill."""
        waiting: Any = self._redis.llen(queue_key(BACKFILL, self._redis.names))
        return int(waiting)

    def has_live_pending(self, company_ids: Collection[str]) -> bool:
        """Return whether an order of these companies is pending in the queue live."""
        due = chain.from_iterable(oldest_first(self._redis, self._redis.names.due))
        orders = (order for member, _ in due if (order := OrderKey.of(member)).company_id in company_ids)
        fields = read_fields(self._redis, orders, "generation", "fetched_generation", "queue")
        return any(
            int(latest or 0) > int(fetched or 0) and queue != BACKFILL.encode() for latest, fetched, queue in fields
        )


def _parsed(order: OrderKey, answer: Any, names: Keys) -> OrderRecord | BrokenRecord | None:
    if isinstance(answer, Exception):
        return BrokenRecord(order.order_id, names.record(order))
    # Every event and every request raises `generation`: without it the hash is what a late command left.
    if b"generation" not in answer:
        return None
    try:
        return parse_record(order, answer)
    except (ValueError, OverflowError):
        return BrokenRecord(order.order_id, names.record(order))


class StoredOrder(msgspec.Struct, frozen=True):
    """The record of an order, and its content as Redis has it: None if it was never fetched, or erased."""

    record: OrderRecord
    packed: Any

    @property
    def raw(self) -> bytes:
        """Return the content as upstream sent it; raises UnreadableAnswer if what is stored is none."""
        return unpack(self.packed)


class LocalCopy(msgspec.Struct, frozen=True):
    """One order as stored here. `status` is that of the latest fetch, or DeletedUpstream; "" without a fetch.

    `unscheduled`: no dispatcher starts its outstanding fetch or delivery. `dead` is the reason code of a dead letter,
    `discarded`, `erased`, or "" for none of them; `fetched_ms` since 1970, 0 for never; `content` the fields of the
    stored content that a list has too, None where nothing is stored. `listed_row`: digest of the row for which
    reconciling requested the last fetch, "" for none; `request_id` that of the record.
    """

    pending: bool
    dead: str
    status: str
    fetched_ms: int
    content: Summary | None
    unscheduled: bool = False
    listed_row: str = ""
    request_id: str = ""


def _local_copy(record: OrderRecord | BrokenRecord | None, packed: Any, *, is_unscheduled: bool) -> LocalCopy | None:
    if isinstance(record, BrokenRecord):
        # A request would not help: an operator must look at its keys.
        return LocalCopy(pending=True, dead="", status="", fetched_ms=0, content=None)
    if record is None:
        return None
    return LocalCopy(
        pending=record.is_pending,
        dead="erased" if record.erased_at else record.dead or ("discarded" if record.is_discarded else ""),
        status=record.status,
        fetched_ms=0 if record.fetched_at is None else to_ms(record.fetched_at),
        content=_summary(packed),
        unscheduled=is_unscheduled,
        listed_row=record.listed_row,
        request_id=record.request_id,
    )


def _summary(packed: Any) -> Summary | None:
    """Return the part of the content that a list shows too: its fields have the same names and rules."""
    try:
        return build(Summary, decode(unpack(packed)))
    except UnreadableAnswer:  # nothing is stored, or another fetch replaces it
        return None


def read_fields(redis: Redis, orders: Iterable[OrderKey], *names: str) -> Iterator[list[bytes | None]]:
    """Yield for each order these fields of its record; None for a field that is not there, and for a broken record."""
    for (answer,) in read_each(redis, orders, lambda pipe, order: pipe.hmget(redis.names.record(order), names)):
        yield [None] * len(names) if isinstance(answer, Exception) else answer


def read_each(
    redis: Redis,
    orders: Iterable[OrderKey],
    *commands: Callable[[Any, OrderKey], object],
    at_once: int = _RECORDS_A_CALL,
) -> Iterator[list[Any]]:
    """Yield for each order the answers to these commands, which add one call each to a pipeline.

    One round trip for `at_once` orders. A key of another type is the fault of that one order: its answer is the error.
    """
    left = iter(orders)
    while chunk := list(islice(left, at_once)):
        with redis.pipeline(transaction=False) as pipe:
            for order in chunk:
                for command in commands:
                    command(pipe, order)
            answers = pipe.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception) and not is_wrong_type(answer):
                raise answer
        yield from (answers[at : at + len(commands)] for at in range(0, len(answers), len(commands)))


def _get_record(names: Keys) -> Callable[[Any, OrderKey], object]:
    return lambda pipe, order: pipe.hgetall(names.record(order))


def get_content(names: Keys) -> Callable[[Any, OrderKey], object]:
    """Return the command for `read_each` that gets the content of an order."""
    return lambda pipe, order: pipe.get(names.content(order))
