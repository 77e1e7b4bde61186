"""The operations of the API, without HTTP's details: single orders, lists, histories, and the feed.

Lists are read along the positions of the feed, latest first, so they need no index of their own: an order that changes
while somebody pages moves to the front, which is behind the reader, and nothing is shown twice or passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Any, Final, NamedTuple

import msgspec
from starlette.responses import Response

from app import log
from app.api.answers import CACHE, Acknowledgement, Refused, answer
from app.api.keys import Caller
from app.deployment import Deployment
from app.erased_file import ErasedFile
from app.errors import BrokenRecord, UnknownCursor, UnreadableAnswer
from app.ids import OrderKey, guid
from app.ledger.feed import Entry, Feed, cursor_of, position_of
from app.ledger.history import as_object
from app.ledger.orders import Archive, StoredOrder
from app.ledger.redis import Redis
from app.ledger.references import References
from app.ledger.work import idempotency_key
from app.order_document import OrderDocument
from app.settings import Company
from app.times import to_ms
from app.upstream.models import parse_order

MOST: Final = 100
"""Orders of one page."""

DEFAULT: Final = 50

MOST_BYTES: Final = 8 * 2**20
"""Of the orders of one page, which ends with the order that exceeds it: an order may have 16 MiB."""

READ_AT_ONCE: Final = 10
"""Orders of one round trip: a page that is full reads no further, and contents can be large."""

MOST_SEARCHED: Final = 1000
"""Orders of one request whose status is looked at; the next page goes on behind them."""

_log = log.get()


class Call(NamedTuple):
    """One request: its caller, what it names, and the fields of its log line, to which the operation adds."""

    caller: Caller
    path: Mapping[str, str]
    query: Mapping[str, str]
    if_none_match: str
    body: bytes
    line: dict[str, Any]


class Page:
    """The orders of one answer as JSON: at most `limit` of them, and none more once they have MOST_BYTES."""

    def __init__(self, limit: int) -> None:
        self.orders: list[msgspec.Raw] = []
        self._limit = limit
        self._bytes = 0

    def add(self, document: OrderDocument | None) -> None:
        """Add an order, if there is one."""
        if document is not None:
            body = document.encode()
            self.orders.append(msgspec.Raw(body))
            self._bytes += len(body)

    @property
    def is_full(self) -> bool:
        return len(self.orders) >= self._limit or self._bytes >= MOST_BYTES

    def answer(self, call: Call, cursor: str | None) -> Response:
        call.line["orders"] = len(self.orders)
        return answer({"orders": self.orders, "next": cursor})


class Orders:
    """Each operation returns the answer; it raises Refused, and what redis-py raises."""

    LIST: Final = frozenset({"reference", "status", "since", "company", "cursor", "limit"})
    ONE: Final = frozenset({"company"})
    FEED: Final = frozenset({"after", "limit"})

    def __init__(self, redis: Redis, companies: Sequence[Company], erased: ErasedFile | None = None) -> None:
        """`erased`: orders that no caller gets, also where Redis was restored from a copy that has them."""
        self._erased = erased or ErasedFile(None)
        self._archive = Archive(redis)
        self._references = References(redis)
        self._feed = Feed(redis)
        self._deployment = Deployment(redis)
        self._slugs = {one.np_company_id: one.slug for one in companies}

    def show(self, call: Call) -> Response:
        """Answer with one order, or with 304 where the caller has it."""
        key, slugs = self._find(call)
        stored = self._kept(key)
        if isinstance(stored, StoredOrder) and stored.packed is None:
            raise Refused("order_not_fetched", "Its event has come, and its fetch is pending.")
        document = _document(stored, slugs)
        if document is None:
            raise Refused("order_unreadable", "Fetch it again: ota-receiver orders refetch, with its id.")
        body = document.encode()
        # Of the whole body, not of the content alone: a fetch without a change has another `fetched_at`.
        tag = f'"{sha256(body).hexdigest()[:32]}"'
        if _names(call.if_none_match, tag):
            return Response(status_code=304, headers={**CACHE, "etag": tag})
        return answer(body, {"etag": tag})

    def history(self, call: Call) -> Response:
        """Answer with what happened to one order, as `orders show --json` does."""
        key, slugs = self._find(call)
        self._kept(key)
        entries = [_in_camel_case(as_object(entry)) for entry in self._archive.history(key)]
        names = {"company": slugs.get(key.company_id, key.company_id), **_in_camel_case(key._asdict())}
        return answer({**names, "history": entries})

    def listed(self, call: Call) -> Response:
        """Answer with a page of orders, the one whose content changed last first."""
        slugs = self._companies()
        company_id = _company(call.query, slugs)
        page, before, since = Page(_limit(call.query)), _position(call.query, "cursor"), _since(call.query)
        status = call.query.get("status")
        searched = 0
        for entries in self._pages(call.query.get("reference"), before, since):
            wanted = [one for one in entries if company_id in (None, one.order.company_id)]
            for entry, stored in self._stored(wanted):
                if _is_wanted(stored, status):
                    page.add(_document(stored, slugs))
                if page.is_full:
                    return page.answer(call, cursor_of(entry.position))
            searched += len(entries)
            if searched >= MOST_SEARCHED:
                return page.answer(call, cursor_of(entries[-1].position))
        return page.answer(call, None)

    def feed(self, call: Call) -> Response:
        """Answer with the revisions behind `after`, or behind what this consumer has acknowledged."""
        slugs, limit = self._companies(), _limit(call.query)
        after = _position(call.query, "after")
        position = self._feed.acknowledged(call.caller.name) if after is None else after
        page = Page(limit)
        # An order that was erased in this moment, or is unreadable, must not look like the end of the feed.
        while not page.orders and (entries := self._feed.after(position, limit)):
            for entry, stored in self._stored(entries):
                page.add(_document(stored, slugs))
                position = entry.position
                if page.is_full:
                    break
        return page.answer(call, cursor_of(position))

    def acknowledge(self, call: Call) -> Response:
        """Move the caller's cursor forward, and answer with where it is then."""
        try:
            cursor = msgspec.json.decode(call.body, type=Acknowledgement).cursor
            position = self._feed.acknowledge(call.caller.name, position_of(cursor))
        except msgspec.ValidationError:
            raise Refused("bad_body", 'It must be an object {"cursor": "…"}.') from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Refused("not_json", 'It must be an object {"cursor": "…"}.') from None
        except UnknownCursor:
            raise Refused("unknown_cursor", "Acknowledge a `next` that the feed gave.") from None
        return answer(Acknowledgement(cursor_of(position)))

    def _pages(self, reference: str | None, before: int | None, since: int | None) -> Iterator[list[Entry]]:
        """Yield the entries of all orders, or of those with the reference, latest first."""
        if reference is not None:
            found = [
                one
                for one in self._feed.positions(self._references.of_fetched(reference))
                if (before is None or one.position < before) and (since is None or one.position >= since)
            ]
            yield from (found[at : at + MOST] for at in range(0, len(found), MOST))
            return
        while entries := self._feed.before(before, since, MOST):
            yield entries
            before = entries[-1].position

    def _stored(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, StoredOrder | BrokenRecord | None]]:
        """Yield each entry with what is stored of its order, read as it is wanted; None for an erased one."""
        for at in range(0, len(entries), READ_AT_ONCE):
            some = entries[at : at + READ_AT_ONCE]
            for entry, stored in zip(some, self._archive.stored([one.order for one in some]), strict=True):
                yield entry, None if entry.order in self._erased else stored

    def _find(self, call: Call) -> tuple[OrderKey, Mapping[str, str]]:
        """Return the order that a path names, and the slugs of all companies by id."""
        slugs = self._companies()
        company_id = _company(call.query, slugs)
        order_id = guid(call.path["order_id"])
        if order_id is None:
            raise Refused("order_not_found", "An order id is a GUID. By reference: GET /orders?reference=")
        call.line["order_id"] = order_id
        ids: Iterable[str] = slugs if company_id is None else [company_id]
        found = self._archive.of_companies(order_id, ids)
        if not found and company_id is None:
            found = self._archive.of_any_company(order_id)
        if not found:
            raise _not_found()
        if len(found) > 1:
            names = ", ".join(sorted(slugs.get(one.company_id, one.company_id) for one in found))
            raise Refused("several_companies", f"Name one of these with ?company=: {names}")
        return found[0], slugs

    def _kept(self, order: OrderKey) -> StoredOrder | BrokenRecord:
        """Return what is stored of an order; raises Refused if there is nothing, also since it was erased."""
        (stored,) = self._archive.stored([order])
        if stored is None:
            raise _not_found()
        if order in self._erased or (isinstance(stored, StoredOrder) and stored.record.erased_at):
            raise Refused("order_erased", "Its content was deleted here, for good.")
        return stored

    def _companies(self) -> dict[str, str]:
        """Return the slug of each company of the deployment and of the settings, by its id."""
        return {id_: one.slug for id_, one in self._deployment.companies().items()} | self._slugs


