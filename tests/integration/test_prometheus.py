"""A real Prometheus scrapes a web process: every panel of the board has data, and every rule can be evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import yaml  # type: ignore[import-untyped]  # it comes with uvicorn, without types

from app.alerts import AlertStore
from app.api.keys import ApiKeys
from app.dev.processes import Process, free_port
from app.heartbeat import Heartbeat
from app.ledger.redis import Redis
from app.ledger.rq_jobs import sink_queue
from app.metrics import HISTOGRAMS, METRICS, add, record_whole_list
from app.snapshot import SnapshotReader
from tests.board import DEPLOY, expressions
from tests.eventually import eventually
from tests.lab import KEYS, VENUE, Lab, company, configuration, order
from tests.programs import program
from tests.service import OPS_TOKEN, serving, settings_of_one_company
from workers.background import log_alerts

SINK = "shop"


@contextmanager
def scraping(folder: Path, port: int) -> Iterator[httpx.Client]:
    """Run a Prometheus that scrapes this port; yield a client of its HTTP API."""
    target = {
        "job_name": "ota",
        "authorization": {"credentials": OPS_TOKEN},
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    often = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    whole = {"global": often, "rule_files": [str(DEPLOY / "alerts.yml")], "scrape_configs": [target]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(whole))
    address = f"127.0.0.1:{free_port()}"
    argv = [program("prometheus", "prometheus"), f"--web.listen-address={address}", "--log.level=warn"]
    argv += [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (
        Process.start(argv, cwd=folder, log=folder / "prometheus.log"),
        httpx.Client(base_url=f"http://{address}/api/v1/", trust_env=False) as http,
    ):
        yield http


def count_everything(redis: Redis) -> None:
    """Count something in each counter and histogram of the venue."""
    counters = {prefix: labels for prefix, (_, labels, _) in METRICS.items()}
    histograms = {prefix: one.labels for prefix, one in HISTOGRAMS.items()}
    for prefix, labels in (counters | histograms).items():
        values = [VENUE if label == "company" else SINK if label == "sink" else "200" for label in labels]
        names = [(prefix, *values)]
        if prefix in histograms:
            names = [(prefix, *values, name) for name in (str(HISTOGRAMS[prefix].bounds[2]), "sum")]
        add(redis, dict.fromkeys(names, 3))


def state_of_everything(lab: Lab) -> None:
    """Let each gauge have a value, and an alert fire."""
    lab.accept_and_fetch(order(1))
    lab.accept(order(2))
    queues = ("live", "backfill", sink_queue(SINK))
    beat = Heartbeat("machine", 1, "", [f"p-{name}-1" for name in queues], lab.now, 0, configuration((SINK,), "venue"))
    lab.redis.hset(KEYS.pools, "p", msgspec.json.encode(beat))
    lab.redis.hset(KEYS.subscription(VENUE), "state", "missing")
    record_whole_list(lab.redis, VENUE, lab.now)
    ApiKeys(lab.redis).create("desk", ("feed",))
    snapshot = SnapshotReader([company("venue", VENUE, "Venue")]).read(lab.redis)
    log_alerts(AlertStore(lab.redis), snapshot, 1800)


def test_every_panel_has_data_and_every_rule_is_evaluated(shop: Lab, redis_url: str, tmp_path: Path) -> None:
    program("prometheus", "prometheus")
    shop.now = None
    settings = settings_of_one_company(redis_url) | {
        "NP_COMPANY_ID": VENUE,
        "NP_COMPANY": "Venue",
        "NP_TENANT": "tenant",
        "NP_ENVIRONMENT": "Sandbox",
        "NP_PARTNER_ID": "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e",
        "OPS_TOKEN": OPS_TOKEN,
        "SPOOL_DIR": str(tmp_path / "spool"),
    }
    # Prometheus first: it does not scrape in its first 5 seconds, whatever the interval.
    port = free_port()
    with scraping(tmp_path, port) as http, serving(tmp_path, settings, port=port):
        state_of_everything(shop)

        def value(expression: str) -> list[Any]:
            try:
                answer = http.get("query", params={"query": expression})
            except httpx.TransportError:
                return []
            found: list[Any] = answer.json()["data"]["result"] if answer.status_code == 200 else []
            return found

        count_everything(shop.redis)
        eventually(lambda: value("ota_orders_broken_total"), what="a scrape")
        count_everything(shop.redis)
        eventually(lambda: value("rate(ota_orders_broken_total[10s]) > 0"), what="two scrapes")

        empty = [name for name, one in expressions("10s").items() if not value(one) or "NaN" in json.dumps(value(one))]
        assert empty == []
        (group,) = http.get("rules").json()["data"]["groups"]
        assert [rule["name"] for rule in group["rules"] if rule["health"] != "ok"] == []
        assert "OtaSubscription" in [rule["name"] for rule in group["rules"] if rule["state"] == "firing"]
