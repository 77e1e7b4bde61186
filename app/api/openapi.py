"""The description of the API: OpenAPI 3.1, built from the types of the answers and from a table of the paths.

tests/integration/test_api_description.py compares it with what the running service answers.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

import msgspec

from app.api.answers import MEDIA_TYPE, REASONS, Acknowledgement, FeedPage, History, OrderPage, Problem
from app.api.orders import DEFAULT, MOST
from app.order_document import OrderDocument

_TEXT: Final = {"type": "string"}
_COMPONENTS: Final = "#/components/schemas/{name}"


def description(webhook_path: str) -> bytes:
    """Return the document; `webhook_path` is where the Channel Manager posts its events."""
    bodies = (OrderDocument, OrderPage, FeedPage, Acknowledgement, History, Problem)
    _, schemas = msgspec.json.schema_components(bodies, ref_template=_COMPONENTS)
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "OTA receiver",
            "version": version("ota-receiver"),
            "description": "Orders of the OTA Channel Manager, for your own services. `docs/api.md` explains it.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": _paths(),
        "webhooks": _webhooks(webhook_path),
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of `ota-receiver keys create`: `otar_…`.",
                }
            },
            "schemas": {**schemas, **_EVENT},
        },
    }
    return msgspec.json.encode(whole)


def _paths() -> dict[str, Any]:
    order_id = _parameter("order_id", "path", {"type": "string", "format": "uuid"}, "The orderId.")
    company = _parameter("company", "query", _TEXT, "Slug or id of a company; default: all.")
    limit = {"type": "integer", "minimum": 1, "maximum": MOST, "default": DEFAULT}
    limited = _parameter("limit", "query", limit, "Orders of a page.")
    cursor = {"type": "string", "pattern": "^[A-Za-z0-9_-]{2,22}$"}
    since = {"type": "string", "format": "date-time"}
    tag = {"ETag": {"description": "Changes with any change of the body.", "schema": _TEXT}}
    unchanged = {"304": {"description": "The copy that you have is the latest.", "headers": tag}}
    of_one = ("order_not_found", "several_companies", "order_erased", "order_unreadable")
    return {
        "/orders": _get(
            "listOrders",
            "Orders, the one whose content changed last first. Scope `orders:read`.",
            _ok("OrderPage"),
            _parameter("reference", "query", _TEXT, "buyFromOrderReference or sellToOrderReference."),
            _parameter("status", "query", _TEXT, "Status of the order, in any case."),
            _parameter("since", "query", since, "Only orders whose content changed since."),
            company,
            _parameter("cursor", "query", cursor, "`next` of the page before."),
            limited,
            problems=("unknown_cursor",),
        ),
        "/orders/{order_id}": _get(
            "getOrder",
            "One order: its latest revision. Scope `orders:read`.",
            _ok("OrderDocument", tag) | unchanged,
            order_id,
            company,
            _parameter("If-None-Match", "header", _TEXT, "The ETag of the copy that you have."),
            problems=(*of_one, "order_not_fetched"),
        ),
        "/orders/{order_id}/history": _get(
            "getOrderHistory",
            "What happened to one order, oldest first. Scope `orders:read`.",
            _ok("History"),
            order_id,
            company,
            problems=of_one,
        ),
        "/feed": _get(
            "getFeed",
            "The next revisions that the consumer has not acknowledged. Scope `feed`.",
            _ok("FeedPage"),
            _parameter("after", "query", cursor, "`next` of the page before; default: what was acknowledged."),
            limited,
            problems=("unknown_cursor",),
        ),
        "/feed/ack": {
            "post": {
                "operationId": "acknowledgeFeed",
                "summary": "Move the consumer's cursor forward. An older one changes nothing. Scope `feed`.",
                "requestBody": {"required": True, "content": _json("Acknowledgement")},
                "responses": {
                    **_ok("Acknowledgement"),
                    **_problems("not_json", "bad_body", "unknown_cursor", "body_too_slow", "body_too_large"),
                },
            }
        },
        "/healthz": _public("isAlive", "The process runs.", {"text/plain": {"schema": _TEXT}}),
        "/openapi.json": _public("getDescription", "This page.", {"application/json": {"schema": {"type": "object"}}}),
    }


def _get(
    name: str, summary: str, good: dict[str, Any], *parameters: dict[str, Any], problems: tuple[str, ...]
) -> dict[str, Any]:
    answers = {**good, **_problems(*problems)}
    return {"get": {"operationId": name, "summary": summary, "parameters": parameters, "responses": answers}}


def _public(name: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    answers = {"200": {"description": summary, "content": content}, **_problems(is_public=True)}
    return {"get": {"operationId": name, "summary": summary, "security": [], "responses": answers}}


def _webhooks(webhook_path: str) -> dict[str, Any]:
    return {
        "orderProcessed": {
            "post": {
                "operationId": "receiveEvents",
                "security": [],
                "summary": f"What the Channel Manager posts to `{webhook_path}` of the web process.",
                "requestBody": {"required": True, "content": _json("EventEnvelope")},
                "responses": {
                    "200": {"description": "Every valid event is recorded."},
                    "401": {"description": "No event carries a clientState of its company."},
                    "503": {"description": "Nothing was recorded: send it again."},
                },
            }
        },
        "orderForwarded": {
            "post": {
                "operationId": "forwardOrder",
                "security": [],
                "summary": "What the sinks send to you for each revision; the feed gives the same document.",
                "requestBody": {"required": True, "content": _json("OrderDocument")},
                "responses": {"200": {"description": "You have it."}, "410": {"description": "Send no more."}},
            }
        },
    }


_EVENT: Final[dict[str, Any]] = {
    "EventEnvelope": {
        "title": "EventEnvelope",
        "type": "object",
        "required": ["values"],
        "properties": {"values": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}},
    },
    "Event": {
        "title": "Event",
        "description": "An order has settled, or has changed.",
        "type": "object",
        "required": ["clientState", "companyId", "eventName", "payload"],
        "properties": {
            "clientState": _TEXT,
            "companyId": {"type": "string", "format": "uuid"},
            "eventName": {"const": "ota_cm_order_processed"},
            "timestamp": {"type": "string", "format": "date-time"},
            "payload": {
                "type": "object",
                "required": ["orderId", "status"],
                "properties": {
                    "orderId": {"type": "string", "format": "uuid"},
                    "buyFromOrderReference": _TEXT,
                    "status": _TEXT,
                },
            },
        },
    },
}


def _parameter(name: str, place: str, schema: dict[str, Any], text: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "description": text, "schema": schema}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _COMPONENTS.format(name=schema)}}}


def _ok(schema: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"200": {"description": "Done.", "content": _json(schema), "headers": headers or {}}}


def _problems(*own: str, is_public: bool = False) -> dict[str, Any]:
    """Return the answers for these reason codes, and for those that every operation may have."""
    every = ("method_not_allowed", "internal_error")
    of_callers = ("unauthorized", "missing_scope", "bad_parameter", "too_many_requests", "unavailable")
    by_status: dict[int, list[str]] = {}
    for reason in (*own, *every, *(() if is_public else of_callers)):
        by_status.setdefault(REASONS[reason][0], []).append(reason)
    return {str(status): _problem(status, reasons) for status, reasons in sorted(by_status.items())}


_HEADERS: Final = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After", 503: "Retry-After"}


def _problem(status: int, reasons: list[str]) -> dict[str, Any]:
    text = " · ".join(f"`{reason}`: {REASONS[reason][1]}." for reason in reasons)
    headers = {_HEADERS[status]: {"schema": _TEXT}} if status in _HEADERS else {}
    schema = {"$ref": _COMPONENTS.format(name="Problem")}
    return {"description": text, "content": {MEDIA_TYPE: {"schema": schema}}, "headers": headers}
