"""Erasing orders, as a guest may demand: the content, the names, the events, and the texts that name the order.

`erase` leaves a tombstone that keeps the order from coming back; the steps after it remove the rest. A run that dies
leaves its orders in `ota:erasing`, and the next run finishes them. The names of an order (its references, the addresses
of its guests) are readable only before `erase`, so the texts of the audit and of replays are cleared first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from app import audit
from app.audit import AuditEntry
from app.erased_file import ErasedFile
from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.content import unpack
from app.ledger.history import DeliveryEnded
from app.ledger.orders import CONTENTS_A_CALL, Archive, get_content, read_each
from app.ledger.record import OrderRecord
from app.ledger.redis import Redis, Script, oldest_first, stream_pages
from app.ledger.revisions import get_older_contents, read_revisions
from app.times import from_ms, to_ms
from app.upstream.models import parse_order

_EVENTS: Final = 250
_KEYS: Final = 1000

ACTION: Final = "erase"
"""The action in the audit. Its entry stays, with the order's id and without any name."""

Step = Callable[[int], None]


class Copies(msgspec.Struct, frozen=True):
    """The copies that a sink has, or may have: we cannot erase them.

    `keys_begin`: the beginnings of the idempotency keys, one per revision, oldest first. They end with a digest of the
    content, which is not kept.
    """

    sink: str
    keys_begin: tuple[str, ...]


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of an order. `erased`: when it was erased before, None if it was not.

    `words` name the order or a guest and must not appear in any log or answer; `references` are among them.
    """

    order: OrderKey
    erased: datetime | None
    revision: int
    stored_token: int
    first: datetime | None
    references: tuple[str, ...]
    words: tuple[str, ...] = msgspec.field(default=())
    copies: tuple[Copies, ...] = ()

    def __repr__(self) -> str:
        return f"Traces({self.order.member})"


class Erasure:
    """The steps of an erasure; those that change something raise OtherSchema."""

    def __init__(self, redis: Redis, *, order_days: int, file: ErasedFile | None = None) -> None:
        self._redis = redis
        self._file = file or ErasedFile(None)
        self._archive = Archive(redis)
        self._keep = order_days * policy.DAY
        self._erase = Script(redis, "erase")
        self._erase_events = Script(redis, "erase_events")

    def traces(self, order: OrderKey) -> Traces | None:
        """Return what is stored of an order, None without a record."""
        stored: Any = self._redis.hget(self._redis.names.record(order), "stored_token")
        record = self._archive.record(order)
        if record is None:
            return None
        try:
            fetched = self._archive.order(order)
        except UnreadableAnswer:  # its names are unknown; all of it is erased
            fetched = None
        references = fetched.references if fetched is not None else ()
        contents = [one.raw for one in read_revisions(self._redis, record) if one.raw is not None]
        addresses = [address for raw in contents for address in parse_order(raw).addresses]
        names = filter(None, (record.reference, *references, *addresses))
        return Traces(
            order=order,
            erased=record.erased_at,
            revision=record.revision,
            stored_token=int(stored or 0),
            first=record.first_at,
            references=references,
            words=tuple(dict.fromkeys((order.order_id, *names))),
            copies=tuple(self._copies(record)),
        )

    def orders_of(self, address: str, company_id: str | None, step: Step) -> list[OrderKey]:
        """Return the orders of which a kept revision has this e-mail address, in any case.

        All stored contents are read; `step` gets the size of each page. An order that changes meanwhile is read again;
        one that is fetched after the last page is not found.
        """
        wanted = _normal(address)
        found: dict[OrderKey, None] = {}
        for page in oldest_first(self._redis, self._redis.names.orders) if wanted else ():
            orders = [OrderKey.of(member) for member, _ in page]
            asked = [one for one in orders if company_id in (None, one.company_id)]
            kept = get_content(self._redis.names), get_older_contents(self._redis.names)
            held = read_each(self._redis, asked, *kept, at_once=CONTENTS_A_CALL)
            for order, (latest, older) in zip(asked, held, strict=True):
                if any(
                    wanted in _addresses(packed) for packed in (latest, *(older if isinstance(older, list) else ()))
                ):
                    found[order] = None
            step(len(page))
        return list(found)

    def unfinished(self) -> list[OrderKey]:
        """Return the orders of a run that died before it was finished."""
        found: Any = self._redis.zrange(self._redis.names.erasing, 0, -1)
        return [OrderKey.of(member.decode()) for member in found]

    def remember(self, orders: Sequence[OrderKey]) -> None:
        """Write to ERASED_FILE that these orders are erased; raises SettingsError if it cannot be written."""
        self._file.add(orders)

    def note(self, orders: Sequence[OrderKey], who: str, why: str) -> None:
        """Write to the audit who erases these orders, and why."""
        entries = (AuditEntry(what=ACTION, who=who, why=why, selected=order.member, orders=1) for order in orders)
        audit.append(self._redis, self._redis.names, *entries)

    def forget_texts(self, words: Collection[str]) -> int:
        """Delete audit entries that have one of the words, and the texts of such replays; return how many.

        People typed these texts; the entries of erasures stay.
        """
        named = _pattern(words)

        def has_word(*texts: bytes | None) -> bool:
            return named.search(b" ".join(text or b"" for text in texts).decode().casefold()) is not None

        entries = [
            entry_id
            for page in stream_pages(self._redis, self._redis.names.audit)
            for entry_id, fields in page
            if fields.get(b"what") != ACTION.encode()
            if has_word(fields.get(b"who"), fields.get(b"why"), fields.get(b"selected"))
        ]
        redis: Any = self._redis
        plans = [self._redis.names.replay(plan.decode()) for plan in redis.zrange(self._redis.names.replays, 0, -1)]
        plans = [plan for plan in plans if has_word(*redis.hmget(plan, "who", "why", "selected"))]
        with self._redis.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.xdel(self._redis.names.audit, entry)
            for plan in plans:
                pipe.hset(plan, mapping={"who": "", "why": "", "selected": ""})
            pipe.execute()
        return len(entries) + len(plans)

    def finish(self, orders: Sequence[OrderKey]) -> None:
        """Record that nothing of these orders is left."""
        if orders:
            self._redis.zrem(self._redis.names.erasing, *(order.member for order in orders))

    def erase(self, traces: Traces) -> datetime | None:
        """Replace the order by a tombstone; return when it was first erased.

        None if the content changed after its traces were read: read them again, and repeat. Raises LookupError without
        a record.
        """
        order = traces.order
        outcome, at = self._erase(
            order=order.member,
            stored_token=traces.stored_token,
            references=[self._redis.names.reference(one) for one in traces.references],
            packed=order.packed,
            keep=self._keep,
        )
        if outcome == b"unknown":
            raise LookupError(order.order_id)
        return from_ms(at) if outcome == b"erased" else None

    def forget_references(self, orders: Sequence[OrderKey], step: Step) -> None:
        """Remove the orders from the index of references, also from earlier ones, which their contents do not name.

        All keys are read; `step` gets how many sets of each page.
        """
        redis: Any = self._redis
        cursor = -1
        while cursor and orders:
            cursor, found = redis.scan(max(cursor, 0), match=f"{redis.names.reference_prefix}*", count=_KEYS)
            with redis.pipeline(transaction=False) as pipe:
                for key in found:
                    pipe.srem(key, *(order.packed for order in orders))
                pipe.execute()
            step(len(found))

    def erase_again(self, order: OrderKey) -> bool:
        """Erase an order that ERASED_FILE names and Redis does not know as erased; return whether it was such a one.

        Redis has lost its tombstone, and the order came back with an event, a request or an older copy.
        """
        if order not in self._file:
            return False
        found = self.traces(order)
        if found is None or found.erased is not None:
            return False
        # Also before it is erased: a worker that is killed after that does not come back here.
        self.forget_events([found], lambda _: None)
        while found is not None and self.erase(found) is None:
            found = self.traces(order)
        if found is not None:
            self.forget_events([found], lambda _: None)
        self.finish([order])
        return True

    def forget_events(self, found: Iterable[Traces], step: Step) -> int:
        """Delete the events of these orders; return how many. `step` gets the size of each page."""
        traces = [one for one in found if one.first is not None]
        newest: Any = self._redis.xrevrange(self._redis.names.events, count=1)
        if not traces or not newest:
            return 0
        # No event of an order is older than its record: both times are of Redis.
        start, removed = str(min(to_ms(one.first) for one in traces if one.first)), 0
        stop, members = newest[0][0].decode(), [one.order.member for one in traces]
        while True:
            last, read, deleted = self._erase_events(start=start, stop=stop, limit=_EVENTS, orders=members)
            removed += int(deleted)
            step(read)
            if read < _EVENTS:
                return removed
            start = f"({last.decode()}"

    def _copies(self, record: OrderRecord) -> Iterator[Copies]:
        # A sink that failed may have kept the revision.
        delivered = {sink.name: {sink.revision, record.revision if sink.attempts else 0} for sink in record.sinks}
        ended = [one for one in self._archive.history(record.key) if isinstance(one, DeliveryEnded)]
        for entry in ended:
            if entry.outcome == "skipped":
                delivered.get(entry.sink, set()).discard(entry.revision)
        for entry in ended:
            if entry.outcome != "skipped":
                delivered.setdefault(entry.sink, set()).add(entry.revision)
        for sink, revisions in sorted(delivered.items()):
            beginnings = [f"{record.company_id}/{record.order_id}/{one}/" for one in sorted(revisions - {0})]
            if beginnings:
                yield Copies(sink, tuple(beginnings))


def are_in(text: str, words: Collection[str]) -> bool:
    """Return whether the text has one of the words, as a whole word, in any case."""
    return _pattern(words).search(text.casefold()) is not None


def _pattern(words: Collection[str]) -> re.Pattern[str]:
    # Whole words, since a reference may be as short as "12".
    alternatives = "|".join(re.escape(word.strip().casefold()) for word in words if word.strip())
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)" if alternatives else r"(?!)")


def _addresses(packed: Any) -> set[str]:
    try:
        return set(map(_normal, parse_order(unpack(packed)).addresses))
    except UnreadableAnswer:  # no content, or not one of ours
        return set()


def _normal(address: str) -> str:
    return unicodedata.normalize("NFKC", address).strip().casefold()
