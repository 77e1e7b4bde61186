"""How an order is shown: a row of a list, or a page of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import msgspec

from app.cli import moment, output
from app.cli.advice import next_step
from app.cli.story import sentence
from app.store.record import OrderRecord, SinkRecord, State
from app.store.trail import Entry
from app.upstream.order import Item, Order, Wallet


def columns() -> tuple[str, ...]:
    """Return the headings of `row`."""
    changed = f"changed ({output.zone()})"
    return (changed, "company", "order", "state", "status", "#wallets", "#tickets", "#coupons", "reference", "trouble")


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
    """All that is known of one order; `order` has been masked already, if it was to be."""

    slug: str
    record: OrderRecord
    state: State
    due: datetime | None
    order: Order | None
    trail: tuple[Entry, ...]

    def as_object(self) -> dict[str, object]:
        """Return the page for machines; the order's own fields are named as upstream names them."""
        about = {"company": self.slug, "state": self.state, "next": next_step(self.record, self.state), "due": self.due}
        return about | msgspec.structs.asdict(self.record) | {"order": self.order, "trail": self.trail}

    def print(self) -> None:
        """Print the page for people."""
        record, order = self.record, self.order
        output.facts(
            f"order {record.order_id}",
            [
                ("company", self.slug),
                ("state", self.state),
                ("next", next_step(record, self.state)),
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
                *((f"sink {sink.name}", _sink(sink, record.revision)) for sink in record.sinks),
            ],
        )
        if order is not None and order.wallets:
            headings = ("line", "visit", "wallet", "guest", "asset", "number", "item", "description")
            output.table("", headings, (cells for item in order.items for cells in _assets(item)))
        output.table("", (f"when ({output.zone()})", "what"), ((moment.short(e.at), sentence(e)) for e in self.trail))

    def _content(self) -> str:
        record = self.record
        if record.erased:
            return "erased"
        if not record.revision:
            return "never fetched"
        counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
        parts = ", ".join(output.many(count, what) for count, what in counts)
        return f"{parts}, revision {record.revision}, " + ("with a manifest" if record.manifest else "no manifest")

    def _trouble(self) -> str:
        record = self.record
        if not (record.error or record.dead):
            return ""
        counts = {"tries": record.tries, "looks": record.looks, "waits": record.parks, "crashes": record.crashes}
        told = [f"{count} {name}" for name, count in counts.items() if count]
        return ", ".join([record.dead or record.error, *([f"HTTP {record.http}"] if record.http else []), *told])


def _sink(sink: SinkRecord, revision: int) -> str:
    if sink.dead:
        return f"given up at revision {sink.revision} of {revision}: {sink.dead}"
    if sink.dropped and sink.dropped >= revision:
        return f"never had revision {revision}: given up for good, by hand"
    if sink.revision >= revision:
        return f"has revision {sink.revision}"
    return f"has revision {sink.revision} of {revision}, {sink.tries} tries, next {moment.short(sink.next) or 'now'}"


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
