"""The routes of the web process, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from app.web.canonical_line import CanonicalLine
from app.web.probes import Probes
from app.web.webhook import Webhook


def application(
    *,
    webhook_path: str,
    webhook: Webhook,
    probes: Probes,
    resources: Callable[[], AbstractAsyncContextManager[None]],
) -> ASGIApp:
    """Return the ASGI app; `resources` are opened at start-up and closed at shutdown."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with resources():
            yield

    app = Starlette(
        routes=[
            Route(webhook_path, webhook),
            Route("/healthz", probes.live),
            Route("/readyz", probes.ready),
            Route("/metrics", probes.metrics),
        ],
        lifespan=lifespan,
    )
    # A redirect would name the host that the request claims, and senders of events do not follow one.
    app.router.redirect_slashes = False
    return CanonicalLine(app, quiet=frozenset({"/healthz", "/readyz", "/metrics"}))
