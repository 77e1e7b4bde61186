"""One run: the service, a sender, a supervisor that kills as planned; then the audit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev import stack
from app.dev.sandbox.webhooks import Event
from app.dev.simulator.audit import (
    Evidence,
    Expected,
    Name,
    StoredOrders,
    acknowledged,
    audit,
    calls_by_order,
    name,
)
from app.dev.simulator.sender import Answer, Post, Sender
from app.ids import OrderKey
from app.ledger import keys
from app.ledger.events import EventLog, EventQuery
from app.ledger.history import EventReceived, FetchStarted, FetchStored, parse_entry
from app.ledger.orders import Archive
from tests.chaos import plan as plans
from tests.chaos.plan import Plan
from tests.chaos.supervisor import Supervisor
from tests.service import Service, ask

FETCHED_WITHIN: Final = 60.0
"""Seconds from the last kill until nothing is pending."""

ANSWERS_PER_SETTLEMENT: Final = 1.05

_OVERTIME: Final = 180.0
"""Seconds beyond the plan within which every kill must have been done."""

_CONNECTIONS: Final = 4
_PAUSE: Final = 0.2
"""Seconds before a POST that failed is sent again."""

_HISTORY_SHOWN: Final = 15

_SINK = """import os
_FILE = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def on_order(order, context):
    os.write(_FILE, (context.idempotency_key + chr(10)).encode())
"""


@dataclass(frozen=True)
class Size:
    """The size of a run and its limits: requests at once, and in five minutes.

    `patience`: seconds from the last kill after which an order that is not fetched counts as lost, no longer as late.
    """

    events: int
    kills: int
    seconds: float
    workers: int
    at_once: int
    in_five_minutes: int
    latency_ms: int = 20
    patience: float = 240.0


SHORT: Final = Size(600, 12, 25, workers=4, at_once=16, in_five_minutes=1_000_000, patience=FETCHED_WITHIN)
LONG: Final = Size(10_000, 60, 240, workers=8, at_once=64, in_five_minutes=1_000_000)
TRUE_BUDGET: Final = Size(3_000, 20, 90, workers=8, at_once=5, in_five_minutes=6_000)


@dataclass
class Found:
    """The figures of the audit; `faults` has the problems of each order that has any."""

    faults: dict[str, list[str]]
    recorded: int = 0
    orders: int = 0
    delivered: int = 0
    deliveries: int = 0
    good_answers: int = 0
    surplus: int = 0
    slowest: float = 0.0
    slowest_order: str = ""
    injected: dict[str, int] = field(default_factory=dict)
    throttled: int = 0

    @property
    def complete(self) -> int:
        return self.orders - len(self.faults)


@dataclass(frozen=True)
class Result:
    """The outcome of a run. `fetched_after` is in seconds from the last kill, None if an order was never fetched."""

    plan: Plan
    sent: int
    acknowledged: int
    answers: Counter[str]
    done: Counter[str]
    unexpected_exits: Counter[str]
    fetched_after: float | None
    found: Found
    histories: dict[str, list[str]]

    @property
    def kills(self) -> int:
        """Return how many SIGKILLs were done, without freezes."""
        return sum(self.done[kind] for kind in plans.KILL_KINDS)

    @property
    def per_settlement(self) -> float:
        """Return the good getOrder answers per settlement; a coalesced order does not offset another's surplus."""
        return 1 + self.found.surplus / self.sent

    @property
    def targets(self) -> list[tuple[str, bool]]:
        """Return each target, and whether it was met."""
        found = self.found
        return [
            ("every event is acknowledged", self.acknowledged == self.sent),
            ("no event lost, no settlement missed, every order delivered in order", not found.faults),
            (
                f"all fetched within {FETCHED_WITHIN:g} s of the last kill",
                self.fetched_after is not None and self.fetched_after <= FETCHED_WITHIN,
            ),
            (
                f"at most {ANSWERS_PER_SETTLEMENT} good getOrder answers per settlement",
                self.per_settlement <= ANSWERS_PER_SETTLEMENT,
            ),
            ("every kill of the plan was done", self.done == Counter(kill.kind for kill in self.plan.kills)),
        ]


