"""The tree of commands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from app.cli import audit, check, dead, dev, events, health, orders, reconcile, replay, serve, status, subscription
from app.cli.console import epilog

cli = typer.Typer(
    name="ota-receiver",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    epilog=epilog("ota-receiver orders explain CM-4711"),
    help="Receives NaviPartner OTA Channel Manager webhooks, fetches each settled order once, and loses none.",
)


@cli.callback()
def _main(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        typer.echo(version("ota-receiver"))
        raise typer.Exit


for group in (serve, dev, check, health, status, events, orders, dead, replay, audit, subscription, reconcile):
    group.register(cli)
