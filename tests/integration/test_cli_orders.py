"""`orders list`, `show`, `explain` and `refetch`: orders are found, shown masked, explained and fetched again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Final, Literal

import pytest
from msgspec.structs import replace
from rq.suspension import suspend

from app import times
from app.ids import OrderKey
from app.ledger import policy
from app.ledger.content import pack
from app.ledger.ledger import Ledger
from tests.command import Ended
from tests.lab import KEYS, LEASE, MUSEUM, SINK, VENUE, WORKER, Lab, configuration, event_of, order

SECRETS = (
    *("TK-000123456", "CP-0009981", "141234529930210327"),
    *("Jane Doe", "guest@example.com", "PAY-987654", "7c3f1a8b"),
)


@pytest.fixture
def fetched(lab: Lab) -> Lab:
    """A pool runs; order 1 is fetched and not delivered yet; no job waits."""
    lab.declare()
    lab.accept_and_fetch(order(1))
    lab.clear_queues()
    return lab


def test_tickets_are_masked_without_reveal(fetched: Lab) -> None:
    show = ("orders", "show", order(1).order_id)
    page, line, whole = fetched.run_commands([show, (*show, "--json"), (*show, "--reveal", "--json")])

    assert [one.code for one in (page, line, whole)] == [0, 0, 0]
    assert [secret for secret in SECRETS if secret in page.out + line.out] == []
    assert [secret for secret in SECRETS if secret not in whole.out] == []
    (shown,) = line.objects
    values = (shown["state"], shown["company"], shown["wallets"], shown["tickets"], shown["coupons"])
    assert values == ("fetched", "venue", 2, 2, 1)
    wallet = shown["order"]["items"][0]["wallets"][0]
    assert (wallet["assets"][0]["referenceNumber"], wallet["unitPriceInclVat"]) == ("…456", 200)
    assert [entry["kind"] for entry in shown["history"]] == ["event", "started", "stored"]


def test_of_two_companies_with_the_same_order_id_one_must_be_named(lab: Lab) -> None:
    lab.accept(order(1), order(1, MUSEUM))

    unclear = lab.run_command("orders", "show", order(1).order_id)
    names = (order(1).order_id, "CM-00000000")
    named = [lab.run_command("orders", "show", name, "--company", "museum", "--json") for name in names]

    assert (unclear.code, "--company" in unclear.err) == (2, True)
    assert [one.objects[0]["company_id"] for one in named] == [MUSEUM, MUSEUM]


def test_an_order_of_a_company_removed_from_the_settings_is_found(lab: Lab) -> None:
    removed = order(1, "33333333-3333-4333-8333-333333333333")
    lab.accept(removed)

    shown = lab.run_command("orders", "show", removed.order_id, "--json").objects[0]

    assert (shown["company"], shown["state"]) == (removed.company_id, "pending")


def test_each_state_has_a_next_step(lab: Lab) -> None:
    lab.declare()
    draft, dead, deferred, fetching, sink = (order(number) for number in range(5))
    lab.accept(draft, dead, deferred, fetching, sink)
    lab.fetch_and_store(draft, "order-draft")
    lab.dead_letter(dead, reason="order_missing")
    lab.fail_fetch("deferred", deferred, reason="unauthorized", http_status=401)
    lab.start_fetch(fetching)
    lab.fetch_and_store(sink)
    lab.dead_letter_delivery(sink)

    states = {one["order_id"]: one["state"] for one in lab.run_command("orders", "list", "--json").objects}

    for one, state, step in (
        (draft, "fetched", f"orders confirm {draft.order_id}"),
        (dead, "dead", f"dead requeue {dead.order_id}"),
        (deferred, "deferred", "unauthorized"),
        (fetching, "fetching", "Nothing"),
        (sink, "fetched", f"dead requeue {sink.order_id}"),
    ):
        assert states[one.order_id] == state
        assert step in lab.run_command("orders", "show", one.order_id, "--json").objects[0]["next"]


def test_orders_are_listed_newest_first_and_filtered(lab: Lab) -> None:
    now = lab.now
    lab.accept(order(1), at=now - 7200000)
    lab.accept(order(2), status="Draft", at=now - 60000)
    lab.accept(order(3, MUSEUM), at=now - 30000)
    lab.accept(order(4), at=now - 90000)
    lab.fetch_and_store(order(4))

    def listed(*filters: str) -> list[int]:
        return [int(one["order_id"][-2:]) for one in lab.run_command("orders", "list", "--json", *filters).objects]

    assert listed() == [4, 3, 2, 1]
    assert order(1).order_id in lab.run_command("orders", "list").out, "ids are whole in a pipe"
    assert listed("--limit", "2") == [4, 3]
    assert listed("--state", "fetched") == [4]
    assert listed("--status", "DRAFT") == [2]
    lab.dead_letter(order(3, MUSEUM))
    assert listed("--dead") == listed("--state", "dead") == [3]
    assert listed("--dead", "--company", "venue") == []
    assert listed("--company", "venue", "--since", "1h") == [4, 2]
    assert listed("--until", "1h") == [1]


def test_a_refetch_is_in_the_live_queue_and_asks_nothing(fetched: Lab) -> None:
    both = [order(1).order_id, order(2).order_id]
    unknown = fetched.run_command("orders", "refetch", *both)
    assert (unknown.code, fetched.queued("live")) == (1, [])

    fetched.accept(order(2))
    ended = fetched.run_command("orders", "refetch", *both, "--json")

    assert (ended.code, ended.objects) == (0, [{"orders": 2, "queued": 1, "waiting": 1, "erased": 0}])
    assert fetched.queued("live") == [order(2).order_id, order(1).order_id]


def test_control_codes_and_markup_of_upstream_have_no_effect(lab: Lab) -> None:
    lab.accept_and_fetch(order(1), "order-error", statusMessage="[bold]no\x1b[2J item[/bold]")

    ended = lab.run_command("orders", "show", order(1).order_id)

    assert "[bold]no�[2J item[/bold]" in ended.out
    assert "\x1b" not in ended.out


def test_attempts_of_a_pending_fetch_and_delivery_are_shown(fetched: Lab) -> None:
    fetched.deliver("retry", order(1), reason="OSError", wait=60)
    fetched.accept(order(2))
    fetched.fail_fetch("retry", order(2), reason="http_503", http_status=503)

    page, other = (fetched.run_command("orders", "show", order(number).order_id) for number in (1, 2))

    text = " ".join(page.out.split())
    assert f"sink {SINK}: revision 1 not delivered yet, failed: OSError (1 attempt)" in text
    assert "(1 attempt); next attempt " in text
    assert f"At once: ota-receiver dead requeue {order(1).order_id}" in text
    assert "http_503, HTTP 503, 1 attempt\n" in re.sub(" +\n", "\n", other.out)


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_is_refused(lab: Lab, text: str) -> None:
    """It does not name the order without a reference."""
    lab.redis.hset(KEYS.record(order(1)), mapping={"generation": 1, "fetched_generation": 1})
    lab.redis.zadd(KEYS.orders, {order(1).member: 1})

    for ended in lab.run_commands([("orders", word, text) for word in ("show", "explain", "refetch")]):
        assert (ended.code, ended.out, "empty" in ended.err) == (2, "", True)
    assert lab.queued("live") == []


def test_the_advice_has_the_company_if_two_have_the_order_id(lab: Lab) -> None:
    for one in (order(1), order(1, MUSEUM), order(2)):
        lab.accept(one)
        lab.dead_letter(one)

    for one, slug, more in ((order(1), "museum", " --company museum"), (order(2), "venue", "")):
        (shown,) = lab.run_command("orders", "show", one.order_id, "--company", slug, "--json").objects
        assert shown["next"].partition("dead requeue ")[2] == one.order_id + more


@pytest.mark.parametrize("broken", ["wrong type", "no number"])
def test_one_broken_record_hides_no_other_order(lab: Lab, broken: str) -> None:
    lab.accept(order(1), order(2), order(3))
    lab.fetch_and_store(order(3))
    if broken == "wrong type":
        lab.overwrite(KEYS.record(order(2)), None)
    else:
        lab.redis.hset(KEYS.record(order(2)), "generation", "rubbish")

    listed, found, searched, status, itself = lab.run_commands(
        [
            ("orders", "list", "--json"),
            ("orders", "show", "PARTNER-ORDER-2026-00042", "--json"),
            ("orders", "show", "CM-NOWHERE"),
            ("status", "--json"),
            ("orders", "show", order(2).order_id),
        ]
    )

    assert (listed.code, sorted(one["order_id"][-1] for one in listed.objects)) == (0, ["1", "3"])
    assert (len(listed.err.splitlines()), KEYS.record(order(2)) in listed.err) == (1, True)
    assert found.objects[0]["order_id"] == order(3).order_id
    assert (searched.code, "'CM-NOWHERE'" in searched.err) == (1, True)
    assert (status.err, status.objects[0]["due"]) == ("", 2)
    assert (itself.code, itself.out, KEYS.record(order(2)) in itself.err) == (1, "", True)


@pytest.mark.parametrize("content", [b"no zlib", pack(b"no order"), None])
def test_unreadable_content_is_reported_with_an_advice(fetched: Lab, content: bytes | None) -> None:
    fetched.overwrite(KEYS.content(order(1)), content)
    name = order(1).order_id

    shown, line, explained = fetched.run_commands(
        [("orders", "show", name), ("orders", "show", name, "--json"), ("orders", "explain", name)]
    )

    assert [shown.code, line.code, explained.code] == [0, 0, 1]
    assert "unreadable; revision 1" in shown.out
    assert f"ota-receiver orders refetch {name}" in line.objects[0]["next"]
    assert "pending   its content is unreadable" in explained.out
    assert f"  ota-receiver orders refetch {name}\n" in explained.out


@pytest.mark.parametrize("kind", ["a byte", "wrong type"])
def test_an_unreadable_history_hides_nothing_else(lab: Lab, kind: str) -> None:
    lab.accept(order(1))
    if kind == "a byte":
        lab.redis.rpush(KEYS.history(order(1)), b"1780000000000 \xff\xfe")
    else:
        lab.redis.set(KEYS.history(order(1)), "rubbish")

    shown = lab.run_commands([("orders", word, order(1).order_id) for word in ("show", "explain")])

    assert [ended.code for ended in shown] == [0, 1]
    sentence = "an entry that this version cannot read" if kind == "a byte" else "unreadable"
    assert all(sentence in ended.out and "1970" not in ended.out for ended in shown)


def explain(lab: Lab, one: OrderKey | str, *options: str, **env: str) -> Ended:
    ended = lab.run_command("orders", "explain", one if isinstance(one, str) else one.order_id, *options, **env)
    if "--json" not in options:
        lines = [line for line in ended.out.splitlines() if not line.startswith("  ota-receiver ")]
        assert max(map(len, lines), default=0) <= 80
    return ended


def flat(ended: Ended) -> str:
    return re.sub(r"\s+", " ", ended.out)


def test_a_fetched_and_delivered_order_is_complete(lab: Lab) -> None:
    lab.accept_and_fetch(order(1))
    lab.deliver(order=order(1))

    page, line = explain(lab, order(1)), explain(lab, order(1), "--json")

    assert (page.code, line.code) == (0, 0)
    for text in (
        "COMPLETE: fetched, Issued",
        "2 wallets, 2 tickets, 1 coupon, a manifest; revision 1",
        "(HTTP 200 in 42 ms)",
        "(secret current, request ",
        "event: fetched after",
    ):
        assert text in flat(page)
    assert [secret for secret in SECRETS if secret in page.out + line.out] == []
    (found,) = line.objects
    assert [step["what"] for step in found["steps"]] == ["event", "started", "stored", "delivery"]
    assert (found["complete"], found["outstanding"]) == (True, [])
    assert 0 <= found["durations"]["fetched_ms"] <= found["durations"]["delivered_ms"] < 60_000
    for name in ("CM-260601081502-9F3A", "partner-order-2026-00042", "cm-00000000"):
        assert explain(lab, name).code == 0


def _fetch_while_a_pool_runs(lab: Lab) -> None:
    lab.declare()
    lab.accept_and_fetch(order(1))


def _defer_for_its_company(lab: Lab, *companies: str) -> None:
    """Defer the fetch as a pool does that lacks the company; then one with `companies` (of none: all) runs."""
    lab.accept(order(1))
    lab.fail_fetch("deferred", order(1), reason="unknown_company", wait=60)
    lab.declare(companies=configuration((), *companies).companies)


def _fetch_and_run_no_pool_with_the_sink(lab: Lab, sink: str = SINK) -> None:
    lab.redis.delete(KEYS.sinks)
    Lab(lab.redis, sinks=(sink,)).accept_and_fetch(order(1))
    lab.declare(sinks=())


def _deliver_for_a_while(lab: Lab, first: Literal["", "retry"] = "", lease_left: int = 0) -> None:
    """Let a worker call the sink; its call has not ended. `lease_left`: ms that its lease has left."""
    _fetch_while_a_pool_runs(lab)
    if first:
        lab.deliver(first, order(1), failure="E at a.py:1", wait=0)
    lab.start_delivery(order(1))
    if lease_left:
        lab.redis.hset(KEYS.record(order(1)), f"{SINK}:lease", lab.now + lease_left)


DELIVERING: Final = ("not delivered yet", f"next Nothing: a delivery to {SINK} has been running since ")
INCOMPLETE: dict[str, tuple[Callable[[Lab], object], tuple[str, ...]]] = {
    "not delivered": (
        _fetch_while_a_pool_runs,
        (
            "NOT COMPLETE: fetched, Issued",
            f"{SINK}: revision 1 not delivered yet",
            "next attempt",
            "next Nothing: delivery is attempted at ",
        ),
    ),
    "being delivered": (_deliver_for_a_while, DELIVERING),
    "being delivered again": (lambda lab: _deliver_for_a_while(lab, "retry"), (*DELIVERING, "failed: E at a.py:1")),
    "delivered by a worker that died": (
        lambda lab: _deliver_for_a_while(lab, lease_left=-1),
        ("next Nothing: delivery is attempted at ",),
    ),
    "unknown status": (
        lambda lab: lab.redis.hset(KEYS.record(order(1)), mapping={"generation": 1}),
        ("NOT COMPLETE: pending\n",),
    ),
    "dead": (
        lambda lab: (lab.accept(order(1)), lab.fail_fetch("dead", order(1), reason="order_missing")),
        ("the fetch is a dead letter: order_missing", f"dead requeue {order(1).order_id}"),
    ),
    "company that a pool has by now": (
        _defer_for_its_company,
        ("next Nothing: it will be fetched (last error: unknown_company).", "; next attempt "),
    ),
}


UNSCHEDULED = "It has no time in ota:due, or one days ahead, so no dispatcher sees it. A worker pool that runs finds it"
NO_POOL = "It will not be fetched or delivered: no worker pool runs. Start one: ota-receiver worker"
NOT_BY_ITSELF: dict[str, tuple[Callable[[Lab], object], str]] = {
    "a fetch in no due": (lambda lab: (lab.accept(order(1)), lab.redis.delete(KEYS.due)), UNSCHEDULED),
    "a fetch days ahead": (
        lambda lab: (lab.accept(order(1)), lab.redis.zadd(KEYS.due, {order(1).member: lab.now + 3 * policy.DAY})),
        UNSCHEDULED,
    ),
    "a delivery in no due": (
        lambda lab: (lab.accept_and_fetch(order(1)), lab.redis.delete(KEYS.deliveries(SINK))),
        f"It has no time in {KEYS.deliveries(SINK)}, or one days ahead",
    ),
    "a fetch in no due whose worker died": (
        lambda lab: (
            lab.accept(order(1), at=lab.now - policy.DAY),
            Ledger(lab.redis, order_days=400, fetch_lease=LEASE, clock=lambda: lab.now - policy.DAY).start_fetch(
                order(1), WORKER
            ),
            lab.redis.delete(KEYS.due),
        ),
        UNSCHEDULED,
    ),
    "RQ is suspended": (
        lambda lab: (lab.accept(order(1)), suspend(lab.redis)),
        'It will not be fetched or delivered: RQ is suspended. Its own command ends that: rq resume --url "$REDIS_URL"',
    ),
    "RQ is suspended, deferred": (
        lambda lab: (lab.accept(order(1)), lab.fail_fetch("deferred", order(1)), suspend(lab.redis)),
        "RQ is suspended",
    ),
    "RQ is suspended, to be delivered": (
        lambda lab: (lab.accept_and_fetch(order(1)), suspend(lab.redis)),
        "RQ is suspended",
    ),
    "no pool runs": (
        lambda lab: (lab.accept(order(1)), lab.redis.delete(KEYS.pools)),
        NO_POOL,
    ),
    "no pool runs, deferred": (
        lambda lab: (lab.accept(order(1)), lab.fail_fetch("deferred", order(1)), lab.redis.delete(KEYS.pools)),
        NO_POOL,
    ),
    "no pool runs, a Draft to be delivered": (
        lambda lab: (lab.accept(order(1)), lab.fetch_and_store(order(1), "order-draft"), lab.redis.delete(KEYS.pools)),
        NO_POOL,
    ),
    "no running pool has the sink": (
        _fetch_and_run_no_pool_with_the_sink,
        f"No running pool has the sink {SINK}. Add it to SINKS of a pool, and restart that pool.",
    ),
    "no running pool has the sink of a table": (
        lambda lab: _fetch_and_run_no_pool_with_the_sink(lab, "shop"),
        "No running pool has the sink shop. Add it to SINKS_FILE of a pool, and restart that pool.",
    ),
    "no running pool has the company": (
        lambda lab: _defer_for_its_company(lab, "museum"),
        f"No running pool has the company {VENUE}. Add it to the settings of a pool, and restart that pool.",
    ),
}


@pytest.mark.parametrize("case", NOT_BY_ITSELF)
def test_what_does_not_happen_by_itself_is_not_announced(lab: Lab, case: str) -> None:
    """What counts is what will happen, not what the record says is outstanding."""
    make, text = NOT_BY_ITSELF[case]
    lab.declare()
    make(lab)

    page, (found,) = explain(lab, order(1)), explain(lab, order(1), "--json").objects

    assert (page.code, found["complete"], text in flat(page)) == (1, False, True)
    assert "next Nothing" not in flat(page)
    assert "next attempt" not in flat(page)
    if text == UNSCHEDULED:
        assert lab.run_command("orders", "refetch", order(1).order_id).code == 0
        lab.declare()
        assert lab.due_in(order(1)) is not None
        assert "next Nothing: it will be fetched" in flat(explain(lab, order(1)))


def test_an_order_in_due_without_a_record_is_not_found(lab: Lab) -> None:
    lab.accept(order(1))
    lab.redis.delete(KEYS.record(order(1)))

    ended = explain(lab, order(1))

    assert (ended.code, ended.out, "reconcile --from-zero --apply" in ended.err) == (1, "", True)


def test_an_order_that_is_fetched_now_or_needs_nothing_needs_no_due_time(lab: Lab) -> None:
    lab.declare()
    lab.accept(order(1))
    lab.start_fetch(order(1))
    lab.accept_and_fetch(order(2))
    lab.deliver(order=order(2))
    lab.redis.delete(KEYS.due)

    assert "next Nothing: it will be fetched" in flat(explain(lab, order(1)))
    assert explain(lab, order(2)).code == 0


def test_an_order_is_found_and_explained_by_the_id_of_its_latest_post(lab: Lab) -> None:
    for request_id in ("0123456789abcdef", "fedcba9876543210"):
        lab.accept_events(replace(event_of(order(1)), request_id=request_id))
    lab.accept(order(2))

    ended = lab.run_command("orders", "explain", "FEDCBA9876543210")

    assert f"order {order(1).order_id} (venue)" in ended.out
    assert "request   fedcba9876543210" in ended.out
    assert "queued (secret current, request 0123456789abcdef)" in flat(ended)
    assert "coalesced (secret current, request fedcba9876543210)" in flat(ended)
    assert lab.run_command("orders", "explain", "0123456789abcdef").code == 1


@pytest.mark.parametrize("state", INCOMPLETE)
def test_an_order_that_is_not_complete_is_explained_with_its_next_step(lab: Lab, state: str) -> None:
    make, texts = INCOMPLETE[state]
    make(lab)

    ended = explain(lab, order(1))

    assert ended.code == 1
    assert [text for text in texts if text not in ended.out + flat(ended)] == []
    assert "tickets are here" not in ended.out
    assert not (DELIVERING[1] in flat(ended) and "next attempt" in ended.out)


def test_an_order_fetched_before_a_sink_was_declared_is_delivered_to_it_by_a_replay(lab: Lab) -> None:
    lab.accept_and_fetch(order(1))
    lab.deliver(order=order(1))
    lab.declare(sinks=("python:operator:eq",))
    assert (explain(lab, order(1)).code, lab.acquire_delivery(order(1))) == (0, None)

    replayed = lab.run_command(
        "events", "replay", "--order", order(1).order_id, "--to-sinks", "python:operator:eq", "--yes"
    )

    assert replayed.code == 0, replayed.err
    ended = explain(lab, order(1))
    assert (ended.code, "pending python:operator:eq: revision 1 not delivered yet" in flat(ended)) == (1, True)
    assert lab.start_delivery(order(1), sink="python:operator:eq").revision == 1


def test_a_revision_that_a_sink_does_not_want_is_shown_as_skipped(lab: Lab) -> None:
    _fetch_while_a_pool_runs(lab)
    lab.deliver("skipped", order(1), failure="status Issued")

    ended = explain(lab, order(1))

    assert ended.code == 0
    assert f"sink {SINK}: revision 1 skipped: status Issued" in flat(ended)
    assert f"delivery of revision 1 to {SINK} skipped: status Issued" in flat(ended)


def test_the_advice_for_a_sink_without_a_planned_delivery_works(lab: Lab) -> None:
    """A sink that was retired before the latest revision was fetched, and was declared again after it."""
    lab.accept_and_fetch(order(1))
    lab.deliver(order=order(1))
    lab.redis.delete(KEYS.sinks)
    Lab(lab.redis, sinks=()).accept_and_fetch(order(1), sellToName="changed")
    lab.declare()
    replay = ("events", "replay", "--order", order(1).order_id, "--to-sinks", SINK)

    ended, advised = explain(lab, order(1)), lab.run_command(*replay, "--yes", "--dry-run")

    assert ended.code == 1
    assert f"pending {SINK}: revision 2 not delivered yet next No attempt is planned." in flat(ended)
    assert f"ota-receiver {' '.join(replay)}" in flat(ended)
    assert advised.code == 0, advised.err


@pytest.mark.parametrize("sinks", ["", SINK, "python:operator:eq"])
def test_the_verdict_is_the_same_in_every_shell(lab: Lab, sinks: str) -> None:
    """SINKS of a shell says nothing of the workers'."""
    lab.accept_and_fetch(order(1))
    lab.accept_and_fetch(order(2))
    lab.deliver(order=order(2))

    assert [explain(lab, one, SINKS=sinks).code for one in (order(1), order(2))] == [1, 0]
    assert f"{SINK}: revision 1 not delivered yet" in flat(explain(lab, order(1), SINKS=sinks))


