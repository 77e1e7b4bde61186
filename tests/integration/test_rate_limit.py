"""The limits of one API key hold over all workers, and its breaker defers orders instead of using up their attempts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import pytest

from app.errors import (
    ConnectionFault,
    Denied,
    OrderNotFound,
    RequestRejected,
    Throttled,
    Unavailable,
    UnreadableAnswer,
    UpstreamError,
)
from app.ledger import policy
from app.ledger.rate_limit import WINDOW, Limits, Permit, RateLimiter
from app.ledger.redis import Redis
from app.ledger.rq_jobs import BACKFILL, LIVE
from tests.eventually import eventually
from tests.lab import ONE, WORKER, Lab

LIMITS = Limits(concurrency=3, backfill_concurrency=1, requests_per_window=100, permit_lease=60_000)
FAULT = ConnectionFault("unauthorized", http_status=401)
FAILURE = Unavailable("timeout")


class Key:
    """One limiter, under a clock that the test moves."""

    def __init__(self, redis: Redis, api_key: str = "a key", company: str = "/a/company", route: str = "") -> None:
        self.now = 1_800_000_000_000
        self.limiter = RateLimiter(redis, api_key, company, LIMITS, route=route, clock=lambda: self.now)

    def acquire(self, queue: str = "live", worker: str = "") -> Permit:
        return self.limiter.permit("backfill" if queue == "backfill" else "live", worker)

    def denied(self, queue: str = "live") -> Denied:
        with pytest.raises(Denied) as denied:
            self.acquire(queue)
        return denied.value

    def answer(self) -> None:
        with self.acquire():
            pass

    def fail(self, error: UpstreamError, order: str = "") -> tuple[int, bool]:
        """Make a call that fails, about another order each time unless one is named."""
        with self.limiter.permit("live", order=order) as permit:
            return permit.failed(error)[:2]

    def open(self) -> int:
        """Let orders fail until the breaker opens; return for how many ms."""
        for _ in range(policy.BREAKER_FAILURES - 1):
            assert not self.fail(FAULT)[1]
        closed_ms, opened = self.fail(FAULT)
        assert opened
        return closed_ms


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no worker wait long for a permit in vain."""
    monkeypatch.setattr(policy, "PERMIT_WAIT", 250)


@pytest.fixture
def key(redis_client: Redis) -> Key:
    return Key(redis_client)


class Line:
    """Workers that wait for a permit, each in a thread, in the order in which they came."""

    def __init__(self, redis: Redis, threads: ThreadPoolExecutor) -> None:
        self.redis = redis
        self._threads = threads

    def key(self, company: str = "/a/company") -> Key:
        return Key(self.redis, company=company)

    def join(self, key: Key, queue: str = "live", worker: str = "") -> Future[Permit]:
        """Let a worker ask for a permit; it waits when this returns."""
        before = self.length()
        asking = self._threads.submit(key.acquire, queue, worker)
        eventually(lambda: self.length() > before, what="it waits")
        return asking

    def length(self) -> int:
        return sum(self.redis.zcard(line) for line in self.redis.keys("ota:waiting:*"))


