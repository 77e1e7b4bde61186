"""The samples of upstream's documentation in tests/fixtures, and the settings of their company."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from app.order_document import OrderDocument
from app.settings import Company
from app.upstream.models import parse_order

COMPANY_ID: Final = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
ORDER_ID: Final = "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"


def sample(name: str) -> bytes:
    """Return a sample such as `order-issued` or `webhook-values`."""
    return (Path(__file__).parent / "fixtures" / f"{name}.json").read_bytes()


def document(name: str, **changes: Any) -> OrderDocument:
    """Return a sample of an order as its first revision."""
    order = parse_order(sample(name))
    values: dict[str, Any] = {
        "company": "museum",
        "company_id": COMPANY_ID,
        "order_id": order.order_id,
        "revision": 1,
        "digest": "d" * 64,
        "fetched_at": 1_780_000_000_000,
        "idempotency_key": f"{COMPANY_ID}/{order.order_id}/1/{'d' * 12}",
        "status": order.status,
        "order": order,
    }
    return OrderDocument(**values | changes)


def example_of(section: str) -> dict[str, Any]:
    """Return what the Python example in a section of docs/sinks.md defines."""
    page = (Path(__file__).parents[1] / "docs" / "sinks.md").read_text(encoding="utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    defined: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], defined)
    return defined


def company(company_id: str, client_state: str, **more: Any) -> Company:
    return Company(
        slug=f"c{company_id[0]}",
        np_company_id=company_id,
        np_company="CRONUS International Ltd.",
        np_tenant="tenant",
        np_environment="Production",
        np_api_key=SecretStr("canary-api-key"),
        client_state=SecretStr(client_state),
        **more,
    )
