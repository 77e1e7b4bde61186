"""The code on docs/consumer.md and docs/cookbook/ does what the pages say: it is taken from there and run.

Of the other pages and of the SQL the tests of their parts run it.
"""

from __future__ import annotations

import json
import re
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import create_autospec

import boto3  # type: ignore[import-untyped]
import pytest
from azure.servicebus import ServiceBusSender
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from moto.server import ThreadedMotoServer
from standardwebhooks import Webhook, WebhookVerificationError

from tests.programs import program
from tests.samples import COMPANY_ID, document
from workers.sinks import Context, Reject

DOCS: Final = Path(__file__).parents[2] / "docs"
SECRET: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD_SECRET: Final = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
BODY: Final = '{"type":"order.revision","data":{"orderId":"é","status":"Issued"}}'.encode()
OTHER: Final = "11111111-2222-4333-8444-555555555555"


def block(page: str, language: str, number: int = 0) -> str:
    """Return a block of code on a page of docs/."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found[number]


def python(page: str, number: int = 0, changed: tuple[str, str] = ("", "")) -> Any:
    """Return what a block of Python defines; `changed`: a text of it, and what stands there instead."""
    code = block(page, "python", number)
    assert changed[0] in code
    code = code.replace(*changed) if changed[0] else code
    defined = SimpleNamespace()
    defined.__dict__["__name__"] = page
    exec(compile(code, page, "exec"), defined.__dict__)
    return defined


def by_library(headers: Mapping[str, str], body: bytes) -> bool:
    try:
        return bool(python("consumer.md").document_of(SECRET, headers, body) == json.loads(body)["data"])
    except WebhookVerificationError:
        return False


def by_hand(headers: Mapping[str, str], body: bytes) -> bool:
    return bool(python("consumer.md", 1).is_genuine(SECRET, headers, body))


def by_node(headers: Mapping[str, str], body: bytes) -> bool:
    call = "const [s, h, b] = JSON.parse(process.argv[1]); console.log(isGenuine(s, h, Buffer.from(b, 'hex')))"
    code, given = f"{block('consumer.md', 'js')}\n{call}", json.dumps([SECRET, headers, body.hex()])
    ended = subprocess.run(["node", "-e", code, given], capture_output=True, text=True, check=True, timeout=20)
    return {"true": True, "false": False}[ended.stdout.strip()]


@pytest.fixture(scope="module")
def by_csharp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, str], bytes], bool]:
    """Compile the code of the page with Mono; .NET knows all that it uses."""
    program("mcs", "mono-mcs")
    program("mono", "mono-runtime")
    folder = tmp_path_factory.mktemp("csharp")
    call = "OrderSignature.IsGenuine(a[0], a[1], a[2], a[3], System.Convert.FromBase64String(a[4]))"
    source = (
        f"public static class Program {{ public static void Main(string[] a) {{ System.Console.Write({call}); }} }}"
    )
    (folder / "page.cs").write_text(block("consumer.md", "csharp"), encoding="utf-8")
    (folder / "program.cs").write_text(source)
    subprocess.run(["mcs", "-out:page.exe", "page.cs", "program.cs"], cwd=folder, check=True, timeout=30)

    def is_genuine(headers: Mapping[str, str], body: bytes) -> bool:
        parts = [headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature")]
        given = ["mono", "page.exe", SECRET, *parts, b64encode(body).decode()]
        ended = subprocess.run(given, cwd=folder, capture_output=True, text=True, check=True, timeout=20)
        return {"True": True, "False": False}[ended.stdout]

    return is_genuine


def signed(body: bytes = BODY, sent: float = 0, *secrets: str) -> dict[str, str]:
    """Return the headers of a request that was sent so many seconds from now."""
    at = datetime.now(UTC) + timedelta(seconds=sent)
    signatures = [Webhook(secret).sign("key/1", at, body.decode()) for secret in secrets or (SECRET,)]
    return {
        "webhook-id": "key/1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


REQUESTS: Final[dict[str, Callable[[], tuple[bool, dict[str, str], bytes]]]] = {
    "signed": lambda: (True, signed(), BODY),
    "signed with two secrets": lambda: (True, signed(BODY, 0, OLD_SECRET, SECRET), BODY),
    "with a signature of another version": lambda: (
        True,
        (headers := signed()) | {"webhook-signature": f"v1a,AAAA {headers['webhook-signature']}"},
        BODY,
    ),
    "sent four minutes ago": lambda: (True, signed(BODY, -240), BODY),
    "sent six minutes ago": lambda: (False, signed(BODY, -360), BODY),
    "sent in six minutes": lambda: (False, signed(BODY, 360), BODY),
    "signed with another secret": lambda: (False, signed(BODY, 0, OLD_SECRET), BODY),
    "another body": lambda: (False, signed(), BODY.replace(b"Issued", b"Issues")),
    "another id": lambda: (False, signed() | {"webhook-id": "key/2"}, BODY),
    "another time": lambda: (
        False,
        signed() | {"webhook-timestamp": str(int(datetime.now(UTC).timestamp()) - 60)},
        BODY,
    ),
    "a time that is no number": lambda: (False, signed() | {"webhook-timestamp": "now"}, BODY),
    "a signature that is none": lambda: (False, signed() | {"webhook-signature": "v1 é"}, BODY),
    "no signature": lambda: (False, {}, BODY),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("verify", ["by_library", "by_hand", "by_node", "by_csharp"])
def test_a_request_is_taken_only_with_a_right_signature_of_now(
    verify: str, request_: str, request: pytest.FixtureRequest
) -> None:
    """The signatures are the library's own."""
    if verify == "by_node":
        program("node", "nodejs")
    is_genuine, headers, body = REQUESTS[request_]()
    found: Any = request.getfixturevalue(verify) if verify == "by_csharp" else globals()[verify]

    assert found(headers, body) is is_genuine