@pytest.fixture
def line(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(policy, "PERMIT_WAIT", 1500)
    with ThreadPoolExecutor() as threads:
        yield Line(redis_client, threads)


def test_two_limiters_of_the_same_key_share_its_permits_and_two_keys_do_not(redis_client: Redis) -> None:
    """A limit belongs to the key, not to the company or the process; a released permit is free at once."""
    one, same, other = (Key(redis_client, name) for name in ("a key", "a key", "another"))
    permits = [one.acquire() for _ in range(3)]

    assert same.denied().reason == "permits_full"
    other.acquire()
    with permits[0]:
        pass
    same.acquire()


@pytest.mark.parametrize("held", ["permits", "probe"])
@pytest.mark.parametrize("end", ["lease", "pool"])
def test_what_a_killed_worker_held_is_free_after_its_lease_or_its_release(key: Key, held: str, end: str) -> None:
    """The probe of a breaker has a lease like every permit."""
    if held == "probe":
        key.now += key.open()
    number = 1 if held == "probe" else 3
    for _ in range(number):
        key.acquire(worker="pool-live-1")

    key.now += 59_000
    assert key.denied().reason == ("breaker_open" if held == "probe" else "permits_full")
    if end == "pool":
        key.limiter.release_worker("pool-live-1")
    else:
        key.now += 1_001

    for _ in range(number):
        key.acquire()


def test_permits_of_a_worker_whose_name_starts_the_same_are_kept(key: Key) -> None:
    for worker in ("pool-live-1", "pool-live-12", "pool-live-12"):
        key.acquire(worker=worker)

    key.limiter.release_worker("pool-live-1")

    key.acquire()
    assert key.denied().reason == "permits_full"


def test_backfill_uses_its_own_share_and_live_may_use_all(key: Key) -> None:
    key.acquire("backfill")

    assert key.denied("backfill").reason == "permits_full"
    key.acquire()
    key.acquire()


def test_a_permit_that_is_released_goes_to_the_worker_that_waits_longest(line: Line) -> None:
    """It is handed over: another worker that asks meanwhile gets none."""
    key = line.key()
    held = [key.acquire() for _ in range(3)]
    first = line.join(key)
    key.now += 1
    second = line.join(key)

    held[0].failed(FAILURE)

    first.result(2)
    assert (second.done(), line.length()) == (False, 1)
    held[1].failed(FAILURE)
    with second.result(2):
        assert line.length() == 0


def test_a_worker_that_waits_in_vain_is_handed_no_permit_later(key: Key, line: Line) -> None:
    """It would be lost until its lease ends. Another one still waits, and gets it."""
    other = line.key()
    held = [other.acquire() for _ in range(3)]
    in_vain, waits = line.join(key), line.join(other)
    with pytest.raises(Denied, match="permits_full"):
        in_vain.result(2)

    held[0].failed(FAILURE)

    waits.result(2)


def test_a_worker_that_is_killed_while_it_waits_is_handed_no_permit(line: Line) -> None:
    key = line.key()
    held = [key.acquire() for _ in range(3)]
    killed, lives = line.join(key, worker="pool-live-1"), line.join(key, worker="pool-live-12")

    key.limiter.release_worker("pool-live-1")
    held[0].failed(FAILURE)

    lives.result(2)
    assert not killed.done()
    held[1].failed(FAILURE)  # its thread asks again when it has waited
    killed.result(10)


def test_a_permit_killed_with_its_worker_goes_to_the_one_that_waits(line: Line) -> None:
    key = line.key()
    for number in range(3):
        key.acquire(worker=f"pool-live-{number}")
    waits = line.join(key)

    key.limiter.release_worker("pool-live-1")

    waits.result(2)


def test_backfill_that_waits_for_its_share_lets_live_pass(line: Line) -> None:
    key = line.key()
    backfill, held = key.acquire("backfill"), [key.acquire() for _ in range(2)]
    waits, live = line.join(key, "backfill"), line.join(key)

    held[0].failed(FAILURE)

    live.result(2)
    assert not waits.done()
    backfill.failed(FAILURE)
    waits.result(2)


def test_each_company_of_a_key_waits_behind_its_own_breaker(line: Line) -> None:
    """The failure that opens the breaker of one releases a permit for the other; the one hears of it at once."""
    key, other = line.key(), line.key("/another/company")
    for _ in range(policy.BREAKER_FAILURES - 1):
        key.fail(FAULT)
    held = [key.acquire() for _ in range(3)]
    refused, granted = line.join(key), line.join(other)

    assert held[0].failed(FAULT).opened

    with pytest.raises(Denied, match="breaker_open"):
        refused.result(2)
    granted.result(2)


def test_a_throttled_key_sends_away_those_that_wait(line: Line) -> None:
    key = line.key()
    held = [key.acquire() for _ in range(3)]
    waits = line.join(key)

    held[0].failed(Throttled("throttled", http_status=429, retry_after=7.5))

    with pytest.raises(Denied, match="throttled"):
        waits.result(2)


@pytest.mark.parametrize("queue", [LIVE, BACKFILL])
def test_the_start_of_a_fetch_takes_a_permit_of_its_queue_and_a_repeat_takes_no_second(
    bare: Lab, key: Key, queue: Literal["live", "backfill"]
) -> None:
    """The answer was lost, so the worker starts the fetch again."""
    bare.request_fetch(queue=queue)
    request = key.limiter.request(WORKER)

    answers = [bare.ledger.start_fetch(ONE, WORKER, request) for _ in range(2)]

    permits = [answer.fetch.permit for answer in answers if answer.fetch]
    assert [permit and (permit.outcome, permit.token[:2]) for permit in permits] == [("granted", f"{queue[0]}-")] * 2
    (name,) = bare.redis.keys("ota:permits:*")
    assert bare.redis.zcard(name) == 1


@pytest.mark.parametrize("fault", ["nothing to fetch", "a broken key"])
def test_a_start_that_gets_no_permit_takes_none(bare: Lab, key: Key, fault: str) -> None:
    """Where a key of the limits is broken the fetch has started, and the worker that asks alone gets the error."""
    bare.accept()
    if fault == "a broken key":
        key.answer()
        (name,) = bare.redis.keys("ota:limiter:*")
        bare.redis.set(name, "a text")
    else:
        bare.fetch_and_store()

    found = bare.ledger.start_fetch(ONE, WORKER, key.limiter.request(WORKER))

    assert found.what == ("fetch" if fault == "a broken key" else "nothing")
    assert (found.fetch.permit if found.fetch else None) is None
    assert not bare.redis.keys("ota:permits:*")


def test_no_job_waits_for_permits_that_are_held_too_long(key: Key) -> None:
    """No permit was released for longer than a job waits, so a job of that company ends at once."""
    for _ in range(3):
        key.acquire()
    started = time.monotonic()
    key.now += policy.PERMIT_WAIT + 1

    key.denied()

    assert time.monotonic() - started < policy.PERMIT_WAIT / 2000


def test_the_window_slides_and_lets_bursts_through(key: Key) -> None:
    """A hundred requests in a row are allowed; the next one when the first has left the window."""
    for _ in range(100):
        key.answer()

    full = key.denied()

    assert (full.reason, full.wait_ms) == ("window_full", WINDOW + 1)
    key.now += full.wait_ms
    key.acquire()


def test_retry_after_holds_for_every_worker_of_the_key(redis_client: Redis, key: Key) -> None:
    """A 429 of one worker stops the others until then, and opens no breaker."""
    other = Key(redis_client)

    assert key.fail(Throttled("throttled", http_status=429, retry_after=7.5)) == (7500, False)

    other.now += 7499
    denied = other.denied()
    assert (denied.wait_ms, denied.reason) == (1, "throttled")
    other.now += 1
    assert other.fail(Throttled("throttled", http_status=429)) == (policy.THROTTLED_WAIT, False)


def test_faults_open_the_breaker_of_their_company_and_one_probe_closes_it(redis_client: Redis, key: Key) -> None:
    """The permits are the key's, the breaker is the company's."""
    other = Key(redis_client, company="/another/company")
    assert key.open() == policy.BREAKER_FIRST

    key.now += policy.BREAKER_FIRST - 1
    assert key.denied().reason == "breaker_open"
    for _ in range(3):
        other.acquire().failed(FAILURE)
    key.now += 1
    with key.acquire():
        assert key.denied().reason == "breaker_open"

    for _ in range(3):
        key.acquire()
    other.now = key.now
    assert other.denied().reason == "permits_full"


FAILURES = {
    "400": RequestRejected("bad_request", http_status=400),
    "a page instead of JSON": UnreadableAnswer("unreadable_answer", http_status=200),
    "403": ConnectionFault("forbidden", http_status=403),
    "404 without its code": ConnectionFault("not_found", http_status=404),
    "time-out": FAILURE,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_breaker_opens_after_five_orders_that_fail_in_a_row(key: Key, failure: str) -> None:
    """Four failures, an answer, four failures: closed. A fifth in a row: open. An order that fails again adds none."""
    error = FAILURES[failure]
    for _ in range(2):
        for _ in range(4):
            assert not key.fail(error)[1]
        key.answer()
    for number in (*range(4), *range(4)):
        assert not key.fail(error, f"order-{number}")[1]

    assert key.fail(error, "order-4")[1]


def test_a_route_without_orders_has_a_breaker_of_its_own(redis_client: Redis, key: Key) -> None:
    """A key that may fetch but not list: one fault pauses the lists, and no getOrder."""
    lists = Key(redis_client, route="list_orders")

    assert lists.fail(FAILURE) == (0, False)
    assert lists.fail(FAULT) == (policy.BREAKER_FIRST, True)

    assert lists.denied().reason == "breaker_open"
    key.answer()
    assert lists.denied().reason == "breaker_open"


@pytest.mark.parametrize("answer", ["429", "404"])
def test_what_is_no_order_is_no_proof_that_orders_are_answered(key: Key, answer: str) -> None:
    """A 429 says nothing, and a 404 with its code may be of an order that is not there yet: neither counts."""
    throttled = Throttled("throttled", http_status=429, retry_after=0.001)
    key.answer()
    answered_at = key.now
    key.now += 1000
    for _ in range(4):
        key.fail(FAILURE)
    key.fail(throttled if answer == "429" else OrderNotFound("order_not_found", http_status=404))
    key.now += 1000

    with key.acquire() as permit:
        released = permit.failed(FAILURE)

    assert (released.opened, released.answered_at) == (True, answered_at)


MISSING = OrderNotFound("order_not_found", http_status=404)


@pytest.mark.parametrize("missing_ms", [0, policy.NOT_FOUND_GRACE - 1, policy.NOT_FOUND_GRACE])
def test_orders_that_stay_missing_while_none_is_answered_open_the_breaker(key: Key, missing_ms: int) -> None:
    """As any failure does. An order that may be there soon counts only as the probe."""
    for number in range(policy.BREAKER_FAILURES):
        with key.limiter.permit("live", order=f"order-{number}") as permit:
            released = permit.failed(MISSING, missing_ms)
    assert released.opened == (missing_ms == policy.NOT_FOUND_GRACE)

    key.now += released.closed_ms or key.open()

    assert key.fail(MISSING) == (2 * policy.BREAKER_FIRST, True)


def test_an_answer_that_was_under_way_is_no_proof_about_a_failure_before_it_ended(key: Key) -> None:
    """An outage begins while the last good answers arrive."""
    under_way, began = key.acquire(), key.now
    key.now += 1000
    key.fail(FAILURE)
    with under_way:
        key.now += 1000

    with key.acquire() as permit:
        assert permit.failed(FAILURE).answered_at == began


def test_a_probe_that_is_throttled_leaves_the_breaker_to_the_next_probe(key: Key) -> None:
    key.now += key.open()
    key.fail(Throttled("throttled", http_status=429, retry_after=1))
    assert key.denied().reason == "throttled"
    key.now += 1000

    assert key.fail(FAULT) == (2 * policy.BREAKER_FIRST, True)


def test_a_retry_after_of_one_failure_holds_for_no_other_order_and_for_the_breaker_once_it_opens(key: Key) -> None:
    busy = Unavailable("http_503", http_status=503, retry_after=900)

    assert [key.fail(busy) for _ in range(5)] == [*[(0, False)] * 4, (900_000, True)]

    key.now += 899_999
    assert (key.denied().wait_ms, key.denied().reason) == (1, "breaker_open")


def test_an_exception_in_the_block_counts_as_a_failure_and_releases_the_permit(key: Key) -> None:
    for _ in range(policy.BREAKER_FAILURES):
        with pytest.raises(RuntimeError), key.acquire():
            raise RuntimeError

    assert key.denied().reason == "breaker_open"


def test_a_release_that_is_repeated_counts_one_failure(key: Key) -> None:
    """Its answer was lost, so the worker releases the permit again."""
    permit = key.acquire()
    for _ in range(policy.BREAKER_FAILURES):
        permit.failed(FAILURE)

    key.acquire()


def test_each_probe_that_fails_doubles_the_wait_up_to_five_minutes(key: Key) -> None:
    waits = [key.open() // 1000]
    key.now += policy.BREAKER_FIRST
    for _ in range(6):
        closed_ms, opened = key.fail(FAULT)
        assert opened
        waits.append(closed_ms // 1000)
        key.now += closed_ms

    assert waits == [15, 30, 60, 120, 240, 300, 300]


def test_requests_that_fail_while_the_breaker_is_open_do_not_lengthen_it(key: Key) -> None:
    """Three calls were running when the key broke: the breaker opens once."""
    for _ in range(policy.BREAKER_FAILURES - 1):
        key.fail(FAULT)
    permits = [key.acquire() for _ in range(3)]

    answers = [permit.failed(FAULT)[:2] for permit in permits]

    assert answers == [(policy.BREAKER_FIRST, True), (policy.BREAKER_FIRST, False), (policy.BREAKER_FIRST, False)]


def test_redis_holds_only_a_digest_of_the_key(redis_client: Redis, key: Key) -> None:
    key.fail(FAILURE)

    assert redis_client.keys()
    assert not list(redis_client.scan_iter("*a key*"))
