"""What the ledger gives a worker to do, and what the worker gives back: values only."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.ids import OrderKey

StartOutcome = Literal["nothing", "held", "dead", "deliver", "fetch"]
"""What an order needs (start_fetch.lua)."""
StoreOutcome = Literal["refused", "erased", "fetched", "deliver", "pending", "dead"]
"""What follows when an answer was given to store_fetch.lua; with the first two it is not stored."""
FailOutcome = Literal["refused", "retry", "deferred", "dead", "deleted_upstream"]
"""What became of an order whose fetch failed (fail_fetch.lua)."""
Failure = Literal["retry", "client_error", "deferred", "not_found", "dead", "deleted_upstream"]
"""How a fetch failed: it uses an attempt, one of the few for client errors, or none (the order is not at fault); the
order is not there, perhaps not yet; it is given up; upstream has deleted it."""
DeliveryOutcome = Literal["succeeded", "retry", "dead"]
PermitOutcome = Literal["answered", "failed", "fault"]
"""What a request tells about its API key: it works, it may not, or it does not."""
WorkerEnd = Literal["killed", "ended"]
"""How a worker came to its end: `killed` counts as a crash of the order it had claimed, `ended` does not."""


class Dispatched(msgspec.Struct, frozen=True):
    """What the dispatcher did: orders looked at, jobs enqueued, and orders whose keys are `broken` (not ours)."""

    looked: int
    enqueued: int
    broken: int


class Fetch(msgspec.Struct, frozen=True):
    """A fetch that was started, as start_fetch.lua knows it.

    `generation` is what it fetches, `token` its fencing token. `missing_ms`: ms since the first 404, 0 without one.
    `known_status`: named last, by an event or a fetch. `queue`: of this order's jobs. `deadline`: end of the lease
    (time.monotonic).
    """

    generation: int
    token: int
    attempts: int
    rechecks: int
    deferrals: int
    client_errors: int
    missing_ms: int
    known_status: str
    request_id: str
    queue: str
    deadline: float = 0.0


class Stored(msgspec.Struct, frozen=True):
    """What follows from an answer, the order's revision, and whether the content is new."""

    what: StoreOutcome
    revision: int
    changed: bool


class Content(msgspec.Struct, frozen=True):
    """An answer of getOrder as it is stored, with what people ask for most; `references` are those of both sides."""

    raw: bytes
    digest: str
    status: str
    wallets: int
    tickets: int
    coupons: int
    manifest: bool
    http_status: int
    duration_ms: int
    references: tuple[str, ...] = ()


class Delivery(msgspec.Struct, frozen=True):
    """A revision that a sink is to get; `attempts` counts this one, `crashes` those before it that never ended.

    `deadline`: end of its lease (time.monotonic).
    """

    sink: str
    revision: int
    attempts: int
    crashes: int
    request_id: str
    digest: str
    raw: bytes = b""
    deadline: float = 0.0

    def idempotency_key(self, order: OrderKey) -> str:
        """Return what is the same for every repeat of this revision, and for no other content.

        The number alone is not enough: after a flush, or in a restored Redis, revisions are counted anew.
        """
        return f"{order.company_id}/{order.order_id}/{self.revision}/{self.digest[:12]}"
