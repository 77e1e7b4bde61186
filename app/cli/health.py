"""The command for HEALTHCHECK: does the web process or the worker pool of this container work?

It runs every few seconds, so it loads little: what only one role needs is imported there.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
import typer

from app import settings
from app.cli import console
from app.cli.console import AWAY, DONE, FOUND, INTERRUPTED, NEWER, epilog
from app.errors import StoreUnavailable
from app.settings import Settings

Role = Literal["web", "worker"]

WEB_SECONDS: Final = 2.0

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here
_CODES: Final = {DONE: "healthy", FOUND: "not healthy", AWAY: "", NEWER: "", INTERRUPTED: ""}

cli = console.commands()


class RoleHealth(msgspec.Struct, frozen=True):
    role: Role
    healthy: bool
    detail: str


@cli.command(epilog=epilog("ota-receiver health --role worker", codes=_CODES))
def health(
    role: Annotated[
        Role | None, typer.Option(help="Check only this role; otherwise one healthy role is enough.")
    ] = None,
    # Not context.Json: that module loads everything a command may need.
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Check that the web process or the worker pool of this machine (or container) works."""
    loaded = settings.load()
    found: list[RoleHealth] = []
    for name, check in (("web", _web), ("worker", _worker)):
        if role in (None, name) and not (found and found[-1].healthy):
            found.append(check(loaded))
    for one in found:
        console.result(f"{one.role}: {one.detail}", one, as_json)
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
    from app.heartbeat import HEARTBEAT_WITHIN, readable, this_machine
    from app.ledger import keys
    from app.ledger.redis import for_command, server_time

    try:
        with for_command(loaded.redis_url.get_secret_value()) as redis:
            now = server_time(redis)
            values: Any = redis.hvals(keys.POOLS)
    except StoreUnavailable as error:
        return RoleHealth("worker", healthy=False, detail=str(error))
    ages = [now - pool.at for pool in readable(values) if pool.machine == this_machine()]
    if not ages:
        return RoleHealth("worker", healthy=False, detail="no heartbeat from a worker pool of this machine")
    age = max(0, min(ages))
    return RoleHealth("worker", healthy=age < HEARTBEAT_WITHIN, detail=f"last heartbeat {age / 1000:.0f} s ago")
