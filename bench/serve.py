"""What `gradstat serve` costs while a long run is written: bytes and time a poll, memory, the page.

Usage: python bench/serve.py [--layers 200] [--steps 10000] [--polls 20]. Makes up a run as
bench/page.py does, serves all of it, opens it in headless Chromium, and then writes a record a
second. Needs playwright and Chromium.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from page import make_up
from playwright.sync_api import sync_playwright

from gradstat import History
from gradstat.history.journal import Journal

BLOCK = 50  # records
# Milliseconds of a page's redrawing, its layout and the next frame.
REDRAW = """() => new Promise((done) => {
    const start = performance.now();
    dispatchEvent(new Event("resize"));
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start))); })"""


def memory_mb(process: int) -> tuple[float, float]:
    """What a process has in memory, and the most that it had."""
    status = Path(f"/proc/{process}/status").read_text()
    now, peak = (
        int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1e3 for name in ("VmRSS", "VmHWM")
    )
    return now, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--polls", type=int, default=20)
    options = parser.parse_args()
    history = make_up(options.layers, options.steps + options.polls)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        journal = Journal(Path(folder) / "run", History(history.layers, history.bins))
        for at, record in enumerate(history.records[: options.steps]):
            journal.add(record)
            if at % BLOCK == BLOCK - 1:
                journal.flush()
        journal.flush()
        command = [sys.executable, "-m", "gradstat", "serve", f"{folder}/run"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            address = server.stdout.readline().strip()
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            start_s = time.perf_counter()
            page.goto(address)
            shown = "() => document.querySelector('#live').innerText.includes('{},')"
            newest = f"{options.steps - 1:,}"
            page.wait_for_function(shown.format(newest), timeout=600_000)
            print(f"all {options.steps} records shown after {time.perf_counter() - start_s:.1f} s")
            page.wait_for_selector(".finding .what", timeout=600_000)
            print(f"findings shown after {time.perf_counter() - start_s:.1f} s")
            version = json.load(urllib.request.urlopen(f"{address}run/0/data"))["version"]
            took, sizes, lags = [], [], []
            for step in range(options.steps, options.steps + options.polls):
                time.sleep(1)
                journal.add(history.records[step]._replace(time_s=float(step)))
                journal.flush()
                start_s = time.perf_counter()
                reply = urllib.request.urlopen(f"{address}run/0/data?since={version}").read()
                took.append(1e3 * (time.perf_counter() - start_s))
                page.wait_for_function(shown.format(f"{step:,}"), timeout=60_000)
                lags.append(time.perf_counter() - start_s)
                version, told = json.loads(reply)["version"], json.loads(reply)
                if told.get("steps"):
                    sizes.append(len(reply) / 1e3)
            page.wait_for_timeout(1500)
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            whole = len(urllib.request.urlopen(f"{address}run/0/data").read()) / 1e6
            now, peak = memory_mb(server.pid)
            redraw = statistics.median(page.evaluate(REDRAW) for _ in range(5))
            print(
                f"{options.layers} layers x {options.steps} steps (Chromium {browser.version})\n"
                f"whole {whole:.1f} MB; a poll {statistics.median(sizes):.0f} kB, "
                f"{statistics.median(took):.0f} ms on the server, at most {max(took):.0f}\n"
                f"a record is shown after {statistics.median(lags):.1f} s, at most "
                f"{max(lags):.1f}\n"
                f"page: {heap:.0f} MB of JavaScript, all of it redrawn in {redraw:.0f} ms\n"
                f"server: {now:.0f} MB, at most {peak:.0f}"
            )
            browser.close()
            server.kill()


if __name__ == "__main__":
    main()
