"""The pages as HTML: the templates, what they may use, and the headers of every answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import Response

from app import times
from app.ops.access import User
from app.texts import printable

HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-store",
}
"""Of every answer, errors too. Pages are kept nowhere: they hold orders of people."""

FOR_EVER: Final = {"cache-control": "public, max-age=31536000, immutable"}
"""Of a static file, whose address changes with its content."""

_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Pages:
    """Renders the templates of this package, which are compiled once, here; whatever they are given is escaped."""

    def __init__(self) -> None:
        self._static = {file.name: file.read_bytes() for file in files("app.ops").joinpath("static").iterdir()}
        self._tags = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in self._static.items()}
        env = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_shown,
            loader=PackageLoader("app.ops"),
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        env.globals |= {"static": self._address, "version": version("ota-receiver")}
        env.filters |= {
            "time": _time,
            "clock": _clock,
            "hour": _hour,
            "age": _age,
            "span": times.span,
            "number": _number,
        }
        self._templates = {name: env.get_template(name) for name in env.list_templates(["html"])}

    def page(
        self,
        template: str,
        user: User | None,
        here: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **values: Any,
    ) -> Response:
        """Return a page: `template` with these values.

        `user`: who reads, None if unknown. `here`: path and query of the page, which parts of it ask for again.
        """
        common = {"user": user, "here": here, "read_at": times.now()}
        text = self._templates[template].render(common | values)
        return Response(text, status, dict(headers or {}), "text/html")

    def file(self, name: str) -> Response | None:
        """Return a static file, None if there is no such one."""
        content, kind = self._static.get(name), _TYPES.get(name.rpartition(".")[2])
        return None if content is None or kind is None else Response(content, 200, FOR_EVER, kind)

    def _address(self, name: str) -> str:
        return f"/static/{name}?v={self._tags[name]}"


def _shown(value: object) -> object:
    """Return what a template writes: in texts from outside no control code, and nothing that turns the writing."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _moment(at: datetime | int) -> datetime:
    return (times.from_ms(at) if isinstance(at, int) else at).astimezone(UTC)


def _time(at: datetime | int) -> Markup:
    """Return an aware time, or one in ms since 1970, in UTC, without the year if it is this year."""
    moment = _moment(at)
    shown = moment.strftime("%m-%d %H:%M:%S" if moment.year == times.now().year else "%Y-%m-%d %H:%M")
    return Markup('<time datetime="{}">{}</time>').format(moment.strftime("%Y-%m-%dT%H:%M:%SZ"), shown)


def _clock(at: datetime | int) -> Markup:
    """Return the time of the day, in UTC."""
    moment = _moment(at)
    return Markup('<time datetime="{}">{}</time>').format(moment.strftime("%Y-%m-%dT%H:%M:%SZ"), f"{moment:%H:%M:%S}")


def _hour(at: datetime | int) -> str:
    """Return the day and hour, in UTC: `11-27 21:00`."""
    return f"{_moment(at):%m-%d %H:00}"


def _age(seconds: float) -> str:
    """Return a duration in seconds in its largest unit: `3 d`, `5 h`, `12 min`, `8 s`."""
    return times.age(timedelta(seconds=seconds))


def _number(figure: int) -> str:
    """Return a number as people read it: `1,234,567`."""
    return f"{figure:,}"
