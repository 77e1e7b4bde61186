"""What a command of ops works with: settings, the books in Redis, and the names of the companies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from app import bootstrap, settings
from app.bootstrap import Books
from app.cli import output
from app.cli.companies import Companies
from app.cli.exits import FOUND, Stop
from app.events import guid
from app.settings import Settings
from app.store.archive import BrokenRecord
from app.store.keys import OrderKey
from app.store.reference_index import MOST_SEARCHED


@dataclass(frozen=True)
class Session:
    """Open for the time of one command."""

    settings: Settings
    books: Books
    companies: Companies

    def order(self, text: str, company_id: str | None) -> OrderKey:
        """Return the one order that `text` names: an orderId, buyFromOrderReference or sellToOrderReference.

        Raises Stop when there is none, when several companies have one and `company_id` does not say which, and when
        `text` is blank: an order without a reference is not named by that.
        """
        if not text.strip():
            raise Stop("ORDER is empty: give an orderId or a reference.")
        found = [one for one in self._orders(text, company_id) if company_id in (None, one.company_id)]
        if not found:
            looked = "" if guid(text) else f" (references of orders never fetched: among the newest {MOST_SEARCHED:,})"
            raise Stop(f"No order {text!r} is here{looked}.", FOUND)
        if len(found) > 1:
            of = ", ".join(f"{self.companies.slug(one.company_id)} {one.order_id}" for one in found)
            raise Stop(f"Several orders match {text!r}: {of}. Give the orderId, and --company.")
        return found[0]

    def name(self, order: OrderKey) -> str:
        """Return what names this order, and no other, on a command line."""
        others = [one for one in self._orders(order.order_id, None) if one != order]
        return f"{order.order_id} --company {self.companies.slug(order.company_id)}" if others else order.order_id

    def _orders(self, text: str, company_id: str | None) -> list[OrderKey]:
        archive = self.books.archive
        order_id = guid(text)
        if order_id is not None:
            ids = self.companies.ids if company_id is None else (company_id,)
            return archive.of_companies(order_id, ids) or archive.of_any_company(order_id)
        with output.progress("looking through references"):
            return self.books.references.orders(text, company_id)


@contextmanager
def session() -> Iterator[Session]:
    """Open what a command works with; raises SettingsError, and StoreUnavailable when Redis fails.

    A BrokenRecord in the block becomes a Stop.
    """
    bootstrap.configure_cli_log()
    found = settings.load()
    with bootstrap.books(found) as books:
        try:
            yield Session(found, books, Companies(found.companies))
        except BrokenRecord as broken:
            raise Stop(str(broken), FOUND) from None
