"""The figures of a run as a table, its targets, and the problems of its orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from tests.chaos.run import Result

_HISTORIES_SHOWN = 20


def table(result: Result) -> Table:
    """Return the figures of a run."""
    found = result.found
    shown = Table("", "figure", title=f"chaos, seed {result.plan.seed}", title_justify="left")
    for name, value in {
        "events acknowledged": f"{result.acknowledged} of {result.sent}",
        "events recorded": f"{found.recorded} of {result.sent}",
        "orders complete": f"{found.complete} of {found.orders}",
        "sink deliveries": f"{found.deliveries}, to {found.delivered} of {found.orders} orders",
        "good getOrder answers": f"{found.good_answers}",
        "good answers per settlement": f"{result.per_settlement:.3f} ({found.surplus} more than settlements)",
        "injected failures": _counts(found.injected),
        "429 for a limit": str(found.throttled),
        "kills, freezes": _counts(result.done),
        "ended without a kill": _counts(result.unexpected_exits) or "none",
        "POSTs by answer": _counts(result.answers),
        "longest from event to fetched": f"{found.slowest:.1f} s (order {found.slowest_order})",
        "all fetched after the last kill": "never" if result.fetched_after is None else f"{result.fetched_after:.1f} s",
    }.items():
        shown.add_row(name, value)
    return shown


def targets(result: Result) -> Iterator[str]:
    """Return a line for each target."""
    for text, met in result.targets:
        yield f"{'met   ' if met else 'MISSED'} {text}"


def faults(result: Result) -> Iterator[str]:
    """Return the problems of every order, with the history of the first ones."""
    for number, (subject, wrong) in enumerate(result.found.faults.items()):
        yield f"{subject}: {'; '.join(wrong)}"
        if number < _HISTORIES_SHOWN:
            yield from (f"    {line}" for line in result.histories.get(subject, []))


def _counts(counts: Mapping[str, int]) -> str:
    whole = sum(counts.values())
    return f"{whole}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) if whole else ""
