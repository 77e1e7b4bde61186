"""Compares a listed order with the local copy: is it to be fetched, or watched because it is unsettled?

Which changes upstream makes without an event: upstream.md 4. The fields of a row: upstream.md 6.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import Final, Literal

import msgspec

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.orders import LocalCopy
from app.times import to_ms
from app.upstream.models import UNSETTLED, Summary

STUCK_AFTER: Final = 10 * policy.MINUTE
"""An order settles about a minute after createOrder (upstream.md 0). Upstream sets one to Error after an hour in
Processing without an event, so it must be fetched before."""

Kind = Literal["no_event", "changed", "stuck", "unscheduled", "dead"]
"""`no_event`: settled, without an event for that settlement. `changed`: confirmed, cancelled or changed since our
fetch, which causes no event. `stuck`: not settled for STUCK_AFTER. `unscheduled`: a fetch or a delivery is outstanding,
and no dispatcher starts it. `dead`: settled, while our fetch is a dead letter."""

_AT_REST: Final = frozenset({"discarded", "erased"})
"""What people decided about an order; the list changes nothing about it."""

_NEEDS_A_PERSON: Final = frozenset({"kills_worker"})
"""Dead letters that are not fetched again by themselves. Every other reason may have passed."""


class Discrepancy(msgspec.Struct, frozen=True, kw_only=True):
    """An order that differs. `status` is the listed one, `stored_status` that of our copy, "" without one.

    `differs` names the fields that differ, without their values. `row` is the digest of the listed row, "" without one.
    An order is `fetchable` once for each row: what that fetch did not change, the next one does not either.
    `request_id`: of the POST with its latest event, "" if it is not known.
    """

    company_id: str
    order_id: str
    kind: Kind
    status: str
    stored_status: str = ""
    differs: tuple[str, ...] = ()
    reference: str = ""
    received_at: datetime | None = None
    row: str = ""
    fetchable: bool = True
    request_id: str = ""

    @property
    def for_good(self) -> bool:
        """Return whether the fetch for this row was stored, and the list still shows something else."""
        return not self.fetchable and self.kind != "dead"

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)


def compare(
    company_id: str, row: Summary, copy: LocalCopy | None, *, unsettled_since: int | None, now: int, oldest: int
) -> Discrepancy | Literal["watch"] | None:
    """Return the discrepancy of a row, None without one, "watch" for an order that is unsettled for now.

    `unsettled_since`: when an earlier run saw it unsettled, None if none did. An order without a copy counts only if it
    was received after `oldest`. All times are ms since 1970.
    """
    digest = row_digest(row)
    found = partial(
        Discrepancy,
        company_id=company_id,
        order_id=row.order_id,
        row=digest,
        fetchable=copy is None or copy.listed_row != digest,
        status=row.status,
        stored_status=copy.status if copy is not None else "",
        reference=row.buy_from_order_reference or row.sell_to_order_reference or "",
        received_at=row.received_at,
        request_id=copy.request_id if copy is not None else "",
    )
    received = to_ms(row.received_at) if copy is None and row.received_at is not None else None
    dead = copy.dead if copy is not None else ""
    if copy is not None and copy.unscheduled:
        # Whatever the row: the request for its fetch makes it due, and so its deliveries.
        return found(kind="unscheduled", fetchable=True)
    if (received is not None and received < oldest) or (copy is not None and copy.pending and not dead):
        return None
    if row.status in UNSETTLED:
        if dead:
            return None
        # replaceOrder does not change receivedAt, so it says nothing about an order that had settled before.
        since = min((one for one in (received, unsettled_since) if one is not None), default=now)
        return found(kind="stuck") if now - since >= STUCK_AFTER else "watch"
    if dead in _AT_REST:
        return None
    differs = _differences(row, copy)
    if dead in _NEEDS_A_PERSON:
        return found(kind="dead", differs=differs, fetchable=False)
    if dead:
        return found(kind="dead", differs=differs)
    if copy is None or copy.content is None or "jobId" in differs:
        return found(kind="no_event", differs=differs)
    return found(kind="changed", differs=differs) if differs else None


def compare_watched(company_id: str, order_id: str, copy: LocalCopy | None, unsettled_since: int) -> Discrepancy | None:
    """Return the discrepancy of an order that was seen unsettled long ago and is not in the list of this run.

    None if it is pending, a dead letter, or was fetched settled since.
    """
    kind: Kind = "stuck"
    if copy is not None and copy.unscheduled:
        kind = "unscheduled"
    elif copy is not None:
        settled_since = copy.fetched_ms > unsettled_since and copy.status not in UNSETTLED
        if copy.pending or copy.dead or settled_since:
            return None
    stored_status, request_id = (copy.status, copy.request_id) if copy is not None else ("", "")
    return Discrepancy(
        company_id=company_id,
        order_id=order_id,
        kind=kind,
        status="",
        stored_status=stored_status,
        request_id=request_id,
    )


def row_digest(row: Summary) -> str:
    """Return what changes with everything of a row that is compared, and with its version."""
    compared = (row.row_version, row.status, row.payment_reference, row.manifest_url, row.job_id)
    return sha256(msgspec.json.encode(compared)).hexdigest()[:16]


def _differences(row: Summary, copy: LocalCopy | None) -> tuple[str, ...]:
    if copy is None or copy.content is None:
        return ()
    stored = copy.content
    compared = {
        # A deleted order has a status of its own, while its content shows the last one.
        "status": (row.status, copy.status),
        "paymentReference": (row.payment_reference, stored.payment_reference),
        "manifestUrl": (row.manifest_url, stored.manifest_url),
        # A release of upstream may name the job in one of its two answers only; that is not a settlement.
        "jobId": (row.job_id or stored.job_id, stored.job_id or row.job_id),
    }
    return tuple(name for name, (listed, ours) in compared.items() if listed != ours)