def test_each_attempt_is_shown_with_its_answer_and_the_reason_to_wait(lab: Lab) -> None:
    lab.declare()
    lab.accept(order(1))
    fetch = lab.start_fetch(order(1))
    running = explain(lab, order(1))
    assert (running.code, "fetching" in running.out, WORKER in running.out) == (1, True, True)

    lab.fail_fetch("retry", order(1), fetch=fetch, reason="http_503", http_status=503, duration_ms=84, wait=60)
    for _ in range(2):
        lab.later(60)
        lab.fail_fetch("deferred", order(1), reason="breaker_open", wait=60)

    redis: Any = lab.redis
    breaker = {"open_until": lab.now + 60_000, "opened_at": lab.now, "reason": "timeout", "http": 0}
    redis.hset(KEYS.breaker("breaker"), mapping=breaker)
    ended = explain(lab, order(1))
    assert ended.code == 1
    for text in (
        "NOT COMPLETE: deferred",
        "breaker open: timeout since",
        "(0 s); next probe at ",
        "fetch 1 failed: http_503 (HTTP 503 in 84 ms), will retry",
        "fetch 3 failed: breaker_open, deferred, does not count as an attempt; 2 times until",
        "fetch deferred (breaker_open); next attempt",
        "ota-receiver check",
    ):
        assert text in flat(ended)


