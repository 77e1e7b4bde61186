"""The description of the API: OpenAPI 3.1, built from the types of the answers and from a table of the paths.

tests/integration/test_api_description.py compares it with what the running service answers.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

import msgspec

from app.api.answers import (
    MEDIA_TYPE,
    REASONS,
    Acknowledgement,
    FeedPage,
    History,
    OrderPage,
    Problem,
)
from app.order_document import OrderDocument

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
        "tags": [{"name": "orders"}, {"name": "feed"}, {"name": "service"}],
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
    company = _parameter("company", "query", {"type": "string"}, "Slug or id of a company; default: all.")
    limit = {"type": "integer", "minimum": 1, "maximum": 100, "default": 50}
    limited = _parameter("limit", "query", limit, "Orders of a page.")
    cursor = {"type": "string", "pattern": "^[A-Za-z0-9_-]{2,22}$"}
    tag = {"ETag": {"description": "Changes with any change of the body.", "schema": {"type": "string"}}}
    known = _parameter("If-None-Match", "header", {"type": "string"}, "The ETag of the copy that you have.")
    since = {"type": "string", "format": "date-time"}
    one = ("order_not_found", "several_companies", "order_erased", "bad_parameter", "order_unreadable")
    return {
        "/orders": {
            "get": {
                "operationId": "listOrders",
                "tags": ["orders"],
                "summary": "Orders, the one whose content changed last first. Scope `orders:read`.",
                "parameters": [
                    _parameter(
                        "reference", "query", {"type": "string"}, "buyFromOrderReference or sellToOrderReference."
                    ),
                    _parameter("status", "query", {"type": "string"}, "Status of the order, in any case."),
                    _parameter("since", "query", since, "Only orders whose content changed since."),
                    company,
                    _parameter("cursor", "query", cursor, "`next` of the page before."),
                    limited,
                ],
                "responses": {"200": _ok("OrderPage"), **_problems("bad_parameter", "unknown_cursor")},
            }
        },
        "/orders/{order_id}": {
            "get": {
                "operationId": "getOrder",
                "tags": ["orders"],
                "summary": "One order: its latest revision. Scope `orders:read`.",
                "parameters": [order_id, company, known],
                "responses": {
                    "200": _ok("OrderDocument", tag),
                    "304": {"description": "The copy that you have is the latest.", "headers": tag},
                    **_problems(*one, "order_not_fetched"),
                },
            }
        },
        "/orders/{order_id}/history": {
            "get": {
                "operationId": "getOrderHistory",
                "tags": ["orders"],
                "summary": "What happened to one order, oldest first. Scope `orders:read`.",
                "parameters": [order_id, company],
                "responses": {"200": _ok("History"), **_problems(*one)},
            }
        },
        "/feed": {
            "get": {
                "operationId": "getFeed",
                "tags": ["feed"],
                "summary": "The next revisions that the consumer has not acknowledged. Scope `feed`.",
                "parameters": [
                    _parameter("after", "query", cursor, "`next` of the page before; default: what was acknowledged."),
                    limited,
                ],
                "responses": {"200": _ok("FeedPage"), **_problems("bad_parameter", "unknown_cursor")},
            }
        },
        "/feed/ack": {
            "post": {
                "operationId": "acknowledgeFeed",
                "tags": ["feed"],
                "summary": "Move the consumer's cursor forward. An older one changes nothing. Scope `feed`.",
                "requestBody": {"required": True, "content": _json("Acknowledgement")},
                "responses": {
                    "200": _ok("Acknowledgement"),
                    **_problems("not_json", "bad_body", "unknown_cursor", "body_too_slow", "body_too_large"),
                },
            }
        },
        "/healthz": {
            "get": {
                "operationId": "isAlive",
                "tags": ["service"],
                "summary": "The process runs.",
                "security": [],
                "responses": {
                    "200": {"description": "It runs.", "content": {"text/plain": {"schema": {"type": "string"}}}},
                    **_problems(public=True),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "operationId": "getDescription",
                "tags": ["service"],
                "summary": "This description.",
                "security": [],
                "responses": {
                    "200": {
                        "description": "OpenAPI 3.1.",
                        "content": {"application/json": {"schema": {"type": "object"}}},
                    },
                    **_problems(public=True),
                },
            }
        },
    }


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


_TEXT: Final = {"type": "string"}
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
    return {"description": "Done.", "content": _json(schema), "headers": headers or {}}


def _problems(*own: str, public: bool = False) -> dict[str, Any]:
    """Return the answers for these reason codes, and for those that every operation may have."""
    every = ("method_not_allowed", "internal_error")
    of_callers = ("unauthorized", "missing_scope", "bad_parameter", "too_many_requests", "unavailable")
    by_status: dict[int, list[str]] = {}
    for reason in dict.fromkeys((*own, *every, *(() if public else of_callers))):
        by_status.setdefault(REASONS[reason][0], []).append(reason)
    return {str(status): _problem(status, reasons) for status, reasons in sorted(by_status.items())}


_HEADERS: Final = {401: "WWW-Authenticate", 405: "Allow", 429: "Retry-After", 503: "Retry-After"}


def _problem(status: int, reasons: list[str]) -> dict[str, Any]:
    text = " · ".join(f"`{reason}`: {REASONS[reason][1]}." for reason in reasons)
    headers = {_HEADERS[status]: {"schema": {"type": "string"}}} if status in _HEADERS else {}
    schema = {"$ref": _COMPONENTS.format(name="Problem")}
    return {"description": text, "content": {MEDIA_TYPE: {"schema": schema}}, "headers": headers}
