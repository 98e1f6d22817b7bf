"""Pages in headless Chromium, as a person has them: what is asked for and complained of is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(__file__).parents[1] / ".axe/package/axe.min.js"


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the tests of pages need playwright")
    if BROWSER is None:
        pytest.skip("the tests of pages need Debian's chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Browsing:
    """A page that is open, and what it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, width: int, hash: str = "", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        own = file.as_uri()
        self.page.on("request", lambda request: self._ask(request.url, own))
        self.page.goto(f"{own}{hash}")
        self.page.wait_for_selector("html[data-ready]")

    def _ask(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.complaints.append(f"asked for {url}")

    def text(self, where: str) -> str:
        return str(self.page.locator(where).inner_text())

    def until(self, expression: str, seconds: float = 5.0) -> None:
        """Wait for an expression to be true; Playwright's own way needs a policy that allows eval."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            self.page.wait_for_timeout(20)

    def downloaded(self, button: str) -> bytes:
        """Press a button and return the file that it saves; `name` is what the file is called."""
        with self.page.expect_download() as waiting:
            self.page.locator(button).click()
        self.name = waiting.value.suggested_filename
        return Path(waiting.value.path()).read_bytes()

    def violations(self) -> list[Any]:
        """What axe-core finds; the page must have been opened with `bypass_csp=True`."""
        if not AXE.exists():
            pytest.skip("axe-core is not there: make .axe/package/axe.min.js (needs npm)")
        self.page.add_script_tag(content=AXE.read_text())
        found = self.page.evaluate("axe.run().then((result) => result.violations)")
        return [(one["id"], one["impact"], [node["html"] for node in one["nodes"]]) for one in found]

    def spills(self) -> int:
        """How many pixels the page is wider than the window."""
        found: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return found
