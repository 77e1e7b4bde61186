"""The commands for a laptop: demo, dev. The image has no `app.dev`, and so not these."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from app.cli.exits import FOUND, Stop, epilog
from app.errors import ReceiverError

_DEMO_CODES: Final = "Exit codes: 0 every order is complete · 1 one is not, or it could not be run"
_DEV_CODES: Final = "Exit codes: 0 told to stop · 1 it could not be run · 2 usage"


def register(cli: typer.Typer) -> None:
    """Add the commands where their parts are installed."""
    if find_spec("app.dev") is not None:
        cli.command(epilog=epilog("ota-receiver demo", codes=_DEMO_CODES))(demo)
        cli.command(
            epilog=epilog("ota-receiver dev --port 8090 --sinks python:mypackage.orders:on_order", codes=_DEV_CODES)
        )(dev)


def demo() -> None:
    """Drive sample orders through real processes and show what arrived; exits 0 only if all is complete.

    Needs no Redis and no account: an embedded Valkey and a simulated Channel Manager are started and stopped.
    """
    from app.dev import demo as script  # the arrow points down: only these commands know app.dev

    raise typer.Exit(0 if script.run(Console()) else 1)


def dev(
    port: Annotated[int, typer.Option(help="Port of the webhook on 127.0.0.1.")] = 8080,
    folder: Annotated[Path, typer.Option(help="Where data and logs are kept.")] = Path(".ota-receiver"),
    sinks: Annotated[str, typer.Option(help="SINKS of the workers: python:package.module:function.")] = "",
) -> None:
    """Run everything on a laptop until Ctrl-C: embedded Valkey, sandbox, web, workers.

    Orders created at the sandbox arrive here as they would in production; data is kept in FOLDER.
    """
    from app.dev import laptop  # the arrow points down

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    try:
        laptop.run(Console(), folder.resolve(), port, sinks)
    except KeyboardInterrupt:
        return
    except ReceiverError as error:
        raise Stop(str(error), FOUND) from None


def interrupt(*_: object) -> None:
    """Leave by way of all `with` blocks, whatever is being waited for; what follows must not disturb that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
