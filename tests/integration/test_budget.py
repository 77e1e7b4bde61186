"""The budget of one API key holds over all workers, and its breaker parks orders instead of burning their tries."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from redis import Redis

from app import bootstrap
from app.ledger import policy
from app.ledger.rate_limit import WINDOW, Budget, Limits, NotNow, Slot

NOW = 1_800_000_000_000
LIMITS = Limits(concurrency=3, backfill_concurrency=1, requests_per_window=100, slot_lease=60_000)


@pytest.fixture
def budget(redis_client: Redis) -> Budget:
    """The budget of a key of its own."""
    return Budget(redis_client, "a key", "/a/company", LIMITS)


def at(now: int) -> Iterator[int]:
    """Return a clock that stands at `now` for the first answer, and is past a job's patience after it."""
    return itertools.chain([now, now], itertools.repeat(now + policy.SLOT_PATIENCE))


def take(budget: Budget, now: int = NOW, lane: str = "live") -> Slot | NotNow:
    clock = at(now)
    return budget.take("backfill" if lane == "backfill" else "live", lambda: next(clock))


def taken(budget: Budget, now: int = NOW, lane: str = "live") -> Slot:
    slot = take(budget, now, lane)
    assert isinstance(slot, Slot), slot
    return slot


def refused(budget: Budget, now: int = NOW, lane: str = "live") -> NotNow:
    answer = take(budget, now, lane)
    assert isinstance(answer, NotNow), answer
    return answer


def test_no_more_requests_at_once_than_slots(budget: Budget) -> None:
    """The fourth of three is refused, and a slot given back is free at once."""
    slots = [taken(budget) for _ in range(3)]
    assert refused(budget).reason == "slots_full"

    budget.give(slots[0], "answered", NOW)

    assert isinstance(take(budget), Slot)


def test_two_budgets_of_the_same_key_share_its_slots_and_two_keys_do_not(redis_client: Redis) -> None:
    """A budget belongs to the key, not to the company or the process."""
    one, same, other = (Budget(redis_client, key, "/a/company", LIMITS) for key in ("a key", "a key", "another"))
    for _ in range(3):
        taken(one)

    assert refused(same).reason == "slots_full"
    assert isinstance(take(other), Slot)


def test_the_slot_of_a_killed_worker_is_free_when_its_lease_ends(budget: Budget) -> None:
    """Nobody gives back what a SIGKILL took."""
    for _ in range(3):
        taken(budget)

    assert refused(budget, NOW + 59_000).reason == "slots_full"
    assert isinstance(take(budget, NOW + 60_001), Slot)


def test_what_a_killed_worker_held_is_free_when_its_pool_has_seen_it_end(redis_client: Redis) -> None:
    """Its slots, and the probe of a breaker; those of a worker whose name begins alike are not touched."""
    budget = Budget(redis_client, "a key", "/a/company", LIMITS)
    for worker in ("pool-live-1", "pool-live-1", "pool-live-12"):
        assert isinstance(budget.take("live", lambda: NOW, worker), Slot)
    later = NOW + policy.SLOT_PATIENCE + 1
    assert isinstance(budget.take("live", lambda: later), NotNow)

    assert budget.reclaim("pool-live-1", later) == 2
    slots = [budget.take("live", lambda: later) for _ in range(2)]
    assert all(isinstance(slot, Slot) for slot in slots)
    assert refused(budget, later).reason == "slots_full"
    assert budget.reclaim("pool-live-1", later) == 0


def test_a_breaker_whose_probe_was_killed_is_asked_again_at_once(budget: Budget) -> None:
    budget.give(taken(budget), "fault", NOW)
    half_open = NOW + policy.BREAKER_FIRST + 1
    assert isinstance(budget.take("live", lambda: half_open, "pool-live-1"), Slot)
    assert refused(budget, half_open).reason == "breaker_open"

    budget.reclaim("pool-live-1", half_open)

    assert isinstance(take(budget, half_open), Slot)


def test_backfill_has_its_own_share_and_live_may_use_all(budget: Budget) -> None:
    """One replay at a time, while live takes the rest."""
    taken(budget, lane="backfill")

    assert refused(budget, lane="backfill").reason == "slots_full"
    assert isinstance(take(budget), Slot)
    assert isinstance(take(budget), Slot)


def test_a_waiting_job_gets_the_slot_that_another_gives_back(redis_client: Redis) -> None:
    """It is woken, and does not poll."""
    limits = Limits(concurrency=1, backfill_concurrency=1, requests_per_window=100, slot_lease=60_000)
    budget = Budget(redis_client, "a key", "/a/company", limits)
    slot = budget.take("live", bootstrap.clock)
    assert isinstance(slot, Slot)
    timer = threading.Timer(0.05, budget.give, (slot, "answered", bootstrap.clock()))
    timer.start()

    waited = budget.take("live", bootstrap.clock)

    timer.join()
    assert isinstance(waited, Slot)


