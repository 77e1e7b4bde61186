"""`subscription`: what makes events come is listed, made, deleted and watched, and no clientState is ever seen."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from redis import Redis

from app.dev.processes import Process
from app.dev.sandbox.process import Sandbox, start
from tests.eventually import eventually
from tests.integration.desk import CLIENT_STATES, MUSEUM, VENUE, Desk, Ended, open_desk
from tests.integration.test_cli_check import declare, subscribe, subscription_call, subscriptions

PATH: Final = "/webhooks/ota-channel-manager"
URL: Final = f"https://hooks.example.com{PATH}"
NOBODY: Final = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start(seed=4) as running:
        yield running


@pytest.fixture
def desk(sandbox: Sandbox, redis_client: Redis, redis_url: str, tmp_path: Path) -> Desk:
    """A desk whose two companies are known upstream and have no subscription."""
    for slug, company_id in (("venue", VENUE), ("museum", MUSEUM)):
        declare(sandbox, slug, company_id)
        for one in subscriptions(sandbox, slug):
            subscription_call(sandbox, slug, "DELETE", f"/{one['id']}")
    sandbox.admin("DELETE", "faults")
    return open_desk(redis_client, redis_url, tmp_path, sandbox.url)


def run(desk: Desk, *arguments: str, **env: str) -> Ended:
    ended = desk.run("subscription", *arguments, **env)
    assert "canary" not in ended.out + ended.err
    return ended


def addresses(sandbox: Sandbox, slug: str = "venue") -> list[tuple[str, str]]:
    return [(one["notificationUrl"], one["subscriptionState"]) for one in subscriptions(sandbox, slug)]


def test_create_subscribes_the_address_with_client_state_and_check_is_content(desk: Desk, sandbox: Sandbox) -> None:
    made = run(desk, "create", URL, "--company", "venue", "--json")

    assert made.code == 0, made.err
    (one,) = subscriptions(sandbox, "venue")
    assert (one["notificationUrl"], one["clientState"]) == (URL, CLIENT_STATES["venue"])
    (told,) = made.objects
    assert (told["id"], told["company"], told["url"], told["secret"]) == (one["id"], "venue", URL, "current")
    assert subscriptions(sandbox, "museum") == []
    assert made.err == ""


def test_create_wants_to_know_which_of_several_companies(desk: Desk, sandbox: Sandbox) -> None:
    ended = run(desk, "create", URL)

    assert (ended.code, "--company: museum, venue" in ended.err, addresses(sandbox)) == (2, True, [])


def test_the_same_address_is_not_subscribed_twice_unless_that_is_meant(desk: Desk, sandbox: Sandbox) -> None:
    known = subscribe(sandbox, "venue", notificationUrl="https://HOOKS.example.com/webhooks/ota-channel-manager/")

    refused = run(desk, "create", URL, "-c", "venue")
    assert (refused.code, known in refused.err, len(addresses(sandbox))) == (2, True, 1)

    assert run(desk, "create", URL, "-c", "venue", "--yes").code == 0
    assert len(addresses(sandbox)) == 2


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"http://hooks.example.com{PATH}", "must be https"),
        (f"https://name:canary@hooks.example.com{PATH}", "neither a user"),
        ("ftp://hooks.example.com", "not a web address"),
        ("https://hooks.example.com/a b", "not a web address"),
        ("https://[::1", "not an address"),
        ("hooks.example.com", "not a web address"),
    ],
)
def test_an_address_at_which_events_could_be_read_or_never_come_is_refused(desk: Desk, url: str, said: str) -> None:
    ended = run(desk, "create", url, "-c", "venue", NP_BASE_URL=NOBODY)

    assert (ended.code, said in ended.err) == (2, True)


def test_an_address_that_does_not_end_in_webhook_path_is_taken_with_a_warning(desk: Desk, sandbox: Sandbox) -> None:
    ended = run(desk, "create", "https://hooks.example.com/elsewhere?code=hidden", "-c", "venue")

    assert (ended.code, "WEBHOOK_PATH" in ended.err, "404" in ended.err) == (0, True, True)
    assert "hidden" not in ended.out + ended.err
    assert addresses(sandbox) == [("https://hooks.example.com/elsewhere?code=hidden", "Active")]


def test_list_tells_state_and_which_secret_of_every_company(desk: Desk, sandbox: Sandbox) -> None:
    first = subscribe(sandbox, "venue", notificationUrl=f"{URL}?code=hidden")
    second = subscribe(sandbox, "venue", clientState="canary-of-somebody-else", eventName="another_event")
    third = subscribe(sandbox, "museum")
    sandbox.admin("PATCH", f"subscriptions/{third}", {"state": "Disabled"})

    lines, table = run(desk, "list", "--json"), run(desk, "list")

    assert (lines.code, table.code) == (0, 0)
    seen = {(one["id"], one["company"], one["state"], one["secret"], one["url"]) for one in lines.objects}
    assert seen == {
        (first, "venue", "Active", "current", f"{URL}?…"),
        (second, "venue", "Active", "unknown", URL),
        (third, "museum", "Disabled", "current", URL),
    }
    assert all(text in table.out for text in (first, second, third, "Disabled", "another_event"))
    assert "hidden" not in lines.out + table.out
    assert [one["id"] for one in run(desk, "list", "--company", MUSEUM, "--json").objects] == [third]


def test_a_company_that_cannot_be_asked_does_not_hide_the_others(desk: Desk, sandbox: Sandbox) -> None:
    third = subscribe(sandbox, "museum")
    declare(sandbox, "venue", VENUE, api_keys=["another-key"])

    ended = run(desk, "list", "--json")

    assert (ended.code, [one["id"] for one in ended.objects]) == (3, [third])
    assert "venue: unauthorized (HTTP 401). Correct NP_API_KEY" in ended.err


def test_no_subscription_at_all_ends_with_1(desk: Desk) -> None:
    ended = run(desk, "list")

    assert (ended.code, ended.err) == (1, "No subscription.\n")


def test_delete_finds_the_company_by_the_id_and_asks_first(desk: Desk, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "museum")

    asked = run(desk, "delete", one)
    assert (asked.code, len(subscriptions(sandbox, "museum"))) == (2, 1)
    assert "It is the last Active one: no more events will arrive." in asked.err

    deleted = run(desk, "delete", f"{{{one.upper()}}}", "--yes", "--json")
    assert (deleted.code, deleted.objects) == (0, [{"company": "museum", "id": one, "deleted": True}])
    assert subscriptions(sandbox, "museum") == []
    assert run(desk, "delete", one, "--yes").code == 1
    assert run(desk, "delete", "no-id").code == 2


@pytest.mark.parametrize("kind", ["cut", "rubbish"])
def test_when_upstreams_answer_is_lost_a_change_is_told_as_uncertain(desk: Desk, sandbox: Sandbox, kind: str) -> None:
    sandbox.admin("POST", "faults", {"kind": kind, "operation": "createSubscription"})

    ended = run(desk, "create", URL, "-c", "venue")

    assert (ended.code, "It may have been done" in ended.err) == (3, True)
    assert len(addresses(sandbox)) == 1


def test_a_new_client_state_goes_to_a_file_of_its_owner_and_nothing_is_changed_upstream(
    desk: Desk, sandbox: Sandbox
) -> None:
    """Before the web processes know it, events that carry it would be answered 401."""
    old = subscribe(sandbox, "venue")
    place = desk.folder / "next"
    rotate = ("create", URL, "-c", "venue", "--new-client-state")

    nowhere = run(desk, *rotate)
    ended = run(desk, *rotate, "--write-to", str(place))

    assert (nowhere.code, "--write-to FILE" in nowhere.err) == (2, True)
    assert (ended.code, ended.err, len(subscriptions(sandbox, "venue"))) == (0, "", 1)
    made = place.read_text().strip()
    assert 40 <= len(made) <= 50
    assert place.stat().st_mode & 0o777 == 0o600
    assert made not in ended.out
    assert all(text in ended.out for text in (str(place), "client_state_previous", f"delete {old}", "--yes"))
    assert [line[:3] for line in ended.out.splitlines()[2:]] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert "\N{REPLACEMENT CHARACTER}" not in ended.out

    again = run(desk, *rotate, "--write-to", str(place))
    assert (again.code, place.read_text().strip()) == (2, made)
    assert run(desk, *rotate, "--write-to", str(place), "--yes").code == 0
    assert place.read_text().strip() != made
    assert [path.name for path in desk.folder.iterdir() if path.name.startswith(".")] == []

    shown = run(desk, *rotate, "--reveal", "--json")
    assert len(shown.objects[0]["client_state"]) == 43


def test_the_client_state_in_use_is_never_overwritten(desk: Desk, sandbox: Sandbox) -> None:
    """It is needed as CLIENT_STATE_PREVIOUS."""
    place = desk.folder / "in-use"
    place.write_text(CLIENT_STATES["venue"] + "\n")

    ended = run(desk, "create", URL, "-c", "venue", "--new-client-state", "--write-to", str(place), "--yes")

    assert (ended.code, "in use" in ended.err) == (2, True)
    assert place.read_text().strip() == CLIENT_STATES["venue"]


def test_the_steps_of_a_rotation_lead_to_a_subscription_with_the_new_secret(desk: Desk, sandbox: Sandbox) -> None:
    old, place = subscribe(sandbox, "venue"), desk.folder / "next"
    assert run(desk, "create", URL, "-c", "venue", "--new-client-state", "--write-to", str(place)).code == 0
    companies = Path(desk.env["COMPANIES_FILE"])
    was = f'client_state = "{CLIENT_STATES["venue"]}"'
    new = f'client_state_file = "{place}"\nclient_state_previous = "{CLIENT_STATES["venue"]}"'
    companies.write_text(companies.read_text().replace(was, new))

    assert run(desk, "create", URL, "-c", "venue", "--yes").code == 0
    assert {one["id"] == old: one["secret"] for one in run(desk, "list", "--json").objects} == {
        True: "previous",
        False: "current",
    }
    assert run(desk, "delete", old, "--yes").code == 0
    assert [one["clientState"] for one in subscriptions(sandbox, "venue")] == [place.read_text().strip()]

    under_way = run(desk, "create", URL, "-c", "venue", "--new-client-state", "--reveal")
    assert (under_way.code, "A rotation is under way" in under_way.err) == (2, True)


def watch_once(desk: Desk, *more: str, **env: str) -> tuple[int, list[str]]:
    ended = run(desk, "watch", "--once", "-c", "venue", "--json", *more, **env)
    return ended.code, [one["state"] for one in ended.objects]


def test_watch_once_tells_by_its_exit_code_for_cron(desk: Desk, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "venue")
    assert watch_once(desk) == (0, ["active"])
    assert watch_once(desk, "--url", "https://other.example.com/hook") == (1, ["missing"])

    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})
    assert watch_once(desk) == (1, ["inactive"])

    subscription_call(sandbox, "venue", "DELETE", f"/{one}")
    assert watch_once(desk) == (1, ["missing"])
    assert watch_once(desk, NP_BASE_URL=NOBODY) == (3, ["unreachable"])


def test_repair_puts_an_active_subscription_in_the_place_of_one_switched_off(desk: Desk, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "venue")
    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})

    assert watch_once(desk, "--repair") == (0, ["inactive", "repaired"])

    (made,) = subscriptions(sandbox, "venue")
    assert (made["id"] != one, made["notificationUrl"], made["subscriptionState"]) == (True, URL, "Active")
    assert made["clientState"] == CLIENT_STATES["venue"]


def test_repair_of_one_that_is_gone_needs_its_address(desk: Desk, sandbox: Sandbox) -> None:
    lost = run(desk, "watch", "--once", "-c", "venue", "--repair")
    assert (lost.code, "give --url" in lost.out, addresses(sandbox)) == (1, True, [])

    mended = run(desk, "watch", "--once", "-c", "venue", "--repair", "--url", URL)
    assert (mended.code, "It is created again" in mended.out, "cannot" in mended.out) == (0, True, False)
    assert ["missing" in line for line in mended.out.splitlines()] == [True, False]
    assert "repaired" in mended.out
    assert addresses(sandbox) == [(URL, "Active")]


def test_a_repair_that_upstream_refuses_is_told_and_deletes_nothing(desk: Desk, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "venue")
    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})
    sandbox.admin("POST", "faults", {"kind": "status", "operation": "createSubscription", "status": 503})

    assert watch_once(desk, "--repair") == (1, ["inactive", "repair_failed"])
    assert addresses(sandbox) == [(URL, "Disabled")]


def test_a_subscription_of_somebody_else_is_neither_taken_for_ours_nor_cleared_away(
    desk: Desk, sandbox: Sandbox
) -> None:
    """It carries a secret that is none of ours."""
    foreign = subscribe(sandbox, "venue", clientState="canary-of-somebody-else")
    sandbox.admin("PATCH", f"subscriptions/{foreign}", {"state": "Disabled"})

    assert watch_once(desk, "--repair") == (1, ["inactive"])
    assert watch_once(desk, "--repair", "--url", URL) == (0, ["inactive", "repaired"])
    assert {one["subscriptionState"] for one in subscriptions(sandbox, "venue")} == {"Active", "Disabled"}


@contextmanager
def watching(desk: Desk, *more: str) -> Iterator[tuple[Process, Path]]:
    """Run `subscription watch` each second; its lines go to one file, its log to another."""
    lines, program = desk.folder / "lines", [sys.executable, "-m", "app.cli", "subscription", "watch", "--every", "1s"]
    code = "import os, sys; os.dup2(os.open(sys.argv[1], 577, 0o600), 1); os.execv(sys.argv[2], sys.argv[2:])"
    argv = [sys.executable, "-c", code, str(lines), *program, "-c", "venue", "--json", *more]
    with Process.start(argv, env=desk.env | {"LOG_FORMAT": "json"}, log=desk.folder / "log") as process:
        yield process, lines


def told(lines: Path) -> list[str]:
    written = lines.read_text().splitlines() if lines.exists() else []
    return [json.loads(line)["state"] for line in written]


def test_watch_tells_each_change_once_repairs_what_is_gone_and_ends_quietly_on_ctrl_c(
    desk: Desk, sandbox: Sandbox
) -> None:
    """It polls each second here: about 5 s. Upstream's trouble is told once too."""
    one = subscribe(sandbox, "venue")

    def asked() -> int:
        operations: dict[str, dict[str, int]] = sandbox.admin("GET", "stats")["operations"]
        return sum(operations.get("listSubscriptions", {}).values())

    with watching(desk, "--repair") as (process, lines):
        eventually(lambda: told(lines) == ["active"], 10, what="it is seen to be active")
        subscription_call(sandbox, "venue", "DELETE", f"/{one}")
        eventually(lambda: told(lines) == ["active", "missing", "repaired"], what="it is repaired")
        (rule,) = sandbox.admin("POST", "faults", {"kind": "status", "operation": "listSubscriptions", "status": 500})
        eventually(lambda: told(lines)[3:] == ["unreachable"], what="the trouble is told")
        before = asked()
        eventually(lambda: asked() >= before + 2, what="two more looks")
        sandbox.admin("DELETE", f"faults/{rule}")
        eventually(
            lambda: told(lines)[3:] == ["unreachable", "active"], what="it is active again, and no more was told"
        )
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(5) == 130
    log = [json.loads(line) for line in (desk.folder / "log").read_text().splitlines()]
    assert [line["event"] for line in log] == [
        "subscription.active",
        "subscription.down",
        "subscription.repaired",
        "subscription.check_failed",
        "subscription.active",
    ]
    assert "canary" not in json.dumps(log) + lines.read_text()
    assert addresses(sandbox) == [(URL, "Active")]


def test_watch_ends_with_0_when_it_is_told_to_stop(desk: Desk) -> None:
    """As the first process of a container it would else not notice SIGTERM."""
    with watching(desk) as (process, lines):
        eventually(lambda: told(lines) == ["missing"], 10, what="it looked")

        assert process.stop() == 0


def test_the_watch_wants_one_company_for_one_address_and_a_duration(desk: Desk) -> None:
    for arguments in (["--url", URL], ["--every", "soon"], ["--every", "0s"]):
        ended = run(desk, "watch", "--once", *arguments, NP_BASE_URL=NOBODY)

        assert (ended.code, ended.out) == (2, "")


def test_the_commands_need_no_redis(desk: Desk, sandbox: Sandbox) -> None:
    subscribe(sandbox, "venue")

    assert run(desk, "list", REDIS_URL=f"redis://{NOBODY[7:]}/0").code == 0
