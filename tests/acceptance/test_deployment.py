"""Several pools on one Redis whose settings differ: what one lacks another does, and strangers are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from app.deployment import Deployment
from app.dev.processes import Process, free_port
from app.dev.stack import ENVIRONMENT, TENANT
from app.heartbeat import Configuration, DeclaredCompany, Heartbeat
from app.ledger.redis import Redis, server_time
from tests.eventually import eventually
from tests.lab import KEYS
from tests.service import Service

SINK = "python:shop:on_order"


@pytest.fixture
def museum_and_zoo(bare: Service) -> Service:
    """Web knows both companies; `museum.toml` knows one only."""
    for name, companies in (("both", ("Museum", "Zoo")), ("museum", ("Museum",))):
        (bare.folder / f"{name}.toml").write_text(
            "".join(
                f'[companies.{company.lower()}]\nnp_company_id = "{bare.company_id_of(company)}"\n'
                f'np_company = "{company}"\nnp_tenant = "{TENANT}"\nnp_environment = "{ENVIRONMENT}"\n'
                f'np_api_key = "key of {company}"\nclient_state = "secret of {company}"\n'
                for company in companies
            )
        )
    shared = {name: value for name, value in bare.variables.items() if name in {"REDIS_URL", "PORT", "LOG_FORMAT"}}
    bare.variables = shared | {"COMPANIES_FILE": "both.toml", "NP_BASE_URL": bare.sandbox.url}
    bare.start("web")
    return bare


@pytest.fixture
def shop(bare: Service) -> Service:
    """A sink can be imported, and SINKS is set nowhere."""
    (bare.folder / "shop.py").write_text("def on_order(order, context): pass\n")
    bare.start("web")
    return bare


def pool(one: Service, **variables: str) -> Process:
    """Start a pool; its three live workers wait for jobs."""
    queue = f"rq:workers:{variables.get('KEY_PREFIX') or one.variables.get('KEY_PREFIX', 'ota')}-live"
    with Redis.from_url(one.valkey.url) as redis:
        before = redis.scard(queue)
        started = one.start("worker", WORKERS="3", BACKFILL_WORKERS="1", **variables)
        eventually(lambda: redis.scard(queue) >= before + 3, 20, what="the workers wait for jobs")
    return started


def post(one: Service, company: str, count: int) -> list[str]:
    """Accept an event for each of `count` new orders of a company."""
    company_id = one.company_id_of(company)
    orders = one.issue(count, company_id)
    events = (one.event(order, clientState=f"secret of {company}", companyId=company_id) for order in orders)
    assert one.post(*events)[1]["queued"] == count
    return orders


def deliveries(one: Service) -> set[str]:
    return {line["order_id"] for line in one.log("worker", "delivery.succeeded")}


def wait_delivered(one: Service, orders: Sequence[str]) -> None:
    eventually(lambda: deliveries(one) >= set(orders), 20, what="every order is delivered")


def test_orders_of_a_company_that_one_pool_does_not_know_are_fetched_by_the_other(museum_and_zoo: Service) -> None:
    """The pool without the company has the only sink: what it delivers names the company all the same."""
    (museum_and_zoo.folder / "shop.py").write_text("def on_order(order, context): pass\n")
    pool(museum_and_zoo, SINKS="")
    museum = pool(museum_and_zoo, COMPANIES_FILE="museum.toml", SINKS=SINK)

    orders = post(museum_and_zoo, "Zoo", 40) + post(museum_and_zoo, "Museum", 40)

    def fetched() -> set[str]:
        return {line["order_id"] for line in museum_and_zoo.log("worker", "order.fetched")}

    eventually(lambda: fetched() == set(orders), 10, what="every order is fetched within seconds")
    assert museum_and_zoo.log("worker", "job.returned") != []
    assert museum_and_zoo.log("worker", "fetch.deferred") == []
    assert {row["gets"] for row in museum_and_zoo.admin("GET", "orders") if row["order_id"] in orders} == {1}
    code, (status,) = museum_and_zoo.cli("status")
    differing = status["pools_differ"]
    ((name, words),) = [one for one in differing.items() if of_pool(one[0]) == museum.pid]
    wait_delivered(museum_and_zoo, orders)
    delivered = [line["company"] for line in museum_and_zoo.log("worker", "delivery.succeeded")]
    assert (delivered.count("zoo"), delivered.count("museum")) == (40, 40)
    assert (code, words) == (0, ["no company zoo"]), "for ten minutes it may be a rolling change"
    found = [(one["level"], one["detail"]) for one in museum_and_zoo.cli("check")[1] if one["what"] == "pools"]
    differs = f"pool {name} differs: no company zoo"
    assert (len(differing), ("note", differs) in found) == (2, True)
    assert ("good", "2 worker pools under this KEY_PREFIX") in found


def test_workers_that_do_not_know_a_company_pass_its_job_around_without_haste(museum_and_zoo: Service) -> None:
    """A pool that knows it seems to run, and takes no job."""
    pool(museum_and_zoo, COMPANIES_FILE="museum.toml")
    zoo = DeclaredCompany("zoo", f"/{TENANT}/{ENVIRONMENT}/Zoo", "breaker")
    known = Configuration({museum_and_zoo.company_id_of("Zoo"): zoo})
    with Redis.from_url(museum_and_zoo.valkey.url) as redis:
        now = server_time(redis)
        Deployment(redis).declare("hangs", Heartbeat("elsewhere", 1, "", [], now + 3000, now, known))
    (order,) = post(museum_and_zoo, "Zoo", 1)
    eventually(lambda: len(museum_and_zoo.log("worker", "job.returned")) > 8, 10, what="each has returned it")

    pool(museum_and_zoo)
    museum_and_zoo.wait_fetched(order)

    assert len(museum_and_zoo.log("worker", "job.returned")) < 60
    assert museum_and_zoo.row(order)["gets"] == 1


def test_a_company_that_no_pool_knows_is_reported_and_fetched_once_one_does(museum_and_zoo: Service) -> None:
    pool(museum_and_zoo, COMPANIES_FILE="museum.toml")
    (order,) = post(museum_and_zoo, "Zoo", 1)
    eventually(lambda: museum_and_zoo.log("worker", "fetch.deferred"), 10, what="its fetch is deferred")

    code, (status,) = museum_and_zoo.cli("status")
    assert (code, status["undeclared"]) == (1, ["zoo"])

    pool(museum_and_zoo)
    museum_and_zoo.wait_fetched(order, within=20)
    assert museum_and_zoo.cli("status")[0] == 0


BOTH = ("order.fetched", "delivery.succeeded")


def of_pool(worker: str) -> int:
    """Return the pid of a worker's pool."""
    return int(worker.split("-")[1])


