"""Pages of order summaries, for finding what no event told of (upstream.md 6)."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote, urlencode

from msgspec import Struct

from app.errors import UnreadableAnswer
from app.upstream.wire import Guid, Part, build, decode

_LARGEST_PAGE = 20_000  # upstream's own limit (upstream.md 5)


class Summary(Part, frozen=True):
    """One row of the list: an order without its items. `row_version` is there only in sync mode."""

    shown = ("order_id", "status", "row_version")

    order_id: Guid
    status: str
    status_message: str | None = None
    partner_id: str | None = None
    sell_to_order_reference: str | None = None
    buy_from_order_reference: str | None = None
    sell_to_email: str | None = None
    sell_to_name: str | None = None
    sell_to_language: str | None = None
    payment_reference: str | None = None
    received_at: datetime | None = None
    job_id: str | None = None
    manifest_url: str | None = None
    row_version: int | None = None


class Page(Struct, frozen=True, kw_only=True):
    """Some rows, the key of the page after this one (None on the last), and how many rows could not be read."""

    rows: tuple[Summary, ...]
    next_key: str | None
    unreadable: int

    @property
    def row_version(self) -> int | None:
        """Return the highest row version on this page: where the next look may begin once this page is stored."""
        return max((row.row_version for row in self.rows if row.row_version is not None), default=None)


class ListQuery(Struct, frozen=True, kw_only=True):
    """Which orders to list; all conditions must hold.

    `received_from` and `received_to` are aware and inclusive. `since_row_version` asks for every order *changed*
    after that row version, 0 for all: only this finds a confirmed, cancelled or replaced order (upstream.md 6).
    Raises ValueError for a naive time or a page size that upstream does not know.
    """

    statuses: tuple[str, ...] = ()
    sell_to_order_reference: str | None = None
    received_from: datetime | None = None
    received_to: datetime | None = None
    since_row_version: int | None = None
    page_size: int = 1000

    def __post_init__(self) -> None:
        if not 1 <= self.page_size <= _LARGEST_PAGE:
            raise ValueError(f"page_size must be 1 to {_LARGEST_PAGE}")
        if any(moment and moment.tzinfo is None for moment in (self.received_from, self.received_to)):
            raise ValueError("received_from and received_to need a time zone")

    def encoded(self, page_key: str | None) -> str:
        """Return the query string, percent-encoded; the conditions go along with each `page_key`.

        Upstream's own nextPageURL is not encoded (upstream.md 5), and a page without `sync` has no row versions.
        """
        parameters = {
            "status": ",".join(self.statuses),
            "sellToOrderReference": self.sell_to_order_reference,
            "receivedAtFrom": self.received_from and _utc(self.received_from),
            "receivedAtTo": self.received_to and _utc(self.received_to),
            "sync": "true" if self.since_row_version is not None else None,
            "lastRowVersion": None if self.since_row_version is None else str(self.since_row_version),
            "pageSize": str(self.page_size),
            "pageKey": page_key,
        }
        return urlencode({name: value for name, value in parameters.items() if value}, quote_via=quote)


def parse_page(raw: bytes) -> Page:
    """Return the page in the body of an answer, be it a page wrapper or a plain list (upstream.md 6).

    Raises UnreadableAnswer if it is neither.
    """
    tree = decode(raw)
    wrapper = tree if isinstance(tree, dict) else {"data": tree}
    data, key = wrapper.get("data"), wrapper.get("nextPageKey")
    if not isinstance(data, list):
        raise UnreadableAnswer("unreadable_answer")
    rows = tuple(row for row in map(_row, data) if row is not None)
    last = wrapper.get("morePages") is False or not isinstance(key, str) or not key
    return Page(rows=rows, next_key=None if last else key, unreadable=len(data) - len(rows))


def _row(raw: object) -> Summary | None:
    try:
        return build(Summary, raw)
    except UnreadableAnswer:  # one bad row must not hide the others
        return None


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
