"""One simulation from the first process to the report: on this laptop, or against a receiver that runs already."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from app import bootstrap
from app.dev import stack as stacks
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.mint import company_id
from app.dev.sandbox.process import Sandbox
from app.dev.simulator import audit, plan, sending
from app.dev.simulator.audit import Asked, Kept, Report
from app.dev.simulator.plan import Plan, Sender, Settled, Wish
from app.errors import ReceiverError
from app.store.archive import Archive
from app.store.keys import OrderKey

_PARTNER: Final = "5f0e8a52-7c1b-4d63-9a3e-2b1c0d9e8f70"
"""Not the partner that the receiver knows: else its own search for missed events would bring these orders home too."""

_MIX: Final = {"Issued": 8, "Draft": 1, "Error": 1}
_ITEMS: Final = ("31001", "PKG-100")
_POLL: Final = 0.3
_QUIET: Final = 2.0
"""Seconds without a getOrder after the last order came home, before what came is counted."""
_REACHABLE_WITHIN: Final = 60.0
_STRIDE: Final = 200
_ADDRESS: Final = (stacks.TENANT, stacks.ENVIRONMENT, stacks.COMPANY)


class NotThere(ReceiverError):
    """What was to be simulated against, or with, cannot be had."""


class Progress(Protocol):
    """Shows how far a task is: called with its name and size it yields a function that takes steps."""

    def __call__(self, task: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]: ...


def receiver_settings(port: int) -> dict[str, str]:
    """Return the environment a receiver needs for a sandbox on `port`; nothing in it is secret."""
    return {
        "CLIENT_STATE": stacks.CLIENT_STATE,
        "NP_BASE_URL": f"http://127.0.0.1:{port}",
        "NP_API_KEY": stacks.API_KEY,
        "NP_TENANT": stacks.TENANT,
        "NP_ENVIRONMENT": stacks.ENVIRONMENT,
        "NP_COMPANY": stacks.COMPANY,
        "NP_COMPANY_ID": company_id(*_ADDRESS),
    }


def on_laptop(wish: Wish, patience: float, progress: Progress) -> Report:
    """Bring up everything, simulate, and look into the receiver's books too. Main thread only (see Process).

    Raises ReceiverError or TimeoutError when a part does not start.
    """
    with contextlib.ExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="ota-receiver-simulate-")))
        with progress("starting Valkey, the sandbox, web and workers"):
            options = ("--seed", str(wish.seed))
            stack = parts.enter_context(stacks.start(folder, sandbox_options=options))
        redis = parts.enter_context(bootstrap.worker_redis(stack.settings))
        archive = Archive(redis)
        company = stack.settings.companies[0].np_company_id

        def books(ids: Iterable[str]) -> dict[str, Kept]:
            keys = [OrderKey(company, order_id) for order_id in ids]
            chunks = [keys[at : at + _STRIDE] for at in range(0, len(keys), _STRIDE)]
            records = [record for chunk in chunks for record in archive.records(chunk)]
            return {key.order_id: Kept(record, archive.order(key)) for key, record in zip(keys, records, strict=True)}

        return _drive(stack.sandbox, stack.webhook_url, wish, patience, books, progress)


def against(url: str, port: int, wish: Wish, patience: float, progress: Progress) -> Report:
    """Play the Channel Manager on `port` for the receiver at `url`, which is configured with `receiver_settings`.

    Waits a minute for it. Raises NotThere, and ReceiverError or TimeoutError when the sandbox does not start.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise NotThere(f"port {port} is taken: name another with --sandbox-port, and in NP_BASE_URL")
    with sandbox_process.start(seed=wish.seed, port=port) as sandbox:
        with progress(f"waiting for {url}"):
            _wait_reachable(url)
        return _drive(sandbox, url, wish, patience, lambda ids: None, progress)


def _drive(
    sandbox: Sandbox,
    url: str,
    wish: Wish,
    patience: float,
    books: Callable[[Iterable[str]], Mapping[str, Kept] | None],
    progress: Progress,
) -> Report:
    sender = Sender(sandbox.company_id(*_ADDRESS), stacks.COMPANY, stacks.CLIENT_STATE)
    planned = plan.make(wish, _settled(sandbox, wish), sender)
    begun = time.monotonic()
    answers = []
    with progress("events sent", len(planned.shots)) as step:
        answers += sending.send(url, planned.first, wish.rate, step)
        heard = audit.acknowledged(planned, answers)
        _wait_home(sandbox, heard, patience, 0.0, lambda _: None)
        answers += sending.send(url, planned.late, wish.rate, step)
    heard = audit.acknowledged(planned, answers)
    with progress("orders fetched", len(heard)) as step:
        asked = _wait_home(sandbox, heard, patience, _QUIET, step)
    kept = books(_ids(planned))
    return audit.report(wish.seed, planned, answers, asked, kept, time.monotonic() - begun)


def _ids(planned: Plan) -> list[str]:
    return [*(order.order_id for order in planned.settled), *sorted(planned.ghosts)]


def _settled(sandbox: Sandbox, wish: Wish) -> list[Settled]:
    """Make the orders at the sandbox and return them with the references that their events name."""
    tenant, environment, company = _ADDRESS
    body = {"tenant": tenant, "environment": environment, "company": company, "partner_id": _PARTNER}
    sandbox.admin("POST", "orders", body | {"count": wish.orders, "mix": _MIX, "items": _ITEMS, "reference": "SIM"})
    url = f"{sandbox.base_url(*_ADDRESS)}/channelManager/orders/{_PARTNER}?pageSize=20000"
    response = sandbox.client.get(url, headers={"x-np-api-key": stacks.API_KEY})
    response.raise_for_status()
    listed: list[dict[str, Any]] = response.json()["data"]
    return [Settled(row["orderId"], row["buyFromOrderReference"], row["status"]) for row in listed]


def _wait_home(
    sandbox: Sandbox, heard: set[str], patience: float, quiet: float, step: Callable[[int], None]
) -> dict[str, Asked]:
    """Return what was asked for, once all of `heard` was fetched and nothing more came for `quiet` seconds.

    Or once nothing came for `patience` seconds.
    """
    fetched, gets, since = 0, -1, time.monotonic()
    while True:
        asked = audit.rows(sandbox.admin("GET", "orders"))
        home = sum(asked.get(order_id, Asked()).answered > 0 for order_id in heard)
        step(home - fetched)
        fetched = home
        now, total = time.monotonic(), sum(one.gets for one in asked.values())
        if total != gets:
            gets, since = total, now
        if now - since >= (quiet if home == len(heard) else patience):
            return asked
        time.sleep(_POLL)


def _wait_reachable(url: str) -> None:
    parts = urlsplit(url)
    address = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    deadline = time.monotonic() + _REACHABLE_WITHIN
    while True:
        try:
            with socket.create_connection(address, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise NotThere(f"nothing listens at {url}") from None
            time.sleep(_POLL)
