"""A plot per suite of the results, beside its JSON."""

from __future__ import annotations

import argparse
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from report import SCHEMES, Document, load

from gradstat.plot.panels import INK, style_frame

COLORS = {
    "gradstat log2": "#0072B2",
    "gradstat linear": "#56B4E9",
    "gradstat.watch": "#0072B2",
    "gradstat.watch, every kind": "#56B4E9",
    "torch composite": "#D55E00",
    "torch.histc": "#E69F00",
    "torch.histogram": "#c9a227",
    "numpy.histogram": "#009E73",
    "fast-histogram": "#CC79A7",
    "boost-histogram": "#7b5ea7",
    "plain read (torch.sum)": "#999999",
    "wandb.watch": "#E69F00",
    "TensorBoard add_histogram": "#D55E00",
}


def plot_tensors(document: Document) -> Figure:
    """Bandwidth by size, dtype and distribution."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    suites = ("sizes", "dtypes", "distributions")
    rows = [row for row in document["benchmarks"] if row.get("suite") in suites]
    names = _shown(rows)
    style_frame(left, 9)
    for name in names:
        mine = [row for row in rows if row["contestant"] == name and row["suite"] == "sizes"]
        mine.sort(key=lambda row: float(row["elements"]))
        x = [row["elements"] for row in mine]
        y = [row["bytes"] / row["median"] / 1e9 for row in mine]
        wide = 2.5 if name in SCHEMES else 1.2
        left.loglog(x, y, "o-", base=2, color=COLORS[name], linewidth=wide, markersize=4)
    left.set_yscale("log", base=10)
    _label(left, "float32 values", "GB/s", "by size, Gaussian")
    for axes, suite, key in ((middle, "dtypes", "dtype"), (right, "distributions", "distribution")):
        large = [
            row
            for row in rows
            if row["suite"] == suite or row["group"].startswith("16 M float32 G")
        ]
        kinds = list(dict.fromkeys(row[key] for row in large))
        values = {
            name: [
                row["elements"] / row["median"] / 1e9
                for kind in kinds
                for row in large
                if row["contestant"] == name and row[key] == kind
            ]
            for name in names
        }
        _points(axes, kinds, values)
        _label(axes, key, "10⁹ values a second", "16 M values")
    _key(figure, names)
    return figure


def plot_lists(document: Document) -> Figure:
    """Time of all gradients of a model."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    rows = [row for row in document["benchmarks"] if not row["contestant"].startswith("engine")]
    models = list(dict.fromkeys(row["group"] for row in rows))
    names = [*SCHEMES, "torch composite"]
    _points(
        axes,
        models,
        {
            name: [
                r["median"] * 1e3
                for m in models
                for r in rows
                if (r["group"], r["contestant"]) == (m, name)
            ]
            for name in names
        },
    )
    _label(axes, "", "ms", "all gradients of a model, in one call")
    _key(figure, names)
    return figure


def plot_training(document: Document) -> Figure:
    """Time of a step, of the bare loop's."""
    rows = document["benchmarks"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    ways = [way for way in _shown(rows, "way") if way in COLORS]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    _points(
        axes,
        networks,
        {
            way: [
                r["ratio"] for n in networks for r in rows if (r["network"], r["way"]) == (n, way)
            ]
            for way in ways
        },
    )
    axes.axhline(1, color=INK, linewidth=0.8)
    _label(axes, "", "time of a step ÷ that of the bare loop", "training, measured at every step")
    _key(figure, ways)
    return figure


def _shown(rows: list[dict[str, Any]], key: str = "contestant") -> list[str]:
    """Names in the order of the rows, without those that only we compare with."""
    names = dict.fromkeys(row[key] for row in rows)
    return [name for name in names if not name.startswith("prototype")]


def _points(axes: Axes, kinds: list[str], values: dict[str, list[float]]) -> None:
    """A point for each name and kind, on a log axis: a bar would begin nowhere."""
    style_frame(axes, 9)
    width = 0.6 / len(values)
    for rank, (name, heights) in enumerate(values.items()):
        at = [k + (rank - (len(values) - 1) / 2) * width for k in range(len(heights))]
        axes.plot(at, heights, "o", color=COLORS[name], markersize=7 if name in SCHEMES else 5.5)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.grid(visible=False, axis="x")
    low, high = (edge(map(edge, values.values())) for edge in (min, max))
    # Numbers that are read as they are, at each decade or, of less than two of these, between them.
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    digits = (1,) if high > 100 * low else (1, 2, 5)
    ticks = [digit * 10.0**power for power in decades for digit in digits]
    axes.set_ylim(low / 1.4, high * 1.4)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low / 1.4, high * 1.4)


def _label(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK)


def _key(figure: Figure, names: list[str]) -> None:
    marks = [Line2D([], [], color=COLORS[name], marker="o", linestyle="") for name in names]
    figure.legend(
        marks, names, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK
    )


PLOTS = {"tensors": plot_tensors, "lists": plot_lists, "training": plot_training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the JSON files are")
    folder = parser.parse_args().folder
    for suite, plot in PLOTS.items():
        document = load(folder, suite)
        if document:
            plot(document).savefig(folder / f"{suite}.png", dpi=110)


if __name__ == "__main__":
    main()
