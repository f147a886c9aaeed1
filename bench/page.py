"""How large the report of a long run is, and how long a browser takes to open it.

Usage: python bench/page.py [--layers 500] [--steps 10000]. Makes up a run of so many layers whose
histograms fill 22 octaves, writes its report and opens it three times in headless Chromium. Needs
playwright and Chromium.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from gradstat import History, Log2Bins
from gradstat.record import Unpacked
from gradstat.results import FLOATS, INTEGERS, PACKED

OCTAVES = 22
NUMEL = 1 << 22
# Milliseconds from the request to the second frame that shows the page.
DRAWN = """() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"""


def make_up(layers: int, steps: int) -> History:
    """A run whose gradients grow with depth and at first with time."""
    rng = np.random.default_rng(0)
    step, depth = np.arange(steps)[:, None], np.arange(layers) / layers
    level = -14 + 4 * depth - 3 * np.exp(-8 * step / steps) + rng.normal(0, 0.6, (steps, layers))
    # The first quarter of each octave below the rms, positive values alone.
    octave = np.rint(level).astype(np.int64)[..., None] - np.arange(OCTAVES)[::-1]
    share = np.exp2(-np.arange(OCTAVES, 0, -1.0))
    counts = np.broadcast_to((NUMEL * share).astype(np.uint32), octave.shape)
    integers = np.zeros((steps, layers, len(INTEGERS)), np.int64)
    integers[..., :2] = counts[0, 0].sum()
    rms, finite = np.exp2(level), integers[..., 1]
    by_name = {"min": rms, "max": 2 * rms, "sum": rms * finite, "std": rms, "l1": rms * finite}
    by_name |= {"l2": rms * np.sqrt(finite), "low": -np.inf, "high": np.inf}
    floats = np.empty((steps, layers, len(FLOATS)))
    for i, name in enumerate(FLOATS):
        floats[..., i] = by_name[name]
    history = History([f"model.layers.{i // 7}.{i % 7}.weight" for i in range(layers)], Log2Bins())
    ends = OCTAVES * np.arange(1, steps * layers + 1)
    bins = 1024 + 4 * (octave + 127)
    formats = np.empty((steps, layers, 0, len(PACKED)))
    numbers = Unpacked(integers, floats, formats, ends, bins.ravel(), counts.ravel())
    for at, data in enumerate(history.layout.pack_all(numbers)):
        history.append(at, data, time_s=float(at))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    history = make_up(options.layers, options.steps)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder) / "report.html"
        start = time.perf_counter()
        history.report(path)
        written = time.perf_counter() - start
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        opened = []
        for _ in range(3):
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            page.goto(path.as_uri())
            opened.append(page.evaluate(DRAWN) / 1000)
            page.close()
        print(
            f"{options.layers} layers x {options.steps} steps: {path.stat().st_size / 1e6:.2f} MB, "
            f"written in {written:.1f} s, opened in {statistics.median(opened):.2f} s "
            f"(Chromium {browser.version})"
        )
        browser.close()


if __name__ == "__main__":
    main()
