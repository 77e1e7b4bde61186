"""Whose turn it is to be reconciled: by the clock, or because of rejected events, and on one machine at a time."""

from __future__ import annotations

import pytest
from redis import Redis

from app.ledger import keys
from app.reconcile.state import AGAIN_AFTER, ASKED_EVERY, FIRST_AFTER, Turns

VENUE = "11111111-1111-4111-8111-111111111111"
NOW = 1_795_000_000_000
EVERY = 900_000


@pytest.fixture
def turns(redis_client: Redis) -> Turns:
    return Turns(redis_client, VENUE, lease=60_000)


def ask(redis: Redis) -> None:
    """Leave the mark of a rejected event, as the web process does."""
    redis.hincrby(keys.reconcile(VENUE), "asks", 1)


def run(turns: Turns, now: int) -> str | None:
    """Run if it is due, to the end; return what caused it."""
    with turns.taken(now) as turn:
        if turn is None:
            return None
        turns.complete(turn, now + EVERY)
        return turn.cause


def test_the_first_run_comes_a_minute_after_the_first_look_and_then_one_every_time(turns: Turns) -> None:
    assert run(turns, NOW) is None
    assert run(turns, NOW + FIRST_AFTER - 1) is None
    assert run(turns, NOW + FIRST_AFTER) == "timed"
    assert run(turns, NOW + FIRST_AFTER + EVERY - 1) is None
    assert run(turns, NOW + FIRST_AFTER + EVERY) == "timed"


def test_a_mark_causes_one_run_at_once_and_the_next_after_five_minutes(turns: Turns, redis_client: Redis) -> None:
    """Marks that come after a run began want another: their orders may not have been in its list."""
    ask(redis_client)
    ask(redis_client)
    assert run(turns, NOW) == "asked"
    assert run(turns, NOW + 1000) is None
    ask(redis_client)
    assert run(turns, NOW + ASKED_EVERY - 1) is None
    assert run(turns, NOW + ASKED_EVERY) == "asked"
    assert run(turns, NOW + 2 * ASKED_EVERY) is None


def test_a_mark_left_during_a_run_is_not_lost(turns: Turns, redis_client: Redis) -> None:
    ask(redis_client)
    with turns.taken(NOW) as turn:
        assert turn is not None
        ask(redis_client)
        turns.complete(turn, NOW + EVERY)

    assert run(turns, NOW + ASKED_EVERY) == "asked"


def test_one_machine_runs_at_a_time_and_the_other_finds_nothing_left(turns: Turns, redis_client: Redis) -> None:
    other = Turns(redis_client, VENUE, lease=60_000)
    run(turns, NOW)
    later = NOW + FIRST_AFTER
    with turns.taken(later) as turn:
        assert turn is not None
        assert run(other, later) is None
        turns.complete(turn, later + EVERY)

    assert run(other, later + 1) is None


def test_a_run_that_died_is_due_again_after_a_minute(turns: Turns, redis_client: Redis) -> None:
    """Its lease has ended by itself or was given back; it must not begin anew each second."""
    run(turns, NOW)
    later = NOW + FIRST_AFTER
    with pytest.raises(ZeroDivisionError), turns.taken(later):
        raise ZeroDivisionError

    assert run(turns, later + 1000) is None
    assert run(turns, later + AGAIN_AFTER) == "timed"


def test_a_lease_left_by_a_kill_ends(redis_client: Redis) -> None:
    short = Turns(redis_client, VENUE, lease=60_000)
    ask(redis_client)
    with short.taken(NOW):
        assert 0 < int(redis_client.pttl(keys.reconcile_lease(VENUE))) <= 60_000
        redis_client.delete(keys.reconcile_lease(VENUE))  # it expired while we were frozen

    assert redis_client.exists(keys.reconcile_lease(VENUE)) == 0


def test_a_run_that_used_up_its_share_goes_on_a_minute_later_whatever_asks(turns: Turns, redis_client: Redis) -> None:
    ask(redis_client)
    with turns.taken(NOW) as turn:
        assert turn is not None
        turns.postpone(NOW + AGAIN_AFTER)
    ask(redis_client)

    assert run(turns, NOW + AGAIN_AFTER - 1) is None
    assert run(turns, NOW + AGAIN_AFTER) == "timed"


def test_a_flushed_redis_begins_anew(turns: Turns, redis_client: Redis) -> None:
    run(turns, NOW)
    run(turns, NOW + FIRST_AFTER)
    redis_client.flushall()

    assert run(turns, NOW + FIRST_AFTER + 1) is None
    assert run(turns, NOW + 2 * FIRST_AFTER + 1) == "timed"
