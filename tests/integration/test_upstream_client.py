"""The client against a server that answers what a test says: each answer, and each silence, has one meaning."""

from __future__ import annotations

import gzip
import json
import ssl
import subprocess
import time
import traceback
import tracemalloc
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from app.errors import (
    ConnectionFault,
    OrderNotFound,
    RequestRejected,
    Throttled,
    Unavailable,
    UnreadableAnswer,
    UpstreamError,
)
from app.upstream.client import MAX_ANSWER_BYTES, ChannelManager, translated_errors
from app.upstream.decode import digest
from app.upstream.transport import DeadlineTransport, tls_context
from tests.integration.relay import Proxy
from tests.lab import PARTNER, Lab, company
from tests.lab_upstream import Reply, Upstream, fake_upstream, raw, says, says_json
from tests.samples import ORDER_ID, sample
from tests.service import COMPANY, SELF_SIGNED

ISSUED = sample("order-issued")
OTHER_ID = "11111111-2b71-4d23-9d6a-a3b4c5d6e7f8"
API_KEY = "np-key-that-is-shown-nowhere"
ROOT = "/tenant/Production/CRONUS%20International%20Ltd."
SECONDS = 0.4


def page(*rows: dict[str, str], key: str = "") -> Reply:
    return says_json({"morePages": bool(key), "nextPageKey": key, "nextPageURL": "", "data": rows})


@pytest.fixture
def http() -> Iterator[DeadlineTransport]:
    with DeadlineTransport(SECONDS) as client:
        yield client


@pytest.fixture
def channel(http: DeadlineTransport, upstream: Upstream) -> ChannelManager:
    return manager(http, upstream.url)


def manager(http: DeadlineTransport, url: str, **changed: Any) -> ChannelManager:
    museum = company("museum", COMPANY, "CRONUS International Ltd.", "tenant", "Production", api_key=API_KEY)
    return ChannelManager(http, museum.model_copy(update=changed), "2026-08-21", url)


def failure(call: Callable[[], object]) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_get_order_sends_one_request_with_key_and_version_and_returns_the_order(
    channel: ChannelManager, upstream: Upstream, encoding: str
) -> None:
    """Its repr shows no guest and no body."""
    upstream.will(says(200, gzip.compress(ISSUED) if encoding == "gzip" else ISSUED, content_encoding=encoding))

    fetched = channel.get_order(ORDER_ID)

    assert (fetched.order.order_id, len(fetched.order.tickets)) == (ORDER_ID, 2)
    assert (fetched.raw, fetched.digest, fetched.http_status) == (ISSUED, digest(ISSUED), 200)
    assert 0 < fetched.seconds < SECONDS
    (asked,) = upstream.asked
    assert (asked.method, asked.target) == ("GET", f"{ROOT}/channelManager/{ORDER_ID}")
    assert (asked.headers["x-np-api-key"], asked.headers["x-api-version"]) == (API_KEY, "2026-08-21")
    assert asked.headers["user-agent"].startswith("ota-receiver/")
    assert [text in repr(fetched) for text in (ORDER_ID, "Jane", "TK-0")] == [True, False, False]


def test_a_company_name_is_encoded_once(http: DeadlineTransport, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED))

    manager(http, upstream.url, np_company="100% A/B ø").get_order(ORDER_ID)

    assert upstream.asked[0].target.startswith("/tenant/Production/100%25%20A%2FB%20%C3%B8/channelManager/")


def test_calls_share_one_warm_connection_and_no_cookie(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED, set_cookie="a=b; Path=/"), says(404, b'{"code": "resource_not_found"}'))

    channel.get_order(ORDER_ID)
    for _ in range(2):
        failure(lambda: channel.get_order(ORDER_ID))

    assert (len(upstream.asked), len(upstream.callers)) == (3, 1)
    assert not any("cookie" in asked.headers for asked in upstream.asked)


