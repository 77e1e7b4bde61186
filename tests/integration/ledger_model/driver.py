"""Senders, people, a pool, its dispatcher and its workers, one step at a time, over the real ledger and inbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

from app.deployment import Deployment
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.content import unpack
from app.ledger.rq_jobs import BACKFILL, LIVE, delivery_of, order_of, queue_key, sink_queue
from app.ledger.work import DeliveryOutcome, Failure
from tests.integration.ledger_model.model import Lost, OrderModel, RunningDelivery, RunningFetch
from tests.lab import KEYS, LEASE, ONE, SAME_ID, START, Lab, content_of, event_of

SINK: Final = "shop"
SINKS: Final = (SINK, "mail")
FETCHING: Final = ((LIVE,), (LIVE,), (BACKFILL, LIVE))
"""The queues of each worker that fetches; the last one stands for the workers of both queues."""
DELIVERING: Final = tuple((sink_queue(sink),) for sink in (SINK, *SINKS))
WORKERS: Final = (*FETCHING, *DELIVERING)
ANOTHER: Final = OrderKey(ONE.company_id, "00000000-0000-4000-8000-000000000002")
ORDERS: Final = (ONE, SAME_ID, ANOTHER)
_NAMES: Final = {ONE: "ONE", SAME_ID: "SAME_ID", ANOTHER: "ANOTHER"}
_RETRY: Final = 5 * policy.SECOND
_ROUNDS: Final = 60
T = TypeVar("T")


class Step(NamedTuple):
    """A public method of Driver, or of Worker with the worker's number first; a counterexample prints as calls."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(_NAMES.get(one, repr(one)) for one in self.arguments)})"


