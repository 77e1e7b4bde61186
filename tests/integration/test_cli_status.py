"""`status`: what waits and when it is done, on one page, with an exit code for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app import bootstrap
from app.intake.envelope import OrderProcessed
from app.intake.spool import NAME, SpoolFile
from app.ledger import keys
from app.ledger.rate_limit import breaker_key
from tests.lab import API_KEY, MUSEUM, VENUE, Lab, order


def beat(lab: Lab, *, ago_ms: int = 0, live: int = 2) -> None:
    """Write what a pool writes each second."""
    workers = [f"h-1-live-{number}" for number in range(live)] + ["h-1-backfill-0"]
    lab.redis.hset(
        keys.POOLS,
        "h-1",
        json.dumps({"machine": "h", "pid": 1, "started": "1", "workers": workers, "at": bootstrap.clock() - ago_ms}),
    )


def status(lab: Lab, code: int) -> Any:
    ended = lab.run_command("status", "--json")
    assert ended.code == code, ended.err
    (found,) = ended.objects
    return found


def test_the_backlog_of_each_queue_has_an_expected_end(lab: Lab) -> None:
    """Two workers with 42 ms for a getOrder do 47.6 a second, until 6,000 in 5 minutes are used up."""
    beat(lab)
    lab.accept(order(1))
    lab.fetch_and_store(order(1))
    lab.clear_queues()
    lab.accept(*(order(number) for number in range(2, 102)), at=bootstrap.clock() - 9000)

    found = status(lab, 0)

    live, backfill = found["queues"]
    assert (found["pools"], found["alerts"], found["due"], found["get_order_s"]) == (1, [], 101, 0.042)
    assert (live["queue"], live["jobs"], live["workers"], live["rate"], live["done_s"]) == ("live", 100, 2, 47.62, 2)
    few = lab.run_command("status", "--json", UPSTREAM_REQUESTS_PER_5_MIN="60").objects[0]["queues"][0]
    assert (few["rate"], few["done_s"]) == (0.2, 200)
    assert (backfill["jobs"], backfill["done_s"]) == (0, 0)
    assert 9 <= found["oldest_pending_s"]["venue"] < 60
    assert found["oldest_pending_s"]["museum"] == 0


def test_without_a_pool_nothing_is_fetched_and_the_exit_code_is_1(lab: Lab) -> None:
    beat(lab, ago_ms=60_000)
    lab.accept(order(1))

    page, found = lab.run_command("status"), status(lab, 1)

    assert (found["pools"], found["queues"][0]["done_s"]) == (0, None)
    assert "0: nothing is fetched" in page.out
    assert "fetching is paused" in page.out


def test_a_firing_alert_is_named_and_the_exit_code_is_1(lab: Lab) -> None:
    beat(lab)
    lab.redis.hset(
        keys.ALERTS, mapping={"fetch_late|venue|": '{"since":1,"firing_at":2}', "silence|museum|": '{"since":1}'}
    )

    assert status(lab, 1)["alerts"] == ["fetch_late venue"]


def test_dead_letters_and_open_breakers_are_counted(lab: Lab) -> None:
    beat(lab)
    lab.accept(order(1), order(2, MUSEUM))
    lab.dead_letter(order(1))
    lab.fetch_and_store(order(2, MUSEUM))
    lab.dead_letter_delivery(order(2, MUSEUM))
    breakers = [breaker_key(API_KEY, f"/tenant/Sandbox/{name}") for name in ("Venue", "Museum")]
    lab.redis.hset(breakers[0], "open_until", bootstrap.clock() + 60_000)

    found = status(lab, 0)
    lab.redis.hset(breakers[1], "open_until", bootstrap.clock() + 60_000)
    lab.accept(order(3))

    assert (found["dead_letters"], found["dead_deliveries"], found["breakers_open"]) == (1, 1, ["venue"])
    assert found["queues"][0]["rate"] > 0
    assert status(lab, 0)["queues"][0]["done_s"] is None


def test_events_in_the_spool_of_this_machine_are_counted(lab: Lab) -> None:
    beat(lab)
    folder = lab.folder / "spool"
    folder.mkdir(mode=0o700)
    assert status_with(lab, folder) == 0
    file = SpoolFile(folder / NAME)
    file.put([OrderProcessed(VENUE, order(1).order_id, "Issued", "", "", "current")] * 3)

    assert status_with(lab, folder) == 3
    assert status_with(lab, lab.folder / "none") is None
    file.close()
    (folder / NAME).write_bytes(b"no database" * 100)
    assert status_with(lab, folder) is None


def status_with(lab: Lab, folder: Path) -> Any:
    return lab.run_command("status", "--json", SPOOL_DIR=str(folder)).objects[0]["spooled"]
