"""What to do next, in a sentence: for an order, by where it stands and why."""

from __future__ import annotations

from typing import Final

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


def next_step(record: OrderRecord, state: State) -> str:
    """Return what a person should do about an order, or that it is nothing."""
    if state == "erased":
        return "Nothing: it was erased on request, and is neither fetched nor handed on any more."
    if state == "dead":
        return f"{_BY_REASON.get(record.dead, f'Mend the cause ({record.dead})')}. {_then(record, 'dead requeue')}"
    if state == "parked":
        return f"Nothing for this order; the connection holds it up ({record.error or 'busy'}): ota-receiver check"
    if state in {"owed", "fetching"}:
        return "Nothing: it will be fetched" + (f", last trouble: {record.error}." if record.error else ".")
    if record.dead_sinks:
        return f"Mend the sink that gave it up ({record.dead_sinks[0].dead}). {_then(record, 'dead requeue')}"
    if state == "gone":
        return "Nothing: it was deleted upstream."
    if state == "dropped":
        again = f"a new event fetches it, or: ota-receiver orders refetch {record.order_id}"
        return f"Nothing: it was given up for good ({record.error}); {again}"
    if record.status == "Issued" and not record.manifest:
        return "Nothing, if this partner has no design template: that is why there is no manifest."
    if record.status in UNSETTLED:
        return f"It has not settled. {_then(record, 'orders refetch')}"
    told = _BY_STATUS.get(
        record.status, f"We do not know this status: look upstream. {_then(record, 'orders refetch')}"
    )
    return told.format(id=record.order_id)


def _then(record: OrderRecord, command: str) -> str:
    return f"Then: ota-receiver {command} {record.order_id}"
