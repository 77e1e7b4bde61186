"""One simulation from the first process to the report: on this laptop, or against a receiver that already runs."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from app import bootstrap
from app.dev import stack as stacks
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.values import company_id
from app.dev.simulator.audit import (
    Calls,
    Evidence,
    Expected,
    StoredOrders,
    acknowledged,
    audit,
    calls_by_order,
    forgeries,
)
from app.dev.simulator.plan import Options, Plan, Settled, make
from app.dev.simulator.sender import Answer, Origin, Sender
from app.errors import ReceiverError
from app.ledger.events import EventLog
from app.ledger.orders import Archive

_PARTNER: Final = "5f0e8a52-7c1b-4d63-9a3e-2b1c0d9e8f70"
"""Not the partner of the receiver's settings, whose orders `reconcile` would fetch too."""

_MIX: Final = {"Issued": 8, "Draft": 1, "Error": 1}
_ITEMS: Final = ("31001", "PKG-100")
_POLL: Final = 0.3
_QUIET: Final = 2.0
"""Seconds without a getOrder, once all orders are fetched, after which the calls are counted."""
_REACHABLE_WITHIN: Final = 60.0
_ADDRESS: Final = (stacks.TENANT, stacks.ENVIRONMENT, stacks.COMPANY)


class ReceiverUnreachable(ReceiverError):
    """The receiver does not answer, or the port of the sandbox is taken."""


class Progress(Protocol):
    """Shows how far a task is: called with its name and size, it yields a function that adds steps."""

    def __call__(self, task: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]: ...