@pytest.mark.parametrize(
    ("timestamps", "text"), [(["2026-06-01T08:15:02Z"] * 40, "39 times until"), (range(210), "older ones are gone")]
)
def test_a_long_history_is_a_short_page(lab: Lab, timestamps: Iterable[object], text: str) -> None:
    """Repeated events are one line, and a history that was cut off says so."""
    for timestamp in timestamps:
        lab.accept(order(1), timestamp=str(timestamp))

    ended = explain(lab, order(1))

    assert text in flat(ended)
    assert len(ended.out.splitlines()) < 20


@pytest.mark.parametrize("text", ["4711", "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"])
def test_an_unknown_order_is_explained_with_commands_that_search_further(lab: Lab, text: str) -> None:
    page, line = explain(lab, text), explain(lab, text, "--json")

    assert (page.code, page.out, line.code) == (1, "", 1)
    assert text in page.err
    assert "\n  ota-receiver reconcile --from-zero --apply\n" in page.err
    assert max(map(len, page.err.splitlines())) <= 80
    assert (line.objects[0]["state"], line.objects[0]["complete"]) == ("unknown", False)
    shown = lab.run_command("orders", "show", text, "--json")
    assert (shown.code, shown.out, text in shown.err) == (1, "", True)


def test_a_replay_is_shown_beside_the_duration_of_the_event(lab: Lab) -> None:
    lab.accept(order(1), at=lab.now - 23000)
    lab.fetch_and_store(order(1))
    lab.run_command("events", "replay", "--since", "1h", "--force", "--rate", "5000", "--yes")
    lab.fetch_and_store(order(1))

    page, (found,) = explain(lab, order(1)), explain(lab, order(1), "--json").objects

    assert re.search(r"took +event: fetched after 2\d s\n +replay:\w{6}: fetched after", page.out)
    assert found["durations"]["fetched_ms"] >= 23_000
    assert found["durations"]["requested"]["fetched_ms"] < 20_000


