"""`orders show --diff`: what changed in an order between two revisions, as a table."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from app.cli import console
from app.cli.command import FOUND, Stop
from app.cli.context import CommandContext
from app.explain.order_diff import Change, difference
from app.ids import OrderKey
from app.ledger.revisions import Revision

_DIGITS_SHOWN: Final = 12


def show(here: CommandContext, key: OrderKey, number: int | None, *, reveal: bool) -> None:
    """Print what revision `number` (the latest) changed against the one before it, and the known revisions.

    Raises NotKnown, and Stop if one of the two is known only by its digest.
    """
    found = difference(here, key, number, reveal=reveal)
    is_whole, said = found.changes is not None, list(found.sentences())
    lines = [f"order {key.order_id} ({here.slug(key.company_id)})"]
    lines += [line for sentence in said for line in console.wrapped(sentence)] if is_whole else []
    console.result(
        lines,
        {
            "company": here.slug(key.company_id),
            "company_id": key.company_id,
            "order_id": key.order_id,
            "revision": found.revision.revision,
            "against": None if found.before is None else found.before.revision,
            "changes": found.changes,
            "revisions": [_as_object(one) for one in found.known],
        },
    )
    if found.changes:
        console.say("")
        console.table("", ("change", "kind", "place", "=number", "item", ">fields"), map(_row, found.changes))
    console.say("")
    headings = ("#revision", "@fetched", "status", "digest", "#wallets", "#tickets", "#coupons", "kept")
    console.table("", headings, map(_revision_row, found.known))
    if not is_whole:
        raise Stop(said[0], FOUND)


def _row(one: Change) -> tuple[object, ...]:
    return (one.what, one.kind, one.place, one.number, one.item_number, ", ".join(map(str, one.fields)))


def _revision_row(one: Revision) -> tuple[object, ...]:
    kept = "content" if one.raw is not None else "digest"
    return (
        one.revision,
        one.at,
        one.status,
        one.digest[:_DIGITS_SHOWN],
        one.wallets,
        one.tickets,
        one.coupons,
        kept,
    )


def _as_object(one: Revision) -> dict[str, Any]:
    fields = msgspec.structs.asdict(one)
    return {name: value for name, value in fields.items() if name != "raw"} | {"kept": one.raw is not None}
