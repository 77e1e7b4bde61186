"""The sink object on an S3 server (moto), and what it makes of the answers of S3, GCS and Azure."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.request import Request, urlopen

import obstore
import pytest

from app.dev.processes import Process, free_port
from app.errors import SettingsError
from app.sink_settings import ObjectSink
from tests.eventually import eventually
from tests.samples import document, example_of
from workers.sinks import Context, objects
from workers.sinks.build import build
from workers.sinks.contract import Failed, Sink, Unavailable

DOCUMENT = document("order-issued")
UNUSED = cast("Context", None)
NAME = f"orders/museum/2026-05-28/{DOCUMENT.order_id}/1-{DOCUMENT.digest}.json"
URLS = ("s3://bucket/orders", "gs://bucket/orders", "az://bucket/orders")


def sink_of(url: str, *, allow_http: bool = True) -> Sink:
    return build([ObjectSink(name="bucket", url=url, allow_http=allow_http)])["bucket"]


def variables(endpoint: str, folder: Path) -> dict[str, str]:
    """Return what names an endpoint and made-up credentials for all three."""
    account = folder / "gcs.json"
    of_google = {"gcs_base_url": endpoint, "disable_oauth": True, "client_email": "", "private_key": ""}
    account.write_text(json.dumps(of_google | {"private_key_id": ""}))
    return {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": "a2V5",
        "AZURE_STORAGE_ENDPOINT": endpoint,
        "GOOGLE_SERVICE_ACCOUNT": str(account),
    }


class Answers(BaseHTTPRequestHandler):
    """Gives one answer after the other, (status, code of the error), and then 200; status 0 closes the connection."""

    protocol_version = "HTTP/1.1"
    answers: ClassVar[list[tuple[int, str]]] = []
    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"] or 0))
        self.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        status, code = self.answers.pop(0) if self.answers else (200, "")
        self.close_connection = not status
        if status:
            body = f"<Error><Code>{code}</Code><Message>canary</Message></Error>".encode() if code else b""
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", '"etag"')
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    """A store whose answers the test writes, for all three kinds of address."""
    Answers.answers.clear()
    Answers.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        for name, value in variables(f"http://127.0.0.1:{http.server_port}", tmp_path).items():
            monkeypatch.setenv(name, value)
        yield Answers
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server with the bucket `bucket`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"

    def is_made() -> bool:
        try:
            with urlopen(Request(f"{url}/bucket", method="PUT"), timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    with Process.start(command, log=tmp_path_factory.mktemp("moto") / "log"):
        eventually(is_made, what="a bucket")
        yield url


@pytest.fixture
def bucket(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> obstore.store.ObjectStore:
    """The bucket of the S3 server, as a reader opens it; it is empty."""
    for name, value in variables(moto, tmp_path).items():
        monkeypatch.setenv(name, value)
    store = obstore.store.from_url("s3://bucket", client_options={"allow_http": True})
    obstore.delete(store, names(store))
    return store


def names(store: obstore.store.ObjectStore) -> list[str]:
    return [one["path"] for page in obstore.list(store) for one in page]


def test_each_revision_is_an_object_of_its_own(bucket: obstore.store.ObjectStore) -> None:
    sink = sink_of("s3://bucket/orders")
    for one in (DOCUMENT, document("order-issued", revision=2, digest="e" * 64, fetched_at=1_780_099_200_000)):
        sink.deliver(one, UNUSED)

    later = f"orders/museum/2026-05-30/{DOCUMENT.order_id}/2-{'e' * 64}.json"
    assert names(bucket) == [NAME, later]
    found = obstore.get(bucket, NAME)
    assert found.attributes["Content-Type"] == "application/json"
    assert bytes(found.bytes()) == DOCUMENT.encode()


def test_the_reader_of_the_page_gets_the_latest_of_each_order(bucket: obstore.store.ObjectStore) -> None:
    sink = sink_of("s3://bucket/orders")
    for number in (1, 2, 3):
        at = DOCUMENT.fetched_at + (3, 9, 6)[number - 1]
        sink.deliver(document("order-issued", revision=number, fetched_at=at), UNUSED)
    sink.deliver(document("order-issued", order_id="other", fetched_at=DOCUMENT.fetched_at + 86_400_000), UNUSED)

    # As the page opens the bucket, but for the server without TLS.
    read = example_of("object")["read"]
    read.__globals__["from_url"] = lambda url: obstore.store.from_url(url, client_options={"allow_http": True})
    assert [one["revision"] for one in read("s3://bucket/orders", "2026-05-28")] == [2]


def test_a_repeat_succeeds_and_leaves_the_object_as_it_is(bucket: obstore.store.ObjectStore) -> None:
    """The store compares: a request without the condition would replace the object."""
    sink_of("s3://bucket/orders").deliver(DOCUMENT, UNUSED)
    obstore.put(bucket, NAME, b"marked")

    sink_of("s3://bucket/orders").deliver(DOCUMENT, UNUSED)

    assert bytes(obstore.get(bucket, NAME).bytes()) == b"marked"
    assert names(bucket) == [NAME]


def test_two_pools_that_deliver_one_revision_both_succeed(bucket: obstore.store.ObjectStore) -> None:
    sinks = [sink_of("s3://bucket/orders") for _ in range(8)]
    with ThreadPoolExecutor(len(sinks)) as pools:
        list(pools.map(lambda sink: sink.deliver(DOCUMENT, UNUSED), sinks))

    assert names(bucket) == [NAME]
    assert bytes(obstore.get(bucket, NAME).bytes()) == DOCUMENT.encode()


def test_a_bucket_that_is_missing_is_a_failure_with_the_reason(bucket: obstore.store.ObjectStore) -> None:
    with pytest.raises(Failed) as refused:
        sink_of("s3://nowhere/orders").deliver(DOCUMENT, UNUSED)

    assert (type(refused.value), refused.value.reason) == (Failed, "HTTP 404 NoSuchBucket")


@pytest.mark.parametrize(
    ("url", "condition"),
    [
        (URLS[0], ("if-none-match", "*")),
        (URLS[1], ("x-goog-if-generation-match", "0")),
        (URLS[2], ("if-none-match", "*")),
    ],
)
def test_every_request_carries_the_condition_that_the_object_does_not_exist(
    server: type[Answers], url: str, condition: tuple[str, str]
) -> None:
    sink_of(url).deliver(DOCUMENT, UNUSED)

    ((_, headers),) = server.seen
    assert headers[condition[0]] == condition[1]


TWICE = 2
"""A failed request is repeated once by obstore."""


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "answers",
    [
        [(412, "PreconditionFailed")],
        [(409, "BlobAlreadyExists")],
        [(503, "SlowDown"), (200, "")],
        [(0, ""), (200, "")],
        [(500, "InternalError"), (412, "PreconditionFailed")],
        [(0, ""), (409, "BlobAlreadyExists")],
    ],
)
def test_what_says_that_the_object_is_there_is_delivered(
    server: type[Answers], url: str, answers: list[tuple[int, str]]
) -> None:
    """Also where the first request made it and only its answer was lost."""
    server.answers[:] = answers

    sink_of(url).deliver(DOCUMENT, UNUSED)

    assert len(server.seen) == len(answers)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ((409, "ConditionalRequestConflict"), Unavailable, "HTTP 409 ConditionalRequestConflict"),
        ((409, "ContainerBeingDeleted"), Unavailable, "HTTP 409 ContainerBeingDeleted"),
        ((429, "TooManyRequests"), Unavailable, "HTTP 429 TooManyRequests"),
        ((503, "SlowDown"), Unavailable, "HTTP 503 SlowDown"),
        ((500, ""), Unavailable, "HTTP 500"),
        ((0, ""), Unavailable, "no answer"),
        ((403, "AccessDenied"), Failed, "HTTP 403 AccessDenied"),
        ((401, "InvalidAuthenticationInfo"), Failed, "HTTP 401 InvalidAuthenticationInfo"),
        ((400, "ExpiredToken"), Failed, "HTTP 400 ExpiredToken"),
        ((404, "NoSuchBucket"), Failed, "HTTP 404 NoSuchBucket"),
        ((304, ""), Failed, "HTTP 304"),
        ((301, ""), Failed, "no address, http:// without allow_http, or the wrong region"),
    ],
)
def test_what_does_not_say_so_is_none_and_the_reason_is_status_and_code(
    server: type[Answers], url: str, answer: tuple[int, str], kind: type[Failed], reason: str
) -> None:
    """409 of S3 says that another request writes the object, which may yet fail; obstore takes it for `exists`."""
    server.answers[:] = [answer] * TWICE

    with pytest.raises(Failed) as refused:
        sink_of(url).deliver(DOCUMENT, UNUSED)

    assert (type(refused.value), refused.value.reason) == (kind, reason)


@pytest.mark.parametrize("url", URLS)
def test_a_store_that_is_away_or_without_tls_is_not_reached(
    server: type[Answers], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failed, match="http:// without allow_http"):
        sink_of(url, allow_http=False).deliver(DOCUMENT, UNUSED)
    assert server.seen == []

    for name, value in variables(f"http://127.0.0.1:{free_port()}", tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match="no answer"):
        sink_of(url).deliver(DOCUMENT, UNUSED)


def test_a_store_that_hangs_costs_one_time_limit(
    server: type[Answers], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(objects, "TIMEOUT", timedelta(seconds=0.2))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as silent:  # it accepts, and serves no one
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.server_port}")
        began = time.monotonic()
        with pytest.raises(Unavailable, match="no answer"):
            sink_of(URLS[0]).deliver(DOCUMENT, UNUSED)
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((403, ""), "credentials: HTTP 403"),
        ((412, "PreconditionFailed"), "credentials: HTTP 412 PreconditionFailed"),
        ((409, "BlobAlreadyExists"), "credentials: HTTP 409 BlobAlreadyExists"),
    ],
)
def test_credentials_that_are_refused_are_told_apart_from_the_bucket(
    server: type[Answers], monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], reason: str
) -> None:
    """Whatever is answered to the request for them, it does not say that the object is there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    server.answers[:] = [answer] * 6

    with pytest.raises(Failed) as refused:
        sink_of(URLS[0]).deliver(DOCUMENT, UNUSED)

    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("url", "variable", "value", "problem"),
    [
        (URLS[2], "AZURE_STORAGE_ACCOUNT_NAME", None, "Account must be specified"),
        (URLS[0], "AWS_SECRET_ACCESS_KEY", None, "Missing SecretAccessKey"),
        (URLS[1], "GOOGLE_SERVICE_ACCOUNT", "/canary", "Unable to open service account file from …"),
        (URLS[0], "AWS_CONDITIONAL_PUT", "canary", "Failed to parse … as S3PutConditional"),
    ],
)
def test_variables_that_cannot_be_used_stop_the_start_and_are_not_quoted(
    server: type[Answers],
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    variable: str,
    value: str | None,
    problem: str,
) -> None:
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)

    with pytest.raises(SettingsError) as refused:
        sink_of(url)

    assert f"obstore refuses its variables: {problem}" in str(refused.value)
    assert "canary" not in str(refused.value)


def test_without_obstore_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)

    with pytest.raises(SettingsError, match=r"needs obstore: pip install 'ota-receiver\[object\]'"):
        sink_of(URLS[0])


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:canary@bucket/orders",
        "s3://bucket/orders?key=canary",
        "s3://bucket/orders#canary",
        "s3:///canary",
        "s3://bucket//canary",
        "https://bucket.s3.amazonaws.com/canary",
        "file:///canary",
        "memory:///canary",
    ],
)
def test_an_address_of_which_a_part_would_be_ignored_is_refused(url: str) -> None:
    """`file` and `memory` would succeed before a line is on a disk: that is what the kind files is for."""
    with pytest.raises(ValueError, match="is not s3://, gs:// or az:// with a bucket and a prefix"):
        ObjectSink(name="bucket", url=url)