def _document(stored: StoredOrder | BrokenRecord | None, slugs: Mapping[str, str]) -> OrderDocument | None:
    """Return what is stored as a document; None without content, and, with a log line, where it is unreadable."""
    if stored is None or (isinstance(stored, StoredOrder) and stored.packed is None):
        return None
    if isinstance(stored, BrokenRecord):
        _log.error("order.unreadable", order_id=stored.order_id)
        return None
    record = stored.record
    company = slugs.get(record.company_id, record.company_id)
    try:
        return OrderDocument(
            company=company,
            company_id=record.company_id,
            order_id=record.order_id,
            revision=record.revision,
            digest=record.digest,
            fetched_at=to_ms(record.fetched_at) if record.fetched_at else 0,
            idempotency_key=idempotency_key(record.key, record.revision, record.digest),
            status=record.status,
            order=parse_order(stored.raw),
        )
    except UnreadableAnswer:
        _log.error("order.unreadable", order_id=record.order_id, company=company)
        return None


def _is_wanted(stored: StoredOrder | BrokenRecord | None, status: str | None) -> bool:
    if status is None:
        return True
    return isinstance(stored, StoredOrder) and stored.record.status.casefold() == status.casefold()


def _in_camel_case(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields under names as all other bodies have them."""
    return {re.sub("_([a-z])", lambda found: found[1].upper(), name): value for name, value in fields.items()}


def _not_found() -> Refused:
    return Refused("order_not_found", "No event for it was accepted, or ORDER_DAYS have passed.")


def _names(if_none_match: str, tag: str) -> bool:
    """Return whether the header names the entity tag; also as a weak one (RFC 9110 13.1.2)."""
    tags = [one.strip().removeprefix("W/") for one in if_none_match.split(",")]
    return tag in tags or tags == ["*"]


def _company(query: Mapping[str, str], slugs: Mapping[str, str]) -> str | None:
    """Return the id of the company of `company`, a slug or an id; None without one."""
    if (name := query.get("company")) is None:
        return None
    found = {slug: company_id for company_id, slug in slugs.items()}.get(name) or guid(name)
    if found is None:
        raise Refused("bad_parameter", "There is no such company.")
    return found


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MOST):
        raise Refused("bad_parameter", f"`limit` must be a whole number from 1 to {MOST}.")
    return int(text)


def _position(query: Mapping[str, str], name: str) -> int | None:
    try:
        return position_of(query[name]) if name in query else None
    except UnknownCursor:
        raise Refused("unknown_cursor", f"`{name}` must be a `next` of an earlier page.") from None


def _since(query: Mapping[str, str]) -> int | None:
    """Return `since` in ms since 1970."""
    if (text := query.get("since")) is None:
        return None
    try:
        return to_ms(datetime.fromisoformat(text))
    except (ValueError, TypeError, OverflowError):
        form = "2026-11-27T10:00:00Z, or with a zone +01:00 in which the plus is written %2B"
        raise Refused("bad_parameter", f"`since` must be a time such as {form}.") from None
