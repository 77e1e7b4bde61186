"""The values that the ledger and its workers exchange."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.ids import OrderKey

StartOutcome = Literal["nothing", "held", "dead", "deliver", "fetch"]
"""What an order needs (start_fetch.lua)."""
StoreOutcome = Literal["refused", "erased", "fetched", "deliver", "pending", "dead"]
"""What follows a call of store_fetch.lua; with the first two the answer is not stored."""
FailOutcome = Literal["refused", "retry", "deferred", "dead", "deleted_upstream"]
"""What follows a failed fetch (fail_fetch.lua)."""
Failure = Literal["retry", "client_error", "deferred", "not_found", "dead", "deleted_upstream"]
"""How a fetch failed: `retry` uses an attempt, `client_error` one of its own few, `deferred` none (the order is not at
fault); `not_found`: 404, perhaps not yet there; `dead`: no further attempt; `deleted_upstream`."""
DeliveryOutcome = Literal["succeeded", "retry", "dead"]
PermitOutcome = Literal["answered", "failed", "fault"]
"""What a request shows of its API key: it works, it may not work, or it does not."""
WorkerEnd = Literal["killed", "ended"]
"""How a worker ended: `killed` counts as a crash of the order it had claimed, `ended` does not."""


class Dispatched(msgspec.Struct, frozen=True):
    """What the dispatcher did: orders that were due, jobs enqueued, and orders whose keys are `broken`."""

    due: int
    enqueued: int
    broken: int


class Fetch(msgspec.Struct, frozen=True):
    """A fetch that start_fetch.lua has started.

    `generation` is what it fetches, `token` its fencing token. `missing_ms`: ms since the first 404, 0 without one.
    `known_status`: of the latest event or fetch. `queue`: of this order's jobs. `deadline`: end of the lease
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
    """The result of store_fetch: what follows, the order's revision, and whether its content is new."""

    what: StoreOutcome
    revision: int
    changed: bool


class Content(msgspec.Struct, frozen=True):
    """An answer of getOrder as it is stored, with the fields of the record; `references` are those of both sides."""

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


class Elsewhere(msgspec.Struct, frozen=True):
    """A delivery is due to a sink that this process does not have."""

    sink: str


class Delivery(msgspec.Struct, frozen=True):
    """A delivery that a worker has acquired; `attempts` counts it, `crashes` those before it that never ended.

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
        """Return the idempotency key: the same for every attempt of this revision, and for no other content.

        The number alone is not enough: after a flush, or in a restored Redis, revisions are counted anew.
        """
        return f"{order.company_id}/{order.order_id}/{self.revision}/{self.digest[:12]}"