@dataclass
class Worker:
    """A worker process, as workers/processor.py and delivery.py work: each public method ends where a kill may come."""

    driver: Driver
    name: str
    queues: tuple[str, ...]
    job: OrderKey | None = None
    fetch: RunningFetch | None = None
    delivery_job: OrderKey | None = None
    delivery: RunningDelivery | None = None

    @property
    def sink(self) -> str:
        """Return the sink of a worker that delivers."""
        (queue,) = self.queues
        return queue.removeprefix(sink_queue(""))

    @property
    def order(self) -> OrderKey | None:
        """Return the order it works on."""
        running = self.fetch or self.delivery
        return running.order if running else self.job or self.delivery_job

    def work(self) -> None:
        """Take the next step; nothing fails."""
        if self.delivery is not None:
            self._complete(self.delivery, "succeeded")
        elif self.delivery_job is not None:
            self._acquire(self.delivery_job)
        elif self.fetch is not None:
            if self.fetch.version is None:
                self._read(self.fetch)
            else:
                self._store(self.fetch)
        elif self.job is not None:
            self._start(self.job)
        else:
            self._pop()

    def start(self) -> None:
        """Take a job and start its fetch or delivery, in one go."""
        if self.order is None:
            self.work()
        if self.job is not None or self.delivery_job is not None:
            self.work()

    def fetch_and_store(self) -> None:
        """Take a job, start its fetch and store the answer, in one go."""
        self.start()
        while self.fetch is not None:
            self.work()

    def unsettled(self, give_up: str) -> None:
        """Upstream answers that the order is not settled."""
        if self.fetch is not None:
            if self.fetch.version is None:
                self._read(self.fetch)
            self._store(self.fetch, recheck_ms=2 * policy.MINUTE, give_up=give_up)

    def fail(self, outcome: Failure) -> None:
        """Upstream does not answer, or has no such order."""
        running = self.fetch
        if running is None:
            return
        order, retry_at = self._end_fetch(running.order), self.driver.now + _RETRY
        result = self._call(
            lambda: self.driver.lab.ledger.fail_fetch(
                order, self.name, running.fetch, outcome=outcome, reason=outcome, wait_ms=_RETRY
            )
        )
        running.retry_from(retry_at)
        if outcome == "deleted_upstream" and result != "refused":
            self.driver.orders[order].store(running, settled=True, deleted=True)

    def sink_fails(self) -> None:
        """The delivery fails or is postponed, and is retried."""
        self.start()
        if self.delivery is not None:
            self._complete(self.delivery, "postponed" if self.driver.step % 2 else "retry")

    def sink_is_away(self) -> None:
        """The destination is away, as it may be for every order."""
        self.start()
        if self.delivery is not None:
            self._complete(self.delivery, "retry", unavailable=True)

    def sink_disables(self) -> None:
        """The destination wants nothing more."""
        self.start()
        if self.delivery is not None:
            self._complete(self.delivery, "disabled")

    def sink_rejects(self) -> None:
        """The delivery fails for good, or at once."""
        self.start()
        if self.delivery is not None:
            self._complete(self.delivery, "rejected" if self.driver.step % 2 else "dead")

    def _pop(self) -> None:
        queues = [queue_key(queue, KEYS) for queue in self.queues]
        popped = self.driver.redis("LMPOP", len(queues), *queues, "LEFT")
        if popped is None:
            return
        job_id = popped[1][0]
        assert job_id not in self.driver.job_ids, f"{job_id} was used twice: RQ would skip the second"
        self.driver.job_ids.add(job_id)
        self.job = order_of(job_id.decode())
        if found := delivery_of(job_id.decode()):
            self.delivery_job, _ = found

    def _start(self, order: OrderKey) -> None:
        self.driver.touch(order)
        self.job = None
        outcome, fetch, _ = self.driver.lab.ledger.start_fetch(order, self.name)
        if fetch is not None:
            self.fetch = RunningFetch(order, fetch, self.driver.step, self.driver.now + LEASE)
            self.driver.orders[order].start_fetch(self.fetch, self.driver.now)
        elif outcome == "dead":
            self.driver.orders[order].exhaust_crashes()

    def _read(self, running: RunningFetch) -> None:
        running.version = self.driver.orders[running.order].version

    def _store(self, running: RunningFetch, *, recheck_ms: int | None = None, give_up: str = "") -> None:
        order, model = self._end_fetch(running.order), self.driver.orders[running.order]
        assert running.version is not None, "an answer is read before it is stored"
        content, now = content_of(running.version), self.driver.now
        outcome = self._call(
            lambda: (
                self.driver.lab.ledger.store_fetch(
                    order, self.name, running.fetch, content, recheck_ms=recheck_ms, give_up=give_up
                ).what
            )
        )
        assert (outcome == "refused") == (model.stored_token > running.fetch.token), (outcome, running)
        if outcome != "refused":
            model.store(running, settled=recheck_ms is None)
            if recheck_ms is not None:
                running.retry_from(now + recheck_ms)

    def _end_fetch(self, order: OrderKey) -> OrderKey:
        self.driver.touch(order)
        self.fetch = None
        return order

    def _acquire(self, order: OrderKey) -> None:
        self.driver.touch(order)
        model, now = self.driver.orders[order], self.driver.now
        received = model.sinks[self.sink]
        self.delivery_job = None
        delivery = self.driver.lab.ledger.acquire_delivery(order, self.sink, self.name)
        if delivery is None:
            return
        assert not self.driver.redis("HEXISTS", KEYS.sinks_disabled, self.sink), "the sink is disabled"
        assert delivery.attempts > 0 <= delivery.crashes, delivery
        running = received.delivery
        assert running is None or running.lease_ends <= now, "two deliveries of one order at once"
        assert delivery.revision > received.delivered, "the sink received this revision before"
        assert delivery.raw == b"%d" % (model.stored_version or 0), "not the content that is stored"
        self.delivery = received.delivery = RunningDelivery(order, delivery, now + policy.DELIVERY_LEASE)

    def _complete(self, running: RunningDelivery, outcome: DeliveryOutcome, *, unavailable: bool = False) -> None:
        order = running.order
        self.driver.touch(order)
        self.delivery = None
        self.driver.orders[order].sinks[self.sink].complete(running, outcome)
        # A repeated call may find the breaker open, so its answer is another one.
        for _ in range(2 if self.driver.step % 3 == 0 else 1):
            self.driver.lab.ledger.complete_delivery(
                order,
                self.name,
                running.delivery,
                outcome=outcome,
                reason="refused",
                wait_ms=_RETRY,
                unavailable=unavailable,
            )

    def _call(self, script: Callable[[], T]) -> T:
        """Call a script; in every third step twice, as a worker does that lost the first answer."""
        answer = script()
        if self.driver.step % 3 == 0:
            repeated = script()
            assert repeated == answer, f"the repeated call returns {repeated} after {answer}"
        return answer


