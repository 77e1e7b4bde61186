"""The use case of the webhook, without a framework: parse, authenticate, record, and return a receipt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec.structs import asdict

from app import log
from app.errors import RequestRefused
from app.intake import envelope
from app.intake.auth import Authenticator, Batch
from app.intake.failover import Failover
from app.intake.recorder import Inbox, Recorded

LINES: Final = 10
"""Lines a second about one company's wrong secrets, or one kind of invalid items; the rest is one sum."""

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
        self._rejected = log.Sampler(LINES, _log_rejected)
        self._invalid = log.Sampler(LINES, _log_invalid)

    async def receive(self, body: bytes, request_id: str) -> Receipt:
        """Record every valid item of the body.

        Raises RequestRefused (400: no envelope; 401: there are items and none is authentic; 413: too many items),
        NotRecorded.
        """
        sent = envelope.parse(body, self._max_items)
        batch = self._authenticator.authenticate(sent, request_id)
        self._report(batch)
        if batch.first_unreadable is not None:
            shape = envelope.shape(body, batch.first_unreadable)
            _log.warning("item.unreadable", field="payload.orderId", place=batch.first_unreadable + 1, shape=shape)
        total = len(sent.items) + sent.broken
        if total and not batch.proven:
            raise RequestRefused(401, "unauthenticated")
        recorded = await self._recorder.accept(batch.events) if batch.events else Recorded(0, 0, 0)
        return Receipt(
            request_id=request_id,
            events=total,
            **asdict(recorded),
            ignored=batch.ignored,
            invalid_items=batch.invalid_items,
        )

    def _report(self, batch: Batch) -> None:
        for company, items in batch.rejected.items():
            if self._rejected.passes(company, items):
                _log_rejected(company, items)
            self._count("rejected", company, items)
        for reason, items in batch.invalid_items.items():
            if self._invalid.passes(reason, items):
                _log_invalid(reason, items)
            self._count("invalid", reason, items)
        if batch.ignored:
            self._count("invalid", "unknown_event", batch.ignored)


def _log_rejected(company: str, items: int) -> None:
    _log.warning("auth.rejected", company=company, items=items)


def _log_invalid(reason: str, items: int) -> None:
    _log.warning("items.invalid", reason=reason, items=items)
