"""The page of one order in a real Chromium: it follows the order without taking anything from who fills in a form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import NARROW, WIDE, Tab, beside, tab_of
from tests.integration.test_operations import has_it
from tests.integration.test_ops_order import HOSTILE, STATES, page_of
from tests.lab import ONE, SINK, Lab
from tests.ops_site import READ, OpsSite

TICK = "document.body.dispatchEvent(new CustomEvent('ops:tick'))"
ADDRESS = page_of(company="venue")


@pytest.fixture
def tab(browser: Browser, ops: OpsSite, lab: Lab) -> Iterator[Tab]:
    beside(lab.declare)
    with tab_of(browser, ops) as one:
        yield one


def test_a_refresh_shows_the_new_state_and_leaves_forms_focus_and_folds_as_they_are(tab: Tab, lab: Lab) -> None:
    beside(STATES["dead_fetch"], lab)
    page = tab.open(ADDRESS)
    page.get_by_text("Fields of the record").click()
    page.get_by_text("Discard the fetch").first.click()
    why = page.locator("details[open] input[name=why]")
    page.get_by_label("I know that this cannot be undone").check()
    why.fill("upstream says")
    why.press("ArrowLeft")
    expect(page.locator("#state")).to_contain_text("the fetch is a dead letter")

    beside(lab.accept)
    beside(has_it, lab)
    page.evaluate(TICK)

    expect(page.locator("#state")).to_contain_text("COMPLETE")
    expect(page.locator("#state")).not_to_contain_text("NOT COMPLETE")
    expect(page.locator("#state")).to_contain_text("What can be done has changed")
    expect(page.locator("#facts")).to_contain_text(f"revision 1 delivered to {SINK}")
    expect(why).to_have_value("upstream says")
    expect(why).to_be_focused()
    assert why.evaluate("one => one.selectionStart") == len("upstream says") - 1
    assert page.get_by_label("I know that this cannot be undone").is_checked()
    expect(page.locator("#facts details[open] dl")).to_contain_text("fetched_generation")

    page.get_by_role("button", name="Discard the fetch").click()
    expect(page.locator("main > .notice")).to_contain_text("Nothing was done: it had been requeued, or had ended")


def test_without_javascript_the_page_is_read_and_acts(browser: Browser, ops: OpsSite, lab: Lab) -> None:
    beside(lab.declare)
    beside(STATES["dead_delivery"], lab)
    with tab_of(browser, ops, javascript=False) as tab:
        page = tab.open(ADDRESS)
        page.locator("summary", has_text="Requeue").click()
        page.get_by_role("button", name="Requeue").click()
        assert page.url.endswith(ADDRESS), "the browser asks for the reason"
        page.locator("details[open] input[name=why]").fill("the shop is back")
        page.get_by_role("button", name="Requeue").click()
        expect(page.locator("main > .notice")).to_contain_text("It was requeued, with all attempts.")
        expect(page.locator("#facts")).to_contain_text("the shop is back")


def test_a_reader_finds_the_order_by_keyboard_and_sees_no_button(browser: Browser, ops: OpsSite, lab: Lab) -> None:
    beside(lab.declare)
    beside(STATES["dead_delivery"], lab)
    with tab_of(browser, ops, password=READ) as tab:
        page = tab.open("/search")
        page.get_by_label("Order id or reference").fill(ONE.order_id)
        page.keyboard.press("Enter")
        page.wait_for_url(f"**{ADDRESS}")
        expect(page.locator("#state")).to_contain_text("NOT COMPLETE")
        assert page.locator("main button").count() == 0


@pytest.mark.parametrize("state", ["dead_fetch_of_fetched"])
def test_axe_and_the_browser_find_nothing_in_any_state(tab: Tab, lab: Lab, state: str) -> None:
    beside(STATES[state], lab)
    tab.open(ADDRESS)
    for summary in tab.page.locator("summary").all():
        summary.click()

    for scheme, width in (("light", WIDE), ("dark", NARROW)):
        tab.resize(width, scheme)  # type: ignore[arg-type]  # a preference
        tab.picture(f"order-{state}-{scheme}-{width}")
        assert (tab.violations(), tab.overflow()) == ([], 0)


def test_hostile_text_leaves_the_layout_as_it_is(tab: Tab, lab: Lab) -> None:
    def fill() -> None:
        lab.accept_and_fetch(statusMessage=HOSTILE + "x" * 10_000, buyFromOrderReference="y" * 300)
        lab.deliver("rejected", reason=f"rejected: {'z' * 500}", failure=HOSTILE)

    beside(fill)
    tab.open(ADDRESS)
    for width in (WIDE, NARROW):
        tab.resize(width, "light")
        tab.picture(f"order-hostile-light-{width}")
        assert tab.overflow() == 0
