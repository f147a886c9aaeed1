"""The benchmarks of a machine with a GPU: first the gate, then the timings.

The gate: ``pytest -m gpu``, and ``compute-sanitizer`` on a small run where it is installed. The
timings: what counts is checked against the reference before it is timed, with the L2 cache flushed
and, up to 16 MB, hot. A JSON, a figure and a table of what was predicted and what was measured,
named after the card, come out: send all three.

A dry run goes through all of it but the gate at tiny sizes, on whatever CUDA device there is, or on
the CPU in Triton's interpreter, and takes no times.

Usage: python bench/gpu_suite.py [--out DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import cards
import triton
from gpu_cases import (
    DISTRIBUTIONS,
    LISTS,
    MODES,
    NETWORKS,
    TIMES,
    TINY,
    Clock,
    Plan,
    time_lists,
    time_tensors,
    time_training,
)
from machine import describe_code

ROOT = Path(__file__).parent.parent
# By contestant, the scheme in `roofline`.
KERNELS_OF = {"gradstat log2": "Log2Bins()", "gradstat linear": "LinearBins(64, ...)"}
SANITIZED = """
import torch, gradstat
x = torch.randn(99999).cuda()
xs = [x, x[1:], x[::3], x.half(), x.bfloat16(), x[:99000].view(300, 330).t(), x[:0]]
for bins in (gradstat.Log2Bins(), gradstat.LinearBins(64, -1.0, 1.0), gradstat.LinearBins(30)):
    print(gradstat.statistics(xs, bins))
"""


def gate() -> list[dict[str, Any]]:
    """Run what must hold before anything is timed.

    Raises:
        SystemExit: one of them fails.
    """
    commands = {"pytest -m gpu": [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]}
    if shutil.which("compute-sanitizer"):
        tool = ["compute-sanitizer", "--error-exitcode", "1"]
        commands["compute-sanitizer"] = [*tool, sys.executable, "-c", SANITIZED]
    passed = []
    for name, command in commands.items():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(f"{name}: {done.stdout.strip().splitlines()[-1:]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        passed.append({"gate": name, "output": done.stdout.strip().splitlines()[-1]})
    return passed


def describe(device: torch.device) -> dict[str, Any]:
    """Card, versions and commit."""
    card: dict[str, Any] = {"name": f"none: {platform.machine()}, interpreted"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = ""
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            driver = done.stdout.strip()
        card = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": driver,
        }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    return {"card": card, "versions": versions, **describe_code()}


def compare(document: dict[str, Any], card: cards.Card | None) -> str:
    """A table of large tensors: the measured share of the memory's nominal speed, the predicted."""
    name = document["card"]["name"]
    if card is None:
        return f"{name}: nothing is predicted for this card (bench/cards.py).\n"
    shares, lists = {}, {}
    if not document["dry_run"]:  # the device in software has no machine code to look at
        import roofline

        shares, lists = roofline.shares(card), roofline.list_times(card)
    lines = [
        f"{name}, predicted as {card.name}. Shares of {card.bytes_per_second / 1e12:.3} TB/s.",
        "",
        "| contestant | dtype | distribution | MB | measured | predicted | roof |",
        "|---|---|---|---|---|---|---|",
    ]
    if document["dry_run"]:
        lines.insert(1, "A dry run: nothing was measured.")
    for row in document["benchmarks"]:
        if row["suite"] != "tensors" or not row["flushed"]:
            continue
        case = row["contestant"], row["dtype"], row["distribution"]
        scheme = KERNELS_OF.get(row["contestant"])
        expected, roof = shares.get((scheme, case[1], DISTRIBUTIONS[case[2]]), (None, ""))
        moved = row["bytes"] * (2 if row["contestant"] == "copy" else 1)
        measured = f"{moved / row['median'] / card.bytes_per_second:.0%}"
        cells = [
            *case,
            f"{row['bytes'] / 2**20:.3g}",
            "" if document["dry_run"] else measured,
            "" if expected is None else f"{expected:.0%}",
            roof,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "All gradients of a model over log2 bins, in microseconds. Predicted is the device's time "
        "alone; short lists wait for the host.",
        "",
        "| list | dtype | measured | predicted |",
        "|---|---|---|---|",
    ]
    for row in document["benchmarks"]:
        if row["suite"] == "lists" and row["contestant"] == "gradstat log2":
            microseconds = ["", ""]
            if not document["dry_run"]:
                seconds = row["median"], lists[row["model"], row["dtype"]]
                microseconds = [f"{each * 1e6:.1f}" for each in seconds]
            lines.append(f"| {' | '.join([row['model'], row['dtype'], *microseconds])} |")
    return "\n".join(lines) + "\n"


def draw(document: dict[str, Any], path: Path) -> None:
    """Input read in a second, against its size, for each dtype."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, dtype in zip(figure.subplots(1, 2, sharey=True), ("float32", "bfloat16"), strict=True):
        rows = [
            row
            for row in document["benchmarks"]
            if row["suite"] == "tensors"
            and (row["dtype"], row["distribution"], row["flushed"]) == (dtype, "Gaussian", True)
        ]
        for name in dict.fromkeys(row["contestant"] for row in rows):
            mine = [row for row in rows if row["contestant"] == name]
            sizes = [row["bytes"] for row in mine]
            ax.loglog(
                sizes,
                [row["bytes"] / row["median"] / 1e9 for row in mine],
                marker=".",
                linewidth=2 if name.startswith("gradstat") else 1,
                label=name,
            )
        ax.set_title(dtype)
        ax.set_xlabel("bytes")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GB/s of input")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    note = ", a dry run without times" if document["dry_run"] else ""
    figure.suptitle(document["card"]["name"] + note)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no times")
    options = parser.parse_args()
    if not options.dry_run and not CUDA:
        print(
            "There is no CUDA device here, so nothing was measured. With one, this runs the tests "
            f"marked gpu, times tensors of {', '.join(f'{n >> 10} KB' for n in Plan().sizes)} in "
            f"float32 and bfloat16 over {', '.join(DISTRIBUTIONS)} values, the gradients of "
            f"{', '.join(LISTS)}, and a training step of {' and of '.join(NETWORKS)}, "
            f"{', '.join(MODES)}, bare and watched.\n"
            "--dry-run goes through all of it on the CPU, at tiny sizes, in Triton's interpreter."
        )
        return 1
    plan = TINY if options.dry_run else Plan()
    clock = Clock(torch.device("cuda" if CUDA else "cpu"), plan)
    document = {
        **describe(clock.device),
        "dry_run": options.dry_run,
        "gate": [] if options.dry_run else gate(),
    }
    rows = document["benchmarks"] = []
    for suite in (time_tensors, time_lists, time_training):
        for row in suite(plan, clock):
            rows.append(row)
            told = {k: v for k, v in row.items() if plan.takes_times or k not in TIMES}
            print(" ".join(f"{key}={value}" for key, value in told.items()), flush=True)
    name = "".join(c if c.isalnum() else "-" for c in document["card"]["name"]).lower()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("dry-run.json" if options.dry_run else f"gpu-{name}.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, path.with_suffix(".png"))
    # The device in software is of an H100's capability.
    card = cards.named("H100" if options.dry_run else document["card"]["name"]) if CUDA else None
    table = compare(document, card)
    path.with_suffix(".md").write_text(table)
    print(f"\n{table}\nResults are in {path}, and beside it a figure and this table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
