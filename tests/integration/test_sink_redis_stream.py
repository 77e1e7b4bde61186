"""The sink redis-stream on a real Valkey: what its readers get, and what a server that cannot take entries does."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr
from rq.timeouts import JobTimeoutException

from app.dev.valkey import Valkey, start
from app.ledger.redis import Redis
from app.sink_settings import RedisStreamSink
from tests.integration.relay import relay
from tests.samples import document, example_of
from workers.sinks import Context, redis_stream
from workers.sinks.build import build
from workers.sinks.contract import Failed, Sink, Unavailable

DOCUMENT = document("order-issued")
UNUSED = cast("Context", None)


def sink_of(url: str, **more: Any) -> Sink:
    return build([RedisStreamSink(name="stream", url=SecretStr(url), **more)])["stream"]


@pytest.fixture
def client(own_valkey: Valkey) -> Any:
    with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
        yield client


def test_an_entry_has_the_document_and_the_fields_that_a_reader_chooses_by(redis_client: Redis, redis_url: str) -> None:
    sink_of(redis_url).deliver(DOCUMENT, UNUSED)

    ((_, entry),) = cast("Any", redis_client.xrange("ota-orders"))
    assert json.loads(entry.pop(b"document")) == json.loads(DOCUMENT.encode())
    assert entry == {
        b"id": DOCUMENT.idempotency_key.encode(),
        b"company": b"museum",
        b"company_id": DOCUMENT.company_id.encode(),
        b"order_id": DOCUMENT.order_id.encode(),
        b"revision": b"1",
        b"digest": DOCUMENT.digest.encode(),
        b"fetched_at": b"1780000000000",
        b"status": b"Issued",
    }


def test_the_reader_of_the_page_handles_a_repeat_once_also_after_its_own_death(
    redis_client: Redis, redis_url: str
) -> None:
    """docs/sinks.md has the reader; a repeat is a second entry with the same id."""
    read = example_of("redis-stream")["read"]
    handled: list[str] = []

    def handle(document: Any) -> None:
        handled.append(document["idempotencyKey"])
        if len(handled) == 1:
            raise RuntimeError

    other = document("order-draft", idempotency_key="other")
    sink = sink_of(redis_url)
    for one in (DOCUMENT, other, DOCUMENT):
        sink.deliver(one, UNUSED)
    with pytest.raises(RuntimeError):
        read(redis_client, handle)
    for _ in range(2):
        read(redis_client, handle)

    assert redis_client.xlen("ota-orders") == 3
    assert handled == [DOCUMENT.idempotency_key, DOCUMENT.idempotency_key, "other"]
    assert cast("Any", redis_client.xpending("ota-orders", "shop"))["pending"] == 0


def test_a_stream_stays_about_as_long_as_it_may_be_and_keeps_the_newest(redis_client: Redis, redis_url: str) -> None:
    sink = sink_of(redis_url, max_length=50)
    for number in range(400):
        sink.deliver(document("order-draft", revision=number), UNUSED)

    assert 50 <= redis_client.xlen("ota-orders") <= 150
    ((_, newest),) = cast("Any", redis_client.xrevrange("ota-orders", count=1))
    assert newest[b"revision"] == b"399"


def test_a_server_that_goes_away_and_comes_back_costs_only_the_deliveries_in_between(own_valkey: Valkey) -> None:
    sink = sink_of(own_valkey.url)
    sink.deliver(DOCUMENT, UNUSED)

    own_valkey.stop()
    for _ in range(2):
        with pytest.raises(Unavailable, match="Redis ConnectionError"):
            sink.deliver(DOCUMENT, UNUSED)
    own_valkey.restart()
    sink.deliver(DOCUMENT, UNUSED)
    own_valkey.restart()
    sink.deliver(DOCUMENT, UNUSED)  # an old connection that the server closed costs no attempt

    with Redis.from_url(own_valkey.url, socket_timeout=5) as client:
        assert client.xlen("ota-orders") == 3


def test_a_server_that_hangs_costs_one_time_limit(own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_stream, "TIMEOUT", 0.2)
    sink = sink_of(own_valkey.url)
    sink.deliver(DOCUMENT, UNUSED)

    own_valkey.pause()
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable, match="Redis TimeoutError"):
            sink.deliver(DOCUMENT, UNUSED)
    finally:
        own_valkey.resume()
    assert time.monotonic() - began < 2
    sink.deliver(DOCUMENT, UNUSED)


def test_after_a_time_limit_the_late_answer_is_not_taken_for_that_to_the_next_entry(
    own_valkey: Valkey, client: Any
) -> None:
    def on_signal(*_: object) -> None:
        raise JobTimeoutException

    sink = sink_of(own_valkey.url)
    sink.deliver(DOCUMENT, UNUSED)
    before = signal.signal(signal.SIGALRM, on_signal)
    own_valkey.pause()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(JobTimeoutException):
            sink.deliver(DOCUMENT, UNUSED)
    finally:
        signal.signal(signal.SIGALRM, before)
        own_valkey.resume()
    _fill(client)

    with pytest.raises(Unavailable, match="Redis OOM"):
        sink.deliver(DOCUMENT, UNUSED)


def test_after_a_failover_the_next_delivery_reaches_the_new_server(
    own_valkey: Valkey, tmp_path: Path, free_port: int
) -> None:
    """The old one, a replica now, keeps its connections open."""
    last_url = own_valkey.url.replace(f":{own_valkey.port}/", f":{free_port}/")  # the same password
    with (
        start(tmp_path / "second", last_url) as second,
        relay(own_valkey.port) as address,
        Redis.from_url(own_valkey.url, socket_timeout=5) as client,
        Redis.from_url(second.url, socket_timeout=5) as new,
    ):
        sink = sink_of(address.url(own_valkey.url))
        sink.deliver(DOCUMENT, UNUSED)
        address.target = second.port
        client.replicaof("127.0.0.1", str(second.port))

        with pytest.raises(Unavailable, match="Redis READONLY"):
            sink.deliver(DOCUMENT, UNUSED)
        sink.deliver(DOCUMENT, UNUSED)

        assert new.xlen("ota-orders") == 1


def _fill(client: Any) -> None:
    client.config_set("maxmemory", 1)


def _forbid(client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "default", "-xadd")


def _lock_out(client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "default", "resetpass", ">other")


def _want_replicas(client: Any) -> None:
    client.config_set("min-replicas-to-write", 1)


def _take_the_key(client: Any) -> None:
    client.set("ota-orders", "canary")


@pytest.mark.parametrize(
    ("refuse", "kind", "reason"),
    [
        (_fill, Unavailable, "Redis OOM"),
        (_want_replicas, Unavailable, "Redis NOREPLICAS"),
        (_forbid, Unavailable, "Redis NOPERM xadd"),
        (_lock_out, Unavailable, "Redis WRONGPASS"),
        (_take_the_key, Failed, "Redis WRONGTYPE"),
    ],
)
def test_what_concerns_all_orders_is_unavailable_and_the_reason_is_a_code(
    own_valkey: Valkey, client: Any, refuse: Callable[[Any], None], kind: type[Failed], reason: str
) -> None:
    client.ping()
    refuse(client)

    with pytest.raises(Failed) as refused:
        sink_of(own_valkey.url).deliver(DOCUMENT, UNUSED)

    assert (type(refused.value), refused.value.reason) == (kind, reason)


def test_a_user_with_one_command_and_one_key_suffices(own_valkey: Valkey, client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "writer", "on", ">word", "~ota-orders", "-@all", "+xadd")

    sink_of(f"redis://writer:word@127.0.0.1:{own_valkey.port}/0").deliver(DOCUMENT, UNUSED)

    assert client.xlen("ota-orders") == 1


def test_a_server_with_room_again_takes_entries_again(own_valkey: Valkey, client: Any) -> None:
    sink = sink_of(own_valkey.url)
    _fill(client)
    with pytest.raises(Unavailable):
        sink.deliver(DOCUMENT, UNUSED)

    client.config_set("maxmemory", 0)
    sink.deliver(DOCUMENT, UNUSED)

    assert client.xlen("ota-orders") == 1
