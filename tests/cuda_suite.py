"""The tests of CUDA: on a card, or without one on a CUDA device in software.

That device runs what is queued late and in several orders, so that a missing wait shows. All tests
run under ``lazy`` (oldest work first), those in which the order may matter under ``reverse`` too
(newest first), those of streams and graphs also under ``random``, and the study once. Two runs go
side by side.

Usage: python tests/cuda_suite.py [--fakecuda DIR] [-- pytest's arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--on-cuda", "-m", "not slow and not faults"]
# On one stream, on which work has one order.
VALUES = ["bit_patterns", "engine_properties", "engines", "format_engines", "triton"]
VALUES = [f"tests/engines/test_{name}.py" for name in VALUES]
VALUES += ["tests/test_ops.py", "tests/test_quantized.py"]
ALL = ["tests/engines/test_triton_streams.py", "tests/recording"]
ALL += ["tests/examples/test_study_training.py"]
ORDERED = ["tests/engines/test_triton_streams.py", "tests/recording/test_streams.py"]
ORDERED += ["tests/recording/test_gpu.py", "tests/recording/test_cadence.py"]
TIMEOUT_S = 1800  # of a test that hangs
# It was once in some ten runs, by a garbage collection in a thread of its own.
ABORTED = (-6, 134)


class Run(NamedTuple):
    """A command, under a schedule of the device in software where one is named."""

    name: str
    command: list[str]
    schedule: str = ""
    seed: int = 0

    def passes(self, fakecuda: Path | None) -> bool:
        """Run it, once more if the device in software was aborted, and print how it ends."""
        code = self._run(fakecuda)
        if fakecuda is not None and code in ABORTED:
            print(f"{self.name}: the device in software was aborted; once more", flush=True)
            code = self._run(fakecuda)
        return code == 0

    def _run(self, fakecuda: Path | None) -> int | str:
        rig = []
        if fakecuda is not None:
            rig = [sys.executable, str(fakecuda / "run.py"), "--schedule", self.schedule]
            rig += ["--seed", str(self.seed), "--"]
        start_s = time.monotonic()
        with tempfile.TemporaryFile("w+") as log:
            try:
                code = subprocess.run(
                    [*rig, *self.command],
                    cwd=ROOT,
                    env={"OMP_NUM_THREADS": "1", **os.environ},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"nothing after {TIMEOUT_S} s"
            log.seek(0)
            lines = log.read().splitlines()
        taken_s = time.monotonic() - start_s
        last = lines[-1] if lines else ""
        print(f"{self.name}: {last} (exit {code}, {taken_s:.0f} s)", flush=True)
        if code != 0:
            print("\n".join(lines[-200:]), flush=True)
        return code


def runs(is_software: bool, arguments: list[str], out: Path) -> list[Run]:
    study = [sys.executable, "examples/relu_vs_sigmoid.py", "--device", "cuda", "--epochs", "1"]
    study += ["--out", str(out)]
    if not is_software:
        return [Run("all", [*PYTEST, *VALUES, *ALL, *arguments]), Run("study", study)]
    return [
        Run("values, lazy", [*PYTEST, *VALUES, *arguments], "lazy"),
        Run("all but values, lazy", [*PYTEST, *ALL, *arguments], "lazy"),
        Run("all but values, reverse", [*PYTEST, *ALL, *arguments], "reverse"),
        Run("streams and graphs, random 0", [*PYTEST, *ORDERED, *arguments], "random", 0),
        Run("streams and graphs, random 1", [*PYTEST, *ORDERED, *arguments], "random", 1),
        Run("study, lazy", study, "lazy"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fakecuda", type=Path, help="folder of the device in software")
    parser.add_argument("arguments", nargs="*", help="pytest's, as -k or -x")
    options = parser.parse_args()
    is_software = not torch.cuda.is_available()
    if is_software and not (options.fakecuda and (options.fakecuda / "run.py").is_file()):
        print(f"skipped: neither a CUDA device nor one in software, in {options.fakecuda}, is here")
        return 0
    with (
        tempfile.TemporaryDirectory() as out,
        ThreadPoolExecutor(2 if is_software else 1) as pool,
    ):
        todo = runs(is_software, options.arguments, Path(out))
        rig = options.fakecuda.resolve() if is_software else None
        passed = list(pool.map(lambda run: run.passes(rig), todo))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
