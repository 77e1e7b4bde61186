"""A company that hangs holds nobody up."""

from __future__ import annotations

import time

from app.dev.stack import ENVIRONMENT, TENANT
from tests.eventually import eventually
from tests.service import Service


def test_an_order_of_one_company_is_home_in_5_s_while_another_hangs_with_200_orders_due(bare: Service) -> None:
    """Company A answers nothing within the time-out; B has its own key, and its own budget."""
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
    eventually(lambda: bare.admin("GET", "stats")["active"] == 5, 10, what="the hanging company is being asked")

    (order_id,) = bare.issue(1, healthy)
    posted = time.monotonic()
    assert bare.post(bare.event(order_id, clientState="secret of Healthy", companyId=healthy))[0] == 200
    eventually(lambda: bare.fetched(order_id), 5, what="the healthy company's order is home")

    assert time.monotonic() - posted < 5
