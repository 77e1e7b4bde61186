"""The answers of the web process, as `ota-receiver serve` runs it."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from app.web.app import NEAR_PATHS
from app.web.requests import Proxies
from tests.eventually import eventually
from tests.lab import Lab
from tests.samples import sample
from tests.service import (
    API_KEY,
    COMPANY,
    FORMER_SECRET,
    HOOK,
    OPS_TOKEN,
    SECRET,
    Web,
    item,
    key_of,
    post,
    read_all,
    samples,
    serve_changed,
    serving,
    settings_of_one_company,
    talk,
    trickle,
)

STRANGER = "cccccccc-0000-4000-8000-000000000000"
MAX_BODY = 1024 * 1024
DEFLATED = zlib.compressobj(wbits=-zlib.MAX_WBITS)
BOMB = gzip.compress(b"")[:10] + (DEFLATED.compress(b" " * MAX_BODY) + DEFLATED.flush(zlib.Z_FULL_FLUSH)) * 900
"""900 MB of blanks, less than MAX_BODY as it is sent."""
OPS = {"authorization": f"Bearer {OPS_TOKEN}"}
WRONG = "canary-wrong"

pytestmark = pytest.mark.usefixtures("redis_client")

# A programming error in the inbox and in the metrics, and 0.2 s for a body.
BROKEN = """
from app.intake.recorder import Inbox
from app.metrics import Metrics
from app.web import webhook as web

async def accept(self, events):
    raise RuntimeError(f"canary-text of {events[0].order_id}")

async def text(self):
    raise RuntimeError("canary-text")

Inbox.accept, Metrics.text, web.BODY_SECONDS = accept, text, 0.2
"""


@pytest.fixture(scope="module")
def web(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    more = {"CLIENT_STATE_PREVIOUS": FORMER_SECRET, "OPS_TOKEN": OPS_TOKEN, "TRUSTED_PROXIES": "127.0.0.1,10.0.0.0/8"}
    with serving(tmp_path_factory.mktemp("web"), settings_of_one_company(valkey.url) | more) as running:
        yield running


def stranger(web: Web, address: str = "127.0.0.2") -> httpx.Client:
    """Return a client at an address that is no proxy's."""
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=web.http.base_url, transport=transport, timeout=10)


@pytest.fixture(scope="module")
def broken(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url) | {"OPS_TOKEN": OPS_TOKEN}
    with serving(tmp_path_factory.mktemp("broken"), settings, serve_changed(BROKEN)) as running:
        yield running


class TestGoodEvents:
    """An accepted event is recorded, and a fetch of its order is pending."""

    @pytest.mark.parametrize(("shape", "orders"), [("values", 1), ("value", 2), ("bare", 1)])
    def test_every_documented_shape_is_accepted(self, web: Web, lab: Lab, shape: str, orders: int) -> None:
        text = sample(f"webhook-{shape}").decode()
        body = text.replace("secret_value_from_subscription_creation_mirrored", SECRET).encode()
        # The headers of the sender are documented nowhere, so the content type does not matter.
        answer = web.post(body, headers={"content-type": "text/plain; charset=utf-16"})

        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        receipt = answer.json()
        assert (receipt.pop("request_id"), receipt.pop("invalid_items")) == (answer.headers["x-request-id"], {})
        zeros = dict.fromkeys(("erased", "coalesced", "duplicates", "spooled", "ignored"), 0)
        assert receipt == zeros | {"events": orders, "queued": orders}
        assert (len(lab.events()), len(lab.due()), len(lab.jobs())) == (orders,) * 3
        assert {event["request"] for event in lab.events()} == {answer.headers["x-request-id"]}

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_other_encodings_of_unicode_are_read(self, web: Web, lab: Lab, encoding: str) -> None:
        one = item(buyFromOrderReference="Zürich \N{TICKET}")

        assert web.post(json.dumps({"values": [one]}, ensure_ascii=False).encode(encoding)).status_code == 200
        assert [event["reference"] for event in lab.events()] == ["Zürich \N{TICKET}"]

    @pytest.mark.parametrize("name", ["gzip", "x-gzip", "GZIP"])
    def test_a_gzip_body_is_read(self, web: Web, lab: Lab, name: str) -> None:
        body = gzip.compress(json.dumps({"values": [item()]}).encode())

        assert web.post(body, headers={"content-encoding": name}).status_code == 200
        assert len(lab.events()) == 1

    def test_a_url_with_a_slash_at_its_end_is_served_too(self, web: Web, lab: Lab) -> None:
        body = {"values": [item()]}

        assert web.http.post(f"{HOOK}/", json=body).status_code == 200
        assert web.http.get(f"{HOOK}/", params={"validationToken": "one"}).text == "one"
        assert len(lab.events()) == 1

    def test_half_a_surrogate_pair_fails_no_batch(self, web: Web) -> None:
        """Business Central cuts a text in the middle of an emoji."""
        items = [item(), item(companyName="Zoo MARK"), item(clientState="MARK")]
        receipt = web.post(json.dumps({"values": items}).encode().replace(b"MARK", b"\\ud83d")).json()

        assert (receipt["queued"], receipt["invalid_items"]) == (2, {"unauthenticated": 1})


