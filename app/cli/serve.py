"""The commands that run the service: serve, worker."""

from __future__ import annotations

import gc
import os
import signal
from typing import Final

import typer

from app import bootstrap, log, settings
from app.cli.console import DONE, FOUND, epilog
from app.web.server import Bounds, Server

_log = log.get()

_SERVE_CODES: Final = "Exit codes: 0 told to stop · 1 it could not listen on HOST and PORT · 2 the settings are wrong"
_WORKER_CODES: Final = (
    "Exit codes: 0 told to stop · 1 a fault of ours: start it again · 2 the settings are wrong · 4 Redis holds data of"
    " a newer version"
)


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog("ota-receiver serve", codes=_SERVE_CODES))(serve)
    cli.command(epilog=epilog("WORKERS=4 ota-receiver worker", codes=_WORKER_CODES))(worker)


def serve() -> None:
    """Receive events: the HTTP endpoint (the `web` process)."""
    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="web", pid=os.getpid())
    server = Server(bootstrap.web_app(found), found.host, found.port, Bounds())
    # Before and after its run too: a signal that comes then must neither be lost nor end the process with its number.
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.signal(signal.SIGINT, server.handle_exit)
    # What was imported never becomes garbage: looking through it again and again took 6 % of the time under load.
    gc.collect()
    gc.freeze()
    # Ends with 1 by itself where the port is taken; uvicorn.run would end with 3, which here says that Redis is away.
    server.run()
    _log.info("service.stopped", role="web")
    raise typer.Exit(DONE if server.started else FOUND)


def worker() -> None:
    """Fetch orders: the pool of worker processes and its ticker (the `worker` process)."""
    from workers.pool import run  # here, since only the CLI knows both sides

    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="worker", pid=os.getpid())
    raise typer.Exit(run(found))
