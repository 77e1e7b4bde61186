"""The commands that run the service: serve, worker."""

from __future__ import annotations

import gc
import os
import signal

import typer

from app import bootstrap, log, settings
from app.cli.command import AWAY, DONE, FOUND, INTERRUPTED, NO_REDIS, OTHER_DEPLOYMENT, USAGE, commands, epilog
from app.errors import OtherDeployment

_log = log.get()

_ENDS = {DONE: "stopped on request", USAGE: "wrong settings"}
_OTHER = {OTHER_DEPLOYMENT: "another deployment uses this Redis under the same KEY_PREFIX"}
_SERVE_CODES = NO_REDIS | _ENDS | _OTHER | {FOUND: "cannot listen on HOST and PORT"}
_WORKER_CODES = {
    **_ENDS,
    **_OTHER,
    FOUND: "internal error: restart it",
    AWAY: "the server is older than Redis 6.2 or Valkey 7.2",
    INTERRUPTED: "",
}

cli = commands()


@cli.command(epilog=epilog("ota-receiver serve", codes=_SERVE_CODES))
def serve() -> None:
    """Receive events: run the HTTP endpoint (the `web` process)."""
    from app.web.server import Server  # the pool imports no web server

    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="web", pid=os.getpid())
    try:
        bootstrap.refuse_other_deployment(found)
    except OtherDeployment as refusal:
        _log.error("service.other_deployment", reason=str(refusal))
        raise typer.Exit(OTHER_DEPLOYMENT) from None
    server = Server(bootstrap.web_app(found), found.host, found.port)
    # Also before and after the run: a signal must neither be lost then nor end the process with its number.
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.signal(signal.SIGINT, server.handle_exit)
    # Imported objects never become garbage: scanning them again and again took 6 % of the time under load.
    gc.collect()
    gc.freeze()
    # Ends with 1 if the port is taken; uvicorn.run would end with 3, which here means that Redis is unavailable.
    server.run()
    _log.info("service.stopped", role="web")
    raise typer.Exit(DONE if server.started else FOUND)


@cli.command(epilog=epilog("WORKERS=4 ota-receiver worker", codes=_WORKER_CODES))
def worker() -> None:
    """Fetch orders: run the pool of worker processes and its dispatcher (the `worker` process)."""
    from workers.pool import run  # here: `serve` does not load it

    found = settings.load()
    bootstrap.configure_log(found)
    _log.info("service.started", role="worker", pid=os.getpid())
    raise typer.Exit(run(found))