def test_no_proxy_or_netrc_is_used(upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    upstream.will(says(200, ISSUED))

    with DeadlineTransport(SECONDS) as http:
        manager(http, upstream.url).get_order(ORDER_ID)

    assert "authorization" not in upstream.asked[0].headers


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the certificate of a host that only the proxy knows."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        SELF_SIGNED.replace("IP:127.0.0.1", "DNS:api.example.test").split(), cwd=folder, check=True, capture_output=True
    )
    return folder


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """Trust the certificate, and return the TLS context of its server."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "all.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "all.pem", certificate / "key.pem")
    tls_context.cache_clear()
    yield context
    tls_context.cache_clear()


@pytest.mark.parametrize(
    ("user", "refusal", "problem"),
    [
        ("", "", ""),
        ("me%40corp:canary%2Fpass@", "", ""),
        ("me:canary@", "", "proxy_407. Correct user and password in NP_PROXY"),
        ("", "403 Forbidden", "proxy_403. Allow the host of NP_BASE_URL"),
        ("", "502 Bad Gateway", "proxy_502. Look at the log of the proxy"),
        ("", "away", "proxy_unreachable. Correct NP_PROXY"),
    ],
)
def test_every_call_goes_through_np_proxy_and_its_errors_are_named(
    lab: Lab, trusted: ssl.SSLContext, certificate: Path, user: str, refusal: str, problem: str
) -> None:
    """The proxy knows the host of the API, reads nothing of a call, and its password is shown nowhere."""
    authorization = f"Basic {b64encode(b'me@corp:canary/pass').decode()}" if user else ""
    with fake_upstream(trusted) as upstream:
        proxy = Proxy(int(upstream.port), authorization, refusal)
        upstream.will(says_json({"value": []}))
        if refusal == "away":
            proxy.end()
        ended = lab.run_command(
            *("subscription", "list", "--company", "venue"),
            NP_BASE_URL="https://api.example.test",
            NP_PROXY=f"http://{user}127.0.0.1:{proxy.port}",
            SSL_CERT_FILE=str(certificate / "all.pem"),
        )
        if refusal != "away":
            proxy.end()

    assert (ended.code == 6, problem in ended.err) == (problem != "", True), ended
    assert [head.split("\r\n", 1)[0] for head in proxy.asked] == ["CONNECT api.example.test:443 HTTP/1.1"] * (
        refusal != "away"
    )
    assert len(upstream.asked) == (problem == "")
    assert "canary" not in ended.out + ended.err


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_certificates_that_are_none_stop_the_start_by_name(lab: Lab, tmp_path: Path, content: bytes | None) -> None:
    """A worker would die with each call."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    tls_context.cache_clear()

    worker, check = (lab.run_command(name, SSL_CERT_FILE=str(path)) for name in ("worker", "check"))

    assert [(one.code, "SSL_CERT_FILE: " in one.out + one.err) for one in (worker, check)] == [(2, True)] * 2
    assert lab.run_command("worker", SSL_CERT_DIR=str(path)).code == 2


@pytest.mark.parametrize("order_id", ["", "42", ORDER_ID.upper(), f"{ORDER_ID}/confirm", f"{ORDER_ID}\n", "../x"])
def test_only_canonical_guids_are_sent(channel: ChannelManager, upstream: Upstream, order_id: str) -> None:
    for call in (channel.get_order, channel.delete_order, channel.delete_subscription):
        with pytest.raises(ValueError, match="GUID"):
            call(order_id)

    assert upstream.asked == []


