"""The lists of events, orders, dead letters and the audit: filtered by their address, page by page.

A list never moves while somebody reads it: a line above it counts what is new. `seen` in its address is the
time (ms since 1970) at which the rows were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, Final, TypeVar, get_args

import msgspec
from starlette.responses import Response

from app import audit
from app.audit import Action
from app.errors import UnknownCursor
from app.ledger.dead_letters import DeadLetter, DeadQuery
from app.ledger.events import EventQuery, StoredEvent
from app.ledger.order_lists import OrderLists
from app.ledger.orders import ON_THE_CLOCK, OrderQuery
from app.ledger.pages import Page
from app.ledger.record import OrderRecord, State
from app.ops.app import Screen, Visit
from app.ops.filters import FETCHES, Filter
from app.ops.pages import Pages
from app.times import to_ms

ROWS: Final = 50

MOST_NEW: Final = 99
"""New rows that are counted one by one; of more it says so."""

MOST_COUNTED: Final = 10_000
"""Dead fetches, and dead deliveries, that are read to count those of one company: about 15 ms."""

STATES: Final[tuple[str, ...]] = get_args(State)
OUTCOMES: Final = ("queued", "coalesced", "erased")
ACTIONS: Final[tuple[str, ...]] = get_args(Action)

_ALL: Final = frozenset({"company", "since", "until", "after", "seen"})

R = TypeVar("R")

Read = Callable[[datetime | None, str | None, int], Page[R]]
"""Reads a page from `since` on, behind a cursor, of so many rows."""


class Lists:
    """The screens `/events`, `/orders`, `/dead` and `/audit`. Their methods raise what redis-py raises."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def screens(self) -> list[Screen]:
        return [
            Screen("/events", self.events, _ALL | {"status", "outcome", "follow"}),
            Screen("/orders", self.orders, _ALL | {"status", "state", "behind", "failing"}),
            Screen("/dead", self.dead, _ALL | {"reason", "sink"}),
            Screen("/audit", self.audit, frozenset({"what", "since", "until", "after", "seen"})),
        ]

    def events(self, visit: Visit) -> Response:
        """Return the accepted events, the latest first; with `follow` the list itself is refreshed."""
        stores, chosen = visit.stores, Filter(visit.query, visit.stores)
        query = EventQuery(
            company_id=chosen.company(),
            status=chosen.text("status"),
            outcome=chosen.one_of("outcome", OUTCOMES),
            since=chosen.time("since"),
            until=chosen.time("until"),
        )
        follows = chosen.one_of("follow", ("1",)) is not None

        def read(since: datetime | None, after: str | None, limit: int) -> Page[StoredEvent]:
            return stores.events.page(msgspec.structs.replace(query, since=since), after, limit)

        return show_list(
            self._pages,
            visit,
            "events.html",
            chosen,
            query.since,
            read,
            read,
            outcomes=OUTCOMES,
            follows=follows,
            follow=chosen.address("/events", "after", "seen", follow="1"),
            unfollow=chosen.address("/events", "after", "seen", "follow"),
        )

    def orders(self, visit: Visit) -> Response:
        """Return orders: those that match, or those that a sink lacks (`behind`) or has refused (`failing`)."""
        stores, chosen = visit.stores, Filter(visit.query, visit.stores)
        now, lists = stores.now(), OrderLists(stores.redis)
        states = ("outstanding", *STATES)
        state = chosen.one_of("state", states)
        company_id, behind, failing = chosen.company(), chosen.text("behind"), chosen.text("failing")
        query: Any = OrderQuery(
            company_id=company_id,
            status=chosen.text("status"),
            state=None if state == "outstanding" else state,  # type: ignore[arg-type]  # one of STATES
            since=chosen.time("since"),
            until=chosen.time("until"),
        )
        by_clock = [name for name in ("behind", "failing") if chosen.text(name)] + ["state"] * (state == "outstanding")
        others = ("status", "since", "until", "state", "failing")
        if by_clock and (both := [name for name in others if chosen.text(name) and name != by_clock[0]]):
            chosen.errors[both[0]] = f"It cannot be combined with {by_clock[0]}."

        def read(since: datetime | None, after: str | None, limit: int) -> Page[OrderRecord]:
            if failing:
                return lists.failing(failing, now, after, limit, company_id=company_id)
            if by_clock:
                return lists.outstanding(behind or "", after, limit, company_id=company_id)
            return lists.page(msgspec.structs.replace(query, since=since), now, after, limit)

        return show_list(
            self._pages,
            visit,
            "orders.html",
            chosen,
            query.since,
            read,
            None if by_clock or state in ON_THE_CLOCK else read,
            states=states,
            sinks=stores.sinks,
            now=now,
        )

    def dead(self, visit: Visit) -> Response:
        """Return dead letters, the oldest first, how many match, and the way to a plan that requeues them."""
        stores, chosen = visit.stores, Filter(visit.query, visit.stores)
        now = stores.now()
        query = dead_query(chosen, now)
        kinds = stores.dead_letters.counts()

        def read(since: datetime | None, after: str | None, limit: int) -> Page[DeadLetter]:
            return stores.dead_letters.page(msgspec.structs.replace(query, since=since), after, limit)

        return show_list(
            self._pages,
            visit,
            "dead.html",
            chosen,
            query.since,
            read,
            read,
            total=None if chosen.errors else stores.dead_letters.total(query, MOST_COUNTED),
            reasons=_with(chosen.text("reason"), (one.reason for one in kinds)),
            sinks=_with(chosen.sink(), (*stores.sinks, *(one.sink for one in kinds))),
            fetches=FETCHES,
            plan=chosen.address("/dead/plan", "after", "seen"),
            now=now,
        )

    def audit(self, visit: Visit) -> Response:
        """Return what people changed by hand, the latest first."""
        stores, chosen = visit.stores, Filter(visit.query, visit.stores)
        what: Any = chosen.one_of("what", ACTIONS)
        since, until = chosen.time("since"), chosen.time("until")

        def read(since: datetime | None, after: str | None, limit: int) -> Page[Any]:
            return audit.page(stores.redis, after, limit, what=what, since=since, until=until)

        return show_list(
            self._pages,
            visit,
            "audit.html",
            chosen,
            since,
            read,
            read,
            actions=ACTIONS,
        )


