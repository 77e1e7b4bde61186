"""docs/json.md names every key that a command prints with --json, and no other."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import pytest

from app.dev.sandbox.process import Sandbox
from app.replay import Plans
from tests.integration.test_cli_changes import draft
from tests.integration.test_cli_events import objects, tailing
from tests.lab import KEYS, PARTNER, SINK, VENUE, Lab, order
from tests.unit.test_docs import COMMANDS, PAGES, names, rows

OPAQUE: Final = frozenset({"order", "history", "pools_differ", "oldest_pending_s"})
"""Keys whose own keys depend on the order or the deployment."""

HOOK: Final = "https://hooks.example.com/webhooks/ota-channel-manager"
DEAD, DEFERRED, FETCHED = order(1), order(2), order(3)


def page() -> dict[str, set[str]]:
    """Return the keys of each command, which may be in several sections."""
    found = defaultdict[str, set[str]](set)
    for section in PAGES["docs/json.md"].split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        for command in names(heading):
            found[command] |= {key for cell, _ in rows(text.strip(), "key") for key in names(cell)}
    return dict(found)


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from keys(one, prefix)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield f"{prefix}{name}"
            if name not in OPAQUE:
                yield from keys(one, f"{prefix}{name}.")


@pytest.fixture
def filled(connected: Lab, sandbox: Sandbox) -> Lab:
    """Something for each key: dead letters, an open breaker, a request, an order without an event, an open plan."""
    sandbox.admin("POST", "orders", {"company_id": VENUE, "partner_id": PARTNER, "count": 1, "reference": "WEB"})
    connected.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    connected.declare()
    connected.accept(DEAD, DEFERRED, FETCHED)
    connected.dead_letter(DEAD)
    connected.fetch_and_store(DEFERRED)
    connected.dead_letter_delivery(DEFERRED)
    connected.accept(DEFERRED)
    connected.fail_fetch("deferred", DEFERRED, reason="unauthorized", http_status=401)
    opened: Any = {
        "open_until": connected.now + 60_000,
        "opened_at": connected.now,
        "reason": "unauthorized",
        "http": 401,
    }
    connected.redis.hset(KEYS.breaker("breaker"), mapping=opened)
    connected.redis.hset(
        KEYS.alerts, "fetch_late|venue|", f'{{"firing_at": {connected.now}, "since": {connected.now}}}'
    )
    connected.fetch_and_store(FETCHED, "order-submitted")
    connected.request_fetch(FETCHED)
    connected.fetch_and_store(FETCHED)
    connected.dead_letter_delivery(FETCHED)
    connected.redis.hset(KEYS.sink_breaker(SINK), mapping=opened)
    return connected


def commands(lab: Lab, sandbox: Sandbox) -> Iterator[tuple[str, ...]]:
    """Yield command lines; what each needs is there when it runs."""
    events = [one["id"] for one in lab.run_command("events", "list", "--json").objects]
    expected = lab.folder / "expected.csv"
    expected.write_text("reference\nCM-nowhere\n")
    plans = [
        Plans(lab.redis, event_days=90)
        .file([(FETCHED.member, None)], rate=1000, sinks=(), selected="", who="", why="")
        .id
        for _ in range(2)
    ]
    yield "orders", "list"
    for words in (("orders", "show"), ("orders", "explain"), ("dead", "show")):
        yield from ((*words, one.order_id) for one in (FETCHED, DEFERRED, DEAD))
    yield "orders", "show", FETCHED.order_id, "--diff"
    yield "orders", "explain", "CM-nowhere"
    yield "events", "list"
    yield "events", "show", events[0]
    yield "events", "replay", "--since", "1h", "--dry-run"
    yield "events", "replay", "--order", FETCHED.order_id, "--force", "--yes"
    yield "replays", "list"
    yield "replays", "resume", plans[0]
    yield "replays", "cancel", plans[1]
    yield "dead", "list"
    yield "dead", "requeue", "--all", "--dry-run"
    yield "dead", "requeue", FETCHED.order_id, "--yes"
    yield "dead", "drop", "--all", "--yes", "--dry-run"
    yield "dead", "drop", "--all", "--yes"
    yield ("audit",)
    lab.run_command("keys", "create", "--name", "reader", "--scope", "feed")
    yield "sinks", "migrate", "--dry-run"
    yield "sinks", "migrate"
    yield ("status",)
    yield "sinks", "disable", SINK
    yield "sinks", "enable", SINK
    yield ("check",)
    yield ("health",)
    yield ("reconcile",)
    yield "reconcile", "--apply", "--yes"
    yield "reconcile", "--from-file", str(expected), "--company", "venue"
    yield "orders", "refetch", FETCHED.order_id
    yield "orders", "cancel", draft(sandbox, lab, "CANCELLED").order_id, "--yes"
    yield "orders", "confirm", draft(sandbox, lab, "PAID").order_id, "--payment-reference", "PAY-1", "--yes"
    yield "orders", "erase", FETCHED.order_id, "--yes"
    yield "keys", "create", "--name", "desk", "--scope", "orders:read"
    yield "keys", "list"
    key = lab.run_command("keys", "list", "--json").objects[0]
    yield "keys", "revoke", key["id"]
    yield "subscription", "create", HOOK, "--yes", "--company", "venue"
    yield "subscription", "create", HOOK, "--new-client-state", "--reveal", "--company", "venue"
    yield "subscription", "watch", "--once"
    yield "subscription", "list"
    (listed,) = lab.run_command("subscription", "list", "--json").objects
    yield "subscription", "delete", listed["id"], "--yes"


def test_the_page_has_the_keys_of_every_command_with_json_and_no_other(filled: Lab, sandbox: Sandbox) -> None:
    printed = defaultdict[str, set[str]](set)
    times: list[tuple[str, str]] = []
    sinks = filled.folder / "sinks.toml"
    sinks.write_text(f'[sinks.warehouse]\nkind = "sql"\nurl = "sqlite:///{filled.folder}/orders.db"\n')
    with tailing(filled, "--json") as tail:
        printed["events tail"] = {key for one in objects(tail, 5) for key in keys(one)}
    for words in commands(filled, sandbox):
        ended = filled.run_command(*words, "--json", SINKS_FILE=str(sinks))
        assert ended.out, (words, ended.err)
        command = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        printed[command] |= {key for one in ended.objects for key in keys(one)}
        times += re.findall(r'"(\w+)":"(20\d\d-\d\d-\d\dT[^"]*)"', ended.out)

    documented = page()
    missing = {name: one for name in printed if (one := printed[name] - documented.get(name, set()))}
    gone = {name: one for name in documented if (one := documented[name] - printed[name])}
    assert (missing, gone) == ({}, {}), "printed and not in docs/json.md; there and not printed"
    with_json = {name for name, found in COMMANDS.items() if "as_json" in {one.name for one in found.params}}
    assert documented.keys() == with_json - {"simulate"}
    # What a sender wrote is kept as it came.
    assert [one for one in times if one[0] != "sent" and not re.fullmatch(r".{19}\.\d{6}Z", one[1])] == []
    assert all(datetime.fromisoformat(text) for _, text in times)
