"""The picture of the ops page in README.md: orders of two weeks, then the real processes and Chromium.

    uv run python -m tests.ops_picture

Run it again after a change of what the first screen shows; it takes two to five minutes and needs Debian's `chromium`.

Everything on the page has come through the receiver: events recorded by the intake's script, orders of the sandbox
fetched and delivered by the code of the workers, failures of the sandbox and of a sink. Only time is not real: the
clock of these steps is set back, and jumps from each event to the next one, until it is now.
"""

from __future__ import annotations

import math
import random
import secrets
import tempfile
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final
from uuid import uuid4

from app import bootstrap, log
from app.alerts import HOUR
from app.deployment import Deployment
from app.dev.stack import ENVIRONMENT, PARTNER_ID, TENANT
from app.ids import OrderKey
from app.ledger.policy import DAY, MINUTE
from app.settings import Settings, parse
from tests.browser import WIDE, chromium
from tests.lab import now_ms
from tests.lab_upstream import WorkerLab
from tests.ops_site import WHO
from tests.service import Service, service
from workers.delivery import Deliverer
from workers.processor import Connection, Processor
from workers.sinks.build import build
from workers.sinks.output import SinkOutput

PICTURE: Final = Path(__file__).parents[1] / "docs" / "ops-page.png"
COMPANIES: Final = {"museum": 5.0, "zoo": 2.0}
"""Each company, and about how many events an hour it has."""

_DAYS: Final = 16
"""Those that the page shows, and two weeks before them, from which it knows what is usual."""

CRM_AWAY: Final = 75 * MINUTE
PENDING: Final = MINUTE
GIVEN_UP: Final = 4 * DAY
"""A delivery that fails is tried for three days."""


