"""Two receivers to compare with: the limit of this stack, and the receiver that takes an afternoon to write.

`limit` does the least that a receiver can do: it parses, compares clientState, answers 200, and records nothing.
`obvious` calls `SET NX`, then RQ's `enqueue`, per event. It is not slow on purpose: one thread pool call per request,
uvloop, hiredis, no access log. It loses an event when it dies between the two commands, which no benchmark shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from hmac import compare_digest
from typing import Any

import msgspec
from rq import Queue
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.ledger.redis import Redis

WEEK = 7 * 86400


class Event(msgspec.Struct, frozen=True):
    """The only field that `limit` reads."""

    client_state: str = msgspec.field(name="clientState")


class Envelope(msgspec.Struct, frozen=True):
    """The documented shape of a delivery."""

    values: list[Event]


def limit() -> Starlette:
    """Return the application (uvicorn --factory); reads CLIENT_STATE."""
    secret = os.environ["CLIENT_STATE"].encode()
    decoder = msgspec.json.Decoder(Envelope)

    async def deliver(request: Request) -> Response:
        envelope = decoder.decode(await request.body())
        if not all(compare_digest(event.client_state.encode(), secret) for event in envelope.values):
            return Response(status_code=401)
        return Response(b'{"accepted":%d}' % len(envelope.values), media_type="application/json")

    return _app(deliver)


def obvious() -> Starlette:
    """Return the application (uvicorn --factory); reads CLIENT_STATE and REDIS_URL."""
    secret = os.environ["CLIENT_STATE"].encode()
    redis = Redis.from_url(os.environ["REDIS_URL"])
    queue = Queue("ota-live", connection=redis)

    def record(events: list[dict[str, Any]]) -> int:
        accepted = 0
        for event in events:
            company, order = event["companyId"], event["payload"]["orderId"]
            status, timestamp = event["payload"]["status"], event["timestamp"]
            if redis.set(f"seen:{company}:{order}:{status}:{timestamp}", 1, nx=True, ex=WEEK):
                queue.enqueue("workers.jobs.fetch_order", company, order)
                accepted += 1
        return accepted

    async def deliver(request: Request) -> Response:
        events = json.loads(await request.body())["values"]
        if not all(compare_digest(event["clientState"].encode(), secret) for event in events):
            return Response(status_code=401)
        return JSONResponse({"accepted": await run_in_threadpool(record, events)})

    return _app(deliver)


def _app(deliver: Callable[[Request], Awaitable[Response]]) -> Starlette:
    return Starlette(routes=[Route("/webhooks/ota-channel-manager", deliver, methods=["POST"])])
