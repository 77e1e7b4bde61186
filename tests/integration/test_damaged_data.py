"""Data of another schema version is refused; work that is not in `due` is found; one broken order stops no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import NotRecorded, OtherSchema
from app.ids import OrderKey
from app.ledger.due_check import LEAST_KEYS, DueCheck
from app.ledger.orders import Archive
from app.ledger.redis import VERSION, Redis
from app.ledger.work import Delivery, Fetch, Requested
from app.replay import Plans
from tests.lab import KEYS, ONE, SAME_ID, Lab, event_of, order
from tests.service import OPS_TOKEN, item, serving, settings_of_one_company


def found_in_a_walk(bare: Lab) -> int:
    check = DueCheck(bare.redis)
    return sum(check.step() for _ in range(2 + bare.redis.dbsize() // LEAST_KEYS))


OUTSTANDING: dict[str, Callable[[Lab], object]] = {
    "accepted": lambda shop: None,
    "fetching": lambda shop: shop.start_fetch(),
    "failed": lambda shop: shop.fail_fetch("retry"),
    "deferred": lambda shop: shop.fail_fetch("deferred"),
    "unsettled": lambda shop: shop.store_fetch(shop.start_fetch(), 1, recheck=60),
    "to be delivered": lambda shop: shop.fetch_and_store(),
    "delivery failed": lambda shop: (shop.fetch_and_store(), shop.deliver("retry")),
    "requested": lambda shop: (shop.fetch_and_store(), shop.deliver(), shop.request_fetch()),
}


@pytest.mark.parametrize("state", OUTSTANDING)
def test_outstanding_work_without_a_due_time_is_due_at_once(shop: Lab, state: str) -> None:
    shop.accept()
    OUTSTANDING[state](shop)
    outstanding = shop.pending()
    shop.redis.delete(KEYS.due, KEYS.deliveries("shop"), "rq:queue:ota-live")

    assert (found_in_a_walk(shop), shop.pending()) == (outstanding, outstanding)
    assert outstanding > 0


AT_REST: dict[str, Callable[[Lab], object]] = {
    "in due": lambda shop: None,
    "delivered": lambda shop: (shop.fetch_and_store(), shop.deliver()),
    "dead": lambda shop: shop.fail_fetch("dead"),
    "dead delivery": lambda shop: (shop.fetch_and_store(), shop.deliver("dead"), shop.dispatch(), shop.try_start()),
    "discarded": lambda shop: (shop.fail_fetch("dead"), shop.ledger.discard(ONE)),
}


@pytest.mark.parametrize("state", AT_REST)
def test_an_order_at_rest_is_left_alone(shop: Lab, state: str) -> None:
    shop.accept()
    AT_REST[state](shop)
    before = shop.due(), shop.pending()

    assert found_in_a_walk(shop) == 0
    assert (shop.due(), shop.pending()) == before


def test_every_record_is_read_among_many_keys(bare: Lab) -> None:
    bare.redis.mset({f"another:{number}": 1 for number in range(3000)})
    bare.accept(ONE, SAME_ID)
    bare.redis.delete(KEYS.due)

    assert found_in_a_walk(bare) == 2


def test_a_broken_record_stops_no_walk(bare: Lab) -> None:
    bare.accept()
    bare.redis.delete(KEYS.due, KEYS.record(SAME_ID))
    bare.redis.set(KEYS.record(SAME_ID), "another program")

    bare.redis.hset("ota:order:of-another-program", "a", "b")

    assert (found_in_a_walk(bare), list(bare.due())) == (1, [ONE])


@pytest.fixture
def broken(shop: Lab) -> OrderKey:
    """The order SAME_ID is fetched and its record is overwritten; ONE is fetched."""
    for one in (ONE, SAME_ID):
        shop.accept_and_fetch(one)
    shop.redis.delete(KEYS.record(SAME_ID))
    shop.redis.set(KEYS.record(SAME_ID), "another program")
    return SAME_ID


def test_a_request_for_several_orders_skips_it(shop: Lab, broken: OrderKey) -> None:
    assert shop.ledger.request_fetch([broken, ONE], queue="backfill", reason="refetch") == Requested(queued=1, broken=1)

    assert len(shop.queued("backfill")) == 1


@pytest.mark.parametrize("sinks", [(), ("shop",)])
def test_a_replay_skips_it_and_the_dispatcher_reports_it(shop: Lab, broken: OrderKey, sinks: tuple[str, ...]) -> None:
    shop.deliver()
    plans = Plans(shop.redis, event_days=90, clock=shop.clock)
    plan = plans.file([(broken.member, None), (ONE.member, None)], rate=100, sinks=sinks)

    shop.later(1)
    fed = plans.feed(plan)

    found = plans.of(plan.id)
    assert found is not None
    assert (fed.state, found.passed, found.queued) == ("done", 1, 1)
    shop.later(121)
    assert shop.ledger.dispatch_due().broken == 2, "its fetch and its delivery"


def test_reconciling_reads_it_as_pending(shop: Lab, broken: OrderKey) -> None:
    """A request would not help: an operator must look at its keys."""
    copies = Archive(shop.redis).copies([broken, ONE])

    assert [copy is not None and copy.pending for copy in copies] == [True, False]


def test_content_of_another_type_is_read_as_missing(shop: Lab) -> None:
    shop.accept_and_fetch()
    shop.redis.delete(KEYS.content(ONE))
    shop.redis.hset(KEYS.content(ONE), "another", "program")

    (copy,) = Archive(shop.redis).copies([ONE])

    assert copy is not None
    assert copy.content is None


NEWER = str(VERSION + 1)


@pytest.mark.parametrize("write", [Lab.accept, Lab.request_fetch, Lab.dispatch])
def test_the_first_writer_notes_the_version_also_after_a_flush(shop: Lab, write: Callable[[Lab], object]) -> None:
    for _ in range(2):
        write(shop)
        assert shop.redis.get(KEYS.schema) == str(VERSION).encode()
        shop.redis.flushall()


def test_data_of_an_older_version_is_refused_with_advice(shop: Lab) -> None:
    shop.redis.set(KEYS.schema, VERSION - 1)

    with pytest.raises(NotRecorded, match="other_schema"):
        shop.accept()
    with pytest.raises(OtherSchema, match="use an empty Redis"):
        shop.try_start()

    assert shop.redis.keys() == [KEYS.schema.encode()]


def test_the_check_costs_one_get_per_post(shop: Lab) -> None:
    shop.accept()
    shop.redis.config_resetstat()

    shop.accept_events(*(event_of(ONE, str(number)) for number in range(20)))

    assert shop.redis.info("commandstats")["cmdstat_get"]["calls"] == 1


@pytest.mark.parametrize("version", [NEWER, "99", "not a number"])
def test_no_event_is_recorded_in_newer_data(shop: Lab, version: str) -> None:
    shop.accept()
    shop.redis.set(KEYS.schema, version)
    before = shop.dump()

    with pytest.raises(NotRecorded, match="other_schema"):
        shop.accept(SAME_ID)

    assert shop.dump() == before


DELIVERY = Delivery("shop", 1, 1, 0, "request", "digest")
STEPS: dict[str, Callable[[Lab, Fetch], object]] = {
    "start_fetch": lambda shop, _: shop.try_start(worker="w2"),
    "store_fetch": lambda shop, fetch: shop.store_fetch(fetch, 1),
    "fail_fetch": lambda shop, fetch: shop.fail_fetch("retry", fetch=fetch),
    "acquire_delivery": lambda shop, _: shop.acquire_delivery(),
    "complete_delivery": lambda shop, _: shop.complete_delivery(DELIVERY),
    "dispatch_due": lambda shop, _: shop.dispatch(),
    "request_fetch": lambda shop, _: shop.request_fetch(),
    "release_worker": lambda shop, _: shop.ledger.release_worker("unknown", "ended", [ONE]),
    "retry_delivery": lambda shop, _: shop.ledger.retry_delivery(ONE, "shop"),
}


@pytest.mark.parametrize("step", STEPS)
def test_no_worker_dispatcher_or_command_writes_to_newer_data(shop: Lab, step: str) -> None:
    shop.accept()
    fetch = shop.start_fetch()
    shop.later(3600)
    shop.redis.set(KEYS.schema, NEWER)
    before = shop.dump()

    with pytest.raises(OtherSchema, match=f"version {NEWER}"):
        STEPS[step](shop, fetch)

    assert shop.dump() == before


class TestCommands:
    @pytest.fixture
    def lab(self, lab: Lab) -> Lab:
        lab.accept(order(1))
        lab.redis.set(KEYS.schema, NEWER)
        return lab

    @pytest.mark.parametrize(
        "arguments",
        [("orders", "list"), ("events", "replay", "--since", "1h", "--yes"), ("dead", "requeue", "--all", "--yes")],
        ids=" ".join,
    )
    def test_a_command_ends_with_one_line_and_exit_code_4(self, lab: Lab, arguments: tuple[str, ...]) -> None:
        before = lab.dump()

        ended = lab.run_command(*arguments)

        assert (ended.code, ended.out, len(ended.err.splitlines())) == (4, "", 1)
        assert f"version {NEWER}" in ended.err
        assert lab.dump() == before

    def test_check_and_health_name_the_version(self, lab: Lab) -> None:
        check, health = lab.run_commands([("check", "--json"), ("health", "--role", "worker", "--ready")])

        (found,) = [one for one in check.objects if one["what"] == "schema"]
        assert (check.code, found["level"]) == (1, "todo")
        assert "If an upgrade is under way, finish it." in found["advice"]
        assert f"schema version {NEWER}" in found["detail"]
        assert (health.code, f"version {NEWER}" in health.out) == (1, True)


def test_web_answers_503_until_the_version_is_its_own(redis_client: Redis, redis_url: str, tmp_path: Path) -> None:
    redis_client.set(KEYS.schema, NEWER)
    with serving(tmp_path, settings_of_one_company(redis_url) | {"OPS_TOKEN": OPS_TOKEN}) as web:
        refused = web.post({"values": [item()]})
        readyz = web.http.get("/readyz", headers={"authorization": f"Bearer {OPS_TOKEN}"})

        assert (refused.status_code, refused.json()["reason"]) == (503, "other_schema")
        assert refused.headers["retry-after"] == "5"
        assert web.http.get("/healthz").status_code == 200
        assert (readyz.status_code, readyz.json()["state"]) == (503, "not ready")
        (failed,) = [one for one in readyz.json()["checks"] if not one["ok"]]
        assert (failed["check"], f"schema version {NEWER}" in failed["detail"]) == ("schema", True)
        assert not redis_client.exists(KEYS.events)

        redis_client.set(KEYS.schema, VERSION)
        assert web.deliver(item())["queued"] == 1
