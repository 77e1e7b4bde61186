"""`ota-receiver demo`: sample orders through the real processes, and a table of what arrived."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app import bootstrap
from app.dev import stack as stacks
from app.dev.driver import Driver, Sample, samples, subscribe
from app.dev.stack import Stack
from app.store.archive import Archive

_HOME_WITHIN: Final = 15.0

_CURL: Final = """curl -i {url} -H 'content-type: application/json' -d '
{{"values": [{{"clientState": "{secret}", "companyId": "{company}",
  "companyName": "CRONUS International Ltd.", "eventName": "ota_cm_order_processed", "eventVersion": "1.0",
  "payload": {{"orderId": "{order}", "buyFromOrderReference": "{reference}", "status": "{status}"}},
  "timestamp": "2026-05-15T09:30:05Z"}}]}}'"""


def run(console: Console) -> bool:
    """Return whether every order arrived complete and each settlement cost exactly one getOrder."""
    with contextlib.ExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="ota-receiver-demo-")))
        progress = parts.enter_context(
            Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console)
        )
        step = progress.add_task("starting Valkey, the sandbox Channel Manager, web and workers")
        stack = parts.enter_context(stacks.start(folder, sandbox_options=("--settle-after", "0.4")))
        progress.update(step, description="parts run", completed=100)
        orders = drive(stack, progress)
        progress.stop()
        show(console, stack, orders)
        return not any(sample.problems for sample in orders)


def drive(stack: Stack, progress: Progress) -> list[Sample]:
    """Send the samples through and return them with what came home."""
    settings, company = stack.settings, stack.settings.companies[0]
    with bootstrap.http(settings) as http, bootstrap.worker_redis(settings) as redis:
        manager = bootstrap.channel_manager(settings, company, http)
        driver = Driver(stack, manager, Archive(redis))
        subscribe(stack, manager)
        orders = samples()
        step = progress.add_task("orders submitted", total=len(orders))
        for number, sample in enumerate(orders, 1):
            driver.create(sample, number)
            progress.advance(step)
        step = progress.add_task("settled, announced, fetched", total=len(orders))
        for number, sample in enumerate(orders, 1):
            if driver.wait_home(sample, _HOME_WITHIN) and sample.expected == "Error":
                driver.replace(sample, number)
                driver.wait_home(sample, _HOME_WITHIN)
            driver.announce_again(sample)
            progress.advance(step)
        for sample in orders:
            driver.wait_duplicates(sample, _HOME_WITHIN)
            driver.inspect(sample)
    return orders


def show(console: Console, stack: Stack, orders: list[Sample]) -> None:
    """Print what arrived, and how to send one event by hand."""
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
            str(record.wanted + record.duplicates) if record else "-",
            str(sample.calls),
            str(len(order.wallets)) if order else "-",
            str(len(order.tickets)) if order else "-",
            str(len(order.coupons)) if order else "-",
            "yes" if order and order.manifest_url else "no",
        )
    console.print(table)
    for sample in orders:
        for problem in sample.problems:
            console.print(f"[red]{sample.title}: {problem}")
    if not any(sample.problems for sample in orders):
        console.print("Every order arrived complete, and each settlement cost exactly one getOrder.\n")
    last = orders[-1]
    console.print(
        "The one POST that started each of them (`uv run ota-receiver dev` keeps a receiver to send it to):\n"
    )
    reference = last.order.buy_from_order_reference if last.order else ""
    print_curl(console, stack, last.order_id, reference or "", last.expected)


def print_curl(console: Console, stack: Stack, order_id: str, reference: str, status: str) -> None:
    """Print an event as a curl command that can be pasted."""
    text = _CURL.format(
        url=stack.webhook_url,
        secret=stacks.CLIENT_STATE,
        company=stack.settings.companies[0].np_company_id,
        order=order_id,
        reference=reference,
        status=status,
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
