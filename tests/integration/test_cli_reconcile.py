"""`reconcile`: the differences between the Channel Manager's list, or the partner's own, and the ledger."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from uuid import uuid4

import pytest

from app.dev.sandbox.process import Sandbox
from app.ids import OrderKey
from app.reconcile.state import Checkpoint
from tests.eventually import eventually
from tests.lab import API_KEY, KEYS, MUSEUM, PARTNER, VENUE, Lab, order


@pytest.fixture
def lab(connected: Lab) -> Lab:
    """A lab of two companies, of which only the venue has a partner id."""
    connected.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    return connected


def make(sandbox: Sandbox, count: int, mix: str = "Issued") -> list[str]:
    """Create orders upstream without an event. Each test also sees those of earlier tests."""
    body = {"company_id": VENUE, "partner_id": PARTNER, "count": count, "mix": {mix: 1}, "reference": uuid4().hex[:8]}
    return [one["order_id"] for one in sandbox.admin("POST", "orders", body)["orders"]]


def test_differences_are_shown_and_nothing_is_queued(lab: Lab, sandbox: Sandbox) -> None:
    """Exit code 1 is for scripts."""
    made = make(sandbox, 2)

    lines, table = lab.run_command("reconcile", "--json"), lab.run_command("reconcile")

    assert (lines.code, table.code) == (1, 1)
    found = {one["order_id"]: one for one in lines.objects}
    assert set(made) <= set(found)
    one = found[made[0]]
    assert (one["company"], one["kind"], one["status"], one["stored_status"]) == ("venue", "no_event", "Issued", "")
    assert one["reference"].startswith("CM-")
    counts = f"{len(found)} differences: {len(found)} no_event; {len(found)} orders listed. Fetch them with --apply."
    assert (made[0] in table.out, counts in table.out) == (True, True)
    assert "museum: left out, NP_PARTNER_ID is not set." in table.err
    assert lab.queued("backfill") == []
    assert "canary" not in lines.out + lines.err + table.out + table.err


def test_apply_queues_exactly_these_in_the_backfill_queue(lab: Lab, sandbox: Sandbox) -> None:
    make(sandbox, 1)
    everything = [one["order_id"] for one in lab.run_command("reconcile", "--json").objects]

    refused = lab.run_command("reconcile", "--apply")
    assert (refused.code, "Not a terminal: pass --yes." in refused.err, lab.queued("backfill")) == (2, True, [])
    ended = lab.run_command("reconcile", "--apply", "--yes", "--json")

    total = {"orders": len(everything), "queued": len(everything), "waiting": 0, "erased": 0}
    assert (ended.code, ended.objects[-1]) == (0, total)
    assert sorted(lab.queued("backfill")) == sorted(everything)
    assert lab.run_command("reconcile").code == 0


def test_it_reads_from_the_checkpoint_without_moving_it_and_from_zero_everything(lab: Lab, sandbox: Sandbox) -> None:
    """Moving it is the workers' business."""
    make(sandbox, 25)
    versions = row_versions(sandbox)
    checkpoint = Checkpoint(lab.redis, VENUE)
    checkpoint.save(dict(versions[-20:]), listed_at=1, now=1)

    assert len(lab.run_command("reconcile", "--json").objects) == 20
    assert len(lab.run_command("reconcile", "--from-zero", "--json").objects) == len(versions) >= 25
    assert checkpoint.start(10**13) == versions[-20][1] - 1


def row_versions(sandbox: Sandbox) -> list[tuple[str, int]]:
    """Return order id and row version of each row of the list."""
    url = f"{sandbox.base_url('tenant', 'Sandbox', 'Venue')}/channelManager/orders/{PARTNER}?sync=true&lastRowVersion=0"
    rows = sandbox.client.get(url, headers={"x-np-api-key": API_KEY}).json()["data"]
    return [(row["orderId"], int(row["rowVersion"])) for row in rows]


