"""Where the time of a call on small tensors goes, alone and in a training loop.

Functions are wrapped in clocks: 0.3 µs each, which the times of those that call them include.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from report import table, where
from shapes import MLP
from training import Run, WithGradstat, build_mlp, seconds_per_step

import gradstat
from gradstat.engines import cpu
from gradstat.recording import gradients, passes, transfers

CALLS, STEPS = 3000, 2000

# Functions by what they do; each is inside one further up.
CALL: list[tuple[Any, str, str]] = [
    (gradstat, "statistics", "`gradstat.statistics` of four weight gradients"),
    (cpu, "measure", "of it, the engine"),
    (cpu.Plan, "__init__", "of the engine, the work table"),
    (cpu.Plan, "measure", "of the engine, reading addresses and the compiled work"),
]
WATCH: list[tuple[Any, str, str]] = [
    (gradients.BackwardHooks, "_begin", "of the first hook, the beginning of a pass"),
    (gradients.BackwardHooks, "_on_end", "end of backward"),
    (passes.Recorder, "measure_waiting", "of it, all that is measured"),
    (cpu.Plan, "run", "of that, the engine"),
    (cpu._Table, "run", "of the engine, the compiled work"),
    (transfers.Delivery, "add", "of the end, the record into the history"),
]


class Clocks:
    """Replaces functions by timed ones."""

    def __init__(self, functions: list[tuple[Any, str, str]]) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
        for (owner, name, function), (_, _, label) in zip(self._originals, functions, strict=True):
            setattr(owner, name, self._timed(function, self.seconds[label]))

    def remove(self) -> None:
        for owner, name, function in self._originals:
            setattr(owner, name, function)

    def per_round(self, rounds: int) -> dict[str, float]:
        """Median of a call, times its calls a round."""
        return {
            label: statistics.median(seconds) * round(len(seconds) / rounds)
            for label, seconds in self.seconds.items()
            if seconds
        }

    @staticmethod
    def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds.append(time.perf_counter() - start)
            return result

        return timed


def break_call_down() -> dict[str, float]:
    tensors = [torch.randn(shape) for shape in MLP]
    gradstat.statistics(tensors)
    clocks = Clocks(CALL)
    for _ in range(CALLS):
        gradstat.statistics(tensors)
    clocks.remove()
    return clocks.per_round(CALLS)


def break_watch_down() -> dict[str, float]:
    bare = Run(build_mlp)
    step = statistics.median(seconds_per_step(bare, 10) for _ in range(STEPS // 10))
    clocks = Clocks(WATCH)
    watched = WithGradstat(build_mlp)
    for _ in range(STEPS):
        watched()
    clocks.remove()
    return {"a step without it": step, **clocks.per_round(STEPS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    path = parser.parse_args().markdown
    sections = [
        ("In a loop of nothing else", break_call_down()),
        ("In the MLP's training loop, with `gradstat.watch`", break_watch_down()),
    ]
    lines = ["# Where the time of a call on small tensors goes", ""]
    for title, seconds in sections:
        rows = [[label, f"{1e6 * s:.1f}"] for label, s in seconds.items()]
        lines += [table([title, "µs"], rows), ""]
    lines.append(where(describe(["torch", "numba", "numpy"])))
    text = "\n".join(lines)
    print(text)
    if path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
