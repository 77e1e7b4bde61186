"""The operations: each takes a call that the gateway let through and returns its answer."""

from __future__ import annotations

import httpx

from app.dev.sandbox import answer, submission, subscription
from app.dev.sandbox.answer import Answer
from app.dev.sandbox.book import Row
from app.dev.sandbox.call import Call
from app.dev.sandbox.company import Company
from app.dev.sandbox.listing import page
from app.dev.sandbox.mint import canonical_guid, guid
from app.dev.sandbox.refusal import bad_request
from app.dev.sandbox.world import World


async def perform(world: World, company: Company, call: Call, body: bytes) -> Answer:
    """Do what is asked; raises Refusal."""
    book, subscriptions = world.book(company), world.subscriptions(company)
    match call.operation:
        case "getOrder":
            return Answer(200, book.get(_order_id(call)).encoded)
        case "createOrder":
            return _create(world, company, call, body)
        case "replaceOrder":
            return _replace(world, company, call, body)
        case "confirmOrder":
            return _confirm(world, company, call, body)
        case "deleteOrder":
            return answer.json(book.delete(_order_id(call)))
        case "listOrdersByPartner":
            partner_id = canonical_guid(call.subject)
            if partner_id is None:
                raise bad_request("Invalid partnerId")
            return answer.json(page(book.of_partner(partner_id), partner_id, call.path, call.query))
        case "listSubscriptions":
            return answer.json(subscriptions.listed())
        case "getSubscription":
            return answer.json(subscriptions.one(call.subject.lower()))
        case "createSubscription":
            return await _subscribe(world, company, body)
        case "deleteSubscription":
            subscriptions.delete(call.subject.lower())
            return Answer(204, b"")
    raise AssertionError(f"no such operation: {call.operation}")


def _order_id(call: Call) -> str:
    if not call.order_id:
        raise bad_request("Invalid order id")
    return call.order_id


def _in_call(call: Call) -> bool:
    """Return whether the hidden switch asks to issue inside the call."""
    return any(part.lower() in (b"sync=1", b"sync=true") for part in call.query.split(b"&"))


def _create(world: World, company: Company, call: Call, body: bytes) -> Answer:
    book, given = world.book(company), submission.decoded(body)
    top = submission.header(given)
    # Before the items are looked at, as in AL: an order in Error is gone even if these are then refused.
    book.make_room(top)
    row = book.place(top, submission.shells(given, top))
    return _begun(world, company, call, row, 201)


def _replace(world: World, company: Company, call: Call, body: bytes) -> Answer:
    book = world.book(company)
    row = book.replaceable(_order_id(call))
    given = submission.decoded(body)
    top = submission.header(given)
    if top.partner_id != row.order.partner_id:
        raise bad_request("partnerId cannot be changed via PUT")
    if top.reference != row.order.sell_to_order_reference:
        raise bad_request("sellToOrderReference cannot be changed via PUT")
    book.resubmit(row, top, submission.shells(given, top))
    return _begun(world, company, call, row, 200)


def _begun(world: World, company: Company, call: Call, row: Row, status: int) -> Answer:
    if _in_call(call):
        world.book(company).settle_now(row)
    else:
        world.book(company).settle_later(row)
    return Answer(status, row.encoded)


def _confirm(world: World, company: Company, call: Call, body: bytes) -> Answer:
    book = world.book(company)
    row = book.get(_order_id(call))
    if row.order.status == "Issued":
        return Answer(200, row.encoded)
    if row.order.status != "Draft":
        raise bad_request(f"Order cannot be confirmed in status {row.order.status}")
    book.confirm(row, submission.required(submission.decoded(body), "paymentReference"))
    return Answer(200, row.encoded)


async def _subscribe(world: World, company: Company, body: bytes) -> Answer:
    wish = subscription.wish(body)
    if world.settings.handshake:
        await _shake_hands(wish.notification_url, world.settings.delivery_timeout)
    return answer.json(world.subscriptions(company).create(company, wish), 201)


async def _shake_hands(url: str, timeout: float) -> None:  # noqa: ASYNC109 (it goes to httpx as it is)
    """Ask a receiver to echo a token, as Microsoft's entity webhooks do; raises Refusal (400)."""
    token = guid("handshake", url)
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=timeout) as client:
            response = await client.post(url, params={"validationToken": token})
    except (httpx.HTTPError, httpx.InvalidURL):
        raise bad_request("The notification URL cannot be reached") from None
    if response.status_code != 200 or response.text != token:
        raise bad_request("The notification URL did not echo the validation token")
