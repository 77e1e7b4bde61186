"""The search: an orderId or its beginning, a reference of either side, or a request id."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

from starlette.responses import Response

from app.explain.order_view import NOT_FOUND
from app.explain.stores import MOST_AT_ONCE
from app.ids import OrderKey, beginning
from app.ledger.orders import MOST_SEARCHED
from app.ops.access import Refused
from app.ops.app import Screen, Visit, see_other
from app.ops.order import address
from app.ops.pages import Pages
from app.texts import cleaned, commands_apart, invisible

LONGEST: Final = 100
"""Characters; a GUID has 38, a reference at most 50."""

MOST_SHOWN: Final = 50


class SearchScreen:
    """Finds orders: at once where that is cheap, and among all of them on request."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def screens(self) -> Iterator[Screen]:
        yield Screen("/search", self.search, frozenset({"q", "all"}))

    def search(self, visit: Visit) -> Response:
        """Return 303 to the only order that there can be; else a page with those found, or what was searched.

        With `all` every order is searched, which takes seconds with a million of them.
        """
        text = cleaned(visit.query.get("q", ""))
        if len(text) > LONGEST or (hidden := invisible(text)):
            what = (
                f"longer than {LONGEST} characters"
                if len(text) > LONGEST
                else f"text with {hidden}, which is invisible"
            )
            detail = f"Give an orderId or its first 4 digits, a reference, or a request id: no order has a {what}."
            raise Refused(HTTPStatus.BAD_REQUEST, "bad_search", "This cannot be found", detail)
        stores, is_whole = visit.stores, True
        found: list[OrderKey] = []
        if text and "all" in visit.query:
            found = stores.find(text)
        elif text:
            found, is_whole = stores.find_at_once(text)
        if len(found) == 1 and is_whole:
            return see_other(address(stores, found[0]))
        records = stores.orders.records(found[:MOST_SHOWN])
        now = stores.now()
        values: dict[str, Any] = {
            "text": text,
            "orders": [
                (key, stores.slug(key.company_id), record, record and record.state(now))
                for key, record in zip(found, records, strict=False)
            ],
            "left": max(0, len(found) - MOST_SHOWN),
            "is_whole": is_whole,
            "is_beginning": beginning(text) is not None,
            "newest": MOST_SEARCHED,
            "at_once": MOST_AT_ONCE,
            "help": [part for line in NOT_FOUND[1:] for part in commands_apart(line)],
        }
        status = HTTPStatus.OK if found or not text else HTTPStatus.NOT_FOUND
        return self._pages.page("search.html", visit.user, visit.here, status, **values)
