"""A sink takes one revision of an order at a time, at least once."""

from __future__ import annotations

from typing import Protocol

import msgspec

from app.upstream.models import Order


class Context(msgspec.Struct, frozen=True):
    """What a sink gets with the order.

    `idempotency_key` is company/order/revision/digest: the same for every repeat of this revision, and for no other
    content. `attempt` counts from 1.
    """

    idempotency_key: str
    company_id: str
    order_id: str
    revision: int
    attempt: int
    request_id: str


class Sink(Protocol):
    """Takes a revision or raises; the type of the exception is recorded, and the delivery is retried later."""

    def deliver(self, order: Order, context: Context) -> None: ...
