"""The alerts of the log: conditions over a snapshot and the counters, and the rules that turn them into alerts.

An alert is logged once when it fires and once when it is resolved. Everything but AlertStore is pure; the pools
evaluate (workers/background.py). Silence is the hardest condition: a stopped sender or a deleted subscription makes no
request fail, so only the missing events show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import msgspec

from app.deployment import differences
from app.ledger import policy
from app.ledger.policy import DAY, MINUTE, SECOND
from app.ledger.redis import Redis
from app.snapshot import AlertState, CompanySnapshot, Snapshot
from app.subscriptions import ACTIVE

EVERY: Final = 20 * SECOND
"""Between two evaluations, over all machines: what fires at once is logged within a minute of its cause."""

SURE: Final = 2 * MINUTE
"""What an evaluation sees may have come up so long before."""

HOUR: Final = 60 * MINUTE
WEEK: Final = 7 * DAY
WEEKS: Final = 4
HOURS_KEPT: Final = (WEEKS * 7 + 2) * 24
"""Four weeks, and what a window that began yesterday reaches beyond them."""

LATE: Final = 5 * MINUTE
"""Age of a pending fetch that needs a look; normally it is seconds."""

POOL_SILENT: Final = MINUTE
"""A pool writes a heartbeat each second and removes it when it stops cleanly."""

QUIET: Final = 30 * MINUTE
"""No company is silent sooner: senders hold batches back, and guests come in groups."""

WINDOW: Final = DAY
"""No longer window is compared: a day holds every hour at which events usually come."""

ENOUGH: Final = 5.0
"""Events that usually come in such a window. With fewer, their absence says nothing."""

OPEN: Final = 10 * MINUTE
"""An order settles about a minute after createOrder and causes an event; after this long one should have come."""

MISSED_WITHIN: Final = 60 * MINUTE
"""For this long, missed events that the order list showed count as a reason for silence."""

Action = Literal["firing", "repeated", "resolved"]

Hours = Mapping[int, int]
"""Hour since 1970 -> new events of a company."""

Key = tuple[str, str, str]
"""Name, company and sink of an alert."""


class Rule(msgspec.Struct, frozen=True):
    """How a condition becomes an alert; all in ms.

    It fires once the condition has been true for `hold`, and resolves once it has been false for `keep_firing`, or its
    cause is seen to be gone. An alert that lasts is logged again after `repeat`, 0 for never.
    """

    hold: int = 0
    keep_firing: int = 0
    repeat: int = 0


RULES: Final[dict[str, Rule]] = {
    "fetch_late": Rule(),
    "breaker_open": Rule(),
    "rq_suspended": Rule(),
    # A rotation takes a day or two; after a week the old secret was forgotten somewhere.
    "previous_secret": Rule(hold=7 * DAY, keep_firing=DAY),
    "dead_letters": Rule(keep_firing=60 * MINUTE),
    "dead_deliveries": Rule(keep_firing=60 * MINUTE),
    "rejected_secrets": Rule(keep_firing=60 * MINUTE),
    "invalid_items": Rule(keep_firing=60 * MINUTE),
    # The dispatcher looks at such an order again after an hour.
    "broken_orders": Rule(keep_firing=120 * MINUTE),
    "missed_events": Rule(keep_firing=60 * MINUTE),
    "sink_failing": Rule(),
    "sink_disabled": Rule(),
    "deliveries_failing": Rule(hold=10 * MINUTE, keep_firing=2 * MINUTE),
    "feed_unacknowledged": Rule(),
    "pool_silent": Rule(),
    # Longer than the restart of all pools, one after the other, with a new configuration.
    "pools_differ": Rule(hold=10 * MINUTE),
    # Longer than the time between two evaluations: a job may have arrived a moment ago.
    "undeclared": Rule(hold=MINUTE - 10 * SECOND),
    "subscription": Rule(),
    "silence": Rule(repeat=60 * MINUTE),
}
"""Every alert of the log; docs/operations.md has a section on each."""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that may be wrong, and whether it is.

    With `count`, the condition is true when this counter has risen; otherwise `is_true` says it. `left_at` is when (ms)
    the latest of what it counted that still stands came up, 0 if nothing stands, None if that is not known: an alert
    that began later is over. `figure` appears in the log: seconds, or a number. `company` is a slug and `sink` a name
    of SINKS, or `feed:` and a consumer of the feed; "" if the alert is about neither.
    """

    name: str
    company: str = ""
    sink: str = ""
    is_true: bool = False
    count: int | None = None
    left_at: int | None = None
    figure: float = 0
    reason: str = ""
    usual: float | None = None

    @property
    def key(self) -> Key:
        return self.name, self.company, self.sink


