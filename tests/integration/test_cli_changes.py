"""Changes by hand: `orders confirm` and `cancel` change upstream and request the fetch; `audit` shows who did what."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.audit import AuditEntry, append
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.submission import order_body
from app.dev.valkey import Valkey
from app.ids import OrderKey
from app.ledger.history import FetchRequested
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import API_KEY, KEYS, ONE, PARTNER, VENUE, Lab, order

REFERENCE = "canary-pay-4711"


def base(sandbox: Sandbox) -> str:
    return f"{sandbox.base_url('tenant', 'Sandbox', 'Venue')}/channelManager"


@pytest.fixture
def lab(connected: Lab) -> Lab:
    return connected


def draft(sandbox: Sandbox, lab: Lab, reference: str) -> OrderKey:
    """Create an unpaid order, and fetch it as a Draft."""
    body, headers = order_body(PARTNER, reference), {"x-np-api-key": API_KEY}
    answer = sandbox.client.post(f"{base(sandbox)}?sync=1", json=body, headers=headers).raise_for_status().json()
    assert answer["status"] == "Draft"
    order = OrderKey(VENUE, answer["orderId"])
    lab.accept(order, status="Draft")
    lab.fetch_and_store(order, "order-draft")
    lab.clear_queues()
    return order


def confirm(order: OrderKey) -> tuple[str, ...]:
    return "orders", "confirm", order.order_id, "--payment-reference", REFERENCE, "--yes"


def status(sandbox: Sandbox, order: OrderKey) -> str:
    answer = sandbox.client.get(f"{base(sandbox)}/{order.order_id}", headers={"x-np-api-key": API_KEY})
    return str(answer.json().get("status", answer.status_code))


def reasons(lab: Lab, order: OrderKey) -> list[str]:
    return [entry.reason for entry in lab.history(order) if isinstance(entry, FetchRequested)]


def test_a_draft_is_confirmed_and_its_fetch_is_in_the_live_queue(lab: Lab, sandbox: Sandbox) -> None:
    order = draft(sandbox, lab, "CONFIRM-1")

    ended = lab.run_command(*confirm(order), "--json")

    changed = {"company": "venue", "order_id": order.order_id, "status": "Issued", "queued": True}
    assert (ended.code, ended.objects) == (0, [changed])
    assert REFERENCE not in ended.out + ended.err
    assert status(sandbox, order) == "Issued"
    assert (lab.queued("live"), reasons(lab, order)) == ([order.order_id], ["confirm"])
    assert lab.run_command(*confirm(order)).code == 0


def test_a_cancelled_draft_is_deleted_upstream_and_its_fetch_is_queued(lab: Lab, sandbox: Sandbox) -> None:
    order = draft(sandbox, lab, "CANCEL-1")

    ended = lab.run_command("orders", "cancel", order.order_id, "--yes")

    assert (ended.code, "upstream answered Cancelled" in ended.out) == (0, True)
    assert status(sandbox, order) == "404"
    assert (lab.queued("live"), reasons(lab, order)) == ([order.order_id], ["cancel"])


def test_without_a_terminal_or_yes_nothing_is_changed(lab: Lab, sandbox: Sandbox) -> None:
    order = draft(sandbox, lab, "ASKED-1")

    ended = lab.run_command("orders", "cancel", order.order_id)
    wordless = lab.run_command("orders", "confirm", order.order_id, "--payment-reference", " ", "--yes")

    assert (ended.code, "--yes" in ended.err, wordless.code) == (2, True, 2)
    assert (status(sandbox, order), reasons(lab, order), lab.queued("live")) == ("Draft", [], [])


def test_a_refused_change_is_reported_and_the_order_is_fetched_again(lab: Lab, sandbox: Sandbox) -> None:
    """The copy here may be old: the order was cancelled upstream meanwhile."""
    order = draft(sandbox, lab, "REFUSED-1")
    sandbox.admin("POST", "faults", {"kind": "status", "status": 400, "code": "generic_error", "calls": 1})

    refused = lab.run_command(*confirm(order))
    sandbox.client.delete(f"{base(sandbox)}/{order.order_id}", headers={"x-np-api-key": API_KEY})
    absent = lab.run_command(*confirm(order))

    assert (refused.code, "only a Draft order can be confirmed" in refused.err) == (1, True)
    assert (absent.code, "HTTP 404" in absent.err) == (1, True)
    assert reasons(lab, order) == ["confirm-refused", "confirm-refused"]


def test_with_a_refused_api_key_nothing_is_changed_or_fetched(lab: Lab, sandbox: Sandbox) -> None:
    order = draft(sandbox, lab, "KEY-1")
    sandbox.admin("POST", "faults", {"kind": "status", "status": 401})

    ended = lab.run_command("orders", "cancel", order.order_id, "--yes")

    assert (ended.code, "NP_API_KEY" in ended.err, "Nothing was changed" in ended.err) == (6, True, True)
    assert (reasons(lab, order), lab.queued("live")) == ([], [])


def test_after_a_lost_answer_the_change_is_uncertain_and_the_order_is_fetched(lab: Lab, sandbox: Sandbox) -> None:
    """Upstream made the change, and the connection broke: only a fetch can show it."""
    order = draft(sandbox, lab, "CUT-1")
    sandbox.admin("POST", "faults", {"kind": "cut", "operation": "confirmOrder"})

    ended = lab.run_command(*confirm(order))

    assert (ended.code, "may have been done upstream" in ended.err) == (6, True)
    assert (lab.queued("live"), reasons(lab, order)) == ([order.order_id], ["confirm-unsure"])


@pytest.fixture
def own_redis(lab: Lab, own_valkey: Valkey) -> Iterator[Lab]:
    """A connected lab whose Redis a test may stop from taking writes, as a full one or a replica."""
    with Redis.from_url(own_valkey.url) as redis:
        yield Lab(redis, own_valkey.url, lab.folder, lab.base_url)


def test_a_redis_without_writes_stops_the_command_before_the_change_upstream(own_redis: Lab, sandbox: Sandbox) -> None:
    """Neither the audit entry nor the fetch could be written."""
    order = draft(sandbox, own_redis, "REDIS-0")
    own_redis.redis.config_set("min-replicas-to-write", 1)

    ended = own_redis.run_command(*confirm(order))

    assert (ended.code, status(sandbox, order), "upstream" in ended.err) == (3, "Draft", False)


def test_when_redis_fails_during_the_call_the_message_says_what_was_done(own_redis: Lab, sandbox: Sandbox) -> None:
    """The change is made upstream: the message says so, and how to fetch the order."""
    sandbox.admin("POST", "faults", {"kind": "latency", "operation": "confirmOrder", "seconds": 1})
    order = draft(sandbox, own_redis, "REDIS-1")
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(own_redis.run_command, *confirm(order))
        eventually(lambda: own_redis.redis.xlen(KEYS.audit) == 1, what="the entry in the audit")
        own_redis.redis.config_set("min-replicas-to-write", 1)
        ended = running.result()

    assert (ended.code, status(sandbox, order)) == (3, "Issued")
    assert "It was done upstream" in ended.err
    assert f"orders refetch {order.order_id}" in ended.err


def test_ctrl_c_during_the_call_queues_a_fetch(lab: Lab, sandbox: Sandbox) -> None:
    """The call may have arrived: without a fetch the copy here would stay a Draft."""
    order = draft(sandbox, lab, "CTRL-C-1")
    sandbox.admin("POST", "faults", {"kind": "latency", "operation": "confirmOrder", "seconds": 5})
    command = [sys.executable, "-m", "app.cli", *confirm(order)]
    with subprocess.Popen(command, env=lab.env, stderr=subprocess.PIPE) as running:
        eventually(lambda: sandbox.admin("GET", "stats")["active"] == 1, what="the call")
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)

    assert running.returncode == 130
    assert b"Interrupted" in err
    assert b"Traceback" not in err
    assert (lab.queued("live"), reasons(lab, order)) == ([order.order_id], ["confirm-unsure"])


def test_each_change_by_hand_is_noted_with_its_author_and_selection(lab: Lab) -> None:
    lab.env["USER"] = "ann"
    dead = [order(number) for number in range(4)]
    lab.accept(*dead)
    for one in dead:
        lab.dead_letter(one)
    expected = lab.folder / "expected.csv"
    expected.write_text(f"orderId\n{order(9).order_id}\n")

    ended = lab.run_commands(
        [
            ("dead", "requeue", dead[0].order_id, "--yes"),
            ("dead", "drop", dead[1].order_id, dead[2].order_id, "--yes"),
            ("dead", "requeue", "--reason", "order_missing", "--company", "venue", "--yes"),
            ("orders", "refetch", dead[1].order_id, "--who", "ann@host", "--why", "ticket 77"),
            ("reconcile", "--from-file", str(expected), "--company", "venue", "--apply", "--yes"),
            ("orders", "confirm", dead[1].order_id, "--payment-reference", "canary-pay", "--yes"),
            ("audit", "--json"),
            ("audit", "--what", "requeue", "--limit", "1"),
            ("audit", "--what", "erase"),
        ]
    )

    noted = [(one["what"], one["selected"].partition(" until=")[0], one["orders"]) for one in ended[-3].objects]
    assert noted == [
        ("order-confirm", dead[1].member, 1),
        ("reconcile", order(9).member, 1),
        ("refetch", dead[1].member, 1),
        ("requeue", f"company={VENUE} reason=order_missing", 1),
        ("drop", "2 orders", 2),
        ("requeue", dead[0].member, 1),
    ]
    assert [one["why"] for one in ended[-3].objects if one["what"] == "refetch"] == ["ticket 77"]
    assert {one["who"].partition("@")[0] for one in ended[-3].objects} == {"ann"}
    assert "canary-pay" not in ended[-3].out
    assert (ended[-2].code, ended[-2].out.count("order_missing"), ended[-2].out.count("ann@")) == (0, 1, 1)
    assert (ended[-1].code, ended[-1].err) == (0, "The audit has no such entry.\n")


def test_dry_runs_and_refused_changes_are_not_noted(lab: Lab) -> None:
    lab.accept(order(1))
    lab.dead_letter(order(1))

    ended = lab.run_commands(
        [
            ("dead", "requeue", "--all", "--dry-run"),
            ("dead", "drop", "--all"),
            ("orders", "refetch", order(2).order_id),
            ("orders", "cancel", order(1).order_id),
        ]
    )

    assert [one.code for one in ended] == [0, 2, 1, 2]
    assert lab.redis.exists(KEYS.audit) == 0


@pytest.mark.parametrize(
    ("selected", "shown"),
    [
        (ONE.member, f"{ONE.order_id} of venue"),
        (f"{ONE.member} to shop", f"{ONE.order_id} of venue to shop"),
        ("status=Issued", "status=Issued"),
    ],
)
def test_the_audit_names_the_order_of_an_action_and_its_company(lab: Lab, selected: str, shown: str) -> None:
    append(lab.redis, KEYS, AuditEntry(what="requeue", who="ann", why="", selected=selected, orders=1))

    assert shown in " ".join(lab.run_command("audit").out.split())


def test_of_an_erased_order_the_audit_keeps_only_the_erasure(lab: Lab) -> None:
    lab.accept(order(1))

    lab.run_commands([("orders", "refetch", order(1).order_id), ("orders", "erase", order(1).order_id, "--yes")])

    assert [one["what"] for one in lab.run_command("audit", "--json").objects] == ["erase"]
