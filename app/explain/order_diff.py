"""What changed in an order between two revisions: the wallets, tickets and coupons that came, changed or went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import msgspec

from app import times
from app.errors import NotKnown
from app.explain.mask import masked
from app.explain.stores import Stores
from app.explain.words import many
from app.ids import OrderKey
from app.ledger.revisions import Revision, read_revisions
from app.upstream.models import Asset, Order, Wallet, parse_order

What = Literal["came", "changed", "went"]


class FieldChange(msgspec.Struct, frozen=True):
    """One field of a wallet or an asset, as it is shown; equal texts where both are masked alike."""

    field: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before == self.after:
            return f"{self.field} (hidden)"
        return f"{self.field} {self.before or '–'} → {self.after or '–'}"


class Change(msgspec.Struct, frozen=True):
    """A wallet, ticket or coupon (`kind`) that came, changed or went; `place` is its line and its wallet on that line.

    `fields` are there only where it changed; the field `place` says that it was moved.
    """

    what: What
    kind: str
    place: str
    number: str | None
    item_number: str | None
    fields: tuple[FieldChange, ...] = ()


class _Found(msgspec.Struct, frozen=True):
    """A wallet or an asset of one revision; `shown` is the same, masked. Its `wallet` is None if it is one."""

    key: tuple[object, ...]
    place: str
    part: Wallet | Asset
    shown: Wallet | Asset
    wallet: tuple[object, ...] | None = None

    @property
    def kind(self) -> str:
        return (self.part.type or "asset") if isinstance(self.part, Asset) else "wallet"


def compare(before: Order, after: Order, *, reveal: bool = False) -> list[Change]:
    """Return what came, changed or went, in the order of the lines; what went comes last.

    A wallet is known by its id, a ticket or a coupon by its own, so it is found again in another wallet. A shell has no
    id yet: it is known by its place. `reveal` leaves names, numbers and links in the result.
    """
    old, new = _flat(before, reveal=reveal), _flat(after, reveal=reveal)
    same = _pairs(old, new)
    changes = []
    for key, found in new.items():
        earlier = old.get(same[key]) if key in same else None
        if earlier is None:
            changes.append(_change("came", found))
        elif fields := tuple(_differences(earlier, found, same)):
            changes.append(_change("changed", found, fields))
    left = old.keys() - set(same.values())
    return [*changes, *(_change("went", found) for key, found in old.items() if key in left)]


def _flat(order: Order, *, reveal: bool) -> dict[tuple[object, ...], _Found]:
    """Return the wallets and assets of an order by what each is known by, in its order."""
    found: dict[tuple[object, ...], _Found] = {}
    seen = Counter[tuple[object, ...]]()

    def unique(*key: object) -> tuple[object, ...]:
        seen[key] += 1
        return (*key, seen[key])

    for item, shown_item in zip(order.items, (order if reveal else masked(order)).items, strict=True):
        for at, (wallet, shown) in enumerate(zip(item.wallets, shown_item.wallets, strict=True), 1):
            place = f"{item.line_no or '?'}/{wallet.seq_no or at}"
            known_by = unique("wallet", wallet.wallet_id) if wallet.wallet_id else unique("shell", place)
            found[known_by] = _Found(known_by, place, wallet, shown)
            for asset, shown_asset in zip(wallet.assets, shown.assets, strict=True):
                own = asset.asset_id or asset.id or asset.reference_number
                key = unique(asset.type, own) if own else unique(asset.type, place, asset.item_number)
                found[key] = _Found(key, place, asset, shown_asset, known_by)
    return found


def _pairs(
    old: Mapping[tuple[object, ...], _Found], new: Mapping[tuple[object, ...], _Found]
) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Return the key in `new` -> the key in `old` of each that both have."""
    same = {key: key for key in new if key in old}
    # A shell that was issued, or the other way round: one of the two has no id.
    places = {one.place: key for key, one in old.items() if one.wallet is None and key not in new}
    for key, one in new.items():
        earlier = places.get(one.place) if key not in same and one.wallet is None else None
        if earlier and "shell" in (key[0], earlier[0]):
            same[key] = earlier
    return same


