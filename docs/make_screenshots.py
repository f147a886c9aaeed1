"""Take the documentation's pictures of the report, light, dark and narrow, and of the live page.

Usage: python docs/make_screenshots.py HISTORY, where HISTORY is what the study saved of its sigmoid
network. Needs playwright and Chromium.
"""

import io
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import gradstat
from gradstat.cli.server import RunList, Server
from gradstat.history.journal import Journal

IMAGES = Path(__file__).parent / "images"
WIDE, NARROW = {"width": 1360, "height": 1000}, {"width": 390, "height": 1100}
COLORS = 256
LIVE_RECORDS = 1200


def save(page: Page, name: str) -> None:
    with Image.open(io.BytesIO(page.screenshot())) as image:
        # With those colours that differ most: a scale keeps its ends, and red stays red.
        method = Image.Quantize.MAXCOVERAGE
        small = image.convert("RGB").quantize(COLORS, method=method, dither=Image.Dither.NONE)
        small.save(IMAGES / f"{name}.png", optimize=True)


def take_report(browser: Browser, history: gradstat.History, folder: Path) -> None:
    path = folder / "report.html"
    history.report(path, title="Sigmoid network")
    for scheme, name, size in (
        ("light", "report", WIDE),
        ("dark", "report_dark", WIDE),
        ("light", "report_narrow", NARROW),
    ):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(path.as_uri())
        if size == NARROW:
            page.locator("#map").evaluate("(e) => e.scrollIntoView()")
        save(page, name)


def write(journal: Journal, history: gradstat.History, start: int, stop: int) -> None:
    for step in history.steps[start:stop].tolist():
        journal.add(history.packed(history.find(step)))
    journal.flush()


def take_live(browser: Browser, history: gradstat.History, folder: Path) -> None:
    journal = Journal(folder / "sigmoid", gradstat.History(history.rows, history.bins))
    write(journal, history, 0, LIVE_RECORDS - 200)
    with Server(RunList([folder / "sigmoid"]), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport=WIDE)
        page.goto(server.address)
        page.wait_for_selector(".finding")
        page.locator("#rows tr").nth(1).click()
        page.mouse.move(0, 0)  # no tip stays over the table
        write(journal, history, LIVE_RECORDS - 200, LIVE_RECORDS)
        page.locator("#live", has_text=f"step {LIVE_RECORDS - 1:,},").wait_for()
        save(page, "live")
        server.shutdown()


def main(path: Path) -> None:
    history = gradstat.History.load(path)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        take_report(browser, history, Path(folder))
        take_live(browser, history, Path(folder))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
