"""`events list`, `events show` and `events tail`: the accepted events, and the outcomes of their orders."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.dev.processes import Process
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.lab import KEYS, MUSEUM, VENUE, Lab, order


def test_events_are_listed_newest_last_as_a_table_and_as_lines(lab: Lab) -> None:
    lab.accept(order(1), status="Draft")
    lab.accept(order(2, MUSEUM))
    lab.accept(order(1), status="Issued")

    table, lines = lab.run_command("events", "list"), lab.run_command("events", "list", "--json", "--limit", "2")

    assert (table.code, lines.code, lines.err) == (0, 0, "")
    assert [line.split()[1] for line in table.out.splitlines()[3:]] == ["venue", "museum", "venue"]
    listed = [(event["company"], event["order_id"], event["status"], event["outcome"]) for event in lines.objects]
    assert listed == [
        ("museum", order(2).order_id, "Issued", "queued"),
        ("venue", order(1).order_id, "Issued", "coalesced"),
    ]
    assert lines.objects[0]["at"].endswith("Z")


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (("--status", "draft"), [1]),
        (("--company", "museum"), [2]),
        (("--outcome", "coalesced"), []),
        (("--outcome", "queued", "--status", "error"), [3]),
        (("--company", "{22222222-2222-4222-8222-222222222222}"), [2]),
        (("--since", "1h", "--company", "venue"), [1, 3]),
    ],
)
def test_events_are_filtered(lab: Lab, filters: tuple[str, ...], numbers: list[int]) -> None:
    lab.accept(order(1), status="Draft")
    lab.accept(order(2, MUSEUM))
    lab.accept(order(3), status="Error")

    found = lab.run_command("events", "list", "--json", *filters)

    assert [event["order_id"] for event in found.objects] == [order(number).order_id for number in numbers]


def test_a_local_time_is_shown_with_its_date_and_zone(lab: Lab) -> None:
    lab.accept(order(1))

    ended = lab.run_command("events", "list", "--since", "2026-06-01 08:15", "--until", "23:59", "--json")
    zoned = lab.run_command("events", "list", "--since", "2026-06-01T08:15Z", "--until", "0s", "--json")

    assert "'2026-06-01 08:15' is 2026-06-01 08:15:00 CEST.\n" in ended.err
    assert re.search(r"^'23:59' is 20\d\d-\d\d-\d\d 23:59:00 CES?T\.$", ended.err, re.MULTILINE)
    assert (zoned.code, zoned.err, len(zoned.objects)) == (0, "", 1)


def test_an_unknown_event_is_exit_code_1(lab: Lab) -> None:
    assert lab.run_command("events", "show", "1-1").code == 1


def test_one_event_is_shown_with_the_state_of_its_order(lab: Lab) -> None:
    lab.accept(order(1), timestamp="2026-06-01T08:15:02.4170000Z")
    lab.fetch_and_store(order(1))
    (event_id,) = [event["id"] for event in lab.run_command("events", "list", "--json").objects]

    page, line = lab.run_command("events", "show", event_id), lab.run_command("events", "show", event_id, "--json")

    assert (page.code, line.code) == (0, 0)
    assert order(1).order_id in page.out
    assert "2026-06-01T08:15:02.4170000Z" in page.out
    (shown,) = line.objects
    assert (shown["id"], shown["order_state"], shown["secret"]) == (event_id, "fetched", "current")


PATIENCE = 20.0


def tailing(lab: Lab, *options: str) -> Process:
    """Start `events tail` from the very beginning, so that no test waits for its start."""
    command = [sys.executable, "-m", "app.cli", "events", "tail", "--since", "2000-01-01T00:00Z", *options]
    return Process.start(command, env=lab.env, log=lab.folder / "tail")


def objects(tail: Process, count: int) -> list[Any]:
    """Return what was printed as JSON, once there are so many lines of it."""

    def printed() -> list[str]:
        lines = [line for line in tail.output.splitlines() if line.startswith("{")]
        return lines if len(lines) >= count else []

    return [json.loads(line) for line in eventually(printed, PATIENCE, what=f"{count} lines")]


def remarks(tail: Process) -> list[str]:
    """Return what was printed beside it."""
    return [line for line in tail.output.splitlines() if not line.startswith("{")]


def test_an_event_is_shown_at_once_and_later_the_outcome_of_its_order(lab: Lab) -> None:
    with tailing(lab, "--json") as tail:
        lab.accept(order(1))
        assert [one["what"] for one in objects(tail, 1)] == ["event"]

        lab.fetch_and_store(order(1))
        event, outcome = objects(tail, 2)

    assert (event["order_id"], event["company"], event["outcome"]) == (order(1).order_id, "venue", "queued")
    shown = (outcome["what"], outcome["state"], outcome["status"], outcome["tickets"], outcome["revision"])
    assert shown == ("outcome", "fetched", "Issued", 2, 1)
    assert 0 <= outcome["took_ms"] < PATIENCE * 1000


def test_deferred_and_dead_orders_are_shown_with_the_reason(lab: Lab) -> None:
    with tailing(lab) as tail:
        lab.accept(order(1), order(2))
        lab.dead_letter(order(1), "bad_request", 400)
        lab.fail_fetch("deferred", order(2), reason="unauthorized", http_status=401)
        ends = ("unauthorized", "bad_request")
        eventually(lambda: all(end in tail.output for end in ends), PATIENCE, what="both ends")

    assert f"{order(1).order_id} venue: dead after" in tail.output
    assert f"{order(2).order_id} venue: deferred after" in tail.output
    assert tail.output.count("deferred") == 1
    assert max(map(len, tail.output.splitlines())) < 100


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--status", "draft"), [2]),
        (("--outcome", "coalesced"), [1]),
        (("--order", order(4).order_id), [4]),
        (("--order", "cm-00000000", "--company", "museum"), [3]),
    ],
)
def test_the_options_filter_what_is_shown(lab: Lab, options: tuple[str, ...], numbers: list[int]) -> None:
    lab.accept(order(1), order(3, MUSEUM), order(4), order(1))
    lab.accept(order(2), status="Draft")

    with tailing(lab, "--json", *options) as tail:
        found = objects(tail, len(numbers))

    assert [int(one["order_id"][-2:]) for one in found] == numbers


def test_it_begins_with_the_events_of_since_and_not_before(lab: Lab) -> None:
    for number, event_id in ((1, "946684799999-7"), (2, "946684800000-0")):
        lab.redis.xadd(KEYS.events, {"company": VENUE, "order": order(number).order_id}, id=event_id)

    with tailing(lab, "--json", "--since", "2000-01-01T00:00:00Z") as tail:
        assert [one["order_id"] for one in objects(tail, 1)] == [order(2).order_id]


def test_it_continues_after_an_outage_of_redis(own_valkey: Valkey, tmp_path: Path) -> None:
    """One remark when Redis fails and one when it is back; no event is lost or shown twice."""
    with Redis.from_url(own_valkey.url) as redis:
        lab = Lab(redis, own_valkey.url, tmp_path)
        with tailing(lab, "--json") as tail:
            lab.accept(order(1))
            objects(tail, 1)
            own_valkey.kill()
            eventually(lambda: "Waiting for it." in tail.output, PATIENCE, what="the remark")
            own_valkey.restart()
            lab.accept(order(2))
            found = objects(tail, 2)

    assert [one["order_id"] for one in found] == [order(1).order_id, order(2).order_id]
    assert ["Waiting for it." in line for line in remarks(tail)] == [True, False]
    assert "Redis is back." in remarks(tail)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_silently(lab: Lab, number: int, code: int) -> None:
    lab.accept(order(1))
    with tailing(lab, "--json") as tail:
        objects(tail, 1)
        os.kill(tail.pid, number)
        assert tail.wait(PATIENCE) == code

    assert remarks(tail) == []


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_closed_output_pipe_ends_it_silently(lab: Lab, form: tuple[str, ...]) -> None:
    lab.accept(order(1))
    command = [sys.executable, "-m", "app.cli", "events", "tail", "--since", "1h", *form]
    with subprocess.Popen(command, env=lab.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert order(1).order_id.encode() in running.stdout.readline()
        running.stdout.close()
        lab.accept(order(2))
        assert running.wait(PATIENCE) == 141
        assert running.stderr.read() == b""
