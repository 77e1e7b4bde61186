"""Holds what was sent against what the sandbox was asked for and what the receiver kept, id by id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from app.dev.driver import gaps
from app.dev.simulator.plan import Plan, Settled
from app.dev.simulator.sending import Answer
from app.store.record import OrderRecord
from app.upstream.order import Order


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
