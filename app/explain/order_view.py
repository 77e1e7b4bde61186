"""One order as people read it: its state, what is outstanding, its history, how long it took, what to do next."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

import msgspec

from app import times
from app.errors import NotKnown, UnreadableAnswer
from app.explain.mask import masked
from app.explain.order_history import Durations, Step, durations, steps
from app.explain.stores import Stores
from app.explain.words import breaker_words, many, sink_words
from app.heartbeat import Configuration
from app.ids import OrderKey
from app.ledger.history import LONGEST, DeliveryEnded, Entry
from app.ledger.policy import JOB_TIMEOUT, NO_ORDER_ANSWERED
from app.ledger.record import OrderRecord, SinkRecord, State
from app.ledger.rq_jobs import RESUME
from app.sink_settings import setting_of
from app.snapshot import Breaker, SinkSnapshot, Snapshot, SnapshotReader
from app.upstream.models import UNSETTLED, Item, Order

_OUTSTANDING: Final = {
    "erased": "it was erased on request: no content is kept, and new events do not fetch it",
    "dead": "the fetch is a dead letter: {0.dead}",
    "discarded": "the fetch was discarded by hand: {0.error}",
    "pending": "fetch queued",
    "fetching": "fetch running",
    "deferred": "fetch deferred",
}

NOT_FOUND: Final = (
    "Order {text!r} not found: no event for it was accepted, or ORDER_DAYS have passed.",
    "It may not be settled yet: its event arrives about a minute after createOrder.",
    (
        "Its event may be lost, or refused because of a wrong clientState. Fetch it through the Channel Manager's order"
        " list (this needs NP_PARTNER_ID): ota-receiver reconcile --from-zero --apply"
    ),
    "If no events arrive at all, check the subscription: ota-receiver check",
    "References of orders never fetched are searched among the newest orders only: give the orderId.",
)
"""What to do where there is no order that `text` names."""

_REFETCH: Final = "Then: ota-receiver orders refetch {id}"
_REQUEUE: Final = "Then: ota-receiver dead requeue {id}"

_UNSCHEDULED: Final = (
    "It has no time in {due}, or one days ahead, so no dispatcher sees it. A worker pool that runs finds it within"
    " the hour. At once: ota-receiver orders refetch {id}"
)

_SUSPENDED: Final = f"It will not be fetched or delivered: RQ is suspended. Its own command ends that: {RESUME}"
_NO_POOL: Final = "It will not be fetched or delivered: no worker pool runs. Start one: ota-receiver worker"

_DELIVERING: Final = (
    "Nothing: a delivery to {} has been running since {}. A sink that hangs is interrupted"
    f" {JOB_TIMEOUT} s after its job began, and called again later."
)
_BREAKER_OPEN: Final = "Nothing for this order alone: no order of its company is fetched. See: ota-receiver check"

_BY_STATE: Final = {
    "erased": "Nothing: it was erased on request, and is no longer fetched or delivered.",
    "dead": f"{{cause}}. {_REQUEUE}",
    "deferred": "Nothing for this order: its fetch is deferred ({cause}). See: ota-receiver check",
    "pending": "Nothing: it will be fetched{last_error}.",
    "fetching": "Nothing: it will be fetched{last_error}.",
    "deleted_upstream": "Nothing: it was deleted upstream.",
    "discarded": "Nothing: it was discarded by hand ({error}). To fetch it: ota-receiver orders refetch {id}",
}

_BY_STATUS: Final = dict.fromkeys(UNSETTLED, f"It is not settled. {_REFETCH}") | {
    "Issued": "Nothing: the tickets are here.",
    "Draft": (
        "When it is paid: ota-receiver orders confirm {id} --payment-reference REF."
        " If it will not be paid: ota-receiver orders cancel {id}"
    ),
    "Error": (
        "Read the status message. Then replace the order upstream (an event follows),"
        " or cancel it: ota-receiver orders cancel {id}"
    ),
    "Cancelled": "Nothing: it was cancelled.",
}

_BY_REASON: Final = {
    NO_ORDER_ANSWERED: (
        "Upstream has answered no order of this company for a day: see ota-receiver check."
        " It is requeued by itself when upstream answers one. Sooner: fix the cause"
    ),
    "order_missing": "Upstream does not have this order. If it should, ask NaviPartner",
    "kills_worker": "Fetching it crashed several workers: see pool.worker_died in the logs",
    "unsettled": "Upstream never finished it: check its job there",
    "bad_request": "Upstream answers 400: ask NaviPartner, with the order's id",
    "too_many_values": "Upstream's answer holds more than any order: ask NaviPartner, with the order's id",
    "unreadable_answer": "Upstream's answer is not an order: ask NaviPartner, with the order's id",
}


class Outstanding(msgspec.Struct, frozen=True):
    """Something that the order still lacks: a delivery to `sink`, else a fetch or its content.

    `next` is the next automatic attempt, None if there is none. `why` says what holds a delivery back, or that it runs;
    "" if neither.
    """

    what: str
    next: datetime | None
    sink: str = ""
    why: str = ""


UNREADABLE: Final = Outstanding("its content is unreadable", None)


class OrderView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one order.

    `order` is its latest content, masked unless it is revealed; None if it was never fetched or cannot be read.
    `sinks` are those that are to get it, also without any attempt. `history` is oldest first. `due` is the next
    automatic attempt. `breaker` is the open breaker that the order waits for, `breaker_words` the same for people. The
    order is `complete` when it is fetched and every sink has it. `next` is what a person should do.
    """

    record: OrderRecord
    order: Order | None
    sinks: tuple[SinkRecord, ...]
    breaker: Breaker | None
    breaker_words: str
    history: tuple[Entry, ...]
    company: str
    state: State
    status: str
    complete: bool
    references: tuple[str, ...]
    status_message: str
    content: str
    due: datetime | None
    outstanding: tuple[Outstanding, ...]
    next: str
    durations: Durations
    steps: tuple[Step, ...]
    older_steps_lost: bool

    def as_object(self) -> dict[str, Any]:
        """Return the view for machines: the record's fields, and what is derived from them."""
        derived = msgspec.structs.asdict(self)
        for name in ("record", "order", "sinks", "history", "breaker_words"):
            del derived[name]
        return msgspec.structs.asdict(self.record) | derived


