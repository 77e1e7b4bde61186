"""`events replay` and the commands for its plans: list, resume, cancel.

A replay is a plan with a rate, an id and an entry in the audit. The command feeds the plan's orders to the backfill
queue for as long as it runs; whenever it ends, another one can resume the plan.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from itertools import islice
from typing import Annotated, Final

import msgspec
import typer

from app import times
from app.cli import console, context
from app.cli.console import FOUND, Stop, epilog
from app.cli.context import CommandContext, open_context
from app.ids import OrderKey
from app.ledger.events import is_event_id
from app.replay import Plan, Selection, is_plan_id
from app.settings import Settings

GET_ORDER: Final = 0.25
"""Seconds that a getOrder is assumed to take, for the default rate. With a faster upstream, permits stay unused."""

SHARE: Final = 0.2
"""Share of UPSTREAM_REQUESTS_PER_5_MIN that replays take by default; the rest is for live orders."""

_WINDOW: Final = 300
_SHORTEST_WAIT: Final = 10
"""ms between two steps: at a high rate each takes several orders."""

_LONGEST_WAIT: Final = 1000
"""ms between two steps at a low rate, so that a cancelled plan ends its feeders soon."""

EPILOG: Final = epilog(
    "ota-receiver events replay --since 6h --status Issued --dry-run",
    'ota-receiver events replay --dead --why "venue is back" --yes',
    "ota-receiver events replay --order CM-4711 --force",
    "ota-receiver events replay --since 2d --to-sinks --rate 20",
)

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Event ids, as `events list` shows them.")]
Orders = Annotated[list[str] | None, typer.Option("--order", help="An order, by orderId or reference; repeatable.")]
Dead = Annotated[bool, typer.Option("--dead", help="Only orders with a dead letter.")]
Force = Annotated[bool, typer.Option("--force", help="Also orders whose stored copy is newer than the event.")]
ToSinks = Annotated[
    bool, typer.Option("--to-sinks", help="Deliver the stored revision to all SINKS again, without a fetch.")
]
SinkNames = Annotated[list[str] | None, typer.Option("--sink", help="Like --to-sinks, to this one; repeatable.")]
Rate = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, max=5000, help="Orders a second. Default: the backfill's share of the limits."),
]
PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="Id of the plan, as `replays list` shows it.")]

cli = console.commands(name="replays", help="Plans made by `events replay`.")


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay of `events` means: of their `orders`, `passed` are skipped and `to_do` are not.

    At `rate` orders a second it takes `seconds`, until `ends` if it starts now.
    """

    events: int
    orders: int
    passed: int
    to_do: int
    get_order_calls: int
    sinks: tuple[str, ...]
    rate: float
    seconds: int
    ends: datetime
    dry_run: bool

    def question(self) -> str:
        orders = console.many(self.to_do, "order")
        what = f"Fetch {orders} again ({console.many(self.get_order_calls, 'getOrder call')})"
        if self.sinks:
            what = f"Deliver {orders} to {', '.join(self.sinks)} again (no getOrder)"
        takes = times.age(timedelta(seconds=self.seconds))
        return f"{what}: at {self.rate:g}/s this takes {takes}, until {times.short(self.ends)}?"

    def skipped(self) -> str:
        """Return how many orders are skipped and why, "" if none is."""
        if not self.passed:
            return ""
        orders = f"{console.many(self.passed, 'order')} skipped"
        if self.sinks:
            return f"{orders}: nothing is stored of them."
        return f"{orders}: the stored copy is newer than the event; --force fetches them too."

    def facts(self) -> tuple[tuple[str, str], ...]:
        return (
            ("events", f"{self.events:,}"),
            ("orders", f"{self.orders:,}"),
            ("skipped", self.skipped()),
            ("getOrder calls", f"{self.get_order_calls:,}"),
            ("deliveries to", ", ".join(self.sinks)),
            ("rate", f"{self.rate:g} orders/s"),
            ("takes", times.age(timedelta(seconds=self.seconds))),
            ("would end", times.short(self.ends)),
        )


