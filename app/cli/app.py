"""The tree of commands."""

from __future__ import annotations

import typer

from app.cli import laptop, service

cli = typer.Typer(
    name="ota-receiver",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Receives NaviPartner OTA Channel Manager webhooks, fetches each settled order once, and loses none.",
)
for group in (service, check, health, events, orders, dead):
    group.register(cli)
laptop.register(cli)
