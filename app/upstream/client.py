"""The Channel Manager of one company as calls: orders, lists of orders, webhook subscriptions.

Paths, headers and bodies: upstream.md 2, 3 and 6. Every call raises UpstreamError of the kind that the table "What an
answer of upstream means" of docs/architecture.md gives, and ValueError, before anything is sent, for an id that is not
a canonical GUID. An error carries a reason code and never upstream's own text, which may quote addresses and headers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from importlib.metadata import version
from time import monotonic
from typing import Any, TypeVar

import httpcore
import httpx
import msgspec
from pydantic import SecretStr

from app.errors import (
    ConnectionFault,
    OrderNotFound,
    RequestRejected,
    Throttled,
    Unavailable,
    UnreadableAnswer,
    UpstreamError,
)
from app.ids import EMPTY_GUID, guid
from app.settings import Company
from app.upstream.decode import decode
from app.upstream.models import (
    EVENT_NAME,
    EVENT_VERSION,
    ListQuery,
    Order,
    Page,
    Subscription,
    digest,
    parse_created,
    parse_order,
    parse_page,
    parse_subscriptions,
)
from app.upstream.transport import DeadlineTransport

MAX_ANSWER_BYTES = 16 * 1024 * 1024  # a full page of 20,000 summaries is about 10 MiB
_MAX_ERROR_BYTES = 64 * 1024
_LONGEST_WAIT = 3600.0  # seconds; a longer Retry-After is taken for a mistake
_WARM_UP = b"""{"orderId": "11111111-1111-1111-1111-111111111111", "status": "Issued", "items": [{"lineNo": 1,
"visitDate": "2026-06-01", "visitTime": "10:00:00", "quantity": 1, "wallets": [{"seqNo": 1, "unitPriceInclVat": 1.25,
"issuedAt": "2026-06-01T08:15:02.1234567Z", "assets": [{"type": "ticket"}]}]}]}"""
_SAAS_CODE = re.compile(r"saas_([a-z]{1,20}_not_found)")
_ENCODER = msgspec.json.Encoder(decimal_format="number")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer; `seconds` from the start of the call to the last byte."""

    status: int
    body: bytes = field(repr=False)
    seconds: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """A fetched order: the body as sent, and the digest that changes with its content."""

    order: Order
    raw: bytes = field(repr=False)
    digest: str
    http_status: int
    seconds: float


