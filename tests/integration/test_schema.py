"""Data of a newer version of ours: whoever finds it says so and touches nothing, and nobody else has a key to mind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.errors import NotRecorded, OtherSchema
from app.ledger import keys
from app.ledger.redis import VERSION
from app.ledger.work import Delivery
from tests.integration.desk import Desk, open_desk, order
from tests.integration.ledger_model.stage import ONE, SAME_ID, Stage, staged
from tests.integration.webserver import COMPANY, HOOK, OPS_TOKEN, SECRET, serving

NEWER = str(VERSION + 1)


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client, "shop") as opened:
        yield opened


def everything(redis: Redis) -> dict[bytes, bytes | None]:
    names: Any = redis.keys("*")
    return {name: redis.dump(name) for name in names}


@pytest.mark.parametrize("write", [Stage.settle, Stage.request, Stage.dispatch])
def test_the_first_writer_notes_the_version_also_after_a_flush(stage: Stage, write: Callable[[Stage], object]) -> None:
    for _ in range(2):
        write(stage)
        assert stage.redis.get(keys.SCHEMA) == str(VERSION).encode()
        stage.redis.flushall()


def test_the_first_writer_of_all_notes_the_version(stage: Stage) -> None:
    stage.settle()

    assert stage.redis.get(keys.SCHEMA) == str(VERSION).encode()


def test_data_of_an_older_version_is_refused_with_what_to_do(stage: Stage) -> None:
    stage.redis.set(keys.SCHEMA, VERSION - 1)

    with pytest.raises(NotRecorded, match="other_schema"):
        stage.settle()
    with pytest.raises(OtherSchema, match="use an empty Redis"):
        stage.start()

    assert stage.redis.keys() == [keys.SCHEMA.encode()]


def test_it_costs_one_get_a_post_however_many_events_it_has(stage: Stage) -> None:
    stage.settle()
    stage.redis.config_resetstat()

    stage.hear_at_once(*((ONE, str(number)) for number in range(20)))

    assert stage.redis.info("commandstats")["cmdstat_get"]["calls"] == 1


@pytest.mark.parametrize("held", [NEWER, "99", "not a number"])
def test_on_newer_data_no_event_is_recorded(stage: Stage, held: str) -> None:
    stage.settle()
    stage.redis.set(keys.SCHEMA, held)
    before = everything(stage.redis)

    with pytest.raises(NotRecorded, match="other_schema"):
        stage.settle(SAME_ID)

    assert everything(stage.redis) == before


DELIVERY = Delivery("shop", 1, 1, 0, "request", "digest")
STEPS: dict[str, Callable[[Stage], object]] = {
    "start_fetch": lambda stage: stage.start("w2"),
    "acquire_delivery": lambda stage: stage.acquire(),
    "complete_delivery": lambda stage: stage.complete(DELIVERY),
    "dispatch_due": lambda stage: stage.dispatch(),
    "request_fetch": lambda stage: stage.request(),
    "release_worker": lambda stage: stage.ledger.release_worker("nobody", "ended", [ONE]),
    "retry_delivery": lambda stage: stage.ledger.retry_delivery(ONE, "shop"),
}


@pytest.mark.parametrize("step", STEPS)
def test_on_newer_data_no_worker_ticker_or_command_writes(stage: Stage, step: str) -> None:
    stage.settle()
    fetch = stage.fetch()
    stage.later(3600)
    stage.redis.set(keys.SCHEMA, NEWER)
    before = everything(stage.redis)

    with pytest.raises(OtherSchema, match=f"version {NEWER}"):
        STEPS[step](stage)
    with pytest.raises(OtherSchema):
        stage.store(fetch, 1)
    with pytest.raises(OtherSchema):
        stage.fail(fetch, "retry")

    assert everything(stage.redis) == before


class TestCommands:
    @pytest.fixture
    def desk(self, redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
        desk = open_desk(redis_client, redis_url, tmp_path)
        desk.hear(order(1))
        redis_client.set(keys.SCHEMA, NEWER)
        return desk

    @pytest.mark.parametrize(
        "arguments",
        [("orders", "list"), ("events", "replay", "--since", "1h", "--yes"), ("dead", "requeue", "--all", "--yes")],
        ids=" ".join,
    )
    def test_a_command_ends_with_one_line_and_exit_code_4(self, desk: Desk, arguments: tuple[str, ...]) -> None:
        before = everything(desk.redis)

        ended = desk.run(*arguments)

        assert (ended.code, ended.out, len(ended.err.splitlines())) == (4, "", 1)
        assert f"version {NEWER}" in ended.err
        assert everything(desk.redis) == before

    def test_check_says_what_to_do(self, desk: Desk) -> None:
        ended = desk.run("check", "--json")

        (found,) = [one for one in ended.objects if one["what"] == "schema"]
        assert (ended.code, found["level"]) == (1, "todo")
        assert "newer version" in found["detail"]
        assert "Upgrade" in found["advice"]

    def test_health_of_a_worker_says_so(self, desk: Desk) -> None:
        ended = desk.run("health", "--role", "worker")

        assert ended.code == 1
        assert f"version {NEWER}" in ended.out


def test_the_web_process_starts_and_answers_503_until_the_data_is_its_own_again(
    redis_client: Redis, redis_url: str, tmp_path: Path
) -> None:
    """The sender keeps its events; no event is half recorded in a layout that nobody here knows."""
    redis_client.set(keys.SCHEMA, NEWER)
    settings = {
        "REDIS_URL": redis_url,
        "CLIENT_STATE": SECRET,
        "NP_API_KEY": "key",
        "NP_TENANT": "tenant",
        "NP_ENVIRONMENT": "Production",
        "NP_COMPANY": "CRONUS",
        "NP_COMPANY_ID": COMPANY,
        "OPS_TOKEN": OPS_TOKEN,
    }
    item = {
        "clientState": SECRET,
        "companyId": COMPANY,
        "eventName": "ota_cm_order_processed",
        "payload": {"orderId": ONE.order_id, "buyFromOrderReference": "CM-1", "status": "Issued"},
        "timestamp": "2026-05-15T09:30:05Z",
    }
    with serving(tmp_path, settings) as web:
        refused = web.http.post(HOOK, content=json.dumps({"values": [item]}))
        readyz = web.http.get("/readyz", headers={"authorization": f"Bearer {OPS_TOKEN}"})

        assert (refused.status_code, refused.json()["reason"], refused.headers["retry-after"]) == (
            503,
            "other_schema",
            "5",
        )
        assert web.http.get("/healthz").status_code == 200
        assert (readyz.status_code, readyz.json()["state"]) == (503, "not ready")
        assert [one["check"] for one in readyz.json()["checks"] if not one["ok"]] == ["schema"]
        assert not redis_client.exists(keys.EVENTS)

        redis_client.set(keys.SCHEMA, VERSION)
        assert web.deliver(item)["queued"] == 1
