"""The revisions of an order: its latest content, and what store_fetch.lua keeps of those that it replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec

from app.errors import UnreadableAnswer
from app.ids import OrderKey
from app.ledger.content import unpack
from app.ledger.keys import Keys
from app.ledger.orders import get_content, read_each
from app.ledger.record import OrderRecord
from app.ledger.redis import Redis
from app.times import from_ms
from app.upstream.decode import digest


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One revision of an order: when it was fetched last, and how much it holds.

    `raw` is its content as upstream sent it, None if it is not kept or is not what the digest was made of.
    """

    revision: int
    at: datetime | None
    status: str
    digest: str
    wallets: int
    tickets: int
    coupons: int
    raw: bytes | None = None

    def __repr__(self) -> str:
        return f"Revision({self.revision})"


class _Replaced(msgspec.Struct, frozen=True, array_like=True):
    """What store_fetch.lua notes of a revision that another one replaces; `at_ms` since 1970, 0 if unknown."""

    at_ms: int
    status: str
    digest: str
    wallets: int
    tickets: int
    coupons: int


def read_revisions(redis: Redis, record: OrderRecord) -> list[Revision]:
    """Return the known revisions of an order, oldest first; none if it was never fetched, or erased."""
    if not record.revision or record.erased_at:
        return []
    ((latest, older),) = read_each(redis, [record.key], get_content(redis.names), _get_replaced(redis.names))
    last = Revision(
        revision=record.revision,
        at=record.fetched_at,
        status=record.status,
        digest=record.digest,
        wallets=record.wallets,
        tickets=record.tickets,
        coupons=record.coupons,
        raw=_content(latest, record.digest),
    )
    return [*_replaced(older if isinstance(older, dict) else {}, record.revision), last]


def get_older_contents(names: Keys) -> Callable[[Any, OrderKey], object]:
    """Return the command for `read_each` that gets all that is kept of replaced revisions, their contents among it."""
    return lambda pipe, order: pipe.hvals(names.revisions(order))


def _get_replaced(names: Keys) -> Callable[[Any, OrderKey], object]:
    return lambda pipe, order: pipe.hgetall(names.revisions(order))


def _replaced(fields: Mapping[bytes, bytes], latest: int) -> list[Revision]:
    found = []
    for number in sorted(int(name) for name in fields if name.isdigit() and int(name) < latest):
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            values = msgspec.msgpack.decode(fields[b"%d" % number], type=_Replaced)
            revision = Revision(
                revision=number,
                at=from_ms(values.at_ms) if values.at_ms else None,
                status=values.status,
                digest=values.digest,
                wallets=values.wallets,
                tickets=values.tickets,
                coupons=values.coupons,
                raw=_content(fields.get(b"%d:content" % number), values.digest),
            )
            found.append(revision)
    return found


def _content(packed: Any, expected: str) -> bytes | None:
    """Return the content in a value of Redis; None if there is none, or its digest is not the `expected` one."""
    try:
        raw = unpack(packed)
        return raw if digest(raw) == expected else None
    except UnreadableAnswer:
        return None
