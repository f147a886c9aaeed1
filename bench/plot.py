"""A plot per suite of the results, beside its JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import SCHEMES, Document, load

COLORS = {
    "gradstat log2": "#08519c",
    "gradstat linear": "#4292c6",
    "prototype log2": "#525252",
    "prototype linear": "#969696",
    "gradstat.watch": "#08519c",
    "gradstat.watch, every kind": "#6baed6",
    "torch composite": "#e6550d",
    "torch.histc": "#fd8d3c",
    "torch.histogram": "#fdbe85",
    "numpy.histogram": "#31a354",
    "fast-histogram": "#756bb1",
    "boost-histogram": "#bcbddc",
    "plain read (torch.sum)": "#bdbdbd",
    "wandb.watch": "#fdbe85",
    "TensorBoard add_histogram": "#e6550d",
}


def plot_tensors(document: Document) -> Figure:
    """Bandwidth by size, dtype and distribution."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    suites = ("sizes", "dtypes", "distributions")
    rows = [row for row in document["benchmarks"] if row.get("suite") in suites]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for name in names:
        mine = [row for row in rows if row["contestant"] == name and row["suite"] == "sizes"]
        mine.sort(key=lambda row: float(row["elements"]))
        x = [row["elements"] for row in mine]
        y = [row["bytes"] / row["median"] / 1e9 for row in mine]
        wide = 2.5 if name in SCHEMES else 1.2
        left.loglog(x, y, "o-", base=2, color=COLORS[name], linewidth=wide, label=name)
    left.set_yscale("log", base=10)
    left.set(xlabel="float32 values", ylabel="GB/s", title="by size, Gaussian")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
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
        _bars(axes, kinds, values)
        axes.set(ylabel="10⁹ values a second", title=f"16 M values, by {key}")
    return figure


def plot_lists(document: Document) -> Figure:
    """Time of all gradients of a model."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows = [row for row in document["benchmarks"] if not row["contestant"].startswith("engine")]
    models = list(dict.fromkeys(row["group"] for row in rows))
    names = [*SCHEMES, "torch composite"]
    _bars(
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
    axes.set(ylabel="ms", title="all gradients of a model, in one call")
    axes.legend(frameon=False)
    return figure


def plot_training(document: Document) -> Figure:
    """Time of a step, of the bare loop's."""
    rows = document["benchmarks"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    _bars(
        axes,
        networks,
        {
            way: [
                r["ratio"] for n in networks for r in rows if (r["network"], r["way"]) == (n, way)
            ]
            for way in ways
        },
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time of a step ÷ bare", title="training, measured at every step")
    axes.legend(frameon=False)
    return figure


def _bars(axes: Axes, kinds: list[str], values: dict[str, list[float]]) -> None:
    """Groups of bars, one for each kind, on a log axis."""
    width = 0.85 / len(values)
    for rank, (name, heights) in enumerate(values.items()):
        at = [k + (rank - (len(values) - 1) / 2) * width for k in range(len(heights))]
        axes.bar(at, heights, width, color=COLORS[name], label=name)
        for x, height in zip(at, heights, strict=True):
            axes.annotate(
                f"{height:.2g}", (x, height), ha="center", va="bottom", fontsize=6, rotation=60
            )
    axes.set_yscale("log")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylim(top=2.5 * max(map(max, values.values())))


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
