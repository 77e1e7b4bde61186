"""What to do next, in a sentence: for an order, by where it stands and why."""

from __future__ import annotations

from typing import Final

from app.store.record import OrderRecord, State

_BY_STATUS: Final = {
    "Issued": "Nothing: the tickets are here.",
    "Draft": "Confirm the payment upstream (confirmOrder); no event tells of that, so then: orders refetch {id}",
    "Error": "Read the status message, then replace or delete the order upstream; an event follows a replacement.",
    "Cancelled": "Nothing: it was cancelled.",
}

_BY_REASON: Final = {
    "order_missing": "Upstream knows no such order. If it should: ask NaviPartner, then: dead requeue {id}",
    "kills_worker": "Its fetch ended its workers. Look at pool.worker_died in the logs, then: dead requeue {id}",
    "unsettled": "Upstream never finished it. Look for its job there, then: dead requeue {id}",
    "bad_request": "Upstream answers 400. Ask NaviPartner with the order's id, then: dead requeue {id}",
    "unreadable_answer": "Upstream's answer is no order. Ask NaviPartner with its id, then: dead requeue {id}",
}


def next_step(record: OrderRecord, state: State) -> str:
    """Return what a person should do about an order, or that it is nothing."""
    if state == "dead":
        known = _BY_REASON.get(record.dead, "Mend the cause ({reason}), then: dead requeue {id}")
        return known.format(id=record.order_id, reason=record.dead)
    if state == "parked":
        return f"Nothing for this order; the connection holds it up ({record.error or 'busy'}): check"
    if state in {"owed", "fetching"}:
        return "Nothing: it will be fetched" + (f", last trouble: {record.error}." if record.error else ".")
    if record.dead_sinks:
        return f"A sink gave it up ({record.dead_sinks[0].dead}). Mend the sink, then: dead requeue {record.order_id}"
    if state == "gone":
        return "Nothing: it was deleted upstream."
    if record.status == "Issued" and not record.manifest:
        return "Nothing, if this partner has no design template: that is why there is no manifest."
    return _BY_STATUS.get(record.status, "Nothing is known of this status.").format(id=record.order_id)
