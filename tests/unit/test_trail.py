"""The trail is read as the scripts write it, and a line of another version hides no other."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from app.cli.order_view import sentence
from app.ledger.history import (
    Begun,
    Dropped,
    Entry,
    Failed,
    GaveUp,
    HandedOn,
    Heard,
    Refused,
    Rehanded,
    Repeated,
    Revived,
    Stored,
    Unread,
    Wanted,
    parse_line,
)

AT = datetime(2026, 6, 1, 8, 15, 2, 417000, tzinfo=UTC)
MS = 1780301702417

LINES: dict[str, Entry] = {
    "event 1780301702417-0 Issued queued current 4f2a": Heard(
        AT, "1780301702417-0", "Issued", "queued", "current", "4f2a"
    ),
    "duplicate Draft previous 4f2b": Repeated(AT, "Draft", "previous", "4f2b"),
    "wanted replay backfill": Wanted(AT, "replay", "backfill"),
    "begin 2 3 pool-live-1": Begun(AT, 2, 3, "pool-live-1"),
    "stored 3 Issued 2 200 84": Stored(AT, 3, "Issued", 2, 200, 84),
    "stored 3 Put on Hold 2 200 84": Stored(AT, 3, "Put on Hold", 2, 200, 84),
    "refused 3": Refused(AT, 3),
    "again 3 network - 20000": Failed(AT, "again", 3, "network", None, 20000),
    "park 3 throttled 429 12": Failed(AT, "park", 3, "throttled", 429, 12),
    "missing 3 order_not_found 404 12": Failed(AT, "missing", 3, "order_not_found", 404, 12),
    "dead 3 order_missing 404 12": Failed(AT, "dead", 3, "order_missing", 404, 12),
    "gone 3 order_not_found 404 12": Failed(AT, "gone", 3, "order_not_found", 404, 12),
    "dead unsettled": GaveUp(AT, "unsettled"),
    "sink python:shop:take 2 done - 7": HandedOn(AT, "python:shop:take", 2, "done", "", 7),
    "sink python:shop:take 2 again ValueError 7": HandedOn(AT, "python:shop:take", 2, "again", "ValueError", 7),
    "revived python:shop:take": Revived(AT, "python:shop:take"),
    "dropped order_missing": Dropped(AT, "order_missing", ""),
    "dropped KeyError python:shop:take": Dropped(AT, "KeyError", "python:shop:take"),
    "rehand k7m2qx python:shop:take": Rehanded(AT, "k7m2qx", "python:shop:take"),
}


@pytest.mark.parametrize("line", LINES)
def test_each_line_that_a_script_writes_is_a_typed_entry(line: str) -> None:
    assert parse_line(f"{MS} {line}") == LINES[line]


@pytest.mark.parametrize("line", LINES)
def test_each_entry_has_a_sentence_for_people(line: str) -> None:
    assert len(sentence(LINES[line])) > 10


@pytest.mark.parametrize("rest", ["", "teleported 3", "begin one two three", "stored 3 Issued", "event x"])
def test_a_line_that_no_script_of_this_version_writes_keeps_its_text_and_time(rest: str) -> None:
    assert parse_line(f"{MS} {rest}") == Unread(AT, rest)


@pytest.mark.parametrize("line", ["", "no time here", "²² begin 1 1 w"])
def test_a_line_without_a_time_is_kept_whole(line: str) -> None:
    assert parse_line(line) == Unread(datetime(1970, 1, 1, tzinfo=UTC), line)
