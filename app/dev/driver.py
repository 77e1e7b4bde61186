"""Drives orders through a receiver by way of the Channel Manager's own API, and checks every one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from app.dev.sandbox.samples import order_body
from app.dev.stack import PARTNER_ID, Stack
from app.store.archive import Archive
from app.store.keys import OrderKey
from app.store.record import OrderRecord
from app.upstream.client import ChannelManager
from app.upstream.order import Order

_POLL: Final = 0.05


@dataclass
class Sample:
    """One order of the demo: what it is made of, what it should become, and what came home."""

    title: str
    items: tuple[str, ...]
    quantity: int
    payment_reference: str
    expected: str
    repeats: int = 0
    order_id: str = ""
    settlements: int = 1
    record: OrderRecord | None = None
    order: Order | None = None
    calls: int = 0
    problems: list[str] = field(default_factory=list)


def samples() -> list[Sample]:
    """Return the orders of the demo."""
    return [
        Sample("Two day tickets", ("31001",), 2, "PAY-1001", "Issued"),
        Sample("Package, coupons", ("31001", "PKG-100"), 2, "PAY-1002", "Issued"),
        Sample("Group ticket", ("GRP-200",), 20, "PAY-1003", "Issued"),
        Sample("Not yet paid", ("31001",), 1, "", "Draft"),
        Sample("Failed, replaced", ("FAIL-1",), 1, "PAY-1005", "Error"),
        Sample("Announced thrice", ("31001", "CPN-300"), 1, "PAY-1006", "Issued", repeats=2),
    ]


class Driver:
    """Creates the samples' orders, waits until they are home, and says what is wrong with them."""

    def __init__(self, stack: Stack, manager: ChannelManager, archive: Archive) -> None:
        self._stack = stack
        self._manager = manager
        self._archive = archive
        self._company_id = stack.settings.companies[0].np_company_id

    def create(self, sample: Sample, number: int) -> None:
        """Submit the order; its event comes when it has settled."""
        sample.order_id = self._manager.create_order(self._body(sample, number)).order.order_id

    def announce_again(self, sample: Sample) -> None:
        """Let the sender repeat the event of a settled order, timestamp and all."""
        if sample.repeats:
            body = {
                "order_id": sample.order_id,
                "company_id": self._company_id,
                "times": sample.repeats,
                "timestamp": "last",
            }
            self._stack.sandbox.admin("POST", "fire", body)

    def replace(self, sample: Sample, number: int) -> None:
        """Repair an Error order as a partner does: replaceOrder, which settles again under the same orderId."""
        sample.items, sample.expected = ("31001",), "Issued"
        sample.settlements += 1
        self._manager.replace_order(sample.order_id, self._body(sample, number))

    def wait_home(self, sample: Sample, within: float) -> bool:
        """Return whether the order came home with all its settlements in `within` seconds."""
        order = OrderKey(self._company_id, sample.order_id)

        def home() -> bool:
            sample.record = self._archive.record(order)
            return (
                sample.record is not None
                and sample.record.done >= sample.settlements
                and sample.record.status == sample.expected
            )

        return _eventually(home, within)

    def wait_duplicates(self, sample: Sample, within: float) -> bool:
        """Return whether the repeats of the event were received, and seen to be repeats."""
        order = OrderKey(self._company_id, sample.order_id)

        def counted() -> bool:
            sample.record = self._archive.record(order)
            return sample.record is not None and sample.record.duplicates >= sample.repeats

        return _eventually(counted, within)

    def inspect(self, sample: Sample) -> None:
        """Compare what is stored with what upstream has, and count what it cost."""
        key = OrderKey(self._company_id, sample.order_id)
        sample.record, sample.order = self._archive.record(key), self._archive.order(key)
        row = next(row for row in self._rows() if row["order_id"] == sample.order_id)
        sample.calls = row["gets"]
        if sample.order is None or sample.record is None or sample.record.status != sample.expected:
            sample.problems.append(f"not home as {sample.expected}")
            return
        if sample.calls != sample.settlements:
            sample.problems.append(f"{sample.calls} getOrder for {sample.settlements} settlements")
        if sample.record.duplicates != sample.repeats:
            sample.problems.append(f"{sample.record.duplicates} duplicates seen of {sample.repeats}")
        sample.problems += gaps(sample.order, sample.expected)

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._stack.sandbox.admin("GET", "orders")
        return rows

    @staticmethod
    def _body(sample: Sample, number: int) -> dict[str, Any]:
        return order_body(
            PARTNER_ID,
            f"DEMO-{number:03}",
            payment_reference=sample.payment_reference,
            items=sample.items,
            quantity=sample.quantity,
        )


def subscribe(stack: Stack, manager: ChannelManager) -> None:
    """Subscribe the receiver's webhook, unless that was done before."""
    if all(one.notification_url != stack.webhook_url for one in manager.subscriptions()):
        manager.create_subscription(stack.webhook_url, stack.settings.companies[0].client_state)


def gaps(order: Order, status: str) -> list[str]:
    """Return what an order of the sandbox that settled in `status` should hold and does not."""
    found = []
    if status == "Issued" and not (order.manifest_url and order.wallets):
        found.append("issued without manifest or wallets")
    if status != "Error" and not all(wallet.tickets or wallet.coupons for wallet in order.wallets):
        found.append("a wallet is empty")
    return found


def _eventually(condition: Callable[[], bool], within: float) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True
