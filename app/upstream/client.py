"""The Channel Manager of one company as a set of calls: orders, lists of orders, webhook subscriptions.

Paths, headers and bodies: upstream.md 2, 3 and 6. Every call raises UpstreamError of the kind that the table in
docs/architecture.md gives, and ValueError, before anything is sent, for an id that is not a canonical GUID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import msgspec
from pydantic import SecretStr

from app.errors import ConnectionFault, OrderNotFound, RequestRejected, UnreadableAnswer
from app.settings import Company
from app.upstream.answer import Answer, ask, translated_errors
from app.upstream.listing import ListQuery, Page, parse_page
from app.upstream.order import Order, digest, parse_order
from app.upstream.subscription import (
    EVENT_NAME,
    EVENT_VERSION,
    Subscription,
    parse_created,
    parse_subscriptions,
)
from app.upstream.transport import open_http
from app.upstream.wire import is_guid

__all__ = ["ChannelManager", "Fetched", "open_http"]

_ENCODER = msgspec.json.Encoder(decimal_format="number")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched:
    """An order as it came home: the body as sent, and the digest that tells whether its content is new."""

    order: Order
    raw: bytes = field(repr=False)
    digest: str
    http_status: int
    seconds: float


class ChannelManager:
    """The calls for one company, over an HTTP client that is shared and closed by its owner."""

    def __init__(self, http: httpx.Client, company: Company, api_version: str, base_url: str) -> None:
        self._http = http
        self._company = company
        self._api_version = api_version
        self._root = base_url.rstrip("/") + company.path

    def get_order(self, order_id: str) -> Fetched:
        """Return the order; OrderNotFound if upstream has none of this id (yet, or any more)."""
        return self._order("GET", order_id)

    def create_order(self, body: Mapping[str, Any]) -> Fetched:
        """Create an order and return it; it is Submitted, and an event tells when it has settled."""
        return _fetched(self._route("POST", "/channelManager", body))

    def confirm_order(self, order_id: str, payment_reference: str) -> Fetched:
        """Confirm a Draft order as paid and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("POST", order_id, "/confirm", {"paymentReference": payment_reference})

    def replace_order(self, order_id: str, body: Mapping[str, Any]) -> Fetched:
        """Replace a Draft or Error order and return it; it is Submitted again, and an event will follow."""
        return self._order("PUT", order_id, body=body)

    def delete_order(self, order_id: str) -> Fetched:
        """Cancel an order and return it; upstream sends no event for this (upstream.md 4)."""
        return self._order("DELETE", order_id)

    def list_orders(self, query: ListQuery) -> Iterator[Page]:
        """Return the pages of the partner's orders; each costs one call, made when it is asked for.

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
        """Delete a subscription; RequestRejected("subscription_not_found") if there is none of this id."""
        try:
            self._call("DELETE", f"/webhook/{_checked(subscription_id)}")
        except OrderNotFound as absent:
            raise RequestRejected("subscription_not_found", http_status=absent.http_status) from None

    def _order(self, method: str, order_id: str, action: str = "", body: Mapping[str, Any] | None = None) -> Fetched:
        """Call for one order, and let no other order be taken for it."""
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
            if key in seen:  # a key that leads back would be followed for ever
                raise UnreadableAnswer("unreadable_answer", http_status=answer.status)
            seen.add(key)

    def _route(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        """Call something that is always there: not to find it means that our address is wrong."""
        try:
            return self._call(method, path, body)
        except OrderNotFound as absent:
            raise ConnectionFault("not_found", http_status=absent.http_status) from None

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Answer:
        content = None if body is None else _ENCODER.encode(body)
        with translated_errors():
            request = self._http.build_request(
                method, self._root + path, content=content, headers=self._headers(content)
            )
        return ask(self._http, request)

    def _headers(self, content: bytes | None) -> dict[str, str]:
        of_the_body = {} if content is None else {"content-type": "application/json"}
        return of_the_body | {
            "accept": "application/json",
            "x-api-version": self._api_version,
            "x-np-api-key": self._company.np_api_key.get_secret_value(),
        }


def _checked(guid: str) -> str:
    if not is_guid(guid):
        raise ValueError("not a canonical GUID")
    return guid


def _fetched(answer: Answer) -> Fetched:
    order = _read(answer, parse_order)
    return Fetched(order, answer.body, digest(answer.body), answer.status, answer.seconds)


def _read(answer: Answer, parse: Callable[[bytes], T]) -> T:
    """Return what `parse` makes of the answer; an UnreadableAnswer says which status the answer had."""
    try:
        return parse(answer.body)
    except UnreadableAnswer as unreadable:
        raise UnreadableAnswer(unreadable.reason, http_status=answer.status) from None
