"""`events replay`: the orders of stored events once more, as a plan with a rate, an id and an audit.

Feeding a plan: its orders go to the backfill queue at its rate, for as long as this process lives.

What a replay would cost: orders, getOrder calls, and the time at a rate.

The commands for the plans of replays: list, resume, cancel.
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
from app.replay import Draft, Plan, Selected, Selection, is_plan_id
from app.settings import Settings

_SHORTEST: Final = 10
"""ms between two steps: at a high rate each takes several orders."""

_LONGEST: Final = 1000
"""ms between two steps at a low rate, so that a cancelled plan ends its feeders soon."""


def feed(here: CommandContext, plan: Plan) -> Plan:
    """Feed the plan until it ends, here or by another hand; return it as it is then.

    However this process ends before, the plan stands where it was; what can be told is told.
    """
    if here.settings.backfill_workers == 0:
        console.remark("BACKFILL_WORKERS is 0 here: unless another machine has one, these orders will wait.")
    if unknown := [sink for sink in plan.sinks if sink not in here.settings.sinks]:
        console.remark(f"{', '.join(unknown)} is not in SINKS here: unless the workers have it, nothing is handed on.")
    left = plan.left
    try:
        with console.progress(f"replay {plan.id}", plan.left) as step:
            while True:
                fed = here.plans.feed(plan)
                step(left - fed.left)
                left = fed.left
                if fed.state != "open":
                    break
                time.sleep(min(max(fed.wait, _SHORTEST), _LONGEST) / 1000)
    except BaseException:
        console.remark(
            f"Stopped: {console.many(left, 'order')} of plan {plan.id} still to do."
            f" Go on with: ota-receiver replays resume {plan.id}"
        )
        raise
    ended = here.plans.of(plan.id)
    if ended is None:
        raise Stop(f"Plan {plan.id} is here no more.", FOUND)
    return ended


def end(plan: Plan, as_json: bool) -> None:
    """Print how a plan stands when its feeding has ended; exit code 1 if somebody cancelled it meanwhile."""
    console.tell(sentence(plan), view(plan), as_json)
    if plan.state != "done":
        raise typer.Exit(FOUND)


def sentence(plan: Plan) -> str:
    """Return how far a plan is."""
    passed = f", {plan.passed:,} passed over" if plan.passed else ""
    left = f", {plan.left:,} left" if plan.left else ""
    unit = "hand-on" if plan.sinks else "order"
    return (
        f"Plan {plan.id} {plan.state}: {console.many(plan.orders, unit)}, {plan.queued:,} queued,"
        f" {plan.waiting:,} waiting already{passed}{left}."
    )


def view(plan: Plan) -> dict[str, object]:
    """Return a plan for machines."""
    return msgspec.structs.asdict(plan)


def find(here: CommandContext, plan_id: str) -> Plan:
    """Return the plan; raises Stop when there is none."""
    plan = here.plans.of(plan_id) if is_plan_id(plan_id) else None
    if plan is None:
        raise Stop(f"No plan {plan_id!r} is here; `ota-receiver replays list` shows them.", FOUND)
    return plan


GET_ORDER: Final = 0.25
"""Seconds that a getOrder is taken to need: what a slot gives of the default rate. A faster upstream leaves it idle."""

SHARE: Final = 0.2
"""Of UPSTREAM_REQUESTS_PER_5_MIN: what replays may take by default, the rest is for live orders."""

_WINDOW: Final = 300


def default_rate(settings: Settings) -> float:
    """Return orders a second that the backfill's part of the budget carries."""
    by_slots = settings.backfill_concurrency / GET_ORDER
    by_window = SHARE * settings.upstream_requests_per_5_min / _WINDOW
    return min(by_slots, by_window)


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a selection comes to.

    `events` were selected, of `orders`; `passed` of them need nothing, `to_do` do. `seconds` at `rate` orders a second
    end at `ends`, if it began now.
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

    @classmethod
    def of(
        cls,
        events: int,
        orders: int,
        passed: int,
        *,
        sinks: tuple[str, ...],
        rate: float,
        now: datetime,
        dry_run: bool,
    ) -> Forecast:
        """Return the forecast of a plan that begins `now`."""
        to_do = orders - passed
        seconds = round(to_do / rate)
        return cls(
            events=events,
            orders=orders,
            passed=passed,
            to_do=to_do,
            get_order_calls=0 if sinks else to_do,
            sinks=sinks,
            rate=round(rate, 3),
            seconds=seconds,
            ends=now + timedelta(seconds=seconds),
            dry_run=dry_run,
        )

    def sentence(self) -> str:
        """Return what would be done, without the end of the sentence."""
        orders = console.many(self.to_do, "order")
        if self.sinks:
            what = f"Hand {orders} on to {', '.join(self.sinks)} once more (no getOrder)"
        else:
            what = f"Fetch {orders} once more ({console.many(self.get_order_calls, 'getOrder call')})"
        span = times.age(timedelta(seconds=self.seconds))
        return f"{what}: at {self.rate:g}/s that takes {span}, until {times.short(self.ends)}"

    def passed_over(self) -> str:
        """Return why orders are passed over, "" if none is."""
        if not self.passed:
            return ""
        if self.sinks:
            return f"{console.many(self.passed, 'order')} passed over: nothing of them is stored."
        return (
            f"{console.many(self.passed, 'order')} passed over: the stored copy is newer than the event;"
            " --force fetches them too."
        )

    def tell(self, as_json: bool) -> None:
        """Print the plan: a table for people, or an object."""
        if as_json:
            console.json_line(self)
            return
        facts = (
            ("events", f"{self.events:,}"),
            ("orders", f"{self.orders:,}"),
            ("passed over", self.passed_over()),
            ("getOrder calls", f"{self.get_order_calls:,}"),
            ("hand-ons to", ", ".join(self.sinks)),
            ("rate", f"{self.rate:g} orders/s"),
            ("takes", times.age(timedelta(seconds=self.seconds))),
            ("would end", times.short(self.ends)),
        )
        console.facts("dry run: nothing was changed", facts)


Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Event ids, as `events list` shows them.")]
Orders = Annotated[list[str] | None, typer.Option("--order", help="An order, by orderId or reference; repeatable.")]
Dead = Annotated[bool, typer.Option("--dead", help="Only orders with a dead letter.")]
Force = Annotated[bool, typer.Option("--force", help="Also orders whose stored copy is newer than the event.")]
ToSinks = Annotated[
    bool, typer.Option("--to-sinks", help="Hand the stored revision to all SINKS again instead of fetching.")
]
SinkNames = Annotated[list[str] | None, typer.Option("--sink", help="Like --to-sinks, to this one; repeatable.")]
Rate = Annotated[
    float | None,
    typer.Option("--rate", min=0.01, max=5000, help="Orders a second; else what the backfill's budget carries."),
]
Why = Annotated[str, typer.Option("--why", help="For the audit; one line.")]
Who = Annotated[str | None, typer.Option("--who", help="For the audit, instead of user@host.")]

