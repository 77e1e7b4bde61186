"""The ops page in a real Chromium: axe, the CSP and the console, the keyboard, and what a reader does page by page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec
import pytest
from playwright.sync_api import Browser, Page, expect

from app import audit
from app.audit import AuditEntry
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from app.replay import Plans
from tests.browser import NARROW, WIDE, WIDEST, Scheme, Tab, beside, tab_of
from tests.eventually import eventually
from tests.lab import KEYS, MUSEUM, ONE, SINK, Lab, event_of, order
from tests.ops_site import READ, WHO, OpsSite

HOSTILE: Final = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
SEVERAL: Final = ONE.order_id[:8]
"""The beginning of several order ids."""

PAGES: Final = {
    "overview": "/",
    "runbook": "/runbook/fetch-late",
    "search": f"/search?q={SEVERAL}",
    "order": f"/orders/{ONE.order_id}?company=venue",
    "order-dead": f"/orders/{order(4).order_id}?company=museum",
    "events": "/events",
    "events-live": "/events?follow=1&company=venue",
    "orders": "/orders",
    "orders-behind": f"/orders?behind={SINK}",
    "dead": "/dead",
    "dead-plan": "/dead/plan?reason=order_missing",
    "replays": "/replays",
    "replay": "/replays/{plan}",
    "audit": "/audit",
}
"""Name of its picture -> a page."""

ERRORS: Final = {
    "search-nothing": ("/search?q=4711", 404),
    "no-page": ("/no-such-page", 404),
    "wrong-filter": ("/events?since=soon", 400),
}

FOR_READERS: Final = ("overview", "order-dead", "events", "dead", "replays", "replay", "audit")
"""Pages that are looked at without the right to act, and without JavaScript."""

SHOWN: Final[tuple[tuple[Scheme, int], ...]] = (("light", WIDE), ("dark", WIDE), ("dark", NARROW), ("light", WIDEST))


_LINES: Final = """
all => all.map((one) => {
  const range = document.createRange();
  range.selectNodeContents(one);
  return new Set([...range.getClientRects()].map((line) => Math.round(line.top))).size;
})
"""


def fill(lab: Lab) -> str:
    """Let there be something of everything; return the id of a plan."""
    lab.declare()
    lab.accept_and_fetch(order(1))
    lab.deliver()
    lab.accept_and_fetch(order(2))
    lab.accept(order(3), at=lab.now - 600_000)
    for number in (4, 6, 7):
        lab.accept(order(number, MUSEUM))
        lab.dead_letter(order(number, MUSEUM))
    lab.accept_and_fetch(order(5))
    lab.dead_letter_delivery(order(5))
    entry = AuditEntry(what="refetch", who=WHO, why="it looks old", selected=ONE.member, orders=1)
    audit.append(lab.redis, KEYS, entry)
    plans = Plans(lab.redis, event_days=90)
    return plans.file([(ONE.member, None)], rate=1, selected="since=1h", who=WHO, why="the sink lost a day").id


@pytest.fixture
def busy(lab: Lab) -> Lab:
    """A receiver with something of everything."""
    beside(fill, lab)
    return lab


@pytest.fixture
def tab(browser: Browser, ops: OpsSite, busy: Lab) -> Iterator[Tab]:
    """A tab of a user who may act, over a busy receiver."""
    with tab_of(browser, ops) as one:
        yield one


class TestEveryPage:
    """They change nothing, so one receiver and one tab are enough."""

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, valkey: Valkey) -> Iterator[str]:
        """The id of a plan, of a receiver with something of everything."""
        with Redis.from_url(valkey.url, socket_timeout=5) as client:
            client.flushall()
            yield beside(fill, Lab(client))

    @pytest.fixture(scope="class")
    @classmethod
    def tab(cls, browser: Browser, ops: OpsSite, plan: str) -> Iterator[Tab]:
        with tab_of(browser, ops) as one:
            yield one

    @pytest.mark.parametrize("name", [*PAGES, *ERRORS])
    def test_axe_and_the_browser_find_nothing_wide_or_narrow_in_light_and_dark(
        self, tab: Tab, plan: str, name: str
    ) -> None:
        """Colours are those of the preference and places those of the width, so axe looks at two of them."""
        tab.problems.clear()
        path, status = ERRORS.get(name) or (PAGES[name].format(plan=plan), 200)
        tab.open(path, status)
        for scheme, width in SHOWN:
            tab.resize(width, scheme)
            tab.picture(f"{name}-{scheme}-{width}")

            assert tab.overflow() == 0
            if (scheme == "light") == (width == WIDE):
                assert tab.violations() == []
        assert tab.problems == []

    def test_without_javascript_each_page_shows_the_same(
        self, browser: Browser, ops: OpsSite, tab: Tab, plan: str
    ) -> None:
        tab.resize(WIDE, "light")
        with tab_of(browser, ops, javascript=False) as without:
            for name in FOR_READERS:
                path = PAGES[name].format(plan=plan)
                shown, same = words(tab.open(path)), words(without.open(path))

                assert shown == same, name
                assert len(same) > 100, name

    def test_a_user_who_may_only_read_sees_no_button_that_acts(self, browser: Browser, ops: OpsSite, plan: str) -> None:
        with tab_of(browser, ops, password=READ) as reader:
            reader.open(PAGES["dead-plan"], 403)
            for name in FOR_READERS:
                page = reader.open(PAGES[name].format(plan=plan))

                assert {*page.get_by_role("button").all_inner_texts()} <= {"Find", "Filter"}, name
                assert page.locator("form[method=post], a[href*=plan]").count() == 0, name
                assert page.get_by_text("read only").is_visible()


def words(page: Page) -> str:
    """Return the text of a page, without its figures: the ages of what waits grow between two looks."""
    return re.sub(r"\d+", "0", page.locator("main").inner_text())


def test_what_a_page_may_not_do_the_browser_forbids(tab: Tab) -> None:
    """Were hostile text not escaped, the policy would still stop it."""
    page = tab.open("/")
    page.evaluate(
        """() => {
          const add = (html) => document.body.insertAdjacentHTML("beforeend", html);
          add(`<img src="x" onerror="document.title = 'taken'">`);
          add(`<p style="color: red">red</p>`);
          add(`<img src="http://127.0.0.1:1/pixel">`);
          add(`<iframe src="/"></iframe>`);
          const script = document.createElement("script");
          script.textContent = "document.title = 'taken'";
          document.body.append(script);
        }"""
    )
    expected = {"script-src-attr", "style-src-attr", "img-src", "frame-src", "script-src-elem"}
    seen = eventually(lambda: (found := reported(tab)) >= expected and found, what="a report of each")
    assert seen == expected
    assert page.title() != "taken"
    tab.problems.clear()


def reported(tab: Tab) -> set[str]:
    """Return the directives that reports of the CSP name, once the browser has sent what it has."""
    tab.page.evaluate("0")
    return {text.split()[2] for text in tab.problems if text.startswith("error: CSP: ")}


def test_hostile_text_is_shown_as_text_on_every_page(tab: Tab, busy: Lab) -> None:
    def be_hostile() -> None:
        busy.accept_events(*(msgspec.structs.replace(event_of(order(n)), reference=HOSTILE) for n in (8, 9)))
        busy.dead_letter(order(8))
        busy.fetch_and_store(order(9), statusMessage=HOSTILE)
        busy.deliver("dead", order(9), reason=f"rejected: {HOSTILE}")
        plans = Plans(busy.redis, event_days=90)
        plans.file([(ONE.member, None)], rate=1, selected=HOSTILE, who=HOSTILE, why=HOSTILE)
        audit.append(busy.redis, KEYS, AuditEntry(what="refetch", who=HOSTILE, why=HOSTILE, selected=HOSTILE, orders=1))

    beside(be_hostile)
    for path in (
        "/",
        "/events",
        "/orders",
        "/dead",
        "/replays",
        "/audit",
        f"/orders/{order(9).order_id}?company=venue",
    ):
        page = tab.open(path)

        expect(page.get_by_text(HOSTILE[:27]).first).to_be_attached()
        assert page.locator("main img, main script, [onerror]").count() == 0, path
        tab.resize(NARROW, "light")
        assert tab.overflow() == 0, path


@pytest.mark.parametrize("name", ["overview", "dead-plan"])
def test_the_keyboard_reaches_everything_and_shows_where_it_is(tab: Tab, name: str) -> None:
    page = tab.open(PAGES[name])
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    assert page.locator(":focus").is_visible()

    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    fields = "a, button, input:not([type=hidden]), select, summary"
    reachable = page.locator("main").locator(fields).count()
    reached = 0
    for _ in range(reachable + 20):
        page.keyboard.press("Tab")
        tag, outline, is_in_main = page.evaluate(
            """() => {
              const one = document.activeElement, style = getComputedStyle(one);
              return [one.tagName, style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
                      one.matches("main *")];
            }"""
        )
        if not is_in_main:
            break
        assert outline >= 2, tag
        reached += tag in {"A", "BUTTON", "INPUT", "SELECT", "SUMMARY"}
    assert reached == reachable


def test_a_poll_shows_what_is_new_and_keeps_focus_and_text_and_what_is_open(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/")
    details = page.locator("main details").first
    expect(page.locator("h1")).to_contain_text("1 order is pending")
    details.locator("summary").click()
    page.get_by_label("Where is an order?").fill("CM-2611")
    beside(busy.accept, order(10))

    page.clock.run_for(5000)
    expect(page.locator("h1")).to_contain_text("2 orders are pending")

    assert page.evaluate("document.activeElement.value") == "CM-2611"
    assert details.get_attribute("open") is not None


def test_a_page_says_while_it_is_not_up_to_date(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/")
    notice = page.locator("#stale")
    schema = busy.redis.get(KEYS.schema)
    expect(notice).to_be_hidden()

    busy.redis.set(KEYS.schema, "another")
    page.clock.run_for(5000)
    expect(notice).to_contain_text("Redis cannot be used now")
    expect(notice).to_contain_text("UTC")
    expect(page.locator("h1")).to_contain_text("1 order is pending")

    busy.redis.set(KEYS.schema, schema or b"")
    page.clock.run_for(5000)
    expect(notice).to_be_hidden()
    tab.forget("status of 503")


def test_names_of_any_length_widen_no_page_and_hide_no_column_and_short_ones_are_not_cut(tab: Tab, busy: Lab) -> None:
    long = "python:a_company.with_many.integrations.of_orders:deliver_to_the_shop"
    busy.declare("another", sinks=(SINK, long, "tickets"))

    for path in ("/", f"/orders/{order(2).order_id}", "/orders"):
        page = tab.open(path)
        tab.resize(NARROW, "light")
        assert tab.overflow() == 0, path

        tab.resize(WIDE, "light")
        hidden = page.locator(".box").evaluate_all("all => all.map((one) => one.scrollWidth - one.clientWidth)")
        assert max(hidden, default=0) == 0, path
        cells = page.get_by_role("rowheader", name="tickets", exact=True)
        assert cells.evaluate_all(_LINES) in ([], [1]), path


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "The ops page does not answer."),
        (401, "Your password is no longer accepted."),
        (500, "The ops page answers with error 500."),
    ],
)
def test_a_page_that_is_not_up_to_date_says_why_and_as_of_when(tab: Tab, status: int, text: str) -> None:
    """That the page is away says nothing of the receiver."""
    tab.page.clock.install()
    page = tab.open("/")
    read_at = page.locator("#read-at").inner_text().removeprefix("Read at ")
    page.route("**/", lambda route: route.fulfill(status=status) if status else route.abort())
    page.clock.run_for(5000)

    expect(page.locator("#stale")).to_contain_text(text)
    expect(page.locator("#stale")).to_contain_text(f"All of this is as of {read_at}.")
    expect(page.locator("main")).to_have_css("filter", "grayscale(1)")
    tab.problems.clear()


def test_a_search_opens_the_only_order_and_lists_several(tab: Tab) -> None:
    page = tab.open("/")
    for text, heading in ((ONE.order_id, f"Order {ONE.order_id}"), (SEVERAL, "found")):
        page.get_by_role("searchbox").first.fill(text)
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_contain_text(heading)
    assert page.url.endswith(f"/search?q={SEVERAL}")
    assert page.locator("main table a.id").count() > 1


def test_a_list_stays_as_it_is_while_events_arrive_and_counts_them(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/events?status=Issued")
    rows, line = page.locator("#rows"), page.locator("#fresh")
    before, place = rows.inner_text(), rows.bounding_box()
    page.mouse.wheel(0, 40)

    for number in range(1, 6):
        beside(busy.accept, *(order(100 * number + one) for one in range(10)))
        beside(busy.accept, order(100 * number), status="Draft")
        page.clock.run_for(5000)
        expect(line).to_have_text(f"{10 * number} new events: show them")

    page.evaluate("scrollTo(0, 0)")
    assert (rows.inner_text(), rows.bounding_box()) == (before, place)
    line.get_by_role("link").click()
    page.wait_for_load_state()
    expect(rows).to_contain_text(order(509).order_id)
    expect(line).to_have_text("")
    assert page.get_by_label("Status").input_value() == "Issued"


def test_texts_from_outside_leave_the_rows_beside_them_as_they_are(tab: Tab, lab: Lab) -> None:
    """Long words without blanks, and letters that pile up marks, which are drawn above their own line."""
    piled, word = "A" + "\N{COMBINING ACUTE ACCENT}" * 49, "x" * 180

    def fill() -> None:
        lab.accept_events(msgspec.structs.replace(event_of(order(6)), reference=piled))
        lab.accept(order(7))
        audit.append(lab.redis, KEYS, AuditEntry(what="refetch", who=word, why=word, selected=word, orders=1))

    beside(fill)
    unknown = f"/dead?company={word}"
    for path in (f"/dead?reason={word}", f"/orders?behind={word}", unknown):
        for width in (WIDE, NARROW):
            tab.resize(width, "light")
            tab.open(path, status=400 if path == unknown else 200)
            assert tab.overflow() == 0, path
    tab.resize(WIDE, "light")
    row = tab.open("/audit").locator("tbody tr").first.bounding_box()
    assert row is not None
    assert row["height"] < 200
    page = tab.open("/events")
    above, below = page.locator("tbody tr").nth(0), page.locator("tbody tr").nth(1)
    before = above.screenshot()
    below.locator("td", has_text="\N{COMBINING ACUTE ACCENT}").evaluate("cell => cell.textContent = 'A'")
    assert above.screenshot() == before


def test_a_live_list_moves_and_keeps_its_filter(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/events?company=museum")
    page.get_by_text("Follow live").click()
    page.wait_for_url("**follow=1*")
    expect(page.locator("main")).to_contain_text("Live:")

    beside(busy.accept, order(20, MUSEUM))
    beside(busy.accept, order(21))
    page.clock.run_for(5000)

    expect(page.locator("#rows")).to_contain_text(order(20).order_id)
    expect(page.locator("#rows")).not_to_contain_text(order(21).order_id)
    page.reload()
    expect(page.locator("#rows")).not_to_contain_text(order(21).order_id)
    assert page.get_by_label("Company").input_value() == "museum"


def test_a_number_opens_in_a_new_tab_the_list_that_it_counts(tab: Tab) -> None:
    page = tab.open("/")
    number = (
        page.get_by_role("group", name="Dead letters by reason")
        .locator("tr", has_text=re.compile("order.missing"))
        .locator("a")
        .first
    )
    count = int(number.inner_text())
    with page.context.expect_page() as opened:
        number.click(modifiers=["ControlOrMeta"])
    expect(opened.value.locator("main table a.id")).to_have_count(count)
    assert page.url.endswith("/")


def test_dead_letters_are_requeued_as_a_plan_that_is_watched(tab: Tab, busy: Lab) -> None:
    page = tab.open("/dead?reason=order_missing&company=museum")
    page.get_by_role("link", name="Requeue these 3").click()
    expect(page.locator("main")).to_contain_text("getOrder calls\n3", use_inner_text=True)
    page.get_by_role("button", name="Requeue 3").click()
    assert "/dead/plan?" in page.url, "the browser asks for the reason"

    page.get_by_label("Why?").fill("the museum is back")
    page.get_by_role("button", name="Requeue 3").click()
    page.wait_for_url("**/replays/*")
    plan = page.url.rpartition("/")[2]

    def is_done() -> bool:
        tab.tick()
        return "3 of 3" in page.locator("#progress").inner_text()

    eventually(is_done, what="it is done")

    page.get_by_role("link", name="Audit").click()
    row = page.locator("tr", has_text=plan)
    expect(row).to_contain_text("the museum is back")
    expect(row).to_contain_text(WHO)
    assert [busy.is_dead(order(number, MUSEUM)) for number in (4, 6, 7)] == [False] * 3


def test_a_plan_is_cancelled_while_it_runs(tab: Tab, busy: Lab) -> None:
    page = tab.open("/dead/plan?reason=order_missing&rate=0.01")
    page.get_by_label("Why?").fill("the museum is back")
    page.get_by_role("button", name="Requeue 3").click()
    page.wait_for_url("**/replays/*")

    page.locator("summary", has_text="Cancel this replay").click()
    page.locator("details[open] input[name=why]").fill("the wrong museum")
    page.get_by_role("button", name="Cancel this replay").click()

    expect(page.locator("#progress")).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Cancel this replay")).to_have_count(0)
