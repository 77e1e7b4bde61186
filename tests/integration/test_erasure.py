"""An erased order does not come back, whatever happens before, during or after the erasure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from app.erasure import Erasure, Traces
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.spool import NAME, SpoolFile, erase_rows
from app.ledger import keys, policy
from app.ledger.orders import Archive
from app.ledger.work import Content, Delivery
from app.reconcile.compare import compare, compare_watched
from app.reconcile.state import Checkpoint
from app.replay import Plans
from app.upstream.decode import Guid
from app.upstream.models import Summary
from tests.integration.desk import SINK, Desk, open_desk, order
from tests.integration.ledger_scenario import ONE, SAME_ID, Scenario, content_of, event_of, open_scenario

SHOP: Final = "shop"
ADDRESS: Final = "canary-guest@example.com"
CANARIES: Final = ("canary-guest", "CANARY-THEIRS", "CANARY-OURS", "Canary Name", "CANARY-TICKET")


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Scenario]:
    with open_scenario(redis_client, SHOP) as opened:
        yield opened


def erasure_of(redis: Redis) -> Erasure:
    return Erasure(redis, order_days=400)


def traces(redis: Redis, order: OrderKey = ONE) -> Traces:
    found = erasure_of(redis).traces(order)
    assert found is not None
    return found


def erase(stage: Scenario) -> Traces:
    """Erase the order ONE; return what is left of it."""
    found = traces(stage.redis)
    assert erasure_of(stage.redis).erase(found) is not None
    erasure_of(stage.redis).forget_events([found], lambda _: None)
    return traces(stage.redis)


def delivery_of(stage: Scenario) -> Delivery:
    """Fetch the order and start its delivery."""
    stage.settle()
    stage.fetch_and_store(1)
    delivery = stage.acquire()
    assert delivery is not None
    return delivery


def events(stage: Scenario) -> list[dict[bytes, bytes]]:
    found: Any = stage.redis.xrange(keys.EVENTS)
    return [fields for _, fields in found]


def assert_at_rest(stage: Scenario) -> None:
    """Only a tombstone that expires is left, nothing is pending, and nothing is fetched."""
    assert stage.redis.exists(keys.content(ONE)) == 0
    assert stage.redis.hkeys(keys.record(ONE)) != []
    known = {
        b"generation",
        b"started_generation",
        b"fetched_generation",
        b"fencing_token",
        b"stored_token",
        b"enqueues_total",
        b"duplicates",
        b"first_at",
        b"last_event_at",
        b"revision",
    }
    left = set(stage.redis.hkeys(keys.record(ONE))) - known - {b"erased_at", b"shop:revision"}
    # What a worker or the dispatcher records for itself.
    assert left <= {b"enqueues", b"job"}, left
    assert stage.field("generation") == stage.field("fetched_generation")
    assert (stage.due_in(), stage.is_dead()) == (None, False)
    assert stage.days_kept() == {400.0}
    assert stage.start("last") == "nothing"
    assert stage.acquire("last") is None
    assert stage.due_in() is None


class TestTheNextStep:
    """Each script meets a tombstone."""

    def test_a_new_event_is_recorded_without_its_reference_and_fetches_nothing(self, stage: Scenario) -> None:
        stage.settle()
        stage.fetch_and_store(1)
        erase(stage)
        stage.redis.delete(keys.EVENTS)

        assert [stage.settle(), stage.settle()] == ["erased", "erased"]

        assert [fields[b"reference"] for fields in events(stage)] == [b"", b""]
        assert stage.redis.hget(keys.COUNTERS, f"events|{ONE.company_id}|erased") == b"2"
        assert (stage.waiting(), stage.dispatch()) == (1, 0)
        assert_at_rest(stage)

    def test_a_repeated_event_is_still_a_duplicate(self, stage: Scenario) -> None:
        stage.accept("2026-11-22T10:00:00Z")
        erase(stage)

        assert stage.accept("2026-11-22T10:00:00Z") == "duplicate"
        assert_at_rest(stage)

    @pytest.mark.parametrize("outcome", ["retry", "deferred", "not_found", "client_error", "dead", "deleted_upstream"])
    def test_a_running_fetch_that_fails_leaves_nothing(self, stage: Scenario, outcome: Any) -> None:
        stage.settle()
        fetch = stage.fetch()
        erase(stage)

        stage.fail(fetch, outcome)
        assert_at_rest(stage)
        assert stage.store(fetch, 1) == "erased"
        assert_at_rest(stage)

    @pytest.mark.parametrize("outcome", ["succeeded", "retry", "dead"])
    def test_a_running_delivery_ends_and_its_copy_is_named(self, stage: Scenario, outcome: Any) -> None:
        """A sink that failed may have kept a copy."""
        delivery = delivery_of(stage)
        left = erase(stage)
        stage.complete(delivery, outcome)

        assert [(copy.sink, copy.keys_begin) for copy in left.copies] == [
            (SHOP, (f"{ONE.company_id}/{ONE.order_id}/1/",))
        ]
        assert_at_rest(stage)

    def test_a_worker_that_dies_during_its_fetch_leaves_nothing(self, stage: Scenario) -> None:
        stage.settle()
        stage.fetch("w1")
        erase(stage)
        stage.ledger.release_worker("w1", "killed")

        assert stage.dispatch() == 0
        assert_at_rest(stage)

    def test_no_fetch_can_be_requested(self, stage: Scenario) -> None:
        stage.settle()
        erase(stage)

        assert [stage.request(), stage.request(queue="backfill")] == [0, 0]
        assert (stage.waiting(), stage.waiting("backfill")) == (1, 0)
        assert_at_rest(stage)

    def test_its_dead_letters_are_deleted(self, stage: Scenario) -> None:
        delivery = delivery_of(stage)
        stage.complete(delivery, "dead")
        stage.settle()
        stage.fail(stage.fetch(), "dead")
        erase(stage)

        assert stage.ledger.retry_delivery(ONE, SHOP) is False
        assert stage.redis.zcard(keys.DEAD_DELIVERIES) == 0
        assert_at_rest(stage)

    def test_an_older_replay_passes_it_over(self, stage: Scenario) -> None:
        stage.settle()
        stage.fetch_and_store(1)
        plans = Plans(stage.redis, event_days=90)
        made = [plans.file([(ONE.member, None)], rate=100, sinks=sinks) for sinks in ((), (SHOP,))]
        erase(stage)
        stage.later(60)

        assert [plans.feed(plan).left for plan in made] == [0, 0]
        assert [(plan.passed, plan.queued) for plan in map(plans.of, (plan.id for plan in made)) if plan] == [
            (1, 0)
        ] * 2
        assert_at_rest(stage)

    @pytest.mark.parametrize("status", ["Issued", "Cancelled", "Processing"])
    def test_reconciling_does_not_find_it(self, stage: Scenario, status: str) -> None:
        stage.settle()
        stage.fetch_and_store(1)
        Checkpoint(stage.redis, ONE.company_id).watch([ONE.order_id], stage.now)
        erase(stage)
        (copy,) = Archive(stage.redis).copies([ONE])
        row = Summary(order_id=Guid(ONE.order_id), status=status, job_id="another")

        assert compare(ONE.company_id, row, copy, unsettled_since=0, now=stage.now, oldest=0) is None
        assert compare_watched(ONE.company_id, ONE.order_id, copy, 0) is None
        assert Checkpoint(stage.redis, ONE.company_id).watched() == {}

    def test_another_companys_order_with_the_same_id_stays(self, stage: Scenario) -> None:
        stage.settle()
        stage.settle(SAME_ID)
        stage.fetch_and_store(1, order=SAME_ID)
        erase(stage)

        assert stage.redis.exists(keys.content(SAME_ID)) == 1
        assert [fields[b"company"].decode() for fields in events(stage)] == [SAME_ID.company_id]


class TestErasing:
    def test_content_stored_after_the_traces_were_read_is_not_erased_unread(self, stage: Scenario) -> None:
        """Otherwise its references would stay in the index."""
        stage.settle()
        read = traces(stage.redis)
        stage.fetch_and_store(1)

        assert erasure_of(stage.redis).erase(read) is None
        assert stage.redis.exists(keys.content(ONE)) == 1
        erase(stage)
        assert_at_rest(stage)

    def test_a_second_erasure_changes_nothing(self, stage: Scenario) -> None:
        """The tombstone does not live longer."""
        stage.settle()
        stage.fetch_and_store(1)
        first = erase(stage)
        stage.redis.pexpire(keys.record(ONE), 100 * policy.DAY)
        stage.redis.pexpire(keys.history(ONE), 100 * policy.DAY)
        stage.later(3600)

        assert erase(stage) == first
        assert stage.days_kept() == {100.0}

    def test_the_history_keeps_only_deliveries(self, stage: Scenario) -> None:
        delivery = delivery_of(stage)
        stage.complete(delivery)
        erase(stage)

        assert [type(entry).__name__ for entry in Archive(stage.redis).history(ONE)] == ["DeliveryEnded", "Erased"]

    def test_events_are_deleted_page_by_page(self, stage: Scenario) -> None:
        stage.settle()
        for number in range(30):
            others = (event_of(SAME_ID, f"{number}-{one}") for one in range(80))
            stage.accept_batch(*others, event_of(ONE, f"{number}"))
        pages: list[int] = []

        assert erasure_of(stage.redis).forget_events([traces(stage.redis)], pages.append) == 31

        assert (len(pages), sum(pages)) == (10, 31 + 2400)
        assert stage.redis.xlen(keys.EVENTS) == 2400


STEPS: dict[str, Callable[[Scenario], object]] = {
    "event": Scenario.settle,
    "request": Scenario.request,
    "request_backfill": lambda stage: stage.request(queue="backfill"),
    "start": Scenario.start,
    "dispatch": Scenario.dispatch,
    "hour": lambda stage: stage.later(3600),
    "acquire": Scenario.acquire,
    "kill": lambda stage: stage.ledger.release_worker("w", "killed"),
    "retry_delivery": lambda stage: stage.ledger.retry_delivery(ONE, SHOP),
    "wake": lambda stage: stage.ledger.release_worker("nobody", "ended", [ONE]),
}


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from([*STEPS, "fetch_and_store", "delivery"]), max_size=8),
    after=st.lists(st.sampled_from([*STEPS, "store", "fail", "complete"]), max_size=8),
)
def test_no_interleaving_brings_it_back(stage: Scenario, before: list[str], after: list[str]) -> None:
    """Whatever happened before and ends after: nothing is stored, pending, queued or delivered."""
    stage.redis.flushdb()
    stage.settle()
    for name in before:
        fetch = stage.ledger.start_fetch(ONE, "w")[1] if name == "fetch_and_store" else None
        if fetch is not None:
            stage.store(fetch, stage.now)
        elif name == "delivery" and (taken := stage.acquire()) is not None:
            stage.complete(taken)
        elif name in STEPS:
            STEPS[name](stage)
    fetch, delivery = stage.ledger.start_fetch(ONE, "w")[1], stage.acquire()
    generation = stage.field("generation")
    erase(stage)
    stage.redis.delete("rq:queue:live", "rq:queue:backfill")  # older jobs end without effect
    for name in after:
        if name == "store" and fetch is not None:
            assert stage.store(fetch, 99) == "erased"
        elif name == "fail" and fetch is not None:
            stage.fail(fetch, "retry")
        elif name == "complete" and delivery is not None:
            stage.complete(delivery)
        elif name in STEPS:
            STEPS[name](stage)
        assert (stage.waiting(), stage.waiting("backfill")) == (0, 0)

    assert stage.field("generation") == generation
    assert_at_rest(stage)


class TestGuests:
    def content(self, version: int, *addresses: str) -> Content:
        items = [{"itemNo": "1", "wallet": {"email": one}} for one in addresses[1:]]
        order = {"orderId": ONE.order_id, "status": "Issued", "sellToEmail": addresses[0] if addresses else ""}
        raw = msgspec.json.encode(order | {"items": items})
        return msgspec.structs.replace(content_of(version), raw=raw)

    def store(self, stage: Scenario, version: int, *addresses: str) -> None:
        stage.settle()
        stage.ledger.store_fetch(ONE, "w", stage.fetch(), self.content(version, *addresses))

    def found(self, stage: Scenario, address: str, company_id: str | None = None) -> list[OrderKey]:
        return erasure_of(stage.redis).orders_of(address, company_id, lambda _: None)

    def test_an_order_is_found_by_its_address_in_any_case(self, stage: Scenario) -> None:
        self.store(stage, 1, "Anna@Example.com")

        assert [self.found(stage, one) for one in (" anna@EXAMPLE.com", "c@d.e", "")] == [[ONE], [], []]
        assert self.found(stage, "anna@example.com", SAME_ID.company_id) == []

    def test_an_order_is_not_found_by_an_address_that_left_it(self, stage: Scenario) -> None:
        self.store(stage, 1, "anna@example.com")
        self.store(stage, 2)

        assert self.found(stage, "anna@example.com") == []

    @pytest.mark.parametrize("content", [b"no zlib", zlib.compress(b"no order"), None])
    def test_unreadable_content_does_not_end_the_search(self, stage: Scenario, content: bytes | None) -> None:
        self.store(stage, 1, "anna@example.com")
        stage.settle(SAME_ID)
        stage.redis.delete(keys.content(SAME_ID))
        if content is None:
            stage.redis.hset(keys.content(SAME_ID), "another", "program")
        else:
            stage.redis.set(keys.content(SAME_ID), content)

        assert self.found(stage, "anna@example.com") == [ONE]


def test_spooled_events_are_erased_from_the_disk(tmp_path: Path) -> None:
    """While a web process writes to the file."""
    event = OrderProcessed(*ONE, "Issued", "CANARY-THEIRS", "", "current", "r", 1)
    other = OrderProcessed(*SAME_ID, "Issued", "CM-1", "", "current", "r", 1)
    assert erase_rows(tmp_path, [ONE]) == (0, ())
    file = SpoolFile(tmp_path / NAME)
    file.put([event, other, event])

    assert (erase_rows(tmp_path, [ONE]), erase_rows(tmp_path, [ONE])) == ((2, ()), (0, ()))
    assert [found for _, found in file.oldest(9)] == [other]
    assert not any(b"CANARY" in path.read_bytes() for path in tmp_path.iterdir())
    file.put([other])
    assert file.waiting() == 2


def test_texts_of_replays_that_name_the_order_or_the_guest_are_erased(stage: Scenario) -> None:
    """Whole words in any case; the plan itself and the entry of an erasure stay."""
    plans, erasure = Plans(stage.redis, event_days=90), erasure_of(stage.redis)
    erasure.note([ONE], "me", "on request")
    names = [f"ticket of {ADDRESS.upper()}", f"lost: {ONE.order_id}.", "lost: CM-12", "lost: CM-123"]
    made = [plans.file([], rate=1, who="me", why=one) for one in names]
    to_erase = [ONE.order_id, "cm-12", ADDRESS]

    assert (erasure.forget_texts(to_erase), erasure.forget_texts(to_erase)) == (6, 0)

    assert [plan.why for plan in map(plans.of, (plan.id for plan in made)) if plan] == ["", "", "", "lost: CM-123"]
    assert stage.redis.xlen(keys.AUDIT) == 2


class TestCommand:
    @pytest.fixture
    def desk(self, redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
        desk = open_desk(redis_client, redis_url, tmp_path)
        (tmp_path / "spool").mkdir(mode=0o700)
        desk.env["SPOOL_DIR"] = str(tmp_path / "spool")
        return desk

    def test_all_orders_of_a_guest_are_erased_and_copies_in_sinks_named(self, desk: Desk) -> None:
        """The address comes from stdin; no address, reference or ticket is left or printed."""
        for number, address in ((1, ADDRESS), (2, ADDRESS.upper()), (3, "other@example.com")):
            fill(desk, number, address)
        desk.run("events", "replay", "--order", "CANARY-OURS-1", "--force", "--why", f"for {ADDRESS}", "--yes")

        ended = desk.run("orders", "erase", "--email", "-", "--yes", "--json", stdin=f" {ADDRESS}\n")

        assert (ended.code, ended.err) == (0, "")
        *orders, totals = ended.objects
        assert sorted(one["order_id"] for one in orders) == [order(1).order_id, order(2).order_id]
        assert {copy["sink"]: copy["keys_begin"] for one in orders for copy in one["copies"]}.keys() == {SINK}
        assert {key for one in orders for copy in one["copies"] for key in copy["keys_begin"]} == {
            f"{order(number).company_id}/{order(number).order_id}/1/" for number in (1, 2)
        }
        assert totals == {"orders": 2, "events": 2, "spooled": 0, "texts": 2, "left": []}
        assert everything_but(desk, 3) == []
        assert not [one for one in CANARIES if one in ended.out]
        assert desk.redis.exists(keys.content(order(3)))
        assert desk.redis.zcard(keys.ERASING) == 0

    def test_a_dry_run_and_a_missing_yes_change_nothing(self, desk: Desk) -> None:
        fill(desk, 1, ADDRESS)
        before = desk.redis.dump(keys.record(order(1)))

        looked = desk.run("orders", "erase", order(1).order_id, "--dry-run")
        asked = desk.run("orders", "erase", order(1).order_id)

        assert (looked.code, asked.code) == (0, 2)
        assert order(1).order_id in looked.out
        assert SINK in looked.out
        assert desk.redis.dump(keys.record(order(1))) == before

    @pytest.mark.parametrize("steps", range(5))
    def test_a_run_that_died_is_finished_by_the_next(self, desk: Desk, steps: int) -> None:
        """Wherever it died, also by address, which no longer finds an erased order."""
        fill(desk, 1, ADDRESS)
        fill(desk, 2, ADDRESS)
        desk.hear(order(1))
        erasure = erasure_of(desk.redis)
        found = [traces(desk.redis, order(number)) for number in (1, 2)]
        all_steps: list[Callable[[], object]] = [
            lambda: erasure.note([order(1), order(2)], "me", ""),
            lambda: erasure.erase(found[0]),
            lambda: erasure.erase(found[1]),
            lambda: erasure.forget_events(found, lambda _: None),
        ]
        for step in all_steps[:steps]:
            step()

        ended = desk.run("orders", "erase", "--email", "-", "--yes", stdin=ADDRESS)

        assert (ended.code, ended.err) == (0, "")
        assert "2 orders erased" in ended.out
        assert everything_but(desk, 3) == []
        assert desk.redis.zcard(keys.ERASING) == 0

    def test_a_run_that_died_is_finished_by_the_same_reference(self, desk: Desk) -> None:
        """The reference names no order any more."""
        fill(desk, 1, ADDRESS)
        erasure_of(desk.redis).erase(traces(desk.redis, order(1)))

        again, later = desk.run_each([("orders", "erase", "CANARY-THEIRS-1", "--yes")] * 2)

        assert (again.code, later.code) == (1, 1)
        assert "No order 'CANARY-THEIRS-1' found" in again.err
        assert "1 order erased" in again.out
        assert "erased" not in later.out
        assert everything_but(desk, 3) == []
        assert desk.redis.zcard(keys.ERASING) == 0

    def test_every_command_shows_an_erased_order_as_erased(self, desk: Desk) -> None:
        """None brings it back."""
        fill(desk, 1, ADDRESS)
        name = order(1).order_id
        (erased,) = desk.run_each([("orders", "erase", name, "--yes")])
        assert erased.code == 0, erased.err
        desk.hear(order(1))
        desk.forget_jobs()
        commands = [
            ("orders", "show", name),
            ("orders", "explain", name),
            ("orders", "list", "--state", "erased"),
            ("orders", "refetch", name),
            ("dead", "requeue", name, "--yes"),
            ("events", "replay", "--order", name, "--force", "--yes"),
            ("events", "list", "--outcome", "erased"),
        ]

        answers = dict(zip(commands, desk.run_each(commands), strict=True))

        assert [command for command, ended in answers.items() if "erased" not in ended.out + ended.err] == []
        assert desk.run_each([("orders", "show", "CANARY-OURS-1")])[0].code == 1
        assert desk.waiting("live") == desk.waiting("backfill") == []

    @pytest.mark.parametrize(
        ("arguments", "stdin", "code", "text"),
        [
            ((), "", 2, "Choose either"),
            (("x", "--email", "-"), "", 2, "Choose either"),
            (("--email", "-"), "", 2, "not an e-mail address"),
            (("--email", "-", "--yes"), ADDRESS, 1, "No order of this guest"),
            (("nothing", "--yes"), "", 1, "No order"),
        ],
    )
    def test_a_mistake_gets_one_sentence(
        self, desk: Desk, arguments: tuple[str, ...], stdin: str, code: int, text: str
    ) -> None:
        """Without the address."""
        ended = desk.run("orders", "erase", *arguments, stdin=stdin)

        assert ended.code == code
        assert text in ended.err
        assert ADDRESS not in ended.err

    def test_a_spool_that_cannot_be_erased_is_named(self, desk: Desk) -> None:
        """The order stays unfinished."""
        fill(desk, 1, ADDRESS)
        broken = desk.folder / "spool" / NAME
        broken.write_text("no database")

        ended = desk.run("orders", "erase", order(1).order_id, "--yes", "--json")

        assert (ended.code, ended.objects[-1]["left"]) == (1, [f"{broken} (DatabaseError)"])
        assert desk.redis.zcard(keys.ERASING) == 1


def fill(desk: Desk, number: int, address: str) -> None:
    """Fetch and deliver an order full of canaries."""
    desk.hear(order(number))
    body = json.loads((Path(__file__).parents[1] / "fixtures" / "order-issued.json").read_bytes())
    items = body["items"]
    for item in items:
        item["sellToEmail"] = address
        for wallet in item["wallets"]:
            wallet["name"] = "Canary Name"
            for asset in wallet["assets"]:
                asset["referenceNumber"] = f"CANARY-TICKET-{number}"
    desk.bring_home(
        order(number),
        sellToEmail=address,
        buyFromOrderReference=f"CANARY-THEIRS-{number}",
        sellToOrderReference=f"CANARY-OURS-{number}",
        items=items,
    )
    ledger = desk.ledger()
    delivery = ledger.acquire_delivery(order(number), "w-live-1")
    assert delivery is not None
    ledger.complete_delivery(order(number), "w-live-1", delivery, outcome="succeeded")
    desk.forget_jobs()


def everything_but(desk: Desk, number: int) -> list[str]:
    """Return the keys that still have a canary or a reference, except those of one order."""
    found = []
    for key in desk.redis.scan_iter("*"):
        read: dict[bytes, Callable[[bytes], object]] = {
            b"hash": desk.redis.hgetall,
            b"stream": desk.redis.xrange,
            b"list": lambda key: desk.redis.lrange(key, 0, -1),
            b"set": desk.redis.smembers,
        }
        kind: Any = desk.redis.type(key)
        value = repr(read[kind](key)).encode() if kind in read else desk.redis.dump(key) or b""
        names_another = order(number).order_id.encode() in key + value
        wanted = [one.encode() for one in CANARIES] + [f"CM-{order(1).order_id[:8]}".encode()]
        in_index = key.startswith(b"ota:reference") and order(1).order_id.encode() in value
        if (any(one in value for one in wanted) or in_index) and not names_another:
            found.append(key.decode())
    return found