def test_where_row_versions_start_lower_again_it_says_so_and_reads_everything(lab: Lab, sandbox: Sandbox) -> None:
    make(sandbox, 1)
    versions = row_versions(sandbox)
    former = {order(number).order_id: 10**9 + number for number in range(20)}
    Checkpoint(lab.redis, VENUE).save(former, listed_at=1, now=1)

    ended = lab.run_command("reconcile", "--json")

    assert (ended.code, len(ended.objects)) == (1, len(versions))
    assert "venue: the row versions of the list start lower again" in ended.err


def test_a_pending_order_without_a_due_time_is_a_difference_and_apply_repairs_it(lab: Lab, sandbox: Sandbox) -> None:
    (order_id,) = make(sandbox, 1)
    lab.run_command("reconcile", "--apply", "--yes")
    lab.redis.zrem(KEYS.due, OrderKey(VENUE, order_id).member)

    shown, applied, after = lab.run_commands(
        [("reconcile", "--json"), ("reconcile", "--apply", "--yes"), ("reconcile", "--json")]
    )

    assert [(one["order_id"], one["kind"]) for one in shown.objects] == [(order_id, "unscheduled")]
    assert (shown.code, applied.code, after.code, after.objects) == (1, 0, 0, [])
    assert lab.due_in(OrderKey(VENUE, order_id)) is not None


def test_what_a_fetch_did_not_bring_in_line_is_counted_and_not_fetched_again(lab: Lab, sandbox: Sandbox) -> None:
    """A dead letter that was fetched for this row stays a difference: exit code 1."""
    lab.run_command("reconcile", "--apply", "--yes")
    odd, dead = (OrderKey(VENUE, one) for one in make(sandbox, 2))
    assert lab.run_command("reconcile", "--apply", "--yes").code == 0
    lab.fetch_and_store(odd, manifestUrl="https://x.example/other")
    lab.dead_letter(dead, "bad_request")
    lab.clear_queues()

    applied, page = lab.run_command("reconcile", "--apply", "--yes"), lab.run_command("reconcile")

    assert (applied.code, page.code, lab.queued("backfill")) == (1, 1, [])
    assert "1 order differs for good: fetched for this row" in applied.err
    assert "1 dead letter must be requeued by hand: ota-receiver dead list" in applied.out
    assert ("no_event (for good)" in page.out, "Fetch them with --apply" in page.out) == (True, False)
    lab.run_command("dead", "requeue", dead.order_id, "--yes")
    assert lab.run_command("reconcile").code == 0


def test_wrong_options_are_refused_with_an_advice(lab: Lab) -> None:
    file = lab.folder / "orders.csv"
    file.write_text("orderId\nnot-a-guid\n")
    for options, advice in (
        (("--company", "museum"), "No NP_PARTNER_ID is set for museum"),
        (("--company", "museum"), "--from-file"),
        (("--from-file", str(file)), "orders.csv: line 2: orderId 'not-a-guid' is not a GUID"),
        (("--from-file", "x", "--from-zero"), "--from-zero"),
    ):
        ended = lab.run_command("reconcile", *options)

        assert (ended.code, advice in ended.err) == (2, True)


@pytest.mark.parametrize(("status", "reason"), [(401, "unauthorized"), (403, "forbidden"), (302, "redirected")])
def test_an_incomplete_list_is_exit_code_5_and_pauses_no_getorder(
    lab: Lab, sandbox: Sandbox, status: int, reason: str
) -> None:
    """A key may be allowed to fetch orders and not to list them: the list has a breaker of its own."""
    make(sandbox, 1)
    sandbox.admin("POST", "faults", {"kind": "status", "operation": "listOrdersByPartner", "status": status})

    ended, again, shown = lab.run_commands([("reconcile",), ("reconcile",), ("status", "--json")])

    assert (ended.code, again.code) == (6, 6)
    assert f"venue: the list ended early: {reason} (HTTP {status}). See: ota-receiver check" in ended.err
    assert "breaker_open" in again.err
    assert json.loads(shown.out)["breakers"] == []