def _differences(
    earlier: _Found, found: _Found, same: Mapping[tuple[object, ...], tuple[object, ...]]
) -> Iterator[FieldChange]:
    # An asset goes where its wallet goes: it was moved only if it is in another wallet.
    is_in_its_wallet = found.wallet is not None and same.get(found.wallet) == earlier.wallet
    if earlier.place != found.place and not is_in_its_wallet:
        yield FieldChange("place", earlier.place, found.place)
    for name in found.part.__struct_fields__:
        if name not in {"assets", "seq_no"} and getattr(earlier.part, name, None) != getattr(found.part, name):
            yield FieldChange(name, _text(getattr(earlier.shown, name, None)), _text(getattr(found.shown, name)))


def _text(value: object) -> str | None:
    # Fields that upstream added since may hold anything.
    return None if value is None else "…" if isinstance(value, dict) else str(value)


def _change(what: What, found: _Found, fields: tuple[FieldChange, ...] = ()) -> Change:
    shown = found.shown
    if isinstance(shown, Asset):
        return Change(what, found.kind, found.place, shown.reference_number, shown.item_number, fields)
    return Change(what, found.kind, found.place, shown.wallet_reference_number, None, fields)


class Difference(msgspec.Struct, frozen=True):
    """What `revision` changed against the one before it; `before` is None if it is the only one known.

    `changes` are None where of one of the two only the digest is kept. `known` are all known revisions.
    """

    before: Revision | None
    revision: Revision
    changes: tuple[Change, ...] | None
    known: tuple[Revision, ...]

    @property
    def without_content(self) -> tuple[int, ...]:
        """Return those of the two of which only the digest is kept."""
        return tuple(one.revision for one in (self.before, self.revision) if one is not None and one.raw is None)

    def sentences(self) -> Iterator[str]:
        """Return in words which revisions are compared, and how many wallets, tickets and coupons came or went."""
        before, after = self.before, self.revision
        if self.changes is None:
            which = " and ".join(map(str, self.without_content))
            yield f"Of revision {which} only the digest is kept (REVISIONS_KEPT): they cannot be compared."
            return
        if before is None:
            yield f"It has one revision, {after.revision}: there is nothing to compare it with."
            return
        apart = ""
        if before.at is not None and after.at is not None:
            apart = f", fetched {times.span(round((after.at - before.at).total_seconds() * 1000))} later"
        yield f"Revision {after.revision} against {before.revision}{apart}:"
        if before.status != after.status:
            yield f"Status {before.status} is now {after.status}."
        if not self.changes:
            yield "No wallet, ticket or coupon came, changed or went; other fields of the order differ."
            return
        yield f"{'; '.join(_counted(self.changes))}."


def difference(stores: Stores, key: OrderKey, number: int | None = None, *, reveal: bool = False) -> Difference:
    """Return what revision `number` (the latest) changed against the one before it; `reveal` as for `compare`.

    Raises NotKnown if the order was never fetched or was erased, or one of the two revisions is not known.
    """
    record = stores.orders.record(key)
    known = read_revisions(stores.redis, record) if record is not None else []
    if record is None or not known:
        why = "was erased: no revision is kept" if record is not None and record.erased_at else "was never fetched"
        raise NotKnown(f"Order {key.order_id} {why}.")
    at = next((at for at, one in enumerate(known) if one.revision == (number or record.revision)), None)
    if at is None or (number is not None and at == 0):
        what = "is not known" if at is None else "is the first one known: it has none before it"
        raise NotKnown(f"Revision {number} {what}. Known: {', '.join(str(one.revision) for one in known)}.")
    before, after = (known[at - 1] if at else None), known[at]
    pair = [one.raw for one in (before, after) if one is not None]
    contents = [parse_order(raw) for raw in pair if raw is not None]
    changes = None
    if len(contents) == len(pair):
        changes = tuple(compare(*contents, reveal=reveal)) if len(contents) == 2 else ()
    return Difference(before, after, changes, tuple(known))


def _counted(changes: Iterable[Change]) -> Iterator[str]:
    counts = Counter((one.what, one.kind) for one in changes)
    for what in ("came", "changed", "went"):
        found = [many(count, kind) for (of, kind), count in counts.items() if of == what]
        if found:
            yield f"{', '.join(found)} {what}"