def test_confirm_and_delete_name_the_order_in_the_path(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED))

    channel.confirm_order(ORDER_ID, "PAY-1")
    channel.delete_order(ORDER_ID)

    assert [(asked.method, asked.target.removeprefix(ROOT), asked.body) for asked in upstream.asked] == [
        ("POST", f"/channelManager/{ORDER_ID}/confirm", b'{"paymentReference":"PAY-1"}'),
        ("DELETE", f"/channelManager/{ORDER_ID}", b""),
    ]
    assert upstream.asked[0].headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("status", "code", "kind", "reason"),
    [
        (404, "resource_not_found", OrderNotFound, "order_not_found"),
        (404, "", ConnectionFault, "not_found"),
        (404, "generic_error", ConnectionFault, "not_found"),
        (404, "saas_company_not_found", ConnectionFault, "company_not_found"),
        (400, "saas_tenant_not_found", ConnectionFault, "tenant_not_found"),
        (403, "saas_environment_not_found", ConnectionFault, "environment_not_found"),
        (401, "", ConnectionFault, "unauthorized"),
        (403, "generic_error", ConnectionFault, "forbidden"),
        (301, "", ConnectionFault, "redirected"),
        (304, "", ConnectionFault, "redirected"),
        (400, "generic_error", RequestRejected, "bad_request"),
        (405, "unsupported_http_method", RequestRejected, "http_405"),
        (410, "", RequestRejected, "http_410"),
        (422, "", RequestRejected, "http_422"),
        (429, "", Throttled, "throttled"),
        (408, "server_timeout", Unavailable, "http_408"),
        (500, "", Unavailable, "http_500"),
        (503, "saas_company_not_found", Unavailable, "http_503"),
        (599, "", Unavailable, "http_599"),
    ],
)
def test_each_refusal_has_one_meaning_and_one_reason_code(
    channel: ChannelManager,
    upstream: Upstream,
    status: int,
    code: str,
    kind: type[UpstreamError],
    reason: str,
) -> None:
    """No redirect is followed with the key."""
    answer = {"code": code, "message": "Jane Doe is not amused"}
    upstream.will(says_json(answer, status, location=f"{upstream.url}/elsewhere"), says(200, ISSUED))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, str(error)) == (kind, reason, reason)
    assert error.http_status == status
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b"\xff", b'{"code": 7}', b"x" * 200_000])
def test_an_unreadable_refusal_is_named_by_its_status(channel: ChannelManager, upstream: Upstream, body: bytes) -> None:
    upstream.will(says(503, body, retry_after="7"))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, error.retry_after) == (Unavailable, "http_503", 7.0)


@pytest.mark.parametrize("status", [429, 408, 503])
@pytest.mark.parametrize(
    ("sent", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("9" * 400, 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2099 07:28:00 -0000", 3600.0),
        ("-5", None),
        ("1.5", None),
        ("nan", None),
        ("soon", None),
        ("Wed, 99 Oct 2099 99:99:99 GMT", None),
        ("", None),
    ],
    ids=lambda value: str(value)[:9],
)
def test_retry_after_is_limited_to_an_hour_and_ignored_when_unreadable(
    channel: ChannelManager, upstream: Upstream, status: int, sent: str, seconds: float | None
) -> None:
    upstream.will(says(status, retry_after=sent))

    assert failure(lambda: channel.get_order(ORDER_ID)).retry_after == seconds


def test_retry_after_may_be_a_date(channel: ChannelManager, upstream: Upstream) -> None:
    at = datetime.now(UTC) + timedelta(seconds=90)
    upstream.will(says(503, retry_after=format_datetime(at, usegmt=True)))

    assert failure(lambda: channel.get_order(ORDER_ID)).retry_after == pytest.approx(60, abs=30)


@pytest.mark.parametrize("body", [b"", b"<html>Welcome</html>", b"{}", b"[" * 100_000, b"\xff\xfe", ISSUED[:-9]])
def test_an_answer_that_is_not_an_order_is_unreadable(channel: ChannelManager, upstream: Upstream, body: bytes) -> None:
    upstream.will(says(200, body))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, error.http_status) == (UnreadableAnswer, "unreadable_answer", 200)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (says(200, ISSUED.replace(ORDER_ID.encode(), OTHER_ID.encode())), "wrong_order"),
        (says(200, gzip.compress(gzip.compress(ISSUED)), content_encoding="gzip, gzip"), "unreadable_answer"),
        (says(200, b"not compressed at all", content_encoding="gzip"), "unreadable_answer"),
    ],
    ids=["another order", "unsupported encoding", "broken encoding"],
)
def test_another_order_is_unreadable(channel: ChannelManager, upstream: Upstream, answer: Reply, reason: str) -> None:
    upstream.will(answer)

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason) == (UnreadableAnswer, reason)


@pytest.mark.parametrize(
    "answer",
    [
        raw(),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length : 3000\r\n\r\n", b"{"),
        raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"zz\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b"HTTP/1.1 99999 What\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 300_000),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + ISSUED[:100]),
    ],
)
def test_a_broken_answer_is_a_fault_of_the_network(channel: ChannelManager, upstream: Upstream, answer: Reply) -> None:
    upstream.will(answer)

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, error.http_status) == (Unavailable, "network", None)


