"""The lists and the plans of the ops page: filters, pages, what is new, and requeueing as a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape

import msgspec
import pytest

from app import audit
from app.audit import AuditEntry
from app.ids import OrderKey
from app.ledger import order_lists
from app.ledger.history import FetchRequested
from app.ops import lists
from app.replay import Plan, Plans
from tests.eventually import eventually
from tests.lab import KEYS, MUSEUM, ONE, SINK, VENUE, Lab, event_of, order
from tests.ops_site import ACT, WHO, OpsSite, ops_site

HOSTILE = "<script>alert('x')</script>\"'>&"


@pytest.fixture(autouse=True)
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "ROWS", 3)


@pytest.fixture
def mixed(lab: Lab) -> Lab:
    """Orders 1 to 20 of two companies in every state that a list may choose, and sinks that lack some."""
    lab.declare()
    for number in range(1, 21):
        lab.accept(one(number), status="Draft" if number % 4 == 0 else "Issued")
    lab.accept(one(1), one(5), one(9))
    for number in range(1, 21):
        if number <= 4:
            lab.dead_letter(one(number), "order_missing" if number % 2 else "http_400")
        elif number <= 7:
            lab.fail_fetch("deferred", one(number))
        elif number > 10:
            lab.fetch_and_store(one(number))
    for number in (11, 12):
        lab.deliver("dead", one(number), reason="rejected: sold out")
    for number in (13, 14, 15):
        lab.deliver("retry", one(number), failure="ConnectionError at shop.py:12")
    for number in (16, 17, 18):
        lab.deliver(order=one(number))
    return lab


def one(number: int) -> OrderKey:
    return order(number, MUSEUM if number in (2, 3, 11, 13, 20) else VENUE)


def numbers(*orders: int) -> list[str]:
    return sorted(order(number).order_id for number in orders)


def ids(html: str) -> list[str]:
    """Return the order of each row."""
    return re.findall(r'<a class="id" href="/orders/([^?"]+)\?', html)


def next_of(html: str) -> str | None:
    found = re.search(r'<a href="([^"]+)" rel="next">', html)
    return unescape(found[1]) if found else None


def pages(ops: OpsSite, path: str | None) -> Iterator[str]:
    """Return the pages of a list, as a reader goes through them."""
    while path is not None:
        html = ops.read(path)
        yield html
        path = next_of(html)


def walk(ops: OpsSite, path: str) -> list[str]:
    return sorted(found for html in pages(ops, path) for found in ids(html))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/events", [*range(1, 21), 1, 5, 9]),
        ("/events?company=museum", [2, 3, 11, 13, 20]),
        ("/events?status=draft&company=venue", [4, 8, 12, 16]),
        ("/events?outcome=coalesced", [1, 5, 9]),
        ("/events?since=1h&until=0s", [*range(1, 21), 1, 5, 9]),
        ("/events?until=1h", []),
        ("/orders", range(1, 21)),
        (f"/orders?company={MUSEUM}", [2, 3, 11, 13, 20]),
        ("/orders?state=dead&company=venue", [1, 4]),
        ("/orders?state=deferred", [5, 6, 7]),
        ("/orders?state=pending", [8, 9, 10]),
        ("/orders?state=outstanding&company=venue", [5, 6, 7, 8, 9, 10]),
        ("/orders?state=fetched&status=Issued", range(11, 21)),
        (f"/orders?behind={SINK}", [13, 14, 15, 19, 20]),
        (f"/orders?failing={SINK}&company=venue", [14, 15]),
        ("/dead", [1, 2, 3, 4, 11, 12]),
        ("/dead?sink=-", [1, 2, 3, 4]),
        (f"/dead?sink={SINK}&company=museum", [11]),
        ("/dead?reason=rejected", [11, 12]),
        ("/dead?reason=order_missing&company=museum", [3]),
        ("/dead?since=0s", []),
    ],
)
def test_a_filter_shows_all_that_match_once_page_by_page(
    mixed: Lab, ops: OpsSite, path: str, expected: list[int]
) -> None:
    assert walk(ops, path) == numbers(*expected)


@pytest.mark.parametrize(
    "path",
    [
        "/dead?",
        "/dead?sink=-&",
        f"/dead?sink={SINK}&",
        "/dead?reason=rejected&",
        "/dead?reason=rejected:%20sold%20out&",
    ],
)
@pytest.mark.parametrize("company", ["", "company=museum", "since=1h&until=0s"])
def test_the_number_above_the_dead_letters_is_that_of_their_rows(
    mixed: Lab, ops: OpsSite, path: str, company: str
) -> None:
    (number,) = re.findall(r"<strong>(.*?)</strong> match", ops.read(path + company))

    assert int(number) == len(walk(ops, path + company))


def test_of_more_dead_letters_than_are_counted_it_says_at_least(
    mixed: Lab, ops: OpsSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "MOST_COUNTED", 2)

    assert "<strong>6</strong> match" in ops.read("/dead")
    # How many of the first two are this company's: those of one millisecond stand in no order of theirs.
    assert re.search("<strong>at least [0-4]</strong> match", ops.read("/dead?company=venue"))


def test_each_number_of_the_first_screen_opens_the_list_that_it_counts(mixed: Lab, ops: OpsSite) -> None:
    links = re.findall(r'<a href="(/(?:orders|dead|events)\?[^"]+)">(\d+)\b', ops.read("/"))

    counted = {unescape(address): int(number) for address, number in links}

    assert {address: len(walk(ops, address)) for address in counted} == counted
    assert {address.partition("&")[0] for address in counted} >= {
        "/orders?state=outstanding",
        f"/orders?behind={SINK}".replace(":", "%3A"),
        f"/orders?failing={SINK}".replace(":", "%3A"),
        f"/dead?sink={SINK}".replace(":", "%3A"),
        "/dead?reason=order_missing",
        "/dead?reason=rejected",
    }


def test_rows_that_come_while_somebody_pages_move_nothing(mixed: Lab, ops: OpsSite) -> None:
    first = ops.read("/events")
    mixed.accept(*(order(number) for number in range(100, 110)))

    following = [found for html in pages(ops, next_of(first)) for found in ids(html)]

    assert sorted(ids(first) + following) == numbers(*range(1, 21), 1, 5, 9)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/events?status=Issued", "2 new events: show them"),
        ("/events?status=Issued&company=museum", "1 new event: show it"),
        ("/events?status=Error", ""),
        ("/orders", "3 changed orders: show them"),
        ("/orders?state=dead", "1 changed order: show it"),
        ("/dead", "1 new dead letter: read again"),
        ("/audit", "1 new entry: show it"),
        ("/replays", "1 new replay: show it"),
    ],
)
def test_a_poll_counts_what_is_new_within_the_filter_and_keeps_it(
    mixed: Lab, ops: OpsSite, path: str, expected: str
) -> None:
    """The line alone asks again; its link is the same list from the front."""
    poll = poll_of(ops.read(path))
    assert fresh_line(ops.read(poll)) == ("", "")
    mixed.accept(order(30), status="Draft")
    mixed.accept(order(31, MUSEUM), order(32))
    mixed.dead_letter(order(30))
    Plans(mixed.redis, event_days=90).file([(ONE.member, None)], rate=1)

    text, link = fresh_line(ops.read(poll))

    assert (text, link) == (expected, path if expected else "")
    assert poll_of(ops.read(poll)) == poll


def poll_of(html: str) -> str:
    (found,) = re.findall(r'hx-get="([^"]+)"', html)
    assert "seen=" in found
    return unescape(found)


def fresh_line(html: str) -> tuple[str, str]:
    """Return text and address of the line that counts what is new."""
    (found,) = re.findall(r'<p [^>]*class="fresh"[^>]*>(.*?)</p>', html, re.DOTALL)
    link = re.search(r'<a href="([^"]+)">(.*)</a>', found)
    return (unescape(link[2]), unescape(link[1])) if link else ("", "")


def test_the_progress_of_replays_is_alive_and_no_new_one_moves_them(lab: Lab, ops: OpsSite) -> None:
    plans = Plans(lab.redis, event_days=90)
    first = plans.file([(ONE.member, None), (order(2).member, None)], rate=1)
    poll = poll_of(ops.read("/replays"))
    plans.feed(first)
    lab.redis.hset(KEYS.replay(first.id), "paced", 0)
    plans.feed(first)
    second = plans.file([(ONE.member, None)], rate=1)

    polled = ops.read(poll)

    assert ("1 of 2" in polled, second.id in polled) == (True, False)
    assert fresh_line(polled)[0] == "1 new replay: show it"


def test_only_a_list_that_is_followed_moves_by_itself(mixed: Lab, ops: OpsSite) -> None:
    followed = ops.read("/events?follow=1&company=museum")

    assert re.findall(r'<section id="rows" hx-get="([^"]+)"', followed) == ["/events?follow=1&amp;company=museum"]
    assert '<section id="rows">' in ops.read("/events")
    assert 'href="/events?company=museum"' in followed


def test_a_search_that_ends_before_the_page_is_full_goes_on_from_there(
    mixed: Lab, ops: OpsSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_lists, "MOST_READ", 5)

    first = ops.read("/orders?status=Draft&company=venue")

    assert re.search(r"Searched to <time[^>]+>[^<]+</time>; <a href=\"[^\"]+\" rel=\"next\">search on</a>", first)
    assert walk(ops, "/orders?status=Draft&company=venue") == numbers(4, 8)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/events?since=soon&status=Draft", ("'soon' is not a time", 'value="soon"', 'value="Draft"')),
        ("/events?outcome=lost", ("'lost' is none of queued, coalesced, erased", 'value="lost" selected')),
        (
            "/orders?company=other",
            ("No company 'other' is known. There are: museum, venue.", 'value="other" selected'),
        ),
        ("/orders?state=fetched&behind=shop", ("cannot be combined", 'value="shop" selected')),
        ("/dead?until=never&reason=http_400", ("'never' is not a time", 'value="http_400" selected')),
        ("/audit?what=look", ("'look' is none of", 'value="look" selected')),
        ("/replays?state=lost&since=1h", ("'lost' is none of draft, open", 'value="1h"')),
        ("/events?after=x", ("begin with the first page",)),
        ("/dead/plan?since=soon", ("'soon' is not a time",)),
        ("/dead/plan?rate=fast", ("'fast' is no number from 0.01 to 5000", 'value="fast"')),
        (f"/orders?company={HOSTILE.replace('&', '%26')}", ("is known. There are: museum, venue.",)),
    ],
)
def test_a_wrong_filter_is_named_and_the_form_stays_filled(
    mixed: Lab, ops: OpsSite, path: str, shown: tuple[str, ...]
) -> None:
    answer = ops.get(path, password=ACT)

    assert answer.status_code == 400
    assert [text for text in shown if text not in unescape(answer.text)] == []
    assert "<script>" not in answer.text
    assert ids(answer.text) == []


@pytest.mark.parametrize(
    ("selected", "shown", "orders"),
    [
        (ONE.member, ONE.order_id, 1),
        (f"{ONE.member} to {SINK}", f"{ONE.order_id} to {SINK}", 1),
        ("dead letters sink=shop", "dead letters sink=shop", 0),
        ("venue https://example.org/x", "venue https://example.org/x", 0),
    ],
)
def test_the_audit_links_to_the_order_that_an_action_was_about(
    lab: Lab, ops: OpsSite, selected: str, shown: str, orders: int
) -> None:
    audit.append(lab.redis, KEYS, AuditEntry(what="requeue", who="ann", why="", selected=selected, orders=1))

    html = ops.read("/audit")

    assert html.count(f'href="/orders/{ONE.order_id}?company=venue"') == orders
    assert shown in re.sub("<[^>]*>", "", html)


def test_hostile_text_is_shown_as_text(lab: Lab, ops: OpsSite) -> None:
    lab.accept_events(*(msgspec.structs.replace(event_of(order(number)), reference=HOSTILE) for number in (1, 2)))
    lab.dead_letter(ONE, HOSTILE)
    lab.fetch_and_store(order(2))
    lab.deliver("dead", order(2), reason=HOSTILE)
    plans = Plans(lab.redis, event_days=90)
    plan = plans.file([(ONE.member, None)], rate=1, selected=HOSTILE, who=HOSTILE, why=HOSTILE)
    audit.append(lab.redis, KEYS, AuditEntry(what="refetch", who=HOSTILE, why=HOSTILE, selected=HOSTILE, orders=1))

    for path in ("/events", "/orders", "/dead", "/replays", f"/replays/{plan.id}", "/audit"):
        html = ops.read(path)
        assert "<script>alert" not in html
        assert HOSTILE in unescape(html), path


class TestRequeue:
    """The lab of each test has two dead fetches and a dead delivery."""

    @pytest.fixture(autouse=True)
    def dead(self, lab: Lab) -> None:
        lab.declare()
        for number in (1, 2):
            lab.accept(order(number))
            lab.dead_letter(order(number), "order_missing" if number == 1 else "http_400")
        lab.accept_and_fetch(order(3))
        lab.dead_letter_delivery(order(3))
        lab.clear_queues()

    def test_it_is_offered_with_its_cost(self, ops: OpsSite) -> None:
        text = " ".join(re.sub(r"<[^>]+>", " ", ops.get("/dead/plan?rate=0.5", password=ACT).text).split())

        assert "3 match: dead letters until=" in text
        assert "getOrder calls 2 Deliveries 1, without a getOrder Takes 6 s" in text
        assert "at most 2 of its 6,000 calls in 5 min (0 %)" in text

    def test_it_runs_as_a_plan_that_names_who_and_why(self, lab: Lab, ops: OpsSite) -> None:
        """What dies after the page was shown is not among them."""
        form = form_of(ops, "/dead/plan")
        lab.accept(order(4))
        lab.dead_letter(order(4))

        answer = ops.act("/dead/plan", form | {"why": "venue is back", "rate": "1000"})

        plan_id = plan_of(answer.headers["location"])
        ended = ended_plan(lab, plan_id)
        assert (answer.status_code, ended.queued, ended.passed) == (303, 3, 0)
        assert [lab.is_dead(order(number)) for number in (1, 2, 3, 4)] == [False, False, False, True]
        assert lab.acquire_delivery(order(3)) is not None
        asked = [entry.reason for entry in lab.history(ONE) if isinstance(entry, FetchRequested)]
        assert asked == [f"replay:{plan_id}"]
        noted = [(entry.what, entry.who, entry.why, entry.plan) for _, entry in audit.newest_first(lab.redis)]
        assert noted == [("requeue", WHO, "venue is back", plan_id)]
        shown = ops.read(f"/replays/{plan_id}")
        assert "3 of 3" in shown
        assert WHO in shown
        assert "venue is back" in shown

    def test_the_filter_of_the_list_is_the_filter_of_the_plan(self, lab: Lab, ops: OpsSite) -> None:
        (button,) = re.findall(r'href="(/dead/plan[^"]*)"', ops.get("/dead?reason=http_400&sink=-", password=ACT).text)
        form = form_of(ops, unescape(button))

        answer = ops.act("/dead/plan", form | {"why": "x", "rate": "1000"})

        assert ended_plan(lab, plan_of(answer.headers["location"])).queued == 1
        assert [lab.is_dead(order(number)) for number in (1, 2)] == [True, False]

    def test_a_form_that_is_sent_twice_makes_one_plan(self, lab: Lab, ops: OpsSite) -> None:
        form = form_of(ops, "/dead/plan") | {"why": "x", "rate": "0.01"}

        answers = [ops.act("/dead/plan", form) for _ in range(2)]

        assert len({answer.headers["location"] for answer in answers}) == 1
        assert (len(Plans(lab.redis, event_days=90).ids()), lab.redis.xlen(KEYS.audit)) == (1, 1)

    def test_the_cost_at_another_rate_makes_nothing_and_puts_no_text_into_an_address(
        self, lab: Lab, ops: OpsSite
    ) -> None:
        form, before = form_of(ops, "/dead/plan") | {"why": "Ada asked", "rate": "0.5"}, lab.dump()

        shown = ops.act("/dead/plan", form | {"show": "cost"})

        assert (shown.status_code, lab.dump() == before) == (200, True)
        assert "6 s" in shown.text
        assert 'value="Ada asked"' in shown.text
        assert "get" not in re.findall(r'method="(\w+)"', shown.text.partition('class="plan"')[2])
        assert ops.get("/dead/plan?why=Ada+asked", password=ACT).status_code == 400

    def test_a_form_that_is_shown_again_is_another_plan(self, lab: Lab, ops: OpsSite) -> None:
        form = form_of(ops, "/dead/plan") | {"why": "x", "rate": "0.01"}
        first = ops.act("/dead/plan", form)

        shown = ops.act("/dead/plan", form | {"show": "cost"}).text
        second = ops.act("/dead/plan", form | hidden_of(shown))

        assert first.headers["location"] != second.headers["location"]

    @pytest.mark.parametrize("parameter", ["plan=abcdef", "plan=../../x"])
    def test_no_address_names_the_plan_that_it_would_make(self, lab: Lab, ops: OpsSite, parameter: str) -> None:
        """Else everybody who opens it would be shown the plan of the first one, as if it were theirs."""
        assert ops.get(f"/dead/plan?{parameter}", password=ACT).status_code == 400

    @pytest.mark.parametrize(
        ("changed", "shown"),
        [
            ({"why": " "}, "Say why"),
            ({"why": "x" * 201}, "Say why"),
            ({"rate": "0"}, "'0' is no number from 0.01 to 5000"),
            ({"rate": "nan"}, "'nan' is no number"),
            ({"plan": "../../x"}, "The form was cut"),
            ({"until": ""}, "The form was cut"),
            ({"since": "soon"}, "'soon' is not a time"),
        ],
    )
    def test_a_wrong_form_is_shown_again_and_does_nothing(
        self, lab: Lab, ops: OpsSite, changed: dict[str, str], shown: str
    ) -> None:
        before = lab.dump()

        answer = ops.act("/dead/plan", form_of(ops, "/dead/plan") | {"why": "a reason", "rate": "7"} | changed)

        assert answer.status_code == 400
        assert shown in unescape(answer.text)
        assert "since" in changed or f'value="{changed.get("rate", "7")}"' in answer.text
        assert lab.dump() == before

    def test_a_plan_is_cancelled_on_its_page(self, lab: Lab, ops: OpsSite) -> None:
        answer = ops.act("/dead/plan", form_of(ops, "/dead/plan") | {"why": "x", "rate": "0.01"})
        address = answer.headers["location"]
        assert f'action="{address}/cancel"' in ops.get(address, password=ACT).text

        cancelled = ops.act(f"{address}/cancel", {"why": "wrong filter"})

        assert (cancelled.status_code, cancelled.headers["location"]) == (303, address)
        assert ended_plan(lab, plan_of(address)).state == "cancelled"
        assert "/cancel" not in ops.get(address, password=ACT).text
        assert (lab.dead(), lab.queued("backfill")) == (2, [])

    def test_a_plan_of_a_command_is_resumed_on_its_page(self, lab: Lab, ops: OpsSite) -> None:
        plan = Plans(lab.redis, event_days=90).file([(ONE.member, None)], rate=1000, who="bob")
        address = f"/replays/{plan.id}"
        assert f'action="{address}/resume"' in ops.get(address, password=ACT).text

        assert ops.act(f"{address}/resume", {"why": ""}).status_code == 400
        assert ops.act(f"{address}/resume", {"why": "bob has left"}).status_code == 303

        assert (ended_plan(lab, plan.id).queued, lab.queued("backfill")) == (1, [ONE.order_id])

    def test_who_may_only_look_sees_no_button_and_can_do_nothing(self, lab: Lab, ops: OpsSite) -> None:
        plan = Plans(lab.redis, event_days=90).file([(ONE.member, None)], rate=1)
        before = lab.dump()

        shown = ops.read("/dead") + ops.read(f"/replays/{plan.id}")
        looked = ops.get("/dead/plan").status_code
        headers = {"origin": ops.url, "sec-fetch-site": "same-origin"}
        acted = [
            ops.http.post(path, data={"why": "x"}, auth=("eve", "canary-ops-token"), headers=headers).status_code
            for path in ("/dead/plan", f"/replays/{plan.id}/cancel", f"/replays/{plan.id}/resume")
        ]

        assert (looked, acted, lab.dump() == before) == (403, [403, 403, 403], True)
        assert "Requeue" not in shown
        assert 'method="post"' not in shown

    def test_without_the_password_to_act_there_is_no_action(self, lab: Lab) -> None:
        plan = Plans(lab.redis, event_days=90).file([(ONE.member, None)], rate=1)
        with ops_site(lab.env, can_act=False) as site:
            assert site.get("/dead/plan").status_code == 404
            for path in ("/dead/plan", f"/replays/{plan.id}/cancel", f"/replays/{plan.id}/resume"):
                headers = {"origin": site.url, "sec-fetch-site": "same-origin"}
                answer = site.http.post(path, data={"why": "x"}, auth=("ann", "canary-ops-token"), headers=headers)
                assert answer.status_code == 404

    @pytest.mark.parametrize("action", ["", "/cancel", "/resume"])
    def test_an_unknown_plan_is_not_found(self, ops: OpsSite, action: str) -> None:
        path = f"/replays/abcdef{action}"
        answer = ops.act(path, {"why": "x"}) if action else ops.get(path)

        assert answer.status_code == 404


def form_of(ops: OpsSite, path: str) -> dict[str, str]:
    """Return the fields of the form that a page shows to somebody who may act."""
    return hidden_of(ops.get(path, password=ACT).text)


def hidden_of(html: str) -> dict[str, str]:
    inputs = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', html)
    return {name: unescape(value) for name, value in inputs}


def plan_of(address: str) -> str:
    return address.rpartition("/")[2]


def ended_plan(lab: Lab, plan_id: str) -> Plan:
    """Return the plan once it has ended."""

    def ended() -> Plan | None:
        plan = Plans(lab.redis, event_days=90).of(plan_id)
        return plan if plan is not None and plan.is_over else None

    found = eventually(ended, 10, what="the plan has ended")
    assert found is not None
    return found


def test_an_order_of_which_a_delivery_failed_is_marked_in_lists_and_in_the_search(ops: OpsSite, mixed: Lab) -> None:
    """12 is refused for good, 14 is tried again, 16 is delivered."""
    marks = {("/search?q=0000", 12): "✕", ("/search?q=0000", 16): "✓", (f"/orders?failing={SINK}", 14): "▲"}
    for (path, number), sign in marks.items():
        row = next(part for part in ops.read(path).split("<tr>") if order(number).order_id in part)
        assert f"{sign}</span> fetched" in row, number
