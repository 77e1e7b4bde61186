"""The sinks, as listed in SINKS: each takes one revision of an order at a time, at least once."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from app.errors import SettingsError
from app.upstream.models import Order

if TYPE_CHECKING:
    import asyncio


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
        if inspect.isgeneratorfunction(self._function) or inspect.isasyncgenfunction(self._function):
            raise SettingsError("is a generator: calling it would run nothing of it")
        try:
            inspect.signature(self._function).bind(None, None)
        except TypeError:
            raise SettingsError("does not take two arguments, an order and its context") from None
        except ValueError:  # written in C, without a signature
            pass
        self._runner: asyncio.Runner | None = None

    def deliver(self, order: Order, context: Context) -> None:
        """Deliver a revision; what the function raises is recorded by its type, and the delivery is retried later.

        An async function runs on one event loop for all deliveries of this process. After an exception, which may be
        RQ's time limit in the middle of the loop, the loop is closed, and the next delivery gets a new one.
        """
        result = self._function(order, context)
        if not inspect.isawaitable(result):
            return
        from asyncio import Runner  # here: most sinks are not async, and it takes 2 MB of each worker

        self._runner = self._runner or Runner()
        try:
            self._runner.run(_finished(result))
        except BaseException:
            runner, self._runner = self._runner, None
            runner.close()
            raise


async def _finished(result: Awaitable[object]) -> None:
    await result


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
