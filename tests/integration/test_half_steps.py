"""A script that fails in the middle leaves what it has written: Redis has no rollback.

Every step of the ledger is made to fail at each of its commands, once for each. Then the sender repeats what was not
answered, time passes, and workers and an operator do what they do: the order is fetched and delivered in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import pytest
from redis.exceptions import ResponseError

from app.deployment import Deployment
from app.erasure import Erasure
from app.errors import NotRecorded
from app.ids import OrderKey
from app.intake import recorder
from app.ledger import policy, redis
from app.ledger.content import unpack
from app.ledger.dead_letters import DeadCount, DeadLetters, DeadQuery
from app.ledger.rate_limit import Limits, RateLimiter
from app.ledger.redis import Redis
from app.ledger.rq_jobs import BACKFILL, LIVE, delivery_of, order_of, queue_key, sink_queue
from app.ledger.work import Delivery, DeliveryOutcome, Failure, Fetch
from app.replay import Plans
from app.times import from_ms
from tests.lab import KEYS, LEASE, ONE, START, WORKER, Lab, order

TWO: Final = order(2)
SENT: Final = "2026-11-23T10:00:00Z"
ROUNDS: Final = 60

BREAKER: Final = """
local real, calls, breaks_at = redis, 0, tonumber(redis.call('GET', 'test:breaks-at') or '0')
local function broken(...)
  calls = calls + 1
  if calls == breaks_at then
    real.call('SET', 'test:broke', (...))
    error({err = real.call('GET', 'test:error')}, 0)
  end
  return real.call(...)
end
local redis = {call = broken, pcall = redis.pcall, error_reply = redis.error_reply, sha1hex = redis.sha1hex}
"""
"""Stands before every script: its call number `test:breaks-at` fails."""

ERRORS: Final = {
    "of_the_server": "OOM command not allowed when used memory > 'maxmemory'.",
    "of_a_key": "WRONGTYPE Operation against a key holding the wrong kind of value",
}


@pytest.fixture
def shop(redis_client: Redis, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab with the sink `shop`, whose scripts can be made to fail."""
    source = redis.source
    for module in (redis, recorder):
        monkeypatch.setattr(module, "source", lambda name: BREAKER + source(name))
    return Lab(redis_client, sinks=("shop",), now=START)


class Step(NamedTuple):
    """A step, what comes before it, and whether its caller repeats it until it is answered."""

    before: Callable[[Lab], Any]
    run: Callable[[Lab, Any], Any]
    is_repeated: bool = False


def fetched(lab: Lab) -> None:
    lab.accept_and_fetch(ONE, 1)
    lab.deliver()


def started(lab: Lab) -> Any:
    lab.accept(ONE)
    return lab.start_fetch()


def started_again(lab: Lab) -> Any:
    fetched(lab)
    return started(lab)


def permit(lab: Lab) -> dict[str, Any]:
    limits = Limits(concurrency=5, backfill_concurrency=1, requests_per_window=100, permit_lease=LEASE)
    return RateLimiter(lab.redis, "a key", "/a/company", limits).request(WORKER)


def crashed(lab: Lab) -> None:
    for _ in range(policy.CRASHES_ALLOWED):
        started(lab)
        lab.later(200)


def stored(lab: Lab) -> None:
    lab.accept_and_fetch(ONE, 1)


def taken(lab: Lab) -> None:
    lab.accept(ONE)
    lab.clear_queues()


def delivering(lab: Lab) -> Any:
    lab.accept_and_fetch(ONE, 1)
    return lab.start_delivery()


def delivery_overtaken(lab: Lab) -> Any:
    """A newer revision is stored during the delivery, and its job finds the sink busy."""
    delivery = delivering(lab)
    lab.accept_and_fetch(ONE, 2)
    lab.acquire_delivery(worker="w-2")
    return delivery


def delivery_late(lab: Lab) -> None:
    lab.accept_and_fetch(ONE, 1)
    lab.clear_queues()
    lab.later(200)


def away(lab: Lab, delivery: Delivery) -> None:
    lab.complete_delivery(delivery, "retry", unavailable=True)


def about_to_open(lab: Lab) -> Delivery:
    for number in range(1, policy.BREAKER_FAILURES):
        lab.accept_and_fetch(TWO, number)
        lab.complete_delivery(lab.start_delivery(TWO), "retry", TWO, unavailable=True)
    lab.accept_and_fetch(ONE, 1)
    return lab.start_delivery()


