"""The audit: who changed what by hand, when and why. A stream in Redis; retention ends it with the events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, Final, Literal

import msgspec
from redis.client import Pipeline

from app.ids import OrderKey, guid
from app.ledger.keys import Keys
from app.ledger.pages import Page, StreamEntry, stream_page
from app.ledger.redis import Redis, stream_pages
from app.times import from_ms

MOST_READ: Final = 1000
"""Entries that are searched for those of one order."""

LONGEST_TEXT: Final = 200
"""Characters of `who` and `why`, and of `selected` for one command."""


Action = Literal[
    "replay",
    "resume",
    "cancel",
    "refetch",
    "requeue",
    "drop",
    "reconcile",
    "order-confirm",
    "order-cancel",
    "erase",
    "subscription-create",
    "subscription-delete",
    "subscription-repair",
    "key-create",
    "key-revoke",
    "sink-disable",
    "sink-enable",
]
"""What the audit lists."""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One action: `what` (Action), its plan ("" without one), and the number of orders.

    `selected`: an order's company and id, a selection in words, a company and the address of a subscription, a key's
    name and its scopes or short id, or the name of a sink. `who` and `why` are a person's own words: no log has them.
    """

    what: str
    plan: str = ""
    who: str
    why: str
    selected: str
    orders: int

    @property
    def order(self) -> OrderKey | None:
        """Return the order that it is about alone, None if it is about others or none."""
        company_id, _, order_id = self.selected.partition(" ")[0].partition(":")
        return OrderKey(company_id, order_id) if guid(company_id) and guid(order_id) else None

    @property
    def about(self) -> str:
        """Return what of its `order` it is about: "to" and a sink, "" for all of it."""
        return self.selected.partition(" ")[2]


def append(redis: Redis | Pipeline, names: Keys, *entries: AuditEntry) -> None:
    """Add entries; before the action, since it may be interrupted. `redis` may be the pipeline of a transaction."""
    for entry in entries:
        fields: Any = msgspec.to_builtins(entry)
        redis.xadd(names.audit, fields)


def of_order(redis: Redis, order: OrderKey) -> list[tuple[datetime, AuditEntry]]:
    """Return those of the latest MOST_READ entries that are about this order alone, newest first."""
    entries = islice(newest_first(redis), MOST_READ)
    return [(at, one) for at, one in entries if one.order == order]


def newest_first(redis: Redis) -> Iterator[tuple[datetime, AuditEntry]]:
    """Return the entries of the last EVENT_DAYS, each with its time."""
    for entries in stream_pages(redis, redis.names.audit, newest_first=True):
        yield from map(_parsed, entries)


def page(
    redis: Redis,
    after: str | None = None,
    limit: int = 50,
    *,
    what: Action | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Page[tuple[datetime, AuditEntry]]:
    """Return a page of the same, of one action or of all; `since` and `until` are inclusive; raises UnknownCursor."""

    def matching(entries: Sequence[StreamEntry]) -> Iterator[tuple[datetime, AuditEntry] | None]:
        return (one if what in (None, one[1].what) else None for one in map(_parsed, entries))

    return stream_page(redis, redis.names.audit, matching, after, limit, since=since, until=until)


def _parsed(entry: StreamEntry) -> tuple[datetime, AuditEntry]:
    entry_id, fields = entry
    texts = {name.decode(): value.decode() for name, value in fields.items()}
    return from_ms(int(entry_id.partition(b"-")[0])), msgspec.convert(texts, AuditEntry, strict=False)
