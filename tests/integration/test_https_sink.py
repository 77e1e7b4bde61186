"""The kind https against a real server: what is sent, what each answer means, and which addresses are refused."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain, count, repeat
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from app.declared import validated
from app.dev.sandbox.process import Sandbox
from app.errors import SettingsError
from app.ledger.history import DeliveryEnded
from app.sink_settings import HttpsSink
from app.upstream.transport import tls_context
from tests.lab import Lab
from tests.lab_upstream import Asked, Reply, Upstream, fake_upstream, raw, says, worker_lab
from tests.samples import document
from tests.service import SELF_SIGNED
from workers.sinks import https
from workers.sinks.build import build
from workers.sinks.contract import Context, Disable, Failed, Sink, Unavailable

DOCUMENT = document("order-issued")
CONTEXT = Context(
    idempotency_key=DOCUMENT.idempotency_key,
    company_id=DOCUMENT.company_id,
    order_id=DOCUMENT.order_id,
    revision=1,
    attempt=1,
    request_id="request",
    fetched_at=DOCUMENT.fetched_at,
)
NEW, OLD = "whsec_bmV3LXNlY3JldC1jYW5hcnktMDEyMzQ1Njc4OWFi", "whsec_b2xkLXNlY3JldC1jYW5hcnktMDEyMzQ1Njc4OWFi"
OK = says(200)
SECONDS = 0.4
NAME = "shop.example.test"


_built: list[Sink] = []


def sink(url: str, path: str = "/hooks/", **more: Any) -> Sink:
    """Return the sink of a table `[sinks.shop]`; private addresses are allowed unless `more` differs."""
    problems: list[str] = []
    given = {"name": "shop", "allow_private": True, "url": f"{url}{path}", "secret": NEW} | more
    declared = validated(HttpsSink, given, problems, {})
    assert declared is not None, problems
    _built.append(build([declared])["shop"])
    return _built[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Close the connections, which a worker keeps until it ends."""
    yield
    while _built:
        if http := vars(_built.pop()).get("_http"):
            http.close()


def failure(of: Sink) -> Exception:
    with pytest.raises((Failed, Disable)) as raised:
        of.deliver(DOCUMENT, CONTEXT)
    return raised.value


