"""The commands for the webhook subscription: list, create, delete, watch. None of them shows a clientState unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from app.cli import options, output, rotation, webhook_address
from app.cli.exits import AWAY, FOUND, Stop, epilog
from app.cli.subscription_watch import CODES, watch
from app.cli.venues import Venue, Venues, asking, changing, sentence, venues
from app.errors import RequestRejected, UpstreamError
from app.events import guid
from app.subscriptions import ends_in, for_settled_orders, same_address, secret_of, shown_address
from app.upstream.subscription import EVENT_NAME, Subscription

subscription = typer.Typer(
    name="subscription", no_args_is_help=True, help="What makes the Channel Manager send us events."
)

_SHOWN_BY_LIST: Final = "Its id, as `subscription list` shows it."
_CREATE: Final = "ota-receiver subscription create https://hooks.example.com/webhooks/ota-channel-manager"
_WATCH: Final = "ota-receiver subscription watch --repair --url https://hooks.example.com/webhooks/ota-channel-manager"


def register(cli: typer.Typer) -> None:
    subscription.command(epilog=epilog(_WATCH, codes=CODES))(watch)
    cli.add_typer(subscription)


@subscription.command("list", epilog=epilog("ota-receiver subscription list", codes=CODES))
def list_(company: options.Company = None, as_json: options.Json = False) -> None:
    """List all subscriptions, also those for other events, and which of our secrets their events carry."""
    rows: list[tuple[Venue, Subscription]] = []
    troubles: list[str] = []
    with venues(company) as here:
        for venue in here.chosen:
            try:
                rows += [(venue, one) for one in venue.upstream.subscriptions()]
            except UpstreamError as error:
                troubles.append(sentence(venue, error))
    if as_json:
        for venue, one in rows:
            output.json_line(_view(venue, one))
    elif rows:
        columns = ("=id", "company", "event", "state", "secret", "address")
        output.table("", columns, (_row(venue, one) for venue, one in rows))
    if troubles:
        raise Stop("\n".join(troubles), AWAY)
    if not rows:
        raise Stop("No subscription.", FOUND)


@subscription.command(epilog=epilog(_CREATE, f"{_CREATE} --new-client-state --write-to FILE", codes=CODES))
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Public https address of the webhook.")],
    company: options.Company = None,
    new_client_state: Annotated[
        bool, typer.Option("--new-client-state", help="Only make a new secret, and tell how to rotate to it.")
    ] = False,
    write_to: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the new secret goes; mode 0600.")] = None,
    reveal: Annotated[bool, typer.Option("--reveal", help="Print the new secret.")] = False,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Subscribe URL to settled orders; events will carry CLIENT_STATE of the settings.

    With --new-client-state nothing is subscribed yet: events with a secret that the web processes do not know would
    be answered 401.
    """
    webhook_address.check(url)
    if not new_client_state and (write_to or reveal):
        raise Stop("--write-to and --reveal go with --new-client-state.")
    if new_client_state and not (write_to or reveal):
        raise Stop("Say where the new clientState goes: --write-to FILE, or --reveal to see it.")
    with venues(company) as here:
        venue = here.one()
        with asking(venue):
            ours = for_settled_orders(venue.upstream.subscriptions())
        same = [one for one in ours if same_address(one.notification_url, url)]
        if not ends_in(url, here.settings.webhook_path):
            output.remark(f"{shown_address(url)} does not end in WEBHOOK_PATH ({here.settings.webhook_path}).")
            output.remark("Unless a proxy maps the path, every event will be answered 404.")
        if new_client_state:
            lines, told = rotation.begin(here.settings, venue.company, url, ours, write_to, reveal, yes)
            output.tell_lines(lines, told, as_json)
            return
        if same:
            output.confirm(f"{shown_address(url)} is subscribed already, as {_ids(same)}. Subscribe it again?", yes)
        with changing(venue):
            made = venue.upstream.create_subscription(url, venue.company.client_state)
        made = _found_again(venue, made, url, ours)
    told = _view(venue, made) | {"event": EVENT_NAME, "url": shown_address(url)}
    text = f"{venue.slug}: {shown_address(url)} is subscribed to {EVENT_NAME} ({told['id'] or 'id not told'})."
    output.tell(text, told, as_json)


@subscription.command(
    epilog=epilog("ota-receiver subscription delete 6f1f0c1e-2b4d-4a57-9c53-0d9d7c1b2a3e", codes=CODES)
)
def delete(
    subscription_id: Annotated[str, typer.Argument(metavar="ID", help=_SHOWN_BY_LIST)],
    company: options.Company = None,
    yes: options.Yes = False,
    as_json: options.Json = False,
) -> None:
    """Delete a subscription."""
    wanted = guid(subscription_id)
    if wanted is None:
        raise Stop(f"{subscription_id!r} is no id. {_SHOWN_BY_LIST}")
    with venues(company) as here:
        venue, one, others = _find(here, wanted)
        last = one.active and not any(other.active for other in others)
        warning = " It is the last Active one: no event will come any more." if last else ""
        what = f"{one.event_name} to {shown_address(one.notification_url)}, {one.subscription_state}"
        output.confirm(f"Delete {wanted} of {venue.slug} ({what})?{warning}", yes)
        with changing(venue):
            deleted = _deleted(venue, wanted)
    if not deleted:
        raise Stop(f"{wanted} is gone already.", FOUND)
    output.tell(f"{wanted} is deleted.", {"company": venue.slug, "id": wanted, "deleted": True}, as_json)


def _deleted(venue: Venue, subscription_id: str) -> bool:
    """Delete it and return whether it was still there."""
    try:
        venue.upstream.delete_subscription(subscription_id)
    except RequestRejected as error:
        if error.reason != "subscription_not_found":
            raise
        return False
    return True


def _found_again(venue: Venue, made: Subscription, url: str, before: list[Subscription]) -> Subscription:
    """Return the new subscription as it is listed: the answer to its creation may have been empty (upstream.md 3)."""
    if made.id is not None:
        return made
    known = {one.id for one in before}
    try:
        listed = for_settled_orders(venue.upstream.subscriptions())
    except UpstreamError:
        return made
    return next((one for one in listed if one.id not in known and same_address(one.notification_url, url)), made)


def _find(here: Venues, wanted: str) -> tuple[Venue, Subscription, list[Subscription]]:
    """Return the subscription of this id, whose it is, and the others of that company for the same event."""
    for venue in here.chosen:
        with asking(venue):
            listed = venue.upstream.subscriptions()
        for one in listed:
            if guid(one.id) == wanted:
                return venue, one, [other for other in listed if other is not one and _same_event(one, other)]
    raise Stop(f"No subscription {wanted} is there.", FOUND)


def _same_event(one: Subscription, other: Subscription) -> bool:
    return (one.event_name or "").casefold() == (other.event_name or "").casefold()


def _ids(found: list[Subscription]) -> str:
    return ", ".join(one.id or "an unnamed one" for one in found)


def _view(venue: Venue, one: Subscription) -> dict[str, object]:
    return {
        "company": venue.slug,
        "id": one.id,
        "event": one.event_name,
        "version": one.event_version,
        "url": shown_address(one.notification_url),
        "state": one.subscription_state,
        "secret": secret_of(venue.company, one),
        "changed": one.last_modified_date_time,
    }


def _row(venue: Venue, one: Subscription) -> tuple[object, ...]:
    secret = secret_of(venue.company, one)
    return (one.id, venue.slug, one.event_name, one.subscription_state, secret, shown_address(one.notification_url))
