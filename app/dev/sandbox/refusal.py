"""What is not done, and in which words: the Channel Manager's error codes and texts."""

from __future__ import annotations


class Refusal(Exception):
    """A call is answered with an error status.

    With a `code` the body is `{"code", "message"}`, as AL and the gateway write it; without one it is plain text, as
    what stands before the gateway answers.
    """

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def bad_request(message: str) -> Refusal:
    """Return the 400 that AL answers to everything it does not like, its own errors included."""
    return Refusal(400, "generic_error", message)


def not_found(what: str) -> Refusal:
    """Return the 404 of AL; it adds its own words to those it is given."""
    return Refusal(404, "resource_not_found", f"{what} Not Found")


def no_order(order_id: str) -> Refusal:
    """Return the 404 of an order; AL prints a GUID in braces and upper case."""
    return not_found(f"Order '{{{order_id.upper()}}}' not found")
