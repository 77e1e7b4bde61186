"""The search and the page of one order: the same view as `orders explain`, and what people may do there."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, Final

import httpx
import pytest

from app import audit
from app.deployment import Deployment
from app.explain.stores import MOST_AT_ONCE, Stores
from app.ids import OrderKey
from app.ops.order import MOST_ROWS, NOTICES, STEPS_SHOWN
from app.ops.search import LONGEST_SOUGHT
from tests.integration.test_operations import dead_delivery, discarded_delivery, erase, failed_delivery, has_it
from tests.lab import KEYS, MUSEUM, ONE, SAME_ID, SINK, VENUE, Lab, event_of, order
from tests.ops_site import ACT, READ, WHO, OpsSite, ops_site
from tests.samples import sample

LARGEST: Final = 60_000
"""Bytes of a page."""

HOSTILE: Final = "<script>alert('x')</script>\"&\u202egnp.exe\x1b[2J\u200b"


def dead_fetch(lab: Lab) -> None:
    lab.accept()
    lab.dead_letter()


def dead_fetch_of_fetched(lab: Lab) -> None:
    """Its sink waits, too."""
    failed_delivery(lab)
    dead_fetch(lab)


def pending(lab: Lab) -> None:
    lab.accept()
    lab.fail_fetch("retry", reason="timeout", http_status=504, wait=300)


def fetching(lab: Lab) -> None:
    lab.accept()
    lab.start_fetch()


def deferred(lab: Lab) -> None:
    lab.accept()
    lab.fail_fetch("deferred", reason="breaker_open")


def discarded_fetch(lab: Lab) -> None:
    dead_fetch(lab)
    lab.ledger.discard(ONE)


def deleted(lab: Lab) -> None:
    lab.accept(status="Draft")
    lab.fail_fetch("deleted_upstream", reason="not_found", http_status=404)


def disabled(lab: Lab) -> None:
    """What waits says why, with a command."""
    lab.accept_and_fetch()
    Deployment(lab.redis).disable(SINK, "by hand")


def two_revisions(lab: Lab) -> None:
    lab.accept(status="Draft")
    lab.fetch_and_store(answer="order-draft")
    lab.deliver()
    lab.accept()
    lab.fetch_and_store()


def erased(lab: Lab) -> None:
    has_it(lab)
    erase(lab)


def unreadable(lab: Lab) -> None:
    has_it(lab)
    lab.overwrite(KEYS.content(ONE), b"not zlib")


STATES: Final[dict[str, Callable[[Lab], None]]] = {
    one.__name__: one
    for one in (
        has_it,
        pending,
        fetching,
        deferred,
        dead_fetch,
        dead_fetch_of_fetched,
        dead_delivery,
        failed_delivery,
        discarded_delivery,
        discarded_fetch,
        deleted,
        disabled,
        two_revisions,
        erased,
        unreadable,
    )
}


@pytest.fixture
def lab(lab: Lab) -> Lab:
    lab.declare()
    return lab


def page_of(one: OrderKey = ONE, **query: str) -> str:
    return f"/orders/{one.order_id}?" + "&".join(f"{name}={value}" for name, value in query.items())


def words(page: str) -> str:
    """Return what a page shows, without its markup, on one line."""
    body = re.sub(r"<head>.*?</head>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def offers(page: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return the fields of each form that acts, by what it does and to which sink."""
    found = {}
    for address, form in re.findall(r'<form action="/orders/[^/]+/(\w+)" method="post">(.*?)</form>', page, re.DOTALL):
        hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', form))
        hidden = {name: html.unescape(value) for name, value in hidden.items()}
        if 'name="sure"' in form:
            hidden["sure"] = "yes"
        found[address, hidden.get("sink", "")] = hidden
    return found


class Desk:
    """A person at the page of one order, who may act."""

    def __init__(self, site: OpsSite, one: OrderKey = ONE) -> None:
        self.site = site
        self.order = one
        self.address = page_of(one, company="venue")

    def page(self) -> str:
        answer = self.site.get(self.address, password=ACT)
        assert answer.status_code == 200, answer.text
        return answer.text

    def offered(self) -> dict[tuple[str, str], dict[str, str]]:
        return offers(self.page())

    def press(self, what: str, form: dict[str, str], why: str = "a guest asked") -> str:
        """Return the code of the notice that follows; the page must show its sentence."""
        answer = self.site.act(f"/orders/{self.order.order_id}/{what}", form | {"why": why})
        assert answer.status_code == 303, answer.text
        address = answer.headers["location"]
        code = httpx.URL(address).params["done"]
        assert NOTICES[code][1] in words(self.site.read(address))
        return code