def half_open(lab: Lab) -> None:
    away(lab, about_to_open(lab))
    lab.later(policy.BREAKER_FIRST / 1000)


def left_on_its_clocks(lab: Lab) -> None:
    """A worker died before it took the order from there."""
    fetched(lab)
    for clock in (KEYS.due, KEYS.deliveries("shop")):
        lab.redis.zadd(clock, {ONE.member: lab.now})
    for key in (KEYS.record(ONE), KEYS.history(ONE), KEYS.content(ONE)):
        lab.redis.persist(key)


def overtaken(lab: Lab) -> Any:
    fetch = started(lab)
    lab.accept(ONE)
    return fetch


def dead(lab: Lab) -> None:
    lab.accept(ONE)
    lab.dead_letter()


def unanswered(lab: Lab) -> Any:
    """One order is dead as upstream answered none, and now it answers another."""
    lab.accept(ONE, TWO)
    lab.fail_fetch("uncounted", wait=0)
    lab.fail_fetch("dead", unanswered=True)
    lab.clear_queues()
    return lab.start_fetch(TWO)


def delivery_dead(lab: Lab) -> None:
    lab.accept_and_fetch(ONE, 1)
    lab.dead_letter_delivery()


def delivery_waits(lab: Lab) -> None:
    lab.accept_and_fetch(ONE, 1)
    lab.deliver("retry", wait=7200)


def late(lab: Lab) -> None:
    lab.accept(ONE)
    lab.clear_queues()
    lab.later(200)


def planned(*sinks: str) -> Callable[[Lab], Any]:
    def before(lab: Lab) -> Any:
        fetched(lab)
        plan = plans_of(lab).file([(ONE.member, None)], rate=100, sinks=sinks)
        lab.later(10)
        return plan

    return before


def requeued(before: Callable[[Lab], Any]) -> Callable[[Lab], Any]:
    def plan_of_dead_letters(lab: Lab) -> Any:
        before(lab)
        plans = plans_of(lab)
        query = DeadQuery(until=from_ms(lab.now))
        draft = plans.draft(plans.new_id(), query, count=1, rate=100, selected="", who="", why="")
        plans.make(draft)
        lab.later(10)
        return draft

    return plan_of_dead_letters


def fail(outcome: Failure, lab: Lab, fetch: Fetch) -> None:
    lab.fail_fetch(outcome, fetch=fetch)


def complete(outcome: DeliveryOutcome, lab: Lab, delivery: Delivery) -> None:
    lab.complete_delivery(delivery, outcome)


def plans_of(lab: Lab) -> Plans:
    return Plans(lab.redis, event_days=90, clock=lab.clock)


def erase(lab: Lab, _: Any) -> None:
    erasure = Erasure(lab.redis, order_days=400)
    traces = erasure.traces(ONE)
    assert traces is not None
    erasure.erase(traces)


