"""accept.lua through the inbox: all or nothing in one step, and groups of POSTs that arrive together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import msgspec
import pytest

from app import bootstrap
from app.dev.valkey import Valkey
from app.errors import NotRecorded
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.recorder import GROUP, GroupCommit, Inbox, Recorded
from app.ledger import policy
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.redis import Redis
from tests.integration.relay import Relay, relay
from tests.lab import KEYS, Lab, event_of, order

A = "aaaaaaaa-0000-4000-8000-000000000000"
B = "bbbbbbbb-0000-4000-8000-000000000000"
ORDER = "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"
NOW = 1_800_000_000_000


@asynccontextmanager
async def inbox(url: str, *, now: int = NOW, dedup_days: int = 7, within: float = 10) -> AsyncIterator[Inbox]:
    """Open an inbox for one event loop; a call that hangs ends with an error."""
    redis = bootstrap.for_web(url, DEFAULT_PREFIX)
    try:
        async with asyncio.timeout(within):
            yield Inbox(redis, dedup_days=dedup_days, event_days=90, clock=lambda: now)
    finally:
        await redis.aclose()


def accept(url: str, *events: OrderProcessed, now: int = NOW, dedup_days: int = 7) -> Recorded:
    """Record the events as one POST."""

    async def work() -> Recorded:
        async with inbox(url, now=now, dedup_days=dedup_days) as box:
            return await box.accept(events)

    return asyncio.run(work())


def event(company: str = A, order: str = "", *, at: int = 0, **changes: str) -> OrderProcessed:
    """Return an event of a new order unless one is named; `at` makes its events differ."""
    one = event_of(OrderKey(company, order or str(uuid4())), f"2026-05-15T09:30:05.{at:07}Z")
    return msgspec.structs.replace(one, **changes)


class TestRecording:
    def test_a_new_event_is_an_event_a_record_a_due_time_and_a_job(self, redis_url: str, lab: Lab) -> None:
        one = event()

        assert accept(redis_url, one) == Recorded(queued=1, coalesced=0, duplicates=0)
        order = OrderKey(A, one.order_id)
        (stored,) = lab.events()
        assert {"company": A, "order": one.order_id, "status": "Issued"}.items() <= stored.items()
        expected = {"generation": "1", "job": "live", "first_at": str(NOW)}
        assert expected.items() <= lab.record(order).items()
        assert lab.due() == {order: NOW + policy.GRACE}
        assert lab.jobs() == [f"ota-f-{A}-{one.order_id}-1"]
        assert lab.job(lab.jobs()[0])["origin"] == "ota-live"

    def test_ten_events_of_one_call_add_at_most_1500_bytes_each_to_the_append_only_file(self, lab: Lab) -> None:
        """At least so many share a call when 32 senders post one event at a time."""
        lab.accept()

        before = lab.redis.info("persistence")["aof_current_size"]
        lab.accept(*map(order, range(2, 12)))

        added = lab.redis.info("persistence")["aof_current_size"] - before
        assert 10_000 < added <= 10 * 1500

    def test_a_duplicate_changes_nothing_but_its_count(self, redis_url: str, lab: Lab) -> None:
        one = event(order=ORDER)
        accept(redis_url, one)
        before = lab.record(OrderKey(A, ORDER))
        del before["first_event"]  # the history has it from now on

        assert accept(redis_url, one, one, now=NOW + 1) == Recorded(queued=0, coalesced=0, duplicates=2)
        assert lab.record(OrderKey(A, ORDER)) == before | {"duplicates": "2"}
        assert (len(lab.events()), len(lab.jobs())) == (1, 1)
        assert lab.due() == {OrderKey(A, ORDER): NOW + policy.GRACE}

    def test_an_event_is_remembered_for_dedup_days(self, redis_url: str, redis_client: Redis) -> None:
        one = event(order=ORDER)
        accept(redis_url, one, dedup_days=3)

        (seen,) = redis_client.keys("ota:seen:*")
        assert 0 <= 3 * policy.DAY - int(redis_client.pttl(seen)) < 60_000
        redis_client.delete(seen)  # as its expiry does
        assert accept(redis_url, one).duplicates == 0

    def test_events_of_a_waiting_order_share_its_job_and_raise_its_generation(self, redis_url: str, lab: Lab) -> None:
        first = accept(redis_url, event(order=ORDER, at=1))
        second = accept(redis_url, event(order=ORDER, at=2), event(order=ORDER, at=3), now=NOW + 5)

        assert (first, second) == (Recorded(1, 0, 0), Recorded(0, 2, 0))
        assert lab.record(OrderKey(A, ORDER))["generation"] == "3"
        assert (len(lab.events()), len(lab.jobs())) == (3, 1)
        assert lab.due() == {OrderKey(A, ORDER): NOW + policy.GRACE}


class TestGroups:
    @pytest.mark.parametrize(
        "sizes",
        [
            pytest.param([1] * 50, id="two halves and a rest"),
            pytest.param([100] * 6, id="a group ends before it is too large, since Redis serves others in between"),
            pytest.param([1, GROUP * 4, 1], id="a POST is not split, or half of it could be recorded"),
        ],
    )
    def test_posts_that_arrive_together_share_three_calls(self, redis_url: str, lab: Lab, sizes: list[int]) -> None:
        posts = [[event() for _ in range(size)] for size in sizes]

        receipts = grouped(redis_url, lab, posts, expected_calls=3)

        assert receipts == [Recorded(size, 0, 0) for size in sizes]
        assert len(lab.events()) == sum(sizes)

    def test_each_post_of_a_group_gets_its_own_answer(self, redis_url: str, lab: Lab) -> None:
        one, other = event(order=ORDER), event()
        posts = [[one, other], [one], [event(order=ORDER, at=1)], [other, event(), other]]

        receipts = grouped(redis_url, lab, posts, expected_calls=1)

        assert receipts == [Recorded(2, 0, 0), Recorded(0, 0, 1), Recorded(0, 1, 0), Recorded(1, 0, 2)]

    def test_a_slow_store_fails_the_callers_of_one_group_and_the_next_have_their_turn(self) -> None:
        async def slow(events: list[OrderProcessed]) -> list[int]:
            if events[0].status == "hangs":
                await asyncio.get_running_loop().create_future()
            return [0 for _ in events]

        async def work() -> list[object]:
            group = GroupCommit(slow, calls=1)
            async with asyncio.timeout(10):
                posts = ((event(status="hangs"), 0.1), (event(), 60))
                together = [asyncio.create_task(group.put([one], seconds)) for one, seconds in posts]
                for _ in range(3):
                    await asyncio.sleep(0)  # their group is under way, and the next caller waits
                found = await asyncio.gather(*together, group.put([event()], 60), return_exceptions=True)
                return [one if isinstance(one, list) else type(one) for one in found]

        assert asyncio.run(work()) == [TimeoutError, TimeoutError, [0]]

    def test_a_cancelled_sender_takes_no_answer_from_the_others(self, redis_url: str) -> None:
        async def work() -> list[Recorded]:
            async with inbox(redis_url) as box:
                cancelled, stays = (asyncio.create_task(box.accept([event()])) for _ in range(2))
                await asyncio.sleep(0)
                cancelled.cancel()
                return [await stays, await box.accept([event()])]

        assert asyncio.run(work()) == [Recorded(1, 0, 0)] * 2


class TestStaleConnections:
    """After a quiet hour the first POST must be accepted, whatever became of the connection that was kept."""

    @pytest.mark.parametrize(
        ("how", "times"), [("forgotten by the network", 1), ("closed by the server", 20), ("to a former primary", 20)]
    )
    def test_the_first_post_on_a_stale_connection_is_accepted(self, own_valkey: Valkey, how: str, times: int) -> None:
        """Each time two calls find theirs stale at once: the second try of one must not take that of the other."""

        async def work(network: Relay, client: Redis) -> list[Recorded]:
            found: list[Recorded] = []
            async with inbox(network.url(own_valkey.url), within=60) as box:
                for _ in range(times):
                    found += await asyncio.gather(*(box.accept([event() for _ in range(200)]) for _ in range(2)))
                    if how == "forgotten by the network":
                        network.forget()
                    elif how == "closed by the server":
                        client.client_kill_filter(_type="normal", skipme=True)
                    else:
                        network.forget(answer=b"-READONLY You can't write against a read only replica.\r\n")
                    found += await asyncio.gather(*(box.accept([event() for _ in range(200)]) for _ in range(2)))
            return found

        with relay(own_valkey.port) as network, Redis.from_url(own_valkey.url) as client:
            assert asyncio.run(work(network, client)) == [Recorded(200, 0, 0)] * 4 * times


class TestRedisUnavailable:
    @pytest.mark.parametrize("how", ["killed", "frozen", "full", "read-only"])
    def test_every_waiting_post_fails(self, own_valkey: Valkey, how: str) -> None:
        with Redis.from_url(own_valkey.url) as client:
            faults: dict[str, Callable[[], object]] = {
                "killed": own_valkey.kill,
                "frozen": own_valkey.pause,
                "full": lambda: client.config_set("maxmemory", 1),
                "read-only": lambda: client.replicaof("127.0.0.1", 1),
            }
            faults[how]()

        async def work() -> list[object]:
            async with inbox(own_valkey.url) as box:
                posts = [box.accept([event() for _ in range(200)]) for _ in range(2)]
                return await asyncio.wait_for(asyncio.gather(*posts, return_exceptions=True), 5)

        errors = asyncio.run(work())

        assert [type(error) for error in errors] == [NotRecorded] * 2
        assert {error.reason for error in errors if isinstance(error, NotRecorded)} == {"redis_unavailable"}
        assert all(own_valkey.url not in str(error) for error in errors)


def grouped(url: str, lab: Lab, posts: list[list[OrderProcessed]], *, expected_calls: int) -> list[Recorded]:
    """Record the POSTs together, once the server has the script."""
    receipts: list[Recorded] = []

    async def together(accept: Callable[[list[OrderProcessed]], Awaitable[Recorded]]) -> None:
        receipts.extend(await asyncio.gather(*(accept(post) for post in posts)))

    async def work() -> None:
        async with inbox(url) as box:
            await together(box.accept)

    accept(url, event(B, timestamp="warm"))
    lab.redis.flushall()  # its scripts stay loaded
    lab.redis.config_resetstat()
    asyncio.run(work())
    assert lab.redis.info("commandstats")["cmdstat_evalsha"]["calls"] == expected_calls
    return receipts


class TestBrokenKeys:
    """Another program wrote something else under our keys."""

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_broken_record_fails_only_one_post(self, redis_url: str, lab: Lab, place: int) -> None:
        """All in one script call: the others are recorded and queued, and a repeat of the refused one is recorded."""
        bad, *good = (event() for _ in range(3))
        posts = [*good[:place], bad, *good[place:]]
        lab.redis.set(KEYS.record(OrderKey(A, bad.order_id)), "of another program")

        async def work() -> list[object]:
            async with inbox(redis_url) as box:
                calls = [asyncio.create_task(box.accept([one])) for one in posts]
                return await asyncio.gather(*calls, return_exceptions=True)

        answers = asyncio.run(work())

        refused = answers.pop(place)
        assert isinstance(refused, NotRecorded)
        assert refused.reason == "record_refused"
        assert answers == [Recorded(1, 0, 0)] * 2
        assert {OrderKey(A, one.order_id) for one in good} <= set(lab.due())
        assert {f"ota-f-{A}-{one.order_id}-1" for one in good} <= set(lab.jobs())
        lab.redis.delete(KEYS.record(OrderKey(A, bad.order_id)))
        again = accept(redis_url, good[0], bad)
        assert (again.queued + again.coalesced, again.duplicates) == (1, 1)
        assert OrderKey(A, bad.order_id) in lab.due()

    @pytest.mark.parametrize("key", [KEYS.history(OrderKey(A, ORDER)), KEYS.counters, KEYS.event_rate(A)])
    def test_a_broken_history_fails_no_event(self, redis_url: str, lab: Lab, key: str) -> None:
        lab.redis.set(key, "of another program")

        assert accept(redis_url, event(order=ORDER)) == Recorded(1, 0, 0)

        assert (lab.jobs(), set(lab.due())) == ([f"ota-f-{A}-{ORDER}-1"], {OrderKey(A, ORDER)})
