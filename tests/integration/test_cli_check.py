"""`check`: everything that keeps events or orders from arriving is found, with what to do."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from rq.suspension import resume, suspend

from app.cli.check import of_address, of_sinks
from app.dev.sandbox.process import Sandbox
from app.intake.envelope import OrderProcessed
from app.intake.spool_file import NAME, SpoolFile
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.rate_limit import breaker_id, key_id
from app.sink_settings import of_file
from tests.command import Ended
from tests.lab import API_KEY, CLIENT_STATES, COMPANIES, KEYS, PARTNER, SINK, VENUE, Lab, order, shown

PATH = "/webhooks/ota-channel-manager"


@pytest.fixture
def lab(connected: Lab, sandbox: Sandbox) -> Lab:
    """A lab whose two companies are known upstream and have their subscriptions; a pool runs that fits all settings."""
    without_subscriptions(sandbox)
    for slug in COMPANIES:
        subscribe(sandbox, slug)
    connected.declare(companies={}, sinks=(), upstream="")
    return connected


def without_subscriptions(sandbox: Sandbox) -> None:
    """Delete the subscriptions of both companies."""
    for slug in COMPANIES:
        for one in subscriptions(sandbox, slug):
            subscription_call(sandbox, slug, "DELETE", f"/{one['id']}")


def declare(sandbox: Sandbox, slug: str, company_id: str, **changed: Any) -> None:
    company = {"id": company_id, "name": slug.title(), "tenant": "tenant", "environment": "Sandbox"}
    sandbox.admin("POST", "companies", company | {"api_keys": [API_KEY]} | changed)


def subscription_call(sandbox: Sandbox, slug: str, method: str, path: str = "", body: object = None) -> httpx.Response:
    url = f"{sandbox.base_url('tenant', 'Sandbox', slug.title())}/webhook{path}"
    response = sandbox.client.request(method, url, json=body, headers={"x-np-api-key": API_KEY})
    response.raise_for_status()
    return response


def subscriptions(sandbox: Sandbox, slug: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = subscription_call(sandbox, slug, "GET").json()["value"]
    return found


def subscribe(sandbox: Sandbox, slug: str, **changed: str) -> str:
    body = {
        "notificationUrl": f"https://hooks.example.com{PATH}",
        "eventName": "ota_cm_order_processed",
        "clientState": CLIENT_STATES[slug],
    }
    return str(subscription_call(sandbox, slug, "POST", body=body | changed).json()["id"])


def problems(ended: Ended) -> list[tuple[str, str]]:
    assert "canary" not in ended.out + ended.err
    found = [one for one in ended.objects if one["level"] in {"todo", "wrong"}]
    assert all(one["advice"] for one in found)
    return [(one["about"], one["what"]) for one in found]


def test_a_complete_setup_is_exit_code_0(lab: Lab) -> None:
    lines, table = lab.run_command("check", "--json"), lab.run_command("check")

    assert (lines.code, problems(lines), table.code) == (0, [], 0)
    good = {(one["about"], one["what"]) for one in lines.objects if one["level"] == "good"}
    assert good >= {("settings", "settings"), ("redis", "redis"), ("redis", "durable")}
    assert good >= {(slug, what) for slug in ("venue", "museum") for what in ("api", "subscription")}
    assert "canary" not in table.out


def test_secrets_of_two_places_can_be_compared_without_being_shown(lab: Lab) -> None:
    found = {(one["about"], one["what"]): one["detail"] for one in lab.run_command("check", "--json").objects}

    fingerprint = sha256(CLIENT_STATES["museum"].encode()).hexdigest()[:8]
    size = len(CLIENT_STATES["museum"])
    where = "COMPANIES_FILE [companies.museum] line 15"
    assert found["museum", "CLIENT_STATE"] == f"{size} characters from {where}, fingerprint {fingerprint}"
    assert found["settings", "REDIS_URL"].endswith(" characters from the environment, fingerprint ", 0, -8)


def test_each_sink_is_named_with_where_it_delivers_and_which_orders_it_gets(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "sinks.toml"
    file.write_text('[sinks.own]\nkind = "python"\nfunction = "operator:lt"\nstatuses = ["Issued", "Error"]\n')

    found = lab.run_command("check", "--json", SINKS_FILE=str(file)).objects
    none = lab.run_command("check", "--json", SINKS="").objects

    sinks = [(one["about"], one["level"], one["detail"]) for one in found if one["what"] == "python"]
    assert sinks == [(SINK, "good", SINK), ("own", "good", "operator:lt; only status Issued, Error")]
    assert [(one["about"], one["level"]) for one in none if one["what"] == "sinks"] == [("settings", "note")]


def test_a_folder_that_is_not_there_is_noted(lab: Lab, tmp_path: Path) -> None:
    """The workers may run elsewhere."""
    file, folder = tmp_path / "sinks.toml", tmp_path / "archive"
    file.write_text(f'[sinks.archive]\nkind = "files"\nfolder = "{folder}"\n')

    def level() -> list[str]:
        found = lab.run_command("check", "--json", SINKS_FILE=str(file)).objects
        return [one["level"] for one in found if (one["about"], one["what"]) == ("archive", "folder")]

    assert level() == ["note"]
    folder.mkdir()
    assert level() == []


@pytest.mark.parametrize("trouble", ["disabled", "breaker open", "fails for all orders"])
def test_a_sink_that_gets_nothing_is_to_be_looked_at(lab: Lab, trouble: str) -> None:
    lab.declare()
    for number in range(5):
        lab.accept_and_fetch(order(number))
        if trouble == "disabled":
            lab.deliver("disabled", order(number), reason="HTTP 410")
            break
        is_away = trouble == "breaker open"
        lab.deliver("retry", order(number), reason="HTTP 503", failure="HTTP 503", unavailable=is_away, wait=600)

    def found() -> list[tuple[str, str]]:
        ended = lab.run_command("check", "--json")
        return [(one["level"], one["detail"]) for one in ended.objects if one["what"] == "deliveries"]

    ((level, detail),) = found()
    assert level == "todo"
    if trouble == "disabled":
        assert (detail.startswith("disabled since "), detail.endswith(": HTTP 410")) == (True, True)
    else:
        assert detail == "nothing is delivered: HTTP 503"
    lab.redis.delete(KEYS.sinks_disabled, KEYS.sink_breaker(SINK), KEYS.sink_failing(SINK))
    assert found() == []


def test_of_the_address_of_a_sink_only_scheme_and_host_are_shown(tmp_path: Path) -> None:
    (tmp_path / "sinks.toml").write_text(
        """
        [sinks]
        shop = { kind = "https", url = "https://shop.example.com/canary", secret_file = "SECRET" }
        database = { kind = "sql", url = "postgresql+psycopg://canary:canary@db.example.com/canary" }
        stream = { kind = "redis-stream", url = "rediss://:canary@redis.example.com/1", companies = ["zoo"] }
        archive = { kind = "files", folder = "/var/lib/orders" }
        bucket = { kind = "object", url = "s3://bucket/canary" }
        """.replace("SECRET", str(tmp_path / "secret"))
    )
    (tmp_path / "secret").write_text("whsec_Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5")
    problems: list[str] = []

    found = [*of_sinks(tuple(one for one, _ in of_file(tmp_path / "sinks.toml", problems)))]

    assert problems == []
    assert [f"{one.about}: {one.detail}" for one in found if one.what.islower()] == [
        "shop: https://shop.example.com",
        "database: postgresql+psycopg://db.example.com",
        "stream: rediss://redis.example.com; only company zoo",
        "archive: /var/lib/orders",
        "bucket: s3://bucket",
    ]
    assert [one.what for one in found if one.what.isupper()] == ["URL", "SECRET", "URL", "URL"]
    assert "canary" not in str(found)
    assert "Y2FuYXJ5" not in str(found)


def test_with_a_partner_id_the_order_list_is_read(lab: Lab, sandbox: Sandbox) -> None:
    sandbox.admin("POST", "orders", {"company_id": VENUE, "partner_id": PARTNER})
    lab.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')

    found = lab.run_command("check", "--json").objects

    details = {one["about"]: one["detail"] for one in found if one["what"] == "api"}
    assert details["venue"].startswith("the API key may call getOrder and list orders")
    assert details["museum"].startswith("the API key may call getOrder")
    assert [one["about"] for one in found if one["what"] == "partner id"] == ["museum"]


def test_what_keeps_the_pools_from_fetching_is_shown_though_upstream_answers_us(lab: Lab) -> None:
    """It names the failure that opened the breaker, since when, and the next probe."""
    opened: Any = {"open_until": lab.now + 60_000, "opened_at": lab.now - 180_000, "reason": "http_500", "http": 500}
    lab.redis.hset(KEYS.breaker(breaker_id(API_KEY, "/tenant/Sandbox/Venue")), mapping=opened)
    suspend(lab.redis)

    ended = lab.run_command("check", "--json")

    assert (ended.code, problems(ended)) == (1, [("redis", "rq"), ("venue", "breaker")])
    (found,) = [one["detail"] for one in ended.objects if one["what"] == "breaker"]
    assert found.startswith("open, so nothing is fetched: http_500 since ")
    assert f"(3 min); next probe at {shown(lab.now + 60_000)}" in found

    resume(lab.redis)
    lab.redis.flushall()
    lab.declare(companies={}, sinks=(), upstream="")
    lab.redis.hset(f"ota:limiter:{key_id(API_KEY)}", "retry_until", lab.now + 60_000)
    assert sorted(problems(lab.run_command("check", "--json"))) == [("museum", "throttled"), ("venue", "throttled")]


@pytest.mark.parametrize("status", [500, 403, 400])
def test_a_getorder_that_fails_is_found_though_the_order_list_is_answered(
    lab: Lab, sandbox: Sandbox, status: int
) -> None:
    """Before the breaker is open, and where too few orders come to open it."""
    lab.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{PARTNER}"')
    sandbox.admin("POST", "faults", {"kind": "status", "operation": "getOrder", "status": status, "company_id": VENUE})

    ended = lab.run_command("check", "--json")

    assert (ended.code, problems(ended)) == (1, [("venue", "api")])


OTHER_PARTNER = "33333333-3333-4333-8333-333333333333"


@pytest.mark.parametrize(
    ("fetched_partner", "level", "detail"),
    [
        (None, "note", "the order list is empty"),
        (OTHER_PARTNER, "note", "the order list is empty"),
        (
            PARTNER.upper(),
            "todo",
            f"the order list is empty, and the orders fetched last have the partner id {PARTNER}",
        ),
    ],
    ids=["nothing fetched", "the same partner", "another partner"],
)
def test_an_empty_list_is_compared_with_the_partner_of_fetched_orders(
    lab: Lab, fetched_partner: str | None, level: str, detail: str
) -> None:
    """The list of an unknown partner is empty, and not refused (upstream.md 6)."""
    lab.change_companies("[companies.venue]", f'[companies.venue]\nnp_partner_id="{OTHER_PARTNER}"')
    lab.accept(order(1))
    if fetched_partner is not None:
        lab.accept_and_fetch(order(2), partnerId=fetched_partner)

    ended = lab.run_command("check", "--json")

    (found,) = [one for one in ended.objects if (one["about"], one["what"]) == ("venue", "partner id")]
    assert (found["level"], found["detail"], ended.code) == (level, detail, int(level == "todo"))
    assert "NP_PARTNER_ID" in found["advice"]


@pytest.mark.parametrize(
    ("changed", "detail", "advice"),
    [
        ({"api_keys": ["another-key"]}, "unauthorized (HTTP 401)", "NP_API_KEY"),
        ({"forbidden_keys": [API_KEY]}, "forbidden (HTTP 403)", "NPR API Channel Mgr"),
    ],
)
def test_a_wrong_api_key_and_a_missing_permission_are_found(
    lab: Lab, sandbox: Sandbox, changed: dict[str, Any], detail: str, advice: str
) -> None:
    declare(sandbox, "venue", VENUE, **changed)

    ended = lab.run_command("check", "--json")

    assert (ended.code, problems(ended)) == (1, [("venue", "api")])
    (found,) = [one for one in ended.objects if one["level"] == "todo"]
    assert (found["detail"], advice in found["advice"]) == (detail, True)


@pytest.mark.parametrize("name", ["np_tenant", "np_environment", "np_company"])
def test_each_wrong_part_of_the_address_is_named(lab: Lab, name: str) -> None:
    museum = Path(lab.env["COMPANIES_FILE"]).read_text().partition("[companies.museum]")[2]
    (right,) = [line for line in museum.splitlines() if line.startswith(f"{name} =")]
    lab.change_companies(museum, museum.replace(right, f'{name} = "Nowhere"'))

    ended = lab.run_command("check", "--json")

    assert (ended.code, problems(ended)) == (1, [("museum", "api")])
    assert any(name.upper() in one["advice"] for one in ended.objects if one["level"] == "todo")


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"eventName": "another_event"}, PATH),
        ({"clientState": "canary-of-another-sender"}, "401"),
        ({"notificationUrl": "https://hooks.example.com/elsewhere"}, "another path"),
        ({"state": "Disabled"}, "Disabled"),
    ],
    ids=["missing", "wrong client state", "wrong path", "inactive"],
)
def test_a_wrong_subscription_is_found(lab: Lab, sandbox: Sandbox, changed: dict[str, str], detail: str) -> None:
    """Also a wrong clientState is not shown."""
    without_subscriptions(sandbox)
    subscribe(sandbox, "museum")
    subscription_id = subscribe(sandbox, "venue", **{name: value for name, value in changed.items() if name != "state"})
    if "state" in changed:
        sandbox.admin("PATCH", f"subscriptions/{subscription_id}", changed)

    ended = lab.run_command("check", "--json")

    assert (ended.code, problems(ended), detail in ended.out) == (1, [("venue", "subscription")], True)


def test_a_wrong_company_id_is_found(lab: Lab) -> None:
    lab.change_companies(VENUE, "44444444-4444-4444-8444-444444444444")

    ended = lab.run_command("check", "--json")

    assert (problems(ended), VENUE in ended.out) == ([("venue", "subscription")], True)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"NP_BASE_URL": "http://127.0.0.1:1"}, [("venue", "api"), ("museum", "api")]),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, [("redis", "redis")]),
    ],
    ids=["upstream", "Redis"],
)
def test_what_does_not_answer_is_one_finding(lab: Lab, changed: dict[str, str], found: list[tuple[str, str]]) -> None:
    ended = lab.run_command("check", "--json", **changed)

    assert (ended.code, problems(ended)) == (1, found)
    assert "good" in {one["level"] for one in ended.objects if (one["about"], one["what"]) not in found}


@pytest.mark.parametrize(
    ("denied", "detail"),
    [
        ("-blmove -lrange -xread", "lrange (web and workers); blmove (workers); xread (commands)"),
        ("-expire", "expire (workers)"),
        ("-multi", "multi (web and workers)"),
    ],
)
def test_what_the_redis_user_may_not_do_is_one_finding(lab: Lab, denied: str, detail: str) -> None:
    """Web needs few commands; workers die without the others."""
    client: Any = lab.redis
    client.execute_command("ACL", "SETUSER", "few", "reset", "on", ">x", "~*", "+@all", *denied.split())
    try:
        ended = lab.run_command("check", "--json", REDIS_URL=f"redis://few:x@{lab.url.partition('@')[2]}")
    finally:
        lab.redis.acl_deluser("few")

    (found,) = [one for one in ended.objects if one["what"] == "rights"]
    assert (ended.code, found["level"], found["detail"]) == (1, "todo", f"the user may not: {detail}")
    assert (("redis", "writable") in problems(ended)) == (denied == "-multi")


def test_events_that_wait_on_this_machine_are_shown_without_redis(lab: Lab) -> None:
    folder = lab.folder / "spool"
    folder.mkdir(mode=0o700)
    file = SpoolFile(folder / NAME)
    away = {"REDIS_URL": "redis://127.0.0.1:1/0", "SPOOL_DIR": str(folder)}
    assert problems(lab.run_command("check", "--json", **away)) == [("redis", "redis")]
    file.put([OrderProcessed(VENUE, order(1).order_id, "Issued", "", "", "current")] * 3)
    file.close()

    ended = lab.run_command("check", "--json", **away)

    assert problems(ended) == [("settings", "spool"), ("redis", "redis")]
    assert "3 events wait on this machine" in ended.out


def test_a_shell_without_the_prefix_of_the_pools_is_told_so(lab: Lab) -> None:
    """Also by `explain`, before it advises to fetch the order through the list; without any pool no prefix is named."""
    lab.accept(order(1))
    lab.declare(companies={}, sinks=(), upstream="")

    def pools(**variables: str) -> list[str]:
        found = lab.run_command("check", "--json", **variables)
        return [one["detail"] for one in found.objects if one["what"] == "pools" and one["level"] == "todo"]

    def advice(**variables: str) -> str:
        return str(lab.run_command("orders", "explain", order(2).order_id, "--json", **variables).objects[0]["next"])

    nothing = "no worker pool runs under KEY_PREFIX {}: nothing is fetched".format
    assert pools() == []
    assert "No worker pool runs" not in advice()
    assert pools(KEY_PREFIX="other") == [f"{nothing('other')}; pools run under {DEFAULT_PREFIX}"]
    assert "No worker pool runs under KEY_PREFIX other" in advice(KEY_PREFIX="other")
    lab.redis.delete(KEYS.pools)
    assert pools() == [nothing(DEFAULT_PREFIX)]
    assert "No worker pool runs" in advice()


def test_a_redis_without_durability_is_found(lab: Lab) -> None:
    lab.redis.config_set("appendonly", "no")
    try:
        ended = lab.run_command("check", "--json")
    finally:
        lab.redis.config_set("appendonly", "yes")

    assert (ended.code, problems(ended)) == (1, [("redis", "durable")])


def test_the_spool_is_opened_and_foreign_files_in_it_are_named(lab: Lab) -> None:
    """As `serve` opens it. Nothing is made or left there."""
    folder = lab.folder / "spool"

    def found() -> dict[str, str]:
        ended = lab.run_command("check", "--json", SPOOL_DIR=str(folder))
        return {one["level"]: one["detail"] for one in ended.objects if one["what"] == "spool"}

    assert (list(found()), folder.exists()) == (["good"], False)
    folder.mkdir(mode=0o700)
    assert "can be written to, " in found()["good"]
    assert [*folder.iterdir()] == []
    (folder / "lost+found").mkdir()
    (folder / "core").write_text("")
    assert f"{folder} also has core, lost+found: " in found()["note"]

    folder.chmod(0o755)
    assert "is open to others" in found()["wrong"]
    assert lab.run_command("check", SPOOL_DIR=str(folder)).code == 2
    assert "cannot be made" in lab.run_command("check", SPOOL_DIR=str(lab.folder / "no" / "folder")).out


def test_a_spool_whose_file_was_deleted_is_found(lab: Lab) -> None:
    folder = lab.folder / "spool"
    folder.mkdir(mode=0o700)
    assert lab.run_command("check", SPOOL_DIR=str(folder)).code == 0
    (folder / "spool.sqlite-journal").touch()

    assert problems(lab.run_command("check", "--json", SPOOL_DIR=str(folder))) == [("settings", "spool")]


def test_wrong_settings_are_findings_with_exit_code_2(lab: Lab, tmp_path: Path) -> None:
    """Each names the page that explains it."""
    (tmp_path / "sinks.toml").write_text('[sinks.a]\nkind = "files"\n')
    wrong = {"REDIS_URL": "http://nonsense", "PORT": "x"}
    lines, table = lab.run_command("check", "--json", **wrong), lab.run_command("check", **wrong)
    sinks = lab.run_command("check", "--json", SINKS_FILE=str(tmp_path / "sinks.toml"))

    assert (lines.code, table.code, sinks.code) == (2, 2, 2)
    assert [one["detail"].split(":")[0] for one in lines.objects] == ["REDIS_URL", "PORT"]
    pages = [one["advice"].split()[2] for one in (*lines.objects, *sinks.objects)]
    assert pages == ["docs/settings.md", "docs/settings.md", "docs/sinks.md"]


@pytest.mark.parametrize(
    ("url", "noted"),
    [
        ("redis://redis.internal:6379/0", ["password", "tls"]),
        ("redis://:secret@redis.internal:6379/0", ["tls"]),
        ("rediss://:secret@redis.internal:6379/0", []),
        ("redis://127.0.0.1:6379/0", []),
        ("unix:///run/redis.sock", []),
    ],
)
def test_an_unprotected_redis_on_another_machine_is_noted(url: str, noted: list[str]) -> None:
    assert [finding.what for finding in of_address(url)] == noted
