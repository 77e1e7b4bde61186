"""The API as a process: who may call it, what it answers about orders and the feed, and what when that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import pytest
from starlette.responses import Response

from app.api import orders
from app.api.keys import ApiKeys, Caller, Scope
from app.dev.valkey import Valkey, start
from app.ledger.feed import cursor_of
from app.ledger.redis import Redis
from app.times import from_ms
from tests.eventually import eventually
from tests.integration.test_feed import erase
from tests.lab import KEYS, MUSEUM, ONE, SAME_ID, VENUE, Lab, order
from tests.service import API, ROOT, Web, serving, settings_of_one_company

TWO, THREE = order(2), order(3)
UNKNOWN: Final = order(999).order_id
PER_MIN: Final = 40


@pytest.fixture(scope="module")
def api(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url) | {"API_REQUESTS_PER_MIN": str(PER_MIN)}
    with serving(tmp_path_factory.mktemp("api"), settings, API) as one:
        yield one


class Client:
    """A caller with a key of its own."""

    def __init__(self, api: Web, lab: Lab, *scopes: Scope, name: str = "desk") -> None:
        self.id, self.key = ApiKeys(lab.redis).create(name, scopes or ("orders:read", "feed"))
        self._http = api.http

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self._http.get(path, headers={"authorization": f"Bearer {self.key}", **headers})

    def read(self, path: str) -> Any:
        """Return the body of an answer, which must be 200."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, path: str) -> list[str]:
        """Return the ids of the orders of a page."""
        return [one["orderId"] for one in self.read(path)["orders"]]

    def acknowledge(self, body: object) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._http.post("/feed/ack", content=content, headers={"authorization": f"Bearer {self.key}"})


@pytest.fixture
def client(api: Web, lab: Lab) -> Client:
    lab.declare()
    return Client(api, lab)


def wrong(answer: httpx.Response) -> tuple[int, str]:
    """Return status and reason of a problem, which must have its form."""
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    assert body["type"] == f"urn:ota-receiver:{body['reason']}"
    assert body["requestId"] == answer.headers["x-request-id"]
    return answer.status_code, body["reason"]


def page_through(client: Client, path: str) -> list[str]:
    """Return the ids of all pages of a list of two orders each."""
    found, body = [], client.read(f"{path}&limit=2")
    while True:
        found += [one["orderId"] for one in body["orders"]]
        if body["next"] is None:
            return found
        body = client.read(f"{path}&limit=2&cursor={body['next']}")


def test_an_order_is_the_document_that_sinks_get(client: Client, lab: Lab) -> None:
    lab.accept_and_fetch(ONE)
    answer = client.get(f"/orders/{ONE.order_id}")

    body = answer.json()
    assert body["idempotencyKey"] == lab.start_delivery().idempotency_key(ONE)
    assert (body["company"], body["companyId"], body["orderId"], body["revision"]) == ("venue", *ONE, 1)
    assert body["order"]["items"][0]["wallets"][0]["assets"]
    assert answer.headers["cache-control"] == "private, no-cache"