def run(service: Service, plan: Plan, size: Size) -> Result:
    """Run the plan on a service without running parts."""
    _prepare(service, plan, size)
    sink = service.folder / "sink.txt"
    supervisor = Supervisor(service, _variables(service, size, sink))
    sender = Sender(
        service.webhook,
        plan.posts,
        connections=_CONNECTIONS,
        tries=None,
        pause=_PAUSE,
        before=_resettler(service, plan),
    )
    with sender.sending() as busy:
        last = _kill_all(service, plan, supervisor, busy, size.seconds)
    retry: Retry = Retry(NoBackoff(), 0)
    with Redis.from_url(service.variables["REDIS_URL"], socket_timeout=10, retry=retry) as redis:
        fetched_after = _fetched_after(supervisor, redis, len(plan.events), last, size.patience)
        found = _audit(service, plan, redis, sender.answers, sink)
        orders = [OrderKey(service.company_id, one) for one in found.faults]
        histories = {order.order_id: list(_history(redis, order)) for order in orders}
    return Result(
        plan=plan,
        sent=len(plan.events),
        acknowledged=len(acknowledged(sender.answers)),
        answers=Counter(one.result for one in sender.answers),
        done=supervisor.done,
        unexpected_exits=supervisor.unexpected_exits,
        fetched_after=fetched_after,
        found=found,
        histories=histories,
    )


def _prepare(service: Service, plan: Plan, size: Size) -> None:
    service.start_valkey()
    limits = ["--slots", str(size.at_once), "--requests", str(size.in_five_minutes)]
    service.start_sandbox("--latency", str(size.latency_ms), *limits, seed=plan.seed)
    service.variables["CLIENT_STATE"] = stack.CLIENT_STATE
    for status, ids in plan.orders.items():
        body = {"company_id": service.company_id, "partner_id": stack.PARTNER_ID, "mix": {status: 1}}
        service.admin("POST", "orders", body | {"order_ids": ids})
    service.admin("PUT", "faults", plans.faults())


def _resettler(service: Service, plan: Plan) -> Callable[[Post], None]:
    """Return a function that settles an order again just before the event of it is first sent."""
    left = set(plan.resettled)

    def before(post: Post) -> None:
        for event in {shot.event for shot in post.shots} & left:
            left.remove(event)
            body = {"order_id": event.payload.order_id, "company_id": event.company_id, "status": event.payload.status}
            service.admin("POST", "settle", body)

    return before


def _variables(service: Service, size: Size, sink: Path) -> dict[str, str]:
    (service.folder / "chaos_sink.py").write_text(_SINK.format(path=str(sink)))
    return {
        "SINKS": "python:chaos_sink:on_order",
        # Without a partner nothing is compared with the order list, so a lost event stays lost.
        "NP_PARTNER_ID": "",
        "SPOOL_DIR": str(service.folder / "spool"),
        "WORKERS": str(size.workers),
        "BACKFILL_WORKERS": "0",
        "UPSTREAM_CONCURRENCY": str(size.at_once),
        "UPSTREAM_REQUESTS_PER_5_MIN": str(size.in_five_minutes),
        # Leases depend on it: with the default of 20 s a single one may be longer than FETCHED_WITHIN.
        "UPSTREAM_TIMEOUT": "5s",
    }


def _kill_all(service: Service, plan: Plan, supervisor: Supervisor, busy: Callable[[], bool], seconds: float) -> float:
    """Do every kill and wait until all is sent; return the monotonic time of the last kill."""
    kills, outages = list(plan.kills), list(plan.outages)
    started = last = time.monotonic()
    while kills or outages or busy():
        supervisor.restart_ended()
        now = time.monotonic() - started
        assert now < seconds + _OVERTIME, f"not done: {kills}; still sending: {busy()}"
        for kill in [kill for kill in kills if kill.at <= now]:
            if supervisor.kill(kill):
                kills.remove(kill)
                last = time.monotonic()
        if outages and outages[0][0] <= now:
            service.admin("POST", "faults", plans.outage(outages.pop(0)[1]))
        time.sleep(0.01)
    return last


def _fetched_after(supervisor: Supervisor, redis: Redis, events: int, last: float, patience: float) -> float | None:
    """Return the seconds from `last` until all is recorded and nothing pending; None: not within `patience`."""
    while (waited := time.monotonic() - last) < patience:
        supervisor.restart_ended()
        try:
            if supervisor.all_up and redis.xlen(keys.EVENTS) >= events and redis.zcard(keys.DUE) == 0:
                return waited
        except (RedisError, OSError):
            # Valkey starts or loads its data.
            pass
        time.sleep(0.05)
    return None


