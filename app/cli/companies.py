"""Companies as people name them: the slug of the settings, or the GUID."""

from __future__ import annotations

from collections.abc import Iterable

from app.cli.exits import Stop
from app.events import guid
from app.settings import Company


class Companies:
    """The companies of the settings, by either name."""

    def __init__(self, companies: Iterable[Company]) -> None:
        self._slugs = {company.np_company_id: company.slug for company in companies}
        self._ids = {slug: company_id for company_id, slug in self._slugs.items()}

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._slugs)

    def slug(self, company_id: str) -> str:
        """Return the slug, or the GUID of a company that the settings do not name (any more)."""
        return self._slugs.get(company_id, company_id)

    def id_of(self, name: str | None) -> str | None:
        """Return the GUID that `name` stands for, None for None; Stop for a slug that is not in the settings.

        A GUID need not be in the settings: orders of a company that was taken out can still be looked up.
        """
        if name is None:
            return None
        found = self._ids.get(name) or guid(name)
        if found is None:
            raise Stop(f"No company {name!r} in the settings; there is: {', '.join(sorted(self._ids))}.")
        return found
