"""The samples of upstream's documentation in tests/fixtures, and the settings of their company."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from app.settings import Company

COMPANY_ID: Final = "b56a418d-8205-4d3a-bdbb-25d94e42abbd"
ORDER_ID: Final = "9c6b2f4e-2b71-4d23-9d6a-a3b4c5d6e7f8"


def sample(name: str) -> bytes:
    """Return a sample such as `order-issued` or `webhook-values`."""
    return (Path(__file__).parent / "fixtures" / f"{name}.json").read_bytes()


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
