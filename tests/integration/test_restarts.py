"""Redis comes back with less than it had, or without what it had: restored, flushed, its queues lost, or killed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from redis import Redis

from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger import keys, policy
from app.ledger.rq_jobs import LIVE, queue
from tests.eventually import eventually
from tests.lab import DUPLICATE, ONE, QUEUED, SAME_ID, START, Lab, event_of
from tests.service import COMPANY, HOOK, SECRET, serving

GRACE = policy.GRACE / 1000
SENT, SENT_LATER = "2026-11-22T10:00:00Z", "2026-11-22T11:00:00Z"


class TestAnOlderCopyIsRestored:
    """The folder of Redis is copied; life goes on; the copy is put back."""

    @pytest.fixture
    def shop(self, own_valkey: Valkey) -> Iterator[Lab]:
        with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
            yield Lab(client, sinks=("shop",), now=START)

    @pytest.fixture
    def copy(self, own_valkey: Valkey, tmp_path: Path) -> Copy:
        return Copy(own_valkey, tmp_path / "copy")

    def test_events_heard_since_are_taken_again_and_older_ones_are_known(self, shop: Lab, copy: Copy) -> None:
        shop.accept(ONE, timestamp=SENT)
        copy.take()
        shop.accept(SAME_ID, timestamp=SENT_LATER)
        copy.put_back()

        assert (shop.accept(ONE, timestamp=SENT), shop.accept(SAME_ID, timestamp=SENT_LATER)) == (DUPLICATE, QUEUED)
        assert shop.try_start(SAME_ID) == "fetch"

    def test_what_came_home_since_is_owed_again_and_comes_home_by_itself(self, shop: Lab, copy: Copy) -> None:
        shop.accept()
        copy.take()
        assert shop.fetch_and_store() == "deliver"
        copy.put_back()

        shop.later(GRACE)
        assert shop.dispatch() == 1
        assert shop.fetch_and_store(worker="after") == "deliver"

    def test_an_order_heard_of_since_is_missing_until_its_event_or_somebody_asks(self, shop: Lab, copy: Copy) -> None:
        """Reconcile asks: it compares with the list of the Channel Manager."""
        copy.take()
        shop.accept()
        copy.put_back()

        shop.later(GRACE)
        assert (shop.dispatch(), shop.try_start()) == (0, "nothing")
        shop.request_fetch()
        assert shop.try_start() == "fetch"

    def test_a_fetch_under_way_counts_for_no_settlement_of_the_restored_ledger(self, shop: Lab, copy: Copy) -> None:
        """It saw three settlements of a ledger that is no more: the next three must not look done."""
        shop.accept()
        copy.take()
        shop.accept()
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        copy.put_back()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"
        for version in range(2, 4):
            shop.accept()
            assert shop.fetch_and_store(answer=version, worker=f"after-{version}") == "deliver"
            assert shop.field("digest") == str(version)


class Copy:
    """A copy of what a server has on disk."""

    def __init__(self, server: Valkey, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._data = server.data_dir / "appendonlydir"

    def take(self) -> None:
        self._server.stop()
        shutil.copytree(self._data, self._folder)
        self._server.restart()

    def put_back(self) -> None:
        self._server.stop()
        shutil.rmtree(self._data)
        shutil.copytree(self._folder, self._data)
        self._server.restart()


class TestRedisIsFlushed:
    def test_new_events_work_at_once_scripts_or_not(self, shop: Lab) -> None:
        shop.accept(timestamp=SENT)
        shop.redis.flushall()
        shop.redis.script_flush()

        assert shop.accept(timestamp=SENT) == QUEUED
        assert shop.fetch_and_store() == "deliver"

    def test_a_fetch_under_way_does_not_pass_for_that_of_a_new_event(self, shop: Lab) -> None:
        """It was read before the event came; and its fence is one that the new record never gave."""
        for _ in range(3):
            shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        shop.accept()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"

        assert shop.fetch_and_store(answer=2, worker="after") == "deliver"
        assert (shop.field("digest"), shop.field("fetched_generation")) == ("2", "1")

    def test_a_fetch_that_failed_for_good_does_not_give_up_the_order_of_a_new_event(self, shop: Lab) -> None:
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        shop.accept()

        assert shop.fail_fetch("dead", fetch=fetch, worker="before") == "refused"

        assert not shop.is_dead()
        assert shop.try_start(worker="after") == "fetch"

    def test_a_hand_on_under_way_does_not_pass_for_one_of_the_new_content(self, shop: Lab) -> None:
        for version in range(3):
            shop.accept()
            shop.fetch_and_store(answer=version, worker=f"worker-{version}")
        delivery = shop.acquire_delivery(worker="before")
        assert delivery is not None
        assert delivery.revision == 3
        shop.redis.flushall()
        shop.accept()
        shop.fetch_and_store(answer=9, worker="after")

        shop.complete_delivery(delivery, worker="before")

        again = shop.acquire_delivery(worker="after")
        assert again is not None
        assert (again.revision, again.raw) == (1, b"9")

    def test_a_fetch_under_way_leaves_nothing_behind(self, shop: Lab) -> None:
        shop.accept()
        fetch = shop.start_fetch()
        shop.redis.flushall()

        assert shop.store_fetch(fetch, 1) == "refused"
        assert shop.redis.keys("*") == [keys.SCHEMA.encode()]


def test_lost_queues_come_back_from_the_clock_within_grace(shop: Lab) -> None:
    """RQ's lists and hashes are gone: each order that is owed gets one fresh job, and only one."""
    orders = [OrderKey(COMPANY, str(uuid4())) for _ in range(600)]
    shop.accept_events(*(event_of(order, SENT) for order in orders))
    lost = shop.redis.keys("rq:*")
    assert len(lost) > 600
    shop.redis.delete(*lost)

    shop.later(GRACE)
    assert shop.dispatch() == 600
    assert shop.dispatch() == 0

    ids = queue(LIVE, shop.redis).job_ids
    assert {job[39:75] for job in ids} == {order.order_id for order in orders}
    assert all(shop.redis.exists(f"rq:job:{job}") for job in ids)


