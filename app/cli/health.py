"""The command for HEALTHCHECK: does a process of this container live, and is it ready?

Alive needs no Redis: a restart does not bring it back. What is not alive hangs or has ended, and a restart helps.

It runs every few seconds, so it loads little: what only one role needs is imported there.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated, Any, Final, Literal

import typer

from app import settings
from app.cli import console
from app.cli.command import DONE, FOUND, NO_REDIS, command, commands
from app.errors import StoreUnavailable
from app.settings import Settings

HTTP_SECONDS: Final = 2.0

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here
_CODES: Final = NO_REDIS | {DONE: "healthy", FOUND: "not healthy"}

cli = commands()


@command(cli, "ota-receiver health --role worker", "ota-receiver health --role web --ready", codes=_CODES)
def health(
    role: Annotated[
        Literal["web", "worker", "api", "ops"] | None,
        typer.Option(help="Check only this role; otherwise one healthy role is enough."),
    ] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Check that it can work now: with Redis, or a spool.")] = False,
) -> None:
    """Check that the web process, the worker pool, the API or the ops page of this machine (or container) works.

    That is: it lives, also while Redis is away (for liveness probes); with --ready, it can do its work now, but of the
    API only that it lives. Of a pool, only its own user and root see whether it lives.
    """
    loaded = settings.load()
    healthy, found = False, []
    checks = {
        "web": partial(_http, loaded.host, loaded.port, "/readyz" if ready else "/healthz"),
        "worker": partial(_worker_ready if ready else _worker, loaded),
        "api": partial(_http, loaded.api_host, loaded.api_port, "/healthz"),
        "ops": partial(_http, loaded.ops_host, loaded.ops_port, "/healthz"),
    }
    for name, check in checks.items():
        if role in (None, name) and not healthy:
            healthy, detail = check()
            found.append({"role": name, "healthy": healthy, "detail": detail})
    for one in found:
        console.result(f"{one['role']}: {one['detail']}", one)
    if not healthy:
        raise typer.Exit(FOUND)


def _http(host: str, port: int, path: str) -> tuple[bool, str]:
    """Return whether a process answers 200 for this path, and the detail."""
    # The standard library's client ignores the proxies of the environment.
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection(_ANY_ADDRESS.get(host, host), port, timeout=HTTP_SECONDS)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return False, f"no answer on port {port} ({type(error).__name__})"
    finally:
        connection.close()
    return status == 200, f"{path} answers {status}"


def _worker(loaded: Settings) -> tuple[bool, str]:
    """Return whether the loop of a pool of this machine runs, and the detail."""
    from app.heartbeat import LOOP_WITHIN, since_last_loop

    if sys.platform != "linux":
        return _worker_ready(loaded)
    age = since_last_loop(loaded.deployment)
    if age is None:
        return False, "no worker pool of this user runs on this machine"
    return age < LOOP_WITHIN, f"its loop last ran {age:.0f} s ago"


def _worker_ready(loaded: Settings) -> tuple[bool, str]:
    """Return whether a pool of this machine has written a heartbeat lately, and the detail."""
    from app.heartbeat import HEARTBEAT_WITHIN, readable, this_machine
    from app.ledger.redis import for_command, server_time

    try:
        with for_command(loaded.redis_url.get_secret_value(), loaded.key_prefix) as redis:
            now = server_time(redis)
            values: Any = redis.hvals(redis.names.pools)
    except StoreUnavailable as error:
        return False, str(error)
    ours = [pool for pool in readable(values) if pool.machine == this_machine()]
    if not ours:
        return False, "no heartbeat from a worker pool of this machine"
    ages = [now - pool.at for pool in ours if not pool.is_of_dead_process()]
    if not ages:
        return False, "the worker pool of this machine has ended"
    age = max(0, min(ages))
    return age < HEARTBEAT_WITHIN, f"last heartbeat {age / 1000:.0f} s ago"
