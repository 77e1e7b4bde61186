"""Data of another schema version is refused by name and not changed, by web, workers and commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from app.errors import NotRecorded, OtherSchema
from app.ledger import keys
from app.ledger.redis import VERSION
from app.ledger.work import Delivery
from tests.integration.desk import Desk, open_desk, order
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario, event_of
from tests.integration.webserver import OPS_TOKEN, item, serving, settings_of_one_company

NEWER = str(VERSION + 1)


def everything(redis: Redis) -> dict[bytes, bytes | None]:
    names: Any = redis.keys("*")
    return {name: redis.dump(name) for name in names}


@pytest.mark.parametrize("write", [Scenario.settle, Scenario.request, Scenario.dispatch])
def test_the_first_writer_notes_the_version_also_after_a_flush(
    shop: Scenario, write: Callable[[Scenario], object]
) -> None:
    for _ in range(2):
        write(shop)
        assert shop.redis.get(keys.SCHEMA) == str(VERSION).encode()
        shop.redis.flushall()


def test_data_of_an_older_version_is_refused_with_advice(shop: Scenario) -> None:
    shop.redis.set(keys.SCHEMA, VERSION - 1)

    with pytest.raises(NotRecorded, match="other_schema"):
        shop.settle()
    with pytest.raises(OtherSchema, match="use an empty Redis"):
        shop.start()

    assert shop.redis.keys() == [keys.SCHEMA.encode()]


def test_the_check_costs_one_get_per_post(shop: Scenario) -> None:
    shop.settle()
    shop.redis.config_resetstat()

    shop.accept_batch(*(event_of(ONE, str(number)) for number in range(20)))

    assert shop.redis.info("commandstats")["cmdstat_get"]["calls"] == 1


@pytest.mark.parametrize("version", [NEWER, "99", "not a number"])
def test_no_event_is_recorded_in_newer_data(shop: Scenario, version: str) -> None:
    shop.settle()
    shop.redis.set(keys.SCHEMA, version)
    before = everything(shop.redis)

    with pytest.raises(NotRecorded, match="other_schema"):
        shop.settle(SAME_ID)

    assert everything(shop.redis) == before


DELIVERY = Delivery("shop", 1, 1, 0, "request", "digest")
STEPS: dict[str, Callable[[Scenario], object]] = {
    "start_fetch": lambda shop: shop.start("w2"),
    "acquire_delivery": lambda shop: shop.acquire(),
    "complete_delivery": lambda shop: shop.complete(DELIVERY),
    "dispatch_due": lambda shop: shop.dispatch(),
    "request_fetch": lambda shop: shop.request(),
    "release_worker": lambda shop: shop.ledger.release_worker("unknown", "ended", [ONE]),
    "retry_delivery": lambda shop: shop.ledger.retry_delivery(ONE, "shop"),
}


@pytest.mark.parametrize("step", STEPS)
def test_no_worker_dispatcher_or_command_writes_to_newer_data(shop: Scenario, step: str) -> None:
    shop.settle()
    fetch = shop.fetch()
    shop.later(3600)
    shop.redis.set(keys.SCHEMA, NEWER)
    before = everything(shop.redis)

    with pytest.raises(OtherSchema, match=f"version {NEWER}"):
        STEPS[step](shop)
    with pytest.raises(OtherSchema):
        shop.store(fetch, 1)
    with pytest.raises(OtherSchema):
        shop.fail(fetch, "retry")

    assert everything(shop.redis) == before


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

    def test_check_gives_advice(self, desk: Desk) -> None:
        ended = desk.run("check", "--json")

        (found,) = [one for one in ended.objects if one["what"] == "schema"]
        assert (ended.code, found["level"]) == (1, "todo")
        assert "schema version 3" in found["detail"]
        assert "If an upgrade is under way, finish it." in found["advice"]

    def test_health_of_a_worker_names_the_version(self, desk: Desk) -> None:
        ended = desk.run("health", "--role", "worker")

        assert ended.code == 1
        assert f"version {NEWER}" in ended.out


def test_the_web_process_starts_and_answers_503_until_the_version_is_its_own(
    redis_client: Redis, redis_url: str, tmp_path: Path
) -> None:
    redis_client.set(keys.SCHEMA, NEWER)
    with serving(tmp_path, settings_of_one_company(redis_url) | {"OPS_TOKEN": OPS_TOKEN}) as web:
        refused = web.post({"values": [item()]})
        readyz = web.http.get("/readyz", headers={"authorization": f"Bearer {OPS_TOKEN}"})

        assert (refused.status_code, refused.json()["reason"]) == (503, "other_schema")
        assert refused.headers["retry-after"] == "5"
        assert web.http.get("/healthz").status_code == 200
        assert (readyz.status_code, readyz.json()["state"]) == (503, "not ready")
        (failed,) = [one for one in readyz.json()["checks"] if not one["ok"]]
        assert (failed["check"], f"schema version {NEWER}" in failed["detail"]) == ("schema", True)
        assert not redis_client.exists(keys.EVENTS)

        redis_client.set(keys.SCHEMA, VERSION)
        assert web.deliver(item())["queued"] == 1
