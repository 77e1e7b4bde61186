"""The receiver as a whole, as people read it: one sentence on how things are, and the figures that it rests on.

Reading it costs the same with one order and with a million. `ota-receiver status` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import islice
from statistics import mean
from typing import Final, Literal, NamedTuple

import msgspec

from app import times
from app.alerts import HOUR, SURE, Hours, read_hours, runbook, usual_count
from app.deployment import differences
from app.explain.stores import Stores
from app.explain.words import age, breaker_words, many, sink_words
from app.heartbeat import Heartbeat, decoded
from app.ids import OrderKey
from app.intake.spool_file import waiting
from app.ledger.dead_letters import DeadCount
from app.ledger.history import FetchStored
from app.ledger.latency import Latency, read_latency
from app.ledger.orders import OrderQuery
from app.ledger.rate_limit import spent
from app.ledger.record import OrderRecord
from app.ledger.rq_jobs import BACKFILL, LIVE
from app.reconcile.state import next_runs
from app.replay import GET_ORDER
from app.snapshot import Breaker, ConsumerSnapshot, SinkSnapshot, Snapshot, SnapshotReader

LOOKED_AT: Final = 200
"""Orders, the latest changes first, of which is read whether their outstanding work has a due time."""

HOURS_SHOWN: Final = 48
"""Hours of events of each company, the current one included."""

LATENCY_HOURS: Final = 24
"""Hours whose fetches give the latency of a company, the current one included."""

_LATEST: Final = 20
"""Orders whose getOrders give the average duration."""

_FIVE_MINUTES: Final = 300
_SURE: Final = timedelta(milliseconds=SURE)


class Alert(msgspec.Struct, frozen=True):
    """An alert that fires; `company` is a slug, `sink` a name, "" if it is about neither; `reason` "" if none is known.

    Its cause was seen last at `last_at`. `count`: how often what it counts came up since, None if it counts nothing.
    `runbook`: the section of docs/operations.md about it.
    """

    name: str
    company: str
    sink: str
    reason: str
    since: datetime
    count: int | None
    last_at: datetime
    runbook: str

    @property
    def subject(self) -> str:
        """Return its name, and the company or sink that it is about."""
        return " ".join(filter(None, (self.name, self.company, self.sink)))

    def words(self, now: datetime) -> str:
        """Return its age, its count and its reason, and when its cause was seen last if that is a while ago."""
        # What was true at the last evaluation has not ended.
        last = f"last at {times.short(self.last_at)}" if now - self.last_at > _SURE else ""
        count = many(self.count, "time") if self.count is not None else ""
        return ", ".join(filter(None, (f"for {times.age(now - self.since)}", count, self.reason, last)))


class HourCount(msgspec.Struct, frozen=True):
    """The new events of the hour that begins at `at`, and how many `usual`ly come in it.

    Of the current hour `usual` reaches until now. It is None before two weeks are known.
    """

    at: datetime
    events: int
    usual: float | None


class Company(msgspec.Struct, frozen=True, kw_only=True):
    """One company.

    `pending_s`: age of its oldest pending fetch, 0 without one. `hours`: oldest first. `latency`: from event to fetch,
    of the last LATENCY_HOURS. `unsettled` counts orders that the order list shows unsettled, the first of them since
    `unsettled_since`. `subscription`: its state as a pool saw it last (app/subscriptions.py), "" before the first
    check. `breaker` is the open one, None while it is closed, and `breaker_words` the same for people.
    `throttled_until`: a Retry-After of its API key ends. `reconciled_at`: its whole list was read last;
    `reconcile_at`: it is read next; None for never.
    """

    company_id: str
    slug: str
    pending_s: int
    last_event_at: datetime | None
    hours: tuple[HourCount, ...]
    latency: Latency
    unsettled: int
    unsettled_since: datetime | None
    subscription: str
    breaker: Breaker | None
    breaker_words: str
    throttled_until: datetime | None
    reconciled_at: datetime | None
    reconcile_at: datetime | None


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs that wait in one queue; the first has waited `waited_s`.

    `rate`: fetches a second that the workers and the limits of the API keys allow now, 0 while none may be used.
    `done_s`: until the queue is empty if no event arrives, None if nothing is fetched.
    """

    queue: str
    jobs: int
    waited_s: int
    workers: int
    rate: float
    done_s: int | None


