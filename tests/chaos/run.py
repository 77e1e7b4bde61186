"""One run: the service, a sender, a supervisor that kills as planned; then the audit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Final

from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev import stack
from app.dev.sandbox.webhooks import Event
from app.dev.simulator.audit import Evidence, Expected, StoredOrders, acknowledged, audit, calls_by_order
from app.dev.simulator.sender import Answer, Post, Sender
from app.ids import OrderKey
from app.ledger.events import EventLog
from app.ledger.history import FetchStored
from app.ledger.orders import Archive
from app.ledger.redis import Redis
from tests.chaos import plan as plans
from tests.chaos.plan import Plan
from tests.chaos.supervisor import Supervisor
from tests.lab import KEYS
from tests.service import Service, ask

FETCHED_WITHIN: Final = 60.0
"""Seconds from the last kill until nothing is pending."""

ANSWERS_PER_SETTLEMENT: Final = 1.05

_PATIENCE: Final = 240.0
"""Seconds from the last kill after which an order that is not fetched counts as lost, no longer as late."""

_OVERTIME: Final = 180.0
"""Seconds beyond the plan within which every kill must have been done."""

_CONNECTIONS: Final = 4
_PAUSE: Final = 0.2
"""Seconds before a POST that failed is sent again."""

_EXPLAINED: Final = 10

_SINK = """import os
_FILE = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def on_order(order, context):
    os.write(_FILE, (context.idempotency_key + chr(10)).encode())
