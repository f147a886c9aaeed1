"""How the benchmarks time: each round beside a round of what it is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from machine import describe

SECONDS = 0.8  # for each case, about
ROUNDS = (5, 300)
# torch's threads spin on for a few milliseconds after their work: whoever comes next has a core
# less. Before each call on data that are large enough to be shared out, they are waited for.
PAUSE = 0.01
LONG = 1e-3
PACKAGES = ("gradstat", "torch", "numba", "numpy", "boost-histogram", "fast-histogram")

Call = Callable[[], Any]


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Time a call; before each of its rounds, the calls that it is compared with.

    A ratio is the median over the rounds of (this call) / (the other), each pair a moment apart:
    what else the machine does falls on both.
    """

    def run(call: Call, others: dict[str, Call], **information: Any) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in others}
        pause = 0.0

        def rest() -> None:
            if pause:
                time.sleep(pause)

        def time_others() -> None:
            for name, other in others.items():
                rest()
                seconds[name].append(_seconds(other))
            rest()

        time_others()
        once = _seconds(call) + sum(_seconds(other) for other in others.values())
        if once > LONG:
            pause = PAUSE
            once += PAUSE * (len(others) + 1)
        rounds = min(max(int(SECONDS / once), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(call, setup=time_others, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info.update(information)
        if benchmark.enabled:
            mine = benchmark.stats.stats.data
            benchmark.extra_info["ratios"] = {
                name: statistics.median(a / b for a, b in zip(mine, theirs[-rounds:], strict=True))
                for name, theirs in seconds.items()
            }

    return run


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pytest_benchmark_update_json(benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep what the tables and plots need: machine, versions, commit, medians, ratios."""
    cases = output_json["benchmarks"]
    output_json.clear()
    output_json.update(describe(PACKAGES))
    output_json["benchmarks"] = [
        {
            "name": case["name"],
            "group": case["group"],
            **case["extra_info"],
            **{name: case["stats"][name] for name in ("median", "iqr", "min", "rounds")},
        }
        for case in cases
    ]
