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
from importlib.metadata import version
from time import monotonic
from typing import Final, TypeVar
from urllib.parse import quote, urlencode

import httpcore
import httpx
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
from app.traces import OFF, Tracer
from app.upstream.decode import build, decode, digest
from app.upstream.models import (
    EVENT_NAME,
    EVENT_VERSION,
    Order,
    Page,
    Subscription,
    parse_order,
    parse_page,
    parse_subscriptions,
)
from app.upstream.transport import DeadlineTransport

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""A full page of 20,000 summaries is about 10 MiB."""

ORDER_ROUTE: Final = "/{tenant}/{environment}/{company}/channelManager/{orderId}"
"""The path of getOrder, as traces show it."""

_MAX_ERROR_BYTES: Final = 64 * 1024
_LONGEST_WAIT: Final = 3600.0  # seconds; a longer Retry-After is taken for a mistake
_WARM_UP: Final = b"""{"orderId": "11111111-1111-1111-1111-111111111111", "status": "Issued", "items": [{"lineNo": 1,
"visitDate": "2026-06-01", "visitTime": "10:00:00", "quantity": 1, "wallets": [{"seqNo": 1, "unitPriceInclVat": 1.25,
"issuedAt": "2026-06-01T08:15:02.1234567Z", "assets": [{"type": "ticket"}]}]}]}"""
_SAAS_CODE: Final = re.compile(r"saas_([a-z]{1,20}_not_found)")
_REFUSALS: Final[dict[int, tuple[type[UpstreamError], str]]] = {
    400: (RequestRejected, "bad_request"),
    401: (ConnectionFault, "unauthorized"),
    403: (ConnectionFault, "forbidden"),
    404: (ConnectionFault, "not_found"),
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A 2xx answer: the body as sent, and the seconds from the start of the call to the last byte."""

    http_status: int
    raw: bytes = field(repr=False)
    seconds: float


@dataclass(frozen=True, slots=True)
class Fetched(Answer):
    """A fetched order, and the digest that changes with its content."""

    order: Order
    digest: str


class ChannelManager:
    """The calls for one company; the caller opens and closes the HTTP transport, and may share it."""

    def __init__(
        self, http: httpx.BaseTransport, company: Company, api_version: str, base_url: str, tracer: Tracer = OFF
    ) -> None:
        self._http = http
        self._tracer = tracer
        self._company = company
        self._api_version = api_version
        self._user_agent = f"ota-receiver/{version('ota-receiver')}"
        self._root = base_url.rstrip("/") + company.path

    def get_order(self, order_id: str) -> Fetched:
        """Return the order; raises OrderNotFound if upstream has none of this id (not yet, or deleted)."""
        with self._tracer.call("GET", ORDER_ROUTE, self._root):
            fetched = self._order("GET", order_id)
            self._tracer.answered(fetched.http_status)
        return fetched

    def confirm_order(self, order_id: str, payment_reference: str) -> Fetched:
        """Confirm a Draft order as paid and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("POST", order_id, "/confirm", {"paymentReference": payment_reference})

    def delete_order(self, order_id: str) -> Fetched:
        """Cancel an order and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("DELETE", order_id)

    def list_orders(self, since_row_version: int | None = None, page_size: int = 1000) -> Iterator[Page]:
        """Return the pages of the partner's orders; each costs one call, made when the page is requested.

        `since_row_version` lists every order *changed* after that row version, 0 for all: only this finds a confirmed,
        cancelled or replaced order (upstream.md 6). A page has at most 20,000 rows. The first page raises ValueError if
        the company has no partner id.
        """
        if self._company.np_partner_id is None:
            raise ValueError("the company has no partner id")
        # Without `sync` a page has no row versions.
        changed = {} if since_row_version is None else {"sync": "true", "lastRowVersion": since_row_version}
        query: dict[str, object] = {**changed, "pageSize": page_size}
        seen: set[str] = set()
        while True:
            # Upstream's own nextPageURL is not percent-encoded (upstream.md 5).
            path = f"/channelManager/orders/{self._company.np_partner_id}?{urlencode(query, quote_via=quote)}"
            answer = self._route("GET", path)
            page = _read(answer, parse_page)
            yield page
            if page.next_key is None:
                return
            if page.next_key in seen:  # else the pages would repeat for ever
                raise UnreadableAnswer("unreadable_answer", http_status=answer.http_status)
            seen.add(page.next_key)
            query["pageKey"] = page.next_key

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
        answer = self._route("POST", "/webhook", body)
        # Microsoft's API underneath may answer without a body (upstream.md 3): then every field is None.
        return _read(answer, lambda raw: build(Subscription, decode(raw.strip() or b"{}")))

    def delete_subscription(self, subscription_id: str) -> None:
        """Delete a subscription; raises RequestRejected("subscription_not_found") if there is none of this id."""
        try:
            self._call("DELETE", f"/webhook/{_checked(subscription_id)}")
        except OrderNotFound as absent:
            raise RequestRejected("subscription_not_found", http_status=absent.http_status) from None

    def _order(self, method: str, order_id: str, action: str = "", body: Mapping[str, str] | None = None) -> Fetched:
        """Call for one order; raises UnreadableAnswer if the answer is another order."""
        answer = self._call(method, f"/channelManager/{_checked(order_id)}{action}", body)
        order = _read(answer, parse_order)
        if order.order_id != order_id:
            raise UnreadableAnswer("wrong_order", http_status=answer.http_status)
        return Fetched(answer.http_status, answer.raw, answer.seconds, order, digest(answer.raw))

    def _route(self, method: str, path: str, body: Mapping[str, str] | None = None) -> Answer:
        """Call a path that always exists: a 404 means that our address is wrong."""
        try:
            return self._call(method, path, body)
        except OrderNotFound as absent:
            raise ConnectionFault("not_found", http_status=absent.http_status) from None

    def _call(self, method: str, path: str, body: Mapping[str, str] | None = None) -> Answer:
        """Send one request and return its 2xx answer; raises UpstreamError for everything else."""
        started = monotonic()
        with translated_errors():
            request = httpx.Request(method, self._root + path, headers=self._headers(), json=body)
            response = self._http.handle_request(request)
            try:
                raw = _body(response, MAX_ANSWER_BYTES if response.is_success else _MAX_ERROR_BYTES)
            finally:
                response.close()
        status = response.status_code
        if not response.is_success:
            raise refusal(status, response.headers, raw or b"")
        if raw is None:
            raise UnreadableAnswer("answer_too_large", http_status=status)
        return Answer(status, raw, monotonic() - started)

    def _headers(self) -> dict[str, str]:
        return {
            "accept": "application/json",
            "accept-encoding": "gzip",
            "user-agent": self._user_agent,
            "x-api-version": self._api_version,
            "x-np-api-key": self._company.np_api_key.get_secret_value(),
        }


