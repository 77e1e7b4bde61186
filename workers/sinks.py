"""The sinks, as listed in SINKS: each takes one revision of an order at a time, at least once."""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Awaitable, Iterable
from contextvars import copy_context
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING

import msgspec
from rq.timeouts import JobTimeoutException

from app.errors import SettingsError
from app.ledger.policy import JOB_TIMEOUT
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
            self._runner.run(_finished(result), context=copy_context())
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


def failure_of(sink: str, error: BaseException) -> str:
    """Return type and place of what a delivery to this sink raised, such as `ValueError at orders.py:41`.

    The place is the innermost one in the sink's own package. The text is left out, as it may quote people's data; that
    of our time limit and of the system's error numbers cannot.
    """
    package = sink.partition(":")[2].partition(":")[0].partition(".")[0]
    frames = [(frame.f_globals.get("__name__", ""), frame, line) for frame, line in walk_tb(error.__traceback__)]
    own = [one for one in frames if one[0].partition(".")[0] == package]
    others = [one for one in frames if one[0] not in {__name__, "workers.processor"}]
    text = type(error).__name__
    if found := own or others:
        _, frame, line = found[-1]
        text += f" at {Path(frame.f_code.co_filename).name}:{line}"
    if isinstance(error, JobTimeoutException):
        text += f" (longer than {JOB_TIMEOUT} s)"
    elif isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        text += f" ({os.strerror(error.errno)})"
    return text
