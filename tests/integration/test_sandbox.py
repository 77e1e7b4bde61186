"""The simulated Channel Manager behaves like the real one: orders, the list, webhooks, limits and faults."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
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

FIXTURES = Path(__file__).parent.parent / "fixtures"
PARTNER = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
OTHER_PARTNER = "31e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
UNKNOWN_ORDER = "00000000-0000-4000-8000-000000000001"
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

    def statuses(self) -> list[str]:
        return sorted(event["payload"]["status"] for event in self.events)


@dataclass(frozen=True)
class Site:
    """One company for one test, and a client with its API key."""

    sandbox: Sandbox
    tenant: str
    id: str
    client: httpx.Client

    def create(self, reference: str, **fields: Any) -> str:
        response = self.client.post("/channelManager", json=order_body(PARTNER, reference, **fields))
        assert response.status_code == 201, response.text
        return str(response.json()["orderId"])

    def get(self, order_id: str) -> dict[str, Any]:
        response = self.client.get(f"/channelManager/{order_id}")
        assert response.status_code == 200, response.text
        order: dict[str, Any] = response.json()
        return order

    def codes(self, order_id: str, calls: int = 1) -> list[int]:
        return [self.client.get(f"/channelManager/{order_id}").status_code for _ in range(calls)]

    def settled(self, order_id: str) -> dict[str, Any]:
        def order() -> dict[str, Any] | None:
            found = self.get(order_id)
            return found if found["status"] in {"Issued", "Draft", "Error"} else None

        return eventually(order, what=f"{order_id} has settled") or {}

    def bulk(self, **fields: Any) -> list[str]:
        body = {"tenant": self.tenant, "environment": "Production", "company": "Museum & Co", **fields}
        return [row["order_id"] for row in self.sandbox.admin("POST", "orders", body)["orders"]]

    def listed(self, **query: str) -> dict[str, Any]:
        page: dict[str, Any] = self.client.get(f"/channelManager/orders/{PARTNER}", params=query).json()
        return page

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
def sandbox(running: Sandbox) -> Iterator[Sandbox]:
    """The sandbox of this file; its faults and settings are reset after the test."""
    before = running.admin("GET", "settings")
    running.admin("DELETE", "stats")
    yield running
    running.admin("PUT", "faults", [])
    running.admin("PATCH", "settings", before)


@pytest.fixture
def site(sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[Site]:
    tenant = request.node.name
    with client_of(sandbox, tenant) as client:
        yield Site(sandbox, tenant, sandbox.company_id(tenant, *ADDRESS), client)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(receiver.codes.pop(0) if receiver.codes else 200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()


def client_of(sandbox: Sandbox, tenant: str, key: str | None = None) -> httpx.Client:
    return httpx.Client(
        base_url=sandbox.base_url(tenant, *ADDRESS),
        headers={"x-np-api-key": key or f"key-of-{tenant}"},
        trust_env=False,
        timeout=10,
    )


def shape(value: Any) -> Any:
    """Return the names, their order and the JSON types of a value; of a list, those of each element."""
    if isinstance(value, dict):
        return [(name, shape(part)) for name, part in value.items()]
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def fixture(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


# -- the process --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly_while_a_call_hangs(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "app.dev.sandbox"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        httpx.post(f"{url}/_sandbox/faults", json={"kind": "hang"}, trust_env=False)
        host, port = url.removeprefix("http://").split(":")
        request = f"GET /t/e/c/channelManager/{UNKNOWN_ORDER} HTTP/1.1\r\nhost: x\r\nx-np-api-key: k\r\n\r\n"
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(request.encode())
            stats = f"{url}/_sandbox/stats"
            eventually(lambda: httpx.get(stats, trust_env=False).json()["active"] == 1, what="a call hangs")
            process.send_signal(number)
            output = process.communicate(timeout=10)

        assert (process.returncode, *output) == (0, "", "")


def test_the_same_seed_makes_the_same_ids_numbers_and_faults() -> None:
    def run(seed: int) -> list[Any]:
        with start(seed=seed) as sandbox, client_of(sandbox, "same") as client:
            body = order_body(PARTNER, "r", payment_reference="p", items=["PKG1"])
            order = client.post("/channelManager?sync=1", json=body).json()
            wallet = order["items"][0]["wallets"][0]
            made = [order["orderId"], order["jobId"], wallet["walletId"], wallet["assets"]]
            sandbox.admin("POST", "faults", {"kind": "status", "rate": 0.5})
            codes = [client.get(f"/channelManager/{UNKNOWN_ORDER}").status_code for _ in range(20)]
            assert {404, 503} == set(codes)
            return [made, codes]

    assert run(3) == run(3)
    assert run(3) != run(4)


# -- orders --


@pytest.mark.parametrize("status", ["Submitted", "Draft", "Issued", "Error", "Cancelled"])
def test_an_order_in_each_status_has_the_fields_of_upstream(site: Site, status: str) -> None:
    items = {"Error": ["FAIL-1", "PKG-100"], "Cancelled": ["31001"]}.get(status, ["31001", "PKG-100"])
    [order_id] = site.bulk(mix={status: 1}, items=items)

    order = site.get(order_id)

    expected = fixture(f"order-{status.lower()}.json")
    assert (expected["status"], shape(expected)) == (order["status"], shape(order))


def test_an_order_settles_in_the_background_with_empty_wallets_until_it_is_issued(site: Site) -> None:
    site.change(settle_after=0.9)
    order_id = site.create("r", payment_reference="pay-1", quantity=2)
    seen: list[dict[str, Any]] = []

    def issued() -> bool:
        order = site.get(order_id)
        if not seen or seen[-1]["status"] != order["status"]:
            seen.append(order)
        return bool(order["status"] == "Issued")

    eventually(issued, what="it is issued")

    assert [order["status"] for order in seen] == ["Submitted", "Scheduled", "Processing", "Issued"]
    for order in seen[:-1]:
        wallets = order["items"][0]["wallets"]
        assert [(wallet["issuedAt"], wallet["assets"]) for wallet in wallets] == [("", [])] * 2
        assert [wallet["externalReferenceNumber"] for wallet in wallets] == ["r-31001-1", "r-31001-2"]
        assert "manifestUrl" not in order
    assert (seen[-1]["sellToOrderReference"], seen[-1]["paymentReference"]) == ("R", "PAY-1")


def test_item_numbers_and_payment_decide_the_contents_and_the_status(site: Site) -> None:
    ends = {"p": (["FAIL-7"], "Error"), "": (["31001"], "Draft")}
    for payment, (items, status) in ends.items():
        made = site.create(f"end-{status}", items=items, payment_reference=payment)
        assert site.settled(made)["status"] == status
    order = site.settled(site.create("r", payment_reference="p", quantity=3, items=["PKG-1", "GRP-1", "CPN-1"]))
    package, group, coupon = order["items"]

    assert [len(item["wallets"]) for item in order["items"]] == [3, 1, 3]
    assert [asset["type"] for asset in package["wallets"][0]["assets"]] == ["ticket", "coupon"]
    assert [part["itemNumber"] for part in package["componentSchedule"]] == ["31010"]
    assert "componentSchedule" not in group
    assert [asset["type"] for asset in coupon["wallets"][2]["assets"]] == ["coupon"]


def test_paths_ignore_case_and_take_both_encodings_of_a_space(site: Site) -> None:
    order_id = site.create("r")
    for company in ("Museum%20%26%20Co", "Museum+%26+Co"):
        url = f"{site.sandbox.url}/{site.tenant}/Production/{company}/CHANNELmanager/{{{order_id.upper()}}}"
        assert order_id == site.client.get(url).json()["orderId"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        (
            "GET",
            f"/channelManager/{UNKNOWN_ORDER}",
            404,
            "resource_not_found",
            f"Order '{{{UNKNOWN_ORDER}}}' not found Not Found",
        ),
        ("GET", "/channelManager/no-guid", 400, "generic_error", "Invalid order id"),
        ("GET", "/channelManager/orders/no-guid", 400, "generic_error", "Invalid partnerId"),
        ("PUT", "/channelManager", 404, "resource_not_found", "API endpoint not found Not Found"),
        ("OPTIONS", "/channelManager", 400, "unsupported_http_method", "Http method OPTIONS is not supported"),
    ],
)
def test_an_error_carries_a_code_and_a_message(
    site: Site, method: str, path: str, status: int, code: str, message: str
) -> None:
    response = site.client.request(method, path)

    assert (status, {"code": code, "message": message}) == (response.status_code, response.json())


@pytest.mark.parametrize("change", [{"partnerId": "x"}, {"sellToOrderReference": ""}, {"items": []}, {"items": [{}]}])
def test_an_invalid_body_is_refused(site: Site, change: dict[str, Any]) -> None:
    response = site.client.post("/channelManager", json={**order_body(PARTNER, "r"), **change})

    assert (response.status_code, response.json()["code"]) == (400, "generic_error")


def test_a_reference_is_used_once_unless_its_order_is_in_error(site: Site) -> None:
    failed = site.create("r", items=["FAIL-1"])
    site.settled(failed)

    site.create("R ", payment_reference="p")

    assert site.codes(failed) == [404]
    assert site.client.post("/channelManager", json=order_body(PARTNER, "r")).status_code == 400


def test_confirm_issues_a_draft_without_an_event_and_can_be_repeated(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    draft = site.settled(site.create("r"))
    path = f"/channelManager/{draft['orderId']}/CONFIRM"

    answers = [site.client.post(path, json=body) for body in ({}, {"paymentReference": "pay-9"})]
    again = site.client.post(path, json={"paymentReference": "other"})

    confirmed = answers[1].json()
    assert [answer.status_code for answer in answers] == [400, 200]
    assert (confirmed["status"], confirmed["paymentReference"], "manifestUrl" in confirmed) == ("Issued", "PAY-9", True)
    assert confirmed == again.json() == site.get(draft["orderId"])
    assert draft["items"][0]["wallets"][0]["assets"] == confirmed["items"][0]["wallets"][0]["assets"]
    site.wait_delivered()
    assert receiver.statuses() == ["Draft"]
    site.sandbox.admin("POST", "settle", {"order_id": draft["orderId"], "status": "Error"})
    refused = site.client.post(path, json={"paymentReference": "p"})
    assert (refused.status_code, refused.json()["message"]) == (400, "Order cannot be confirmed in status Error")


@pytest.mark.parametrize("item", ["FAIL-1", "31001"])
def test_a_replaced_order_settles_again_with_new_tickets_under_the_same_ids(
    site: Site, receiver: Receiver, item: str
) -> None:
    site.subscribe(receiver)
    first = site.settled(site.create("r", items=[item]))

    body = order_body(PARTNER, "r", payment_reference="p")
    replaced = site.client.put(f"/channelManager/{first['orderId']}", json=body)
    second = site.settled(first["orderId"])

    assert (replaced.json()["status"], replaced.json()["statusMessage"]) == ("Submitted", "")
    same = ("orderId", "buyFromOrderReference", "receivedAt", "partnerId")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert second["items"][0]["wallets"] != first["items"][0]["wallets"]
    eventually(lambda: len(receiver.events) == 2, what="both events are there")
    assert receiver.statuses() == sorted([first["status"], "Issued"])
    assert site.counts(first["orderId"])["settlements"] == 2


def test_the_identity_of_an_order_and_an_issued_order_cannot_be_replaced(site: Site) -> None:
    [draft] = site.bulk(mix={"Draft": 1}, partner_id=PARTNER)
    [issued] = site.bulk(mix={"Issued": 1}, partner_id=PARTNER)
    reference = site.get(draft)["sellToOrderReference"]

    bodies = [(draft, OTHER_PARTNER, reference), (draft, PARTNER, "another"), (issued, PARTNER, "any")]
    answers = [site.client.put(f"/channelManager/{one}", json=order_body(*body)) for one, *body in bodies]

    assert [answer.status_code for answer in answers] == [400] * 3
    assert answers[2].json()["message"] == "Order cannot be replaced in status Issued"


@pytest.mark.parametrize(
    ("status", "answer", "afterwards"),
    [("Draft", 200, 404), ("Error", 200, 404), ("Issued", 200, 200), ("Submitted", 400, 200)],
)
def test_a_deleted_order_stays_only_if_it_was_issued(site: Site, status: str, answer: int, afterwards: int) -> None:
    [order_id] = site.bulk(mix={status: 1})

    deleted = site.client.delete(f"/channelManager/{order_id}")

    assert (answer, [afterwards]) == (deleted.status_code, site.codes(order_id))
    if answer == 200:
        assert (deleted.json()["status"], deleted.json()["items"]) == ("Cancelled", [])


def test_issuing_inside_the_call_sends_no_event(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    bodies = [order_body(PARTNER, "r-1", payment_reference="p"), order_body(PARTNER, "r-2", items=["FAIL-1"])]
    issued, failed = [site.client.post("/channelManager?sync=true", json=body) for body in bodies]
    site.settled(site.create("r-3"))

    assert (issued.json()["status"], failed.status_code) == ("Issued", 400)
    eventually(lambda: receiver.events, what="the third order is announced")
    assert receiver.statuses() == ["Draft"]


def test_the_list_has_the_fields_of_upstream(site: Site) -> None:
    site.bulk(partner_id=PARTNER, mix={"Draft": 1})
    site.bulk(partner_id=OTHER_PARTNER)

    page = site.listed(sync="true")

    assert shape(fixture("list-page.json")) == shape(page)
    assert "rowVersion" not in site.listed()["data"][0]


@pytest.mark.parametrize("sync", ["false", "true"])
def test_pages_follow_the_key(site: Site, sync: str) -> None:
    made = site.bulk(partner_id=PARTNER, count=5)
    page = site.listed(sync=sync, pageSize="2")
    pages = [page]
    while page["morePages"]:
        assert re.fullmatch("[A-Za-z0-9_-]+", page["nextPageKey"])
        assert page["nextPageURL"].startswith("https://api.npretail.app/")
        page = site.listed(pageKey=page["nextPageKey"], pageSize="2")
        pages.append(page)

    assert [len(page["data"]) for page in pages] == [2, 2, 1]
    assert sorted(made) == sorted(row["orderId"] for page in pages for row in page["data"])
    assert (page["nextPageKey"], page["nextPageURL"]) == ("", "")


@pytest.mark.parametrize("query", ["sync=maybe", "sync=true&lastRowVersion=x", "pageKey=!!", "pageSize=x"])
def test_an_unreadable_query_of_the_list_is_refused(site: Site, query: str) -> None:
    assert site.client.get(f"/channelManager/orders/{PARTNER}?{query}").status_code == 400


def test_sync_lists_what_changed_since_a_row_version(site: Site) -> None:
    first, second = site.bulk(partner_id=PARTNER, mix={"Draft": 1}, count=2)
    versions = [row["rowVersion"] for row in site.listed(sync="true")["data"]]
    assert versions == sorted(versions, key=int)

    assert site.listed(sync="true", lastRowVersion=versions[-1])["data"] == []
    site.client.post(f"/channelManager/{first}/confirm", json={"paymentReference": "p"}).raise_for_status()
    site.client.delete(f"/channelManager/{second}").raise_for_status()

    changed = site.listed(sync="true", lastRowVersion=versions[-1])["data"]
    assert [(row["orderId"], row["status"]) for row in changed] == [(first, "Issued")]


# -- companies and keys --


def test_only_declared_companies_exist_and_check_their_keys() -> None:
    company = {"id": "B56A418D-8205-4D3A-BDBB-25D94E42ABBD", "name": "Zoo", "tenant": "Tenant", "environment": "Prod"}
    with start() as sandbox:
        declared = sandbox.admin("POST", "companies", company | {"api_keys": ["good"], "forbidden_keys": ["weak"]})

        def call(path: str, key: str = "good") -> tuple[int, str]:
            url = f"{sandbox.url}/{path}/channelManager/{UNKNOWN_ORDER}"
            response = httpx.get(url, headers={"x-np-api-key": key}, trust_env=False)
            is_json = response.headers["content-type"] == "application/json"
            return response.status_code, response.json()["code"] if is_json else response.text

        assert declared["id"] == "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
        assert call("tenant/PROD/zoo") == (404, "resource_not_found")
        assert call("tenant/PROD/zoo", "") == (401, "Unauthorized")
        assert call("tenant/PROD/zoo", "bad") == (401, "Unauthorized")
        assert call("tenant/PROD/zoo", "weak") == (403, "generic_error")
        assert call("other/Prod/x") == (404, "saas_tenant_not_found")
        assert call("Tenant/Test/x") == (404, "saas_environment_not_found")
        assert call("Tenant/Prod/x") == (404, "saas_company_not_found")


# -- webhooks --


@pytest.mark.parametrize("wrapper", ["value", "values", "bare"])
def test_an_event_has_the_wrapper_of_the_settings(site: Site, receiver: Receiver, wrapper: str) -> None:
    site.change(shape=wrapper)
    site.subscribe(receiver)
    order = site.settled(site.create("r"))

    eventually(lambda: receiver.bodies, what="the event is there")

    expected = fixture(f"webhook-{wrapper}.json")
    if wrapper != "bare":
        expected[wrapper] = expected[wrapper][:1]
    assert shape(expected) == shape(receiver.bodies[0])
    event, same = receiver.events[0], ("orderId", "buyFromOrderReference", "status")
    assert (SECRET, site.id, "Museum & Co") == (event["clientState"], event["companyId"], event["companyName"])
    assert {name: order[name] for name in same} == event["payload"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", event["timestamp"])


def test_subscriptions_are_created_listed_and_deleted(site: Site, receiver: Receiver) -> None:
    first, second = site.subscribe(receiver, "one"), site.subscribe(receiver, "two")

    both = site.client.get("/webhook").json()
    alone = site.client.get(f"/webhook/{first}").json()["value"][0]
    codes = [site.client.delete(f"/webhook/{first}").status_code for _ in range(2)]

    assert ([one["clientState"] for one in both["value"]], "@odata.context" in both) == (["one", "two"], True)
    assert ("Active", "1.0", site.id) == (alone["subscriptionState"], alone["eventVersion"], alone["companyId"])
    assert codes == [204, 404]
    for body in ({"notificationUrl": "u"}, {"notificationUrl": "u", "eventName": "e", "clientState": "x" * 51}):
        assert site.client.post("/webhook", json=body).status_code == 400
    assert [second] == [one["id"] for one in site.client.get("/webhook").json()["value"]]
    assert site.client.get(f"/webhook/{first}").status_code == 404


def test_only_active_subscriptions_to_the_event_get_it(site: Site, receiver: Receiver) -> None:
    off = site.subscribe(receiver, "off")
    site.subscribe(receiver, "other", event="other")
    site.subscribe(receiver, "on")
    site.sandbox.admin("PATCH", f"subscriptions/{off}", {"state": "Disabled"})

    site.bulk(events=1)

    site.wait_delivered()
    assert [event["clientState"] for event in receiver.events] == ["on"]
    assert site.client.get(f"/webhook/{off}").json()["value"][0]["subscriptionState"] == "Disabled"


@pytest.mark.parametrize(("attempts", "codes", "accepted"), [(1, [503], 0), (0, [503, 500, 401], 1)])
def test_a_delivery_has_as_many_attempts_as_the_settings_allow(
    site: Site, receiver: Receiver, attempts: int, codes: list[int], accepted: int
) -> None:
    site.change(attempts=attempts, attempt_every=0.01)
    receiver.codes = list(codes)
    site.subscribe(receiver)
    [order_id] = site.bulk(events=1)

    site.wait_delivered()

    results = {str(code): 1 for code in codes} | ({"200": 1} if accepted else {})
    assert (site.stats()["deliveries"], len(receiver.bodies)) == (results, len(results))
    assert len({json.dumps(body) for body in receiver.bodies}) == 1
    assert (site.counts(order_id)["fired"], site.counts(order_id)["accepted"]) == (1, accepted)


def test_an_event_is_fired_again_with_the_same_or_a_new_timestamp(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    [order_id] = site.bulk(mix={"Draft": 1}, events=1)
    site.sandbox.admin("POST", "settle", {"order_id": order_id, "status": "Issued"})

    site.sandbox.admin("POST", "fire", {"order_id": order_id, "timestamp": "last", "times": 2})
    site.sandbox.admin("POST", "fire", {"order_id": order_id, "company_id": site.id})

    eventually(lambda: len(receiver.events) == 4, what="all are there")
    assert len({event["timestamp"] for event in receiver.events}) == 2
    assert receiver.statuses() == ["Draft", "Draft", "Draft", "Issued"]
    assert site.counts(order_id)["fired"] == 4


def test_faults_of_events_repeat_delay_spoil_and_lose_them(site: Site, receiver: Receiver) -> None:
    site.subscribe(receiver)
    kinds = ("duplicate", "late", "bad_secret", "lost", "none")
    orders = dict(zip(kinds, site.bulk(count=len(kinds)), strict=True))
    for kind in kinds[:-1]:
        site.fault(kind=kind, order_id=orders[kind], **({"seconds": 0.3} if kind == "late" else {}))
    for order_id in orders.values():
        site.sandbox.admin("POST", "fire", {"order_id": order_id})

    site.wait_delivered()

    by_order = {kind: [e for e in receiver.events if e["payload"]["orderId"] == orders[kind]] for kind in kinds}
    assert [len(by_order[kind]) for kind in kinds] == [2, 1, 1, 0, 1]
    assert by_order["duplicate"][0] == by_order["duplicate"][1]
    assert receiver.events[-1] == by_order["late"][0]
    assert by_order["late"][0]["timestamp"] < by_order["none"][0]["timestamp"]
    assert [by_order[kind][0]["clientState"] == SECRET for kind in ("bad_secret", "none")] == [False, True]
    assert site.stats()["events"]["lost"] == 1


# -- limits and faults of calls --


def test_five_calls_of_a_key_are_processed_at_once_and_calls_beyond_the_queue_get_429(site: Site) -> None:
    site.change(latency_ms=600, queue=4)
    [order_id] = site.bulk()

    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(lambda _: site.codes(order_id)[0], range(12)))

    assert {code: codes.count(code) for code in set(codes)} == {200: 9, 429: 3}
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

        assert hanging.get(f"/channelManager/{UNKNOWN_ORDER}").status_code == 429
        assert site.codes(UNKNOWN_ORDER) == [404]
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
        ({"kind": "status", "status": 429}, 429, "Status 429", None),
        ({"kind": "status", "status": 429, "retry_after": 2}, 429, "Status 429", "2"),
        ({"kind": "status", "status": 503, "message": "down"}, 503, "down", None),
        ({"kind": "status", "status": 403}, 403, '"generic_error"', None),
        ({"kind": "status", "status": 404}, 404, '"resource_not_found"', None),
        ({"kind": "status", "status": 404, "code": "saas_company_not_found"}, 404, '"saas_company_not_found"', None),
        ({"kind": "status", "status": 404, "message": "no such site"}, 404, "no such site", None),
        ({"kind": "hang", "seconds": 0.1}, 408, '"server_timeout"', None),
        ({"kind": "rubbish"}, 200, "<html>", None),
    ],
)
def test_a_fault_changes_the_next_calls_of_its_company(
    site: Site, rule: dict[str, Any], status: int, body: str, retry_after: str | None
) -> None:
    [order_id] = site.bulk()
    site.fault(calls=2, **rule)
    with client_of(site.sandbox, "other") as other:
        assert other.get(f"/channelManager/{UNKNOWN_ORDER}").status_code == 404

    answers = [site.client.get(f"/channelManager/{order_id}") for _ in range(3)]

    assert [status, status, 200] == [answer.status_code for answer in answers]
    assert (body in answers[0].text, "orderId" in answers[2].text) == (True, True)
    assert retry_after == answers[0].headers.get("retry-after")
    assert site.counts(order_id)["answered"] == 1


def test_answers_are_truncated_cut_or_of_another_order(site: Site) -> None:
    truncated, cut, wrong = made = site.bulk(count=3)
    for kind, order_id in zip(("truncated", "cut", "wrong_order"), made, strict=True):
        site.fault(kind=kind, order_id=order_id)

    with pytest.raises(json.JSONDecodeError):
        site.client.get(f"/channelManager/{truncated}").json()
    with pytest.raises(httpx.RemoteProtocolError):
        site.client.get(f"/channelManager/{cut}")
    assert wrong != site.get(wrong)["orderId"]
    assert [(site.counts(one)["gets"], site.counts(one)["answered"]) for one in made] == [(1, 0)] * 3


def test_a_fault_strikes_the_first_calls_of_each_order_or_lasts_a_while(site: Site) -> None:
    made = site.bulk(count=2)
    site.fault(kind="status", operation="getOrder", status=404, first=2)
    assert [site.codes(one, calls=3) for one in made] == [[404, 404, 200]] * 2

    site.fault(kind="status", status=401, lasts=1.0)
    assert site.codes(made[0]) == [401]
    eventually(lambda: site.codes(made[0]) == [200], what="it is over")


def test_rules_are_listed_removed_and_replaced(sandbox: Sandbox) -> None:
    first, second = sandbox.admin("POST", "faults", [{"kind": "latency", "order_id": UNKNOWN_ORDER}, {"kind": "lost"}])
    assert [first, second] == [rule["number"] for rule in sandbox.admin("GET", "faults")]
    assert [second] == [rule["number"] for rule in sandbox.admin("DELETE", f"faults/{first}")]
    sandbox.admin("PUT", "faults", {"kind": "hang", "order_id": UNKNOWN_ORDER})
    assert [rule["kind"] for rule in sandbox.admin("GET", "faults")] == ["hang"]
    assert sandbox.admin("DELETE", "faults") == []


# -- the admin API --


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "faults", {"kind": "explode"}),
        ("POST", "faults", {"kind": "status", "statsu": 500}),
        ("POST", "orders", {"cuont": 3}),
        ("POST", "companies", {"id": "x", "name": "n", "tenant": "t", "environment": "e"}),
        ("POST", "fire", {"order_id": UNKNOWN_ORDER, "when": "now"}),
        ("PATCH", "settings", {"slots": 0}),
    ],
)
def test_the_admin_api_refuses_unknown_fields_and_values(
    sandbox: Sandbox, method: str, path: str, body: dict[str, Any]
) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        sandbox.admin(method, path, body)


def test_bulk_orders_have_the_mix_and_the_ids_of_the_request(site: Site) -> None:
    site.bulk(count=100, mix={"Issued": 0.71, "Draft": 0.29})
    site.bulk(order_ids=[UNKNOWN_ORDER], reference="named", mix={"Error": 1})

    statuses = [row["status"] for row in site.sandbox.admin("GET", f"orders?company_id={site.id}")]

    assert [statuses.count(name) for name in ("Issued", "Draft", "Error")] == [71, 29, 1]
    assert site.get(UNKNOWN_ORDER)["status"] == "Error"


def test_the_same_order_id_in_two_companies_is_two_orders(site: Site) -> None:
    order_id = "00000000-0000-4000-8000-00000000abcd"
    site.bulk(order_ids=[order_id], mix={"Draft": 1})
    site.bulk(order_ids=[order_id], mix={"Issued": 1}, tenant=f"{site.tenant}-2")
    with client_of(site.sandbox, f"{site.tenant}-2") as other:
        assert other.get(f"/channelManager/{order_id}").json()["status"] == "Issued"
    assert site.get(order_id)["status"] == "Draft"
