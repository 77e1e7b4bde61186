"""The command that looks for orders of which no event told, or none of their last change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from app import bootstrap
from app.cli import deeds, expected_orders, moment, options, output
from app.cli.exits import FOUND, Stop, epilog
from app.cli.fetches import ask_for
from app.cli.session import Session, session
from app.errors import UpstreamError
from app.reconcile.gap import Gap
from app.reconcile.survey import Survey
from app.settings import Company
from app.store.cursor import Cursor
from app.store.holdings import Holdings

NO_LIST: Final = 5

_CODES: Final = (
    "Exit codes: 0 no gaps, or all queued · 1 gaps, and not all"
    " queued · 2 usage or settings, or a question that nobody could answer · 3 Redis does not answer · 4 its data is of"
    " a newer version · 5 the Channel Manager did not give the whole list · 130 interrupted"
)

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
_Apply = Annotated[bool, typer.Option("--apply", help="Fetch the orders of the gaps, behind the live ones.")]


def register(cli: typer.Typer) -> None:
    cli.command(epilog=epilog("ota-receiver reconcile --from-zero --apply", codes=_CODES))(reconcile)


def reconcile(
    company: options.Company = None,
    from_zero: _FromZero = False,
    from_file: _FromFile = None,
    apply: _Apply = False,
    yes: options.Yes = False,
    who: deeds.Who = None,
    why: deeds.Why = "",
    as_json: options.Json = False,
) -> None:
    """Compare the Channel Manager's list of orders with ours, and show the gaps; --apply fetches just these.

    never_heard: settled, and no event told of it. changed: confirmed, cancelled or changed since it was fetched, of
    which no event tells. stuck: not settled for more than 10 minutes. The workers do the same by themselves every
    RECONCILE_EVERY; interrupted, nothing is lost.
    """
    if from_file is not None and from_zero:
        raise Stop("--from-file asks no list: leave --from-zero out.")
    with session() as here:
        if from_file is not None:
            left = expected_orders.compare(
                here, from_file, company, apply=apply, yes=yes, who=who, why=why, as_json=as_json
            )
            raise typer.Exit(FOUND if left else 0)
        chosen = _companies(here, company)
        gaps, listed, troubles = _look(here, chosen, from_zero, as_json)
        asked = None
        if gaps and apply:
            if not yes:
                _show(here, gaps, as_json)
            output.confirm(f"Fetch {output.many(len(gaps), 'order')} (one getOrder each)?", yes)
            asked = ask_for(here, [gap.key for gap in gaps], queue="backfill", what="reconcile", who=who, why=why)
        # Shown after it is done where nobody is asked: a reader that leaves early must not keep it from being done.
        if yes or asked is None:
            _show(here, gaps, as_json)
        if asked is not None:
            output.tell(asked.sentence(), asked, as_json)
        if not as_json:
            output.say(_summary(gaps, listed, apply))
    for trouble in troubles:
        output.remark(trouble)
    raise typer.Exit(NO_LIST if troubles else FOUND if gaps and not apply else 0)


def _companies(here: Session, name: str | None) -> list[Company]:
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
        output.remark(f"{slug}: left out, NP_PARTNER_ID is not set.")
    return [one for one in asked if one.np_partner_id is not None]


def _look(here: Session, companies: list[Company], from_zero: bool, as_json: bool) -> tuple[list[Gap], int, list[str]]:
    """Return the gaps of all companies, how many orders were listed, and whose list ended early and why."""
    gaps: list[Gap] = []
    troubles: list[str] = []
    listed = 0
    with output.progress("reading the list") as step:
        for company in companies:
            try:
                for rows, found in _read(here, company, from_zero):
                    listed += rows
                    gaps += found
                    step(rows)
            except UpstreamError as error:
                status = f" (HTTP {error.http_status})" if error.http_status else ""
                text = f"{company.slug}: the list ended early: {error.reason}{status}. See: ota-receiver check"
                troubles.append(text)
    return gaps, listed, troubles


def _read(here: Session, company: Company, from_zero: bool) -> Iterator[tuple[int, tuple[Gap, ...]]]:
    """Yield the number of rows and the gaps of each page, then those of orders watched since earlier looks.

    The cursor stays where it is: moving it is the workers' business.
    """
    from workers.reconciler import listing  # the arrow points down: only the CLI knows both sides

    redis = here.books.ledger.redis
    cursor = Cursor(redis, company.np_company_id)
    survey = Survey(Holdings(redis), company.np_company_id, here.settings.order_days)
    watched = cursor.watched()
    unseen = dict(watched)
    start = 0 if from_zero else cursor.start(bootstrap.clock())
    with bootstrap.http(here.settings) as http:
        client = bootstrap.channel_manager(here.settings, company, http)
        for _, page in listing(here.settings, company, redis, client).since(start):
            for row in page.rows:
                unseen.pop(row.order_id, None)
            yield len(page.rows), survey.of_page(page, watched, bootstrap.clock()).gaps
    yield 0, survey.of_watched(unseen, bootstrap.clock()).gaps


def _show(here: Session, gaps: list[Gap], as_json: bool) -> None:
    if as_json:
        for gap in gaps:
            output.json_line({"company": here.companies.slug(gap.company_id)} | msgspec.structs.asdict(gap))
        return
    if gaps:
        columns = (
            "company",
            "=order",
            "gap",
            "listed as",
            "here",
            "differs",
            "?reference",
            f"?received ({output.zone()})",
        )
        output.table("", columns, (_row(here, gap) for gap in gaps))


def _row(here: Session, gap: Gap) -> tuple[object, ...]:
    return (
        here.companies.slug(gap.company_id),
        gap.order_id,
        gap.kind,
        gap.status,
        gap.held,
        ", ".join(gap.differs),
        gap.reference,
        moment.short(gap.received_at),
    )


def _summary(gaps: list[Gap], listed: int, apply: bool) -> str:
    looked = f"{output.many(listed, 'order')} listed"
    if not gaps:
        return f"No gaps: {looked}."
    kinds = Counter(gap.kind for gap in gaps)
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{output.many(len(gaps), 'gap')}: {told}; {looked}." + ("" if apply else " Fetch them with --apply.")
