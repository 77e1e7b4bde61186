"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from app.cli import moment


def time(text: str) -> datetime:
    """Return the time that was typed, for an option's `parser`; raises BadParameter."""
    try:
        return moment.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would be done, and do nothing.")]
Company = Annotated[str | None, typer.Option("--company", "-c", help="Slug or GUID of the company.")]
Status = Annotated[str | None, typer.Option("--status", help="Issued, Draft, Error, ...")]
Limit = Annotated[int, typer.Option("--limit", "-l", min=1, help="At most so many.")]
Since = Annotated[datetime | None, typer.Option("--since", parser=time, metavar="TIME", help=moment.HINT)]
Until = Annotated[datetime | None, typer.Option("--until", parser=time, metavar="TIME", help=moment.HINT)]
