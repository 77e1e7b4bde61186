"""The ops page as a process: when it starts, what it logs, and what it shows while Redis cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.dev.valkey import Valkey, start
from app.ledger.redis import VERSION
from tests.eventually import eventually
from tests.lab import KEYS, ONE, SINK, Lab
from tests.ops_site import ACT, READ, WHO
from tests.service import OPS, SERVE, Service, Web, serving, settings_of_one_company

SEARCH = "canary-guest-name"


@pytest.fixture(scope="module")
def page(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url) | {"OPS_TOKEN": READ, "OPS_ACT_TOKEN": ACT, "TZ": "IST-5:30"}
    with serving(tmp_path_factory.mktemp("ops"), settings, OPS) as one:
        yield one


def test_without_its_password_the_page_does_not_start(lab: Lab) -> None:
    ended = lab.run_command("ops")

    assert ended.code == 2
    assert "OPS_TOKEN: missing" in ended.err


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        ({"OPS_ACT_TOKEN": ACT}, "needs OPS_TOKEN"),
        ({"OPS_ACT_TOKEN": READ, "OPS_TOKEN": READ}, "must not be the same"),
        ({"OPS_ACT_TOKEN": ACT[:15], "OPS_TOKEN": READ}, "must have at least 16 characters"),
        ({"OPS_ACT_TOKEN": ACT[:15]}, "must have at least 16 characters"),
    ],
)
def test_the_second_password_needs_the_first_another_value_and_a_length(
    lab: Lab, tokens: dict[str, str], problem: str
) -> None:
    ended = lab.run_command("ops", **tokens)

    assert ended.code == 2
    assert f"OPS_ACT_TOKEN: {problem}" in ended.err
    assert not [value for value in tokens.values() if value in ended.err]


@pytest.mark.parametrize("tokens", [{}, {"OPS_TOKEN": ""}])
def test_without_its_password_the_line_of_the_procfile_runs_on(tmp_path: Path, tokens: dict[str, str]) -> None:
    """Process managers such as honcho stop all processes when one ends."""
    with ExitStack() as parts:
        off = Service(tmp_path, parts).launch("ops", **tokens)
        off.wait_for_line("OPS_TOKEN is not set: the ops page is off", 5)

        assert off.exit_code is None


@pytest.mark.parametrize("name", ["OPS_TOKEN", "OPS_TOKEN_FILE"])
def test_with_its_password_the_line_of_the_procfile_is_the_command(tmp_path: Path, name: str) -> None:
    with ExitStack() as parts:
        ended = Service(tmp_path, parts).launch("ops", **{name: READ})

        assert ended.wait(10) == 2  # no other setting is given
        assert "REDIS_URL: missing" in ended.output


def test_an_address_that_others_reach_is_warned_of(lab: Lab) -> None:
    ended = lab.run_command("ops", OPS_HOST="192.0.2.1", OPS_TOKEN=READ, LOG_FORMAT="json")

    assert [line["event"] for line in ended.objects if line["level"] in {"warning", "error"}] == [
        "ops.open",
        "service.cannot_listen",
    ]


def test_a_request_is_logged_with_who_and_the_route_and_without_what_was_searched_for(page: Web, lab: Lab) -> None:
    for path in ("/?q=", "/search?q=", "/orders/"):
        page.http.get(path + SEARCH, auth=(WHO, READ))
    page.http.get("/", auth=(WHO, "wrong"))
    page.http.get("/healthz")
    shown = page.http.get("/", auth=(WHO, READ))

    def logged() -> list[dict[str, Any]]:
        """Return the lines of the requests once that of the last one is there: it comes after its answer."""
        found = [line for line in page.lines() if line["event"] == "ops.request"]
        return found if found and found[-1]["request_id"] == shown.headers["x-request-id"] else []

    lines = eventually(logged, what="the line of the last request")
    assert [(line["path"], line["status"], line.get("user")) for line in lines][-5:] == [
        ("/", 400, WHO),
        ("/search", 404, WHO),
        ("/orders/{order_id}", 404, WHO),
        ("/", 401, None),
        ("/", 200, WHO),
    ]
    assert lines[-2]["reason"] == "wrong_password"
    assert not [secret for secret in (SEARCH, READ, ACT) if secret in page.process.output]


def test_the_port_of_the_webhook_never_shows_the_page(valkey: Valkey, tmp_path: Path) -> None:
    settings = settings_of_one_company(valkey.url) | {"OPS_TOKEN": READ, "OPS_ACT_TOKEN": ACT}
    with serving(tmp_path, settings, SERVE) as web:
        answers = [web.http.get(path, auth=(WHO, ACT)) for path in ("/", "/orders", "/static/ops.css")]

    assert [answer.status_code for answer in answers] == [404, 404, 404]


def test_health_of_its_role_asks_it(page: Web, lab: Lab, free_port: int) -> None:
    answers = [lab.run_command("health", "--role", "ops", OPS_PORT=str(port)) for port in (page.port, free_port)]

    assert [answer.code for answer in answers] == [0, 1]


def test_without_redis_it_starts_and_says_so_until_redis_is_back(tmp_path: Path) -> None:
    with start(tmp_path / "valkey") as server, ExitStack() as parts:
        server.stop()
        settings = settings_of_one_company(server.url) | {"OPS_TOKEN": READ}
        page = parts.enter_context(serving(tmp_path, settings, OPS))
        away = page.http.get("/", auth=(WHO, READ))
        assert (away.status_code, away.headers["retry-after"], away.headers["refresh"]) == (503, "5", "5")
        assert "Redis cannot be used now" in away.text
        assert "Traceback" not in away.text
        server.restart()
        assert page.http.get("/", auth=(WHO, READ)).status_code == 200

        def changes() -> bool:
            noted = [(line["event"], line["role"]) for line in page.lines() if line["event"].startswith("redis.")]
            assert noted == [("redis.unavailable", "ops"), ("redis.recovered", "ops")]
            return True

        eventually(changes, 5, what="both lines")


def test_data_of_another_version_is_named_and_not_shown(page: Web, lab: Lab) -> None:
    lab.redis.set(KEYS.schema, VERSION + 1)
    answer = page.http.get("/", auth=(WHO, READ))

    assert answer.status_code == 503
    assert f"schema version {VERSION + 1}" in answer.text
    assert "This page tries again every 5 s." in answer.text


def test_every_time_on_a_page_is_utc_wherever_its_machine_is(page: Web, lab: Lab) -> None:
    """Also those in sentences that the commands have too, which write local times."""
    lab.declare()
    lab.accept_and_fetch()
    lab.deliver("retry", wait=7200)
    due = lab.archive.due(ONE, SINK)
    assert due is not None

    shown = page.http.get(f"/orders/{ONE.order_id}", auth=(WHO, READ), follow_redirects=True).text

    assert f"Delivery is attempted again at {due:%m-%d %H:%M:%S}." in shown
