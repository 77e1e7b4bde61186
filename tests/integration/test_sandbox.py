"""The simulated Channel Manager behaves like the real one: orders, the list, webhooks, limits and faults."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from app.dev.sandbox.process import Sandbox, start
from app.dev.sandbox.submission import order_body
from tests.eventually import eventually

PARTNER = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
UNKNOWN_ORDER = "00000000-0000-4000-8000-000000000001"
UNKNOWN = f"/channelManager/{UNKNOWN_ORDER}"
LIST = f"/channelManager/orders/{PARTNER}"
SECRET = "a-client-state"
ADDRESS = ("Production", "Museum & Co")


@dataclass
class Receiver:
    """A webhook receiver that keeps the bodies it gets and answers the next of `codes`, then 200."""

    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for body in self.bodies for event in body.get("value", body.get("values", [body]))]


@dataclass(frozen=True)
class Site:
    """One company for one test, and a client with its API key."""

    sandbox: Sandbox
    tenant: str
    id: str
    client: httpx.Client

    def create(self, reference: str, query: str = "", **fields: Any) -> Any:
        body = order_body(PARTNER, reference, **fields)
        return self.client.post(f"/channelManager{query}", json=body).raise_for_status().json()

    def get(self, order_id: str) -> Any:
        return self.client.get(f"/channelManager/{order_id}").raise_for_status().json()

    def codes(self, order_id: str, calls: int = 1) -> list[int]:
        return [self.client.get(f"/channelManager/{order_id}").status_code for _ in range(calls)]

    def settled(self, reference: str, **fields: Any) -> Any:
        order_id = self.create(reference, **fields)["orderId"]
        eventually(lambda: self.counts(order_id)["settlements"], what=f"{order_id} has settled")
        return self.get(order_id)

    def bulk(self, **fields: Any) -> list[str]:
        body = {"tenant": self.tenant, "environment": ADDRESS[0], "company": ADDRESS[1], "partner_id": PARTNER}
        return [row["order_id"] for row in self.sandbox.admin("POST", "orders", body | fields)["orders"]]

    def subscribe(self, receiver: Receiver, secret: str = SECRET, event: str = "ota_cm_order_processed") -> str:
        body = {"notificationUrl": receiver.url, "eventName": event, "clientState": secret}
        return str(self.client.post("/webhook", json=body).json()["id"])

    def fault(self, **rule: Any) -> None:
        self.sandbox.admin("POST", "faults", {"company_id": self.id, **rule})

    def change(self, **settings: Any) -> None:
        self.sandbox.admin("PATCH", "settings", settings)

    def stats(self) -> Any:
        return self.sandbox.admin("GET", "stats")

    def counts(self, order_id: str) -> dict[str, Any]:
        rows = self.sandbox.admin("GET", f"orders?company_id={self.id}")
        return next(row for row in rows if row["order_id"] == order_id)

    def wait_delivered(self) -> None:
        eventually(lambda: self.stats()["events"]["pending"] == 0, what="all events are delivered")


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    with start(seed=7, options=("--settle-after", "0.03")) as sandbox:
        yield sandbox


@pytest.fixture
def site(running: Sandbox, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A company of its own in the sandbox of this file, whose faults and settings are reset after the test."""
    tenant = request.node.name
    before = running.admin("GET", "settings")
    running.admin("DELETE", "stats")
    with client_of(running, tenant) as client:
        yield Site(running, tenant, running.company_id(tenant, *ADDRESS), client)
    running.admin("PUT", "faults", [])
    running.admin("PATCH", "settings", before)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(receiver.codes.pop(0) if receiver.codes else 200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield receiver
        server.shutdown()


def client_of(sandbox: Sandbox, tenant: str, key: str | None = None) -> httpx.Client:
    headers = {"x-np-api-key": key or f"key-of-{tenant}"}
    return httpx.Client(base_url=sandbox.base_url(tenant, *ADDRESS), headers=headers, trust_env=False, timeout=10)


def shape(value: Any) -> Any:
    """Return the names, their order and the JSON types of a value; of a list, those of each element."""
    if isinstance(value, dict):
        return [(name, shape(part)) for name, part in value.items()]
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def fixture(name: str) -> Any:
    return json.loads((Path(__file__).parents[1] / "fixtures" / name).read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly_while_a_call_hangs(number: signal.Signals) -> None:
    with start() as sandbox, client_of(sandbox, "signals") as client, ThreadPoolExecutor(1) as pool:
        sandbox.admin("POST", "faults", {"kind": "hang"})
        pool.submit(client.get, UNKNOWN)
        eventually(lambda: sandbox.admin("GET", "stats")["active"] == 1, what="a call hangs")
        os.kill(sandbox.process.pid, number)

        assert (sandbox.process.wait(10), sandbox.process.output.count("\n")) == (0, 1)


def test_the_same_seed_makes_the_same_ids_numbers_and_faults() -> None:
    def run(seed: int) -> list[Any]:
        with start(seed=seed) as sandbox, client_of(sandbox, "same") as client:
            site = Site(sandbox, "same", "", client)
            order = site.create("r", "?sync=1", payment_reference="p", items=["PKG1"])
            wallet = order["items"][0]["wallets"][0]
            sandbox.admin("POST", "faults", {"kind": "status", "rate": 0.5})
            codes = site.codes(UNKNOWN_ORDER, calls=20)
            assert {404, 503} == set(codes)
            return [order["orderId"], order["jobId"], wallet["walletId"], wallet["assets"], codes]

    assert run(3) == run(3)
    assert all(one != other for one, other in zip(run(3), run(4), strict=True))


# -- orders --


@pytest.mark.parametrize("status", ["Submitted", "Draft", "Issued", "Error", "Cancelled"])
def test_an_order_in_each_status_has_the_fields_of_upstream(site: Site, status: str) -> None:
    items = {"Error": ["FAIL-1", "PKG-100"], "Cancelled": ["31001"]}.get(status, ["31001", "PKG-100"])
    [order_id] = site.bulk(mix={status: 1}, items=items)

    order = site.get(order_id)

    expected = fixture(f"order-{status.lower()}.json")
    assert (expected["status"], shape(expected)) == (order["status"], shape(order))


def test_a_replaced_order_settles_in_the_background_with_empty_wallets_until_it_is_issued(site: Site) -> None:
    order = site.settled("r", quantity=2)
    site.change(settle_after=0.9)
    body = order_body(PARTNER, "r", payment_reference="pay-1", quantity=2)
    site.client.put(f"/channelManager/{order['orderId']}", json=body).raise_for_status()
    seen: dict[str, dict[str, Any]] = {}

    def issued() -> bool:
        found = site.get(order["orderId"])
        seen.setdefault(found["status"], found)
        return "Issued" in seen

    eventually(issued, what="it is issued")

    assert [*seen] == ["Submitted", "Scheduled", "Processing", "Issued"]
    last = seen.pop("Issued")
    assert (last["sellToOrderReference"], last["paymentReference"]) == ("R", "PAY-1")
    assert all(last[name] == order[name] for name in ("buyFromOrderReference", "receivedAt", "partnerId"))
    assert last["items"][0]["wallets"] != order["items"][0]["wallets"]
    for found in seen.values():
        wallets = found["items"][0]["wallets"]
        assert [(wallet["issuedAt"], wallet["assets"]) for wallet in wallets] == [("", [])] * 2
        assert [wallet["externalReferenceNumber"] for wallet in wallets] == ["r-31001-1", "r-31001-2"]


def test_item_numbers_decide_the_wallets_and_their_contents(site: Site) -> None:
    order = site.create("r", "?sync=1", quantity=3, items=["PKG-1", "GRP-1", "CPN-1"])

    package, _, coupon = order["items"]
    assert [len(item["wallets"]) for item in order["items"]] == [3, 1, 3]
    assert [asset["type"] for asset in package["wallets"][0]["assets"]] == ["ticket", "coupon"]
    assert [part["itemNumber"] for part in package["componentSchedule"]] == ["31010"]
    assert [asset["type"] for asset in coupon["wallets"][2]["assets"]] == ["coupon"]


@pytest.mark.parametrize(
    ("method", "path", "change", "status", "code", "message"),
    [
        ("GET", UNKNOWN, {}, 404, "resource_not_found", f"Order '{{{UNKNOWN_ORDER}}}' not found Not Found"),
        ("GET", "/channelManager/no-guid", {}, 400, "generic_error", "Invalid order id"),
        ("GET", f"{LIST}?sync=maybe", {}, 400, "generic_error", "type Boolean"),
        ("PUT", "/channelManager", {}, 404, "resource_not_found", "API endpoint not found Not Found"),
        ("OPTIONS", "/channelManager", {}, 400, "unsupported_http_method", "Http method OPTIONS is not supported"),
        ("POST", "/channelManager", {"partnerId": "x"}, 400, "generic_error", "Invalid partnerId"),
        ("POST", "/channelManager", {}, 400, "generic_error", "sellToOrderReference 'R' already exists"),
    ],
)
def test_a_wrong_call_is_answered_with_a_code_and_a_message(
    site: Site, method: str, path: str, change: dict[str, Any], status: int, code: str, message: str
) -> None:
    site.create("r ")

    response = site.client.request(method, path, json=order_body(PARTNER, "r") | change)

    assert (status, code) == (response.status_code, response.json()["code"])
    assert message in response.json()["message"]


def test_confirming_and_issuing_inside_a_call_send_no_event(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    draft = site.settled("r-1")
    path = f"/channelManager/{draft['orderId']}/CONFIRM"

    refused, first, again = [
        site.client.post(path, json=body) for body in ({}, {"paymentReference": "pay-9"}, {"paymentReference": "other"})
    ]
    issued = site.create("r-2", "?sync=true", payment_reference="p")
    failed = site.client.post("/channelManager?sync=1", json=order_body(PARTNER, "r-3", items=["FAIL-1"]))

    confirmed = first.json()
    assert (confirmed["status"], confirmed["paymentReference"], "manifestUrl" in confirmed) == ("Issued", "PAY-9", True)
    assert confirmed == again.json() == site.get(draft["orderId"])
    assert draft["items"][0]["wallets"][0]["assets"] == confirmed["items"][0]["wallets"][0]["assets"]
    assert (refused.status_code, issued["status"], failed.status_code) == (400, "Issued", 400)
    site.wait_delivered()
    assert [event["payload"]["status"] for event in receiver.events] == ["Draft"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/confirm", "Error", "Order cannot be confirmed in status Error"),
        ("PUT", "", "Issued", "Order cannot be replaced in status Issued"),
        ("PUT", "", "Draft", "partnerId and sellToOrderReference cannot be changed via PUT"),
        ("DELETE", "", "Submitted", "Order is mid-flight (status Submitted); retry once it has settled."),
    ],
)
def test_a_change_in_the_wrong_status_is_refused(site: Site, method: str, path: str, status: str, message: str) -> None:
    [order_id] = site.bulk(mix={status: 1})
    body = order_body(PARTNER, "another", payment_reference="p")

    answer = site.client.request(method, f"/channelManager/{order_id}{path}", json=body)

    assert (400, message) == (answer.status_code, answer.json()["message"])


def test_a_page_of_the_list_has_the_fields_of_upstream(site: Site) -> None:
    site.bulk()
    site.bulk(partner_id=None)

    page, without_versions = [site.client.get(LIST, params={"sync": sync}).json() for sync in ("true", "false")]

    assert shape(fixture("list-page.json")) == shape(page)
    assert page["data"] == [without_versions["data"][0] | {"rowVersion": page["data"][0]["rowVersion"]}]


# -- webhooks --


@pytest.mark.parametrize("wrapper", ["value", "values", "bare"])
def test_an_event_has_the_wrapper_of_the_settings(site: Site, receiver: Receiver, wrapper: str) -> None:
    site.change(shape=wrapper)
    site.subscribe(receiver)
    order = site.settled("r")

    site.wait_delivered()

    expected = fixture(f"webhook-{wrapper}.json")
    if wrapper != "bare":
        expected[wrapper] = expected[wrapper][:1]
    assert [shape(expected)] == [shape(body) for body in receiver.bodies]
    event, same = receiver.events[0], ("orderId", "buyFromOrderReference", "status")
    assert (SECRET, site.id, "Museum & Co") == (event["clientState"], event["companyId"], event["companyName"])
    assert {name: order[name] for name in same} == event["payload"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", event["timestamp"])


def test_only_active_subscriptions_to_the_event_get_it_until_they_acknowledge_it(
    site: Site, receiver: Receiver
) -> None:
    site.change(attempts=0, attempt_every=0.01)
    receiver.codes = [503, 401]
    off, deleted, on = [site.subscribe(receiver, secret) for secret in ("off", "deleted", "on")]
    other = site.subscribe(receiver, "other", event="other")
    site.sandbox.admin("PATCH", f"subscriptions/{off}", {"state": "Disabled"})
    codes = [site.client.delete(f"/webhook/{deleted}").status_code for _ in range(2)]

    [order_id] = site.bulk(events=1)

    site.wait_delivered()
    assert ([event["clientState"] for event in receiver.events], codes) == (["on"] * 3, [204, 404])
    assert site.stats()["deliveries"] == {"503": 1, "401": 1, "200": 1}
    assert (site.counts(order_id)["fired"], site.counts(order_id)["accepted"]) == (1, 1)
    listed = site.client.get("/webhook").json()
    shown = [(one["id"], one["clientState"], one["subscriptionState"]) for one in listed["value"]]
    assert shown == [(off, "off", "Disabled"), (on, "on", "Active"), (other, "other", "Active")]
    assert site.client.get(f"/webhook/{on}").json() == listed | {"value": [listed["value"][1]]}


def test_faults_of_events_repeat_delay_spoil_and_lose_them(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    kinds = ("duplicate", "late", "bad_secret", "lost", "none")
    kind_of = dict(zip(site.bulk(count=len(kinds)), kinds, strict=True))
    for order_id, kind in kind_of.items():
        if kind != "none":
            site.fault(kind=kind, order_id=order_id, seconds=0.3)
        site.sandbox.admin("POST", "fire", {"order_id": order_id})

    site.wait_delivered()

    got = [(kind_of[one["payload"]["orderId"]], one["clientState"] == SECRET) for one in receiver.events]
    once = [("bad_secret", False), ("duplicate", True), ("late", True), ("none", True)]
    assert (sorted(got), got[-1]) == (sorted([*once, ("duplicate", True)]), ("late", True))
    # A repeated event has the same timestamp, a late one that of its moment.
    times = [event["timestamp"] for event in receiver.events]
    assert (len(set(times)), sorted(set(times)).index(times[-1])) == (4, 1)
    assert site.stats()["events"]["lost"] == 1


# -- limits and faults of calls --


def test_five_calls_of_a_key_are_processed_at_once_and_calls_beyond_the_queue_get_429(site: Site) -> None:
    site.change(latency_ms=600, queue=4)
    [order_id] = site.bulk()

    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(lambda _: site.codes(order_id)[0], range(12)))

    assert sorted(codes) == [200] * 9 + [429] * 3
    stats, counts = site.stats(), site.counts(order_id)
    assert (stats["most_active"], stats["most_waiting"], stats["throttled"]["queue"]) == (5, 4, 3)
    assert (counts["gets"], counts["answered"]) == (12, 9)


def test_keys_do_not_share_slots_and_a_disconnected_call_frees_its_slot(site: Site) -> None:
    site.change(slots=1, queue=0)
    [order_id] = site.bulk()
    site.fault(kind="hang", order_id=order_id)
    with client_of(site.sandbox, site.tenant, "key-that-hangs") as hanging, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(hanging.get, f"/channelManager/{order_id}", timeout=1.0)
        eventually(lambda: site.stats()["active"] == 1, what="it hangs")

        assert (hanging.get(UNKNOWN).status_code, site.codes(UNKNOWN_ORDER)) == (429, [404])
        assert isinstance(stuck.exception(), httpx.ReadTimeout)
        eventually(lambda: site.stats()["active"] == 0, what="the slot is free again")
        assert site.stats()["operations"]["getOrder"]["abandoned"] == 1


def test_the_window_of_a_key_slides(site: Site) -> None:
    site.change(requests=3, window=1.0)
    assert site.codes(UNKNOWN_ORDER, calls=5) == [404, 404, 404, 429, 429]
    assert site.stats()["throttled"]["window"] == 2

    eventually(lambda: site.codes(UNKNOWN_ORDER) == [404], what="the window has moved on")


@pytest.mark.parametrize(
    ("rule", "status", "body", "retry_after"),
    [
        ({"kind": "status", "status": 429, "retry_after": 2}, 429, "Status 429", "2"),
        ({"kind": "status", "message": "down"}, 503, "down", None),
        ({"kind": "status", "status": 403}, 403, '"generic_error"', None),
        ({"kind": "status", "status": 404}, 404, '"resource_not_found"', None),
        ({"kind": "hang", "seconds": 0.1}, 408, '"server_timeout"', None),
        ({"kind": "rubbish"}, 200, "<html>", None),
        ({"kind": "truncated"}, 200, '{"orderId"', None),
        ({"kind": "wrong_order"}, 200, '{"orderId"', None),
    ],
)
def test_a_fault_changes_the_next_calls_of_its_company(
    site: Site, rule: dict[str, Any], status: int, body: str, retry_after: str | None
) -> None:
    [order_id] = site.bulk()
    site.fault(calls=2, **rule)
    with client_of(site.sandbox, "other") as other:
        assert other.get(UNKNOWN).json()["code"] == "resource_not_found"

    answers = [site.client.get(f"/channelManager/{order_id}") for _ in range(3)]

    assert [status, status, 200] == [answer.status_code for answer in answers]
    assert (body in answers[0].text, "orderId" in answers[2].text) == (True, True)
    assert retry_after == answers[0].headers.get("retry-after")
    assert site.counts(order_id)["answered"] == 1


def test_a_call_whose_answer_breaks_off_does_not_count_as_answered(site: Site) -> None:
    [order_id] = site.bulk()
    site.fault(kind="cut")

    with pytest.raises(httpx.RemoteProtocolError):
        site.get(order_id)
    assert (site.counts(order_id)["gets"], site.counts(order_id)["answered"]) == (1, 0)


def test_a_fault_strikes_the_first_calls_of_each_order_or_lasts_a_while(site: Site) -> None:
    made = site.bulk(count=2)
    site.fault(kind="status", operation="getOrder", status=404, first=2)
    assert [site.codes(one, calls=3) for one in made] == [[404, 404, 200]] * 2

    site.fault(kind="status", status=401, lasts=1.0)
    assert site.codes(made[0]) == [401]
    eventually(lambda: site.codes(made[0]) == [200], what="it is over")


@pytest.mark.parametrize(("path", "body"), [("faults", {"kind": "explode"}), ("orders", {"cuont": 3})])
def test_the_admin_api_refuses_unknown_fields_and_values(running: Sandbox, path: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        running.admin("POST", path, body)


def test_bulk_orders_have_the_mix_and_the_ids_of_the_request_in_each_company(site: Site) -> None:
    site.bulk(count=100, mix={"Issued": 0.71, "Draft": 0.29})
    site.bulk(order_ids=[UNKNOWN_ORDER], mix={"Error": 1})
    site.bulk(order_ids=[UNKNOWN_ORDER], tenant=f"{site.tenant}-2")

    statuses = [row["status"] for row in site.sandbox.admin("GET", f"orders?company_id={site.id}")]

    assert [statuses.count(name) for name in ("Issued", "Draft", "Error")] == [71, 29, 1]
    with client_of(site.sandbox, f"{site.tenant}-2") as other:
        assert (site.get(UNKNOWN_ORDER)["status"], other.get(UNKNOWN).json()["status"]) == ("Error", "Issued")