def view_of(stores: Stores, key: OrderKey, *, reveal: bool = False) -> OrderView:
    """Return the view of an order; `reveal` leaves names, numbers and links in it. Raises NotKnown without a record."""
    record = stores.orders.record(key)
    if record is None:
        raise NotKnown(f"Order {key.order_id} has no record.")
    snapshot = SnapshotReader(stores.settings.companies).read(stores.redis)
    now = times.from_ms(snapshot.now)
    state, history = record.state(now), stores.orders.history(key)
    names, lost, name = stores.redis.names, stores.orders.unscheduled([key]).get(key, ()), stores.words_for(key)
    clocks = {"": names.due, **{sink: names.deliveries(sink) for sink in stores.sinks}}
    due = {sink: stores.orders.due(key, sink) for sink, clock in clocks.items() if clock not in lost}
    outstanding = tuple(_outstanding(record, state, due, stores.sinks))
    hindrances = [
        _UNSCHEDULED.format(id=name, due=clocks[one.sink]) if clocks.get(one.sink) in lost else why
        for one, why in zip(outstanding, _hindrances(snapshot, key.company_id, state, outstanding), strict=True)
    ]
    running = record.delivering(now)
    outstanding = tuple(
        _explained(one, why, snapshot.sinks.get(one.sink), running.get(one.sink), now)
        for one, why in zip(outstanding, hindrances, strict=True)
    )
    disabled = {name for name, one in snapshot.sinks.items() if one.disabled_at}
    # First what only a person ends.
    hindrances = [why for one, why in zip(outstanding, hindrances, strict=True) if one.sink in disabled] + hindrances
    try:
        order = stores.orders.order(key)
    except UnreadableAnswer:
        order, outstanding = None, (*outstanding, UNREADABLE)
    if order is not None and not reveal:
        order = masked(order)
    breaker = snapshot.breaker(key.company_id) if state in {"deferred", "pending"} else None
    held = _BREAKER_OPEN if breaker is not None else ""
    if running and state == "fetched" and not record.dead_sinks and all(one.next is None for one in outstanding):
        sink, since = min(running.items(), key=itemgetter(1))
        held = _DELIVERING.format(sink, times.short(since))
    return OrderView(
        record=record,
        order=order,
        sinks=tuple(_sinks(record, stores.sinks)) if record.revision else record.sinks,
        breaker=breaker,
        breaker_words=breaker_words(breaker, now) if breaker is not None else "",
        history=history,
        company=stores.slug(key.company_id),
        state=state,
        status=record.known_status,
        complete=not outstanding,
        references=(order.references if order else ()) or tuple(filter(None, [record.reference])),
        status_message=(order.status_message or "") if order else "",
        content=_content(record, UNREADABLE in outstanding),
        due=min(filter(None, due.values()), default=None),
        outstanding=outstanding,
        next=next(filter(None, hindrances), "") or held or next_step(record, state, name, outstanding),
        durations=durations(history),
        steps=steps(history),
        older_steps_lost=len(history) >= LONGEST,
    )


