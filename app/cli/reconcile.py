"""The command that compares the orders here with the Channel Manager's list, or with the partner's own file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from app import bootstrap, times
from app.cli import console, context
from app.cli.console import DONE, FOUND, Stop, epilog
from app.cli.context import CommandContext, open_context, reason
from app.cli.orders import request_fetches
from app.errors import BadExpected, UpstreamError
from app.ids import OrderKey
from app.ledger.orders import LocalCopies, References
from app.reconcile.compare import Discrepancy
from app.reconcile.expected import Expected, read
from app.settings import Company

NO_LIST: Final = 5

_CHUNK: Final = 200
_CODES: Final = {
    DONE: "no differences, or all queued",
    FOUND: "differences that are not all queued",
    NO_LIST: "the Channel Manager did not return the whole list",
}

FromZero = Annotated[bool, typer.Option("--from-zero", help="The whole list, not only what changed since last time.")]
FromFile = Annotated[
    Path | None,
    typer.Option(
        "--from-file",
        metavar="CSV",
        help="Instead of the list: orders that you expect, by column orderId, reference, buyFromOrderReference or"
        " sellToOrderReference.",
    ),
]
Apply = Annotated[bool, typer.Option("--apply", help="Fetch the orders that differ, in the backfill queue.")]

_Request = Callable[[list[OrderKey], Callable[[], None]], None]

cli = console.commands()


@cli.command(epilog=epilog("ota-receiver reconcile --from-zero --apply", codes=_CODES))
def reconcile(
    company: context.CompanyOption = None,
    from_zero: FromZero = False,
    from_file: FromFile = None,
    apply: Apply = False,
    yes: context.Yes = False,
    who: context.Who = "",
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Compare the Channel Manager's list of orders with ours, and show the differences. --apply fetches these orders.

    no_event: settled, and no event arrived for it. changed: confirmed, cancelled or changed since it was fetched,
    which sends no event. stuck: not settled for more than 10 minutes. The workers do the same every RECONCILE_EVERY;
    an interrupted run loses nothing.
    """
    if from_file is not None and from_zero:
        raise Stop("--from-file reads no list: leave out --from-zero.")

    def request(orders: list[OrderKey], show: Callable[[], None]) -> None:
        # With --yes the fetches are requested first: they must be, even if the reader of the output leaves early.
        if not yes:
            show()
        console.confirm(f"Fetch {console.many(len(orders), 'order')} (one getOrder each)?", yes)
        requests = request_fetches(here, orders, queue="backfill", what="reconcile", who=who, why=why)
        if yes:
            show()
        console.result(requests.sentence(), requests, as_json)

    with open_context(company) as here:
        if from_file is not None:
            code = _compare_file(here, from_file, request if apply else None, as_json)
        else:
            code = _compare_list(here, company, from_zero, request if apply else None, as_json)
    raise typer.Exit(code)


def _compare_list(
    here: CommandContext, name: str | None, from_zero: bool, request: _Request | None, as_json: bool
) -> int:
    """Show how the list differs, and request fetches if asked to; return the exit code."""
    differences: list[Discrepancy] = []
    troubles: list[str] = []
    listed = 0
    companies = _companies(here, name)
    with console.progress("reading the list") as step:
        for company in companies:
            try:
                for rows, found in _read(here, company, from_zero):
                    listed += rows
                    differences += found
                    step(rows)
            except UpstreamError as error:
                text = f"{company.slug}: the list ended early: {reason(error)}. See: ota-receiver check"
                troubles.append(text)
    if differences and request is not None:
        request([one.key for one in differences], lambda: _show(here, differences, as_json))
    else:
        _show(here, differences, as_json)
    if not as_json:
        console.say(_summary(differences, f"{console.many(listed, 'order')} listed", request is not None))
    for trouble in troubles:
        console.remark(trouble)
    return NO_LIST if troubles else FOUND if differences and request is None else DONE


def _summary(differences: Sequence[Discrepancy], listed: str, requested: bool) -> str:
    if not differences:
        return f"No differences: {listed}."
    kinds = Counter(one.kind for one in differences)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    hint = "" if requested else " Fetch them with --apply."
    return f"{console.many(len(differences), 'difference')}: {counts}; {listed}.{hint}"


