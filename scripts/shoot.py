"""Take a picture of a page of results in headless Chromium: `python scripts/shoot.py report.html report.png`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """Open the page, choose a mark of its plot if one is named, and write a PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--height", type=int, help="of the part that is shown (all of it)")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--choose", type=int, metavar="ROW", help="point at the mark of this row, counted from 0")
    given = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": given.width, "height": given.height or 900}
        page = browser.new_page(viewport=size, color_scheme="dark" if given.dark else "light")
        page.on("console", lambda message: print(f"console: {message.text}"))
        page.on("pageerror", lambda error: print(f"error: {error}"))
        page.goto(given.page.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        if given.choose is not None:
            spot = next(one for one in page.evaluate("results.spots()") if one["i"] == given.choose)
            page.locator("#chart").hover(position={"x": spot["x"], "y": spot["y"]})
        page.screenshot(path=given.out, full_page=given.height is None)
        browser.close()


if __name__ == "__main__":
    main()
