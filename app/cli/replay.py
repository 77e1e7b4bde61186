"""`events replay` and the commands for its plans: list, resume, cancel.

A replay is a plan with a rate, an id and an entry in the audit. The command feeds the plan's orders to the backfill
queue for as long as it runs; whenever it ends, another one can resume the plan.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from typing import Annotated, Final

import typer

from app import times
from app.cli import console, context
from app.cli.command import FOUND, Stop, command, commands, flags
from app.cli.context import CommandContext, only, open_context
from app.explain.words import many
from app.ids import OrderKey
from app.ledger.events import is_event_id
from app.replay import Plan, Selected, Selection, default_rate, needless, select
from app.sink_settings import EVERY

EXAMPLES: Final = (
    "ota-receiver events replay --since 6h --status Issued --dry-run",
    'ota-receiver events replay --dead --why "venue is back" --yes',
    "ota-receiver events replay --order CM-4711 --force",
    "ota-receiver events replay --since 2d --to-sinks shop --rate 20",
)

Rate = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, max=5000, help="Orders a second. Default: the backfill's share of the limits."),
]
PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="Id of the plan; its beginning is enough.")]

cli = commands(name="replays", help="Replays, made by `events replay` or on the ops page.")


def replay(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Event ids; the beginning is enough.")
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option("--order", help="An order, by orderId, its beginning, or reference; repeatable.")
    ] = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    until: context.Until = None,
    dead: Annotated[bool, typer.Option("--dead", help="Only orders with a dead letter.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also orders whose stored copy is newer than the event.")
    ] = False,
    to_sinks: Annotated[
        list[str] | None,
        typer.Option(
            "--to-sinks",
            metavar="NAME",
            help=f"Deliver the stored revision to this sink again, without a fetch; repeatable. `{EVERY}`: every sink.",
        ),
    ] = None,
    rate: Rate = None,
) -> None:
    """Fetch the orders of stored events again, at a limited rate.

    Each order is fetched once, oldest first, after live orders. The events with these ids and of --order are searched,
    or else all events. All other conditions must hold. An order whose stored copy is newer than its last selected event
    is skipped, unless --force. The replay is a plan: Ctrl-C stops it, `replays resume` continues it, and
    `replays cancel` ends it. For one order use `orders refetch`, for dead letters `dead requeue`, for orders without an
    event `reconcile`.
    """
    if not any((ids, order, flags().company, status, outcome, since, until, dead)):
        raise Stop("Choose what to replay: event ids, --order, --dead, or a selection; --since 2000-01-01 is all.")
    if force and to_sinks:
        raise Stop("--force is about fetching; --to-sinks fetches nothing.")
    with open_context() as here:
        event_ids = [here.event_id(one) for one in ids or []]
        wrong = next((one for one in event_ids if not is_event_id(one)), None)
        if wrong is not None:
            raise Stop(f"{wrong!r} is not an event id. For an order use --order.")
        sinks = _sinks(here, to_sinks or [])
        here.warn_of_disabled(sinks)
        selection = Selection(
            event_ids=tuple(dict.fromkeys(event_ids)),
            orders=tuple(dict.fromkeys(here.order(text) for text in order or [])),
            company_id=here.company_id,
            status=status,
            outcome=outcome,
            since=since,
            until=until,
            dead=dead,
        )
        with console.progress("reading events") as step:
            found = select(here.redis, selection, step)
        for text in found.missing:
            console.remark(f"No event {text!r} found.")
        if not found.orders:
            raise Stop("No event matches.", FOUND)
        for erased in here.orders.erased_among([OrderKey.of(member) for member in found.orders]):
            del found.orders[erased.member]
        if not found.orders:
            raise Stop("All orders that match were erased.", FOUND)
        passed = set() if force else needless(here.redis, found.orders, deliver=bool(sinks))
        for one in passed:
            del found.orders[one]
        selected = " ".join((selection.words(), *(f"to {sink}" for sink in sinks)))
        _start(here, selected, found, len(passed), force, sinks, rate or default_rate(here.settings))
    if found.missing:
        raise typer.Exit(FOUND)


def _start(
    here: CommandContext,
    selected: str,
    found: Selected,
    passed: int,
    force: bool,
    sinks: tuple[str, ...],
    speed: float,
) -> None:
    """Ask, then file the plan for the orders found and feed it; a dry run prints what the replay means instead.

    `selected` are the conditions and sinks in words; `passed` other orders are skipped; `speed` is in orders a second.
    """
    to_do = len(found.orders)
    calls = 0 if sinks else to_do
    orders, rate = many(to_do, "order"), round(speed, 3)
    seconds = round(to_do / speed)
    takes, ends = times.age(timedelta(seconds=seconds)), times.now() + timedelta(seconds=seconds)
    forecast: dict[str, object] = {"events": found.events, "orders": passed + to_do, "passed": passed, "to_do": to_do}
    forecast |= {"get_order_calls": calls, "sinks": sinks, "rate": rate, "takes_s": seconds, "ends": ends}
    forecast |= {"dry_run": flags().dry_run}
    why_skipped = "the stored copy is newer than the event; --force fetches them too."
    if sinks:
        why_skipped = "nothing is stored of them."
    skipped = f"{many(passed, 'order')} skipped: {why_skipped}" if passed else ""
    if flags().dry_run:
        facts = {
            "events": f"{found.events:,}",
            "orders": f"{passed + to_do:,}",
            "skipped": skipped,
            "getOrder calls": f"{calls:,}",
            "deliveries to": sinks,
            "rate": f"{rate:g} orders/s",
            "takes": takes,
            "would end": ends,
        }
        console.facts("dry run: nothing was changed", facts, forecast)
        return
    if passed:
        console.remark(skipped)
    if not to_do:
        console.result("Nothing to do.", forecast)
        return
    what = f"Fetch {orders} again ({many(calls, 'getOrder call')})"
    if sinks:
        what = f"Deliver {orders} to {', '.join(sinks)} again (no getOrder)"
    console.confirm(f"{what}: at {rate:g}/s this takes {takes}, until {times.short(ends)}?")
    left = ((one, None if force else at) for one, at in found.orders.items())
    plan = here.plans.file(left, rate=speed, sinks=sinks, selected=selected, who=flags().who, why=flags().why)
    console.remark(f"Plan {plan.id}; Ctrl-C stops it, `ota-receiver replays resume {plan.id}` continues it.")
    _finish(here, plan)


@command(cli, "ota-receiver replays list --limit 5")
def list_(limit: context.Limit = 20) -> None:
    """List the latest plans, newest first. Each with what was requested, by whom and why, and how much is left."""
    columns = (("=plan", "id"), ("@made", "at"), "state", "#orders", "#left", "who", ">selected", ">why", "#rate")
    with open_context() as here:
        console.listing(list(islice(here.plans.newest_first(), limit)), columns, nothing="No plans.")


@command(cli, "ota-receiver replays resume k7m2qx --rate 2", options="who")
def resume(plan_id: PlanId, rate: Rate = None) -> None:
    """Resume a replay. Several processes may run one plan: they share its rate, and no order is queued twice."""
    with open_context() as here:
        _finish(here, here.plans.resume(_open_plan(here, plan_id), flags().who, rate=rate))


@command(cli, 'ota-receiver replays cancel k7m2qx --why "too many"', options="why who")
def cancel(plan_id: PlanId) -> None:
    """Cancel a replay. Orders already queued stay queued. Processes that run it stop within seconds."""
    with open_context() as here:
        plan = here.plans.cancel(_open_plan(here, plan_id), flags().who, flags().why)
        console.result(_sentence(plan), plan)


def _sinks(here: CommandContext, names: list[str]) -> tuple[str, ...]:
    """Return the sinks that the stored revision goes to, () for a replay that fetches."""
    for name in names:
        if name not in here.sinks and not (name == EVERY and here.sinks):
            raise here.no_sink(name)
    return here.sinks if EVERY in names else tuple(dict.fromkeys(names))


def _open_plan(here: CommandContext, plan_id: str) -> Plan:
    """Return the plan; raises Stop when there is none, or it has ended."""
    known = only("plan", plan_id, [one for one in here.plans.ids() if len(plan_id) > 3 and one.startswith(plan_id)])
    plan = here.plans.of(known) if known else None
    if plan is None:
        raise Stop(f"No plan {plan_id!r} found; `ota-receiver replays list` shows them.", FOUND)
    if plan.is_over:
        raise Stop(f"Plan {plan.id} is already {plan.state}.", FOUND)
    return plan


def _finish(here: CommandContext, plan: Plan) -> None:
    """Feed the plan until it ends, and print it; exit code 1 if it was cancelled meanwhile.

    However this process ends earlier, the plan stays as it is, and a line says how to resume it.
    """
    if unknown := [sink for sink in plan.sinks if sink not in here.sinks]:
        console.remark(f"No worker pool declares {', '.join(unknown)} any more: nothing is delivered to it.")
    left = plan.left
    try:
        with console.progress(f"replay {plan.id}", plan.left) as step:
            for still_left in here.plans.run(plan):
                step(left - still_left)
                left = still_left
    except BaseException:
        orders = many(left, "order")
        console.remark(f"Stopped: {orders} of plan {plan.id} left. Resume: ota-receiver replays resume {plan.id}")
        raise
    ended = here.plans.of(plan.id)
    if ended is None:
        raise Stop(f"Plan {plan.id} no longer exists.", FOUND)
    console.result(_sentence(ended), ended)
    if ended.state != "done":
        raise typer.Exit(FOUND)


def _sentence(plan: Plan) -> str:
    skipped = f", {plan.passed:,} skipped" if plan.passed else ""
    left = f", {plan.left:,} left" if plan.left else ""
    unit = "dead letter" if plan.kind == "dead" else "delivery" if plan.sinks else "order"
    units = many(plan.orders, unit)
    counts = f"{plan.queued:,} queued, {plan.waiting:,} already waiting"
    return f"Plan {plan.id} {plan.state}: {units}, {counts}{skipped}{left}."
