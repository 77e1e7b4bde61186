# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "celery==5.7.0", "fastapi==0.165.0", "redis==8.1.0", "packaging==26.3",
#     "hiredis==3.5.0", "httptools==0.9.0", "uvicorn==0.54.0", "uvloop==0.23.0",
# ]
# ///
"""FastAPI with Celery on Redis: `SET NX`, then `delay`, per event, in the thread pool."""

import os
from hmac import compare_digest
from typing import Any

from celery import Celery
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from redis import Redis

WEEK = 7 * 86400
secret = os.environ["CLIENT_STATE"].encode()
redis = Redis.from_url(os.environ["REDIS_URL"])
tasks = Celery("orders", broker=os.environ["REDIS_URL"])
app = FastAPI()


@tasks.task(name="fetch_order", ignore_result=True)
def fetch_order(company_id: str, order_id: str) -> None:
    """What a worker would run."""


def record(events: list[dict[str, Any]]) -> int:
    """Queue a fetch of each order that is new; return how many."""
    accepted = 0
    for event in events:
        company, order = event["companyId"], event["payload"]["orderId"]
        if redis.set(f"seen:{company}:{order}", 1, nx=True, ex=WEEK):
            fetch_order.delay(company, order)
            accepted += 1
    return accepted


@app.post("/webhooks/ota-channel-manager")
async def deliver(request: Request) -> dict[str, int]:
    """Record the events of one POST."""
    events = (await request.json())["values"]
    if not all(compare_digest(event["clientState"].encode(), secret) for event in events):
        raise HTTPException(401)
    return {"accepted": await run_in_threadpool(record, events)}