class Driver:
    """One interleaving on an empty server. `check` is called after each step with the orders it was about."""

    def __init__(self, lab: Lab, check: Callable[[frozenset[OrderKey]], None]) -> None:
        lab.redis.flushdb()
        lab.now = START
        self.lab, self._ledger, self._check = lab, lab.ledger, check
        self.orders = {order: OrderModel(order, SINKS) for order in ORDERS}
        self.step, self.job_ids = 0, set[bytes]()
        self.touched = frozenset[OrderKey]()
        """The orders that the latest step was about."""
        self._workers = [Worker(self, f"w{number}", queues) for number, queues in enumerate(WORKERS)]
        self._killed: list[Worker] = []
        self._unsent: list[OrderKey] = []
        self._started = len(WORKERS)

    @property
    def now(self) -> int:
        return self.lab.now

    def redis(self, *command: Any) -> Any:
        """Return the raw answer to a command that is not a step of the ledger."""
        client: Any = self.lab.redis
        return client.execute_command(*command)

    def touch(self, *orders: OrderKey) -> None:
        self.touched = frozenset(orders)

    def play(self, steps: Sequence[Step]) -> None:
        """Run the steps, then let time pass without faults until no order is due.

        Raises Lost when some order stays due, or was not fetched then. Dead letters are requeued first.
        """
        for name, arguments in steps:
            self._step(name, *arguments)
        self._step("send_events")
        for sink in self.lab.sinks:
            self._step("enable", sink)
        self._run_until_quiet()
        dead = [OrderKey.of(member.decode()) for member in self.redis("ZRANGE", KEYS.dead, 0, -1)]
        for order in dead:
            self._step("request", order, LIVE)
        if dead:
            self._run_until_quiet()
        contents = self.redis("MGET", *map(KEYS.content, self.orders))
        for model, content in zip(self.orders.values(), contents, strict=True):
            model.check_fetched(unpack(content) if content else None)

    def settle(self, *orders: OrderKey) -> None:
        """Orders settle, and one POST has their events."""
        for order in orders:
            self.orders[order].version += 1
        self._accept(orders)

    def settle_before_event(self, order: OrderKey) -> None:
        """An order settles; its event comes later."""
        self.orders[order].version += 1
        self._unsent.append(order)

    def send_events(self) -> None:
        """The events that were to come later arrive together."""
        orders, self._unsent = self._unsent, []
        if orders:
            self._accept(orders)

    def repeat_event(self, order: OrderKey) -> None:
        """The sender sends the latest event of an order again."""
        timestamp = self.orders[order].last_timestamp
        if timestamp:
            self.touch(order)
            recorded = self.lab.accept_events(event_of(order, timestamp))
            assert recorded.duplicates == 1, "a repeated event was not dropped"

    def request(self, order: OrderKey, queue: str) -> None:
        """Somebody requests a fetch: replay, refetch, requeue."""
        self.touch(order)
        self.lab.request_fetch(order, queue=cast("Literal['live', 'backfill']", queue))
        self.orders[order].settled_at.append(self.step)

    def retry_delivery(self, order: OrderKey) -> None:
        """Somebody gives a dead delivery new attempts."""
        self.touch(order)
        self._ledger.retry_delivery(order, SINK)

    def discard_delivery(self, order: OrderKey) -> None:
        """Somebody discards a dead delivery."""
        self.touch(order)
        self._ledger.discard(order, SINK)

    def disable(self, sink: str) -> None:
        """Somebody disables a sink."""
        Deployment(self.lab.redis).disable(sink, "by hand")

    def enable(self, sink: str) -> None:
        """Somebody enables a sink, which may be disabled or not."""
        Deployment(self.lab.redis).enable(sink)

    def kill(self, number: int) -> None:
        """A worker is killed where it is; another one takes its place."""
        self._killed.append(self._workers[number])
        self._workers[number] = Worker(self, f"w{self._started}", WORKERS[number])
        self._started += 1

    def release(self) -> None:
        """The pool finds the worker that was killed last. Without this step the pool died as well."""
        if not self._killed:
            return
        worker = self._killed.pop()
        if worker.order is not None:
            self.touch(worker.order)
        fetches = [] if worker.job is None else [worker.job]
        deliveries = [] if worker.delivery_job is None else [(worker.delivery_job, worker.sink)]
        self._ledger.release_worker(worker.name, "killed", fetches, deliveries)
        if worker.fetch is not None:
            worker.fetch.repeatable = True
        if worker.delivery is not None:
            worker.delivery.lease_ends = self.now

    def dispatch(self) -> None:
        self.touch(*self.orders)
        self._ledger.dispatch_due()

    def wake(self, order: OrderKey) -> None:
        """The job of an order was lost with a worker that had not started it."""
        self.touch(order)
        self._ledger.release_worker("unknown", "ended", [order], [(order, sink) for sink in self.lab.sinks])

    def pass_time(self, seconds: int) -> None:
        self.lab.later(seconds)

    def set_clock(self, seconds: int) -> None:
        """The clock of Redis is set forward or back.

        What was running or waiting may now be repeated: by this clock its time is over, or never came.
        """
        self.lab.later(seconds)
        for model in self.orders.values():
            if model.latest is not None:
                model.latest.retry_from(0)
            for received in model.sinks.values():
                if received.delivery is not None:
                    received.delivery.lease_ends = 0

    def _step(self, name: str, *arguments: Any) -> None:
        """Run one step, a millisecond after the last."""
        self.step += 1
        self.lab.now += 1
        self.touch()
        if hasattr(Worker, name):
            number, *rest = arguments
            getattr(self._workers[number], name)(*rest)
        else:
            getattr(self, name)(*arguments)
        if self.touched:
            self._check(self.touched)

    def _accept(self, orders: Sequence[OrderKey]) -> None:
        self.touch(*orders)
        events = []
        for number, order in enumerate(orders):
            # Every other event has no timestamp: it is never a duplicate.
            timestamp = f"{self.step}.{number}" if self.step % 2 else ""
            self.orders[order].last_timestamp = timestamp or self.orders[order].last_timestamp
            events.append(event_of(order, timestamp))
        recorded = self.lab.accept_events(*events)
        assert recorded.queued + recorded.coalesced == len(orders), "a new event was dropped"
        for order in orders:
            self.orders[order].settled_at.append(self.step)

    def _run_until_quiet(self) -> None:
        for number, worker in enumerate(self._workers):
            while worker.order is not None:
                self._step("work", number)
        for _ in range(_ROUNDS):
            self._empty_the_queues()
            clocks = (KEYS.due, *map(KEYS.deliveries, self.lab.sinks))
            first = [found[1] for clock in clocks if (found := self.redis("ZRANGE", clock, 0, 0, "WITHSCORES"))]
            if not first:
                return
            next_at = min(int(float(score)) for score in first)
            # What an open breaker holds back is due all the time.
            self.lab.now = next_at if next_at > self.now else self.now + policy.BREAKER_FIRST
            self._step("dispatch")
        raise Lost(f"some order is still due after {_ROUNDS} rounds")

    def _empty_the_queues(self) -> None:
        for number in range(len(FETCHING) - 1, len(WORKERS)):
            is_empty = False
            while not is_empty:
                self._step("work", number)
                is_empty = self._workers[number].order is None and not self.touched
