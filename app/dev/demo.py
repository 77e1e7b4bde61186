"""`ota-receiver demo` and `dev`: sample orders go through the real processes, and a table shows what arrived.

The demo acts as the partner: it creates and replaces orders at the sandbox, and checks each order at the receiver.
At a terminal it then shows them on the ops page until Enter. `dev` keeps everything running and prints the addresses.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app import bootstrap
from app.dev import stack as stacks
from app.dev.sandbox.submission import order_body
from app.dev.stack import PARTNER_ID, Stack
from app.ids import OrderKey
from app.ledger.orders import Archive
from app.ledger.record import OrderRecord
from app.settings import of_dotenv
from app.subscriptions import SubscriptionMemory
from app.upstream.models import Order

_PORT: Final = "8080"
_POLL: Final = 0.05
_FETCHED_WITHIN: Final = 15.0
_PROCESS_CHECK: Final = 0.2

_CURL: Final = """curl -i {url} -H 'content-type: application/json' -d '
{{"values": [{{"clientState": "{secret}", "companyId": "{company}",
  "companyName": "CRONUS International Ltd.", "eventName": "ota_cm_order_processed", "eventVersion": "1.0",
  "payload": {{"orderId": "{order}", "buyFromOrderReference": "{reference}", "status": "{status}"}},
  "timestamp": "2026-05-15T09:30:05Z"}}]}}'"""
_LOOK: Final = """
Look at these orders in a browser: {ops}
The user name is your own name, the password {password}
"""
_LATER: Final = "`ota-receiver dev` shows such orders in a browser, on the ops page, until Ctrl-C."
_GUIDE: Final = """
  ops page    {ops}   (user name: your own name; password: {password})
  webhook     {webhook}
  readiness   {web}/readyz
  sandbox     {sandbox}/_sandbox/settings   (faults, stats, orders: see app/dev/sandbox/__init__.py)
  logs        tail -F {folder}/web.log {folder}/worker.log {folder}/ops.log
  settings    set -a; . {folder}/env; set +a
              then: uv run ota-receiver orders list · events list · check · api

Ctrl-C stops everything; the data stays in {folder}.
"""


@dataclass
class Sample:
    """One order of the demo: its contents, the status it should get, and what was fetched."""

    reference: str
    title: str
    items: tuple[str, ...]
    quantity: int
    payment_reference: str
    expected: str
    repeats: int = 0
    order_id: str = ""
    settlements: int = 0
    record: OrderRecord | None = None
    order: Order | None = None
    calls: int = 0
    problems: list[str] = field(default_factory=list)


def samples() -> list[Sample]:
    """Return the orders of the demo."""
    return [
        Sample("DEMO-001", "Two day tickets", ("31001",), 2, "PAY-1001", "Issued"),
        Sample("DEMO-002", "Package, coupons", ("31001", "PKG-100"), 2, "PAY-1002", "Issued"),
        Sample("DEMO-003", "Group ticket", ("GRP-200",), 20, "PAY-1003", "Issued"),
        Sample("DEMO-004", "Not yet paid", ("31001",), 1, "", "Draft"),
        Sample("DEMO-005", "Failed, replaced", ("FAIL-1",), 1, "PAY-1005", "Error"),
        Sample("DEMO-006", "Sent three times", ("31001", "CPN-300"), 1, "PAY-1006", "Issued", repeats=2),
    ]


