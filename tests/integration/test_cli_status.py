"""`status`: what waits and when it is done. `health`: the check for HEALTHCHECK. Both have exit codes for scripts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytest
from rq.suspension import suspend

from app.heartbeat import Heartbeat, LoopTime
from app.intake.envelope import OrderProcessed
from app.intake.spool_file import NAME, SpoolFile
from app.ledger import policy
from app.ledger.rate_limit import breaker_id
from tests.eventually import eventually
from tests.lab import API_KEY, KEYS, MUSEUM, SINK, VENUE, Lab, configuration, order, shown
from tests.lab_upstream import Upstream, says


def beat(lab: Lab, name: str = "pool", *, ago_ms: int = 0, **changed: Any) -> None:
    """Write what a pool of this machine writes each second, or with `changed` fields another pool."""
    workers, at = ("h-1-live-0", "h-1-live-1", "h-1-backfill-0"), lab.now - ago_ms
    heartbeat = Heartbeat.of_this_process(workers, at, at, configuration())
    lab.redis.hset(KEYS.pools, name, msgspec.json.encode(msgspec.structs.replace(heartbeat, **changed)))


def status(lab: Lab, code: int) -> Any:
    ended = lab.run_command("status", "--json")
    assert ended.code == code, ended.err
    (found,) = ended.objects
    return found


def test_the_backlog_of_each_queue_has_an_expected_end(lab: Lab) -> None:
    """Two workers with 42 ms for a getOrder do 47.6 a second, until 6,000 in 5 minutes are used up."""
    beat(lab)
    lab.accept_and_fetch(order(1))
    lab.clear_queues()
    lab.accept(*(order(number) for number in range(2, 102)), at=lab.now - 9000)

    found = status(lab, 0)

    live, backfill = found["queues"]
    assert (found["pools"], found["alerts"], found["due"], found["get_order_s"]) == (1, [], 100, 0.042)
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
    assert ("0: nothing is fetched" in page.out, "fetching is paused" in page.out) == (True, True)


def test_orders_without_a_due_time_are_counted(lab: Lab) -> None:
    """Also where `due` is gone as a whole, and its length says that nothing is pending."""
    beat(lab)
    lab.accept(order(1), order(2))
    lab.accept_and_fetch(order(3))
    lab.deliver(order=order(3))
    assert lab.acquire_delivery(order(3)) is None
    assert status(lab, 0)["unscheduled"] == 0
    lab.redis.zadd(KEYS.due, {order(1).member: lab.now + 10**9})
    assert status(lab, 1)["unscheduled"] == 1
    lab.redis.delete(KEYS.due)

    found, page = status(lab, 1), lab.run_command("status")

    assert (found["due"], found["unscheduled"]) == (0, 2)
    assert "2 orders of the 200 changed last" in page.out


def test_a_suspended_rq_is_shown_and_its_backlog_has_no_end(lab: Lab) -> None:
    beat(lab)
    lab.accept(order(1))
    suspend(lab.redis)

    found, page = status(lab, 1), lab.run_command("status")

    assert (found["suspended"], found["queues"][0]["done_s"]) == (True, None)
    said = re.search(r"suspended: nothing is fetched or delivered. To go on: (rq resume .*)", page.out)
    assert said, page.out
    env = os.environ | {"REDIS_URL": lab.url, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["/bin/sh", "-c", said[1]], env=env, check=True, capture_output=True)
    assert (status(lab, 0)["suspended"], status(lab, 0)["queues"][0]["done_s"] is None) == (False, False)


def test_dead_letters_and_open_breakers_are_counted(lab: Lab) -> None:
    beat(lab)
    lab.accept(order(1))
    lab.dead_letter(order(1))
    lab.accept_and_fetch(order(2, MUSEUM))
    lab.dead_letter_delivery(order(2, MUSEUM))
    breakers = [KEYS.breaker(breaker_id(API_KEY, f"/tenant/Sandbox/{name}")) for name in ("Venue", "Museum")]
    lab.redis.hset(breakers[0], "open_until", lab.now + 60_000)
    lab.redis.hset(breakers[0], mapping={"opened_at": lab.now - 180_000, "reason": "bad_request", "http": 400})

    page, found = lab.run_command("status"), status(lab, 1)
    assert "venue: bad_request (HTTP 400) since " in page.out
    assert f" (3 min); next probe at {shown(lab.now + 60_000)}" in page.out
    (breaker,) = found["breakers"]
    assert (breaker["company"], breaker["reason"], breaker["http_status"]) == ("venue", "bad_request", 400)

    found = status(lab, 1)
    lab.redis.hset(breakers[1], "open_until", lab.now + 90_000)
    lab.accept(order(3))

    assert (found["dead_letters"], found["dead_deliveries"], len(found["breakers"])) == (1, 1, 1)
    assert found["queues"][0]["rate"] > 0
    assert (status(lab, 1)["queues"][0]["rate"], status(lab, 1)["queues"][0]["done_s"]) == (0, None)
    soonest = shown(lab.now + 60_000)
    assert f"fetching is paused until {soonest}" in lab.run_command("status").out
    lab.redis.hset(breakers[0], "open_until", lab.now - 1000)
    assert "next probe with the next order that is due" in lab.run_command("status").out


def test_a_retry_after_of_the_pools_key_is_shown_with_its_end_instead_of_a_rate(lab: Lab) -> None:
    """The key of the shell is another one, and is free. Where another company has a free key, its rate counts."""
    venue_alone = msgspec.structs.replace(configuration((), "venue").companies[VENUE], key="of-the-pools")
    museum = msgspec.structs.replace(configuration((), "museum").companies[MUSEUM], key="another")
    lab.declare(companies={VENUE: venue_alone, MUSEUM: museum})
    beat(lab)
    lab.accept(order(1))
    assert status(lab, 0)["queues"][0]["rate"] > 0

    lab.redis.hset("ota:limiter:of-the-pools", "retry_until", lab.now + 600_000)
    found = status(lab, 0)
    assert (list(found["throttled_until"]), found["queues"][0]["rate"] > 0) == (["venue"], True)

    lab.redis.hset("ota:limiter:another", "retry_until", lab.now + 900_000)
    page, found = lab.run_command("status"), status(lab, 0)
    soonest = shown(lab.now + 600_000)
    assert (found["queues"][0]["rate"], found["queues"][0]["done_s"]) == (0, None)
    assert f"1 worker, fetching is paused until {soonest}" in page.out.replace("2 workers", "1 worker")
    assert f"venue until {soonest}" in page.out

    for key in ("of-the-pools", "another"):
        lab.redis.hset(f"ota:limiter:{key}", "retry_until", lab.now - 1)
    lab.redis.zadd(KEYS.window("of-the-pools"), {str(number): lab.now for number in range(60)})
    few = lab.run_command("status", "--json", UPSTREAM_REQUESTS_PER_5_MIN="30").objects[0]["queues"][0]
    assert few["rate"] > 1, "the other key has room for it"
    lab.redis.zadd(KEYS.window("another"), {str(number): lab.now for number in range(60)})
    few = lab.run_command("status", "--json", UPSTREAM_REQUESTS_PER_5_MIN="30").objects[0]["queues"][0]
    assert few["rate"] == 0.2


def test_an_alert_has_its_age_its_count_when_it_was_last_true_and_its_runbook(lab: Lab) -> None:
    beat(lab)
    states: dict[str, dict[str, Any]] = {
        "rejected_secrets|venue|": {"since": 7200, "last_true_at": 1800, "firing_at": 7200, "count": 90, "risen": 7},
        "subscription|museum|": {"since": 300, "last_true_at": 5, "firing_at": 300, "reason": "missing"},
        "fetch_late|museum|": {"since": 300, "last_true_at": 5},
    }
    for name, state in states.items():
        for field in state.keys() & {"since", "last_true_at", "firing_at"}:
            state[field] = lab.now - state[field] * 1000
        lab.redis.hset(KEYS.alerts, name, msgspec.json.encode(state))

    page, (rejected, down) = lab.run_command("status").out, status(lab, 1)["alerts"]

    assert (rejected["name"], rejected["company"], rejected["count"]) == ("rejected_secrets", "venue", 7)
    assert (down["reason"], down["count"], down["runbook"]) == ("missing", None, "docs/operations.md#subscription")
    last = shown(lab.now - 1_800_000)
    flat = " ".join(page.split())
    assert f"rejected_secrets venue: for 2 h, 7 times, last at {last}" in flat
    assert "subscription museum: for 5 min, missing; docs/operations.md#subscription" in flat
    assert "fetch_late" not in page
    # Each has a line of its own.
    assert re.search(r"^ +subscription museum: ", page, re.MULTILINE)


def test_a_sink_that_does_not_return_is_shown_before_its_time_limit(lab: Lab) -> None:
    """The latest of several deliveries does not hide the longest, and one of a worker that died is none."""
    beat(lab)
    for number, ago in ((1, 80), (2, 5), (3, 400)):
        lab.accept_and_fetch(order(number))
        lab.start_delivery(order(number), f"worker-{number}")
        lab.redis.hset(KEYS.record(order(number)), f"{SINK}:lease", lab.now + policy.DELIVERY_LEASE - ago * 1000)

    found = status(lab, 0)
    assert (found["longest_delivery_s"] in (80, 81), found["longest_delivery_sink"]) == (True, SINK)
    assert re.search(
        f"longest delivery      to {SINK}: has run for 8[01] s; a job is interrupted after 120 s",
        lab.run_command("status").out,
    )
    lab.redis.hdel(KEYS.record(order(1)), f"{SINK}:lease")
    assert "longest delivery" not in lab.run_command("status").out


def test_a_sink_that_fails_for_everything_is_shown_and_the_exit_code_is_1(lab: Lab) -> None:
    """One that takes others after a failure is not."""
    beat(lab)
    for number in range(1, 5):
        lab.accept_and_fetch(order(number))
    assert status(lab, 0)["sinks"][0]["behind"] == 4
    for number in (1, 2):
        lab.deliver("retry", order(number), failure="ValueError at shop.py:7", wait=600)
    (sink,) = status(lab, 0)["sinks"]
    assert (sink["fails"], sink["attempts"], sink["error"]) == (False, 2, "ValueError at shop.py:7")
    lab.deliver("retry", order(3), failure="KeyError at shop.py:9", wait=600)

    page, found = lab.run_command("status"), status(lab, 1)

    (sink,) = found["sinks"]
    assert (sink["sink"], sink["behind"], sink["fails"], sink["attempts"]) == (SINK, 4, True, 3)
    assert f"{SINK}: 4 orders behind; nothing delivered for 0 s: 3 attempts failed, KeyError at shop.py:9" in page.out
    listed = lab.run_command("orders", "list").out
    assert listed.count(f"{SINK}: ValueError at shop.py:7") == 2
    explained = " ".join(lab.run_command("orders", "explain", order(3).order_id).out.split())
    assert "not delivered yet, failed: KeyError at shop.py:9 (1 attempt); next attempt" in explained
    assert f"Fix the sink {SINK} (KeyError at shop.py:9). Delivery is attempted again at" in explained

    lab.deliver(order=order(4))
    assert (status(lab, 0)["sinks"][0]["behind"], status(lab, 0)["sinks"][0]["failing_s"]) == (3, None)


def test_a_sink_that_asks_for_another_time_is_behind_and_fails_nowhere(lab: Lab) -> None:
    beat(lab)
    for number in range(1, 5):
        lab.accept_and_fetch(order(number))
        lab.deliver("postponed", order(number), failure="Retry at shop.py:7", wait=600)

    (sink,) = status(lab, 0)["sinks"]

    assert (sink["behind"], sink["fails"], sink["failing_s"], sink["error"]) == (4, False, None, "")
    explained = " ".join(lab.run_command("orders", "explain", order(3).order_id).out.split())
    assert "revision 1 not delivered yet, postponed: Retry at shop.py:7; next attempt" in explained
    assert f"revision 1 postponed by {SINK} after 7 ms: Retry at shop.py:7" in explained
    assert f"Nothing: the sink {SINK} asked for another time. Delivery is attempted again at" in explained


def test_a_shell_with_another_api_key_shows_the_breaker_of_the_pools(lab: Lab) -> None:
    """The key of the pool that started last counts, and its breaker is open; that of the shell's own key is closed."""
    lab.declare()
    lab.accept(order(1))
    lab.fail_fetch("deferred", order(1), reason="unauthorized", http_status=401)
    opened: Any = {
        "open_until": lab.now + 60_000,
        "opened_at": lab.now - 180_000,
        "reason": "unauthorized",
        "http": 401,
    }
    lab.redis.hset(KEYS.breaker("breaker"), mapping=opened)

    assert "venue" in {one["company"] for one in status(lab, 1)["breakers"]}
    assert "unauthorized (HTTP 401)" in lab.run_command("orders", "explain", order(1).order_id).out

    lab.redis.delete(KEYS.breaker("breaker"))
    lab.redis.hset(KEYS.breaker(breaker_id(API_KEY, "/tenant/Sandbox/Venue")), mapping=opened)
    assert status(lab, 0)["breakers"] == []


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


