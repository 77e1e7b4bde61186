"""One run: the service, a sender, a supervisor that kills as planned; then the audit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.dev import stack
from app.dev.sandbox.webhooks import Event
from app.dev.simulator.audit import Calls, Evidence, Expected, StoredOrders, acknowledged, audit, calls_by_order
from app.dev.simulator.sender import Answer, Post, Sender
from app.ids import OrderKey
from app.ledger.events import EventLog
from app.ledger.history import FetchStored
from app.ledger.orders import Archive
from app.ledger.record import OrderRecord
from app.ledger.redis import Redis
from tests.chaos import plan as plans
from tests.chaos.plan import Plan
from tests.chaos.sinks import FAILURES, REFUSING, Content, Recorder, recording, table
from tests.chaos.supervisor import Supervisor
from tests.lab import KEYS
from tests.service import Service, ask

FETCHED_WITHIN: Final = 60.0
"""Seconds from the last kill until nothing is pending."""

DELIVERED_WITHIN: Final = 150.0
"""Seconds from the last kill until every sink has everything: four failures of one delivery wait 5, 15, 30 and 60 s,
±20 %, and the lease of a delivery is longer."""

ANSWERS_PER_SETTLEMENT: Final = 1.05

_PATIENCE: Final = 240.0
"""Seconds from the last kill after which an order that is not fetched counts as lost, no longer as late."""

_OVERTIME: Final = 180.0
"""Seconds beyond the plan within which every kill must have been done."""

_CONNECTIONS: Final = 4
_PAUSE: Final = 0.2
"""Seconds before a POST that failed is sent again."""

_EXPLAINED: Final = 10
_READ: Final = 100

_AT_ONCE: Final = 4
"""Requests at once that read upstream's contents."""


@dataclass(frozen=True)
class Size:
    """The size of a run, how often each failure of a sink strikes, and upstream's limits.

    These are requests at once, and in five minutes.
    """

    events: int
    kills: int
    seconds: float
    workers: int
    failures: int
    at_once: int
    in_five_minutes: int

    def plan(self, seed: int) -> Plan:
        return plans.draw(seed, self.events, self.kills, self.seconds)


SHORT: Final = Size(600, 12, 16, workers=4, failures=8, at_once=16, in_five_minutes=1_000_000)
LONG: Final = Size(10_000, 60, 240, workers=8, failures=50, at_once=64, in_five_minutes=1_000_000)
TRUE_BUDGET: Final = Size(3_000, 20, 90, workers=8, failures=20, at_once=5, in_five_minutes=6_000)


@dataclass(frozen=True)
class Result:
    """The outcome of a run: its figures, a table of the sinks, each target and whether it was met, and the problems."""

    figures: dict[str, str]
    sinks: str
    targets: dict[str, bool]
    faults: list[str]

    def __str__(self) -> str:
        figures = [f"{name}: {value}" for name, value in self.figures.items()]
        targets = [f"{'met   ' if met else 'MISSED'} {text}" for text, met in self.targets.items()]
        return "\n".join([*figures, "", self.sinks, "", *targets, *self.faults])


@dataclass(frozen=True)
class Ending:
    """The end of a run: seconds from the last kill until all was fetched, and delivered; inf: not within _PATIENCE.

    `calls` were made by the time all was fetched. Before what a sink refused was requeued, `dead` were the dead letters
    and `missing` the orders whose latest content a sink did not have: sink ("" for a fetch) and order.
    """

    fetched_after: float
    delivered_after: float
    calls: dict[str, Calls]
    dead: set[tuple[str, str]]
    missing: set[tuple[str, str]]


