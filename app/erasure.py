"""Erasing orders: what somebody may ask for whose name is in one. `erase` comes first and blocks; the rest tidies up.

A run that dies half way leaves the orders that it has begun in `ota:erasing`, and the next run takes them along. What
an order was called (its references, its guests' addresses) is known only until `erase`: the audit is cleared before.

Words of an order that people typed into a replay, as who or why: they leave the audit and the plans with it.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
from redis import Redis

from app.audit import Audit, Deed
from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.history import DeliveryEnded
from app.ledger.orders import Archive, read_fields
from app.ledger.record import OrderRecord
from app.ledger.redis import Script, oldest_first, stream_pages
from app.times import from_ms, to_ms
from app.upstream.models import parse_order

_EVENTS: Final = 250

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
    stored_token: int
    first: datetime | None
    references: tuple[str, ...]
    words: tuple[str, ...] = msgspec.field(default=())
    copies: tuple[Copies, ...] = ()

    def __repr__(self) -> str:
        return f"Traces({self.order.member})"


class Erasure:
    """The steps of an erasure; `now` is ms since 1970. Each script raises OtherSchema."""

    def __init__(
        self, redis: Redis, *, order_days: int, event_days: int, clock: Callable[[], int] | None = None
    ) -> None:
        self._redis = redis
        self._audit = Audit(redis, event_days=event_days)
        self._archive = Archive(redis)
        self._keep = order_days * policy.DAY
        self._erase = Script(redis, "erase", clock)
        self._erase_events = Script(redis, "erase_events", clock)

    def erased_among(self, orders: Sequence[OrderKey]) -> set[OrderKey]:
        """Return the orders among these that were erased: they are not fetched or delivered any more."""
        found = read_fields(self._redis, orders, "erased_at")
        return {order for order, (erased_at,) in zip(orders, found, strict=True) if erased_at}

    def traces(self, order: OrderKey) -> Traces | None:
        """Return what is held of an order, None if there is no record of it."""
        stored: Any = self._redis.hget(keys.record(order), "stored_token")
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
            erased=record.erased_at,
            content=content,
            revision=record.revision,
            stored_token=int(stored or 0),
            first=record.first_at,
            references=references,
            words=tuple(dict.fromkeys((order.order_id, *told))),
            copies=tuple(self._copies(record)),
        )

    def orders_of(self, address: str, company_id: str | None, step: Step) -> list[OrderKey]:
        """Return the orders in whose content this e-mail address stands, in any case.

        All stored contents are read; `step` gets the size of each page. An order that changes meanwhile is read again;
        one that is fetched only after the walk has ended is not found.
        """
        wanted = _normal(address)
        found: dict[OrderKey, None] = {}
        for page in oldest_first(self._redis, keys.ORDERS) if wanted else ():
            orders = [OrderKey.of(member) for member, _ in page]
            asked = [one for one in orders if company_id in (None, one.company_id)]
            with self._redis.pipeline(transaction=False) as pipe:
                for order in asked:
                    pipe.get(keys.content(order))
                held = pipe.execute(raise_on_error=False)
            found |= {order: None for order, packed in zip(asked, held, strict=True) if wanted in _addresses(packed)}
            step(len(page))
        return list(found)

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

    def erase(self, traces: Traces) -> datetime | None:
        """Replace the order by a tombstone; return when it was first erased.

        Then its traces are to be read again. Raises LookupError if the order is not here any more.
        """
        order = traces.order
        verdict, at = self._erase(
            order=order.member,
            stored_token=traces.stored_token,
            references=[keys.reference(one) for one in traces.references],
            keep=self._keep,
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
            last, looked, gone = self._erase_events(
                start=start, stop=newest[0][0].decode(), limit=_EVENTS, orders=members
            )
            removed += int(gone)
            step(looked)
            if looked < _EVENTS:
                return removed
            start = f"({last.decode()}"

    def _copies(self, record: OrderRecord) -> Iterator[Copies]:
        told: dict[str, set[int]] = {
            # A sink that failed may have kept the revision.
            sink.name: {sink.revision, record.revision if sink.attempts else 0}
            for sink in record.sinks
        }
        for entry in self._archive.history(record.key):
            if isinstance(entry, DeliveryEnded):
                told.setdefault(entry.sink, set()).add(entry.revision)
        for sink, revisions in sorted(told.items()):
            names = [f"{record.company_id}/{record.order_id}/{one}/" for one in sorted(revisions - {0})]
            if names:
                yield Copies(sink, tuple(names))


class AuditWords:
    """The texts of the audit and of replays that people typed: who, why and selection."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    @staticmethod
    def are_in(text: str, words: Collection[str]) -> bool:
        """Return whether the text holds one of the words, as a whole word, in any case."""
        return _pattern(words).search(text.casefold()) is not None

    def forget(self, words: Collection[str]) -> int:
        """Delete the audit entries that hold one of the words, and who and why of such replays; return how many."""
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
        for page in stream_pages(self._redis, keys.AUDIT):
            for deed_id, fields in page:
                texts = {name.decode(): value.decode() for name, value in fields.items()}
                typed = " ".join(texts.get(name, "") for name in ("who", "why", "selected"))
                if texts.get("what") != DEED and named.search(typed.casefold()):
                    yield deed_id.decode()

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
    # Whole words, since a reference may be as short as "12".
    alternatives = "|".join(re.escape(word.strip().casefold()) for word in words if word.strip())
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)" if alternatives else r"(?!)")


def _addresses(packed: Any) -> set[str]:
    if not isinstance(packed, bytes):
        return set()
    try:
        return set(map(_normal, parse_order(zlib.decompress(packed)).addresses))
    except (UnreadableAnswer, zlib.error):
        return set()


def _normal(address: str) -> str:
    return unicodedata.normalize("NFKC", address).strip().casefold()
