"""How an order is shown: a row of a list, or a page of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import msgspec

from app.cli import moment, output
from app.cli.advice import next_step
from app.cli.lacks import UNREADABLE, Lack
from app.cli.story import sentence
from app.store.record import OrderRecord, SinkRecord, State
from app.store.trail import Entry
from app.upstream.order import Item, Order, Wallet


def columns() -> tuple[str, ...]:
    """Return the headings of `row`."""
    changed = f"changed ({output.zone()})"
    counts = ("#wallets", "#tickets", "#coupons")
    return (changed, "?company", "=order", "state", "status", *counts, "?reference", "trouble")


def row(record: OrderRecord, slug: str, now: datetime) -> tuple[object, ...]:
    """Return an order as one row."""
    sinks = ", ".join(sink.dead for sink in record.dead_sinks)
    return (
        moment.short(record.changed),
        slug,
        record.order_id,
        record.state(now),
        record.known_status,
        record.wallets,
        record.tickets,
        record.coupons,
        record.reference,
        record.dead or record.error or sinks,
    )


@dataclass(frozen=True)
class OrderPage:
    """All that is known of one order; `order` has been masked already, if it was to be.

    `sinks`: also those that were never tried; `name`: what names the order on a command line.
    """

    slug: str
    record: OrderRecord
    state: State
    due: datetime | None
    order: Order | None
    lacks: tuple[Lack, ...]
    sinks: tuple[SinkRecord, ...]
    name: str
    trail: tuple[Entry, ...]

    def as_object(self) -> dict[str, object]:
        """Return the page for machines; the order's own fields are named as upstream names them."""
        about = {"company": self.slug, "state": self.state, "next": self._next(), "due": self.due}
        return about | msgspec.structs.asdict(self.record) | {"order": self.order, "trail": self.trail}

    def print(self) -> None:
        """Print the page for people."""
        record, order = self.record, self.order
        output.facts(
            f"order {record.order_id}",
            [
                ("company", self.slug),
                ("state", self.state),
                ("next", self._next()),
                ("status", record.known_status),
                ("status message", order.status_message if order else None),
                ("our reference", order.sell_to_order_reference if order else None),
                ("their reference", record.reference or (order.buy_from_order_reference if order else None)),
                ("content", self._content()),
                ("manifest", order.manifest_url if order else None),
                ("fetched", moment.short(record.fetched)),
                ("erased", moment.short(record.erased)),
                ("looked at again", moment.short(self.due)),
                ("trouble", self._trouble()),
                *((f"sink {sink.name}", _sink(sink, record.revision)) for sink in self.sinks),
            ],
        )
        if order is not None and order.wallets:
            headings = ("line", "visit", "wallet", "guest", "asset", "number", "item", "description")
            output.table("", headings, (cells for item in order.items for cells in _assets(item)))
        output.table("", (f"when ({output.zone()})", "what"), ((moment.short(e.at), sentence(e)) for e in self.trail))

    def _next(self) -> str:
        return next_step(self.record, self.state, self.lacks, self.name)

    def _content(self) -> str:
        record = self.record
        if record.erased:
            return "erased"
        if UNREADABLE in self.lacks:
            return f"unreadable, revision {record.revision}"
        if not record.revision:
            return "never fetched"
        counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
        parts = ", ".join(output.many(count, what) for count, what in counts)
        return f"{parts}, revision {record.revision}, " + ("with a manifest" if record.manifest else "no manifest")

    def _trouble(self) -> str:
        record = self.record
        if not (record.error or record.dead):
            return ""
        counts = (
            (record.tries, "try", "tries"),
            (record.looks, "look", "looks"),
            (record.parks, "wait", "waits"),
            (record.crashes, "crash", "crashes"),
        )
        told = [f"{count} {one if count == 1 else several}" for count, one, several in counts if count]
        return ", ".join([record.dead or record.error, *([f"HTTP {record.http}"] if record.http else []), *told])


def _sink(sink: SinkRecord, revision: int) -> str:
    if sink.dead:
        return f"given up at revision {sink.revision} of {revision}: {sink.dead}"
    if sink.dropped and sink.dropped >= revision:
        return f"never had revision {revision}: given up for good, by hand"
    if sink.revision >= revision:
        return f"has revision {sink.revision}"
    again = f", tried {output.many(sink.tries, 'time')}, next {moment.short(sink.next) or 'now'}" if sink.tries else ""
    return f"has revision {sink.revision} of {revision}{again}"


def _assets(item: Item) -> list[tuple[object, ...]]:
    visit = " ".join(str(part) for part in (item.visit_date, item.visit_time) if part is not None)
    rows: list[tuple[object, ...]] = []
    for wallet in item.wallets:
        rows.append((item.line_no, visit, *_wallet(wallet)))
        rows += [
            ("", "", "", "", asset.type, asset.reference_number, asset.item_number, asset.description)
            for asset in wallet.assets
        ]
    return rows


def _wallet(wallet: Wallet) -> tuple[object, ...]:
    return (
        wallet.external_reference_number,
        wallet.name,
        "wallet",
        wallet.wallet_reference_number,
        "",
        wallet.manifest_url,
    )
