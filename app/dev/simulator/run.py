"""One simulation from the first process to the report: on this laptop, or against a receiver that runs already.

Holds what was sent against what the sandbox was asked for and what the receiver kept, id by id.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import msgspec

from app import bootstrap
from app.dev import stack as stacks
from app.dev.demo import gaps
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.settings import company_id
from app.dev.simulator.sender import Answer, Plan, Sender, Settled, Wish, make, send
from app.errors import ReceiverError
from app.ids import OrderKey
from app.ledger.orders import Archive, OrderRecord
from app.upstream.models import Order


class Asked(msgspec.Struct, frozen=True):
    """How often the sandbox was asked for an order, and how often it answered with it."""

    gets: int = 0
    answered: int = 0


class Kept(msgspec.Struct, frozen=True):
    """What the receiver has of an order, where we can look into its books."""

    record: OrderRecord | None
    order: Order | None


class Wrong(msgspec.Struct, frozen=True):
    """An id, and all that is wrong with it."""

    order_id: str
    problems: list[str]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole run; counts of events unless named otherwise. None: that receiver does not tell."""

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


def report(
    seed: int,
    plan: Plan,
    answers: Sequence[Answer],
    asked: Mapping[str, Asked],
    kept: Mapping[str, Kept] | None,
    seconds: float,
) -> Report:
    """Return the report; `kept` is None where only the sandbox's side can be seen."""
    wrong = [*_of_orders(plan, answers, asked, kept), *_of_forgeries(plan, answers, asked, kept)]
    shots, wells = plan.shots, [one for one in answers if one.well]
    told = [one.receipt["duplicates"] for one in wells if isinstance(one.receipt.get("duplicates"), int)]
    times = sorted(one.seconds for one in answers)
    gets = sum(asked.get(order.order_id, Asked()).gets for order in plan.settled)
    bad = {one.order_id for one in wrong}
    return Report(
        seed=seed,
        orders=len(plan.settled),
        posts=len(plan.first) + len(plan.late),
        sent=len(shots),
        acknowledged=sum(shot.kind != "forged" for one in wells for shot in one.post.shots),
        answers=dict(Counter(one.said for one in answers)),
        duplicates_sent=sum(shot.kind == "duplicate" for shot in shots),
        duplicates_recognised=sum(told) if told else None,
        forged_sent=sum(shot.kind == "forged" for shot in shots),
        forged_orders_fetched=sum(asked.get(ghost, Asked()).gets > 0 for ghost in plan.ghosts),
        forged_posts_refused=sum(one.post.forged and not one.well for one in answers),
        orders_fetched=sum(asked.get(order.order_id, Asked()).answered > 0 for order in plan.settled),
        orders_complete=None if kept is None else sum(order.order_id not in bad for order in plan.settled),
        get_orders=gets,
        get_orders_per_settlement=round(gets / len(plan.settled), 3),
        p50_ms=_percentile(times, 0.50),
        p99_ms=_percentile(times, 0.99),
        seconds=round(seconds, 1),
        wrong=wrong,
    )


def acknowledged(plan: Plan, answers: Sequence[Answer]) -> set[str]:
    """Return the orders of which at least one true event was answered 2xx: from then on they are owed a fetch."""
    true = {shot.order_id for one in answers if one.well for shot in one.post.shots if shot.kind != "forged"}
    return true & {order.order_id for order in plan.settled}


def _of_orders(
    plan: Plan, answers: Sequence[Answer], asked: Mapping[str, Asked], kept: Mapping[str, Kept] | None
) -> list[Wrong]:
    heard, repeats = acknowledged(plan, answers), plan.repeats
    said: dict[str, list[str]] = {}
    for one in answers:
        for order_id in {shot.order_id for shot in one.post.shots if shot.kind != "forged"}:
            said.setdefault(order_id, []).append(one.said)
    found = []
    for order in plan.settled:
        key = order.order_id
        if key not in heard:
            problems = [f"never acknowledged: {', '.join(said.get(key, ['not sent']))}"]
        else:
            problems = _fetching(asked.get(key, Asked()))
        if kept is not None:
            # A POST that was tried again may have been recorded the first time.
            tried_again = any(not text.isdecimal() or text >= "500" for text in said.get(key, []))
            problems += _keeping(order, kept[key], None if tried_again else repeats[key])
        if problems:
            found.append(Wrong(key, problems))
    return found


def _fetching(asked: Asked) -> list[str]:
    if asked.answered == 1:
        return []
    if asked.answered:
        return [f"{asked.answered} getOrders for one settlement"]
    return [f"acknowledged, but never fetched ({asked.gets} getOrders without an order)"]


def _keeping(order: Settled, kept: Kept, repeats: int | None) -> list[str]:
    record = kept.record
    if record is None or kept.order is None:
        return ["not in the books"]
    problems = gaps(kept.order, order.status)
    if (record.wanted, record.done) != (1, 1):
        problems.append(f"{record.wanted} settlements counted and {record.done} fetched, of one")
    if record.status != order.status:
        problems.append(f"kept as {record.status}, settled as {order.status}")
    if repeats is not None and record.duplicates != repeats:
        problems.append(f"{record.duplicates} duplicates recognised of {repeats}")
    return problems


def _of_forgeries(
    plan: Plan, answers: Sequence[Answer], asked: Mapping[str, Asked], kept: Mapping[str, Kept] | None
) -> list[Wrong]:
    welcomed = {shot.order_id for one in answers if one.well and one.post.forged for shot in one.post.shots}
    found = []
    for ghost in sorted(plan.ghosts | welcomed):
        problems = ["forged, and answered as if it were true"] if ghost in welcomed else []
        if ghost in plan.ghosts and asked.get(ghost, Asked()).gets:
            problems.append("forged, and fetched")
        if ghost in plan.ghosts and kept is not None and kept[ghost].record is not None:
            problems.append("forged, and recorded")
        if problems:
            found.append(Wrong(ghost, problems))
    return found


def rows(listed: Sequence[Mapping[str, Any]]) -> dict[str, Asked]:
    """Return what the sandbox's admin API says of its orders."""
    return {row["order_id"]: Asked(row["gets"], row["answered"]) for row in listed}


def _percentile(times: Sequence[float], share: float) -> float:
    return round(times[min(len(times) - 1, int(share * len(times)))] * 1000, 1) if times else 0.0


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
    planned = make(wish, _settled(sandbox, wish), sender)
    begun = time.monotonic()
    answers = []
    with progress("events sent", len(planned.shots)) as step:
        answers += send(url, planned.first, wish.rate, step)
        heard = acknowledged(planned, answers)
        _wait_home(sandbox, heard, patience, 0.0, lambda _: None)
        answers += send(url, planned.late, wish.rate, step)
    heard = acknowledged(planned, answers)
    with progress("orders fetched", len(heard)) as step:
        asked = _wait_home(sandbox, heard, patience, _QUIET, step)
    kept = books(_ids(planned))
    return report(wish.seed, planned, answers, asked, kept, time.monotonic() - begun)


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
        asked = rows(sandbox.admin("GET", "orders"))
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
