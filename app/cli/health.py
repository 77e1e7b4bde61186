"""The command for HEALTHCHECK: does the process in this container do its work?"""

from __future__ import annotations

from http.client import HTTPConnection, HTTPException
from typing import Annotated, Final, Literal

import msgspec
import typer

from app import bootstrap, settings
from app.cli import console, context
from app.cli.console import FOUND, epilog
from app.ledger.redis import StoreUnavailable
from app.settings import Settings
from app.snapshot import read_heartbeat

Role = Literal["web", "worker"]

WEB_SECONDS: Final = 2.0
BEAT_SECONDS: Final = 15.0
"""A pool beats each second; in so many it has hung, or cannot reach Redis."""

_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  # nothing is bound here
_CODES = "Exit codes: 0 it works · 1 it does not · 2 wrong usage or settings"


class Pulse(msgspec.Struct, frozen=True):
    """What was found of one role."""

    role: Role
    healthy: bool
    detail: str


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog("ota-receiver health --role worker", codes=_CODES))(health)


def health(
    role: Annotated[Role | None, typer.Option(help="Only this one; else either will do.")] = None,
    as_json: context.Json = False,
) -> None:
    """Tell whether the web process or the worker pool of this machine (or container) is alive."""
    bootstrap.configure_cli_log()
    found = settings.load()
    pulses = []
    for name, look in (("web", _web), ("worker", _worker)):
        if role in (None, name):
            pulses.append(look(found))
            if pulses[-1].healthy:
                break
    for pulse in pulses:
        console.tell(f"{pulse.role}: {pulse.detail}", pulse, as_json)
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
    # Here, not above: RQ takes longer to load than the whole check of a web process.
    from workers.recovery import identity

    try:
        with bootstrap.books(found) as books:
            told = [census for text in books.pools.all() if (census := read_heartbeat(text)) is not None]
    except StoreUnavailable as away:
        return Pulse("worker", healthy=False, detail=str(away))
    here = identity().machine
    ages = [(bootstrap.clock() - census.beat) / 1000 for census in told if census.machine == here]
    if not ages:
        return Pulse("worker", healthy=False, detail="no pool of this machine has ever beaten")
    age = max(0.0, min(ages))
    return Pulse("worker", healthy=age < BEAT_SECONDS, detail=f"last heartbeat {age:.0f} s ago")
