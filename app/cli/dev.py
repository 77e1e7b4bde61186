"""The commands for a laptop: `demo`, `dev` and `simulate`. The image has no `app.dev`, so they do not run there."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit

import typer

from app.cli import console
from app.cli.command import (
    AWAY,
    DONE,
    FOUND,
    LOOPBACK,
    NO_REDIS,
    OTHER_SCHEMA,
    USAGE,
    Stop,
    command,
    commands,
    epilog,
    flags,
)
from app.errors import ReceiverError
from app.explain.words import many

if TYPE_CHECKING:  # in the image there is no such module
    from app.dev.simulator.run import Report

_DEMO_CODES: Final = NO_REDIS | {DONE: "every order is complete", FOUND: "an order is incomplete, or it could not run"}
_DEV_CODES: Final = NO_REDIS | {DONE: "stopped on request", FOUND: "it could not run"}
_CODES: Final = {
    DONE: "every order is right",
    FOUND: "some orders are wrong, or it could not run",
    AWAY: "",
    OTHER_SCHEMA: "",
}

_MOST_SHOWN: Final = 20
_RATE: Final = 50.0
_EXAMPLE: Final = "ota-receiver simulate --orders 500 --duplicates 10% --late 5% --burst --bad-secret 1% --batch 20"

cli = commands()


@cli.command(epilog=epilog("ota-receiver demo", codes=_DEMO_CODES | {USAGE: ""}))
def demo() -> None:
    """Send sample orders through real processes and show what arrived. Exits 0 only if all is complete.

    Needs no Redis and no account: an embedded Valkey and a simulated Channel Manager are started and stopped. At a
    terminal the ops page shows the orders in a browser until Enter.
    """
    from rich.console import Console

    from app.dev.demo import run  # here: the image has no app.dev

    _handle_signals()
    raise typer.Exit(0 if run(Console()) else 1)


@cli.command(epilog=epilog("ota-receiver dev --port 8090 --sinks-file sinks.toml", codes=_DEV_CODES))
def dev(
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the webhook on 127.0.0.1.", show_default="that of the last start, or 8080"
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where data and logs are kept.")] = Path(".ota-receiver"),
    sinks: Annotated[
        str, typer.Option(help="SINKS of the workers: python:package.module:function, or entry:NAME.")
    ] = "",
    sinks_file: Annotated[
        Path | None, typer.Option(help="SINKS_FILE of the workers: a TOML file of sinks. Paths in it are absolute.")
    ] = None,
) -> None:
    """Run everything on a laptop until Ctrl-C, with an embedded Valkey and a simulated Channel Manager.

    An order created at the simulated Channel Manager (the sandbox) arrives as in production; the ops page shows it in a
    browser. Data and ports stay in --folder for the next start. What a sink raises is shown with its whole traceback.
    """
    from rich.console import Console

    from app.dev.demo import keep_running  # here: the image has no app.dev

    _handle_signals()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(folder, 0o700)
    sys.path.insert(0, os.getcwd())
    try:
        given = {"SINKS": sinks, "SINKS_FILE": str(sinks_file.resolve()) if sinks_file else ""}
        keep_running(Console(), folder.resolve(), port, {name: value for name, value in given.items() if value})
    except KeyboardInterrupt:
        return
    except ReceiverError as error:
        raise Stop(str(error), FOUND) from None


def _interrupt(*_: object) -> None:
    """End every `with` block by KeyboardInterrupt; further signals are ignored meanwhile."""
    _handle_signals(signal.SIG_IGN)
    raise KeyboardInterrupt


def _handle_signals(handler: Any = _interrupt) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


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


def _share_option(default: str, text: str) -> Any:
    return typer.Option(parser=_share, metavar="SHARE", show_default=default, help=text)


def _per_second(text: str) -> float:
    try:
        rate = float(text.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise typer.BadParameter("is not a rate such as 50/s")
    return rate


@command(cli, _EXAMPLE, codes=_CODES)
def simulate(
    orders: Annotated[
        int, typer.Option(min=1, max=5000, help="Orders that settle. The API key allows 6,000 calls in 5 min.")
    ] = 100,
    duplicates: Annotated[float, _share_option("10%", "Share of events that are sent twice.")] = 0.1,
    late: Annotated[float, _share_option("5%", "Share of events that are sent last.")] = 0.05,
    bad_secret: Annotated[float, _share_option("1%", "Share of forged events, added to the genuine ones.")] = 0.01,
    batch: Annotated[int, typer.Option(min=1, max=1000, help="Largest number of events in one POST.")] = 20,
    rate: Annotated[
        float | None, typer.Option(parser=_per_second, metavar="N/s", show_default="50/s", help="Events a second.")
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="Send all at once, over 32 connections.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=10**9, help="Seed that repeats a run; without it a new one is used and shown."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Webhook of a running receiver with the settings that --settings prints.")
    ] = None,
    sandbox_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the simulated Channel Manager.")] = 8089,
    show_settings: Annotated[
        bool, typer.Option("--settings", help="Print the settings for the receiver at --url, and exit.")
    ] = False,
    beyond_loopback: Annotated[
        bool, typer.Option("--beyond-loopback", help="Allow --url on another machine. Never use production.")
    ] = False,
    patience: Annotated[
        int, typer.Option(min=1, max=3600, help="Stop waiting after this many seconds without a getOrder.")
    ] = 15,
) -> None:
    """Send late, duplicate, batched and forged events, and check the outcome of every order.

    Without --url it starts and stops everything as `demo` does, and also checks what the receiver stored. With --url it
    starts only a simulated Channel Manager, and checks the number of getOrder calls.
    """
    if find_spec("app.dev") is None:
        raise Stop("simulate needs a development install: in a checkout of the source, uv run ota-receiver simulate.")
    from app.dev.simulator.run import Options, against, on_laptop
    from app.dev.stack import env_line, receiver_settings

    if show_settings:
        needed = receiver_settings(f"http://127.0.0.1:{sandbox_port}")
        console.result((env_line(name, value) for name, value in needed.items()), needed)
        return
    if burst and rate is not None:
        raise Stop("--burst sends all at once: leave out --rate.")
    if url is not None:
        _check_address(url, beyond_loopback)
    options = Options(
        orders=orders,
        duplicates=duplicates,
        late=late,
        bad_secret=bad_secret,
        batch=batch,
        rate=None if burst else rate or _RATE,
        seed=secrets.randbelow(1_000_000) if seed is None else seed,
    )
    _handle_signals()
    try:
        if url is None:
            report = on_laptop(options, patience, console.progress)
        else:
            report = against(url, sandbox_port, options, patience, console.progress)
    except (ReceiverError, TimeoutError) as error:
        raise Stop(str(error), FOUND) from None
    console.facts("", _facts(report), report)
    if not report.wrong:
        console.say("All orders are right.")
        return
    shown = [(one.order_id, "; ".join(one.problems)) for one in report.wrong[:_MOST_SHOWN]]
    console.table(f"{many(len(report.wrong), 'id')} wrong", ("=order", ">what"), shown)
    if len(report.wrong) > _MOST_SHOWN and not flags().as_json:
        console.remark(f"{len(report.wrong) - _MOST_SHOWN:,} more: --json names all.")
    raise typer.Exit(FOUND)


def _check_address(url: str, beyond_loopback: bool) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"http", "https"}:
        raise Stop("--url must start with http:// or https://.")
    if host not in LOOPBACK and not beyond_loopback:
        raise Stop("--url is on another machine: forged events go there only with --beyond-loopback.")


def _facts(report: Report) -> dict[str, object]:
    recognised, complete = report.duplicates_recognised, report.orders_complete
    right = "" if complete is None else f", {complete:,} complete and right"
    refused = f"{many(report.forged_posts_refused, 'POST')} of only these answered 401"
    forged = f"{report.forged_sent:,}, {report.forged_orders_fetched:,} fetched, {refused}"
    known = "" if recognised is None else f", {recognised:,} recognised"
    return {
        "seed": report.seed,
        "orders": f"{report.orders:,}, {report.orders_fetched:,} fetched{right}",
        "events": f"{report.sent:,} in {report.posts:,} POSTs, {report.acknowledged:,} genuine ones acknowledged",
        "answers": tuple(f"{result}: {count:,}" for result, count in sorted(report.answers.items())),
        "duplicates": f"{report.duplicates_sent:,}{known}",
        "forged": forged if report.forged_sent else "",
        "getOrders": f"{report.get_orders:,}, {report.get_orders_per_settlement:g} per settlement",
        "answer time": f"p50 {report.p50_ms:g} ms, p99 {report.p99_ms:g} ms",
        "took": f"{report.seconds:g} s",
    }
