"""Many orders at once, put straight into their status: what a load test or a chaos test starts from."""

from __future__ import annotations

import asyncio
import random
from typing import Annotated

import msgspec

from app.dev.sandbox import submission
from app.dev.sandbox.company import Company
from app.dev.sandbox.mint import guid, timestamp
from app.dev.sandbox.order import Status
from app.dev.sandbox.samples import order_body
from app.dev.sandbox.world import World

# Orders made between two looks at the sockets.
_STRIDE = 100
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(ge=0)]


class Bulk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is wanted.

    The company is named by `company_id` or by its address. `mix` gives shares: of 10 orders, {"Issued": 8,
    "Draft": 1, "Error": 1} makes exactly so many, shuffled by the seed. `order_ids` (instead of `count`) sets the
    ids. `events` is how often each is announced, at once; with `same_timestamp` these are exact duplicates.
    """

    company_id: str | None = None
    tenant: str = "sandbox"
    environment: str = "Sandbox"
    company: str = "Sandbox"
    partner_id: str | None = None
    count: _Count = 1
    order_ids: tuple[str, ...] = ()
    mix: dict[Status, _Share] = msgspec.field(default_factory=lambda: {"Issued": 1.0})
    items: tuple[str, ...] = ("31001",)
    quantity: Annotated[int, msgspec.Meta(ge=1)] = 1
    reference: str = "BULK"
    events: _Count = 0
    same_timestamp: bool = False


async def make(world: World, company: Company, wish: Bulk) -> list[dict[str, str]]:
    """Make the orders and return their ids and statuses; raises Refusal (400) for lines that cannot be."""
    partner_id = wish.partner_id or next(iter(sorted(company.partner_ids)), guid("partner", company.id))
    count = len(wish.order_ids) or wish.count
    book = world.book(company)
    made = []
    for number, status in enumerate(_statuses(wish.mix, count, world.seed)):
        reference = f"{wish.reference}-{len(book) + 1}-{number}"
        body = order_body(
            partner_id,
            reference,
            payment_reference="" if status == "Draft" else f"PAY-{number}",
            items=wish.items,
            quantity=wish.quantity,
        )
        top = submission.header(body)
        order_id = wish.order_ids[number].lower() if wish.order_ids else None
        row = book.place(top, submission.shells(body, top), order_id)
        if status != "Submitted":
            book.force(row, status)
        made.append({"order_id": row.order.order_id, "status": status})
        at = timestamp(world.settings.digits) if wish.same_timestamp else None
        for _ in range(wish.events):
            # A cancelled order was announced as what it was before: cancelling itself fires nothing.
            world.announce(company, row.order, "Issued" if status == "Cancelled" else status, at)
        if number % _STRIDE == _STRIDE - 1:
            await asyncio.sleep(0)
    return made


def _statuses(mix: dict[Status, float], count: int, seed: int) -> list[Status]:
    whole = sum(mix.values()) or 1
    # 0.29 of 100 is 28.999... in binary, and 29 are meant.
    statuses: list[Status] = [status for status, share in mix.items() for _ in range(int(count * share / whole + 1e-6))]
    statuses += [next(iter(mix), "Issued")] * (count - len(statuses))
    random.Random(seed).shuffle(statuses)  # noqa: S311 (a shuffle that the seed repeats, no secret)
    return statuses
