"""The runbook of each alert, /runbook/<section>: that section of docs/operations.md, which is in the wheel."""

from __future__ import annotations

import re
from collections.abc import Collection
from http import HTTPStatus
from importlib.resources import files
from typing import Final, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from starlette.responses import Response

from app.ops.access import Refused
from app.ops.app import Screen, Visit
from app.ops.pages import Pages

_SECTION: Final = re.compile(r'^<a id="([^"]+)"></a>\n### ([^\n]+)\n(.*?)(?=^<a id=|^## |\Z)', re.DOTALL | re.MULTILINE)


class Section(NamedTuple):
    title: str
    html: Markup


class Runbook:
    """The screen `/runbook/<section>`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        text = files("app.ops").joinpath("operations.md").read_text(encoding="utf-8")
        found = {name: (title, body) for name, title, body in _SECTION.findall(text)}
        self._sections = {name: Section(title, _rendered(body, found.keys())) for name, (title, body) in found.items()}

    def screens(self) -> list[Screen]:
        return [Screen("/runbook/{section}", self.show)]

    def show(self, visit: Visit) -> Response:
        """Return the page of a section; raises Refused (404) if there is none."""
        section = self._sections.get(visit.path["section"])
        if section is None:
            raise Refused(HTTPStatus.NOT_FOUND, "not_found", "Not found", "The runbook has no such section.")
        return self._pages.page("runbook.html", visit.user, visit.here, section=section)


def _rendered(text: str, sections: Collection[str]) -> Markup:
    """Return markdown as HTML; a link to another section goes to its page, one to another file stays its text."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for block in tokens:
        block.children = [*_linked(block.children or [], sections)] if block.type == "inline" else block.children
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))  # noqa: S704  # our own file


def _linked(tokens: list[Token], sections: Collection[str]) -> list[Token]:
    kept, is_shown = [], True
    for token in tokens:
        if token.type == "link_open":
            target = str(token.attrs["href"]).removeprefix("#")
            is_shown = target in sections
            token.attrs = {"href": f"/runbook/{target}"}
        if is_shown or not token.type.startswith("link_"):
            kept.append(token)
    return kept