class ChannelManager:
    """The calls for one company; the caller opens and closes the HTTP transport, and may share it."""

    def __init__(self, http: httpx.BaseTransport, company: Company, api_version: str, base_url: str) -> None:
        self._http = http
        self._company = company
        self._api_version = api_version
        self._root = base_url.rstrip("/") + company.path

    def get_order(self, order_id: str) -> Fetched:
        """Return the order; raises OrderNotFound if upstream has none of this id (not yet, or deleted)."""
        return self._order("GET", order_id)

    def confirm_order(self, order_id: str, payment_reference: str) -> Fetched:
        """Confirm a Draft order as paid and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("POST", order_id, "/confirm", {"paymentReference": payment_reference})

    def delete_order(self, order_id: str) -> Fetched:
        """Cancel an order and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("DELETE", order_id)

    def list_orders(self, query: ListQuery) -> Iterator[Page]:
        """Return the pages of the partner's orders; each costs one call, made when the page is requested.

        Raises ValueError if the company has no partner id.
        """
        if self._company.np_partner_id is None:
            raise ValueError("the company has no partner id")
        return self._pages(f"/channelManager/orders/{self._company.np_partner_id}", query)

    def subscriptions(self) -> tuple[Subscription, ...]:
        """Return all webhook subscriptions of the company, also those for other events."""
        return _read(self._route("GET", "/webhook"), parse_subscriptions)

    def create_subscription(self, notification_url: str, client_state: SecretStr) -> Subscription:
        """Subscribe `notification_url` to settled orders; each event will carry `client_state` (1 to 50 characters)."""
        body = {
            "notificationUrl": notification_url,
            "eventName": EVENT_NAME,
            "clientState": client_state.get_secret_value(),
            "eventVersion": EVENT_VERSION,
        }
        return _read(self._route("POST", "/webhook", body), parse_created)

    def delete_subscription(self, subscription_id: str) -> None:
        """Delete a subscription; raises RequestRejected("subscription_not_found") if there is none of this id."""
        try:
            self._call("DELETE", f"/webhook/{_checked(subscription_id)}")
        except OrderNotFound as absent:
            raise RequestRejected("subscription_not_found", http_status=absent.http_status) from None

    def _order(self, method: str, order_id: str, action: str = "", body: Mapping[str, Any] | None = None) -> Fetched:
        """Call for one order; raises UnreadableAnswer if the answer is another order."""
        fetched = _fetched(self._call(method, f"/channelManager/{_checked(order_id)}{action}", body))
        if fetched.order.order_id != order_id:
            raise UnreadableAnswer("wrong_order", http_status=fetched.http_status)
        return fetched

    def _pages(self, path: str, query: ListQuery) -> Iterator[Page]:
        key: str | None = None
        seen: set[str] = set()
        while True:
            answer = self._route("GET", f"{path}?{query.encoded(key)}")
            page = _read(answer, parse_page)
            yield page
            key = page.next_key
            if key is None:
                return
            if key in seen:  # else the pages would repeat for ever
                raise UnreadableAnswer("unreadable_answer", http_status=answer.status)
            seen.add(key)

    def _route(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Call a path that always exists: a 404 means that our address is wrong."""
        try:
            return self._call(method, path, body)
        except OrderNotFound as absent:
            raise ConnectionFault("not_found", http_status=absent.http_status) from None

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        content = None if body is None else _ENCODER.encode(body)
        with translated_errors():
            request = httpx.Request(method, self._root + path, content=content, headers=self._headers(content))
        return ask(self._http, request)

    def _headers(self, content: bytes | None) -> dict[str, str]:
        of_the_body = {} if content is None else {"content-type": "application/json"}
        return of_the_body | {
            "accept": "application/json",
            "accept-encoding": "gzip",
            "user-agent": _user_agent(),
            "x-api-version": self._api_version,
            "x-np-api-key": self._company.np_api_key.get_secret_value(),
        }


def warm_up(company: Company) -> None:
    """Run one getOrder on an answer in memory, so that processes forked later share what that imports and builds."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_WARM_UP)
    with DeadlineTransport(1.0, httpcore.MockBackend([head, _WARM_UP])) as http:
        ChannelManager(http, company, "", "http://127.0.0.1").get_order(EMPTY_GUID.replace("0", "1"))


def ask(http: httpx.BaseTransport, request: httpx.Request) -> Answer:
    """Send `request` and return its 2xx answer.

    Raises UpstreamError for everything else.
    """
    started = monotonic()
    with translated_errors():
        response = http.handle_request(request)
        try:
            body = _body(response, MAX_ANSWER_BYTES if response.is_success else _MAX_ERROR_BYTES)
        finally:
            response.close()
    if not response.is_success:
        raise refusal(response.status_code, response.headers, body or b"", datetime.now(UTC))
    if body is None:
        raise UnreadableAnswer("answer_too_large", http_status=response.status_code)
    return Answer(response.status_code, body, monotonic() - started)


def refusal(status: int, headers: httpx.Headers, body: bytes, now: datetime) -> UpstreamError:
    """Return what an answer other than 2xx means; `now` is aware and dates a Retry-After."""
    code = _code(body)
    wait = retry_after(headers.get("retry-after"), now)
    saas = _SAAS_CODE.fullmatch(code)
    match status:
        case _ if 300 <= status < 400:
            return ConnectionFault("redirected", http_status=status)
        case _ if saas and 400 <= status < 500:
            return ConnectionFault(saas[1], http_status=status)
        case 400:
            return RequestRejected("bad_request", http_status=status)
        case 401:
            return ConnectionFault("unauthorized", http_status=status)
        case 403:
            return ConnectionFault("forbidden", http_status=status)
        case 404 if code == "resource_not_found":
            return OrderNotFound("order_not_found", http_status=status)
        case 404:
            return ConnectionFault("not_found", http_status=status)
        case 429:
            return Throttled("throttled", http_status=status, retry_after=wait)
        case _ if 400 <= status < 500 and status != 408:
            return RequestRejected(f"http_{status}", http_status=status)
    return Unavailable(f"http_{status}", http_status=status, retry_after=wait)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Return the seconds from `now` (aware) that a Retry-After asks for, 0 to 3600, or None without a readable one."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), _LONGEST_WAIT)
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what httpx and the standard library under it raise into our errors, without their texts."""
    try:
        yield
    except (httpx.TimeoutException, TimeoutError):
        raise Unavailable("timeout") from None
    except (httpx.DecodingError, zlib.error):
        raise UnreadableAnswer("unreadable_answer") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, UnicodeError):
        # The address or the key holds characters that HTTP cannot carry.
        raise ConnectionFault("unsendable_request") from None
    except (httpx.HTTPError, httpx.StreamError, OSError):
        raise Unavailable("network") from None


@cache
def _user_agent() -> str:
    return f"ota-receiver/{version('ota-receiver')}"


def _checked(text: str) -> str:
    if guid(text) != text:
        raise ValueError("not a canonical GUID")
    return text


def _fetched(answer: Answer) -> Fetched:
    order = _read(answer, parse_order)
    return Fetched(order, answer.body, digest(answer.body), answer.status, answer.seconds)


def _read(answer: Answer, parse: Callable[[bytes], T]) -> T:
    """Return the parsed answer; an UnreadableAnswer carries the status of the answer."""
    try:
        return parse(answer.body)
    except UnreadableAnswer as unreadable:
        raise UnreadableAnswer(unreadable.reason, http_status=answer.status) from None


def _body(response: httpx.Response, limit: int) -> bytes | None:
    """Return the body, or None once it exceeds `limit` bytes; the rest stays unread.

    httpx would unpack without a limit: 64 KiB of gzip can hold 64 MiB, and gzip within gzip 64 GiB. Only plain gzip is
    requested; any other encoding stays packed and is then not valid JSON.
    """
    packed = response.headers.get("content-encoding", "").strip().lower() == "gzip"
    gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    arrived, body = 0, bytearray()
    for chunk in response.iter_raw():
        arrived += len(chunk)
        body += gzip.decompress(chunk, limit + 1 - len(body)) if packed else chunk
        if max(arrived, len(body)) > limit:  # bytes after the end of the gzip stream count too
            return None
    return bytes(body)


def _code(body: bytes) -> str:
    """Return the `code` of an error body (upstream.md 5), "" if there is none."""
    try:
        tree = decode(body)
    except UnreadableAnswer:
        return ""
    code = tree.get("code") if isinstance(tree, dict) else None
    return code if isinstance(code, str) else ""