def test_nothing_that_was_answered_200_is_lost_when_redis_is_killed_under_load(
    own_valkey: Valkey, tmp_path: Path
) -> None:
    """Four senders POST batches while Redis is killed and comes back, twice; the append-only file has all of it."""
    settings = {
        "REDIS_URL": own_valkey.url,
        "CLIENT_STATE": SECRET,
        "NP_API_KEY": "key",
        "NP_TENANT": "tenant",
        "NP_ENVIRONMENT": "Production",
        "NP_COMPANY": "CRONUS",
        "NP_COMPANY_ID": COMPANY,
    }
    acknowledged: list[str] = []
    statuses: set[int] = set()
    stop = threading.Event()

    def send(port: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as http:
            while not stop.is_set():
                ids = [str(uuid4()) for _ in range(5)]
                answer = http.post(HOOK, json={"values": [item(one) for one in ids]})
                statuses.add(answer.status_code)
                if answer.status_code == 200:
                    acknowledged.extend(ids)

    with serving(tmp_path, settings) as web:
        senders = [threading.Thread(target=send, args=(web.port,)) for _ in range(4)]
        for sender in senders:
            sender.start()
        try:
            for _ in range(2):
                more(100, acknowledged)
                own_valkey.kill()
                own_valkey.restart()
            more(100, acknowledged)
        finally:
            stop.set()
            for sender in senders:
                sender.join(10)

    with Redis.from_url(own_valkey.url) as client:
        lab = Lab(client)
        recorded = {event["order"] for event in lab.events()}
        due = {order.order_id for order in lab.due()}
    assert set(acknowledged) <= recorded
    assert recorded == due
    assert statuses <= {200, 503}


def more(number: int, acknowledged: list[str]) -> None:
    """Wait until so many more events were acknowledged, by the web process that has run all the time."""
    before = len(acknowledged)
    eventually(lambda: len(acknowledged) > before + number, what="events are acknowledged")


def item(order_id: str) -> dict[str, object]:
    return {
        "clientState": SECRET,
        "companyId": COMPANY,
        "eventName": "ota_cm_order_processed",
        "payload": {"orderId": order_id, "buyFromOrderReference": "CM-1", "status": "Issued"},
        "timestamp": SENT,
    }