def run(service: Service, plan: Plan, size: Size) -> Result:
    """Run the plan on a service without running parts; the result is also in its folder."""
    with recording(service, plan, size.seconds, size.failures) as recorder:
        contents = _prepare(service, plan, size)
        supervisor = Supervisor(service)
        before = _resettler(service, plan, contents)
        sender = Sender(service.webhook, plan.posts, connections=_CONNECTIONS, tries=None, pause=_PAUSE, before=before)
        with sender.sending() as busy:
            last = _kill_all(plan, supervisor, busy, size.seconds)
        retry: Retry = Retry(NoBackoff(), 0)
        with Redis.from_url(service.variables["REDIS_URL"], socket_timeout=10, retry=retry) as redis:
            ending = _end(service, plan, redis, supervisor, recorder, contents, last)
            result = _audit(service, plan, redis, sender.answers, supervisor, recorder, contents, ending)
    (service.folder / "result.txt").write_text(f"{result}\n")
    return result


def _prepare(service: Service, plan: Plan, size: Size) -> dict[str, list[Content]]:
    """Start Valkey and the Channel Manager, and return the content of each order there."""
    service.start_valkey()
    limits = ["--slots", str(size.at_once), "--requests", str(size.in_five_minutes)]
    service.start_sandbox(*limits, seed=plan.seed)
    service.variables |= {
        "CLIENT_STATE": stack.CLIENT_STATE,
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
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = threads.map(partial(_content, service), plan.settlements)
        contents = {order_id: [content] for order_id, content in zip(plan.settlements, found, strict=True)}
    service.admin("DELETE", "stats")
    service.admin("PATCH", "settings", {"latency_ms": 20})
    service.admin("PUT", "faults", plans.faults())
    return contents


def _content(service: Service, order_id: str) -> Content:
    """Return what the Channel Manager answers for an order; calls with a key of our own."""
    status, answer = ask("GET", service.api(f"channelManager/{order_id}"), None, {"x-np-api-key": "audit"})
    assert status == 200, answer
    return Content.of(answer)


def _resettler(service: Service, plan: Plan, contents: dict[str, list[Content]]) -> Callable[[Post], None]:
    """Return a function that settles an order again just before its second event is first sent.

    The new content is added to `contents`.
    """
    left = {event for _, *again in plan.settlements.values() for event in again}

    def before(post: Post) -> None:
        for event in {shot.event for shot in post.shots} & left:
            left.remove(event)
            body = {"order_id": event.payload.order_id, "company_id": event.company_id, "status": event.payload.status}
            contents[event.payload.order_id].append(Content.of(service.admin("POST", "settle", body)))

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


def _end(
    service: Service,
    plan: Plan,
    redis: Redis,
    supervisor: Supervisor,
    recorder: Recorder,
    contents: dict[str, list[Content]],
    last: float,
) -> Ending:
    """Wait until all is fetched and delivered, then requeue what a sink refused and wait for that."""
    archive, orders = Archive(redis), [OrderKey(service.company_id, one) for one in plan.settlements]
    fetched = _all(archive, orders, lambda record: bool(record.dead) or not record.is_pending)
    fetched_after = _after(supervisor, last, lambda: redis.xlen(KEYS.events) >= plan.events and fetched())
    calls = calls_by_order(service.admin("GET", "orders"))
    sinks = frozenset(recorder.sinks)
    _after(supervisor, last, _all(archive, orders, lambda one: _behind(one, sinks) <= _dead(one)))
    _, letters = service.cli("dead", "list", "--limit", "1000")
    dead = {(letter["sink"] or "", letter["order_id"]) for letter in letters}
    missing = {(sink.name, one) for sink in recorder.sinks.values() for one in sink.lost(contents)}
    recorder.refuses = False
    for sink in {sink for sink, _ in dead if sink}:
        service.cli("dead", "requeue", "--sink", sink, "--yes")
    delivered_after = _after(supervisor, last, _all(archive, orders, lambda one: not _behind(one, sinks)))
    return Ending(fetched_after, delivered_after, calls, dead, missing)


def _behind(record: OrderRecord, sinks: frozenset[str]) -> frozenset[str]:
    """Return the sinks that do not have the latest revision."""
    return sinks - {sink.name for sink in record.sinks if sink.revision >= record.revision}


def _dead(record: OrderRecord) -> frozenset[str]:
    """Return the sinks for which the delivery is a dead letter."""
    return frozenset(sink.name for sink in record.dead_sinks)


def _all(archive: Archive, orders: Sequence[OrderKey], is_done: Callable[[OrderRecord], bool]) -> Callable[[], bool]:
    """Return a function that returns whether each order has been seen done.

    It reads few of those that were not: the service needs the processors.
    """
    left = list(orders)

    def all_done() -> bool:
        while part := left[-_READ:]:
            records = zip(part, archive.records(part), strict=True)
            left[-_READ:] = [key for key, one in records if one is None or not is_done(one)]
            if left and left[-1] in part:
                return False
        return True

    return all_done


def _after(supervisor: Supervisor, last: float, is_done: Callable[[], bool]) -> float:
    """Return the seconds from `last` until it is done; inf: not within _PATIENCE."""
    while (waited := time.monotonic() - last) < _PATIENCE:
        supervisor.restart_ended()
        try:
            if supervisor.all_up and is_done():
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
    recorder: Recorder,
    contents: dict[str, list[Content]],
    ending: Ending,
) -> Result:
    """Compare every event and order with the ledger, the sinks and the Channel Manager."""
    settlements = plan.settlements
    calls = calls_by_order(service.admin("GET", "orders"))
    injected: Counter[str] = Counter()
    for rule in service.admin("GET", "faults"):
        injected[str(rule["status"]) if rule["kind"] == "status" else rule["kind"]] += rule["struck"]
    throttled = service.admin("GET", "stats")["throttled"]
    stored = StoredOrders(Archive(redis), EventLog(redis), service.company_id)
    recorded, sinks = stored.recorded(), recorder.sinks.values()
    evidence = Evidence(
        answers,
        calls,
        exact=False,
        stored=stored.orders(settlements),
        recorded=recorded,
        tickets={one: list(found[-1].tickets) for one, found in contents.items() if len(found) > 1},
    )
    wrong = audit([Expected(order_id, events) for order_id, events in settlements.items()], evidence)
    faults = [f"{order_id}: {'; '.join(problems)}" for order_id, problems in wrong.items()]
    faults += (problems := [line for sink in sinks for line in sink.problems(contents)])
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
        "good getOrder answers": f"{sum(calls[one].answered for one in settlements)}",
        "good answers per settlement": f"{per_settlement:.3f} ({surplus} more than settlements)",
        "injected failures": _counts(injected),
        "429 for a limit": str(throttled["window"] + throttled["queue"]),
        "kills, freezes, outages": _counts(supervisor.done),
        "ended without a kill": _counts(supervisor.unexpected_exits) or "none",
        "POSTs by answer": _counts(Counter(one.result for one in answers)),
        "longest from an order's last event to its fetch": f"{slowest:.1f} s (order {slowest_order})",
        "all fetched after the last kill": f"{ending.fetched_after:.1f} s",
        "all delivered after the last kill": f"{ending.delivered_after:.1f} s",
    }
    targets = {
        "every event is acknowledged": accepted == sent,
        "no event lost, no settlement missed": not wrong,
        f"all fetched within {FETCHED_WITHIN:g} s of the last kill": ending.fetched_after <= FETCHED_WITHIN,
        f"at most {ANSWERS_PER_SETTLEMENT} good answers per settlement": per_settlement <= ANSWERS_PER_SETTLEMENT,
        "no getOrder for a delivery": calls == ending.calls,
        f"all delivered within {DELIVERED_WITHIN:g} s of the last kill": ending.delivered_after <= DELIVERED_WITHIN,
        "every sink got the latest content of every order, each revision in order, and nothing else": not problems,
        "until the requeue the refused order was a dead letter, and nothing was missing that was none": (
            (REFUSING, recorder.refused) in ending.missing <= ending.dead
        ),
        "every kill of the plan was done": supervisor.done == Counter(kill.kind for kill in plan.kills),
        "the Channel Manager failed now and then, and each sink in every way": injected.total() > 0
        and all({*FAILURES, "down"} <= {*one.injected} for one in sinks),
    }
    return Result(figures, table(sinks, contents, Counter(sink for sink, _ in ending.dead)), targets, faults)


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
