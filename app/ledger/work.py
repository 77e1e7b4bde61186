"""The values that the ledger and its workers exchange."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from app.ids import OrderKey

StartOutcome = Literal["nothing", "held", "dead", "fetch"]
"""What an order needs (start_fetch.lua)."""
StoreOutcome = Literal["refused", "erased", "fetched", "pending", "dead"]
"""What follows a call of store_fetch.lua; with the first two the answer is not stored."""
FailOutcome = Literal["refused", "retry", "deferred", "dead", "deleted_upstream"]
"""What follows a failed fetch (fail_fetch.lua)."""
Failure = Literal["retry", "client_error", "uncounted", "deferred", "not_found", "dead", "deleted_upstream"]
"""How a fetch failed: `retry` uses an attempt, `client_error` one of its own few, `uncounted` none (perhaps all orders
fail), `deferred` none (the order is not at fault); `not_found`: 404, perhaps not yet there; `dead`: no further attempt;
`deleted_upstream`."""
DeliveryOutcome = Literal["succeeded", "skipped", "retry", "postponed", "dead", "rejected", "disabled"]
"""How a delivery ended. `skipped`: the sink does not want such an order; `retry`: it failed, and uses an attempt;
`postponed`: the sink asked for another time, which uses none; `dead`: no attempt is left; `rejected`: dead at once,
since the sink will never take this revision; `disabled`: its destination wants nothing more, which uses no attempt."""
PermitOutcome = Literal["good", "missing", "failed", "unknown"]
"""What a request shows of the calls of its company: the order came; upstream has no such order, perhaps not yet; the
call failed, for this order or for all; or nothing (release_permit.lua)."""
WorkerEnd = Literal["killed", "ended"]
"""How a worker ended: `killed` counts as a crash of the order it had claimed, `ended` does not."""


class Released(NamedTuple):
    """For how many ms the key or the breaker is closed, and whether this request opened the breaker.

    `answered_at`: when the latest good request began (ms since 1970), 0 if that is not known.
    """

    closed_ms: int
    opened: bool
    answered_at: int


class Dispatched(msgspec.Struct, frozen=True):
    """What the dispatcher did: orders that were due, jobs enqueued, and orders whose keys are `broken`."""

    due: int
    enqueued: int
    broken: int


class Requested(msgspec.Struct, frozen=True):
    """How many orders of a request for fetches have a new job, had one already, were erased, or have a broken key.

    Those erased or broken are not fetched.
    """

    queued: int = 0
    waiting: int = 0
    erased: int = 0
    broken: int = 0

    def __add__(self, other: Requested) -> Requested:
        return Requested(*map(sum, zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)))


class Origin(NamedTuple):
    """Where an order comes from: the POST with its latest event, or "" for what is not known.

    `traceparents`: that of this POST, and after it those of earlier ones that the same job serves, separated by blanks.
    An order that no event announced has the id of what first requested its fetch: a reconcile run, a replay, a command.
    """

    request_id: str = ""
    traceparents: str = ""


class PermitAnswer(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a request for the permit with this token: granted, full or closed (permits.lua).

    `wait_ms`: full, how long it waits in line, 0 if it does not; closed, until it may be asked again, with a `reason`.
    """

    outcome: Literal["granted", "full", "closed"]
    token: str
    wait_ms: int = 0
    reason: str = ""


class Fetch(msgspec.Struct, frozen=True):
    """A fetch that start_fetch.lua has started.

    `generation` is what it fetches, `token` its fencing token. `missing_ms`: ms since the first 404, 0 without one.
    `failing_since`: the first failure in ms since 1970, `failing_ms`: since then, 0 without one. `known_status`: of the
    latest event or fetch. `queue`: of this order's jobs. `permit`: None if none was asked for. `deadline`: end of the
    lease (time.monotonic).
    """

    generation: int
    token: int
    attempts: int
    rechecks: int
    deferrals: int
    client_errors: int
    missing_ms: int
    failing_since: int
    failing_ms: int
    known_status: str
    queue: str
    permit: PermitAnswer | None = None
    deadline: float = 0.0


class Started(NamedTuple):
    """The result of start_fetch; `fetch` is None unless `what` is `fetch`."""

    what: StartOutcome
    fetch: Fetch | None
    origin: Origin


class Stored(msgspec.Struct, frozen=True):
    """The result of store_fetch: what follows, the order's revision, and whether its content is new.

    `requeued`: dead letters (OrderKey.member, request_id) that are fetched again, since upstream answers again.
    """

    what: StoreOutcome
    revision: int
    changed: bool
    requeued: tuple[tuple[str, str], ...] = ()


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


class Delivery(msgspec.Struct, frozen=True):
    """A delivery that a worker has acquired; `attempts` counts it, `crashes` those before it that never ended.

    `postponed_ms`: ms since the sink first asked for another time, 0 if it did not. `fetched_at`: ms since 1970 of the
    latest fetch, which had this content. `traceparents` as in Origin. `deadline`: end of its lease (time.monotonic).
    """

    sink: str
    revision: int
    attempts: int
    crashes: int
    request_id: str
    digest: str
    postponed_ms: int = 0
    fetched_at: int = 0
    traceparents: str = ""
    raw: bytes = b""
    deadline: float = 0.0

    def idempotency_key(self, order: OrderKey) -> str:
        return idempotency_key(order, self.revision, self.digest)


def idempotency_key(order: OrderKey, revision: int, digest: str) -> str:
    """Return the idempotency key: the same for every attempt of this revision, and for no other content.

    The number alone is not enough: after a flush, or in a restored Redis, revisions are counted anew.
    """
    return f"{order.company_id}/{order.order_id}/{revision}/{digest[:12]}"