def test_no_port_or_no_tls_is_a_network_fault(http: DeadlineTransport, upstream: Upstream, free_port: int) -> None:
    for address in (f"http://127.0.0.1:{free_port}", upstream.url.replace("http:", "https:")):
        error = failure(lambda url=address: manager(http, url).get_order(ORDER_ID))  # type: ignore[misc]

        assert (type(error), error.reason) == (Unavailable, "network")


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((), b""),
        ((), b"H"),
        ((OK,), b"x: y\r\n"),
        ((), b"HTTP/1.1 100 Continue\r\n\r\n"),
        ((OK, b"\r\n"), b" "),
        ((OK, b"transfer-encoding: chunked\r\n\r\n"), b"1\r\n \r\n"),
        ((b"HTTP/1.1 500 No\r\n", b"\r\n"), b" "),
    ],
    ids=["silence", "status line", "headers", "interim answers", "body", "chunks", "refusal"],
)
def test_a_call_ends_at_its_deadline_while_bytes_keep_arriving(
    channel: ChannelManager, upstream: Upstream, first: tuple[bytes, ...], then: bytes
) -> None:
    upstream.will(upstream.slowly(*first, then=then, every=SECONDS / 10))
    started = time.monotonic()

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason) == (Unavailable, "timeout")
    assert SECONDS * 0.9 < time.monotonic() - started < SECONDS * 3


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize(
    "head", [b"", b"content-encoding: gzip\r\n\r\n" + gzip.compress(b"{}")], ids=["plain", "after gzip"]
)
def test_an_endless_answer_is_cut_off(upstream: Upstream, head: bytes, status: int) -> None:
    start = f"HTTP/1.1 {status} Because\r\n".encode() + (head or b"\r\n")
    upstream.will(lambda: chain([start], repeat(b" " * 1_000_000)))

    with DeadlineTransport(20) as http:
        error = failure(lambda: manager(http, upstream.url).get_order(ORDER_ID))

    assert (error.reason, error.http_status) == ("answer_too_large" if status == 200 else "http_503", status)


def test_an_answer_that_unpacks_beyond_the_limit_is_cut_off_before_it_fills_memory(upstream: Upstream) -> None:
    """One of the largest size is read."""
    bomb = gzip.compress(b" " * (5 * MAX_ANSWER_BYTES))
    upstream.will(says(200, ISSUED.ljust(MAX_ANSWER_BYTES)), says(200, bomb, content_encoding="gzip"))

    with DeadlineTransport(20) as http:
        channel = manager(http, upstream.url)
        assert channel.get_order(ORDER_ID).order.order_id == ORDER_ID
        tracemalloc.start()
        error = failure(lambda: channel.get_order(ORDER_ID))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert (type(error), error.reason) == (UnreadableAnswer, "answer_too_large")
    assert peak < 4 * MAX_ANSWER_BYTES


@pytest.mark.parametrize(
    ("one", "count"),
    [(b"{}", 5_500_000), (b'{"assets":[{}]}', 70_000), (b"[]", 200_000), (b"1.5", 1_000_002), (b'""', 5_500_000)],
)
def test_an_order_that_holds_too_much_is_refused_before_it_is_read(upstream: Upstream, one: bytes, count: int) -> None:
    """16 MiB of empty wallets cost half a minute and 1.5 GiB: here a tenth of a second, and nothing but the body."""
    body = b'{"orderId":"%s","status":"Issued","items":[{"wallets":[%s]}]}' % (
        ORDER_ID.encode(),
        b",".join([one] * count),
    )
    upstream.will(says(200, body))
    with DeadlineTransport(20) as http:
        started = time.process_time()
        error = failure(lambda: manager(http, upstream.url).get_order(ORDER_ID))
        took = time.process_time() - started

    assert (type(error), error.reason, error.http_status) == (UnreadableAnswer, "too_many_values", 200)
    assert took < 1


