"""The Redis user that docs/operations.md shows suffices for the whole service, and for every command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from app.ledger.redis import Redis
from tests.eventually import eventually
from tests.service import Service

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize("prefix", ["ota", "shop-2"])
def test_the_user_of_the_docs_suffices_for_everything(bare: Service, prefix: str) -> None:
    """With another KEY_PREFIX, the same user for these keys: no key has the default prefix."""
    bare.variables["KEY_PREFIX"] = prefix
    with Redis.from_url(bare.variables["REDIS_URL"]) as admin:
        (rules,) = re.findall(r"^ACL SETUSER ota on >PASSWORD (.+)$", PAGE.read_text(), re.MULTILINE)
        redis: Any = admin
        redis.execute_command(
            "ACL", "SETUSER", "ota", "reset", "on", ">secret", *rules.replace("ota:", f"{prefix}:").split()
        )
        redis.execute_command("ACL", "LOG", "RESET")
        bare.variables["REDIS_URL"] = f"redis://ota:secret@127.0.0.1:{bare.valkey.port}/0"
        bare.start("web")
        bare.start("worker", WORKERS="1", BACKFILL_WORKERS="1", RECONCILE_EVERY="60")
        order_ids = bare.issue(2)
        for order_id in order_ids:
            assert bare.post(bare.event(order_id))[1]["queued"] == 1
            bare.wait_fetched(order_id)

        for arguments in (
            ["check"],
            ["status"],
            ["health", "--role", "worker"],
            ["orders", "list"],
            ["orders", "explain", order_ids[0]],
            ["orders", "refetch", order_ids[0]],
            ["events", "list"],
            ["events", "replay", "--since", "1h", "--force", "--rate", "100", "--yes"],
            ["replays", "list"],
            ["dead", "list"],
            ["reconcile"],
            ["audit"],
            ["orders", "erase", order_ids[1], "--why", "asked", "--yes"],
        ):
            code, out = bare.cli(*arguments)[:2]
            assert code in (0, 1), (arguments, code, out)
            assert "NOPERM" not in str(out)
        eventually(lambda: bare.cli("health", "--role", "worker")[0] == 0, 10, what="the pool works")
        denied = [(one["object"], one["context"], one["reason"]) for one in redis.acl_log()]
        assert denied == [], "refused"
        assert {name.split(b":")[0] for name in redis.scan_iter()} == {prefix.encode(), b"rq"}
