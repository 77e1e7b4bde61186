"""`ota-receiver keys`: create, list, revoke."""

from __future__ import annotations

import pytest

from app.api.keys import ApiKeys
from app.ledger.feed import Feed
from tests.lab import KEYS, ONE, Lab, order

TWO = order(2)

CREATE = ("keys", "create", "--name", "desk", "--scope", "feed")


def test_a_key_is_printed_once_alone_on_stdout_and_redis_has_its_digest_only(lab: Lab) -> None:
    ended = lab.run_command(*CREATE, "--scope", "orders:read", "--who", "ann", "--why", "new desk")
    text = ended.out.removesuffix("\n")
    key_id, secret = text.split("_")[1:]

    assert (ended.code, len(text), len(secret)) == (0, 78, 64)
    caller = ApiKeys(lab.redis).admit(text, 1)
    assert caller is not None
    assert (caller.key_id, caller.name, caller.scopes) == (key_id, "desk", ("orders:read", "feed"))
    assert secret.encode() not in lab.everything()
    assert secret not in ended.err
    (note,) = lab.run_command("audit", "--json").objects
    assert (note["what"], note["who"], note["why"], note["selected"]) == (
        *("key-create", "ann", "new desk"),
        "desk: orders:read, feed",
    )


def test_the_list_shows_each_key_and_no_digest(lab: Lab) -> None:
    assert "no key" in lab.run_command("keys", "list").err
    made = lab.run_command(*CREATE, "--json").objects[0]
    ApiKeys(lab.redis).admit(made["key"], 10)
    lab.run_command("keys", "revoke", made["id"], "--who", "ann", "--why", "left")
    (shown,) = lab.run_command("keys", "list", "--json").objects

    assert (shown["id"], shown["name"], shown["scopes"]) == (made["id"], "desk", ["feed"])
    assert shown.keys() == {"id", "name", "scopes", "created_at", "last_used_at", "revoked_at"}
    assert None not in shown.values()
    assert made["id"] in lab.on_terminal(120, "keys", "list").out


def test_a_key_is_revoked_once_with_a_note_and_its_consumer_keeps_its_place(lab: Lab) -> None:
    made = lab.run_command(*CREATE, "--json").objects[0]
    lab.accept_and_fetch(ONE)
    feed = Feed(lab.redis)
    place = feed.acknowledge("desk", feed.after(0, 1)[0].position)
    first, again, unknown = (
        lab.run_command("keys", "revoke", key_id, "--why", "left") for key_id in (made["id"], made["id"], "00000000")
    )

    assert (first.code, again.code, unknown.code) == (0, 1, 1)
    assert ApiKeys(lab.redis).admit(made["key"], 10) is None
    assert feed.acknowledged("desk") == place
    assert [one["what"] for one in lab.run_command("audit", "--json").objects] == ["key-revoke", "key-create"]


def test_a_new_consumer_may_begin_now_and_one_with_a_place_may_not(lab: Lab) -> None:
    lab.accept_and_fetch(ONE)
    feed = Feed(lab.redis)
    first = lab.run_command(*CREATE, "--from-now")
    lab.accept_and_fetch(TWO)
    again = lab.run_command(*CREATE, "--from-now")

    assert (first.code, again.code) == (0, 2)
    assert [one.order for one in feed.after(feed.acknowledged("desk"), 9)] == [TWO]
    assert lab.redis.hlen(KEYS.api_keys) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--name", "Desk 1", "--scope", "feed"),
        ("--name", "desk", "--scope", "all"),
        ("--name", "desk"),
        ("--scope", "feed"),
        ("--name", "desk", "--scope", "orders:read", "--from-now"),
    ],
)
def test_a_wrong_key_is_not_made(lab: Lab, arguments: tuple[str, ...]) -> None:
    assert lab.run_command("keys", "create", *arguments).code == 2
    assert lab.dump() == {}
