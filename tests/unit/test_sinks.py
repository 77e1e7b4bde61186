"""SINKS names functions of the user; a worker refuses settings whose function cannot be called."""

from __future__ import annotations

import json
import signal
import tomllib
from base64 import b64encode
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.contextvars import bound_contextvars

from app import settings
from app.errors import SettingsError
from app.settings import Settings
from app.sink_settings import KINDS, HttpsSink, SqlSink, of_file, of_specification
from tests.samples import document
from tests.unit.test_settings import GOOD
from workers.sinks.build import build as build_declared
from workers.sinks.contract import Context, Retry, Sink
from workers.sinks.output import TRACEBACKS, failure_of, show_traceback
from workers.sinks.python import FORMS

DOCUMENT = document("order-issued")
ORDER = DOCUMENT.order
CONTEXT = Context(
    idempotency_key="company/order/3",
    company_id="company",
    order_id="order",
    revision=3,
    attempt=2,
    request_id="request",
    fetched_at=5,
)
MODULE = """
import asyncio
import json
from rq.timeouts import JobTimeoutException
from structlog.contextvars import get_contextvars

seen = []
value = 5

def on_order(order, context):
    seen.append((order, context))

class Shop:
    pass

class AsyncShop:
    async def __call__(self, order, context):
        await on_order_async(order, context)

bound, loops, open_tasks = [], [], []

async def on_order_async(order, context):
    bound.append(get_contextvars())
    loops.append(asyncio.get_running_loop())
    if context.attempt == 1:
        raise LookupError("canary")
    if context.attempt == 3:
        open_tasks.append(asyncio.current_task())
        await asyncio.sleep(60)
    await asyncio.sleep(0)
    seen.append((order, context))

async_shop = AsyncShop()

def raises(order, context):
    _raises(context)

def _raises(context):
    if context.attempt == 1:
        raise ValueError("canary")
    if context.attempt == 2:
        json.loads("canary")
    if context.attempt == 3:
        open("/canary/file")
    if context.attempt == 4:
        raise JobTimeoutException("canary")

async def raises_async(order, context):
    await asyncio.sleep(0)
    raise KeyError("canary")

def yields(order, context):
    yield order

async def yields_async(order, context):
    yield order

def one(order):
    pass

def three(order, context, more):
    pass

def named(*, order, context):
    pass
"""


def build(specifications: Iterable[str]) -> dict[str, Sink]:
    return build_declared(map(of_specification, specifications))


@pytest.fixture(autouse=True)
def _modules_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_for_tests.py").write_text(MODULE)
    (tmp_path / "shop_that_breaks.py").write_text("raise LookupError('canary')")
    (tmp_path / "shop_with_a_typo.py").write_text("def canary(")
    (tmp_path / "shop_that_exits.py").write_text("import sys\nsys.exit('canary')")
    (tmp_path / "shop_that_needs.py").write_text("import no_such_library.part")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_function_is_called_with_the_order_and_its_context() -> None:
    import shop_for_tests  # type: ignore[import-not-found]  # written by the fixture above

    shop_for_tests.seen.clear()
    build(["python:shop_for_tests:on_order"])["python:shop_for_tests:on_order"].deliver(DOCUMENT, CONTEXT)

    assert shop_for_tests.seen == [(ORDER, CONTEXT)]


def test_sinks_are_in_the_order_of_the_setting_and_their_exceptions_reach_the_caller() -> None:
    names = ["python:shop_for_tests:on_order", "python:operator:is_", "python:operator:lt"]
    sinks = build(names)

    assert list(sinks) == names
    assert build(()) == {}
    with pytest.raises(TypeError):
        sinks["python:operator:lt"].deliver(DOCUMENT, CONTEXT)


