"""`orders confirm` and `orders cancel`: a change upstream of which no event tells, so its fetch is owed here."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis

from app.dev.sandbox.process import Sandbox, start
from app.dev.sandbox.submission import order_body
from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger.history import FetchRequested
from app.ledger.keys import AUDIT
from app.ledger.orders import Archive
from tests.eventually import eventually
from tests.integration.desk import API_KEY, PARTNER, VENUE, Desk, open_desk

REFERENCE = "canary-pay-4711"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start(seed=5, options=("--settle-after", "0")) as running:
        company = {"id": VENUE, "name": "Venue", "tenant": "tenant", "environment": "Sandbox", "api_keys": [API_KEY]}
        running.admin("POST", "companies", company)
        yield running


@pytest.fixture
def desk(sandbox: Sandbox, redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    sandbox.admin("DELETE", "faults")
    return open_desk(redis_client, redis_url, tmp_path, sandbox.url)


def base(sandbox: Sandbox) -> str:
    return f"{sandbox.base_url('tenant', 'Sandbox', 'Venue')}/channelManager"


def draft(sandbox: Sandbox, desk: Desk, reference: str) -> OrderKey:
    """Create an order that is not paid, and let it come home as a Draft."""
    answer = sandbox.client.post(
        f"{base(sandbox)}?sync=1", json=order_body(PARTNER, reference), headers={"x-np-api-key": API_KEY}
    )
    answer.raise_for_status()
    assert answer.json()["status"] == "Draft"
    order = OrderKey(VENUE, answer.json()["orderId"])
    desk.hear(order, status="Draft")
    desk.bring_home(order, "order-draft")
    desk.forget_jobs()
    return order


def status(sandbox: Sandbox, order: OrderKey) -> str:
    answer = sandbox.client.get(f"{base(sandbox)}/{order.order_id}", headers={"x-np-api-key": API_KEY})
    return str(answer.json().get("status", answer.status_code))


def whys(desk: Desk, order: OrderKey) -> list[str]:
    return [entry.reason for entry in Archive(desk.redis).history(order) if isinstance(entry, FetchRequested)]


def test_a_draft_is_confirmed_and_its_fetch_is_queued_among_the_live_ones(desk: Desk, sandbox: Sandbox) -> None:
    order = draft(sandbox, desk, "CONFIRM-1")

    ended = desk.run("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes", "--json")

    told = {"company": "venue", "order_id": order.order_id, "status": "Issued", "queued": True}
    assert (ended.code, ended.objects) == (0, [told])
    assert REFERENCE not in ended.out + ended.err
    assert status(sandbox, order) == "Issued"
    assert (desk.waiting("live"), whys(desk, order)) == ([order.order_id], ["confirm"])
    again = desk.run("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes")
    assert again.code == 0


def test_a_cancelled_draft_vanishes_upstream_and_its_fetch_is_queued(desk: Desk, sandbox: Sandbox) -> None:
    order = draft(sandbox, desk, "CANCEL-1")

    ended = desk.run("orders", "cancel", order.order_id, "--yes")

    assert (ended.code, "upstream answered Cancelled" in ended.out) == (0, True)
    assert status(sandbox, order) == "404"
    assert (desk.waiting("live"), whys(desk, order)) == ([order.order_id], ["cancel"])


def test_without_anybody_to_ask_nothing_is_changed(desk: Desk, sandbox: Sandbox) -> None:
    order = draft(sandbox, desk, "ASKED-1")

    ended = desk.run("orders", "cancel", order.order_id)
    wordless = desk.run("orders", "confirm", order.order_id, "--payment-reference", " ", "--yes")

    assert (ended.code, "--yes" in ended.err, wordless.code) == (2, True, 2)
    assert (status(sandbox, order), whys(desk, order), desk.waiting("live")) == ("Draft", [], [])


def test_what_upstream_refuses_is_told_and_the_order_is_fetched_anew(desk: Desk, sandbox: Sandbox) -> None:
    """Our copy may be old: here it was cancelled upstream in the meantime."""
    order = draft(sandbox, desk, "REFUSED-1")
    confirm = ("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes")
    sandbox.admin("POST", "faults", {"kind": "status", "status": 400, "code": "generic_error", "calls": 1})

    refused = desk.run(*confirm)
    sandbox.client.delete(f"{base(sandbox)}/{order.order_id}", headers={"x-np-api-key": API_KEY})
    absent = desk.run(*confirm)

    assert (refused.code, "only a Draft order can be confirmed" in refused.err) == (1, True)
    assert (absent.code, "HTTP 404" in absent.err) == (1, True)
    assert whys(desk, order) == ["confirm-refused", "confirm-refused"]


def test_a_key_that_is_not_accepted_changes_nothing_here_either(desk: Desk, sandbox: Sandbox) -> None:
    order = draft(sandbox, desk, "KEY-1")
    sandbox.admin("POST", "faults", {"kind": "status", "status": 401})

    ended = desk.run("orders", "cancel", order.order_id, "--yes")

    assert (ended.code, "NP_API_KEY" in ended.err, "Nothing was changed" in ended.err) == (3, True, True)
    assert (whys(desk, order), desk.waiting("live")) == ([], [])


def test_an_answer_that_never_comes_is_told_as_uncertain_and_the_order_is_fetched(desk: Desk, sandbox: Sandbox) -> None:
    """Upstream has done it, and the connection broke: only a fetch can tell."""
    order = draft(sandbox, desk, "CUT-1")
    sandbox.admin("POST", "faults", {"kind": "cut", "operation": "confirmOrder"})

    ended = desk.run("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes")

    assert (ended.code, "may have been done upstream" in ended.err) == (3, True)
    assert (desk.waiting("live"), whys(desk, order)) == ([order.order_id], ["confirm-unsure"])


def test_redis_that_takes_no_writes_is_told_before_anything_is_changed_upstream(
    sandbox: Sandbox, own_valkey: Valkey, tmp_path: Path
) -> None:
    """Nobody could be told of it in the audit, nor could its fetch be owed."""
    sandbox.admin("DELETE", "faults")
    with Redis.from_url(own_valkey.url) as redis:
        desk = open_desk(redis, own_valkey.url, tmp_path, sandbox.url)
        order = draft(sandbox, desk, "REDIS-0")
        # From here on it refuses to write: as full, or as a replica after a failover.
        redis.config_set("min-replicas-to-write", 1)

        ended = desk.run("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes")

    assert (ended.code, status(sandbox, order)) == (3, "Draft")
    assert "upstream" not in ended.err


def test_redis_that_dies_during_the_call_is_told_with_what_was_done(
    sandbox: Sandbox, own_valkey: Valkey, tmp_path: Path
) -> None:
    """The change stands upstream: whoever typed the command must know, and how to bring it home."""
    sandbox.admin("DELETE", "faults")
    sandbox.admin("POST", "faults", {"kind": "latency", "operation": "confirmOrder", "seconds": 1})
    with Redis.from_url(own_valkey.url) as redis, ThreadPoolExecutor(1) as thread:
        desk = open_desk(redis, own_valkey.url, tmp_path, sandbox.url)
        order = draft(sandbox, desk, "REDIS-1")

        running = thread.submit(
            desk.run, "orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes"
        )
        eventually(lambda: redis.xlen(AUDIT) == 1, what="the deed in the audit")
        redis.config_set("min-replicas-to-write", 1)
        ended = running.result()

    assert (ended.code, status(sandbox, order)) == (3, "Issued")
    assert "It was done upstream" in ended.err
    assert f"orders refetch {order.order_id}" in ended.err


def test_ctrl_c_while_upstream_is_asked_owes_the_fetch_that_shows_what_became_of_it(
    desk: Desk, sandbox: Sandbox
) -> None:
    """The call may have arrived: nobody shall read Draft for ever."""
    order = draft(sandbox, desk, "CTRL-C-1")
    sandbox.admin("POST", "faults", {"kind": "latency", "operation": "confirmOrder", "seconds": 5})
    words = ("orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes")
    with subprocess.Popen([sys.executable, "-m", "app.cli", *words], env=desk.env, stderr=subprocess.PIPE) as running:
        eventually(lambda: desk.redis.xlen(AUDIT) == 1, what="the deed in the audit")
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=20)

    assert running.returncode == 130
    assert b"Interrupted" in told
    assert b"Traceback" not in told
    assert (desk.waiting("live"), whys(desk, order)) == ([order.order_id], ["confirm-unsure"])