class Driver:
    """Creates the samples' orders, waits until they are fetched, and lists what is wrong with them."""

    def __init__(self, stack: Stack, archive: Archive) -> None:
        self._sandbox = stack.sandbox
        self._archive = archive
        self._company_id = stack.settings.companies[0].np_company_id

    def submit(self, sample: Sample) -> None:
        """Create the order, or replace it if it exists; its event comes when it has settled.

        Only a partner calls createOrder and replaceOrder, so the receiver's client has neither.
        """
        url = self._sandbox.base_url(stacks.TENANT, stacks.ENVIRONMENT, stacks.COMPANY) + "/channelManager"
        body = order_body(
            PARTNER_ID,
            sample.reference,
            payment_reference=sample.payment_reference,
            items=sample.items,
            quantity=sample.quantity,
        )
        method, path = ("PUT", f"/{sample.order_id}") if sample.order_id else ("POST", "")
        response = self._sandbox.client.request(method, url + path, json=body, headers={"x-np-api-key": stacks.API_KEY})
        response.raise_for_status()
        sample.order_id = response.json()["orderId"]
        sample.settlements += 1

    def repeat_event(self, sample: Sample) -> None:
        """Make the sandbox repeat the event of a settled order with the same timestamp."""
        body = {"order_id": sample.order_id, "company_id": self._company_id, "timestamp": "last"}
        self._sandbox.admin("POST", "fire", body | {"times": sample.repeats})

    def wait_fetched(self, sample: Sample, duplicates: int = 0) -> None:
        """Wait until all settlements are fetched and `duplicates` events are counted, at most 15 s."""
        deadline = time.monotonic() + _FETCHED_WITHIN
        while time.monotonic() < deadline:
            record = self._archive.record(OrderKey(self._company_id, sample.order_id))
            if (
                record is not None
                and record.fetched_generation >= sample.settlements
                and record.status == sample.expected
                and record.duplicates >= duplicates
            ):
                return
            time.sleep(_POLL)

    def inspect(self, sample: Sample) -> None:
        """Compare the stored order with what was expected, and count its getOrder calls."""
        key = OrderKey(self._company_id, sample.order_id)
        sample.record, sample.order = self._archive.record(key), self._archive.order(key)
        rows: list[dict[str, Any]] = self._sandbox.admin("GET", "orders")
        sample.calls = next(row["gets"] for row in rows if row["order_id"] == sample.order_id)
        if sample.order is None or sample.record is None or sample.record.status != sample.expected:
            sample.problems.append(f"not fetched as {sample.expected}")
            return
        if sample.calls != sample.settlements:
            sample.problems.append(f"{sample.calls} getOrder for {sample.settlements} settlements")
        if sample.record.duplicates != sample.repeats:
            sample.problems.append(f"{sample.record.duplicates} duplicates seen of {sample.repeats}")
        sample.problems += gaps(sample.order, sample.expected)


def run(console: Console) -> bool:
    """Return whether every order arrived complete and each settlement cost exactly one getOrder.

    At a terminal everything runs until the reader, who may look at the ops page, presses Enter.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ota-receiver-demo-") as folder,
        Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress,
        contextlib.ExitStack() as parts,
    ):
        step = progress.add_task("starting Valkey, the sandbox Channel Manager, web and workers")
        stack = parts.enter_context(stacks.start(Path(folder), sandbox_options=("--settle-after", "0.4")))
        progress.update(step, description="all processes run", completed=100)
        orders = drive(stack, progress)
        progress.stop()
        show(console, orders)
        end(console, stack, Path(folder))
        return not any(sample.problems for sample in orders)


def end(console: Console, stack: Stack, folder: Path) -> None:
    """At a terminal run the ops page until Enter, Ctrl-D or Ctrl-C; else print what shows it, and return at once."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        console.print(_LATER, markup=False, highlight=False, soft_wrap=True)
        return
    with stacks.ops_page(stack, folder), contextlib.suppress(EOFError, KeyboardInterrupt):
        text = _LOOK.format(ops=stack.ops_url, password=stack.variables["OPS_ACT_TOKEN"])
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        input("Press Enter to end. ")


def keep_running(console: Console, folder: Path, port: int | None, sinks: Mapping[str, str]) -> None:
    """Keep all parts running until KeyboardInterrupt, or until one of them ends.

    All ports are those of the last start in the folder, except those that are taken; `port` is to be that of web.
    `sinks` has SINKS and SINKS_FILE of the workers.
    """
    environment = folder / "env"
    last, _ = of_dotenv(environment)
    usual = int(last.get("PORT", _PORT))
    port_now, tracebacks = port or stacks.free_or(usual), folder / "tracebacks.log"
    tracebacks.unlink(missing_ok=True)
    started = stacks.start(folder, port=port_now, last=last, sinks=sinks, tracebacks=tracebacks)
    with started as stack, stacks.ops_page(stack, folder) as ops, tracebacks.open() as raised:
        meant = {"OPS_PORT": stacks.OPS_PORT} | last | {"PORT": str(port or usual)}
        _say_which_moved(console, meant, stack.variables)
        environment.touch(mode=0o600)
        environment.write_text("".join(f"{stacks.env_line(*one)}\n" for one in stack.variables.items()))
        with Progress(console=console, transient=True) as progress:
            orders = drive(stack, progress)
        guide = _GUIDE.format(
            ops=stack.ops_url,
            password=stack.variables["OPS_ACT_TOKEN"],
            webhook=stack.webhook_url,
            web=stack.web_url,
            sandbox=stack.sandbox.url,
            folder=folder,
        )
        console.print(guide, markup=False, highlight=False, soft_wrap=True)
        console.print("Send an event yourself; the second time it is a duplicate:\n")
        print_curl(console, stack, orders[-1])
        while True:
            time.sleep(_PROCESS_CHECK)
            if text := raised.read():
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            for name, process in (("web", stack.web), ("worker", stack.worker), ("ops", ops)):
                if process.exit_code is not None:
                    console.print(f"{name} ended with {process.exit_code}: see {folder}/{name}.log")
                    return


