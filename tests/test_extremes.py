"""Readers of histories with the smallest and the largest float64, and of those without layers."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows, make_history
from legibility import draw_small

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.bins import FLOAT64_MAX, Bins
from gradstat.cli import commands
from gradstat.plot.data import drawable

SMALLEST = 5e-324
CASES = {
    "large and small": [[1e300, -1e300, 0.0], [SMALLEST, 1e-320]],
    "the largest": [[FLOAT64_MAX] * 5, [-FLOAT64_MAX] * 5, [FLOAT64_MAX, -FLOAT64_MAX]],
    "the largest and the smallest": [[1.7e308] * 5, [SMALLEST] * 5, [1.0, -2.0]],
    "the smallest alone": [[SMALLEST] * 5] * 4,
    "six hundred decades": [[10.0 ** (20 * layer - 320)] * 4 for layer in range(30)],
}


def extreme_history(case: str, bins: Bins) -> History:
    values = [torch.tensor(each, dtype=torch.float64) for each in CASES[case]]
    return make_history(bins, len(values), gradient=lambda step, layer: values[layer])


def newest(history: History, path: Path) -> object:
    return commands.newest("a run", history)


def compare(history: History, path: Path) -> object:
    return commands.comparison({"a": history, "b": history})


def diagnose(history: History, path: Path) -> object:
    numbers = [finding.numbers for finding in history.diagnose()]
    return commands.findings(history.diagnose()) + json.dumps(numbers, allow_nan=False)


def report(history: History, path: Path) -> object:
    return history.report(path / "run.html")


def to_csv(history: History, path: Path) -> object:
    return history.to_csv(path / "run.csv")


def ridge(history: History, path: Path) -> object:
    return draw_small(plot.ridge(history))


def curves(history: History, path: Path) -> object:
    return [draw_small(plot.curves(history, field)) for field in ("mean_abs", "mean")]


def heatmap(history: History, path: Path) -> object:
    return [draw_small(plot.heatmap(history, field)) for field in ("std", "min")]


# Curves and heatmaps of fields do not look at the bins.
READERS = [
    *product((newest, compare, diagnose, report, to_csv, ridge), (Log2Bins(), LinearBins(30))),
    *product((curves, heatmap), (Log2Bins(),)),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("read", "bins"), READERS)
def test_readers_take_the_extremes_of_float64(
    read: Callable[[History, Path], object], case: str, bins: Bins, tmp_path: Path
) -> None:
    # Warnings are errors.
    read(extreme_history(case, bins), tmp_path)


@pytest.mark.parametrize("before", [1.0, 1.7e308, -1.7e308])
def test_diagnose_takes_losses_as_large_as_float64_holds(before: float) -> None:
    history = make_history(Log2Bins(), 1, 60)
    for step in range(60):
        for _ in range(2):  # passes, of which the mean is taken
            history.add_scalar("loss", step, before if step < 40 else 1.7e308)
    spikes = [each for each in history.diagnose() if each.kind == "loss spike"]
    assert [each.steps for each in spikes] == ([(40, 59)] if before < 1e308 else [])


def test_diagnose_counts_decades_that_float64_does_not_hold() -> None:
    found = extreme_history("six hundred decades", Log2Bins()).diagnose()
    slope = next(finding for finding in found if "slope" in finding.numbers)
    assert slope.kind == "vanishing"
    assert slope.numbers["slope"] == pytest.approx(20, rel=0.02)
    assert 0 < slope.numbers["ratio"] < 1e-300


def test_newest_draws_bars_in_proportion_to_the_logarithm() -> None:
    values = [[1e300], [1.0], [1e-300]]
    history = make_history(
        Log2Bins(),
        3,
        gradient=lambda step, layer: torch.tensor(values[layer], dtype=torch.float64),
    )
    bars = [line.count("#") for line in commands.newest("a run", history).splitlines()[3:6]]
    assert bars[0] == 12
    assert bars[1] in (6, 7)
    assert bars[2] == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_drawable_takes_any_numbers(dtype: type) -> None:
    x = np.array([0, 1, 3], dtype=dtype)
    for log in (False, True):
        assert drawable(x, log=log).tolist() == [0.0, 1.0, 3.0]


def test_quantile_of_a_bin_wider_than_float64_holds_is_within_it() -> None:
    x = torch.tensor([-1.7e308, 1.7e308], dtype=torch.float64)
    history = make_history(LinearBins(1), 1, gradient=lambda step, layer: x)
    assert float(history.record().quantile(0.75)[0]) == pytest.approx(0.85e308, rel=1e-6)


def without_layers() -> History:
    history = History([], Log2Bins())
    for step in range(2):
        counts = np.empty((0, 2048), np.int64)
        append_rows(history, step, np.empty((0, 8), np.int64), np.empty((0, 8)), counts)
    return history


@pytest.mark.parametrize("read", [compare, diagnose, newest, report, ridge, curves, heatmap])
def test_readers_refuse_a_history_without_layers(
    read: Callable[[History, Path], object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"needs a History with records; history.* is History\(2"):
        read(without_layers(), tmp_path)


def test_to_csv_of_a_history_without_layers_is_a_table_without_rows(tmp_path: Path) -> None:
    without_layers().to_csv(tmp_path / "run.csv")
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines] == [["step", "kind", "layer"]]