def reason(of: Sink) -> str:
    error = failure(of)
    assert isinstance(error, Unavailable)
    return error.reason


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end after SECONDS."""
    monkeypatch.setattr(https, "TIMEOUT", SECONDS)


class TestRequest:
    def test_the_order_is_posted_in_the_form_of_standard_webhooks(self, upstream: Upstream) -> None:
        upstream.will(OK)

        sink(upstream.url).deliver(DOCUMENT, CONTEXT)

        (asked,) = upstream.asked
        assert (asked.method, asked.target, asked.headers["content-type"]) == ("POST", "/hooks/", "application/json")
        assert asked.headers["webhook-id"] == DOCUMENT.idempotency_key
        assert json.loads(asked.body) == {
            "type": "order.revision",
            "timestamp": "2026-05-28T20:26:40Z",
            "data": json.loads(DOCUMENT.encode()),
        }
        assert DOCUMENT.encode() in asked.body

    def test_as_a_cloud_event_it_is_read_by_their_sdk(self, upstream: Upstream) -> None:
        upstream.will(OK)

        sink(upstream.url, format="cloudevents").deliver(DOCUMENT, CONTEXT)

        (asked,) = upstream.asked
        assert asked.headers["content-type"] == "application/cloudevents+json"
        event: BaseCloudEvent = from_http_event(HTTPMessage(asked.headers, asked.body))
        assert (event.get_specversion(), event.get_type()) == ("1.0", "order.revision")
        assert (event.get_id(), event.get_subject()) == (DOCUMENT.idempotency_key, DOCUMENT.order_id)
        assert event.get_source() == f"urn:uuid:{DOCUMENT.company_id}"
        assert event.get_time() == datetime(2026, 5, 28, 20, 26, 40, tzinfo=UTC)
        assert (event.get_datacontenttype(), event.get_data()) == ("application/json", json.loads(DOCUMENT.encode()))
        Webhook(NEW).verify(asked.body, asked.headers)

    @pytest.mark.parametrize(
        ("secrets", "good", "bad"),
        [
            ({"secret": NEW}, [NEW], [OLD]),
            ({"secret": NEW, "secret_previous": OLD}, [NEW, OLD], [NEW[:-4]]),
            ({"secret": NEW.rstrip("=")}, [NEW], [OLD]),
        ],
        ids=["one", "rotation", "unpadded"],
    )
    def test_the_librarys_verifier_accepts_each_live_secret_and_no_other(
        self, upstream: Upstream, secrets: dict[str, str], good: list[str], bad: list[str], monkeypatch: Any
    ) -> None:
        """Also on a machine whose zone is not UTC."""
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        upstream.will(OK)

        sink(upstream.url, **secrets).deliver(DOCUMENT, CONTEXT)
        monkeypatch.undo()
        time.tzset()

        (asked,) = upstream.asked
        for secret in good:
            assert Webhook(secret).verify(asked.body, asked.headers)["data"]["orderId"] == DOCUMENT.order_id
        for secret, body in [*((one, asked.body) for one in bad), (NEW, asked.body + b" ")]:
            with pytest.raises(WebhookVerificationError, match="No matching signature"):
                Webhook(secret).verify(body, asked.headers, json_parse=False)

    def test_further_headers_are_sent_with_each_request(self, upstream: Upstream, tmp_path: Path) -> None:
        (tmp_path / "headers").write_bytes(b"\xef\xbb\xbfAuthorization: Basic YTpi\r\n\nx-shop:a: b \n")
        upstream.will(OK)

        shop = sink(upstream.url, headers_file=tmp_path / "headers")
        shop.deliver(DOCUMENT, CONTEXT)
        shop.deliver(DOCUMENT, CONTEXT)

        assert [(one.headers["authorization"], one.headers["x-shop"]) for one in upstream.asked] == [
            ("Basic YTpi", "a: b")
        ] * 2

    def test_the_trace_of_the_delivery_goes_on_at_the_endpoint(self, upstream: Upstream) -> None:
        upstream.will(OK)
        traceparent = f"00-{'a' * 32}-{'b' * 16}-01"

        shop = sink(upstream.url)
        for given in (traceparent, ""):
            shop.deliver(DOCUMENT, msgspec.structs.replace(CONTEXT, traceparent=given))

        assert [one.headers.get("traceparent") for one in upstream.asked] == [traceparent, None]

    def test_one_connection_serves_all_deliveries_and_no_proxy_is_used(
        self, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        upstream.will(says(200, b"thank you", set_cookie="a=b; Path=/"), says(422, b"no"), OK)
        shop = sink(upstream.url)

        shop.deliver(DOCUMENT, CONTEXT)
        failure(shop)
        shop.deliver(DOCUMENT, CONTEXT)

        assert (len(upstream.asked), len(upstream.callers)) == (3, 1)
        assert not any("cookie" in asked.headers for asked in upstream.asked)


class TestAnswer:
    @pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
    def test_a_2xx_is_a_delivery(self, upstream: Upstream, status: int) -> None:
        upstream.will(says(status))

        sink(upstream.url).deliver(DOCUMENT, CONTEXT)

    @pytest.mark.parametrize(
        ("status", "kind", "text"),
        [
            *((status, Failed, f"HTTP {status}") for status in (400, 401, 403, 404, 409, 413, 422, 499)),
            *((status, Failed, f"HTTP {status}: redirects are not followed") for status in (301, 302, 307, 308)),
            *((status, Unavailable, f"HTTP {status}") for status in (408, 425, 429, 500, 502, 503, 504, 599)),
            (410, Disable, "HTTP 410"),
        ],
    )
    def test_each_other_answer_has_one_meaning(
        self, upstream: Upstream, status: int, kind: type[Exception], text: str
    ) -> None:
        upstream.will(says(status, b"canary", location=f"{upstream.url}/elsewhere"))

        error = failure(sink(upstream.url))

        assert (type(error), str(error), len(upstream.asked)) == (kind, text, 1)

    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize(
        ("sent", "after"),
        [
            ("90", 90),
            ("0", 0),
            ("86400", 7200),
            (lambda: format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True), 600),
            (lambda: format_datetime(datetime.now(UTC) + timedelta(days=3), usegmt=True), 7200),
            ("Thu, 01 Jan 2026 00:00:00 GMT", 0),
            ("soon", None),
        ],
    )
    def test_a_retry_after_is_passed_on_for_at_most_two_hours(
        self, upstream: Upstream, status: int, sent: str | Callable[[], str], after: float | None
    ) -> None:
        upstream.will(says(status, retry_after=sent if isinstance(sent, str) else sent()))

        error = failure(sink(upstream.url))

        assert isinstance(error, Unavailable)
        assert error.after == (after if after is None else pytest.approx(after, abs=2))

    @pytest.mark.parametrize(
        ("first", "then", "text"),
        [
            ((), b"", f"time-out after {SECONDS} s"),
            ((), b"HTTP/1.1 100 Continue\r\n\r\n", f"time-out after {SECONDS} s"),
            ((b"HTTP/1.1 200 OK\r\n",), b"x: y\r\n", f"time-out after {SECONDS} s"),
            ((b"HTTP/1.1 503 No\r\n", b"\r\n"), b" ", "HTTP 503"),
            ((b"HTTP/1.1 200 OK\r\n", b"\r\n"), b" ", ""),
        ],
        ids=["silence", "interim answers", "headers", "refusal", "body"],
    )
    @pytest.mark.usefixtures("brief")
    def test_a_server_that_drips_bytes_holds_the_worker_no_longer_than_the_time_limit(
        self, upstream: Upstream, first: tuple[bytes, ...], then: bytes, text: str
    ) -> None:
        """Once there is a status it counts, however the body ends."""
        upstream.will(upstream.slowly(*first, then=then, every=SECONDS / 10))
        shop = sink(upstream.url)
        started = time.monotonic()

        if text:
            assert reason(shop) == text
        else:
            shop.deliver(DOCUMENT, CONTEXT)

        assert SECONDS * 0.9 < time.monotonic() - started < SECONDS * 3

    @pytest.mark.parametrize("read_at_once", [400_000, 700_000])
    @pytest.mark.usefixtures("brief")
    def test_a_server_that_reads_slowly_holds_the_worker_no_longer_than_the_time_limit(self, read_at_once: int) -> None:
        order = msgspec.structs.replace(DOCUMENT.order, extra={"note": 30_000_000 * "x"})
        large = msgspec.structs.replace(DOCUMENT, order=order)

        def read(server: socket.socket) -> None:
            with server.accept()[0] as connection, suppress(ConnectionError):
                while connection.recv(read_at_once):
                    time.sleep(SECONDS / 10)

        with socket.create_server(("127.0.0.1", 0)) as server:
            reader = Thread(target=read, args=(server,))
            reader.start()
            shop = sink(f"http://127.0.0.1:{server.getsockname()[1]}")
            started = time.monotonic()
            with pytest.raises(Unavailable, match=f"^time-out after {SECONDS} s$"):
                shop.deliver(large, CONTEXT)
            took = time.monotonic() - started
            vars(shop)["_http"].close()
            reader.join()

        assert SECONDS * 0.9 < took < SECONDS * 3

    @pytest.mark.parametrize("status", [200, 500])
    def test_an_endless_answer_is_not_read(self, upstream: Upstream, status: int) -> None:
        sent = count()
        head = f"HTTP/1.1 {status} Because\r\n\r\n".encode()
        upstream.will(lambda: chain([head], (b" " * 65536 for _ in zip(sent, repeat(None), strict=False))))
        shop = sink(upstream.url)

        if status == 200:
            shop.deliver(DOCUMENT, CONTEXT)
        else:
            assert reason(shop) == "HTTP 500"

        assert next(sent) < 200  # pieces that the buffers of the sockets held

    @pytest.mark.parametrize("answer", [raw(), raw(b"HTTP/1.1 2"), raw(b"220 mail.example.com ESMTP\r\n")])
    def test_an_answer_that_is_none_is_named(self, upstream: Upstream, answer: Reply) -> None:
        upstream.will(answer)

        assert reason(sink(upstream.url)) == "the connection ended without an HTTP answer"

    def test_a_destination_that_is_away_is_named_by_the_systems_words(
        self, free_port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        assert reason(sink(f"http://127.0.0.1:{free_port}")) == "Connection refused"
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        assert reason(sink("https://shop.example.com")) == "Name or service not known"

    def test_a_host_that_answers_no_handshake_is_left_early(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(https, "CONNECT_TIMEOUT", SECONDS)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            started = time.monotonic()
            text = reason(sink(f"https://127.0.0.1:{silent.getsockname()[1]}"))

        assert text == f"no connection within {SECONDS} s"
        assert SECONDS * 0.9 < time.monotonic() - started < SECONDS * 3


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ssl.SSLContext | Path]:
    """Make servers' TLS contexts: of NAME, `expired`, and `foreign`; `trusted` is a file with the first two."""
    made: dict[str, ssl.SSLContext | Path] = {}
    folder = tmp_path_factory.mktemp("certificates")
    trusted = ""
    for name in (NAME, "expired", "foreign"):
        command = SELF_SIGNED.replace("IP:127.0.0.1", f"DNS:{NAME}")
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
        if name == "expired":
            _expire(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "all.pem", folder / "key.pem")
        made[name] = context
        trusted += (folder / "all.pem").read_text() if name != "foreign" else ""
    (folder / "trusted.pem").write_text(trusted)
    return made | {"trusted": folder / "trusted.pem"}


