"""What a replay would cost: orders, getOrder calls, and the time at a rate."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec

from app.cli import moment, output
from app.settings import Settings

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
        orders = output.many(self.to_do, "order")
        if self.sinks:
            what = f"Hand {orders} on to {', '.join(self.sinks)} once more (no getOrder)"
        else:
            what = f"Fetch {orders} once more ({output.many(self.get_order_calls, 'getOrder call')})"
        span = moment.age(timedelta(seconds=self.seconds))
        return f"{what}: at {self.rate:g}/s that takes {span}, until {moment.short(self.ends)}"

    def passed_over(self) -> str:
        """Return why orders are passed over, "" if none is."""
        if not self.passed:
            return ""
        if self.sinks:
            return f"{output.many(self.passed, 'order')} passed over: nothing of them is stored."
        return (
            f"{output.many(self.passed, 'order')} passed over: the stored copy is newer than the event;"
            " --force fetches them too."
        )

    def tell(self, as_json: bool) -> None:
        """Print the plan: a table for people, or an object."""
        if as_json:
            output.json_line(self)
            return
        facts = (
            ("events", f"{self.events:,}"),
            ("orders", f"{self.orders:,}"),
            ("passed over", self.passed_over()),
            ("getOrder calls", f"{self.get_order_calls:,}"),
            ("hand-ons to", ", ".join(self.sinks)),
            ("rate", f"{self.rate:g} orders/s"),
            ("takes", moment.age(timedelta(seconds=self.seconds))),
            ("would end", moment.short(self.ends)),
        )
        output.facts("dry run: nothing was changed", facts)