STEPS: Final = {
    "accept": Step(lambda _: None, lambda lab, _: lab.accept(ONE, TWO, timestamp=SENT), is_repeated=True),
    "accept_again": Step(fetched, lambda lab, _: lab.accept(ONE, timestamp=SENT), is_repeated=True),
    "accept_of_a_dead_order": Step(dead, lambda lab, _: lab.accept(ONE, timestamp=SENT), is_repeated=True),
    "request_fetch": Step(fetched, lambda lab, _: lab.request_fetch(ONE), is_repeated=True),
    "request_fetch_of_a_dead_order": Step(dead, lambda lab, _: lab.request_fetch(ONE), is_repeated=True),
    "dispatch": Step(late, lambda lab, _: lab.dispatch()),
    "dispatch_of_a_delivery": Step(delivery_late, lambda lab, _: lab.dispatch()),
    "dispatch_of_a_delivered_order": Step(left_on_its_clocks, lambda lab, _: lab.dispatch()),
    "start_fetch": Step(Lab.accept, lambda lab, _: lab.try_start()),
    "start_fetch_with_permit": Step(Lab.accept, lambda lab, _: lab.ledger.start_fetch(ONE, WORKER, permit(lab))),
    "start_fetch_after_crashes": Step(crashed, lambda lab, _: lab.try_start()),
    "store_fetch": Step(started, lambda lab, fetch: lab.store_fetch(fetch, 1)),
    "store_fetch_of_a_new_revision": Step(started_again, lambda lab, fetch: lab.store_fetch(fetch, 2)),
    "store_fetch_unsettled": Step(started, lambda lab, fetch: lab.store_fetch(fetch, 1, recheck=120)),
    "store_fetch_for_the_last_time": Step(
        started, lambda lab, fetch: lab.store_fetch(fetch, 1, recheck=9, give_up="x")
    ),
    "store_fetch_overtaken": Step(overtaken, lambda lab, fetch: lab.store_fetch(fetch, 1)),
    **{
        f"fail_fetch_{outcome}": Step(started, partial(fail, outcome))
        for outcome in ("retry", "client_error", "uncounted", "deferred", "not_found", "dead", "deleted_upstream")
    },
    "fail_fetch_unanswered": Step(started, lambda lab, fetch: lab.fail_fetch("dead", fetch=fetch, unanswered=True)),
    "store_fetch_that_requeues": Step(unanswered, lambda lab, fetch: lab.store_fetch(fetch, 2, order=TWO)),
    "acquire_delivery": Step(stored, lambda lab, _: lab.acquire_delivery()),
    "return_job": Step(taken, lambda lab, _: lab.ledger.return_job(ONE)),
    **{
        f"complete_delivery_{outcome}": Step(delivering, partial(complete, outcome))
        for outcome in ("succeeded", "skipped", "retry", "postponed", "dead", "rejected", "disabled")
    },
    "complete_delivery_that_opens_the_breaker": Step(about_to_open, away),
    "acquire_delivery_of_a_probe": Step(half_open, lambda lab, _: lab.acquire_delivery()),
    "complete_delivery_overtaken": Step(delivery_overtaken, partial(complete, "succeeded")),
    "release_worker_in_a_fetch": Step(started, lambda lab, _: lab.ledger.release_worker(WORKER, "killed")),
    "release_worker_in_a_delivery": Step(delivering, lambda lab, _: lab.ledger.release_worker(WORKER, "ended")),
    "retry_of_a_delivery": Step(delivery_dead, lambda lab, _: lab.ledger.retry_delivery(ONE, "shop"), is_repeated=True),
    "release_worker_that_a_delivery_ended": Step(
        delivering, lambda lab, _: lab.ledger.release_worker(WORKER, "killed")
    ),
    "retry_of_a_delivery_that_waits": Step(
        delivery_waits, lambda lab, _: lab.ledger.retry_delivery(ONE, "shop"), is_repeated=True
    ),
    "discard_of_a_fetch": Step(dead, lambda lab, _: lab.ledger.discard(ONE), is_repeated=True),
    "discard_of_a_delivery": Step(delivery_dead, lambda lab, _: lab.ledger.discard(ONE, "shop"), is_repeated=True),
    "replay": Step(planned(), lambda lab, plan: plans_of(lab).feed(plan), is_repeated=True),
    "replay_to_sinks": Step(planned("shop"), lambda lab, plan: plans_of(lab).feed(plan), is_repeated=True),
    "replay_of_a_dead_fetch": Step(requeued(dead), lambda lab, plan: plans_of(lab).feed(plan), is_repeated=True),
    "replay_of_a_dead_delivery": Step(
        requeued(delivery_dead), lambda lab, plan: plans_of(lab).feed(plan), is_repeated=True
    ),
    "erase": Step(fetched, erase, is_repeated=True),
    "erase_of_a_pending_order": Step(started, erase, is_repeated=True),
    "erase_of_a_dead_order": Step(dead, erase, is_repeated=True),
    "erase_of_a_dead_delivery": Step(delivery_dead, erase, is_repeated=True),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_fails_in_the_middle_loses_nothing(shop: Lab, name: str, error: str) -> None:
    step = STEPS[name]
    for broken_at in count(1):
        shop.redis.flushdb()
        shop.now = START
        given = step.before(shop)
        command = fail_once(shop, broken_at, error, partial(step.run, shop, given))
        if command is None:
            break
        if step.is_repeated:
            step.run(shop, given)
        if "erase" in name:
            assert not shop.redis.exists(KEYS.dead, KEYS.dead_deliveries), "an erased order is a dead letter"
        try:
            finish(shop)
            check_finished(shop, name, error)
        except AssertionError as failure:
            failure.add_note(f"{name} failed at its command {broken_at}, {command}")
            raise
    assert broken_at > 5, "nothing was broken"


@pytest.mark.parametrize("sink", ["", "shop"])
def test_a_dead_letter_that_a_failed_step_left_counts_once(shop: Lab, sink: str) -> None:
    """Once the order is dead again, perhaps for another reason."""
    begin, die = (delivering, shop.complete_delivery) if sink else (started, shop.fail_fetch)
    for broken_at in count(1):
        shop.redis.flushdb()
        given = begin(shop)
        named = {} if sink else {"fetch": given}
        first = (given, "dead") if sink else ("dead",)
        if fail_once(shop, broken_at, "of_the_server", partial(die, *first, reason="first", **named)) is None:
            break
        shop.later(200)
        reason = "first"
        if shop.field("shop:dead" if sink else "dead") is None:
            reason = "second"
            if sink:
                shop.dead_letter_delivery(reason=f"{reason}: of the sink")
            else:
                shop.dead_letter(reason=reason)

        assert DeadLetters(shop.redis).counts() == [DeadCount(sink=sink, reason=reason, count=1)]
    assert broken_at > 5, "nothing was broken"


def fail_once(lab: Lab, call: int, error: str, run: Callable[[], object]) -> str | None:
    """Run a step whose command number `call` fails; return the name of the command, None if there are not so many."""
    lab.redis.mset({"test:breaks-at": call, "test:error": ERRORS[error]})
    with suppress(ResponseError, NotRecorded):
        run()
    redis: Any = lab.redis
    broke = redis.get("test:broke")
    lab.redis.delete("test:breaks-at", "test:error", "test:broke")
    return broke.decode() if broke else None


def finish(lab: Lab) -> None:
    """Let workers, dispatchers and an operator work until no order is due or dead."""
    redis: Any = lab.redis
    for _ in range(ROUNDS):
        work(lab)
        for member in redis.zrange(KEYS.dead, 0, -1):
            lab.request_fetch(OrderKey.of(member.decode()))
        for member in redis.zrange(KEYS.dead_deliveries, 0, -1):
            lab.ledger.retry_delivery(OrderKey.of(member.decode().partition(" ")[0]), "shop")
        if not lab.pending():
            return
        Deployment(lab.redis).enable("shop")
        lab.later(300)
        lab.dispatch()
    raise AssertionError(f"still due: {lab.due()}, {lab.record()}")


def work(lab: Lab) -> None:
    """Take all jobs, as workers do; upstream answers version 2."""
    redis: Any = lab.redis
    queues = [queue_key(queue, KEYS) for queue in (LIVE, BACKFILL, sink_queue("shop"))]
    while job := next(filter(None, map(redis.lpop, queues)), None):
        if one := order_of(job.decode()):
            _, fetch, _ = lab.ledger.start_fetch(one, "w-2")
            if fetch is not None:
                lab.store_fetch(fetch, 2, order=one, worker="w-2")
        elif found := delivery_of(job.decode()):
            one, _ = found
            if (delivery := lab.acquire_delivery(one, "w-2")) is not None:
                lab.complete_delivery(delivery, order=one, worker="w-2")


def check_finished(lab: Lab, name: str, error: str) -> None:
    """Raises AssertionError unless all that is pending was fetched and delivered, and all keys expire."""
    for one in (ONE, TWO) if name == "accept" else (ONE,):
        record = lab.record(one)
        assert record, "there is no record"
        assert record["fetched_generation"] == record["generation"], record
        if "erase" in name:
            assert record.keys() >= {"erased_at"}, record
            assert not lab.redis.exists(KEYS.content(one))
        elif "discard" not in name and "deleted" not in name:
            redis: Any = lab.redis
            content = unpack(redis.get(KEYS.content(one)))
            assert int(content) in versions(name, error), record
            assert record["shop:revision"] == record["revision"], record
            if "new_revision" in name:
                kept = redis.hget(KEYS.revisions(one), "1:content")
                # Where its own key is broken, the step goes on without it.
                assert (error == "of_a_key" and kept is None) or unpack(kept) == b"1", record
        is_in_feed = lab.redis.zscore(KEYS.feed, one.member) is not None
        assert is_in_feed == bool(lab.redis.exists(KEYS.content(one))), "the feed has what has content"
        assert None not in lab.days_kept(one), f"a key does not expire: {record}"
    assert not lab.redis.exists(KEYS.dead_kinds, *lab.redis.keys(KEYS.dead_by("*"))), "a kind has no dead letter"


def versions(name: str, error: str) -> tuple[int, ...]:
    """Return the versions that may be delivered in the end: 1 was fetched before or in the step, 2 after it."""
    if name == "store_fetch" or (name == "replay" and error == "of_a_key"):
        return 1, 2  # stored or fetched again; a replay passes over an order whose keys are broken
    return (1,) if ("deliver" in name and "overtaken" not in name) or name == "replay_to_sinks" else (2,)