def _expire(folder: Path) -> None:
    """Issue the certificate again, for a day of the past."""
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nnew_certs_dir=.\nrand_serial=yes\ndefault_md=sha256\npolicy=p\n"
        f"x509_extensions=x\n[p]\ncommonName=supplied\n[x]\nsubjectAltName=DNS:{NAME}\nbasicConstraints=CA:true\n"
    )
    (folder / "index.txt").write_text("")
    sign = "openssl ca -batch -config ca.conf -selfsign -keyfile key.pem -in request.pem -out all.pem -notext"
    for command in (
        "openssl req -new -key key.pem -subj /CN=expired -out request.pem",
        f"{sign} -startdate 20200101000000Z -enddate 20200102000000Z",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch, certificates: dict[str, Any]) -> Iterator[Internet]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates["trusted"]))
    tls_context.cache_clear()
    yield Internet(monkeypatch)
    tls_context.cache_clear()


class Internet:
    """A name server of the test for NAME, and PUBLIC as an address of the test's own server."""

    PUBLIC = "8.8.8.8"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] = [self.PUBLIC]
        self.asked = 0
        self.connected: list[str] = []
        self._look_up, self._connect = socket.getaddrinfo, socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", self._create_connection)

    def _getaddrinfo(self, host: str, *more: Any, **options: Any) -> Any:
        """Return the next address for NAME, the last one again and again."""
        if host == NAME:
            self.asked += 1
            host = self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]
        return self._look_up(host, *more, **options)

    def _create_connection(self, address: tuple[str, int], *more: Any, **options: Any) -> socket.socket:
        self.connected.append(address[0])
        host = "127.0.0.1" if address[0] == self.PUBLIC else address[0]
        return self._connect((host, address[1]), *more, **options)


