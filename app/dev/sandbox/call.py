"""A call to the Channel Manager, told from its method and path; literal segments compare without case."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote_plus

from app.dev.sandbox.company import Address
from app.dev.sandbox.mint import canonical_guid
from app.dev.sandbox.refusal import Refusal, not_found

# (method, segments after the company; None is a parameter) -> operation. The first that fits counts.
_ROUTES: tuple[tuple[str, tuple[bytes | None, ...], str], ...] = (
    ("GET", (b"channelmanager", b"orders", None), "listOrdersByPartner"),
    ("GET", (b"channelmanager", None), "getOrder"),
    ("POST", (b"channelmanager", None, b"confirm"), "confirmOrder"),
    ("POST", (b"channelmanager",), "createOrder"),
    ("PUT", (b"channelmanager", None), "replaceOrder"),
    ("DELETE", (b"channelmanager", None), "deleteOrder"),
    ("GET", (b"webhook",), "listSubscriptions"),
    ("GET", (b"webhook", None), "getSubscription"),
    ("POST", (b"webhook",), "createSubscription"),
    ("DELETE", (b"webhook", None), "deleteSubscription"),
)
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE"}


class Call(NamedTuple):
    """What is asked; `subject` is the id in the path as written, `order_id` the canonical one if it is an order's."""

    operation: str
    address: Address
    subject: str
    order_id: str
    path: str
    query: bytes


def read(method: str, raw_path: bytes, query: bytes) -> Call:
    """Return the call; raises Refusal (400, 404) when there is no such operation."""
    if method not in _METHODS:
        raise Refusal(400, "unsupported_http_method", f"Http method {method} is not supported")
    segments = raw_path.strip(b"/").split(b"/")
    rest = segments[3:]
    operation, pattern = _route(method, rest)
    subject = next((_text(have) for want, have in zip(pattern, rest, strict=True) if want is None), "")
    order_id = ""
    if operation.endswith("Order") and operation != "createOrder":
        order_id = canonical_guid(subject) or ""
    address = Address(*map(_text, segments[:3]))
    return Call(operation, address, subject, order_id, raw_path.decode("latin-1"), query)


def _route(method: str, rest: list[bytes]) -> tuple[str, tuple[bytes | None, ...]]:
    for wanted, pattern, operation in _ROUTES:
        if wanted == method and len(pattern) == len(rest) and _fits(pattern, rest):
            return operation, pattern
    raise not_found("API endpoint not found")


def _fits(pattern: tuple[bytes | None, ...], rest: list[bytes]) -> bool:
    return all(want is None or want == have.lower() for want, have in zip(pattern, rest, strict=True))


def _text(segment: bytes) -> str:
    # Upstream's own page builds the address with form encoding, so "+" is a blank here too.
    return unquote_plus(segment.decode("latin-1"))
