"""The record of one order: the hash that keys.py describes, typed, and the state of the order."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from app.ids import OrderKey
from app.ledger import policy
from app.times import from_ms

State = Literal["pending", "fetching", "deferred", "fetched", "deleted_upstream", "dead", "discarded", "erased"]
"""The state of an order; the first that applies.

`erased`: on request; a tombstone keeps it from being fetched again. `dead`: a dead letter. `fetching`: a worker has
the lease. `deferred`: pending, and the connection is at fault, not the order. `pending`: a fetch is outstanding.
`deleted_upstream`: upstream has deleted it. `discarded`: a dead letter that an operator discarded. `fetched`: every
settlement has been fetched. Deliveries are not part of it: an order may be fetched and a sink behind (`SinkRecord`).
"""

DELETED_UPSTREAM: Final = "DeletedUpstream"
"""Status of an order that upstream has deleted (fail_fetch.lua); upstream has no such status."""


_LONGEST_LEASE: Final = timedelta(milliseconds=policy.LONGEST_LEASE)
_DELIVERY_LEASE: Final = timedelta(milliseconds=policy.DELIVERY_LEASE)


class SinkRecord(msgspec.Struct, frozen=True):
    """The deliveries of one sink: `revision` is the latest delivered, `next_at` the next attempt after a failure.

    `dead` is the reason code of a dead delivery, `discarded` the latest revision that an operator discarded: the sink
    never got it, unless it got a later one. `error` is the type and place of what the sink raised last, or the reason
    why it rejected the revision. `postponed`: when it first asked for another time (Retry). `lease`: until when the
    delivery that `worker` makes must be done; a dead worker's stays.
    """

    name: str
    revision: int = 0
    attempts: int = 0
    next_at: datetime | None = None
    dead: str = ""
    discarded: int = 0
    error: str = ""
    postponed: datetime | None = None
    lease: datetime | None = None
    worker: str = ""

    def running_since(self, now: datetime) -> datetime | None:
        """Return since when a worker delivers the order to it, None if none does at `now`."""
        since = self.lease - _DELIVERY_LEASE if self.lease is not None else None
        return since if since is not None and since <= now < since + _DELIVERY_LEASE else None


class OrderRecord(msgspec.Struct, frozen=True, kw_only=True, rename={"http_status": "http"}):
    """One order; keys.py describes the fields. A missing one is 0, "" or None."""

    company_id: str
    order_id: str
    generation: int = 0
    started_generation: int = 0
    fetched_generation: int = 0
    fencing_token: int = 0
    job: str = ""
    queue: str = ""
    lease: datetime | None = None
    worker: str = ""
    attempts: int = 0
    rechecks: int = 0
    deferrals: int = 0
    crashes: int = 0
    first_404_at: datetime | None = None
    error: str = ""
    http_status: int | None = None
    dead: str = ""
    dead_at: datetime | None = None
    discarded_at: datetime | None = None
    erased_at: datetime | None = None
    status: str = ""
    last_event_status: str = ""
    revision: int = 0
    digest: str = ""
    fetched_at: datetime | None = None
    wallets: int = 0
    tickets: int = 0
    coupons: int = 0
    manifest: int = 0
    first_at: datetime | None = None
    last_event_at: datetime | None = None
    reference: str = ""
    request_id: str = ""
    duplicates: int = 0
    listed_row: str = ""
    sinks: tuple[SinkRecord, ...] = ()

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)

    @property
    def is_pending(self) -> bool:
        """Return whether a settlement has not been fetched yet; a dead order is pending too."""
        return self.fetched_generation < self.generation

    @property
    def known_status(self) -> str:
        """Return the status of the latest event or fetch, "" without either."""
        by_fetch = self.fetched_at is not None and (self.last_event_at is None or self.fetched_at > self.last_event_at)
        return (by_fetch and self.status) or self.last_event_status

    @property
    def changed(self) -> datetime | None:
        """Return when the order last changed."""
        times = (self.first_at, self.last_event_at, self.fetched_at, self.dead_at, self.discarded_at, self.erased_at)
        return max(filter(None, times), default=None)

    @property
    def failing_sinks(self) -> tuple[SinkRecord, ...]:
        """Return the sinks whose delivery failed and waits for its next attempt."""
        return tuple(sink for sink in self.sinks if sink.next_at is not None and not sink.dead)

    @property
    def dead_sinks(self) -> tuple[SinkRecord, ...]:
        """Return the sinks whose delivery is dead."""
        return tuple(sink for sink in self.sinks if sink.dead)

    def delivering(self, now: datetime) -> dict[str, datetime]:
        """Return each sink to which a worker delivers the order at `now`, and since when."""
        return {sink.name: since for sink in self.sinks if (since := sink.running_since(now)) is not None}

    def clocks(self, now: datetime, declared: Collection[str]) -> list[str]:
        """Return on which clocks an order that does not expire must stand at `now`: "" is that of fetches.

        The others are named by their sinks, of those that are `declared`. An order that waits only for an operator or a
        running fetch needs none. One that waits for nothing must be looked at, so that it gets its end.
        """
        found = [one.name for one in self.sinks if one.name in declared and self.is_behind(one) and not self.erased_at]
        if self.is_pending:
            is_waiting = not (self.dead or self._is_held(now))
        else:
            is_waiting = not (found or self.dead or self.dead_sinks)
        return [*found, *[""] * is_waiting]

    def is_behind(self, sink: SinkRecord) -> bool:
        """Return whether a sink is still to get the latest revision."""
        return sink.revision < self.revision and not sink.dead

    @property
    def is_discarded(self) -> bool:
        """Return whether it was discarded, and nothing followed: no event, no request, no late answer."""
        if self.discarded_at is None or self.is_pending:
            return False
        return self.fetched_at is None or self.fetched_at <= self.discarded_at

    def _is_held(self, now: datetime) -> bool:
        # A lease that reaches farther than any lease can was taken from a Redis server whose clock was ahead.
        return self.lease is not None and now < self.lease <= now + _LONGEST_LEASE

    def state(self, now: datetime) -> State:
        """Return the state at `now`, an aware datetime."""
        if self.erased_at:
            return "erased"
        if self.dead:
            return "dead"
        if self.is_pending:
            if self._is_held(now):
                return "fetching"
            return "deferred" if self.deferrals else "pending"
        if self.status == DELETED_UPSTREAM:
            return "deleted_upstream"
        return "discarded" if self.is_discarded else "fetched"


_TIMES: Final = frozenset(field.name for field in msgspec.structs.fields(OrderRecord) if field.type == datetime | None)


def parse_record(order: OrderKey, fields: Mapping[bytes, bytes]) -> OrderRecord:
    """Return the record in the hash of `order`; raises ValueError where a number is none."""
    texts = {name.decode(): value.decode() for name, value in fields.items() if value}
    if texts.get("http") == "0":  # no answer
        del texts["http"]
    values = {name: from_ms(int(text)) if name in _TIMES else text for name, text in texts.items()}
    return msgspec.convert({**values, **order._asdict(), "sinks": _sinks(texts)}, OrderRecord, strict=False)


def _sinks(texts: Mapping[str, str]) -> list[dict[str, object]]:
    sinks: dict[str, dict[str, object]] = {}
    for name, text in sorted(texts.items()):
        # A sink's own name has colons (`python:package.module:function`), its field is what follows the last.
        sink, _, field = name.rpartition(":")
        if sink:
            value = from_ms(int(text)) if field in {"next_at", "postponed", "lease"} else text
            sinks.setdefault(sink, {"name": sink})[field] = value
    return list(sinks.values())
