"""The command that compares the orders here with the Channel Manager's list, or with the partner's own file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from app import bootstrap
from app.cli import console
from app.cli.command import DONE, FOUND, NO_ANSWER, Stop, command, commands, flags
from app.cli.context import CommandContext, open_context, reason
from app.cli.orders import request_fetches
from app.errors import BadExpected, UpstreamError
from app.explain.words import many
from app.ids import OrderKey
from app.ledger.orders import read_fields
from app.ledger.redis import server_time
from app.reconcile.compare import Discrepancy
from app.reconcile.expected import Expected, read
from app.settings import Company

_FROM_FILE: Final = (
    "Compare this file of orders that you expect instead. It has at least one of the columns orderId, reference,"
    " buyFromOrderReference, sellToOrderReference."
)
_STARTED_OVER: Final = (
    "{0}: the row versions of the list start lower again (a restored or copied database, or another NP_PARTNER_ID)."
    " The whole list is read."
)
_FOR_GOOD: Final = (
    "{0} for good: fetched for this row of the list already, and the list still shows something else. Ask NaviPartner,"
    " or fetch again with: ota-receiver orders refetch ORDER"
)
_CODES: Final = {
    DONE: "no differences, or all queued, or such as remain after a fetch",
    FOUND: "differences that are not all queued, such as dead letters",
    NO_ANSWER: "the Channel Manager did not return the whole list",
}

cli = commands()


@command(cli, "ota-receiver reconcile --from-zero --apply", options="company yes who why", codes=_CODES)
def reconcile(
    from_zero: Annotated[
        bool, typer.Option("--from-zero", help="Read the whole list, not only the changes since the last run.")
    ] = False,
    from_file: Annotated[Path | None, typer.Option(metavar="CSV", help=_FROM_FILE)] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Fetch the orders that differ, in the backfill queue.")
    ] = False,
) -> None:
    """Compare the Channel Manager's order list with ours, and show the differences. --apply fetches these orders.

    no_event: settled, and no event arrived for it. changed: confirmed, cancelled or changed since it was fetched,
    which sends no event. stuck: not settled for more than 10 minutes. unscheduled: its fetch or delivery is outstanding
    here, and no time is set for it. dead: settled, and its fetch is a dead letter. An order is fetched once for each
    change of its row. The workers do the same every RECONCILE_EVERY; an interrupted run loses nothing. For orders that
    are here use `orders refetch` or `events replay`, for dead letters `dead requeue`.
    """
    if from_file is not None and from_zero:
        raise Stop("--from-file reads no list: leave out --from-zero.")
    with open_context() as here:
        raise typer.Exit(_compare_file(here, from_file, apply) if from_file else _compare_list(here, from_zero, apply))


def _show_and_request(here: CommandContext, orders: Mapping[OrderKey, str], show: Callable[[], None]) -> None:
    """Show the differences; if there are `orders`, ask, and request their fetches."""
    if not orders:
        show()
        return
    # With --yes the fetches are requested first: they must be, even if the reader of the output leaves early.
    if not flags().yes:
        show()
    console.confirm(f"Fetch {many(len(orders), 'order')} (one getOrder each)?")
    requested = request_fetches(here, orders, "backfill", "reconcile")
    if flags().yes:
        show()
    console.result(*requested)


def _compare_list(here: CommandContext, from_zero: bool, apply: bool) -> int:
    """Show how the list differs, and request fetches if asked to; return the exit code."""
    differences: list[Discrepancy] = []
    troubles: list[str] = []
    listed, companies = 0, _companies(here)
    with console.progress("reading the list") as step:
        for company in companies:
            try:
                for rows, found in _read(here, company, from_zero):
                    listed += rows
                    differences += found
                    step(rows)
            except UpstreamError as error:
                troubles.append(f"{company.slug}: the list ended early: {reason(error)}. See: ota-receiver check")
    wanted = {one.key: one.row for one in differences if one.fetchable and apply}
    _show_and_request(here, wanted, partial(_show, here, differences))
    for_good = sum(one.for_good for one in differences)
    console.say(_summary(differences, f"{many(listed, 'order')} listed", apply))
    if for_good:
        differ = "order differs" if for_good == 1 else "orders differ"
        console.remark(_FOR_GOOD.format(f"{for_good:,} {differ}"))
    for trouble in troubles:
        console.remark(trouble)
    return NO_ANSWER if troubles else FOUND if len(differences) > for_good + len(wanted) else DONE


def _summary(differences: Sequence[Discrepancy], listed: str, requested: bool) -> str:
    if not differences:
        return f"No differences: {listed}."
    kinds = Counter(one.kind for one in differences)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    hint = " Fetch them with --apply." if any(one.fetchable for one in differences) and not requested else ""
    dead = sum(one.kind == "dead" and not one.fetchable for one in differences)
    if dead:
        hint += f" {many(dead, 'dead letter')} must be requeued by hand: ota-receiver dead list"
    return f"{many(len(differences), 'difference')}: {counts}; {listed}.{hint}"


def _companies(here: CommandContext) -> list[Company]:
    """Return the companies whose list can be read; raises Stop if there is none."""
    chosen = here.chosen
    without = [one.slug for one in chosen if one.np_partner_id is None]
    if not chosen:
        raise Stop(f"Company {flags().company!r} is not in the settings: its list cannot be read.")
    if len(without) == len(chosen):
        raise Stop(
            f"No NP_PARTNER_ID is set for {', '.join(without)}, and the order list cannot be read without it."
            " Set it, or give the orders that you expect: --from-file orders.csv."
        )
    for slug in without:
        console.remark(f"{slug}: left out, NP_PARTNER_ID is not set.")
    return [one for one in chosen if one.np_partner_id is not None]


def _read(here: CommandContext, company: Company, from_zero: bool) -> Iterator[tuple[int, list[Discrepancy]]]:
    """Yield the number of rows and the differences of each page, then those of orders watched since earlier runs.

    The checkpoint stays where it is: only the workers move it.
    """
    with bootstrap.http(here.settings) as http:
        orders = bootstrap.order_list(here.settings, company, here.redis, http)
        for found in orders.compared(0 if from_zero else orders.checkpoint.start(server_time(here.redis))):
            if found.starts_over:
                console.remark(_STARTED_OVER.format(company.slug))
            yield len(found.page.rows) if found.page else 0, found.discrepancies


def _show(here: CommandContext, differences: Sequence[Discrepancy]) -> None:
    columns = (
        *here.company_column(differences),
        ("=order", "order_id"),
        ("difference", lambda one: f"{one.kind} (for good)" if one.for_good else one.kind),
        "=reference",
        (">differs", "differs"),
        ("?listed as", "status"),
        ("?here", "stored_status"),
        ("?@received", "received_at"),
    )
    console.listing(differences, columns, here.view)


def _compare_file(here: CommandContext, path: Path, apply: bool) -> int:
    """Show the orders of the file that are missing here, and if asked to request fetches of those with an orderId.

    Returns the exit code; raises Stop for a file that cannot be used.
    """
    try:
        expected = read(path)
    except BadExpected as bad:
        raise Stop(str(bad)) from None
    if not expected:
        # A broken export must not look like "none is missing".
        raise Stop(f"{path} names no order.")
    company_ids = here.company_ids if here.company_id is None else (here.company_id,)
    missing = _missing(here, expected, company_ids)

    def show() -> None:
        columns = (("line", lambda one: str(one.line)), ("=order", "order_id"), "=references")
        console.listing(missing, columns, lambda one: {"kind": "missing"} | msgspec.structs.asdict(one))
        of = f"{many(len(expected), 'order')} expected"
        console.say(f"{len(missing):,} missing of {of}." if missing else f"None is missing: {of}.")

    fetchable = [one.order_id for one in missing if one.order_id] if apply else []
    if fetchable and len(company_ids) > 1:
        slugs = ", ".join(sorted(map(here.slug, company_ids)))
        raise Stop(f"To which company do the orders belong? Give --company with --apply. There are: {slugs}.")
    _show_and_request(here, {OrderKey(company_ids[0], one): "" for one in fetchable}, show)
    left = len(missing) - len(fetchable)
    if fetchable and left:
        console.remark(f"{left:,} have no orderId and cannot be fetched by it: try reconcile --from-zero --apply.")
    return FOUND if left else DONE


def _missing(here: CommandContext, expected: list[Expected], company_ids: tuple[str, ...]) -> list[Expected]:
    """Return those that no company has, neither by id nor by any of their references."""
    known_ids: set[str] = set()
    keys = [OrderKey(company_id, one.order_id) for one in expected if one.order_id for company_id in company_ids]
    with console.progress("looking for orders", len(keys)) as step:
        for key, (generation,) in zip(keys, read_fields(here.redis, keys, "generation"), strict=True):
            if generation:
                known_ids.add(key.order_id)
            step(1)
    # An orderId identifies the order; references count only without one.
    wanted = {text.casefold() for one in expected if not one.order_id for text in one.references}
    known = here.references.fetched(wanted, company_ids)
    with console.progress("searching references") as step:
        pages = here.references.of_events(company_ids)
        while known != wanted and (texts := next(pages, None)) is not None:
            known |= texts & wanted
            step(len(texts))
    return [
        one
        for one in expected
        if not (one.order_id in known_ids if one.order_id else any(text.casefold() in known for text in one.references))
    ]