@pytest.mark.parametrize("name", ["on_order_async", "async_shop"])
def test_an_async_function_is_awaited_on_one_loop_that_an_error_closes(name: str) -> None:
    import shop_for_tests as shop

    def on_alarm(*_: object) -> None:
        raise TimeoutError

    shop.seen.clear()
    shop.loops.clear()
    shop.open_tasks.clear()
    (sink,) = build([f"python:shop_for_tests:{name}"]).values()
    for _ in range(2):
        sink.deliver(DOCUMENT, CONTEXT)
    with pytest.raises(LookupError):
        sink.deliver(DOCUMENT, replace(CONTEXT, attempt=1))
    sink.deliver(DOCUMENT, CONTEXT)
    # RQ's time limit is such a signal.
    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(TimeoutError):
            sink.deliver(DOCUMENT, replace(CONTEXT, attempt=3))
    finally:
        signal.signal(signal.SIGALRM, before)
    sink.deliver(DOCUMENT, CONTEXT)

    assert shop.seen == [(ORDER, CONTEXT)] * 4
    assert shop.open_tasks[0].cancelled()
    with pytest.raises(LookupError):
        sink.deliver(DOCUMENT, replace(CONTEXT, attempt=1))
    assert [shop.loops.index(loop) for loop in shop.loops] == [0, 0, 0, 3, 3, 5, 5]


def test_an_async_function_logs_with_the_order_of_its_delivery() -> None:
    """Not with that of the first one, whose context made the loop."""
    import shop_for_tests as shop

    shop.bound.clear()
    (sink,) = build(["python:shop_for_tests:on_order_async"]).values()
    for order_id in ("1", "2"):
        with bound_contextvars(order_id=order_id):
            sink.deliver(DOCUMENT, CONTEXT)

    assert [one["order_id"] for one in shop.bound] == ["1", "2"]
    with pytest.raises(LookupError):  # which closes the event loop
        sink.deliver(DOCUMENT, replace(CONTEXT, attempt=1))