def test_a_copy_that_the_caller_has_is_304_until_anything_changes(client: Client, lab: Lab) -> None:
    lab.accept_and_fetch(ONE)
    path = f"/orders/{ONE.order_id}"
    tag = client.get(path).headers["etag"]

    same = client.get(path, **{"if-none-match": f'"other", W/{tag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    for fixture in ("order-issued", "order-cancelled"):
        lab.later(1)
        lab.accept_and_fetch(ONE, fixture)
        changed = client.get(path, **{"if-none-match": tag})
        assert changed.status_code == 200
        assert changed.headers["etag"] != tag
        tag = changed.headers["etag"]


def test_an_order_of_two_companies_needs_its_company(client: Client, lab: Lab) -> None:
    for one in (ONE, SAME_ID):
        lab.accept_and_fetch(one)
    path = f"/orders/{ONE.order_id}"

    assert wrong(client.get(path)) == (409, "several_companies")
    assert "museum, venue" in client.get(path).json()["detail"]
    for company, expected in (("venue", VENUE), ("museum", MUSEUM), (MUSEUM, MUSEUM)):
        assert client.read(f"{path}?company={company}")["companyId"] == expected
    assert wrong(client.get(f"{path}?company=other")) == (422, "bad_parameter")


@pytest.mark.parametrize("what", ["", "/history"])
def test_an_order_that_is_not_here_says_why(client: Client, lab: Lab, what: str) -> None:
    lab.accept(ONE)
    lab.accept_and_fetch(TWO)
    erase(lab, TWO)

    assert wrong(client.get(f"/orders/{UNKNOWN}{what}")) == (404, "order_not_found")
    assert wrong(client.get(f"/orders/CM-4711{what}")) == (404, "order_not_found")
    assert wrong(client.get(f"/orders/{TWO.order_id}{what}")) == (410, "order_erased")
    if not what:
        assert wrong(client.get(f"/orders/{ONE.order_id}")) == (404, "order_not_fetched")


@pytest.mark.parametrize("key", ["record", "content"])
def test_an_unreadable_order_is_500_alone_and_hides_no_other(client: Client, api: Web, lab: Lab, key: str) -> None:
    for one in (ONE, TWO):
        lab.accept_and_fetch(one)
    lab.overwrite(getattr(KEYS, key)(ONE), b"damaged")

    assert wrong(client.get(f"/orders/{ONE.order_id}")) == (500, "order_unreadable")
    assert client.ids("/orders") == client.ids("/feed?limit=1") == [TWO.order_id]
    assert client.get(f"/orders/{ONE.order_id}/history").status_code == 200
    assert any(line["event"] == "order.unreadable" and line["order_id"] == ONE.order_id for line in api.lines())


def test_the_history_is_that_of_orders_show(client: Client, lab: Lab) -> None:
    lab.accept_and_fetch(ONE)
    body = client.read(f"/orders/{ONE.order_id}/history")

    assert (body["company"], body["orderId"]) == ("venue", ONE.order_id)
    assert [one["kind"] for one in body["history"]] == ["event", "started", "stored"]
    assert body["history"][2] | {"at": "", "durationMs": 0} == {
        "kind": "stored",
        "at": "",
        "token": 1,
        "status": "Issued",
        "revision": 1,
        "httpStatus": 200,
        "durationMs": 0,
    }


def test_lists_are_filtered_and_paged_latest_first(client: Client, lab: Lab) -> None:
    for number in range(1, 8):
        lab.later(1)
        one = order(number, MUSEUM if number == 3 else VENUE)
        lab.accept_and_fetch(
            one, "order-draft" if number in (2, 5) else "order-issued", buyFromOrderReference=f"CM-{number}"
        )
        if number == 4:
            between = quote(from_ms(lab.now + 500).isoformat())

    def ids(*numbers: int) -> list[str]:
        return [order(number).order_id for number in numbers]

    assert page_through(client, "/orders?") == ids(7, 6, 5, 4, 3, 2, 1)
    assert page_through(client, "/orders?status=draft") == ids(5, 2)
    assert page_through(client, "/orders?company=museum") == ids(3)
    assert page_through(client, "/orders?reference=cm-4") == ids(4)
    assert page_through(client, "/orders?reference=cm-4&company=museum") == []
    assert page_through(client, f"/orders?since={between}") == ids(7, 6, 5)
    assert page_through(client, f"/orders?since={between}&reference=cm-4") == []
    assert page_through(client, "/orders?since=2099-01-01T00:00:00%2B01:00") == []
    assert page_through(client, "/orders?status=&company=venue") == page_through(client, "/orders?reference=") == []


def test_an_order_that_changes_while_somebody_pages_is_behind_the_reader(client: Client, lab: Lab) -> None:
    for one in (ONE, TWO, THREE):
        lab.accept_and_fetch(one)
    first = client.read("/orders?limit=2")
    lab.accept_and_fetch(ONE, "order-cancelled")
    erase(lab, TWO)
    rest = client.read(f"/orders?limit=2&cursor={first['next']}")

    assert [one["orderId"] for one in first["orders"]] == [THREE.order_id, TWO.order_id]
    assert (rest["orders"], rest["next"]) == ([], None)
    assert wrong(client.get(f"/orders/{TWO.order_id}")) == (410, "order_erased")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("limit=0", "bad_parameter"),
        ("limit=101", "bad_parameter"),
        ("limit=ten", "bad_parameter"),
        ("limit=%C2%B2", "bad_parameter"),
        ("since=yesterday", "bad_parameter"),
        ("since=2026-11-27T10:00:00", "bad_parameter"),
        ("refrence=CM-1", "bad_parameter"),
        ("status=Issued&status=Draft", "bad_parameter"),
        ("cursor=guess", "unknown_cursor"),
    ],
)
def test_a_wrong_parameter_is_refused_and_not_passed_over(client: Client, query: str, reason: str) -> None:
    assert wrong(client.get(f"/orders?{query}")) == (422, reason)


