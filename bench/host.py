"""What the Triton engine costs the host, with the launches themselves left out.

A call for a list of tensors, and a watched backward pass, from the first hook to the filed record.

Usage: python bench/host.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the engine takes CPU tensors

import torch
from torch import nn

import gradstat
from gradstat.bins import Bins, LinearBins
from gradstat.engines import triton as triton_engine

TENSORS = (4, 16, 64, 148, 300)
ROUNDS = 1000


class NoLaunch:
    """A kernel that does nothing, as compiled once it was launched."""

    packed_metadata = ()

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: self


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


def pass_microseconds(layers: int, bins: Bins) -> float:
    """What a watched backward pass takes longer than a bare one, least of the rounds of each."""
    times = {}
    for is_watched in (False, True):
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)])
        watch = gradstat.watch(model, bins, engine="triton", capacity=2) if is_watched else None
        found = []
        for _ in range(ROUNDS // 5):
            loss = model(torch.ones(1, 16)).sum()
            start = time.perf_counter()
            loss.backward()
            found.append(time.perf_counter() - start)
            model.zero_grad(set_to_none=False)  # a GPU gives the same memory again
        times[is_watched] = min(found)
        if watch is not None:
            watch.close()
    return 1e6 * (times[True] - times[False])


def main() -> None:
    torch.set_num_threads(1)
    for name in ("measure_kernel", "finish_kernel", "histogram_kernel"):
        setattr(triton_engine, name, NoLaunch(name))
    # A CPU tensor's counts are zeroed by the host, a GPU's are not: few bins, so that it is small.
    bins = LinearBins(64, -1.0, 1.0)
    times = {tensors: microseconds(tensors, bins) for tensors in TENSORS}
    for tensors, time_ in times.items():
        print(f"{tensors:4} tensors: {time_:6.1f} us a call")
    first, last = TENSORS[0], TENSORS[-1]
    print(f"{(times[last] - times[first]) / (last - first):.2f} us a tensor")
    for layers in (4, 148):
        print(f"{layers:4} layers: {pass_microseconds(layers, bins):6.1f} us a watched pass")


if __name__ == "__main__":
    main()
