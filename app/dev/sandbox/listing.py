"""listOrdersByPartner: filters, order and pages, as NaviPartner's shared paging code does them.

Read from AL (`NPR API Request`): the page key carries the view of the first call, so the filters of later calls do
not count; `nextPageURL` names the public host and is glued together without encoding.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import parse_qsl

import msgspec
from msgspec.structs import replace

from app.dev.sandbox.book import Row
from app.dev.sandbox.order import Summary
from app.dev.sandbox.refusal import bad_request

_HOST = "https://api.npretail.app"
_PAGE_LIMIT = 20_000
_STATUSES = {"Submitted", "Scheduled", "Processing", "Draft", "Issued", "Cancelled", "Error"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a list shows; times are Unix milliseconds."""

    partner_id: str
    statuses: tuple[str, ...] = ()
    reference: str | None = None
    received_from: float | None = None
    received_to: float | None = None
    by_row_version: bool = False


class PageKey(msgspec.Struct, frozen=True):
    """Where the next page begins: after the row with these index fields."""

    view: View
    after: tuple[int, str]


class Page(msgspec.Struct, frozen=True, rename="camel"):
    """One page."""

    more_pages: bool
    next_page_key: str
    next_page_url: str = msgspec.field(name="nextPageURL")
    data: list[Summary]


def page(rows: Iterable[Row], partner_id: str, path: str, query: bytes) -> Page:
    """Return the page that `query` asks for of a partner's `rows`; raises Refusal (400)."""
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    view, after = _view(given, partner_id), None
    if "pageKey" in given:
        key = _page_key(given["pageKey"])
        view, after = key.view, key.after
    last = _integer(given, "lastRowVersion") if "sync" in given and "lastRowVersion" in given else None
    size = _integer(given, "pageSize") if "pageSize" in given else 0
    size = size if 1 <= size <= _PAGE_LIMIT else _PAGE_LIMIT

    found = sorted(
        (_index(view, row), row)
        for row in rows
        if _shows(view, row) and (last is None or row.version > last) and (after is None or _index(view, row) > after)
    )
    shown = found[:size]
    more = len(found) > size
    key_text = _encoded(PageKey(view, shown[-1][0])) if more else ""
    return Page(more, key_text, _url(path, given, key_text), [_summary(view, row) for _, row in shown])


def _view(given: dict[str, str], partner_id: str) -> View:
    statuses = tuple(name for name in given.get("status", "").split(",") if name)
    unknown = [name for name in statuses if name not in _STATUSES]
    if unknown:
        raise bad_request(f"The filter '{unknown[0]}' is not valid for the Status field.")
    sync = given.get("sync", "false").lower()
    if sync not in _BOOLEANS:
        raise bad_request(f"The value '{sync}' can't be evaluated into type Boolean.")
    return View(
        partner_id=partner_id,
        statuses=statuses,
        reference=given["sellToOrderReference"].upper() if "sellToOrderReference" in given else None,
        received_from=_moment(given, "receivedAtFrom"),
        received_to=_moment(given, "receivedAtTo"),
        by_row_version=_BOOLEANS[sync],
    )


def _shows(view: View, row: Row) -> bool:
    order = row.order
    return (
        order.partner_id == view.partner_id
        and (not view.statuses or order.status in view.statuses)
        and (view.reference is None or order.sell_to_order_reference == view.reference)
        and (view.received_from is None or row.received >= view.received_from)
        and (view.received_to is None or row.received <= view.received_to)
    )


def _index(view: View, row: Row) -> tuple[int, str]:
    return (row.version if view.by_row_version else row.received), row.order.order_id


def _summary(view: View, row: Row) -> Summary:
    return replace(row.summary(), row_version=str(row.version)) if view.by_row_version else row.summary()


def _integer(given: dict[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise bad_request(f"The value '{given[name]}' can't be evaluated into type Integer.") from None


def _moment(given: dict[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        value = datetime.fromisoformat(given[name])
    except ValueError:
        raise bad_request(f"{name} must be ISO 8601 datetime") from None
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000


def _encoded(key: PageKey) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def _page_key(text: str) -> PageKey:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=PageKey)
    except ValueError:
        raise bad_request("The input is not a valid Base-64 string.") from None


def _url(path: str, given: dict[str, str], page_key: str) -> str:
    if not page_key:
        return ""
    kept = [f"{name}={value}" for name, value in given.items() if name != "pageKey"]
    return f"{_HOST}{path}?{'&'.join([*kept, f'pageKey={page_key}'])}"