class TestBadItems:
    """One bad item never fails its batch; tests/unit/test_auth.py and test_events.py have every kind of them."""

    def test_invalid_items_are_counted_by_reason_and_the_others_are_recorded(self, web: Web, lab: Lab) -> None:
        wrong_secret, other_company = item(clientState=WRONG), item(companyId=STRANGER)
        receipt = web.deliver(5, item(), [[]], item("../../etc"), item(payload=[1]), wrong_secret, other_company)

        assert (receipt["events"], receipt["queued"]) == (7, 1)
        assert receipt["invalid_items"] == {"bad_item": 2, "bad_order_id": 2, "unauthenticated": 2}
        assert len(lab.events()) == 1

    @pytest.mark.parametrize(
        ("changed", "shape"),
        [
            ({"payload": {"orderNo": "canary"}}, "payload: {orderNo: text 6}"),
            ({"payload": ["canary"]}, "payload: list 1 [text 6]"),
            ({"payload": None, "data": {"orderId": "canary"}}, "data: {orderId: text 6}"),
        ],
    )
    def test_a_proven_item_that_cannot_be_read_leaves_its_shape_in_the_log(
        self, web: Web, changed: dict[str, Any], shape: str
    ) -> None:
        answer = web.post({"values": [item(), item(clientState=WRONG), item() | changed, item() | changed]})

        (line,) = [line for line in web.lines_of(answer) if line["event"] == "item.unreadable"]
        assert (line["field"], line["place"]) == ("payload.orderId", 3)
        assert shape in line["shape"]
        assert "canary" not in line["shape"]

    def test_an_empty_list_is_accepted_and_events_of_other_names_are_ignored(self, web: Web, lab: Lab) -> None:
        """They may come from another subscription to the same URL, which a 4xx could switch off."""
        assert web.deliver()["events"] == 0
        assert web.deliver(item(eventName="pos_sale_completed"), item(eventName="order"))["ignored"] == 2
        assert (lab.events(), lab.due(), lab.jobs()) == ([], {}, [])
        assert web.deliver(item(eventName="pos_sale_completed"), item() | {"new": [{}]})["queued"] == 1