def test_the_feed_gives_the_same_until_it_is_acknowledged(client: Client, lab: Lab) -> None:
    """A consumer that dies after it has read loses nothing."""
    for one in (ONE, TWO, THREE):
        lab.accept_and_fetch(one)
    first = client.read("/feed?limit=2")

    assert [one["orderId"] for one in first["orders"]] == client.ids("/feed?limit=2") == [ONE.order_id, TWO.order_id]
    assert client.ids(f"/feed?after={first['next']}") == [THREE.order_id]
    assert client.acknowledge({"cursor": first["next"]}).json() == {"cursor": first["next"]}
    rest = client.read("/feed")
    assert [one["orderId"] for one in rest["orders"]] == [THREE.order_id]
    client.acknowledge({"cursor": rest["next"]})
    assert client.read("/feed") == {"orders": [], "next": rest["next"]}
    lab.accept_and_fetch(ONE, "order-cancelled")
    assert client.ids("/feed") == [ONE.order_id]


def test_the_lines_of_the_page_read_the_feed_to_its_end(
    client: Client, api: Web, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (ONE, TWO):
        lab.accept_and_fetch(one)
    (tmp_path / "billing.key").write_text(client.key + "\n")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[0]
    stored: list[str] = []
    exec(lines.replace("8081", str(api.port)), {"store": lambda key, _: stored.append(key.split("/")[1])})

    assert stored == [ONE.order_id, TWO.order_id]
    assert client.ids("/feed") == []


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed: the lines of docs/api.md were not run")
def test_each_curl_line_of_the_page_is_answered_200_with_the_keys_that_the_page_makes(
    api: Web, lab: Lab, tmp_path: Path
) -> None:
    lab.accept_and_fetch(ONE)
    feed = Client(api, lab, "feed", name="billing")
    (tmp_path / "billing.key").write_text(f"{feed.key}\n")
    (tmp_path / "desk.key").write_text(f"{Client(api, lab, 'orders:read').key}\n")
    _, *blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("8081", str(api.port)).replace("curl ", "curl -sS -o answer -w '%{http_code} ' ")
    lines = re.sub(r"[0-9a-f-]{36}", ONE.order_id, lines).replace("MTc5NTg5MTIzNDU2Nw", feed.read("/feed")["next"])
    done = subprocess.run(["/bin/sh", "-ec", lines], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["200"] * 6


def test_the_reader_of_the_page_gets_each_order_and_again_what_it_could_not_store(
    client: Client, api: Web, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/api.md has it: it dies with the second order of the first page."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    code = code.replace("127.0.0.1:8081", f"127.0.0.1:{api.port}").replace("limit=100", "limit=2")
    (tmp_path / "billing.key").write_text(f"{client.key}\n")
    monkeypatch.chdir(tmp_path)
    for one in (ONE, TWO, THREE):
        lab.accept_and_fetch(one)
    stored: list[str] = []

    def store(key: str, document: dict[str, Any]) -> None:
        assert key.split("/")[1] == document["orderId"]
        if len(stored) == 1:
            stored.append("failed")
            raise OSError
        stored.append(document["orderId"])

    with pytest.raises(OSError, match=r"^$"):
        exec(code, {"store": store})
    exec(code, {"store": store})

    assert stored == [ONE.order_id, "failed", ONE.order_id, TWO.order_id, THREE.order_id]
    assert client.ids("/feed") == []


def test_an_older_acknowledgement_changes_nothing_and_says_where_the_consumer_is(client: Client, lab: Lab) -> None:
    """Of a request that was repeated late, or of a second process of the same consumer."""
    for one in (ONE, TWO):
        lab.accept_and_fetch(one)
    first = client.read("/feed?limit=1")["next"]
    second = client.read("/feed")["next"]

    answers = [client.acknowledge({"cursor": one}).json()["cursor"] for one in (second, first, second)]
    assert answers == [second] * 3
    assert client.ids("/feed") == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"cursor": cursor_of(10**15)}, (422, "unknown_cursor")),
        ({"cursor": "guess"}, (422, "unknown_cursor")),
        ({"cursor": 1}, (422, "bad_body")),
        ({}, (422, "bad_body")),
        ([], (422, "bad_body")),
        (b"cursor=MA", (400, "not_json")),
        (b"\xff", (400, "not_json")),
        (b"", (400, "not_json")),
        (b'{"x":' + 2000 * b"[", (400, "not_json")),
        (b'{"x":' + 1010 * b'{"":', (400, "not_json")),
        (b'{"x":' + 1500 * b"[" + 1500 * b"]" + b',"cursor":"MA"}', (400, "not_json")),
        (b'"' + 5000 * b"x" + b'"', (413, "body_too_large")),
    ],
)
def test_a_wrong_acknowledgement_moves_nothing(
    client: Client, lab: Lab, body: object, expected: tuple[int, str]
) -> None:
    lab.accept_and_fetch(ONE)

    assert wrong(client.acknowledge(body)) == expected
    assert client.ids("/feed") == [ONE.order_id]


