"""The use case of the webhook, without a framework: parse, authenticate, record, and return a receipt."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec.structs import asdict

from app import log
from app.errors import Unauthenticated
from app.intake import envelope
from app.intake.auth import UNKNOWN, Authenticator, Batch
from app.intake.failover import Failover
from app.intake.recorder import Inbox, Recorded

_log = log.get()


class Receipt(msgspec.Struct, frozen=True):
    """The answer to one POST: the fields of Recorded, and `events`, the number of items sent.

    `ignored`: events of other names. `invalid_items`: reason code -> items.
    """

    request_id: str
    events: int
    queued: int
    coalesced: int
    duplicates: int
    spooled: int
    erased: int
    ignored: int
    invalid_items: dict[str, int]


class Intake:
    """Records the events in the body of a POST, of `max_items` items; `count` adds to a metric with one label."""

    def __init__(
        self,
        authenticator: Authenticator,
        recorder: Inbox | Failover,
        count: Callable[[str, str, int], None],
        max_items: int,
    ) -> None:
        self._max_items = max_items
        self._authenticator = authenticator
        self._recorder = recorder
        self._count = count

    async def receive(self, body: bytes, request_id: str, traceparent: str = "") -> Receipt:
        """Record every valid item of the body.

        Raises RequestRefused (400: no envelope; 401: there are items and none is authentic; 413: too many items),
        NotRecorded.
        """
        sent = envelope.parse(body, self._max_items)
        batch = self._authenticator.authenticate(sent, request_id, traceparent)
        self._count_items(batch)
        total = len(sent.items) + sent.broken
        if total and not batch.proven:
            # Anybody can cause it: the line of the request is the only one.
            raise Unauthenticated(max(batch.rejected, key=batch.rejected.__getitem__, default=UNKNOWN))
        _log_items(batch)
        if batch.first_unreadable is not None:
            shape = envelope.shape(body, batch.first_unreadable)
            _log.warning("item.unreadable", field="payload.orderId", place=batch.first_unreadable + 1, shape=shape)
        recorded = await self._recorder.accept(batch.events) if batch.events else Recorded(0, 0, 0)
        return Receipt(
            request_id=request_id,
            events=total,
            **asdict(recorded),
            ignored=batch.ignored,
            invalid_items=batch.invalid_items,
        )

    def _count_items(self, batch: Batch) -> None:
        for company, items in batch.rejected.items():
            self._count("rejected", company, items)
        for reason, items in batch.invalid_items.items():
            self._count("invalid", reason, items)
        if batch.ignored:
            self._count("invalid", "unknown_event", batch.ignored)


def _log_items(batch: Batch) -> None:
    """Log what is not recorded of a POST whose sender knows a clientState."""
    for company, items in batch.rejected.items():
        _log.warning("auth.rejected", company=company, items=items)
    for reason, items in batch.invalid_items.items():
        _log.warning("items.invalid", reason=reason, items=items)
