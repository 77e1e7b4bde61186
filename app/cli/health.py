"""The command for HEALTHCHECK: does the web process or the worker pool of this container work?

It runs every few seconds, so it loads little: what only one role needs is imported there.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
import typer

from app import settings
from app.cli import console
from app.cli.command import DONE, FOUND, NO_REDIS, command, commands
from app.errors import StoreUnavailable
from app.settings import Settings

Role = Literal["web", "worker"]

WEB_SECONDS: Final = 2.0
HEARTBEAT_SECONDS: Final = 15.0
"""A pool writes a heartbeat each second. After so many without one it hangs, or cannot reach Redis."""

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here
_CODES: Final = NO_REDIS | {DONE: "healthy", FOUND: "not healthy"}

cli = commands()


class RoleHealth(msgspec.Struct, frozen=True):
    role: Role
    healthy: bool
    detail: str


@command(cli, "ota-receiver health --role worker", codes=_CODES)
def health(
    role: Annotated[
        Role | None, typer.Option(help="Check only this role; otherwise one healthy role is enough.")
    ] = None,
) -> None:
    """Check that the web process or the worker pool of this machine (or container) works."""
    loaded = settings.load()
    found: list[RoleHealth] = []
    for name, check in (("web", _web), ("worker", _worker)):
        if role in (None, name) and not (found and found[-1].healthy):
            found.append(check(loaded))
    for one in found:
        console.result(f"{one.role}: {one.detail}", one)
    if not found[-1].healthy:
        raise typer.Exit(FOUND)


def _web(loaded: Settings) -> RoleHealth:
    # The standard library's client ignores the proxies of the environment.
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection(_ANY_ADDRESS.get(loaded.host, loaded.host), loaded.port, timeout=WEB_SECONDS)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return RoleHealth("web", healthy=False, detail=f"no answer on port {loaded.port} ({type(error).__name__})")
    finally:
        connection.close()
    return RoleHealth("web", healthy=status == 200, detail=f"/healthz answers {status}")


def _worker(loaded: Settings) -> RoleHealth:
    from app.identity import identity
    from app.ledger.redis import for_command, server_time
    from app.snapshot import read_heartbeats

    try:
        with for_command(loaded.redis_url.get_secret_value()) as redis:
            now = server_time(redis)
            pools = read_heartbeats(redis)
    except StoreUnavailable as error:
        return RoleHealth("worker", healthy=False, detail=str(error))
    machine = identity().machine
    ages = [(now - pool.at) / 1000 for pool in pools if pool.machine == machine]
    if not ages:
        return RoleHealth("worker", healthy=False, detail="no heartbeat from a worker pool of this machine")
    age = max(0.0, min(ages))
    return RoleHealth("worker", healthy=age < HEARTBEAT_SECONDS, detail=f"last heartbeat {age:.0f} s ago")