class Shops:
    """Two endpoints, `/shop` and `/crm`. The second takes no order of `refused`, and while it `is_away` none at all."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_away = False
        self.refused: set[str] = set()

    def answer(self, path: str, body: str) -> int:
        if path != "/crm":
            return 204
        return 503 if self.is_away else 422 if any(one in body for one in self.refused) else 204


class Past(WorkerLab):
    """The workers of all companies of the settings, whose clock goes as fast as the real one, but is set back."""

    def __init__(self, service: Service, settings: Settings, sinks: dict[str, Any]) -> None:
        self._back = _DAYS * DAY
        super().__init__(service.valkey.url, service.sandbox, sinks, 6000)
        connections = {
            one.np_company_id: Connection(
                one.slug,
                bootstrap.channel_manager(settings, one, self._http),
                bootstrap.rate_limiter(settings, one, self.redis),
            )
            for one in settings.companies
        }
        self.processor = Processor(self.ledger, Deployment(self.redis), connections, self.erasure)
        slugs = {one.np_company_id: one.slug for one in settings.companies}
        unwanted = {one.name: one.unwanted for one in settings.declared_sinks}
        self.deliverer = Deliverer(self.ledger, sinks, unwanted, slugs.__getitem__, self.erasure, SinkOutput())

    @property
    def now(self) -> int:
        return now_ms() - self._back

    @now.setter
    def now(self, now: int | None) -> None:
        self._back = now_ms() - (now or now_ms())


def main() -> None:
    """Write the picture; raises when a part does not start, or does not show what it should."""
    log.configure("CRITICAL", "console")
    with (
        tempfile.TemporaryDirectory(prefix="ota-receiver-picture-") as folder,
        service(Path(folder)) as it,
        shops() as to,
    ):
        it.start_valkey()
        it.start_sandbox()
        settings = settle_in(it, to)
        remember(it, settings, to)
        it.start("web")
        subscribe(it, settings)
        it.start("worker", WORKERS="2")
        it.start("ops")
        take(f"http://127.0.0.1:{settings.ops_port}/", it.variables["OPS_ACT_TOKEN"])


@contextmanager
def shops() -> Iterator[Shops]:
    """Run both endpoints until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # a name that http.server looks for
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            self.send_response(found.answer(self.path, body))
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = Shops(f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def settle_in(it: Service, to: Shops) -> Settings:
    """Write the settings of all processes, and return them."""
    (it.folder / "files").mkdir()
    companies = it.folder / "companies.toml"
    companies.write_text(
        "\n".join(
            f'[companies.{slug}]\nnp_company_id = "{it.company_id_of(slug)}"\nnp_company = "{slug}"\n'
            f'np_tenant = "{TENANT}"\nnp_environment = "{ENVIRONMENT}"\nnp_partner_id = "{PARTNER_ID}"\n'
            f'np_api_key = "{secrets.token_hex(16)}"\nclient_state = "{secrets.token_hex(16)}"\n'
            for slug in COMPANIES
        )
    )
    sinks = it.folder / "sinks.toml"
    sinks.write_text(
        f'[sinks.files]\nkind = "files"\nfolder = "{it.folder / "files"}"\n'
        + "".join(
            f'[sinks.{name}]\nkind = "https"\nurl = "{to.url}/{name}"\nallow_private = true\n'
            f'secret = "whsec_{"QUFB" * 8}"\n'
            for name in ("crm", "shop")
        )
    )
    of_one = [name for name in it.variables if name.startswith("NP_") and name != "NP_BASE_URL"]
    for name in (*of_one, "CLIENT_STATE", "SUBSCRIPTION_CHECK_EVERY"):
        del it.variables[name]
    it.variables |= {
        "COMPANIES_FILE": str(companies),
        "SINKS_FILE": str(sinks),
        "OPS_TOKEN": secrets.token_hex(16),
        "OPS_ACT_TOKEN": secrets.token_hex(16),
    }
    return parse(it.variables)


def remember(it: Service, settings: Settings, to: Shops) -> None:
    """Let the time pass until now.

    Four events name orders that do not exist; crm refuses two orders, and has been away lately; two orders cannot be
    fetched.
    """
    dice, end = random.Random(1), now_ms()
    past = Past(it, settings, build(settings.declared_sinks))
    arrivals: list[tuple[int, OrderKey]] = []
    for one in settings.companies:
        times = [*times_of(COMPANIES[one.slug], end - _DAYS * DAY, end, dice)]
        orders = make_orders(it, one.np_company_id, len(times))
        arrivals += zip(times, orders, strict=True)
        to.refused.add(orders[bisect(times, end - GIVEN_UP)].order_id)
        arrivals += [(end - hours * HOUR, OrderKey(one.np_company_id, str(uuid4()))) for hours in (9, 20)]
    for at, order in sorted(arrivals):
        if end - at < GIVEN_UP:  # what failed is tried again
            past.run_for((at - past.now) / 1000)
        past.now = max(past.now, at)
        to.is_away = end - at < CRM_AWAY
        past.accept(order)
        past.work()
    past.now = now_ms() - PENDING
    for one in settings.companies:
        (order,) = make_orders(it, one.np_company_id, 1)
        failing = {"kind": "status", "operation": "getOrder", "status": 500, "order_id": order.order_id}
        it.admin("POST", "faults", failing)
        past.accept(order)
    past.work()
    past.close()


def times_of(rate: float, start: int, end: int, dice: random.Random) -> Iterator[int]:
    """Yield when events come, in ms: about `rate` an hour, most of them about three hours before the time of `end`."""
    at = float(start)
    while True:
        by_day = 1 + 0.9 * math.cos(2 * math.pi * (at - end + 3 * HOUR) / DAY)
        at += dice.expovariate(rate * by_day) * HOUR
        if at >= end:
            return
        yield int(at)


def make_orders(it: Service, company_id: str, count: int) -> list[OrderKey]:
    """Make so many issued orders at the sandbox."""
    body = {"company_id": company_id, "count": count, "partner_id": PARTNER_ID, "items": ["31001", "CPN-300"]}
    return [OrderKey(company_id, row["order_id"]) for row in it.admin("POST", "orders", body)["orders"]]


def subscribe(it: Service, settings: Settings) -> None:
    with bootstrap.http(settings) as http:
        for one in settings.companies:
            manager = bootstrap.channel_manager(settings, one, http)
            manager.create_subscription(it.webhook, one.client_state)


def take(url: str, password: str) -> None:
    """Write the picture once the page shows the alert, and when the order list was read."""
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": WIDE, "height": 900}, http_credentials={"username": WHO, "password": password}
        )
        page.goto(url)
        page.get_by_text("sink_failing crm").wait_for(timeout=60_000)
        page.get_by_text("never").first.wait_for(state="detached", timeout=120_000)
        page.screenshot(path=PICTURE, full_page=True)


if __name__ == "__main__":
    main()
