"""The main job: an event arrives, and moments later its order is stored, fetched once."""

from __future__ import annotations

import json
import os
import re
import shlex
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.dev.processes import Process
from app.dev.sandbox.submission import order_body
from app.dev.stack import ENVIRONMENT, PARTNER_ID, TENANT
from app.ledger.rq_jobs import sink_queue
from tests import command
from tests.eventually import eventually
from tests.service import OPS_TOKEN, ROOT, Service, ask

FIELDS = ("status", "wallets", "tickets", "coupons", "manifest", "revision")


def test_a_settled_order_is_fetched_with_all_its_contents_for_one_get_order(whole: Service) -> None:
    """createOrder, event, POST, job, getOrder, stored record, one log line, `orders show`."""
    order_id = whole.create("MAIN-1", "31001", "PKG-100")
    (line,) = whole.wait_fetched(order_id)

    assert [line[name] for name in FIELDS] == ["Issued", 2, 2, 1, True, 1]
    request = next(r for r in whole.log("web", "request") if r["request_id"] == line["request_id"])
    assert (request["status"], request["queued"]) == (200, 1)
    assert whole.row(order_id)["gets"] == 1

    code, shown = whole.cli("orders", "show", order_id)
    assert (code, shown[0]["state"], shown[0]["status"]) == (0, "fetched", "Issued")


def test_a_draft_has_tickets_without_a_manifest_and_an_error_has_neither(whole: Service) -> None:
    draft = whole.create("MAIN-2", "31001", payment="")
    error = whole.create("MAIN-3", "FAIL-1")
    found = [tuple(whole.wait_fetched(one)[0][name] for name in FIELDS) for one in (draft, error)]

    assert found == [("Draft", 1, 1, 0, False, 1), ("Error", 1, 0, 0, False, 1)]


def test_a_replaced_order_settles_again_and_costs_one_more_get_order(whole: Service) -> None:
    """replaceOrder repairs an Error order: same orderId, second event, second revision."""
    order_id = whole.create("MAIN-4", "FAIL-1")
    whole.wait_fetched(order_id)
    body = order_body(PARTNER_ID, "MAIN-4", payment_reference="PAY-1")
    assert ask("PUT", whole.api(f"channelManager/{order_id}"), body, whole.key)[0] == 200

    fetched = whole.wait_fetched(order_id, times=2)

    assert [(one["status"], one["revision"]) for one in fetched] == [("Error", 1), ("Issued", 2)]
    assert whole.row(order_id)["gets"] == 2


def test_the_same_event_again_never_causes_a_second_get_order(whole: Service) -> None:
    order_id = whole.create("MAIN-5", "31001")
    whole.wait_fetched(order_id)
    whole.admin("POST", "fire", {"order_id": order_id, "times": 5, "timestamp": "last"})

    requests = partial(whole.log, "web", "request")
    eventually(lambda: sum(one.get("duplicates", 0) for one in requests()) == 5, 10, what="five duplicates")
    whole.wait_fetched(whole.create("MAIN-6", "31001"))
    assert whole.row(order_id)["gets"] == 1


def test_a_python_sink_gets_the_order_again_with_the_same_key_after_it_raised(bare: Service) -> None:
    """The repeat costs no getOrder."""
    (bare.folder / "shop.py").write_text(
        "import json, logging, pathlib\n"
        "def on_order(order, context):\n"
        f"    path = pathlib.Path({str(bare.folder / 'sink.jsonl')!r})\n"
        "    line = [context.idempotency_key, context.attempt, order.status, len(order.tickets)]\n"
        "    with path.open('a') as out: out.write(json.dumps(line) + chr(10))\n"
        "    print('attempt', context.attempt)\n"
        "    logging.getLogger('shop').warning('half done')\n"
        "    if context.attempt == 1: raise RuntimeError(order.sell_to_name)\n"
    )
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0", SINKS="python:shop:on_order")
    bare.subscribe()
    order_id = bare.create("SINK-1", "31001")

    delivered = eventually(lambda: bare.log("worker", "delivery.succeeded"), 20, what="the second attempt succeeds")

    calls = [json.loads(line) for line in (bare.folder / "sink.jsonl").read_text().splitlines()]
    key = calls[0][0]
    assert re.fullmatch(f"{bare.company_id}/{order_id}/1/[0-9a-f]{{12}}", key)
    assert calls == [[key, 1, "Issued", 1], [key, 2, "Issued", 1]]
    assert (delivered[0]["order_id"], delivered[0]["revision"]) == (order_id, 1)
    assert bare.row(order_id)["gets"] == 1
    assert "Jane Doe" not in (bare.folder / "worker.log").read_text()
    assert "failed: RuntimeError at shop.py:8 after" in json.dumps(bare.cli("orders", "explain", order_id)[1])
    printed, logged = bare.log("worker", "sink.output"), bare.log("worker", "half done")
    assert [one["text"] for one in printed] == ["attempt 1", "attempt 2"]
    (request,) = {one["request_id"] for one in bare.log("web", "request") if one.get("events")}
    about = [(one["order_id"], one["sink"], one["request_id"]) for one in (*printed, *logged)]
    assert about == [(order_id, "python:shop:on_order", request)] * 4


