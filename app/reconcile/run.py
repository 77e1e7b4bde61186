"""One run over one company's list of orders: find the gaps, owe those orders a fetch, move the cursor.

Whatever dies between two steps is only repeated: an order that was queued is owed, and what is owed is no gap.

The list of a company's orders, page by page, each page through the budget of the API key like any other call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from app import log
from app.errors import Denied, Unavailable, UpstreamError
from app.ledger import policy
from app.ledger.ledger import Ledger
from app.ledger.orders import Backlog
from app.ledger.rate_limit import Permit, RateLimiter
from app.reconcile.compare import Findings, Gap, Survey
from app.reconcile.state import Cursor
from app.upstream.client import ChannelManager
from app.upstream.models import ListQuery, Page

BUSY: Final = frozenset({"permits_full", "window_full", "throttled"})
"""Reasons for which no page was asked for that soon pass."""

_TURNS: Final = 20
_PAUSE: Final = 0.25
"""Where the one permit of backfill changes hands among jobs, a page waits about 5 s for it; the jobs come back too."""

_log = log.get()


class Listing:
    """Reads the list of one company on the backfill lane; `pause` waits so many seconds."""

    def __init__(
        self,
        client: ChannelManager,
        limiter: RateLimiter,
        slug: str,
        clock: Callable[[], int],
        pause: Callable[[float], None],
        page_size: int = 1000,
    ) -> None:
        self._client = client
        self._limiter = limiter
        self._slug = slug
        self._clock = clock
        self._pause = pause
        self._page_size = page_size

    def since(self, row_version: int) -> Iterator[tuple[int, Page]]:
        """Yield each page of the orders changed after `row_version`, with the ms when it was asked for.

        Raises UpstreamError; where the limits deny a permit, Unavailable with their reason.
        """
        query = ListQuery(since_row_version=row_version, page_size=self._page_size)
        pages = self._client.list_orders(query)
        while True:
            with self._permit() as permit:
                asked_at = self._clock()
                try:
                    page = next(pages)
                except UpstreamError as error:
                    permit.failed(error)
                    raise
            yield asked_at, page
            if page.next_key is None:
                return

    def _permit(self) -> Permit:
        for left in reversed(range(_TURNS)):
            try:
                return self._limiter.permit("backfill")
            except Denied as denied:
                if denied.reason != "permits_full" or not left:
                    raise Unavailable(denied.reason) from None
            self._pause(_PAUSE)
        raise AssertionError("there is a last turn")


LONGEST: Final = 5 * policy.MINUTE
"""A run begins no page after that; what is left is for the next."""

LIVE_SHARE: Final = 0.2
IDLE_SHARE: Final = 0.8
"""Of the requests that the API key may make in a minute: while a live order is owed, and while none is."""

TOLD: Final = 20
"""Gaps a run logs one by one; a flushed Redis has 10,000."""

_CHUNK: Final = 200
"""Orders one call of request_fetch.lua takes: Redis serves others in between."""

Outcome = Literal["complete", "paced", "failed"]
"""`complete`: the whole list was read. `paced`: the share of a minute was used up. `failed`: upstream, see `error`."""


class Share(msgspec.Struct, frozen=True):
    """What of an API key's budget a run may use: requests a minute of the key, and the companies that share it."""

    per_minute: float
    company_ids: frozenset[str]


class Report(msgspec.Struct):
    """What a run has done so far; `gaps` are those queued, by kind."""

    pages: int = 0
    rows: int = 0
    unreadable: int = 0
    gaps: Counter[str] = msgspec.field(default_factory=Counter)
    outcome: Outcome = "complete"
    error: UpstreamError | None = None

    @property
    def queued(self) -> int:
        return self.gaps.total()


class Reconcile:
    """The run; `clock` gives ms since 1970."""

    def __init__(
        self,
        *,
        slug: str,
        listing: Listing,
        survey: Survey,
        cursor: Cursor,
        backlog: Backlog,
        ledger: Ledger,
        share: Share,
        lane: Literal["live", "backfill"],
        clock: Callable[[], int],
    ) -> None:
        self._slug = slug
        self._listing = listing
        self._survey = survey
        self._cursor = cursor
        self._backlog = backlog
        self._ledger = ledger
        self._share = share
        self._lane: Literal["live", "backfill"] = lane
        self._clock = clock

    def run(self) -> Report:
        """Read the list from the cursor on and queue what is missing; an error of upstream ends up in the report."""
        report = Report()
        room = self._room()
        deadline = self._clock() + LONGEST
        if room < 1:  # what waits in backfill comes first
            report.outcome = "paced"
            return report
        watched = self._cursor.watched()
        unseen = dict(watched)
        try:
            for listed_at, page in self._listing.since(self._cursor.start(self._clock())):
                self._note(report, page)
                for row in page.rows:
                    unseen.pop(row.order_id, None)
                findings = self._survey.of_page(page, watched, self._clock())
                left = room - report.pages - report.queued
                if not self._handle(findings, watched, left, report):
                    return report
                if page.row_version is not None:
                    self._cursor.mark(page.row_version, listed_at, self._clock())
                used_up = report.pages + report.queued >= room or self._clock() >= deadline
                if used_up and page.next_key is not None:
                    report.outcome = "paced"
                    return report
        except UpstreamError as error:
            report.outcome, report.error = "failed", error
            return report
        findings = self._survey.of_watched(unseen, self._clock())
        self._handle(findings, watched, max(room - report.pages - report.queued, 0), report)
        return report

    def _room(self) -> int:
        """Return how many requests this run may cause.

        What waits in backfill already counts: it comes out of the same share.
        """
        owes_live = self._backlog.has_live_pending(self._share.company_ids)
        share = self._share.per_minute * (LIVE_SHARE if owes_live else IDLE_SHARE) / len(self._share.company_ids)
        # Two, one for a page and one for an order: with less, nothing would ever move.
        return max(2, int(share)) - self._backlog.backfill()

    def _note(self, report: Report, page: Page) -> None:
        report.pages += 1
        report.rows += len(page.rows)
        report.unreadable += page.unreadable

    def _handle(self, findings: Findings, watched: dict[str, int], left: int, report: Report) -> bool:
        """Queue the gaps, at most `left`, and remember what to watch; return whether all of it was done."""
        self._queue(findings.gaps[: max(left, 0)], report)
        if len(findings.gaps) > max(left, 0):
            report.outcome = "paced"
            return False
        self._cursor.watch(findings.watch, self._clock())
        self._cursor.unwatch(one for one in findings.settled if one in watched)
        return True

    def _queue(self, gaps: Sequence[Gap], report: Report) -> None:
        for gap in gaps[: max(TOLD - report.queued, 0)]:
            _log.warning(
                "reconcile.discrepancy_found",
                company=self._slug,
                order_id=gap.order_id,
                kind=gap.kind,
                status=gap.status,
                stored_status=gap.held,
            )
        for at in range(0, len(gaps), _CHUNK):
            chunk = gaps[at : at + _CHUNK]
            self._ledger.request_fetch([gap.key for gap in chunk], queue=self._lane, reason="reconcile")
            report.gaps.update(gap.kind for gap in chunk)