EPILOG: Final = epilog(
    "ota-receiver events replay --since 6h --status Issued --dry-run",
    'ota-receiver events replay --dead --why "venue is back" --yes',
    "ota-receiver events replay --order CM-4711 --force",
    "ota-receiver events replay --since 2d --to-sinks --rate 20",
)


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
    why: Why = "",
    who: Who = None,
    dry_run: context.DryRun = False,
    yes: context.Yes = False,
    as_json: context.Json = False,
) -> None:
    """Fetch the orders of stored events once more: each order once, oldest first, at a rate, behind the live ones.

    All conditions must hold; event ids and --order together name what is looked through. An order whose stored copy is
    newer than its last selected event is passed over, unless --force. The replay is a plan: Ctrl-C stops it, and
    `replays resume` goes on where it stood, `replays cancel` ends it.
    """
    if not any((ids, order, company, status, outcome, since, until, dead)):
        raise Stop("Say what to replay: event ids, --order, --dead, or a selection; everything is --since 2000-01-01.")
    asks, reason = context.who_asks(who), context.printable(why, "--why")
    if force and (to_sinks or sink):
        raise Stop("--force is about fetching; --to-sinks fetches nothing.")
    wrong = next((one for one in ids or [] if not is_event_id(one)), None)
    if wrong is not None:
        raise Stop(f"{wrong!r} is no event id. An order is named by --order.")
    with open_context(company) as here:
        sinks = _sinks(here, to_sinks, sink or [])
        company_id = here.company_id
        selection = Selection(
            event_ids=tuple(dict.fromkeys(ids or [])),
            orders=tuple(dict.fromkeys(here.order(text) for text in order or [])),
            company_id=company_id,
            status=status,
            outcome=outcome,
            since=since,
            until=until,
            dead=dead,
        )
        with console.progress("reading events") as step:
            found = here.selector.select(selection, step)
        for text in found.missing:
            console.remark(f"No event {text!r} is here.")
        if not found.orders:
            raise Stop("No event matches.", FOUND)
        for erased in here.erasure.erased_among([OrderKey.of(member) for member in found.orders]):
            del found.orders[erased.member]
        if not found.orders:
            raise Stop("All orders that match were erased.", FOUND)
        passed = _passed(here, found, force, sinks)
        speed = rate or default_rate(here.settings)
        forecast = Forecast.of(
            found.events,
            len(found.orders),
            len(passed),
            sinks=sinks,
            rate=speed,
            now=times.now(),
            dry_run=dry_run,
        )
        if dry_run:
            forecast.tell(as_json)
        elif not forecast.to_do:
            console.remark(forecast.passed_over())
            console.tell("Nothing to do.", forecast, as_json)
        else:
            if forecast.passed:
                console.remark(forecast.passed_over())
            console.confirm(f"{forecast.sentence()}?", yes)
            draft = Draft(who=asks, why=reason, selected=selection.words(), rate=speed, sinks=sinks)
            left = ((one, None if force else told) for one, told in found.orders.items() if one not in passed)
            plan = here.plans.file(draft, left)
            console.remark(f"Plan {plan.id}; Ctrl-C stops it, and `ota-receiver replays resume {plan.id}` goes on.")
            end(feed(here, plan), as_json)
    if found.missing:
        raise typer.Exit(FOUND)


