"""The ops page in a real Chromium: what it shows, how it is reached, and that neither axe nor the browser complains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest
from playwright.sync_api import Browser

from app.ledger.dead_letters import DeadQuery
from app.replay import Plans
from app.times import from_ms
from tests.browser import NARROW, WIDE, Scheme, Tab, beside, chromium, tab_of
from tests.eventually import eventually
from tests.lab import KEYS, MUSEUM, Lab, order
from tests.ops_site import OpsSite

PAGES: Final = {
    "overview": "/",
    "runbook": "/runbook/fetch-late",
    "events": "/events",
    "orders": "/orders",
    "dead": "/dead",
    "dead-plan": "/dead/plan",
    "replays": "/replays",
    "replay": "/replays/abcdef",
    "audit": "/audit?since=1h",
}
"""Name of its picture -> a page."""

SHOWN: Final[tuple[tuple[Scheme, int], ...]] = (("light", WIDE), ("light", NARROW), ("dark", WIDE), ("dark", NARROW))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture
def busy(lab: Lab) -> Lab:
    """A receiver with something of everything."""

    def fill() -> None:
        lab.declare()
        lab.accept_and_fetch(order(1))
        lab.deliver()
        lab.accept_and_fetch(order(2))
        lab.accept(order(3), at=lab.now - 600_000)
        lab.accept(order(4, MUSEUM))
        lab.dead_letter(order(4, MUSEUM))
        lab.accept_and_fetch(order(5))
        lab.dead_letter_delivery(order(5), "rejected: <b>sold out</b>")
        query = DeadQuery(until=from_ms(lab.now))
        Plans(lab.redis, event_days=90).draft(
            "abcdef", query, count=2, rate=0.01, selected="dead letters", who="Ada", why="back"
        )

    beside(fill)
    return lab


@pytest.fixture
def tab(browser: Browser, ops: OpsSite, busy: Lab) -> Iterator[Tab]:
    """A tab of a user who may act, over a busy receiver."""
    with tab_of(browser, ops) as one:
        yield one


@pytest.mark.parametrize("name", PAGES)
def test_axe_and_the_browser_find_nothing_at_any_width_in_light_and_dark(tab: Tab, name: str) -> None:
    """Colours are those of the preference and places those of the width, so axe looks at two of the four."""
    tab.open(PAGES[name])
    for scheme, width in SHOWN:
        tab.resize(width, scheme)
        tab.picture(f"{name}-{scheme}-{width}")

        assert tab.overflow() == 0
        if (scheme == "light") == (width == WIDE):
            assert tab.violations() == []


@pytest.mark.parametrize("name", PAGES)
def test_without_javascript_a_page_shows_the_same(browser: Browser, ops: OpsSite, busy: Lab, name: str) -> None:
    with tab_of(browser, ops) as with_it, tab_of(browser, ops, javascript=False) as without:
        # The ages of what waits grow between the two.
        shown = [re.sub(r"\d+", "0", one.open(PAGES[name]).locator("main").inner_text()) for one in (with_it, without)]

        assert shown[0] == shown[1]
        assert len(shown[1]) > 100


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
    page.wait_for_function("document.querySelector('iframe')")
    seen = eventually(lambda: (found := reported(tab)) >= expected and found, what="a report of each")
    assert seen == expected
    assert page.title() != "taken"
    tab.problems.clear()


def reported(tab: Tab) -> set[str]:
    """Return the directives that reports of the CSP name, once the browser has sent what it has."""
    tab.page.evaluate("0")
    return {text.split()[2] for text in tab.problems if text.startswith("error: CSP: ")}


def test_the_keyboard_reaches_everything_and_shows_where_it_is(tab: Tab) -> None:
    page = tab.open("/")
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text() == "Skip to the content"
    assert page.locator(":focus").is_visible()

    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    reachable = page.evaluate("document.querySelectorAll('main a, main button, main input, main summary').length")
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
        if tag == "BODY" or not is_in_main:
            break
        assert outline >= 2, tag
        reached += tag in {"A", "BUTTON", "INPUT", "SUMMARY"}
    assert reached == reachable


def test_a_poll_shows_what_is_new_and_keeps_focus_and_text_and_what_is_open(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/")
    pending, details = page.locator("h1"), page.locator("main details").first
    assert "2 orders are pending" not in pending.inner_text()
    details.locator("summary").click()
    page.get_by_label("Where is an order?").fill("CM-2611")
    beside(busy.accept, order(6))

    page.clock.run_for(5000)
    pending.filter(has_text="2 orders are pending").wait_for()

    assert page.evaluate("document.activeElement.value") == "CM-2611"
    assert details.get_attribute("open") is not None


def test_a_page_says_while_it_is_not_up_to_date(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/")
    notice = page.locator("#stale")
    schema = busy.redis.get(KEYS.schema)
    assert not notice.is_visible()

    busy.redis.set(KEYS.schema, "another")
    page.clock.run_for(5000)
    notice.filter(has_text="Redis cannot be used now").wait_for()
    assert "UTC" in notice.inner_text()
    assert "pending" in page.locator("h1").inner_text()

    busy.redis.set(KEYS.schema, schema or b"")
    page.clock.run_for(5000)
    notice.wait_for(state="hidden")
    assert {text.partition(" (")[0] for text in tab.problems} == {
        "error: Failed to load resource: the server responded with a status of 503"
    }
    tab.problems.clear()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (0, "The ops page does not answer."),
        (401, "Your password is no longer accepted."),
        (500, "The ops page answers with error 500."),
    ],
)
def test_a_page_that_is_not_up_to_date_says_why_and_as_of_when(tab: Tab, status: int, said: str) -> None:
    """That the page is away says nothing of the receiver."""
    tab.page.clock.install()
    page = tab.open("/")
    read_at = page.locator("#read-at").inner_text().removeprefix("Read at ")
    page.route("**/", lambda route: route.fulfill(status=status) if status else route.abort())
    page.clock.run_for(5000)

    page.locator("#stale").filter(has_text=said).wait_for()

    assert f"All of this is as of {read_at}." in page.locator("#stale").inner_text()
    assert page.locator("main").evaluate("one => getComputedStyle(one).filter") == "grayscale(1)"
    tab.problems.clear()


def test_a_list_stands_still_while_events_arrive_and_says_how_many_there_are(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/events?company=museum")
    before = page.locator("tbody").inner_html()
    beside(busy.accept, order(7, MUSEUM), order(8, MUSEUM), order(9))

    page.clock.run_for(5000)
    new = page.get_by_role("link", name="2 new events: show them")
    new.wait_for()

    assert page.locator("tbody").inner_html() == before
    new.click()
    page.get_by_role("link", name=order(8).order_id).wait_for()
    assert (page.url.partition("?")[2], page.locator("tbody tr").count()) == ("company=museum", 3)


def test_a_list_that_is_followed_moves_as_events_arrive(tab: Tab, busy: Lab) -> None:
    tab.page.clock.install()
    page = tab.open("/events?company=museum")
    page.get_by_role("link", name="Follow live").click()
    page.get_by_text("Live:").wait_for()
    beside(busy.accept, order(7, MUSEUM), order(9))

    page.clock.run_for(5000)

    page.get_by_role("link", name=order(7).order_id).wait_for()
    assert page.locator("tbody tr").count() == 2


def test_dead_letters_are_requeued_with_a_form_and_the_progress_is_alive(tab: Tab, busy: Lab) -> None:
    page = tab.open("/dead")
    page.get_by_role("link", name="Requeue these 2…").click()
    page.get_by_label("Dead letters a second").fill("0.5")
    page.get_by_role("button", name="Show the cost at this rate").click()
    page.get_by_text("4 s", exact=True).wait_for()
    page.get_by_label("Why?").fill("the venue is back")
    page.get_by_role("button", name="Requeue 2").click()

    page.get_by_text("0 of 2").or_(page.get_by_text("1 of 2")).wait_for()
    page.locator("#progress").get_by_text("2 of 2").wait_for(timeout=15_000)

    assert "done" in page.locator("#progress").inner_text()
    assert busy.dead() == 0
