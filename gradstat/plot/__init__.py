"""Figures of a `History`, or of several side by side: `ridge`, `curves`, `heatmap`.

Each returns a `matplotlib.figure.Figure` that belongs to no window, so they work without a
display; a notebook shows it, and ``figure.savefig(path)`` writes it.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D

from gradstat.bins import OCTAVES
from gradstat.diagnosis import diagnose
from gradstat.diagnosis.findings import COLORS, began
from gradstat.history import History
from gradstat.plot import data, panels
from gradstat.plot.data import Histories, Layers, Limits
from gradstat.record import NOUNS
from gradstat.util import Array, check_integer

_MAGNITUDES = ("mean_abs", "std", "var", "l1", "l2", "rms", "abs_max", "update_ratio")
_MAX_RIDGES = 60
_NORM = "norm"  # field of all layers together
_WIDE = 30.0  # ratio of a series' ends from which its axis is logarithmic
_MARKS = {"severe": "a severe finding begins", "warning": "a warning begins"}


def ridge(
    history: Histories,
    *,
    layers: Layers | None = None,
    steps_per_epoch: int | None = None,
    limits: Limits | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw each layer's histograms one behind the other, the newest in front.

    Over `LinearBins` the horizontal axis is the value; over `Log2Bins` it is its magnitude, by
    octave, without the zeros. At most 60 records are drawn, evenly spread, the newest among them.

    Args:
        history: one History, or several in a mapping of names or a sequence; each starts a row.
        layers: names of the rows to draw, by default of the first kind; a mapping titles each.
        steps_per_epoch: count in epochs of so many steps, and draw the last record of each.
        limits: ends of the horizontal axis, in values or log2 of magnitudes; by default all fits.
        figure: cleared and drawn into; by default a new one of a fitting size.

    Returns:
        The figure: a 3-D axes for each layer of each history, and the colour bar's.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no records, an unknown layer, more than 100 panels, limits that do not
            increase, both kinds of bins.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Linear(3, 2)
        >>> with gradstat.watch(model, bins=gradstat.LinearBins(30)) as w:
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> len(gradstat.plot.ridge(w.history).axes)
        2
    """
    named, titles = _checked("ridge", history, layers, steps_per_epoch, figure)
    data.check_panels("ridge", len(named), len(titles))
    limits = data.check_limits("ridge", limits)
    log2 = data.check_bins("ridge", named)
    noun = data.noun(named, titles)
    drawn = []
    for name, each in named.items():
        kept = data.select(each.steps, steps_per_epoch, _MAX_RIDGES)
        time = data.times(each.steps, steps_per_epoch)[kept]
        for layer, title in titles.items():
            drawn.append((panels.heading(name, title), time, *data.histograms(each, layer, kept)))
    if limits is None:
        limits = data.extent([panel[2:] for panel in drawn], symmetric=not log2)

    first = min(float(time[0]) for _, time, _, _ in drawn)
    last = max(float(time[-1]) for _, time, _, _ in drawn)
    span = (first, last if last > first else first + 1)
    color = ScalarMappable(Normalize(*span), "viridis")
    time_unit = "step" if steps_per_epoch is None else "epoch"
    heads, size = panels.fit_titles([head for head, *_ in drawn], panels.CELL - 0.1)
    title_lines = max(head.count("\n") + 1 for head in heads)
    figure, boxes, bar = panels.grid_3d(figure, len(named), len(titles), title_lines)
    for box, head, (_, time, counts, edges) in zip(boxes, heads, drawn, strict=True):
        ax: Axes3D = figure.add_axes(box, projection="3d")
        panels.style_3d(ax, limits, span, max(1, counts.max()))
        ax.set_title(head, fontsize=size, color=panels.INK, y=1.05, pad=0)
        ax.set_xlabel(panels.value_label(ax.xaxis, noun, log2=log2), labelpad=-1)
        ax.set_ylabel(time_unit, labelpad=-1)
        ax.set_zlabel("count", labelpad=1)
        panels.add_ridges(ax, time, counts, edges, limits, color.to_rgba(time))
    colorbar = panels.add_colorbar(figure, color, time_unit, figure.add_axes(bar))
    colorbar.locator = panels.whole_numbers(5)
    return figure


