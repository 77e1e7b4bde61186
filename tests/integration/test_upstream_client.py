"""The client against a server that answers what a test says: each answer, and each silence, has one meaning."""

from __future__ import annotations

import gzip
import json
import ssl
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from pathlib import Path
from threading import Event, Thread
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
from app.settings import Company
from app.upstream.client import MAX_ANSWER_BYTES, ChannelManager, translated_errors
from app.upstream.decode import digest
from app.upstream.transport import DeadlineTransport

FIXTURES = Path(__file__).parent.parent / "fixtures"
ISSUED = (FIXTURES / "order-issued.json").read_bytes()
ORDER_ID = "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"
OTHER_ID = "11111111-2b71-4d23-9d6a-a3b4c5d6e7f8"
PARTNER_ID = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
API_KEY = "np-key-that-nobody-may-see"
ROOT = "/tenant/Production/CRONUS%20International%20Ltd."
SECONDS = 0.4

Reply = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Asked:
    """One request as received."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Upstream:
    """A Channel Manager that gives the `replies` in turn and repeats the last one."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    callers: set[tuple[str, int]] = field(default_factory=set)
    over: Event = field(default_factory=Event)

    def will(self, *replies: Reply) -> None:
        self.replies[:] = replies

    def slowly(self, *first: bytes, then: bytes) -> Reply:
        """Send `first` at once and `then` again and again, each well within any time-out of its own, for 4 s."""

        def pieces() -> Iterator[bytes]:
            yield from first
            for _ in range(100):
                if self.over.wait(SECONDS / 10):
                    return
                yield then

        return pieces


