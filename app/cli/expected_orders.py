"""What `reconcile --from-file` does: which of the orders that the partner expects does the ledger not know?"""

from __future__ import annotations

from pathlib import Path

from app.cli import output
from app.cli.exits import Stop
from app.cli.fetches import ask_for
from app.cli.session import Session
from app.reconcile.expected import BadExpected, Expected, read
from app.store.holdings import Holdings
from app.store.keys import OrderKey
from app.store.references import References

_CHUNK = 200


def compare(
    here: Session,
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
    output.confirm(f"Fetch {output.many(len(orders), 'order')} (one getOrder each)?", yes)
    asked = ask_for(here, orders, queue="backfill", what="reconcile", who=who, why=why)
    # Shown after it is done where nobody is asked: a reader that leaves early must not keep it from being done.
    if yes:
        _tell(missing, expected, as_json)
    output.tell(asked.sentence(), asked, as_json)
    left = len(missing) - len(fetchable)
    if left:
        output.remark(f"{left:,} have no orderId and cannot be fetched by it: try reconcile --from-zero --apply.")
    return left


def _missing(here: Session, expected: list[Expected], company_ids: tuple[str, ...]) -> list[Expected]:
    """Return those that no company holds, neither by id nor by any of their references."""
    redis = here.books.ledger.redis
    known_ids: set[str] = set()
    holdings = Holdings(redis)
    keys = [OrderKey(company_id, one.order_id) for one in expected if one.order_id for company_id in company_ids]
    with output.progress("looking for orders", len(keys)) as step:
        for at in range(0, len(keys), _CHUNK):
            chunk = keys[at : at + _CHUNK]
            known_ids |= {key.order_id for key, held in zip(chunk, holdings.of(chunk), strict=True) if held is not None}
            step(len(chunk))
    # An orderId says which order is meant; references are only asked where there is none.
    wanted = {text.casefold() for one in expected if not one.order_id for text in one.references}
    known = _known(here, wanted, company_ids)
    return [
        one
        for one in expected
        if not (one.order_id in known_ids if one.order_id else any(text.casefold() in known for text in one.references))
    ]


def _known(here: Session, wanted: set[str], company_ids: tuple[str, ...]) -> set[str]:
    references = References(here.books.ledger.redis, company_ids)
    known = references.indexed(wanted)
    if known == wanted:
        return known
    with output.progress("looking through references") as step:
        for texts in references.told():
            known |= texts & wanted
            step(len(texts))
            if known == wanted:
                break
    return known


def _tell(missing: list[Expected], expected: list[Expected], as_json: bool) -> None:
    _show(missing, as_json)
    if not as_json:
        of = f"{output.many(len(expected), 'order')} expected"
        output.say(f"{len(missing):,} missing of {of}." if missing else f"None is missing: {of}.")


def _show(missing: list[Expected], as_json: bool) -> None:
    if as_json:
        for one in missing:
            output.json_line(
                {"kind": "missing", "line": one.line, "order_id": one.order_id, "references": one.references}
            )
    elif missing:
        rows = ((one.line, one.order_id, ", ".join(one.references)) for one in missing)
        output.table("", ("#line", "order", "references"), rows)


def _slugs(here: Session, company_ids: tuple[str, ...]) -> str:
    return ", ".join(sorted(here.companies.slug(one) for one in company_ids))