class TestAddress:
    @pytest.mark.parametrize(
        "address",
        [
            *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "0.1.2.3"),
            *("169.254.169.254", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255"),
            *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
            *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::ffff:0:127.0.0.1"),
            *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::"),
            *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "100::1", "4000::1"),
        ],
    )
    def test_an_address_that_is_not_of_the_internet_stops_the_start(self, address: str) -> None:
        assert not https.is_public(address)
        host = f"[{address}]" if ":" in address else address
        if "%" not in address:
            with pytest.raises(SettingsError, match=r"^SINKS_FILE \[sinks.shop\]: URL is not a public address"):
                sink(f"https://{host}", allow_private=False)
            sink(f"https://{host}")

    @pytest.mark.parametrize(
        "address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "2606:4700::1111"]
    )
    def test_an_address_of_the_internet_is_taken(self, address: str) -> None:
        assert https.is_public(address)

    @pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f000001", "127.1", "0"])
    def test_a_name_or_number_that_means_this_machine_is_not_connected_to(self, upstream: Upstream, host: str) -> None:
        text = reason(sink(f"https://{host}:{upstream.port}", allow_private=False))

        assert re.fullmatch(r"[0-9.:]+ is not a public address, which needs allow_private = true", text)
        assert upstream.asked == []

    def test_what_counts_is_the_address_connected_to(self, internet: Internet, certificates: dict[str, Any]) -> None:
        """The name server answers with a public address first, and then with one of this machine."""
        internet.addresses = [internet.PUBLIC, "127.0.0.1", internet.PUBLIC]
        with fake_upstream(certificates[NAME]) as server:
            server.will(raw(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"))
            shop = sink(f"https://{NAME}:{server.port}", allow_private=False)

            shop.deliver(DOCUMENT, CONTEXT)
            text = reason(shop)
            shop.deliver(DOCUMENT, CONTEXT)

        assert text == "127.0.0.1 is not a public address, which needs allow_private = true"
        assert (len(server.asked), internet.connected, internet.asked) == (2, [internet.PUBLIC] * 2, 3)

    @pytest.mark.parametrize(
        ("certificate", "host", "text"),
        [
            ("expired", NAME, "certificate refused: certificate has expired"),
            ("foreign", NAME, "certificate refused: self-signed certificate"),
            (NAME, "localhost", "certificate refused: Hostname mismatch"),
            (None, NAME, "TLS error WRONG_VERSION_NUMBER"),
        ],
    )
    def test_a_certificate_that_is_not_good_is_named(
        self, internet: Internet, certificates: dict[str, Any], certificate: str | None, host: str, text: str
    ) -> None:
        internet.addresses = ["127.0.0.1"]
        with fake_upstream(certificates[certificate] if certificate else None) as server:
            assert reason(sink(f"https://{host}:{server.port}")) == text

            assert server.asked == []


class TestSettings:
    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (None, ": the file is missing"),
            (b"\xff", ": the file is not UTF-8 text"),
            (b"x: y\ncanary", " line 2: is not `Name: value` in printable ASCII characters"),
            (b"x:\n", " line 1: is not `Name: value` in printable ASCII characters"),
            (b"x y: canary\n", " line 1: is not `Name: value` in printable ASCII characters"),
            (b"x: can\rary\n", " line 2: is not `Name: value` in printable ASCII characters"),
            (b"x: can\x00ary\n", " line 1: is not `Name: value` in printable ASCII characters"),
            ("x: canary ø".encode(), " line 1: is not `Name: value` in printable ASCII characters"),
            (b"\n\nHost: canary\n", " line 3: host is set by the receiver or by HTTP itself"),
            (b"Webhook-Id: canary\n", " line 1: webhook-id is set by the receiver or by HTTP itself"),
            (b"Transfer-Encoding: canary\n", " line 1: transfer-encoding is set by the receiver or by HTTP itself"),
            (b"X: y\nx: canary\n", " line 2: x is given twice"),
        ],
    )
    def test_a_file_of_headers_that_cannot_be_sent_stops_the_start(
        self, tmp_path: Path, content: bytes | None, problem: str
    ) -> None:
        if content is not None:
            (tmp_path / "headers").write_bytes(content)

        with pytest.raises(SettingsError) as refused:
            sink("https://shop.example.com", headers_file=tmp_path / "headers")

        assert str(refused.value) == f"SINKS_FILE [sinks.shop]: HEADERS_FILE{problem}"

    @pytest.mark.parametrize("host", ["0177.0.0.1", "300.1.1.1", "shop..example.com", f"{70 * 'a'}.com"])
    def test_a_host_that_can_be_none_stops_the_start(self, host: str) -> None:
        with pytest.raises(SettingsError, match=r"^SINKS_FILE \[sinks.shop\]: URL is not an http\(s\) address$"):
            sink(f"https://{host}")

    def test_each_mistake_is_a_sentence_of_check(self, lab: Lab) -> None:
        file = lab.folder / "sinks.toml"
        secret = f'\nsecret = "{NEW}"\n'
        file.write_text(
            f'[sinks.a]\nkind = "https"\nurl = "https://[fd00::1]/"{secret}'
            f'[sinks.b]\nkind = "https"\nurl = "https://shop.example.com/"{secret}headers_file = "{lab.folder}/canary"'
        )

        check = lab.run_command("check", SINKS="", SINKS_FILE=str(file))

        assert check.code == 2
        for text in (
            "SINKS_FILE [sinks.a]: URL is not a public address, which needs allow_private = true",
            "SINKS_FILE [sinks.b]: HEADERS_FILE: the file is missing",
        ):
            assert text in " ".join(check.out.split())
        assert "canary" not in check.out + check.err


