"""The command `simulate`: load and misbehaviour on purpose. The image has no `app.dev`, and there it says so."""

from __future__ import annotations

import secrets
import signal
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

import typer

from app.cli import options, output
from app.cli.exits import FOUND, Stop, epilog
from app.cli.laptop import interrupt
from app.errors import ReceiverError

if TYPE_CHECKING:  # in the image there is no such module
    from app.dev.simulator.audit import Report

_LOOPBACK: Final = {"127.0.0.1", "localhost", "::1"}
_MOST_SHOWN: Final = 20
_RATE: Final = 50.0
_EXAMPLE: Final = "ota-receiver simulate --orders 500 --duplicates 10% --late 5% --burst --bad-secret 1% --batch 20"
_CODES: Final = (
    "Exit codes: 0 every id is right · 1 the ids shown are not, or it could not be run · 2 usage · 130 interrupted"
)


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog(_EXAMPLE, codes=_CODES))(simulate)


def _share(text: str | float) -> float:
    if isinstance(text, float):  # the default comes this way too
        return text
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter("is not a share such as 10%")
    return share


def _per_second(text: str) -> float:
    try:
        rate = float(text.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise typer.BadParameter("is not a rate such as 50/s")
    return rate


def simulate(
    orders: Annotated[
        int, typer.Option(min=1, max=5000, help="Orders that settle; a key has 6,000 calls in 5 min.")
    ] = 100,
    duplicates: Annotated[
        float, typer.Option(parser=_share, metavar="SHARE", show_default="10%", help="Events sent twice.")
    ] = 0.1,
    late: Annotated[
        float, typer.Option(parser=_share, metavar="SHARE", show_default="5%", help="Events that come last of all.")
    ] = 0.05,
    bad_secret: Annotated[
        float,
        typer.Option(parser=_share, metavar="SHARE", show_default="1%", help="Forged events, beside the true ones."),
    ] = 0.01,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Most events in one POST.")] = 20,
    rate: Annotated[
        float | None, typer.Option(parser=_per_second, metavar="N/s", show_default="50/s", help="Events a second.")
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="All at once, over 32 connections.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Repeats a plan; else one is drawn, and shown.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Webhook of a receiver that runs already and was given --settings.")
    ] = None,
    sandbox_port: Annotated[int, typer.Option(min=1, max=65535, help="Where it finds the Channel Manager.")] = 8089,
    show_settings: Annotated[bool, typer.Option("--settings", help="Print what it must be given, and end.")] = False,
    beyond_loopback: Annotated[
        bool, typer.Option("--beyond-loopback", help="Allow --url on another machine: it is yours, and no production.")
    ] = False,
    patience: Annotated[int, typer.Option(min=1, help="Seconds without any getOrder after which it gives up.")] = 15,
    as_json: options.Json = False,
) -> None:
    """Send events as badly as they may come, and check what became of every order.

    Without --url everything is started and stopped as by `demo`, and the receiver's books are checked too. With it
    a simulated Channel Manager runs here, and its count of getOrder calls is checked.
    """
    if find_spec("app.dev") is None:
        raise Stop("simulate needs a development install: in a checkout of the source, uv run ota-receiver simulate.")
    from app.dev.simulator import run  # the arrow points down
    from app.dev.simulator.plan import Wish

    if show_settings:
        for name, value in run.receiver_settings(sandbox_port).items():
            output.say(f"{name}='{value}'")
        return
    if burst and rate is not None:
        raise Stop("--burst is all at once: it has no --rate.")
    if url is not None:
        _check_address(url, beyond_loopback)
    wish = Wish(
        orders=orders,
        duplicates=duplicates,
        late=late,
        bad_secret=bad_secret,
        batch=batch,
        rate=None if burst else rate or _RATE,
        seed=secrets.randbelow(1_000_000) if seed is None else seed,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if url is None:
            report = run.on_laptop(wish, patience, output.progress)
        else:
            report = run.against(url, sandbox_port, wish, patience, output.progress)
    except (ReceiverError, TimeoutError) as error:
        raise Stop(str(error), FOUND) from None
    if as_json:
        output.json_line(report)
    else:
        _print(report)
    if report.wrong:
        raise typer.Exit(FOUND)


def _check_address(url: str, beyond_loopback: bool) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise Stop("--url is no http(s) address.")
    if host not in _LOOPBACK and not beyond_loopback:
        raise Stop("--url is not on this machine: made-up and forged events go there only with --beyond-loopback.")


def _print(report: Report) -> None:
    told = report.duplicates_recognised
    whole = report.orders_complete
    output.facts(
        "",
        [
            ("seed", report.seed),
            ("orders", f"{report.orders:,}, {report.orders_fetched:,} fetched")
            if whole is None
            else ("orders", f"{report.orders:,}, {report.orders_fetched:,} fetched, {whole:,} complete and right"),
            ("events", f"{report.sent:,} in {report.posts:,} POSTs, {report.acknowledged:,} true ones acknowledged"),
            ("answers", ", ".join(f"{said}: {count:,}" for said, count in sorted(report.answers.items()))),
            ("duplicates", f"{report.duplicates_sent:,}" + ("" if told is None else f", {told:,} recognised")),
            ("forged", _forged(report)),
            ("getOrders", f"{report.get_orders:,}, {report.get_orders_per_settlement:g} a settlement"),
            ("answer time", f"p50 {report.p50_ms:g} ms, p99 {report.p99_ms:g} ms"),
            ("took", f"{report.seconds:g} s"),
        ],
    )
    if not report.wrong:
        output.say("Every id is right.")
        return
    output.table(
        f"{output.many(len(report.wrong), 'id')} wrong",
        ("order", "what"),
        ((one.order_id, "; ".join(one.problems)) for one in report.wrong[:_MOST_SHOWN]),
    )
    if len(report.wrong) > _MOST_SHOWN:
        output.remark(f"{len(report.wrong) - _MOST_SHOWN:,} more: --json names all.")


def _forged(report: Report) -> str:
    if not report.forged_sent:
        return ""
    refused = output.many(report.forged_posts_refused, "POST")
    return f"{report.forged_sent:,}, {report.forged_orders_fetched:,} fetched, {refused} of only these answered 401"