class Change(msgspec.Struct, frozen=True):
    """What is to be logged; the condition has been true since `since`, in ms since 1970."""

    action: Action
    condition: Condition
    since: int


class AlertStore:
    """What the alerts remember in Redis; raises what Redis raises."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def acquire_turn(self) -> bool:
        """Return whether this pool evaluates now; if it dies meanwhile, another one does a minute later."""
        return bool(self._redis.set(self._redis.names.alerts_turn, 1, nx=True, px=EVERY - SECOND))

    def hours(self, company_id: str, now: int) -> Hours:
        """Return the new events of each hour; deletes hours older than HOURS_KEPT."""
        found = read_hours(self._redis, [company_id])[company_id]
        if old := [hour for hour in found if hour < now // HOUR - HOURS_KEPT]:
            self._redis.hdel(self._redis.names.event_rate(company_id), *(f"hour:{hour}" for hour in old))
        return {hour: count for hour, count in found.items() if hour not in old}

    def save(self, states: Mapping[Key, AlertState]) -> None:
        """Replace all saved states by these."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._redis.names.alerts)
            if states:
                pipe.hset(
                    self._redis.names.alerts,
                    mapping={"|".join(key): msgspec.json.encode(one) for key, one in states.items()},
                )
            pipe.execute()


def read_hours(redis: Redis, company_ids: Iterable[str]) -> dict[str, Hours]:
    """Return the new events of each hour by company; raises what redis-py raises."""
    ids, found = list(company_ids), dict[str, Hours]()
    with redis.pipeline(transaction=False) as pipe:
        for company_id in ids:
            pipe.hgetall(redis.names.event_rate(company_id))
        saved: list[Any] = pipe.execute()
    for company_id, fields in zip(ids, saved, strict=True):
        counts = ((field.partition(b":"), int(value)) for field, value in fields.items())
        found[company_id] = {int(hour): count for (kind, _, hour), count in counts if kind == b"hour"}
    return found


def runbook(name: str) -> str:
    """Return the section of an alert in docs/operations.md."""
    return f"docs/operations.md#{name.replace('_', '-')}"