def _content(record: OrderRecord, is_unreadable: bool) -> str:
    """Return what is stored of the order, in words."""
    if record.erased_at:
        return "erased"
    if is_unreadable:
        return f"unreadable; revision {record.revision}"
    if not record.revision:
        return "never fetched"
    return f"{assets(record)}, {'a' if record.manifest else 'no'} manifest; revision {record.revision}"


def error_words(record: OrderRecord) -> str:
    """Return the latest error of the fetch with its counts, "" if there is none."""
    if not (record.error or record.dead):
        return ""
    counts = (
        (record.attempts, "attempt"),
        (record.rechecks, "recheck"),
        (record.deferrals, "deferral"),
        (record.crashes, "worker crash"),
    )
    parts = [record.dead or record.error, f"HTTP {record.http_status}" if record.http_status else ""]
    parts += [many(count, noun) for count, noun in counts if count]
    return ", ".join(filter(None, parts))


def sink_state(view: OrderView, sink: SinkRecord) -> str:
    """Return what a sink of the view has of the order, in words."""
    return _skip(view.history, sink) or _delivery(sink, view.record.revision)


def assets(record: OrderRecord) -> str:
    """Return how many wallets, tickets and coupons an order has, in words."""
    counts = ((record.wallets, "wallet"), (record.tickets, "ticket"), (record.coupons, "coupon"))
    return ", ".join(many(count, noun) for count, noun in counts)


def asset_rows(items: Sequence[Item]) -> Iterator[tuple[object, ...]]:
    """Return wallets, tickets and coupons as rows: line, visit, wallet, guest, asset, number, item, description."""
    for item in items:
        visit = " ".join(str(part) for part in (item.visit_date, item.visit_time) if part is not None)
        for wallet in item.wallets:
            number, link = wallet.wallet_reference_number, wallet.manifest_url
            yield (item.line_no, visit, wallet.external_reference_number, wallet.name, "wallet", number, "", link)
            for one in wallet.assets:
                yield ("", "", "", "", one.type, one.reference_number, one.item_number, one.description)


def _hindrances(snapshot: Snapshot, company_id: str, state: State, outstanding: tuple[Outstanding, ...]) -> list[str]:
    """Return for each why its planned attempt will not happen, and what to do; "" if it will, or if none is planned."""
    if state == "fetching" or all(one.next is None for one in outstanding):
        return [""] * len(outstanding)
    pools = [pool.configuration for pool in snapshot.running_pools().values()]
    hindrances = [_SUSPENDED if snapshot.suspended else _lacking(one, company_id, pools) for one in outstanding]
    for number, one in enumerate(outstanding):
        sink = snapshot.sinks.get(one.sink)
        if (
            sink is not None
            and not hindrances[number]
            and (held := sink_words(one.sink, sink, times.from_ms(snapshot.now)))
        ):
            hindrances[number] = f"Nothing for this order alone: {one.sink} is not called, {held}"
    return ["" if one.next is None else why for one, why in zip(outstanding, hindrances, strict=True)]


def _lacking(one: Outstanding, company_id: str, pools: Collection[Configuration]) -> str:
    """Return what no running pool has and this needs, "" if one has it."""
    if not pools:
        return _NO_POOL
    if one.sink and not any(one.sink in pool.sinks for pool in pools):
        return (
            f"No running pool has the sink {one.sink}. Add it to {setting_of(one.sink)} of a pool, and restart that"
            " pool. If it was removed on purpose, it is retired after a day."
        )
    if not one.sink and not any(company_id in pool.companies for pool in pools):
        return f"No running pool has the company {company_id}. Add it to the settings of a pool, and restart that pool."
    return ""


def _explained(
    one: Outstanding, hindrance: str, sink: SinkSnapshot | None, running_since: datetime | None, now: datetime
) -> Outstanding:
    """Return it with why it waits, and without the time of an attempt that will not be made then."""
    if one.next is None or sink is None:
        return msgspec.structs.replace(one, next=None) if hindrance else one
    if running_since is not None:
        return msgspec.structs.replace(one, next=None, why=f"running since {times.short(running_since)}")
    return msgspec.structs.replace(one, next=None if hindrance else one.next, why=sink_words(one.sink, sink, now))


