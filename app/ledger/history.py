"""What happened to one order: the entries of its history, read and decoded.

A script packs an entry as the MessagePack array [kind, ms, values...] (append_history in prelude.lua).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import msgspec

from app.ids import OrderKey
from app.ledger.redis import Redis, is_wrong_type, server_time
from app.times import from_ms

LONGEST: Final = 200
"""Entries that the scripts keep of one order (prelude.lua)."""


UNREAD: Final = "an entry that this version cannot read: another version or another program wrote it"

_LATEST: Final = 4_102_444_800_000
"""The year 2100: what is later is no time in ms."""


class _Entry(msgspec.Struct, frozen=True, array_like=True, tag_field="kind"):
    at_ms: int

    @property
    def at(self) -> datetime:
        return from_ms(self.at_ms)


class EventReceived(_Entry, frozen=True, tag="event"):
    """An event was received; `outcome` is queued, coalesced or erased (accept)."""

    event_id: str
    status: str
    outcome: str
    secret: str
    request_id: str


class DuplicateReceived(_Entry, frozen=True, tag="duplicate"):
    """An event was received again; only this entry was recorded (accept)."""

    status: str
    secret: str
    request_id: str


class FetchRequested(_Entry, frozen=True, tag="requested"):
    """A fetch was requested without an event: replay, requeue, refetch, reconcile (request_fetch, replay_step)."""

    reason: str
    queue: str


class FetchStarted(_Entry, frozen=True, tag="started"):
    """A worker started a fetch of this generation (start_fetch)."""

    generation: int
    token: int
    worker: str


class FetchStored(_Entry, frozen=True, tag="stored"):
    """An answer of getOrder was stored (store_fetch)."""

    token: int
    status: str
    revision: int
    http_status: int
    duration_ms: int


class FetchRefused(_Entry, frozen=True, tag="refused"):
    """The result of a fetch came after that of a later one, and changed nothing (store_fetch, fail_fetch)."""

    token: int


class FetchFailed(_Entry, frozen=True, tag="failed"):
    """A fetch ended without an order; `outcome` as Failure of work.py, `http_status` is 0 without an answer.

    By fail_fetch.
    """

    outcome: str
    token: int
    reason: str
    http_status: int
    duration_ms: int


class DeadLettered(_Entry, frozen=True, tag="dead"):
    """The order became a dead letter without a failed call: it stayed unsettled, or its fetches killed workers."""

    reason: str


class WorkerCrashed(_Entry, frozen=True, tag="crashed"):
    """A worker ended or froze during a fetch (`sink` is "") or a delivery.

    Recorded by its pool (release_worker), or else when the next one starts (start_fetch, acquire_delivery).
    """

    worker: str
    sink: str


class DeliveryEnded(_Entry, frozen=True, tag="delivery"):
    """A delivery of a revision ended; `outcome` as DeliveryOutcome of work.py (complete_delivery)."""

    sink: str
    revision: int
    outcome: str
    reason: str
    duration_ms: int


class DeliveryRetried(_Entry, frozen=True, tag="retried"):
    """A dead delivery got new attempts (resolve_dead_letter)."""

    sink: str


class Discarded(_Entry, frozen=True, tag="discarded"):
    """What was dead for `reason` was discarded by hand: the fetch (`sink` is "") or a delivery."""

    reason: str
    sink: str


class Redelivered(_Entry, frozen=True, tag="redelivered"):
    """A replay delivers the stored revision to a sink once more (replay_step)."""

    plan: str
    sink: str


class Erased(_Entry, frozen=True, tag="erased"):
    """All else that was known of the order was erased (erase)."""


class Unread(_Entry, frozen=True, tag="unread"):
    """What none of our scripts has written, in words; at 0 if it has no time in the place where theirs have it."""

    text: str


Entry = (
    EventReceived
    | DuplicateReceived
    | FetchRequested
    | FetchStarted
    | FetchStored
    | FetchRefused
    | FetchFailed
    | DeadLettered
    | WorkerCrashed
    | DeliveryEnded
    | DeliveryRetried
    | Discarded
    | Redelivered
    | Erased
    | Unread
)


def as_object(entry: Entry) -> dict[str, Any]:
    """Return an entry for machines: its kind, its time, and its values by name."""
    values = msgspec.structs.asdict(entry)
    del values["at_ms"]
    return {"kind": entry.__struct_config__.tag, "at": entry.at, **values}


_decoder: Final[msgspec.msgpack.Decoder[Entry]] = msgspec.msgpack.Decoder(Entry)


def parse_entry(packed: bytes) -> Entry:
    """Return an entry of the history; never raises."""
    try:
        return _decoder.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Unread(_time_of(packed), UNREAD)


def read_history(redis: Redis, order: OrderKey) -> tuple[Entry, ...]:
    """Return what happened to the order, oldest first; the last LONGEST entries are kept.

    What is not readable is an Unread. The first event is in the stream alone until something else happens (accept.lua).
    """
    names = redis.names
    with redis.pipeline(transaction=False) as pipe:
        pipe.lrange(names.history(order), 0, -1)
        pipe.hmget(names.record(order), "first_event", "first_at")
        entries, first = pipe.execute(raise_on_error=False)
    for answer in (entries, first):
        if isinstance(answer, Exception) and not is_wrong_type(answer):
            raise answer
    if isinstance(entries, Exception):
        where = names.history(order)
        return (Unread(server_time(redis), f"the history is unreadable: look at {where} in Redis"),)
    found = tuple(parse_entry(entry) for entry in entries)
    event_id, at = (None, 0) if isinstance(first, Exception) else first
    if event_id is None or len(found) >= LONGEST or any(isinstance(one, EventReceived) for one in found[:1]):
        return found
    return (*_first_event(redis, event_id.decode(), int(at)), *found)


def _first_event(redis: Redis, event_id: str, at_ms: int) -> Iterator[Entry]:
    entries: Any = redis.xrange(redis.names.events, event_id, event_id)
    for _, fields in entries:
        status, request = fields[b"status"].decode(), fields[b"request"].decode()
        yield EventReceived(at_ms, event_id, status, "queued", "current", request)


def _time_of(packed: bytes) -> int:
    try:
        _, at_ms, *_ = msgspec.msgpack.decode(packed, type=list[Any])
        return at_ms if isinstance(at_ms, int) and 0 < at_ms < _LATEST else 0
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
        return 0
