"""What to do next, in a sentence: for an order, by where it stands and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from app.cli import moment
from app.cli.lacks import UNREADABLE, Lack
from app.store.record import OrderRecord, State
from app.upstream.order import UNSETTLED

_BY_STATUS: Final = {
    "Issued": "Nothing: the tickets are here.",
    "Draft": (
        "Once it is paid: ota-receiver orders confirm {id} --payment-reference REF."
        " If it will not be: ota-receiver orders cancel {id}"
    ),
    "Error": (
        "Read the status message, then replace the order upstream (an event follows),"
        " or: ota-receiver orders cancel {id}"
    ),
    "Cancelled": "Nothing: it was cancelled.",
}

_BY_REASON: Final = {
    "order_missing": "Upstream knows no such order. If it should, ask NaviPartner",
    "kills_worker": "Its fetch ended its workers: look at pool.worker_died in the logs",
    "unsettled": "Upstream never finished it: look for its job there",
    "bad_request": "Upstream answers 400: ask NaviPartner with the order's id",
    "unreadable_answer": "Upstream's answer is no order: ask NaviPartner with the order's id",
}


def next_step(record: OrderRecord, state: State, lacks: Sequence[Lack], name: str) -> str:
    """Return what a person should do about an order, or that it is nothing.

    `lacks` is what it is without, `name` what names it, and no other, on a command line (`Session.name`).
    """
    if state == "erased":
        return "Nothing: it was erased on request, and is neither fetched nor handed on any more."
    if state == "dead":
        return f"{_BY_REASON.get(record.dead, f'Mend the cause ({record.dead})')}. {_then('dead requeue', name)}"
    if state == "parked":
        return f"Nothing for this order; the connection holds it up ({record.error or 'busy'}): ota-receiver check"
    if state in {"owed", "fetching"}:
        return "Nothing: it will be fetched" + (f", last trouble: {record.error}." if record.error else ".")
    if record.dead_sinks:
        return f"Mend the sink that gave it up ({record.dead_sinks[0].dead}). {_then('dead requeue', name)}"
    if UNREADABLE in lacks:
        return f"What is kept of it is unreadable. {_then('orders refetch', name)}"
    told = _at_rest(record, state, name)
    # Whoever is told that there is nothing to do believes that all is done.
    return (_handed_on(lacks, state, name) or told) if told.startswith("Nothing") else told


def _at_rest(record: OrderRecord, state: State, name: str) -> str:
    if state == "gone":
        return "Nothing: it was deleted upstream."
    if state == "dropped":
        again = f"a new event fetches it, or: ota-receiver orders refetch {name}"
        return f"Nothing: it was given up for good ({record.error}); {again}"
    if record.status == "Issued" and not record.manifest:
        return "Nothing, if this partner has no design template: that is why there is no manifest."
    if record.status in UNSETTLED:
        return f"It has not settled. {_then('orders refetch', name)}"
    told = _BY_STATUS.get(record.status, f"We do not know this status: look upstream. {_then('orders refetch', name)}")
    return told.format(id=name)


def _handed_on(lacks: Sequence[Lack], state: State, name: str) -> str:
    times = [lack.next for lack in lacks if lack.next is not None]
    if times:
        return f"Nothing: it is handed on at {moment.short(min(times))}."
    if not lacks or state == "dropped":
        return ""
    return f"Nobody looks again by itself. To hand it on: ota-receiver events replay --order {name} --to-sinks"


def _then(command: str, name: str) -> str:
    return f"Then: ota-receiver {command} {name}"
