"""What the API answers: the bodies as types, from which /openapi.json takes its schemas, and the problems."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from app.errors import RequestRefused
from app.order_document import OrderDocument

MEDIA_TYPE: Final = "application/problem+json"
CACHE: Final = {"cache-control": "private, no-cache"}

Cursor = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{2,22}$", description="A place in the feed or in a list.")]


class OrderPage(msgspec.Struct, frozen=True):
    """Orders, the one whose content changed last first. `next` is null on the last page.

    A page may hold fewer orders than `limit`, or none, and still have a `next`.
    """

    orders: tuple[OrderDocument, ...]
    next: Cursor | None


class FeedPage(msgspec.Struct, frozen=True):
    """Latest revisions in the order in which they came. Empty: there is nothing more now.

    `next` is what to acknowledge when all of them are safe, and the `after` of the next page.
    """

    orders: tuple[OrderDocument, ...]
    next: Cursor


class Acknowledgement(msgspec.Struct, frozen=True):
    """The cursor up to which a consumer has acknowledged."""

    cursor: Cursor


class HistoryEntry(msgspec.Struct, frozen=True):
    """One thing that happened; each `kind` has further names of its own."""

    kind: str
    at: Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


class History(msgspec.Struct, frozen=True, rename="camel"):
    """What happened to an order, oldest first; the last 200 entries are kept."""

    company: str
    company_id: str
    order_id: str
    history: tuple[HistoryEntry, ...]


class Problem(msgspec.Struct, frozen=True, rename="camel"):
    """What is wrong with a request (RFC 9457). `reason` is the code, for programs."""

    type: str
    title: str
    status: int
    detail: str
    reason: str
    request_id: str


REASONS: Final[Mapping[str, tuple[int, str]]] = MappingProxyType(
    {
        "not_json": (400, "The body is not JSON"),
        "unauthorized": (401, "There is no valid key"),
        "missing_scope": (403, "The key does not allow this"),
        "order_not_found": (404, "There is no such order"),
        "order_not_fetched": (404, "The order has not been fetched yet"),
        "no_such_path": (404, "There is no such path"),
        "method_not_allowed": (405, "The path does not take this method"),
        "body_too_slow": (408, "The body came too slowly"),
        "several_companies": (409, "Several companies have an order with this id"),
        "order_erased": (410, "The order was erased on request"),
        "body_too_large": (413, "The body is too large"),
        "bad_parameter": (422, "A query parameter is wrong"),
        "bad_body": (422, "The body has another form"),
        "unknown_cursor": (422, "The cursor was never given"),
        "too_many_requests": (429, "The key has made too many requests"),
        "internal_error": (500, "Internal error"),
        "order_unreadable": (500, "What is stored of the order is unreadable"),
        "unavailable": (503, "Redis is unavailable"),
    }
)
"""Reason code of each problem -> its status and its title; docs/api.md explains them."""


class Refused(RequestRefused):
    """A request is answered with a problem; `detail` is a sentence for people."""

    def __init__(self, reason: str, detail: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(REASONS[reason][0], reason)
        self.detail = detail
        self.headers = headers


def problem(request: Request, reason: str, detail: str, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """Return the answer for a reason code of REASONS, and note it in the request's log line."""
    request.state.line["reason"] = reason
    status, title = REASONS[reason]
    body = Problem(f"urn:ota-receiver:{reason}", title, status, detail, reason, request.state.request_id)
    return Response(msgspec.json.encode(body), status, dict(headers), MEDIA_TYPE)


def answer(value: Any, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """Return 200 with a value as JSON, or with JSON as it is."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return Response(body, headers={**CACHE, **headers}, media_type="application/json")
