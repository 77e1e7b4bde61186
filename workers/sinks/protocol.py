"""What a sink is: something that takes one revision of an order, perhaps more than once."""

from __future__ import annotations

from typing import Protocol

import msgspec

from app.upstream.models import Order


class Context(msgspec.Struct, frozen=True):
    """What a sink is told beside the order.

    `idempotency_key` is company/order/revision/digest, the same for every repeat of this revision and of nothing else;
    `attempt` counts from 1.
    """

    idempotency_key: str
    company_id: str
    order_id: str
    revision: int
    attempt: int
    request_id: str


class Sink(Protocol):
    """Takes a revision or raises; what it raises is recorded by type only, and tried again later."""

    def deliver(self, order: Order, context: Context) -> None: ...
