"""Dead letters are requeued on the ops page, in real processes and to the sink; and how fast its pages are."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import httpx
import pytest

from app.ids import OrderKey
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.redis import Redis
from tests.benchmarks import ops_pages
from tests.eventually import eventually
from tests.service import Service, as_another, service

ORDERS = 6


def test_dead_letters_are_requeued_from_the_form_to_the_sink(bare: Service) -> None:
    bare.variables |= {
        "OPS_TOKEN": "token-to-read",
        "OPS_ACT_TOKEN": "a-token-to-act-by",
        "SINKS": "python:operator:is_",
    }
    orders = [OrderKey(bare.company_id, order_id) for order_id in bare.issue(ORDERS)]
    bare.start("web")
    bare.start("ops")
    assert bare.post(*(bare.event(one.order_id) for one in orders))[1]["queued"] == ORDERS
    with Redis.from_url(bare.valkey.url) as redis:
        ledger = Ledger(redis, order_days=400, fetch_lease=policy.MINUTE, sinks=["python:operator:is_"])
        for one in orders:
            fetch = ledger.start_fetch(one, "worker").fetch
            assert fetch is not None
            ledger.fail_fetch(one, "worker", fetch, outcome="dead", reason="http_400", http_status=400)
        url = f"http://127.0.0.1:{bare.variables['OPS_PORT']}"
        hooks = {"request": [as_another]}
        with httpx.Client(base_url=url, auth=("Ada", "a-token-to-act-by"), trust_env=False, event_hooks=hooks) as http:
            form = dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', http.get("/dead/plan").text))
            fields = {name: unescape(text) for name, text in form.items()} | {"why": "the venue is back", "rate": "20"}
            made = http.post("/dead/plan", data=fields, headers={"origin": url, "sec-fetch-site": "same-origin"})
            assert made.status_code == 303
            bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1")

            eventually(lambda: len(bare.log("worker", "delivery.succeeded")) == ORDERS, 20, what="all are delivered")

            assert sorted(one.order_id for one in orders) == sorted(
                line["order_id"] for line in bare.log("worker", "delivery.succeeded")
            )
            shown = re.sub(r"<[^>]+>|\s+", " ", http.get(made.headers["location"]).text)
            assert re.search(r"done +6 of 6 .*Ada .*the venue is back", shown)


@pytest.mark.nightly
def test_every_page_is_fast_and_small(tmp_path: Path) -> None:
    """The benchmark in small, by CPU time, as other tests run beside it: with a million events it is run by hand."""
    with service(tmp_path) as one:
        measured = list(ops_pages.measure(one, 20_000))

    assert [found.page for found in measured if not found.succeeded] == []
    assert [(found.page, found.cpu_ms) for found in measured if found.cpu_ms > ops_pages.MOST_MS] == []
    assert [(found.page, found.size) for found in measured if found.size > ops_pages.MOST_KB * 1000] == []