class TestAuthentication:
    """Nothing without a clientState of its own company is recorded, and the answer does not show what was wrong."""

    @pytest.mark.parametrize(
        "client_state", [WRONG, None, [SECRET], "x" * 900_000, SECRET + " "], ids=lambda value: repr(value)[:24]
    )
    def test_any_other_client_state_is_401(self, web: Web, lab: Lab, client_state: object) -> None:
        answer = web.post({"values": [item(clientState=client_state)]})

        assert (answer.status_code, answer.json()["reason"]) == (401, "unauthenticated")
        assert (lab.events(), lab.due(), lab.jobs()) == ([], {}, [])

    def test_an_unknown_company_and_a_wrong_secret_get_the_same_answer(self, web: Web) -> None:
        wrong = web.post({"values": [item(clientState=WRONG)]})
        unknown = web.post({"values": [item(companyId=STRANGER)]})

        def shown(answer: httpx.Response) -> tuple[Any, ...]:
            request_id = answer.headers["x-request-id"]
            assert answer.json()["request_id"] == request_id
            headers = [(name, value) for name, value in answer.headers.raw if name not in {b"x-request-id", b"date"}]
            return answer.status_code, answer.text.replace(request_id, ""), headers

        assert shown(wrong) == shown(unknown)
        assert shown(wrong)[0] == 401

    def test_no_secret_and_no_name_reaches_redis_or_the_log(self, web: Web, lab: Lab) -> None:
        items = [
            item(companyName="canary-name", buyFromOrderReference="CM-1"),
            item(clientState=FORMER_SECRET, extra="canary-extra"),
            item(clientState=WRONG),
        ]
        headers = {"x-np-api-key": API_KEY, "authorization": "canary-bearer"}
        answer = web.post({"values": items}, headers=headers, params={"secret": "canary-query"})

        assert answer.status_code == 200
        assert "canary" not in json.dumps(web.lines_of(answer))
        assert b"canary" not in lab.everything()


class TestHandshake:
    """Microsoft's entity webhooks send it; for business events no document says whether they do."""

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_the_token_is_echoed_as_text(self, web: Web, method: str) -> None:
        token = 'Az09._~+/=%:- <é>{}"' + "x" * 1000
        answer = web.http.request(method, HOOK, params={"validationToken": token})

        assert (answer.status_code, answer.text) == (200, token)
        assert answer.headers["content-type"].partition(";")[0] == "text/plain"
        assert answer.headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("method", ["GET", "POST"])
    @pytest.mark.parametrize("token", ["", "a\r\nb", "a\x00", "\x1b[31m", "a\x7f", "\x9b"])
    def test_a_token_with_control_characters_is_not_echoed(self, web: Web, method: str, token: str) -> None:
        answer = web.http.request(method, HOOK, params={"validationToken": token})

        assert (answer.status_code, answer.json()["reason"]) == (400, "bad_validation_token")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]

    def test_a_body_is_read_as_events_whatever_the_query(self, web: Web, lab: Lab) -> None:
        bodies = [{"values": [item()]}, {"values": [item(clientState=WRONG)]}, b"not json"]
        answers = [web.post(body, params={"validationToken": "canary-token"}) for body in bodies]

        assert [answer.status_code for answer in answers] == [200, 401, 400]
        assert len(lab.events()) == 1
        assert not any("canary" in json.dumps(web.lines_of(answer)) for answer in answers)


class TestMalformed:
    """A body that is not an envelope is 400 with a reason; tests/unit/test_events.py has every kind of them."""

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "not_json"),
            (json.dumps({"values": [{"clientState": "x"}]}).encode("utf-16")[:-1], "not_json"),
            (b'{"values":[{"clientState":"\xff"}]}', "not_json"),
            (b'{"values":' + b"[" * 30_000, "not_json"),
            (b"[]", "no_envelope"),
            (b'{"value":{}}', "no_envelope"),
        ],
        ids=lambda value: repr(value)[:24],
    )
    def test_the_answer_names_the_reason(self, web: Web, body: bytes, reason: str) -> None:
        answer = web.post(body)

        assert answer.status_code == 400
        assert answer.json() == {"reason": reason, "request_id": answer.headers["x-request-id"]}


