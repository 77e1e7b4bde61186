"""The use case of the webhook, without a framework: parse, authenticate, accept, and say what became of it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from app import log
from app.errors import Unauthenticated
from app.intake import envelope
from app.intake.auth import UNKNOWN, Authenticator, Batch
from app.intake.envelope import OrderProcessed
from app.intake.recorder import Recorded

_log = log.get()


class Accepts(Protocol):
    """Something that records events durably or raises NotRecorded."""

    async def accept(self, events: tuple[OrderProcessed, ...], request_id: str) -> Recorded: ...


class Counts(Protocol):
    """Something that keeps count of what no event tells."""

    def count(self, metric: str, label: str, times: int = 1) -> None: ...

    def alarm(self, company_id: str, items: int) -> None: ...


class Receipt(msgspec.Struct, frozen=True):
    """The answer to one POST. `ignored`: other events' names; `put_aside`: reason code -> items."""

    request_id: str
    events: int
    queued: int
    coalesced: int
    duplicates: int
    spooled: int
    erased: int
    ignored: int
    put_aside: dict[str, int]


class Intake:
    """Takes a body from whoever holds the secret of a company."""

    def __init__(self, authenticator: Authenticator, inbox: Accepts, counts: Counts) -> None:
        self._authenticator = authenticator
        self._inbox = inbox
        self._counts = counts

    async def receive(self, body: bytes, request_id: str) -> Receipt:
        """Record every good item of the body in one step.

        Raises MalformedEnvelope, Unauthenticated (there are items and none is proven), NotRecorded.
        """
        sent = envelope.parse(body)
        batch = self._authenticator.authenticate(sent)
        self._report(batch)
        total = len(sent.items) + sent.broken
        if total and not batch.proven:
            raise Unauthenticated
        recorded = await self._inbox.accept(batch.events, request_id) if batch.events else Recorded(0, 0, 0)
        return Receipt(
            request_id,
            total,
            recorded.queued,
            recorded.coalesced,
            recorded.duplicates,
            recorded.spooled,
            recorded.erased,
            batch.ignored,
            batch.put_aside,
        )

    def _report(self, batch: Batch) -> None:
        for company, items in batch.rejected.items():
            _log.warning("auth.rejected", company=company, items=items)
            self._counts.count("rejected", company, items)
            if company != UNKNOWN:
                self._counts.alarm(company, items)
        for reason, items in batch.put_aside.items():
            _log.warning("events.put_aside", reason=reason, items=items)
            self._counts.count("aside", reason, items)
        if batch.ignored:
            self._counts.count("aside", "unknown_event", batch.ignored)