def test_a_page_of_large_orders_ends_early_and_passes_over_none(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "MOST_BYTES", 1000)
    for one in (ONE, TWO, THREE):
        lab.accept_and_fetch(one)
    operations = orders.Orders(lab.redis, [])

    def pages(answer: Callable[[orders.Call], Response], name: str) -> list[list[str]]:
        found: list[list[str]] = []
        query: dict[str, str] = {}
        while True:
            call = orders.Call(Caller("", "desk", ("feed",), 0), {}, query, "", b"", {})
            body = json.loads(bytes(answer(call).body))
            found.append([one["orderId"] for one in body["orders"]])
            if not body["orders"] or not body["next"]:
                return found
            query = {name: body["next"]}

    assert pages(operations.feed, "after") == [[ONE.order_id], [TWO.order_id], [THREE.order_id], []]
    assert pages(operations.listed, "cursor") == [[THREE.order_id], [TWO.order_id], [ONE.order_id], []]


def test_consumers_are_apart_and_keys_of_one_name_are_one(client: Client, api: Web, lab: Lab) -> None:
    lab.accept_and_fetch(ONE)
    rotated, other = Client(api, lab, "feed"), Client(api, lab, "feed", name="billing")
    client.acknowledge({"cursor": client.read("/feed")["next"]})

    assert rotated.ids("/feed") == []
    assert other.ids("/feed") == [ONE.order_id]


