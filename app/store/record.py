"""The record of one order as people read it: the hash of keys.py, typed, with one word for where the order stands."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

import msgspec

from app.store.keys import OrderKey
from app.store.moment import from_ms

State = Literal["owed", "fetching", "parked", "home", "gone", "dead", "dropped", "erased"]
"""Where an order stands, first match wins.

`erased`: on request; what is left keeps it from coming back. `dead`: given up, still owed. `fetching`: a worker holds
it. `parked`: owed, and the connection is at fault, not the order. `owed`: a fetch is to come. `gone`: upstream has
deleted it. `dropped`: given up for good, by hand. `home`: all that was settled has been fetched.
Sinks are not in it: an order may be home and a sink behind (`SinkRecord`).
"""


class SinkRecord(msgspec.Struct, frozen=True):
    """How far one sink is; `revision` is the latest it took, `next` its next try, `dead` why it was given up.

    `dropped` is the latest revision that was given up for good: the sink never had it, unless it took a later one.
    """

    name: str
    revision: int
    tries: int
    next: datetime | None
    dead: str
    dropped: int = 0


class OrderRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One order; what the fields mean stands in keys.py. What is not there is 0, "" or None."""

    company_id: str
    order_id: str
    wanted: int
    begun: int
    done: int
    fence: int
    job: str
    lane: str
    lease: datetime | None
    holder: str
    tries: int
    looks: int
    parks: int
    crashes: int
    missing: datetime | None
    error: str
    http: int | None
    dead: str
    dead_at: datetime | None
    dropped: datetime | None
    erased: datetime | None
    status: str
    said: str
    revision: int
    fetched: datetime | None
    wallets: int
    tickets: int
    coupons: int
    manifest: bool
    first: datetime | None
    heard: datetime | None
    reference: str
    request: str
    duplicates: int
    sinks: tuple[SinkRecord, ...]

    @property
    def key(self) -> OrderKey:
        return OrderKey(self.company_id, self.order_id)

    @property
    def known_status(self) -> str:
        """Return the status told last, by an event or by a fetch; "" if neither came yet."""
        by_fetch = self.fetched is not None and (self.heard is None or self.fetched > self.heard)
        return (self.status if by_fetch else self.said) or self.status

    @property
    def changed(self) -> datetime | None:
        """Return when something was last learnt of the order."""
        moments = (self.first, self.heard, self.fetched, self.dead_at, self.dropped, self.erased)
        return max(filter(None, moments), default=None)

    @property
    def dead_sinks(self) -> tuple[SinkRecord, ...]:
        """Return the sinks whose hand-on was given up."""
        return tuple(sink for sink in self.sinks if sink.dead)

    @property
    def is_dropped(self) -> bool:
        """Return whether it was given up for good, and nothing came since: no event, no wish, no late answer."""
        return (
            self.dropped is not None and self.done >= self.wanted and not (self.fetched and self.fetched > self.dropped)
        )

    def state(self, now: datetime) -> State:
        """Return the one word; `now` is aware and tells whether a lease still holds."""
        if self.erased:
            return "erased"
        if self.dead:
            return "dead"
        if self.done < self.wanted:
            if self.lease is not None and self.lease > now:
                return "fetching"
            return "parked" if self.parks else "owed"
        if self.status == "Gone":
            return "gone"
        return "dropped" if self.is_dropped else "home"


def parse_record(order: OrderKey, fields: Mapping[bytes, bytes]) -> OrderRecord:
    """Return the record in the hash of `order`."""
    texts = {name.decode(): value.decode() for name, value in fields.items()}

    def number(name: str) -> int:
        return int(texts.get(name) or 0)

    def moment(name: str) -> datetime | None:
        return _moment(texts.get(name))

    def text(name: str) -> str:
        return texts.get(name, "")

    return OrderRecord(
        company_id=order.company_id,
        order_id=order.order_id,
        wanted=number("wanted"),
        begun=number("begun"),
        done=number("done"),
        fence=number("fence"),
        job=text("job"),
        lane=text("lane"),
        lease=moment("lease"),
        holder=text("holder"),
        tries=number("tries"),
        looks=number("looks"),
        parks=number("parks"),
        crashes=number("crashes"),
        missing=moment("missing"),
        error=text("error"),
        http=number("http") or None,
        dead=text("dead"),
        dead_at=moment("dead_at"),
        dropped=moment("dropped"),
        erased=moment("erased"),
        status=text("status"),
        said=text("said"),
        revision=number("revision"),
        fetched=moment("fetched"),
        wallets=number("wallets"),
        tickets=number("tickets"),
        coupons=number("coupons"),
        manifest=number("manifest") == 1,
        first=moment("first"),
        heard=moment("heard"),
        reference=text("reference"),
        request=text("request"),
        duplicates=number("duplicates"),
        sinks=_sinks(texts),
    )


def _sinks(texts: Mapping[str, str]) -> tuple[SinkRecord, ...]:
    # A sink's own name has colons (`python:package.module:function`), its field is what follows the last.
    names = sorted({name.rpartition(":")[0] for name in texts} - {""})
    return tuple(
        SinkRecord(
            name=name,
            revision=int(texts.get(f"{name}:at") or 0),
            tries=int(texts.get(f"{name}:tries") or 0),
            next=_moment(texts.get(f"{name}:next")),
            dead=texts.get(f"{name}:dead", ""),
            dropped=int(texts.get(f"{name}:dropped") or 0),
        )
        for name in names
    )


def _moment(milliseconds: str | None) -> datetime | None:
    return from_ms(int(milliseconds)) if milliseconds else None
