# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "arq==0.28.0", "fastapi==0.165.0",
#     "hiredis==3.5.0", "httptools==0.9.0", "uvicorn==0.54.0", "uvloop==0.23.0",
# ]
# ///
"""FastAPI with arq: `SET NX`, then `enqueue_job`, per event, on the event loop."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hmac import compare_digest

from arq import ArqRedis, create_pool
from arq.connections import RedisSettings
from fastapi import FastAPI, HTTPException, Request

WEEK = 7 * 86400
secret = os.environ["CLIENT_STATE"].encode()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect to Redis for as long as the application runs."""
    app.state.redis = await create_pool(RedisSettings.from_dsn(os.environ["REDIS_URL"]))
    yield
    await app.state.redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/webhooks/ota-channel-manager")
async def deliver(request: Request) -> dict[str, int]:
    """Queue a fetch of each order that is new; return how many."""
    events = (await request.json())["values"]
    if not all(compare_digest(event["clientState"].encode(), secret) for event in events):
        raise HTTPException(401)
    redis: ArqRedis = request.app.state.redis
    accepted = 0
    for event in events:
        company, order = event["companyId"], event["payload"]["orderId"]
        if await redis.set(f"seen:{company}:{order}", 1, nx=True, ex=WEEK):
            await redis.enqueue_job("fetch_order", company, order)
            accepted += 1
    return {"accepted": accepted}
