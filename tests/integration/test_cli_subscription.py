"""`subscription`: subscriptions are listed, created, deleted and watched, and no clientState is shown."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

from app import bootstrap, settings
from app.alerts import AlertStore
from app.dev.processes import Process
from app.dev.sandbox.process import Sandbox
from app.errors import Denied
from app.ledger.rate_limit import RateLimiter
from app.ledger.redis import for_worker
from app.snapshot import SnapshotReader
from app.subscriptions import REPAIR_AGAIN_AFTER, SubscriptionMemory
from app.upstream.transport import DeadlineTransport
from tests.command import Ended
from tests.eventually import eventually
from tests.integration.test_cli_check import (
    PATH,
    declare,
    subscribe,
    subscription_call,
    subscriptions,
    without_subscriptions,
)
from tests.lab import CLIENT_STATES, KEYS, MUSEUM, VENUE, Lab
from workers.background import BUSY_WAIT, DOWN_WAIT, SubscriptionRunner, check_subscription, log_alerts

URL: Final = f"https://hooks.example.com{PATH}"
UNREACHABLE: Final = "http://127.0.0.1:1"
NO_REDIS: Final = "redis://127.0.0.1:1/0"


@pytest.fixture
def lab(connected: Lab, sandbox: Sandbox) -> Lab:
    """A lab whose two companies are known upstream and have no subscription."""
    without_subscriptions(sandbox)
    return connected


def run(lab: Lab, *arguments: str, **env: str) -> Ended:
    ended = lab.run_command("subscription", *arguments, **env)
    assert "canary" not in ended.out + ended.err
    return ended


def addresses(sandbox: Sandbox, slug: str = "venue") -> list[tuple[str, str]]:
    return [(one["notificationUrl"], one["subscriptionState"]) for one in subscriptions(sandbox, slug)]


def test_create_subscribes_the_address_with_the_client_state_for_one_company(lab: Lab, sandbox: Sandbox) -> None:
    unclear = run(lab, "create", URL)
    assert (unclear.code, "--company: museum, venue" in unclear.err, addresses(sandbox)) == (2, True, [])

    made = run(lab, "create", URL, "--company", "venue", "--json")

    assert (made.code, made.err) == (0, "")
    (one,) = subscriptions(sandbox, "venue")
    assert (one["notificationUrl"], one["clientState"]) == (URL, CLIENT_STATES["venue"])
    assert (one["eventName"], one["eventVersion"]) == ("ota_cm_order_processed", "1.0")
    (shown,) = made.objects
    assert (shown["id"], shown["company"], shown["url"], shown["secret"]) == (one["id"], "venue", URL, "current")
    assert subscriptions(sandbox, "museum") == []


def test_the_same_address_is_subscribed_twice_only_with_yes(lab: Lab, sandbox: Sandbox) -> None:
    known = subscribe(sandbox, "venue", notificationUrl="https://HOOKS.example.com/webhooks/ota-channel-manager/")

    refused = run(lab, "create", URL, "-c", "venue")
    assert (refused.code, known in refused.err, len(addresses(sandbox))) == (2, True, 1)

    assert run(lab, "create", URL, "-c", "venue", "--yes").code == 0
    assert len(addresses(sandbox)) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("create", f"http://hooks.example.com{PATH}", "-c", "venue"), "must be https"),
        (("create", f"https://name:canary@hooks.example.com{PATH}", "-c", "venue"), "neither a user"),
        (("create", "ftp://hooks.example.com", "-c", "venue"), "not a web address"),
        (("create", "https://hooks.example.com/a b", "-c", "venue"), "not a web address"),
        (("create", "https://[::1", "-c", "venue"), "not an address"),
        (("create", "hooks.example.com", "-c", "venue"), "not a web address"),
        (("watch", "--once", "--url", URL), "--company"),
        (("watch", "--once", "--every", "soon"), "--every"),
        (("watch", "--once", "--every", "0s"), "0s"),
    ],
)
def test_an_unusable_address_or_duration_is_refused(lab: Lab, arguments: tuple[str, ...], text: str) -> None:
    """So is one address for two companies."""
    ended = run(lab, *arguments, NP_BASE_URL=UNREACHABLE)

    assert (ended.code, ended.out, text in ended.err) == (2, "", True)


def test_an_address_with_another_path_is_accepted_with_a_warning(lab: Lab, sandbox: Sandbox) -> None:
    ended = run(lab, "create", "https://hooks.example.com/elsewhere?code=hidden", "-c", "venue")

    assert (ended.code, "WEBHOOK_PATH" in ended.err, "404" in ended.err) == (0, True, True)
    assert "hidden" not in ended.out + ended.err
    assert addresses(sandbox) == [("https://hooks.example.com/elsewhere?code=hidden", "Active")]


def test_list_shows_state_and_secret_of_every_company(lab: Lab, sandbox: Sandbox) -> None:
    empty = run(lab, "list")
    assert (empty.code, empty.out, empty.err) == (0, "", "No subscription.\n")
    first = subscribe(sandbox, "venue", notificationUrl=f"{URL}?code=hidden")
    second = subscribe(sandbox, "venue", clientState="canary-of-another-sender", eventName="another_event")
    third = subscribe(sandbox, "museum")
    sandbox.admin("PATCH", f"subscriptions/{third}", {"state": "Disabled"})

    lines, table = run(lab, "list", "--json", REDIS_URL=NO_REDIS), run(lab, "list")

    assert (lines.code, table.code) == (0, 0)
    assert {(one["id"], one["company"], one["state"], one["secret"], one["url"]) for one in lines.objects} == {
        (first, "venue", "Active", "current", f"{URL}?…"),
        (second, "venue", "Active", "unknown", URL),
        (third, "museum", "Disabled", "current", URL),
    }
    assert all(text in table.out for text in (first, second, third, "Disabled", "another_event"))
    assert "hidden" not in lines.out + table.out
    assert [one["id"] for one in run(lab, "list", "--company", MUSEUM, "--json").objects] == [third]


def test_an_error_of_one_company_does_not_hide_the_others(lab: Lab, sandbox: Sandbox) -> None:
    third = subscribe(sandbox, "museum")
    declare(sandbox, "venue", VENUE, api_keys=["another-key"])

    ended = run(lab, "list", "--json")

    assert (ended.code, [one["id"] for one in ended.objects]) == (6, [third])
    assert "venue: unauthorized (HTTP 401). Correct NP_API_KEY" in ended.err


def test_delete_finds_the_company_by_the_id_and_asks_first(lab: Lab, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "museum")

    asked = run(lab, "delete", one)
    assert (asked.code, len(subscriptions(sandbox, "museum"))) == (2, 1)
    assert "It is the last Active one: no more events will arrive." in asked.err

    deleted = run(lab, "delete", f"{{{one.upper()}}}", "--yes", "--json")
    assert (deleted.code, deleted.objects) == (0, [{"company": "museum", "id": one, "deleted": True}])
    assert subscriptions(sandbox, "museum") == []
    assert run(lab, "delete", one, "--yes").code == 1
    assert run(lab, "delete", "no-id").code == 2


def test_a_new_client_state_is_in_a_private_file_and_nothing_is_changed_upstream(lab: Lab, sandbox: Sandbox) -> None:
    """Before the web processes have it, events that carry it would be answered 401."""
    old = subscribe(sandbox, "venue")
    place = lab.folder / "next"

    nowhere, ended = rotate(lab), rotate(lab, "--write-to", str(place))

    assert (nowhere.code, "--write-to FILE" in nowhere.err) == (2, True)
    assert (ended.code, ended.err, len(subscriptions(sandbox, "venue"))) == (0, "", 1)
    made = place.read_text().strip()
    assert 40 <= len(made) <= 50
    assert place.stat().st_mode & 0o777 == 0o600
    assert made not in ended.out
    assert all(text in ended.out for text in (str(place), "client_state_previous", f"delete {old}", "--yes"))
    assert [line[:3] for line in ended.out.splitlines()[2:]] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert "\N{REPLACEMENT CHARACTER}" not in ended.out

    again = rotate(lab, "--write-to", str(place))
    assert (again.code, place.read_text().strip()) == (2, made)
    assert rotate(lab, "--write-to", str(place), "--yes").code == 0
    assert place.read_text().strip() != made
    assert [path.name for path in lab.folder.iterdir() if path.name.startswith(".")] == []

    shown = rotate(lab, "--reveal", "--json")
    assert len(shown.objects[0]["client_state"]) == 43


@pytest.mark.parametrize("kind", ["cut", "rubbish"])
def test_after_a_lost_answer_the_change_is_uncertain(lab: Lab, sandbox: Sandbox, kind: str) -> None:
    sandbox.admin("POST", "faults", {"kind": kind, "operation": "createSubscription"})

    ended = run(lab, "create", URL, "-c", "venue")

    assert (ended.code, "It may have been done" in ended.err, len(addresses(sandbox))) == (6, True, 1)


def rotate(lab: Lab, *more: str) -> Ended:
    return run(lab, "create", URL, "-c", "venue", "--new-client-state", *more)


def test_the_client_state_in_use_is_never_overwritten(lab: Lab) -> None:
    """It is needed as CLIENT_STATE_PREVIOUS."""
    place = lab.folder / "in-use"
    place.write_text(CLIENT_STATES["venue"] + "\n")

    ended = rotate(lab, "--write-to", str(place), "--yes")

    assert (ended.code, "in use" in ended.err) == (2, True)
    assert place.read_text().strip() == CLIENT_STATES["venue"]


class Place:
    """Where the settings of the company `venue` stand, and a person who follows step 1 of a rotation to the letter."""

    def __init__(self, lab: Lab, kind: str, is_file: bool) -> None:
        self.lab, self.kind = lab, kind
        table = tomllib.loads(Path(lab.env["COMPANIES_FILE"]).read_text())["companies"]["venue"]
        if is_file:
            (lab.folder / "current").write_text(table.pop("client_state"))
            table["client_state_file"] = str(lab.folder / "current")
        self.values = table if kind == "table" else {name.upper(): value for name, value in table.items()}
        if kind != "table":
            del lab.env["COMPANIES_FILE"]
        self._write()

    def follow(self, step: str) -> None:
        place, _, changes = step.removeprefix("In ").removesuffix(".").partition(": ")
        assert place.startswith(
            {"environment": "the env", "dotenv": ".env line ", "table": "COMPANIES_FILE ["}[self.kind]
        )
        for change in changes.split("; "):
            if found := re.fullmatch(r"rename (\w+) to (\w+)", change):
                self.values[found[2]] = self.values.pop(found[1])
            elif found := re.fullmatch(r"remove (\w+)", change):
                del self.values[found[1]]
            elif found := re.fullmatch(r'add (\w+)=(\S+)|add (\w+) = "(\S+)"', change):
                name, value = filter(None, found.groups())
                self.values[name] = value
            else:
                assert change.startswith("the web processes must")
        self._write()

    def _write(self) -> None:
        lines = "".join(f"{name}={json.dumps(value)}\n" for name, value in self.values.items())
        if self.kind == "dotenv":
            (self.lab.folder / ".env").write_text(lines)
        elif self.kind == "table":
            Path(self.lab.env["COMPANIES_FILE"]).write_text(f"[companies.venue]\n{lines}")
        else:
            others = {name: value for name, value in self.lab.env.items() if not name.startswith("CLIENT_STATE")}
            self.lab.env.clear()
            self.lab.env.update(others | self.values)


@pytest.mark.parametrize("is_file", [False, True], ids=["value", "file"])
@pytest.mark.parametrize("kind", ["environment", "dotenv", "table"])
def test_the_printed_steps_of_a_rotation_lead_to_a_subscription_with_the_new_secret(
    lab: Lab, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, kind: str, is_file: bool
) -> None:
    """Whatever the settings come from; also of a second rotation before the first one has ended."""
    monkeypatch.chdir(lab.folder)
    place, old = Place(lab, kind, is_file), subscribe(sandbox, "venue")
    for round_ in (1, 2):
        new = lab.folder / f"next-{round_}"
        rotation = ("create", URL, "--new-client-state", "--write-to", str(new), "--json")
        assert run(lab, *rotation).code == (0 if round_ == 1 else 2)
        first, _, create, delete, last = run(lab, *rotation, "--yes").objects[0]["steps"]

        place.follow(first)
        assert run(lab, *shlex.split(create)[2:]).code == 0
        secrets = {one["id"] == old: one["secret"] for one in run(lab, "list", "--json").objects}
        assert secrets == {True: "previous", False: "current"}
        assert run(lab, *shlex.split(delete)[2:], "--yes").code == 0
        (made,) = subscriptions(sandbox, "venue")
        assert made["clientState"] == new.read_text().strip()
        old = made["id"]
    del place.values[last.rpartition(" ")[2].removesuffix(".")]
    place._write()
    assert [one["secret"] for one in run(lab, "list", "--json").objects] == ["current"]


def watch_once(lab: Lab, *more: str, **env: str) -> tuple[int, list[str]]:
    ended = run(lab, "watch", "--once", "-c", "venue", "--json", *more, **env)
    return ended.code, [one["state"] for one in ended.objects]


def test_watch_once_has_an_exit_code_for_cron(lab: Lab, sandbox: Sandbox) -> None:
    one = subscribe(sandbox, "venue")
    assert watch_once(lab) == (0, ["active"])
    assert watch_once(lab, "--url", "https://other.example.com/hook") == (1, ["other_address"])
    assert watch_once(lab, WEBHOOK_URL="https://other.example.com/hook") == (1, ["other_address"])

    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})
    assert watch_once(lab) == (1, ["inactive"])

    subscription_call(sandbox, "venue", "DELETE", f"/{one}")
    assert watch_once(lab) == (1, ["missing"])
    assert watch_once(lab, NP_BASE_URL=UNREACHABLE) == (6, ["unreachable"])


def disabled(sandbox: Sandbox, **changed: str) -> str:
    """Make a subscription that upstream has disabled; return its id."""
    one = subscribe(sandbox, "venue", **changed)
    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})
    return one


def test_repair_replaces_an_inactive_subscription(lab: Lab, sandbox: Sandbox) -> None:
    one = disabled(sandbox)

    assert watch_once(lab, "--repair") == (0, ["inactive", "repaired"])

    (made,) = subscriptions(sandbox, "venue")
    assert (made["id"] != one, made["notificationUrl"], made["subscriptionState"]) == (True, URL, "Active")
    assert made["clientState"] == CLIENT_STATES["venue"]


def test_repair_of_a_missing_subscription_needs_its_address(lab: Lab, sandbox: Sandbox) -> None:
    lost = run(lab, "watch", "--once", "-c", "venue", "--repair")
    assert (lost.code, "give --url" in lost.out, addresses(sandbox)) == (1, True, [])

    repaired = run(lab, "watch", "--once", "-c", "venue", "--repair", "--url", URL)
    assert (repaired.code, "created again for https://" in repaired.out, "cannot" in repaired.out) == (0, True, False)
    assert ["missing" in line for line in repaired.out.splitlines()] == [True, False]
    assert "repaired" in repaired.out
    assert addresses(sandbox) == [(URL, "Active")]


def test_a_refused_repair_is_reported_and_deletes_nothing(lab: Lab, sandbox: Sandbox) -> None:
    disabled(sandbox)
    sandbox.admin("POST", "faults", {"kind": "status", "operation": "createSubscription", "status": 503})

    assert watch_once(lab, "--repair") == (1, ["inactive", "repair_failed"])
    assert addresses(sandbox) == [(URL, "Disabled")]


@pytest.mark.parametrize("state", ["active", "ACTIVE"])
def test_a_state_is_read_without_case(lab: Lab, sandbox: Sandbox, state: str) -> None:
    one = subscribe(sandbox, "venue")
    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": state})

    assert watch_once(lab, "--repair") == (0, ["active"])
    assert addresses(sandbox) == [(URL, state)]


@pytest.mark.parametrize("state", ["Enabled", "Disabled"])
def test_a_repair_that_does_not_help_is_made_once(lab: Lab, sandbox: Sandbox, state: str) -> None:
    """Whatever upstream calls a new subscription, however often watch is started, also with deletes that are refused.

    Each run is a process of its own here, as on another machine.
    """
    disabled(sandbox)
    sandbox.admin("POST", "faults", {"kind": "status", "operation": "deleteSubscription", "status": 403})
    assert watch_once(lab, "--repair") == (0, ["inactive", "repaired"])
    for one in subscriptions(sandbox, "venue"):
        sandbox.admin("PATCH", f"subscriptions/{one['id']}", {"state": state})

    again = run(lab, "watch", "--once", "-c", "venue", "--repair")

    assert (again.code, "which did not last: not repeated" in again.out) == (1, True)
    assert watch_once(lab, "--repair") == (1, ["inactive", "repair_failed"])
    assert len(subscriptions(sandbox, "venue")) == 2


def test_a_subscription_that_ends_soon_after_its_repair_is_not_created_again_before_an_hour(
    lab: Lab, sandbox: Sandbox
) -> None:
    """The hour is counted from a check that sees it work."""
    disabled(sandbox)
    memory = SubscriptionMemory(lab.redis, VENUE)
    assert watch_once(lab, "--repair") == (0, ["inactive", "repaired"])
    assert watch_once(lab, "--repair") == (0, ["active"])
    for one in subscriptions(sandbox, "venue"):
        sandbox.admin("PATCH", f"subscriptions/{one['id']}", {"state": "Disabled"})
    assert watch_once(lab, "--repair") == (1, ["inactive", "repair_failed"])

    lab.redis.hset(KEYS.subscription(VENUE), "repaired_at", lab.now - REPAIR_AGAIN_AFTER)
    assert watch_once(lab, "--repair") == (1, ["inactive", "repair_failed"])
    memory.works()
    assert watch_once(lab, "--repair") == (0, ["inactive", "repaired"])


@pytest.mark.parametrize(("status", "after"), [(400, "repaired"), (503, "repair_failed")])
def test_a_refused_creation_may_be_repeated_and_an_uncertain_one_not(
    lab: Lab, sandbox: Sandbox, status: int, after: str
) -> None:
    """After a 5xx it may have been created."""
    disabled(sandbox)
    (rule,) = sandbox.admin("POST", "faults", {"kind": "status", "operation": "createSubscription", "status": status})
    assert watch_once(lab, "--repair") == (1, ["inactive", "repair_failed"])
    sandbox.admin("DELETE", f"faults/{rule}")

    assert watch_once(lab, "--repair")[1] == ["inactive", after]


def test_every_change_of_a_subscription_is_in_the_audit_with_who_and_why(lab: Lab, sandbox: Sandbox) -> None:
    person = ("--who", "ann", "--why", "moved to another host")
    made = run(lab, "create", f"{URL}?code=hidden", "-c", "venue", "--json", *person).objects[0]["id"]
    assert run(lab, "delete", made, "--yes", *person).code == 0
    assert run(lab, "watch", "--once", "-c", "venue", "--repair", "--url", URL, *person).code == 0

    entries = lab.run_command("audit", "--json").objects

    assert [(one["what"], one["who"], one["why"]) for one in reversed(entries)] == [
        (f"subscription-{what}", "ann", "moved to another host") for what in ("create", "delete", "repair")
    ]
    assert [one["selected"] for one in reversed(entries)] == [
        f"venue: {URL}?…",
        f"venue: {made} to {URL}?…",
        f"venue: {URL}, missing",
    ]


def test_without_redis_no_subscription_is_changed(lab: Lab, sandbox: Sandbox) -> None:
    """Neither the audit nor the memory of a repair could be written. Looking needs no Redis."""
    one = disabled(sandbox)

    assert run(lab, "create", URL, "-c", "venue", "--yes", REDIS_URL=NO_REDIS).code == 3
    assert run(lab, "delete", one, "--yes", REDIS_URL=NO_REDIS).code == 3
    assert watch_once(lab, "--repair", REDIS_URL=NO_REDIS) == (1, ["inactive", "repair_failed"])
    assert watch_once(lab, REDIS_URL=NO_REDIS) == (1, ["inactive"])
    assert addresses(sandbox) == [(URL, "Disabled")]


def pool_check(lab: Lab, **env: str) -> str:
    """Check the subscription of the venue as a pool does; return its state as the snapshot has it."""
    loaded = settings.parse(lab.env | env)
    of = next(one for one in loaded.companies if one.slug == "venue")
    with for_worker(lab.url, "ota") as redis, DeadlineTransport(5) as http:
        check_subscription(loaded, of, redis, http)
        return SnapshotReader(loaded.companies).read(redis).companies[VENUE].subscription


def alerts(lab: Lab) -> list[tuple[str, str, str]]:
    """Evaluate the alerts as a pool does; return what was logged of the subscription: action, company, reason."""
    snapshot = SnapshotReader(settings.parse(lab.env).companies).read(lab.redis)
    changes = log_alerts(AlertStore(lab.redis), snapshot, 0)
    found = [one for one in changes if one.condition.name == "subscription"]
    return [(one.action, one.condition.company, one.condition.reason) for one in found]


def test_a_pool_raises_an_alert_for_a_subscription_that_does_not_work_and_ends_it(lab: Lab, sandbox: Sandbox) -> None:
    assert (pool_check(lab), alerts(lab)) == ("missing", [("firing", "venue", "missing")])
    assert SubscriptionMemory(lab.redis, VENUE).acquire_turn(1) is False
    assert lab.redis.pttl(KEYS.subscription_turn(VENUE)) <= DOWN_WAIT

    one = subscribe(sandbox, "venue")
    assert (pool_check(lab), alerts(lab)) == ("active", [("resolved", "venue", "")])

    assert pool_check(lab, WEBHOOK_URL="https://other.example.com/hook") == "other_address"
    assert pool_check(lab, WEBHOOK_URL=URL) == "active"
    sandbox.admin("PATCH", f"subscriptions/{one}", {"state": "Disabled"})
    assert (pool_check(lab), alerts(lab)) == ("inactive", [("firing", "venue", "inactive")])
    assert addresses(sandbox) == [(URL, "Disabled")]


@pytest.mark.parametrize(("status", "headers"), [(500, {}), (403, {}), (429, {"Retry-After": "60"})])
def test_an_outage_is_no_missing_subscription_and_touches_no_breaker_of_orders(
    lab: Lab, sandbox: Sandbox, status: int, headers: dict[str, str]
) -> None:
    """Retry-After holds for the key, and then no check is made at all."""
    subscribe(sandbox, "venue")
    assert pool_check(lab) == "active"
    fault = {"kind": "status", "operation": "listSubscriptions", "status": status}
    sandbox.admin("POST", "faults", fault | ({"retry_after": 60} if headers else {}))

    assert [pool_check(lab) for _ in range(6)] == ["active"] * 6
    assert alerts(lab) == []
    found = SnapshotReader(settings.parse(lab.env).companies).read(lab.redis)
    assert not found.breaker_is_open(VENUE)
    limiter = bootstrap.rate_limiter(settings.parse(lab.env), settings.parse(lab.env).companies[0], lab.redis)
    assert is_denied(limiter) is (status == 429)


def is_denied(limiter: RateLimiter) -> bool:
    try:
        with limiter.permit("live"):
            return False
    except Denied:
        return True


def test_a_check_waits_until_orders_leave_it_a_permit(lab: Lab, sandbox: Sandbox) -> None:
    loaded = settings.parse(lab.env)
    with bootstrap.rate_limiter(loaded, loaded.companies[0], lab.redis).permit("backfill"):
        assert pool_check(lab) == ""
    assert 0 < lab.redis.pttl(KEYS.subscription_turn(VENUE)) <= BUSY_WAIT
    assert pool_check(lab) == "missing"


def test_one_pool_of_all_checks_in_each_period_and_a_lowered_one_counts_at_once(lab: Lab) -> None:
    first, second = (SubscriptionMemory(lab.redis, VENUE) for _ in range(2))

    assert [first.acquire_turn(10**9), second.acquire_turn(10**9), second.acquire_turn(60_000)] == [True, False, False]
    assert lab.redis.pttl(KEYS.subscription_turn(VENUE)) <= 60_000


def test_the_child_of_a_pool_checks_every_company_and_0_turns_it_off(lab: Lab, sandbox: Sandbox) -> None:
    subscribe(sandbox, "museum")
    with for_worker(lab.url, "ota") as redis:
        runner = SubscriptionRunner(settings.parse(lab.env), redis)
        runner.tick()
        states = [SubscriptionMemory(redis, one).state for one in (VENUE, MUSEUM)]
        eventually(lambda: [state() for state in states] == ["missing", "active"], what="both were checked")
        runner.child.stop()

        SubscriptionRunner(settings.parse(lab.env | {"SUBSCRIPTION_CHECK_EVERY": "0"}), redis).tick()
        assert [state() for state in states] == ["", ""]


def test_a_subscription_with_another_secret_is_not_ours_and_stays(lab: Lab, sandbox: Sandbox) -> None:
    """It carries a secret that is none of ours."""
    disabled(sandbox, clientState="canary-of-another-sender")

    assert watch_once(lab, "--repair") == (1, ["inactive"])
    assert watch_once(lab, "--repair", "--url", URL) == (0, ["inactive", "repaired"])
    assert {one["subscriptionState"] for one in subscriptions(sandbox, "venue")} == {"Active", "Disabled"}


def watching(lab: Lab, *more: str) -> Process:
    """Run `subscription watch` each second; its lines have a `state`, and those of its log an `event`."""
    program = [sys.executable, "-m", "app.cli", "subscription", "watch", "--every", "1s", "-c", "venue", "--json"]
    return Process.start([*program, *more], env=lab.env | {"LOG_FORMAT": "json"}, log=lab.folder / "log")


def printed(process: Process, field: str) -> list[str]:
    """Return this field of every line that has it."""
    lines = [json.loads(line) for line in process.output.splitlines() if line.endswith("}")]
    return [line[field] for line in lines if field in line]


def test_watch_prints_each_change_once_repairs_and_ends_on_ctrl_c(lab: Lab, sandbox: Sandbox) -> None:
    """It checks each second here. An error of upstream is printed once too."""
    one = subscribe(sandbox, "venue")

    def asked() -> int:
        operations: dict[str, dict[str, int]] = sandbox.admin("GET", "stats")["operations"]
        return sum(operations.get("listSubscriptions", {}).values())

    with watching(lab, "--repair") as process:
        eventually(lambda: printed(process, "state") == ["active"], 10, what="it is seen to be active")
        subscription_call(sandbox, "venue", "DELETE", f"/{one}")
        eventually(lambda: printed(process, "state") == ["active", "missing", "repaired"], what="it is repaired")
        (rule,) = sandbox.admin("POST", "faults", {"kind": "status", "operation": "listSubscriptions", "status": 500})
        eventually(lambda: printed(process, "state")[3:] == ["unreachable"], what="the error is printed")
        before = asked()
        eventually(lambda: asked() >= before + 2, what="two more looks")
        sandbox.admin("DELETE", f"faults/{rule}")
        eventually(
            lambda: printed(process, "state")[3:] == ["unreachable", "active"],
            what="active, and no more",
        )
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    events = [event.partition(".")[2] for event in printed(process, "event")]
    assert events == ["active", "down", "repaired", "check_failed", "active"]
    assert "canary" not in process.output
    assert addresses(sandbox) == [(URL, "Active")]


def test_watch_ends_with_0_on_sigterm(lab: Lab) -> None:
    """As the first process of a container it would else not notice SIGTERM."""
    with watching(lab) as process:
        eventually(lambda: printed(process, "state") == ["missing"], 10, what="it looked")

        assert process.stop() == 0