def _sinks(here: CommandContext, everyone: bool, names: list[str]) -> tuple[str, ...]:
    """Return the sinks that the stored revision goes to, () for a replay that fetches."""
    known = here.settings.sinks
    if (names or everyone) and not known:
        raise Stop("SINKS is empty: there is nobody to hand on to.")
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise Stop(f"No sink {wrong!r} in the settings; there is: {', '.join(known)}.")
    return tuple(dict.fromkeys(names)) or (known if everyone else ())


def _passed(here: CommandContext, found: Selected, force: bool, sinks: tuple[str, ...]) -> set[str]:
    if sinks:
        return here.selector.without_content(found.orders)
    return set() if force else here.selector.up_to_date(found.orders)


cli = console.commands(name="replays", help="Plans made by `events replay`.")

PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="Id of the plan, as `replays list` shows it.")]


@cli.command("list", epilog=epilog("ota-receiver replays list --limit 5"))
def list_(limit: context.Limit = 20, as_json: context.Json = False) -> None:
    """List the latest plans, newest first: what was asked for, by whom and why, and how far it is."""
    with open_context() as here:
        found = list(islice(here.plans.newest_first(), limit))
        if as_json:
            for plan in found:
                console.json_line(view(plan))
        elif found:
            columns = (
                "=plan",
                f"made ({console.zone()})",
                "state",
                "#orders",
                "#left",
                "#rate",
                "selected",
                "who",
                "why",
            )
            rows = (
                (
                    plan.id,
                    times.short(plan.at),
                    plan.state,
                    f"{plan.orders:,}",
                    f"{plan.left:,}",
                    f"{plan.rate:g}",
                    " ".join((plan.selected, *(f"to {sink}" for sink in plan.sinks))),
                    plan.who,
                    plan.why,
                )
                for plan in found
            )
            console.table("", columns, rows)
    if not found:
        raise Stop("No plans.", FOUND)


@cli.command(epilog=epilog("ota-receiver replays resume k7m2qx --rate 2"))
def resume(plan_id: PlanId, rate: Rate = None, who: Who = None, as_json: context.Json = False) -> None:
    """Resume a replay. Several processes may feed one plan: they share its rate, and never an order."""
    asks = context.who_asks(who)
    with open_context() as here:
        plan = find(here, plan_id)
        if plan.state != "open":
            raise Stop(f"Plan {plan.id} is {plan.state} already.", FOUND)
        plan = here.plans.resume(plan, asks, rate)
        end(feed(here, plan), as_json)


@cli.command(epilog=epilog('ota-receiver replays cancel k7m2qx --why "too many"'))
def cancel(plan_id: PlanId, why: Why = "", who: Who = None, as_json: context.Json = False) -> None:
    """End a plan: nothing more is queued, what was queued stays so. Whoever feeds it stops within seconds."""
    asks, reason = context.who_asks(who), context.printable(why, "--why")
    with open_context() as here:
        plan = find(here, plan_id)
        if plan.state != "open":
            raise Stop(f"Plan {plan.id} is {plan.state} already.", FOUND)
        plan = here.plans.cancel(plan, asks, reason)
        console.tell(sentence(plan), view(plan), as_json)
