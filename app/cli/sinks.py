"""The commands for sinks: migrate, which creates and upgrades the tables of the kind sql."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from app import settings
from app.cli import console
from app.cli.command import FOUND, NO_REDIS, Stop, command, commands, flags
from app.sink_settings import SqlSink

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
