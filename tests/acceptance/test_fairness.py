"""A company whose Channel Manager hangs does not delay another company."""

from __future__ import annotations

import time

from app.dev.stack import ENVIRONMENT, TENANT
from tests.eventually import eventually
from tests.service import Service


def test_an_order_is_fetched_in_5_s_while_another_company_hangs_with_200_orders_due(bare: Service) -> None:
    """The second company has its own key and so its own limits."""
    hanging, healthy = bare.company_id_of("Hanging"), bare.company_id_of("Healthy")
    bare.admin("POST", "faults", {"kind": "hang", "operation": "getOrder", "company_id": hanging})
    (bare.folder / "companies.toml").write_text(
        "".join(
            f'[companies.{name.lower()}]\nnp_company_id = "{company_id}"\nnp_company = "{name}"\n'
            f'np_tenant = "{TENANT}"\nnp_environment = "{ENVIRONMENT}"\nnp_api_key = "key of {name}"\n'
            f'client_state = "secret of {name}"\n'
            for name, company_id in (("Hanging", hanging), ("Healthy", healthy))
        )
    )
    several = {name: value for name, value in bare.variables.items() if name in {"REDIS_URL", "PORT", "LOG_FORMAT"}}
    bare.variables = several | {"COMPANIES_FILE": str(bare.folder / "companies.toml"), "NP_BASE_URL": bare.sandbox.url}
    bare.start("web")
    orders = bare.issue(200, hanging)
    assert bare.post(*(bare.event(o, clientState="secret of Hanging", companyId=hanging) for o in orders))[0] == 200
    bare.start("worker", WORKERS="8", BACKFILL_WORKERS="0")
    eventually(lambda: bare.admin("GET", "stats")["active"] == 5, 10, what="five getOrders of the first company hang")

    (order_id,) = bare.issue(1, healthy)
    posted = time.monotonic()
    assert bare.post(bare.event(order_id, clientState="secret of Healthy", companyId=healthy))[0] == 200
    eventually(lambda: bare.fetched(order_id), 5, what="the order of the second company is fetched")

    assert time.monotonic() - posted < 5
