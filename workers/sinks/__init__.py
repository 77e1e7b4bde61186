"""Where a fetched order goes after the ledger; SINKS lists the sinks, one file a kind."""

from __future__ import annotations

from collections.abc import Iterable

from app.errors import SettingsError
from workers.sinks.protocol import Context, Sink
from workers.sinks.python import PythonSink

__all__ = ["Context", "Sink", "build"]


def build(specifications: Iterable[str]) -> dict[str, Sink]:
    """Return name -> sink for specifications such as `python:mypackage.orders:on_order`.

    Raises SettingsError for an unknown kind or a function that cannot be imported.
    """
    sinks: dict[str, Sink] = {}
    for specification in specifications:
        kind, _, target = specification.partition(":")
        if kind != "python" or not target:
            raise SettingsError(f"SINKS: {specification!r} is not of the form python:package.module:function")
        sinks[specification] = PythonSink(target)
    return sinks
