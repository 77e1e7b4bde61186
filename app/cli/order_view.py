"""The lines of an order, its steps and its assets, as `orders explain`, `orders show` and `dead show` print them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from app import times
from app.cli import console
from app.explain.order_history import Step, took
from app.explain.order_view import OrderView, error_words, sink_state
from app.ledger.history import LONGEST

_INDENT: Final = 10
_STEP_INDENT: Final = 24


def lines(view: OrderView, latest: int | None = None) -> Iterator[str]:
    """Return the lines of an order's view; `latest` limits the steps shown to so many."""
    yield f"order {view.record.order_id} ({view.company})"
    state = ", ".join(filter(None, (view.state, view.status)))
    yield from _fact("state", ("COMPLETE: " if view.complete else "NOT COMPLETE: ") + state)
    yield from _fact("known as", ", ".join(view.references))
    yield from _fact("request", view.record.request_id)
    yield from _fact("content", view.content)
    yield from _fact("message", view.status_message)
    yield from _fact("error", error_words(view.record))
    if view.breaker is not None:
        yield from _fact("breaker", f"open: {view.breaker_words}")
    for sink in view.sinks:
        yield from _fact("sink", f"{sink.name}: {sink_state(view, sink)}")
    yield ""
    if view.older_steps_lost:
        yield f"(only the latest {LONGEST} history entries are kept; older ones are gone)"
    yield from step_lines(view.steps if latest is None else view.steps[-latest:])
    yield ""
    for name, text in zip(("took", ""), took(view.durations), strict=False):
        yield from _fact(name, text)
    for one in view.outstanding:
        attempt = f"next attempt {times.short(one.next)}" if one.next is not None else ""
        yield from _fact("pending", "; ".join(filter(None, (one.what, attempt, one.why))))
    yield from _fact("next", view.next)


def step_lines(found: Sequence[Step]) -> Iterator[str]:
    """Return steps on lines of 80 columns: local time, time since the step before, what happened."""
    day = None
    for step in found:
        local = step.at.astimezone()
        if local.date() != day:
            day = local.date()
            yield f"{day.isoformat()} ({local.tzname()})"
        clock = f"{local:%H:%M:%S}.{local.microsecond // 1000:03}"
        since = "" if step.since_ms is None else f"+{times.span(step.since_ms)}"
        text = step.text if step.times == 1 else f"{step.text}; {step.times} times until {_until(step)}"
        yield from console.wrap(text, f"{clock}{since:>10}  ", " " * _STEP_INDENT)


def _until(step: Step) -> str:
    local = step.until.astimezone()
    same_day = local.date() == step.at.astimezone().date()
    return f"{local:%H:%M:%S}" if same_day else f"{local:%m-%d %H:%M:%S}"


def _fact(name: str, text: str) -> list[str]:
    return console.wrapped(text, f"{name:<{_INDENT}}", " " * _INDENT)
