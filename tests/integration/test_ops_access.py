"""The ops page lets in who may look, lets act who may act, and tells browsers what they may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final
from urllib.parse import quote

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from app.dev.valkey import Valkey
from app.ledger.keys import DEFAULT_PREFIX
from app.ledger.redis import Redis, client_of
from app.ops import app
from app.ops.access import LONGEST_NAME, SENDERS, TRIES, TRIES_SECONDS, Access, Refused
from app.ops.app import LONGEST_BODY, Screen, Visit, application, see_other
from app.ops.pages import FOR_EVER, HEADERS, Pages
from app.settings import parse
from app.web.requests import Proxies
from tests.lab import Lab
from tests.ops_site import ACT, READ, WHO, OpsSite, site_of
from tests.service import settings_of_one_company
from tests.vendor_htmx import STATIC, digest

STOP: Final = {"why": "a guest asked"}


@pytest.fixture(scope="module")
def acting(valkey: Valkey) -> Iterator[OpsSite]:
    """A site with one page, `/kitchen`, one that fails, and the action `/kitchen/stop`, which tells who did it."""
    with site_of(kitchen(valkey, can_act=True)) as site:
        yield site


def kitchen(valkey: Valkey, *, can_act: bool) -> ASGIApp:
    def fail(visit: Visit) -> Response:
        raise ValueError("canary")

    def stop(visit: Visit) -> Response:
        return see_other(f"/kitchen?by={visit.user.who}&why={visit.form['why']}")

    screens = [
        Screen("/kitchen", lambda visit: PlainTextResponse("bread"), frozenset({"by", "why"})),
        Screen("/kitchen/fire", fail),
        Screen("/kitchen/stop", stop, frozenset({"why"}), "POST"),
        Screen("/kitchen/knives", lambda visit: PlainTextResponse("sharp"), needs="act"),
    ]
    access = Access(READ, ACT if can_act else None)
    tokens = {"OPS_TOKEN": READ} | ({"OPS_ACT_TOKEN": ACT} if can_act else {})
    found = parse(settings_of_one_company(valkey.url) | tokens)
    return application(client_of(Redis, valkey.url, DEFAULT_PREFIX), found, Pages(), screens, access)


def title(answer: httpx.Response) -> tuple[int, str]:
    """Return status and title of an error, which must be a page of ours without anything of Python."""
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-request-id"] in answer.text
    assert "Traceback" not in answer.text
    return answer.status_code, answer.text.partition("<title>")[2].partition(" · ")[0]


def basic(credentials: bytes) -> dict[str, str]:
    return {"authorization": f"Basic {base64.b64encode(credentials).decode()}"}


def test_each_password_opens_the_first_screen_and_shows_who_looks(ops: OpsSite, lab: Lab) -> None:
    for password, who, may in ((READ, "Søren Bo", "read only"), (ACT, "李", "")):
        answer = ops.get("/", who, password)

        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert who in answer.text
        assert ("read only" in answer.text) == bool(may)


def test_a_name_is_normalized_and_trimmed() -> None:
    """A decomposed é is one person with the composed one, also in the audit."""
    header = basic(f" Rene\N{COMBINING ACUTE ACCENT} :{READ}".encode())["authorization"]

    assert Access(READ, None).admit(header, "192.0.2.1") == ("Ren\u00e9", "read")


@pytest.mark.parametrize("who", ["", "  ", "a" * (LONGEST_NAME + 1), "two\nlines", "\u202ereversed", "\x1b[2J"])
def test_a_user_without_a_readable_name_is_asked_for_one(acting: OpsSite, who: str) -> None:
    answer = acting.get("/kitchen", who)

    assert title(answer) == (401, "Password needed")
    assert "your own name" in answer.text
    assert answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": f"Bearer {READ}"},
        {"authorization": "Basic"},
        {"authorization": "Basic ###"},
        basic(b"Ada"),
        basic(b"Ada:"),
        basic(f"Ada:{READ}x".encode()),
        basic(b"\xff:" + READ.encode()),
    ],
)
def test_without_the_password_every_address_is_401_also_those_that_are_not_there(
    acting: OpsSite, header: dict[str, str]
) -> None:
    for path in ("/", "/kitchen", "/no-such-page", "/kitchen/stop"):
        for method in ("GET", "POST"):
            answer = acting.http.request(method, path, headers=header)
            assert title(answer) == (401, "Password needed")
            assert "Version" not in answer.text


@pytest.mark.parametrize("path", ["/kitchen", "/no-such-page", "/kitchen/fire", "/healthz", "/static/ops.css"])
def test_every_answer_has_the_headers(acting: OpsSite, path: str) -> None:
    for answer in (acting.get(path), acting.get(path, password="wrong"), acting.act(path, STOP)):
        is_file = answer.status_code == 200 and path.startswith("/static/")
        for name, value in HEADERS.items():
            assert answer.headers.get_list(name) == [value] or (is_file and name == "cache-control")


def test_static_files_need_no_password_and_are_kept_under_an_address_of_their_content(ops: OpsSite, lab: Lab) -> None:
    addresses = re.findall(r'(?:href|src)="(/static/[^"]+)"', ops.read("/"))

    assert {address.partition("?")[0] for address in addresses} >= {"/static/ops.css", "/static/htmx.min.js"}
    for address in addresses:
        answer = ops.http.get(address)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, FOR_EVER["cache-control"])
        assert hashlib.sha256(answer.content).hexdigest()[:12] == address.partition("?v=")[2]
    for other in ("/static/", "/static/none.css", "/static/..%2fapp.py", "/static/htmx.SHA256"):
        assert ops.http.get(other).status_code in {401, 404}


def test_htmx_is_the_released_file_that_its_checksum_names() -> None:
    """tests/vendor_htmx.py renews it."""
    checksum, name = (STATIC / "htmx.SHA256").read_text().split()

    assert digest(STATIC / name) == checksum
    assert "Zero-Clause BSD" in (STATIC / "htmx.LICENSE").read_text()


def test_after_ten_wrong_passwords_a_sender_waits_whatever_it_sends_and_others_do_not(acting: OpsSite) -> None:
    sender, other = {"x-forwarded-for": "192.0.2.10"}, {"x-forwarded-for": "192.0.2.11"}

    tries = [acting.get("/kitchen", password="wrong", **sender).status_code for _ in range(TRIES)]
    right = acting.get("/kitchen", **sender)

    assert tries == [401] * TRIES
    assert title(right) == (429, "Too many tries")
    assert 0 < int(right.headers["retry-after"]) <= TRIES_SECONDS + 1
    assert acting.get("/kitchen", **other).status_code == 200


def test_tries_without_a_header_are_not_counted(acting: OpsSite) -> None:
    """A browser asks first without the password."""
    sender = {"x-forwarded-for": "192.0.2.12"}
    for _ in range(TRIES + 1):
        assert acting.http.get("/kitchen", headers=sender).status_code == 401

    assert acting.get("/kitchen", **sender).status_code == 200


def wrong(access: Access, sender: str) -> int:
    with pytest.raises(Refused) as refused:
        access.admit(basic(b"Ada:wrong")["authorization"], sender)
    return refused.value.status


def test_a_sender_may_try_again_after_a_minute() -> None:
    now = [0.0]
    access = Access(READ, None, lambda: now[0])

    assert [wrong(access, "192.0.2.1") for _ in range(TRIES + 1)] == [401] * TRIES + [429]
    now[0] = TRIES_SECONDS - 0.1
    assert wrong(access, "192.0.2.1") == 429
    now[0] = TRIES_SECONDS
    assert access.admit(basic(f"Ada:{READ}".encode())["authorization"], "192.0.2.1").who == "Ada"


def test_the_tries_of_a_network_of_ipv6_are_those_of_one_sender() -> None:
    access = Access(READ, None)

    tries = [wrong(access, f"2001:db8:0:1::{number:x}") for number in range(TRIES + 1)]

    assert tries == [401] * TRIES + [429]
    assert wrong(access, "2001:db8:0:2::1") == 401


def test_two_addresses_of_ipv4_are_two_senders_also_on_a_socket_of_ipv6() -> None:
    access, proxies = Access(READ, None), Proxies([])

    def sender(address: str) -> str:
        return proxies.sender({"client": (f"::ffff:{address}", 1), "headers": []})

    assert [wrong(access, sender("192.0.2.1")) for _ in range(TRIES + 1)] == [401] * TRIES + [429]
    assert wrong(access, sender("192.0.2.2")) == 401


def test_the_memory_of_tries_is_bounded() -> None:
    access = Access(READ, None)
    for number in range(SENDERS + 50):
        wrong(access, str(ip_address("198.18.0.0") + number))

    assert len(access._wrong) == SENDERS


def test_an_action_is_done_with_who_and_why_and_shows_a_page_again(acting: OpsSite) -> None:
    answer = acting.act("/kitchen/stop", STOP)

    assert answer.status_code == 303
    assert answer.headers["location"] == f"/kitchen?by={quote(WHO)}&why=a%20guest%20asked"


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (303, {"sec-fetch-site": "same-origin", "origin": "null"}),
        (303, {"sec-fetch-site": "none"}),
        (303, {"sec-fetch-site": ""}),
        (403, {"sec-fetch-site": "same-site"}),
        (403, {"sec-fetch-site": "cross-site"}),
        (403, {"sec-fetch-site": "none", "origin": "null"}),
        (403, {"sec-fetch-site": "", "origin": ""}),
        (403, {"sec-fetch-site": "", "origin": "null"}),
        (403, {"sec-fetch-site": "", "origin": "https://evil.example"}),
        (403, {"sec-fetch-site": "", "origin": "http://127.0.0.1"}),
        (403, {"sec-fetch-site": "", "origin": "http://[::1"}),
    ],
)
def test_an_action_of_another_site_is_refused(acting: OpsSite, status: int, headers: dict[str, str]) -> None:
    """An empty value here: the header is not sent."""
    sent = {"origin": acting.url, **headers} | basic(f"{WHO}:{ACT}".encode())
    answer = acting.http.post("/kitchen/stop", data=STOP, headers={k: v for k, v in sent.items() if v})

    assert answer.status_code == status
    if status == 403:
        assert title(answer) == (403, "The action was refused")


def test_the_password_that_reads_cannot_act(acting: OpsSite) -> None:
    headers = {"origin": acting.url, "sec-fetch-site": "same-origin"} | basic(f"{WHO}:{READ}".encode())

    assert title(acting.http.post("/kitchen/stop", data=STOP, headers=headers)) == (403, "You may only look")
    assert title(acting.get("/kitchen/knives")) == (403, "You may only look")
    assert acting.get("/kitchen/knives", password=ACT).text == "sharp"


def test_without_the_second_password_no_action_is_there(valkey: Valkey) -> None:
    with site_of(kitchen(valkey, can_act=False)) as site:
        headers = {"origin": site.url, "sec-fetch-site": "same-origin"} | basic(f"{WHO}:{READ}".encode())

        assert title(site.http.post("/kitchen/stop", data=STOP, headers=headers)) == (404, "Not found")
        assert title(site.get("/kitchen/knives")) == (404, "Not found")
        assert title(site.get("/kitchen", password=ACT)) == (401, "Password needed")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (413, b"why=" + b"a" * LONGEST_BODY, "application/x-www-form-urlencoded"),
        (415, b'{"why": "json"}', "application/json"),
        (415, b"why=plain", "text/plain"),
        (400, b"why=\xff", "application/x-www-form-urlencoded"),
        (400, b"why=%ff", "application/x-www-form-urlencoded"),
        (400, b"why=a&why=b", "application/x-www-form-urlencoded"),
        (400, b"why=a&sink=shop", "application/x-www-form-urlencoded"),
        (400, b"&".join(b"a%d=" % number for number in range(100)), "application/x-www-form-urlencoded"),
    ],
)
def test_a_body_that_is_no_form_of_ours_is_refused(acting: OpsSite, status: int, body: bytes, kind: str) -> None:
    headers = {"origin": acting.url, "sec-fetch-site": "same-origin", "content-type": kind}
    answer = acting.http.post("/kitchen/stop", content=body, headers=headers | basic(f"{WHO}:{ACT}".encode()))

    assert title(answer)[0] == status


def test_a_body_that_comes_too_slowly_is_408(acting: OpsSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    credentials = basic(f"{WHO}:{ACT}".encode())["authorization"]
    head = f"POST /kitchen/stop HTTP/1.1\r\nhost: x\r\nauthorization: {credentials}\r\nsec-fetch-site: same-origin\r\n"
    host, _, port = acting.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{head}content-length: 9\r\n\r\nwhy=".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("query", ["?why=a&why=b", "?sort=when", "?by=a&=", "?by&sort="])
def test_a_filter_that_would_have_no_effect_is_refused(acting: OpsSite, query: str) -> None:
    assert title(acting.get(f"/kitchen{query}"))[0] == 400


def test_an_empty_filter_is_none(acting: OpsSite) -> None:
    """A form sends all its fields."""
    assert acting.get("/kitchen?by=&why=%20").status_code == 200


def test_other_methods_are_405_and_a_head_is_a_get_without_its_body(acting: OpsSite) -> None:
    headers = basic(f"{WHO}:{ACT}".encode())
    for path, method, allowed in (("/kitchen", "POST", "GET, HEAD"), ("/kitchen/stop", "GET", "POST")):
        answer = acting.http.request(method, path, headers=headers)
        assert (title(answer)[0], answer.headers["allow"]) == (405, allowed)
    head = acting.http.head("/kitchen", headers=headers)
    assert (head.status_code, head.text) == (200, "")


def test_an_internal_error_is_a_page_with_the_id_of_its_log_line(acting: OpsSite) -> None:
    answer = acting.get("/kitchen/fire")

    assert title(answer) == (500, "Internal error")
    assert "canary" not in answer.text


def test_what_a_visitor_writes_is_shown_as_text(ops: OpsSite, lab: Lab) -> None:
    page = ops.get("/", who="<script>alert(1)</script>").text

    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
