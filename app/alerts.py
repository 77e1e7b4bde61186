"""The alerts of the log: conditions over a snapshot and the counters, and the rules that turn them into alerts.

An alert is logged once when it fires and once when it is resolved. Everything but AlertStore is pure; the pools
evaluate (workers/background.py). Silence is the hardest condition: a stopped sender or a deleted subscription makes no
request fail, so only the missing events show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import msgspec
from redis import Redis

from app.ledger import keys, policy
from app.metrics import METRICS
from app.settings import Company
from app.snapshot import AlertState, Snapshot, decoded

EVERY: Final = policy.MINUTE
"""Between two evaluations, over all machines."""

MINUTE: Final = policy.MINUTE
HOUR: Final = 60 * MINUTE
WEEK: Final = 7 * policy.DAY
WEEKS: Final = 4
HOURS_KEPT: Final = (WEEKS * 7 + 2) * 24
"""Four weeks, and what a window that began yesterday reaches beyond them."""

LATE: Final = 5 * MINUTE
"""Age of a pending fetch that needs a look; normally it is seconds."""

POOL_SILENT: Final = MINUTE
"""A pool writes a heartbeat each second and removes it when it stops cleanly."""

QUIET: Final = 30 * MINUTE
"""No company is silent sooner: senders hold batches back, and guests come in groups."""

WINDOW: Final = policy.DAY
"""No longer window is compared: a day holds every hour at which events usually come."""

ENOUGH: Final = 5.0
"""Events that usually come in such a window. With fewer, their absence says nothing."""

OPEN: Final = 10 * MINUTE
"""An order settles about a minute after createOrder and causes an event; after this long one should have come."""

MISSED_WITHIN: Final = 60 * MINUTE
"""For this long, missed events that the order list showed count as a reason for silence."""

_HOUR_FIELD: Final = "hour:"

Reason = Literal["missed_events", "open_orders", "usual"]
"""`missed_events`: the list shows settled orders without an event, and none has come for QUIET. `open_orders`: the list
shows an order unsettled since OPEN, and no event has come since. `usual`: events usually come at this time of the week.
"""

Action = Literal["firing", "repeated", "resolved"]

Totals = Mapping[tuple[str, ...], int]
"""Every counter by field prefix and label values, with company ids."""


class Rule(msgspec.Struct, frozen=True):
    """How a condition becomes an alert; all in ms.

    It fires once the condition has been true for `hold`, and resolves once it has been false for `keep_firing`. An
    alert that lasts is logged again after `repeat`, 0 for never.
    """

    hold: int = 0
    keep_firing: int = 0
    repeat: int = 0


RULES: Final[dict[str, Rule]] = {
    "fetch_late": Rule(),
    "breaker_open": Rule(hold=5 * MINUTE),
    # A rotation takes a day or two; after a week the old secret was forgotten somewhere.
    "previous_secret": Rule(hold=7 * policy.DAY, keep_firing=policy.DAY),
    "dead_letters": Rule(keep_firing=60 * MINUTE),
    "dead_deliveries": Rule(keep_firing=60 * MINUTE),
    "rejected_secrets": Rule(keep_firing=60 * MINUTE),
    "missed_events": Rule(keep_firing=60 * MINUTE),
    "sink_failing": Rule(hold=10 * MINUTE, keep_firing=2 * MINUTE),
    "pool_silent": Rule(),
    "silence": Rule(repeat=60 * MINUTE),
}
"""Every alert of the log; docs/operations.md has a section on each."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that may be wrong, and whether it is.

    With `count`, the condition is true when this counter has risen; otherwise `is_true` says it. `figure` appears in
    the log: seconds, or a number. `company` is a slug and `sink` a name of SINKS, "" if the alert is about neither.
    """

    name: str
    company: str = ""
    sink: str = ""
    is_true: bool = False
    count: int | None = None
    figure: float = 0
    reason: str = ""
    usual: float | None = None

    @property
    def field(self) -> str:
        """Return the field of `ota:alerts` that holds its state."""
        return f"{self.name}|{self.company}|{self.sink}"


class Inputs(msgspec.Struct, frozen=True):
    """All that the conditions are computed from; `hours`: company id -> hour since 1970 -> new events."""

    snapshot: Snapshot
    totals: Totals
    hours: Mapping[str, Mapping[int, int]]
    states: Mapping[str, AlertState]


class Change(msgspec.Struct, frozen=True):
    """What is to be logged; the condition has been true since `since`, in ms since 1970."""

    action: Action
    condition: Condition
    since: int


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """What the silence of a company is judged by; times in ms since 1970, 0 for never.

    `hours`: hour since 1970 -> new events. `missed_at`: when a missed event was found last. `unsettled_since`: when the
    oldest unsettled order was first seen.
    """

    last_event_at: int
    missed_at: int
    unsettled_since: int
    hours: Mapping[int, int]


class Silence(msgspec.Struct, frozen=True):
    """A company is silent: why, for how many ms (0 if it never sent), and how many events usually come in that time."""

    reason: Reason
    quiet_ms: int
    usual: float | None


class AlertStore:
    """What the alerts remember in Redis; raises what Redis raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def acquire_turn(self) -> bool:
        """Return whether this pool evaluates now; if it dies meanwhile, another one does a minute later."""
        return bool(self._redis.set(keys.ALERTS_TURN, 1, nx=True, px=EVERY - policy.SECOND))

    def inputs(self, snapshot: Snapshot, companies: Iterable[Company]) -> Inputs:
        """Return the inputs of the conditions."""
        hours = {one.np_company_id: self.hours(one.np_company_id, snapshot.now) for one in companies}
        return Inputs(snapshot, self._totals(), hours, self._states())

    def hours(self, company_id: str, now: int) -> dict[int, int]:
        """Return hour since 1970 -> new events of the company; deletes hours older than HOURS_KEPT."""
        saved: Any = self._redis.hgetall(keys.event_rate(company_id))
        prefix = _HOUR_FIELD.encode()
        found = {int(field[len(prefix) :]): int(value) for field, value in saved.items() if field.startswith(prefix)}
        if old := [hour for hour in found if hour < now // HOUR - HOURS_KEPT]:
            self._redis.hdel(keys.event_rate(company_id), *(f"{_HOUR_FIELD}{hour}" for hour in old))
        return {hour: count for hour, count in found.items() if hour not in old}

    def save(self, states: Mapping[str, AlertState]) -> None:
        """Replace all saved states by these."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.ALERTS)
            if states:
                pipe.hset(keys.ALERTS, mapping={field: msgspec.json.encode(state) for field, state in states.items()})
            pipe.execute()

    def _totals(self) -> dict[tuple[str, ...], int]:
        saved: Any = self._redis.hgetall(keys.COUNTERS)
        fields = {tuple(field.decode(errors="replace").split("|")): value for field, value in saved.items()}
        return {name: int(value) for name, value in fields.items() if name[0] in METRICS}

    def _states(self) -> dict[str, AlertState]:
        saved: Any = self._redis.hgetall(keys.ALERTS)
        found = {field.decode(errors="replace"): decoded(text, AlertState) for field, text in saved.items()}
        return {field: state for field, state in found.items() if state is not None}


def conditions(inputs: Inputs, companies: Iterable[Company]) -> list[Condition]:
    """Return every condition, true or not: an alert resolves when its condition is false."""
    return [
        *(condition for company in companies for condition in _of_company(inputs, company)),
        *_of_sinks(inputs),
        _of_pools(inputs.snapshot),
    ]


def evaluate(
    found: Iterable[Condition], states: Mapping[str, AlertState], now: int
) -> tuple[dict[str, AlertState], list[Change]]:
    """Return the new states and what is to be logged.

    An alert without a condition is resolved: the settings no longer name its company or sink.
    """
    after: dict[str, AlertState] = {}
    changes: list[Change] = []
    for condition in found:
        state = states.get(condition.field, AlertState())
        after[condition.field], action = _next_state(condition, RULES[condition.name], state, now)
        if action is not None:
            changes.append(Change(action, condition, state.since or now))
    for field, state in states.items():
        if field not in after and state.firing_at:
            name, company, sink = field.split("|")
            changes.append(Change("resolved", Condition(name=name, company=company, sink=sink), state.since))
    return after, changes


def silence(activity: Activity, now: int) -> Silence | None:
    """Return why a company is silent at `now` (ms), None if it is not."""
    last = activity.last_event_at
    quiet = now - last if last else 0
    usual = usual_count(activity.hours, max(last, now - WINDOW), now)
    # A missed event is found later than it happened; an event since then shows that the sender works.
    is_quiet = not last or quiet >= QUIET
    if activity.missed_at > last and now - activity.missed_at < MISSED_WITHIN and is_quiet:
        return Silence("missed_events", quiet, usual)
    if activity.unsettled_since > last and now - activity.unsettled_since >= OPEN:
        return Silence("open_orders", quiet, usual)
    if is_quiet and usual is not None and usual >= ENOUGH:
        return Silence("usual", quiet, usual)
    return None


def usual_count(hours: Mapping[int, int], start: int, end: int) -> float | None:
    """Return how many events usually come between two times of a week (ms), None before two weeks are known.

    This is the second lowest of the last four weeks: one holiday or one silence among them must neither hide the next
    silence nor cause an alert.
    """
    first = min(hours, default=None)
    if first is None:
        return None
    shifts = [week * WEEK for week in range(1, WEEKS + 1) if start - week * WEEK >= first * HOUR]
    counts = sorted(_between(hours, start - shift, end - shift) for shift in shifts)
    if len(counts) < 2:
        return None
    return counts[1 if len(counts) > 2 else 0]


def _between(hours: Mapping[int, int], start: int, end: int) -> float:
    """Count the events between two times (ms), with the share of hours that are only in part between them."""
    total = 0.0
    for hour in range(start // HOUR, end // HOUR + 1):
        share = min(end, (hour + 1) * HOUR) - max(start, hour * HOUR)
        total += hours.get(hour, 0) * share / HOUR
    return total


def _of_company(inputs: Inputs, company: Company) -> Iterator[Condition]:
    company_id, slug, now = company.np_company_id, company.slug, inputs.snapshot.now
    found = inputs.snapshot.companies[company_id]
    age = found.oldest_pending_ms
    yield Condition(name="fetch_late", company=slug, is_true=age > LATE, figure=_seconds(age))
    yield Condition(name="breaker_open", company=slug, is_true=inputs.snapshot.breaker_is_open(company_id))
    unused = now - found.previous_secret_at
    yield Condition(name="previous_secret", company=slug, is_true=unused < policy.DAY, figure=_seconds(unused))
    dead = _total(inputs.totals, "dead", company_id)
    yield Condition(name="dead_letters", company=slug, count=dead, figure=inputs.snapshot.dead)
    rejected = _total(inputs.totals, "rejected", company_id)
    yield Condition(name="rejected_secrets", company=slug, count=rejected, figure=rejected)
    missed = inputs.totals.get(("discrepancies", company_id, "no_event"), 0)
    missed_events = Condition(name="missed_events", company=slug, count=missed, figure=missed)
    yield missed_events
    activity = Activity(
        last_event_at=found.last_event_at,
        missed_at=inputs.states.get(missed_events.field, AlertState()).last_true_at,
        unsettled_since=found.unsettled_since,
        hours=inputs.hours.get(company_id, {}),
    )
    if (silent := silence(activity, now)) is None:
        yield Condition(name="silence", company=slug)
    else:
        quiet, usual = _seconds(silent.quiet_ms), silent.usual
        yield Condition(name="silence", company=slug, is_true=True, figure=quiet, reason=silent.reason, usual=usual)


def _of_sinks(inputs: Inputs) -> Iterator[Condition]:
    for name, sink in inputs.snapshot.sinks.items():
        yield Condition(name="sink_failing", sink=name, is_true=sink.failing > 0, figure=sink.failing)
        total = inputs.totals.get(("deliveries_dead_lettered", name), 0)
        yield Condition(name="dead_deliveries", sink=name, count=total, figure=total)


def _of_pools(snapshot: Snapshot) -> Condition:
    oldest = max((snapshot.now - pool.at for pool in snapshot.heartbeats()), default=0)
    return Condition(name="pool_silent", is_true=oldest > POOL_SILENT, figure=_seconds(oldest))


def _total(totals: Totals, prefix: str, company_id: str) -> int:
    return sum(count for name, count in totals.items() if name[:2] == (prefix, company_id))


def _seconds(milliseconds: int) -> int:
    return round(milliseconds / 1000)


def _next_state(condition: Condition, rule: Rule, state: AlertState, now: int) -> tuple[AlertState, Action | None]:
    count = -1 if condition.count is None else condition.count
    # A counter that is new, or lower than before (Redis was flushed), says nothing yet.
    is_true = condition.is_true if condition.count is None else 0 <= state.count < count
    last_true_at = now if is_true else state.last_true_at
    if not is_true and not (state.since and now - last_true_at < rule.keep_firing):
        # `last_true_at` stays: silence depends on it.
        return AlertState(last_true_at=last_true_at, count=count), "resolved" if state.firing_at else None
    after = msgspec.structs.replace(state, since=state.since or now, last_true_at=last_true_at, count=count)
    if not state.firing_at:
        if now - after.since < rule.hold:
            return after, None
        return msgspec.structs.replace(after, firing_at=now, logged_at=now), "firing"
    if rule.repeat and now - state.logged_at >= rule.repeat:
        return msgspec.structs.replace(after, logged_at=now), "repeated"
    return after, None
