"""Debian's Chromium as a person uses it: each tab notes what a page must not do, axe judges it, and it is pictured.

While a browser runs, this thread has an event loop, so `asyncio.run` fails in it: use `beside` for steps of a Lab.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, ParamSpec, TypeVar

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.ops_site import ACT, WHO, OpsSite
from tests.programs import program

P = ParamSpec("P")
T = TypeVar("T")

Scheme = Literal["light", "dark"]

PICTURES: Final = Path(os.environ.get("OPS_PICTURES") or Path(__file__).parent / "artefacts")
"""Where pictures of the pages are put, for people."""

WIDEST, WIDE, NARROW = 2560, 1280, 360
WITHIN_MS: Final = 10_000

_OPTIONS: Final = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Its sandbox does not run as root, as which CI runs.
    "--no-sandbox",
)
_AXE: Final = files("axe_playwright_python").joinpath("axe.min.js")
_REPORT_CSP: Final = """
document.addEventListener("securitypolicyviolation",
  (event) => console.error(`CSP: ${event.effectiveDirective} ${event.blockedURI}`));
"""
_AXE_RUN: Final = """
async () => (await axe.run({resultTypes: ["violations"]})).violations.flatMap(
  (one) => one.nodes.map((node) => `${one.id}: ${node.target.join(" ")}: ${node.any.map((why) => why.message).join()}`))
"""


class Tab:
    """One tab of a user. `problems`: messages of the console, reports of the CSP, errors of scripts, lost requests."""

    def __init__(self, page: Page, site: OpsSite) -> None:
        self.page = page
        self.problems: list[str] = []
        self._site = site
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("requestfailed", self._note_lost)

    def open(self, path: str, status: int = 200) -> Page:
        """Open a page of the site, which must answer with this status; return once it is loaded."""
        answer = self.page.goto(self._site.url + path)
        assert answer is not None
        assert answer.status == status, path
        if status >= 400:
            self.forget(f"status of {status}")
        return self.page

    def tick(self) -> None:
        """Let the page ask for what is new, as it does every 5 s while it is visible."""
        self.page.evaluate("document.body.dispatchEvent(new CustomEvent('ops:tick'))")

    def forget(self, *texts: str) -> None:
        """Leave out the problems that contain each of these texts: there must be one at least."""
        kept = [one for one in self.problems if not any(text in one for text in texts)]
        assert len(kept) < len(self.problems), f"none has {texts}: {self.problems}"
        self.problems = kept

    def resize(self, width: int, scheme: Scheme) -> None:
        """Show the page so wide and with this preference."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme)

    def violations(self) -> list[str]:
        """Return what axe finds wrong with the page as it is shown now."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(_AXE.read_text(encoding="utf-8"))
        found: list[str] = self.page.evaluate(_AXE_RUN)
        return found

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def picture(self, name: str) -> None:
        """Print the whole page as PICTURES/name.png."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png", full_page=True)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.problems.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def _note_lost(self, request: Request) -> None:
        # A page that is left ends its own requests.
        if request.failure != "net::ERR_ABORTED":
            self.problems.append(f"lost: {request.url}: {request.failure}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run one browser until the block ends."""
    path = program("chromium", "chromium")
    expect.set_options(timeout=WITHIN_MS)
    with sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=[*_OPTIONS]) as browser:
        yield browser


@contextmanager
def tab_of(
    browser: Browser, site: OpsSite, *, password: str = ACT, width: int = WIDE, javascript: bool = True
) -> Iterator[Tab]:
    """Open a tab of a user with this password; at its end nothing may have gone wrong that no test has looked at."""
    context = browser.new_context(
        http_credentials={"username": WHO, "password": password},
        java_script_enabled=javascript,
        viewport={"width": width, "height": 900},
        reduced_motion="reduce",
    )
    context.set_default_timeout(WITHIN_MS)
    context.add_init_script(_REPORT_CSP)
    try:
        tab = Tab(context.new_page(), site)
        yield tab
        assert tab.problems == []
    finally:
        context.close()


def beside(do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `do` returns, called in a thread that has no event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(do, *args, **kwargs).result()
