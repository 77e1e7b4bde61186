"""An erased order does not come back, whatever happens before, after or while it is erased."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from app import bootstrap
from app.erasure import AuditWords, Erasure, Traces
from app.intake.recorder import Entry
from app.intake.spool import SpoolFolder, SpoolTraces
from app.ledger import keys, policy
from app.ledger.guests import Guests
from app.ledger.orders import Archive, Holdings
from app.reconcile.compare import judge, of_watched
from app.reconcile.state import Cursor
from app.replay import Draft, Plans
from app.upstream.decode import Guid
from app.upstream.models import Summary
from tests.integration.commands import run_each
from tests.integration.desk import SINK, Desk, open_desk, order
from tests.integration.ledger_model.parts import content_of
from tests.integration.ledger_model.stage import ONE, SAME_ID, Stage, staged

SHOP: Final = "shop"
ADDRESS: Final = "canary-guest@example.com"
CANARIES: Final = ("canary-guest", "CANARY-THEIRS", "CANARY-OURS", "Canary Name", "CANARY-TICKET")


@pytest.fixture
def stage(redis_client: Redis) -> Iterator[Stage]:
    with staged(redis_client, SHOP) as opened:
        yield opened


def erase(stage: Stage) -> Traces:
    """Erase the order ONE, which is here; return what is left of it."""
    erasure = Erasure(stage.redis, order_days=400, event_days=90)
    found = erasure.traces(ONE)
    assert found is not None
    assert erasure.erase(found, stage.now) is not None
    erasure.forget_events([found], stage.now, lambda _: None)
    erasure.forget_jobs([ONE], lambda _: None)
    left = erasure.traces(ONE)
    assert left is not None
    return left


def events(stage: Stage) -> list[dict[bytes, bytes]]:
    found: Any = stage.redis.xrange(keys.EVENTS)
    return [fields for _, fields in found]


def assert_at_rest(stage: Stage) -> None:
    """Nothing of the order is kept but a tombstone with an end, nothing is owed, and nothing is ever fetched."""
    assert stage.redis.exists(keys.content(ONE)) == 0
    assert stage.redis.hkeys(keys.record(ONE)) != []
    known = {
        b"wanted",
        b"begun",
        b"done",
        b"fence",
        b"stored",
        b"pushed",
        b"duplicates",
        b"first",
        b"heard",
        b"revision",
    }
    left = set(stage.redis.hkeys(keys.record(ONE))) - known - {b"erased", b"shop:at"}
    # A worker's or ticker's own books, without a word of the order.
    assert left <= {b"pushes", b"job"}, left
    assert stage.field("wanted") == stage.field("done")
    assert (stage.due_in(), stage.is_dead()) == (None, False)
    assert stage.days_kept() == {400.0}
    assert stage.begin("last") == "nothing"
    assert stage.hand("last") is None
    assert stage.due_in() is None


class TestTheNextStep:
    """Each of the scripts meets a tombstone."""

    def test_a_new_event_is_recorded_without_its_reference_and_fetches_nothing(self, stage: Stage) -> None:
        stage.settle()
        stage.bring_home(1)
        erase(stage)
        stage.redis.delete(keys.EVENTS)

        assert [stage.settle(), stage.settle()] == ["erased", "erased"]

        assert [fields[b"reference"] for fields in events(stage)] == [b"", b""]
        assert stage.redis.hget(keys.COUNTERS, f"events|{ONE.company_id}|erased") == b"2"
        assert (stage.waiting(), stage.tick()) == (0, 0)
        assert_at_rest(stage)

    def test_an_old_event_that_comes_again_is_still_a_duplicate(self, stage: Stage) -> None:
        stage.hear("2026-11-22T10:00:00Z")
        erase(stage)

        assert stage.hear("2026-11-22T10:00:00Z") == "duplicate"
        assert_at_rest(stage)

    def test_a_fetch_under_way_brings_nothing_back(self, stage: Stage) -> None:
        stage.settle()
        fetch = stage.fetch()
        erase(stage)

        assert stage.store(fetch, 1) == "erased"
        assert_at_rest(stage)

    @pytest.mark.parametrize("what", ["again", "park", "missing", "dead", "gone", "reject"])
    def test_a_fetch_under_way_that_fails_leaves_nothing(self, stage: Stage, what: Any) -> None:
        stage.settle()
        fetch = stage.fetch()
        erase(stage)

        stage.fail(fetch, what)
        assert_at_rest(stage)

    @pytest.mark.parametrize("what", ["done", "again", "dead"])
    def test_a_hand_on_under_way_ends_and_its_copy_is_named(self, stage: Stage, what: Any) -> None:
        """What a sink that failed has kept, nobody knows."""
        stage.settle()
        stage.bring_home(1)
        hand_on = stage.hand()
        assert hand_on is not None
        left = erase(stage)
        stage.handed(hand_on, what)

        assert [(copy.sink, copy.keys_begin) for copy in left.copies] == [
            (SHOP, (f"{ONE.company_id}/{ONE.order_id}/1/",))
        ]
        assert_at_rest(stage)

    def test_a_worker_that_dies_at_it_leaves_nothing_to_do(self, stage: Stage) -> None:
        stage.settle()
        stage.fetch("w1")
        erase(stage)
        stage.ledger.abandon("w1", stage.now)

        assert stage.tick() == 0
        assert_at_rest(stage)

    def test_nobody_can_ask_for_it(self, stage: Stage) -> None:
        stage.settle()
        erase(stage)

        assert [stage.want(), stage.want(queue="backfill")] == [0, 0]
        assert (stage.waiting(), stage.waiting("backfill")) == (0, 0)
        assert_at_rest(stage)

    def test_the_dead_letters_of_it_go(self, stage: Stage) -> None:
        stage.settle()
        stage.bring_home(1)
        hand_on = stage.hand()
        assert hand_on is not None
        stage.handed(hand_on, "dead")
        stage.settle()
        stage.fail(stage.fetch(), "dead")
        erase(stage)

        assert stage.ledger.revive_sink(ONE, SHOP, stage.now) is False
        assert stage.redis.zcard(keys.DEAD_SINKS) == 0
        assert_at_rest(stage)

    def test_a_plan_made_before_passes_it_over(self, stage: Stage) -> None:
        stage.settle()
        stage.bring_home(1)
        plans = Plans(stage.redis, event_days=90)
        made = [
            plans.file(Draft(who="", why="", selected="", rate=100, sinks=sinks), [(ONE.member, None)], stage.now)
            for sinks in ((), (SHOP,))
        ]
        erase(stage)
        stage.later(60)

        assert [plans.feed(plan, stage.now).left for plan in made] == [0, 0]
        assert [(plan.passed, plan.queued) for plan in map(plans.of, (plan.id for plan in made)) if plan] == [
            (1, 0)
        ] * 2
        assert_at_rest(stage)

    @pytest.mark.parametrize("status", ["Issued", "Cancelled", "Processing"])
    def test_it_is_no_gap_in_the_list_of_orders(self, stage: Stage, status: str) -> None:
        stage.settle()
        stage.bring_home(1)
        Cursor(stage.redis, ONE.company_id).watch([ONE.order_id], stage.now)
        erase(stage)
        (held,) = Holdings(stage.redis).of([ONE])
        row = Summary(order_id=Guid(ONE.order_id), status=status, job_id="another")

        assert judge(ONE.company_id, row, held, open_since=0, now=stage.now, oldest=0) is None
        assert of_watched(ONE.company_id, ONE.order_id, held, 0) is None
        assert Cursor(stage.redis, ONE.company_id).watched() == {}

    def test_another_companys_order_with_the_same_id_stays(self, stage: Stage) -> None:
        stage.settle()
        stage.settle(SAME_ID)
        stage.bring_home(1, order=SAME_ID)
        erase(stage)

        assert stage.redis.exists(keys.content(SAME_ID)) == 1
        assert [fields[b"company"].decode() for fields in events(stage)] == [SAME_ID.company_id]


class TestErasing:
    def test_a_content_that_came_after_its_words_were_read_is_read_first(self, stage: Stage) -> None:
        """Else its references would stay in the index."""
        erasure = Erasure(stage.redis, order_days=400, event_days=90)
        stage.settle()
        read = erasure.traces(ONE)
        assert read is not None
        stage.bring_home(1)

        assert erasure.erase(read, stage.now) is None
        assert stage.redis.exists(keys.content(ONE)) == 1
        erase(stage)
        assert_at_rest(stage)

    def test_again_it_changes_nothing(self, stage: Stage) -> None:
        """The tombstone does not live longer for it."""
        stage.settle()
        stage.bring_home(1)
        first = erase(stage)
        stage.redis.pexpire(keys.record(ONE), 100 * policy.DAY)
        stage.redis.pexpire(keys.trail(ONE), 100 * policy.DAY)
        stage.later(3600)

        assert erase(stage) == first
        assert stage.days_kept() == {100.0}

    def test_the_trail_keeps_only_what_sinks_were_handed(self, stage: Stage) -> None:
        stage.settle()
        stage.bring_home(1)
        hand_on = stage.hand()
        assert hand_on is not None
        stage.handed(hand_on)
        erase(stage)

        assert [type(entry).__name__ for entry in Archive(stage.redis).trail(ONE)] == ["HandedOn", "Erased"]

    def test_events_go_from_long_streams_page_by_page(self, stage: Stage) -> None:
        stage.settle()
        for number in range(30):
            stage.hear_at_once(*((SAME_ID, f"{number}-{one}") for one in range(80)), (ONE, f"{number}"))
        pages: list[int] = []
        erasure = Erasure(stage.redis, order_days=400, event_days=90)
        found = erasure.traces(ONE)
        assert found is not None

        assert erasure.forget_events([found], stage.now, pages.append) == 31

        assert (len(pages), sum(pages)) == (10, 31 + 2400)
        assert stage.redis.xlen(keys.EVENTS) == 2400

    def test_jobs_go_from_long_queues_wherever_they_stand(self, stage: Stage) -> None:
        stage.redis.rpush("rq:queue:live", *(f"f-x-{number}" for number in range(1500)))
        stage.settle()
        stage.redis.rpush("rq:queue:live", *(f"f-x-{number}" for number in range(1500, 2600)))
        assert len(stage.redis.keys("rq:job:*")) == 1

        assert Erasure(stage.redis, order_days=400, event_days=90).forget_jobs([ONE], lambda _: None) == 1

        assert stage.waiting() == 2600
        assert stage.redis.keys("rq:job:*") == []


STEPS: dict[str, Callable[[Stage], object]] = {
    "settle": Stage.settle,
    "want": Stage.want,
    "want_later": lambda stage: stage.want(queue="backfill"),
    "begin": Stage.begin,
    "tick": Stage.tick,
    "hour": lambda stage: stage.later(3600),
    "hand": Stage.hand,
    "kill": lambda stage: stage.ledger.abandon("w", stage.now),
    "revive": lambda stage: stage.ledger.revive_sink(ONE, SHOP, stage.now),
    "nudge": lambda stage: stage.ledger.nudge([ONE], stage.now),
}


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.lists(st.sampled_from([*STEPS, "fetch_and_store", "hand_on"]), max_size=8),
    after=st.lists(st.sampled_from([*STEPS, "finish", "fail", "handed"]), max_size=8),
)
def test_no_interleaving_brings_it_back(stage: Stage, before: list[str], after: list[str]) -> None:
    """Whatever came before, and whatever of it ends after: nothing is stored, owed, queued or handed on."""
    stage.redis.flushdb()
    stage.settle()
    for name in before:
        fetch = stage.ledger.begin(ONE, "w", stage.now)[1] if name == "fetch_and_store" else None
        if fetch is not None:
            stage.store(fetch, stage.now)
        elif name == "hand_on" and (taken := stage.hand()) is not None:
            stage.handed(taken)
        elif name in STEPS:
            STEPS[name](stage)
    fetch, hand_on = stage.ledger.begin(ONE, "w", stage.now)[1], stage.hand()
    wanted = stage.field("wanted")
    erase(stage)
    for name in after:
        if name == "finish" and fetch is not None:
            assert stage.store(fetch, 99) == "erased"
        elif name == "fail" and fetch is not None:
            stage.fail(fetch, "again")
        elif name == "handed" and hand_on is not None:
            stage.handed(hand_on)
        elif name in STEPS:
            STEPS[name](stage)
        assert (stage.waiting(), stage.waiting("backfill")) == (0, 0)

    assert stage.field("wanted") == wanted
    assert_at_rest(stage)


class TestGuests:
    def test_an_order_is_found_by_any_address_in_it_in_any_case(self, stage: Stage) -> None:
        guests = Guests(stage.redis)
        stage.settle()
        content = msgspec.structs.replace(content_of(1), guests=("Anna@Example.com", "ben@example.com"))
        stage.ledger.finish(ONE, "w", stage.fetch(), content, stage.now)

        found = [guests.orders(one, None, lambda _: None) for one in (" anna@EXAMPLE.com", "ben@example.com", "c@d.e")]

        assert found == [[ONE], [ONE], []]
        assert guests.orders("ben@example.com", SAME_ID.company_id, lambda _: None) == []

    def test_a_guest_who_is_in_the_order_no_more_is_not_found_by_it(self, stage: Stage) -> None:
        for version, guest in enumerate((("anna@example.com",), ())):
            stage.settle()
            content = msgspec.structs.replace(content_of(version), guests=guest)
            stage.ledger.finish(ONE, "w", stage.fetch(), content, stage.now)

        assert Guests(stage.redis).orders("anna@example.com", None, lambda _: None) == []

    def test_digests_are_salted_and_the_salt_is_made_once(self, stage: Stage) -> None:
        """Whoever knows an address and sees a record of another installation learns nothing."""
        first = Guests(stage.redis).digests(["anna@example.com"])
        again = Guests(stage.redis).digests(["anna@example.com"])
        stage.redis.delete(keys.SALT)

        assert first == again != Guests(stage.redis).digests(["anna@example.com"])
        assert stage.redis.ttl(keys.SALT) == -1


def test_rows_of_living_and_dead_spools_go_and_leave_nothing_on_the_disk(tmp_path: Path) -> None:
    """The owner of a file goes on writing to it."""
    folder = SpoolFolder(tmp_path / "spool", 2**24)
    entry = Entry("d", *ONE, "Issued", "CANARY-THEIRS", "current", "r", "", 1)
    other = Entry("e", *SAME_ID, "Issued", "CM-1", "current", "r", "", 1)
    living, dead = folder.create(), folder.create()
    for claim in (living, dead):
        claim.file.put([entry, other, entry])
    dead.release()
    (folder.path / "broken.sqlite").write_text("no database")
    (folder.path / "unborn.sqlite").touch()
    traces = SpoolTraces(folder.path)

    gone, again = traces.forget([ONE]), traces.forget([ONE])

    assert (gone.rows, again.rows) == (4, 0)
    assert gone.troubles == (f"{folder.path / 'broken.sqlite'} (DatabaseError)",)
    assert [kept.entry for kept in living.file.oldest(9)] == [other]
    assert not any(b"CANARY" in path.read_bytes() for path in folder.path.iterdir())
    living.file.put([other])


def test_texts_of_replays_that_name_the_order_or_the_guest_go(stage: Stage) -> None:
    """Whole words in any case; the plan itself, and what an erasure notes, stay."""
    plans, words = Plans(stage.redis, event_days=90), AuditWords(stage.redis)
    Erasure(stage.redis, order_days=400, event_days=90).note([ONE], "me", "asked for", stage.now)
    names = [f"ticket of {ADDRESS.upper()}", f"lost: {ONE.order_id}.", "lost: CM-12", "lost: CM-123"]
    made = [plans.file(Draft(who="me", why=one, selected="", rate=1), [], stage.now) for one in names]
    told = [ONE.order_id, "cm-12", ADDRESS]

    assert (words.forget(told), words.forget(told)) == (6, 0)

    assert [plan.why for plan in map(plans.of, (plan.id for plan in made)) if plan] == ["", "", "", "lost: CM-123"]
    assert stage.redis.xlen(keys.AUDIT) == 2


class TestCommand:
    @pytest.fixture
    def desk(self, redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
        desk = open_desk(redis_client, redis_url, tmp_path)
        (tmp_path / "spool").mkdir(mode=0o700)
        desk.env["SPOOL_DIR"] = str(tmp_path / "spool")
        return desk

    def test_all_orders_of_a_guest_go_and_sinks_copies_are_named(self, desk: Desk) -> None:
        """The address comes by stdin, and neither it nor a reference nor a ticket is left anywhere, or printed."""
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
        assert totals == {"orders": 2, "events": 2, "jobs": 1, "spooled": 0, "texts": 2, "left": []}
        assert everything_but(desk, 3) == []
        assert not [one for one in CANARIES if one in ended.out]
        assert desk.redis.exists(keys.content(order(3)))
        assert desk.redis.zcard(keys.ERASING) == 0

    def test_it_is_told_what_goes_and_nothing_goes_without_yes(self, desk: Desk) -> None:
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
        """Wherever it died; also one by address, which finds an order no more whose digests have gone."""
        fill(desk, 1, ADDRESS)
        fill(desk, 2, ADDRESS)
        desk.hear(order(1))
        erasure = Erasure(desk.redis, order_days=400, event_days=90)
        found = [one for one in map(erasure.traces, (order(1), order(2))) if one is not None]
        now = bootstrap.clock()
        all_steps: list[Callable[[], object]] = [
            lambda: erasure.note([order(1), order(2)], "me", "", now),
            lambda: erasure.erase(found[0], now),
            lambda: erasure.erase(found[1], now),
            lambda: erasure.forget_events(found, now, lambda _: None),
        ]
        for step in all_steps[:steps]:
            step()

        ended = desk.run("orders", "erase", "--email", "-", "--yes", stdin=ADDRESS)

        assert (ended.code, ended.err) == (0, "")
        assert "2 orders erased" in ended.out
        assert everything_but(desk, 3) == []
        assert (desk.redis.zcard(keys.ERASING), desk.waiting("live")) == (0, [])

    def test_a_run_that_died_is_finished_though_the_reference_names_nothing_any_more(self, desk: Desk) -> None:
        """The references went first: who says the same command again must not be stopped by that."""
        fill(desk, 1, ADDRESS)
        erasure = Erasure(desk.redis, order_days=400, event_days=90)
        found = erasure.traces(order(1))
        assert found is not None
        erasure.erase(found, bootstrap.clock())

        again, later = run_each(desk, [("orders", "erase", "CANARY-THEIRS-1", "--yes")] * 2)

        assert (again.code, later.code) == (1, 1)
        assert "No order 'CANARY-THEIRS-1' is here" in again.err
        assert "1 order erased" in again.out
        assert "erased" not in later.out
        assert everything_but(desk, 3) == []
        assert (desk.redis.zcard(keys.ERASING), desk.waiting("live")) == (0, [])

    def test_afterwards_every_command_says_so(self, desk: Desk) -> None:
        """And none brings it back."""
        fill(desk, 1, ADDRESS)
        name = order(1).order_id
        (erased,) = run_each(desk, [("orders", "erase", name, "--yes")])
        assert erased.code == 0, erased.err
        desk.hear(order(1))
        commands = [
            ("orders", "show", name),
            ("orders", "explain", name),
            ("orders", "list", "--state", "erased"),
            ("orders", "refetch", name),
            ("dead", "requeue", name, "--yes"),
            ("events", "replay", "--order", name, "--force", "--yes"),
            ("events", "list", "--outcome", "erased"),
        ]

        said = dict(zip(commands, run_each(desk, commands), strict=True))

        assert [command for command, ended in said.items() if "erased" not in ended.out + ended.err] == []
        assert run_each(desk, [("orders", "show", "CANARY-OURS-1")])[0].code == 1
        assert desk.waiting("live") == desk.waiting("backfill") == []

    @pytest.mark.parametrize(
        ("arguments", "stdin", "code", "text"),
        [
            ((), "", 2, "Say which"),
            (("x", "--email", "-"), "", 2, "Say which"),
            (("--email", "-"), "", 2, "no e-mail address"),
            (("--email", "-", "--yes"), ADDRESS, 1, "No order of this guest"),
            (("nothing", "--yes"), "", 1, "No order"),
        ],
    )
    def test_a_mistake_is_one_sentence(
        self, desk: Desk, arguments: tuple[str, ...], stdin: str, code: int, text: str
    ) -> None:
        """Which does not repeat the address."""
        ended = desk.run("orders", "erase", *arguments, stdin=stdin)

        assert ended.code == code
        assert text in ended.err
        assert ADDRESS not in ended.err

    def test_a_spool_that_cannot_be_cleaned_is_named(self, desk: Desk) -> None:
        """And the order stays on the list of what is to be finished."""
        fill(desk, 1, ADDRESS)
        broken = desk.folder / "spool" / "1-a.sqlite"
        broken.write_text("no database")

        ended = desk.run("orders", "erase", order(1).order_id, "--yes", "--json")

        assert (ended.code, ended.objects[-1]["left"]) == (1, [f"{broken} (DatabaseError)"])
        assert desk.redis.zcard(keys.ERASING) == 1


def fill(desk: Desk, number: int, address: str) -> None:
    """Bring an order home that is full of canaries, and hand it on."""
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
    hand_on = ledger.hand(order(number), "w-live-1", 1)
    assert hand_on is not None
    ledger.handed(order(number), "w-live-1", hand_on, 2, what="done")
    desk.forget_jobs()


def everything_but(desk: Desk, number: int) -> list[str]:
    """Return the keys that still name a canary, or a reference of an event, save those of one order."""
    found = []
    for key in desk.redis.scan_iter("*"):
        value = desk.redis.dump(key) or b""
        kind = desk.redis.type(key)
        if kind == b"hash":
            value = repr(desk.redis.hgetall(key)).encode()
        elif kind == b"stream":
            value = repr(desk.redis.xrange(key)).encode()
        elif kind == b"list":
            value = repr(desk.redis.lrange(key, 0, -1)).encode()
        elif kind == b"set":
            value = repr(desk.redis.smembers(key)).encode()
        names_another = order(number).order_id.encode() in key + value
        wanted = [one.encode() for one in CANARIES] + [f"CM-{order(1).order_id[:8]}".encode()]
        in_index = key.startswith(b"ota:reference") and order(1).order_id.encode() in value
        if (any(one in value for one in wanted) or in_index) and not names_another:
            found.append(key.decode())
    return found
