"""A real browser for tests of HTML: found on this machine, driven through Playwright, and given nothing but files.

`python -m tests.browser` says which browser the tests use and whether it starts; `make browser` installs one if there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from playwright.sync_api import ConsoleMessage, Page, Request, Route, ViewportSize, sync_playwright

VARIABLE = "PCD_BROWSER"
"""Environment variable that names the browser's program; it is then the only one considered."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LOCAL = ("file:", "data:", "blob:", "about:")
"""Addresses that are no network."""
PATIENCE = 10_000
"""Milliseconds that Playwright waits for anything before it fails."""


class BrowserError(RuntimeError):
    """There is no browser that starts: a failed test, never one left out."""


@dataclass
class Watched:
    """A page and everything that went wrong on it, in order: texts of errors, addresses of requests."""

    page: Page
    console: list[str] = field(default_factory=list)
    """Errors and warnings the page wrote to the console."""
    errors: list[str] = field(default_factory=list)
    """Exceptions that no script caught."""
    network: list[str] = field(default_factory=list)
    """Requests that were not for a file; none of them was let through."""
    failed: list[str] = field(default_factory=list)
    """Requests that got no answer, those of `network` included."""

    def open(self, path: Path) -> Page:
        """Load a file and wait until everything it refers to is there."""
        self.page.goto(path.resolve().as_uri(), wait_until="load")
        return self.page

    @property
    def complaints(self) -> list[str]:
        """All of it, a line each with its kind; a page without fault has none."""
        kinds = {"console": self.console, "error": self.errors, "network": self.network, "failed": self.failed}
        return [f"{kind}: {text}" for kind, texts in kinds.items() for text in texts]

    def watch(self) -> None:
        """Begin to write down what goes wrong, and to refuse whatever is not a file."""
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("requestfailed", lambda request: self.failed.append(request.url))
        self.page.route(lambda url: not url.startswith(LOCAL), _refuse)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith(LOCAL):
            self.network.append(request.url)


def _refuse(route: Route) -> None:
    route.abort()


def find_browser() -> Path:
    """The program of a Chromium or Chrome: `PCD_BROWSER`, then the usual names on PATH, then Playwright's own download.

    Raises `BrowserError` if there is none.
    """
    if named := os.environ.get(VARIABLE):
        if found := shutil.which(named):
            return Path(found)
        raise BrowserError(f"{VARIABLE}={named} is not a program; name a Chromium or Chrome there, or unset it.")
    for name in NAMES:
        if found := shutil.which(name):
            return Path(found)
    with sync_playwright() as playwright:
        downloaded = Path(playwright.chromium.executable_path)
    if downloaded.is_file():
        return downloaded
    raise BrowserError(
        f"no browser: neither {', '.join(NAMES)} on PATH nor Playwright's own at {downloaded}. `make browser` installs one; "
        f"{VARIABLE}=PROGRAM names one that is elsewhere."
    )


class Pages(Protocol):
    """`pages(width, height, dark)`: a context with an empty page of that many CSS pixels, in dark or light colours."""

    def __call__(self, width: int = 1200, height: int = 900, dark: bool = False) -> AbstractContextManager[Watched]: ...


@contextmanager
def browsing() -> Iterator[Pages]:
    """One browser for several pages, each with a profile of its own; for a fixture of a whole module.

    The browser, its temporary folder and Playwright's event loop end with it; only one may be open at a time.
    Raises `BrowserError` if there is no browser.
    """
    program = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))

        @contextmanager
        def pages(width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Watched]:
            colours: Literal["dark", "light"] = "dark" if dark else "light"
            size: ViewportSize = {"width": width, "height": height}
            context = browser.new_context(viewport=size, color_scheme=colours, reduced_motion="reduce", accept_downloads=True)
            context.set_default_timeout(PATIENCE)
            watched = Watched(context.new_page())
            watched.watch()
            try:
                yield watched
            finally:
                context.close()

        try:
            yield pages
        finally:
            browser.close()


@contextmanager
def page(width: int = 1200, height: int = 900, dark: bool = False) -> Iterator[Watched]:
    """A browser for one page, see `Pages`."""
    with browsing() as pages, pages(width, height, dark) as watched:
        yield watched


def main() -> int:
    """Print the browser and its version: 0 if it starts, 1 with the reason if not."""
    try:
        program = find_browser()
        told = subprocess.run([program, "--no-sandbox", "--version"], capture_output=True, text=True, check=False, timeout=60)
        if told.returncode:
            raise BrowserError(f"{program} does not start: {told.stderr.strip() or told.returncode}")
    except BrowserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"browser: {program}, {told.stdout.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