def test_nobody_waits_for_slots_that_hang(budget: Budget) -> None:
    """No slot changed hands for longer than a job's patience: the job of a hanging company ends at once."""
    for _ in range(3):
        taken(budget)
    started = time.monotonic()
    later = NOW + policy.SLOT_PATIENCE + 1

    answer = budget.take("live", lambda: later)

    assert isinstance(answer, NotNow)
    assert time.monotonic() - started < policy.SLOT_PATIENCE / 2000


def test_the_window_slides_and_lets_bursts_through(budget: Budget) -> None:
    """A hundred requests in a moment are fine; the next one comes when the first has left the window."""
    for _ in range(100):
        budget.give(taken(budget), "answered", NOW)

    full = refused(budget)

    assert (full.reason, full.until) == ("window_full", NOW + WINDOW + 1)
    assert isinstance(take(budget, full.until), Slot)


def test_retry_after_holds_for_every_worker_of_the_key(redis_client: Redis, budget: Budget) -> None:
    """A 429 seen by one worker stops the others until then, and opens no breaker."""
    until, opened = budget.give(taken(budget), "answered", NOW, retry_after=7.5)
    other = Budget(redis_client, "a key", "/a/company", LIMITS)

    assert (until, opened) == (NOW + 7500, False)
    assert refused(other, NOW + 7499) == NotNow(NOW + 7500, "throttled")
    assert isinstance(take(other, NOW + 7500), Slot)


def test_a_fault_of_the_key_opens_its_breaker_at_once(budget: Budget) -> None:
    """401 and 403 say that no call with this key can help."""
    until, opened = budget.give(taken(budget), "fault", NOW)

    assert (until, opened) == (NOW + policy.BREAKER_FIRST, True)
    assert refused(budget, until - 1).reason == "breaker_open"


def test_a_company_whose_address_is_wrong_does_not_close_the_way_for_others_of_the_same_key(
    redis_client: Redis, budget: Budget
) -> None:
    """The slots are the key's, the breaker is the company's."""
    other = Budget(redis_client, "a key", "/another/company", LIMITS)
    budget.give(taken(budget), "fault", NOW)

    assert refused(budget).reason == "breaker_open"
    for _ in range(3):
        taken(other)
    assert refused(other).reason == "slots_full"


def test_failures_open_the_breaker_only_in_a_row(budget: Budget) -> None:
    """Four failures, an answer, four failures: closed. A fifth in a row: open."""
    for how in ["failed"] * 4 + ["answered"] + ["failed"] * 4:
        _, opened = budget.give(taken(budget), "failed" if how == "failed" else "answered", NOW)
        assert not opened

    _, opened = budget.give(taken(budget), "failed", NOW)

    assert opened


def test_an_open_breaker_lets_one_probe_through_and_closes_when_it_is_answered(budget: Budget) -> None:
    """While the probe is under way the others still wait; its answer frees all."""
    until, _ = budget.give(taken(budget), "fault", NOW)
    probe = taken(budget, until)

    assert refused(budget, until).reason == "breaker_open"
    budget.give(probe, "answered", until)

    assert [type(take(budget, until)) for _ in range(3)] == [Slot] * 3


def test_each_probe_that_fails_doubles_the_wait_up_to_five_minutes(budget: Budget) -> None:
    """15, 30, 60, 120, 240, 300, 300 seconds."""
    now, waits = NOW, []
    for _ in range(7):
        until, opened = budget.give(taken(budget, now), "fault", now)
        assert opened
        waits.append((until - now) // 1000)
        now = until

    assert waits == [15, 30, 60, 120, 240, 300, 300]


def test_those_who_failed_while_it_was_open_do_not_make_it_longer(budget: Budget) -> None:
    """Three calls were under way when the key broke: one opening, not three."""
    slots = [taken(budget) for _ in range(3)]

    answers = [budget.give(slot, "fault", NOW) for slot in slots]

    assert answers == [
        (NOW + policy.BREAKER_FIRST, True),
        (NOW + policy.BREAKER_FIRST, False),
        (NOW + policy.BREAKER_FIRST, False),
    ]


def test_a_probe_whose_worker_died_does_not_close_the_way_for_ever(budget: Budget) -> None:
    """The probe has a lease like every slot."""
    until, _ = budget.give(taken(budget), "fault", NOW)
    taken(budget, until)

    assert refused(budget, until + 59_000).reason == "breaker_open"
    assert isinstance(take(budget, until + 60_001), Slot)


def test_the_key_itself_is_nowhere_in_redis(redis_client: Redis, budget: Budget) -> None:
    """Only a digest names it."""
    budget.give(taken(budget), "failed", NOW)

    assert redis_client.keys()
    assert not list(redis_client.scan_iter("*a key*"))
