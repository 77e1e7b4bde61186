"""A short way to write down a history in a test: ms after the start, and the words of an entry."""

from __future__ import annotations

import msgspec

from app.ledger.history import Entry, parse_entry

MS = 1780301702417


def history(*told: tuple[int, str]) -> tuple[Entry, ...]:
    """Return the entries of `(ms, "kind value value")`; `-` stands for a text that is empty."""
    return tuple(_entry(MS + after, line.split(" ")) for after, line in told)


def _entry(at: int, words: list[str]) -> Entry:
    kind, *values = words
    read = [value if kind in {"event", "duplicate"} or not value.isdecimal() else int(value) for value in values]
    return parse_entry(msgspec.msgpack.encode([kind, at, *("" if value == "-" else value for value in read)]))