def test_a_web_process_that_answers_is_healthy(lab: Lab, upstream: Upstream) -> None:
    """It is asked without the proxies of the environment; with HOST 0.0.0.0 too."""
    upstream.will(says(200))
    for host in ("127.0.0.1", "0.0.0.0"):
        ended = lab.run_command("health", "--json", PORT=upstream.port, HOST=host, http_proxy="http://127.0.0.1:1")
        assert (ended.code, [one["role"] for one in ended.objects]) == (0, ["web"])
    assert {one.target for one in upstream.asked} == {"/healthz"}


def test_a_web_process_with_another_answer_or_none_is_not_healthy(lab: Lab, upstream: Upstream) -> None:
    upstream.will(says(503))
    assert lab.run_command("health", "--role", "web", PORT=upstream.port).code == 1

    with socket.create_server(("127.0.0.1", 0)) as mute:
        ended = lab.run_command("health", "--role", "web", "--json", PORT=str(mute.getsockname()[1]))
    assert (ended.code, ended.objects[0]["healthy"]) == (1, False)
    assert "TimeoutError" in ended.objects[0]["detail"]


def nothing_listens_on(port: int) -> dict[str, str]:
    """Return the settings of a machine where no HTTP process runs; on this one another may have the usual ports."""
    return dict.fromkeys(("PORT", "API_PORT", "OPS_PORT"), str(port))


