"""The companies with their Channel Managers, for commands that ask upstream and need no Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app import bootstrap, settings
from app.cli.check_upstream import WEBHOOK_PERMISSIONS, advice, told
from app.cli.companies import Companies
from app.cli.exits import AWAY, Stop
from app.errors import Unavailable, UnreadableAnswer, UpstreamError
from app.settings import Company, Settings
from app.upstream.client import ChannelManager


@dataclass(frozen=True)
class Venue:
    """One company and the calls for it."""

    company: Company
    upstream: ChannelManager

    @property
    def slug(self) -> str:
        return self.company.slug


@dataclass(frozen=True)
class Venues:
    """The companies that a command is about, open for its time."""

    settings: Settings
    chosen: tuple[Venue, ...]

    def one(self) -> Venue:
        """Return the only one; raises Stop when there are several."""
        if len(self.chosen) > 1:
            slugs = ", ".join(sorted(venue.slug for venue in self.chosen))
            raise Stop(f"Say which company by --company: {slugs}.")
        return self.chosen[0]


@contextmanager
def venues(name: str | None) -> Iterator[Venues]:
    """Open the company of this slug or GUID, all of the settings for None; raises SettingsError, Stop."""
    bootstrap.configure_cli_log()
    found = settings.load()
    company_id = Companies(found.companies).id_of(name)
    companies = [one for one in found.companies if company_id in (None, one.np_company_id)]
    if not companies:
        raise Stop(f"No company {name!r} in the settings.")
    with bootstrap.http(found) as client:
        chosen = [Venue(company, bootstrap.channel_manager(found, company, client)) for company in companies]
        yield Venues(found, tuple(chosen))


@contextmanager
def asking(venue: Venue) -> Iterator[None]:
    """Turn upstream's trouble into the sentence that ends the command; raises Stop."""
    try:
        yield
    except UpstreamError as error:
        raise Stop(sentence(venue, error), AWAY) from None


@contextmanager
def changing(venue: Venue) -> Iterator[None]:
    """Do as `asking`, for a call after whose silence, or babble, nobody knows whether it was carried out."""
    try:
        yield
    except (Unavailable, UnreadableAnswer) as error:
        unsure = "It may have been done all the same: look with `ota-receiver subscription list` first."
        raise Stop(f"{sentence(venue, error)} {unsure}", AWAY) from None
    except UpstreamError as error:
        raise Stop(sentence(venue, error), AWAY) from None


def sentence(venue: Venue, error: UpstreamError) -> str:
    """Return what upstream's trouble is, and what to do about it."""
    return f"{venue.slug}: {told(error)}. {advice(error.reason, WEBHOOK_PERMISSIONS)}"