def conditions(snapshot: Snapshot, hours: Mapping[str, Hours], feed_ack_alert: int) -> list[Condition]:
    """Return every condition, true or not: an alert resolves when its condition is false.

    `hours`: by company id. `feed_ack_alert`: FEED_ACK_ALERT in seconds.
    """
    found = [one for company_id in snapshot.companies for one in _of_company(snapshot, company_id, hours[company_id])]
    for name, of_sink in snapshot.sinks.items():
        total = snapshot.total("deliveries_dead_lettered", name)
        fails, seconds = of_sink.fails(snapshot.now), of_sink.failing_s(snapshot.now) or 0
        found.append(Condition(name="sink_failing", sink=name, is_true=fails, figure=seconds, reason=of_sink.error))
        reason, since = of_sink.disabled_reason, of_sink.disabled_at
        seconds = (snapshot.now - since) // 1000 if since else 0
        found.append(Condition(name="sink_disabled", sink=name, is_true=since > 0, figure=seconds, reason=reason))
        some = of_sink.failing if not fails else 0
        found.append(Condition(name="deliveries_failing", sink=name, is_true=some > 0, figure=some))
        left_at = _left_at(of_sink.dead_at, snapshot.dead_deliveries)
        found.append(Condition(name="dead_deliveries", sink=name, count=total, left_at=left_at, figure=total))
    for name, consumer in snapshot.consumers.items():
        waiting = consumer.waiting_s(snapshot.now)
        is_late = 0 < feed_ack_alert <= waiting
        found.append(Condition(name="feed_unacknowledged", sink=f"feed:{name}", is_true=is_late, figure=waiting))
    invalid = snapshot.total("invalid", "bad_order_id")
    found.append(Condition(name="invalid_items", count=invalid, figure=invalid))
    refused = sum(snapshot.total("events", company_id, "refused") for company_id in snapshot.companies)
    broken = snapshot.total("broken") + refused
    found.append(Condition(name="broken_orders", count=broken, figure=broken))
    found.append(Condition(name="rq_suspended", is_true=snapshot.suspended))
    oldest = max((snapshot.now - pool.at for pool in snapshot.heartbeats()), default=0)
    found.append(Condition(name="pool_silent", is_true=oldest > POOL_SILENT, figure=oldest // 1000))
    differing = len(differences(snapshot.running_pools()))
    found.append(Condition(name="pools_differ", is_true=differing > 0, figure=differing))
    for (company, name), waiting in snapshot.undeclared().items():
        figure = waiting // 1000 if company else waiting
        found.append(Condition(name="undeclared", company=company, sink=name, is_true=True, figure=figure))
    return found


def evaluate(
    found: Iterable[Condition], states: Mapping[Key, AlertState], now: int
) -> tuple[dict[Key, AlertState], list[Change]]:
    """Return the new states and what is to be logged.

    An alert without a condition is resolved: its company or sink no longer belongs to the deployment.
    """
    after: dict[Key, AlertState] = {}
    changes: list[Change] = []
    for condition in found:
        state = _not_ahead(states.get(condition.key, AlertState()), now)
        after[condition.key], action = _next_state(condition, RULES[condition.name], state, now)
        if action is not None:
            changes.append(Change(action, condition, state.since or now))
    for (name, company, sink), state in states.items():
        if (name, company, sink) not in after and state.firing_at:
            changes.append(Change("resolved", Condition(name=name, company=company, sink=sink), state.since))
    return after, changes


def silence(slug: str, found: CompanySnapshot, now: int, missed_at: int, hours: Hours) -> Condition:
    """Return whether a company is silent at `now`; `missed_at` is when a missed event was found last, 0 for never.

    Its reason is `missed_events`: the list shows settled orders without an event, and none has come for QUIET.
    `open_orders`: it shows an order unsettled since OPEN, and no event has come since. `usual`: so many events usually
    come at this time of the week.
    """
    last, reason = found.last_event_at, ""
    quiet = now - last if last else 0
    usual = usual_count(hours, max(last, now - WINDOW), now)
    # A missed event is found later than it happened; an event since then shows that the sender works.
    is_quiet = not last or quiet >= QUIET
    if missed_at > last and now - missed_at < MISSED_WITHIN and is_quiet:
        reason = "missed_events"
    elif found.unsettled_since > last and now - found.unsettled_since >= OPEN:
        reason = "open_orders"
    elif is_quiet and usual is not None and usual >= ENOUGH:
        reason = "usual"
    figure = quiet // 1000
    return Condition(name="silence", company=slug, is_true=bool(reason), figure=figure, reason=reason, usual=usual)


def usual_count(hours: Hours, start: int, end: int) -> float | None:
    """Return how many events usually come between two times of a week (ms), None before two weeks are known.

    This is the second lowest of the last four weeks: one holiday or one silence among them must neither hide the next
    silence nor cause an alert.
    """
    first = min(hours, default=end // HOUR)
    shifts = [week * WEEK for week in range(1, WEEKS + 1) if start - week * WEEK >= first * HOUR]
    counts = sorted(_between(hours, start - shift, end - shift) for shift in shifts)
    if len(counts) < 2:
        return None
    return counts[1 if len(counts) > 2 else 0]


def _between(hours: Hours, start: int, end: int) -> float:
    """Count the events between two times (ms), with the share of hours that are only in part between them."""
    total = 0.0
    for hour in range(start // HOUR, end // HOUR + 1):
        share = min(end, (hour + 1) * HOUR) - max(start, hour * HOUR)
        total += hours.get(hour, 0) * share / HOUR
    return total


def _of_company(snapshot: Snapshot, company_id: str, hours: Hours) -> Iterator[Condition]:
    found, now = snapshot.companies[company_id], snapshot.now
    slug = found.slug
    age = found.oldest_pending_ms
    yield Condition(name="fetch_late", company=slug, is_true=age > LATE, figure=age // 1000)
    is_open, open_s = snapshot.breaker_is_open(company_id), (now - found.breaker_opened_at) // 1000
    why = found.breaker_reason if is_open else ""
    yield Condition(name="breaker_open", company=slug, is_true=is_open, figure=open_s if is_open else 0, reason=why)
    down = "" if found.subscription == ACTIVE else found.subscription
    yield Condition(name="subscription", company=slug, is_true=bool(down), reason=down)
    unused = now - found.previous_secret_at
    yield Condition(name="previous_secret", company=slug, is_true=unused < DAY, figure=unused // 1000)
    dead = snapshot.total("dead", company_id)
    left_at = _left_at(found.dead_at, snapshot.dead)
    yield Condition(name="dead_letters", company=slug, count=dead, left_at=left_at, figure=snapshot.dead)
    states = snapshot.alert_states()
    rejected_at = states.get(("rejected_secrets", slug, ""), AlertState()).last_true_at
    is_accepted = found.last_event_at > rejected_at and now - rejected_at >= SURE
    rejected, left_at = snapshot.total("rejected", company_id), 0 if is_accepted else None
    yield Condition(name="rejected_secrets", company=slug, count=rejected, left_at=left_at, figure=rejected)
    missed_at = states.get(("missed_events", slug, ""), AlertState()).last_true_at
    # A run that read the whole list since has found none.
    left_at = 0 if snapshot.total("reconciled", company_id) > missed_at else None
    missed = snapshot.total("discrepancies", company_id, "no_event")
    yield Condition(name="missed_events", company=slug, count=missed, left_at=left_at, figure=missed)
    yield silence(slug, found, now, missed_at, hours)


def _left_at(dead_at: int, dead: int) -> int | None:
    """Return when the latest dead letter of a company or a sink became one; None if it may be beyond the sample."""
    return dead_at if dead_at or dead <= policy.SAMPLE else None


def _not_ahead(state: AlertState, now: int) -> AlertState:
    """Return the state with no time after `now`: the clock of Redis was ahead, and is right again."""
    times = ("since", "last_true_at", "firing_at", "logged_at")
    return msgspec.structs.replace(state, **{name: min(getattr(state, name), now) for name in times})


def _next_state(condition: Condition, rule: Rule, state: AlertState, now: int) -> tuple[AlertState, Action | None]:
    count = -1 if condition.count is None else condition.count
    # A counter that is new, or lower than before (Redis was flushed), says nothing yet.
    is_true = condition.is_true if condition.count is None else 0 <= state.count < count
    last_true_at = now if is_true else state.last_true_at
    is_over = condition.left_at is not None and condition.left_at < state.since - SURE
    if not is_true and (not state.since or is_over or now - last_true_at >= rule.keep_firing):
        # `last_true_at` stays: silence depends on it.
        return AlertState(last_true_at=last_true_at, count=count), "resolved" if state.firing_at else None
    after = msgspec.structs.replace(
        state,
        since=state.since or now,
        last_true_at=last_true_at,
        count=count,
        risen=state.risen + (count - state.count if is_true and condition.count is not None else 0),
        reason=condition.reason,
    )
    if not state.firing_at:
        if now - after.since < rule.hold:
            return after, None
        return msgspec.structs.replace(after, firing_at=now, logged_at=now), "firing"
    if rule.repeat and now - state.logged_at >= rule.repeat:
        return msgspec.structs.replace(after, logged_at=now), "repeated"
    return after, None
