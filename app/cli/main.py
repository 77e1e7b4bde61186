"""The entry point `ota-receiver`: every error that a person can cause ends in one sentence and an exit code."""

from __future__ import annotations

import sys

from app.cli.console import AWAY, FOUND, INTERRUPTED, NEWER, USAGE, Stop
from app.errors import SettingsError
from app.ledger.redis import NewerData, StoreUnavailable


def main() -> None:
    """Run `ota-receiver`; a user's mistake ends in one clear line and an exit code (exits.py), never in a traceback."""
    try:
        from app.cli.commands import cli  # here, so that Ctrl-C while it loads ends as quietly as later

        cli()
    except SettingsError as error:
        lines = [f"  {line}" for line in str(error).splitlines()]
        _end("\n".join(["The settings are incomplete or wrong:", *lines]), USAGE)
    except NewerData as newer:
        _end(str(newer), NEWER)
    except StoreUnavailable as away:
        _end(str(away), AWAY)
    except Stop as stop:
        _end(str(stop), stop.code)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if not _stdout_fails():
            raise
        _end(f"The output cannot be written: {error.strerror}.", FOUND)


def _stdout_fails() -> bool:
    """Tell whether what was printed can still not be written; then it is given up."""
    try:
        sys.stdout.flush()
    except OSError:
        from app.cli import console  # it loads rich: only here, see above

        console.close()
        return True
    return False


def _end(text: str, code: int) -> None:
    print(text, file=sys.stderr)  # noqa: T201  # stderr is ours here, no logs are set up
    raise SystemExit(code) from None