def late(upstream: Upstream) -> Reply:
    """Answer 200 after the time limit of the sender."""

    def pieces() -> Iterator[bytes]:
        upstream.over.wait(1.5)
        yield from OK()

    return pieces


class TestDelivery:
    @pytest.fixture(autouse=True)
    def _within_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(https, "TIMEOUT", 1)

    def test_a_delivery_that_timed_out_comes_again_under_the_same_id(
        self, redis_url: str, sandbox: Sandbox, upstream: Upstream
    ) -> None:
        """The destination took it the first time, too: its answer came too late."""
        upstream.will(late(upstream), says(503), OK)
        with worker_lab(redis_url, sandbox, {"shop": sink(upstream.url)}) as lab:
            (order,) = lab.issue()
            lab.run_for(60)
            ended = [one.outcome for one in lab.history(order) if isinstance(one, DeliveryEnded)]

        assert ended[-1] == "succeeded"
        assert len(upstream.asked) == 3
        assert len({one.headers["webhook-id"] for one in upstream.asked}) == 1
        assert len({one.body for one in upstream.asked}) == 1
        for one in upstream.asked:
            Webhook(NEW).verify(one.body, one.headers)

    def test_failures_are_shown_by_their_reason_and_nothing_that_is_secret_is_shown(
        self, redis_url: str, sandbox: Sandbox, upstream: Upstream, tmp_path: Path
    ) -> None:
        (tmp_path / "headers").write_text("Authorization: Bearer canary-header")
        path = "/canary-path?code=canary-query"
        shop = sink(upstream.url, path, secret_previous=OLD, headers_file=tmp_path / "headers")
        elsewhere = says(307, b"canary-body", location="https://canary-location")
        upstream.will(says(422, b"canary-body"), elsewhere, late(upstream), raw(b"canary-body"), says(500), says(403))
        with worker_lab(redis_url, sandbox, {"shop": shop}) as lab, capture_logs() as lines:
            (order,) = lab.issue()
            lab.run_for(4 * 24 * 3600)
            shown = lab.history(order)
            dead, everything = lab.field("shop:dead", order), lab.everything()

        failed = [line["error"] for line in lines if line["event"] == "delivery.failed"]
        assert failed[:5] == [
            "HTTP 422",
            "HTTP 307: redirects are not followed",
            "time-out after 1 s",
            "the connection ended without an HTTP answer",
            "HTTP 500",
        ]
        assert (set(failed[5:]), dead) == ({"HTTP 403"}, "HTTP 403")
        assert [one.reason for one in shown if isinstance(one, DeliveryEnded)][:6] == failed[:6]
        asked: Asked = upstream.asked[0]
        assert (asked.headers["authorization"], asked.target) == ("Bearer canary-header", path)
        for text in ("canary", NEW, OLD, NEW.partition("_")[2], asked.headers["webhook-signature"]):
            assert text not in f"{lines}{shown}{everything!r}{shop!r}"
