"""The sink `python:package.module:function`: the user's own function, called with the order and a Context."""

from __future__ import annotations

from importlib import import_module

from app.errors import SettingsError
from app.upstream.models import Order
from workers.sinks.protocol import Context


class PythonSink:
    """Calls a function by its dotted path; the path is resolved once, when the worker starts."""

    def __init__(self, target: str) -> None:
        """Import the function; raises SettingsError if it cannot be used."""
        module_name, _, function_name = target.partition(":")
        if not module_name or not function_name:
            raise SettingsError("is not of the form python:package.module:function")
        try:
            self._function = getattr(import_module(module_name), function_name)
        except Exception as error:
            # Importing the user's module may raise anything.
            raise SettingsError(f"cannot be imported ({type(error).__name__})") from error
        if not callable(self._function):
            raise SettingsError("is not callable")

    def deliver(self, order: Order, context: Context) -> None:
        self._function(order, context)
