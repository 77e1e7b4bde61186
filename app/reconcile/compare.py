"""One listed order against what the ledger holds of it: is something missing here? Pure: arguments in, verdict out.

The facts behind it: upstream.md 4 (which changes fire no event) and 6 (what a row of the list says).

A page of the list held against the ledger: which of its orders are to be fetched, which to be watched.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, Literal

import msgspec

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.orders import Holding, Holdings
from app.times import to_ms
from app.upstream.models import UNSETTLED, Page, Summary

STUCK_AFTER: Final = 10 * policy.MINUTE
"""An order settles about a minute after createOrder (upstream.md 0). One that was swept to Error after an hour in
Processing fires no event, so somebody must look before."""

Kind = Literal["no_event", "changed", "stuck"]
"""`no_event`: settled, and no event told of that settlement. `changed`: confirmed, cancelled or changed since our
copy was fetched, of which no event tells. `stuck`: not settled for STUCK_AFTER."""

_PROVEN_WRONG: Final = frozenset({"order_missing", "unsettled"})
"""Dead letters that the list itself contradicts, once it shows the order settled; others are for people to mend."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """An order that is to be fetched. `status` is the listed one, `held` that of our copy, "" if there is none.

    `differs` names the fields in which the list and our copy differ, never their values.
    """

    company_id: str
    order_id: str
    kind: Kind
    status: str
    held: str = ""
    differs: tuple[str, ...] = ()
    reference: str = ""
    received_at: datetime | None = None

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)


def judge(
    company_id: str, row: Summary, holding: Holding | None, *, open_since: int | None, now: int, oldest: int
) -> Gap | Literal["watch"] | None:
    """Return the gap that a row shows, None if there is none, "watch" for an unsettled order to be looked at again.

    `open_since` is when an earlier look saw it unsettled, None if none did. An order that we do not hold is wanted
    only if it was received after `oldest`. All times are ms since 1970.
    """
    if holding is None and row.received_at is not None and to_ms(row.received_at) < oldest:
        return None
    if holding is not None and holding.pending and not holding.dead:
        return None
    if row.status in UNSETTLED:
        if holding is not None and holding.dead:
            return None
        since = _unsettled_since(row, holding, open_since)
        return _gap("stuck", company_id, row, holding) if since is not None and now - since >= STUCK_AFTER else "watch"
    return _of_settled(company_id, row, holding)


def of_watched(company_id: str, order_id: str, holding: Holding | None, open_since: int) -> Gap | None:
    """Return the gap of an order that was seen unsettled long ago and does not stand in the list of this time.

    None if the ledger looks after it, has given it up, or has fetched it settled since.
    """
    if holding is not None:
        settled_since = holding.fetched_ms > open_since and holding.status not in UNSETTLED
        if holding.pending or holding.dead or settled_since:
            return None
    held = holding.status if holding is not None else ""
    return Gap(company_id=company_id, order_id=order_id, kind="stuck", status="", held=held)


def _unsettled_since(row: Summary, holding: Holding | None, open_since: int | None) -> int | None:
    # receivedAt is not moved by replaceOrder: of an order that had settled before, it says nothing.
    received = to_ms(row.received_at) if holding is None and row.received_at is not None else None
    return min((since for since in (received, open_since) if since is not None), default=None)


def _of_settled(company_id: str, row: Summary, holding: Holding | None) -> Gap | None:
    if holding is not None and holding.dead and holding.dead not in _PROVEN_WRONG:
        return None
    differs = _differences(row, holding)
    if holding is None or holding.copy is None or "jobId" in differs:
        return _gap("no_event", company_id, row, holding, differs)
    return _gap("changed", company_id, row, holding, differs) if differs or holding.dead else None


def _differences(row: Summary, holding: Holding | None) -> tuple[str, ...]:
    if holding is None or holding.copy is None:
        return ()
    copy = holding.copy
    compared = {
        # The record says Gone of an order whose copy still shows what it was.
        "status": (row.status, holding.status),
        "paymentReference": (row.payment_reference, copy.payment_reference),
        "manifestUrl": (row.manifest_url, copy.manifest_url),
        # A release of upstream may name the job in one of its two answers only; that is no settlement.
        "jobId": (row.job_id or copy.job_id, copy.job_id or row.job_id),
    }
    return tuple(name for name, (listed, held) in compared.items() if listed != held)


def _gap(kind: Kind, company_id: str, row: Summary, holding: Holding | None, differs: tuple[str, ...] = ()) -> Gap:
    return Gap(
        company_id=company_id,
        order_id=row.order_id,
        kind=kind,
        status=row.status,
        held=holding.status if holding is not None else "",
        differs=differs,
        reference=row.buy_from_order_reference or row.sell_to_order_reference or "",
        received_at=row.received_at,
    )


class Findings(msgspec.Struct, frozen=True):
    """What one page shows; order ids in `watch` (unsettled for now) and `settled` (to be watched no more)."""

    gaps: tuple[Gap, ...]
    watch: tuple[str, ...]
    settled: tuple[str, ...]


class Survey:
    """Compares for one company; reads, and writes nothing. `order_days`: ORDER_DAYS."""

    def __init__(self, holdings: Holdings, company_id: str, order_days: int) -> None:
        self._holdings = holdings
        self._company_id = company_id
        self._keep = order_days * policy.DAY

    def of_page(self, page: Page, watched: Mapping[str, int], now: int) -> Findings:
        """Return what the page shows; `watched`: order id -> ms when it was first seen unsettled."""
        rows = {row.order_id: row for row in page.rows}
        held = self._holdings.of([OrderKey(self._company_id, order_id) for order_id in rows])
        gaps: list[Gap] = []
        watch: list[str] = []
        settled: list[str] = []
        for row, holding in zip(rows.values(), held, strict=True):
            found = judge(
                self._company_id,
                row,
                holding,
                open_since=watched.get(row.order_id),
                now=now,
                oldest=now - self._keep,
            )
            if found == "watch":
                watch.append(row.order_id)
            else:
                settled.append(row.order_id)
                if found is not None:
                    gaps.append(found)
        return Findings(tuple(gaps), tuple(watch), tuple(settled))

    def of_watched(self, watched: Mapping[str, int], now: int) -> Findings:
        """Return what has become of the orders that were seen unsettled; those not yet long ago stay watched."""
        old = {order_id: since for order_id, since in watched.items() if now - since >= STUCK_AFTER}
        held = self._holdings.of([OrderKey(self._company_id, order_id) for order_id in old])
        found = [
            of_watched(self._company_id, order_id, holding, old[order_id])
            for order_id, holding in zip(old, held, strict=True)
        ]
        young = tuple(order_id for order_id in watched if order_id not in old)
        return Findings(tuple(gap for gap in found if gap is not None), young, tuple(old))