def test_the_commands_of_the_first_day_lead_from_env_example_to_an_order_in_a_sink(
    bare: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/first-day.md has them, with the addresses and the key of the sandbox."""
    monkeypatch.chdir(bare.folder)
    page = (ROOT / "docs" / "first-day.md").read_text(encoding="utf-8")
    shell, order, code = (_block(page, kind) for kind in ("sh", "json", "python"))
    sinks = re.findall(r"`SINKS=(\S+)`", page)
    key, env = bare.key, (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in [name for name in bare.variables if re.search(f"^{name}=", env, re.MULTILINE)]:
        env = re.sub(f"^{name}=.*", f'{name}="{bare.variables.pop(name)}"', env, flags=re.MULTILINE)
    Path(".env").write_text(env)
    Path("mypackage").mkdir()
    Path("mypackage/orders.py").write_text(code)
    log = partial(Path("worker.log").read_text)

    ended: list[tuple[str, int, int]] = []
    pools: list[Process] = []
    for line in shell.splitlines():
        match shlex.split(line.replace("https://hooks.example.com", bare.web_url)):
            case ["ota-receiver", "serve"]:
                bare.start("web")
            case ["ota-receiver", "worker"]:
                changed = {"SINKS": sinks[0]} if pools else {}
                assert [pool.stop() for pool in pools] in ([], [0])
                pools = [bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1", **changed)]
            case ["ota-receiver", "ops"]:
                bare.start("ops", OPS_TOKEN=OPS_TOKEN)
                search = f"http://127.0.0.1:{bare.variables['OPS_PORT']}/search?q=FIRST-DAY-1"
                found = httpx.get(search, auth=("Ada", OPS_TOKEN), follow_redirects=True, trust_env=False)
                assert (found.status_code, found.url.path[:8]) == (200, "/orders/")
            case ["curl", url]:
                assert ask("GET", url) == (200, "hello")
            case ["curl", "-H", _, "-d", "@order.json", url]:
                assert ask("POST", bare.api(url.rpartition("/")[2]), json.loads(order), key)[0] == 201
                eventually(lambda: "order.fetched" in log(), what="the order is fetched")
            case ["ota-receiver", *words] if words != ["events", "tail"]:
                one = command.run(words, os.environ | bare.variables, "")
                ended.append((" ".join(words[:2]), one.code, one.out.count("✗")))
                if "--to-sinks" in words:
                    eventually(lambda: "delivery.succeeded" in log(), what="the sink has the order")

    assert ended == [
        ("check", 1, 1),
        ("subscription create", 0, 0),
        ("check", 0, 0),
        ("orders explain", 0, 0),
        ("events replay", 0, 0),
        ("orders explain", 0, 0),
    ]
    assert re.search(r'"event":"sink.output".*"text":"[0-9a-f/-]+ Issued 1"', log())


def _block(page: str, kind: str) -> str:
    """Return the lines of all blocks of this kind."""
    return "".join(re.findall(rf"^```{kind}\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def test_a_sink_that_hangs_for_every_order_delays_neither_fetches_nor_another_sink(bare: Service) -> None:
    """Its own orders wait, and go on where they were when it works again."""
    (bare.folder / "shop.py").write_text(
        "import os, time\n"
        "def hangs(order, context):\n    while os.path.exists('hang'): time.sleep(0.02)\n"
        "def works(order, context): pass\n"
    )
    hang, names = bare.folder / "hang", ("python:shop:hangs", "python:shop:works")
    hang.touch()
    bare.variables["SINKS"] = ",".join(names)
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0", SINK_WORKERS="1")
    orders = bare.issue(20)
    assert bare.post(*(bare.event(one) for one in orders))[0] == 200

    def delivered(name: str) -> int:
        return sum(line["sink"] == name for line in bare.log("worker", "delivery.succeeded"))

    eventually(lambda: delivered(names[1]) == 20, 10, what="the other sink has all")
    assert (len(bare.log("worker", "order.fetched")), delivered(names[0])) == (20, 0)
    assert [one["behind"] for one in bare.cli("status")[1][0]["sinks"]] == [20, 0]
    hang.unlink()
    eventually(lambda: delivered(names[0]) == 20, 10, what="this sink has all")


def test_a_replay_to_sinks_costs_no_get_order_and_no_worker_that_fetches(bare: Service) -> None:
    """The sink gets the same idempotency key again."""
    calls = bare.folder / "calls"
    (bare.folder / "shop.py").write_text(
        "def on_order(order, context):\n"
        f"    with open({str(calls)!r}, 'a') as out: out.write(context.idempotency_key + chr(10))\n"
    )
    bare.variables["SINKS"] = "python:shop:on_order"
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")
    orders = bare.issue(3)
    assert bare.post(*(bare.event(one) for one in orders))[0] == 200
    eventually(lambda: len(bare.log("worker", "delivery.succeeded")) == 3, 20, what="three orders are delivered")
    once = sorted(calls.read_text().splitlines())

    code, (sent,) = bare.cli(
        "events", "replay", "--since", "1h", "--to-sinks", "all", "--rate", "100", "--yes", "--json"
    )
    eventually(lambda: len(bare.log("worker", "delivery.succeeded")) == 6, 20, what="three orders are delivered again")

    assert (code, sent["queued"]) == (0, 3)
    assert sorted(calls.read_text().splitlines()) == sorted(once * 2)
    assert [bare.row(one)["gets"] for one in orders] == [1, 1, 1]
    workers = {line["worker"] for line in bare.log("worker", "delivery.succeeded")}
    assert all(f"-{sink_queue('python:shop:on_order')}-" in worker for worker in workers)

    code, (sent,) = bare.cli("events", "replay", "--since", "1h", "--force", "--rate", "100", "--yes")
    eventually(lambda: len(bare.log("worker", "order.fetched")) == 6, 20, what="three orders are fetched again")

    assert (code, sent["queued"]) == (0, 3)
    fetched = bare.log("worker", "order.fetched")
    assert [line["queue"] for line in fetched] == ["live"] * 3 + ["backfill"] * 3
    assert [(line["changed"], line["revision"]) for line in fetched[3:]] == [(False, 1)] * 3
    assert sorted(calls.read_text().splitlines()) == sorted(once * 2), "unchanged content is not delivered again"


def test_eight_workers_share_the_five_slots_of_a_key_without_a_429(bare: Service) -> None:
    """The first calls take a second, so that five are open at once however slow the machine is."""
    bare.admin("PATCH", "settings", {"latency_ms": 1000, "queue": 0})
    bare.start("web")
    assert bare.post(*map(bare.event, bare.issue(60)))[0] == 200
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="0")

    eventually(lambda: bare.admin("GET", "stats")["active"] == 5, 20, what="five calls are open at once")
    bare.admin("PATCH", "settings", {"latency_ms": 30})
    eventually(lambda: len(bare.log("worker", "order.fetched")) == 60, 20, what="60 orders are fetched")

    stats = bare.admin("GET", "stats")
    assert sum(stats["throttled"].values()) == 0
    assert stats["most_active"] == 5
    assert [row["gets"] for row in bare.admin("GET", "orders")] == [1] * 60


def test_what_is_replayed_is_fetched_without_backfill_workers(bare: Service) -> None:
    """Else its jobs would wait for ever: the live workers take them."""
    bare.start("web")
    bare.start("worker", WORKERS="1", BACKFILL_WORKERS="0")
    orders = bare.issue(3)
    assert bare.post(*map(bare.event, orders))[0] == 200
    eventually(lambda: len(bare.log("worker", "order.fetched")) == 3, 20, what="three orders are fetched")

    code, (sent,) = bare.cli("events", "replay", "--since", "1h", "--force", "--rate", "100", "--yes")
    eventually(lambda: len(bare.log("worker", "order.fetched")) == 6, 20, what="they are fetched again")

    assert (code, sent["queued"]) == (0, 3)
    assert [line["queue"] for line in bare.log("worker", "order.fetched")[3:]] == ["backfill"] * 3


def test_one_order_that_is_always_refused_delays_no_other(bare: Service) -> None:
    """Half of the 120 others once waited 8 s for a breaker that the one order had opened."""
    orders = bare.issue(121)
    bare.admin("POST", "faults", {"kind": "status", "status": 403, "operation": "getOrder", "order_id": orders[0]})
    bare.start("web")
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="1")
    for first in range(0, len(orders), 11):
        assert bare.post(*map(bare.event, orders[first : first + 11]))[0] == 200

    eventually(lambda: len(bare.log("worker", "order.fetched")) == 120, 20, what="120 orders are fetched")

    assert bare.log("worker", "upstream.breaker_opened") == []
    posted = {line["request_id"]: _seconds(line) for line in bare.log("web", "request")}
    waited = sorted(_seconds(line) - posted[line["request_id"]] for line in bare.log("worker", "order.fetched"))
    assert waited[60] < 6
    _, (shown,) = bare.cli("orders", "show", orders[0])
    assert (shown["error"], shown["http_status"], shown["dead"]) == ("forbidden", 403, "")


@pytest.mark.nightly
def test_an_outage_that_speaks_400_and_pages_makes_no_dead_letter(bare: Service) -> None:
    """It lasts until the breaker has opened; then all orders are fetched, none with an attempt less.

    Most of a minute of waits; the short form is in test_upstream_outages.py, for each kind of outage.
    """
    bare.admin(
        "PUT",
        "faults",
        [
            {"kind": "status", "status": 400, "code": "generic_error", "operation": "getOrder", "rate": 0.5},
            {"kind": "rubbish", "operation": "getOrder"},
        ],
    )
    bare.start("web")
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="1")
    orders = bare.issue(40)
    assert bare.post(*map(bare.event, orders))[0] == 200
    (opened,) = eventually(lambda: bare.log("worker", "upstream.breaker_opened"), 20, what="the breaker opens")
    assert opened["reason"] in {"bad_request", "unreadable_answer"}
    assert bare.cli("status")[1][0]["breakers"][0]["reason"] == opened["reason"]
    bare.admin("DELETE", "faults")

    eventually(lambda: len(bare.log("worker", "order.fetched")) == 40, 90, what="40 orders are fetched")

    assert bare.log("worker", "order.dead_lettered") == bare.log("worker", "fetch.retry_scheduled") == []


def _seconds(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def test_a_sink_that_cannot_be_imported_ends_the_pool_with_the_code_of_wrong_settings(bare: Service) -> None:
    """Before any worker starts; the reason names the folders that were searched, as in `check`."""
    bare.variables["SINKS"] = "python:no_such_shop:on_order"
    worker = bare.run(["ota-receiver", "worker"], "worker.log")

    assert worker.wait(20) == 2
    (line,) = bare.log("worker", "service.bad_settings")
    (problem,) = line["problems"]
    reason = "SINKS: number 1 cannot be imported: no module no_such_shop in /"
    assert problem.startswith(reason)
    assert str(bare.folder) in problem
    assert bare.log("worker", "pool.worker_started") == []
    (started,) = bare.log("worker", "service.started")
    assert _seconds(line) - _seconds(started) < 5
    code, (found,) = bare.cli("check")
    assert (code, found["detail"].startswith(reason)) == (2, True)


def test_an_order_is_fetched_in_5_s_while_another_company_hangs_with_200_orders_due(bare: Service) -> None:
    """The second company has its own key and so its own limits."""
    hanging, healthy = bare.company_id_of("Hanging"), bare.company_id_of("Healthy")
    bare.admin("POST", "faults", {"kind": "hang", "operation": "getOrder", "company_id": hanging})
    (bare.folder / "companies.toml").write_text(
        "".join(
            f'[companies.{name.lower()}]\nnp_company_id = "{company_id}"\nnp_company = "{name}"\n'
            f'np_tenant = "{TENANT}"\nnp_environment = "{ENVIRONMENT}"\nnp_api_key = "key of {name}"\n'
            f'client_state = "secret of {name}"\n'
            for name, company_id in (("Hanging", hanging), ("Healthy", healthy))
        )
    )
    several = {name: value for name, value in bare.variables.items() if name in {"REDIS_URL", "PORT", "LOG_FORMAT"}}
    bare.variables = several | {"COMPANIES_FILE": str(bare.folder / "companies.toml"), "NP_BASE_URL": bare.sandbox.url}
    bare.start("web")
    orders = bare.issue(200, hanging)
    assert bare.post(*(bare.event(o, clientState="secret of Hanging", companyId=hanging) for o in orders))[0] == 200
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="0")
    eventually(lambda: bare.admin("GET", "stats")["active"] == 5, 10, what="five getOrders of the first company hang")

    (order_id,) = bare.issue(1, healthy)
    assert bare.post(bare.event(order_id, clientState="secret of Healthy", companyId=healthy))[0] == 200

    bare.wait_fetched(order_id, within=5)