def _audit(service: Service, plan: Plan, redis: Redis, answers: list[Answer], sink: Path) -> Found:
    """Compare every event and order with the ledger, the sink and the Channel Manager."""
    settlements = plan.settlements
    calls = calls_by_order(service.admin("GET", "orders"))
    injected: Counter[str] = Counter()
    for rule in service.admin("GET", "faults"):
        injected[str(rule["status"]) if rule["kind"] == "status" else rule["kind"]] += rule["struck"]
    throttled = service.admin("GET", "stats")["throttled"]
    # All counts are read; the calls below must not meet a fault.
    service.admin("DELETE", "faults")
    stored = StoredOrders(Archive(redis), EventLog(redis), service.company_id)
    recorded, revisions = stored.recorded(), _revisions(sink)
    evidence = Evidence(
        answers,
        calls,
        exact=False,
        stored=stored.orders(settlements),
        recorded=recorded,
        revisions=revisions,
        tickets={one: _tickets(service, one) for one, events in settlements.items() if len(events) > 1},
    )
    expected = [Expected(order_id, events) for order_id, events in settlements.items()]
    slowest, slowest_order = _slowest(service, stored, redis, answers)
    return Found(
        audit(expected, evidence),
        recorded=len(recorded),
        orders=len(settlements),
        delivered=len(revisions),
        deliveries=sum(map(len, revisions.values())),
        good_answers=sum(calls[one].answered for one in settlements),
        surplus=sum(max(0, calls[one].answered - len(events)) for one, events in settlements.items()),
        slowest=slowest,
        slowest_order=slowest_order,
        injected=dict(injected),
        throttled=throttled["window"] + throttled["queue"],
    )


def _tickets(service: Service, order_id: str) -> list[str]:
    """Return the ticket numbers that the Channel Manager has, calls with a key of our own."""
    status, answer = ask("GET", service.api(f"channelManager/{order_id}"), None, {"x-np-api-key": "audit"})
    assert status == 200, answer
    wallets = [wallet for item in answer["items"] for wallet in item["wallets"]]
    return sorted(asset["referenceNumber"] for wallet in wallets for asset in wallet["assets"])


def _revisions(sink: Path) -> dict[str, list[int]]:
    """Return the revisions of each order in the order of delivery."""
    revisions: dict[str, list[int]] = {}
    for line in sink.read_text().splitlines() if sink.exists() else []:
        _, order_id, revision, _ = line.split("/")
        revisions.setdefault(order_id, []).append(int(revision))
    return revisions


def _slowest(service: Service, stored: StoredOrders, redis: Redis, answers: list[Answer]) -> tuple[float, str]:
    """Return the longest time in seconds from an event's first POST to its fetch, and the order."""
    sent: dict[Event, float] = {}
    for answer in answers:
        for shot in answer.post.shots:
            sent[shot.event] = min(answer.sent_at, sent.get(shot.event, answer.sent_at))
    first: dict[Name, float] = {name(event): at for event, at in sent.items()}
    names = {one.id: (one.order_id, one.status, one.sent) for one in EventLog(redis).oldest_first(EventQuery())}
    slowest = 0.0, ""
    for order_id in {event.payload.order_id for event in sent}:
        history = stored.archive.history(OrderKey(service.company_id, order_id))
        saw = {entry.token: entry.generation for entry in history if isinstance(entry, FetchStarted)}
        fetches = [entry for entry in history if isinstance(entry, FetchStored)]
        received = [entry for entry in history if isinstance(entry, EventReceived)]
        for number, event in enumerate(received, start=1):
            at = first.get(names.get(event.event_id, ("", "", "")))
            fetched = next((one.at.timestamp() for one in fetches if saw.get(one.token, 0) >= number), None)
            if at is not None and fetched is not None:
                slowest = max(slowest, (fetched - at, order_id))
    return slowest


def _history(redis: Redis, order: OrderKey) -> Iterator[str]:
    """Return the record and the history of an order, line by line."""
    answer: Any = redis.hgetall(keys.record(order))
    fields = {name.decode(): value.decode() for name, value in answer.items()}
    yield " ".join(f"{name}={value}" for name, value in sorted(fields.items())) or "no record"
    yield f"due {redis.zscore(keys.DUE, order.member)} dead {redis.zscore(keys.DEAD, order.member)}"
    entries: Any = redis.lrange(keys.history(order), -_HISTORY_SHOWN, -1)
    yield from (repr(parse_entry(entry)) for entry in entries)
