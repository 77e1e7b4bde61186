"""The sink `python:package.module:function`: the user's own function, called with the order and a Context."""

from __future__ import annotations

from importlib import import_module

from app.errors import SettingsError
from app.upstream.order import Order
from workers.sinks.protocol import Context


class PythonSink:
    """Calls a function by its dotted path; the path is resolved once, when the worker starts."""

    def __init__(self, target: str) -> None:
        module_name, _, function_name = target.partition(":")
        try:
            self._function = getattr(import_module(module_name), function_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingsError(f"SINKS: python:{target} cannot be imported ({type(error).__name__})") from error
        if not callable(self._function):
            raise SettingsError(f"SINKS: python:{target} is not callable")

    def deliver(self, order: Order, context: Context) -> None:
        self._function(order, context)
