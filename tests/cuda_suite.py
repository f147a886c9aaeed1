"""The tests of CUDA: on a card, or without one on the CUDA device in software of cuda_device/.

That device runs queued work late and in several orders, so that a missing wait shows. Each test
runs under ``lazy`` (oldest work first). Those in which the order of work was ever the device's
choice run under ``reverse`` (newest first) and ``random`` too. The study runs once.

Usage: python tests/cuda_suite.py [pytest's arguments, such as --schedules=lazy,random:1,random:2]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from cuda_device import build

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--on-cuda", "-m", "not slow and not faults"]
ENGINES = ["bit_patterns", "engine_properties", "engines", "format_engines"]
TESTS = [f"tests/engines/test_{name}.py" for name in [*ENGINES, "triton", "triton_streams"]]
TESTS += ["tests/test_ops.py", "tests/test_quantized.py", "tests/recording"]
TESTS += ["tests/examples/test_study_training.py", "tests/cuda_device"]
TESTS += ["tests/bench/test_bench.py::test_gpu_suite_goes_through_in_a_dry_run"]
STUDY = ["examples/relu_vs_sigmoid.py", "--device", "cuda", "--epochs", "1", "--out"]
SCHEDULES = "--schedules=lazy,reverse,random:0"
MOST_PROCESSES = 8  # of some 3 GB each
TIMEOUT_S = 3600  # of a test that hangs


def main(arguments: list[str]) -> int:
    command, environment = [*PYTEST, *TESTS, *arguments], {**os.environ}
    if not torch.cuda.is_available():
        try:
            environment = build.environment("lazy")
        except build.MissingError as e:
            print(f"skipped: there is no CUDA device, and none in software: {e}")
            return 0
        processes = min(os.cpu_count() or 1, MOST_PROCESSES)
        command[3:3] = ["-n", str(processes), "--dist", "worksteal", SCHEDULES]
    with tempfile.TemporaryDirectory() as out:
        study = Run([sys.executable, *STUDY, out], environment, Path(out, "log"))
        codes = [Run(command, environment).ends(), study.ends()]
    return max(codes)


class Run:
    """A command that runs; its output goes to a file, if there is one."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path | None = None):
        self.log, self.start_s = log, time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log.open("w") if log else None,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )

    def ends(self) -> int:
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = f"killed after {TIMEOUT_S} s"
        if self.log:
            lines = self.log.read_text().splitlines()
            print("\n".join(lines[-200:] if code else lines[-1:]))
        print(f"exit {code}, {time.monotonic() - self.start_s:.0f} s", flush=True)
        return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
