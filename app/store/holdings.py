"""What the ledger holds of many orders at once, as far as a list of orders can be compared with it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import msgspec
from redis import Redis

from app.errors import UnreadableAnswer
from app.store import keys
from app.store.keys import OrderKey
from app.store.record import parse_record
from app.upstream.listing import Summary
from app.upstream.wire import build, decode

_CHUNK = 200
"""Orders a round trip: contents can be large, and Redis serves others in between."""

_FIELDS = ("wanted", "done", "dead", "dropped", "status", "fetched", "erased")


class Holding(msgspec.Struct, frozen=True):
    """One order as we hold it. `status` is that of the latest fetch, or Gone; "" if none came home.

    `dead` is the reason it was given up, `dropped` if people did so for good, `erased` if
    they erased it, "" if neither; `fetched` ms, 0 for
    never; `copy` the fields of the stored content that a list shows too, None where nothing was stored.
    """

    owed: bool
    dead: str
    status: str
    fetched: int
    copy: Summary | None


class Holdings:
    """Reads; writes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def of(self, orders: Sequence[OrderKey]) -> list[Holding | None]:
        """Return what is held of each order, None where the ledger has no record."""
        found: list[Holding | None] = []
        for at in range(0, len(orders), _CHUNK):
            found += self._of(orders[at : at + _CHUNK])
        return found

    def _of(self, orders: Sequence[OrderKey]) -> list[Holding | None]:
        with self._redis.pipeline(transaction=False) as pipe:
            for order in orders:
                pipe.hmget(keys.record(order), _FIELDS)
                pipe.get(keys.content(order))
            answers = pipe.execute()
        return [
            _holding(order, dict(zip(_FIELDS, values, strict=True)), packed)
            for order, values, packed in zip(orders, answers[::2], answers[1::2], strict=True)
        ]


def _holding(order: OrderKey, values: dict[str, bytes | None], packed: bytes | None) -> Holding | None:
    record = parse_record(order, {name.encode(): value for name, value in values.items() if value is not None})
    # As in the archive: every record counts `wanted`.
    if not record.wanted:
        return None
    return Holding(
        owed=record.done < record.wanted,
        dead="erased" if record.erased else record.dead or ("dropped" if record.is_dropped else ""),
        status=record.status,
        fetched=int(values["fetched"] or 0),
        copy=_copy(packed),
    )


def _copy(packed: bytes | None) -> Summary | None:
    """Return the part of the content that a list shows too: its fields have the same names and rules."""
    if packed is None:
        return None
    try:
        return build(Summary, decode(zlib.decompress(packed)))
    except (UnreadableAnswer, zlib.error):  # to be fetched anew is what helps
        return None