@pytest.mark.parametrize(
    ("specification", "problem"),
    [
        ("canary", FORMS),
        ("python", FORMS),
        ("python:", FORMS),
        ("python:json", FORMS),
        ("python::canary", FORMS),
        ("https://user:canary@example.com", FORMS),
        ("python:.canary:f", FORMS),
        ("python:json:canary", f"cannot be imported: {json.__file__} has no canary"),
        ("python:json:dumps(1)", FORMS),
        ("python:shop_that_breaks:f", "cannot be imported: LookupError at shop_that_breaks.py:1"),
        ("python:shop_with_a_typo:f", "cannot be imported: SyntaxError at shop_with_a_typo.py:1"),
        ("python:shop_that_exits:f", "cannot be imported: SystemExit at shop_that_exits.py:2"),
        ("python:shop_for_tests:value", "is not callable"),
        ("python:shop_for_tests:one", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:three", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:named", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:Shop", "does not take two arguments, an order and its context"),
        ("python:shop_for_tests:yields", "is a generator: calling it would run nothing of it"),
        ("python:shop_for_tests:yields_async", "is a generator: calling it would run nothing of it"),
    ],
)
def test_a_specification_that_cannot_be_called_is_refused(specification: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        build(["python:operator:is_", specification])

    assert str(refused.value) == f"SINKS: number 2 {problem}"


@pytest.mark.parametrize(
    ("specification", "missing"), [("no_such.shop:f", "no_such"), ("shop_that_needs:f", "no_such_library")]
)
def test_what_is_missing_is_named_with_the_folders_that_were_searched(
    tmp_path: Path, specification: str, missing: str
) -> None:
    with pytest.raises(SettingsError, match=f"cannot be imported: no module {missing} in {tmp_path}, "):
        build([f"python:{specification}"])


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsError, match=r"^SINKS: number 1 .*\nSINKS: number 3 [^\n]*$"):
        build(["ftp:x", "python:operator:is_", "python:no_such:f"])


@pytest.mark.parametrize(
    ("name", "attempt", "failure"),
    [
        ("python:shop_for_tests:raises", 1, "ValueError at shop_for_tests.py:40"),
        ("python:shop_for_tests:raises", 2, "JSONDecodeError at shop_for_tests.py:42"),
        ("python:shop_for_tests:raises", 3, "FileNotFoundError at shop_for_tests.py:44 (No such file or directory)"),
        ("python:shop_for_tests:raises", 4, "JobTimeoutException at shop_for_tests.py:46 (longer than 120 s)"),
        ("python:shop_for_tests:raises_async", 1, "KeyError at shop_for_tests.py:50"),
        ("python:operator:lt", 1, "TypeError"),
    ],
)
def test_a_failure_is_told_by_its_type_and_its_place_in_the_sink(name: str, attempt: int, failure: str) -> None:
    """Its text may quote people's data; the system's own text of an error number cannot."""
    (sink,) = build([name]).values()

    with pytest.raises(BaseException) as raised:  # noqa: PT011  # each case raises another
        sink.deliver(DOCUMENT, replace(CONTEXT, attempt=attempt))

    error = raised.value
    assert failure_of(sink.package, error.with_traceback(raised.tb.tb_next)) == failure


@pytest.mark.parametrize("after", [-1, float("nan"), timedelta(seconds=-5)])
def test_a_retry_after_no_time_is_refused_where_it_is_raised(after: float | timedelta) -> None:
    with pytest.raises(ValueError, match="after is negative, or no number"):
        Retry(after=after)


def install(folder: Path, package: str, *points: str) -> None:
    """Let a package be installed that offers these sinks (`name = module:function`)."""
    about = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("\n".join(("[ota_receiver.sinks]", *points)))


def test_a_sink_of_an_installed_package_is_found_by_its_name(tmp_path: Path) -> None:
    install(tmp_path, "shop-package", "shop = shop_for_tests:raises", "shop.2 = shop_for_tests:on_order")

    sinks = build(["entry:shop", "entry:shop.2"])

    assert list(sinks) == ["entry:shop", "entry:shop.2"]
    with pytest.raises(ValueError, match="canary") as raised:
        sinks["entry:shop"].deliver(DOCUMENT, replace(CONTEXT, attempt=1))
    assert failure_of(sinks["entry:shop"].package, raised.value) == "ValueError at shop_for_tests.py:40"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent", "is no sink of an installed package; these have: broken, exits, method, module, twice"),
        ("twice", "is a sink of several installed packages, one-shop and two-shop: keep one of them"),
        ("broken", "cannot be imported: LookupError at shop_that_breaks.py:1"),
        ("exits", "cannot be imported: SystemExit at shop_that_exits.py:2"),
        ("module", FORMS),
        ("method", FORMS),
        ("", FORMS),
        ("a b", FORMS),
        ("a:b", FORMS),
    ],
)
def test_a_sink_of_a_package_that_cannot_be_used_is_refused(tmp_path: Path, name: str, problem: str) -> None:
    install(tmp_path, "two-shop", "twice = shop_for_tests:on_order", "exits = shop_that_exits:f")
    install(tmp_path, "one-shop", "twice = shop_for_tests:on_order", "broken = shop_that_breaks:f")
    install(tmp_path, "bad-shop", "module = shop_for_tests", "method = shop_for_tests:Shop.take")

    with pytest.raises(SettingsError) as refused:
        build([f"entry:{name}"])

    assert str(refused.value) == f"SINKS: number 1 {problem}"


def test_without_any_package_none_is_named() -> None:
    with pytest.raises(SettingsError, match=r"number 1 is no sink of an installed package; these have: none$"):
        build(["entry:shop"])


