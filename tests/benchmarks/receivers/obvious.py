"""The obvious version, Starlette with RQ: `SET NX`, then `enqueue`, per event, in the thread pool."""

from __future__ import annotations

import json
import os
from hmac import compare_digest
from typing import Any

from redis import Redis
from rq import Queue
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

WEEK = 7 * 86400
secret = os.environ["CLIENT_STATE"].encode()
redis = Redis.from_url(os.environ["REDIS_URL"])
queue = Queue("orders", connection=redis)


def record(events: list[dict[str, Any]]) -> int:
    """Queue a fetch of each order that is new; return how many."""
    accepted = 0
    for event in events:
        company, order = event["companyId"], event["payload"]["orderId"]
        if redis.set(f"seen:{company}:{order}", 1, nx=True, ex=WEEK):
            queue.enqueue("workers.jobs.fetch_order", company, order)
            accepted += 1
    return accepted


async def deliver(request: Request) -> Response:
    """Record the events of one POST."""
    events = json.loads(await request.body())["values"]
    if not all(compare_digest(event["clientState"].encode(), secret) for event in events):
        return Response(status_code=401)
    return JSONResponse({"accepted": await run_in_threadpool(record, events)})


app = Starlette(routes=[Route("/webhooks/ota-channel-manager", deliver, methods=["POST"])])