class Sink(msgspec.Struct, frozen=True, kw_only=True):
    """One sink, which lacks the latest revision of `behind` orders; SinkSnapshot says more about its fields.

    `held`: why nothing is delivered to it, and since when, in words; "" if deliveries may start.
    """

    sink: str
    behind: int
    failing: int
    fails: bool
    failing_s: int | None
    attempts: int
    error: str
    breaker: Breaker | None
    disabled_at: datetime | None
    disabled_reason: str
    held: str

    @property
    def needs_a_look(self) -> bool:
        """Return whether it fails, is disabled, or has orders that wait for its breaker."""
        return self.fails or self.disabled_at is not None or (self.breaker is not None and self.behind > 0)

    @property
    def why(self) -> str:
        """Return why it lacks orders, "" if deliveries may start and the last one did not fail."""
        if self.held or self.failing_s is None:
            return self.held
        failed = f"{many(self.attempts, 'attempt')} failed, {self.error}"
        return f"nothing delivered for {age(self.failing_s)}: {failed}"

    def words(self) -> str:
        """Return how many orders it lacks, and why."""
        return "; ".join(filter(None, (f"{many(self.behind, 'order')} behind", self.why)))


class Consumer(msgspec.Struct, frozen=True):
    """One consumer of the feed: orders that it has not acknowledged, the oldest of which has waited `waiting_s`."""

    consumer: str
    behind: int
    waiting_s: int

    def words(self) -> str:
        oldest = f", the oldest for {age(self.waiting_s)}" if self.behind else ""
        return f"{many(self.behind, 'order')} unacknowledged{oldest}"


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """One worker pool, which wrote its heartbeat last at `at`; `runs` says that this was just now.

    Its name begins with its host and its pid. `differs`: what it lacks or has otherwise than the others, in words.
    """

    name: str
    pid: int
    workers: int
    since: datetime
    at: datetime
    runs: bool
    differs: tuple[str, ...]


class Clause(NamedTuple):
    """A part of the sentence.

    `about`: `pending`, `alerts`, `dead`, the section of docs/operations.md that helps, or "".
    """

    text: str
    about: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """The whole at the time `now`.

    `due`: orders with a pending fetch. `unscheduled`: of the LOOKED_AT changed last, those whose outstanding work has
    no due time. `elsewhere_s`: age of the oldest pending fetch of each company that is not among `companies`, by id.
    `undeclared`: companies and sinks that orders wait for and no running pool has. `dead`: dead letters by sink and
    reason. `get_order_s`: average duration of a getOrder. `longest_delivery_s`: for how long the longest delivery of
    the latest orders has run, 0 without one, with the sink "". `spooled`: events in the spool of this machine, None if
    that is unknown or it has none.
    """

    now: datetime
    alerts: tuple[Alert, ...]
    companies: tuple[Company, ...]
    sinks: tuple[Sink, ...]
    consumers: tuple[Consumer, ...]
    pools: tuple[Pool, ...]
    queues: tuple[Queue, ...]
    suspended: bool
    due: int
    unscheduled: int
    elsewhere_s: dict[str, int]
    undeclared: tuple[str, ...]
    dead: tuple[DeadCount, ...]
    dead_letters: int
    dead_deliveries: int
    get_order_s: float
    longest_delivery_s: int
    longest_delivery_sink: str
    spooled: int | None

    def dead_deliveries_to(self, sink: str) -> int:
        """Return how many deliveries to this sink are dead letters."""
        return sum(one.count for one in self.dead if one.sink == sink)

    @property
    def running(self) -> int:
        """Return how many pools run."""
        return sum(one.runs for one in self.pools)

    @property
    def oldest_pending_s(self) -> dict[str, int]:
        """Return the age of the oldest pending fetch by slug, of a company that is not known by id; 0 without one."""
        return {one.slug: one.pending_s for one in self.companies} | self.elsewhere_s

    @property
    def breakers(self) -> dict[str, Breaker]:
        """Return the open breakers of upstream by the slug of their company."""
        return {one.slug: one.breaker for one in self.companies if one.breaker is not None}

    @property
    def throttled(self) -> dict[str, datetime]:
        """Return until when a Retry-After holds back the calls of a company, by slug."""
        return {one.slug: one.throttled_until for one in self.companies if one.throttled_until is not None}

    @property
    def status(self) -> Literal["ok", "look"]:
        """Return `look` if an alert fires or something else needs a look."""
        return "look" if self.alerts or [*self._troubles()] else "ok"

    @property
    def sentence(self) -> str:
        """Return one sentence on how things are, the worst first: the texts of the clauses."""
        return f"{'; '.join(one.text for one in self.clauses)}."

    @property
    def clauses(self) -> tuple[Clause, ...]:
        """Return what needs a look, then what is pending, the alerts, and how many dead letters there are."""
        oldest = max(self.oldest_pending_s.values(), default=0)
        pending = f"{many(self.due, 'order')} {'is' if self.due == 1 else 'are'} pending"
        if not self.due:
            pending = "no order is pending"
        elif oldest:
            pending += f", the oldest for {age(oldest)}"
        alerts = many(len(self.alerts), "alert") if self.alerts else "no alert"
        found = [*self._troubles(), Clause(pending, "pending"), Clause(alerts, "alerts")]
        if count := self.dead_letters + self.dead_deliveries:
            # Their alerts end an hour after the latest one; the orders still wait for someone.
            found.append(Clause(many(count, "dead letter"), "dead"))
        first = found[0].text
        return (found[0]._replace(text=first[0].upper() + first[1:]), *found[1:])

    def _troubles(self) -> Iterator[Clause]:
        if not self.running:
            yield Clause("no worker pool runs", "pool-silent")
        if self.suspended:
            yield Clause("RQ is suspended", "rq-suspended")
        if self.breakers:
            yield Clause(f"nothing is fetched for {', '.join(self.breakers)}", "breaker-open")
        disabled = [one.sink for one in self.sinks if one.disabled_at]
        if failing := [one.sink for one in self.sinks if one.needs_a_look and not one.disabled_at]:
            yield Clause(f"nothing is delivered to {', '.join(failing)}", "sink-failing")
        if disabled:
            sinks = "sink" if len(disabled) == 1 else "sinks"
            are = "is" if len(disabled) == 1 else "are"
            yield Clause(f"{sinks} {', '.join(disabled)} {are} disabled", "sink-disabled")
        if self.undeclared:
            yield Clause(f"no pool has {', '.join(self.undeclared)}", "undeclared")
        if self.unscheduled:
            yield Clause(f"{many(self.unscheduled, 'order')} without a due time", "")