class TestLimits:
    """A body is bounded in size and time; the rest is not read."""

    def test_the_items_of_a_body_are_recorded_in_steps_or_refused_as_a_whole(
        self, valkey: Valkey, lab: Lab, tmp_path: Path
    ) -> None:
        """A script of Redis cannot unpack 8,000 values, and must not hold up other events for long."""
        settings = settings_of_one_company(valkey.url) | {"MAX_ITEMS": "9000", "MAX_BODY_BYTES": str(2**24)}
        program = serve_changed("from app.intake import recorder; recorder.ACCEPT_SECONDS = 15.0")
        with serving(tmp_path, settings, program) as web:
            items = [item() for _ in range(9001)]
            answer = web.post({"values": items})
            assert (answer.status_code, answer.json()["reason"]) == (413, "too_many_items")
            assert (lab.events(), lab.due()) == ([], {})
            assert web.deliver(*items[1:])["queued"] == 9000
            assert len(lab.due()) == len(lab.events()) == 9000

    def test_a_body_of_exactly_the_limit_is_accepted(self, web: Web) -> None:
        body = json.dumps({"values": [item()]}).encode().ljust(MAX_BODY)
        assert web.post(body).status_code == 200
        assert web.post(body + b" ").status_code == 413

    @pytest.mark.parametrize(
        ("body", "encoding", "status", "reason"),
        [
            (gzip.compress(b" " * (MAX_BODY + 1)), "gzip", 413, "body_too_large"),
            (BOMB, "gzip", 413, "body_too_large"),
            (gzip.compress(b"{}")[:-1], "gzip", 400, "not_gzip"),
            (gzip.compress(b"{}") + b"more", "gzip", 400, "not_gzip"),
            (b"{}", "gzip", 400, "not_gzip"),
            (b"{}", "br", 415, "unknown_encoding"),
            (b"{}", "gzip, gzip", 415, "unknown_encoding"),
            (b"{}", "deflate", 415, "unknown_encoding"),
        ],
        ids=lambda value: "" if isinstance(value, bytes) else None,
    )
    def test_a_compressed_body_is_bounded_too(
        self, web: Web, body: bytes, encoding: str, status: int, reason: str
    ) -> None:
        answer = web.post(body, headers={"content-encoding": encoding})

        assert (answer.status_code, answer.json()["reason"]) == (status, reason)
        assert answer.headers.get("accept-encoding") == ("gzip" if status == 415 else None)

    @pytest.mark.parametrize(
        ("sent", "status", "reason"),
        [
            (post(b"", f"content-length: {MAX_BODY + 1}", "expect: 100-continue"), 413, "body_too_large"),
            (post(b'{"val', "content-length: 100"), 408, "body_too_slow"),
        ],
        ids=["large", "slow"],
    )
    def test_a_large_or_slow_body_is_refused_unread(self, broken: Web, sent: bytes, status: int, reason: str) -> None:
        answer = talk(broken, sent)

        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"connection: close" in answer.lower()
        assert f'"reason":"{reason}"'.encode() in answer

    def test_an_endless_chunked_body_is_refused_and_the_rest_left_unread(self, web: Web) -> None:
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        sent = 0
        with web.connect() as connection:
            connection.sendall(post(b"", "transfer-encoding: chunked"))
            answer = b""
            try:
                while sent < 100 * MAX_BODY:
                    connection.sendall(chunk)
                    sent += len(chunk)
                answer = read_all(connection)
            except (BrokenPipeError, ConnectionResetError):
                pass

        # What the two sockets' buffers swallow comes on top of the limit.
        assert sent < 40 * MAX_BODY
        assert not answer or answer.startswith(b"HTTP/1.1 413 ")
        assert any(line["event"] == "request" and line["status"] == 413 for line in web.lines())

    def test_a_body_that_never_ends_is_408_although_bytes_keep_coming(self, broken: Web) -> None:
        answer = trickle(broken, post(b"{", "content-length: 1000"), b" ")

        assert answer.startswith(b"HTTP/1.1 408 ")

    def test_a_sender_that_disconnects_leaves_one_line_and_no_traceback(self, web: Web) -> None:
        before = len(web.lines())
        with web.connect() as connection:
            connection.sendall(post(b'{"val', "content-length: 100"))

        eventually(lambda: web.lines()[before + 1 :], what="the line of the request")
        lines = web.lines()[before:]
        assert [line["event"] for line in lines] == ["request.client_disconnected", "request"]
        assert "trace" not in json.dumps(lines).lower()


