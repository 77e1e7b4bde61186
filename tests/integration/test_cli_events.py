"""`events list` and `events show`: the accepted events."""

from __future__ import annotations

import pytest

from tests.lab import MUSEUM, Lab, order


def event_ids(lab: Lab) -> list[str]:
    return [event["id"] for event in lab.run_command("events", "list", "--json").objects]


def test_events_are_listed_newest_last_as_a_table_and_as_lines(lab: Lab) -> None:
    lab.accept(order(1), status="Draft")
    lab.accept(order(2, MUSEUM))
    lab.accept(order(1), status="Issued")

    table, lines = lab.run_command("events", "list"), lab.run_command("events", "list", "--json", "--limit", "2")

    assert (table.code, lines.code, lines.err) == (0, 0, "")
    assert [line.split()[3] for line in table.out.splitlines()[3:-1]] == ["venue", "museum", "venue"]
    listed = [(event["company"], event["order_id"], event["status"], event["outcome"]) for event in lines.objects]
    assert listed == [
        ("museum", order(2).order_id, "Issued", "queued"),
        ("venue", order(1).order_id, "Issued", "coalesced"),
    ]
    assert lines.objects[0]["at"].endswith("Z")


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (("--status", "draft"), [1]),
        (("--company", "museum"), [2]),
        (("--outcome", "coalesced"), []),
        (("--outcome", "queued", "--status", "error"), [3]),
        (("--company", "{22222222-2222-4222-8222-222222222222}"), [2]),
        (("--since", "1h", "--company", "venue"), [1, 3]),
    ],
)
def test_events_are_filtered(lab: Lab, filters: tuple[str, ...], numbers: list[int]) -> None:
    lab.accept(order(1), status="Draft")
    lab.accept(order(2, MUSEUM))
    lab.accept(order(3), status="Error")

    found = lab.run_command("events", "list", "--json", *filters)

    assert [event["order_id"] for event in found.objects] == [order(number).order_id for number in numbers]


def test_no_match_is_one_sentence_and_exit_code_1(lab: Lab) -> None:
    ended = lab.run_command("events", "list", "--until", "1h", "--json")

    assert (ended.code, ended.out, ended.err) == (1, "", "No event matches.\n")


def test_one_event_is_shown_with_the_state_of_its_order(lab: Lab) -> None:
    lab.accept(order(1), timestamp="2026-06-01T08:15:02.4170000Z")
    lab.fetch_and_store(order(1))
    (event_id,) = event_ids(lab)

    page, line = lab.run_command("events", "show", event_id), lab.run_command("events", "show", event_id, "--json")

    assert (page.code, line.code) == (0, 0)
    assert order(1).order_id in page.out
    assert "2026-06-01T08:15:02.4170000Z" in page.out
    (shown,) = line.objects
    assert (shown["id"], shown["order_state"], shown["secret"]) == (event_id, "fetched", "current")


def test_an_unknown_event_is_exit_code_1(lab: Lab) -> None:
    assert lab.run_command("events", "show", "1-1").code == 1
