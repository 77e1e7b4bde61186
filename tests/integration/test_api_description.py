"""/openapi.json is true: it is OpenAPI 3.1, and the running service answers as it says.

schemathesis sends what the description allows, what it forbids, methods that it does not name, and no key. To see its
summary: `uv run pytest -n0 -rP tests/integration/test_api_description.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from app.api.keys import ApiKeys
from app.dev.valkey import Valkey
from app.ledger.redis import Redis
from tests.lab import Lab, order
from tests.service import API, Web, serving, settings_of_one_company

SECONDS = 120
"""For all of schemathesis, which takes seven on an idle machine."""


@pytest.fixture(scope="module")
def api(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = settings_of_one_company(valkey.url) | {"API_REQUESTS_PER_MIN": "1000000"}
    with serving(tmp_path_factory.mktemp("api"), settings, API) as one:
        yield one


@pytest.fixture
def description(api: Web) -> Any:
    answer = api.http.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def test_the_description_is_openapi_3_1_and_has_every_operation(description: Any) -> None:
    OpenAPIV31SpecValidator(description).validate()

    operations = {f"{method} {path}" for path, item in description["paths"].items() for method in item}
    assert operations == {
        "get /orders",
        "get /orders/{order_id}",
        "get /orders/{order_id}/history",
        "get /feed",
        "post /feed/ack",
        "get /healthz",
        "get /openapi.json",
    }
    assert description["webhooks"].keys() == {"orderProcessed", "orderForwarded"}


def test_the_running_service_answers_as_described(
    api: Web, redis_client: Redis, redis_url: str, tmp_path: Path
) -> None:
    lab = Lab(redis_client, redis_url, tmp_path)
    lab.declare()
    for number in range(1, 6):
        lab.accept_and_fetch(order(number))
    _, key = ApiKeys(redis_client).create("desk", ("orders:read", "feed"))
    description = api.http.get("/openapi.json").json()
    _fill_in(description, order_id=order(1).order_id, companies=["venue", "museum"], cursors=_cursors(api, key))
    (tmp_path / "openapi.json").write_text(json.dumps(description))

    ended = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", "openapi.json"),
            *("--url", f"http://127.0.0.1:{api.port}", "--header", f"Authorization: Bearer {key}"),
            *("--checks", "all", "--mode", "all", "--max-examples", "10", "--seed", "1", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    sys.stdout.write(ended.stdout)

    assert ended.returncode == 0
    assert "Tested: 7" in ended.stdout


def _cursors(api: Web, key: str) -> list[str]:
    """Return cursors that the feed has given."""
    headers = {"authorization": f"Bearer {key}"}
    first = api.http.get("/feed?limit=2", headers=headers).json()["next"]
    return [first, api.http.get(f"/feed?limit=2&after={first}", headers=headers).json()["next"]]


def _fill_in(description: Any, *, order_id: str, companies: list[str], cursors: list[str]) -> None:
    """Put in what only this deployment knows, so that all else must be refused: its companies, and cursors.

    The order is an example, so that its answers are checked too.
    """
    known = {"company": {"schema": {"enum": companies}}, "order_id": {"example": order_id}}
    known |= {name: {"schema": {"enum": cursors}} for name in ("after", "cursor")}
    for item in description["paths"].values():
        for one in item.get("get", {}).get("parameters", ()):
            one |= known.get(one["name"], {})
    description["components"]["schemas"]["Acknowledgement"]["properties"]["cursor"] = {"enum": cursors}