def test_after_a_flush_a_consumer_goes_on_with_its_cursor(api: Web, lab: Lab, client: Client) -> None:
    """Its key is lost with all else, and it needs a new one."""
    lab.accept_and_fetch(ONE)
    cursor = client.read("/feed")["next"]
    client.acknowledge({"cursor": cursor})
    lab.redis.flushall()
    assert wrong(client.get("/feed")) == (401, "unauthorized")
    again = Client(api, lab)
    assert again.acknowledge({"cursor": cursor}).json() == {"cursor": cursor}
    lab.accept_and_fetch(TWO)

    assert again.ids("/feed") == [TWO.order_id]


def test_an_order_erased_while_a_consumer_pages_does_not_look_like_the_end(client: Client, lab: Lab) -> None:
    for one in (ONE, TWO):
        lab.accept_and_fetch(one)
    lab.redis.delete(KEYS.record(ONE))  # between the list and the reading of its orders

    assert client.ids("/feed?limit=1") == [TWO.order_id]


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer x",
        "Basic eDp5",
        "Bearer otar_00000000_{0}",
        "otar_{1}_{0}",
        "Bearer otar_{1}_{0}",
    ],
)
def test_without_a_valid_key_everything_but_the_public_paths_is_401_before_it_is_looked_at(
    client: Client, api: Web, authorization: str
) -> None:
    text = authorization.format("0" * 64, client.id)
    for method, path in (("GET", f"/orders/{ONE.order_id}"), ("GET", "/orders?refrence=x"), ("POST", "/feed/ack")):
        answer = api.http.request(method, path, headers={"authorization": text})
        assert wrong(answer) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert api.http.get("/healthz").text == "alive\n"
    assert (
        api.http.head("/healthz").status_code,
        api.http.head("/feed", headers={"authorization": f"Bearer {client.key}"}).content,
    ) == (200, b"")
    assert api.http.get("/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize("path", ["/healthz", "/openapi.json", "/feed"])
def test_each_answer_has_the_id_of_its_own_request_alone(api: Web, path: str) -> None:
    """Also where all requests get the same answer: its head must not grow with each of them."""
    heads = [api.http.get(path).headers for _ in range(3)]

    ids = [head.get_list("x-request-id") for head in heads]
    assert [len(one) for one in ids] == [1, 1, 1]
    assert len({one for (one,) in ids}) == 3


def test_a_key_allows_what_its_scopes_say(api: Web, lab: Lab) -> None:
    reader, consumer = Client(api, lab, "orders:read"), Client(api, lab, "feed")

    assert (reader.get("/orders").status_code, consumer.get("/feed").status_code) == (200, 200)
    assert [wrong(one) for one in (reader.get("/feed"), reader.acknowledge(b""), consumer.get("/orders"))] == [
        (403, "missing_scope")
    ] * 3


def test_a_revoked_key_ends_at_once(client: Client, lab: Lab) -> None:
    assert client.get("/orders").status_code == 200
    ApiKeys(lab.redis).revoke(client.id)

    assert wrong(client.get("/orders")) == (401, "unauthorized")


def test_a_key_has_its_own_limit_and_its_last_use_is_noted(client: Client, api: Web, lab: Lab) -> None:
    answers = [client.get("/feed") for _ in range(2 * PER_MIN + 1)]  # two minutes, if one ends meanwhile

    refused = [one for one in answers if one.status_code == 429]
    assert refused
    assert wrong(refused[0]) == (429, "too_many_requests")
    assert 1 <= int(refused[0].headers["retry-after"]) <= 60
    assert Client(api, lab).get("/feed").status_code == 200
    assert abs(lab.now - ApiKeys(lab.redis).used()[client.id]) < 120_000


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/orders", "GET, HEAD"),
        ("DELETE", f"/orders/{UNKNOWN}", "GET, HEAD"),
        ("GET", "/feed/ack", "POST"),
        ("PUT", "/healthz", "GET, HEAD"),
    ],
)
def test_another_method_is_405_before_anything_else(api: Web, method: str, path: str, allowed: str) -> None:
    answer = api.http.request(method, path)

    assert wrong(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/", "/orders/", "/order", f"/orders/{UNKNOWN}/other", "/metrics"])
def test_another_path_is_a_problem_too(api: Web, path: str) -> None:
    assert wrong(api.http.get(path)) == (404, "no_such_path")


def test_no_line_of_the_log_has_a_reference_or_a_key(client: Client, api: Web, lab: Lab) -> None:
    lab.accept_and_fetch(ONE, buyFromOrderReference="CM-canary")
    answer = client.get("/orders?reference=CM-canary")
    client.get("/orders/CM-canary")
    line = eventually(
        lambda: [one for one in api.lines() if one.get("request_id") == answer.headers["x-request-id"]],
        what="the line of the request",
    )[0]

    assert line | {"duration_ms": 0, "timestamp": "", "host": "", "version": ""} == {
        "timestamp": "",
        "level": "info",
        "event": "api.request",
        "service": "ota-receiver",
        "version": "",
        "host": "",
        "method": "GET",
        "path": "/orders",
        "status": 200,
        "duration_ms": 0,
        "orders": 1,
        "key": client.id,
        "consumer": "desk",
        "request_id": answer.headers["x-request-id"],
    }
    assert "CM-canary" not in api.process.output
    assert client.key not in api.process.output
    assert client.key.encode() not in lab.everything()


def test_of_callers_without_a_key_one_line_a_second_is_logged(api: Web) -> None:
    sender = {"x-forwarded-for": "203.0.113.9"}
    for _ in range(30):
        api.http.get("/orders", headers=sender)
    lines = eventually(
        lambda: [one for one in api.lines() if one["event"] == "requests.unlogged" and one["sender"] == "203.0.113.9"],
        what="the line of the rest",
    )

    assert lines[0]["status"] == 401
    assert len([one for one in api.lines() if one["event"] == "api.request" and one.get("sender") == "203.0.113.9"]) < 5


def test_without_redis_it_starts_answers_503_and_goes_on_when_redis_is_back(tmp_path: Path) -> None:
    with start(tmp_path / "valkey") as server:
        settings = settings_of_one_company(server.url)
        server.stop()
        with serving(tmp_path, settings, API) as api:
            answer = api.http.get("/feed", headers={"authorization": f"Bearer otar_{8 * '0'}_{64 * '0'}"})
            assert wrong(answer) == (503, "unavailable")
            assert answer.headers["retry-after"] == "5"
            assert [one["role"] for one in api.lines() if one["event"] == "redis.unavailable"] == ["api"]
            server.restart()
            with Redis.from_url(server.url) as redis:
                client = Client(api, Lab(redis))
                assert client.get("/feed").status_code == 200
            assert [one["role"] for one in api.lines() if one["event"] == "redis.recovered"] == ["api"]


def test_without_any_key_the_start_says_so(api: Web) -> None:
    (line,) = [one for one in api.lines() if one["event"] == "api.no_keys"]

    assert "ota-receiver keys create" in line["advice"]


def test_health_asks_the_api_on_its_own_port(api: Web, lab: Lab, free_port: int) -> None:
    answers = [lab.run_command("health", "--role", "api", API_PORT=str(port)) for port in (api.port, free_port)]

    assert [one.code for one in answers] == [0, 1]
    assert answers[0].out == "api: /healthz answers 200\n"


def test_a_port_that_is_taken_ends_the_start_with_its_setting(api: Web, lab: Lab) -> None:
    env = {**os.environ, **settings_of_one_company(lab.url), "API_PORT": str(api.port), "LOG_FORMAT": "json"}
    ended = subprocess.run(API, env=env, cwd=lab.folder, capture_output=True, text=True, timeout=20, check=False)

    assert ended.returncode == 1
    assert f"API_HOST 127.0.0.1, API_PORT {api.port}: " in ended.stdout