def dead_query(chosen: Filter, now: datetime) -> DeadQuery:
    """Return which dead letters a filter means."""
    return DeadQuery(
        company_id=chosen.company(),
        sink=chosen.sink(),
        reason=chosen.text("reason"),
        since=chosen.time("since"),
        until=min(chosen.time("until") or now, now),
    )


def show_list(
    pages: Pages,
    visit: Visit,
    template: str,
    chosen: Filter,
    since: datetime | None,
    read: Read[Any],
    read_new: Read[Any] | None,
    **values: Any,
) -> Response:
    """Return the page of a list: 400 with its form as it was typed if a field of the filter is wrong.

    `read` reads what matches from `since` on, `read_new` what came since the rows were `seen`: None where a row that
    comes later has no later time.
    """
    path, stores = visit.here.partition("?")[0], visit.stores
    seen = chosen.moment("seen") or stores.now()
    found, fresh = Page[Any]([]), 0
    try:
        if not chosen.errors:
            found = read(since, visit.query.get("after"), ROWS)
            if read_new and "seen" in visit.query:
                behind = seen + timedelta(milliseconds=1)
                fresh = len(read_new(behind if since is None else max(behind, since), None, MOST_NEW + 1).rows)
    except UnknownCursor:
        chosen.errors["after"] = "The address of this page was cut, or changed: begin with the first page."
    common: dict[str, Any] = {
        "chosen": chosen.typed,
        "errors": chosen.errors,
        "companies": sorted(stores.slugs.values()) if stores.are_several or chosen.text("company") else [],
        "slug": stores.slug,
        "rows": found.rows,
        "searched_to": found.searched_to,
        "next": found.next and chosen.address(path, "seen", after=found.next),
        "first": chosen.address(path, "after", "seen"),
        "fresh": fresh,
        "most_new": MOST_NEW,
        "poll": chosen.address(path, seen=str(to_ms(seen))) if read_new else None,
    }
    status = int(HTTPStatus.BAD_REQUEST if chosen.errors else HTTPStatus.OK)
    return pages.page(template, visit.user, visit.here, status, **common, **values)


def _with(typed: str | None, known: Iterable[str]) -> list[str]:
    """Return the values of a choice, also the one that was typed: what is chosen stays chosen."""
    return sorted({*known, typed or ""} - {""})
