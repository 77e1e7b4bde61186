"""The command that looks for orders of which no event told, or none of their last change.

What `reconcile --from-file` does: which of the orders that the partner expects does the ledger not know?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from app import bootstrap, times
from app.cli import console, context
from app.cli.console import DONE, FOUND, Stop, epilog
from app.cli.context import CommandContext, open_context
from app.cli.orders import ask_for
from app.errors import BadExpected, UpstreamError
from app.ids import OrderKey
from app.ledger.orders import LocalCopies, References
from app.reconcile.compare import Comparison, Discrepancy
from app.reconcile.expected import Expected, read
from app.reconcile.state import Checkpoint
from app.settings import Company

_CHUNK = 200


cli = console.commands()


def compare(
    here: CommandContext,
    path: Path,
    company: str | None,
    *,
    apply: bool,
    yes: bool,
    who: str | None,
    why: str,
    as_json: bool,
) -> int:
    """Show the orders of the file that are missing, and with `apply` fetch those that have an orderId.

    Returns how many are missing and were not queued. Raises Stop for a file that cannot be used.
    """
    company_id = here.companies.id_of(company)
    try:
        expected = read(path)
    except BadExpected as bad:
        raise Stop(str(bad)) from None
    if not expected:
        # A broken export must not pass for "none is missing".
        raise Stop(f"{path} names no order.")
    company_ids = here.companies.ids if company_id is None else (company_id,)
    missing = _missing(here, expected, company_ids)
    fetchable = [one for one in missing if one.order_id] if apply else []
    if fetchable and len(company_ids) > 1:
        raise Stop(f"Whose orders are they? Give --company with --apply; there is: {_slugs(here, company_ids)}.")
    if not fetchable:
        _tell(missing, expected, as_json)
        return len(missing)
    orders = list(dict.fromkeys(OrderKey(company_ids[0], one.order_id) for one in fetchable))
    if not yes:
        _tell(missing, expected, as_json)
    console.confirm(f"Fetch {console.many(len(orders), 'order')} (one getOrder each)?", yes)
    asked = ask_for(here, orders, queue="backfill", what="reconcile", who=who, why=why)
    # Shown after it is done where nobody is asked: a reader that leaves early must not keep it from being done.
    if yes:
        _tell(missing, expected, as_json)
    console.tell(asked.sentence(), asked, as_json)
    left = len(missing) - len(fetchable)
    if left:
        console.remark(f"{left:,} have no orderId and cannot be fetched by it: try reconcile --from-zero --apply.")
    return left


def _missing(here: CommandContext, expected: list[Expected], company_ids: tuple[str, ...]) -> list[Expected]:
    """Return those that no company holds, neither by id nor by any of their references."""
    redis = here.redis
    known_ids: set[str] = set()
    copies = LocalCopies(redis)
    keys = [OrderKey(company_id, one.order_id) for one in expected if one.order_id for company_id in company_ids]
    with console.progress("looking for orders", len(keys)) as step:
        for at in range(0, len(keys), _CHUNK):
            chunk = keys[at : at + _CHUNK]
            known_ids |= {key.order_id for key, held in zip(chunk, copies.read(chunk), strict=True) if held is not None}
            step(len(chunk))
    # An orderId says which order is meant; references are only asked where there is none.
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
    with console.progress("looking through references") as step:
        for texts in references.of_events(company_ids):
            known |= texts & wanted
            step(len(texts))
            if known == wanted:
                break
    return known


def _tell(missing: list[Expected], expected: list[Expected], as_json: bool) -> None:
    _show_expected(missing, as_json)
    if not as_json:
        of = f"{console.many(len(expected), 'order')} expected"
        console.say(f"{len(missing):,} missing of {of}." if missing else f"None is missing: {of}.")


def _show_expected(missing: list[Expected], as_json: bool) -> None:
    if as_json:
        for one in missing:
            console.json_line(
                {"kind": "missing", "line": one.line, "order_id": one.order_id, "references": one.references}
            )
    elif missing:
        rows = ((one.line, one.order_id, ", ".join(one.references)) for one in missing)
        console.table("", ("#line", "order", "references"), rows)


def _slugs(here: CommandContext, company_ids: tuple[str, ...]) -> str:
    return ", ".join(sorted(here.companies.slug(one) for one in company_ids))


NO_LIST: Final = 5

_CODES: Final = {
    DONE: "no differences, or all queued",
    FOUND: "differences that are not all queued",
    NO_LIST: "the Channel Manager did not return the whole list",
}

_FromZero = Annotated[bool, typer.Option("--from-zero", help="The whole list, not only what changed since last time.")]
_FromFile = Annotated[
    Path | None,
    typer.Option(
        "--from-file",
        metavar="CSV",
        help="Instead of the list: orders that you expect, by column orderId, reference, buyFromOrderReference or"
        " sellToOrderReference.",
    ),
]
_Apply = Annotated[bool, typer.Option("--apply", help="Fetch these orders, behind live events.")]


@cli.command(epilog=epilog("ota-receiver reconcile --from-zero --apply", codes=_CODES))
def reconcile(
    company: context.CompanyOption = None,
    from_zero: _FromZero = False,
    from_file: _FromFile = None,
    apply: _Apply = False,
    yes: context.Yes = False,
    who: context.Who = None,
    why: context.Why = "",
    as_json: context.Json = False,
) -> None:
    """Compare the Channel Manager's list of orders with ours, and show the differences. --apply fetches these orders.

    no_event: settled without an event. changed: confirmed, cancelled or changed since it was fetched, which causes no
    event. stuck: not settled for more than 10 minutes. The workers do the same by themselves every
    RECONCILE_EVERY; interrupted, nothing is lost.
    """
    if from_file is not None and from_zero:
        raise Stop("--from-file asks no list: leave --from-zero out.")
    with open_context(company) as here:
        if from_file is not None:
            left = compare(here, from_file, company, apply=apply, yes=yes, who=who, why=why, as_json=as_json)
            raise typer.Exit(FOUND if left else 0)
        chosen = _companies(here, company)
        differences, listed, troubles = _look(here, chosen, from_zero, as_json)
        asked = None
        if differences and apply:
            if not yes:
                _show(here, differences, as_json)
            console.confirm(f"Fetch {console.many(len(differences), 'order')} (one getOrder each)?", yes)
            asked = ask_for(
                here, [one.key for one in differences], queue="backfill", what="reconcile", who=who, why=why
            )
        # Shown after it is done where nobody is asked: a reader that leaves early must not keep it from being done.
        if yes or asked is None:
            _show(here, differences, as_json)
        if asked is not None:
            console.tell(asked.sentence(), asked, as_json)
        if not as_json:
            console.say(_summary(differences, listed, apply))
    for trouble in troubles:
        console.remark(trouble)
    raise typer.Exit(NO_LIST if troubles else FOUND if differences and not apply else 0)


def _companies(here: CommandContext, name: str | None) -> list[Company]:
    """Return the companies whose list can be read; Stop if there is none, or the one that was named is none."""
    company_id = here.companies.id_of(name)
    asked = [one for one in here.settings.companies if company_id in (None, one.np_company_id)]
    without = [one.slug for one in asked if one.np_partner_id is None]
    if not asked:
        raise Stop(f"Company {name!r} is not in the settings: its list cannot be asked for.")
    if len(without) == len(asked):
        raise Stop(
            f"No NP_PARTNER_ID is set for {', '.join(without)}, and without it no list of orders can be asked for."
            " Set it, or give what you expect: --from-file orders.csv."
        )
    for slug in without:
        console.remark(f"{slug}: left out, NP_PARTNER_ID is not set.")
    return [one for one in asked if one.np_partner_id is not None]


def _look(
    here: CommandContext, companies: list[Company], from_zero: bool, as_json: bool
) -> tuple[list[Discrepancy], int, list[str]]:
    """Return the differences of all companies, how many orders were listed, and whose list ended early and why."""
    differences: list[Discrepancy] = []
    troubles: list[str] = []
    listed = 0
    with console.progress("reading the list") as step:
        for company in companies:
            try:
                for rows, found in _read(here, company, from_zero):
                    listed += rows
                    differences += found
                    step(rows)
            except UpstreamError as error:
                status = f" (HTTP {error.http_status})" if error.http_status else ""
                text = f"{company.slug}: the list ended early: {error.reason}{status}. See: ota-receiver check"
                troubles.append(text)
    return differences, listed, troubles


def _read(here: CommandContext, company: Company, from_zero: bool) -> Iterator[tuple[int, tuple[Discrepancy, ...]]]:
    """Yield the number of rows and the differences of each page, then those of orders watched since earlier looks.

    The checkpoint stays where it is: moving it is the workers' business.
    """
    from workers.background import listing  # the arrow points down: only the CLI knows both sides

    redis = here.redis
    checkpoint = Checkpoint(redis, company.np_company_id)
    comparison = Comparison(LocalCopies(redis), company.np_company_id, here.settings.order_days)
    watched = checkpoint.watched()
    unseen = dict(watched)
    start = 0 if from_zero else checkpoint.start(here.now())
    with bootstrap.http(here.settings) as http:
        client = bootstrap.channel_manager(here.settings, company, http)
        for _, page in listing(here.settings, company, redis, client).since(start):
            for row in page.rows:
                unseen.pop(row.order_id, None)
            yield len(page.rows), comparison.of_page(page, watched, here.now()).discrepancies
    yield 0, comparison.of_watched(unseen, here.now()).discrepancies


def _show(here: CommandContext, differences: list[Discrepancy], as_json: bool) -> None:
    if as_json:
        for one in differences:
            console.json_line({"company": here.companies.slug(one.company_id)} | msgspec.structs.asdict(one))
        return
    if differences:
        columns = (
            "company",
            "=order",
            "kind",
            "listed as",
            "here",
            "differs",
            "?reference",
            f"?received ({console.zone()})",
        )
        console.table("", columns, (_row(here, one) for one in differences))


def _row(here: CommandContext, one: Discrepancy) -> tuple[object, ...]:
    return (
        here.companies.slug(one.company_id),
        one.order_id,
        one.kind,
        one.status,
        one.stored_status,
        ", ".join(one.differs),
        one.reference,
        times.short(one.received_at),
    )


def _summary(differences: list[Discrepancy], listed: int, apply: bool) -> str:
    looked = f"{console.many(listed, 'order')} listed"
    if not differences:
        return f"No differences: {looked}."
    kinds = Counter(one.kind for one in differences)
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{console.many(len(differences), 'difference')}: {told}; {looked}." + (
        "" if apply else " Fetch them with --apply."
    )
