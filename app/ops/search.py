"""The search: an orderId or its beginning, a reference of either side, or a request id; and the addresses of orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from http import HTTPStatus
from threading import Lock
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.responses import Response

from app.explain.order_view import NOT_FOUND
from app.explain.stores import MOST_AT_ONCE, Stores
from app.ids import OrderKey, beginning
from app.ledger.orders import MOST_SEARCHED
from app.ops.access import Refused
from app.ops.app import RETRY_AFTER, Screen, Visit, see_other
from app.ops.pages import Pages
from app.texts import cleaned, commands_apart, invisible

LONGEST_SOUGHT: Final = 100
"""Characters; a GUID has 38, a reference at most 50."""

MOST_SHOWN: Final = 50


class SearchScreen:
    """Finds orders: at once where that is cheap, and among all of them on request.

    Of the latter only one runs: a few of them would take all threads, and let Redis answer late also to the webhook.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._searches_all = Lock()

    def screens(self) -> Iterator[Screen]:
        yield Screen("/search", self.search, frozenset({"q", "all"}))

    def search(self, visit: Visit) -> Response:
        """Return 303 to the only order that there can be; else the page of results.

        With `all` every order is searched, which takes seconds with a million of them.
        """
        text = cleaned(visit.query.get("q", ""))
        hidden = invisible(text)
        if hidden or len(text) > LONGEST_SOUGHT:
            what = f"has {hidden}, which is invisible" if hidden else f"is longer than {LONGEST_SOUGHT} characters"
            detail = f"It {what}. Give an orderId or its first 4 digits, a reference, or a request id."
            raise Refused(HTTPStatus.BAD_REQUEST, "bad_search", "This cannot be found", detail)
        if "all" in visit.query:
            found, is_whole = self._find(visit.stores, text), True
        else:
            found, is_whole = visit.stores.find_at_once(text)
        if len(found) == 1 and is_whole:
            return see_other(address(visit.stores, found[0]))
        return results(self._pages, visit, text, found, is_whole=is_whole)

    def _find(self, stores: Stores, text: str) -> list[OrderKey]:
        """Return what is found among all orders; raises Refused while another such search runs."""
        if not self._searches_all.acquire(blocking=False):
            detail = "All orders are searched for somebody else, which takes seconds. Reload this page then."
            headers = {"retry-after": str(RETRY_AFTER)}
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "search_runs", "Another search runs", detail, headers)
        try:
            return stores.find(text)
        finally:
            self._searches_all.release()


def results(pages: Pages, visit: Visit, text: str, found: Sequence[OrderKey], *, is_whole: bool) -> Response:
    """Return the page of the orders found; without any (404) it says what was searched, and what to do.

    `is_whole`: whether all orders were searched; if not, the page offers to do so.
    """
    stores = visit.stores
    records, now = stores.orders.records(found[:MOST_SHOWN]), stores.now()
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
        # The last line is what the page itself says of what was searched.
        "help": [commands_apart(line.format(text=text)) for line in NOT_FOUND[:-1]],
    }
    status = HTTPStatus.OK if found or not text else HTTPStatus.NOT_FOUND
    return pages.page("search.html", visit.user, visit.here, status, **values)


def address(stores: Stores, key: OrderKey, **query: object) -> str:
    """Return the address of the page of an order; of `query` what is empty is left out."""
    named = {"company": stores.slug(key.company_id)} if stores.are_several else {}
    text = urlencode(named | {name: value for name, value in query.items() if value})
    return f"/orders/{quote(key.order_id)}{'?' if text else ''}{text}"
