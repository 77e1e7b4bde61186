"""The sinks of this process, from what is declared of them."""

from __future__ import annotations

from collections.abc import Iterable

from app.errors import SettingsError
from app.sink_settings import FilesSink, HttpsSink, ObjectSink, PythonSink, RedisStreamSink, SinkSettings, SqlSink
from workers.sinks.contract import Sink
from workers.sinks.python import Function


def build(declared: Iterable[SinkSettings]) -> dict[str, Sink]:
    """Return name -> sink; importing or checking what each needs, and opening nothing.

    Raises SettingsError, with every problem on its own line.
    """
    sinks: dict[str, Sink] = {}
    problems: list[str] = []
    for number, one in enumerate(declared, start=1):
        try:
            sinks[one.name] = _sink(one)
        except SettingsError as error:
            # An entry of SINKS is named by its place in the list: the value may hold a secret.
            place = f"SINKS: number {number}" if one.is_short else f"SINKS_FILE [sinks.{one.name}]:"
            problems.append(f"{place} {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return sinks


def _sink(declared: SinkSettings) -> Sink:
    """Return the sink; each kind is imported where one is declared, since some bring libraries of many MB."""
    match declared:
        case PythonSink(function=function):
            is_whole = declared.is_short or function.startswith(("entry:", "python:"))
            return Function(function if is_whole else f"python:{function}")
        case HttpsSink():
            from workers.sinks.https import Https

            return Https(declared)
        case SqlSink():
            from workers.sinks.sql import Tables

            return Tables(declared)
        case RedisStreamSink():
            from workers.sinks.redis_stream import RedisStream

            return RedisStream(declared)
        case FilesSink():
            from workers.sinks.files import Files

            return Files(declared)
        case ObjectSink():
            from workers.sinks.objects import Objects

            return Objects(declared)
    raise SettingsError(f"kind {declared.kind} is not available")