def test_whole_tracebacks_go_to_the_file_of_dev_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable alone makes no file, and in the image, which has no app.dev, it does nothing."""
    file = tmp_path / "tracebacks.log"
    show_traceback("shop", ValueError("canary"))
    monkeypatch.setenv(TRACEBACKS, str(file))
    show_traceback("shop", ValueError("canary"))
    assert not file.exists()

    file.touch()
    show_traceback("shop", ValueError("canary"))
    assert file.read_text() == "\nshop\nValueError: canary\n"

    monkeypatch.setattr("workers.sinks.output.find_spec", lambda name: None)
    show_traceback("shop", ValueError("canary"))
    assert file.read_text() == "\nshop\nValueError: canary\n"


def declare(folder: Path, table: str) -> Settings:
    (folder / "sinks.toml").write_text(table)
    return settings.parse({**GOOD, "SINKS": "python:operator:is_", "SINKS_FILE": str(folder / "sinks.toml")})


SECRET = f"whsec_{b64encode(24 * b'x').decode()}"
NO_SECRET = (
    "must be whsec_ and the base64 of 24 to 64 bytes, for example the output of echo whsec_$(openssl rand -base64 32)"
)
NO_URL = (
    "is not an http(s) address (percent-encode other characters), for example https://shop.example.com/hooks/orders"
)
NO_USER = "must hold no user and password: send them as Authorization, a line of headers_file, for example https"


def https(**values: object) -> str:
    """Return a table of an https sink with these values; url is in its third line, secret in the next."""
    given = {"url": "https://shop.example.com/", "secret": SECRET} | values
    return "\n".join(["[sinks.a]", 'kind = "https"', *(f"{name} = {json.dumps(one)}" for name, one in given.items())])


FILES = '[sinks.a]\nkind = "files"\nfolder = "/x"\n'
ALL_KINDS = "'https', 'sql', 'redis-stream', 'files', 'object' or 'python'"
TWICE = "given twice, also as URL_FILE (SINKS_FILE [sinks.a] line 4): remove one of them"
NAMES = "the table's name must be of lower-case letters, digits, - and _, at most 31, for example shop"

ALL = "the table's name must not be all, which means every sink, for example shop"


class TestSinksFile:
    def test_its_sinks_stand_beside_those_of_the_short_form(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("postgresql://canary\n")
        found = declare(
            tmp_path,
            f"""
            [sinks.own]
            kind = "python"
            function = "operator:lt"
            companies = ["default"]
            statuses = ["Issued"]
            workers = 4

            [sinks.database]
            kind = "sql"
            url_file = "{tmp_path / "secret"}"
            """,
        ).declared_sinks
        short, own, database = found

        assert [one.name for one in found] == ["python:operator:is_", "own", "database"]
        assert (short.unwanted("zoo", "Draft"), own.workers, database.workers) == ("", 4, 2)
        assert own.unwanted("default", "Issued") == ""
        assert own.unwanted("default", "Draft") == "status Draft"
        assert own.unwanted("zoo", "Issued") == "company zoo"
        assert isinstance(database, SqlSink)
        assert database.url.get_secret_value() == "postgresql://canary"
        assert "canary" not in repr(found)
        assert list(build_declared([short, own])) == ["python:operator:is_", "own"]

    @pytest.mark.parametrize("function", ["operator:lt", "python:operator:lt"])
    def test_a_function_may_be_written_as_in_the_short_form(self, function: str, tmp_path: Path) -> None:
        """The message about a wrong one asks for it."""
        *_, found = declare(tmp_path, f'[sinks.own]\nkind = "python"\nfunction = "{function}"\n').declared_sinks

        assert list(build_declared([found])) == ["own"]

    @pytest.mark.parametrize(
        ("url", "more"),
        [
            ("https://shop.example.com/hooks/?code=a%20b", {}),
            ("http://shop:8080/hooks/", {"allow_private": True}),
        ],
    )
    def test_the_address_of_an_endpoint_stays_as_it_is_written(
        self, url: str, more: dict[str, object], tmp_path: Path
    ) -> None:
        *_, found = declare(
            tmp_path, https(url=url, secret=f"whsec_{b64encode(64 * b'x').decode()}", **more)
        ).declared_sinks

        assert isinstance(found, HttpsSink)
        assert found.url.get_secret_value() == url
        assert url not in repr(found)

    @pytest.mark.parametrize(
        ("table", "name", "line", "problem"),
        [
            ("[sinks.a]\n", "KIND", "", "missing, for example https"),
            ('[sinks.a]\nkind = "kafka"', "KIND", " line 2", f"must be {ALL_KINDS}, for example https"),
            ('[sinks.a]\nkind = "sql"\nurl = "canary"\nurl_file = "/y"', "URL", " line 3", TWICE),
            (f'{FILES}work_ers = "canary"', "work_ers", " line 4", "unknown name, perhaps workers"),
            (f'{FILES}companies = ["zoo"]', "COMPANIES", "", "no company zoo; there are: default"),
            (f"{FILES}workers = 0", "WORKERS", " line 4", "must be at least 1, for example 2"),
            *(
                (https(url=url), "URL", " line 3", NO_URL)
                for url in (
                    "canary",
                    "ftp://canary/",
                    "https:///canary",
                    "https://canary/#x",
                    "https://canary:x/",
                    "https://[canary",
                )
            ),
            (https(url="https://canary.example.com/a b"), "URL", " line 3", NO_URL),
            (
                https(url="https://c:anary@shop.example.com/"),
                "URL",
                " line 3",
                f"{NO_USER}://shop.example.com/hooks/orders",
            ),
            *(
                (
                    https(url=url, allow_private=False),
                    "URL",
                    " line 3",
                    "must be https, unless allow_private is true, for example https://shop.example.com/hooks/orders",
                )
                for url in ("http://canary/", "HTTP://127.0.0.1/")
            ),
            *(
                (https(secret=secret), "SECRET", " line 4", NO_SECRET)
                for secret in (
                    "canary",
                    SECRET.removeprefix("whsec_"),
                    "whsec_canary!" + 28 * "x",
                    f"whsec_{b64encode(23 * b'x').decode()}",
                    f"whsec_{b64encode(65 * b'x').decode()}",
                )
            ),
            (
                https(secret_previous="whsec_"),
                "SECRET_PREVIOUS",
                " line 5",
                NO_SECRET.partition(", for")[0] + ", for example the secret until now",
            ),
            (https(format="xml"), "FORMAT", " line 5", "must be 'standard' or 'cloudevents', for example standard"),
            (f"{FILES}statuses = 5", "STATUSES", " line 4", "must be a list of texts, for example Issued"),
        ],
    )
    def test_a_mistake_is_one_plain_sentence(
        self, table: str, name: str, line: str, problem: str, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError) as refused:
            declare(tmp_path, table)

        assert str(refused.value).splitlines() == [f"{name} (SINKS_FILE [sinks.a]{line}): {problem}"]

    @pytest.mark.parametrize(
        ("table", "problem"),
        [
            ("", "SINKS_FILE: has no table [sinks.NAME], for example [sinks.museum]"),
            ("[sinks.a]\nkind = nothing", 'SINKS_FILE line 2: is not TOML, for example kind = "https"'),
            (FILES.replace("a]", "A]"), f"NAME (SINKS_FILE [sinks.A] line 1): {NAMES}"),
            (FILES.replace("a]", "all]"), f"NAME (SINKS_FILE [sinks.all] line 1): {ALL}"),
        ],
    )
    def test_a_file_without_a_usable_table_is_refused(self, table: str, problem: str, tmp_path: Path) -> None:
        with pytest.raises(SettingsError) as refused:
            declare(tmp_path, table)

        assert str(refused.value).splitlines() == [problem]

    def test_the_example_is_complete(self) -> None:
        text = (Path(__file__).parents[2] / "sinks.example.toml").read_text()
        problems: list[str] = []
        path = Path(__file__).parents[2] / "sinks.example.toml"

        found = [one.kind for one, _ in of_file(path, problems)]

        assert set(tomllib.loads(text)["sinks"]) == {
            "shop",
            "tickets",
            "warehouse",
            "stream",
            "archive",
            "bucket",
            "own",
        }
        assert all("/run/secrets/" in line or "_FILE" in line for line in problems)
        assert set(found) | {"https", "sql"} == set(KINDS)
