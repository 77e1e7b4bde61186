"""What must hold after every single step, by what the ledger itself says of its orders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.ids import OrderKey
from tests.integration.ledger_model.wire import Wire

NO_KEY, NO_END, WILL_END = -2, -1, 1


class Row(NamedTuple):
    """One order as the ledger has it; `record`, `history`, `content`: NO_KEY, NO_END or WILL_END."""

    generation: int
    started: int
    fetched: int
    token: int
    stored: int
    revision: int
    digest: str
    dead: str
    delivered: int
    sink_dead: str
    due: int | None
    died: int | None
    record: int
    history: int
    content: int

    @property
    def fetch_is_pending(self) -> bool:
        return self.fetched < self.generation

    def delivery_is_pending(self, sinks: Sequence[str]) -> bool:
        return bool(sinks) and not self.sink_dead and self.delivered < self.revision

    @property
    def will_end(self) -> bool:
        """Tell whether every key of the order has an end."""
        return self.record == self.history == WILL_END and self.content in (WILL_END, NO_KEY)

    def is_pending(self, sinks: Sequence[str]) -> bool:
        """Tell whether anything is owed, be it given up for now."""
        return self.fetch_is_pending or (bool(sinks) and (self.delivery_is_pending(sinks) or bool(self.sink_dead)))


NOTHING = Row(0, 0, 0, 0, 0, 0, "", "", 0, "", None, None, NO_KEY, NO_KEY, NO_KEY)
_SNAPSHOT = Path(__file__).with_name("snapshot.lua")


class Snapshots:
    """The rows of some orders as they stand after each script, without a round trip of their own."""

    def __init__(self, wire: Wire, orders: Sequence[OrderKey], sinks: Sequence[str]) -> None:
        self._wire, self._orders = wire, tuple(orders)
        sha = wire.execute_command("SCRIPT LOAD", _SNAPSHOT.read_text(encoding="utf-8")).decode()
        wire.follow("EVALSHA", sha, 0, sinks[0] if sinks else "none", *(order.member for order in orders))

    def latest(self) -> dict[OrderKey, Row]:
        return {order: _row(values) for order, values in zip(self._orders, self._wire.followed, strict=True)}


class Audit:
    """Compares what is with what was."""

    def __init__(self, snapshots: Snapshots, orders: Iterable[OrderKey], sinks: Sequence[str]) -> None:
        self._snapshots = snapshots
        self._sinks = tuple(sinks)
        self.rows = dict.fromkeys(orders, NOTHING)

    def look(self, touched: Iterable[OrderKey]) -> None:
        """Raise AssertionError if a step that was about `touched` broke a promise, or changed another order."""
        now = self._snapshots.latest()
        for order, row in now.items():
            was = self.rows[order]
            if row != was:
                assert order in touched, f"{order.member} was changed by a step about another order"
                self._check(was, row)
        self.rows = now

    def _check(self, was: Row, row: Row) -> None:
        assert row.fetched <= row.started <= row.generation, row
        assert row.stored <= row.token, row
        for name in ("generation", "started", "fetched", "token", "stored", "revision", "delivered"):
            assert getattr(row, name) >= getattr(was, name), f"{name} fell: {was} -> {row}"
        assert (row.revision > was.revision) == (row.digest != was.digest), f"{was} -> {row}"
        assert row.revision <= was.revision + 1, f"{was} -> {row}"
        assert bool(row.dead) == (row.died is not None), f"the list of the dead says otherwise: {row}"
        assert not row.dead or row.fetch_is_pending, f"dead, and nothing is owed: {row}"
        if (row.fetch_is_pending and not row.dead) or row.delivery_is_pending(self._sinks):
            assert row.due is not None, f"owed, and nobody will look: {row}"
        if row.is_pending(self._sinks):
            assert WILL_END not in (row.record, row.history, row.content), f"owed, and will end: {row}"


def _row(values: list[Any]) -> Row:
    generation, started, fetched, token, stored, revision = (int(value or 0) for value in values[:6])
    digest, dead, delivered, sink_dead, due, died, record, history, content = values[6:]
    return Row(
        generation,
        started,
        fetched,
        token,
        stored,
        revision,
        (digest or b"").decode(),
        (dead or b"").decode(),
        int(delivered or 0),
        (sink_dead or b"").decode(),
        _score(due),
        _score(died),
        record,
        history,
        content,
    )


def _score(value: bytes | None) -> int | None:
    return None if value is None else int(float(value))
