"""A POST as the Channel Manager sends it, with as many events as wanted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

_FIXTURE = Path(__file__).parents[1] / "fixtures" / "webhook-values.json"


def body(order_ids: Iterable[str], *, client_state: str, company_id: str) -> str:
    """Return a body with one event an order, all of this moment."""
    (sample,) = json.loads(_FIXTURE.read_text(encoding="utf-8"))["values"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    same = sample | {"clientState": client_state, "companyId": company_id, "timestamp": now}
    values = [same | {"payload": sample["payload"] | {"orderId": order_id}} for order_id in order_ids]
    return json.dumps({"values": values}, separators=(",", ":"))