def says(status: int = 200, body: bytes = b"", **headers: str) -> Reply:
    """Reply with a complete answer; a header named `retry_after` is sent as `retry-after`."""
    lines = [f"HTTP/1.1 {status} Because", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def raw(*pieces: bytes) -> Reply:
    return lambda: pieces


def says_json(tree: object, status: int = 200) -> Reply:
    return says(status, json.dumps(tree).encode())


def page(*rows: dict[str, str], key: str = "") -> Reply:
    return says_json({"morePages": bool(key), "nextPageKey": key, "nextPageURL": "", "data": rows})


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client hangs up on answers it will not have
                super().handle()

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            fake.asked.append(Asked(self.command, self.path, headers, body))
            fake.callers.add(self.client_address)
            reply = fake.replies.pop(0) if len(fake.replies) > 1 else fake.replies[0]
            try:
                self.close_connection = True  # whatever is not a complete answer ends with the connection
                for piece in reply():
                    self.wfile.write(piece)
                    self.close_connection = b"\r\ncontent-length: " not in piece  # as `says` writes it
            except OSError:
                self.close_connection = True

        do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  # names that http.server looks for

        def log_message(self, *_: object) -> None:
            """Keep the test's output to itself."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = Upstream(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def http() -> Iterator[DeadlineTransport]:
    with DeadlineTransport(SECONDS) as client:
        yield client


@pytest.fixture
def channel(http: DeadlineTransport, upstream: Upstream) -> ChannelManager:
    return manager(http, upstream.url)


def manager(http: DeadlineTransport, url: str, **changed: Any) -> ChannelManager:
    company = Company(
        slug="museum",
        np_company_id="b56a418d-8205-4d3a-bdbb-25d94e42abbd",
        np_company="CRONUS International Ltd.",
        np_tenant="tenant",
        np_environment="Production",
        np_api_key=SecretStr(API_KEY),
        np_partner_id=PARTNER_ID,
        client_state=SecretStr("state"),
    )
    return ChannelManager(http, company.model_copy(update=changed), "2026-08-21", url)


def failure(call: Callable[[], object]) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        call()
    return caught.value


# Requests and their answers


def test_get_order_sends_one_request_with_key_and_version_and_returns_the_order(
    channel: ChannelManager, upstream: Upstream
) -> None:
    upstream.will(says(200, ISSUED))

    fetched = channel.get_order(ORDER_ID)

    assert fetched.order.order_id == ORDER_ID
    assert len(fetched.order.tickets) == 2
    assert (fetched.raw, fetched.digest, fetched.http_status) == (ISSUED, digest(ISSUED), 200)
    assert 0 < fetched.seconds < SECONDS
    (asked,) = upstream.asked
    assert (asked.method, asked.target) == ("GET", f"{ROOT}/channelManager/{ORDER_ID}")
    assert asked.headers["x-np-api-key"] == API_KEY
    assert asked.headers["x-api-version"] == "2026-08-21"
    assert asked.headers["user-agent"].startswith("ota-receiver/")


def test_the_repr_of_a_fetched_order_shows_no_guest_and_no_body(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED))

    printed = repr(channel.get_order(ORDER_ID))

    assert ORDER_ID in printed
    assert "Jane" not in printed
    assert "TK-0" not in printed


def test_a_company_name_with_a_percent_sign_and_a_slash_is_encoded_once(
    http: DeadlineTransport, upstream: Upstream
) -> None:
    upstream.will(says(200, ISSUED))

    manager(http, upstream.url, np_company="100% A/B ø").get_order(ORDER_ID)

    assert upstream.asked[0].target.startswith("/tenant/Production/100%25%20A%2FB%20%C3%B8/channelManager/")


def test_a_compressed_answer_is_read(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, gzip.compress(ISSUED), content_encoding="gzip"))

    assert channel.get_order(ORDER_ID).raw == ISSUED


def test_calls_share_one_warm_connection(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED), says(404, b'{"code": "resource_not_found"}'), says(200, ISSUED))

    channel.get_order(ORDER_ID)
    failure(lambda: channel.get_order(ORDER_ID))
    channel.get_order(ORDER_ID)

    assert len(upstream.asked) == 3
    assert len(upstream.callers) == 1


def test_a_cookie_of_one_answer_is_not_carried_to_the_next_call(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED, set_cookie="company=museum; Path=/"))

    channel.get_order(ORDER_ID)
    channel.get_order(ORDER_ID)

    assert "cookie" not in upstream.asked[1].headers


def test_proxies_and_passwords_of_the_environment_are_ignored(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    upstream.will(says(200, ISSUED))

    with DeadlineTransport(SECONDS) as http:
        manager(http, upstream.url).get_order(ORDER_ID)

    assert "authorization" not in upstream.asked[0].headers


@pytest.mark.parametrize("order_id", ["", "42", ORDER_ID.upper(), f"{ORDER_ID}/confirm", f"{ORDER_ID}\n", "../x"])
def test_an_id_that_is_not_a_canonical_guid_is_never_sent(
    channel: ChannelManager, upstream: Upstream, order_id: str
) -> None:
    for call in (channel.get_order, channel.delete_order, channel.delete_subscription):
        with pytest.raises(ValueError, match="GUID"):
            call(order_id)

    assert upstream.asked == []


# The other calls for an order


def test_confirm_and_delete_name_the_order_in_the_path(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED))

    channel.confirm_order(ORDER_ID, "PAY-1")
    channel.delete_order(ORDER_ID)

    assert [(asked.method, asked.target.removeprefix(ROOT), asked.body) for asked in upstream.asked] == [
        ("POST", f"/channelManager/{ORDER_ID}/confirm", b'{"paymentReference":"PAY-1"}'),
        ("DELETE", f"/channelManager/{ORDER_ID}", b""),
    ]
    assert upstream.asked[0].headers["content-type"] == "application/json"


def test_an_answer_with_another_order_is_unreadable(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED))

    error = failure(lambda: channel.get_order(OTHER_ID))

    assert isinstance(error, UnreadableAnswer)
    assert (error.reason, error.http_status) == ("wrong_order", 200)


# What answers mean


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
    upstream.will(says_json({"code": code, "message": "Jane Doe is not amused"}, status))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, str(error)) == (kind, reason, reason)
    assert error.http_status == status
    assert len(upstream.asked) == 1


def test_a_redirect_is_not_followed_with_the_key(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(302, location=f"{upstream.url}/elsewhere"), says(200, ISSUED))

    assert failure(lambda: channel.get_order(ORDER_ID)).reason == "redirected"
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b"\xff", b'{"code": 7}', b"x" * 200_000])
def test_a_refusal_without_a_readable_body_is_classified_by_its_status(
    channel: ChannelManager, upstream: Upstream, body: bytes
) -> None:
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
)
def test_retry_after_is_limited_to_an_hour_and_ignored_when_unreadable(
    channel: ChannelManager, upstream: Upstream, status: int, sent: str, seconds: float | None
) -> None:
    upstream.will(says(status, retry_after=sent))

    assert failure(lambda: channel.get_order(ORDER_ID)).retry_after == seconds


def test_retry_after_as_a_date_is_counted_from_now(channel: ChannelManager, upstream: Upstream) -> None:
    later = datetime.now(UTC) + timedelta(seconds=90)
    upstream.will(says(429, retry_after=format_datetime(later, usegmt=True)))

    assert failure(lambda: channel.get_order(ORDER_ID)).retry_after == pytest.approx(90, abs=5)


@pytest.mark.parametrize("body", [b"", b"<html>Welcome</html>", b"{}", b"[" * 100_000, b"\xff\xfe", ISSUED[:-9]])
def test_an_answer_that_is_not_an_order_is_unreadable(channel: ChannelManager, upstream: Upstream, body: bytes) -> None:
    upstream.will(says(200, body))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, error.http_status) == (UnreadableAnswer, "unreadable_answer", 200)


# Rubbish, silence and broken lines


@pytest.mark.parametrize(
    "answer",
    [
        raw(),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length : 3000\r\n\r\n", b"{"),
        raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"zz\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
        raw(b"HTTP/1.1 99999 What\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 300_000),
    ],
)
def test_a_broken_answer_is_a_fault_of_the_network(channel: ChannelManager, upstream: Upstream, answer: Reply) -> None:
    upstream.will(answer)

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason, error.http_status) == (Unavailable, "network", None)


def test_an_answer_cut_off_in_the_middle_is_a_fault_of_the_network(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + ISSUED[:100]))

    assert failure(lambda: channel.get_order(ORDER_ID)).reason == "network"


def test_a_closed_port_is_a_fault_of_the_network(http: DeadlineTransport, free_port: int) -> None:
    error = failure(lambda: manager(http, f"http://127.0.0.1:{free_port}").get_order(ORDER_ID))

    assert (type(error), error.reason) == (Unavailable, "network")


def test_a_server_that_does_not_speak_tls_is_a_fault_of_the_network(
    http: DeadlineTransport, upstream: Upstream
) -> None:
    address = upstream.url.replace("http:", "https:")

    error = failure(lambda: manager(http, address).get_order(ORDER_ID))

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
    upstream.will(upstream.slowly(*first, then=then))
    begun = time.monotonic()

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason) == (Unavailable, "timeout")
    assert SECONDS * 0.9 < time.monotonic() - begun < SECONDS * 3


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
    bomb = gzip.compress(b" " * (5 * MAX_ANSWER_BYTES))
    upstream.will(says(200, bomb, content_encoding="gzip"))

    with DeadlineTransport(20) as http:
        tracemalloc.start()
        error = failure(lambda: manager(http, upstream.url).get_order(ORDER_ID))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert (type(error), error.reason) == (UnreadableAnswer, "answer_too_large")
    assert peak < 4 * MAX_ANSWER_BYTES


def test_an_answer_of_the_largest_size_is_read(upstream: Upstream) -> None:
    upstream.will(says(200, ISSUED.ljust(MAX_ANSWER_BYTES)))

    with DeadlineTransport(20) as http:
        assert manager(http, upstream.url).get_order(ORDER_ID).order.order_id == ORDER_ID


@pytest.mark.parametrize(
    ("body", "encoding"),
    [(gzip.compress(gzip.compress(ISSUED)), "gzip, gzip"), (b"not compressed at all", "gzip")],
)
def test_an_unsupported_or_broken_encoding_is_unreadable(
    channel: ChannelManager, upstream: Upstream, body: bytes, encoding: str
) -> None:
    upstream.will(says(200, body, content_encoding=encoding))

    assert failure(lambda: channel.get_order(ORDER_ID)).reason == "unreadable_answer"


# No foreign exception, and no foreign text


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


@pytest.mark.parametrize("key", ["schlüssel-geheim", "line\r\nbreak-geheim", "null\x00geheim"])
def test_a_key_that_http_cannot_carry_is_a_fault_of_the_connection_and_is_not_shown(
    http: DeadlineTransport, upstream: Upstream, key: str
) -> None:
    channel = manager(http, upstream.url, np_api_key=SecretStr(key))

    error = failure(lambda: channel.get_order(ORDER_ID))

    assert (type(error), error.reason) == (ConnectionFault, "unsendable_request")
    assert "geheim" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("address", ["ftp://127.0.0.1", "https://host:port", "//nowhere", "https://\x00"])
def test_an_invalid_address_is_a_fault_of_the_connection(http: DeadlineTransport, address: str) -> None:
    error = failure(lambda: manager(http, address).get_order(ORDER_ID))

    assert (type(error), error.reason) == (ConnectionFault, "unsendable_request")


# Lists of orders


def test_pages_follow_the_key_and_repeat_the_conditions(channel: ChannelManager, upstream: Upstream) -> None:
    rows = [{"orderId": ORDER_ID, "status": "Draft", "rowVersion": str(version)} for version in (8, 9, 10)]
    upstream.will(page(rows[0], key="K_- &"), page(rows[1], key="K-2"), page(rows[2]))

    pages = list(channel.list_orders(since_row_version=7, page_size=1))

    assert [page.row_version for page in pages] == [8, 9, 10]
    assert [asked.target.removeprefix(f"{ROOT}/channelManager/orders/{PARTNER_ID}?") for asked in upstream.asked] == [
        "sync=true&lastRowVersion=7&pageSize=1",
        "sync=true&lastRowVersion=7&pageSize=1&pageKey=K_-%20%26",
        "sync=true&lastRowVersion=7&pageSize=1&pageKey=K-2",
    ]


def test_a_page_is_requested_only_when_it_is_read(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(page(key="K-1"), page())

    pages = channel.list_orders()
    assert len(upstream.asked) == 0

    next(pages)
    assert [asked.target.partition("?")[2] for asked in upstream.asked] == ["pageSize=1000"]


def test_a_repeated_page_key_ends_the_list_as_unreadable(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(page(key="K-1"), page(key="K-2"), page(key="K-1"))

    error = failure(lambda: list(channel.list_orders()))

    assert isinstance(error, UnreadableAnswer)
    assert len(upstream.asked) == 3


def test_a_list_that_is_not_found_is_a_fault_of_the_connection(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says_json({"code": "resource_not_found"}, 404))

    for call in (lambda: list(channel.list_orders()), channel.subscriptions):
        error = failure(call)
        assert (type(error), error.reason) == (ConnectionFault, "not_found")


def test_a_company_without_partner_id_has_no_list(http: DeadlineTransport, upstream: Upstream) -> None:
    with pytest.raises(ValueError, match="partner id"):
        next(manager(http, upstream.url, np_partner_id=None).list_orders())


# Subscriptions


def test_subscriptions_are_listed_with_their_client_state_as_a_secret(
    channel: ChannelManager, upstream: Upstream
) -> None:
    upstream.will(says_json({"value": [{"id": OTHER_ID, "clientState": "hush", "subscriptionState": "Active"}]}))

    (subscription,) = channel.subscriptions()

    assert upstream.asked[0].target == f"{ROOT}/webhook"
    assert subscription.active
    assert subscription.client_state == SecretStr("hush")
    assert "hush" not in repr(subscription)


def test_a_subscription_is_created_for_the_event_of_settled_orders(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says_json({"id": OTHER_ID}, 201))

    created = channel.create_subscription("https://hooks.example.com/np", SecretStr("hush"))

    assert created.id == OTHER_ID
    (asked,) = upstream.asked
    assert (asked.method, asked.target) == ("POST", f"{ROOT}/webhook")
    assert json.loads(asked.body) == {
        "notificationUrl": "https://hooks.example.com/np",
        "eventName": "ota_cm_order_processed",
        "clientState": "hush",
        "eventVersion": "1.0",
    }


def test_a_subscription_is_deleted_and_a_missing_one_is_rejected(channel: ChannelManager, upstream: Upstream) -> None:
    upstream.will(says(204), says_json({"code": "resource_not_found"}, 404))

    channel.delete_subscription(OTHER_ID)
    error = failure(lambda: channel.delete_subscription(OTHER_ID))

    assert (upstream.asked[0].method, upstream.asked[0].target) == ("DELETE", f"{ROOT}/webhook/{OTHER_ID}")
    assert (type(error), error.reason) == (RequestRejected, "subscription_not_found")