def revision(number: int, order_id: str = "") -> tuple[Any, Context]:
    """Return what a sink gets for a revision of an order; the key is as long as ours can be."""
    order = document("order-issued").order
    order_id = order_id or order.order_id
    key = f"{COMPANY_ID}/{order_id}/{number + 10**9}/{'d' * 12}"
    return order, Context(key, COMPANY_ID, order_id, number, 1, "request", 1_780_000_000_000 + number)


@pytest.fixture
def queue_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a FIFO queue of a simulated SQS, made as the page says."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "eu-north-1",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = block("cookbook/sqs.md", "sh").split()
    name, attributes = (words[words.index(option) + 1] for option in ("--queue-name", "--attributes"))
    made = boto3.client("sqs").create_queue(QueueName=name, Attributes=dict([attributes.split("=")]))
    monkeypatch.setenv("ORDERS_QUEUE_URL", made["QueueUrl"])
    yield str(made["QueueUrl"])
    server.stop()


def test_sqs_gets_the_revisions_of_each_order_in_their_order_and_drops_repeats(queue_url: str) -> None:
    sink = python("cookbook/sqs.md")
    for order, context in (revision(1), revision(1, OTHER), revision(1), revision(2)):
        sink.on_order(order, context)

    names = ["MessageGroupId"]
    received = boto3.client("sqs").receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, AttributeNames=names)
    groups: dict[str, list[str]] = {}
    for one in received["Messages"]:
        groups.setdefault(one["Attributes"]["MessageGroupId"], []).append(json.loads(one["Body"])["id"])
    contexts = [revision(1)[1], revision(2)[1], revision(1, OTHER)[1]]
    first, second, other = (context.idempotency_key for context in contexts)
    assert groups == {f"{COMPANY_ID}/{contexts[0].order_id}": [first, second], f"{COMPANY_ID}/{OTHER}": [other]}


