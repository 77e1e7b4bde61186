"""An erased order does not come back, whatever happens before, during or after the erasure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.dev.sandbox.process import Sandbox
from app.erased_file import ErasedFile
from app.erasure import Erasure, Traces
from app.errors import SettingsError
from app.ids import OrderKey
from app.intake.envelope import OrderProcessed
from app.intake.spool_file import NAME, SpoolFile, erase_rows
from app.ledger import policy
from app.ledger.content import pack
from app.ledger.orders import Archive
from app.ledger.redis import Redis
from app.ledger.rq_jobs import sink_queue
from app.reconcile.compare import compare, compare_watched
from app.reconcile.state import Checkpoint
from app.replay import Plans
from app.upstream.decode import Guid
from app.upstream.models import Summary
from tests.lab import DUPLICATE, ERASED, KEYS, ONE, SAME_ID, SINK, Lab, event_of, order
from tests.lab_upstream import Shop, worker_lab
from tests.samples import sample

SHOP: Final = "shop"
ADDRESS: Final = "canary-guest@example.com"
CANARIES: Final = ("canary-guest", "CANARY-THEIRS", "CANARY-OURS", "Canary Name", "CANARY-TICKET")


def erasure_of(redis: Redis) -> Erasure:
    return Erasure(redis, order_days=400)


def traces(redis: Redis, order: OrderKey = ONE) -> Traces:
    found = erasure_of(redis).traces(order)
    assert found is not None
    return found


def erase(shop: Lab) -> Traces:
    """Erase the order ONE; return what is left of it."""
    found = traces(shop.redis)
    assert erasure_of(shop.redis).erase(found) is not None
    erasure_of(shop.redis).forget_events([found], lambda _: None)
    return traces(shop.redis)


KEPT: Final = frozenset(
    """
    generation started_generation fetched_generation fencing_token stored_token enqueues_total duplicates first_at
    last_event_at revision erased_at shop:revision enqueues job
    """.split()  # noqa: SIM905  # as in app/explain/mask.py
)
"""Fields of a tombstone; the last two are what a worker or the dispatcher records for itself."""


def assert_at_rest(shop: Lab) -> None:
    """Only a tombstone that expires is left, nothing is pending, and nothing is fetched."""
    assert shop.redis.exists(KEYS.content(ONE)) == 0
    assert shop.record().keys() <= KEPT
    assert shop.record()["generation"] == shop.field("fetched_generation")
    assert (shop.due_in(), shop.delivery_in(), shop.is_dead(), shop.days_kept()) == (None, None, False, {400.0})
    assert (shop.try_start(worker="last"), shop.acquire_delivery(worker="last")) == ("nothing", None)
    assert shop.due_in() is None


class TestTheNextStep:
    """Each script meets a tombstone."""

    def test_a_new_event_is_recorded_without_its_reference_and_fetches_nothing(self, shop: Lab) -> None:
        shop.accept_and_fetch()
        erase(shop)
        shop.redis.delete(KEYS.events)

        assert [shop.accept(), shop.accept()] == [ERASED, ERASED]

        assert [event["reference"] for event in shop.events()] == ["", ""]
        assert shop.counters("events|")[f"events|{ONE.company_id}|erased"] == 2
        assert (len(shop.queued()), shop.dispatch()) == (1, 0)
        assert_at_rest(shop)

    def test_a_repeated_event_is_still_a_duplicate(self, shop: Lab) -> None:
        shop.accept(timestamp="2026-11-22T10:00:00Z")
        erase(shop)

        assert shop.accept(timestamp="2026-11-22T10:00:00Z") == DUPLICATE
        assert_at_rest(shop)

    @pytest.mark.parametrize("outcome", ["retry", "deferred", "not_found", "client_error", "dead", "deleted_upstream"])
    def test_a_running_fetch_that_fails_leaves_nothing(self, shop: Lab, outcome: Any) -> None:
        shop.accept()
        fetch = shop.start_fetch()
        erase(shop)

        shop.fail_fetch(outcome, fetch=fetch)
        assert_at_rest(shop)
        assert shop.store_fetch(fetch, 1) == "erased"
        assert_at_rest(shop)

    @pytest.mark.parametrize("outcome", ["succeeded", "retry", "postponed", "dead", "rejected"])
    def test_a_running_delivery_ends_and_its_copy_is_named(self, shop: Lab, outcome: Any) -> None:
        """A sink that failed may have kept a copy."""
        shop.accept_and_fetch()
        delivery = shop.start_delivery()
        left = erase(shop)
        shop.complete_delivery(delivery, outcome, failure="canary" if outcome == "rejected" else "")
        assert b"canary" not in shop.everything()

        (copy,) = left.copies
        assert (copy.sink, copy.keys_begin) == (SHOP, (f"{ONE.company_id}/{ONE.order_id}/1/",))
        assert_at_rest(shop)

    def test_a_sink_that_skipped_it_has_no_copy(self, shop: Lab) -> None:
        shop.accept_and_fetch()
        shop.deliver("skipped", failure="status Issued")

        assert erase(shop).copies == ()
        assert_at_rest(shop)

    @pytest.mark.parametrize("outcome", ["postponed", "rejected"])
    def test_what_a_sink_answered_is_no_longer_told_and_its_copy_is_named(self, shop: Lab, outcome: Any) -> None:
        """The reason of a rejection is a text of the user. A sink that postponed an order may have kept a copy."""
        shop.accept_and_fetch()
        shop.deliver(outcome, reason="rejected: canary", failure="canary" if outcome == "rejected" else "Retry")
        left = erase(shop)

        (copy,) = left.copies
        assert (copy.sink, copy.keys_begin) == (SHOP, (f"{ONE.company_id}/{ONE.order_id}/1/",))
        assert shop.field(f"{SHOP}:revision") == "1"
        assert b"canary" not in shop.everything()
        assert_at_rest(shop)

    def test_its_dead_letters_are_deleted(self, shop: Lab) -> None:
        shop.accept_and_fetch()
        shop.dead_letter_delivery()
        shop.accept()
        shop.fail_fetch("dead")
        erase(shop)

        assert shop.ledger.retry_delivery(ONE, SHOP) is False
        assert shop.redis.zcard(KEYS.dead_deliveries) == 0
        assert_at_rest(shop)

    def test_an_older_replay_passes_it_over(self, shop: Lab) -> None:
        shop.accept_and_fetch()
        plans = Plans(shop.redis, event_days=90)
        made = [plans.file([(ONE.member, None)], rate=100, sinks=sinks) for sinks in ((), (SHOP,))]
        erase(shop)
        shop.later(60)

        assert [plans.feed(plan).left for plan in made] == [0, 0]
        assert [(plan.passed, plan.queued) for plan in plans.newest_first()] == [(1, 0)] * 2
        assert_at_rest(shop)

    @pytest.mark.parametrize("status", ["Issued", "Cancelled", "Processing"])
    def test_reconciling_does_not_find_it(self, shop: Lab, status: str) -> None:
        shop.accept_and_fetch()
        Checkpoint(shop.redis, ONE.company_id).watch([ONE.order_id], shop.now)
        erase(shop)
        (copy,) = Archive(shop.redis).copies([ONE])
        row = Summary(order_id=Guid(ONE.order_id), status=status, job_id="another")

        assert compare(ONE.company_id, row, copy, unsettled_since=0, now=shop.now, oldest=0) is None
        assert compare_watched(ONE.company_id, ONE.order_id, copy, 0) is None
        assert Checkpoint(shop.redis, ONE.company_id).watched() == {}

    def test_another_companys_order_with_the_same_id_stays(self, shop: Lab) -> None:
        shop.accept()
        shop.accept_and_fetch(SAME_ID)
        erase(shop)

        assert shop.redis.exists(KEYS.content(SAME_ID)) == 1
        assert [event["company"] for event in shop.events()] == [SAME_ID.company_id]


class TestErasing:
    def test_content_stored_after_the_traces_were_read_is_not_erased_unread(self, shop: Lab) -> None:
        """Otherwise its references would stay in the index."""
        shop.accept()
        read = traces(shop.redis)
        shop.fetch_and_store()

        assert erasure_of(shop.redis).erase(read) is None
        assert shop.redis.exists(KEYS.content(ONE)) == 1
        erase(shop)
        assert_at_rest(shop)

    def test_a_second_erasure_changes_nothing(self, shop: Lab) -> None:
        """The tombstone does not live longer."""
        shop.accept_and_fetch()
        first = erase(shop)
        shop.redis.pexpire(KEYS.record(ONE), 100 * policy.DAY)
        shop.redis.pexpire(KEYS.history(ONE), 100 * policy.DAY)
        shop.later(3600)

        assert erase(shop) == first
        assert shop.days_kept() == {100.0}

    def test_the_history_keeps_only_deliveries(self, shop: Lab) -> None:
        shop.accept_and_fetch()
        shop.deliver()
        erase(shop)

        assert [type(entry).__name__ for entry in shop.history()] == ["DeliveryEnded", "Erased"]

    def test_events_are_deleted_page_by_page(self, shop: Lab) -> None:
        shop.accept()
        for number in range(30):
            others = (event_of(SAME_ID, f"{number}-{one}") for one in range(80))
            shop.accept_events(*others, event_of(ONE, f"{number}"))
        pages: list[int] = []

        assert erasure_of(shop.redis).forget_events([traces(shop.redis)], pages.append) == 31

        assert (len(pages), sum(pages)) == (10, 31 + 2400)
        assert shop.redis.xlen(KEYS.events) == 2400


STEPS: dict[str, Callable[[Lab], object]] = {
    "event": Lab.accept,
    "request": Lab.request_fetch,
    "request_backfill": lambda shop: shop.request_fetch(queue="backfill"),
    "start": Lab.try_start,
    "dispatch": Lab.dispatch,
    "hour": lambda shop: shop.later(3600),
    "acquire": Lab.acquire_delivery,
    "kill": lambda shop: shop.ledger.release_worker("w", "killed"),
    "retry_delivery": lambda shop: shop.ledger.retry_delivery(ONE, SHOP),
    "wake": lambda shop: shop.ledger.release_worker("unknown", "ended", [ONE], [(ONE, SHOP)]),
}


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from([*STEPS, "fetch_and_store", "delivery"]), max_size=8),
    after=st.lists(st.sampled_from([*STEPS, "store", "fail", "complete"]), max_size=8),
)
def test_no_interleaving_brings_it_back(shop: Lab, before: list[str], after: list[str]) -> None:
    """Whatever happened before and ends after: nothing is stored, pending, queued or delivered."""
    shop.redis.flushdb()
    shop.accept()
    for name in before:
        fetch = shop.ledger.start_fetch(ONE, "w")[1] if name == "fetch_and_store" else None
        if fetch is not None:
            shop.store_fetch(fetch, shop.now)
        elif name == "delivery" and (taken := shop.acquire_delivery()) is not None:
            shop.complete_delivery(taken)
        elif name in STEPS:
            STEPS[name](shop)
    fetch, delivery = shop.ledger.start_fetch(ONE, "w")[1], shop.acquire_delivery()
    generation = shop.field("generation")
    erase(shop)
    shop.clear_queues()  # older jobs end without effect
    for name in after:
        if name == "store" and fetch is not None:
            assert shop.store_fetch(fetch, 99) == "erased"
        elif name == "fail" and fetch is not None:
            shop.fail_fetch("retry", fetch=fetch)
        elif name == "complete" and delivery is not None:
            shop.complete_delivery(delivery)
        elif name in STEPS:
            STEPS[name](shop)
        assert [shop.queued(queue) for queue in ("live", "backfill", sink_queue(SHOP))] == [[], [], []]

    assert shop.field("generation") == generation
    assert_at_rest(shop)


class TestGuests:
    def found(self, shop: Lab, address: str, company_id: str | None = None) -> list[OrderKey]:
        return erasure_of(shop.redis).orders_of(address, company_id, lambda _: None)

    def test_an_order_is_found_by_its_address_in_any_case_or_one_of_a_ticket(self, shop: Lab) -> None:
        shop.accept_and_fetch(sellToEmail="Anna@Example.com")

        addresses = (" anna@EXAMPLE.com", "guest@example.com", "c@d.e", "")
        assert [self.found(shop, one) for one in addresses] == [[ONE], [ONE], [], []]
        assert self.found(shop, "anna@example.com", SAME_ID.company_id) == []

    def test_an_order_is_found_by_an_address_that_left_it_as_long_as_that_revision_is_kept(self, shop: Lab) -> None:
        shop.accept_and_fetch(sellToEmail="anna@example.com")
        shop.accept_and_fetch()
        assert self.found(shop, "anna@example.com") == [ONE]

        for number in range(4):
            shop.accept_and_fetch(paymentReference=f"PAY-{number}")

        assert self.found(shop, "anna@example.com") == []

    @pytest.mark.parametrize("content", [b"no zlib", pack(b"no order"), None])
    def test_unreadable_content_does_not_end_the_search(self, shop: Lab, content: bytes | None) -> None:
        shop.accept_and_fetch(sellToEmail="anna@example.com")
        shop.accept(SAME_ID)
        shop.overwrite(KEYS.content(SAME_ID), content)

        assert self.found(shop, "anna@example.com") == [ONE]


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


def test_texts_of_replays_that_name_the_order_or_the_guest_are_erased(shop: Lab) -> None:
    """Whole words in any case; the plan itself and the entry of an erasure stay."""
    plans, erasure = Plans(shop.redis, event_days=90), erasure_of(shop.redis)
    erasure.note([ONE], "me", "on request")
    names = [f"ticket of {ADDRESS.upper()}", f"lost: {ONE.order_id}.", "lost: CM-12", "lost: CM-123"]
    made = [plans.file([], rate=1, who="me", why=one) for one in names]
    to_erase = [ONE.order_id, "cm-12", ADDRESS]

    assert (erasure.forget_texts(to_erase), erasure.forget_texts(to_erase)) == (6, 0)

    assert [plan.why for plan in map(plans.of, (plan.id for plan in made)) if plan] == ["", "", "", "lost: CM-123"]
    assert shop.redis.xlen(KEYS.audit) == 2


@pytest.mark.parametrize("selected", [f"{ONE.member} to shop", f"dead letters reason={ADDRESS}", "orders CM-12"])
def test_texts_of_a_replay_that_was_made_for_the_order_are_erased(shop: Lab, selected: str) -> None:
    """Its reason may tell who the guest is without a name."""
    plans, erasure = Plans(shop.redis, event_days=90), erasure_of(shop.redis)
    made = plans.file([], rate=1, who="me", why="the lady with the dog", selected=selected)

    assert erasure.forget_texts([ONE.order_id, "cm-12", ADDRESS]) == 2

    left = plans.of(made.id)
    assert left is not None
    assert (left.who, left.why, left.selected, shop.redis.xlen(KEYS.audit)) == ("", "", "", 0)


class TestErasedFile:
    """What outlives Redis: salted digests, in a file that `erase` writes and every worker reads."""

    def test_it_names_no_order_and_belongs_to_its_owner_alone(self, tmp_path: Path) -> None:
        one, other = (ErasedFile(tmp_path / name) for name in ("one", "other"))
        for file in (one, other):
            file.add([ONE])
            file.add([ONE, order(2)])

        assert [(ONE in file, order(2) in file, SAME_ID in file) for file in (one, other)] == [(True, True, False)] * 2
        first, second = ((tmp_path / name).read_text().splitlines() for name in ("one", "other"))
        assert (len(first), set(first) & set(second), ONE.order_id in str(first)) == (3, set(), False)
        assert [(path.name, path.stat().st_mode & 0o777) for path in sorted(tmp_path.iterdir())] == [
            ("one", 0o600),
            ("other", 0o600),
        ]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for another user")
    def test_made_by_root_it_belongs_to_the_owner_of_its_folder(self, tmp_path: Path) -> None:
        os.chown(tmp_path, 1234, 5678)
        ErasedFile(tmp_path / "erased").add([ONE])

        found = (tmp_path / "erased").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (1234, 5678, 0o600)

    def test_a_running_worker_sees_what_another_process_adds(self, tmp_path: Path) -> None:
        path = tmp_path / "erased"
        reader = ErasedFile(path)
        assert ONE not in reader

        with ProcessPoolExecutor(4, get_context("fork")) as pool:
            orders = [order(number) for number in range(40)]
            assert list(pool.map(partial(_add, path), orders)) == [None] * 40

        assert [one for one in orders if one not in reader] == []
        assert len(path.read_bytes().splitlines()) == 41

    def test_what_a_killed_erase_left_of_a_line_is_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "erased"
        ErasedFile(path).add([ONE])
        whole = path.read_bytes()
        path.write_bytes(whole + b"0123")
        assert ONE in ErasedFile(path)

        ErasedFile(path).add([order(2)])

        assert (path.read_bytes()[: len(whole)], len(path.read_bytes())) == (whole, len(whole) + 65)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "line 1 is not one of ours"),
            (b"another program\n", "line 1 is not one of ours"),
            (b"a secret without an end of its line", "line 1 is not one of ours"),
            (
                b"ota-receiver erased orders, salt " + b"a" * 32 + b"\n" + b"b" * 64 + b"\nx\n",
                "line 3 is not one of ours",
            ),
            (None, "cannot be read (Is a directory)"),
        ],
    )
    def test_a_file_that_is_not_one_stops_the_start_and_the_erase(
        self, lab: Lab, tmp_path: Path, content: bytes | None, problem: str
    ) -> None:
        path = tmp_path / "erased"
        path.mkdir() if content is None else path.write_bytes(content)
        lab.accept(ONE)
        asked = {"ERASED_FILE": str(path)}

        worker, check = (lab.run_command(name, **asked) for name in ("worker", "check"))
        erase = lab.run_command("orders", "erase", ONE.order_id, "--yes", **asked)

        assert (worker.code, check.code, erase.code) == (2, 2, 2)
        assert problem in worker.err
        assert problem.partition(" (")[0] in " ".join(check.out.split())
        assert f"ERASED_FILE: {path} " in erase.err
        assert lab.field("erased_at", ONE) is None
        assert content is None or path.read_bytes() == content

    def test_a_folder_that_is_missing_is_named_and_a_file_that_vanishes_is_logged_once(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="is missing"):
            ErasedFile(tmp_path / "none" / "erased").read()
        path = tmp_path / "erased"
        file = ErasedFile(path)
        file.add([ONE])
        assert ONE in file
        path.unlink()

        with capture_logs() as lines:
            assert [one in file for one in (ONE, order(2), ONE)] == [True, False, True]

        assert [line["event"] for line in lines] == ["erased_file.failed"]

    @pytest.mark.parametrize("back", ["event", "request", "older copy"])
    def test_after_a_flush_an_erased_order_is_not_fetched_whatever_brings_it_back(
        self, redis_url: str, sandbox: Sandbox, tmp_path: Path, back: str
    ) -> None:
        shop = Shop()
        with worker_lab(redis_url, sandbox, {"shop": shop}) as lab:
            lab.use_key("key", tmp_path / "erased")
            erased, other = lab.issue(2)
            copy = lab.dump()
            ErasedFile(tmp_path / "erased").add([erased])
            lab.redis.flushall()
            if back == "event":
                lab.accept(erased, other)
            elif back == "request":
                lab.request_fetch(erased, other)
            for key, value in copy.items() if back == "older copy" else ():
                lab.redis.restore(key, 0, value)

            lab.run_for(3600)

            assert (len(lab.calls), shop.received) == (1, [other.order_id])
            assert (lab.field("erased_at", erased) is None, lab.field("reference", erased)) == (False, None)
            assert [event["order"] for event in lab.events()] == [other.order_id] * (back != "request")
            assert (lab.pending(), lab.redis.exists(KEYS.erasing)) == (0, 0)

    def test_a_worker_that_is_killed_while_it_erases_again_leaves_no_event(self, lab: Lab, tmp_path: Path) -> None:
        class Killed(Erasure):
            def erase(self, traces: Traces) -> datetime | None:
                super().erase(traces)
                raise KeyboardInterrupt

        file = ErasedFile(tmp_path / "erased")
        file.add([ONE])
        lab.accept(ONE, order(2))

        with pytest.raises(KeyboardInterrupt):
            Killed(lab.redis, order_days=400, file=file).erase_again(ONE)

        assert [event["order"] for event in lab.events()] == [order(2).order_id]


def _add(path: Path, order: OrderKey) -> None:
    ErasedFile(path).add([order])


class TestCommand:
    @pytest.fixture
    def lab(self, lab: Lab, tmp_path: Path) -> Lab:
        (tmp_path / "spool").mkdir(mode=0o700)
        lab.env |= {"SPOOL_DIR": str(tmp_path / "spool"), "ERASED_FILE": str(tmp_path / "erased")}
        return lab

    def test_all_orders_of_a_guest_are_erased_and_copies_in_sinks_named(self, lab: Lab) -> None:
        """The address comes from stdin; no address, reference or ticket is left or printed."""
        for number, address in ((1, ADDRESS), (2, ADDRESS.upper()), (3, "other@example.com")):
            fill(lab, number, address)
        lab.run_command("events", "replay", "--order", "CANARY-OURS-1", "--force", "--why", f"for {ADDRESS}", "--yes")

        ended = lab.run_command("orders", "erase", "--email", "-", "--yes", "--json", stdin=f" {ADDRESS}\n")

        assert (ended.code, ended.err) == (0, "")
        *orders, totals = ended.objects
        assert sorted(one["order_id"] for one in orders) == [order(1).order_id, order(2).order_id]
        copies = {(copy["sink"], key) for one in orders for copy in one["copies"] for key in copy["keys_begin"]}
        assert copies == {(SINK, f"{order(one).company_id}/{order(one).order_id}/1/") for one in (1, 2)}
        assert totals == {"orders": 2, "events": 2, "spooled": 0, "texts": 2, "left": []}
        assert everything_but(lab, 3) == []
        assert not [one for one in CANARIES if one in ended.out]
        assert lab.redis.exists(KEYS.content(order(3)))

    def test_the_order_is_not_found_by_an_earlier_reference(self, lab: Lab) -> None:
        """And another order with that reference still is."""
        lab.accept_and_fetch(order(3), sellToOrderReference="CANARY-OURS-1")
        lab.accept_and_fetch(order(1), sellToOrderReference="CANARY-OURS-1")
        fill(lab, 1, ADDRESS.replace("@", ".new@"))
        lab.accept_and_fetch(order(1), sellToOrderReference="CANARY-OURS-9")

        found, erased = lab.run_commands(
            [("orders", "show", "CANARY-THEIRS-1"), ("orders", "erase", order(1).order_id, "--yes")]
        )

        assert (found.code, erased.code) == (0, 0)
        assert not [key for key in lab.redis.keys("ota:reference:*") if lab.redis.sismember(key, order(1).packed)]
        shown = lab.run_command("orders", "show", "CANARY-OURS-1", "--json")
        assert (shown.code, order(3).order_id in shown.out) == (0, True)

    def test_the_erased_order_is_in_the_file_and_without_one_the_command_says_so(self, lab: Lab) -> None:
        path = lab.folder / "erased"
        fill(lab, 1, ADDRESS)
        fill(lab, 2, ADDRESS)

        without = lab.run_command("orders", "erase", order(1).order_id, "--yes", ERASED_FILE="")
        with_it = lab.run_command("orders", "erase", order(1).order_id, order(2).order_id, "--yes")

        assert (without.code, "ERASED_FILE is not set" in without.err) == (0, True)
        assert (with_it.code, with_it.err) == (0, "")
        assert [order(number) in ErasedFile(path) for number in (1, 2, 3)] == [True, True, False]

    def test_a_dry_run_and_a_missing_yes_change_nothing(self, lab: Lab) -> None:
        fill(lab, 1, ADDRESS)
        before = lab.redis.dump(KEYS.record(order(1)))

        erase = ("orders", "erase", order(1).order_id)
        looked, asked = lab.run_commands([(*erase, "--dry-run"), erase])

        assert (looked.code, asked.code) == (0, 2)
        assert (order(1).order_id in looked.out, SINK in looked.out) == (True, True)
        assert lab.redis.dump(KEYS.record(order(1))) == before

    @pytest.mark.parametrize("steps", range(5))
    def test_a_run_that_died_is_finished_by_the_next(self, lab: Lab, steps: int) -> None:
        """Wherever it died, also by address, which no longer finds an erased order."""
        fill(lab, 1, ADDRESS)
        fill(lab, 2, ADDRESS)
        lab.accept(order(1))
        erasure = erasure_of(lab.redis)
        found = [traces(lab.redis, order(number)) for number in (1, 2)]
        if steps > 0:
            erasure.note([order(1), order(2)], "me", "")
        for one in found[: max(0, steps - 1)]:
            erasure.erase(one)
        if steps > 3:
            erasure.forget_events(found, lambda _: None)

        ended = lab.run_command("orders", "erase", "--email", "-", "--yes", stdin=ADDRESS)

        assert (ended.code, ended.err) == (0, "")
        assert "2 orders erased" in ended.out
        assert everything_but(lab, 3) == []

    def test_a_run_that_died_is_finished_by_the_same_reference(self, lab: Lab) -> None:
        """The reference names no order any more."""
        fill(lab, 1, ADDRESS)
        erasure_of(lab.redis).erase(traces(lab.redis, order(1)))

        again, later = lab.run_commands([("orders", "erase", "CANARY-THEIRS-1", "--yes")] * 2)

        assert (again.code, later.code) == (1, 1)
        assert "No order 'CANARY-THEIRS-1' found" in again.err
        assert "1 order erased" in again.out
        assert "erased" not in later.out
        assert everything_but(lab, 3) == []

    def test_every_command_shows_an_erased_order_as_erased(self, lab: Lab) -> None:
        """None brings it back."""
        fill(lab, 1, ADDRESS)
        name = order(1).order_id
        assert lab.run_command("orders", "erase", name, "--yes").code == 0
        lab.accept(order(1))
        lab.clear_queues()
        commands = [
            ("orders", "show", name),
            ("orders", "explain", name),
            ("orders", "list", "--state", "erased"),
            ("orders", "refetch", name),
            ("dead", "requeue", name, "--yes"),
            ("events", "replay", "--order", name, "--force", "--yes"),
            ("events", "list", "--outcome", "erased"),
        ]

        answers = dict(zip(commands, lab.run_commands(commands), strict=True))

        assert [command for command, ended in answers.items() if "erased" not in ended.out + ended.err] == []
        assert lab.run_command("orders", "show", "CANARY-OURS-1").code == 1
        assert lab.queued("live") == lab.queued("backfill") == []

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
    def test_a_mistake_is_named(self, lab: Lab, arguments: tuple[str, ...], stdin: str, code: int, text: str) -> None:
        """Without the address."""
        ended = lab.run_command("orders", "erase", *arguments, stdin=stdin)

        assert (ended.code, text in ended.err, ADDRESS in ended.err) == (code, True, False)

    def test_a_spool_that_cannot_be_erased_is_named(self, lab: Lab) -> None:
        """The order stays unfinished."""
        fill(lab, 1, ADDRESS)
        broken = lab.folder / "spool" / NAME
        broken.write_text("no database")

        ended = lab.run_command("orders", "erase", order(1).order_id, "--yes", "--json")

        assert (ended.code, ended.objects[-1]["left"]) == (1, [f"{broken} (DatabaseError)"])
        assert lab.redis.zcard(KEYS.erasing) == 1


def fill(lab: Lab, number: int, address: str) -> None:
    """Fetch and deliver an order full of canaries."""
    text = sample("order-issued").decode()
    for known, canary in (
        ("guest@example.com", address),
        ("Jane Doe", "Canary Name"),
        ("TK-000", f"CANARY-TICKET-{number}"),
        ("CM-260601081502-9F3A", f"CANARY-THEIRS-{number}"),
        ("PARTNER-ORDER-2026-00042", f"CANARY-OURS-{number}"),
    ):
        text = text.replace(known, canary)
    lab.accept_and_fetch(order(number), **json.loads(text) | {"orderId": order(number).order_id})
    lab.deliver(order=order(number))
    lab.clear_queues()


def everything_but(lab: Lab, number: int) -> list[str]:
    """Return the keys with a canary, a reference or unfinished erasures, except those of one order."""
    other, erased = order(number), order(1)
    texts = [*map(str.encode, CANARIES), f"CM-{erased.order_id[:8]}".encode()]
    forms = other.order_id.encode(), other.packed.encode()
    found = {name: value for name, value in lab.dump().items() if not any(form in name + value for form in forms)}
    return [
        name.decode()
        for name, value in found.items()
        if any(text in value for text in texts)
        or name == KEYS.erasing.encode()
        or (name.startswith(b"ota:reference") and erased.packed.encode() in value)
    ]
