"""The plans of replays on the ops page: their list and their progress, cancel and resume, and requeueing dead letters.

A bulk action is a plan: its page shows what it costs and asks why, and then it can be watched and cancelled.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, Final, get_args

import msgspec
from starlette.responses import Response

from app.explain.stores import Stores
from app.explain.words import many
from app.ledger.dead_letters import DeadQuery, DeadTotal
from app.ledger.pages import Page
from app.ops.access import Refused
from app.ops.app import Screen, Visit, see_other
from app.ops.filters import FETCHES, Filter
from app.ops.lists import MOST_COUNTED, dead_query, show_list
from app.ops.pages import Pages
from app.replay import WINDOW, Plan, State, default_rate

SLOWEST, FASTEST = 0.01, 5000.0
"""Orders a second, as for the commands."""

STATES: Final[tuple[str, ...]] = get_args(State)

_DEAD: Final = frozenset({"company", "reason", "sink", "since", "until"})
_PLAN_ID: Final = re.compile(r"[0-9a-f]{6}")


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan of so many dead letters costs.

    `calls` of the `window` calls that an API key has in 5 min: what it takes of them at most, if all are of one key.
    """

    total: DeadTotal
    seconds: int
    ends: datetime
    calls: int
    window: int


class PlanPages:
    """The screens below `/replays`, and `/dead/plan`. Their methods raise what redis-py raises."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def screens(self) -> list[Screen]:
        form = _DEAD | {"rate"}
        return [
            Screen("/replays", self.list_, frozenset({"state", "since", "until", "after", "seen"})),
            Screen("/replays/{plan}", self.show),
            Screen("/replays/{plan}/cancel", self.cancel, frozenset({"why"}), "POST"),
            Screen("/replays/{plan}/resume", self.resume, frozenset({"why"}), "POST"),
            Screen("/dead/plan", self.offer, form, needs="act"),
            Screen("/dead/plan", self.make, form | {"why", "plan", "show"}, "POST"),
        ]

    def list_(self, visit: Visit) -> Response:
        """Return the plans, the latest first."""
        chosen = Filter(visit.query, visit.stores)
        state: Any = chosen.one_of("state", STATES)
        since, until = chosen.time("since"), chosen.time("until")

        # The rows are refreshed, and yet none comes above those that are read.
        last = min(filter(None, (until, chosen.moment("seen"))), default=None)

        def read(since: datetime | None, after: str | None, limit: int) -> Page[Plan]:
            return visit.stores.plans.page(after, limit, state=state, since=since, until=last)

        def read_new(since: datetime | None, after: str | None, limit: int) -> Page[Plan]:
            return visit.stores.plans.page(after, limit, state=state, since=since, until=until)

        return show_list(self._pages, visit, "replays.html", chosen, since, read, read_new, states=STATES)

    def show(self, visit: Visit) -> Response:
        """Return one plan with its progress."""
        plan, now = _plan(visit), visit.stores.now()
        what = "Fetch orders again, with a getOrder for each"
        skipped = "Skipped: their stored copy is newer, or nothing is stored of them, or they were erased."
        if plan.kind == "dead":
            what = "Requeue dead letters: each is fetched or delivered again"
            skipped = "Skipped: somebody has requeued or discarded them meanwhile, or they were erased."
        elif plan.sinks:
            what = f"Deliver the stored content to {', '.join(plan.sinks)} again, without a getOrder"
        ends = None if plan.is_over else now + timedelta(seconds=plan.left / plan.rate)
        return self._pages.page("plan.html", visit.user, visit.here, plan=plan, what=what, skipped=skipped, ends=ends)

    def cancel(self, visit: Visit) -> Response:
        """End a plan."""
        plan = visit.stores.plans.cancel(_plan(visit), visit.user.who, visit.why())
        return see_other(f"/replays/{plan.id}")

    def resume(self, visit: Visit) -> Response:
        """Feed a plan from this page from now on."""
        plan = visit.stores.plans.resume(_plan(visit), visit.user.who, visit.why(), fed_by="ops")
        return see_other(f"/replays/{plan.id}")

    def offer(self, visit: Visit) -> Response:
        """Return what it costs to requeue the dead letters of a filter, and the form that asks why."""
        return self._offer(visit, Filter(visit.query, visit.stores))

    def make(self, visit: Visit) -> Response:
        """Make the plan that requeues them; with `show`, and with 400 if a field is wrong, the form again."""
        stores, chosen = visit.stores, Filter(visit.form, visit.stores)
        if chosen.text("show"):
            # A POST too: what was typed is in no address, so in no log of a proxy, and no link repeats the plan's id.
            return self._offer(visit, chosen)
        query, rate = dead_query(chosen, stores.now()), chosen.number("rate", SLOWEST, FASTEST)
        why, plan_id = "", chosen.text("plan") or ""
        try:
            why = visit.why()
        except Refused as refusal:
            chosen.errors["why"] = refusal.detail
        if not _PLAN_ID.fullmatch(plan_id) or not chosen.text("until"):
            chosen.errors["plan"] = "The form was cut, or changed."
        if chosen.errors:
            return self._offer(visit, chosen)
        count = stores.dead_letters.total(query, MOST_COUNTED).count
        plan = stores.plans.draft(
            plan_id,
            query,
            count=count,
            rate=rate or default_rate(stores.settings),
            selected=_words(query, stores),
            who=visit.user.who,
            why=why,
        )
        return see_other(f"/replays/{plan.id}")

    def _offer(self, visit: Visit, chosen: Filter) -> Response:
        stores, now = visit.stores, visit.stores.now()
        query = dead_query(chosen, now)
        rate = chosen.number("rate", SLOWEST, FASTEST) or round(default_rate(stores.settings), 3)
        bad_filter = chosen.errors.keys() & _DEAD
        # From here on the same letters, however long the page is looked at: `2h` would mean others later.
        hidden = {name: chosen.typed[name] for name in ("company", "reason", "sink")}
        hidden["since"] = "" if query.since is None else query.since.isoformat()
        hidden["until"] = query.until.isoformat()
        hidden["plan"] = stores.plans.new_id()
        status = int(HTTPStatus.BAD_REQUEST if chosen.errors else HTTPStatus.OK)
        return self._pages.page(
            "dead_plan.html",
            visit.user,
            visit.here,
            status,
            chosen=chosen.typed,
            errors=chosen.errors,
            forecast=None if bad_filter else _forecast(stores, query, rate, now),
            selected=_words(query, stores),
            until=query.until,
            hidden={name: text for name, text in hidden.items() if text},
            rate=chosen.typed["rate"] or f"{rate:g}",
            back=chosen.address("/dead", "rate", "why", "plan", "show"),
        )


def _forecast(stores: Stores, query: DeadQuery, rate: float, now: datetime) -> Forecast:
    total = stores.dead_letters.total(query, MOST_COUNTED)
    window = stores.settings.upstream_requests_per_5_min
    return Forecast(
        total=total,
        seconds=round(total.count / rate),
        ends=now + timedelta(seconds=total.count / rate),
        calls=round(min(total.fetches, rate * WINDOW)),
        window=window,
    )


def _plan(visit: Visit) -> Plan:
    """Return the plan of an address; raises Refused when there is none (any more)."""
    plan = visit.stores.plans.of(visit.path["plan"])
    if plan is None:
        detail = f"Plans are kept for {many(visit.stores.settings.event_days, 'day')}."
        raise Refused(HTTPStatus.NOT_FOUND, "not_found", "There is no such replay", detail)
    return plan


def _words(query: DeadQuery, stores: Stores) -> str:
    """Return the selection on one line, for the audit and for lists of plans."""
    named = {
        "company": query.company_id and stores.slug(query.company_id),
        "sink": FETCHES if query.sink == "" else query.sink,
        "reason": query.reason,
        "since": query.since and query.since.isoformat(timespec="seconds"),
        "until": query.until.isoformat(timespec="seconds"),
    }
    return " ".join(["dead letters", *(f"{name}={text}" for name, text in named.items() if text)])
