"""The kind python: a function of the user, by its module or by the entry point of an installed package."""

from __future__ import annotations

import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Awaitable
from contextvars import copy_context
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

from app.errors import SettingsError
from app.order_document import OrderDocument
from workers.sinks.contract import Context, Reject, Retry
from workers.sinks.output import failure_of

if TYPE_CHECKING:
    import asyncio

ENTRY_POINTS: Final = "ota_receiver.sinks"
"""Group of the entry points by which an installed package offers its sinks."""

FORMS: Final = "is not of the form python:package.module:function, or entry:NAME of an installed package"


class Function:
    """The user's own function, imported when its worker starts."""

    package = ""

    def __init__(self, specification: str) -> None:
        """Import the function; raises SettingsError if it cannot be used."""
        kind, _, target = specification.partition(":")
        if kind == "entry":
            target = _entry_point(target)
        module_name, _, function_name = target.partition(":")
        if kind not in {"python", "entry"} or not all(map(str.isidentifier, (*module_name.split("."), function_name))):
            raise SettingsError(FORMS)
        self.package = module_name.partition(".")[0]
        try:
            module = import_module(module_name)
        except (Exception, SystemExit) as error:
            # Importing the user's module may raise anything.
            reason = failure_of(self.package, error)
            if isinstance(error, ModuleNotFoundError) and error.name:
                reason = f"no module {error.name} in {_searched()}"
            raise SettingsError(f"cannot be imported: {reason}") from error
        if not hasattr(module, function_name):
            raise SettingsError(
                f"cannot be imported: {getattr(module, '__file__', '') or module_name} has no {function_name}"
            )
        self._function = getattr(module, function_name)
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

    def deliver(self, document: OrderDocument, context: Context) -> None:
        """Deliver a revision; raises what the function raises, also Retry and Reject.

        An async function runs on one event loop for all deliveries of this process. After another exception, which may
        be RQ's time limit in the middle of the loop, the loop is closed, and the next delivery gets a new one.
        """
        result = self._function(document.order, context)
        if not inspect.isawaitable(result):
            return
        from asyncio import Runner  # here: most sinks are not async, and it takes 2 MB of each worker

        self._runner = self._runner or Runner()
        try:
            self._runner.run(_finished(result), context=copy_context())
        except (Retry, Reject):
            raise
        except BaseException:
            runner, self._runner = self._runner, None
            runner.close()
            raise


def _entry_point(name: str) -> str:
    """Return module:function of the entry point; raises SettingsError unless one installed package has it."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise SettingsError(FORMS)
    offered = entry_points(group=ENTRY_POINTS)
    found = [one for one in offered if one.name == name]
    if not found:
        names = ", ".join(sorted({one.name for one in offered})) or "none"
        raise SettingsError(f"is no sink of an installed package; these have: {names}")
    if len(found) > 1:
        packages = " and ".join(sorted(one.dist.name for one in found if one.dist))
        raise SettingsError(f"is a sink of several installed packages, {packages}: keep one of them")
    return found[0].value


async def _finished(result: Awaitable[object]) -> None:
    await result


def _searched() -> str:
    """Return in words where modules are searched: the folders of PYTHONPATH and others that are not Python's own."""
    pythons = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
    folders = [one or os.getcwd() for one in sys.path if not one.startswith(pythons) and not one.endswith(".zip")]
    return f"{', '.join((*dict.fromkeys(folders), 'the installed packages'))} (PYTHONPATH adds folders)"
