"""Curves of one number a step: scalars such as the loss, and the norm of all layers."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from gradstat.arrays import Array
from gradstat.diagnosis import diagnose
from gradstat.history import History
from gradstat.plot import data, labels, panels
from gradstat.plot.labels import Color
from gradstat.record import NOUNS

NORM = "norm"
_WIDE = 30.0  # ratio of a series' ends from which its axis is logarithmic
_MARKS = {"severe": to_rgba("#c2182b"), "warning": to_rgba("#c77700")}
_MARK_NAMES = {
    "a severe finding begins": _MARKS["severe"],
    "a warning begins": _MARKS["warning"],
}


def is_series(named: dict[str, History], field: str) -> bool:
    """Whether one of the histories has such a series."""
    return field == NORM or any(field in each.scalars for each in named.values())


def series_curves(
    named: dict[str, History],
    field: str,
    steps_per_epoch: int | None,
    average: int,
    log: bool | None,
    figure: Figure | None,
) -> Figure:
    """Draw a line for each history, and a mark where each of its findings begins.

    Args:
        named: histories with records.
        field: as `is_series` knows.
        steps_per_epoch: as for `plot.curves`, and so are the others.
        average: of so many values in a row.
        log: by default where the values span much.
        figure: cleared and drawn into.
    """
    names = list(map(labels.literal, named))
    lines = [_series(each, field) for each in named.values()]
    marks = [mark for each in named.values() for mark in _marks(each, steps_per_epoch)]
    drawn = {color for _, color in marks}
    shown = {name: color for name, color in _MARK_NAMES.items() if color in drawn}
    beside = labels.longest_inches([*names, *shown], 9)
    figure, (ax,) = panels.grid_2d(figure, 1, 1, (5.2, 3.0), margin=0.5 + max(0.4, beside))
    panels.style_2d(ax)
    everything = np.concatenate([values for _, values in lines])
    log = _spans_much(everything) if log is None else log
    colors = panels.line_colors(len(names), ordered=False)
    for (steps, values), color in zip(lines, colors, strict=True):
        times = steps.astype(np.float64)
        if steps_per_epoch is not None:
            times = (times + 1) / steps_per_epoch
        if len(times):
            times, values = data.block_last(times, average), data.block_mean(values, average)
            panels.add_line(ax, times, values, color, log=log)
    for time, color in marks:
        ax.plot(
            [time],
            [0.0],
            transform=ax.get_xaxis_transform(),
            color=color,
            marker="^",
            markersize=6,
            linestyle="",
            clip_on=False,
            zorder=5,
        )
    is_norm = all(field not in each.scalars for each in named.values())
    label = labels.field_label(field, NOUNS[next(iter(named.values())).kinds[0]])
    labels.label_axes(
        figure, labels.time_label(steps_per_epoch), label if is_norm else labels.literal(field)
    )
    if any(names):
        labels.add_key(figure, names, colors, shown)
    elif shown:
        labels.add_key(figure, [], [], shown)
    labels.label_log(ax)
    return figure


def _series(history: History, field: str) -> tuple[Array, Array]:
    if field == NORM and field not in history.scalars:
        return history.steps, history.norm(history.kinds[0])
    if field not in history.scalars:
        return np.empty(0, np.int64), np.empty(0)
    return history.scalar(field)


def _spans_much(values: Array) -> bool:
    known = values[np.isfinite(values)]
    return bool(len(known) and known.min() > 0 and known.max() > _WIDE * known.min())


def _marks(history: History, steps_per_epoch: int | None) -> list[tuple[float, Color]]:
    """Where each severe finding or warning begins, the worst last, and the colour of its mark."""
    marks = []
    for finding in diagnose(history):
        if finding.severity in _MARKS:
            step = finding.numbers.get("first_step", float(finding.steps[0]))
            time = step if steps_per_epoch is None else (step + 1) / steps_per_epoch
            marks.append((time, _MARKS[finding.severity]))
    return marks[::-1]