@pytest.mark.parametrize(("age", "code"), [(0, 0), (4, 0), (16, 1)])
def test_a_pool_is_ready_while_its_heartbeat_is_fresh(lab: Lab, free_port: int, age: int, code: int) -> None:
    """That of another machine does not count."""
    beat(lab, ago_ms=age * 1000)
    assert lab.run_command("health", "--role", "worker", "--ready").code == code
    assert lab.run_command("health", "--ready", **nothing_listens_on(free_port)).code == code

    beat(lab, ago_ms=age * 1000, machine="another-boot-another-namespace")
    assert lab.run_command("health", "--role", "worker", "--ready").code == 1


@pytest.mark.parametrize("changed", [{"pid": 2**22 + 1}, {"started": "12"}], ids=["ended", "its pid is used again"])
def test_a_pool_that_was_killed_is_not_ready_though_its_heartbeat_is_fresh(lab: Lab, changed: dict[str, Any]) -> None:
    """Its successor is."""
    beat(lab, "killed", **changed)
    ended = lab.run_command("health", "--role", "worker", "--ready")
    assert (ended.code, "has ended" in ended.out) == (1, True)

    beat(lab, "successor")
    assert lab.run_command("health", "--role", "worker", "--ready").code == 0


def test_a_pool_that_was_killed_and_whose_parent_has_not_noticed_is_not_ready(lab: Lab) -> None:
    """Its start time is still in /proc."""
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        beat(lab, "killed", pid=process.pid, started=stat.read_text().rpartition(")")[2].split()[19])
        assert lab.run_command("health", "--role", "worker", "--ready").code == 0
        process.kill()
        eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", 5, what="it has ended")

        assert lab.run_command("health", "--role", "worker", "--ready").code == 1