"""


@dataclass(frozen=True)
class Size:
    """The size of a run and its limits: requests at once, and in five minutes."""

    events: int
    kills: int
    seconds: float
    workers: int
    at_once: int
    in_five_minutes: int

    def plan(self, seed: int) -> Plan:
        return plans.draw(seed, self.events, self.kills, self.seconds)


SHORT: Final = Size(600, 12, 16, workers=4, at_once=16, in_five_minutes=1_000_000)
LONG: Final = Size(10_000, 60, 240, workers=8, at_once=64, in_five_minutes=1_000_000)
TRUE_BUDGET: Final = Size(3_000, 20, 90, workers=8, at_once=5, in_five_minutes=6_000)


@dataclass(frozen=True)
class Result:
    """The outcome of a run: its figures, each target and whether it was met, and the problems line by line."""

    figures: dict[str, str]
    targets: dict[str, bool]
    faults: list[str]

    def __str__(self) -> str:
        figures = [f"{name}: {value}" for name, value in self.figures.items()]
        targets = [f"{'met   ' if met else 'MISSED'} {text}" for text, met in self.targets.items()]
        return "\n".join([*figures, *targets, *self.faults])


def run(service: Service, plan: Plan, size: Size) -> Result:
    """Run the plan on a service without running parts."""
    _prepare(service, plan, size)
    supervisor = Supervisor(service)
    before = _resettler(service, plan)
    sender = Sender(service.webhook, plan.posts, connections=_CONNECTIONS, tries=None, pause=_PAUSE, before=before)
    with sender.sending() as busy:
        last = _kill_all(plan, supervisor, busy, size.seconds)
    retry: Retry = Retry(NoBackoff(), 0)
    with Redis.from_url(service.variables["REDIS_URL"], socket_timeout=10, retry=retry) as redis:
        fetched_after = _fetched_after(supervisor, redis, plan.events, last)
        return _audit(service, plan, redis, sender.answers, supervisor, fetched_after)


def _prepare(service: Service, plan: Plan, size: Size) -> None:
    service.start_valkey()
    limits = ["--slots", str(size.at_once), "--requests", str(size.in_five_minutes)]
    service.start_sandbox("--latency", "20", *limits, seed=plan.seed)
    (service.folder / "chaos_sink.py").write_text(_SINK.format(path=str(service.folder / "sink.txt")))
    service.variables |= {
        "CLIENT_STATE": stack.CLIENT_STATE,
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
    orders: dict[str, list[str]] = {}
    for order_id, (first, *_) in plan.settlements.items():
        orders.setdefault(first.payload.status, []).append(order_id)
    for status, ids in orders.items():
        body = {"company_id": service.company_id, "partner_id": stack.PARTNER_ID, "mix": {status: 1}}
        service.admin("POST", "orders", body | {"order_ids": ids})
    service.admin("PUT", "faults", plans.faults())


def _resettler(service: Service, plan: Plan) -> Callable[[Post], None]:
    """Return a function that settles an order again just before its second event is first sent."""
    left = {event for _, *again in plan.settlements.values() for event in again}

    def before(post: Post) -> None:
        for event in {shot.event for shot in post.shots} & left:
            left.remove(event)
            body = {"order_id": event.payload.order_id, "company_id": event.company_id, "status": event.payload.status}
            service.admin("POST", "settle", body)

    return before


def _kill_all(plan: Plan, supervisor: Supervisor, busy: Callable[[], bool], seconds: float) -> float:
    """Do every kill and wait until all is sent; return the monotonic time of the last kill."""
    kills = list(plan.kills)
    started = last = time.monotonic()
    while kills or busy():
        supervisor.restart_ended()
        now = time.monotonic() - started
        assert now < seconds + _OVERTIME, f"not done: {kills}; still sending: {busy()}"
        for kill in [kill for kill in kills if kill.at <= now]:
            if supervisor.strike(kill):
                kills.remove(kill)
                last = time.monotonic()
        time.sleep(0.01)
    return last


def _fetched_after(supervisor: Supervisor, redis: Redis, events: int, last: float) -> float:
    """Return the seconds from `last` until all is recorded and nothing pending; inf: not within _PATIENCE."""
    while (waited := time.monotonic() - last) < _PATIENCE:
        supervisor.restart_ended()
        try:
            if supervisor.all_up and redis.xlen(KEYS.events) >= events and redis.zcard(KEYS.due) == 0:
                return waited
        except (RedisError, OSError):
            # Valkey starts or loads its data.
            pass
        time.sleep(0.05)
    return inf


def _audit(
    service: Service,
    plan: Plan,
    redis: Redis,
    answers: list[Answer],
    supervisor: Supervisor,
    fetched_after: float,
) -> Result:
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
    recorded, revisions = stored.recorded(), _revisions(service.folder / "sink.txt")
    evidence = Evidence(
        answers,
        calls,
        exact=False,
        stored=stored.orders(settlements),
        recorded=recorded,
        revisions=revisions,
        tickets={one: _tickets(service, one) for one, events in settlements.items() if len(events) > 1},
    )
    wrong = audit([Expected(order_id, events) for order_id, events in settlements.items()], evidence)
    faults = [f"{order_id}: {'; '.join(problems)}" for order_id, problems in wrong.items()]
    faults += [str(service.cli("orders", "explain", order_id)) for order_id in list(wrong)[:_EXPLAINED]]
    sent, accepted = plan.events, len(acknowledged(answers))
    # A coalesced order does not offset another's surplus.
    surplus = sum(max(0, calls[one].answered - len(events)) for one, events in settlements.items())
    per_settlement = 1 + surplus / sent
    slowest, slowest_order = _slowest(service, stored, plan, answers)
    figures = {
        "events acknowledged": f"{accepted} of {sent}",
        "events recorded": f"{len(recorded)} of {sent}",
        "orders complete": f"{len(settlements) - len(wrong)} of {len(settlements)}",
        "sink deliveries": f"{sum(map(len, revisions.values()))}, to {len(revisions)} of {len(settlements)} orders",
        "good getOrder answers": f"{sum(calls[one].answered for one in settlements)}",
        "good answers per settlement": f"{per_settlement:.3f} ({surplus} more than settlements)",
        "injected failures": _counts(injected),
        "429 for a limit": str(throttled["window"] + throttled["queue"]),
        "kills, freezes, outages": _counts(supervisor.done),
        "ended without a kill": _counts(supervisor.unexpected_exits) or "none",
        "POSTs by answer": _counts(Counter(one.result for one in answers)),
        "longest from an order's last event to its fetch": f"{slowest:.1f} s (order {slowest_order})",
        "all fetched after the last kill": f"{fetched_after:.1f} s",
    }
    targets = {
        "every event is acknowledged": accepted == sent,
        "no event lost, no settlement missed, every order delivered in order": not wrong,
        f"all fetched within {FETCHED_WITHIN:g} s of the last kill": fetched_after <= FETCHED_WITHIN,
        f"at most {ANSWERS_PER_SETTLEMENT} good answers per settlement": per_settlement <= ANSWERS_PER_SETTLEMENT,
        "every kill of the plan was done": supervisor.done == Counter(kill.kind for kill in plan.kills),
        "the Channel Manager failed now and then": injected.total() > 0,
    }
    return Result(figures, targets, faults)


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


def _slowest(service: Service, stored: StoredOrders, plan: Plan, answers: list[Answer]) -> tuple[float, str]:
    """Return the longest time in seconds from the first POST of an order's last event to its fetch, and the order."""
    sent: dict[Event, float] = {}
    for answer in answers:
        for shot in answer.post.shots:
            sent[shot.event] = min(answer.sent_at, sent.get(shot.event, answer.sent_at))
    slowest = 0.0, ""
    for order_id, events in plan.settlements.items():
        history = stored.archive.history(OrderKey(service.company_id, order_id))
        if fetches := [entry.at.timestamp() for entry in history if isinstance(entry, FetchStored)]:
            slowest = max(slowest, (fetches[-1] - max(sent[event] for event in events), order_id))
    return slowest


def _counts(counts: Mapping[str, int]) -> str:
    whole = sum(counts.values())
    return f"{whole}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) if whole else ""
