"""The commands that run the service: serve, worker."""

from __future__ import annotations

import gc
import os
import signal

import typer
import uvicorn

from app import bootstrap, log, settings
from app.cli.exits import DONE, FOUND

_log = log.get()


def register(cli: typer.Typer) -> None:
    cli.command()(serve)
    cli.command()(worker)


def serve() -> None:
    """Receive events: the HTTP endpoint (the `web` process)."""
    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="web", pid=os.getpid())
    # uvicorn raises the signal that stopped it once more; a handler of ours lets the process end with 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    web = bootstrap.web_app(found)
    # What was imported never becomes garbage: looking through it again and again took 6 % of the time under load.
    gc.collect()
    gc.freeze()
    server = uvicorn.Server(
        uvicorn.Config(
            web,
            host=found.host,
            port=found.port,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=8,
            limit_concurrency=1000,
        )
    )
    # Ends with 1 by itself where the port is taken; uvicorn.run would end with 3, which here says that Redis is away.
    server.run()
    _log.info("service.stopped", role="web")
    raise typer.Exit(DONE if server.started else FOUND)


def worker() -> None:
    """Fetch orders: the pool of worker processes and its ticker (the `worker` process)."""
    from workers import pool  # the arrow points down: only the CLI knows both sides

    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="worker", pid=os.getpid())
    raise typer.Exit(pool.run(found))