def test_an_order_of_ten_thousand_wallets_is_read(upstream: Upstream, channel: ChannelManager) -> None:
    """It is far below the limit, whatever is in them."""
    tree = json.loads(ISSUED)
    tree["items"][0]["wallets"] = tree["items"][0]["wallets"][:1] * 10_000
    upstream.will(says_json(tree))

    assert len(channel.get_order(ORDER_ID).order.wallets) >= 10_000


FOREIGN_ERRORS: list[type[BaseException]] = [
    *(
        thing
        for thing in vars(httpx).values()
        # Only httpx.Client, which we do not use, raises a CookieConflict.
        if isinstance(thing, type) and issubclass(thing, Exception) and thing is not httpx.CookieConflict
    ),
    *(ssl.SSLCertVerificationError, ConnectionResetError, TimeoutError, UnicodeError, zlib.error),
]


@pytest.mark.parametrize("kind", FOREIGN_ERRORS)
def test_every_library_exception_becomes_one_of_ours_without_its_text(kind: type[BaseException]) -> None:
    thrown = kind.__new__(kind)
    thrown.args = (f"https://host/{API_KEY}",)

    def throw() -> None:
        with translated_errors():
            raise thrown

    error = failure(throw)

    assert isinstance(error, Unavailable | ConnectionFault | UnreadableAnswer)
    assert API_KEY not in "".join(traceback.format_exception(error))


def test_httpx_has_the_errors_this_test_believes_it_has() -> None:
    assert {httpx.ReadTimeout, httpx.PoolTimeout, httpx.ConnectError, httpx.InvalidURL} < {*FOREIGN_ERRORS}
    assert len(FOREIGN_ERRORS) > 25


@pytest.mark.parametrize(
    ("address", "key"),
    [
        *((None, key) for key in ("schlüssel-geheim", "line\r\nbreak-geheim", "null\x00geheim")),
        *((address, "geheim") for address in ("ftp://127.0.0.1", "https://host:port", "//nowhere", "https://\x00")),
    ],
)
def test_a_key_or_address_that_http_cannot_use_is_a_fault_of_the_connection_and_no_key_is_shown(
    http: DeadlineTransport, upstream: Upstream, address: str | None, key: str
) -> None:
    channel = manager(http, address or upstream.url, np_api_key=SecretStr(key))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason) == (ConnectionFault, "unsendable_request")
    assert "geheim" not in "".join(traceback.format_exception(error))


def test_each_page_is_requested_when_it_is_read(channel: ChannelManager, upstream: Upstream) -> None:
    rows = [{"orderId": ORDER_ID, "status": "Draft", "rowVersion": str(version)} for version in (8, 9, 10)]
    upstream.will(page(rows[0], key="K_- &"), page(rows[1], key="K-2"), page(rows[2]))

    pages = channel.list_orders(since_row_version=7, page_size=1)

    assert [(page.row_versions[ORDER_ID], len(upstream.asked)) for page in pages] == [(8, 1), (9, 2), (10, 3)]
    conditions = "sync=true&lastRowVersion=7&pageSize=1"
    assert [asked.target.removeprefix(f"{ROOT}/channelManager/orders/{PARTNER}?") for asked in upstream.asked] == [
        conditions + key for key in ("", "&pageKey=K_-%20%26", "&pageKey=K-2")
    ]


def test_a_missing_list_is_a_fault(channel: ChannelManager, http: DeadlineTransport, upstream: Upstream) -> None:
    """A company without a partner id has none."""
    upstream.will(says_json({"code": "resource_not_found"}, 404))

    for call in (lambda: list(channel.list_orders()), channel.subscriptions):
        error = failure(call)
        assert (type(error), error.reason) == (ConnectionFault, "not_found")
    with pytest.raises(ValueError, match="partner id"):
        next(manager(http, upstream.url, np_partner_id=None).list_orders())


@pytest.mark.parametrize(("answer", "created_id"), [(says_json({"id": OTHER_ID}, 201), OTHER_ID), (says(201), None)])
def test_an_empty_answer_to_a_creation_is_a_subscription_without_an_id(
    channel: ChannelManager, upstream: Upstream, answer: Reply, created_id: str | None
) -> None:
    upstream.will(answer)

    assert channel.create_subscription("https://hooks.example.com/np", SecretStr("hush")).id == created_id
