"""A new clientState, and the way to it on which no event is refused: the receiver knows it before upstream does."""

from __future__ import annotations

import secrets
import shlex
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from app.cli import output, secret_file
from app.settings import Company, Settings
from app.subscriptions import same_address
from app.upstream.subscription import Subscription

_BYTES = 32
"""Of chance; 43 characters in base64, of the 50 that a subscription takes (upstream.md 3)."""


def begin(
    settings: Settings,
    company: Company,
    url: str,
    ours: list[Subscription],
    write_to: Path | None,
    reveal: bool,
    yes: bool,
) -> tuple[list[str], dict[str, Any]]:
    """Make a secret, put it where it was asked for, and return the steps that are left: as lines, and as an object.

    Raises Stop, before anything is made, where the file must not be written.
    """
    in_use = (company.client_state, company.client_state_previous)
    if company.client_state_previous is not None:
        question = "A rotation is under way: CLIENT_STATE_PREVIOUS is set, and would be dropped. Begin another?"
        output.confirm(question, yes)
    made = SecretStr(secrets.token_urlsafe(_BYTES))
    if write_to is not None:
        secret_file.check(write_to, in_use, yes)
        secret_file.write(write_to, made)
    found = _steps(settings, company, url, ours, write_to)
    lines = ["Nothing is changed upstream yet. In this order no event is refused:"]
    lines += [f"{number}. {step}" for number, step in enumerate(found, 1)]
    told: dict[str, Any] = {"company": company.slug, "written_to": str(write_to) if write_to else None, "steps": found}
    if reveal:
        told["client_state"] = made.get_secret_value()
        lines.insert(0, f"New clientState: {made.get_secret_value()}")
    if write_to is not None:
        lines.insert(0, f"A new clientState is in {write_to}.")
    return lines, told


def _steps(
    settings: Settings, company: Company, url: str, ours: list[Subscription], write_to: Path | None
) -> list[str]:
    several = settings.companies_file is not None
    place = f"[companies.{company.slug}] of COMPANIES_FILE: " if several else ""
    names = ["CLIENT_STATE", "CLIENT_STATE_PREVIOUS"]
    current, previous = (name.lower() if several else name for name in names)
    suffix = "_file" if several else "_FILE"
    new = f"{current}{suffix} = {write_to.absolute()}" if write_to else f"{current} = the new one"
    which = f" --company {company.slug}" if several else ""
    old = [one.id for one in ours if one.id and same_address(one.notification_url, url)]
    deletes = [f"ota-receiver subscription delete {one}{which}" for one in old]
    return [
        f"{place}{previous} = what {current} is now; {new}",
        "Restart the web processes, and `subscription watch`: from now on both secrets are taken.",
        f"ota-receiver subscription create {shlex.quote(url)}{which} --yes",
        *(deletes or ["Delete the old subscription: ota-receiver subscription list, and delete."]),
        f'Once ota_events_by_secret_total{{secret="previous"}} has stood still for a day: take {previous} out.',
    ]