def _say_which_moved(console: Console, last: dict[str, str], now: dict[str, str]) -> None:
    """Print which ports are other ones than in the last start."""
    parts = {"PORT": "the webhook", "OPS_PORT": "the ops page", "NP_BASE_URL": "the sandbox", "REDIS_URL": "Valkey"}
    for name, part in parts.items():
        was, found = (one.get(name, "").rpartition(":")[2].removesuffix("/0") for one in (last, now))
        if was not in ("", found):
            console.print(f"Port {was} of {part} is taken: it is {found} this time.", soft_wrap=True)


def drive(stack: Stack, progress: Progress) -> list[Sample]:
    """Send the samples through and return them with what was fetched."""
    settings, company = stack.settings, stack.settings.companies[0]
    with bootstrap.http(settings) as http, bootstrap.worker_redis(settings) as redis:
        driver = Driver(stack, Archive(redis))
        manager = bootstrap.channel_manager(settings, company, http)
        manager.create_subscription(stack.webhook_url, company.client_state)
        # The pool may have looked before it was there; else it would raise an alert for a minute.
        SubscriptionMemory(redis, company.np_company_id).check_in(0)
        orders = samples()
        step = progress.add_task("orders submitted", total=len(orders))
        for sample in orders:
            driver.submit(sample)
            progress.advance(step)
        step = progress.add_task("settled, announced, fetched", total=len(orders))
        for sample in orders:
            driver.wait_fetched(sample)
            if sample.expected == "Error":
                # A partner repairs such an order by replaceOrder, which settles it again under the same orderId.
                sample.items, sample.expected = ("31001",), "Issued"
                driver.submit(sample)
                driver.wait_fetched(sample)
            if sample.repeats:
                driver.repeat_event(sample)
                driver.wait_fetched(sample, duplicates=sample.repeats)
            progress.advance(step)
        for sample in orders:
            driver.inspect(sample)
    return orders


def gaps(order: Order, status: str) -> list[str]:
    """Return what is missing in an order of the sandbox that settled in `status`."""
    found = []
    if status == "Issued" and not (order.manifest_url and order.wallets):
        found.append("issued without manifest or wallets")
    if status != "Error" and not all(wallet.tickets or wallet.coupons for wallet in order.wallets):
        found.append("a wallet is empty")
    return found


def show(console: Console, orders: list[Sample]) -> None:
    """Print what arrived, and what is wrong with it."""
    table = Table(
        title="What arrived", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("order", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for heading in ("events", "GETs", "wallets", "tickets", "coupons"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("manifest")
    for sample in orders:
        order, record = sample.order, sample.record
        table.add_row(
            sample.title,
            record.status if record else "-",
            str(record.generation + record.duplicates) if record else "-",
            str(sample.calls),
            *(str(len(part)) for part in (order.wallets, order.tickets, order.coupons)) if order else "---",
            "yes" if order and order.manifest_url else "no",
        )
    console.print(table)
    for sample in orders:
        for problem in sample.problems:
            console.print(f"[red]{sample.title}: {problem}")
    if not any(sample.problems for sample in orders):
        console.print("Every order arrived complete, and each settlement cost exactly one getOrder.")


def print_curl(console: Console, stack: Stack, sample: Sample) -> None:
    """Print the event of a sample as a curl command to paste."""
    text = _CURL.format(
        url=stack.webhook_url,
        secret=stacks.CLIENT_STATE,
        company=stack.settings.companies[0].np_company_id,
        order=sample.order_id,
        reference=(sample.order.buy_from_order_reference if sample.order else "") or "",
        status=sample.expected,
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
