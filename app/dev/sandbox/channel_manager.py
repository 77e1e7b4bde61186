"""The Channel Manager and the webhook API: a call goes through address, key, faults and limits to its operation."""

from __future__ import annotations

from typing import Annotated, NamedTuple
from urllib.parse import unquote_plus

import msgspec
from starlette.types import Receive, Scope, Send

from app.dev.sandbox.companies import Address, Company
from app.dev.sandbox.faults import Strikes, spoilt, status_answer
from app.dev.sandbox.http import (
    Answer,
    Refusal,
    bad_request,
    connected_for,
    decode,
    json,
    not_found,
    read_body,
    refused,
)
from app.dev.sandbox.order_book import Row, page
from app.dev.sandbox.submission import Submission
from app.dev.sandbox.values import canonical_guid, guid
from app.dev.sandbox.webhooks import NewSubscription
from app.dev.sandbox.world import World

# (method, segments after the company; None is a parameter) -> operation. The first match counts.
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
# The gateway answers these itself, so they take no slot.
_WITHOUT_SLOT = {401, 403, 429}
# Upstream's limit for one call, in seconds.
_OPERATION_LIMIT = 480.0


class Call(NamedTuple):
    """A call; `subject` is the id in the path as sent, `order_id` the canonical one of an operation on an order."""

    operation: str
    address: Address
    subject: str
    order_id: str
    path: str
    query: bytes


class Confirmation(msgspec.Struct, frozen=True, rename="camel"):
    """The body of confirmOrder."""

    payment_reference: Annotated[str, msgspec.Meta(min_length=1)]


class ChannelManager:
    """The ASGI app of all companies."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call, unless the caller disconnects first."""
        operation = "unknown"
        answer: Answer | None
        try:
            call = read_call(scope["method"], scope["raw_path"], scope["query_string"])
            operation = call.operation
            answer = await self._answer(call, scope, receive)
        except Refusal as refusal:
            answer = refused(refusal)
        counts = self._world.counts.operations[operation]
        if answer is None:
            counts["abandoned"] += 1
            return
        counts[str(answer.status) if answer.sound else f"{answer.status} spoilt"] += 1
        await answer.send(send)

    async def _answer(self, call: Call, scope: Scope, receive: Receive) -> Answer | None:
        """Return the answer; None when the caller has disconnected. Raises Refusal."""
        world, settings = self._world, self._world.settings
        company = world.companies.at(call.address)
        if call.operation == "getOrder" and call.order_id:
            world.counts.order(company.id, call.order_id).gets += 1
        key = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-np-api-key"), "")
        company.check_key(key)
        faults = world.faults.strike(call.operation, company.id, call.order_id)
        status = faults.of("status")
        if status is not None and status.status in _WITHOUT_SLOT:
            if status.status == 429:
                world.counts.throttled["fault"] += 1
            return status_answer(status, call.order_id)
        limits = world.limits[key]
        limits.count(settings)
        body = await read_body(receive) if scope["method"] in ("POST", "PUT") else b""
        if not await limits.acquire(settings, receive):
            return None
        try:
            if not await self._wait(call, faults, receive):
                return None
            if status is not None:
                return status_answer(status, call.order_id)
            return self._perform(call, company, faults, body)
        finally:
            limits.release(settings)

    async def _wait(self, call: Call, faults: Strikes, receive: Receive) -> bool:
        """Take the call's time in its slot; return False if the caller disconnects. Raises Refusal (408)."""
        hang, latency = faults.of("hang"), faults.of("latency")
        seconds = self._world.settings.latency_ms / 1000 if call.operation == "getOrder" else 0.0
        seconds += (latency.seconds or 0.0) if latency else 0.0
        if hang is not None:
            seconds = _OPERATION_LIMIT if hang.seconds is None else hang.seconds
        if seconds and not await connected_for(receive, seconds):
            return False
        if hang is not None:
            raise Refusal(408, "server_timeout", "The operation took too long")
        return True

    def _perform(self, call: Call, company: Company, faults: Strikes, body: bytes) -> Answer:
        world = self._world
        answer = perform(world, company, call, body)
        for fault in faults.faults:
            answer = spoilt(answer, fault, call.order_id, guid(world.seed, "other", call.order_id))
        if call.operation == "getOrder" and answer.sound:
            world.counts.order(company.id, call.order_id).answered += 1
        return answer


def read_call(method: str, raw_path: bytes, query: bytes) -> Call:
    """Return the call; raises Refusal (400, 404) when there is no such operation."""
    if method not in _METHODS:
        raise Refusal(400, "unsupported_http_method", f"Http method {method} is not supported")
    segments = raw_path.strip(b"/").split(b"/")
    rest = segments[3:]
    operation, pattern = _route(method, rest)
    subject = next((_text(have) for want, have in zip(pattern, rest, strict=True) if want is None), "")
    order_id = (canonical_guid(subject) or "") if operation.endswith("Order") else ""
    return Call(operation, Address(*map(_text, segments[:3])), subject, order_id, raw_path.decode("latin-1"), query)


def perform(world: World, company: Company, call: Call, body: bytes) -> Answer:
    """Run the operation and return its answer; raises Refusal."""
    orders, webhooks = world.orders(company), world.webhooks
    match call.operation:
        case "getOrder":
            return Answer(200, orders.get(_order_id(call)).encoded)
        case "createOrder":
            return _settling(world, company, call, orders.add(decode(body, Submission)), 201)
        case "replaceOrder":
            return _settling(world, company, call, orders.replace(_order_id(call), decode(body, Submission)), 200)
        case "confirmOrder":
            confirmation = decode(body, Confirmation)
            return Answer(200, orders.confirm(_order_id(call), confirmation.payment_reference).encoded)
        case "deleteOrder":
            return json(orders.delete(_order_id(call)))
        case "listOrdersByPartner":
            partner_id = canonical_guid(call.subject)
            if partner_id is None:
                raise bad_request("Invalid partnerId")
            return json(page(orders, partner_id, call.path, call.query))
        case "listSubscriptions":
            return json(webhooks.listed(company.id))
        case "getSubscription":
            return json(webhooks.get(company.id, call.subject.lower()))
        case "createSubscription":
            return json(webhooks.create(company, decode(body, NewSubscription)), 201)
        case "deleteSubscription":
            webhooks.delete(company.id, call.subject.lower())
            return Answer(204, b"")
    raise AssertionError(f"no such operation: {call.operation}")


def _settling(world: World, company: Company, call: Call, row: Row, status: int) -> Answer:
    """Settle the order inside the call with the undocumented `?sync=1`, else later."""
    if any(part.lower() in (b"sync=1", b"sync=true") for part in call.query.split(b"&")):
        world.orders(company).settle_now(row)
    else:
        world.orders(company).settle_later(row)
    return Answer(status, row.encoded)


def _route(method: str, rest: list[bytes]) -> tuple[str, tuple[bytes | None, ...]]:
    for wanted, pattern, operation in _ROUTES:
        if wanted == method and len(pattern) == len(rest) and _matches(pattern, rest):
            return operation, pattern
    raise not_found("API endpoint not found")


def _matches(pattern: tuple[bytes | None, ...], segments: list[bytes]) -> bool:
    return all(want is None or want == have.lower() for want, have in zip(pattern, segments, strict=True))


def _order_id(call: Call) -> str:
    if not call.order_id:
        raise bad_request("Invalid order id")
    return call.order_id


def _text(segment: bytes) -> str:
    # Upstream's own page builds the address with form encoding, so "+" is a space here too.
    return unquote_plus(segment.decode("latin-1"))
