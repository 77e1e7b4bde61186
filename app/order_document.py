"""One revision of an order as everyone outside gets it: the sinks but those in Python, the feed and the Order API."""

from __future__ import annotations

import msgspec

from app.upstream.models import Order

_ENCODER = msgspec.json.Encoder()


class OrderDocument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A revision; its JSON names are in camelCase, as those of `order`, which has upstream's names.

    `company` is its slug. `revision` counts the contents from 1, and starts again after Redis was emptied. `digest`
    (64 hex digits) is the same as long as the content is. `fetched_at`: when the Channel Manager last answered with
    this content, in ms since 1970. `idempotency_key` is the same for each repeat of this revision, and for no other
    content.
    """

    company: str
    company_id: str
    order_id: str
    revision: int
    digest: str
    fetched_at: int
    idempotency_key: str
    status: str
    order: Order

    def encode(self) -> bytes:
        """Return the JSON: money as text of its digits, times as RFC 3339, without what is absent."""
        return _ENCODER.encode(self)
