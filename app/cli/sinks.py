"""The commands for sinks: migrate creates and upgrades the tables of the kind sql; enable and disable."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from app import settings
from app.cli import console, context
from app.cli.command import FOUND, NO_REDIS, Stop, command, commands, flags
from app.cli.context import open_context
from app.sink_settings import SqlSink

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the sink, as `status` shows it.")]

cli = commands(name="sinks", help="Sinks: where fetched orders are delivered.")


@command(cli, "ota-receiver sinks migrate warehouse --dry-run", options="dry_run", codes=NO_REDIS)
def migrate(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this sink.")] = None) -> None:
    """Create or upgrade the tables of the sql sinks.

    Tables that are up to date stay as they are, so it may run before each start. --dry-run prints the SQL, for somebody
    who may create tables where the user of the sink may not.
    """
    from workers.sinks.build import build  # here: of app only the CLI may import workers
    from workers.sinks.contract import Failed

    declared = [one for one in settings.load().declared_sinks if isinstance(one, SqlSink)]
    chosen = [one for one in declared if name in (None, one.name)]
    if not chosen:
        names = ", ".join(one.name for one in declared) or "none"
        raise Stop(f"SINKS_FILE has no such sink of kind sql. There are: {names}.", FOUND)
    sinks = build(chosen)
    from workers.sinks.sql import Tables  # here: it loads SQLAlchemy

    for sink, tables in sinks.items():
        assert isinstance(tables, Tables)
        try:
            with closing(tables):
                if flags().dry_run:
                    sql = tables.statements()
                    lines = [f"-- {sink}{'' if sql else ': up to date'}"]
                    lines += [line for one in sql for line in f"{one};".splitlines()]
                    console.result(lines, {"sink": sink, "statements": sql})
                    continue
                before, after = tables.migrate()
        except Failed as error:
            raise Stop(f"{sink}: {error.reason}.", FOUND) from None
        done = "up to date" if before == after else f"upgraded from version {before}" if before else "created"
        console.result(f"{sink}: tables {done}, version {after}.", {"sink": sink, "before": before, "version": after})


@command(cli, "ota-receiver sinks disable shop --why 'the shop moves'", options="who why")
def disable(name: Name) -> None:
    """Deliver nothing to a sink until it is enabled. Its orders are fetched and wait; no attempt is used."""
    with open_context() as here:
        if name not in here.sinks:
            raise here.no_sink(name, FOUND)
        context.note(here.redis, "sink-disable", name)
        if not here.deployment.disable(name, "by hand"):
            raise Stop(f"{name} is disabled already.", FOUND)
    console.result(f"{name} is disabled. To go on: ota-receiver sinks enable {name}", {"sink": name, "enabled": False})


@command(cli, "ota-receiver sinks enable shop --why 'it takes orders again'", options="who why")
def enable(name: Name) -> None:
    """Deliver to a disabled sink again. What waits is due at once: the latest revision of each order."""
    with open_context() as here:
        if name not in here.sinks:
            raise here.no_sink(name, FOUND)
        context.note(here.redis, "sink-enable", name)
        if not here.deployment.enable(name):
            raise Stop(f"{name} is not disabled.", FOUND)
    console.result(f"{name} is enabled.", {"sink": name, "enabled": True})
