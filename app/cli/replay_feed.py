"""Feeding a plan: its orders go to the backfill queue at its rate, for as long as this process lives."""

from __future__ import annotations

import time
from typing import Final

import msgspec
import typer

from app import bootstrap
from app.cli import output
from app.cli.exits import FOUND, Stop
from app.cli.session import Session
from app.store.plan import Plan, is_plan_id

_SHORTEST: Final = 10
"""ms between two steps: at a high rate each takes several orders."""

_LONGEST: Final = 1000
"""ms between two steps at a low rate, so that a cancelled plan ends its feeders soon."""


def feed(here: Session, plan: Plan) -> Plan:
    """Feed the plan until it ends, here or by another hand; return it as it is then.

    However this process ends before, the plan stands where it was; what can be told is told.
    """
    if here.settings.backfill_workers == 0:
        output.remark("BACKFILL_WORKERS is 0 here: unless another machine has one, these orders will wait.")
    if unknown := [sink for sink in plan.sinks if sink not in here.settings.sinks]:
        output.remark(f"{', '.join(unknown)} is not in SINKS here: unless the workers have it, nothing is handed on.")
    left = plan.left
    try:
        with output.progress(f"replay {plan.id}", plan.left) as step:
            while True:
                fed = here.books.plans.feed(plan, bootstrap.clock())
                step(left - fed.left)
                left = fed.left
                if fed.state != "open":
                    break
                time.sleep(min(max(fed.wait, _SHORTEST), _LONGEST) / 1000)
    except BaseException:
        output.remark(
            f"Stopped: {output.many(left, 'order')} of plan {plan.id} still to do."
            f" Go on with: ota-receiver replays resume {plan.id}"
        )
        raise
    ended = here.books.plans.of(plan.id)
    if ended is None:
        raise Stop(f"Plan {plan.id} is here no more.", FOUND)
    return ended


def end(plan: Plan, as_json: bool) -> None:
    """Print how a plan stands when its feeding has ended; exit code 1 if somebody cancelled it meanwhile."""
    output.tell(sentence(plan), view(plan), as_json)
    if plan.state != "done":
        raise typer.Exit(FOUND)


def sentence(plan: Plan) -> str:
    """Return how far a plan is."""
    passed = f", {plan.passed:,} passed over" if plan.passed else ""
    left = f", {plan.left:,} left" if plan.left else ""
    unit = "hand-on" if plan.sinks else "order"
    return (
        f"Plan {plan.id} {plan.state}: {output.many(plan.orders, unit)}, {plan.queued:,} queued,"
        f" {plan.waiting:,} waiting already{passed}{left}."
    )


def view(plan: Plan) -> dict[str, object]:
    """Return a plan for machines."""
    return msgspec.structs.asdict(plan)


def find(here: Session, plan_id: str) -> Plan:
    """Return the plan; raises Stop when there is none."""
    plan = here.books.plans.of(plan_id) if is_plan_id(plan_id) else None
    if plan is None:
        raise Stop(f"No plan {plan_id!r} is here; `ota-receiver replays list` shows them.", FOUND)
    return plan
