"""The command for HEALTHCHECK: does the process in this container do its work?"""

from __future__ import annotations

from http.client import HTTPConnection, HTTPException
from typing import Annotated, Final, Literal

import msgspec
import typer

from app import settings
from app.cli import console
from app.cli.console import AWAY, DONE, FOUND, INTERRUPTED, NEWER, epilog
from app.errors import StoreUnavailable
from app.settings import Settings

Role = Literal["web", "worker"]

WEB_SECONDS: Final = 2.0
BEAT_SECONDS: Final = 15.0
"""A pool beats each second; in so many it has hung, or cannot reach Redis."""

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here
_CODES: Final = {DONE: "healthy", FOUND: "not healthy", AWAY: "", NEWER: "", INTERRUPTED: ""}


cli = console.commands()


class Pulse(msgspec.Struct, frozen=True):
    """What was found of one role."""

    role: Role
    healthy: bool
    detail: str


@cli.command(epilog=epilog("ota-receiver health --role worker", codes=_CODES))
def health(
    role: Annotated[Role | None, typer.Option(help="Only this one; else either will do.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Check that the web process or the worker pool of this machine (or container) works."""
    found = settings.load()
    pulses = []
    for name, look in (("web", _web), ("worker", _worker)):
        if role in (None, name):
            pulses.append(look(found))
            if pulses[-1].healthy:
                break
    for pulse in pulses:
        console.result(f"{pulse.role}: {pulse.detail}", pulse, as_json)
    if not pulses[-1].healthy:
        raise typer.Exit(FOUND)


def _web(found: Settings) -> Pulse:
    # The standard library's client: no proxy of the environment comes between us and our own process.
    connection = HTTPConnection(_ANY_ADDRESS.get(found.host, found.host), found.port, timeout=WEB_SECONDS)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return Pulse("web", healthy=False, detail=f"no answer on port {found.port} ({type(error).__name__})")
    finally:
        connection.close()
    return Pulse("web", healthy=status == 200, detail=f"/healthz answers {status}")


def _worker(found: Settings) -> Pulse:
    # Here, not above: these load longer than the whole check of a web process takes.
    from app import bootstrap
    from app.ledger.redis import server_time
    from app.snapshot import read_heartbeats
    from workers.recovery import identity

    try:
        with bootstrap.command_redis(found) as redis:
            now = server_time(redis)
            pools = read_heartbeats(redis)
    except StoreUnavailable as away:
        return Pulse("worker", healthy=False, detail=str(away))
    here = identity().machine
    ages = [(now - pool.at) / 1000 for pool in pools if pool.machine == here]
    if not ages:
        return Pulse("worker", healthy=False, detail="no heartbeat from a worker pool of this machine")
    age = max(0.0, min(ages))
    return Pulse("worker", healthy=age < BEAT_SECONDS, detail=f"last heartbeat {age:.0f} s ago")
