"""The tree of commands."""

from __future__ import annotations

import typer

from app.cli import check, dead, events, health, laptop, orders, service
from app.cli.exits import CODES

cli = typer.Typer(
    name="ota-receiver",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=CODES,
    help="Receives NaviPartner OTA Channel Manager webhooks, fetches each settled order once, and loses none.",
)
for group in (service, laptop, check, health, events, orders, dead):
    group.register(cli)