def _outstanding(
    record: OrderRecord, state: State, due: Mapping[str, datetime | None], declared: tuple[str, ...]
) -> Iterator[Outstanding]:
    """Yield what is outstanding; `due`: when the fetch ("") and the delivery to each sink come next."""
    is_pending = state in {"pending", "fetching", "deferred"}
    if text := _OUTSTANDING.get(state):
        error = f" ({record.error})" if is_pending and record.error else ""
        yield Outstanding(f"{text.format(record)}{error}", due.get("") if is_pending else None)
    for sink in _sinks(record, declared) if state != "erased" else ():
        what = f"{sink.name}: {_delivery(sink, record.revision)}"
        if sink.dead or 0 < record.revision <= sink.discarded:
            yield Outstanding(what, None, sink.name)
        elif sink.revision < record.revision:
            yield Outstanding(what, due.get(sink.name), sink.name)


def _sinks(record: OrderRecord, declared: tuple[str, ...]) -> list[SinkRecord]:
    """Return the state of each declared sink that is to get the order, and of others that have a dead letter."""
    return [sink for sink in record.sinks if sink.name in declared or sink.dead]


def _skip(history: Sequence[Entry], sink: SinkRecord) -> str:
    """Return why a sink did not get the latest revision that it is done with, "" if it got it."""
    ended = (one for one in reversed(history) if isinstance(one, DeliveryEnded) and one.sink == sink.name)
    latest = next(ended, None)
    if latest is None or latest.outcome != "skipped" or latest.revision != sink.revision:
        return ""
    return f"revision {latest.revision} skipped: {latest.reason}"


def _delivery(sink: SinkRecord, revision: int) -> str:
    if sink.dead:
        return f"delivery of revision {revision} is a dead letter: {sink.error or sink.dead}"
    if 0 < revision <= sink.discarded:
        return f"delivery of revision {revision} was discarded by hand"
    if sink.revision >= revision:
        return f"has revision {sink.revision}"
    attempts = f" ({many(sink.attempts, 'attempt')})" if sink.attempts else ""
    error = f", {'postponed' if sink.postponed else 'failed'}: {sink.error}" if sink.error else ""
    return f"revision {revision} not delivered yet{error}{attempts}"


def next_step(record: OrderRecord, state: State, name: str, outstanding: tuple[Outstanding, ...]) -> str:
    """Return what a person should do about the order `name`, or that there is nothing to do."""
    cause = record.error or "busy"
    if state == "dead":
        cause = _BY_REASON.get(record.dead, f"Fix the cause ({record.dead})")
    if state in {"erased", "dead", "deferred", "pending", "fetching"}:
        # A running pool has the company by now: else that would be the hindrance.
        text = _BY_STATE["pending" if state == "deferred" and record.error == "unknown_company" else state]
    elif record.dead_sinks:
        sink = record.dead_sinks[0]
        cause = sink.error or sink.dead
        text = f"Fix the sink {sink.name} ({{cause}}). {_REQUEUE}"
        if cause.startswith("rejected: "):
            text = f"Fix the reason, in the order or in the sink {sink.name} ({{cause}}). {_REQUEUE}"
    elif UNREADABLE in outstanding:
        text = f"The stored content is unreadable. {_REFETCH}"
    else:
        unknown = f"Unknown status: check the order upstream. {_REFETCH}"
        text = _BY_STATE.get(state) or _BY_STATUS.get(record.status, unknown)
        if state == "fetched" and record.status == "Issued" and not record.manifest:
            text = "Nothing, if this partner has no design template: without one there is no manifest."
        attempts = [one.next for one in outstanding if one.next is not None]
        # "Nothing" alone would sound as if every sink had it.
        if text.startswith("Nothing") and attempts:
            at = times.short(min(attempts))
            if waiting := record.failing_sinks:
                failing = [f"Fix the sink {sink.name} ({sink.error})" for sink in waiting if not sink.postponed]
                what = failing[0] if failing else f"Nothing: the sink {waiting[0].name} asked for another time"
                return f"{what}. Delivery is attempted again at {at}. At once: ota-receiver dead requeue {name}"
            return f"Nothing: delivery is attempted at {at}."
        if text.startswith("Nothing") and outstanding and state != "discarded":
            sinks = " ".join(f"--to-sinks {one.sink}" for one in outstanding)
            text = f"No attempt is planned. To deliver it: ota-receiver events replay --order {{id}} {sinks}"
    last_error = f" (last error: {record.error})" if record.error else ""
    return text.format(id=name, cause=cause, error=record.error, last_error=last_error)
