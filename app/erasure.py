"""Erasing orders: what somebody may ask for whose name is in one. `erase` comes first and blocks; the rest tidies up.

A run that dies half way leaves the orders that it has begun in `ota:erasing`, and the next run takes them along. What
an order was called (its references, its guests' addresses) is known only until `erase`: the audit is cleared before.

Words of an order that people typed into a replay, as who or why: they leave the audit and the plans with it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from redis import Redis
from redis.exceptions import ResponseError
from rq.job import Job

from app.audit import Audit, Deed
from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.history import HandedOn
from app.ledger.orders import Archive, OrderRecord
from app.ledger.redis import guarded, newer_data, source
from app.ledger.rq_jobs import BACKFILL, LIVE, queue_key
from app.times import from_ms, to_ms

_EVENTS: Final = 250
_JOBS: Final = 1000
"""A call: a millisecond or two of Redis, which serves others in between."""

_CHUNK: Final = 200

DEED: Final = "erase"
"""What an erasure is called in the audit, where it stays with the order's id and without any word of it."""

_SKEW: Final = policy.DAY
"""An event's id is by Redis's clock, `first` by ours: so much earlier the search begins."""

Step = Callable[[int], None]


class Copies(msgspec.Struct, frozen=True):
    """What a sink has, or may have: it is not ours to erase.

    `keys_begin`: how the idempotency keys begin, a revision each, oldest first; they end with a digest of the content,
    which is not kept.
    """

    sink: str
    keys_begin: tuple[str, ...]


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """What is held of an order. `erased`: when it was erased before, None if it was not.

    `words` name the order or a guest, and are to stand in no log and no answer; `references` are among them.
    """

    order: OrderKey
    erased: datetime | None
    content: bool
    revision: int
    stored: str
    first: datetime | None
    references: tuple[str, ...]
    words: tuple[str, ...] = msgspec.field(default=())
    copies: tuple[Copies, ...] = ()

    def __repr__(self) -> str:
        return f"Traces({self.order.member})"


class Erasure:
    """The steps; `now` is ms since 1970. Each raises NewerData for data of a newer version of ours."""

    def __init__(self, redis: Redis, *, order_days: int, event_days: int) -> None:
        self._redis = redis
        self._audit = Audit(redis, event_days=event_days)
        self._archive = Archive(redis)
        self._keep = order_days * policy.DAY
        names = ("erase", "erase_events", "erase_jobs")
        self._script = {name: redis.register_script(guarded(source(name))) for name in names}

    def erased_among(self, orders: Sequence[OrderKey]) -> set[OrderKey]:
        """Return those that were erased: nobody fetches or hands them on any more."""
        found: set[OrderKey] = set()
        for at in range(0, len(orders), _CHUNK):
            chunk = orders[at : at + _CHUNK]
            with self._redis.pipeline(transaction=False) as pipe:
                for order in chunk:
                    pipe.hexists(keys.record(order), "erased")
                found |= {order for order, erased in zip(chunk, pipe.execute(), strict=True) if erased}
        return found

    def traces(self, order: OrderKey) -> Traces | None:
        """Return what is held of an order, None if it is not here."""
        stored: Any = self._redis.hget(keys.record(order), "stored")
        record = self._archive.record(order)
        if record is None:
            return None
        content = bool(self._redis.exists(keys.content(order)))
        try:
            fetched = self._archive.order(order)
        except (UnreadableAnswer, zlib.error):  # what it was called is not known, and all of it goes
            fetched = None
        references = fetched.references if fetched is not None else ()
        addresses = fetched.addresses if fetched is not None else ()
        told = filter(None, (record.reference, *references, *addresses))
        return Traces(
            order=order,
            erased=record.erased,
            content=content,
            revision=record.revision,
            stored=(stored or b"").decode(),
            first=record.first,
            references=references,
            words=tuple(dict.fromkeys((order.order_id, *told))),
            copies=tuple(self._copies(record)),
        )

    def unfinished(self) -> list[OrderKey]:
        """Return the orders that were erased by a run that died before it was done."""
        found: Any = self._redis.zrange(keys.ERASING, 0, -1)
        return [OrderKey.of(member.decode()) for member in found]

    def note(self, orders: Sequence[OrderKey], who: str, why: str, now: int) -> None:
        """Tell the audit who erases these orders, and why."""
        oldest = self._audit.oldest_kept(now)
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                deed = Deed(what=DEED, plan="", who=who, why=why, selected=order.member, orders=1)
                self._audit.note(deed, oldest, pipe)
            pipe.execute()

    def finish(self, orders: Sequence[OrderKey]) -> None:
        """Note that nothing of these orders is left here."""
        if orders:
            self._redis.zrem(keys.ERASING, *(order.member for order in orders))

    def erase(self, traces: Traces, now: int) -> datetime | None:
        """Leave a tombstone of the order; return when it was first erased, None if another content came meanwhile.

        Then its traces are to be read again. Raises LookupError if the order is not here any more.
        """
        order = traces.order
        verdict, at = self._run(
            "erase",
            [
                keys.record(order),
                keys.DUE,
                keys.DEAD,
                keys.trail(order),
                keys.content(order),
                keys.DEAD_SINKS,
                keys.reconcile_watch(order.company_id),
                keys.ERASING,
                *map(keys.reference, traces.references),
            ],
            [now, order.member, self._keep, traces.stored, order.order_id],
        )
        if verdict == b"unknown":
            raise LookupError(order.order_id)
        return from_ms(at) if verdict == b"erased" else None

    def forget_events(self, found: Iterable[Traces], now: int, step: Step) -> int:
        """Take the events of these orders out of the stream; return how many; `step` is told the size of each page."""
        traces = list(found)
        # A clock that was ahead is no reason to pass an event over.
        oldest = min((now if one.first is None else min(to_ms(one.first), now) for one in traces), default=now) - _SKEW
        newest: Any = self._redis.xrevrange(keys.EVENTS, count=1)
        if not traces or not newest:
            return 0
        start, removed = str(max(oldest, 0)), 0
        while True:
            members = [one.order.member for one in traces]
            last, looked, gone = self._run("erase_events", [keys.EVENTS], [start, newest[0][0], _EVENTS, *members])
            removed += int(gone)
            step(looked)
            if looked < _EVENTS:
                return removed
            start = f"({last.decode()}"

    def forget_jobs(self, orders: Sequence[OrderKey], step: Step) -> int:
        """Take the jobs of these orders out of the queues; return how many; `step` is told how many were looked at."""
        beginnings = [f"f-{order.company_id}-{order.order_id}-" for order in orders]
        removed = 0
        for name in (LIVE, BACKFILL):
            end, looked = -1, _JOBS
            while looked == _JOBS:
                stretch = [end - _JOBS + 1, end, Job.redis_job_namespace_prefix, *beginnings]
                looked, gone = self._run("erase_jobs", [queue_key(name)], stretch)
                removed += int(gone)
                end += gone - looked
                step(looked)
        return removed

    def _copies(self, record: OrderRecord) -> Iterator[Copies]:
        told: dict[str, set[int]] = {
            # Tried is as good as taken: what a sink that failed has kept nobody knows.
            sink.name: {sink.revision, record.revision if sink.tries else 0}
            for sink in record.sinks
        }
        for entry in self._archive.trail(record.key):
            if isinstance(entry, HandedOn):
                told.setdefault(entry.sink, set()).add(entry.revision)
        for sink, revisions in sorted(told.items()):
            names = [f"{record.company_id}/{record.order_id}/{one}/" for one in sorted(revisions - {0})]
            if names:
                yield Copies(sink, tuple(names))

    def _run(self, name: str, key_names: list[str], arguments: list[Any]) -> Any:
        try:
            return self._script[name](keys=key_names, args=arguments)
        except ResponseError as error:
            raise newer_data(error) or error from None


