"""The commands for the plans of replays: list, resume, cancel."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from app import bootstrap
from app.cli import deeds, moment, options, output, replay_feed
from app.cli.exits import FOUND, Stop, epilog
from app.cli.replay import Rate, Who, Why
from app.cli.session import session

replays = typer.Typer(name="replays", no_args_is_help=True, help="The plans that `events replay` makes.")

PlanId = Annotated[str, typer.Argument(metavar="PLAN", help="Id of the plan, as `replays list` shows it.")]


def register(cli: typer.Typer) -> None:
    cli.add_typer(replays)


@replays.command("list", epilog=epilog("ota-receiver replays list --limit 5"))
def list_(limit: options.Limit = 20, as_json: options.Json = False) -> None:
    """List the latest plans, newest first: what was asked for, by whom and why, and how far it is."""
    with session() as here:
        found = list(islice(here.books.plans.newest_first(), limit))
        if as_json:
            for plan in found:
                output.json_line(replay_feed.view(plan))
        elif found:
            columns = (
                "=plan",
                f"made ({output.zone()})",
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
                    moment.short(plan.at),
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
            output.table("", columns, rows)
    if not found:
        raise Stop("No plans.", FOUND)


@replays.command(epilog=epilog("ota-receiver replays resume k7m2qx --rate 2"))
def resume(plan_id: PlanId, rate: Rate = None, who: Who = None, as_json: options.Json = False) -> None:
    """Go on with a plan where it stands. Several may at once: they share its rate, and never an order."""
    asks = deeds.who_asks(who)
    with session() as here:
        plan = replay_feed.find(here, plan_id)
        if plan.state != "open":
            raise Stop(f"Plan {plan.id} is {plan.state} already.", FOUND)
        plan = here.books.plans.resume(plan, asks, bootstrap.clock(), rate)
        replay_feed.end(replay_feed.feed(here, plan), as_json)


@replays.command(epilog=epilog('ota-receiver replays cancel k7m2qx --why "too many"'))
def cancel(plan_id: PlanId, why: Why = "", who: Who = None, as_json: options.Json = False) -> None:
    """End a plan: nothing more is queued, what was queued stays so. Whoever feeds it stops within seconds."""
    asks, reason = deeds.who_asks(who), deeds.printable(why, "--why")
    with session() as here:
        plan = replay_feed.find(here, plan_id)
        if plan.state != "open":
            raise Stop(f"Plan {plan.id} is {plan.state} already.", FOUND)
        plan = here.books.plans.cancel(plan, asks, reason, bootstrap.clock())
        output.tell(replay_feed.sentence(plan), replay_feed.view(plan), as_json)
