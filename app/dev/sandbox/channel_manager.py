"""The Channel Manager and the webhook API: a call goes through address, key, faults and limits to its operation."""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple
from urllib.parse import unquote_plus

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.dev.sandbox.faults import Fault, Kind, spoilt, status_answer
from app.dev.sandbox.http import Answer, Refusal, bad_request, decode, json, not_found
from app.dev.sandbox.orders import Orders, Row
from app.dev.sandbox.submission import Submission
from app.dev.sandbox.values import Text, canonical_guid
from app.dev.sandbox.webhooks import NewSubscription, Webhooks
from app.dev.sandbox.world import Address, Company, OrderCounts, World

# (method, path after the company) -> operation. The first match counts; case does not.
_ROUTES = (
    ("GET", r"channelmanager/orders/([^/]+)", "listOrdersByPartner"),
    ("GET", r"channelmanager/([^/]+)", "getOrder"),
    ("POST", r"channelmanager/([^/]+)/confirm", "confirmOrder"),
    ("POST", r"channelmanager", "createOrder"),
    ("PUT", r"channelmanager/([^/]+)", "replaceOrder"),
    ("DELETE", r"channelmanager/([^/]+)", "deleteOrder"),
    ("GET", r"webhook", "listSubscriptions"),
    ("GET", r"webhook/([^/]+)", "getSubscription"),
    ("POST", r"webhook", "createSubscription"),
    ("DELETE", r"webhook/([^/]+)", "deleteSubscription"),
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


class Confirmation(msgspec.Struct, frozen=True, rename="camel"):
    """The body of confirmOrder."""

    payment_reference: Text


class ChannelManager:
    """The ASGI app of all companies."""

    def __init__(self, world: World, orders: Orders, webhooks: Webhooks) -> None:
        self._world = world
        self._orders = orders
        self._webhooks = webhooks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call; work stops when the caller disconnects."""
        request = Request(scope, receive)
        operation = "unknown"
        answer: Answer | None
        try:
            call = read_call(scope["method"], scope["raw_path"])
            operation = call.operation
            body = await request.body()
            work = asyncio.create_task(self._answer(call, request, body))
            leaving = asyncio.create_task(_disconnected(receive))
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            answer = work.result() if work.done() else None
            work.cancel()
        except Refusal as refusal:
            answer = refusal.answer
        counts = self._world.counts.operations[operation]
        if answer is None:
            counts["abandoned"] += 1
            return
        counts[str(answer.status) if answer.sound else f"{answer.status} spoilt"] += 1
        await answer.send(send)

    async def _answer(self, call: Call, request: Request, body: bytes) -> Answer:
        """Return the answer; raises Refusal."""
        world = self._world
        company = world.companies.at(call.address)
        counts = OrderCounts()
        if call.operation == "getOrder" and call.order_id:
            counts = world.counts.orders[company.id, call.order_id]
        counts.gets += 1
        key = request.headers.get("x-np-api-key", "")
        company.check_key(key)
        faults = world.faults.strike(call.operation, company.id, call.order_id)
        status = faults.get("status")
        if status is not None and status.status in _WITHOUT_SLOT:
            world.counts.throttled += status.status == 429
            return status_answer(status, call.order_id)
        limits = world.limits[key]
        limits.count()
        async with limits.slot():
            await self._take_time(call, faults)
            if status is not None:
                return status_answer(status, call.order_id)
            answer = self._perform(call, company, request, body)
        for kind in faults:
            answer = spoilt(answer, kind, call.order_id)
        counts.answered += answer.sound
        return answer

    async def _take_time(self, call: Call, faults: dict[Kind, Fault]) -> None:
        """Wait as long as the call takes; raises Refusal (408) when it hangs."""
        if hang := faults.get("hang"):
            await asyncio.sleep(_OPERATION_LIMIT if hang.seconds is None else hang.seconds)
            raise Refusal(408, "server_timeout", "The operation took too long")
        seconds = self._world.settings.latency_ms / 1000 if call.operation == "getOrder" else 0.0
        if latency := faults.get("latency"):
            seconds += latency.seconds or 0.0
        if seconds:
            await asyncio.sleep(seconds)

    def _perform(self, call: Call, company: Company, request: Request, body: bytes) -> Answer:
        """Run the operation and return its answer; raises Refusal."""
        orders, webhooks = self._orders, self._webhooks
        if call.operation.endswith("Order") and call.subject and not call.order_id:
            raise bad_request("Invalid order id")
        match call.operation:
            case "getOrder":
                return json(orders.get(company, call.order_id).answer())
            case "createOrder":
                return self._settling(orders.add(company, decode(body, Submission)), request, 201)
            case "replaceOrder":
                return self._settling(orders.replace(company, call.order_id, decode(body, Submission)), request, 200)
            case "confirmOrder":
                payment = decode(body, Confirmation).payment_reference
                return json(orders.confirm(company, call.order_id, payment).answer())
            case "deleteOrder":
                return json(orders.delete(company, call.order_id).answer())
            case "listOrdersByPartner":
                partner_id = canonical_guid(call.subject)
                if partner_id is None:
                    raise bad_request("Invalid partnerId")
                path = request.scope["raw_path"].decode("latin-1")
                return json(orders.page(company, partner_id, path, request.query_params))
            case "listSubscriptions":
                return json(webhooks.listed(company.id))
            case "getSubscription":
                return json(webhooks.listed(company.id, call.subject.lower()))
            case "createSubscription":
                return json(webhooks.create(company, decode(body, NewSubscription)), 201)
            case "deleteSubscription":
                webhooks.delete(company.id, call.subject.lower())
                return Answer(204, b"")
        raise AssertionError(f"no such operation: {call.operation}")

    def _settling(self, row: Row, request: Request, status: int) -> Answer:
        """Settle the order inside the call with the undocumented `?sync=1`, else later."""
        self._orders.settle(row, request.query_params.get("sync", "").lower() in ("1", "true"))
        return json(row.answer(), status)


def read_call(method: str, raw_path: bytes) -> Call:
    """Return the call; raises Refusal (400, 404) when there is no such operation."""
    if method not in _METHODS:
        raise Refusal(400, "unsupported_http_method", f"Http method {method} is not supported")
    *address, rest = raw_path.decode("latin-1").strip("/").split("/", 3)
    for wanted, pattern, operation in _ROUTES:
        match = re.fullmatch(pattern, rest, re.IGNORECASE)
        if match and wanted == method and len(address) == len(Address._fields):
            # Upstream's own page builds the address with form encoding, so "+" is a space here too.
            subject = unquote_plus(match[1]) if match.lastindex else ""
            order_id = (canonical_guid(subject) or "") if operation.endswith("Order") else ""
            return Call(operation, Address(*map(unquote_plus, address)), subject, order_id)
    raise not_found("API endpoint not found")


async def _disconnected(receive: Receive) -> None:
    """Return when the caller closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