_PAGE: Final = 200


class AuditWords:
    """Finds texts that name an order or a guest, and forgets them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @staticmethod
    def are_in(text: str, words: Collection[str]) -> bool:
        """Return whether the text names one of the words, in any case."""
        return _pattern(words).search(text.casefold()) is not None

    def forget(self, words: Collection[str]) -> int:
        """Drop the deeds that name one of the words, and who asked for such a plan and why; return how many."""
        deeds, plans = list(self._deeds(words)), list(self._plans(words))
        with self._redis.pipeline(transaction=False) as pipe:
            for deed in deeds:
                pipe.xdel(keys.AUDIT, deed)
            for plan in plans:
                pipe.hset(keys.replay(plan), mapping={"who": "", "why": ""})
            pipe.execute()
        return len(deeds) + len(plans)

    def _deeds(self, words: Collection[str]) -> Iterator[str]:
        named = _pattern(words)
        low = "-"
        while page := self._page(low):
            for deed_id, fields in page:
                texts = {name.decode(): value.decode() for name, value in fields.items()}
                said = " ".join(texts.get(name, "") for name in ("who", "why", "selected"))
                if texts.get("what") != DEED and named.search(said.casefold()):
                    yield deed_id.decode()
            low = f"({page[-1][0].decode()}"

    def _page(self, low: str) -> Any:
        return self._redis.xrange(keys.AUDIT, low, "+", count=_PAGE)

    def _plans(self, words: Collection[str]) -> Iterator[str]:
        named = _pattern(words)
        found: Any = self._redis.zrange(keys.REPLAYS, 0, -1)
        with self._redis.pipeline(transaction=False) as pipe:
            for plan in found:
                pipe.hmget(keys.replay(plan.decode()), "who", "why")
            texts = pipe.execute()
        for plan, values in zip(found, texts, strict=True):
            if named.search(" ".join((value or b"").decode() for value in values).casefold()):
                yield plan.decode()


def _pattern(words: Collection[str]) -> re.Pattern[str]:
    # Whole words only: a reference may be as short as "12".
    alternatives = "|".join(re.escape(word.strip().casefold()) for word in words if word.strip())
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)" if alternatives else r"(?!)")
