"""One simulation from its plan to the report: on this laptop, or against a receiver that already runs.

The plan: events of settled orders, repeated, late and forged as the options say, in batches.
"""

from __future__ import annotations

import contextlib
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec

from app import bootstrap
from app.dev import stack as stacks
from app.dev.processes import check_free
from app.dev.sandbox import process as sandbox_process
from app.dev.sandbox.process import Sandbox
from app.dev.sandbox.values import Shape, event_timestamp, guid
from app.dev.sandbox.webhooks import Payload
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
from app.dev.simulator.sender import Answer, Origin, Post, Sender, Shot
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
_LONGEST_STATE: Final = 50


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How much of each misbehaviour: shares are of the orders, 0 to 1; `rate` in events a second, None: all at once."""

    orders: int
    duplicates: float
    late: float
    bad_secret: float
    batch: int
    rate: float | None
    seed: int


class Plan(msgspec.Struct, frozen=True):
    """The settled orders and all POSTs: the first wave, and those sent when every order is fetched."""

    settled: tuple[Payload, ...]
    first: tuple[Post, ...]
    late: tuple[Post, ...]

    @property
    def shots(self) -> list[Shot]:
        return [shot for post in (*self.first, *self.late) for shot in post.shots]

    @property
    def repeats(self) -> Counter[str]:
        """Return how often each order's event is repeated."""
        return Counter(shot.order_id for shot in self.shots if shot.kind == "duplicate")

    @property
    def ghosts(self) -> set[str]:
        """Return the ids that only forged events name."""
        return {shot.order_id for shot in self.shots} - {order.order_id for order in self.settled}


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
    """Run the Channel Manager on `port` for the receiver at `url`, which has the `stack.receiver_settings`.

    Waits a minute for it. Raises PortTaken, ProcessEnded, or TimeoutError, also when the receiver does not listen.
    """
    check_free(port, "choose another with --sandbox-port, also in NP_BASE_URL")
    with sandbox_process.start(seed=options.seed, port=port) as sandbox:
        with progress(f"waiting for {url}"):
            _wait_reachable(url)
        return _drive(sandbox, url, options, patience, None, progress)


def make(options: Options, settled: Sequence[Payload], origin: Origin) -> Plan:
    """Return the POSTs; each share above 0 makes at least one event.

    Half of the repeats come late, when their order is fetched. So does every other forged event, which then names a
    real order: accepting it costs a getOrder that can be counted. The others name orders that do not exist.
    """
    dice = random.Random(options.seed)  # noqa: S311  # a plan that the seed repeats, no secret
    genuine = {
        order.order_id: Shot(
            "genuine", origin.event(order.order_id, order.buy_from_order_reference, order.status, event_timestamp())
        )
        for order in settled
    }
    late_ids = _drawn(dice, genuine, options.late)
    first = [shot for order_id, shot in genuine.items() if order_id not in late_ids]
    late = [genuine[order_id] for order_id in late_ids]
    for number, order_id in enumerate(_drawn(dice, genuine, options.duplicates)):
        repeat = Shot("duplicate", genuine[order_id].event)
        (late if number % 2 or order_id in late_ids else first).append(repeat)
    forged = _drawn(dice, genuine, options.bad_secret)
    late += [_forged(number, order_id, origin) for number, order_id in enumerate(forged) if number % 2]
    ghosts = [_forged(number, guid(options.seed, "ghost", number), origin) for number in range(0, len(forged), 2)]
    first += ghosts[1:]
    # The first one comes by itself: only then does the answer show that it was refused.
    alone = [Post((ghost,), "values") for ghost in ghosts[:1]]
    dice.shuffle(first)
    dice.shuffle(late)
    return Plan(
        tuple(settled),
        _timed([*alone, *_batches(dice, first, options.batch)], options.rate),
        _timed(_batches(dice, late, options.batch), options.rate),
    )


def report(options: Options, plan: Plan, evidence: Evidence, seconds: float) -> Report:
    """Return the report of a run that took `seconds`."""
    shots, answers, calls, repeats = plan.shots, evidence.answers, evidence.calls, plan.repeats
    genuine = [shot for shot in shots if shot.kind == "genuine"]
    orders = [Expected(shot.order_id, (shot.event,), repeats[shot.order_id]) for shot in genuine]
    wrong = audit(orders, evidence) | forgeries(plan.ghosts, evidence)
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


def _settled(sandbox: Sandbox, options: Options) -> list[Payload]:
    """Make the orders at the sandbox and return the payloads of their events."""
    tenant, environment, company = _ADDRESS
    body = {"tenant": tenant, "environment": environment, "company": company, "partner_id": _PARTNER}
    sandbox.admin("POST", "orders", body | {"count": options.orders, "mix": _MIX, "items": _ITEMS, "reference": "SIM"})
    url = f"{sandbox.base_url(*_ADDRESS)}/channelManager/orders/{_PARTNER}?pageSize=20000"
    response = sandbox.client.get(url, headers={"x-np-api-key": stacks.API_KEY})
    response.raise_for_status()
    return msgspec.convert(response.json()["data"], list[Payload])


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
                raise TimeoutError(f"nothing listens at {url}") from None
            time.sleep(_POLL)


def _percentile(times: Sequence[float], share: float) -> float:
    return round(times[min(len(times) - 1, int(share * len(times)))] * 1000, 1) if times else 0.0


def _drawn(dice: random.Random, ids: Iterable[str], share: float) -> list[str]:
    known = list(ids)
    return dice.sample(known, min(len(known), max(round(share * len(known)), 1 if share else 0)))


def _forged(number: int, order_id: str, origin: Origin) -> Shot:
    """Return an event with a clientState that is nearly right, or none."""
    right = origin.client_state
    wrong = (f"not-{right}"[:_LONGEST_STATE], "", right.swapcase(), right[:-1], f"{right} "[-_LONGEST_STATE:])
    event = origin.event(order_id, "CM-FORGED", "Issued", event_timestamp(), wrong[number % len(wrong)])
    return Shot("forged", event)


def _batches(dice: random.Random, shots: Sequence[Shot], batch: int) -> list[Post]:
    """Return the shots in POSTs of 1 to `batch`, in all documented shapes."""
    posts: list[Post] = []
    at = 0
    while at < len(shots):
        some = tuple(shots[at : at + dice.randint(1, batch)])
        shapes: tuple[Shape, ...] = ("values", "value", "bare") if len(some) == 1 else ("values", "value")
        posts.append(Post(some, dice.choice(shapes)))
        at += len(some)
    return posts


def _timed(posts: Sequence[Post], rate: float | None) -> tuple[Post, ...]:
    """Return the posts with the seconds at which they are sent."""
    timed, events = [], 0
    for post in posts:
        timed.append(msgspec.structs.replace(post, at=events / rate if rate else 0.0))
        events += len(post.shots)
    return tuple(timed)
