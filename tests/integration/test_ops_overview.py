"""The first screen of the ops page: one sentence on how things are, and each number with the list that it counts."""

from __future__ import annotations

import re
from functools import partial
from html.parser import HTMLParser
from typing import Any, Final, cast

import msgspec
import pytest

from app import times
from app.alerts import HOUR, RULES
from app.deployment import Deployment
from app.ops import overview
from app.ops.access import User
from app.ops.app import Visit
from app.ops.overview import FRESH_SECONDS, FirstScreen
from app.ops.pages import Pages
from app.snapshot import AlertState
from tests.lab import KEYS, ONE, SAME_ID, SINK, VENUE, Lab, order
from tests.ops_site import OpsSite

QUOTED: Final = "python%3Aoperator%3Ais_"


class Reader(HTMLParser):
    """The text of a page, and its links by their text; no element may have a style or a script of its own."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.links: list[tuple[str, str]] = []
        self._address: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert not [name for name in given if name == "style" or name.startswith("on")]
        assert tag != "style"
        assert tag != "script" or given["src"]
        if tag == "a":
            self._address = given["href"]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._address is not None:
            self.links.append((" ".join(data.split()), self._address))
            self._address = None

    def address(self, text: str) -> str:
        """Return where the only link with this text goes."""
        (found,) = {address for shown, address in self.links if shown == text}
        return found

    def has(self, *texts: str) -> bool:
        """Return whether the page has these texts, in this order."""
        return re.search(".*".join(map(re.escape, texts)), " ".join(self.text.split())) is not None


def first_screen(ops: OpsSite) -> Reader:
    return Reader(ops.read("/"))


def test_an_empty_receiver_says_that_nothing_is_pending_and_what_is_missing(ops: OpsSite, lab: Lab) -> None:
    page = first_screen(ops)

    assert page.has("Needs a look", "No worker pool runs; no order is pending; no alert.")
    assert page.address("No worker pool runs") == "/runbook/pool-silent"
    assert page.has("Which sinks there are is known when a worker pool runs.")
    assert page.has("Start ota-receiver worker")
    lab.declare()
    page = first_screen(ops)
    assert page.has("Good", "No order is pending; no alert.")
    assert page.has("No order and no delivery has failed for good.")


def test_the_parts_come_in_the_order_in_which_people_need_them(ops: OpsSite, lab: Lab) -> None:
    lab.declare()
    fire(lab, "fetch_late|venue|")
    page = first_screen(ops)

    parts = "1 alert.", "fetch_late venue", "Where is an order?", "Companies", "Dead letters", "Sinks", "Worker pools"
    assert page.has(*parts, "Queues", "Channel Manager")


def test_what_is_pending_links_to_the_pending_orders_of_all_and_of_its_company(ops: OpsSite, lab: Lab) -> None:
    lab.declare()
    lab.accept(ONE, order(2), SAME_ID, at=lab.now - 240_000)
    page = first_screen(ops)

    assert page.address("3 orders are pending, the oldest for 4 min") == "/orders?state=outstanding"
    assert {address for text, address in page.links if text == "4 min"} == {
        "/orders?state=outstanding&company=venue",
        "/orders?state=outstanding&company=museum",
    }


def fire(lab: Lab, key: str, reason: str = "") -> None:
    state = AlertState(since=lab.now - 60_000, firing_at=lab.now, last_true_at=lab.now, reason=reason)
    lab.redis.hset(KEYS.alerts, key, msgspec.json.encode(state))


def test_an_alert_links_to_its_section_of_the_runbook(ops: OpsSite, lab: Lab) -> None:
    fire(lab, "breaker_open|venue|", "HTTP 401")
    page = first_screen(ops)

    assert page.has("breaker_open venue", "for 1 min, HTTP 401")
    assert page.address("What to do") == "/runbook/breaker-open"
    section = Reader(ops.read("/runbook/breaker-open"))
    assert section.has("Breaker open", "Means.", "Do.")


def test_every_alert_has_a_section_whose_links_lead_somewhere(ops: OpsSite, lab: Lab) -> None:
    addresses = {f"/runbook/{name.replace('_', '-')}" for name in RULES}
    assert len(addresses) > 10
    for address in addresses:
        addresses = addresses | {link for _, link in Reader(ops.read(address)).links if link.startswith("/runbook/")}

    assert {address: ops.get(address).status_code for address in addresses} == dict.fromkeys(addresses, 200)
    assert ops.get("/runbook/no-such-alert").status_code == 404
    assert not {link for address in addresses for _, link in Reader(ops.read(address)).links if ".md" in link}


def test_dead_letters_are_counted_by_reason_and_link_to_exactly_these(ops: OpsSite, lab: Lab) -> None:
    lab.accept(ONE, order(2), order(3), order(4))
    for number, reason in ((1, "order_missing"), (2, "order_missing"), (3, "unsettled")):
        lab.dead_letter(order(number), reason)
    lab.fetch_and_store(order(4))
    lab.dead_letter_delivery(order(4), "unsettled")
    lab.declare()
    page = first_screen(ops)

    assert page.has("Dead letters", "no alert; 4 dead letters.")
    assert page.address("4 dead letters") == "/dead"
    assert page.has("order_missing", "2", "fetch 2")
    assert page.has("unsettled", "2", f"fetch 1, {SINK} 1")
    assert {link for link in page.links if link[1].startswith("/dead?reason")} == {
        ("2", "/dead?reason=order_missing"),
        ("2", "/dead?reason=unsettled"),
        ("1", f"/dead?reason=unsettled&sink={QUOTED}"),
        ("2", "/dead?reason=order_missing&sink=-"),
        ("1", "/dead?reason=unsettled&sink=-"),
    }


def test_a_sink_links_to_the_orders_that_it_lacks_refuses_and_has_refused_for_good(ops: OpsSite, lab: Lab) -> None:
    lab.declare()
    for number in (1, 2, 3):
        lab.accept_and_fetch(order(number))
    page = first_screen(ops)
    assert page.has(SINK, "delivers", "3", "0", "0")
    assert {address for _, address in page.links if QUOTED in address} == {f"/orders?behind={QUOTED}"}

    lab.deliver("retry", order(1), failure="ValueError at shop.py:7", wait=600)
    lab.dead_letter_delivery(order(2))
    page = first_screen(ops)
    assert page.has(SINK, "some fail", "nothing delivered for", "2 attempts failed, ValueError", "2", "1", "1")
    assert {link for link in page.links if QUOTED in link[1] and "reason" not in link[1]} == {
        ("2", f"/orders?behind={QUOTED}"),
        ("1", f"/orders?failing={QUOTED}"),
        ("1", f"/dead?sink={QUOTED}"),
    }


def test_a_disabled_sink_and_a_silent_pool_are_named(ops: OpsSite, lab: Lab) -> None:
    lab.declare("pool-of-host", ago=400)
    Deployment(lab.redis).disable(SINK, "HTTP 410")
    page = first_screen(ops)

    assert page.has(SINK, "disabled", "HTTP 410")
    assert page.has("pool-of-host", "silent for 6 min", "No worker pool runs")
    assert page.address(f"sink {SINK} is disabled") == "/runbook/sink-disabled"


@pytest.mark.parametrize(("age_s", "shown"), [(4, "✓ 5.0 s target 30 s"), (3000, "▲ 1.0 h target 30 s")])
def test_the_time_from_event_to_fetch_is_compared_with_the_target(
    ops: OpsSite, lab: Lab, age_s: int, shown: str
) -> None:
    assert first_screen(ops).has("venue", "no fetch in 24 h")
    lab.accept(at=lab.now - age_s * 1000)
    lab.fetch_and_store()

    assert first_screen(ops).has("venue", shown)


def test_the_events_of_each_hour_are_a_chart_and_a_table_beside_the_usual(ops: OpsSite, lab: Lab) -> None:
    hour = lab.now // HOUR
    for week in range(5):
        lab.redis.hset(KEYS.event_rate(VENUE), f"hour:{hour - 1 - week * 7 * 24}", 70 if week else 4321)
    page = ops.read("/")

    assert [path.count("M") for path in re.findall(r'class="bar" d="([^"]*)"', page)] == [48, 48]
    assert "M277 48v-46.0h4V48z" in page
    assert "M276 47.3h6" in page
    assert Reader(page).has(f"{times.from_ms((hour - 1) * HOUR):%m-%d %H:00}", "0 (–)", "4,321 (70)")


def test_texts_of_others_are_shown_as_text(ops: OpsSite, lab: Lab) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    fire(lab, "sink_failing||<b>shop</b>", hostile)
    lab.declare(f"{hostile}.example.com:1")
    page = first_screen(ops)

    assert page.text.count(hostile) == 2
    assert "<b>shop</b>" in page.text


def test_many_viewers_cost_redis_as_much_as_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "FRESH_SECONDS", FRESH_SECONDS)  # `ops` has none
    now, stats = [0.0], partial(cast("Any", lab.redis).info, "stats")
    screen, visit = FirstScreen(Pages(), lambda: now[0]), Visit(User("Ada", "read"), lab.stores(), "/", {}, {}, {}, {})

    def commands(seconds: float) -> int:
        """Return how many commands a visit at this time sends."""
        now[0], before = seconds, int(stats()["total_commands_processed"])
        screen.show(visit)
        return int(stats()["total_commands_processed"]) - before - 1

    assert commands(0) > 10
    # One read would be over ten; the feeder of the ops process on this server asks now and then.
    assert sum(commands(FRESH_SECONDS - 0.01) for _ in range(20)) < 10
    assert commands(FRESH_SECONDS) > 10