@pytest.fixture
def desk(ops: OpsSite, lab: Lab) -> Desk:
    return Desk(ops)


def noted(lab: Lab) -> list[tuple[str, str, str, str]]:
    entries = [entry for _, entry in audit.newest_first(lab.redis)]
    return [(one.what, one.who, one.why, one.selected) for one in reversed(entries)]


# The page


@pytest.mark.parametrize("state", STATES)
def test_the_page_shows_the_facts_of_explain(lab: Lab, desk: Desk, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of `orders explain --json`; its times as the page writes them, in UTC."""
    STATES[state](lab)
    (facts,) = lab.run_command("orders", "explain", ONE.order_id, "--company", "venue", "--json", TZ="UTC").objects

    shown = words(desk.page())

    headline = "ERASED" if state == "erased" else "COMPLETE" if facts["complete"] else "NOT COMPLETE"
    assert headline in shown
    assert facts["next"].replace("  ", " ") in shown.replace("If it", "If it")
    single = ("order_id", "company", "state", "status", "content", "status_message", "request_id", "digest", "worker")
    missing = [
        facts[name] for name in single if str(facts[name] or "").replace("_", " ") not in shown.replace("_", " ")
    ]
    missing += [one for one in facts["references"] if one not in shown]
    missing += [step["text"] for step in facts["steps"] if step["text"] not in shown]
    missing += [one["what"] for one in facts["outstanding"] if one["what"] not in shown]
    said = [f"{one['what']}; {one['why']}" for one in facts["outstanding"] if one["why"] and not one["next"]]
    missing += [one for one in said if one not in shown.replace(" ;", ";")]
    counts = ("generation", "started_generation", "fetched_generation", "revision", "attempts", "deferrals")
    missing += [name for name in counts if facts[name] and f"{name} {facts[name]}" not in shown]
    assert missing == []
    for at in (facts["due"], facts["first_at"], facts["fetched_at"], *(one["next"] for one in facts["outstanding"])):
        assert at is None or f"{at[5:10]} {at[11:19]}" in shown


def test_steps_say_when_and_how_long_after_the_step_before(lab: Lab, desk: Desk) -> None:
    lab.accept()
    for _ in range(3):
        lab.fail_fetch("deferred", reason="breaker_open", wait=0)

    page = desk.page()

    assert re.search(
        r'<time datetime="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z">\d\d:\d\d:\d\d\.\d{3}</time><i>\+\d+ ms</i>', page
    )
    assert re.search(r"breaker_open, deferred, does not count as an attempt; 3 times until \d\d:\d\d:\d\d", words(page))


def test_a_page_with_the_longest_history_and_fifty_wallets_is_small(lab: Lab, desk: Desk) -> None:
    body: dict[str, Any] = json.loads(sample("order-issued"))
    wallets = body["items"][0]["wallets"]
    body["items"][0]["wallets"] = [wallets[0] | {"walletId": order(one).order_id, "seqNo": one} for one in range(50)]
    lab.accept()
    lab.fetch_and_store(items=body["items"])
    for _ in range(100):
        lab.deliver("retry", reason="E" * 40, failure=f"{'E' * 30} at {'f' * 20}.py:1", wait=0)
        lab.accept_events(event_of(ONE, status="Issued"))
        lab.fail_fetch("retry", wait=0)
    assert len(lab.history()) == 200

    page = desk.page()

    assert len(page.encode()) <= LARGEST
    assert len(lab.archive.history(ONE)) == 200
    assert len(re.findall("<tr><td>", page)) <= MOST_ROWS
    assert "more: ota-receiver orders show" in words(page)
    assert "earlier steps" in words(page)
    assert page.rpartition("</details>")[0].count("<li>") > STEPS_SHOWN


def test_numbers_names_and_links_are_masked(lab: Lab, desk: Desk) -> None:
    lab.accept_and_fetch()
    held = lab.archive.order(ONE)
    assert held is not None
    page = desk.page()

    secrets = [one.reference_number for wallet in held.wallets for one in wallet.assets]
    secrets += [text for wallet in held.wallets for text in (wallet.name, wallet.manifest_url, wallet.wallet_id)]
    assert [one for one in secrets if one and one in page] == []
    assert f"…{secrets[0]}"[-3:] in page


def test_hostile_text_is_text(lab: Lab, desk: Desk) -> None:
    """Of upstream, of a sender, of a sink and of a person; no control code or override reaches the reader."""
    lab.accept_and_fetch(statusMessage=HOSTILE + "x" * 10_000, buyFromOrderReference=HOSTILE)
    lab.deliver("rejected", reason=f"rejected: {HOSTILE}", failure=HOSTILE)
    audit.append(
        lab.redis, KEYS, audit.AuditEntry(what="refetch", who=HOSTILE, why=HOSTILE, selected=ONE.member, orders=1)
    )

    page = desk.page()

    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 4
    assert not {"\u202e", "\x1b", "\u200b"} & set(page)
    assert len(page.encode()) < LARGEST


def test_each_revision_is_compared_with_the_one_before_it(lab: Lab, desk: Desk) -> None:
    two_revisions(lab)
    lab.accept()
    lab.fetch_and_store(statusMessage="changed")

    latest, second = desk.page(), desk.site.read(page_of(company="venue", revision="2"))
    first, unknown = (desk.site.get(page_of(company="venue", revision=number)) for number in ("1", "9"))

    assert "Revision 3 against 2" in words(latest)
    assert "Revision 2 against 1" in words(second)
    assert "Status Draft is now Issued" in words(second)
    assert (first.status_code, unknown.status_code) == (404, 404)
    assert [desk.site.get(page_of(revision=text)).status_code for text in ("0", "x", "²", "1e3", "9" * 30)] == [400] * 5


def test_an_order_of_several_companies_asks_which_one(lab: Lab, ops: OpsSite) -> None:
    lab.accept(ONE, SAME_ID)

    choice = ops.read(page_of())

    assert re.findall(r'href="(/orders/[^"]+)"', choice) == [page_of(company="venue"), page_of(company="museum")]
    assert "museum" in words(ops.read(page_of(company="museum")))
    assert "museum" in words(ops.read(page_of(company=MUSEUM)))
    assert ops.get(page_of(company="nowhere")).status_code == 404
    answer = ops.act(f"/orders/{ONE.order_id}/refetch", {"why": "which?"})
    assert (answer.status_code, lab.history()[-1].__struct_config__.tag) == (400, "event")


@pytest.mark.parametrize("order_id", [order(9).order_id, "4711", HOSTILE.replace("/", "")[:20], "0" * 3000])
def test_an_unknown_order_is_404_with_what_to_do_and_the_search(ops: OpsSite, lab: Lab, order_id: str) -> None:
    answer = ops.http.get(httpx.URL(ops.url).copy_with(path=f"/orders/{order_id}"), auth=(WHO, READ))

    assert answer.status_code == 404
    assert "no event for it was accepted" in words(answer.text)
    assert 'action="/search"' in answer.text


@pytest.mark.parametrize("broken", [None, b"another program"])
def test_a_broken_record_is_shown_and_the_others_are_shown(ops: OpsSite, lab: Lab, broken: bytes | None) -> None:
    lab.accept(ONE, order(2))
    lab.overwrite(KEYS.record(ONE), broken)

    answer = ops.get(page_of(company="venue"))
    pressed = ops.act(f"/orders/{ONE.order_id}/refetch", {"why": "broken?", "company": "venue"})

    assert (answer.status_code, pressed.status_code) == (500, 500)
    assert f"look at {KEYS.record(ONE)} in Redis" in words(answer.text)
    assert "Traceback" not in answer.text
    assert order(2).order_id in ops.read(page_of(order(2)))


def test_a_broken_history_is_shown_on_the_page(lab: Lab, desk: Desk) -> None:
    has_it(lab)
    lab.overwrite(KEYS.history(ONE), b"another program")

    assert f"the history is unreadable: look at {KEYS.history(ONE)}" in words(desk.page())


def test_what_people_did_to_the_order_is_on_its_page(lab: Lab, desk: Desk) -> None:
    lab.accept_and_fetch()
    lab.accept_and_fetch(order(2))
    lab.run_command("orders", "refetch", ONE.order_id, "--who", "ann", "--why", "looked old", "--company", "venue")
    lab.run_command("orders", "refetch", order(2).order_id, "--who", "bob", "--why", "another", "--company", "venue")

    shown = words(desk.page())

    assert "refetch ann looked old" in shown
    assert "bob" not in shown


@pytest.mark.parametrize("query", ["done=hacked", "who=x", "revision=-1", "reveal=1"])
def test_an_unknown_parameter_is_refused(ops: OpsSite, lab: Lab, query: str) -> None:
    lab.accept()

    answer = ops.get(f"{page_of(company='venue')}&{query}")

    assert (answer.status_code, "hacked" in words(answer.text)) == (400, False)


# Actions

OFFERED: Final[dict[str, set[str]]] = {
    "has_it": {"refetch", "redeliver"},
    "pending": {"refetch"},
    "fetching": {"refetch"},
    "deferred": {"refetch"},
    "dead_fetch": {"requeue", "discard"},
    "dead_fetch_of_fetched": {"requeue", "redeliver", "discard"},
    "dead_delivery": {"requeue", "refetch", "discard"},
    "failed_delivery": {"requeue", "refetch"},
    "discarded_delivery": {"refetch", "redeliver"},
    "discarded_fetch": {"refetch"},
    "deleted": {"refetch"},
    "disabled": {"refetch"},
    "two_revisions": {"refetch"},
    "erased": set(),
    "unreadable": {"refetch", "redeliver"},
}


@pytest.mark.parametrize("state", STATES)
def test_only_what_makes_sense_is_offered_and_only_to_those_who_may_act(lab: Lab, desk: Desk, state: str) -> None:
    STATES[state](lab)

    assert {what for what, _ in desk.offered()} == OFFERED[state]
    assert offers(desk.site.read(desk.address)) == {}


def test_a_refetch_is_queued_and_a_second_one_adds_no_job(lab: Lab, desk: Desk) -> None:
    has_it(lab)
    lab.clear_queues()
    form = desk.offered()["refetch", ""]

    assert [desk.press("refetch", form) for _ in range(2)] == ["fetch_queued", "fetch_waiting"]
    assert lab.queued("live") == [ONE.order_id]
    assert noted(lab) == [("refetch", WHO, "a guest asked", ONE.member)] * 2


@pytest.mark.parametrize("before", [dead_fetch, dead_fetch_of_fetched, dead_delivery, failed_delivery])
def test_requeue_tries_again_what_failed_and_pressed_twice_it_does_nothing(
    lab: Lab, desk: Desk, before: Callable[[Lab], None]
) -> None:
    before(lab)
    lab.clear_queues()
    form = desk.offered()["requeue", ""]

    assert desk.press("requeue", form) == "requeued"
    done = lab.dump()
    assert desk.press("requeue", form) == "was_requeued"

    assert lab.dump() == done
    assert (lab.field("dead"), lab.field(f"{SINK}:dead"), lab.field(f"{SINK}:next_at")) == (None, None, None)
    assert noted(lab) == [("requeue", WHO, "a guest asked", ONE.member)]


@pytest.mark.parametrize("before", [has_it, discarded_delivery, dead_fetch_of_fetched])
def test_a_sink_gets_the_stored_revision_again_and_pressed_twice_only_once(
    lab: Lab, desk: Desk, before: Callable[[Lab], None]
) -> None:
    before(lab)
    form = desk.offered()["redeliver", SINK]

    assert [desk.press("redeliver", form) for _ in range(2)] == ["redelivered", "was_requeued"]
    assert (lab.start_delivery().revision, lab.field("fetched_generation")) == (1, "1")
    ((_, who, why, selected),) = noted(lab)
    assert (who, why, selected) == (WHO, "a guest asked", f"{ONE.member} to {SINK}")


def test_a_sink_that_was_declared_later_can_get_the_order(lab: Lab, desk: Desk) -> None:
    has_it(lab)
    lab.redis.hdel(KEYS.record(ONE), f"{SINK}:revision")

    assert desk.press("redeliver", desk.offered()["redeliver", SINK]) == "redelivered"
    assert lab.start_delivery().revision == 1


def test_a_disabled_sink_is_shown(lab: Lab, desk: Desk) -> None:
    has_it(lab)
    assert lab.run_command("sinks", "disable", SINK, "--why", "test").code == 0

    assert desk.press("redeliver", desk.offered()["redeliver", SINK]) == "redelivery_disabled"


@pytest.mark.parametrize(("before", "sink"), [(dead_fetch, ""), (dead_delivery, SINK)])
def test_discard_asks_twice_and_pressed_twice_it_does_nothing(
    lab: Lab, desk: Desk, before: Callable[[Lab], None], sink: str
) -> None:
    before(lab)
    form = desk.offered()["discard", sink]
    unsure = desk.site.act(f"/orders/{ONE.order_id}/discard", form | {"why": "test", "sure": ""})
    assert (unsure.status_code, "Nothing was done" in words(unsure.text), noted(lab)) == (400, True, [])

    assert [desk.press("discard", form) for _ in range(2)] == ["discarded", "was_discarded"]

    selected = f"{ONE.member} to {sink}" if sink else ONE.member
    assert noted(lab) == [("drop", WHO, "a guest asked", selected)]
    assert "discarded by hand" in words(desk.page())


def die_again(lab: Lab) -> None:
    """It is requeued, and dies of something else."""
    lab.accept()
    lab.dead_letter(reason="bad_request", http_status=400)


def deliver_again(lab: Lab) -> None:
    lab.ledger.retry_delivery(ONE, SINK)
    lab.deliver()


def requeue_delivery(lab: Lab) -> None:
    lab.ledger.retry_delivery(ONE, SINK)


def discard_delivery(lab: Lab) -> None:
    lab.ledger.discard(ONE, SINK)


def kill_delivery_again(lab: Lab) -> None:
    lab.ledger.retry_delivery(ONE, SINK)
    lab.dead_letter_delivery(reason="KeyError")


def refetch(lab: Lab) -> None:
    lab.request_fetch()


@pytest.mark.parametrize(
    ("before", "what", "sink", "happens", "code"),
    [
        (dead_fetch, "requeue", "", erase, "erased"),
        (dead_fetch, "requeue", "", refetch, "was_requeued"),
        (dead_fetch, "requeue", "", lambda lab: lab.ledger.discard(ONE), "was_discarded"),
        (dead_fetch, "requeue", "", die_again, "was_changed"),
        (dead_fetch, "discard", "", erase, "erased"),
        (dead_fetch, "discard", "", refetch, "was_requeued"),
        (dead_fetch, "discard", "", die_again, "was_changed"),
        (dead_delivery, "discard", SINK, deliver_again, "was_delivered"),
        (dead_delivery, "discard", SINK, requeue_delivery, "was_requeued"),
        (dead_delivery, "discard", SINK, discard_delivery, "was_discarded"),
        (dead_delivery, "discard", SINK, kill_delivery_again, "was_changed"),
        (dead_delivery, "requeue", "", deliver_again, "was_requeued"),
        (dead_fetch_of_fetched, "redeliver", SINK, deliver_again, "was_delivered"),
        (dead_fetch_of_fetched, "redeliver", SINK, erase, "erased"),
        (has_it, "redeliver", SINK, erase, "erased"),
        (has_it, "refetch", "", erase, "erased"),
    ],
)
def test_what_had_changed_since_the_page_was_read_is_shown_and_nothing_is_done(
    lab: Lab,
    desk: Desk,
    before: Callable[[Lab], None],
    what: str,
    sink: str,
    happens: Callable[[Lab], object],
    code: str,
) -> None:
    before(lab)
    form = desk.offered()[what, sink]
    happens(lab)
    lab.redis.delete(KEYS.audit)
    then = lab.dump()

    assert desk.press(what, form) == code

    lab.redis.delete(KEYS.audit)
    assert lab.dump() == then


def test_a_failure_more_of_a_delivery_that_waits_is_no_other_one(lab: Lab, desk: Desk) -> None:
    failed_delivery(lab)
    form = desk.offered()["requeue", ""]
    requeue_delivery(lab)
    lab.deliver("retry", reason="KeyError", wait=3600)

    assert desk.press("requeue", form) == "requeued"


@pytest.mark.parametrize("what", ["refetch", "requeue", "redeliver", "discard"])
def test_an_action_needs_the_right_a_reason_and_its_own_page(ops: OpsSite, lab: Lab, what: str) -> None:
    dead_fetch_of_fetched(lab)
    form = next(form for (name, _), form in Desk(ops).offered().items() if name == what) if what != "refetch" else {}
    form, path = form | {"company": "venue", "why": "test"}, f"/orders/{ONE.order_id}/{what}"
    then = lab.dump()

    refused = {
        "read only": ops.http.post(path, data=form, auth=(WHO, READ), headers={"origin": ops.url}).status_code,
        "no password": ops.http.post(path, data=form, headers={"origin": ops.url}).status_code,
        "another site": ops.act(
            path, form, **{"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
        ).status_code,
        "no reason": ops.act(path, form | {"why": " "}).status_code,
        "long reason": ops.act(path, form | {"why": "x" * 201}).status_code,
        "reason of two lines": ops.act(path, form | {"why": "a\nb"}).status_code,
        "unknown field": ops.act(path, form | {"reveal": "1"}).status_code,
        "unknown order": ops.act(path.replace(ONE.order_id, order(9).order_id), form).status_code,
        "another company": ops.act(path, form | {"company": "museum"}).status_code,
        "by GET": ops.get(path, password=ACT).status_code,
    }

    assert refused == {
        "read only": 403,
        "no password": 401,
        "another site": 403,
        "no reason": 400,
        "long reason": 400,
        "reason of two lines": 400,
        "unknown field": 400,
        "unknown order": 404,
        "another company": 404,
        "by GET": 405,
    }
    assert lab.dump() == then


@pytest.mark.parametrize("sink", ["", "python:operator:eq", "../x", HOSTILE])
def test_an_unknown_sink_is_refused(ops: OpsSite, lab: Lab, sink: str) -> None:
    has_it(lab)
    then = lab.dump()

    answer = ops.act(f"/orders/{ONE.order_id}/redeliver", {"company": "venue", "why": "test", "sink": sink})

    assert (answer.status_code, SINK in words(answer.text)) == (400, True)
    assert lab.dump() == then


def test_without_the_password_to_act_no_action_answers(lab: Lab) -> None:
    dead_fetch(lab)
    with ops_site(lab.env, can_act=False) as site:
        answer = site.act(f"/orders/{ONE.order_id}/requeue", {"company": "venue", "why": "test"})
        page = site.read(page_of(company="venue"))

    assert answer.status_code in {401, 404}
    assert offers(page) == {}
    assert lab.is_dead()


# The search

OLDEST: Final = OrderKey(VENUE, "abcd1234-0000-4000-8000-000000000004")
OLD: Final = OrderKey(VENUE, "beef5678-0000-4000-8000-000000000005")


@pytest.fixture
def known(lab: Lab) -> Lab:
    """Two orders of the venue with one reference, one of the museum, and one that was never fetched."""
    for number in (1, 2):
        lab.accept_and_fetch(order(number), buyFromOrderReference="TWICE", sellToOrderReference=f"OURS-{number}")
    lab.accept_and_fetch(order(3, MUSEUM), buyFromOrderReference="MUSEUM-3")
    lab.accept(OLDEST)
    return lab


@pytest.mark.parametrize(
    ("typed", "number"),
    [
        (order(1).order_id, "1"),
        (f"{{{order(1).order_id.upper()}}}", "1"),
        (f' "{order(2).order_id}" ', "2"),
        ("ours-2", "2"),
        ("MUSEUM-3", "3"),
        ("CM-abcd1234", "4"),
        ("abcd", "4"),
        ("abcd1234-00", "4"),
    ],
)
def test_the_search_goes_to_the_only_order(ops: OpsSite, known: Lab, typed: str, number: str) -> None:
    answer = ops.http.get("/search", params={"q": typed}, auth=(WHO, READ))

    assert answer.status_code == 303
    assert httpx.URL(answer.headers["location"]).path.endswith(number)
    assert ops.get(answer.headers["location"]).status_code == 200


@pytest.mark.parametrize(
    ("typed", "numbers"), [("TWICE", ["1", "2"]), ("request-1", ["1", "2", "3", "4"]), ("0000", ["1", "2", "3"])]
)
def test_several_are_listed(ops: OpsSite, known: Lab, typed: str, numbers: list[str]) -> None:
    page = ops.read(f"/search?q={typed}")

    assert sorted(one[-1] for one in re.findall(r'href="/orders/([0-9a-f-]+)\?company=\w+"', page)) == numbers
    assert f"{len(numbers)} found: {typed}" in words(page)


@pytest.mark.parametrize("typed", ["nothing-such", order(9).order_id, "fefe", "%", "*", "[a-z]*"])
def test_nothing_found_says_what_was_searched_and_what_to_do(ops: OpsSite, known: Lab, typed: str) -> None:
    answer = ops.http.get("/search", params={"q": typed}, auth=(WHO, READ))

    assert answer.status_code == 404
    assert "Searched: all orders by orderId" in words(answer.text)
    assert "ota-receiver check" in words(answer.text)


@pytest.mark.parametrize("typed", ["x" * (LONGEST_SOUGHT + 1), "CM\u200b-1", "CM\x00", "\u202e4711", "a\nb"])
def test_what_no_order_can_have_is_refused(ops: OpsSite, known: Lab, typed: str) -> None:
    assert ops.http.get("/search", params={"q": typed}, auth=(WHO, READ)).status_code == 400


def test_an_empty_search_explains_itself(ops: OpsSite, known: Lab) -> None:
    assert "Search for an orderId" in words(ops.read("/search"))
    assert "Search for an orderId" in words(ops.read("/search?q=%20"))


def test_what_is_searched_for_is_in_no_log(ops: OpsSite, known: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ("canary-reference", "ours-2", "x" * 200):
        ops.http.get("/search", params={"q": typed, "all": "1"}, auth=(WHO, READ))

    logged = capsys.readouterr()
    assert "ops.request" in logged.out + logged.err
    assert not [one for one in ("canary-reference", "ours-2", "xxxx") if one in logged.out + logged.err]


@pytest.fixture
def crowded(lab: Lab) -> Lab:
    """More orders than a page searches at once; two older ones were never fetched, and were discarded."""
    for at, old in ((1, OLDEST), (2_000, OLD)):
        lab.accept(old)
        lab.dead_letter(old)
        lab.ledger.discard(old)
        lab.redis.zadd(KEYS.orders, {old.member: at})
    lab.redis.zadd(KEYS.orders, {order(number).member: 1_000 + number for number in range(16_000)})
    return lab


@pytest.mark.parametrize(("typed", "found"), [("abcd1234", OLDEST), ("CM-beef5678", OLD)])
def test_all_orders_are_searched_on_request(ops: OpsSite, crowded: Lab, typed: str, found: OrderKey) -> None:
    at_once = ops.get(f"/search?q={typed}")
    further = ops.get(f"/search?q={typed}&all=1")

    assert at_once.status_code == 404
    assert f"the newest {MOST_AT_ONCE}" in words(at_once.text)
    assert f'<input type="hidden" name="q" value="{typed}"><input type="hidden" name="all" value="1">' in at_once.text
    assert (further.status_code, found.order_id in further.headers["location"]) == (303, True)


def test_while_all_orders_are_searched_another_such_search_waits_and_others_do_not(
    ops: OpsSite, known: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end, find = Event(), Event(), Stores.find

    def slow(stores: Stores, text: str) -> list[OrderKey]:
        began.set()
        assert may_end.wait(10)
        return find(stores, text)

    monkeypatch.setattr(Stores, "find", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ops.get, "/search?q=CM-NOWHERE&all=1")
        assert began.wait(10)
        second, cheap = ops.get("/search?q=CM-NOWHERE&all=1"), ops.get("/search?q=CM-NOWHERE")
        may_end.set()

    assert (second.status_code, second.headers["retry-after"], cheap.status_code) == (503, "5", 404)
    assert "Another search runs" in second.text
    assert first.result().status_code == 404
    assert ops.get("/search?q=CM-NOWHERE&all=1").status_code == 404


def test_a_beginning_that_older_orders_may_share_is_not_taken_for_the_only_one(ops: OpsSite, crowded: Lab) -> None:
    new = OrderKey(VENUE, "abcd1234-0000-4000-8000-000000000006")
    crowded.accept(new)

    at_once, further = ops.read("/search?q=abcd1234"), ops.read("/search?q=abcd1234&all=1")

    assert ("1 found" in words(at_once), "Search further" in words(at_once)) == (True, True)
    assert "2 found" in words(further)


def test_an_action_without_redis_says_that_it_may_have_been_done_and_is_not_repeated_by_itself(
    ops: OpsSite, lab: Lab
) -> None:
    has_it(lab)
    lab.redis.set(KEYS.schema, "another")

    answer = ops.act(f"/orders/{ONE.order_id}/refetch", {"company": "venue", "why": "the guest waits"})

    assert (answer.status_code, "refresh" in answer.headers) == (503, False)
    assert "Whether the action was done is not known: look before you repeat it." in words(answer.text)


def test_how_long_deliveries_took_is_said_of_the_last_one_as_other_sinks_may_still_lack_it(
    ops: OpsSite, lab: Lab
) -> None:
    has_it(lab)

    assert re.search(r"event: fetched after \d+ m?s, last delivery after \d+ m?s", words(Desk(ops).page()))