class Wrong(msgspec.Struct, frozen=True):
    """An order id, and all that is wrong with it."""

    order_id: str
    problems: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run; counts of events unless named otherwise. None: unknown for this receiver."""

    seed: int
    orders: int
    posts: int
    sent: int
    acknowledged: int
    answers: dict[str, int]
    duplicates_sent: int
    duplicates_recognised: int | None
    forged_sent: int
    forged_orders_fetched: int
    forged_posts_refused: int
    orders_fetched: int
    orders_complete: int | None
    get_orders: int
    get_orders_per_settlement: float
    p50_ms: float
    p99_ms: float
    seconds: float
    wrong: list[Wrong]


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


def on_laptop(options: Options, patience: float, progress: Progress) -> Report:
    """Start everything, simulate, and check what the receiver stored too. Main thread only (see Process).

    Raises ReceiverError or TimeoutError when a part does not start.
    """
    with contextlib.ExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="ota-receiver-simulate-")))
        with progress("starting Valkey, the sandbox, web and workers"):
            sandbox_options = ("--seed", str(options.seed))
            stack = parts.enter_context(stacks.start(folder, sandbox_options=sandbox_options))
        redis = parts.enter_context(bootstrap.worker_redis(stack.settings))
        stored = StoredOrders(Archive(redis), EventLog(redis), stack.settings.companies[0].np_company_id)
        return _drive(stack.sandbox, stack.webhook_url, options, patience, stored, progress)


def against(url: str, port: int, options: Options, patience: float, progress: Progress) -> Report:
    """Run the Channel Manager on `port` for the receiver at `url`, which is configured with `receiver_settings`.

    Waits a minute for it. Raises ReceiverUnreachable, and ReceiverError or TimeoutError without a sandbox.
    """
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ReceiverUnreachable(f"port {port} is taken: choose another with --sandbox-port, also in NP_BASE_URL")
    with sandbox_process.start(seed=options.seed, port=port) as sandbox:
        with progress(f"waiting for {url}"):
            _wait_reachable(url)
        return _drive(sandbox, url, options, patience, None, progress)


def _drive(
    sandbox: Sandbox,
    url: str,
    options: Options,
    patience: float,
    stored: StoredOrders | None,
    progress: Progress,
) -> Report:
    origin = Origin(sandbox.company_id(*_ADDRESS), stacks.COMPANY, stacks.CLIENT_STATE)
    plan = make(options, _settled(sandbox, options), origin)
    started = time.monotonic()
    answers = []
    with progress("events sent", len(plan.shots)) as step:
        answers += Sender(url, plan.first).send(step)
        _wait_fetched(sandbox, _orders(answers), patience, 0.0, lambda _: None)
        answers += Sender(url, plan.late).send(step)
    accepted = _orders(answers)
    with progress("orders fetched", len(accepted)) as step:
        calls = _wait_fetched(sandbox, accepted, patience, _QUIET, step)
    ids = [*(order.order_id for order in plan.settled), *sorted(plan.ghosts)]
    evidence = Evidence(
        answers,
        calls,
        exact=True,
        stored=stored.orders(ids) if stored else None,
        recorded=stored.recorded() if stored else None,
    )
    return report(options, plan, evidence, time.monotonic() - started)


def _orders(answers: Sequence[Answer]) -> set[str]:
    return {event.payload.order_id for event in acknowledged(answers)}


def _settled(sandbox: Sandbox, options: Options) -> list[Settled]:
    """Make the orders at the sandbox and return them with the references that their events name."""
    tenant, environment, company = _ADDRESS
    body = {"tenant": tenant, "environment": environment, "company": company, "partner_id": _PARTNER}
    sandbox.admin("POST", "orders", body | {"count": options.orders, "mix": _MIX, "items": _ITEMS, "reference": "SIM"})
    url = f"{sandbox.base_url(*_ADDRESS)}/channelManager/orders/{_PARTNER}?pageSize=20000"
    response = sandbox.client.get(url, headers={"x-np-api-key": stacks.API_KEY})
    response.raise_for_status()
    listed: list[dict[str, Any]] = response.json()["data"]
    return [Settled(row["orderId"], row["buyFromOrderReference"], row["status"]) for row in listed]


def _wait_fetched(
    sandbox: Sandbox, accepted: set[str], patience: float, quiet: float, step: Callable[[int], None]
) -> dict[str, Calls]:
    """Return the getOrder calls once all of `accepted` are fetched and no call came for `quiet` seconds.

    Or once none came for `patience` seconds.
    """
    fetched, gets, since = 0, -1, time.monotonic()
    while True:
        calls = calls_by_order(sandbox.admin("GET", "orders"))
        done = sum(calls.get(order_id, Calls()).answered > 0 for order_id in accepted)
        step(done - fetched)
        fetched = done
        now, total = time.monotonic(), sum(one.gets for one in calls.values())
        if total != gets:
            gets, since = total, now
        if now - since >= (quiet if done == len(accepted) else patience):
            return calls
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
                raise ReceiverUnreachable(f"nothing listens at {url}") from None
            time.sleep(_POLL)


def report(options: Options, plan: Plan, evidence: Evidence, seconds: float) -> Report:
    """Return the report of a run that took `seconds`."""
    wrong = audit(expected(plan), evidence) | forgeries(plan.ghosts, evidence)
    shots, answers, calls = plan.shots, evidence.answers, evidence.calls
    ok = [one for one in answers if one.ok]
    recognised = [one.receipt["duplicates"] for one in ok if isinstance(one.receipt.get("duplicates"), int)]
    times = sorted(one.seconds for one in answers)
    gets = sum(calls.get(order.order_id, Calls()).gets for order in plan.settled)
    return Report(
        seed=options.seed,
        orders=len(plan.settled),
        posts=len(plan.first) + len(plan.late),
        sent=len(shots),
        acknowledged=sum(shot.kind != "forged" for one in ok for shot in one.post.shots),
        answers=dict(Counter(one.result for one in answers)),
        duplicates_sent=sum(shot.kind == "duplicate" for shot in shots),
        duplicates_recognised=sum(recognised) if recognised else None,
        forged_sent=sum(shot.kind == "forged" for shot in shots),
        forged_orders_fetched=sum(calls.get(ghost, Calls()).gets > 0 for ghost in plan.ghosts),
        forged_posts_refused=sum(one.post.forged and not one.ok for one in answers),
        orders_fetched=sum(calls.get(order.order_id, Calls()).answered > 0 for order in plan.settled),
        orders_complete=(
            None if evidence.stored is None else sum(order.order_id not in wrong for order in plan.settled)
        ),
        get_orders=gets,
        get_orders_per_settlement=round(gets / len(plan.settled), 3),
        p50_ms=_percentile(times, 0.50),
        p99_ms=_percentile(times, 0.99),
        seconds=round(seconds, 1),
        wrong=[Wrong(order_id, problems) for order_id, problems in wrong.items()],
    )


def expected(plan: Plan) -> list[Expected]:
    """Return each order of the plan with its event and its repeats."""
    events = {shot.order_id: shot.event for shot in plan.shots if shot.kind == "genuine"}
    repeats = plan.repeats
    return [Expected(order_id, (event,), repeats[order_id]) for order_id, event in events.items()]


def _percentile(times: Sequence[float], share: float) -> float:
    return round(times[min(len(times) - 1, int(share * len(times)))] * 1000, 1) if times else 0.0
