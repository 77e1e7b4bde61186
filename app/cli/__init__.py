"""The command line, one file per command group; thin: parts come from bootstrap."""

from __future__ import annotations

import sys

from app.cli.app import cli
from app.errors import SettingsError


def main() -> None:
    """Run `ota-receiver`; a user's mistake ends in one clear line and exit code 2, never in a traceback."""
    try:
        cli()
    except SettingsError as error:
        print("The settings are incomplete or wrong:", file=sys.stderr)  # noqa: T201  # no logs are set up yet
        for line in str(error).splitlines():
            print(f"  {line}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
