"""Asking for fetches of many orders: in chunks, with a bar, and with a count of what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final, Literal

import msgspec

from app import bootstrap
from app.cli import deeds, output
from app.cli.session import Session
from app.store.keys import OrderKey

CHUNK: Final = 200
"""Orders one call of want.lua takes: Redis serves others in between."""


class Asked(msgspec.Struct, frozen=True):
    """What came of it: of `orders`, so many have a new job, so many had one waiting already; erased ones have none."""

    orders: int
    queued: int
    waiting: int
    erased: int = 0

    def sentence(self) -> str:
        erased = f", {self.erased:,} erased and not fetched any more" if self.erased else ""
        return f"{output.many(self.orders, 'order')}: {self.queued:,} queued, {self.waiting:,} waiting already{erased}."


def ask_for(
    here: Session,
    orders: Sequence[OrderKey],
    *,
    queue: Literal["live", "backfill"],
    what: str,
    who: str | None,
    why: str,
) -> Asked:
    """Owe the orders a fetch, in the order given, and note who asks and why; interrupted, it is done so far."""
    deeds.note(here, what, deeds.about(orders), len(orders), who, why)
    if queue == "backfill" and here.settings.backfill_workers == 0:
        output.remark("BACKFILL_WORKERS is 0 here: unless another machine has one, these orders will wait.")
    erased = here.books.erasure.erased_among(orders)
    queued = 0
    left = (order for order in orders if order not in erased)
    with output.progress("asking for fetches", len(orders) - len(erased)) as step:
        while chunk := list(islice(left, CHUNK)):
            queued += here.books.ledger.want(chunk, bootstrap.clock(), queue=queue, why=what)
            step(len(chunk))
    return Asked(len(orders), queued, len(orders) - len(erased) - queued, len(erased))
