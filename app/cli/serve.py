"""The commands that run the service: serve, worker, api, ops."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import typer

from app import bootstrap, log, settings
from app.cli.command import AWAY, DONE, FOUND, INTERRUPTED, NO_REDIS, OTHER_DEPLOYMENT, USAGE, commands, epilog
from app.errors import OtherDeployment, SettingsError
from app.setting_values import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_log = log.get()

Role = Literal["web", "api", "ops"]

_ENDS = {DONE: "stopped on request", USAGE: "wrong settings"}
_OTHER = {OTHER_DEPLOYMENT: "another deployment uses this Redis under the same KEY_PREFIX"}
_SERVE_CODES = NO_REDIS | _ENDS | _OTHER | {FOUND: "cannot listen on HOST and PORT"}
_API_CODES = NO_REDIS | _ENDS | _OTHER | {FOUND: "cannot listen on API_HOST and API_PORT"}
_OPS_CODES = NO_REDIS | _ENDS | _OTHER | {FOUND: "cannot listen on OPS_HOST and OPS_PORT"}
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
    with _settings("web") as found:
        _refuse_other_deployment(found)
        app = bootstrap.web_app(found)
    _listen("web", app, {"HOST": found.host, "PORT": found.port})


@cli.command(epilog=epilog("ota-receiver api", codes=_API_CODES))
def api() -> None:
    """Serve orders and the feed to your own services: run the API (the `api` process)."""
    with _settings("api") as found:
        _refuse_other_deployment(found)
        app = bootstrap.api_app(found)
    _listen("api", app, {"API_HOST": found.api_host, "API_PORT": found.api_port})


@cli.command(epilog=epilog("ota-receiver ops", codes=_OPS_CODES))
def ops() -> None:
    """Show people their orders in a browser: run the ops page (the `ops` process). Needs OPS_TOKEN."""
    with _settings("ops") as found:
        _refuse_other_deployment(found)
        # Its times are UTC, as those of the log: who looks may be in any zone.
        os.environ["TZ"] = "UTC"
        time.tzset()
        app = bootstrap.ops_app(found)
        if not is_loopback(f"//{found.ops_host}"):
            _log.warning("ops.open", advice="The page sends passwords: put a proxy with TLS before OPS_HOST.")
    _listen("ops", app, {"OPS_HOST": found.ops_host, "OPS_PORT": found.ops_port})


@cli.command(epilog=epilog("WORKERS=4 ota-receiver worker", codes=_WORKER_CODES))
def worker() -> None:
    """Fetch orders: run the pool of worker processes and its dispatcher (the `worker` process)."""
    from workers.pool import run  # here: `serve` does not load it

    with _settings("worker") as found:
        code = run(found)
    raise typer.Exit(code)


def _refuse_other_deployment(found: settings.Settings) -> None:
    try:
        bootstrap.refuse_other_deployment(found)
    except OtherDeployment as refusal:
        _log.error("service.other_deployment", reason=str(refusal))
        raise typer.Exit(OTHER_DEPLOYMENT) from None


def _listen(role: Role, app: ASGIApp, address: Mapping[str, Any]) -> NoReturn:
    """Serve the app until SIGTERM or SIGINT. `address`: the settings of host and port, by name."""
    from app.web.server import Server, listen  # the pool imports no web server

    host, port = address.values()
    server = Server(app, host, port)
    # Also before and after the run: a signal must neither be lost then nor end the process with its number.
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.signal(signal.SIGINT, server.handle_exit)
    # Imported objects never become garbage: scanning them again and again took 6 % of the time under load.
    gc.collect()
    gc.freeze()
    try:
        listeners = listen(host, port)
    except OSError as error:
        named = ", ".join(f"{name} {value}" for name, value in address.items())
        _log.error("service.cannot_listen", reason=f"{named}: {error.strerror}")
        raise typer.Exit(FOUND) from None
    server.run(listeners)
    _log.info("service.stopped", role=role)
    raise typer.Exit(DONE if server.started else FOUND)


@contextmanager
def _settings(role: Role | Literal["worker"]) -> Iterator[settings.Settings]:
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