class TestOtherRequests:
    @pytest.mark.parametrize("path", ["/", "/docs", f"{HOOK}//", f"{HOOK}/x", "//evil.example", "/%00", "/healthz/"])
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_other_paths_are_404(self, web: Web, method: str, path: str) -> None:
        assert web.http.request(method, f"http://127.0.0.1:{web.port}{path}").status_code == 404

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
    def test_other_methods_are_405_with_the_method_that_is_allowed(self, web: Web, method: str) -> None:
        answer = web.http.request(method, HOOK)

        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")

    def test_an_internal_error_is_one_500_without_its_text_and_the_server_works_on(self, broken: Web) -> None:
        answer = broken.post({"values": [item()]})

        assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (500, "text/plain")
        assert "canary" not in answer.text
        failed, line = broken.lines_of(answer)
        assert (failed["event"], failed["error"], line["status"]) == ("request.failed", "RuntimeError", 500)
        assert "accept" in failed["trace"]
        for _ in range(3):
            assert broken.http.get("/metrics", headers=OPS).status_code == 500
        assert broken.http.get("/healthz").status_code == 200
        lines = broken.lines()
        assert {line["event"] for line in lines if line["level"] == "error"} <= {"request.failed"}
        assert "canary" not in json.dumps(lines)


class TestLogs:
    def test_each_request_has_one_canonical_line_with_its_request_id(self, web: Web) -> None:
        one = item()
        answers = [
            web.post({"values": [one, one, item(eventName="x"), 5]}),
            web.post({"values": [item(clientState=WRONG)]}),
            web.http.get(HOOK, params={"validationToken": "token"}),
        ]

        first, second, third = map(web.line_of, answers)
        assert len({answer.headers["x-request-id"] for answer in answers}) == 3
        assert (first["method"], first["path"], first["status"], first["level"]) == ("POST", HOOK, 200, "info")
        counts = ("events", "queued", "duplicates", "ignored", "invalid_items")
        assert [first[name] for name in counts] == [4, 1, 1, 1, 1]
        assert first["bytes"] == int(answers[0].request.headers["content-length"])
        assert 0 < first["duration_ms"] < 5000
        assert (second["status"], second["reason"]) == (401, "unauthenticated")
        assert (third["method"], third["status"], third["path"]) == ("GET", 200, HOOK)

    @pytest.mark.parametrize(
        ("number", "method", "path", "status", "more"),
        [
            (3, "GET", "/wp-login.php", 404, {}),
            (4, "POST", "/wp-login.php", 404, {}),
            (5, "DELETE", HOOK, 405, {}),
            (6, "GET", HOOK, 405, {}),
            (7, "GET", "/metrics", 401, {}),
            (8, "POST", HOOK, 400, {"content": b"no JSON"}),
            (9, "POST", HOOK, 401, {"json": {"values": [item(clientState=WRONG)]}}),
            (10, "POST", HOOK, 413, {"content": b" " * (MAX_BODY + 1)}),
            (11, "POST", HOOK, 415, {"headers": {"content-encoding": "br"}}),
        ],
    )
    def test_a_flood_of_what_anybody_can_send_is_one_line_a_second_for_each_sender(
        self, web: Web, number: int, method: str, path: str, status: int, more: dict[str, Any]
    ) -> None:
        """A proxy's own address is no sender, and only a proxy is believed."""
        behind, direct = f"203.0.113.{number}", f"127.0.0.{number}"
        before = len(web.lines())
        started = time.monotonic()
        through_proxy = {**more, "headers": {**more.get("headers", {}), "x-forwarded-for": f"6.6.6.6, {behind}"}}
        with stranger(web, direct) as other:
            for _ in range(30):
                for client in (web.http, other):
                    assert client.request(method, path, **through_proxy).status_code == status

        def of(sender: str) -> list[dict[str, Any]]:
            lines = [line for line in web.lines()[before:] if line.get("sender") == sender]
            assert {line["status"] for line in lines} <= {status}
            return lines

        for sender in (behind, direct):
            eventually(
                lambda sender=sender: sum(line.get("requests", 1) for line in of(sender)) == 30,  # type: ignore[misc]
                what="all are accounted for",
            )
            assert len(of(sender)) <= time.monotonic() - started + 2
            first, *rest = of(sender)
            assert (first["event"], first["path"]) == ("request", path)
            assert {line["event"] for line in rest} == {"requests.unlogged"}
            assert not any("request_id" in line for line in rest)
        assert {line["event"] for line in web.lines()[before:]} <= {"request", "requests.unlogged", "auth.alert"}

    def test_a_post_near_the_webhook_is_counted_and_warned_of_once_with_the_right_path(
        self, redis_url: str, lab: Lab, tmp_path: Path
    ) -> None:
        """A subscription to such an address would lose every event. What scanners ask for is none of it."""
        near = [
            *("/webhooks/ota", "/webhook/ota/x", f"/{HOOK}", HOOK.upper(), f"/api{HOOK}/", HOOK.replace("-", "_")),
            *(f"/webhook/{number}" for number in range(NEAR_PATHS)),
        ]
        with serving(tmp_path, settings_of_one_company(redis_url)) as web:
            for path in (*near, "/webhooks/ota"):
                url = f"http://127.0.0.1:{web.port}{path}"
                assert web.http.post(url, json={}).status_code == 404
            for method, path in (("POST", "/"), ("POST", "/xmlrpc.php"), ("GET", "/webhooks/ota"), ("POST", "/readyz")):
                web.http.request(method, f"http://127.0.0.1:{web.port}{path}")

            # The process of the other tests writes its own counts here.
            counted = eventually(lambda: lab.counters("requests|404"), what="the counts are written")

            warned = [line for line in web.lines() if line["event"] == "request.near_webhook"]
        assert counted == {"requests|404": len(near) + 1}
        assert [line["path"] for line in warned] == near[:NEAR_PATHS]
        assert warned[0]["advice"].startswith(f"The webhook is {HOOK}: ")

    @pytest.mark.parametrize(
        ("peer", "forwarded", "sender"),
        [
            ("127.0.0.1", [], "127.0.0.1"),
            ("127.0.0.1", ["203.0.113.7"], "203.0.113.7"),
            ("::ffff:127.0.0.1", ["203.0.113.7"], "203.0.113.7"),
            ("::ffff:192.0.2.1", ["203.0.113.7"], "192.0.2.1"),
            ("2001:db8::7", [], "2001:db8::7"),
            ("127.0.0.1", ["6.6.6.6, 203.0.113.7, 10.1.2.3"], "203.0.113.7"),
            ("127.0.0.1", ["6.6.6.6", "203.0.113.7"], "203.0.113.7"),
            ("127.0.0.1", ["10.9.9.9"], "10.9.9.9"),
            ("127.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
            ("127.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::7"),
            ("127.0.0.1", ["203.0.113.7, unknown"], "127.0.0.1"),
            ("127.0.0.1", [""], "127.0.0.1"),
            ("127.0.0.1", ["fe80::7%canary"], "fe80::7"),
            ("fe80::1%eth0", ["203.0.113.7"], "203.0.113.7"),
            ("192.0.2.1", ["203.0.113.7"], "192.0.2.1"),
        ],
    )
    def test_the_sender_is_the_last_address_that_is_no_proxys(
        self, peer: str, forwarded: list[str], sender: str
    ) -> None:
        proxies = Proxies([ip_network(one) for one in ("127.0.0.1", "10.0.0.0/8", "fe80::1")])
        headers = [(b"x-forwarded-for", one.encode()) for one in forwarded]

        assert proxies.sender({"client": (peer, 1), "headers": headers}) == sender

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        ],
    )
    def test_a_flood_of_what_is_no_http_is_one_line_a_second(self, web: Web, sent: bytes, status: int) -> None:
        before = len(web.lines())
        started = time.monotonic()
        for _ in range(30):
            assert f" {status} ".encode() in talk(web, sent)

        def lines() -> list[dict[str, Any]]:
            return [line for line in web.lines()[before:] if line["status"] == status]

        eventually(lambda: sum(line["requests"] for line in lines()) == 30, what="all are accounted for")
        assert len(lines()) <= time.monotonic() - started + 2
        assert {(line["event"], line["status"], line["sender"]) for line in lines()} == {
            ("request.unreadable", status, "127.0.0.1")
        }

    def test_rejected_items_are_logged_by_company(self, web: Web) -> None:
        """Of a POST without a good item the line of the request has the company that most items name."""
        mixed = web.post({"values": [item(), item(clientState=WRONG), item(companyId=STRANGER)]})
        refused = web.post({"values": [item(clientState=WRONG), item(companyId=STRANGER), item(clientState=WRONG)]})

        rejected = [line for line in web.lines_of(mixed) if line["event"] == "auth.rejected"]
        found = {(line["company"], line["items"], line["level"]) for line in rejected}
        assert found == {(COMPANY, 1, "warning"), ("unknown", 1, "warning")}
        assert web.line_of(refused)["company"] == COMPANY

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ([("x-request-id", "a1B2-c3/d4=")], "a1B2-c3/d4="),
            ([("x-request-id", "x" * 128)], "x" * 128),
            ([("x-request-id", "x" * 129)], None),
            ([("x-request-id", "two words")], None),
            ([("x-request-id", "caf\xe9")], None),
            ([("x-request-id", "")], None),
            ([("x-request-id", "one"), ("x-request-id", "two")], None),
        ],
    )
    def test_the_id_of_a_trusted_proxy_is_kept_beside_our_own(
        self, web: Web, headers: list[tuple[str, str]], expected: str | None
    ) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        with stranger(web) as other:
            answers = [client.post(HOOK, json={"values": [item()]}, headers=raw) for client in (web.http, other)]

        ours, strange = map(web.line_of, answers)
        assert ours.get("proxy_request_id") == expected
        assert "proxy_request_id" not in strange
        assert len({answer.headers["x-request-id"] for answer in answers}) == 2

    def test_a_traceparent_is_on_the_lines_of_the_request_and_in_the_record(self, web: Web, lab: Lab) -> None:
        trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        given = [f"00-{trace}-{parent}-01", f"ff-{trace}-{parent}-01"]
        posted = [item(), item()]
        answers = [
            web.post({"values": [one]}, headers={"traceparent": header})
            for one, header in zip(posted, given, strict=True)
        ]

        lines = [[line.get(name) for name in ("trace_id", "parent_id")] for line in map(web.line_of, answers)]
        assert lines == [[trace, parent], [None, None]]
        kept = [lab.field("traceparent", key_of(one)) for one in posted]
        assert kept == [given[0], None]

    def test_successful_probes_are_not_logged(self, web: Web) -> None:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert web.http.get(path, headers=OPS).status_code == 200
        web.line_of(web.http.get("/nowhere"))

        assert not {line["path"] for line in web.lines() if "path" in line} & {"/healthz", "/readyz"}