def test_orders_fetched_by_a_pool_without_the_sink_are_delivered_by_the_other(shop: Service) -> None:
    """Also after Redis was flushed, which the pools notice with their next heartbeat."""
    delivering, plain = pool(shop, SINKS=SINK), pool(shop)
    with Redis.from_url(shop.valkey.url) as redis:
        for _ in range(2):
            orders = shop.issue(30)
            assert shop.post(*map(shop.event, orders))[1]["queued"] == 30
            wait_delivered(shop, orders)
            assert [shop.cli("orders", "explain", one)[0] for one in orders[:2]] == [0, 0]
            redis.flushall()
            eventually(lambda: redis.hlen(KEYS.pools) == 2 and redis.hkeys(KEYS.sinks), 10, what="the state is back")
    pids = {event: {of_pool(line["worker"]) for line in shop.log("worker", event)} for event in BOTH}
    assert pids == {"order.fetched": {delivering.pid, plain.pid}, "delivery.succeeded": {delivering.pid}}
    assert (shop.log("worker", "delivery.failed"), plain.exit_code) == ([], None)


def test_deliveries_wait_for_the_pool_that_has_the_sink_and_every_shell_says_so(shop: Service) -> None:
    """It is killed, not stopped, after it has declared the sink."""
    pool(shop, SINKS=SINK).kill()
    pool(shop)
    (order,) = shop.issue()
    shop.post(shop.event(order))
    shop.wait_fetched(order)

    assert [shop.cli("orders", "explain", order)[0] for _ in range(2)] == [1, 1]
    eventually(lambda: shop.cli("status")[1][0]["undeclared"] == [SINK], 20, what="status names the sink")

    pool(shop, SINKS=SINK)
    code, _ = shop.cli("events", "replay", "--since", "1h", "--to-sinks", SINK, "--yes")
    wait_delivered(shop, [order])
    assert code == 0
    # The pool's start and the replay each cause a delivery.
    eventually(lambda: shop.cli("orders", "explain", order)[0] == 0, what="explain says complete")


@pytest.mark.parametrize("runs", [True, False], ids=["while_a_pool_runs", "while_none_runs"])
def test_another_deployment_on_the_same_redis_is_refused_by_name(bare: Service, *, runs: bool) -> None:
    """And the owner starts again, also after its only pool was killed."""
    others = [
        {"NP_TENANT": "00000000-0000-4000-8000-00000000000a"},
        {"NP_ENVIRONMENT": "Sandbox2"},
        {"NP_COMPANY_ID": "00000000-0000-4000-8000-00000000000b"},
    ]
    ours = pool(bare)
    if not runs:
        ours.kill()

    started = [bare.launch(name, PORT=str(free_port()), **change) for change in others for name in ("worker", "web")]
    refused = {process.wait(20) for process in started}
    checked = [bare.cli("check", **change) for change in others]

    assert (refused, {code for code, _ in checked}) == ({5}, {1})
    reasons = [line["reason"] for name in ("worker", "web") for line in bare.log(name, "service.other_deployment")]
    reasons += [one["detail"] for _, found in checked for one in found if one["what"] == "deployment"]
    assert len(reasons) == 3 * len(others)
    assert all("KEY_PREFIX" in reason and "another deployment" in reason for reason in reasons)
    pool(bare)
    assert bare.cli("status")[0] == 0
    assert runs == (ours.exit_code is None)