def test_a_wrong_clock_of_this_machine_changes_no_state_and_no_age(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.accept(order(1), order(2))
    lab.start_fetch(order(1))
    lab.dead_letter(order(2))
    tomorrow = times.now() + timedelta(days=1)
    monkeypatch.setattr(times, "now", lambda: tomorrow)

    orders, events, letters = (lab.run_command(what, "list", "--json").objects for what in ("orders", "events", "dead"))
    event = lab.run_command("events", "show", events[0]["id"], "--json").objects[0]
    shown = lab.run_command("dead", "show", order(2).order_id, "--json").objects[0]

    assert sorted(one["state"] for one in orders) == ["dead", "fetching"]
    assert "NOT COMPLETE: fetching" in explain(lab, order(1)).out
    assert event["order_state"] == "fetching"
    assert max(one["age_s"] for one in (*letters, shown)) < 3600


def test_of_two_orders_with_one_reference_the_company_must_be_given(lab: Lab) -> None:
    for one in (order(1), order(1, MUSEUM)):
        lab.accept_and_fetch(one, status="Draft")
        lab.deliver(order=one)

    found = explain(lab, "CM-260601081502-9F3A", "--company", "museum")

    assert (explain(lab, "CM-260601081502-9F3A").code, found.code) == (2, 0)
    command = f"  ota-receiver orders confirm {order(1).order_id} --company museum --payment-reference REF"
    assert command in found.out.splitlines(), "a command can be copied as a whole"


ALIKE = (
    OrderKey(VENUE, "16021111-0000-4000-8000-000000000001"),
    OrderKey(VENUE, "1602aaaa-0000-4000-8000-000000000002"),
)


@pytest.mark.parametrize("text", ["16021", "16021111", "16021111-0000-4", "160211110000", "16021111-", " 16021111-00 "])
def test_the_beginning_of_an_id_is_enough_if_no_other_order_has_it(lab: Lab, text: str) -> None:
    lab.accept(*ALIKE, order(1))

    shown, other = lab.run_command("orders", "show", text, "--json"), lab.run_command("orders", "show", f"{text}f9")

    assert (shown.code, shown.objects[0]["order_id"]) == (0, ALIKE[0].order_id)
    assert shown.err == f"{text!r} is order {ALIKE[0].order_id} --company venue.\n"
    assert other.code == 1


def test_a_beginning_that_several_have_lists_them_and_acts_on_none(lab: Lab) -> None:
    lab.accept(*ALIKE, OrderKey(MUSEUM, ALIKE[0].order_id))
    for one in ALIKE:
        lab.dead_letter(one)
    lab.clear_queues()

    for words in (("orders", "explain"), ("orders", "refetch"), ("orders", "cancel"), ("dead", "requeue")):
        ended = lab.run_command(*words, "1602")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.splitlines()[:2] == [
            "Several orders begin with '1602':",
            f"  {ALIKE[0].order_id} --company venue",
        ]
        assert f"  {ALIKE[1].order_id} --company venue\n" in ended.err
        assert "museum" in ended.err
    assert lab.queued("live") == lab.queued("backfill") == []
    assert lab.run_command("orders", "show", "1602", "--company", "museum").code == 0


def test_a_change_shows_the_whole_id_first_and_an_erase_needs_it(lab: Lab) -> None:
    lab.accept(*ALIKE)
    lab.dead_letter(ALIKE[0])
    lab.clear_queues()

    refused = lab.run_command("dead", "drop", "16021")
    assert (refused.code, ALIKE[0].order_id in refused.err.splitlines()[0]) == (2, True)
    requeued = lab.run_command("dead", "requeue", "16021", "--yes")
    assert (requeued.code, ALIKE[0].order_id in requeued.err, lab.queued("backfill")) == (0, True, [ALIKE[0].order_id])
    erased = lab.run_command("orders", "erase", "16021", "--yes")
    assert (erased.code, "its whole id is needed" in erased.err, lab.field("erased_at", ALIKE[0])) == (1, True, None)


def test_a_reference_comes_before_the_beginning_of_an_id_and_three_digits_are_none(lab: Lab) -> None:
    lab.accept(*ALIKE)
    lab.redis.hset(KEYS.record(ALIKE[1]), "reference", "16021")

    assert lab.run_command("orders", "show", "16021", "--json").objects[0]["order_id"] == ALIKE[1].order_id
    assert lab.run_command("orders", "show", "160").code == 1
    assert lab.run_command("orders", "show", "1602-1111").code == 1


def test_the_beginning_of_an_event_or_of_a_plan_is_enough_too(lab: Lab) -> None:
    old = "1700000000000-0"
    lab.redis.xadd(KEYS.events, {"company": VENUE, "order": order(2).order_id}, id=old)
    lab.accept(order(2), order(3))
    replay = ("--force", "--rate", "5000", "--yes")
    assert lab.run_command("events", "replay", "--since", "1d", *replay).code == 0
    _, *ids = (one["id"] for one in lab.run_command("events", "list", "--json").objects)
    (plan,) = lab.run_command("replays", "list", "--json").objects

    shown = lab.run_command("events", "show", "1700", "--json")
    assert (shown.objects[0]["id"], shown.err) == (old, f"'1700' is event {old}.\n")
    several = lab.run_command("events", "show", ids[0][:8])
    assert (several.code, [line.strip() for line in several.err.splitlines()[1:-1]]) == (2, ids)
    assert lab.run_command("events", "replay", "17000", *replay, "--json").objects[0]["orders"] == 1
    ended = lab.run_command("replays", "resume", plan["id"][:4])
    assert (ended.code, f"Plan {plan['id']} is already done." in ended.err) == (1, True)
    assert "No plan" in lab.run_command("replays", "resume", plan["id"][:3]).err
