"""The counts of a run as the admin API shows them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from app.dev.sandbox.world import World


def totals(world: World) -> dict[str, Any]:
    """Return all that can be said without naming an order."""
    tally, gates = world.tally, list(world.gates.values())
    throttled = sum((gate.refused for gate in gates), Counter(tally.throttled))
    statuses = Counter(row.order.status for company in world.companies for row in world.book(company))
    return {
        "operations": tally.operations,
        "throttled": {name: throttled[name] for name in ("window", "queue", "fault")},
        "active": sum(gate.active for gate in gates),
        "waiting": sum(gate.waiting for gate in gates),
        "most_active": max((gate.most_active for gate in gates), default=0),
        "most_waiting": max((gate.most_waiting for gate in gates), default=0),
        "orders": statuses,
        "settlements": tally.settled,
        "events": {
            "fired": tally.fired,
            "accepted": tally.accepted,
            "pending": world.deliveries.pending,
            "lost": tally.lost,
        },
        "deliveries": tally.codes,
        "paused": world.deliveries.paused,
    }


def order_rows(world: World, company_id: str | None) -> list[dict[str, Any]]:
    """Return a row for every order of a company (None: of all) that is or was there, or was asked for."""
    statuses = {
        (company.id, row.order.order_id): row.order.status for company in world.companies for row in world.book(company)
    }
    keys = dict.fromkeys([*statuses, *world.tally.orders])
    return [_row(world, key, statuses.get(key)) for key in keys if company_id is None or key[0] == company_id]


def _row(world: World, key: tuple[str, str], status: str | None) -> dict[str, Any]:
    counts = world.tally.orders.get(key)
    return {
        "company_id": key[0],
        "order_id": key[1],
        "status": status,
        "gets": counts.gets if counts else 0,
        "answered": counts.answered if counts else 0,
        "settlements": counts.settlements if counts else [],
        "fired": counts.fired if counts else 0,
        "accepted": counts.accepted if counts else 0,
    }
