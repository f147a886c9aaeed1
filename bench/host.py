"""What a call of the Triton engine costs the host, with the launches themselves left out.

Usage: python bench/host.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the engine takes CPU tensors

import torch

from gradstat.bins import Bins, LinearBins
from gradstat.engines import triton as triton_engine

TENSORS = (4, 16, 64, 148, 300)
ROUNDS = 1000


class NoLaunch:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def microseconds(tensors: int, bins: Bins) -> float:
    """Least of the rounds, in steady state: the table of work items is uploaded already.

    The least, since on a busy machine the others measure its other programs.
    """
    xs = [torch.ones(1000) for _ in range(tensors)]
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        triton_engine.measure(xs, bins)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    triton_engine.measure_kernel = triton_engine.finish_kernel = triton_engine.histogram_kernel = (
        NoLaunch()
    )
    # A CPU tensor's counts are zeroed by the host, a GPU's are not: few bins, so that it is small.
    bins = LinearBins(64, -1.0, 1.0)
    times = {tensors: microseconds(tensors, bins) for tensors in TENSORS}
    for tensors, time_ in times.items():
        print(f"{tensors:4} tensors: {time_:6.1f} us a call")
    first, last = TENSORS[0], TENSORS[-1]
    print(f"{(times[last] - times[first]) / (last - first):.2f} us a tensor")


if __name__ == "__main__":
    main()