def warm_up(company: Company) -> None:
    """Run one getOrder on an answer in memory, so that processes forked later share what that imports and builds."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_WARM_UP)
    with DeadlineTransport(1.0, httpcore.MockBackend([head, _WARM_UP])) as http:
        ChannelManager(http, company, "", "http://127.0.0.1").get_order(EMPTY_GUID.replace("0", "1"))


def refusal(status: int, headers: httpx.Headers, body: bytes) -> UpstreamError:
    """Return what an answer other than 2xx means; its `code` (upstream.md 5) counts, its text does not."""
    code = _code(body)
    if status == 404 and code == "resource_not_found":
        return OrderNotFound("order_not_found", http_status=status)
    if 400 <= status < 500 and (saas := _SAAS_CODE.fullmatch(code)):
        return ConnectionFault(saas[1], http_status=status)
    if 300 <= status < 400:
        return ConnectionFault("redirected", http_status=status)
    if status == 429:
        return Throttled("throttled", http_status=status, retry_after=retry_after(headers))
    if status == 408 or not 400 <= status < 500:
        return Unavailable(f"http_{status}", http_status=status, retry_after=retry_after(headers))
    kind, reason = _REFUSALS.get(status, (RequestRejected, f"http_{status}"))
    return kind(reason, http_status=status)


def retry_after(headers: httpx.Headers, longest: float = _LONGEST_WAIT) -> float | None:
    """Return the seconds that a Retry-After asks for, 0 to `longest`, or None without a readable one."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+", text):
        return min(float(text), longest)
    try:
        moment = parsedate_to_datetime(text)
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), longest)


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
    except httpx.ProxyError as error:
        # Its text begins with the status of the proxy's answer to CONNECT, if there was one.
        status = str(error)[:3]
        if not status.isdigit():
            raise Unavailable("proxy_unreachable") from None
        kind = ConnectionFault if status.startswith("4") else Unavailable
        raise kind(f"proxy_{status}") from None
    except (httpx.HTTPError, httpx.StreamError, OSError):
        raise Unavailable("network") from None


def _checked(text: str) -> str:
    if guid(text) != text:
        raise ValueError("not a canonical GUID")
    return text


def _read(answer: Answer, parse: Callable[[bytes], T]) -> T:
    """Return the parsed answer; an UnreadableAnswer carries the status of the answer."""
    try:
        return parse(answer.raw)
    except UnreadableAnswer as unreadable:
        raise UnreadableAnswer(unreadable.reason, http_status=answer.http_status) from None


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
