"""A new secret on disk: readable by its owner alone, whole or not at all, and never in the place of one in use."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from app.cli.exits import Stop


def check(path: Path, in_use: Iterable[SecretStr | None], yes: bool) -> None:
    """Raise Stop if `path` must not be written: it is there and `yes` is not said, or it holds a secret in use."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise Stop(f"{path} is there and is no file.")
    if not yes:
        raise Stop(f"{path} is there already: name another, or overwrite it with --yes.")
    try:
        held = path.read_bytes().strip()
    except OSError as error:
        raise Stop(f"{path} cannot be read ({type(error).__name__}).") from None
    if any(one is not None and one.get_secret_value().encode() == held for one in in_use):
        raise Stop(f"{path} holds a clientState in use, which is needed until the rotation is over: name another.")


def write(path: Path, secret: SecretStr) -> None:
    """Put `secret` into `path` with mode 0600, in one step, in the place of what may be there; raises Stop."""
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(secret.get_secret_value() + "\n")
                file.flush()
                os.fsync(number)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise Stop(f"{path} cannot be written ({type(error).__name__}).") from None
