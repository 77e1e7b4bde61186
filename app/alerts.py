"""What looks wrong at this moment, read off the vital signs and the counters. Pure; onset.py makes alerts of it.

When a sign becomes an alert, and when it is one no more: each is told once, at its onset and at its end. Pure.

Is a company silent? No event comes, although one should: pure, the time is an argument.

A sender that has stopped, or a subscription that is gone, fails no request of ours; only what does not come tells.

The alerts' memory: whose minute it is to look, what was raised when, and how many events each hour usually has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import msgspec
from redis import Redis

from app.ledger import keys, policy
from app.metrics import METRICS, is_open
from app.snapshot import AlertState, Subject, Vitals, read_alert

EVERY: Final = policy.MINUTE
"""Between two looks, over all machines."""

HOUR: Final = 60 * policy.MINUTE
HOURS_KEPT: Final = (4 * 7 + 2) * 24
"""Four weeks, and what a window that began yesterday reaches beyond them."""

_HOUR_FIELD: Final = "hour:"


class Watch:
    """Reads and writes it; raises what Redis raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def take_turn(self) -> bool:
        """Return whether this pool is to look now; if it dies at it, another does a minute later."""
        return bool(self._redis.set(keys.ALERTS_TURN, 1, nx=True, px=EVERY - policy.SECOND))

    def totals(self) -> dict[tuple[str, ...], int]:
        """Return every counter by field prefix and label values."""
        kept: Any = self._redis.hgetall(keys.COUNTERS)
        known = METRICS.keys()
        fields = {tuple(field.decode(errors="replace").split("|")): value for field, value in kept.items()}
        return {name: int(value) for name, value in fields.items() if name[0] in known}

    def hours(self, company_id: str, now: int) -> dict[int, int]:
        """Return hour since 1970 -> events of the company that were new in it; those long past are forgotten."""
        kept: Any = self._redis.hgetall(keys.event_rate(company_id))
        prefix = _HOUR_FIELD.encode()
        found = {int(field[len(prefix) :]): int(value) for field, value in kept.items() if field.startswith(prefix)}
        if old := [hour for hour in found if hour < now // HOUR - HOURS_KEPT]:
            self._redis.hdel(keys.event_rate(company_id), *(f"{_HOUR_FIELD}{hour}" for hour in old))
        return {hour: count for hour, count in found.items() if hour not in old}

    def states(self) -> dict[str, AlertState]:
        """Return the state of each alert by its field."""
        kept: Any = self._redis.hgetall(keys.ALERTS)
        found = {field.decode(errors="replace"): read_alert(text) for field, text in kept.items()}
        return {field: state for field, state in found.items() if state is not None}

    def save(self, states: Mapping[str, AlertState]) -> None:
        """Put these states in the place of all that were kept."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.ALERTS)
            if states:
                pipe.hset(keys.ALERTS, mapping={field: msgspec.json.encode(state) for field, state in states.items()})
            pipe.execute()


WEEK: Final = 7 * policy.DAY
WEEKS: Final = 4

QUIET: Final = 30 * policy.MINUTE
"""No company is silent sooner: senders hold batches back, and guests come in groups."""

WINDOW: Final = policy.DAY
"""No longer window is compared: it holds every hour of a day, so whoever is usually heard in any of them is missed."""

ENOUGH: Final = 5.0
"""Events that usually come in such a window. With fewer, none at all is no news."""

OPEN: Final = 10 * policy.MINUTE
"""An order settles about a minute after createOrder, and an event tells of it; after so many one should have come."""

MISSED_WITHIN: Final = 60 * policy.MINUTE
"""How long it counts that the list showed settled orders of which no event had told."""

Reason = Literal["missed_events", "open_orders", "usual"]
"""`missed_events`: the list shows settled orders of which no event told, and none has come for QUIET.
`open_orders`: the list shows an order unsettled since OPEN, and no event has come since it was seen.
`usual`: at this time of the week events usually come."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a company; moments in ms since 1970, 0 for never. `hours`: hour since 1970 -> new events.

    `missed`: when a missed event was found last; `unsettled_since`: when the oldest unsettled order was first seen.
    """

    last: int
    missed: int
    unsettled_since: int
    hours: Mapping[int, int]


class Silence(msgspec.Struct, frozen=True):
    """It is silent: why, for how many ms (0 if it was never heard), and how many events usually come in that time."""

    reason: Reason
    quiet: int
    usual: float | None


def of(heard: Heard, now: int) -> Silence | None:
    """Return the silence of a company at `now`, None if there is none."""
    # A clock that was ahead wrote a moment to come: that is now.
    last = min(heard.last, now)
    quiet = now - last if last else 0
    usual = usual_count(heard.hours, max(last, now - WINDOW), now)
    # Found later than it happened: what has come since then shows that the sender lives.
    is_quiet = not last or quiet >= QUIET
    if heard.missed > last and now - heard.missed < MISSED_WITHIN and is_quiet:
        return Silence("missed_events", quiet, usual)
    if heard.unsettled_since > last and now - heard.unsettled_since >= OPEN:
        return Silence("open_orders", quiet, usual)
    if is_quiet and usual is not None and usual >= ENOUGH:
        return Silence("usual", quiet, usual)
    return None


def usual_count(hours: Mapping[int, int], start: int, end: int) -> float | None:
    """Return how many events at least come between two moments of a week (ms), None while fewer than two weeks tell.

    The least of the last four weeks, but for one: a holiday, or a silence, among them must neither hide the next one
    nor cause an alert.
    """
    first = min(hours, default=None)
    if first is None:
        return None
    weeks = range(1, WEEKS + 1)
    told = [
        _between(hours, start - week * WEEK, end - week * WEEK) for week in weeks if start - week * WEEK >= first * HOUR
    ]
    if len(told) < 2:
        return None
    return sorted(told)[1 if len(told) > 2 else 0]


def _between(hours: Mapping[int, int], start: int, end: int) -> float:
    """Count events between two moments; of an hour that is only in part between them, that part."""
    total = 0.0
    for hour in range(start // HOUR, end // HOUR + 1):
        share = min(end, (hour + 1) * HOUR) - max(start, hour * HOUR)
        total += hours.get(hour, 0) * share / HOUR
    return total


LATE: Final = 5 * policy.MINUTE
"""Age of an owed fetch that somebody should know of; in a healthy hour it is seconds."""

SILENT_POOL: Final = policy.MINUTE
"""A pool beats each second; one that was told to stop takes itself out of the list."""

Totals = Mapping[tuple[str, ...], int]
"""Every counter by field prefix and label values, with company ids."""


class Sign(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that may be wrong, and whether it is.

    `count`: a counter that is wrong when it rises, instead of `is_on`. `figure` is what the log line tells: seconds,
    or how many. `company` is a slug, `sink` a name of SINKS, "" where the alert is of neither.
    """

    name: str
    company: str = ""
    sink: str = ""
    is_on: bool = False
    count: int | None = None
    figure: float = 0
    reason: str = ""
    usual: float | None = None

    @property
    def field(self) -> str:
        """Return what it is kept under."""
        return f"{self.name}|{self.company}|{self.sink}"


class Seen(msgspec.Struct, frozen=True):
    """All that is looked at. `hours`: company id -> hour since 1970 -> new events; `states`: what was known before."""

    vitals: Vitals
    totals: Totals
    hours: Mapping[str, Mapping[int, int]]
    states: Mapping[str, AlertState]


def read(seen: Seen, subjects: tuple[Subject, ...]) -> list[Sign]:
    """Return every sign, on or not: an alert that is no more is one whose sign is off."""
    return [
        *(sign for one in subjects for sign in _of_company(seen, one)),
        *_of_sinks(seen),
        _of_pools(seen.vitals),
    ]


def _of_company(seen: Seen, one: Subject) -> Iterator[Sign]:
    vitals, slug, now = seen.vitals.companies[one.company_id], one.slug, seen.vitals.now
    yield Sign(name="fetch_late", company=slug, is_on=vitals.oldest_owed > LATE, figure=_seconds(vitals.oldest_owed))
    yield Sign(name="breaker_open", company=slug, is_on=is_open(seen.vitals, one.company_id))
    previous = vitals.previous_seen
    yield Sign(
        name="previous_secret",
        company=slug,
        is_on=previous > 0 and now - previous < policy.DAY,
        figure=_seconds(now - previous) if previous else 0,
    )
    dead = _total(seen.totals, "dead", one.company_id)
    yield Sign(name="dead_letters", company=slug, count=dead, figure=seen.vitals.dead)
    rejected = _total(seen.totals, "rejected", one.company_id)
    yield Sign(name="rejected_secrets", company=slug, count=rejected, figure=rejected)
    missed = seen.totals.get(("gaps", one.company_id, "never_heard"), 0)
    sign = Sign(name="missed_events", company=slug, count=missed, figure=missed)
    yield sign
    found = of(
        Heard(
            last=vitals.last_event,
            missed=seen.states.get(sign.field, AlertState()).seen,
            unsettled_since=vitals.unsettled_since,
            hours=seen.hours.get(one.company_id, {}),
        ),
        now,
    )
    if found is None:
        yield Sign(name="silence", company=slug)
    else:
        quiet, usual = _seconds(found.quiet), found.usual
        yield Sign(name="silence", company=slug, is_on=True, figure=quiet, reason=found.reason, usual=usual)


def _of_sinks(seen: Seen) -> Iterator[Sign]:
    for name, sink in seen.vitals.sinks.items():
        yield Sign(name="sink_failing", sink=name, is_on=sink.failing > 0, figure=sink.failing)
        total = seen.totals.get(("deliveries_dead_lettered", name), 0)
        yield Sign(name="dead_deliveries", sink=name, count=total, figure=total)


def _of_pools(vitals: Vitals) -> Sign:
    ages = [vitals.now - pool.beat for pool in vitals.heartbeats()]
    silent = [age for age in ages if age > SILENT_POOL]
    return Sign(name="pool_silent", is_on=bool(silent), figure=_seconds(max(silent, default=0)))


def _total(totals: Totals, prefix: str, company_id: str) -> int:
    return sum(count for name, count in totals.items() if name[:2] == (prefix, company_id))


def _seconds(milliseconds: int) -> int:
    return round(milliseconds / 1000)


MINUTE: Final = policy.MINUTE


class Rule(msgspec.Struct, frozen=True):
    """In ms: `hold` for how long the sign must be seen first, `calm` for how long it must not be seen to end it,
    `again` after which an alert that lasts is told anew, 0 for never.
    """

    hold: int = 0
    calm: int = 0
    again: int = 0


RULES: Final[dict[str, Rule]] = {
    "fetch_late": Rule(),
    "breaker_open": Rule(hold=5 * MINUTE),
    # A rotation takes a day or two; after a week the old secret was forgotten somewhere.
    "previous_secret": Rule(hold=7 * policy.DAY, calm=policy.DAY),
    "dead_letters": Rule(calm=60 * MINUTE),
    "dead_deliveries": Rule(calm=60 * MINUTE),
    "rejected_secrets": Rule(calm=60 * MINUTE),
    "missed_events": Rule(calm=60 * MINUTE),
    "sink_failing": Rule(hold=10 * MINUTE, calm=2 * MINUTE),
    "pool_silent": Rule(),
    "silence": Rule(again=60 * MINUTE),
}
"""Every alert of the log; docs/operations.md has a section on each."""


class Change(msgspec.Struct, frozen=True):
    """What is to be told; `since` ms since 1970 is when its sign was first seen."""

    what: Literal["raised", "again", "cleared"]
    sign: Sign
    since: int


def judge(
    signs: Iterable[Sign], states: Mapping[str, AlertState], now: int
) -> tuple[dict[str, AlertState], list[Change]]:
    """Return the states from now on and what is to be told. What has no sign any more (a company that the settings no
    longer name) has ended.
    """
    after: dict[str, AlertState] = {}
    changes: list[Change] = []
    for sign in signs:
        was = _not_ahead(states.get(sign.field, AlertState()), now)
        after[sign.field], what = _next(sign, RULES[sign.name], was, now)
        if what is not None:
            changes.append(Change(what, sign, was.since or now))
    for field, was in states.items():
        if field not in after and was.raised:
            name, company, sink = field.split("|")
            changes.append(Change("cleared", Sign(name=name, company=company, sink=sink), was.since))
    return after, changes


def _next(
    sign: Sign, rule: Rule, was: AlertState, now: int
) -> tuple[AlertState, Literal["raised", "again", "cleared"] | None]:
    count = -1 if sign.count is None else sign.count
    # Seen for the first time, or lower than before (Redis was flushed), a counter says nothing yet.
    is_on = sign.is_on if sign.count is None else 0 <= was.count < count
    seen = now if is_on else was.seen
    if not is_on and not (was.since and now - seen < rule.calm):
        # When it was seen last is kept: silence.py asks for it.
        return AlertState(seen=was.seen, count=count), "cleared" if was.raised else None
    state = AlertState(since=was.since or now, seen=seen, raised=was.raised, told=was.told, count=count)
    if not was.raised:
        if now - state.since < rule.hold:
            return state, None
        return msgspec.structs.replace(state, raised=now, told=now), "raised"
    if rule.again and now - was.told >= rule.again:
        return msgspec.structs.replace(state, told=now), "again"
    return state, None


def _not_ahead(state: AlertState, now: int) -> AlertState:
    """Return the state with nothing in it that is still to come: a clock was ahead, and is right again."""
    return AlertState(
        since=min(state.since, now),
        seen=min(state.seen, now),
        raised=min(state.raised, now),
        told=min(state.told, now),
        count=state.count,
    )