def default_rate(settings: Settings) -> float:
    """Return the orders a second that the backfill's permits and its share of the window allow."""
    by_permits = settings.backfill_concurrency / GET_ORDER
    by_window = SHARE * settings.upstream_requests_per_5_min / _WINDOW
    return min(by_permits, by_window)


def replay(
    ids: Ids = None,
    order: Orders = None,
    company: context.CompanyOption = None,
    status: context.Status = None,
    outcome: context.OutcomeOption = None,
    since: context.Since = None,
    until: context.Until = None,
    dead: Dead = False,
    force: Force = False,
    to_sinks: ToSinks = False,
    sink: SinkNames = None,
    rate: Rate = None,
    why: context.Why = "",
    who: context.Who = "",
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Fetch the orders of stored events again: each order once, oldest first, at a rate, after live orders.

    All conditions must hold; event ids and --order together say what is searched. An order whose stored copy is newer
    than its last selected event is skipped, unless --force. The replay is a plan: Ctrl-C stops it, `replays resume`
    continues it, and `replays cancel` ends it.
    """
    if not any((ids, order, company, status, outcome, since, until, dead)):
        raise Stop("Choose what to replay: event ids, --order, --dead, or a selection; --since 2000-01-01 is all.")
    if force and (to_sinks or sink):
        raise Stop("--force is about fetching; --to-sinks fetches nothing.")
    wrong = next((one for one in ids or [] if not is_event_id(one)), None)
    if wrong is not None:
        raise Stop(f"{wrong!r} is not an event id. For an order use --order.")
    with open_context(company) as here:
        sinks = _sinks(here.settings.sinks, to_sinks, sink or [])
        selection = Selection(
            event_ids=tuple(dict.fromkeys(ids or [])),
            orders=tuple(dict.fromkeys(here.order(text) for text in order or [])),
            company_id=here.company_id,
            status=status,
            outcome=outcome,
            since=since,
            until=until,
            dead=dead,
        )
        with console.progress("reading events") as step:
            found = here.selector.select(selection, step)
        for text in found.missing:
            console.remark(f"No event {text!r} found.")
        if not found.orders:
            raise Stop("No event matches.", FOUND)
        for erased in here.erasure.erased_among([OrderKey.of(member) for member in found.orders]):
            del found.orders[erased.member]
        if not found.orders:
            raise Stop("All orders that match were erased.", FOUND)
        passed = set() if force else here.selector.needless(found.orders, deliver=bool(sinks))
        to_do, speed = len(found.orders) - len(passed), rate or default_rate(here.settings)
        seconds = round(to_do / speed)
        forecast = Forecast(
            events=found.events,
            orders=len(found.orders),
            passed=len(passed),
            to_do=to_do,
            get_order_calls=0 if sinks else to_do,
            sinks=sinks,
            rate=round(speed, 3),
            seconds=seconds,
            ends=times.now() + timedelta(seconds=seconds),
            dry_run=dry_run,
        )
        if dry_run and as_json:
            console.json_line(forecast)
        elif dry_run:
            console.facts("dry run: nothing was changed", forecast.facts())
        else:
            if passed:
                console.remark(forecast.skipped())
            if to_do:
                console.confirm(forecast.question(), yes)
                left = ((one, None if force else at) for one, at in found.orders.items() if one not in passed)
                plan = here.plans.file(left, rate=speed, sinks=sinks, selected=selection.words(), who=who, why=why)
                console.remark(
                    f"Plan {plan.id}; Ctrl-C stops it, `ota-receiver replays resume {plan.id}` continues it."
                )
                _finish(here, plan, as_json)
            else:
                console.result("Nothing to do.", forecast, as_json)
    if found.missing:
        raise typer.Exit(FOUND)


@cli.command("list", epilog=epilog("ota-receiver replays list --limit 5"))
def list_(limit: context.Limit = 20, as_json: context.Json = False) -> None:
    """List the latest plans, newest first: what was requested, by whom and why, and how much is left."""

    def row(plan: Plan) -> tuple[str, ...]:
        selected = " ".join((plan.selected, *(f"to {sink}" for sink in plan.sinks)))
        counts = (f"{plan.orders:,}", f"{plan.left:,}", f"{plan.rate:g}")
        return (plan.id, times.short(plan.at), plan.state, *counts, selected, plan.who, plan.why)

    with open_context() as here:
        console.listing(
            list(islice(here.plans.newest_first(), limit)),
            as_json,
            columns=(
                *("=plan", f"made ({console.zone()})", "state"),
                *("#orders", "#left", "#rate", "selected", "who", "why"),
            ),
            row=row,
            view=msgspec.structs.asdict,
            nothing="No plans.",
        )


@cli.command(epilog=epilog("ota-receiver replays resume k7m2qx --rate 2"))
def resume(plan_id: PlanId, rate: Rate = None, who: context.Who = "", as_json: context.Json = False) -> None:
    """Resume a replay. Several processes may feed one plan: they share its rate, and no order is fed twice."""
    with open_context() as here:
        plan = here.plans.resume(_open_plan(here, plan_id), who, rate)
        _finish(here, plan, as_json)


@cli.command(epilog=epilog('ota-receiver replays cancel k7m2qx --why "too many"'))
def cancel(plan_id: PlanId, why: context.Why = "", who: context.Who = "", as_json: context.Json = False) -> None:
    """Cancel a replay: nothing more is queued, what is queued stays. Its feeders stop within seconds."""
    with open_context() as here:
        plan = here.plans.cancel(_open_plan(here, plan_id), who, why)
        console.result(_sentence(plan), plan, as_json)


def _sinks(known: tuple[str, ...], everyone: bool, names: list[str]) -> tuple[str, ...]:
    """Return the sinks that the stored revision goes to, () for a replay that fetches."""
    if (names or everyone) and not known:
        raise Stop("SINKS is empty: there is no sink to deliver to.")
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise Stop(f"No sink {wrong!r} in the settings. There are: {', '.join(known)}.")
    return tuple(dict.fromkeys(names)) or (known if everyone else ())


def _open_plan(here: CommandContext, plan_id: str) -> Plan:
    """Return the plan; raises Stop when there is none, or it has ended."""
    plan = here.plans.of(plan_id) if is_plan_id(plan_id) else None
    if plan is None:
        raise Stop(f"No plan {plan_id!r} found; `ota-receiver replays list` shows them.", FOUND)
    if plan.state != "open":
        raise Stop(f"Plan {plan.id} is already {plan.state}.", FOUND)
    return plan


def _finish(here: CommandContext, plan: Plan, as_json: bool) -> None:
    """Feed the plan until it ends, and print it; exit code 1 if it was cancelled meanwhile.

    However this process ends earlier, the plan stays as it is, and a line says how to resume it.
    """
    here.warn_without_backfill()
    if unknown := [sink for sink in plan.sinks if sink not in here.settings.sinks]:
        names = ", ".join(unknown)
        console.remark(f"{names} is not in SINKS here: nothing is delivered unless the workers' SINKS have it.")
    left = plan.left
    try:
        with console.progress(f"replay {plan.id}", plan.left) as step:
            while True:
                fed = here.plans.feed(plan)
                step(left - fed.left)
                left = fed.left
                if fed.state != "open":
                    break
                time.sleep(min(max(fed.wait, _SHORTEST_WAIT), _LONGEST_WAIT) / 1000)
    except BaseException:
        orders = console.many(left, "order")
        console.remark(f"Stopped: {orders} of plan {plan.id} left. Resume: ota-receiver replays resume {plan.id}")
        raise
    ended = here.plans.of(plan.id)
    if ended is None:
        raise Stop(f"Plan {plan.id} no longer exists.", FOUND)
    console.result(_sentence(ended), ended, as_json)
    if ended.state != "done":
        raise typer.Exit(FOUND)


def _sentence(plan: Plan) -> str:
    skipped = f", {plan.passed:,} skipped" if plan.passed else ""
    left = f", {plan.left:,} left" if plan.left else ""
    units = console.many(plan.orders, "delivery" if plan.sinks else "order")
    counts = f"{plan.queued:,} queued, {plan.waiting:,} already waiting"
    return f"Plan {plan.id} {plan.state}: {units}, {counts}{skipped}{left}."