def test_without_redis_the_worker_is_not_ready_and_a_web_process_with_a_spool_is(lab: Lab, upstream: Upstream) -> None:
    upstream.will(says(200))
    without = {"REDIS_URL": "redis://127.0.0.1:1/0", "PORT": upstream.port}

    assert lab.run_command("health", "--role", "worker", "--ready", **without).code == 1
    assert lab.run_command("health", "--ready", **without).code == 0


@pytest.mark.parametrize(("age", "code"), [(0, 0), (50, 0), (61, 1)])
def test_a_pool_lives_while_its_loop_runs_with_or_without_redis(
    lab: Lab, free_port: int, monkeypatch: pytest.MonkeyPatch, age: int, code: int
) -> None:
    """A liveness probe must not restart every pool when Redis is away. That of another deployment does not count."""
    away = {"REDIS_URL": "redis://:canary@127.0.0.1:1/0", **nothing_listens_on(free_port)}
    monkeypatch.setattr("app.heartbeat.monotonic", lambda: monotonic() - age)
    clocks = [LoopTime(f"ota {away['REDIS_URL']}"), LoopTime(f"other {away['REDIS_URL']}")]
    for one in clocks:
        one.set_now()
        monkeypatch.setattr("app.heartbeat.monotonic", monotonic)

    alive = lab.run_command("health", "--role", "worker", **away)

    assert (alive.code, alive.out) == (code, f"worker: its loop last ran {age} s ago\n")
    assert lab.run_command("health", **away).code == code
    assert lab.run_command("health", "--role", "worker", "--ready", **away).code == 1
    clocks[0].close()
    ended = lab.run_command("health", "--role", "worker", **away)
    assert (ended.code, ended.out) == (1, "worker: no worker pool of this user runs on this machine\n")
    clocks[1].close()


def test_the_check_of_a_worker_imports_no_heavy_library(lab: Lab) -> None:
    """A container runs it every few seconds."""
    code = (
        "import sys\nfrom app.cli.main import main\nsys.argv = ['ota-receiver', 'health', '--role', 'worker']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=lab.env, capture_output=True, text=True, check=True, timeout=30
    )

    assert "no worker pool" in ended.stdout
    heavy = {"app.bootstrap", "workers", "httpx", "starlette", "prometheus_client"}
    assert heavy & set(ended.stderr.split()) == set()
