"""The report's page in a browser: where to point, and what it shows there."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from playwright.sync_api import Page

MAP = "#map-plot canvas >> nth=0"
DISTRIBUTION = "#detail-distribution canvas >> nth=0"

Open: TypeAlias = "Callable[..., Page]"


def place(page: Page, canvas: str, x: float, y: float) -> dict[str, float]:
    """A place in a canvas, from 0 to 1."""
    box = page.locator(canvas).bounding_box()
    return {"x": x * box["width"], "y": y * box["height"]}


def hover(page: Page, canvas: str, x: float, y: float) -> str:
    """What the tip says over a place in a canvas."""
    page.locator(canvas).hover(position=place(page, canvas, x, y))
    assert page.locator("#tip").is_visible()
    return page.locator("#tip").inner_text()


def pixels(page: Page, canvas: str) -> np.ndarray:
    """What is drawn in a canvas: ``(height, width, 4)``, 0 to 255."""
    read = """(c) => {
        const copy = new OffscreenCanvas(c.width, c.height);
        const context = copy.getContext("2d", { willReadFrequently: true });
        context.drawImage(c, 0, 0);
        const values = context.getImageData(0, 0, c.width, c.height).data;
        let text = "";
        for (let at = 0; at < values.length; at += 1 << 14)
            text += String.fromCharCode(...values.subarray(at, at + (1 << 14)));
        return [c.height, c.width, btoa(text)]; }"""  # a million numbers would take it seconds
    height, width, text = page.locator(canvas).evaluate(read)
    values = np.frombuffer(base64.b64decode(text), np.uint8)
    return values.astype(int).reshape(height, width, 4)


def written_in(page: Page, plot: str) -> list[str]:
    """The texts that are drawn in a plot's canvases, in their order."""
    return page.evaluate(
        """(plot) => {
        const kept = [];
        const real = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
          if (this.canvas.closest(plot)) kept.push(text);
          real.call(this, text, ...rest);
        };
        dispatchEvent(new Event("resize"));
        // The page draws in the next frame, however late that comes; the one after it is ours.
        return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
          CanvasRenderingContext2D.prototype.fillText = real;
          done(kept);
        }))); }""",
        plot,
    )


def detail(page: Page) -> str:
    return page.locator("#detail-name").inner_text()


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until a page shows it, however busy the machine."""
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def written(x: float) -> str:
    """A number as the page writes it."""
    text = f"{x:#.3g}" if 1e-3 <= x < 1e4 else f"{x:.2e}"
    return text.replace("e-0", "e-").replace("-", "\u2212")
