"""The charts and tables that a run in Weights & Biases gets beside its histograms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradstat.history import History
from gradstat.integrations.viewers import chosen_steps, derived, group, layers_of, rows, scalars
from gradstat.record import NOUNS, UPDATE
from gradstat.util import Array

MAX_POINTS = 10_000  # of one custom chart
_COLUMNS = ("layer", "numel", "mean", "std", "rms", "l2", "zero_fraction", "nonfinite")


def summary(history: History) -> dict[str, object]:
    """Tables of the newest record and charts of the whole run, by name.

    Args:
        history: with one record at least.
    """
    import wandb

    found: dict[str, object] = {
        f"{group(kind)}/layers": wandb.Table(columns=list(_COLUMNS), data=table)
        for kind, table in _newest(history).items()
    }
    for name, title, layers, values in _charts(history):
        xs, ys, keys = _lines(history, layers, values)
        if keys:
            found[name] = wandb.plot.line_series(xs, ys, keys, title, "step")
    return found


def _charts(history: History) -> Iterator[tuple[str, str, list[str], Array]]:
    """Name, title, layers and values, ``(S, L)``, of each chart; NaN where there is nothing."""
    log_rms = _log10(history["rms"])
    for kind in dict.fromkeys(history.kinds):
        layers = layers_of(history, kind)
        title = f"log10 rms of each layer's {NOUNS[kind]}"
        yield f"{group(kind)}/rms", title, list(layers.values()), log_rms[:, list(layers)]
    for kind, name, names, values in derived(history):
        title = "share of each layer's units that are dead"
        if kind == UPDATE:
            values, title = _log10(values), "log10 of each layer's update / parameter"
        yield f"{group(kind)}/{name}", title, names, values


def _log10(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        logarithm: Array = np.log10(x)
    return logarithm


def _lines(
    history: History, layers: list[str], values: Array
) -> tuple[list[list[int]], list[list[float]], list[str]]:
    """Steps and finite values of each layer that has any, 10,000 points in all."""
    most = max(1, MAX_POINTS // len(layers))
    kept = np.searchsorted(history.steps, chosen_steps("log", history, most))
    steps, values = history.steps[kept], values[kept]
    xs, ys, keys = [], [], []
    for layer, line in zip(layers, values.T, strict=True):
        known = np.isfinite(line)
        if known.any():
            xs.append(steps[known].tolist())
            ys.append(line[known].tolist())
            keys.append(layer)
    return xs, ys, keys


def _newest(history: History) -> dict[str, list[list[object]]]:
    """Rows of `_COLUMNS` by kind; NaN where a number is undefined."""
    tables: dict[str, list[list[object]]] = {kind: [] for kind in history.kinds}
    for (kind, layer), statistics, _ in rows(history, int(history.steps[-1])):
        named = scalars(statistics)
        numbers = [named.get(name, math.nan) for name in _COLUMNS[2:]]
        tables[kind].append([layer, int(statistics.numel), *numbers])
    return tables
