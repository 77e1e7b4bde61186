"""Numbers, breakers and sinks in words, the same in every command and on every page."""

from __future__ import annotations

from datetime import datetime, timedelta

from app import times
from app.snapshot import Breaker, SinkSnapshot


def many(count: int, noun: str) -> str:
    """Return `1 order`, `2,000 orders`, `3 companies`, `4 crashes`."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith(("ry", "ny")) else f"{noun}es" if noun.endswith("sh") else f"{noun}s"
    return f"{count:,} {plural}"


def age(seconds: int) -> str:
    """Return a number of seconds in its largest unit, as `times.age` does."""
    return times.age(timedelta(seconds=seconds))


def breaker_words(breaker: Breaker, now: datetime) -> str:
    """Return why nothing is fetched for a company, since when, and when the next probe is made."""
    probe = f"at {times.short(breaker.probe_at)}" if breaker.probe_at > now else "with the next order that is due"
    return f"{_opened(breaker, now)}; next probe {probe}"


def _opened(breaker: Breaker, now: datetime) -> str:
    is_named = not breaker.http_status or str(breaker.http_status) in breaker.reason
    http = "" if is_named else f" (HTTP {breaker.http_status})"
    return f"{breaker.reason}{http} since {times.short(breaker.since)} ({times.age(now - breaker.since)})"


def sink_words(name: str, sink: SinkSnapshot, now: datetime) -> str:
    """Return why nothing is delivered to a sink and since when, "" if deliveries may start."""
    if sink.disabled_at:
        since = times.short(times.from_ms(sink.disabled_at))
        return f"disabled since {since}: {sink.disabled_reason}. To go on: ota-receiver sinks enable {name}"
    if sink.breaker is None:
        return ""
    if times.from_ms(sink.probe_until) > now:
        return f"breaker open: {_opened(sink.breaker, now)}; a probe runs"
    return f"breaker open: {breaker_words(sink.breaker, now)}"
