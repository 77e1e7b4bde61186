"""The sinks, as listed in SINKS: each takes one revision of an order at a time, at least once."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

import msgspec

from app.errors import SettingsError
from app.upstream.models import Order


class Context(msgspec.Struct, frozen=True):
    """What a sink gets with the order.

    `idempotency_key` is company/order/revision/digest: the same for every repeat of this revision, and for no other
    content. `attempt` counts from 1.
    """

    idempotency_key: str
    company_id: str
    order_id: str
    revision: int
    attempt: int
    request_id: str


class Sink:
    """The sink `python:package.module:function`: the user's own function, imported when the worker starts."""

    def __init__(self, specification: str) -> None:
        """Import the function; raises SettingsError if it cannot be used."""
        kind, _, target = specification.partition(":")
        module_name, _, function_name = target.partition(":")
        if kind != "python" or not module_name or not function_name:
            raise SettingsError("is not of the form python:package.module:function")
        try:
            self._function = getattr(import_module(module_name), function_name)
        except Exception as error:
            # Importing the user's module may raise anything.
            raise SettingsError(f"cannot be imported ({type(error).__name__})") from error
        if not callable(self._function):
            raise SettingsError("is not callable")

    def deliver(self, order: Order, context: Context) -> None:
        """Deliver a revision; what the function raises is recorded by its type, and the delivery is retried later."""
        self._function(order, context)


def build(specifications: Iterable[str]) -> dict[str, Sink]:
    """Return name -> sink for specifications such as `python:mypackage.orders:on_order`.

    Raises SettingsError, with every problem on its own line, for an unknown kind or a function that cannot be used.
    """
    sinks: dict[str, Sink] = {}
    problems: list[str] = []
    for number, specification in enumerate(specifications, start=1):
        try:
            sinks[specification] = Sink(specification)
        except SettingsError as error:
            # Named by its place in the list: the value may hold a secret.
            problems.append(f"SINKS: number {number} {error}")
    if problems:
        raise SettingsError("\n".join(problems))
    return sinks
