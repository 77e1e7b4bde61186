"""Prove where each item comes from: its clientState must be a live secret of the company it names."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final

import msgspec

from app.ids import guid
from app.intake.envelope import ORDER_PROCESSED, Envelope, Item, OrderProcessed, text
from app.settings import Company

CURRENT: Final = "current"
PREVIOUS: Final = "previous"
UNKNOWN: Final = "unknown"

_LONGEST_SECRET: Final = 1024
"""Characters compared; a subscription's clientState has at most 50 (upstream.md 3)."""


class Batch(msgspec.Struct, frozen=True):
    """What may be recorded of one POST; only `authenticate` makes one.

    `proven` items carried a good secret, `ignored` of them another event's name. `invalid_items`: reason code -> items;
    `rejected`: company id, or `unknown` -> items with a wrong secret. `first_unreadable`: place of the first proven
    item that could not be read.
    """

    events: tuple[OrderProcessed, ...]
    proven: int
    ignored: int = 0
    invalid_items: dict[str, int] = {}
    rejected: dict[str, int] = {}
    first_unreadable: int | None = None


class Authenticator:
    """The live secrets of every company, as digests: comparing those takes the same time for any length."""

    def __init__(self, companies: Iterable[Company]) -> None:
        self._secrets = {
            company.np_company_id: (
                _digest(company.client_state.get_secret_value()),
                _digest(company.client_state_previous.get_secret_value())
                if company.client_state_previous
                else secrets.token_bytes(32),
            )
            for company in companies
        }
        self._unknown = (secrets.token_bytes(32), secrets.token_bytes(32))
        self._owners: dict[bytes, list[str]] = {}
        for company_id, digests in self._secrets.items():
            for digest in set(digests):
                self._owners.setdefault(digest, []).append(company_id)

    def authenticate(self, envelope: Envelope, request_id: str = "", traceparent: str = "") -> Batch:
        """Return the events of the items that carry a valid clientState of their own company.

        `request_id` and `traceparent` become parts of each event.
        """
        events: list[OrderProcessed] = []
        invalid: dict[str, int] = defaultdict(int)
        rejected: dict[str, int] = defaultdict(int)
        proven = ignored = 0
        first_unreadable: int | None = None
        for place, item in enumerate(envelope.items):
            company_id = guid(item.company_id)
            if company_id is None and item.company_id in (None, ""):
                company_id = self._owner(item.client_state)
            secret = self._which(company_id, item.client_state)
            if secret is None:
                invalid["unauthenticated"] += 1
                rejected[company_id if company_id in self._secrets else UNKNOWN] += 1
                continue
            assert company_id is not None
            proven += 1
            name = text(item.event_name).strip().casefold()
            if name and name != ORDER_PROCESSED:
                ignored += 1
                continue
            event = _event(item, company_id, secret, request_id, traceparent)
            if event is None:
                invalid["bad_order_id"] += 1
                first_unreadable = place if first_unreadable is None else first_unreadable
            else:
                events.append(event)
        if envelope.broken:
            invalid["bad_item"] = envelope.broken
        return Batch(tuple(events), proven, ignored, dict(invalid), dict(rejected), first_unreadable)

    def _owner(self, given: object) -> str | None:
        """Return the only company that has this secret: the vendor's guide shows an item without a companyId."""
        owners = self._owners.get(_digest(given[:_LONGEST_SECRET]), []) if isinstance(given, str) else []
        return owners[0] if len(owners) == 1 else None

    def _which(self, company_id: str | None, given: object) -> str | None:
        """Return the name of the matching secret. Every candidate is compared, also for an unknown company.

        An item without a text costs nothing.
        """
        if not isinstance(given, str):
            return None
        known = company_id is not None and company_id in self._secrets
        current, previous = self._secrets[company_id] if known and company_id else self._unknown
        digest = _digest(given[:_LONGEST_SECRET])
        is_current = compare_digest(digest, current)
        is_previous = compare_digest(digest, previous)
        return CURRENT if is_current else PREVIOUS if is_previous else None


def _event(item: Item, company_id: str, secret: str, request_id: str, traceparent: str) -> OrderProcessed | None:
    payload: dict[str, Any] = item.payload if isinstance(item.payload, dict) else {}
    order_id = guid(payload.get("orderId"))
    if order_id is None:
        return None
    return OrderProcessed(
        company_id=company_id,
        order_id=order_id,
        status=text(payload.get("status")),
        reference=text(payload.get("buyFromOrderReference")),
        timestamp=text(item.timestamp),
        secret=secret,
        request_id=request_id,
        traceparent=traceparent,
    )


def _digest(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()
