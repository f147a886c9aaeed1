"""Take the documentation's pictures of the report, light and dark.

Usage: python docs/make_screenshots.py HISTORY, where HISTORY is what the study saved of its sigmoid
network. Needs playwright and Chromium.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import gradstat

IMAGES = Path(__file__).parent / "images"
SIZE = {"width": 1360, "height": 1000}
COLORS = 256


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_path = Path(folder) / "report.html"
        gradstat.History.load(path).report(page_path, title="Sigmoid network")
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for scheme, name in (("light", "report"), ("dark", "report_dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)
            page.goto(page_path.as_uri())
            drawn = page.locator("#detail-distribution canvas").first
            drawn.hover(position={"x": 190, "y": 70})
            with Image.open(io.BytesIO(page.screenshot())) as image:
                small = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
                small.save(IMAGES / f"{name}.png", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
