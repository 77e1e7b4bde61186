"""The simulated Channel Manager must be as exact and as awkward as the real one, or it proves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from app.dev.processes import Process
from app.dev.sandbox.process import Sandbox, start
from app.dev.sandbox.submission import order_body
from tests.eventually import eventually
from tests.pids import is_running

FIXTURES = Path(__file__).parent.parent / "fixtures"
PARTNER = "21e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
OTHER_PARTNER = "31e8c1d2-3f4a-4c5b-9e6d-7f8a9b0c1d2e"
NOBODY = "00000000-0000-4000-8000-000000000001"
NO_GUID = "00000000-0000-0000-0000-000000000000"
SECRET = "a-client-state"
QUICK = 0.03


@dataclass
class Hook:
    """A webhook receiver that keeps what it gets and answers the next of `codes`, then 200."""

    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for body in self.bodies for event in body.get("value", body.get("values", [body]))]

    def orders(self) -> list[str]:
        return [event["payload"]["orderId"] for event in self.events]


@dataclass(frozen=True)
class Venue:
    """One company of its own for one test, with a key of its own."""

    sandbox: Sandbox
    tenant: str
    id: str
    client: httpx.Client

    def create(self, reference: str, *, query: str = "", **wishes: Any) -> str:
        response = self.client.post(f"/channelManager{query}", json=order_body(PARTNER, reference, **wishes))
        assert response.status_code == 201, response.text
        return str(response.json()["orderId"])

    def get(self, order_id: str) -> dict[str, Any]:
        response = self.client.get(f"/channelManager/{order_id}")
        assert response.status_code == 200, response.text
        order: dict[str, Any] = response.json()
        return order

    def settled(self, order_id: str) -> dict[str, Any]:
        def terminal() -> dict[str, Any] | None:
            order = self.get(order_id)
            return order if order["status"] in {"Issued", "Draft", "Error"} else None

        order = eventually(terminal, what=f"{order_id} has settled")
        assert order is not None
        return order

    def bulk(self, **wishes: Any) -> list[str]:
        wish = {"tenant": self.tenant, "environment": "Production", "company": "Museum & Co", **wishes}
        return [row["order_id"] for row in self.sandbox.admin("POST", "orders", wish)["orders"]]

    def subscribe(self, hook: Hook, secret: str = SECRET) -> str:
        wish = {"notificationUrl": hook.url, "eventName": "ota_cm_order_processed", "clientState": secret}
        response = self.client.post("/webhook", json=wish)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def fault(self, **rule: Any) -> None:
        self.sandbox.admin("POST", "faults", {"company_id": self.id, **rule})

    def counts(self, order_id: str) -> dict[str, Any]:
        rows = self.sandbox.admin("GET", f"orders?company_id={self.id}")
        return next(row for row in rows if row["order_id"] == order_id)


@pytest.fixture(scope="module")
def running() -> Iterator[Sandbox]:
    """One sandbox for all tests of this file that need no other."""
    with start(seed=7, options=("--settle-after", str(QUICK))) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Iterator[Sandbox]:
    """The shared sandbox, put back to its first settings afterwards."""
    before = running.admin("GET", "settings")
    running.admin("DELETE", "stats")
    yield running
    running.admin("PUT", "faults", [])
    running.admin("PATCH", "settings", before)
    running.admin("POST", "resume")


@pytest.fixture
def venue(sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[Venue]:
    """A company and a key that no other test uses."""
    with at(sandbox, request.node.name) as client:
        yield Venue(
            sandbox, request.node.name, sandbox.company_id(request.node.name, "Production", "Museum & Co"), client
        )


@pytest.fixture
def hook() -> Iterator[Hook]:
    """A webhook receiver."""
    hook = Hook()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            token = parse_qs(urlsplit(self.path).query).get("validationToken", [""])[0]
            if token:
                hook.tokens.append(token)
            else:
                hook.bodies.append(json.loads(body))
            self.send_response(hook.codes.pop(0) if hook.codes else 200)
            answer = token.encode()
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is the base class's)
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        hook.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hook
        server.shutdown()
        thread.join()


def at(sandbox: Sandbox, tenant: str, key: str | None = None) -> httpx.Client:
    return httpx.Client(
        base_url=sandbox.base_url(tenant, "Production", "Museum & Co"),
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


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "app.dev.sandbox", *options]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_one_line_and_ends_in_good_order_even_while_a_call_hangs(number: signal.Signals) -> None:
    with subprocess.Popen(command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        httpx.post(f"{url}/_sandbox/faults", json={"kind": "hang"}, trust_env=False)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as caller:
            caller.sendall(
                f"GET /t/e/c/channelManager/{NOBODY} HTTP/1.1\r\nhost: x\r\nx-np-api-key: k\r\n\r\n".encode()
            )
            eventually(
                lambda: httpx.get(f"{url}/_sandbox/stats", trust_env=False).json()["active"] == 1, what="a call hangs"
            )
            process.send_signal(number)
            rest, errors = process.communicate(timeout=10)

        assert (process.returncode, rest, errors) == (0, "", "")


def test_it_ends_when_whoever_started_it_is_killed(tmp_path: Path) -> None:
    parent_code = (
        "import subprocess, sys, signal\n"
        "child = subprocess.Popen([sys.executable, '-m', 'app.dev.sandbox'], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print('child', child.pid)\n"
        "signal.pause()\n"
    )
    with Process.start([sys.executable, "-c", parent_code], log=tmp_path / "log") as parent:
        child = int(parent.wait_for_line("child", 15).split()[1])

        os.kill(parent.pid, signal.SIGKILL)

        eventually(lambda: not is_running(child), what="the sandbox is gone")


def test_a_setting_that_cannot_be_is_refused_at_start() -> None:
    done = subprocess.run(command("--digits", "8"), capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 2
    assert "digits" in done.stderr


def test_the_same_seed_makes_the_same_ids_and_numbers() -> None:
    def run(seed: int) -> list[Any]:
        with start(seed=seed) as sandbox, at(sandbox, "same") as client:
            made = []
            for number in range(3):
                body = order_body(PARTNER, f"r{number}", payment_reference="p", items=["PKG1"])
                order = client.post("/channelManager?sync=1", json=body).json()
                wallet = order["items"][0]["wallets"][0]
                made.append(
                    (order["orderId"], order["jobId"], wallet["walletId"], wallet["assets"][0]["referenceNumber"])
                )
            sandbox.admin("POST", "faults", {"kind": "status", "rate": 0.5})
            answers = [client.get(f"/channelManager/{made[0][0]}").status_code for _ in range(20)]
            assert {200, 503} == set(answers)
            return [made, answers]

    assert run(3) == run(3)
    assert run(3) != run(4)


# -- orders --


@pytest.mark.parametrize(
    ("status", "file", "items"),
    [
        ("Submitted", "order-submitted.json", ["31001", "PKG-100"]),
        ("Draft", "order-draft.json", ["31001", "PKG-100"]),
        ("Issued", "order-issued.json", ["31001", "PKG-100"]),
        ("Error", "order-error.json", ["FAIL-1", "PKG-100"]),
        ("Cancelled", "order-cancelled.json", ["31001"]),
    ],
)
def test_an_order_in_each_status_has_the_fields_of_upstream(
    venue: Venue, status: str, file: str, items: list[str]
) -> None:
    [order_id] = venue.bulk(mix={status: 1}, items=items)

    order = venue.get(order_id)

    assert fixture(file)["status"] == order["status"]
    assert shape(fixture(file)) == shape(order)


def test_an_order_goes_from_submitted_over_scheduled_and_processing_to_issued_as_shells(venue: Venue) -> None:
    venue.sandbox.admin("PATCH", "settings", {"settle_after": 0.9})
    order_id = venue.create("r", payment_reference="pay-1", quantity=2)
    seen: list[dict[str, Any]] = []

    def issued() -> bool:
        order = venue.get(order_id)
        if not seen or seen[-1]["status"] != order["status"]:
            seen.append(order)
        return bool(order["status"] == "Issued")

    eventually(issued, what="it is issued")

    assert [order["status"] for order in seen] == ["Submitted", "Scheduled", "Processing", "Issued"]
    for order in seen[:-1]:
        wallets = order["items"][0]["wallets"]
        assert [
            (w["walletId"], w["walletReferenceNumber"], w["issuedAt"], w["unitPriceInclVat"], w["assets"])
            for w in wallets
        ] == [(NO_GUID, "", "", 0, [])] * 2
        assert [wallet["externalReferenceNumber"] for wallet in wallets] == ["r-31001-1", "r-31001-2"]
        assert "manifestUrl" not in order
    assert (seen[-1]["sellToOrderReference"], seen[-1]["paymentReference"]) == ("R", "PAY-1")
    assert len({order["receivedAt"] for order in seen}) == 1


@pytest.mark.parametrize(
    ("items", "payment", "status"),
    [(["31001"], "p", "Issued"), (["31001"], "", "Draft"), (["31001", "FAIL-7"], "p", "Error")],
)
def test_the_payment_reference_and_the_items_decide_how_an_order_ends(
    venue: Venue, items: list[str], payment: str, status: str
) -> None:
    order = venue.settled(venue.create("r", items=items, payment_reference=payment))

    assert status == order["status"]
    assert (status == "Error") == ("FAIL-7" in order["statusMessage"])
    assert (status == "Error") == (order["jobId"] == "")
    assert (status == "Issued") == ("manifestUrl" in order)


def test_the_item_number_asks_for_packages_groups_coupons_and_no_manifest(venue: Venue) -> None:
    order = venue.settled(
        venue.create("r", payment_reference="p", quantity=3, items=["PKG-1", "GRP-1", "CPN-1", "NOMANIFEST-1"])
    )
    package, group, coupon, _ = order["items"]

    assert [len(item["wallets"]) for item in order["items"]] == [3, 1, 3, 3]
    assert [asset["type"] for asset in package["wallets"][0]["assets"]] == ["ticket", "coupon"]
    assert [part["itemNumber"] for part in package["componentSchedule"]] == ["31010"]
    assert "componentSchedule" not in group
    assert [asset["type"] for asset in coupon["wallets"][2]["assets"]] == ["coupon"]
    assert "manifestUrl" not in json.dumps(order)


def test_an_order_with_an_item_that_is_stuck_stays_in_processing(venue: Venue) -> None:
    stuck, sound = venue.create("r-1", items=["STUCK-1"]), venue.create("r-2")

    venue.settled(sound)

    eventually(lambda: venue.get(stuck)["status"] == "Processing", what="it is being processed")
    assert venue.counts(stuck)["settlements"] == []


def test_literal_segments_compare_without_case_and_the_company_comes_in_either_encoding(venue: Venue) -> None:
    order_id = venue.create("r")
    for company in ("Museum%20%26%20Co", "Museum+%26+Co"):
        url = f"{venue.sandbox.url}/{venue.tenant}/Production/{company}/CHANNELmanager/{{{order_id.upper()}}}"
        assert order_id == venue.client.get(url).json()["orderId"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "message"),
    [
        ("GET", f"/channelManager/{NOBODY}", 404, "resource_not_found", f"Order '{{{NOBODY}}}' not found Not Found"),
        ("GET", "/channelManager/no-guid", 400, "generic_error", "Invalid order id"),
        ("GET", "/channelManager/orders/no-guid", 400, "generic_error", "Invalid partnerId"),
        ("PUT", "/channelManager", 404, "resource_not_found", "API endpoint not found Not Found"),
        ("OPTIONS", "/channelManager", 400, "unsupported_http_method", "Http method OPTIONS is not supported"),
        ("POST", "/channelManager", 400, "generic_error", "Body must be a JSON object"),
        ("GET", "/otaChannelManager/x", 404, "resource_not_found", "API endpoint not found Not Found"),
    ],
)
def test_an_error_carries_a_code_and_a_message(
    venue: Venue, method: str, path: str, status: int, code: str, message: str
) -> None:
    response = venue.client.request(method, path)

    assert (status, {"code": code, "message": message}) == (response.status_code, response.json())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partnerId": "x"}, "partnerId is not a valid GUID"),
        ({"sellToOrderReference": ""}, "Required field 'sellToOrderReference' cannot be empty"),
        ({"sellToEmail": []}, "Optional field 'sellToEmail' must be a primitive value"),
        ({"items": []}, "items array must contain at least one entry"),
        ({"items": [{"itemNumber": "UNKNOWN-1"}]}, "Unknown item 'UNKNOWN-1'"),
        ({"items": [{"itemNumber": "1", "quantity": 0}]}, "quantity must be >= 1 (line 100000)"),
        ({"items": [{"itemNumber": "1", "visitDate": "1.6.26"}]}, "Required field 'visitDate' must be YYYY-MM-DD"),
    ],
)
def test_a_body_that_is_not_right_is_refused_with_the_reason(
    venue: Venue, change: dict[str, Any], message: str
) -> None:
    response = venue.client.post("/channelManager", json={**order_body(PARTNER, "r"), **change})

    assert (400, message) == (response.status_code, response.json()["message"])


def test_a_visit_in_the_past_is_refused(venue: Venue) -> None:
    body = order_body(PARTNER, "r")
    body["items"][0]["visitDate"] = (datetime.now(UTC) - timedelta(days=2)).date().isoformat()

    assert venue.client.post("/channelManager", json=body).status_code == 400


def test_a_reference_is_taken_once_unless_an_order_in_error_holds_it(venue: Venue) -> None:
    failed = venue.create("r", items=["FAIL-1"])
    venue.settled(failed)

    renewed = venue.create("R ", payment_reference="p")
    again = venue.client.post("/channelManager", json=order_body(PARTNER, "r"))

    assert failed != renewed
    assert venue.client.get(f"/channelManager/{failed}").status_code == 404
    assert again.status_code == 400


def test_confirm_issues_a_draft_without_an_event_and_is_repeatable(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    draft = venue.settled(venue.create("r"))
    path = f"/channelManager/{draft['orderId']}/CONFIRM"

    missing = venue.client.post(path, json={})
    first = venue.client.post(path, json={"paymentReference": "pay-9"})
    second = venue.client.post(path, json={"paymentReference": "other"})

    assert (missing.status_code, first.status_code, second.status_code) == (400, 200, 200)
    assert (first.json()["status"], first.json()["paymentReference"]) == ("Issued", "PAY-9")
    assert first.json() == second.json() == venue.get(draft["orderId"])
    assert "manifestUrl" in first.json()
    assert draft["items"][0]["wallets"][0]["assets"] == first.json()["items"][0]["wallets"][0]["assets"]
    eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["pending"] == 0, what="all is sent")
    assert [event["payload"]["status"] for event in hook.events] == ["Draft"]


@pytest.mark.parametrize("status", ["Submitted", "Scheduled", "Processing", "Error", "Cancelled"])
def test_confirm_takes_nothing_but_a_draft(venue: Venue, status: str) -> None:
    [order_id] = venue.bulk(mix={status: 1})

    response = venue.client.post(f"/channelManager/{order_id}/confirm", json={"paymentReference": "p"})

    assert (400, f"Order cannot be confirmed in status {status}") == (response.status_code, response.json()["message"])


def test_replacing_settles_and_fires_again_under_the_same_ids(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    failed = venue.settled(venue.create("r", items=["FAIL-1"], payment_reference="p"))

    replaced = venue.client.put(
        f"/channelManager/{failed['orderId']}", json=order_body(PARTNER, "r", payment_reference="p")
    )
    repaired = venue.settled(failed["orderId"])

    assert (
        replaced.status_code,
        replaced.json()["status"],
        replaced.json()["statusMessage"],
    ) == (200, "Submitted", "")
    same = ("orderId", "buyFromOrderReference", "receivedAt", "partnerId")
    assert [failed[name] for name in same] == [repaired[name] for name in same]
    assert repaired["status"] == "Issued"
    eventually(lambda: len(hook.events) == 2, what="both events are there")
    assert [event["payload"]["status"] for event in hook.events] == ["Error", "Issued"]
    assert len({event["timestamp"] for event in hook.events}) == 2
    assert len(venue.counts(failed["orderId"])["settlements"]) == 2


def test_a_replaced_draft_gets_new_tickets(venue: Venue) -> None:
    draft = venue.settled(venue.create("r"))
    venue.client.put(f"/channelManager/{draft['orderId']}", json=order_body(PARTNER, "r")).raise_for_status()

    renewed = venue.settled(draft["orderId"])

    tickets = [order["items"][0]["wallets"][0]["assets"][0]["referenceNumber"] for order in (draft, renewed)]
    assert tickets[0] != tickets[1]


def test_identity_cannot_be_replaced_nor_an_issued_order(venue: Venue) -> None:
    draft, issued = venue.bulk(mix={"Draft": 1}) + venue.bulk(mix={"Issued": 1})
    reference = venue.get(draft)["sellToOrderReference"]

    def refused(order_id: str, partner: str, name: str) -> str:
        response = venue.client.put(f"/channelManager/{order_id}", json=order_body(partner, name))
        assert response.status_code == 400
        return str(response.json()["message"])

    assert refused(draft, OTHER_PARTNER, reference) == "partnerId cannot be changed via PUT"
    partner = venue.get(draft)["partnerId"]
    assert refused(draft, partner, "another") == "sellToOrderReference cannot be changed via PUT"
    assert refused(issued, partner, "any") == "Order cannot be replaced in status Issued"


@pytest.mark.parametrize(
    ("status", "answer", "afterwards"),
    [
        ("Draft", 200, 404),
        ("Error", 200, 404),
        ("Issued", 200, 200),
        ("Cancelled", 200, 200),
        ("Submitted", 400, 200),
        ("Processing", 400, 200),
    ],
)
def test_deleting_leaves_a_trace_of_issued_orders_only(venue: Venue, status: str, answer: int, afterwards: int) -> None:
    [order_id] = venue.bulk(mix={status: 1})

    deleted = venue.client.delete(f"/channelManager/{order_id}")
    later = venue.client.get(f"/channelManager/{order_id}")

    assert (answer, afterwards) == (deleted.status_code, later.status_code)
    if answer == 200:
        assert (deleted.json()["status"], deleted.json()["items"]) == ("Cancelled", [])
    if status == "Issued":
        assert deleted.json() == later.json()
        assert later.json()["paymentReference"]


def test_issuing_inside_the_call_fires_no_event(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    order_id = venue.create("r-1", query="?sync=1", payment_reference="p")
    failed = venue.client.post("/channelManager?sync=true", json=order_body(PARTNER, "r-2", items=["FAIL-1"]))

    venue.settled(venue.create("r-3"))

    assert venue.get(order_id)["status"] == "Issued"
    assert failed.status_code == 400
    rows = venue.client.get(f"/channelManager/orders/{PARTNER}?status=Error").json()["data"]
    assert [row["sellToOrderReference"] for row in rows] == ["R-2"]
    eventually(lambda: len(hook.events) == 1, what="the third order is announced")
    assert hook.events[0]["payload"]["status"] == "Draft"


# -- the list --


def listed(venue: Venue, **query: str) -> dict[str, Any]:
    response = venue.client.get(f"/channelManager/orders/{PARTNER}", params=query)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


def test_a_row_of_the_list_has_the_fields_of_upstream(venue: Venue) -> None:
    venue.bulk(partner_id=PARTNER, mix={"Draft": 1})

    page = listed(venue, sync="true")

    assert shape(fixture("list-page.json")) == shape(page)
    assert page["data"][0]["manifestUrl"] == ""
    assert page["data"][0]["id"] != page["data"][0]["orderId"]
    assert "rowVersion" not in listed(venue)["data"][0]


def test_filters_of_the_list_are_anded(venue: Venue) -> None:
    drafts = venue.bulk(partner_id=PARTNER, mix={"Draft": 1}, count=2, reference="a")
    errors = venue.bulk(partner_id=PARTNER, mix={"Error": 1}, count=2, reference="b")
    venue.bulk(partner_id=OTHER_PARTNER, mix={"Draft": 1})
    reference = venue.get(errors[1])["sellToOrderReference"]

    def ids(**query: str) -> list[str]:
        return [row["orderId"] for row in listed(venue, **query)["data"]]

    assert sorted(drafts + errors) == sorted(ids())
    assert sorted(drafts) == sorted(ids(status="Draft,Issued"))
    assert [errors[1]] == ids(status="Error", sellToOrderReference=reference)
    assert ids(status="Draft", sellToOrderReference=reference) == []
    assert ids(receivedAtFrom="2100-01-01T00:00:00Z") == []
    assert ids(receivedAtTo="2000-01-01T00:00:00Z") == []
    now = venue.get(errors[1])["receivedAt"]
    assert errors[1] in ids(receivedAtFrom=now, receivedAtTo=now)
    assert venue.client.get(f"/channelManager/orders/{NOBODY}").json()["data"] == []


@pytest.mark.parametrize(
    "query", ["status=Nope", "receivedAtFrom=yesterday", "sync=true&lastRowVersion=x", "pageKey=!!", "pageSize=x"]
)
def test_a_filter_that_cannot_be_read_is_a_400(venue: Venue, query: str) -> None:
    assert venue.client.get(f"/channelManager/orders/{PARTNER}?{query}").status_code == 400


def test_pages_follow_the_key_and_the_key_carries_the_filter(venue: Venue) -> None:
    drafts = venue.bulk(partner_id=PARTNER, mix={"Draft": 1}, count=5, reference="a")
    venue.bulk(partner_id=PARTNER, mix={"Error": 1}, count=3, reference="b")
    page = listed(venue, status="Draft", pageSize="2")
    seen = [row["orderId"] for row in page["data"]]
    sizes = [len(page["data"])]
    while page["morePages"]:
        assert re.fullmatch("[A-Za-z0-9_-]+", page["nextPageKey"])
        assert page["nextPageURL"].startswith("https://api.npretail.app/")
        page = listed(venue, pageKey=page["nextPageKey"], pageSize="2")
        seen += [row["orderId"] for row in page["data"]]
        sizes.append(len(page["data"]))

    assert sizes == [2, 2, 1]
    assert sorted(drafts) == sorted(seen)
    assert (page["nextPageKey"], page["nextPageURL"]) == ("", "")


def test_sync_gives_what_changed_since_a_row_version(venue: Venue) -> None:
    first, second = venue.bulk(partner_id=PARTNER, mix={"Draft": 1}, count=2)
    rows = listed(venue, sync="true")["data"]
    last = rows[-1]["rowVersion"]
    assert [int(row["rowVersion"]) for row in rows] == sorted(int(row["rowVersion"]) for row in rows)

    assert listed(venue, sync="true", lastRowVersion=last)["data"] == []
    venue.client.post(f"/channelManager/{first}/confirm", json={"paymentReference": "p"}).raise_for_status()
    venue.client.delete(f"/channelManager/{second}").raise_for_status()

    changed = listed(venue, sync="true", lastRowVersion=last)["data"]
    assert [(first, "Issued")] == [(row["orderId"], row["status"]) for row in changed]


# -- companies and keys --


def test_an_undeclared_company_takes_any_key_but_needs_one(venue: Venue) -> None:
    assert httpx.get(f"{venue.client.base_url}channelManager/{NOBODY}", trust_env=False).status_code == 401
    bearer = {"authorization": "Bearer any"}
    response = httpx.get(f"{venue.client.base_url}channelManager/{NOBODY}", headers=bearer, trust_env=False)
    assert response.status_code == 404


def test_declared_companies_are_the_only_ones_and_know_their_keys_and_partners() -> None:
    company = {
        "id": "B56A418D-8205-4D3A-BDBB-25D94E42ABBD",
        "name": "CRONUS International Ltd.",
        "tenant": "Tenant",
        "environment": "Production",
        "api_keys": ["good"],
        "forbidden_keys": ["weak"],
        "partner_ids": [PARTNER],
        "manifest": False,
    }
    with start() as sandbox:
        sandbox.admin("POST", "companies", company)

        def call(path: str, key: str) -> tuple[int, str]:
            url = f"{sandbox.url}/{path}/channelManager/{NOBODY}"
            response = httpx.get(url, headers={"x-np-api-key": key}, trust_env=False)
            is_json = response.headers["content-type"] == "application/json"
            return response.status_code, response.json()["code"] if is_json else response.text

        here = "tenant/PRODUCTION/CRONUS%20International%20Ltd."
        assert call(here, "good") == (404, "resource_not_found")
        assert call(here, "bad") == (401, "Unauthorized")
        assert call(here, "weak") == (403, "generic_error")
        assert call("other/Production/x", "good") == (404, "saas_tenant_not_found")
        assert call("Tenant/Test/x", "good") == (404, "saas_environment_not_found")
        assert call("Tenant/Production/x", "good") == (404, "saas_company_not_found")

        base_url = sandbox.base_url("Tenant", "Production", "CRONUS International Ltd.")
        with httpx.Client(base_url=base_url, headers={"x-np-api-key": "good"}, trust_env=False) as client:
            unknown = client.post("/channelManager", json=order_body(OTHER_PARTNER, "r"))
            issued = client.post("/channelManager?sync=1", json=order_body(PARTNER, "r", payment_reference="p"))
        assert unknown.status_code == 400
        assert (issued.json()["status"], "manifestUrl" in issued.json()) == ("Issued", False)
        assert sandbox.admin("GET", "companies")[0]["id"] == "b56a418d-8205-4d3a-bdbb-25d94e42abbd"


# -- webhooks --


@pytest.mark.parametrize(("wrapper", "file"), [(name, f"webhook-{name}.json") for name in ("value", "values", "bare")])
def test_an_event_comes_in_the_wrapper_that_is_set(venue: Venue, hook: Hook, wrapper: str, file: str) -> None:
    venue.sandbox.admin("PATCH", "settings", {"shape": wrapper})
    venue.subscribe(hook)
    order = venue.settled(venue.create("r"))

    eventually(lambda: hook.bodies, what="the event is there")

    expected = fixture(file)
    if wrapper != "bare":
        expected[wrapper] = expected[wrapper][:1]
    assert shape(expected) == shape(hook.bodies[0])
    event = hook.events[0]
    assert (SECRET, venue.id, "Museum & Co") == (event["clientState"], event["companyId"], event["companyName"])
    assert {
        "orderId": order["orderId"],
        "buyFromOrderReference": order["buyFromOrderReference"],
        "status": "Draft",
    } == event["payload"]


@pytest.mark.parametrize("digits", range(8))
def test_a_timestamp_has_as_many_digits_as_set(venue: Venue, hook: Hook, digits: int) -> None:
    venue.sandbox.admin("PATCH", "settings", {"digits": digits})
    venue.subscribe(hook)
    venue.bulk(events=1)

    eventually(lambda: hook.events, what="the event is there")

    fraction = rf"\.\d{{{digits}}}" if digits else ""
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d{fraction}Z", hook.events[0]["timestamp"])


def test_events_of_a_short_time_come_in_one_post_up_to_the_limit(venue: Venue, hook: Hook) -> None:
    venue.sandbox.admin("PATCH", "settings", {"batch_window": 0.2, "batch_max": 3})
    venue.subscribe(hook)
    made = venue.bulk(count=7, events=1)

    eventually(lambda: len(hook.events) == 7, what="all events are there")

    assert sorted((len(body["value"]) for body in hook.bodies), reverse=True) == [3, 3, 1]
    assert sorted(made) == sorted(hook.orders())


def test_subscriptions_can_be_made_seen_and_deleted(venue: Venue, hook: Hook) -> None:
    first, second = venue.subscribe(hook, "one"), venue.subscribe(hook, "two")

    both = venue.client.get("/webhook").json()
    alone = venue.client.get(f"/webhook/{first}").json()
    deleted = venue.client.delete(f"/webhook/{first}")

    assert [one["clientState"] for one in both["value"]] == ["one", "two"]
    assert "@odata.context" in both
    assert ("Active", "1.0", venue.id) == tuple(
        alone["value"][0][name] for name in ("subscriptionState", "eventVersion", "companyId")
    )
    assert deleted.status_code == 204
    assert [second] == [one["id"] for one in venue.client.get("/webhook").json()["value"]]
    assert venue.client.get(f"/webhook/{first}").status_code == 404
    assert venue.client.delete(f"/webhook/{first}").status_code == 404


@pytest.mark.parametrize(
    "wish",
    [{}, {"notificationUrl": "http://x"}, {"notificationUrl": "http://x", "eventName": "e", "clientState": "x" * 51}],
)
def test_a_subscription_needs_its_fields_and_a_secret_of_at_most_50(venue: Venue, wish: dict[str, str]) -> None:
    assert venue.client.post("/webhook", json=wish).status_code == 400


def test_only_active_subscriptions_to_the_event_are_told(venue: Venue, hook: Hook) -> None:
    off = venue.subscribe(hook, "off")
    venue.client.post("/webhook", json={"notificationUrl": hook.url, "eventName": "other", "clientState": "other"})
    venue.subscribe(hook, "on")
    venue.sandbox.admin("PATCH", f"subscriptions/{off}", {"state": "Disabled"})

    venue.bulk(events=1)

    eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["accepted"] == 1, what="it is sent")
    assert venue.sandbox.admin("GET", "stats")["events"]["fired"] == 1
    assert [event["clientState"] for event in hook.events] == ["on"]
    assert venue.client.get(f"/webhook/{off}").json()["value"][0]["subscriptionState"] == "Disabled"


def test_a_new_subscription_can_be_asked_for_an_echo(venue: Venue, hook: Hook) -> None:
    venue.sandbox.admin("PATCH", "settings", {"handshake": True})

    venue.subscribe(hook)
    hook.codes = [500]
    refused = venue.client.post("/webhook", json={"notificationUrl": hook.url, "eventName": "ota_cm_order_processed"})

    assert len(hook.tokens) == 2
    assert refused.status_code == 400


def test_by_default_a_delivery_is_tried_once_and_its_answer_recorded(venue: Venue, hook: Hook) -> None:
    hook.codes = [503]
    venue.subscribe(hook)
    [order_id] = venue.bulk(events=1)

    eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["pending"] == 0, what="it is given up")

    [delivery] = [one for one in venue.sandbox.admin("GET", "deliveries") if one["url"] == hook.url]
    assert (503, 1, order_id) == (delivery["code"], delivery["attempt"], delivery["events"][0][0])
    counts = venue.counts(order_id)
    assert (counts["fired"], counts["accepted"]) == (1, 0)
    assert len(hook.bodies) == 1


def test_a_delivery_can_be_tried_until_it_is_taken(venue: Venue, hook: Hook) -> None:
    venue.sandbox.admin("PATCH", "settings", {"attempts": 0, "attempt_every": 0.01})
    hook.codes = [503, 500, 401]
    venue.subscribe(hook)
    [order_id] = venue.bulk(events=1)

    eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["pending"] == 0, what="it is taken")

    tries = [
        (one["attempt"], one["code"]) for one in venue.sandbox.admin("GET", "deliveries") if one["url"] == hook.url
    ]
    assert tries == [(1, 503), (2, 500), (3, 401), (4, 200)]
    assert len({json.dumps(body) for body in hook.bodies}) == 1
    assert venue.counts(order_id)["accepted"] == 1


def test_a_receiver_that_cannot_be_reached_is_recorded_too(venue: Venue, hook: Hook) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = Hook(url=f"http://127.0.0.1:{closed.getsockname()[1]}/")
        venue.subscribe(nowhere)
        venue.bulk(events=1)
        eventually(lambda: venue.sandbox.admin("GET", "stats")["deliveries"], what="it is tried")

    assert venue.sandbox.admin("GET", "stats")["deliveries"] == {"ConnectError": 1}


def test_repeated_4xx_can_switch_a_subscription_off(venue: Venue, hook: Hook) -> None:
    venue.sandbox.admin("PATCH", "settings", {"disable_after": 2})
    hook.codes = [400] * 5
    subscription = venue.subscribe(hook)
    for _ in range(2):
        venue.bulk(events=1)
        eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["pending"] == 0, what="it is sent")

    state = venue.client.get(f"/webhook/{subscription}").json()["value"][0]["subscriptionState"]
    assert state == "Disabled"


def test_paused_deliveries_are_kept_and_sent_later(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    venue.sandbox.admin("POST", "pause")
    venue.bulk(count=40, events=1)
    paused = venue.sandbox.admin("GET", "stats")
    assert (paused["events"]["pending"], paused["paused"]) == (40, True)
    # Each look lets the sandbox's loop turn: what could be sent would be by the end.
    assert {venue.sandbox.admin("GET", "stats")["events"]["accepted"] for _ in range(100)} == {0}
    assert hook.bodies == []

    venue.sandbox.admin("POST", "resume")

    eventually(lambda: len(hook.events) == 40, what="all are sent")


def test_an_event_can_be_fired_again_with_the_same_or_a_new_timestamp(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    [order_id] = venue.bulk(mix={"Draft": 1}, events=1)
    venue.client.delete(f"/channelManager/{order_id}").raise_for_status()

    venue.sandbox.admin("POST", "fire", {"order_id": order_id, "timestamp": "last", "times": 2})
    venue.sandbox.admin("POST", "fire", {"order_id": order_id, "company_id": venue.id, "status": "Issued"})

    eventually(lambda: len(hook.events) == 4, what="all are there")
    assert len({event["timestamp"] for event in hook.events}) == 2
    assert sorted(event["payload"]["status"] for event in hook.events) == ["Draft", "Draft", "Draft", "Issued"]
    assert venue.counts(order_id)["fired"] == 4


@pytest.mark.parametrize("same", [True, False])
def test_an_order_can_be_announced_n_times_at_once(venue: Venue, hook: Hook, same: bool) -> None:
    venue.subscribe(hook)
    venue.bulk(events=3, same_timestamp=same)

    eventually(lambda: len(hook.events) == 3, what="all are there")

    assert (1 if same else 3) == len({event["timestamp"] for event in hook.events})


# -- faults of the webhook --


def test_a_duplicate_is_exact(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    venue.fault(kind="duplicate", copies=2)
    venue.bulk(events=1)

    eventually(lambda: len(hook.events) == 3, what="three are there")

    assert len({json.dumps(event) for event in hook.events}) == 1


def test_a_late_event_comes_with_its_old_timestamp(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    venue.fault(kind="late", seconds=0.3, calls=1)
    first, second = venue.bulk(count=2, events=1)

    eventually(lambda: len(hook.events) == 2, what="both are there")

    assert [second, first] == hook.orders()
    assert hook.events[1]["timestamp"] < hook.events[0]["timestamp"]


def test_a_reordered_event_is_overtaken_by_the_next(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    venue.fault(kind="reorder", calls=1)
    made = venue.bulk(count=3, events=1)

    eventually(lambda: len(hook.events) == 3, what="all are there")

    assert hook.orders().index(made[0]) > hook.orders().index(made[1])


def test_a_reordered_event_that_nothing_follows_comes_all_the_same(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    venue.fault(kind="reorder")
    venue.bulk(events=1)

    eventually(lambda: len(hook.events) == 1, what="it is there")


def test_a_bad_secret_is_wrong_and_a_lost_event_never_comes(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    spoilt, lost, sound = venue.bulk(count=3)
    venue.fault(kind="bad_secret", order_id=spoilt)
    venue.fault(kind="lost", order_id=lost)
    for order_id in (spoilt, lost, sound):
        venue.sandbox.admin("POST", "fire", {"order_id": order_id})

    eventually(lambda: venue.sandbox.admin("GET", "stats")["events"]["accepted"] == 2, what="two are taken")

    secrets = {event["payload"]["orderId"]: event["clientState"] for event in hook.events}
    assert {spoilt, sound} == secrets.keys()
    assert (secrets[sound], secrets[spoilt] != SECRET) == (SECRET, True)
    assert venue.sandbox.admin("GET", "stats")["events"]["lost"] == 1


# -- limits and faults of the API --


def in_parallel(count: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_five_are_worked_on_at_once_and_beyond_the_queue_is_429(venue: Venue) -> None:
    venue.sandbox.admin("PATCH", "settings", {"latency_ms": 600, "queue": 4})
    [order_id] = venue.bulk()

    answers = in_parallel(12, lambda _: venue.client.get(f"/channelManager/{order_id}").status_code)

    assert {code: answers.count(code) for code in set(answers)} == {200: 9, 429: 3}
    stats = venue.sandbox.admin("GET", "stats")
    assert (stats["most_active"], stats["most_waiting"], stats["throttled"]["queue"]) == (5, 4, 3)
    counts = venue.counts(order_id)
    assert (counts["gets"], counts["answered"]) == (12, 9)


def test_keys_do_not_share_their_slots(venue: Venue) -> None:
    venue.sandbox.admin("PATCH", "settings", {"slots": 1, "queue": 0})
    [order_id] = venue.bulk()
    venue.fault(kind="hang", order_id=order_id)
    with at(venue.sandbox, venue.tenant, "key-that-hangs") as hanging, ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(hanging.get, f"/channelManager/{order_id}", timeout=1.0)
        eventually(lambda: venue.sandbox.admin("GET", "stats")["active"] == 1, what="it hangs")

        same_key = hanging.get(f"/channelManager/{NOBODY}")
        other_key = venue.client.get(f"/channelManager/{NOBODY}")

        assert (same_key.status_code, other_key.status_code) == (429, 404)
        assert isinstance(stuck.exception(), httpx.ReadTimeout)
        eventually(lambda: venue.sandbox.admin("GET", "stats")["active"] == 0, what="the slot is free again")
        assert venue.sandbox.admin("GET", "stats")["operations"]["getOrder"]["abandoned"] == 1


def test_the_window_slides(venue: Venue) -> None:
    venue.sandbox.admin("PATCH", "settings", {"requests": 3, "window": 1.0})
    codes = [venue.client.get("/webhook").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    assert venue.sandbox.admin("GET", "stats")["throttled"]["window"] == 2

    eventually(lambda: venue.client.get("/webhook").status_code == 200, what="the window has slid")


def test_waiting_too_long_for_a_slot_is_503_and_working_too_long_408(venue: Venue) -> None:
    venue.sandbox.admin("PATCH", "settings", {"slots": 1, "queue_wait": 0.2, "operation_limit": 1.0})
    venue.fault(kind="hang", calls=1)

    answers = in_parallel(2, lambda _: venue.client.get(f"/channelManager/{NOBODY}"))

    assert sorted(answer.status_code for answer in answers) == [408, 503]
    late = next(answer for answer in answers if answer.status_code == 408)
    assert late.json()["code"] == "server_timeout"


@pytest.mark.parametrize(
    ("rule", "status", "body", "retry_after"),
    [
        ({"status": 429}, 429, "Status 429", None),
        ({"status": 429, "retry_after": 2}, 429, "Status 429", "2"),
        ({"status": 503, "message": "down"}, 503, "down", None),
        ({"status": 401}, 401, "Status 401", None),
        ({"status": 403}, 403, '"generic_error"', None),
        ({"status": 404}, 404, '"resource_not_found"', None),
        ({"status": 404, "code": "saas_company_not_found"}, 404, '"saas_company_not_found"', None),
        ({"status": 404, "message": "no such site"}, 404, "no such site", None),
    ],
)
def test_a_status_can_be_asked_for(
    venue: Venue, rule: dict[str, Any], status: int, body: str, retry_after: str | None
) -> None:
    [order_id] = venue.bulk()
    venue.fault(kind="status", calls=2, **rule)

    answers = [venue.client.get(f"/channelManager/{order_id}") for _ in range(3)]

    assert [status, status, 200] == [answer.status_code for answer in answers]
    assert body in answers[0].text
    assert retry_after == answers[0].headers.get("retry-after")
    assert venue.counts(order_id)["answered"] == 1


def test_an_order_can_be_unknown_for_its_first_calls(venue: Venue) -> None:
    made = venue.bulk(count=2)
    venue.fault(kind="status", operation="getOrder", status=404, first=2)

    codes = [[venue.client.get(f"/channelManager/{one}").status_code for _ in range(3)] for one in made]

    assert codes == [[404, 404, 200]] * 2


def test_a_fault_can_last_a_while_and_keep_to_one_company(venue: Venue) -> None:
    [order_id] = venue.bulk()
    venue.fault(kind="status", status=401, lasts=1.0)
    with at(venue.sandbox, "some-other-company") as other:
        assert other.get(f"/channelManager/{NOBODY}").status_code == 404
    assert venue.client.get(f"/channelManager/{order_id}").status_code == 401

    eventually(lambda: venue.client.get(f"/channelManager/{order_id}").status_code == 200, what="it is over")


def test_a_rate_strikes_about_so_many_and_counts_them(venue: Venue) -> None:
    made = venue.bulk(count=200)
    venue.fault(kind="status", status=500, rate=0.25)

    codes = [venue.client.get(f"/channelManager/{one}").status_code for one in made]

    struck = venue.sandbox.admin("GET", "faults")[-1]["struck"]
    assert codes.count(500) == struck
    assert 25 <= struck <= 75


def test_spoilt_answers_are_spoilt(venue: Venue) -> None:
    truncated, cut, rubbish, wrong = made = venue.bulk(count=4)
    for kind, order_id in zip(("truncated", "cut", "rubbish", "wrong_order"), made, strict=True):
        venue.fault(kind=kind, order_id=order_id)

    half = venue.client.get(f"/channelManager/{truncated}")
    with pytest.raises(json.JSONDecodeError):
        half.json()
    assert half.status_code == 200
    with pytest.raises(httpx.RemoteProtocolError):
        venue.client.get(f"/channelManager/{cut}")
    assert venue.client.get(f"/channelManager/{rubbish}").text.startswith("<html>")
    assert wrong != venue.get(wrong)["orderId"]
    assert [(venue.counts(one)["gets"], venue.counts(one)["answered"]) for one in made] == [(1, 0)] * 4


def test_latency_is_drawn_around_what_is_asked(venue: Venue) -> None:
    [order_id] = venue.bulk()
    venue.fault(kind="latency", seconds=0.1, spread=0.05)

    began = time.monotonic()
    for _ in range(5):
        venue.get(order_id)

    assert time.monotonic() - began >= 0.25


def test_rules_can_be_seen_lifted_and_replaced(sandbox: Sandbox) -> None:
    first, second = sandbox.admin("POST", "faults", [{"kind": "latency", "order_id": NOBODY}, {"kind": "lost"}])
    assert [first, second] == [rule["number"] for rule in sandbox.admin("GET", "faults")]
    assert [second] == [rule["number"] for rule in sandbox.admin("DELETE", f"faults/{first}")]
    sandbox.admin("PUT", "faults", {"kind": "hang", "order_id": NOBODY})
    assert [rule["kind"] for rule in sandbox.admin("GET", "faults")] == ["hang"]
    assert sandbox.admin("DELETE", "faults") == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("faults", {"kind": "explode"}),
        ("faults", {"kind": "status", "statsu": 500}),
        ("orders", {"cuont": 3}),
        ("companies", {"id": "x", "name": "n", "tenant": "t", "environment": "e"}),
        ("fire", {"order_id": NOBODY, "when": "now"}),
    ],
)
def test_the_admin_api_refuses_what_it_does_not_know(sandbox: Sandbox, path: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        sandbox.admin("POST", path, body)


# -- bulk and back office --


def test_bulk_orders_have_exactly_the_mix_and_the_ids_that_were_asked_for(venue: Venue) -> None:
    venue.bulk(count=100, mix={"Issued": 0.71, "Draft": 0.29})
    venue.bulk(order_ids=[NOBODY], reference="named", mix={"Error": 1})

    rows = venue.sandbox.admin("GET", f"orders?company_id={venue.id}")

    statuses = [row["status"] for row in rows]
    assert tuple(statuses.count(name) for name in ("Issued", "Draft", "Error")) == (71, 29, 1)
    assert venue.get(NOBODY)["status"] == "Error"


def test_the_same_order_id_in_two_companies_is_two_orders(venue: Venue) -> None:
    order_id = "00000000-0000-4000-8000-00000000abcd"
    venue.bulk(order_ids=[order_id], mix={"Draft": 1})
    venue.bulk(order_ids=[order_id], mix={"Issued": 1}, tenant=f"{venue.tenant}-2")
    with at(venue.sandbox, f"{venue.tenant}-2") as other:
        assert other.get(f"/channelManager/{order_id}").json()["status"] == "Issued"
    assert venue.get(order_id)["status"] == "Draft"


def test_the_back_office_can_put_an_order_into_any_status(venue: Venue, hook: Hook) -> None:
    venue.subscribe(hook)
    [order_id] = venue.bulk(mix={"Submitted": 1})
    for status in ("Processing", "Error", "Draft", "Issued", "Cancelled"):
        order = venue.sandbox.admin("POST", "settle", {"order_id": order_id, "status": status})
        assert order == venue.get(order_id)
        assert status == order["status"]

    venue.sandbox.admin("POST", "settle", {"order_id": order_id, "status": "Cancelled", "events": 2})

    eventually(lambda: len(hook.events) == 2, what="it is announced twice")


def test_ten_thousand_orders_are_no_burden(venue: Venue) -> None:
    began = time.monotonic()
    made = venue.bulk(count=10_000)
    assert len(set(made)) == 10_000
    venue.sandbox.admin("PATCH", "settings", {"requests": 1_000_000})

    for order_id in made[:300]:
        venue.get(order_id)

    assert time.monotonic() - began < 15