def test_a_pool_with_another_address_of_the_api_starts_once_all_others_have_stopped(bare: Service) -> None:
    """Half of the orders would come from elsewhere; web fetches nothing, and starts with any address."""
    first, other = pool(bare), {"NP_BASE_URL": bare.sandbox.url.replace("127.0.0.1", "localhost")}

    assert bare.launch("worker", **other).wait(20) == 5
    assert f"its orders come from {bare.sandbox.url}" in bare.log("worker", "service.other_deployment")[0]["reason"]
    assert [one["level"] for one in bare.cli("check", **other)[1] if one["what"] == "deployment"] == ["todo"]
    bare.start("web", **other)
    first.kill()
    pool(bare, **other)  # at once, though the last heartbeat of the killed pool is fresh
    (order,) = bare.issue()
    bare.post(bare.event(order))
    bare.wait_fetched(order)


def test_a_rolling_change_is_not_refused(museum_and_zoo: Service) -> None:
    """A company and a sink are added, and the version of the API changes."""
    (museum_and_zoo.folder / "shop.py").write_text("def on_order(order, context): pass\n")
    first = pool(museum_and_zoo, COMPANIES_FILE="museum.toml")

    second = pool(museum_and_zoo, SINKS=SINK, NP_API_VERSION="2026-09-01")

    ((_, words),) = museum_and_zoo.cli("status")[1][0]["pools_differ"].items()
    assert words[:2] == ["no company zoo", f"no sink {SINK}"]
    assert words[2].startswith("upstream http://127.0.0.1")
    first.stop()
    orders = post(museum_and_zoo, "Museum", 2) + post(museum_and_zoo, "Zoo", 2)
    wait_delivered(museum_and_zoo, orders)
    assert second.exit_code is None
    assert museum_and_zoo.cli("status")[1][0]["pools_differ"] == {}


def test_two_deployments_with_two_prefixes_share_one_redis(bare: Service) -> None:
    """They have the same company, and so the same orders."""
    orders = bare.issue(5)
    contents: dict[str, dict[bytes, bytes]] = {}
    with Redis.from_url(bare.valkey.url) as client:
        redis: Any = client

        def lasting(prefix: str) -> dict[bytes, bytes]:
            names = redis.keys(f"{prefix}:*")
            return {name: redis.dump(name) for name in names if not 0 <= redis.pttl(name) < 60_000}

        for prefix in ("first", "second"):
            bare.variables["KEY_PREFIX"] = prefix
            web, worker = bare.start("web"), pool(bare)
            assert bare.post(*map(bare.event, orders))[1]["queued"] == 5
            eventually(lambda: bare.cli("status")[1][0]["due"] == 0, 20, what="all are fetched")
            assert [bare.cli("orders", "explain", order)[0] for order in orders] == [0] * 5
            assert bare.cli("check")[1][0]["level"] != "wrong"
            assert (web.stop(), worker.stop()) == (0, 0)
            contents[prefix] = lasting(prefix)

        assert lasting("first") == contents["first"]
        assert {name.split(b":")[0] for name in redis.scan_iter()} == {b"first", b"second", b"rq"}
        queues = {f"rq:queue:{prefix}-live".encode() for prefix in contents}
        assert queues <= redis.smembers("rq:queues")
    assert [bare.row(order)["gets"] for order in orders] == [2] * 5


def test_two_deployments_with_two_prefixes_run_at_once(bare: Service) -> None:
    """One has a company that the other does not know: neither takes a job of the other."""
    ours = pool(bare)
    other = {"KEY_PREFIX": "other", "NP_COMPANY": "Other", "NP_COMPANY_ID": bare.company_id_of("Other")}
    theirs = pool(bare, **other)
    mine, yours = bare.issue(20), bare.issue(20, other["NP_COMPANY_ID"])
    bare.start("web")
    assert bare.post(*map(bare.event, mine))[1]["queued"] == 20
    bare.variables |= other | {"PORT": str(free_port())}
    bare.start("web")
    events = (bare.event(order, companyId=other["NP_COMPANY_ID"]) for order in yours)
    assert bare.post(*events)[1]["queued"] == 20

    def fetched() -> set[str]:
        return {line["order_id"] for line in bare.log("worker", "order.fetched")}

    eventually(lambda: fetched() == {*mine, *yours}, 10, what="every order is fetched by its own deployment")

    assert bare.log("worker", "job.returned") == bare.log("worker", "fetch.deferred") == []
    assert (ours.exit_code, theirs.exit_code) == (None, None)