def _companies(here: CommandContext, name: str | None) -> list[Company]:
    """Return the companies whose list can be read; raises Stop if there is none."""
    chosen = [one for one in here.settings.companies if here.company_id in (None, one.np_company_id)]
    without = [one.slug for one in chosen if one.np_partner_id is None]
    if not chosen:
        raise Stop(f"Company {name!r} is not in the settings: its list cannot be read.")
    if len(without) == len(chosen):
        raise Stop(
            f"No NP_PARTNER_ID is set for {', '.join(without)}, and the list of orders cannot be read without it."
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
        for found in orders.compared(0 if from_zero else orders.checkpoint.start(here.now())):
            yield len(found.page.rows) if found.page else 0, found.discrepancies


def _show(here: CommandContext, differences: Sequence[Discrepancy], as_json: bool) -> None:
    def row(one: Discrepancy) -> tuple[object, ...]:
        order = (here.companies.slug(one.company_id), one.order_id)
        differs = (one.kind, one.status, one.stored_status, ", ".join(one.differs))
        return (*order, *differs, one.reference, times.short(one.received_at))

    console.listing(
        differences,
        as_json,
        columns=(
            *("company", "=order", "difference", "listed as", "here", "differs"),
            *("?reference", f"?received ({console.zone()})"),
        ),
        row=row,
        view=lambda one: {"company": here.companies.slug(one.company_id)} | msgspec.structs.asdict(one),
    )


def _compare_file(here: CommandContext, path: Path, request: _Request | None, as_json: bool) -> int:
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
    company_ids = here.companies.ids if here.company_id is None else (here.company_id,)
    missing = _missing(here, expected, company_ids)

    def show() -> None:
        console.listing(
            missing,
            as_json,
            columns=("#line", "order", "references"),
            row=lambda one: (one.line, one.order_id, ", ".join(one.references)),
            view=lambda one: {"kind": "missing"} | msgspec.structs.asdict(one),
        )
        if not as_json:
            of = f"{console.many(len(expected), 'order')} expected"
            console.say(f"{len(missing):,} missing of {of}." if missing else f"None is missing: {of}.")

    fetchable = [one.order_id for one in missing if one.order_id] if request else []
    if not fetchable or request is None:
        show()
        return FOUND if missing else DONE
    if len(company_ids) > 1:
        slugs = ", ".join(sorted(map(here.companies.slug, company_ids)))
        raise Stop(f"To which company do the orders belong? Give --company with --apply. There are: {slugs}.")
    request([OrderKey(company_ids[0], one) for one in dict.fromkeys(fetchable)], show)
    left = len(missing) - len(fetchable)
    if left:
        console.remark(f"{left:,} have no orderId and cannot be fetched by it: try reconcile --from-zero --apply.")
    return FOUND if left else DONE


def _missing(here: CommandContext, expected: list[Expected], company_ids: tuple[str, ...]) -> list[Expected]:
    """Return those that no company has, neither by id nor by any of their references."""
    known_ids: set[str] = set()
    copies = LocalCopies(here.redis)
    keys = [OrderKey(company_id, one.order_id) for one in expected if one.order_id for company_id in company_ids]
    with console.progress("looking for orders", len(keys)) as step:
        for at in range(0, len(keys), _CHUNK):
            chunk = keys[at : at + _CHUNK]
            known_ids |= {key.order_id for key, copy in zip(chunk, copies.read(chunk), strict=True) if copy is not None}
            step(len(chunk))
    # An orderId identifies the order; references count only without one.
    wanted = {text.casefold() for one in expected if not one.order_id for text in one.references}
    known = _known(here, wanted, company_ids)
    return [
        one
        for one in expected
        if not (one.order_id in known_ids if one.order_id else any(text.casefold() in known for text in one.references))
    ]


def _known(here: CommandContext, wanted: set[str], company_ids: tuple[str, ...]) -> set[str]:
    references = References(here.redis)
    known = references.fetched(wanted, company_ids)
    if known == wanted:
        return known
    with console.progress("searching references") as step:
        for texts in references.of_events(company_ids):
            known |= texts & wanted
            step(len(texts))
            if known == wanted:
                break
    return known
