"""The filter of a list: what was typed into its form, which is also its address, and what it means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime
from urllib.parse import urlencode

from app import times
from app.explain.stores import Stores
from app.ids import guid

FETCHES = "-"
"""The `sink` of a dead fetch in an address, where an empty one means any; no sink has this name."""

_FARTHEST = 4_102_444_800_000
"""The year 2100, in ms since 1970."""


class Filter:
    """The fields of one address. `typed` has the text of each, "" of others; `errors` why one cannot be used.

    Each reader returns None for a field that is empty, or wrong and then in `errors`.
    """

    def __init__(self, typed: Mapping[str, str], stores: Stores) -> None:
        self.typed = defaultdict(str, typed)
        self.errors: dict[str, str] = {}
        self._ids = {slug: company_id for company_id, slug in stores.slugs.items()}

    def text(self, name: str) -> str | None:
        return self.typed[name].strip() or None

    def one_of(self, name: str, known: Collection[str]) -> str | None:
        """Return one of the known values."""
        found = self.text(name)
        if found is None or found in known:
            return found
        self.errors[name] = f"{found!r} is none of {', '.join(known)}."
        return None

    def company(self) -> str | None:
        """Return the id of a company, which is named by its slug or by its id."""
        found = self.text("company")
        if found is None:
            return None
        company_id = self._ids.get(found) or guid(found)
        if company_id is None:
            self.errors["company"] = f"No company {found!r} is known. There are: {', '.join(sorted(self._ids))}."
        return company_id

    def sink(self) -> str | None:
        """Return the name of a sink, "" for fetches."""
        found = self.text("sink")
        return "" if found == FETCHES else found

    def time(self, name: str) -> datetime | None:
        found = self.text(name)
        try:
            return None if found is None else times.parse(found)
        except ValueError as error:
            self.errors[name] = str(error)
            return None

    def moment(self, name: str) -> datetime | None:
        """Return a time that the page itself has put into an address, as ms since 1970."""
        found = self.number(name, 0, _FARTHEST)
        return None if found is None else times.from_ms(int(found))

    def number(self, name: str, least: float, most: float) -> float | None:
        found = self.text(name)
        try:
            value = None if found is None else float(found)
        except ValueError:
            value = least - 1
        if value is None or least <= value <= most:
            return value
        self.errors[name] = f"{found!r} is no number from {least:g} to {most:g}."
        return None

    def address(self, path: str, *without: str, **changed: str | None) -> str:
        """Return the address of a page with this filter, without some fields, or with other values; None is none."""
        fields = {name: text for name, text in (self.typed | changed).items() if text and name not in without}
        return f"{path}?{urlencode(fields)}" if fields else path
