"""The commands that run the service: serve, worker."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import typer

from app import bootstrap, log, settings
from app.cli.command import AWAY, DONE, FOUND, INTERRUPTED, NO_REDIS, OTHER_DEPLOYMENT, USAGE, commands, epilog
from app.errors import OtherDeployment, SettingsError

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
    from app.web.server import Server, listen  # the pool imports no web server

    with _settings("web") as found:
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
    try:
        listeners = listen(found.host, found.port)
    except OSError as error:
        _log.error("service.cannot_listen", reason=f"HOST {found.host}, PORT {found.port}: {error.strerror}")
        raise typer.Exit(FOUND) from None
    server.run(listeners)
    _log.info("service.stopped", role="web")
    raise typer.Exit(DONE if server.started else FOUND)


@cli.command(epilog=epilog("WORKERS=4 ota-receiver worker", codes=_WORKER_CODES))
def worker() -> None:
    """Fetch orders: run the pool of worker processes and its dispatcher (the `worker` process)."""
    from workers.pool import run  # here: `serve` does not load it

    with _settings("worker") as found:
        code = run(found)
    raise typer.Exit(code)


@contextmanager
def _settings(role: Literal["web", "worker"]) -> Iterator[settings.Settings]:
    """Give the settings and set up the log; with LOG_FORMAT=json a SettingsError, also one of the block, is a line."""
    try:
        found = settings.load()
        bootstrap.configure_log(found)
        _log.info("service.started", role=role, pid=os.getpid())
        for sentence in found.unknown:
            _log.warning("settings.unknown_name", reason=sentence)
        yield found
    except SettingsError as error:
        form = os.environ.get("LOG_FORMAT", "").lower()
        if form not in {"json", "ecs"}:
            raise
        log.configure(form="ecs" if form == "ecs" else "json")
        _log.error("service.bad_settings", role=role, problems=str(error).splitlines())
        raise typer.Exit(USAGE) from None