def test_orders_of_a_file_are_found_by_id_and_by_either_reference(lab: Lab) -> None:
    lab.accept(order(1), order(2))
    lab.fetch_and_store(order(1), buyFromOrderReference="CM-HERE", sellToOrderReference="WEB-HERE")
    file = lab.folder / "orders.csv"
    rows = ["orderId;reference", f"{order(1).order_id};", ";web-here", ";CM-HERE", f";cm-{order(2).order_id[:8]}"]
    rows += [f"{order(9).order_id};CM-HERE", ";WEB-NEVER"]
    file.write_text("\n".join(rows), encoding="utf-8-sig")
    reconcile = ("reconcile", "--from-file", str(file))

    lines, table = lab.run_commands([(*reconcile, "--json"), reconcile])

    assert (lines.code, table.code) == (1, 1)
    assert lines.objects == [
        {"kind": "missing", "line": 6, "order_id": order(9).order_id, "references": ["CM-HERE"]},
        {"kind": "missing", "line": 7, "order_id": "", "references": ["WEB-NEVER"]},
    ]
    assert "2 missing of 6 orders expected." in table.out


def test_a_file_is_applied_to_one_company_and_only_by_order_id(lab: Lab) -> None:
    file = lab.folder / "orders.csv"
    file.write_text(f"orderId,reference\n{order(9).order_id},\n,WEB-NEVER\n")
    apply = ("reconcile", "--from-file", str(file), "--apply", "--yes")

    unclear, ended = lab.run_command(*apply), lab.run_command(*apply, "--company", "museum")

    assert (unclear.code, ended.code) == (2, 1)
    assert "Give --company with --apply. There are: museum, venue." in unclear.err
    assert "1 have no orderId" in ended.err
    assert lab.queued("backfill") == [order(9).order_id]
    assert lab.redis.exists(f"ota:order:{OrderKey(MUSEUM, order(9).order_id).member}")
    file.write_text(f"orderId\n{order(9).order_id}\n")
    assert lab.run_command("reconcile", "--from-file", str(file)).code == 0


def test_ctrl_c_prints_nothing_and_releases_the_permit(lab: Lab, sandbox: Sandbox) -> None:
    """The next page of the workers must not wait for a lease to end."""
    fault = {"kind": "hang", "operation": "listOrdersByPartner", "seconds": 15}
    sandbox.admin("POST", "faults", fault)
    command = [sys.executable, "-m", "app.cli", "reconcile"]
    with subprocess.Popen(command, env=lab.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        eventually(lambda: sandbox.admin("GET", "stats")["active"] == 1, what="the call")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=10)

    assert (running.returncode, out, err) == (130, "", "museum: left out, NP_PARTNER_ID is not set.\n")
    assert lab.redis.keys("ota:permits:*") == []


@pytest.mark.parametrize("of_file", [False, True])
def test_a_closed_output_pipe_does_not_stop_the_requests(lab: Lab, sandbox: Sandbox, of_file: bool) -> None:
    """`--apply --yes --json | head -1`: the reader leaves, and every order is queued all the same."""
    expected = lab.folder / "expected.csv"
    expected.write_text("orderId\n" + "".join(f"{order(number).order_id}\n" for number in range(3000)))
    make(sandbox, 5)
    how = ["--from-file", str(expected), "--company", "venue"] if of_file else []
    command = [sys.executable, "-m", "app.cli", "reconcile", *how, "--apply", "--yes", "--json"]
    with subprocess.Popen(command, env=lab.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        running.stdout.close()
        running.wait(30)

    assert lab.redis.llen("rq:queue:ota-backfill") >= (3000 if of_file else 5)
    assert lab.run_command("audit", "--what", "reconcile", "--json").objects