def read(stores: Stores) -> Overview:
    """Return how the receiver is now; raises what redis-py raises."""
    snapshot = SnapshotReader(stores.settings.companies).read(stores.redis)
    now, spool = times.from_ms(snapshot.now), stores.settings.spool_dir
    records = list(islice(stores.orders.newest_first(OrderQuery(), now), LOOKED_AT))
    latest = [one.key for one in records]
    get_order = _get_order_seconds(stores, latest[:_LATEST])
    slow_sink, longest = _longest_delivery(records, now)
    return Overview(
        now=now,
        alerts=tuple(_alerts(snapshot)),
        companies=tuple(_companies(stores, snapshot, now)),
        sinks=tuple(_sink(name, one, snapshot.now) for name, one in snapshot.sinks.items()),
        consumers=tuple(_consumer(name, one, snapshot.now) for name, one in snapshot.consumers.items()),
        pools=tuple(_pools(snapshot)),
        queues=tuple(_queues(stores, snapshot, get_order)),
        suspended=snapshot.suspended,
        due=snapshot.due,
        unscheduled=len(stores.orders.unscheduled(latest)),
        elsewhere_s={company_id: age // 1000 for company_id, age in snapshot.elsewhere.items()},
        undeclared=tuple(company or sink for company, sink in snapshot.undeclared()),
        dead=tuple(stores.dead_letters.counts()),
        dead_letters=snapshot.dead,
        dead_deliveries=snapshot.dead_deliveries,
        get_order_s=get_order,
        longest_delivery_s=longest,
        longest_delivery_sink=slow_sink,
        spooled=waiting(spool) if spool else None,
    )


def _alerts(snapshot: Snapshot) -> Iterator[Alert]:
    for (name, company, sink), state in snapshot.alert_states().items():
        if state.firing_at:
            since, last_at = times.from_ms(state.since), times.from_ms(state.last_true_at)
            count = state.risen if state.count >= 0 else None
            yield Alert(name, company, sink, state.reason, since, count, last_at, runbook(name))


def _companies(stores: Stores, snapshot: Snapshot, now: datetime) -> Iterator[Company]:
    hours, next_at = read_hours(stores.redis, snapshot.companies), next_runs(stores.redis, snapshot.companies)
    latency = read_latency(stores.redis, snapshot.companies, LATENCY_HOURS, snapshot.now)
    breakers, throttled = snapshot.open_breakers(), snapshot.throttled()
    for company_id, one in snapshot.companies.items():
        breaker = breakers.get(one.slug)
        yield Company(
            company_id=company_id,
            slug=one.slug,
            pending_s=one.oldest_pending_ms // 1000,
            last_event_at=_moment(one.last_event_at),
            hours=tuple(_hours(hours[company_id], snapshot.now)),
            latency=latency[company_id],
            unsettled=one.unsettled,
            unsettled_since=_moment(one.unsettled_since),
            subscription=one.subscription,
            breaker=breaker,
            breaker_words="" if breaker is None else breaker_words(breaker, now),
            throttled_until=throttled.get(one.slug),
            reconciled_at=_moment(snapshot.total("reconciled", company_id)),
            reconcile_at=_moment(next_at[company_id]),
        )


def _hours(found: Hours, now: int) -> Iterator[HourCount]:
    for hour in range(now // HOUR - HOURS_SHOWN + 1, now // HOUR + 1):
        usual = usual_count(found, hour * HOUR, min((hour + 1) * HOUR, now))
        yield HourCount(times.from_ms(hour * HOUR), found.get(hour, 0), usual)


def _sink(name: str, one: SinkSnapshot, now: int) -> Sink:
    return Sink(
        sink=name,
        behind=one.behind,
        failing=one.failing,
        fails=one.fails(now),
        failing_s=one.failing_s(now),
        attempts=one.failed_attempts,
        error=one.error,
        breaker=one.breaker,
        disabled_at=_moment(one.disabled_at),
        disabled_reason=one.disabled_reason,
        held=sink_words(name, one, times.from_ms(now)),
    )


def _consumer(name: str, one: ConsumerSnapshot, now: int) -> Consumer:
    return Consumer(name, one.behind, one.waiting_s(now))


def _pools(snapshot: Snapshot) -> Iterator[Pool]:
    running = snapshot.running_pools()
    differing = differences(running)
    for name, text in snapshot.pools.items():
        if (beat := decoded(text, Heartbeat)) is not None:
            yield Pool(
                name=name,
                pid=beat.pid,
                workers=len(beat.workers),
                since=times.from_ms(beat.since),
                at=times.from_ms(beat.at),
                runs=name in running,
                differs=tuple(differing.get(name, ())),
            )


def _queues(stores: Stores, snapshot: Snapshot, get_order: float) -> Iterator[Queue]:
    """Return what waits in each queue, if a getOrder takes `get_order` seconds."""
    held = {**snapshot.open_breakers(), **snapshot.throttled()}
    keys = {one.key for one in snapshot.companies.values() if one.slug not in held} if not snapshot.suspended else set()
    of_key = stores.settings.upstream_requests_per_5_min
    room = sum(max(of_key - spent(stores.redis, one, snapshot.now), 0) for one in keys)
    permits = {LIVE: stores.settings.upstream_concurrency, BACKFILL: stores.settings.backfill_concurrency}
    for queue, at_once in permits.items():
        # Without backfill workers the live workers take these jobs too.
        workers, jobs = snapshot.workers(queue) or snapshot.workers(LIVE), snapshot.queues[queue].jobs
        speed = min(workers, len(keys) * at_once) / get_order
        # A burst goes as fast as the permits allow; what the window has no room for goes at the rate of the window.
        by_window = len(keys) * of_key / _FIVE_MINUTES
        rate = speed if jobs <= room else min(speed, by_window)
        done = 0 if not jobs else round(max(jobs / speed, (jobs - room) / by_window)) if speed else None
        waited = snapshot.queue_age_ms(queue) // 1000
        yield Queue(queue=queue, jobs=jobs, waited_s=waited, workers=workers, rate=round(rate, 2), done_s=done)


def _get_order_seconds(stores: Stores, orders: Sequence[OrderKey]) -> float:
    """Return the average duration of the getOrders of these orders."""
    histories = map(stores.orders.history, orders)
    took = [entry.duration_ms for history in histories for entry in history if isinstance(entry, FetchStored)]
    return max(mean(took), 1) / 1000 if took else GET_ORDER


def _longest_delivery(records: Sequence[OrderRecord], now: datetime) -> tuple[str, int]:
    """Return the sink of the longest delivery of these orders, and for how many seconds it has run; "", 0 if none."""
    running = ((since, name) for one in records for name, since in one.delivering(now).items())
    since, name = min(running, default=(now, ""))
    return name, round((now - since).total_seconds())


def _moment(ms: int) -> datetime | None:
    """Return a time in ms since 1970, None for 0."""
    return times.from_ms(ms) if ms else None
