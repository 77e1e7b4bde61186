"""The dead letters that a command is about: those of orders that were named, or a selection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from app.cli import deeds, output
from app.cli.exits import FOUND, Stop
from app.cli.session import Session
from app.store.dead_letters import RECORD_GONE, DeadLetter, DeadQuery
from app.store.keys import OrderKey


@dataclass(frozen=True)
class Letters:
    """Read anew each time: there may be hundreds of thousands. `gone` of the named orders have no dead letter."""

    here: Session
    query: DeadQuery
    orders: tuple[OrderKey, ...]
    gone: int

    def __iter__(self) -> Iterator[DeadLetter]:
        if not self.orders:
            return self.here.books.dead.oldest_first(self.query)
        return filter(self.query.matches, chain.from_iterable(map(self.here.books.dead.of, self.orders)))

    def words(self) -> str:
        """Return the selection on one line, for the audit."""
        if self.orders:
            return deeds.about(self.orders)
        query = self.query
        named = {"company": query.company_id, "reason": query.reason, "until": query.until}
        return " ".join(
            f"{name}={value if isinstance(value, str) else value.isoformat(timespec='seconds')}"
            for name, value in named.items()
            if value is not None
        )

    def count(self) -> tuple[int, int]:
        """Return how many have their record, and how many have lost it."""
        return _count(output.counted(self, "reading dead letters"))


def chosen(here: Session, named: list[str], query: DeadQuery) -> Letters:
    """Return the letters of the orders that are named, or if none is, those that match.

    What is no dead letter (any more) is told, counted, and stops nothing. Raises Stop when none of them is one.
    """
    found: list[OrderKey] = []
    for text in named:
        try:
            order = here.order(text, query.company_id)
        except Stop as stop:
            if stop.code != FOUND:
                raise
        else:
            if here.books.dead.of(order):
                found.append(order)
                continue
            if here.books.erasure.erased_among([order]):
                output.remark(f"{text!r} was erased: it is not fetched any more.")
                continue
        output.remark(f"{text!r} is no dead letter.")
    if named and not found:
        raise Stop("No dead letter matches.", FOUND)
    return Letters(here, query, tuple(dict.fromkeys(found)), len(named) - len(found))


def _count(letters: Iterable[DeadLetter]) -> tuple[int, int]:
    count = stale = 0
    for letter in letters:
        if letter.reason == RECORD_GONE:
            stale += 1
        else:
            count += 1
    return count, stale
