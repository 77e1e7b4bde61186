"""The receivers of fetched orders, as listed in SINKS; one file for each kind."""

from __future__ import annotations

from collections.abc import Iterable

from app.errors import SettingsError
from workers.sinks.protocol import Context, Sink
from workers.sinks.python import PythonSink

__all__ = ["Context", "Sink", "build"]


def build(specifications: Iterable[str]) -> dict[str, Sink]:
    """Return name -> sink for specifications such as `python:mypackage.orders:on_order`.

    Raises SettingsError, with every problem on its own line, for an unknown kind or a function that cannot be used.
    """
    sinks: dict[str, Sink] = {}
    problems: list[str] = []
    for number, specification in enumerate(specifications, start=1):
        kind, _, target = specification.partition(":")
        try:
            if kind != "python":
                raise SettingsError("is not of the form python:package.module:function")
            sinks[specification] = PythonSink(target)
        except SettingsError as error:
            # Named by its place in the list: the value may hold a secret.
            problems.append(f"SINKS: number {number} {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return sinks
