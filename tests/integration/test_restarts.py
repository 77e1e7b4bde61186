"""Redis comes back with less than it had, or without what it had: restored, flushed, its queues lost, or killed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from redis import Redis

from app.dev.valkey import Valkey
from app.ledger import keys, policy
from tests.eventually import eventually
from tests.lab import DUPLICATE, ONE, QUEUED, SAME_ID, START, Lab
from tests.service import HOOK, item, serving, settings_of_one_company

GRACE = policy.GRACE / 1000
SENT, SENT_LATER = "2026-11-22T10:00:00Z", "2026-11-22T11:00:00Z"


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


class TestAnOlderCopyIsRestored:
    """The folder of Redis is copied, the service works on, and the copy is put back."""

    @pytest.fixture
    def shop(self, own_valkey: Valkey) -> Iterator[Lab]:
        with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
            yield Lab(client, sinks=("shop",), now=START)

    @pytest.fixture
    def copy(self, own_valkey: Valkey, tmp_path: Path) -> Copy:
        return Copy(own_valkey, tmp_path / "copy")

    def test_events_since_the_copy_are_accepted_again_older_ones_are_duplicates(self, shop: Lab, copy: Copy) -> None:
        """Without its event an order is missing until a request, such as that of reconcile."""
        shop.accept(ONE, timestamp=SENT)
        copy.take()
        shop.accept(SAME_ID, timestamp=SENT_LATER)
        copy.put_back()

        assert shop.try_start(SAME_ID) == "nothing"
        assert (shop.accept(ONE, timestamp=SENT), shop.accept(SAME_ID, timestamp=SENT_LATER)) == (DUPLICATE, QUEUED)
        assert shop.try_start(SAME_ID) == "fetch"

    def test_an_order_fetched_since_the_copy_is_pending_and_fetched_again(self, shop: Lab, copy: Copy) -> None:
        shop.accept()
        copy.take()
        assert shop.fetch_and_store() == "deliver"
        copy.put_back()

        shop.later(GRACE)
        assert shop.dispatch() == 1
        assert shop.fetch_and_store(worker="after") == "deliver"

    def test_a_running_fetch_counts_for_no_settlement_of_the_restored_ledger(self, shop: Lab, copy: Copy) -> None:
        """It saw three settlements of a ledger that is no more: the next ones must not look fetched."""
        shop.accept()
        copy.take()
        shop.accept()
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        copy.put_back()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"
        for version in range(2, 4):
            assert shop.accept_and_fetch(answer=version) == "deliver"
            assert shop.field("digest") == str(version)


class TestRedisIsFlushed:
    def test_a_running_fetch_does_not_count_as_that_of_a_new_event(self, shop: Lab) -> None:
        """It was read before the event came, and the new record never gave its fencing token."""
        for _ in range(3):
            shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        assert shop.store_fetch(fetch, 1, worker="before") == "refused"
        assert shop.redis.keys("*") == [keys.SCHEMA.encode()]
        shop.accept()

        assert shop.store_fetch(fetch, 1, worker="before") == "refused"

        assert shop.fetch_and_store(answer=2, worker="after") == "deliver"
        assert (shop.field("digest"), shop.field("fetched_generation")) == ("2", "1")

    def test_a_fetch_that_failed_for_good_makes_no_dead_letter_of_a_new_event(self, shop: Lab) -> None:
        shop.accept()
        fetch = shop.start_fetch(worker="before")
        shop.redis.flushall()
        shop.accept()

        assert shop.fail_fetch("dead", fetch=fetch, worker="before") == "refused"

        assert not shop.is_dead()
        assert shop.try_start(worker="after") == "fetch"

    def test_a_running_delivery_does_not_count_as_one_of_the_new_content(self, shop: Lab) -> None:
        for version in range(3):
            shop.accept_and_fetch(answer=version)
        delivery = shop.start_delivery(worker="before")
        assert delivery.revision == 3
        shop.redis.flushall()
        shop.accept_and_fetch(answer=9)

        shop.complete_delivery(delivery, worker="before")

        again = shop.start_delivery(worker="after")
        assert (again.revision, again.raw) == (1, b"9")


def test_nothing_that_was_answered_200_is_lost_when_redis_is_killed(own_valkey: Valkey, tmp_path: Path) -> None:
    """Four senders POST batches while Redis is killed and comes back, twice; the append-only file has all of it."""
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

    def more() -> None:
        """Wait until the web process, which runs all the time, has acknowledged 100 more events."""
        before = len(acknowledged)
        eventually(lambda: len(acknowledged) > before + 100, what="events are acknowledged")

    with serving(tmp_path, settings_of_one_company(own_valkey.url)) as web, ThreadPoolExecutor(4) as threads:
        senders = [threads.submit(send, web.port) for _ in range(4)]
        try:
            for _ in range(2):
                more()
                own_valkey.kill()
                own_valkey.restart()
            more()
        finally:
            stop.set()
    for sender in senders:
        sender.result()

    with Redis.from_url(own_valkey.url) as client:
        lab = Lab(client)
        recorded = {event["order"] for event in lab.events()}
        due = {order.order_id for order in lab.due()}
    assert set(acknowledged) <= recorded
    assert recorded == due
    assert statuses <= {200, 503}
