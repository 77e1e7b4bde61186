"""What an order is without: a fetch, a hand-on to a sink, content that can be read; and when somebody looks again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

import msgspec

from app.cli import output
from app.store.record import OrderRecord, SinkRecord, State


class Lack(msgspec.Struct, frozen=True):
    """Something that an order is without: `next` is when somebody looks again, None if nobody does by itself."""

    what: str
    next: datetime | None


UNREADABLE: Final = Lack("its content is unreadable", None)


def lacks(record: OrderRecord, state: State, due: datetime | None, configured: tuple[str, ...]) -> Iterator[Lack]:
    """Return what the order is without; `due` is when it is looked at again, `configured` the sinks of the settings."""
    if state == "erased":
        yield Lack("it was erased on request: nothing of it is kept, and no new event fetches it", None)
        return
    if state == "dead":
        yield Lack(f"the fetch was given up: {record.dead}", None)
    elif state == "dropped":
        yield Lack(f"the fetch was given up for good, by hand: {record.error}", None)
    elif state in {"owed", "fetching", "parked"}:
        doing = {"owed": "a fetch is to come", "fetching": "is being fetched", "parked": "the connection is at fault"}
        trouble = f" ({record.error})" if record.error else ""
        yield Lack(f"{doing[state]}{trouble}", due)
    for sink in sinks(record, configured):
        yield from _of_sink(sink, record.revision, due)


def sinks(record: OrderRecord, configured: tuple[str, ...]) -> Iterator[SinkRecord]:
    """Return how far each sink is, also one that was never tried.

    One that the settings no longer name is owed nothing, unless it left a dead letter.
    """
    known = {sink.name: sink for sink in record.sinks}
    for name in dict.fromkeys([*configured, *known]):
        sink = known.get(name) or SinkRecord(name=name, revision=0, tries=0, next=None, dead="")
        if name in configured or sink.dead:
            yield sink


def _of_sink(sink: SinkRecord, revision: int, due: datetime | None) -> Iterator[Lack]:
    if sink.dead:
        yield Lack(f"{sink.name} gave up revision {revision}: {sink.dead}", None)
    elif sink.revision < revision:
        tried = f", tried {output.many(sink.tries, 'time')} so far" if sink.tries else ""
        yield Lack(f"{sink.name} has revision {sink.revision} of {revision}{tried}", sink.next or due)
    elif sink.dropped and sink.dropped >= revision:
        yield Lack(f"{sink.name} never had revision {revision}: given up for good, by hand", None)
