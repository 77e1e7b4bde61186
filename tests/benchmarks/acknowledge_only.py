"""The limit: the least a receiver can do (parse, compare clientState, answer 200); it records nothing."""

from __future__ import annotations

import os
from hmac import compare_digest

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Event(msgspec.Struct, frozen=True):
    """The only field that is read."""

    client_state: str = msgspec.field(name="clientState")


class Envelope(msgspec.Struct, frozen=True):
    """The documented shape of a delivery."""

    values: list[Event]


def app() -> Starlette:
    """Return the application (uvicorn --factory); reads CLIENT_STATE."""
    secret = os.environ["CLIENT_STATE"].encode()
    decoder = msgspec.json.Decoder(Envelope)

    async def healthz(request: Request) -> Response:
        return Response(b"ok")

    async def deliver(request: Request) -> Response:
        envelope = decoder.decode(await request.body())
        if not all(compare_digest(event.client_state.encode(), secret) for event in envelope.values):
            return Response(status_code=401)
        return Response(b'{"accepted":%d}' % len(envelope.values), media_type="application/json")

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/webhooks/ota-channel-manager", deliver, methods=["POST"]),
        ]
    )