class TestProbes:
    def test_readyz_is_one_word_and_has_details_with_the_ops_token(self, web: Web) -> None:
        answer, detail = web.http.get("/readyz"), web.http.get("/readyz", headers=OPS).json()

        assert (answer.status_code, answer.text, detail["state"]) == (200, "ready\n", "ready")
        names = {"redis", "writable", "durable", "memory", "schema"}
        assert {check["check"] for check in detail["checks"]} == names

    @pytest.mark.parametrize(
        "bearer", ["", "Bearer", "Bearer wrong", f"Bearer {OPS_TOKEN}x", f"Basic {OPS_TOKEN}", "Bearer \xe9"]
    )
    def test_a_wrong_bearer_gets_no_details(self, web: Web, bearer: str) -> None:
        headers = {b"authorization": bearer.encode("latin-1")}

        assert web.http.get("/readyz", headers=headers).text == "ready\n"
        answer = web.http.get("/metrics", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")

    def test_metrics_count_events_invalid_items_and_answers(self, web: Web) -> None:
        one = item(clientState=FORMER_SECRET)
        web.deliver(one, one, item(), item(eventName="x"), item(clientState=WRONG), 7)
        web.post({"values": [item(clientState=WRONG)]})
        exact = {
            "ota_events_total default queued": 2,
            "ota_events_total default duplicate": 1,
            "ota_events_by_secret_total default previous": 2,
            "ota_events_by_secret_total default current": 1,
            "ota_orders_due": 2,
            "ota_orders_dead": 0,
        }
        # Counts that earlier tests made within the last second may be among these.
        at_least = {
            "ota_items_invalid_total unauthenticated": 2,
            "ota_items_invalid_total unknown_event": 1,
            "ota_items_invalid_total bad_item": 1,
            "ota_requests_total 200": 1,
            "ota_requests_total 401": 1,
            "ota_webhook_seconds_count 200": 1,
            "ota_webhook_seconds_count 401": 1,
        }

        def counted() -> bool:
            answer = web.http.get("/metrics", headers=OPS)
            assert answer.headers["content-type"].startswith("text/plain; version=")
            found = samples(answer.text)
            assert exact.items() <= found.items()
            return all(found.get(name, 0) >= count for name, count in at_least.items())

        eventually(counted, what="the counts of this process are in Redis")

    def test_metrics_exist_only_with_a_token(self, redis_url: str, tmp_path: Path) -> None:
        with serving(tmp_path, settings_of_one_company(redis_url)) as web:
            bearer = {b"authorization": b"Bearer None"}
            assert web.http.get("/metrics", headers=bearer).status_code == 404
            assert web.http.get("/readyz", headers=bearer).text.startswith("ready")


class TestRedisUnavailable:
    def test_a_sender_gets_503_until_redis_is_available_again(self, own_valkey: Valkey, tmp_path: Path) -> None:
        """The web process starts without Redis, refuses within 2.5 s, and needs no restart."""
        own_valkey.stop()
        settings = settings_of_one_company(own_valkey.url) | {"OPS_TOKEN": OPS_TOKEN}
        with serving(tmp_path, settings) as web:
            one = item()
            for attempt in ("closed port", "frozen server"):
                if attempt == "frozen server":
                    own_valkey.restart()
                    assert web.deliver(item())["queued"] == 1
                    own_valkey.pause()
                started = time.monotonic()
                answer = web.post({"values": [one]})

                assert time.monotonic() - started < 2.5
                assert (answer.status_code, answer.json()["reason"]) == (503, "redis_unavailable")
                assert int(answer.headers["retry-after"]) > 0
                assert web.line_of(answer)["status"] == 503
                ready = web.http.get("/readyz")
                assert (ready.status_code, ready.text) == (503, "not ready\n")
                assert web.http.get("/readyz", headers=OPS).json()["checks"][0]["ok"] is False
                assert web.http.get("/healthz").status_code == 200

            # A refusal needs no Redis.
            assert web.post({"values": [item(clientState=WRONG)]}).status_code == 401
            own_valkey.resume()

            receipt = eventually(lambda: web.post({"values": [one]}).json().get("events"), what="accepted again")
            assert receipt == 1
            with Redis.from_url(own_valkey.url) as redis:
                assert key_of(one) in Lab(redis).due()
            assert eventually(lambda: web.http.get("/readyz").text == "ready\n", what="ready again")
            text = json.dumps(web.lines())
            assert "canary" not in text
            assert own_valkey.url.split("@")[0] not in text
            assert "Traceback" not in text
