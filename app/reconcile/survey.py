"""A page of the list held against the ledger: which of its orders are to be fetched, which to be watched."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from app.reconcile.gap import STUCK_AFTER, Gap, judge, of_watched
from app.store import clockwork
from app.store.holdings import Holdings
from app.store.keys import OrderKey
from app.upstream.listing import Page


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
        self._keep = order_days * clockwork.DAY

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
