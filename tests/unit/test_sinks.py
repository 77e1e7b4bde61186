"""SINKS names functions of the user; a worker refuses settings whose function cannot be called."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import SettingsError
from app.upstream.models import parse_order
from tests.samples import sample
from workers.sinks import Context, build

ORDER = parse_order(sample("order-issued"))
CONTEXT = Context(
    idempotency_key="company/order/3",
    company_id="company",
    order_id="order",
    revision=3,
    attempt=2,
    request_id="request",
)
MODULE = """
seen = []
value = 5

def on_order(order, context):
    seen.append((order, context))

class Shop:
    pass
"""


@pytest.fixture(autouse=True)
def _modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_for_tests.py").write_text(MODULE)
    (tmp_path / "shop_that_breaks.py").write_text("raise LookupError('canary')")
    (tmp_path / "shop_with_a_typo.py").write_text("def canary(")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_called_with_the_order_and_its_context() -> None:
    import shop_for_tests  # type: ignore[import-not-found]  # written by the fixture above

    shop_for_tests.seen.clear()
    build(["python:shop_for_tests:on_order"])["python:shop_for_tests:on_order"].deliver(ORDER, CONTEXT)

    assert shop_for_tests.seen == [(ORDER, CONTEXT)]


def test_sinks_are_in_the_order_of_the_setting_and_their_exceptions_reach_the_caller() -> None:
    names = ["python:shop_for_tests:on_order", "python:json:loads", "python:shop_for_tests:Shop"]
    sinks = build(names)

    assert list(sinks) == names
    assert build(()) == {}
    with pytest.raises(TypeError):
        sinks["python:json:loads"].deliver(ORDER, CONTEXT)


@pytest.mark.parametrize(
    ("specification", "problem"),
    [
        ("canary", "is not of the form python:package.module:function"),
        ("python", "is not of the form python:package.module:function"),
        ("python:", "is not of the form python:package.module:function"),
        ("python:json", "is not of the form python:package.module:function"),
        ("python::canary", "is not of the form python:package.module:function"),
        ("https://user:canary@example.com", "is not of the form python:package.module:function"),
        ("python:no_such_canary:f", "cannot be imported (ModuleNotFoundError)"),
        ("python:json:canary", "cannot be imported (AttributeError)"),
        ("python:.canary:f", "cannot be imported (TypeError)"),
        ("python:shop_that_breaks:f", "cannot be imported (LookupError)"),
        ("python:shop_with_a_typo:f", "cannot be imported (SyntaxError)"),
        ("python:shop_for_tests:value", "is not callable"),
    ],
)
def test_a_specification_that_cannot_be_called_is_refused(specification: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        build(["python:json:loads", specification])

    assert str(refused.value) == f"SINKS: number 2 {problem}"


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsError, match=r"^SINKS: number 1 .*\nSINKS: number 3 [^\n]*$"):
        build(["ftp:x", "python:json:loads", "python:no_such:f"])
