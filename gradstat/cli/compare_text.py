"""What ``gradstat compare`` prints and draws of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gradstat.arrays import Array
from gradstat.cli.text import (
    MOST_LAYERS,
    bar,
    ends_of,
    findings,
    heading,
    late,
    number,
    percent,
    plain,
    ratio,
    series_of,
    some,
    table,
)
from gradstat.diagnosis.run import median
from gradstat.escaping import escaped
from gradstat.files import replacing
from gradstat.history import History
from gradstat.history.arguments import check_history, first_rows
from gradstat.record import PARAM, UNIT, UPDATE

_MOST_LINES = 10  # layers that a figure's key has room for


def compare(runs: Mapping[str, History], *, every_layer: bool = False) -> str:
    """Two runs layer by layer: rms of each, their ratio, first over last layer, and findings.

    Of several kinds of rows the first that both runs have is compared. So are update ratios and
    dead units where both have them.

    Args:
        runs: two histories with records, by name.
        every_layer: also where a network has more layers than a screen has lines.

    Returns:
        Text.

    Raises:
        ValueError: a history without records or layers.
    """
    for history in runs.values():
        check_history("compare", history)
    one, other = runs
    common = next((kind for kind in runs[one].kinds if kind in runs[other].kinds), None)
    typical = {
        name: _typical(
            history.select(common) if common not in (None, history.kinds[0]) else history
        )
        for name, history in runs.items()
    }
    layers = list(dict.fromkeys(layer for values in typical.values() for layer in values))
    shown = layers if every_layer else some(layers, MOST_LAYERS)
    ends = ends_of([x for values in typical.values() for x in values.values()])
    rows: list[tuple[str, ...]] = [("rms, median of all records", "A", "", "B", "", "B / A")]
    for layer in shown:
        a, b = (typical[name].get(layer, math.nan) for name in (one, other))
        rows.append(
            (escaped(layer), number(a), bar(a, *ends), number(b), bar(b, *ends), ratio(b, a))
        )
    shares = [_first_over_last(list(values.values())) for values in typical.values()]
    rows.append(("first layer / last layer", ratio(shares[0], 1), "", ratio(shares[1], 1), "", ""))
    rows += _derived(list(runs.values()))
    a_series, b_series = (series_of(history) for history in runs.values())
    for series in a_series:
        if series in b_series:
            a, b = late(a_series[series]), late(b_series[series])
            what = f"{escaped(series)}, lately"
            rows.append((what, plain(a), "", plain(b), "", ratio(b, a)))
    lines = [f"A  {heading(one, runs[one])}", f"B  {heading(other, runs[other])}", ""]
    lines += table(rows)
    if not set(typical[one]) & set(typical[other]):
        lines.append("A and B have no layer in common")
    if len(shown) < len(layers):
        lines.append(f"{len(layers) - len(shown)} layers between them are left out (--all)")
    for name, history in runs.items():
        found = [each for each in history.diagnose() if each.severity != "note"]
        lines += ["", f"{'A' if name == one else 'B'}  {escaped(name)}:"]
        lines.append(findings(found, most=2, indent="   "))
    return "\n".join(lines)


def draw(runs: Mapping[str, History], path: Path) -> None:
    """Write the curves of several runs: mean |gradient| of some of the layers against time.

    Args:
        runs: histories with records, by name.
        path: of the file, which appears whole or not at all; its suffix is the format.

    Raises:
        OSError: it cannot be written.
        ValueError: an unknown format.
    """
    from gradstat import plot

    layers = list(dict.fromkeys(row for history in runs.values() for row in first_rows(history)))
    average = max(1, max(len(history) for history in runs.values()) // 100)
    figure = plot.curves(
        runs,
        split="history",
        layers=some(layers, _MOST_LINES),
        average=average,
    )
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:] or "png")


def _typical(history: History) -> dict[str, float]:
    """Median rms of each layer of the first kind over all records."""
    rms: Array = median(history["rms"])
    typical = dict(zip(history.layers, rms.tolist(), strict=True))
    return {row: typical[row] for row in first_rows(history)}


def _first_over_last(typical: Sequence[float]) -> float:
    present = [rms for rms in typical if rms > 0]
    return present[0] / present[-1] if present else math.nan


def _derived(runs: Sequence[History]) -> list[tuple[str, ...]]:
    """Lines on two runs' updates and units, medians over all records, where both have them."""
    rows: list[tuple[str, ...]] = []
    if all({UPDATE, PARAM} <= set(run.kinds) for run in runs):
        a, b = (float(median(median(run.update_ratio()))) for run in runs)
        rows.append(("update / parameter, median", number(a), "", number(b), "", ratio(b, a)))
    if all(UNIT in run.kinds for run in runs):
        a, b = (float(np.fmax.reduce(median(run.dead_units()))) for run in runs)
        rows.append(("dead units, most in a layer", percent(a), "", percent(b), "", ""))
    return rows
