"""Curves of one number a step: scalars such as the loss, and the norm of all layers."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradstat.arrays import Array
from gradstat.diagnosis import diagnose
from gradstat.history import History
from gradstat.plot import data, labels, panels

NORM = "norm"
_WIDE = 30.0  # ratio of a series' ends from which its axis is logarithmic
_MARKS = {"severe": "#c2182b", "warning": "#c77700"}


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
    names = list(named)
    lines = [_series(each, field) for each in named.values()]
    figure, (ax,) = panels.grid_2d(
        figure, 1, 1, (5.2, 3.0), margin=0.5 + max(0.4, labels.longest_inches(names, 9))
    )
    panels.style_2d(ax)
    everything = np.concatenate([values for _, values in lines])
    log = _spans_much(everything) if log is None else log
    colors = panels.line_colors(len(names), ordered=False)
    for (steps, values), color in zip(lines, colors, strict=True):
        time = steps.astype(np.float64)
        if steps_per_epoch is not None:
            time = (time + 1) / steps_per_epoch
        if len(time):
            time, values = data.block_last(time, average), data.block_mean(values, average)
            panels.add_line(ax, time, values, color, log=log)
    for each in named.values():
        _mark_findings(ax, each, steps_per_epoch)
    labels.label_axes(figure, labels.time_label(steps_per_epoch), field)
    if any(names):
        labels.add_key(figure, names, colors)
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


def _mark_findings(ax: Axes, history: History, steps_per_epoch: int | None) -> None:
    """A triangle on the time axis where a severe finding or a warning begins."""
    for finding in diagnose(history):
        if finding.severity in _MARKS:
            step = finding.numbers.get("first_step", float(finding.steps[0]))
            time = step if steps_per_epoch is None else (step + 1) / steps_per_epoch
            ax.plot(
                [time],
                [0.0],
                transform=ax.get_xaxis_transform(),
                color=_MARKS[finding.severity],
                marker="^",
                markersize=6,
                linestyle="",
                clip_on=False,
                zorder=5,
            )
