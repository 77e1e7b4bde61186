"""What the ledger gives a worker to do, and what the worker gives back: values only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from app.ids import OrderKey

Begun = Literal["nothing", "held", "dead", "hand", "fetch"]
Stored = Literal["refused", "erased", "home", "hand", "again", "dead"]
Failed = Literal["refused", "again", "parked", "dead", "gone"]
Failure = Literal["again", "reject", "park", "missing", "dead", "gone"]
Handed = Literal["done", "again", "dead"]
Outcome = Literal["answered", "failed", "fault"]
"""What a request says of its API key: it works, it may not, or it does not."""
Ending = Literal["killed", "ended"]
"""How a worker came to its end: `killed` counts as a crash of what it held, `ended` does not."""


class Ticked(NamedTuple):
    """What a tick did: orders looked at, jobs pushed, and orders whose keys are `broken` (not written by us)."""

    looked: int
    pushed: int
    broken: int


class Fetch(msgspec.Struct, frozen=True):
    """What `begin` knows of an order that needs a getOrder. `missing`: ms of the first 404, 0 = none.

    `known`: the status told last, by an event or a fetch; `lane`: queue of this order's jobs; `until`: ms when its
    lease ends.
    """

    begun: int
    fence: int
    tries: int
    looks: int
    parks: int
    missing: int
    known: str
    request_id: str
    lane: str
    rejects: int = 0
    until: int = 0


class Content(msgspec.Struct, frozen=True):
    """An answer of getOrder as it is stored, with what people ask for most; `references` are those of both sides.

    `guests`: e-mail addresses, of which digests are kept and nothing else.
    """

    raw: bytes
    digest: str
    status: str
    wallets: int
    tickets: int
    coupons: int
    manifest: bool
    http_status: int
    duration_ms: int
    references: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()


class HandOn(msgspec.Struct, frozen=True):
    """A revision that a sink is to get; `tries` counts this one, `crashes` those before it that never ended.

    `until`: ms when its lease ends.
    """

    sink: str
    revision: int
    tries: int
    raw: bytes
    request_id: str
    crashes: int = 0
    until: int = 0
    digest: str = ""

    def idempotency_key(self, order: OrderKey) -> str:
        """Return what is the same for every repeat of this revision, and for no other content.

        The number alone is not enough: after a flush, or in a restored Redis, revisions are counted anew.
        """
        return f"{order.company_id}/{order.order_id}/{self.revision}/{self.digest[:12]}"
