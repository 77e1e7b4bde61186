"""Words that were replaced stay away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[2]
SEARCHED: Final = ("app", "workers", "tests", "docs", "deploy")
ALSO: Final = ("README.md", "CONTRIBUTING.md", "companies.example.toml", ".env.example", "Dockerfile")
TEXT: Final = {".py", ".lua", ".md", ".yml", ".conf", ".toml", ".csv"}

RETIRED: Final = {
    # States, answers and log events
    r"\bowing\b|\boldest_owed\w*": "pending",
    r"[\"'`.](?:gone|dropped)[\"'`]": "deleted_upstream, discarded",
    r"\bnever_heard\b": "no_event",
    r"\bredis_away\b": "redis_unavailable",
    r"\bis_dropped\b|\bis_parked\b|\bis_owed\b": "is_discarded, is_pending",
    r"\bput[ _-]aside\b|\bitems aside\b": "invalid items",
    r"\border\.(?:handed|hand_failed|hand_dead|again|parked|not_needed|gone)\b": "delivery.*, fetch.*",
    r"[\"'`]order\.dead[\"'`]": "order.dead_lettered",
    r"\brequest\.client_gone\b|\bclient_gone\b": "request.client_disconnected",
    r"\b(?:intake|pool)\.redis_(?:away|back)\b": "redis.unavailable, redis.recovered",
    r"\bworker_overdue\b|\bpool\.orphans\b|\bpool\.ticked\b|\bpool\.orders_broken\b": "worker.timed_out, pool.*",
    r"\breconcile\.ran\b": "reconcile.finished",
    r"\bsubscription\.trouble\b": "subscription.check_failed",
    r"\bspool\.(?:adopted|refused)\b": "one spool file per machine",
    r"\balarms?\b|\bAlarms?\b": "alert",
    # Metrics
    r"\bota_(?:order_home|oldest_owed|hand_ons|dead_hand_ons|ticker|alarm|items_aside)\w*": "see docs/operations.md",
    r"\blast_beat\w*|\bbeaten\b|\bBEAT_WITHIN\b|\blast beat\b|[\"'`.]beat\b": "heartbeat",
    # Fields and functions
    r"[.\"'`](?:parks|rejects)\b(?!\()": "deferrals, client_errors",
    r"\bwant_fetch\b|\bask_for\b|\blet_go\b|\bnudge\w*": "request_fetch, release_worker, wake",
    r"\borphans?\b": "recovered",
    r"\brehand\w*": "redeliver",
    r"\breclaim\w*": "release_worker",
    # Classes and modules
    r"\b(?:Budget|Slot|NotNow)\b": "RateLimiter, Permit, Denied",
    r"\bWatchman\b|\bclass Watch\b|\bWatch\(|\bonset\b|\bSigns?\b": "AlertEvaluator, AlertState, rules",
    r"\b[Vv]itals?\b|\bVitalSigns\b|\bvital_signs\b|\bpulses?\b": "snapshot",
    r"\b[Tt]ally\b": "CounterBuffer",
    r"\b(?:Turns|Survey|Holdings)\b": "schedule, comparison, LocalCopy",
    r"\b(?:Letters|Lack|Sight)\b": "selection, Outstanding, SubscriptionStatus",
    r"\b(?:Room|Guest)\b": "ConnectionRegistry, Connection",
    r"\bEstate\b|\bclass Census\b": "WorkerRecovery, Heartbeat",
    r"\bclockwork\b": "policy",
    r"\bapp\.(?:store|alarms|spool|inbox)\b|\bapp/(?:store|alarms|spool)/": "app.ledger, app.alerts, app.intake",
    # Plain English
    r"\bowe[sd]?\b": "pending",
    r"(?<![/:-])\bhome\b(?!/)|_home_|_home\b|\bhome_\w+|\bHOME_WITHIN\b": "fetched",
    r"\bpark(?:s|ed|ing)?\b": "deferred",
    r"[.\"'`](?:wanted|begun|fence|looks|lacks|said|heard)\b(?!\()": "see OrderRecord",
    r"\bhand(?:s|ed|ing)?[ -]ons?\b|hand_on\w*|\brevive\w*": "delivery, retry_delivery",
    r"\b[Cc]ensus\b|\b[Bb]ooks\b|\b[Dd]eeds?\b": "Heartbeat, ledger, AuditEntry",
    r"\btrails?\b|\bstory\b": "history",
    r"\blanes?\b|\bLane\b|\btickers?\b|\bticked\b": "queue, dispatcher",
    r"\bmend(?:s|ed|ing)?\b|\bburnt\b|\btold\b|\bnobody\b": "fixed; used up; logged, shown; no one",
    r"\bbegun\b|\bverdicts?\b|\bNEWER_DATA\b|\bnewer_data\b": "started, outcome, other_schema",
    r"\bgive[sn]? up\b|\bgave up\b|\bin good order\b": "dead letter, failed for good; clean shutdown",
}
"""Pattern -> what is used now."""


@cache
def texts() -> dict[str, str]:
    """Return every text file that people read here, by its path."""
    files = [path for folder in SEARCHED for path in sorted((ROOT / folder).rglob("*")) if path.suffix in TEXT]
    files += [ROOT / name for name in ALSO]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files if path != Path(__file__)}


def occurrences(pattern: str) -> Iterator[str]:
    word = re.compile(pattern)
    for path, text in texts().items():
        for number, line in enumerate(text.splitlines(), 1):
            if word.search(line):
                yield f"{path}:{number}: {line.strip()}"


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_does_not_come_back(pattern: str) -> None:
    assert list(occurrences(pattern)) == [], f"use: {RETIRED[pattern]}"


def test_the_search_reads_the_code_and_the_pages() -> None:
    """A search that finds no file would find no word either."""
    read = {"app/settings.py", "workers/jobs.py", "docs/operations.md", "deploy/alerts.yml", "README.md"}

    assert read <= texts().keys()
    assert list(occurrences(r"\bfetch_order\b"))
