"""After the storm: every event and every order is asked for, in the ledger, at the sink and at the Channel Manager."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from app.ids import OrderKey
from app.ledger import keys
from app.ledger.events import EventLog, EventQuery, StoredEvent
from app.ledger.history import Begun, Entry, Heard, Stored
from app.ledger.orders import Archive, OrderRecord
from tests.acceptance.strangers import System, ask
from tests.chaos.plan import Event, Plan

_PAGE = 500
_TRAIL_SHOWN = 15

Name = tuple[str, str, str]
"""An event: order id, status, timestamp."""


@dataclass
class Audit:
    """What was found. `faults` says of an order (or event) what is wrong; empty: nothing is."""

    recorded: int = 0
    orders: int = 0
    complete: int = 0
    delivered: int = 0
    deliveries: int = 0
    good_answers: int = 0
    surplus: int = 0
    slowest: float = 0.0
    slowest_order: str = ""
    injected: dict[str, int] = field(default_factory=dict)
    throttled: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def audit(system: System, plan: Plan, redis: Redis, sent: Mapping[Event, float], sink: Path) -> Audit:
    """Ask for everything; `sent` are the events with the Unix second at which each was first sent."""
    found = Audit(orders=sum(map(len, plan.orders.values())))
    settlements: defaultdict[str, list[Event]] = defaultdict(list)
    for event in plan.events:
        settlements[event.order_id].append(event)
    rows = {row["order_id"]: row for row in system.admin("GET", "orders")}
    found.injected, found.throttled = _injected(system)
    # From here on the Channel Manager answers us: what it has counted has been read.
    system.admin("DELETE", "faults")

    stream = list(EventLog(redis).oldest_first(EventQuery()))
    _count_events(found, plan, stream)
    archive = Archive(redis)
    records = dict(_records(archive, system.company_id, list(settlements)))
    handed = _handed(sink)
    moments = {(event.order_id, event.status, event.timestamp): at for event, at in sent.items()}
    names = {event.id: (event.order_id, event.status, event.sent) for event in stream}
    for order_id, events in settlements.items():
        key, record, row = OrderKey(system.company_id, order_id), records[order_id], rows[order_id]
        wrong = [*_not_home(record), *_not_handed(handed.get(order_id, []), record)]
        if len(events) > 1 and not wrong and not _same_content(system, archive, key):
            wrong.append("the ledger holds an older settlement")
        if wrong:
            found.faults[order_id] += wrong
        found.complete += not wrong
        found.deliveries += len(handed.get(order_id, []))
        found.delivered += bool(handed.get(order_id))
        found.good_answers += row["answered"]
        found.surplus += max(0, row["answered"] - len(events))
        slowest = max(_waits(archive.trail(key), names, moments), default=0.0)
        if slowest > found.slowest:
            found.slowest, found.slowest_order = slowest, order_id
    return found


def story(redis: Redis, order: OrderKey) -> Iterator[str]:
    """Return what the ledger knows of an order, line by line."""
    answer: Any = redis.hgetall(keys.record(order))
    fields = {name.decode(): value.decode() for name, value in answer.items()}
    yield " ".join(f"{name}={value}" for name, value in sorted(fields.items())) or "no record"
    yield f"due {redis.zscore(keys.DUE, order.member)} dead {redis.zscore(keys.DEAD, order.member)}"
    lines: Any = redis.lrange(keys.trail(order), -_TRAIL_SHOWN, -1)
    yield from (line.decode() for line in lines)


def _count_events(found: Audit, plan: Plan, stream: list[StoredEvent]) -> None:
    names = [(event.order_id, event.status, event.sent) for event in stream]
    there = set(names)
    found.recorded = len(there)
    for event in plan.events:
        if (event.order_id, event.status, event.timestamp) not in there:
            found.faults[event.order_id].append(f"its event {event.status} {event.timestamp} is not recorded")
    if len(names) > len(there):
        found.faults["events"].append(f"{len(names) - len(there)} are recorded twice")


def _injected(system: System) -> tuple[dict[str, int], int]:
    struck: defaultdict[str, int] = defaultdict(int)
    for rule in system.admin("GET", "faults"):
        struck[str(rule["status"]) if rule["kind"] == "status" else rule["kind"]] += rule["struck"]
    throttled = system.admin("GET", "stats")["throttled"]
    return dict(struck), throttled["window"] + throttled["queue"]


def _records(archive: Archive, company_id: str, ids: list[str]) -> Iterator[tuple[str, OrderRecord | None]]:
    for start in range(0, len(ids), _PAGE):
        page = ids[start : start + _PAGE]
        yield from zip(page, archive.records([OrderKey(company_id, one) for one in page]), strict=True)


def _handed(sink: Path) -> dict[str, list[int]]:
    """Return the revisions of each order in the order in which the sink was called."""
    handed: defaultdict[str, list[int]] = defaultdict(list)
    for line in sink.read_text().splitlines() if sink.exists() else []:
        _, order_id, revision, _ = line.split("/")
        handed[order_id].append(int(revision))
    return handed


def _not_home(record: OrderRecord | None) -> Iterator[str]:
    if record is None:
        yield "it has no record"
    elif record.dead:
        yield f"it was given up: {record.dead}"
    elif record.done < record.wanted:
        yield f"it is owed a fetch: done {record.done} of {record.wanted}"
    elif not record.revision:
        yield "nothing of it is stored"


def _not_handed(revisions: list[int], record: OrderRecord | None) -> Iterator[str]:
    if record is not None and record.revision and record.revision not in revisions:
        yield f"the sink never had its revision {record.revision}"
    if revisions != sorted(revisions):
        yield f"the sink had its revisions out of order: {revisions}"


def _same_content(system: System, archive: Archive, order: OrderKey) -> bool:
    """Compare the tickets of the ledger with those of the Channel Manager; asked with a key of our own."""
    status, answer = ask("GET", system.api(f"channelManager/{order.order_id}"), None, {"x-np-api-key": "audit"})
    stored = archive.order(order)
    return status == 200 and stored is not None and _tickets(answer) == sorted(_numbers(stored))


def _tickets(answer: Any) -> list[str]:
    wallets = [wallet for item in answer["items"] for wallet in item["wallets"]]
    return sorted(asset["referenceNumber"] for wallet in wallets for asset in wallet["assets"])


def _numbers(order: Any) -> Iterator[str]:
    return (ticket.reference_number for ticket in order.tickets)


def _waits(trail: tuple[Entry, ...], names: Mapping[str, Name], moments: Mapping[Name, float]) -> Iterator[float]:
    """Return for each settlement of one order the seconds from its event's first POST to a fetch that saw it."""
    heard = [entry for entry in trail if isinstance(entry, Heard)]
    saw = {entry.fence: entry.settlement for entry in trail if isinstance(entry, Begun)}
    stored = [entry for entry in trail if isinstance(entry, Stored)]
    for number, event in enumerate(heard, start=1):
        sent = moments.get(names.get(event.event_id, ("", "", "")))
        home = next((one.at.timestamp() for one in stored if saw.get(one.fence, 0) >= number), None)
        if sent is not None and home is not None:
            yield home - sent