def test_sqs_raises_for_a_queue_that_is_not_there_and_rejects_what_is_too_large(
    queue_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = python("cookbook/sqs.md")
    monkeypatch.setenv("ORDERS_QUEUE_URL", f"{queue_url}x")

    with pytest.raises(sink.sqs().exceptions.QueueDoesNotExist):
        sink.on_order(*revision(1))
    sink.LARGEST = 100
    with pytest.raises(Reject):
        sink.on_order(*revision(1))


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of the mock cluster of librdkafka, which lives as long as a client of it."""
    cluster = Producer({"bootstrap.servers": "mock", "test.mock.num.brokers": 1})
    (broker,) = cluster.list_topics(timeout=10).brokers.values()
    monkeypatch.setenv("KAFKA_SERVERS", f"{broker.host}:{broker.port}")
    yield f"{broker.host}:{broker.port}"
    cluster.flush(0)


def test_kafka_gets_the_revisions_of_each_order_in_one_partition(kafka: str) -> None:
    sink = python("cookbook/kafka.md")
    for order, context in (revision(1), revision(1, OTHER), revision(2)):
        sink.on_order(order, context)

    consumer = Consumer({"bootstrap.servers": kafka, "group.id": "shop", "auto.offset.reset": "earliest"})
    partitions = consumer.list_topics("orders", timeout=10).topics["orders"].partitions
    consumer.assign([TopicPartition("orders", one, 0) for one in partitions])
    received: dict[tuple[str, int], list[str]] = {}
    for message in consumer.consume(3, timeout=10):
        assert message.error() is None
        key, value = message.key(), message.value()
        assert isinstance(key, bytes)
        assert value is not None
        received.setdefault((key.decode(), message.partition() or 0), []).append(json.loads(value)["id"])
    consumer.close()

    ours = f"{COMPANY_ID}/{revision(1)[1].order_id}"
    assert [ids for (key, _), ids in received.items() if key == ours] == [
        [revision(number)[1].idempotency_key for number in (1, 2)]
    ]
    assert len(received) == 2


def test_kafka_raises_without_a_broker_and_goes_on_when_there_is_one(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = python("cookbook/kafka.md", changed=("20_000", "1_000"))
    monkeypatch.setenv("KAFKA_SERVERS", "127.0.0.1:1")

    with pytest.raises(KafkaException):
        sink.on_order(*revision(1))
    monkeypatch.setenv("KAFKA_SERVERS", kafka)
    sink.on_order(*revision(1))
    sink.LARGEST = 100
    with pytest.raises(Reject):
        sink.on_order(*revision(1))


def test_service_bus_is_called_as_its_client_allows_with_session_and_message_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client refuses ids that are too long; only what would connect is replaced, with the same signature."""
    send = create_autospec(ServiceBusSender.send_messages)
    monkeypatch.setattr(ServiceBusSender, "send_messages", send)
    key = "SharedAccessKeyName=send;SharedAccessKey=c2VjcmV0"
    monkeypatch.setenv("SERVICE_BUS", f"Endpoint=sb://shop.servicebus.windows.net/;{key}")
    sink = python("cookbook/service-bus.md")

    sink.on_order(*revision(1))
    sink.on_order(*revision(2))

    (sender, message), timeout = send.call_args_list[0]
    context = revision(1)[1]
    assert (message.message_id, message.session_id) == (
        context.idempotency_key,
        f"{COMPANY_ID}/{context.order_id}",
    )
    assert (sender.entity_name, message.content_type, timeout) == ("orders", "application/json", {"timeout": 30})
    assert json.loads(b"".join(message.body))["order"]["status"] == "Issued"
    assert send.call_args_list[1].args[0] is sender
    send.side_effect = ConnectionError
    with pytest.raises(ConnectionError):
        sink.on_order(*revision(3))
    sink.LARGEST = 100
    with pytest.raises(Reject):
        sink.on_order(*revision(3))
