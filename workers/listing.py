"""The list of a company's orders, page by page, each page through the budget of the API key like any other call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from app import log
from app.errors import Unavailable, UpstreamError
from app.store.budget import Budget, Slot
from app.upstream.client import ChannelManager
from app.upstream.listing import ListQuery, Page
from workers import verdict

BUSY: Final = frozenset({"slots_full", "window_full", "throttled"})
"""Reasons for which no page was asked for that soon pass."""

_TURNS: Final = 20
_PAUSE: Final = 0.25
"""Where the one slot of backfill changes hands among jobs, a page waits about 5 s for it; the jobs come back too."""

_log = log.get()


class Listing:
    """Reads the list of one company on the backfill lane; `pause` waits so many seconds."""

    def __init__(
        self,
        client: ChannelManager,
        budget: Budget,
        slug: str,
        clock: Callable[[], int],
        pause: Callable[[float], None],
        page_size: int = 1000,
    ) -> None:
        self._client = client
        self._budget = budget
        self._slug = slug
        self._clock = clock
        self._pause = pause
        self._page_size = page_size

    def since(self, row_version: int) -> Iterator[tuple[int, Page]]:
        """Yield each page of the orders changed after `row_version`, with the ms when it was asked for.

        Raises UpstreamError; where the budget gives no slot, Unavailable with the budget's reason.
        """
        query = ListQuery(since_row_version=row_version, page_size=self._page_size)
        pages = self._client.list_orders(query)
        while True:
            slot = self._slot()
            asked_at = self._clock()
            page = self._next(pages, slot)
            yield asked_at, page
            if page.next_key is None:
                return

    def _slot(self) -> Slot:
        for left in reversed(range(_TURNS)):
            slot = self._budget.take("backfill", self._clock)
            if isinstance(slot, Slot):
                return slot
            if slot.reason != "slots_full" or not left:
                raise Unavailable(slot.reason)
            self._pause(_PAUSE)
        raise AssertionError("there is a last turn")

    def _next(self, pages: Iterator[Page], slot: Slot) -> Page:
        try:
            page = next(pages)
        except UpstreamError as error:
            self._give(slot, error)
            raise
        except BaseException:
            self._budget.give(slot, "failed", self._clock())
            raise
        self._budget.give(slot, "answered", self._clock())
        return page

    def _give(self, slot: Slot, error: UpstreamError) -> None:
        wait = error.retry_after
        if wait is None and error.http_status == 429:
            wait = verdict.THROTTLED_WAIT
        now = self._clock()
        closed_until, opened = self._budget.give(slot, verdict.of_connection(error), now, retry_after=wait)
        if opened:
            _log.error(
                "upstream.breaker_opened",
                company=self._slug,
                reason=error.reason,
                http_status=error.http_status,
                open_s=round((closed_until - now) / 1000),
            )
