"""One run: the service on one machine, a sender, a supervisor, the blows of the plan; then the audit."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app.ids import OrderKey
from app.ledger import keys
from tests.acceptance.strangers import PARTNER, System
from tests.chaos import plan as plans
from tests.chaos.audit import Audit, audit, story
from tests.chaos.plan import Plan
from tests.chaos.sender import Sender
from tests.chaos.supervisor import Supervisor

HOME_WITHIN: Final = 60.0
"""Seconds from the last kill until nothing is owed any more."""

ANSWERS_PER_SETTLEMENT: Final = 1.05

_STORM: Final = 180.0
"""Seconds beyond the plan within which every blow must have found its target."""

_SINK = """import os
_FILE = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def on_order(order, context):
    os.write(_FILE, (context.idempotency_key + chr(10)).encode())
"""


@dataclass(frozen=True)
class Size:
    """How large a run is, and on which budget: requests at once, and in five minutes.

    `patience`: seconds from the last kill after which what is not home counts as lost and no longer as late.
    """

    events: int
    kills: int
    seconds: float
    workers: int
    at_once: int
    in_five_minutes: int
    latency_ms: int = 20
    patience: float = 240.0


SHORT: Final = Size(600, 12, 25, workers=4, at_once=16, in_five_minutes=1_000_000, patience=HOME_WITHIN)
LONG: Final = Size(10_000, 60, 240, workers=8, at_once=64, in_five_minutes=1_000_000)
TRUE_BUDGET: Final = Size(3_000, 20, 90, workers=8, at_once=5, in_five_minutes=6_000)


@dataclass(frozen=True)
class Result:
    """What came of a run. `home_after` is in seconds from the last kill, None if something never came home."""

    plan: Plan
    sent: int
    acknowledged: int
    answers: Counter[str]
    dealt: Counter[str]
    surprises: Counter[str]
    home_after: float | None
    found: Audit
    stories: dict[str, list[str]]

    @property
    def kills(self) -> int:
        """Return how many SIGKILLs were dealt; a freeze is none."""
        return sum(self.dealt[kind] for kind in plans.KILLS)

    @property
    def per_settlement(self) -> float:
        """Return the good getOrder answers a settlement; what coalescing saved on one order excuses no other's."""
        return 1 + self.found.surplus / self.sent

    @property
    def targets(self) -> list[tuple[str, bool]]:
        """Return what was to be reached, and whether it was."""
        found = self.found
        return [
            ("every event is acknowledged", self.acknowledged == self.sent),
            ("0 lost, no settlement missed, every order handed on in order", not found.faults),
            (
                f"all home within {HOME_WITHIN:g} s of the last kill",
                self.home_after is not None and self.home_after <= HOME_WITHIN,
            ),
            (
                f"at most {ANSWERS_PER_SETTLEMENT} good getOrder answers a settlement",
                self.per_settlement <= ANSWERS_PER_SETTLEMENT,
            ),
            ("every kill of the plan was dealt", self.dealt == Counter(blow.kind for blow in self.plan.blows)),
        ]


def run(system: System, plan: Plan, size: Size) -> Result:
    """Play the plan on a system of which nothing runs yet."""
    _prepare(system, plan, size)
    sender = Sender(system, plan)
    sink = system.folder / "sink.txt"
    supervisor = Supervisor(system, _variables(system, size, sink))
    with sender.sending():
        last = _storm(system, plan, supervisor, sender, size.seconds)
    retry: Retry = Retry(NoBackoff(), 0)
    with Redis.from_url(system.variables["REDIS_URL"], socket_timeout=10, retry=retry) as redis:
        home_after = _home_after(supervisor, redis, len(plan.events), last, size.patience)
        found = audit(system, plan, redis, sender.sent, sink)
        orders = [OrderKey(system.company_id, one) for one in found.faults if len(one) == 36]
        stories = {order.order_id: list(story(redis, order)) for order in orders}
    return Result(
        plan=plan,
        sent=len(plan.events),
        acknowledged=len(sender.acknowledged),
        answers=sender.answers,
        dealt=supervisor.dealt,
        surprises=supervisor.surprises,
        home_after=home_after,
        found=found,
        stories=stories,
    )


def _prepare(system: System, plan: Plan, size: Size) -> None:
    system.start_valkey()
    limits = ["--slots", str(size.at_once), "--requests", str(size.in_five_minutes)]
    system.start_sandbox("--seed", str(plan.seed), "--latency", str(size.latency_ms), *limits)
    for status, ids in plan.orders.items():
        wish = {"company_id": system.company_id, "partner_id": PARTNER, "mix": {status: 1}, "order_ids": ids}
        system.admin("POST", "orders", wish)
    system.admin("PUT", "faults", plans.faults())


def _variables(system: System, size: Size, sink: Path) -> dict[str, str]:
    (system.folder / "chaos_sink.py").write_text(_SINK.format(path=str(sink)))
    return {
        "SINKS": "python:chaos_sink:on_order",
        # Without it nobody compares with the Channel Manager's list: what an event loses, nothing else brings back.
        "NP_PARTNER_ID": "",
        "SPOOL_DIR": str(system.folder / "spool"),
        "WORKERS": str(size.workers),
        "BACKFILL_WORKERS": "0",
        "UPSTREAM_CONCURRENCY": str(size.at_once),
        "UPSTREAM_REQUESTS_PER_5_MIN": str(size.in_five_minutes),
        # Leases follow from it: with the default of 20 s one alone may outlast the 60 s in which all must be home.
        "UPSTREAM_TIMEOUT": "5s",
    }


def _storm(system: System, plan: Plan, supervisor: Supervisor, sender: Sender, seconds: float) -> float:
    """Deal every blow and wait until all is sent; return the moment of the last blow, on the monotonic clock."""
    blows, outages = list(plan.blows), list(plan.outages)
    began = last = time.monotonic()
    while blows or outages or sender.busy:
        supervisor.mind()
        now = time.monotonic() - began
        assert now < seconds + _STORM, f"still to be dealt: {blows}; still sending: {sender.busy}"
        for blow in [blow for blow in blows if blow.at <= now]:
            if supervisor.strike(blow):
                blows.remove(blow)
                last = time.monotonic()
        if outages and outages[0][0] <= now:
            system.admin("POST", "faults", plans.outage(outages.pop(0)[1]))
        time.sleep(0.01)
    return last


def _home_after(supervisor: Supervisor, redis: Redis, events: int, last: float, patience: float) -> float | None:
    """Return the seconds from `last` until all is recorded and nothing is owed; None: not within `patience`."""
    while (waited := time.monotonic() - last) < patience:
        supervisor.mind()
        try:
            if supervisor.all_up and redis.xlen(keys.EVENTS) >= events and redis.zcard(keys.DUE) == 0:
                return waited
        except (RedisError, OSError):
            # It is being started, or reads its file.
            pass
        time.sleep(0.05)
    return None