def curves(
    history: Histories,
    field: str = "mean_abs",
    *,
    split: str | None = None,
    layers: Layers | None = None,
    steps_per_epoch: int | None = None,
    average: int = 1,
    log: bool | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw a statistic of each layer, or a scalar such as the loss, against time.

    Of more than eight lines the first, the last and those that stand out at some time have a colour
    and a name; the others are grey. A scalar, or the norm of all layers together, has one panel
    with a line for each history, and triangles where severe findings and warnings begin.

    Args:
        history: as for `ridge`.
        field: a field of `Statistics`, ``"mean_abs"``, the mean of magnitudes,
            ``"update_ratio"`` or ``"dead_units"`` as of `History`, one of `History.scalars`, or
            ``"norm"``, that of all layers of the first kind.
        split: ``"layer"`` draws a panel for each layer with a line for each history (the default
            for several), ``"history"`` a panel for each history with a line for each layer.
        layers: as for `ridge`.
        steps_per_epoch: as for `ridge`.
        figure: as for `ridge`.
        average: draw the mean of so many records in a row.
        log: logarithmic vertical axis; by default for the fields that are magnitudes.

    Returns:
        The figure. Panels split by history share their vertical axis.

    Raises:
        TypeError, ValueError: as `ridge`; an unknown field or split, ``average`` < 1.
    """
    named, titles = _checked("curves", history, layers, steps_per_epoch, figure, field)
    check_integer("curves", "average", average, 1)
    if field == _NORM or any(field in each.scalars for each in named.values()):
        return _series_curves(named, field, steps_per_epoch, average, log, figure)
    data.check_field("curves", field)
    if split is None:
        split = "layer" if len(named) > 1 else "history"
    if split not in ("layer", "history"):
        raise ValueError(f"curves() needs split 'layer' or 'history'; split is {split!r}")
    by_layer = split == "layer"
    data.check_panels("curves", 1, len(titles) if by_layer else len(named))
    log = field in _MAGNITUDES if log is None else log
    heads, keys, drawn = list(map(data.literal, named)), list(titles.values()), []
    for each in named.values():
        time = data.block_last(data.times(each.steps, steps_per_epoch), average)
        series = [data.block_mean(data.values(each, layer, field), average) for layer in titles]
        drawn.append([(time, values) for values in series])
    if by_layer:
        heads, keys, drawn = keys, heads, list(map(list, zip(*drawn, strict=True)))
    keys = [panels.shorten(key, panels.KEY_INCHES, 9) for key in keys]
    marked = panels.standing_out([[value for _, value in lines] for lines in drawn], log=log)
    colors = panels.line_colors(len(keys), marked, ordered=not by_layer)
    in_key = marked or range(len(keys))
    keys = [keys[i] for i in in_key]
    columns, size = (4, (2.7, 2.2)) if by_layer else (2, (3.9, 3.0))
    margin = 0.5 + max(0.4, panels.longest_inches(keys, 9))
    figure, axes = panels.grid_2d(
        figure, len(heads), columns, size, margin=margin, sharex=True, sharey=not by_layer
    )
    for ax, lines in zip(axes, drawn, strict=True):
        panels.style_2d(ax)
        for (time, value), color in zip(lines, colors, strict=True):
            panels.add_line(ax, time, value, color, log=log)
    label = panels.field_label(field, data.noun(named, titles))
    panels.label_axes(figure, panels.time_label(steps_per_epoch), label)
    for ax in axes:
        panels.label_log(ax)
    if any(keys):
        panels.add_key(figure, keys, [colors[i] for i in in_key])
    panels.add_titles(figure, axes, heads)
    return figure


def heatmap(
    history: Histories,
    field: str = "std",
    *,
    layers: Layers | None = None,
    steps_per_epoch: int | None = None,
    log: bool | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw a statistic as colour, layer against time, or whole histograms against time.

    With ``field="counts"`` each layer has a panel: the vertical axis is the magnitude, by octave,
    the colour the share of its finite elements there (zeros, which have no octave, stay undrawn).
    A layer whose gradient vanishes sinks. Long histories are averaged to at most 200 columns.

    Args:
        history: as for `ridge`.
        field: as for `curves`, but for scalars and ``"norm"``; or ``"counts"``, of `Log2Bins`.
        layers: as for `ridge`.
        steps_per_epoch: as for `ridge`.
        figure: as for `ridge`.
        log: logarithmic colour; by default for the fields that are magnitudes.

    Returns:
        The figure: an axes for each history, or for each layer of each history, and the colour
        bar's. All panels share one colour scale, and with ``"counts"`` one vertical axis.

    Raises:
        TypeError, ValueError: as `ridge`; an unknown field, ``"counts"`` of `LinearBins`.
    """
    named, titles = _checked("heatmap", history, layers, steps_per_epoch, figure, field)
    data.check_field("heatmap", field, "counts")
    if field == "counts":
        if not data.check_bins("heatmap", named):
            raise ValueError("heatmap() needs Log2Bins for 'counts'; history is over LinearBins")
        data.check_panels("heatmap", len(named), len(titles))
        return _counts_heatmap(named, titles, steps_per_epoch, log, figure)
    images = []
    for each in named.values():
        size = math.ceil(len(each) / data.MAX_COLUMNS)
        time = data.block_mean(data.times(each.steps, steps_per_epoch), size)
        means = [data.block_mean(data.values(each, layer, field), size) for layer in titles]
        images.append((time, np.stack(means)))
    log = field in _MAGNITUDES if log is None else log
    everything = np.concatenate([image.ravel() for _, image in images])
    norm = panels.color_norm(everything, log=log)
    height = min(12.0, max(1.6, 0.6 + 0.3 * len(titles)))
    names = [panels.shorten(title, panels.KEY_INCHES, 8) for title in titles.values()]
    margin = 0.3 + max(0.6, panels.longest_inches(names, 8))
    figure, axes = panels.grid_2d(figure, len(named), 2, (4.2, height), margin=margin, sharey=True)
    for ax, (time, image) in zip(axes, images, strict=True):
        panels.style_2d(ax)
        rows = np.arange(len(titles) + 1) - 0.5
        drawn = panels.add_image(ax, time, rows, image, norm, colormaps["viridis"])
        shown = range(0, len(titles), math.ceil(len(titles) / 40))
        ax.set_yticks(shown, [names[i] for i in shown])
    axes[0].invert_yaxis()
    panels.label_axes(figure, panels.time_label(steps_per_epoch), "")
    panels.add_colorbar(figure, drawn, panels.field_label(field, data.noun(named, titles)), axes)
    panels.add_titles(figure, axes, list(map(data.literal, named)))
    return figure


def _checked(
    function: str,
    history: Histories,
    layers: Layers | None,
    steps_per_epoch: int | None,
    figure: Figure | None,
    field: str | None = None,
) -> tuple[dict[str, History], dict[str, str]]:
    """The histories by name, and the titles of layers, from arguments that all figures have."""
    if figure is not None and not isinstance(figure, Figure):
        raise TypeError(
            f"{function}() needs a matplotlib Figure; figure is {type(figure).__name__}"
        )
    named = data.check_histories(function, history)
    if steps_per_epoch is not None:
        check_integer(function, "steps_per_epoch", steps_per_epoch, 1)
    return named, data.check_layers(function, named, layers, field)


def _series_curves(
    named: dict[str, History],
    field: str,
    steps_per_epoch: int | None,
    average: int,
    log: bool | None,
    figure: Figure | None,
) -> Figure:
    """`curves` of one number a step: a line for each history, marks where findings begin."""
    names = list(map(data.literal, named))
    lines = [_series(each, field) for each in named.values()]
    # The worst last, over the others.
    found = [each for history in named.values() for each in diagnose(history)[::-1]]
    found = [each for each in found if each.severity in _MARKS]
    marked = {each.severity for each in found}
    shown = {name: to_rgba(COLORS[each]) for each, name in _MARKS.items() if each in marked}
    beside = panels.longest_inches([*names, *shown], 9)
    figure, (ax,) = panels.grid_2d(figure, 1, 1, (5.2, 3.0), margin=0.5 + max(0.4, beside))
    panels.style_2d(ax)
    if log is None:
        everything = np.concatenate([values for _, values in lines])
        known = everything[np.isfinite(everything)]
        log = bool(len(known) and known.min() > 0 and known.max() > _WIDE * known.min())
    colors = panels.line_colors(len(names), ordered=False)
    for (steps, values), color in zip(lines, colors, strict=True):
        times = data.times(steps, steps_per_epoch)
        if len(times):
            times, values = data.block_last(times, average), data.block_mean(values, average)
            panels.add_line(ax, times, values, color, log=log)
    at_axis = ax.get_xaxis_transform()
    for each in found:
        time = data.times(np.array([began(each)]), steps_per_epoch)
        (mark,) = ax.plot(time, [0.0], "^", color=COLORS[each.severity], transform=at_axis)
        mark.set(clip_on=False, zorder=5)
    label = data.literal(field)
    if all(field not in each.scalars for each in named.values()):  # it is the norm
        label = panels.field_label(field, NOUNS[next(iter(named.values())).kinds[0]])
    panels.label_axes(figure, panels.time_label(steps_per_epoch), label)
    if any(names):
        panels.add_key(figure, names, colors, shown)
    elif shown:
        panels.add_key(figure, [], [], shown)
    panels.label_log(ax)
    return figure


def _series(history: History, field: str) -> tuple[Array, Array]:
    if field in history.scalars:
        return history.scalar(field)
    if field == _NORM:
        return history.steps, history.norm(history.kinds[0])
    return np.empty(0, np.int64), np.empty(0)


def _counts_heatmap(
    named: dict[str, History],
    titles: dict[str, str],
    steps_per_epoch: int | None,
    log: bool | None,
    figure: Figure | None,
) -> Figure:
    """`heatmap` of whole histograms: the share of the elements in each octave, against time."""
    drawn = []
    for name, each in named.items():
        size = math.ceil(len(each) / data.MAX_COLUMNS)
        time = data.block_mean(data.times(each.steps, steps_per_epoch), size)
        for layer, title in titles.items():
            drawn.append((panels.heading(name, title), time, data.octave_shares(each, layer, size)))
    everything = np.concatenate([shares for _, _, shares in drawn])
    norm = panels.color_norm(everything, log=bool(log))
    cmap = panels.density_colormap()
    figure, axes = panels.grid_2d(
        figure, len(titles), 4, (2.5, 2.1), groups=len(named), sharex=True, sharey=True
    )
    for ax, (_, time, shares) in zip(axes, drawn, strict=True):
        panels.style_2d(ax)
        image = panels.add_image(ax, time, OCTAVES, shares.T, norm, cmap)
    # Stray elements far below would squeeze the picture: show octaves that ever hold one in 100.
    shown = np.nan_to_num(everything).max(0, keepdims=True) > 0.01
    axes[0].set_ylim(*data.extent([(shown, OCTAVES[None])], symmetric=False))
    panels.powers_of_two(axes[0].yaxis, 6)
    label = f"|{data.noun(named, titles)}|"
    panels.label_axes(figure, panels.time_label(steps_per_epoch), label)
    panels.add_colorbar(figure, image, "share of elements", axes)
    panels.add_titles(figure, axes, [head for head, *_ in drawn])
    return figure
